"""Click tasks on ratings: the next rated film, and whether a film is rated 4 or more.

``generated`` makes ratings up, for trials without any file.

``data.ctr_files`` builds samples with the same functions.
"""

from typing import NamedTuple

import numpy as np

from jaxpapers.data.ctr import FIRST, Clicks, Log, Samples


class Ratings(NamedTuple):
    """Ratings in file order.

    Attributes:
      user, item: int32 ids.
      rating: float32.
      time: int32 unix seconds.
      cate: int32 category of each row of the item table.
      rows: sizes of the tables "user", "item", "cate".
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    time: np.ndarray
    cate: np.ndarray
    rows: dict[str, int]


def generated(
    *,
    users: int = 200,
    items: int = 400,
    cates: int = 20,
    each: int = 40,
    seed: int = 0,
) -> Ratings:
    """A log in which interests can be learned, for trials without any file.

    A user likes three of the categories, and goes on with the one of the behaviour before
    in six of ten cases; one behaviour in four is of any category. Within a category, the
    k-th item is chosen in proportion to 1/k. Ratings are 3 to 5, higher for the first
    category.

    Args:
      users: number of users.
      items: number of items, dealt to the categories in turn.
      cates: number of categories.
      each: behaviours of a user, an hour apart.
      seed: of all choices.
    """
    rng = np.random.default_rng(seed)
    favourites = rng.permuted(np.tile(np.arange(cates), (users, 1)), axis=1)[:, :3]
    place = rng.choice(3, (users, each), p=(0.5, 0.3, 0.2))
    stays = rng.random((users, each)) < 0.6
    for t in range(1, each):
        place[:, t] = np.where(stays[:, t], place[:, t - 1], place[:, t])
    liked = np.take_along_axis(favourites, place, 1)
    other = rng.integers(cates, size=liked.shape)
    chosen = np.where(rng.random(liked.shape) < 0.25, other, liked).ravel()
    popularity = 1 / np.arange(1, items // cates + 1)
    rank = rng.choice(len(popularity), users * each, p=popularity / popularity.sum())
    item = FIRST + rank * cates + chosen
    cate = np.zeros(items + FIRST, np.int32)
    cate[FIRST:] = FIRST + np.arange(items) % cates
    rating = np.clip(5 - place.ravel() + rng.integers(-1, 1, users * each), 3, 5)
    start = np.repeat(rng.integers(0, 10**6, users), each)
    return Ratings(
        np.repeat(np.arange(users, dtype=np.int32) + FIRST, each),
        item.astype(np.int32),
        rating.astype(np.float32),
        (start + 3600 * np.tile(np.arange(1, each + 1), users)).astype(np.int32),
        cate,
        {"user": users + FIRST, "item": items + FIRST, "cate": cates + FIRST},
    )


def task_next_item(
    ratings: Ratings,
    *,
    order: str = "row",
    test: int = 10,
    train_negatives: int = 1,
    test_negatives: int = 4,
    seed: int = 0,
) -> Clicks:
    """Next-item prediction: 179,254 training and 47,150 test rows of MovieLens-100k.

    Each rating of a user but the first is a positive, its history the user's earlier
    ratings; the last ``test`` of each user are the test split. Negatives are drawn from
    the items of all ratings, in proportion to popularity, among those that the user never
    rated.

    Args:
      ratings: the log.
      order: of a user's ratings with equal times: "row" of the file or item "id".
      test: number of last ratings per user in the test split.
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
    rated = np.unique(user.astype(np.int64) * ratings.rows["item"] + item)
    splits = []
    for chosen, negatives in ((~tested, train_negatives), (tested, test_negatives)):
        at = np.flatnonzero(chosen & (place > first))
        drawn = _unrated(rng, user[at], item, rated, ratings.rows["item"], negatives)
        splits.append(pairs(log, user, at, first[at], drawn, ratings.cate[drawn]))
    pool = np.flatnonzero(~tested)
    return Clicks("next item", splits[0], splits[1], log, pool, ratings.rows)


def task_rating(
    ratings: Ratings, *, test_users: int = 262, order: str = "row", seed: int = 1234
) -> Clicks:
    """Is a film rated 4 or more: 75,994 training and 24,006 test rows of MovieLens-100k.

    The history is the films that the user rated 4 or more at a strictly earlier time:
    ratings come in pages with one time, and the candidate's page would leak its label.

    Args:
      ratings: the log.
      test_users: number of users in the test split.
      order: of history items with equal times: "row" of the file or item "id".
      seed: of the permutation of users.
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
    # (user, time) as one integer: a history is then two binary searches.
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
    """First row and one past the last row of each row's user, in a log sorted by user."""
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
    """Samples: positives of a log, each followed by negatives with the same history.

    Args:
      log: E behaviours sorted by user and time.
      user: (E,) user of each behaviour.
      at: (P,) rows of the positives; a history ends before its positive.
      start: (P,) first rows of the histories.
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


def _unrated(rng, user, log_item, rated, rows, each) -> np.ndarray:
    """(P, each) items of random log rows that each row's user has not rated."""
    per_user = np.bincount(rated // rows)
    if per_user.max() >= len(np.unique(log_item)):
        raise ValueError("a user has rated every item of the log: no negative exists")
    user = np.repeat(user.astype(np.int64), each)
    drawn = np.empty(len(user), np.int32)
    pending = np.arange(len(user))
    while len(pending):
        drawn[pending] = log_item[rng.integers(len(log_item), size=len(pending))]
        key = user[pending] * rows + drawn[pending]
        near = np.minimum(np.searchsorted(rated, key), len(rated) - 1)
        pending = pending[rated[near] == key]
    return drawn.reshape(-1, each)
