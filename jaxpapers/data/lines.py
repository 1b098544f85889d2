"""Line-by-line reading of text files, with progress and errors that name the line."""

import ast
import csv
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from jaxpapers.data import files

Progress = Callable[[int, int], None]

MAX_LINE = 1 << 24
"""Bytes of a line: histories have kilobytes, a broken file may have no line ends."""

_REPORT_LINES = 1 << 16
_LARGE = 100_000_000  # bytes of a file that takes long to read
_MAX_LITERAL = 1 << 20  # bytes; Python's parser needs a hundred times as many
_CHECK_BYTES = 1 << 24
_BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}


def records(
    path: str | Path,
    parse: Callable[[str], Any],
    *,
    progress: Progress | None = None,
    longest: int = MAX_LINE,
) -> Iterator[Any]:
    """Parsed lines of a text file; empty lines are skipped.

    Args:
      path: UTF-8 text, with or without a byte order mark, plain or gzipped.
      parse: line without its end -> value.
      progress: called with (bytes read, size of the file), compressed bytes of a gzipped
        file, regularly and at the end.
      longest: bytes of a line.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line that is longer, not UTF-8, or that ``parse`` refuses by
        ValueError, with its number; a broken gzip file, or one that grows beyond all
        measure; no regular file.
    """
    for number, line in numbered(path, progress=progress, longest=longest):
        yield _parsed(path, number, line, parse)


def rows(
    path: str | Path,
    columns: Sequence[str],
    parse: Callable[..., Any],
    *,
    split: Callable[[str], list[str]],
    progress: Progress | None = None,
) -> Iterator[Any]:
    """Parsed rows of a table with a header, whose columns may be in any order.

    Without a header, that is if the first line has none of the names, the columns are
    those expected, in their order.

    Args:
      path: see ``records``.
      columns: names; case, punctuation and RecBole's ``:type`` do not count.
      parse: the fields of these columns -> value.
      split: line -> fields.
      progress: see ``records``.

    Raises:
      FileNotFoundError, ValueError: see ``records``; a column that is missing or given
        twice, a row of another number of fields.
    """
    known = [_plain(name) for name in columns]
    pick: Callable | None = None
    width = len(columns)

    def row(line: str) -> Any:
        fields = split(line)
        if len(fields) != width:
            raise ValueError(f"{len(fields)} fields, expected {width}")
        return parse(*(pick(fields) if pick is not None else fields))

    for number, line in numbered(path, progress=progress):
        if pick is None:
            names = [_plain(x) for x in _parsed(path, number, line, split)]
            if set(names) & set(known):
                place = _places(path, number, columns, known, names)
                pick, width = itemgetter(*place), len(names)
                continue
            pick = tuple
            try:
                value = _parsed(path, number, line, row)
            except ValueError as e:
                raise ValueError(
                    f"{e}; expected the columns {','.join(columns)}, by name or, without "
                    "a header, in this order"
                ) from e
        else:
            value = _parsed(path, number, line, row)
        yield value


def fields(text: str, separator: str = ",") -> list[str]:
    """Fields of a line of CSV, with or without quotes."""
    if '"' not in text:
        return text.split(separator)
    return next(csv.reader([text], delimiter=separator, strict=True))


def numbered(
    path: str | Path, *, progress: Progress | None = None, longest: int = MAX_LINE
) -> Iterator[tuple[int, str]]:
    """Numbers and texts, without their ends, of the lines of a text file.

    Args:
      path, progress, longest: see ``records``.

    Raises:
      FileNotFoundError, ValueError: see ``records``.
    """
    path, total = files.check(path)
    number, size, checked = 0, 0, _CHECK_BYTES
    with files.opened(path) as (raw, content):
        while True:
            try:
                line = content.readline(longest + 1)
            except files.UNREADABLE as e:
                raise files.unreadable(path, f"line {number}", e) from e
            if not line:
                break
            number, size = number + 1, size + len(line)
            if len(line) > longest:
                raise ValueError(f"{path}, line {number}: more than {longest:,} bytes")
            if content is not raw and size > checked:
                files.check_ratio(path, raw, size)
                checked = size + _CHECK_BYTES
            line = line.rstrip(b"\r\n")
            if number == 1:
                line = _without_mark(path, line)
            if line:
                yield number, _decoded(path, number, line)
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
    """A dict from a Python or JSON literal, without evaluating code.

    Raises:
      ValueError: neither, no dict, or a Python literal of more than a mebibyte.
    """
    try:
        # JSON is 20 times faster, and a literal valid in both means the same.
        row = json.loads(line) if line.startswith('{"') else _python(line)
    except (ValueError, RecursionError):
        row = _python(line)
    if not isinstance(row, dict):
        raise ValueError("not a dict; expected one on each line")
    return row


def whole(text: str) -> int:
    """An integer; "7.0" of an export is one, Python's "1_000" is not (ValueError)."""
    try:
        if "_" not in text and text.isascii():
            return int(text.removesuffix(".0"))
    except ValueError:
        pass
    raise ValueError(f"expected an integer, got {text[:40]!r}")


def number(text: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high] (ValueError)."""
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"expected a number in [{low:g}, {high:g}], got {text[:40]!r}")
    return value


def identity(text: str, low: int = 0) -> int:
    """An id of 32 bits with room for one more, at least ``low`` (ValueError)."""
    value = whole(text)
    if not low <= value < (1 << 31) - 1:
        raise ValueError(f"expected an id in [{low}, {(1 << 31) - 2}], got {value}")
    return value


def seconds(value: str | int | float) -> int:
    """Unix seconds of 32 bits (ValueError)."""
    time = whole(str(value))
    if not -(1 << 31) <= time < 1 << 31:
        raise ValueError(
            f"time {time}: expected unix seconds of 32 bits; milliseconds must be "
            "divided by 1000"
        )
    return time


def _python(line: str) -> Any:
    if len(line) > _MAX_LITERAL:
        raise ValueError(f"no JSON, and too long for Python: {len(line):,} characters")
    try:
        return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as e:
        raise ValueError("neither JSON nor a Python literal of a dict") from e


def _parsed(path: str | Path, number: int, line: str, parse: Callable) -> Any:
    try:
        return parse(line)
    except (ValueError, OverflowError, RecursionError, csv.Error) as e:
        # Python's own texts need the class: "too many values to unpack".
        raise ValueError(
            f"{path}, line {number} is malformed ({type(e).__name__}: {e}): "
            f"{line[:100].encode()!r}; correct or remove it"
        ) from e


def _without_mark(path: Path, line: bytes) -> bytes:
    for mark, name in _BOMS.items():
        if line.startswith(mark):
            raise ValueError(
                f"{path}, line 1: is {name}, expected UTF-8; convert it, e.g. "
                f"iconv -f {name} -t UTF-8"
            )
    return line.removeprefix(b"\xef\xbb\xbf")


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{path}, line {number} is malformed (not UTF-8: {e}): {line[:100]!r}; "
            "convert the file, e.g. iconv -f LATIN1 -t UTF-8"
        ) from e


def _plain(name: str) -> str:
    """A column's name without case, punctuation and RecBole's type."""
    return re.sub(r"[^a-z0-9]", "", name.rsplit(":", 1)[0].lower())


def _places(path, number, columns, known, names) -> list[int]:
    wrong = [x for x, name in zip(columns, known) if names.count(name) != 1]
    if wrong:
        what = "is there twice" if _plain(wrong[0]) in names else "is missing"
        raise ValueError(
            f"{path}, line {number}: the column {wrong[0]!r} {what}; expected the "
            f"columns {','.join(columns)}, in any order"
        )
    return [names.index(name) for name in known]
