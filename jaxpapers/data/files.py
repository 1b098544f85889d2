"""Files of others: regular ones only, of bounded size, decompressed, errors with names.

Readers open files here alone. gzip is recognised by its first bytes, whatever the name.
"""

import contextlib
import gzip
import stat
import warnings
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, Any

MAX_BYTES = 1 << 30
"""Of a file that is read whole, after decompression."""

UNREADABLE = (EOFError, OSError, zlib.error)
"""What a broken gzip file or disk raises."""

# gzip files of text are 3 to 20 times smaller than it; deflate can reach 1032.
_MAX_RATIO = 200
_FREE_BYTES = 1 << 26
_CHUNK = 1 << 20
_GZIP = b"\x1f\x8b"


def check(path: str | Path) -> tuple[Path, int]:
    """The path with ``~`` replaced, and the file's size in bytes.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a folder, a pipe, a device, or a file that may not be read.
    """
    path = Path(path).expanduser()
    with _named(path):
        status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path}: is a folder, expected a file")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"{path}: is a pipe, a socket or a device, expected a regular file; write "
            "its content to a file first"
        )
    return path, status.st_size


def refuse_path(path: str | Path, source: str, sources: Sequence[str]) -> None:
    """Refuses files that a source which makes its data up would not read.

    Args:
      path: of the user's files; "": none.
      source: the one that is configured.
      sources: all.

    Raises:
      ValueError: a path.
    """
    if path:
        known = ", ".join(x for x in sources if x != source)
        raise ValueError(
            f"config.data.path: {str(path)!r} is not read with "
            f"config.data.source={source}; name the source of these files, one of {known}"
        )


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder; raises FileNotFoundError for none, ValueError."""
    path = Path(path).expanduser()
    with _named(path):
        return stat.S_ISDIR(path.stat().st_mode)


@contextlib.contextmanager
def opened(path: str | Path) -> Generator[tuple[IO[bytes], IO[bytes]], None, None]:
    """The file as it is and, the same or decompressed, its content.

    Raises:
      FileNotFoundError, ValueError: see ``check``.
    """
    path, _ = check(path)
    with _named(path):
        raw = open(path, "rb")
    with raw:
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        content: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        with content:
            yield raw, content


def read(path: str | Path, *, most: int = MAX_BYTES) -> bytes:
    """The whole content of a file, decompressed if it is gzipped.

    Args:
      path: of the file.
      most: bytes that it may have.

    Raises:
      FileNotFoundError: no such file.
      ValueError: more bytes, a broken gzip file, or see ``check``.
    """
    chunks, size = [], 0
    with opened(path) as (raw, content):
        while True:
            try:
                chunk = content.read(_CHUNK)
            except UNREADABLE as e:
                raise unreadable(path, f"{size:,} bytes", e) from e
            if not chunk:
                return b"".join(chunks)
            size += len(chunk)
            if size > most:
                raise ValueError(f"{path}: more than the {most:,} bytes allowed")
            if content is not raw:
                check_ratio(path, raw, size)
            chunks.append(chunk)


def check_ratio(path: str | Path, raw: IO[bytes], size: int) -> None:
    """Refuses gzip files that grow beyond what data can (ValueError).

    Args:
      path: of the file.
      raw: the compressed file, at its position.
      size: decompressed bytes so far.
    """
    if size > max(_FREE_BYTES, _MAX_RATIO * raw.tell()):
        raise ValueError(
            f"{path}: {raw.tell():,} compressed bytes gave {size:,}, more than "
            f"{_MAX_RATIO} times as many; decompress it yourself if that is right"
        )


def unreadable(path: str | Path, place: str, error: Exception) -> ValueError:
    """The refusal of a file at which one of ``UNREADABLE`` was raised.

    Args:
      path: of the file.
      place: up to which it was read.
      error: what was raised.
    """
    return ValueError(f"{path}: unreadable after {place}: {error}; copy the file again")


def listing(folder: str | Path) -> list[Path]:
    """What a folder holds, sorted, without hidden names and what macOS adds to archives.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: it may not be read.
    """
    folder = Path(folder).expanduser()
    with _named(folder):
        if not folder.is_dir():
            raise FileNotFoundError
        return sorted(p for p in folder.iterdir() if not is_hidden(p.name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data of the user's by its name."""
    return name.startswith(".") or name == "__MACOSX"


@contextlib.contextmanager
def parsing(path: str | Path, problem: str) -> Generator[None, None, None]:
    """Turns whatever another library raises on a broken file into ValueError.

    For calls of foreign parsers alone: errors of our own code would be hidden. What
    names the file already passes. Warnings are dropped.

    Args:
      path: of the file.
      problem: what the file is then, e.g. "not a font".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (FileNotFoundError, ModuleNotFoundError):
        raise
    except Exception as e:
        if isinstance(e, ValueError) and str(e).startswith(f"{path}: "):
            raise
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(f"{path}: {problem} ({reason:.300})") from e


@contextlib.contextmanager
def _named(path: Path) -> Generator[None, None, None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as e:
        raise FileNotFoundError(f"no file {path}") from e
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the name.
        reason = getattr(e, "strerror", None) or e
        raise ValueError(f"{str(path)!r}: cannot be read: {reason}") from e
