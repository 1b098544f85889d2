"""The typed record of a review correspondence: every character of it has a place.

``ReviewFile.text`` is the whole source text; ``segments`` tile it. Points are what
reviewers ask; replies what authors answer to them; both by offsets into the text.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

KINDS = (
    "cover", "note", "noise", "heading", "letter", "report", "summary", "point",
    "quote", "reply", "response", "other",
)  # fmt: skip
"""Kinds of segments. ``letter``: the editor's words; ``summary``: of a report, without a
point; ``quote``: of a point, in the authors' response; ``response``: the authors' words
to no point in particular; ``noise``: lines of pages; ``other``: what no rule placed."""

TYPES = (
    "methodology", "evidence/data", "interpretation/claim", "novelty/significance",
    "literature", "reproducibility", "writing/presentation", "other",
)  # fmt: skip
TARGETS = ("core", "peripheral")
POLARITIES = ("criticism", "suggestion", "question", "praise")
RESPONSES = (
    "agree_and_revise", "agree_partial", "clarify", "rebut", "defer", "no_response",
)  # fmt: skip
SCORES = ("strength", "constructiveness", "quality", "revision_cost")
VERSION = "1"


class Span(NamedTuple):
    """Characters [start, end) of the source text."""

    start: int
    end: int


class Segment(NamedTuple):
    """A stretch of the text.

    Attributes:
      start, end: offsets.
      kind: of ``KINDS``.
      round: of review, from 1; 0 before the first.
      reviewer: number, 0 for the editor or all reviewers.
      point: index into ``ReviewFile.points``; -1: none.
    """

    start: int
    end: int
    kind: str
    round: int = 0
    reviewer: int = 0
    point: int = -1


class Link(NamedTuple):
    """An answer to a point.

    Attributes:
      quote: spans in which the authors repeat the point.
      reply: spans of the answer; () where the point is repeated without one.
      by: how it was found: quote, number, ellipsis (between two quotes of the
        same answer), interleaved, order.
      score: share of the quote that is the point's words; 1 for the others.
    """

    quote: tuple[Span, ...]
    reply: tuple[Span, ...]
    by: str
    score: float


class Point(NamedTuple):
    """What a reviewer asks.

    Attributes:
      round: from 1.
      reviewer: number; 0: the editor, or all together.
      label: as written ("2", "b", "*"); "" where the letter numbers nothing.
      number: from 1 within the reviewer's report.
      spans: of the text, without headings and page noise in between.
      links: answers to it.
      section: heading that it stands under.
    """

    round: int
    reviewer: int
    label: str
    number: int
    spans: tuple[Span, ...]
    links: tuple[Link, ...] = ()
    section: str = ""


class Report(NamedTuple):
    """A reviewer's report of a round.

    Attributes:
      round, reviewer: as in ``Point``.
      spans: of its text.
      note: why there is none ("None", an editorial note); "" where there is one.
    """

    round: int
    reviewer: int
    spans: tuple[Span, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class ReviewFile:
    """A parsed correspondence.

    Attributes:
      text: the whole source text; of XML its character data.
      segments: they tile the text without a gap.
      reports: by round and reviewer.
      points: in the order of the letters.
      paper: doi, title, year where the source has them.
      layout: journal, jats or openreview.
      warnings: what a reader should look at.
    """

    text: str
    segments: tuple[Segment, ...]
    reports: tuple[Report, ...]
    points: tuple[Point, ...]
    paper: Mapping[str, str]
    layout: str
    warnings: tuple[str, ...] = ()

    def __post_init__(self):
        place = 0
        for s in self.segments:
            if s.start != place or s.end <= s.start or s.kind not in KINDS:
                raise ValueError(f"segments must tile the text, got {s} at {place}")
            place = s.end
        if place != len(self.text):
            raise ValueError(f"segments end at {place} of {len(self.text)} characters")

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return max((s.round for s in self.segments), default=0)

    @property
    def reviewers(self) -> tuple[int, ...]:
        """Numbers of those who wrote a report."""
        return tuple(sorted({r.reviewer for r in self.reports if r.reviewer}))

    def quote(self, spans: Sequence[Span]) -> str:
        """The text of some spans, one space between them."""
        return " ".join(self.text[a:b].strip() for a, b in spans)

    def words(self, *kinds: str) -> int:
        """Number of words in segments of some kinds."""
        parts = (self.text[s.start : s.end] for s in self.segments if s.kind in kinds)
        return sum(len(x.split()) for x in parts)

    @property
    def unanswered(self) -> list[Point]:
        """Points without an answer."""
        return [p for p in self.points if not any(x.reply for x in p.links)]


@dataclasses.dataclass(frozen=True)
class Opinion:
    """One opinion of a reviewer, coded.

    Attributes:
      id: unique within its file.
      round, reviewer: as in ``Point``.
      quote: of the source.
      summary: in other words.
      opinion_type: of ``TYPES``.
      target: core or peripheral to the paper's claims.
      polarity: of ``POLARITIES``.
      strength, constructiveness, quality, revision_cost: in [0, 1], five steps from 0.
      response_type: of ``RESPONSES``.
      response_quote: of the authors, or None.
      resolved_round: round in which it was settled, or None.
      span: of the quote in the source; None until it is located.
      point: index of the point that it is about; -1: none.
    """

    id: str
    round: int
    reviewer: int
    quote: str
    summary: str
    opinion_type: str
    target: str
    polarity: str
    strength: float
    constructiveness: float
    quality: float
    revision_cost: float
    response_type: str = "no_response"
    response_quote: str | None = None
    resolved_round: int | None = None
    span: Span | None = None
    point: int = -1

    def __post_init__(self):
        for name, known in (
            ("opinion_type", TYPES), ("target", TARGETS), ("polarity", POLARITIES),
            ("response_type", RESPONSES),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(
                    f"opinion {self.id}: {name} must be one of {known}, got "
                    f"{getattr(self, name)!r}"
                )
        for name in SCORES:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(
                    f"opinion {self.id}: {name} must be in [0, 1], got {value!r}"
                )
        if self.round < 1 or self.reviewer < 0:
            raise ValueError(
                f"opinion {self.id}: round must be >= 1 and reviewer >= 0, got "
                f"{self.round} and {self.reviewer}"
            )
        if not self.quote.strip():
            raise ValueError(f"opinion {self.id}: its quote is empty")


def to_dict(file: ReviewFile) -> dict[str, Any]:
    """The parse as plain data, with the text of points and answers."""
    return {
        "layout": file.layout,
        "paper": dict(file.paper),
        "rounds": file.rounds,
        "reviewers": list(file.reviewers),
        "characters": len(file.text),
        "warnings": list(file.warnings),
        "segments": [list(s) for s in file.segments],
        "reports": [
            {"round": r.round, "reviewer": r.reviewer, "note": r.note, "spans": r.spans}
            for r in file.reports
        ],
        "points": [
            {
                "round": p.round, "reviewer": p.reviewer, "label": p.label,
                "number": p.number, "section": p.section, "spans": p.spans,
                "text": file.quote(p.spans),
                "answers": [
                    {"by": x.by, "score": round(x.score, 4), "quote": x.quote,
                     "reply": x.reply, "text": file.quote(x.reply)}
                    for x in p.links
                ],
            }
            for p in file.points
        ],
    }  # fmt: skip
