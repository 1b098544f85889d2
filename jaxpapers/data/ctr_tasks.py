"""Tasks on ratings: which film is rated next, and is it rated 4 or more.

The loaders of the papers' files build their samples with the same parts.
"""

from typing import NamedTuple

import numpy as np

from jaxpapers.data.ctr import Clicks, Log, Samples


class Ratings(NamedTuple):
    """Ratings in file order.

    Attributes:
      user, item: int32 ids.
      rating: float32.
      time: int32 unix seconds.
      cate: int32 category of every row of the item table.
      rows: rows of the tables "user", "item", "cate".
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    cate: np.ndarray
    rows: dict[str, int]


def task_next_item(
    ratings: Ratings,
    *,
    order: str = "row",
    test: int = 10,
    train_negatives: int = 1,
    test_negatives: int = 4,
    seed: int = 0,
) -> Clicks:
    """Which film is rated next (task N): 179,254 training and 47,150 test rows.

    Every user's ratings in time; each but the first is a positive whose history is what
    the user rated before, the last ``test`` ones for testing. Negatives are items of
    ratings drawn from the whole log, so in proportion to popularity, and drawn anew
    while the user has rated that item at any time.

    Args:
      ratings: the log.
      order: how equal times of a user are ordered: "row" of the file or item "id".
      test: last ratings of every user that are tested.
      train_negatives, test_negatives: per positive.
      seed: of the negatives.
    """
    if order not in ("row", "id"):
        raise ValueError(f"order must be 'row' or 'id', got {order!r}")
    tie = ratings.item if order == "id" else np.arange(len(ratings.item))
    by_time = np.lexsort((tie, ratings.time, ratings.user))
    user, item, time = (x[by_time] for x in (ratings.user, ratings.item, ratings.time))
    log = Log(item, ratings.cate[item], time)
    first, last = user_ranges(user)
    place = np.arange(len(user))
    tested = (place > first) & (place >= last - test)
    rng = np.random.default_rng(seed)
    owned = np.unique(user.astype(np.int64) * ratings.rows["item"] + item)
    splits = []
    for chosen, negatives in ((~tested, train_negatives), (tested, test_negatives)):
        at = np.flatnonzero(chosen & (place > first))
        drawn = _not_owned(rng, user[at], item, owned, ratings.rows["item"], negatives)
        splits.append(pairs(log, user, at, first[at], drawn, ratings.cate[drawn]))
    pool = np.flatnonzero(~tested)
    return Clicks("next item", splits[0], splits[1], log, pool, ratings.rows)


def task_rating(
    ratings: Ratings, *, test_users: int = 262, order: str = "row", seed: int = 1234
) -> Clicks:
    """Is the film rated 4 or more (task R): 75,994 training and 24,006 test rows.

    The history is what the user rated 4 or more at a strictly earlier time: ratings
    arrive in pages with one time, and the page of the candidate would tell its label.

    Args:
      ratings: the log.
      test_users: users of the test split, the first of a permutation.
      order: how equal times of a user are ordered in histories: "row" or item "id".
      seed: of the permutation.
    """
    users = np.unique(ratings.user)
    if not 0 < test_users < len(users):
        raise ValueError(
            f"test_users must be between 1 and {len(users) - 1}, got {test_users}"
        )
    if order not in ("row", "id"):
        raise ValueError(f"order must be 'row' or 'id', got {order!r}")
    tested = users[np.random.default_rng(seed).permutation(len(users))[:test_users]]
    tested = np.isin(ratings.user, tested)
    liked = np.flatnonzero(ratings.rating >= 4)
    tie = ratings.item[liked] if order == "id" else liked
    liked = liked[np.lexsort((tie, ratings.time[liked], ratings.user[liked]))]
    item = ratings.item[liked]
    log = Log(item, ratings.cate[item], ratings.time[liked])
    # (user, time) as one number: a history is then two binary searches.
    time = ratings.time.astype(np.int64) - int(ratings.time.min())
    base = ratings.user.astype(np.int64) * (int(time.max()) + 1)
    keys = (base + time)[liked]
    samples = Samples(
        ratings.user,
        ratings.item,
        ratings.cate[ratings.item],
        ratings.time,
        (ratings.rating >= 4).astype(np.float32),
        np.searchsorted(keys, base),
        np.searchsorted(keys, base + time),
    )
    train, test = (Samples(*(x[rows] for x in samples)) for rows in (~tested, tested))
    pool = np.flatnonzero(~tested[liked])
    return Clicks("rating", train, test, log, pool, ratings.rows)


def user_ranges(user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of every row's user and one past the last, in a log sorted by user."""
    first = np.searchsorted(user, user, side="left")
    return first, np.searchsorted(user, user, side="right")


def pairs(
    log: Log,
    user: np.ndarray,
    at: np.ndarray,
    start: np.ndarray,
    item: np.ndarray,
    cate: np.ndarray,
) -> Samples:
    """Positives of a log, each followed by its negatives with the same history.

    Args:
      log: behaviours sorted by user and time.
      user: (E,) the log's users.
      at: (P,) rows that are positives; their history ends before them.
      start: (P,) where their history begins.
      item, cate: (P, M) ids of the negatives.
    """
    each = item.shape[1] + 1

    def repeated(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, each)

    label = np.zeros((len(at), each), np.float32)
    label[:, 0] = 1
    return Samples(
        repeated(user[at]),
        np.column_stack([log.item[at], item]).astype(np.int32).ravel(),
        np.column_stack([log.cate[at], cate]).astype(np.int32).ravel(),
        repeated(log.time[at]),
        label.ravel(),
        repeated(start),
        repeated(at),
    )


def _not_owned(rng, user, log_item, owned, rows, each) -> np.ndarray:
    """(P, each) items of random log rows that the user of each row has nowhere."""
    per_user = np.bincount(owned // rows)
    if per_user.max() >= len(np.unique(log_item)):
        raise ValueError("a user has every item of the log, so no negative exists")
    user = np.repeat(user.astype(np.int64), each)
    drawn = np.empty(len(user), np.int32)
    left = np.arange(len(user))
    while len(left):
        drawn[left] = log_item[rng.integers(len(log_item), size=len(left))]
        key = user[left] * rows + drawn[left]
        near = np.minimum(np.searchsorted(owned, key), len(owned) - 1)
        left = left[owned[near] == key]
    return drawn.reshape(-1, each)
