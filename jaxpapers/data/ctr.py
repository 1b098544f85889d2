"""Click logs as arrays, and batches of samples with their histories.

A sample is (user, candidate, label) and a range of rows of the log: the user's earlier
behaviours, oldest first. Histories are gathered per batch, so memory is that of the log
at any history length.

Ids of every table: 0 is padding, 1 is out of vocabulary, known values start at 2 (as in
``nets.embedding``).

``data.ctr_tasks`` builds samples from ratings, ``data.ctr_files`` reads the papers'
files.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

OOV = 1
FIRST = 2

_COUNT_CHUNK = 8192


class Samples(NamedTuple):
    """Samples of a split; arrays of one length, int32 unless noted.

    Attributes:
      user, item, cate: ids of the user, the candidate and its category.
      time: of the impression, seconds; 0 without times.
      label: float32, 1 for a click.
      start, stop: int64 range of the log's rows that is the history, oldest first.
    """

    user: np.ndarray
    item: np.ndarray
    cate: np.ndarray
    time: np.ndarray
    label: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class Log(NamedTuple):
    """Behaviours; int32 arrays of one length: item and category ids, seconds."""

    item: np.ndarray
    cate: np.ndarray
    time: np.ndarray


class Clicks(NamedTuple):
    """A data set with its split.

    Attributes:
      name: of the source.
      train, test: samples.
      log: behaviours; a sample's history is a range of its rows.
      pool: int64 rows of the log that auxiliary negatives are drawn from, those of the
        training split, hence proportional to popularity.
      rows: sizes of the tables "user", "item", "cate", including padding and out of
        vocabulary.
      negatives: item and category ids of the source's own negatives, one per row of the
        log; None: negatives are drawn from ``pool``.
      notes: what the reader found out about the files, for the summary of a run.
    """

    name: str
    train: Samples
    test: Samples
    log: Log
    pool: np.ndarray
    rows: dict[str, int]
    negatives: tuple[np.ndarray, np.ndarray] | None = None
    notes: str = ""


class Examples:
    """Shuffled batches of a split, addressed by a global example index.

    Each epoch is a seeded permutation of the split. The only state of a run is the index
    of its next example, for any number of hosts.
    """

    def __init__(
        self,
        clicks: Clicks,
        length: int = 50,
        *,
        split: str = "train",
        seed: int = 0,
        shuffle: bool = True,
        times: bool = False,
        negatives: bool = False,
    ):
        """Batches of ``clicks``.

        Args:
          clicks: data set.
          length: most recent behaviours of a history that are kept.
          split: "train" or "test".
          seed: of the permutations and of the auxiliary negatives.
          shuffle: False keeps the split's order in every epoch.
          times: add ``time`` and ``hist_time`` to batches.
          negatives: add ``neg_hist_item`` and ``neg_hist_cate`` to batches.

        Raises:
          ValueError: length < 1, an empty split, inconsistent arrays, or times or
            negatives that the data set does not have.
        """
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if length < 1:
            raise ValueError(f"length of hist_item must be at least 1, got {length}")
        self.samples = getattr(clicks, split)
        check(clicks, split)
        if times and not self.samples.time.any():
            raise ValueError(f"{clicks.name}: has no times; use times=False")
        if negatives and clicks.negatives is None:
            pool = clicks.log.item[clicks.pool]
            different = np.flatnonzero(pool != pool[:1])
            if not len(different):
                raise ValueError(
                    f"{clicks.name}: auxiliary negatives need two items in the pool"
                )
            # Fallbacks for draws that repeatedly equal the behaviour itself.
            self._spare = clicks.pool[[0, different[0]]]
        self.clicks = clicks
        self.length = length
        self.seed = seed
        self.shuffle = shuffle
        self.times = times
        self.negatives = negatives
        self._epoch: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.samples.label)

    def batch(self, start: int, size: int, rows: slice = slice(None)) -> dict:
        """Examples start .. start + size - 1.

        Args:
          start: global index of the first example.
          size: of the global batch.
          rows: the part of the batch that this host builds.

        Returns:
          int32 ``user``, ``item``, ``cate``, ``length`` (B,), float32 ``label`` (B,),
          int32 ``hist_item``, ``hist_cate`` (B, T), oldest behaviour first, right-padded
          with zeros. Optional ``time`` (B,), ``hist_time`` (B, T), ``neg_hist_item`` and
          ``neg_hist_cate`` (B, T), at each position an item other than the behaviour's.
        """
        example = np.arange(start, start + size)[rows]
        epoch, place = np.divmod(example, len(self))
        index = np.empty_like(place)
        for e in np.unique(epoch):
            here = epoch == e
            index[here] = self._order(int(e))[place[here]]
        return self.gather(index, example)

    def gather(self, index: np.ndarray, example: np.ndarray) -> dict:
        """Batch of the samples ``index`` of the split.

        Args:
          index: rows of the split.
          example: global example indices, from which auxiliary negatives are hashed.
        """
        samples, log = self.samples, self.clicks.log
        stop = samples.stop[index]
        count = np.minimum(stop - samples.start[index], self.length)
        step = np.arange(self.length)
        valid = step < count[:, None]
        at = ((stop - count)[:, None] + step)[valid]

        def spread(values: np.ndarray) -> np.ndarray:
            out = np.zeros(valid.shape, np.int32)
            out[valid] = values
            return out

        batch = {
            name: getattr(samples, name)[index] for name in ("user", "item", "cate")
        }
        batch["label"] = samples.label[index]
        batch["length"] = count.astype(np.int32)
        batch["hist_item"] = spread(log.item[at])
        batch["hist_cate"] = spread(log.cate[at])
        if self.times:
            batch["time"] = samples.time[index]
            batch["hist_time"] = spread(log.time[at])
        if self.negatives:
            if self.clicks.negatives is None:
                drawn = self._draw(log.item[at], example, valid)
                item, cate = log.item[drawn], log.cate[drawn]
            else:
                item, cate = (x[at] for x in self.clicks.negatives)
            batch["neg_hist_item"], batch["neg_hist_cate"] = spread(item), spread(cate)
        return batch

    def score_batches(self, size: int) -> Iterator[dict]:
        """All samples of the split once, in order, for evaluation.

        Yields:
          Batches with float32 ``weight`` (size,), 0 for the padding of the last.
        """
        for start in range(0, len(self), size):
            index = np.arange(start, start + size)
            weight = (index < len(self)).astype(np.float32)
            index = np.minimum(index, len(self) - 1)
            yield {**self.gather(index, index), "weight": weight}

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self._epoch = (epoch, rng.permutation(len(self)))
        return self._epoch[1]

    def _draw(
        self, item: np.ndarray, example: np.ndarray, valid: np.ndarray
    ) -> np.ndarray:
        """Rows of the pool, one per behaviour, whose item is not the behaviour's.

        Draws are hashes of (seed, example, step, attempt), so that any part of a batch
        can be built by itself.
        """
        pool, items = self.clicks.pool, self.clicks.log.item
        row, step = np.nonzero(valid)
        key = _mix(_mix(example[row].astype(np.uint64)) + np.uint64(self.seed))
        key = _mix(key + step.astype(np.uint64))
        drawn = pool[(key % np.uint64(len(pool))).astype(np.int64)]
        for attempt in range(1, 9):
            hit = np.flatnonzero(items[drawn] == item)
            if not len(hit):
                return drawn
            again = _mix(key[hit] + np.uint64(attempt))
            drawn[hit] = pool[(again % np.uint64(len(pool))).astype(np.int64)]
        hit = np.flatnonzero(items[drawn] == item)
        same = items[self._spare[0]] == item[hit]
        drawn[hit] = np.where(same, self._spare[1], self._spare[0])
        return drawn


def occurrences(clicks: Clicks, length: int = 50) -> dict[str, np.ndarray]:
    """Number of training samples with each id: n_j of DIN's mini-batch-aware L2.

    An id counts once per sample, as candidate or in the history. Padding has 0.

    Args:
      clicks: data set.
      length: most recent behaviours of a history that are kept.

    Returns:
      int64 counts, one per row of the tables "user", "item", "cate".
    """
    examples = Examples(clicks, length, shuffle=False)
    counts = {name: np.zeros(n, np.int64) for name, n in clicks.rows.items()}
    for start in range(0, len(examples), _COUNT_CHUNK):
        batch = examples.batch(start, min(_COUNT_CHUNK, len(examples) - start))
        counts["user"] += np.bincount(batch["user"], minlength=clicks.rows["user"])
        for name in ("item", "cate"):
            ids = np.sort(np.column_stack([batch[name], batch[f"hist_{name}"]]), 1)
            first = np.diff(ids, axis=1, prepend=0) > 0
            counts[name] += np.bincount(ids[first], minlength=clicks.rows[name])
    return counts


def popularity(clicks: Clicks) -> np.ndarray:
    """Baseline scores of the test samples: log(1 + training clicks of the candidate)."""
    clicked = clicks.train.item[clicks.train.label > 0]
    count = np.bincount(clicked, minlength=clicks.rows["item"])
    return np.log1p(count)[clicks.test.item]


def item_mean(clicks: Clicks, *, pseudo: float = 5.0) -> np.ndarray:
    """Baseline scores of the test samples: mean training label of the candidate.

    Args:
      clicks: data set.
      pseudo: pseudo-count of the overall mean, added to every item.
    """
    item, label, n = clicks.train.item, clicks.train.label, clicks.rows["item"]
    total = np.bincount(item, label, n) + pseudo * label.mean(dtype=np.float64)
    return (total / (np.bincount(item, minlength=n) + pseudo))[clicks.test.item]


def shuffle_labels(clicks: Clicks, seed: int = 0) -> Clicks:
    """The data set with permuted training labels, which carry no signal."""
    label = np.random.default_rng(seed).permutation(clicks.train.label)
    return clicks._replace(train=clicks.train._replace(label=label))


def hold_out(clicks: Clicks, share: float = 0.2, seed: int = 0) -> Clicks:
    """Data set whose test split is the training samples of some users.

    For choosing hyper-parameters without the test samples.

    Args:
      clicks: data set.
      share: of the training users that are held out.
      seed: of their choice.

    Raises:
      ValueError: a share that leaves a split without users.
    """
    users = np.unique(clicks.train.user)
    count = round(share * len(users))
    if not 0 < count < len(users):
        raise ValueError(
            f"hold_out needs a share that leaves users on both sides, got {share} of "
            f"{len(users)} users"
        )
    held = np.random.default_rng(seed).permutation(users)[:count]
    held = np.isin(clicks.train.user, held)
    train, test = (Samples(*(x[rows] for x in clicks.train)) for rows in (~held, held))
    return clicks._replace(train=train, test=test)


def check(clicks: Clicks, split: str = "train") -> None:
    """Checks that a split is not empty and its arrays are consistent.

    Raises:
      ValueError: names the field, the value and what is expected.
    """
    samples: Samples = getattr(clicks, split)
    where = f"{clicks.name}, {split}"
    n, e = len(samples.label), len(clicks.log.item)
    if not n:
        raise ValueError(f"{where}: no samples")
    for name, values in samples._asdict().items():
        if len(values) != n:
            raise ValueError(f"{where}: {name} has {len(values)} values, expected {n}")
    for name, values in clicks.log._asdict().items():
        if len(values) != e:
            raise ValueError(f"{clicks.name}: log.{name} has {len(values)} of {e} rows")
    if not np.isin(samples.label, (0, 1)).all():
        raise ValueError(f"{where}: label must be 0 or 1, got others or NaN")
    for name, rows in clicks.rows.items():
        ids = [getattr(samples, name)]
        ids += [getattr(clicks.log, name)] if name != "user" else []
        low = min(int(x.min(initial=1)) for x in ids)
        high = max(int(x.max(initial=1)) for x in ids)
        if low < 1 or high >= rows:
            raise ValueError(
                f"{where}: {name} must be in [1, {rows - 1}] (0 is padding), "
                f"got {low if low < 1 else high}"
            )
    start, stop = samples.start, samples.stop
    if start.min() < 0 or (start > stop).any() or stop.max() > e:
        raise ValueError(f"{where}: start and stop must be ranges of the {e} log rows")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's mixing function, a bijection of 64-bit integers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
