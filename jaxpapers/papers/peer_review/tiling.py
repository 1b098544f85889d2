"""Segments that cover a text, of the units that were placed in it."""

from collections.abc import Sequence
from typing import Any

from jaxpapers.papers.peer_review.schema import Segment


def tile(text: str, found: Sequence[Any]) -> tuple[Segment, ...]:
    """Segments that tile the text; white space goes to the one before it."""
    segments: list[Segment] = []
    place = 0
    for u in sorted(found, key=lambda u: u.start):
        if u.start > place and text[place : u.start].strip():
            segments.append(Segment(place, u.start, "other"))
        elif u.start > place:
            if segments:
                segments[-1] = segments[-1]._replace(end=u.start)
            else:
                u.start = place
        segments.append(
            Segment(u.start, u.end, u.kind or "other", u.round, u.reviewer, u.group)
        )
        place = u.end
    if place < len(text):
        if text[place:].strip() or not segments:
            segments.append(Segment(place, len(text), "other"))
        else:
            segments[-1] = segments[-1]._replace(end=len(text))
    return tuple(segments)
