"""Shuffled batches of arrays in memory."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class Examples:
    """Batches of an endless stream of examples, reshuffled every epoch.

    Args:
      fields: name -> array with one row per example.
      seed: of the permutations.
      transform: dict of a batch's fields -> dict, e.g. normalisation; None: identity.

    Raises:
      ValueError: no fields, no rows, or different numbers of rows; non-finite values.

    Example:
      >>> examples = Examples({"x": np.arange(6.0)})
      >>> len(examples), examples.batch(4, 4)["x"].shape
      (6, (4,))
    """

    def __init__(
        self,
        fields: Mapping[str, np.ndarray],
        seed: int = 0,
        transform: Callable[[dict], dict] | None = None,
    ):
        counts = {name: len(array) for name, array in fields.items()}
        if len(set(counts.values())) != 1 or not min(counts.values()):
            raise ValueError(f"fields must have the same number of rows, got {counts}")
        for name, array in fields.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite numbers, got NaN or infinity")
        self.fields = dict(fields)
        self.seed = seed
        self.transform = transform or dict
        self._order: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        """Examples of an epoch."""
        return len(next(iter(self.fields.values())))

    def batch(self, start: int, size: int, rows: slice | None = None) -> dict:
        """Examples ``start`` .. ``start + size - 1`` of the stream.

        Args:
          start: index of the first example.
          size: of the global batch.
          rows: the part of it that this host builds; None: all.
        """
        numbers = np.arange(start, start + size)[rows or slice(None)]
        index = [self._epoch(n // len(self))[n % len(self)] for n in numbers]
        index = np.array(index, int)
        return self.transform(
            {name: array[index] for name, array in self.fields.items()}
        )

    def _epoch(self, epoch):
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, int(epoch)])
            self._order = (epoch, rng.permutation(len(self)))
        return self._order[1]
