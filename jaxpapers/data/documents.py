"""Text files as bytes: plain or gzipped UTF-8; anything else is refused by its name."""

import codecs
import re
from pathlib import Path
from typing import NamedTuple

from jaxpapers.data import files

MAX_BYTES = 1 << 32
"""Of all text of a corpus, which is held in memory."""

# What files that are no text start with; bzip2's next bytes tell it from a word.
_KINDS = (
    (rb"PK\x03\x04", "a zip archive"),
    (rb"PAR1", "a Parquet file"),
    (rb"\xfd7zXZ\x00", "compressed by xz"),
    (rb"BZh[1-9]1AY&SY", "compressed by bzip2"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (rb"\x04\x22\x4d\x18", "compressed by lz4"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (rb"\x1f\x8b", "gzipped twice"),
    (rb"(?s:.{257}ustar)", "a tar archive"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"ARROW1", "an Arrow file"),
    (rb"\x93NUMPY", "a NumPy file"),
    (rb"\x80[\x02-\x05]", "a pickle"),
    (rb"%PDF-", "a PDF file"),
    (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32 text"),
    (
        rb"\xff\xfe|\xfe\xff|(?:[\t\n\r -~]\x00){8}|(?:\x00[\t\n\r -~]){8}",
        "UTF-16 text",
    ),
)
# Of text files, one byte in a thousand at most: a scraped page has a few.
_CONTROL = re.compile(rb"[\x01-\x06\x0e-\x19\x1c-\x1f]")
_MOST_CONTROL = 1e-3
_CHUNK = 1 << 22


class Document(NamedTuple):
    """A text file: its path below the corpus's folder, and its bytes."""

    name: str
    data: bytes


class Documents(NamedTuple):
    """The text files of a folder, and a sentence about the files that were skipped."""

    read: list[Document]
    notes: str


def read(path: str | Path, *, most: int = MAX_BYTES) -> bytes:
    """The bytes of a UTF-8 text, without a byte order mark, decompressed.

    Args:
      path: of the file.
      most: bytes that it may have.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no UTF-8 text, a broken gzip file, or more bytes.
    """
    data = files.read(path, most=most)
    other = _other(data)
    if other:
        way = "extract its text"
        if other.startswith("UTF"):
            way = f"convert it, e.g. iconv -f {other.removesuffix(' text')} -t UTF-8"
        elif other.startswith("no UTF-8"):
            way = "convert it, e.g. iconv -f LATIN1 -t UTF-8"
        raise ValueError(
            f"{path}: is {other}, expected UTF-8 text or that gzipped; {way}"
        )
    return data.removeprefix(codecs.BOM_UTF8)


def folder(root: Path, paths: list[Path]) -> Documents:
    """The texts among some files, in the order of their names.

    Empty files have nothing to skip.

    Args:
      root: folder that names are relative to.
      paths: files in it.

    Raises:
      ValueError: more than ``MAX_BYTES`` of text.
    """
    documents, skipped, left = [], [], MAX_BYTES
    for name, path in sorted((p.relative_to(root).as_posix(), p) for p in paths):
        try:
            data = read(path, most=left)
        except (FileNotFoundError, ValueError) as e:
            if "bytes allowed" in str(e):
                raise ValueError(
                    f"{root}: more than {MAX_BYTES:,} bytes of text; write token shards "
                    "(data.text.write_shard), which are not held in memory"
                ) from e
            reason = str(e).removeprefix(f"{path}: ").partition(",")[0]
            skipped.append(f"{name} ({reason:.60})")
            continue
        if data:
            documents.append(Document(name, data))
            left -= len(data)
    return Documents(documents, notes(skipped, len(paths)))


def notes(skipped: list[str], total: int) -> str:
    """A sentence about skipped files; "" for none."""
    if not skipped:
        return ""
    more = ", ..." if len(skipped) > 3 else ""
    return f"skipped {len(skipped)} of {total} files: {', '.join(skipped[:3])}{more}"


def _other(data: bytes) -> str:
    """What a file is that is no UTF-8 text; "" if it is."""
    for start, kind in _KINDS:
        if re.match(start, data):
            return kind
    if b"\0" in data:
        return f"binary (a zero byte at {data.index(0)})"
    decoder = codecs.getincrementaldecoder("utf-8")()
    # The last character may be cut, as in texts of a round number of bytes.
    for start in range(0, len(data), _CHUNK):
        try:
            decoder.decode(data[start : start + _CHUNK])
        except UnicodeDecodeError as e:
            return f"no UTF-8 (near byte {start + e.start})"
    count = sum(1 for _ in _CONTROL.finditer(data))
    if count > _MOST_CONTROL * len(data):
        return f"binary ({count:,} control characters)"
    return ""
