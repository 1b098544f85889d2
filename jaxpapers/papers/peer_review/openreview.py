"""Notes of OpenReview: reviews by fields, comments of authors as answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpapers.papers.peer_review import units
from jaxpapers.papers.peer_review.units import Block

# Fields whose paragraphs are points, and those that only describe.
ASKED = ("weaknesses", "questions", "limitations", "requested_changes", "review",
         "main_review", "strengths_and_weaknesses", "comment", "suggestions")  # fmt: skip
MOST_NOTES = 20_000


def is_notes(data: Any) -> bool:
    """Whether plain data are notes: a list of objects with ``content`` and ``id``."""
    notes = data.get("notes") if isinstance(data, Mapping) else data
    return (
        isinstance(notes, Sequence) and not isinstance(notes, str) and len(notes) > 0
        and all(isinstance(n, Mapping) and "content" in n for n in notes)
    )  # fmt: skip


def read(data: Any) -> tuple[str, list[Block], dict[str, str], list[str]]:
    """(text, paragraphs, metadata, warnings) of the notes of one forum.

    The text is made of the notes' fields, a heading line each: of the submission, then of
    each review and the comments below it in their order.

    Raises:
      ValueError: no notes, too many, several forums, or no review among them.
    """
    if not is_notes(data):
        raise ValueError("expected a list of notes with 'content', or {'notes': [...]}")
    notes = list(data["notes"] if isinstance(data, Mapping) else data)
    if len(notes) > MOST_NOTES:
        raise ValueError(f"{len(notes):,} notes; at most {MOST_NOTES:,} are read")
    forums = {n.get("forum") for n in notes if n.get("forum")}
    if len(forums) > 1:
        raise ValueError(f"notes of {len(forums)} forums; give those of one at a time")
    children: dict[Any, list[Mapping]] = {}
    by_id = {n.get("id"): n for n in notes}
    for n in sorted(notes, key=_time):
        children.setdefault(n.get("replyto"), []).append(n)
    reviews = [n for n in sorted(notes, key=_time) if _is_review(n)]
    if not reviews:
        fields = sorted({k for n in notes for k in n["content"]})
        raise ValueError(
            "no note is a review: expected content with rating, recommendation, "
            f"weaknesses or review, got fields {fields}"
        )
    writer = _Writer()
    paper: dict[str, str] = {}
    placed: set[Any] = set()
    for n in notes:
        if not n.get("replyto") and not _is_review(n):
            paper = {"title": str(_value(n, "title") or ""), "forum": str(n.get("id"))}
            writer.note(n, "cover", 0)
            placed.add(id(n))
    for number, review in enumerate(reviews, 1):
        writer.add(f"Reviewer #{number}:", "heading", number)
        writer.note(review, "letter", number)
        placed.add(id(review))
        stack, depth = list(reversed(children.get(review.get("id"), []))), 0
        while stack and depth < MOST_NOTES:
            child, depth = stack.pop(), depth + 1
            if id(child) in placed or _is_review(child):
                continue
            placed.add(id(child))
            side = "response" if _by_authors(child) else "letter"
            writer.note(child, side, number)
            stack += reversed(children.get(child.get("id"), []))
    warnings = []
    for n in notes:
        if id(n) not in placed:
            side = "response" if _by_authors(n) and n.get("replyto") else "cover"
            writer.note(n, side, 0)
            if n.get("replyto") and n.get("replyto") not in by_id:
                warnings.append(
                    f"note {n.get('id')} answers {n.get('replyto')}, not here"
                )
    return "".join(writer.pieces), writer.blocks, paper, warnings


class _Writer:
    """Text and blocks of notes in order."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.blocks: list[Block] = []
        self.size = 0

    def add(self, part: str, side: str, reviewer: int) -> None:
        start = self.size
        self.pieces += [part, "\n\n"]
        self.size += len(part) + 2
        for a, b in units.paragraphs(part, 0, len(part)):
            self.blocks.append(
                Block(start + a, start + b, side, round=1, reviewer=reviewer)
            )

    def note(self, note: Mapping, side: str, reviewer: int) -> None:
        for field in note["content"]:
            value = _value(note, field)
            if value is None or not str(value).strip():
                continue
            own = side
            if side == "letter" and field not in ASKED:
                own = "note"
            self.add(f"{field.replace('_', ' ').capitalize()}:", "heading", reviewer)
            self.add(str(value), own, reviewer)


def _value(note: Mapping, field: str) -> Any:
    """A field's value, of either version of the interface."""
    value = note["content"].get(field)
    return value.get("value") if isinstance(value, Mapping) else value


def _time(note: Mapping) -> Any:
    value = note.get("cdate") or note.get("tcdate") or 0
    return value if isinstance(value, int | float) else 0


def _by_authors(note: Mapping) -> bool:
    signed = " ".join(map(str, note.get("signatures") or ()))
    return "Authors" in signed


def _is_review(note: Mapping) -> bool:
    fields = set(note["content"])
    invitation = str(note.get("invitation") or note.get("invitations") or "")
    if _by_authors(note) or "Meta_Review" in invitation or "Decision" in invitation:
        return False
    return bool(
        "Official_Review" in invitation
        or fields & {"weaknesses", "strengths_and_weaknesses", "main_review"}
        or "rating" in fields or {"recommendation", "review"} <= fields
    )  # fmt: skip
