r"""Measures of semantic IDs: cohesion, discrimination, use of codes, collisions.

A semantic ID (SID) is a tuple of codes, one per level. Items with the same ID, or the
same first codes, are a group G; q are their quantised vectors and p the groups' centres
(R3-VAE, arXiv 2604.11440, section on SID measures).

$$ SC(G) = \frac{2}{|G|^2 - |G|} \sum_{i<j} \cos(q_i, q_j), \quad
   PD = \log \mathrm{mean}_{a<b}\, e^{-t (1 - \cos(p_a, p_b))} $$

SC is at most 1, higher is better; PD of M groups lies in [-t M / (M - 1), 0], lower is
better.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.ops.vector_quantization import unit

HIGHEST = lax.Precision.HIGHEST
MAX_GROUPS = 4096


def cohesion(
    q: Float[Array, "N D"], group: Int[Array, " N"], groups: int
) -> Float[Array, ""]:
    r"""SC: mean cosine of the pairs of a group, mean over groups of two or more.

    In O(N) by $(\|\sum u_i\|^2 - |G|) / (|G|^2 - |G|)$ with unit vectors u;
    differentiable in q.

    Args:
      q: vectors, none zero.
      group: of each, in [0, groups).
      groups: static bound of their number.

    Returns:
      SC; NaN where no group has two members (0 in a loss: see ``cohesion_or``).
    """
    total, count = _cohesion(q, group, groups)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)


def cohesion_or(
    q: Float[Array, "N D"],
    group: Int[Array, " N"],
    groups: int,
    default: float = 0.0,
) -> Float[Array, ""]:
    """SC, and ``default`` where no group has two members: for losses."""
    total, count = _cohesion(q, group, groups)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), default)


def _cohesion(q, group, groups):
    """Sum of SC(G) over groups of two or more, and their number."""
    u = unit(q)
    member = jax.nn.one_hot(group, groups, dtype=q.dtype)
    if groups > 512:  # Products with a one-hot matrix are for training.
        sums = jax.ops.segment_sum(u, group, groups)
        n = jax.ops.segment_sum(jnp.ones(len(q), q.dtype), group, groups)
    else:
        sums, n = jnp.matmul(member.T, u, precision=HIGHEST), member.sum(0)
    pairs = jnp.maximum(n * n - n, 1)
    each = (jnp.square(sums).sum(-1) - n) / pairs
    several = n >= 2
    return jnp.where(several, each, 0).sum(), several.sum().astype(q.dtype)


def discrimination(
    centres: Float[Array, "M D"],
    t: float = 2.0,
    *,
    present: Any = None,
    chunk: int = 512,
    key: Key[Array, ""] | None = None,
    pairs: int = 2**20,
) -> Float[Array, ""]:
    """PD of group centres; differentiable.

    Args:
      centres: none zero.
      t: inverse temperature.
      present: (M,) False at rows that are no group; None: all are.
      chunk: rows whose pairs are in memory at once.
      key: draw ``pairs`` random pairs where there are more than ``MAX_GROUPS`` rows;
        None: all pairs.
      pairs: see ``key``.

    Returns:
      PD, NaN where there are fewer than two groups.
    """
    m = len(centres)
    u = unit(centres)
    present = jnp.ones(m, bool) if present is None else present
    if key is not None and m > MAX_GROUPS:
        i, j = jax.random.randint(key, (2, pairs), 0, jnp.array([[m], [m - 1]]))
        j = j + (j >= i)
        cosine = (u[i] * u[j]).sum(-1)
        kept = present[i] & present[j]
    elif m <= chunk:
        cosine = jnp.matmul(u, u.T, precision=HIGHEST)
        kept = present[:, None] & present[None] & ~jnp.eye(m, dtype=bool)
    else:
        return _chunked(u, t, present, chunk)
    return _log_mean(-t * (1 - cosine), kept)


def _log_mean(value, kept):
    count = kept.sum()
    total = jax.nn.logsumexp(jnp.where(kept, value, -jnp.inf))
    return jnp.where(count > 0, total - jnp.log(jnp.maximum(count, 1)), jnp.nan)


def _chunked(u, t, present, chunk):
    """``_log_mean`` over all ordered pairs, some rows at a time."""
    m = len(u)
    size = -(-m // chunk) * chunk
    rows = jnp.pad(u, ((0, size - m), (0, 0))).reshape(-1, chunk, u.shape[1])
    number = jnp.arange(size).reshape(-1, chunk)
    here = jnp.pad(present, (0, size - m)).reshape(-1, chunk)

    def part(inputs):
        u_rows, i, kept = inputs
        cosine = jnp.matmul(u_rows, u.T, precision=HIGHEST)
        kept = kept[:, None] & present[None] & (i[:, None] != jnp.arange(m)[None])
        value = jnp.where(kept, -t * (1 - cosine), -jnp.inf)
        return jax.nn.logsumexp(value), kept.sum()

    totals, counts = lax.map(jax.checkpoint(part), (rows, number, here))
    count = counts.sum()
    value = jax.nn.logsumexp(totals) - jnp.log(jnp.maximum(count, 1))
    return jnp.where(count > 0, value, jnp.nan)


def soft_centres(
    q: Float[Array, "B D"], weights: Float[Array, "B K"]
) -> Float[Array, "K D"]:
    r"""Means of q by the weights of each code, $\sum_i w_{ik} q_i / \sum_i w_{ik}$."""
    total = jnp.maximum(weights.sum(0), 1e-12)
    return jnp.matmul(weights.T, q, precision=HIGHEST) / total[:, None]


class Groups(NamedTuple):
    """Items by a prefix of their SID, on the host.

    Attributes:
      group: (N,) number of each item's group, groups in the order of their codes.
      count: number of groups.
      sizes: (count,) items of each.
    """

    group: np.ndarray
    count: int
    sizes: np.ndarray


def groups_of(sid: Any, prefix: int = 0) -> Groups:
    """Groups of the items that share their first ``prefix`` codes (0: all codes).

    Raises:
      ValueError: no items, or a prefix longer than the SID.
    """
    sid = np.asarray(sid)
    if sid.ndim != 2 or not sid.size:
        raise ValueError(f"expected SIDs (items, levels), got shape {sid.shape}")
    prefix = prefix or sid.shape[1]
    if not 1 <= prefix <= sid.shape[1]:
        raise ValueError(
            f"the prefix must be between 1 and {sid.shape[1]} codes, got {prefix}"
        )
    _, group, sizes = np.unique(
        sid[:, :prefix], axis=0, return_inverse=True, return_counts=True
    )
    return Groups(group.reshape(-1).astype(np.int32), len(sizes), sizes)


def code_statistics(sid: Any, codes: Any) -> dict[str, float]:
    """Use of codes and collisions of SIDs, on the host in float64.

    Args:
      sid: (N, L) codes.
      codes: K of each level, one number for all or L.

    Returns:
      Per level ``usage_l`` (distinct codes / K), ``perplexity_l`` (exp of the entropy of
      code frequencies) and ``gini_l`` (of the counts of all K codes, 0: equal);
      ``unique`` (distinct SIDs / N), ``collision`` (1 - unique), ``colliding`` (share of
      items whose SID another one has), ``items_per_sid`` (N / distinct, what some papers
      call the collision rate), ``largest_group``, ``entropy`` (of SIDs / log N),
      ``capacity`` (N / number of possible SIDs).

    Raises:
      ValueError: no items, codes out of range.
    """
    sid = np.asarray(sid)
    groups = groups_of(sid)
    n, levels = sid.shape
    sizes = np.broadcast_to(np.asarray(codes), (levels,))
    if sid.min() < 0 or (sid >= sizes).any():
        raise ValueError(
            f"codes must be in [0, K) with K {sizes.tolist()}, got {sid.min(0).tolist()} "
            f"to {sid.max(0).tolist()}"
        )
    values = {}
    for level in range(levels):
        counts = np.bincount(sid[:, level], minlength=sizes[level])
        values[f"usage_{level + 1}"] = float((counts > 0).mean())
        values[f"perplexity_{level + 1}"] = math.exp(_entropy(counts))
        values[f"gini_{level + 1}"] = _gini(counts)
    several = groups.sizes[groups.sizes > 1]
    return values | {
        "unique": groups.count / n,
        "collision": 1 - groups.count / n,
        "colliding": float(several.sum()) / n,
        "items_per_sid": n / groups.count,
        "largest_group": float(groups.sizes.max()),
        "entropy": _entropy(groups.sizes) / math.log(n) if n > 1 else 1.0,
        "capacity": n / math.prod(float(k) for k in sizes),
    }


def neighbour_overlap(
    x: Any, q: Any, k: int = 10, rows: int = 2000, seed: int = 0
) -> float:
    """Share of the k nearest neighbours by cosine that x and q have in common.

    Args:
      x, q: (N, D), (N, E) of the same items, none zero.
      k: neighbours, lowered to N - 1.
      rows: items looked at, drawn by ``seed`` where there are more.
      seed: see ``rows``.
    """
    x, q = (np.asarray(v, np.float64) for v in (x, q))
    n = len(x)
    k = min(k, n - 1)
    chosen = np.arange(n)
    if n > rows:
        chosen = np.random.default_rng(seed).choice(n, rows, replace=False)

    def near(v):
        v = v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-30)
        score = v[chosen] @ v.T
        score[np.arange(len(chosen)), chosen] = -np.inf
        return np.argsort(-score, axis=1, kind="stable")[:, :k]

    a, b = near(x), near(q)
    return float(np.mean([len(np.intersect1d(*pair)) / k for pair in zip(a, b)]))


def _entropy(counts: np.ndarray) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _gini(counts: np.ndarray) -> float:
    """Mean absolute difference of two counts by twice their mean."""
    ordered = np.sort(counts.astype(np.float64))
    n = len(ordered)
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return float((ranks * ordered).sum() / (n * ordered.sum()))
