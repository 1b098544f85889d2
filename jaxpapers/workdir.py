"""A folder that a run writes to: its lock, and files that are whole or not there."""

import contextlib
import errno
import os
import re
import socket
import threading
import warnings
from collections.abc import Generator
from pathlib import Path

from jaxpapers import processes

try:
    import fcntl
except ImportError:  # Not a POSIX system: no lock.
    fcntl = None

LOCK = ".lock"
_held: dict[Path, int] = {}  # Locks of this process: folder -> thread.


@contextlib.contextmanager
def replaced(path: str | Path) -> Generator[Path, None, None]:
    """A path to write to; what lies there becomes ``path`` when all went well.

    A kill or an error while writing leaves the file that was there.

    Raises:
      FileNotFoundError: its folder is missing.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    part = path.with_name(f".part.{path.name}")  # Writers of figures go by the suffix.
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write(path: str | Path, content: str | bytes) -> None:
    """Writes a file as a whole: readers see the old content or the new one."""
    data = content.encode() if isinstance(content, str) else content
    with replaced(path) as part:
        part.write_bytes(data)


def local(path: str | os.PathLike, name: str) -> Path:
    """A path on this machine, ``~`` expanded.

    Args:
      path: as given.
      name: of the option, for the error.

    Raises:
      ValueError: a URL, which would become a folder of that name, or no path.
    """
    if "\0" in os.fspath(path):
        raise ValueError(f"{name}: {os.fspath(path)!r} has a zero byte")
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", os.fspath(path))
    if found and len(found[1]) > 1:  # One letter is a drive.
        raise ValueError(
            f"{name}: {os.fspath(path)!r} is a URL, expected a folder or file of this "
            f"machine; mount the {found[1]} store (for gs:// with gcsfuse, for s3:// "
            "with mountpoint-s3) and give the path below the mount"
        )
    return Path(path).expanduser()


@contextlib.contextmanager
def lock(folder: str | Path) -> Generator[None, None, None]:
    """Holds a folder for this process while it is written to.

    The system releases the lock of a process that ends in any way. A lock that this
    thread already holds, of the folder, is not taken twice.

    Raises:
      ValueError: another process or thread writes there, it names the process; or it is
        a file.
      OSError: it cannot be written to.
    """
    folder = Path(folder).resolve()
    me = threading.get_ident()
    if _held.get(folder) == me or fcntl is None:
        yield
        return
    if folder in _held:
        raise ValueError(_taken(folder, "another thread of this process"))
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"{folder} is a file, expected a folder; choose another --workdir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    file = _locked(folder)
    _held[folder] = me
    try:
        yield
    finally:
        del _held[folder]
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        with contextlib.suppress(OSError):
            os.close(file)


@contextlib.contextmanager
def lock_for_all(folder: str | Path) -> Generator[None, None, None]:
    """``lock`` for all processes of a job: the first one holds it.

    Raises:
      ValueError: as ``lock``, on all of them.
    """
    import jax

    with contextlib.ExitStack() as held:
        error: Exception | None = None
        if jax.process_index() == 0:
            try:
                held.enter_context(lock(folder))
            except (OSError, ValueError) as e:
                error = e
        if processes.of_first(error is not None):
            raise error or ValueError(f"process 0 does not get the lock of {folder}")
        yield


def _locked(folder: Path) -> int:
    """Descriptor of the lock file, locked."""
    assert fcntl is not None
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one that held it removes the file: this may be the removed one.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    os.ftruncate(file, 0)
                    text = f"process {os.getpid()} on {socket.gethostname()}"
                    os.write(file, text.encode())
                    return file
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace")
            os.close(file)
            raise ValueError(_taken(folder, holder or "another process")) from None
        except OSError as e:
            if e.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                warnings.warn(
                    f"{folder}: its file system knows no locks; see to it that no other "
                    "run writes there",
                    stacklevel=3,
                )
                return file
            os.close(file)
            raise
        os.close(file)


def _taken(folder: Path, holder: str) -> str:
    return (
        f"{folder}: {holder} is writing there; wait for it to end, stop it (SIGTERM "
        "saves its state), or choose another --workdir"
    )
