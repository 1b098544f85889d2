"""From paragraphs to reports, points and answers: the grammar all layouts share.

A letter is read first: who writes, under which heading, with which label. The response
is read against it: what repeats a letter's words is a quote, what follows the answer.
What is a point of a letter without labels is decided last, also by what is quoted.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from jaxpapers.papers.peer_review import linking, units
from jaxpapers.papers.peer_review.schema import (
    Link,
    Point,
    Report,
    ReviewFile,
    Span,
)
from jaxpapers.papers.peer_review.tiling import tile
from jaxpapers.papers.peer_review.units import Block


@dataclasses.dataclass
class Unit:
    """A paragraph, or the part of one behind a heading, while it is being placed.

    Attributes:
      start, end, styled, figure: see ``Block``.
      side: letter or response; other kinds of segments are final.
      kind: of the segment; "" until it is known.
      round, reviewer: of the context.
      section: heading that it stands under.
      label: "" without; ``lead`` characters belong to it.
      group: units of one point share a number; -1: no point.
      interleaved: an answer within the letter.
      joined: see ``Block``.
    """

    start: int
    end: int
    side: str
    kind: str = ""
    styled: float = 0.0
    figure: bool = False
    round: int = 1
    reviewer: int = 0
    section: str = ""
    label: str = ""
    lead: int = 0
    group: int = -1
    interleaved: bool = False
    continues: bool = False
    joined: bool = False


def parse(
    text: str,
    blocks: Sequence[Block],
    paper: Mapping[str, str],
    layout: str,
    warnings: Sequence[str] = (),
) -> ReviewFile:
    """The correspondence of a text whose paragraphs have a side.

    Args:
      text: the source.
      blocks: in order; what they leave out is white space.
      paper: metadata.
      layout: journal, jats or openreview.
      warnings: of the reader.

    Raises:
      ValueError: no paragraphs of letters or responses.
    """
    found = _place(text, blocks)
    letters = [u for u in found if u.side == "letter" and not u.kind]
    answers = [u for u in found if u.side == "response" and not u.kind]
    if not letters and not answers:
        first = [line for line in text.splitlines() if line.strip()][:3]
        raise ValueError(
            "unrecognised layout: no reviewer's report and no response found; the text "
            f"begins {first}"
        )
    quotes = linking.quotes(text, letters, answers)
    _points_of_letters(text, letters, quotes)
    points = _collect(text, letters, answers, quotes)
    reports, notes = _reports(text, found)
    said = [*warnings, *notes]
    return ReviewFile(
        text, tile(text, found), reports, tuple(points), dict(paper), layout,
        tuple(said),
    )  # fmt: skip


def _place(text: str, blocks: Sequence[Block]) -> list[Unit]:
    """Units with their context: round, reviewer, section, label."""
    found: list[Unit] = []
    # Context of each side: both count rounds of their own.
    state = {s: _Context() for s in ("letter", "response")}
    for block in blocks:
        if block.side not in state:
            known = state["letter"]
            found.append(
                Unit(block.start, block.end, block.side, block.side, block.styled,
                     round=block.round or (known.round if found else 0),
                     reviewer=max(block.reviewer, 0))
            )  # fmt: skip
            continue
        found += _units_of(text, block, state[block.side])
    return found


@dataclasses.dataclass
class _Context:
    """Where a side stands: round, reviewer, section, and whether the round has begun."""

    round: int = 1
    base: int = 0
    reviewer: int = 0
    section: str = ""
    begun: bool = False

    def again(self) -> None:
        """The next round, unless this one has not begun."""
        if self.begun:
            self.round += 1
        self.reviewer, self.section, self.begun = 0, "", False

    def enter(self, block: Block) -> None:
        """A block whose source says its round or reviewer."""
        if block.round > self.base:
            self.round = max(self.round + (self.base > 0 and self.begun), block.round)
            self.base, self.reviewer, self.section = block.round, 0, ""
            self.begun = False
        if block.reviewer >= 0 and block.reviewer != self.reviewer:
            self.reviewer, self.section = block.reviewer, ""


def _units_of(text: str, block: Block, at: _Context) -> list[Unit]:
    """The units of a paragraph; moves the context."""
    at.enter(block)
    side, start, end = block.side, block.start, block.end
    found: list[Unit] = []
    unit = functools.partial(_add, found, block, at)
    part = text[start:end]
    if block.figure or block.joined:
        unit(start, end, joined=block.joined)
        return found
    if units.NOTE.match(part):
        first = at.round == 1 and units.FIRST.search(part)
        if units.AGAIN.search(part) and not first:
            at.again()
        cut = _note_end(part)
        unit(start, start + cut, "note")
        start += cut
        part = text[start:end]
        if not part.strip(' \n\t]"”.'):
            found[-1].end = end
            return found
    elif units.RESUBMITTED.match(part) and at.begun and side == "letter":
        at.again()
    opened = units.reviewer_heading(part)
    if opened and not (opened[1] < len(part.rstrip()) and block.styled > 0.9
                       and side == "response"):  # fmt: skip
        number, size = opened
        at.reviewer, at.section = number, ""
        unit(start, start + size, "heading")
        start += size
        part = text[start:end]
        at.begun = True
        if not part.strip():
            return found
    elif units.EDITOR.match(part):
        at.reviewer, at.section = 0, ""
        unit(start, end, "heading")
        return found
    if units.is_heading(part, block.styled if side == "letter" else 0.0):
        if side == "letter" or units.SECTIONS.match(part.strip()):
            at.section = " ".join(part.split()).strip(" :.*_")
            unit(start, end, "heading")
            return found
    label, lead = units.label_of(part)
    at.begun = at.begun or side == "response" or bool(label) or bool(at.reviewer)
    unit(start, end, label=label, lead=lead)
    if side == "letter" and units.asks(part):
        at.begun = at.begun or not units.SET_PHRASES.match(part)
    return found


def _add(found, block, at, start, end, kind="", **more) -> None:
    """Appends the part of a block between two offsets, in its context."""
    found.append(
        Unit(
            start, end, block.side, kind, block.styled, block.figure, at.round,
            at.reviewer, at.section, **more,
        )
    )  # fmt: skip


def _note_end(part: str) -> int:
    """Length of an editors' note; what it quotes after a second colon is not of it."""
    first = part.find(":")
    second = part.find(":", first + 1)
    if 0 < second and len(part) - second > 60:
        if not units.AGAIN.search(part[second:]) or part[second:].count(" ") > 12:
            return second + 1
    closing = part.find("]")
    return closing + 1 if 0 < closing < len(part) - 60 else len(part)


def _points_of_letters(
    text: str, letters: Sequence[Unit], quotes: Mapping[int, linking.Quote]
) -> None:
    """Gives the units of letters a group: the point that they belong to, or a kind."""
    quoted = {i for q in quotes.values() for i in q.letters}
    # Answered before anything else is quoted.
    direct = {i for j, q in quotes.items() if j + 1 not in quotes for i in q.letters}
    by_report: dict[tuple[int, int], list[int]] = {}
    for i, u in enumerate(letters):
        by_report.setdefault((u.round, u.reviewer), []).append(i)
    several = {r for r, reviewer in by_report if reviewer}
    count = 0
    for (round_, reviewer), members in by_report.items():
        labelled = any(letters[i].label for i in members)
        interleaved = any(letters[i].interleaved for i in members)
        open_, section, section_labelled = -1, None, False
        first_labelled = min((i for i in members if letters[i].label), default=-1)
        last_labelled = max((i for i in members if letters[i].label), default=-1)
        for i in members:
            u = letters[i]
            part = text[u.start : u.end]
            if u.joined and i != members[0]:
                cut = letters[members[members.index(i) - 1]]
                u.group, u.interleaved = cut.group, cut.interleaved
                u.continues = True
                continue
            if units.REPLY.match(part) and open_ >= 0 and not u.label:
                u.interleaved, u.group = True, open_
                interleaved = True
                continue
            if section != u.section:
                section_labelled = any(
                    letters[j].label for j in members if letters[j].section == u.section
                )
                open_, section = -1, u.section
            asks = units.asks(part)
            told = bool(units.SET_PHRASES.match(part)) or (
                not u.label
                and len(part) < 250
                and bool(units.LEADS.search(part))
                and (i not in quoted or _before_label(letters, members, i))
            )
            opens = i == members[0] and bool(units.OPENS.match(part))
            before = letters[members[members.index(i) - 1]] if i != members[0] else None
            after_reply = before is not None and before.interleaved
            if u.label and not told:
                open_ = u.group = count
                count += 1
            elif told or units.ELLIPSIS.match(part):
                open_ = -1
            elif labelled and section_labelled:
                # Before the first label an introduction, after it the point goes on.
                if after_reply and open_ >= 0 and interleaved:
                    u.group, u.interleaved = open_, True
                elif open_ >= 0 and (i < last_labelled or reviewer or i in quoted):
                    u.group, u.continues = open_, True
                elif i in quoted and asks:
                    u.group = count
                    count += 1
            elif (
                i in quoted
                or asks
                and not (opens or labelled and i < first_labelled)
                or _before_reply(text, letters, members, i)
            ):
                if reviewer or round_ not in several or i in quoted or _orders(part):
                    open_ = u.group = count
                    count += 1
    _drop_introductions(text, letters, quoted - direct)
    for u in letters:
        if u.interleaved:
            u.kind = "reply"
        elif u.group >= 0:
            u.kind = "point"
        elif u.reviewer:
            u.kind = "summary"
        else:
            u.kind = "letter"


def _before_reply(text, letters, members, i) -> bool:
    """Whether an answer within the letter follows."""
    later = members[members.index(i) + 1 :]
    if not later:
        return False
    after = letters[later[0]]
    return bool(units.REPLY.match(text[after.start : after.end]))


def _before_label(letters, members, i) -> bool:
    """Whether a labelled paragraph of the same report follows."""
    later = members[members.index(i) + 1 :]
    return bool(later) and bool(letters[later[0]].label)


def _orders(part: str) -> bool:
    """Whether the editor asks for a change, rather than telling what reviewers found."""
    lowered = part.lower()
    return any(
        x in lowered
        for x in ("authors should", "please ", "you should", "must be", "must ")
    ) and not lowered.startswith(("please contact", "please note", "please send"))


def _drop_introductions(text, letters, quoted) -> None:
    """A quoted paragraph that asks nothing is an introduction, if its report has points
    that do."""
    asking = {
        (u.round, u.reviewer) for u in letters
        if u.group >= 0 and (u.label or units.asks(text[u.start : u.end]))
    }  # fmt: skip
    for i, u in enumerate(letters):
        if i in quoted and u.group >= 0 and not u.label and not u.continues:
            alone = sum(v.group == u.group for v in letters) == 1
            asks = units.asks(text[u.start : u.end])
            if alone and not asks and (u.round, u.reviewer) in asking:
                u.group = -1


def _collect(text, letters, answers, quotes) -> list[Point]:
    """Points in the order of the letters, then those that only a response has."""
    groups: dict[int, list[int]] = {}
    for i, u in enumerate(letters):
        if u.group >= 0:
            groups.setdefault(u.group, []).append(i)
    order = {g: n for n, g in enumerate(groups)}
    points, counts = [], {}
    for members in groups.values():
        own = [letters[i] for i in members if not letters[i].interleaved]
        said = [letters[i] for i in members if letters[i].interleaved]
        first = own[0]
        key = (first.round, first.reviewer)
        counts[key] = counts.get(key, 0) + 1
        reply = tuple(Span(u.start, u.end) for u in said)
        links = (Link((), reply, "interleaved", 1.0),) if said else ()
        points.append(
            Point(
                first.round, first.reviewer, first.label, counts[key],
                tuple(Span(u.start, u.end) for u in own), links, first.section,
            )
        )  # fmt: skip
    for u in letters:
        u.group = order.get(u.group, -1)
    made = linking.link(text, letters, answers, quotes, points)
    for n, links in made.links.items():
        points[n] = points[n]._replace(links=points[n].links + tuple(links))
    for first, spans, links in made.only_quoted:
        key = (first.round, first.reviewer)
        counts[key] = counts.get(key, 0) + 1
        points.append(
            Point(*key, first.label, counts[key], spans, links, "quoted by the authors")
        )
    return points


def _reports(text: str, found: Sequence[Unit]) -> tuple[tuple[Report, ...], list[str]]:
    """Reports of every round, and warnings about reviewers without one."""
    spans: dict[tuple[int, int], list[Span]] = {}
    for u in found:
        if u.side == "letter" and u.round:
            if u.kind in ("point", "summary", "letter"):
                key = (u.round, u.reviewer)
                spans.setdefault(key, []).append(Span(u.start, u.end))
            elif u.kind == "heading" and u.reviewer:
                spans.setdefault((u.round, u.reviewer), [])
    reports, warnings = [], []
    for (round_, reviewer), own in sorted(spans.items()):
        said = " ".join(text[a:b] for a, b in own).strip()
        empty = len(said) < 30 and said.strip(" .:-–—[]()").lower() in (
            "", "none", "no comments", "no further comments", "n/a", "not applicable",
            "no report",
        )  # fmt: skip
        note = (said or "no text") if empty else ""
        if empty and not said:
            warnings.append(f"reviewer {reviewer} of round {round_} has no report")
        reports.append(Report(round_, reviewer, tuple(own), note))
    return tuple(reports), warnings
