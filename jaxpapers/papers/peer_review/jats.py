"""JATS XML with review material as sub-articles: eLife, PLOS and what follows them.

The XML is untrusted: no external entity is read, a document that declares entities is
refused, and size, depth and number of elements are bounded.
"""

import html.entities
import re
from typing import Any, NamedTuple
from xml.parsers import expat

from jaxpapers.papers.peer_review.units import Block, reviewer_in

LETTERS = (
    "decision-letter", "article-commentary", "editor-report", "referee-report",
    "aggregated-review-documents", "peer-review", "review-article", "reviewer-report",
)  # fmt: skip
RESPONSES = (
    "reply",
    "author-comment",
    "response",
    "author-response",
    "rebuttal-letter",
)
MOST_BYTES = 32 * 2**20
MOST_ELEMENTS = 500_000
MOST_DEPTH = 200
# Elements that end a paragraph.
BLOCKS = {
    "p", "title", "article-title", "list", "list-item", "disp-quote", "boxed-text", "sec",
    "label", "caption", "fig", "media", "table-wrap", "table", "tr", "td", "th",
    "disp-formula", "sub-article", "front-stub", "front", "body", "back", "article-id",
    "contrib", "aff", "role", "pub-date", "license", "license-p", "abstract", "ref",
    "related-object", "attrib", "def-item", "verse-line", "preformat", "response",
    "article-meta", "journal-meta", "title-group", "subject", "kwd", "permissions",
    "object-id", "fn", "name", "string-name", "institution", "email", "journal-title",
}  # fmt: skip


class Part(NamedTuple):
    """A sub-article: its type, its title, and which reviewer wrote it (-1: not said)."""

    kind: str
    title: str
    reviewer: int


class Source(NamedTuple):
    """Character data of a document and its paragraphs."""

    text: str
    blocks: list[Block]
    paper: dict[str, str]
    warnings: list[str]


def read(data: bytes) -> Source:
    """Text, paragraphs and metadata of a JATS article.

    Args:
      data: the XML.

    Returns:
      The text is all character data in order, paragraphs apart by blank lines.

    Raises:
      ValueError: no XML, declared entities, too large, or no sub-article with reviews.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(
            f"the XML has {len(data):,} bytes; at most {MOST_BYTES:,} are read"
        )
    reader = _Reader()
    try:
        reader.parser.Parse(data, True)
    except expat.ExpatError as e:
        raise ValueError(f"no well-formed XML: {e}") from e
    return reader.source()


class _Reader:
    """Handlers of one document."""

    def __init__(self) -> None:
        self.parser = parser = expat.ParserCreate()
        parser.StartElementHandler = self.start
        parser.EndElementHandler = self.end
        parser.CharacterDataHandler = self.characters
        parser.EntityDeclHandler = self.refuse
        parser.SkippedEntityHandler = self.skipped
        # External subsets and entities are not read: their handler only says so.
        parser.ExternalEntityRefHandler = lambda *names: 1
        parser.SetParamEntityParsing(expat.XML_PARAM_ENTITY_PARSING_NEVER)
        parser.buffer_text = True
        self.done: list[str] = []
        self.pieces: list[str] = []  # Of the open paragraph.
        self.size = 0
        self.stack: list[str] = []
        self.kinds: list[str] = []
        self.run_start = 0
        self.styled = 0
        self.letters = 0
        self.elements = 0
        self.raw: list[tuple[int, int, str, float, tuple[str, ...], int]] = []
        self.part = -1
        self.outer: list[int] = []  # Sub-articles around the open one.
        self.id_type = ""
        self.paper: dict[str, str] = {}

    def refuse(self, name: str, *rest: Any) -> None:
        raise ValueError(
            f"the XML declares the entity {name!r}; files that declare entities are not "
            "read"
        )

    def skipped(self, name: str, is_parameter: int) -> None:
        if not is_parameter:
            self.characters(html.entities.html5.get(f"{name};", f"&{name};"))

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.elements += 1
        if self.elements > MOST_ELEMENTS or len(self.stack) >= MOST_DEPTH:
            raise ValueError(
                f"the XML has more than {MOST_ELEMENTS:,} elements or is deeper than "
                f"{MOST_DEPTH}"
            )
        name = name.rpartition(":")[2]
        if name in BLOCKS:
            self.flush()
        self.stack.append(name)
        if name == "sub-article":
            self.kinds.append(attributes.get("article-type", ""))
            self.outer.append(self.part)
            self.part = len(self.kinds) - 1
        if name == "article-id" and len(self.stack) < 5:
            self.id_type = attributes.get("pub-id-type", "")

    def end(self, name: str) -> None:
        name = name.rpartition(":")[2]
        if name in BLOCKS:
            self.flush()
        self.stack.pop()
        if name == "sub-article":
            self.part = self.outer.pop()

    def characters(self, text: str) -> None:
        if self.run_start == self.size and not text.strip():
            return  # Indentation between elements.
        self.pieces.append(text)
        self.size += len(text)
        count = sum(map(str.isalnum, text))
        self.letters += count
        if "italic" in self.stack or "bold" in self.stack:
            self.styled += count

    def flush(self) -> None:
        """Ends the paragraph that is open."""
        if self.size == self.run_start:
            return
        share = self.styled / self.letters if self.letters else 0.0
        self.raw.append(
            (self.run_start, self.size, self.stack[-1] if self.stack else "", share,
             tuple(self.stack), self.part)
        )  # fmt: skip
        text = "".join(self.pieces)
        self.metadata(text if self.part < 0 else "")
        self.done += [text, "\n\n"]
        self.pieces = []
        self.size += 2
        self.run_start, self.styled, self.letters = self.size, 0, 0

    def metadata(self, text: str) -> None:
        where = self.stack[-1] if self.stack else ""
        if where == "article-id" and self.id_type == "doi":
            self.paper.setdefault("doi", text.strip())
        elif where == "article-title":
            self.paper.setdefault("title", " ".join(text.split()))
        elif (where == "year" or "pub-date" in self.stack) and text.strip():
            found = re.search(r"\b(1[89]|20)\d\d\b", text)
            if found:
                self.paper.setdefault("year", found[0])

    def source(self) -> Source:
        """Blocks with their side; see ``read``."""
        text = "".join(self.done)
        parts = self._parts(text)
        if not any(p.kind in (*LETTERS, *RESPONSES) for p in parts):
            found = sorted({p.kind for p in parts}) or "none"
            raise ValueError(
                "the article has no sub-article with reviews or replies: expected "
                f"article-type one of {(*LETTERS, *RESPONSES)}, got {found}"
            )
        unknown = sorted(
            {p.kind for p in parts if p.kind not in (*LETTERS, *RESPONSES)}
        )
        warnings = [
            f"sub-article of type {k!r} is kept and not parsed" for k in unknown
        ]
        rounds = _rounds(parts)
        blocks = []
        for start, end, _, styled, stack, part in self.raw:
            a, b = _trim(text, start, end)
            if a == b:
                continue
            side, round_, reviewer = "cover", 0, -1
            if part >= 0:
                own = parts[part]
                round_, reviewer = rounds[part], own.reviewer
                side = (
                    "response" if own.kind in RESPONSES
                    else "letter" if own.kind in LETTERS else "cover"
                )  # fmt: skip
                if "front-stub" in stack:
                    side = "heading"
                elif "boxed-text" in stack and side == "letter":
                    side = "note"
            figure = bool({"fig", "caption", "media", "table-wrap"} & set(stack))
            blocks.append(Block(a, b, side, styled, round_, reviewer, figure))
        return Source(text, blocks, self.paper, warnings)

    def _parts(self, text: str) -> list[Part]:
        """Sub-articles with title and reviewer."""
        titles: dict[int, list[str]] = {}
        for start, end, _, _, stack, part in self.raw:
            if "front-stub" in stack:
                titles.setdefault(part, []).append(text[start:end].strip())
        parts = []
        for i, kind in enumerate(self.kinds):
            words = " | ".join(titles.get(i, []))
            reviewer = -1
            if kind in ("referee-report", "reviewer-report", "peer-review"):
                before = sum(p.reviewer > 0 for p in parts)
                named = reviewer_in(words)
                reviewer = before + 1 if named is None else named
            elif kind == "editor-report":
                reviewer = 0
            parts.append(Part(kind, words, reviewer))
        return parts


def _rounds(parts: list[Part]) -> list[int]:
    """Round of each sub-article: of its title's number, else letters after replies open
    the next one."""
    rounds, current, answered = [], 1, False
    for part in parts:
        found = re.search(
            r"(?:decision letter|review|revision|version|round)\s*#?\s*(\d)\s*(?:\||$)",
            part.title, re.IGNORECASE,
        )  # fmt: skip
        plain = part.kind in ("decision-letter", "aggregated-review-documents")
        if (
            found
            and (plain or part.kind in RESPONSES)
            and "decision" in part.title.lower()
        ):
            current = max(current, int(found[1]) + 1)
            answered = part.kind in RESPONSES
        elif part.kind in RESPONSES:
            answered = True
        elif answered and part.kind in LETTERS and part.kind != "editor-report":
            current, answered = current + 1, False
        rounds.append(current)
    return rounds


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    return start, max(start, start + len(part.strip()))
