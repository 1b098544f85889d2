"""Catalogues: items with texts or vectors, and users' sequences of them.

==========  ======================================================================
source      files of ``path``
==========  ======================================================================
generated   none: a made-up log, vectors of genre and year
ml-100k     none: fetched; RecBole's ml-100k.inter and ml-100k.item
amazon      reviews_*.json.gz and meta_*.json.gz, Amazon's release of 2014
p5          sequential_data.txt, datamaps.json, meta.json.gz
csv         events.csv (user, item, time) and items.csv (item, text)
==========  ======================================================================

Item vectors of ``vectors.npy`` (items in the order of ``Catalogue.names``) in the folder
are taken in place of those of the texts.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.data import amazon, ctr_tasks, files, lines, movielens, sequences
from jaxpapers.data.ctr import FIRST
from jaxpapers.data.sequences import Sequences

SOURCES = ("generated", "ml-100k", "amazon", "p5", "csv")
_ARTICLE = re.compile(r"^(.*), (The|A|An|Les|La|Le|L'|Il|Das|Der|Die|El)( \(.*)?$")
_MAX_JSON = 1 << 28
_MAX_VECTORS = 1 << 32
_MAX_TEXT = 2000


class Catalogue(NamedTuple):
    """Items and sequences.

    Attributes:
      names: id of each item in the files.
      texts: of each item, "" where it has none.
      vectors: (N, d) of the source's own, or None: those of the texts.
      sequences: of users.
      notes: what was left out.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    vectors: np.ndarray | None
    sequences: Sequences
    notes: str = ""


def read(source: str, path: str | Path, *, core: int = 5, **sizes: Any) -> Catalogue:
    """The catalogue of a source.

    Args:
      source: one of ``SOURCES``.
      path: folder, see the module.
      core: least events of a user and of an item.
      sizes: of ``generated``.

    Raises:
      FileNotFoundError: a missing file.
      ValueError: unknown source, malformed lines, no events.
    """
    if source not in SOURCES:
        raise ValueError(f"config.data.source must be one of {SOURCES}, got {source!r}")
    if source == "generated":
        return generated(core=core, **sizes)
    folder = Path(path).expanduser()
    readers = {"ml-100k": ml_100k, "amazon": amazon_2014, "p5": p5, "csv": plain}
    found = readers[source](folder, core)
    own = folder / "vectors.npy"
    if own.exists():
        found = found._replace(vectors=_vectors(own, len(found.names)))
    return found


def generated(
    *, core: int = 5, users: int = 200, items: int = 400, features: int = 16,
    cates: int = 20, seed: int = 0,
) -> Catalogue:  # fmt: skip
    """A made-up log in which interests can be learned, see ``ctr_tasks.generated``.

    The vector of an item is that of its genre, of its year, and noise, of length 1. The
    more popular items of a genre are the older ones.
    """
    log = ctr_tasks.generated(users=users, items=items, cates=cates, each=20, seed=seed)
    rng = np.random.default_rng(seed)
    item = np.arange(items)
    genre, year = item % cates, item // cates
    years = np.stack([np.sin(0.3 * year), np.cos(0.3 * year)], 1)
    vectors = (
        rng.normal(size=(cates, features))[genre]
        + years @ rng.normal(size=(2, features))
        + 0.2 * rng.normal(size=(items, features))
        + 0.5
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    texts = tuple(f"film {i} ({1990 + y}). Genres: {g}." for i, g, y in
                  zip(item, genre, year))  # fmt: skip
    found = sequences.from_events(log.user, log.item - FIRST, log.time, items, core)
    names = tuple(map(str, item))
    return Catalogue(names, texts, vectors.astype(np.float32), found)


def ml_100k(folder: Path, core: int = 5) -> Catalogue:
    """MovieLens-100k; the text of a film is "Title (year). Genres: A, B."

    Items are the 1,682 films, of which sequences have those with enough ratings.
    """
    ratings = movielens.ml_100k(folder)
    titles: dict[int, str] = {}

    def film(item: str, title: str, year: str, genres: str) -> None:
        name = title_in_order(title)
        year = year.strip()
        when = f" ({year})" if year and f"({year})" not in name else ""
        titles[lines.identity(item, 1) - 1] = (
            f"{name}{when}. Genres: {', '.join(genres.split())}."
        )

    columns = ("item_id", "movie_title", "release_year", "class")
    for _ in lines.rows(
        folder / "ml-100k.item", columns, film, split=lambda line: line.split("\t")
    ):
        pass
    count = max(titles) + 1
    texts = tuple(titles.get(i, "") for i in range(count))
    found = sequences.from_events(
        ratings.user, ratings.item - FIRST, ratings.time, count, core
    )
    return Catalogue(tuple(str(i + 1) for i in range(count)), texts, None, found)


def title_in_order(title: str) -> str:
    """A title with its article in front.

    Example:
      >>> title_in_order("Godfather, The"), title_in_order("Postino, Il (1994)")
      ('The Godfather', 'Il Postino (1994)')
    """
    match = _ARTICLE.match(title.strip())
    if not match:
        return title.strip()
    name, article, rest = match.groups()
    space = "" if article.endswith("'") else " "
    return f"{article}{space}{name}{rest or ''}"


def amazon_2014(folder: Path, core: int = 5) -> Catalogue:
    """Reviews of Amazon's release of 2014, all ratings, in the order of user and time."""
    reviews = list(lines.records(_one(folder, "reviews_*.json*"), amazon.Reviews()))
    texts = dict(lines.records(_one(folder, "meta_*.json*"), product_text))
    return _numbered(
        [r.user for r in reviews], [r.item for r in reviews],
        [r.time for r in reviews], texts, core,
    )  # fmt: skip


def product_text(line: str) -> tuple[str, str]:
    """Id and text of a product: "Title: ..; Brand: ..; Categories: ..; Price: ..;".

    Raises:
      ValueError: no dict with a text ``asin``.
    """
    row = lines.literal(line)
    item = amazon.product(line).item
    paths = amazon.product(line).paths
    parts = {
        "Title": _flat(row.get("title")),
        "Brand": _flat(row.get("brand")),
        "Categories": ", ".join(dict.fromkeys(name for p in paths for name in p)),
        "Price": _flat(row.get("price")),
    }
    text = " ".join(f"{key}: {value};" for key, value in parts.items() if value)
    return item, text[:_MAX_TEXT]


def p5(folder: Path, core: int = 0) -> Catalogue:
    """A folder of P5: sequences with items from 1, in time order, already filtered.

    Args:
      folder: with the files of the module's table; ``meta.json.gz`` may be absent.
      core: ignored: the files are filtered.
    """
    del core
    maps = _json(folder / "datamaps.json")
    try:
        ids = {int(k): str(v) for k, v in maps["id2item"].items()}
    except (KeyError, AttributeError, ValueError, TypeError):
        try:
            ids = {int(v): str(k) for k, v in maps["item2id"].items()}
        except (KeyError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(
                f"{folder / 'datamaps.json'}: expected item2id or id2item"
            ) from error
    count = max(ids, default=0)
    if sorted(ids) != list(range(1, count + 1)):
        raise ValueError(
            f"{folder / 'datamaps.json'}: items must be numbered from 1 without gaps, "
            f"got {len(ids)} of {count}"
        )

    def sequence(line: str) -> np.ndarray:
        _, *items = (lines.whole(x) for x in line.split())
        if not items or min(items) < 1 or max(items) > count:
            raise ValueError(f"expected a user and items in [1, {count}]")
        return np.array(items, np.int32) - 1

    rows = list(lines.records(folder / "sequential_data.txt", sequence))
    if not rows:
        raise ValueError(f"{folder / 'sequential_data.txt'}: no sequences")
    names = tuple(ids[i] for i in range(1, count + 1))
    texts: dict[str, str] = {}
    if (folder / "meta.json.gz").exists():
        texts = dict(lines.records(folder / "meta.json.gz", product_text))
    start = np.cumsum([0, *map(len, rows)])
    found = Sequences(np.concatenate(rows), start, count)
    return Catalogue(names, *_texts(names, texts), found)._replace(
        notes=_missing(names, texts)
    )


def plain(folder: Path, core: int = 5) -> Catalogue:
    """``events.csv`` with the columns user, item, time and ``items.csv`` with item, text.

    Ids are any text, times are numbers. Without ``items.csv`` a ``vectors.npy`` is needed
    for the items in the order of their names.
    """
    events: list[tuple[str, str, float]] = []

    def event(user: str, item: str, time: str) -> None:
        if not user or not item:
            raise ValueError("expected a user and an item, got an empty one")
        events.append((user, item, lines.number(time)))

    for _ in lines.rows(
        folder / "events.csv", ("user", "item", "time"), event, split=lines.fields
    ):
        pass
    texts: dict[str, str] = {}
    if (folder / "items.csv").exists():

        def row(item: str, text: str) -> None:
            if item in texts:
                raise ValueError(f"the item {item!r} is there twice")
            texts[item] = text[:_MAX_TEXT]

        for _ in lines.rows(
            folder / "items.csv", ("item", "text"), row, split=lines.fields
        ):
            pass
    elif not (folder / "vectors.npy").exists():
        raise FileNotFoundError(f"{folder} has neither items.csv nor vectors.npy")
    users, items, times = zip(*events) if events else ((), (), ())
    return _numbered(users, items, times, texts, core)


def _numbered(users, items, times, texts: dict[str, str], core: int) -> Catalogue:
    """Items that have events, numbered in the order of their names."""
    names, item = np.unique(np.asarray(items, object).astype(str), return_inverse=True)
    _, user = np.unique(np.asarray(users, object).astype(str), return_inverse=True)
    kept = sequences.from_events(
        user.reshape(-1), item.reshape(-1), np.asarray(times), len(names), core
    )
    # Only what is left after filtering is a catalogue.
    used = kept.candidates
    number = np.full(len(names), -1)
    number[used] = np.arange(len(used))
    found = Sequences(number[kept.items].astype(np.int32), kept.start, len(used))
    left = tuple(str(x) for x in names[used])
    return Catalogue(left, *_texts(left, texts), found)._replace(
        notes=_missing(left, texts)
    )


def _texts(names, texts) -> tuple[tuple[str, ...], None]:
    return tuple(texts.get(name, "") for name in names), None


def _missing(names, texts) -> str:
    absent = sum(not texts.get(name) for name in names)
    return f"{absent} of {len(names)} items have no text" if absent else ""


def _flat(value: Any) -> str:
    return str(value).strip() if isinstance(value, str | int | float) else ""


def _one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise FileNotFoundError(
            f"config.data.path: {folder} has no {pattern}, which its owners offer for "
            "download"
        )
    if len(found) > 1:
        raise ValueError(
            f"config.data.path: {folder} has several files like {pattern}: "
            f"{', '.join(x.name for x in found[:4])}; leave one"
        )
    return found[0]


def _json(path: Path) -> dict:
    files.check(path)
    if path.stat().st_size > _MAX_JSON:
        raise ValueError(f"{path} has more than {_MAX_JSON} bytes")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict")
    return content


def _vectors(path: Path, count: int) -> np.ndarray:
    if path.stat().st_size > _MAX_VECTORS:
        raise ValueError(f"{path} has more than {_MAX_VECTORS} bytes")
    array = np.load(path, allow_pickle=False)
    if array.ndim != 2 or len(array) != count or array.dtype.kind != "f":
        raise ValueError(
            f"{path}: expected floating-point vectors of {count} items, got "
            f"{array.dtype} {array.shape}"
        )
    return array.astype(np.float32)
