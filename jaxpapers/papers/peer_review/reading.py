"""One correspondence from text, XML or JSON, whichever it is."""

import json
from typing import Any

from jaxpapers.papers.peer_review import correspondence, jats, journal, openreview
from jaxpapers.papers.peer_review.schema import ReviewFile


def parse_review_file(text: str) -> ReviewFile:
    """Parses plain text in the journal's grammar.

    Args:
      text: of any PDF tool; form feeds between pages if there are.

    Raises:
      ValueError: unrecognised layout, too long.
    """
    text, blocks, paper, warnings = journal.read(text)
    return correspondence.parse(text, blocks, paper, "journal", warnings)


def parse_jats(data: bytes) -> ReviewFile:
    """Parses a JATS article with review sub-articles; see ``jats.read``."""
    source = jats.read(data)
    return correspondence.parse(
        source.text, source.blocks, source.paper, "jats", source.warnings
    )


def parse_openreview(data: Any) -> ReviewFile:
    """Parses notes of one forum; see ``openreview.read``."""
    text, blocks, paper, warnings = openreview.read(data)
    return correspondence.parse(text, blocks, paper, "openreview", warnings)


def parse_bytes(data: bytes) -> ReviewFile:
    """Parses a file's bytes: XML, JSON notes, else text in UTF-8.

    Raises:
      ValueError: of the parsers; no text.
    """
    start = data[:2000].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"<"):
        return parse_jats(data)
    if start.startswith(b"%PDF"):
        raise ValueError("a PDF; extract its text first (pdftotext FILE.pdf)")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"neither XML nor text in UTF-8: {e}") from None
    if start[:1] in (b"{", b"["):
        try:
            notes = json.loads(text)
        except (ValueError, RecursionError):
            notes = None
        if openreview.is_notes(notes):
            return parse_openreview(notes)
    return parse_review_file(text.replace("\r\n", "\n"))
