"""Ids of embedding tables: by frequency, by name, or from the papers' vocabularies."""

import json
from pathlib import Path

import numpy as np

from jaxpapers.data import files, pickles
from jaxpapers.data.ctr import FIRST, OOV, Clicks

_MAX_JSON = 1 << 28  # bytes


def by_frequency(clicks: Clicks) -> Clicks:
    """Renumbers ids by frequency in the training split, others as out of vocabulary.

    As in DIEN's generate_voc, all occurrences in candidates and histories count. Ties are
    broken by the old id.
    """
    train, log = clicks.train, clicks.log
    cover = np.bincount(train.start, minlength=len(log.item) + 1)
    cover -= np.bincount(train.stop, minlength=len(log.item) + 1)
    times = np.cumsum(cover)[:-1]
    maps, rows = {}, {}
    for table, n in clicks.rows.items():
        count = np.bincount(getattr(train, table), minlength=n)
        if table != "user":
            count += np.bincount(getattr(log, table), times, n).astype(count.dtype)
        order = np.argsort(-count, kind="stable")
        order = order[count[order] > 0]
        maps[table] = np.full(n, OOV, np.int32)
        maps[table][order] = np.arange(len(order)) + FIRST
        rows[table] = len(order) + FIRST
    return renumbered(clicks, maps, rows)


def renumbered(
    clicks: Clicks, maps: dict[str, np.ndarray], rows: dict[str, int]
) -> Clicks:
    """The data set with other ids.

    Args:
      clicks: data set.
      maps: table -> new id of each old one; "item" and "cate" are required, "user" is
        optional.
      rows: new sizes of the tables.
    """
    train, test = (
        s._replace(**{name: maps[name][getattr(s, name)] for name in maps})
        for s in (clicks.train, clicks.test)
    )
    log = clicks.log
    log = log._replace(item=maps["item"][log.item], cate=maps["cate"][log.cate])
    return clicks._replace(train=train, test=test, log=log, rows=rows)


def categories(genres: dict[int, str], category: str) -> tuple[np.ndarray, int]:
    """Category ids of an item table from genre strings.

    Args:
      genres: item id (from 2) -> genres, separated by spaces or ``|``.
      category: "first" genre, or their "combination" in the given order.

    Returns:
      int32 category of each row of the item table (0 for padding, 1 without genres), and
      the size of the category table.

    Example:
      >>> categories({2: "Drama", 3: "Action|Drama"}, "first")
      (array([0, 1, 3, 2], dtype=int32), 4)
    """
    if category not in ("first", "combination"):
        raise ValueError(f"category must be 'first' or 'combination', got {category!r}")
    split = {item: text.replace("|", " ").split() for item, text in genres.items()}
    name = {
        item: " ".join(parts[:1] if category == "first" else parts)
        for item, parts in split.items()
    }
    ids = {text: i for i, text in enumerate(sorted(set(name.values())), FIRST)}
    table = np.full(max(name, default=1) + 1, OOV, np.int32)
    table[0] = 0
    for item, text in name.items():
        table[item] = ids[text]
    return table, len(ids) + FIRST


def check_highest(name: str, highest: int, count: int, max_id: int = 0) -> None:
    """Refuses an id that asks for a table far larger than the data (ValueError).

    Args:
      name: of the file and of what has the id.
      highest: id of the data.
      count: number of its rows or ids.
      max_id: highest allowed; 0: a million, or 100 times ``count`` if that is more.
    """
    allowed = max_id or max(1_000_000, 100 * count)
    if highest > allowed:
        raise ValueError(
            f"{name}: the id {highest:,} needs a table of as many rows, for {count:,} in "
            f"the data; allowed is {allowed:,}; correct the id, number the values anew, "
            "or raise max_id (config.data.max_id)"
        )


def sorted_ids(codes: dict[str, int]) -> np.ndarray:
    """Id of each code (0, 1, ...), in the order of the sorted names."""
    ids = np.empty(len(codes), np.int32)
    ids[[codes[name] for name in sorted(codes)]] = np.arange(len(codes)) + FIRST
    return ids


def vocabulary(path: str | Path) -> dict[str, int]:
    """A vocabulary name -> number from a .json file or one of DIEN's .pkl files.

    A pickle can run any code, so only one of plain containers, texts and numbers is read.

    Raises:
      ValueError: the pickle wants anything else, or there is no such dict in the file.
    """
    path = Path(path).expanduser()
    try:
        if path.suffix == ".json":
            loaded = json.loads(files.read(path, most=_MAX_JSON).decode("utf-8-sig"))
        else:  # DIEN's are of Python 2.
            loaded = pickles.load(path, encoding="utf-8")
    except (ValueError, RecursionError) as e:
        raise ValueError(
            f"{path}: not a plain vocabulary: {e}; convert the vocabulary to a .json "
            "file of name -> number"
        ) from e
    if not isinstance(loaded, dict) or not all(
        isinstance(k, str) and type(v) is int and v >= 0 for k, v in loaded.items()
    ):
        raise ValueError(f"{path}: expected a dict of names to numbers >= 0")
    return loaded
