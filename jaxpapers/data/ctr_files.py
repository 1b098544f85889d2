"""Readers of the click papers' original files into the arrays of ``data.ctr``.

Files are read line by line (``data.lines``); the error for a malformed line has its
number. ``progress`` is called with (bytes read, size of the file) for each file in turn.
Users bring these files; ``data.movielens`` reads MovieLens.
"""

import random
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers.data import amazon as amazon_rows
from jaxpapers.data.ctr import FIRST, OOV, Clicks, Log, Samples
from jaxpapers.data.ctr_tasks import pairs, user_ranges
from jaxpapers.data.ids import by_frequency, check_highest, renumbered, sorted_ids
from jaxpapers.data.lines import Progress, fields, identity, records, seconds
from jaxpapers.data.lines import rows as table_rows

NO_CATEGORY = "default_cat"
LEAST = 0.1
"""Share of the samples whose names a vocabulary must have."""

_LONGEST_REVIEW = 1 << 22  # bytes; a product of 2023 has up to a few 100,000
_TAOBAO = ("user_id", "item_id", "category_id", "behavior_type", "timestamp")


def amazon(
    reviews: str | Path,
    meta: str | Path,
    *,
    protocol: str = "din",
    seed: int = 1234,
    least: float = 0.5,
    progress: Progress | None = None,
) -> Clicks:
    """Amazon reviews (5-core) as clicks on the next product; see ``data.amazon``.

    "din" (Electronics): each review but a user's first is a positive; its negative is
    uniform over the products that the user never reviewed; a user's last review is the
    test split. Category: last name of the last path. Ids: in the order of names.

    "dien" (Books): the last review of each user with two or more is a positive; its
    negative is the product of a random review, other than the positive but possibly one
    of the user's; a user is in the test split with probability 1/10. Category: last name
    of the first path. Ids: by frequency in the training split.

    Args:
      reviews: reviews_*.json(.gz), a Python or JSON dict per line, of the release of
        2014, 2018 or 2023.
      meta: meta_*.json(.gz) of the same department; products without a category share
        one, and ``Clicks.notes`` says how many reviews found theirs.
      protocol: "din" or "dien".
      seed: of the negatives and of the split.
      least: share of the reviews whose product must have a category in ``meta``.
      progress: see the module.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a malformed line, no reviews, or too few that find their category.
    """
    if protocol not in ("din", "dien"):
        raise ValueError(f"protocol must be 'din' or 'dien', got {protocol!r}")
    if not 0 <= least <= 1:
        raise ValueError(f"least must be in [0, 1], got {least}")
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    user, item, time = array("i"), array("i"), array("i")
    parse = amazon_rows.Reviews()
    for row in records(reviews, parse, progress=progress, longest=_LONGEST_REVIEW):
        user.append(users.setdefault(row.user, len(users)))
        item.append(items.setdefault(row.item, len(items)))
        time.append(row.time)
    if not user:
        raise ValueError(f"{reviews}: no reviews")
    category = _categories(meta, items, -1 if protocol == "din" else 0, progress)
    known = np.array([name in category for name in items])
    share = float(known[np.asarray(item)].mean())
    if share < least:
        raise ValueError(
            f"{meta}: has categories of the products of only {share:.1%} of the "
            f"{len(item):,} reviews in {reviews}, expected at least {least:.0%}; give "
            "the meta file of the same department and release"
        )
    names = sorted(items)
    cates = sorted({category.get(name, NO_CATEGORY) for name in names})
    cate_id = {name: i for i, name in enumerate(cates, FIRST)}
    table = [0, OOV, *(cate_id[category.get(name, NO_CATEGORY)] for name in names)]
    rows = {
        "user": len(users) + FIRST,
        "item": len(names) + FIRST,
        "cate": len(cates) + FIRST,
    }
    log_user, log = _sorted_log(
        sorted_ids(users)[user], sorted_ids(items)[item], time, table
    )
    split = _amazon_din if protocol == "din" else _amazon_dien
    table_of = np.array(table, np.int32)
    clicks = split(str(reviews), log_user, log, table_of, rows, seed)
    note = f"release of {parse.release}; {share:.1%} of the reviews have a category"
    return clicks._replace(name=f"{Path(reviews).name} ({protocol})", notes=note)


def _categories(meta, items, path, progress) -> dict[str, str]:
    """Product -> last name of its path, for the products that are reviewed."""
    category: dict[str, str] = {}
    for row in records(
        meta, amazon_rows.product, progress=progress, longest=_LONGEST_REVIEW
    ):
        if row.item in items and row.paths:
            category[row.item] = row.paths[path][-1]
    return category


def _amazon_din(name, user, log, table, rows, seed) -> Clicks:
    first, last = user_ranges(user)
    place = np.arange(len(user))
    items = rows["item"] - FIRST
    drawn = np.empty((len(user), 1), np.int32)
    # The draws of DIN's code: Python 2's randint, once per review, in the order of users.
    rng = random.Random(seed)
    for start in np.flatnonzero(place == first):
        reviewed = set(log.item[start : last[start]].tolist())
        if len(reviewed) == items:
            raise ValueError(f"{name}: a user has all {items} products: no negative")
        for row in range(start, last[start]):
            item = next(iter(reviewed))
            while item in reviewed:
                item = int(rng.random() * items) + FIRST
            drawn[row] = item
    tested = place == last - 1
    splits = []
    for chosen in (~tested, tested):
        at = np.flatnonzero(chosen & (place > first))
        splits.append(pairs(log, user, at, first[at], drawn[at], table[drawn[at]]))
    return Clicks(name, splits[0], splits[1], log, np.flatnonzero(~tested), rows)


def _amazon_dien(name, user, log, table, rows, seed) -> Clicks:
    rng = np.random.default_rng(seed)
    first, last = user_ranges(user)
    place = np.arange(len(user))
    at = np.flatnonzero((place == last - 1) & (place > first))
    if (log.item == log.item[0]).all():
        raise ValueError(f"{name}: a single product: no negative")
    drawn = np.empty(len(at), np.int32)
    pending = np.arange(len(at))
    while len(pending):
        drawn[pending] = log.item[rng.integers(len(log.item), size=len(pending))]
        pending = pending[drawn[pending] == log.item[at[pending]]]
    drawn = drawn[:, None]
    tested = rng.integers(10, size=len(at)) == 0
    splits = [
        pairs(log, user, at[m], first[at[m]], drawn[m], table[drawn[m]])
        for m in (~tested, tested)
    ]
    return by_frequency(Clicks(name, splits[0], splits[1], log, place, rows))


def taobao(
    path: str | Path,
    *,
    quantile: float = 0.7,
    seed: int = 0,
    progress: Progress | None = None,
) -> Clicks:
    """Taobao's UserBehavior.csv in MIMN's protocol.

    The candidate is a user's last action, its history all earlier ones; with probability
    1/2 another item, uniform over all, replaces the candidate with label 0. Users whose
    last action is later than the quantile of all last actions are the test split. (MIMN's
    script leaves the candidate in the history.) Users with one action are dropped. The
    paper keeps the last 200 behaviours: ``length`` of ``ctr.Examples``.

    Args:
      path: lines user,item,category,behaviour,seconds, without a header or with one
        that names ``user_id,item_id,category_id,behavior_type,timestamp``.
      quantile: share of users in the training split.
      seed: of labels and negatives.
      progress: see the module.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile must be in (0, 1), got {quantile}")
    columns = [array("i") for _ in range(4)]
    append = [column.append for column in columns]

    def action(user: str, item: str, cate: str, kind: str, time: str) -> None:
        if kind not in ("pv", "buy", "cart", "fav"):
            raise ValueError(f"behaviour {kind!r}, expected pv, buy, cart or fav")
        values = identity(user), identity(item), identity(cate), seconds(time)
        for put, value in zip(append, values):
            put(value)

    for _ in table_rows(path, _TAOBAO, action, split=fields, progress=progress):
        pass
    if not columns[0]:
        raise ValueError(f"{path}: no actions")
    users, user = np.unique(np.asarray(columns[0]), return_inverse=True)
    items, where, item = np.unique(
        np.asarray(columns[1]), return_index=True, return_inverse=True
    )
    cates, cate = np.unique(np.asarray(columns[2]), return_inverse=True)
    rows = {
        "user": len(users) + FIRST,
        "item": len(items) + FIRST,
        "cate": len(cates) + FIRST,
    }
    table = np.concatenate([[0, OOV], cate[where] + FIRST])
    user, log = _sorted_log(user + FIRST, item + FIRST, columns[3], table)
    first, last = user_ranges(user)
    place = np.arange(len(user))
    at = np.flatnonzero((place == last - 1) & (place > first))
    if not len(at) or len(items) < 2:
        raise ValueError(f"{path}: needs users with two actions, and two items")
    rng = np.random.default_rng(seed)
    label = rng.integers(2, size=len(at)).astype(np.float32)
    # Uniform over the other items.
    other = rng.integers(FIRST, len(items) + 1, size=len(at))
    other += other >= log.item[at]
    shown = np.where(label > 0, log.item[at], other).astype(np.int32)
    cate = table[shown].astype(np.int32)
    data = Samples(user[at], shown, cate, log.time[at], label, first[at], at)
    late = data.time > np.sort(data.time)[int(len(at) * quantile)]
    if not late.any():
        raise ValueError(
            f"{path}: no user's last action is later than the quantile {quantile} of "
            f"them, second {data.time.max()}: no test split; are the times right?"
        )
    train, test = (Samples(*(x[m] for x in data)) for m in (~late, late))
    pool = np.flatnonzero(place < last - 1)
    return Clicks(Path(path).name, train, test, log, pool, rows)


def dien_text(
    train: str | Path,
    test: str | Path,
    *,
    vocabularies: dict[str, dict[str, int]] | None = None,
    max_id: int = 0,
    progress: Progress | None = None,
) -> Clicks:
    r"""DIEN's local_train_splitByUser and local_test_splitByUser.

    A line has, separated by tabs, label, user, item, category, history items and history
    categories; histories are separated by \x02. (For DIN's dataset.pkl use ``amazon`` on
    the files that it was made from.)

    Args:
      train, test: the two files.
      vocabularies: table ("user", "item", "cate") -> name -> number, as ``vocabulary``
        reads them from uid_voc.pkl, mid_voc.pkl, cat_voc.pkl; ids are numbers + 2. None:
        ids by frequency in the training file, as in DIEN's generate_voc. A vocabulary
        must have the names of ``LEAST`` of the samples; ``Clicks.notes`` says the shares.
      max_id: highest number of a vocabulary, see ``ids.check_highest``.
      progress: see the module.
    """
    codes: dict[str, dict[str, int]] = {"user": {}, "item": {}, "cate": {}}
    log = array("i"), array("i")
    last: list[Any] = ["", "", 0]  # Positive and negative have one history.

    def code(table: str, name: str) -> int:
        ids = codes[table]
        return ids.setdefault(name, len(ids) + FIRST)

    def sample(line: str) -> tuple:
        label, user, item, cate, hist, hist_cate = line.split("\t")
        if label not in ("0", "1"):
            raise ValueError(f"label {label[:20]!r}, expected 0 or 1")
        if (hist, hist_cate) != (last[0], last[1]):
            names = [x.split("\x02") if x else [] for x in (hist, hist_cate)]
            if len(names[0]) != len(names[1]):
                raise ValueError(
                    f"a history of {len(names[0])} items, {len(names[1])} categories"
                )
            last[:] = hist, hist_cate, len(log[0])
            log[0].extend(code("item", x) for x in names[0])
            log[1].extend(code("cate", x) for x in names[1])
        ids = code("user", user), code("item", item), code("cate", cate)
        return *ids, 0, int(label), last[2], len(log[0])

    splits = [_samples(train, sample, progress)]
    pool = np.arange(len(log[0]))
    splits.append(_samples(test, sample, progress))
    none = np.zeros(len(log[0]), np.int32)
    behaviours = Log(np.array(log[0], np.int32), np.array(log[1], np.int32), none)
    rows = {table: len(ids) + FIRST for table, ids in codes.items()}
    clicks = Clicks(Path(train).name, splits[0], splits[1], behaviours, pool, rows)
    if vocabularies is None:
        return by_frequency(clicks)
    maps, sizes, shares = {}, {}, []
    for table, ids in codes.items():
        known = vocabularies.get(table, {})
        if not known:
            raise ValueError(f"vocabularies: {table!r} is missing or empty")
        if len(set(known.values())) < len(known):
            raise ValueError(f"vocabularies: two names of {table!r} have one number")
        used = np.concatenate([getattr(s, table) for s in splits])
        share = float(np.array([False, False, *(x in known for x in ids)])[used].mean())
        shares.append(f"{table} {share:.1%}")
        if share < LEAST:
            raise ValueError(
                f"vocabularies: {table!r} has the names of only {share:.1%} of the "
                f"{len(used):,} samples, expected at least {LEAST:.0%}; give the "
                "vocabularies that were made of these files"
            )
        highest = max(known.values())
        check_highest(f"vocabularies: {table}", highest, len(known), max_id)
        sizes[table] = highest + FIRST + 1
        numbers = (known[x] + FIRST if x in known else OOV for x in ids)
        maps[table] = np.array([0, OOV, *numbers], np.int32)
    notes = f"samples whose names are in the vocabularies: {', '.join(shares)}"
    return renumbered(clicks, maps, sizes)._replace(notes=notes)


def mimn_text(
    train: str | Path,
    test: str | Path,
    *,
    max_id: int = 0,
    progress: Progress | None = None,
) -> Clicks:
    """MIMN's text files, with negatives of their own.

    A line has, separated by tabs, user, item, category, label and four lists separated by
    commas: history items and categories, negative items and categories. All ids share one
    numbering from 1, here from 2; leading zeros of a history are padding.

    Args:
      train, test: the two files.
      max_id: highest id, see ``ids.check_highest``.
      progress: see the module.
    """
    log = tuple(array("i") for _ in range(4))

    def sample(line: str) -> tuple:
        user, item, cate, label, *lists = line.split("\t")
        columns = [[identity(x) for x in text.split(",") if x] for text in lists]
        if len(columns) != 4 or label not in ("0", "1"):
            raise ValueError(
                f"label {label[:20]!r} and {len(columns)} lists, expected 0 or 1 and 4"
            )
        if len({len(column) for column in columns}) != 1:
            raise ValueError(f"lists of {', '.join(str(len(x)) for x in columns)} ids")
        padding = next((i for i, x in enumerate(columns[0]) if x), len(columns[0]))
        kept = [column[padding:] for column in columns]
        ids = tuple(identity(x, 1) + 1 for x in (user, item, cate))
        if any(min(column, default=1) < 1 for column in kept):
            raise ValueError("the id 0 within a list; it is padding at its start")
        start = len(log[0])
        for values, column in zip(log, kept):
            values.extend(x + 1 for x in column)
        return *ids, 0, int(label), start, len(log[0])

    first = _samples(train, sample, progress)
    pool = np.arange(len(log[0]))
    splits = first, _samples(test, sample, progress)
    item, cate, neg_item, neg_cate = (np.array(x, np.int32) for x in log)
    ids = [x for s in splits for x in (s.user, s.item, s.cate)]
    highest = max(int(x.max(initial=0)) for x in [*ids, item, cate, neg_item, neg_cate])
    count = sum(map(len, ids)) + 4 * len(item)
    check_highest(f"{train} and {test}", highest - 1, count, max_id)
    rows = dict.fromkeys(("user", "item", "cate"), highest + 1)
    behaviours = Log(item, cate, np.zeros_like(item))
    name, negatives = Path(train).name, (neg_item, neg_cate)
    return Clicks(name, splits[0], splits[1], behaviours, pool, rows, negatives)


def _samples(path, parse, progress) -> Samples:
    columns = array("i"), array("i"), array("i"), array("i"), array("f")
    columns += array("q"), array("q")
    for values in records(path, parse, progress=progress):
        for column, value in zip(columns, values):
            column.append(value)
    return Samples(*(np.array(column) for column in columns))


def _sorted_log(user, item, time, table) -> tuple[np.ndarray, Log]:
    """Users and behaviours sorted by user and time; ties keep the file's order."""
    time = np.asarray(time, np.int32)
    order = np.lexsort((time, user))
    item = item[order].astype(np.int32)
    cate = np.asarray(table, np.int32)[item]
    return user[order].astype(np.int32), Log(item, cate, time[order])
