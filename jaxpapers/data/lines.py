"""Line-by-line reading of text files, with progress and errors that name the line."""

import ast
import contextlib
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Progress = Callable[[int, int], None]

_REPORT_LINES = 1 << 16
_LARGE = 100_000_000  # bytes of a file that takes long to read


def records(
    path: str | Path,
    parse: Callable[[str], Any],
    *,
    header: bool = False,
    progress: Progress | None = None,
) -> Iterator[Any]:
    """Parsed lines of a text file; empty lines are skipped.

    Args:
      path: UTF-8 text, gzipped if the suffix is .gz.
      parse: line without its end -> value.
      header: skip the first line.
      progress: called with (bytes read, size of the file), compressed bytes of a gzipped
        file, regularly and at the end.

    Raises:
      ValueError: a line that is not UTF-8 or that ``parse`` refuses by Value-, Key-,
        Index-, Type- or OverflowError, with its number; a broken gzip file.
    """
    path = Path(path).expanduser()
    total = path.stat().st_size
    with open(path, "rb") as raw, _binary(path, raw) as binary:
        for number, line in _numbered(path, binary):
            line = line.rstrip(b"\r\n")
            if line and (number > 1 or not header):
                try:
                    value = parse(line.decode())
                except (ValueError, LookupError, TypeError, OverflowError) as e:
                    raise ValueError(
                        f"{path}, line {number} is malformed ({type(e).__name__}: {e}): "
                        f"{line[:100]!r}; correct or remove it"
                    ) from e
                yield value
            if progress is not None and number % _REPORT_LINES == 0:
                progress(raw.tell(), total)
    if progress is not None:
        progress(total, total)


def print_progress(done: int, total: int) -> None:
    """Prints to standard error how much of a large file is read; a ``Progress``."""
    if total >= _LARGE:
        end = "\n" if done == total else ""
        text = f"\r{done / 1e6:,.0f} of {total / 1e6:,.0f} MB read"
        print(text, end=end, file=sys.stderr, flush=True)


def literal(line: str) -> dict:
    """A dict from a Python or JSON literal, without evaluating code."""
    try:
        # JSON is 20 times faster, and a literal valid in both means the same.
        row = json.loads(line) if line.startswith('{"') else ast.literal_eval(line)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        try:
            row = ast.literal_eval(line)
        except (SyntaxError, MemoryError, RecursionError) as e:
            raise ValueError(f"neither Python nor JSON: {e}") from e
    if not isinstance(row, dict):
        raise ValueError("not a dict")
    return row


def _binary(path: Path, raw: Any) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    return contextlib.nullcontext(raw)


def _numbered(path: Path, binary: Any) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for number, line in enumerate(binary, 1):  # noqa: B007
            yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise ValueError(
            f"{path}: unreadable after line {number}: {e}; copy the file again"
        ) from e
