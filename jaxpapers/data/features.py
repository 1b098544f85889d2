"""Columns of features: standardised numbers, bins, hash buckets."""

import zlib

import numpy as np


def standardize(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Columns scaled to mean 0 and standard deviation 1 over ``rows``, float32.

    A column that is constant over ``rows`` is only centred.

    Example:
      >>> standardize(np.array([[1.0, 5], [3, 5], [9, 6]]), np.array([True, True, False]))
      array([[-1.,  0.],
             [ 1.,  0.],
             [ 7.,  1.]], dtype=float32)
    """
    values = values.astype(np.float64)
    mean, deviation = values[rows].mean(0), values[rows].std(0)
    deviation = np.where(deviation > 0, deviation, 1)
    return ((values - mean) / deviation).astype(np.float32)


def bucketize(values: np.ndarray, bins: int, rows: np.ndarray) -> np.ndarray:
    """Equal-width bins of a column over its range in ``rows``.

    With the range scaled to [0, 1] the boundaries are j / (bins - 1), j = 0 .. bins - 2,
    each the lowest value of a bin. Bin 0 is below the range; the last bin has the range's
    top 1 / (bins - 1) and all above.

    Example:
      >>> bucketize(np.array([0.0, 2, 4, -9, 99]), 5, np.array([1, 1, 1, 0, 0], bool))
      array([1, 3, 4, 0, 4])
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    low, high = float(values[rows].min()), float(values[rows].max())
    scaled = (values - low) / ((high - low) or 1.0)
    return np.searchsorted(np.arange(bins - 1) / (bins - 1), scaled, side="right")


def stable_hash(text: str, buckets: int, column: int = 0) -> int:
    """Hash bucket of a category, the same in every process and on every machine.

    Args:
      text: the category, may be empty.
      buckets: number of buckets.
      column: seed of the hash, one per column.

    Example:
      >>> stable_hash("a", 512), stable_hash("a", 512, 1)
      (124, 12)
    """
    code = zlib.crc32(f"{column}:{text}".encode())
    # CRC-32 is linear and its low bits a poor hash: multiply, take the high bits.
    return (code * 0x9E3779B97F4A7C15 % 2**64 >> 32) * buckets >> 32
