"""Plain text of a peer review file: pages, the journal's headings, replies between.

The text comes from any PDF tool: pages apart by form feeds, lines that repeat on pages,
page numbers, hyphenated breaks. Offsets are those of the text as it was given.
"""

import re
from collections import Counter

from jaxpapers.papers.peer_review import units
from jaxpapers.papers.peer_review.units import Block

MOST_CHARACTERS = 8 * 2**20
_AFTER = r"\s*[:.\-–—]*\s*$"
# A round of reports: "REVIEWER COMMENTS", "Reviewers' comments, second round:".
REPORTS = re.compile(
    r"^\W{0,3}(?:(?:first|second|third|fourth|initial|\d(?:st|nd|rd|th))\s+round\s*(?:of)?\s*"
    r"(?:review)?\s*[:\-–—]?\s*)?(?:reviewer|referee)s?\s*['’`]?\s*s?['’`]?\s*"
    r"(?:comments?|reports?|remarks|expertise)(?:\s+to\s+(?:the\s+)?authors?)?"
    r"(?:\s*(?:\([^)]*\)|[,:\-–—]\s*(?:first|second|third|\d(?:st|nd|rd|th))\s+"
    r"(?:round|review|version)[^\n]{0,20}))?" + _AFTER,
    re.IGNORECASE,
)
RESPONSE = re.compile(
    r"^\W{0,3}(?:point[\s-]*by[\s-]*point\s+(?:response|reply|rebuttal|responses|replies)|"
    r"(?:authors?['’]?s?\s+)?(?:response|reply|replies|responses|rebuttal|answers?)\s+"
    r"(?:letter|to\s+(?:the\s+)?(?:reviewers?|referees?|editors?)['’]?s?"
    r"(?:\s+(?:and\s+)?(?:reviewers?|comments?|reports?|remarks))*)|"
    r"authors?['’]?s?\s+(?:response|reply|rebuttal)(?:\s+letter)?|rebuttal(?:\s+letter)?)"
    r"(?:\s*(?:\([^)]*\)|to\s+the\s+(?:reviewers?|referees?)['’]?s?\s*(?:comments?)?|"
    r"[,:\-–—]?\s*(?:first|second|third|\d(?:st|nd|rd|th))\s+(?:round|revision)))*"
    + _AFTER,
    re.IGNORECASE,
)
COVER = re.compile(r"^\W{0,3}(?:transparent\s+)?peer\s*review\s*file\b", re.IGNORECASE)
OPEN_END = re.compile(
    r"\b(?:fig(?:ure|s|ures)?|tables?|sections?|lines?|panels?|parts?|equations?|eqs?|"
    r"refs?|pages?|of|the|in|and|or|to|than|at|by|with)\.?\Z",
    re.IGNORECASE,
)
PAGE_NUMBER = re.compile(
    r"^\s*(?:page\s+)?[-–—]?\s*\d{1,4}\s*[-–—]?(?:\s*(?:/|of)\s*\d{1,4})?\s*$",
    re.IGNORECASE,
)
DOI = re.compile(r"\b10\.\d{4,9}/[^\s\"<>]+")


def is_journal(text: str) -> bool:
    """Whether any line heads a round, a report or a response."""
    for line in text.splitlines():
        if REPORTS.match(line) or RESPONSE.match(line) or units.reviewer_heading(line):
            return True
    return False


def read(text: str) -> tuple[str, list[Block], dict[str, str], list[str]]:
    """(text, paragraphs with their side and round, metadata, warnings).

    Raises:
      ValueError: too long, or no heading of the journal's grammar: names the first lines.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"the text has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read"
        )
    if not is_journal(text):
        first = [line.strip() for line in text.splitlines() if line.strip()][:3]
        raise ValueError(
            "unrecognised layout: no line like 'REVIEWER COMMENTS', 'Reviewer #1 ("
            "Remarks to the Author):' or 'Response to reviewers'; the text begins "
            f"{first}"
        )
    lines = _lines(text)
    noise = _noise(text, lines)
    blocks: list[Block] = []
    side, round_, answered = "cover", 0, False
    for start, end, noisy in _paragraphs(text, lines, noise):
        part = text[start:end]
        # Of the paragraph that noise has cut.
        last = next((i for i in reversed(range(len(blocks)))
                     if blocks[i].side != "noise"), None)  # fmt: skip
        before = last if blocks and blocks[-1].side == "noise" else None
        if noisy:
            blocks.append(Block(start, end, "noise", round=round_))
            continue
        one = "\n" not in part and len(part) < 140
        # "Reviewer #1" heads a report of this round, or its answers in a response.
        if one and REPORTS.match(part):
            # In a response it heads the reports that are answered.
            if side != "response" or answered:
                round_, side, answered = round_ + 1, "letter", False
            blocks.append(Block(start, end, "heading", round=round_))
        elif one and RESPONSE.match(part):
            side, round_, answered = "response", max(round_, 1), False
            blocks.append(Block(start, end, "heading", round=round_))
        elif side == "cover" and not units.reviewer_heading(part):
            blocks.append(Block(start, end, "cover", round=0))
        else:
            if side == "cover":
                side, round_ = "letter", 1
            answered = answered or side == "response"
            joined = before is not None and _goes_on(text, blocks[before], start, side)
            blocks.append(Block(start, end, side, round=round_, joined=joined))
    doi = DOI.search(text)
    paper = {"doi": doi[0].rstrip(".,;)")} if doi else {}
    return text, blocks, paper, []


def _lines(text: str) -> list[tuple[int, int]]:
    return [
        (m.start(), m.end()) for m in re.finditer(r"[^\n\f]+", text) if m[0].strip()
    ]


def _noise(text: str, lines: list[tuple[int, int]]) -> set[int]:
    """Indices of lines that pages repeat, and of bare page numbers beside page breaks.

    A header or footer is on half of the pages or more, digits aside.
    """
    breaks = [m.start() for m in re.finditer("\f", text)]
    if not breaks:
        return set()
    pages: list[list[int]] = [[] for _ in range(len(breaks) + 1)]
    page = 0
    for i, (start, _) in enumerate(lines):
        while page < len(breaks) and start > breaks[page]:
            page += 1
        pages[page].append(i)
    filled = [p for p in pages if p]
    edges = [set(p[:2] + p[-2:]) for p in filled]
    shapes = {
        i: re.sub(r"\d+", "#", " ".join(text[slice(*lines[i])].split()).lower())
        for e in edges for i in e
    }  # fmt: skip
    counts = Counter(s for e in edges for s in {shapes[i] for i in e})
    least = max(2, len(filled) / 2)
    repeated = {s for s, n in counts.items() if n >= least}
    noise = set()
    for i, shape in shapes.items():
        part = text[slice(*lines[i])]
        known = (REPORTS, RESPONSE, units.REVIEWER, units.REPLY, units.LABEL)
        heading = any(p.match(part) for p in known)
        if PAGE_NUMBER.match(part) or shape in repeated and not heading:
            noise.add(i)
    return noise


def _paragraphs(text, lines, noise):
    """(start, end, noise) of paragraphs, which page breaks do not end.

    A paragraph ends at a blank line, before a heading, a label, a reply's mark, and after
    a heading. Noise within a paragraph cuts it in two, of which the second goes on.
    """
    found = []
    open_: list[int] | None = None
    for i, (start, end) in enumerate(lines):
        part = text[start:end]
        if i in noise:
            if open_:
                found.append((*open_, False))
                open_ = None
            found.append((start, end, True))
            continue
        gap = text[lines[i - 1][1] : start] if i else "\n\n"
        blank = "\n\n" in re.sub(r"[ \t\f]", "", gap.replace("\f", ""))
        starts = (
            blank or not open_ or _heads(part) or bool(units.REPLY.match(part))
            or bool(units.LABEL.match(part)) and _sentence_ended(text, open_[1])
            or bool(re.match(r"\s*[*•▪●]\s", part))
        )  # fmt: skip
        if starts and open_:
            found.append((*open_, False))
            open_ = None
        if open_:
            open_[1] = end
        else:
            open_ = [start + len(part) - len(part.lstrip()), end]
        if _heads(part):
            found.append((*open_, False))
            open_ = None
    if open_:
        found.append((*open_, False))
    return [(a, a + len(text[a:b].rstrip()), noisy) for a, b, noisy in found]


def _goes_on(text: str, before: Block, start: int, side: str) -> bool:
    """Whether what follows page noise belongs to the paragraph before it."""
    if before.side != side:
        return False
    if OPEN_END.search(text, before.start, before.end):
        return True  # "See Figure" and a number that is no label.
    if units.LABEL.match(text[start : start + 200]):
        return False
    if units.REPLY.match(text[start : start + 200]):
        return False
    if not _sentence_ended(text, before.end):
        return True
    return not re.search(r"\n[ \t]*\n", text[before.end : start])


def _heads(part: str) -> bool:
    line = part.strip()
    if (
        REPORTS.match(line)
        or RESPONSE.match(line)
        or units.NOTE.match(line)
        and (line.endswith("]"))
    ):
        return True
    opened = units.reviewer_heading(line)
    return bool(opened) and opened[1] >= len(line)


def _sentence_ended(text: str, end: int) -> bool:
    return text[:end].rstrip()[-1:] in ".?!:)]”\"'"
