"""Checksums of a folder's files, in a file inside it.

CRC-32 and size of each file: every flipped bit, every burst of up to 32 and every cut
shows. They guard against broken disks and transfers, not against people. Of several
processes each reads a share of the files, and all get the same answer.
"""

import json
import zlib
from pathlib import Path

import jax

from jaxpapers import processes

NAME = "checksums.json"
# What orbax still writes after the checksums: when the folder got its name.
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write(folder: Path, name: str = "") -> None:
    """Writes the checksums of all files of a folder.

    Args:
      folder: with the files.
      name: that the folder will have, "" for the one that it has.
    """
    sums = {
        str(path.relative_to(folder)): [path.stat().st_size, _sum(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in LATER
    }
    text = json.dumps({"folder": name or folder.name, "crc32": sums})
    (folder / NAME).write_text(text)


def exist(folder: Path) -> bool:
    """Whether a folder has checksums; one of a version before 0.2 has not."""
    return (folder / NAME).exists()


def problem(folder: Path, item: str = "") -> str:
    """What is wrong with a folder's files; "" if nothing is, or if it has no checksums.

    Args:
      folder: that ``write`` was called with.
      item: the only folder inside it to look at; "": all.
    """
    text = _first_problem(folder, item)
    bad = processes.of_all(bool(text))
    if any(bad) and not text:
        text = f"process {bad.index(True)} finds damaged files"
    return text


def _first_problem(folder: Path, item: str) -> str:
    path = folder / NAME
    try:
        stored = json.loads(path.read_text())
        files = [(n, int(size), int(crc)) for n, (size, crc) in stored["crc32"].items()]
        name = stored.get("folder", folder.name)
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{NAME} cannot be read"
    if name != folder.name:
        return f"it was written as {name} and renamed"
    listed = {name for name, _, _ in files}
    for other in sorted(folder.glob(f"{item or '*'}/**/*")):
        name = str(other.relative_to(folder))
        later = other.name in LATER or other.name.startswith(".")
        if other.is_file() and not later and name not in listed:
            return f"{name} has no checksum"
    chosen = [x for x in files if not item or x[0].startswith(f"{item}/")]
    chosen.sort(key=lambda x: -x[1])
    for name, size, crc in chosen[jax.process_index() :: jax.process_count()]:
        try:
            actual = (folder / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
            if _sum(folder / name) != crc:
                return f"the checksum of {name} differs"
        except OSError as e:
            return f"{name}: {e.strerror or e}"
    return ""


def _sum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**22):
            value = zlib.crc32(block, value)
    return value
