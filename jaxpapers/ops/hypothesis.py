"""Rank and correlation tests, and many tests at a time; float64.

Statistics are computed on the device, p-values from SciPy's distributions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import stats


class Test(NamedTuple):
    """A statistic and its two-sided p-value."""

    statistic: float
    p: float


def ranks(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """Ranks from 1, ties averaged."""
    ordered = jnp.sort(x)
    low = jnp.searchsorted(ordered, x, side="left")
    high = jnp.searchsorted(ordered, x, side="right")
    return (low + high + 1).astype(x.dtype) / 2


def correlation(x: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, ""]:
    """Pearson's correlation; NaN where one side is constant."""
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / jnp.sqrt((x * x).sum() * (y * y).sum())


def pearson(x: Any, y: Any) -> Test:
    """Pearson's correlation and its t test.

    Raises:
      ValueError: other lengths, fewer than 3 rows, values not finite or constant.
    """
    return _correlation(x, y, by_rank=False)


def spearman(x: Any, y: Any) -> Test:
    """Correlation of average ranks and its t test.

    Raises:
      ValueError: see ``pearson``.

    Example:
      >>> spearman([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 7.0]).statistic
      0.8
    """
    return _correlation(x, y, by_rank=True)


def _correlation(x, y, by_rank: bool) -> Test:
    x, y = _sample("x", x, 3), _sample("y", y, 3)
    if x.shape != y.shape:
        raise ValueError(f"x and y must be of one length, got {len(x)} and {len(y)}")
    for name, v in (("x", x), ("y", y)):
        if np.ptp(v) == 0:
            raise ValueError(f"{name} is constant ({v[0]:g}): it has no correlation")
    with jax.enable_x64(True):
        r = float(_correlate(x, y, by_rank))
    t = r * np.sqrt((len(x) - 2) / max((1 - r) * (1 + r), 1e-300))
    return Test(round(r, 15), float(2 * stats.t.sf(abs(t), len(x) - 2)))


@jax.jit
def _both(x, y):
    return correlation(x, y), correlation(ranks(x), ranks(y))


def _correlate(x, y, by_rank):
    return _both(jnp.asarray(x), jnp.asarray(y))[by_rank]


def kruskal(groups: Sequence[Any]) -> Test:
    """Kruskal and Wallis's H over groups, corrected for ties; chi-squared with k - 1.

    Raises:
      ValueError: fewer than two groups, an empty one, all values equal.
    """
    samples = [_sample(f"group {i + 1}", g, 1) for i, g in enumerate(groups)]
    if len(samples) < 2:
        raise ValueError(f"kruskal needs at least 2 groups, got {len(samples)}")
    pooled = np.concatenate(samples)
    if np.ptp(pooled) == 0:
        raise ValueError(f"all values are {pooled[0]:g}: groups cannot differ")
    n, place = len(pooled), _ranked(pooled)
    ends = np.cumsum([0, *map(len, samples)])
    sums = sum(place[a:b].sum() ** 2 / (b - a) for a, b in zip(ends, ends[1:]))
    h = 12 / (n * (n + 1)) * sums - 3 * (n + 1)
    h /= 1 - _ties(pooled) / (n**3 - n)
    return Test(float(h), float(stats.chi2.sf(h, len(samples) - 1)))


def mannwhitney(x: Any, y: Any) -> Test:
    """U of x over y, its two-sided normal p-value with ties and continuity corrected.

    Raises:
      ValueError: an empty sample, all values equal.
    """
    x, y = _sample("x", x, 1), _sample("y", y, 1)
    pooled = np.concatenate([x, y])
    if np.ptp(pooled) == 0:
        raise ValueError(f"all values are {pooled[0]:g}: samples cannot differ")
    a, b, n = len(x), len(y), len(pooled)
    u = _ranked(pooled)[:a].sum() - a * (a + 1) / 2
    variance = a * b / 12 * (n + 1 - _ties(pooled) / (n * (n - 1)))
    z = (max(u, a * b - u) - a * b / 2 - 0.5) / np.sqrt(variance)
    return Test(float(u), float(min(2 * stats.norm.sf(z), 1.0)))


def benjamini_hochberg(p: Any) -> np.ndarray:
    """Adjusted p-values whose largest accepted one bounds the false discovery rate.

    Raises:
      ValueError: p-values outside [0, 1] or NaN.

    Example:
      >>> benjamini_hochberg([0.01, 0.02, 0.5]).tolist()
      [0.03, 0.03, 0.5]
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be in [0, 1], got {p.tolist()}")
    order = np.argsort(p)[::-1]
    scaled = p[order] * len(p) / np.arange(len(p), 0, -1)
    out = np.empty_like(p)
    out[order] = np.minimum(np.minimum.accumulate(scaled), 1)
    return out


def _ranked(values: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(_ranks(jnp.asarray(values)))


_ranks = jax.jit(ranks)


def _ties(values: np.ndarray) -> float:
    """Sum of t^3 - t over runs of equal values."""
    counts = np.unique(values, return_counts=True)[1].astype(np.float64)
    return float(np.sum(counts**3 - counts))


def _sample(name: str, values: Any, least: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < least:
        raise ValueError(
            f"{name} must hold at least {least} numbers, got shape {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name} has {int((~np.isfinite(values)).sum())} values that are not finite"
        )
    return values


def average_ranks(values: Any) -> np.ndarray:
    """Ranks from 1, ties averaged; on the host, for many small groups."""
    values = np.asarray(values, np.float64)
    ordered = np.sort(values)
    low = np.searchsorted(ordered, values, "left")
    return (low + np.searchsorted(ordered, values, "right") + 1) / 2
