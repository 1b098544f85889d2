"""Users' sequences of items: k-core, leave-one-out, windows for training, baselines.

The protocol of SASRec and TIGER: every event counts as positive, events are in the order
of user and time (equal times in file order), the last item of a user is the test target,
the one before it the validation target, all others are for training. Users with fewer
than three events are for training only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

NONE = -1
SPLITS = ("test", "validation")


class Sequences(NamedTuple):
    """Events of users in time order.

    Attributes:
      items: number of each event's item, users one after the other.
      start: (users + 1,) first event of each user, and the end.
      count: N, items of the catalogue.
    """

    items: np.ndarray
    start: np.ndarray
    count: int

    @property
    def users(self) -> int:
        """Number of users."""
        return len(self.start) - 1

    def of(self, user: int) -> np.ndarray:
        """Items of a user, the oldest first."""
        return self.items[self.start[user] : self.start[user + 1]]

    @property
    def candidates(self) -> np.ndarray:
        """Items that occur, which are those that can be recommended."""
        return np.unique(self.items)


class Targets(NamedTuple):
    """Rows of an evaluation.

    Attributes:
      user: of each row.
      history: (rows, H), padded on the left by -1.
      target: the item to find.
      seen: per row, all items of the user before the target.
    """

    user: np.ndarray
    history: np.ndarray
    target: np.ndarray
    seen: Sequence[np.ndarray]


def from_events(
    user: Any, item: Any, time: Any, count: int, core: int = 5
) -> Sequences:
    """Sequences of events, of users and items with ``core`` events at least.

    Args:
      user, item, time: of events in file order; items in [0, count).
      count: items of the catalogue.
      core: users and items with fewer events are removed, until none is left with fewer.

    Raises:
      ValueError: no events are left, arrays of other lengths, or items out of range.
    """
    user, item, time = (np.asarray(x) for x in (user, item, time))
    if not len(user) == len(item) == len(time):
        raise ValueError(
            f"expected as many users as items and times, got {len(user)}, {len(item)} "
            f"and {len(time)}"
        )
    if len(item) and not 0 <= item.min() <= item.max() < count:
        raise ValueError(
            f"items must be in [0, {count}), got {item.min()} to {item.max()}"
        )
    kept = np.arange(len(user))
    while len(kept):
        enough = np.ones(len(kept), bool)
        for ids in (user[kept], item[kept]):
            _, group, size = np.unique(ids, return_inverse=True, return_counts=True)
            enough &= size[group.reshape(-1)] >= core
        if enough.all():
            break
        kept = kept[enough]
    if not len(kept):
        raise ValueError(
            f"no users and items have {core} events each, of {len(user)} events; lower "
            "config.data.core"
        )
    order = kept[np.lexsort((kept, time[kept], user[kept]))]
    _, start = np.unique(user[order], return_index=True)
    return Sequences(item[order].astype(np.int32), np.append(start, len(order)), count)


def training(sequences: Sequences) -> list[np.ndarray]:
    """Items of each user that are for training: all but the last two."""
    each = [sequences.of(u) for u in range(sequences.users)]
    return [x[:-2] if len(x) >= 3 else x for x in each]


def targets(sequences: Sequences, split: str, history: int) -> Targets:
    """Rows of an evaluation: users with at least three events.

    Raises:
      ValueError: an unknown split, or no such user.
    """
    if split not in SPLITS:
        raise ValueError(f"config.data.split must be one of {SPLITS}, got {split!r}")
    last = -1 if split == "test" else -2
    users = [u for u in range(sequences.users) if len(sequences.of(u)) >= 3]
    if not users:
        raise ValueError("no user has three events, of which one can be the target")
    seen = [sequences.of(u)[:last] for u in users]
    rows = np.stack([padded(x, history) for x in seen])
    target = np.array([sequences.of(u)[last] for u in users], np.int32)
    return Targets(np.array(users, np.int32), rows, target, seen)


def padded(items: np.ndarray, length: int) -> np.ndarray:
    """The last ``length`` items, padded on the left by -1."""
    items = items[-length:]
    return np.pad(items, (length - len(items), 0), constant_values=NONE).astype(
        np.int32
    )


class Windows:
    """Batches of windows of the users' training items, drawn at random.

    A user is drawn in proportion to the items that are for training, then the end of the
    window; a window has ``length`` items, or all up to its end where there are fewer. The
    batch of a position in the stream does not depend on the batches before.

    Args:
      items: of each user.
      length: of a window.
      seed: of the draws.

    Raises:
      ValueError: no user has items.
    """

    def __init__(self, items: Sequence[np.ndarray], length: int, seed: int = 0):
        self.items, self.length, self.seed = items, length, seed
        sizes = np.array([len(x) for x in items])
        if not sizes.sum():
            raise ValueError("no user has items to train on")
        self._ends = np.cumsum(sizes)
        self._first = self._ends - sizes

    def __len__(self) -> int:
        """Items to train on."""
        return int(self._ends[-1])

    def batch(self, start: int, size: int, rows: slice | None = None) -> dict:
        """See ``arrays.Examples``: ``items`` (size, length), ``user`` (size)."""
        numbers = np.arange(start, start + size)[rows or slice(None)]
        places = [
            np.random.default_rng([self.seed, int(n)]).integers(len(self))
            for n in numbers
        ]
        users = np.searchsorted(self._ends, places, side="right")
        windows = [
            padded(
                self.items[u][: self._end(int(u), int(p - self._first[u]))], self.length
            )
            for u, p in zip(users, places)
        ]
        return {"items": np.stack(windows), "user": users.astype(np.int32)}

    def _end(self, user: int, place: int) -> int:
        """Windows end at each item of a long sequence, and at the end of a short one."""
        return max(place + 1, min(len(self.items[user]), self.length))


def popularity(items: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Events of each item, (count,)."""
    return np.bincount(np.concatenate(items), minlength=count).astype(float)


def markov(items: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Transitions from each item to the next one, (count, count).

    Ties, and items that never followed, are ordered by popularity: a share below 1 of it
    is added.
    """
    table = np.zeros((count, count), np.float32)
    for own in items:
        np.add.at(table, (own[:-1], own[1:]), 1)
    popular = popularity(items, count)
    return table + (popular / (popular.sum() + 1)).astype(np.float32)[None]


def ranked(
    scores: np.ndarray, rows: Targets, candidates: np.ndarray, k: int, exclude: bool
) -> np.ndarray:
    """The k items with the highest scores of each row, -1 where there are fewer.

    Args:
      scores: (count,) for all rows, or (rows, count).
      rows: of the evaluation.
      candidates: items that can be found.
      k: items per row.
      exclude: leave out what the user has had.
    """
    allowed = np.full(scores.shape[-1], -np.inf)
    allowed[candidates] = 0
    found = np.full((len(rows.target), k), NONE, np.int64)
    for i, seen in enumerate(rows.seen):
        own = (scores if scores.ndim == 1 else scores[i]) + allowed
        if exclude:
            own = own.copy()
            own[seen] = -np.inf
        order = np.argsort(-own, kind="stable")[:k]
        order = order[own[order] > -np.inf]
        found[i, : len(order)] = order
    return found


def seen_table(rows: Targets, count: int) -> np.ndarray:
    """(rows, count) True at what a user has had."""
    table = np.zeros((len(rows.target), count), bool)
    for i, seen in enumerate(rows.seen):
        table[i, seen] = True
    return table
