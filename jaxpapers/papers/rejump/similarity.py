r"""Similarity of walks: how often one kind of jump follows another.

$P_{ab} = (c_{ab} + \epsilon) / (\sum_b c_{ab} + 3 \epsilon)$ of consecutive jumps a, b;
similarity is $1 - \frac13 \sum_a \mathrm{JSD}_2(P_a, Q_a)$, each divergence in [0, 1].
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

SMOOTHING = 1e-9


def transition_matrix(
    category: Int[Any, "*B S"], smoothing: float = SMOOTHING
) -> Float[Array, "*B 3 3"]:
    """Shares of the categories that follow each category; a row never seen is uniform.

    Args:
      category: see ``TraceBatch.category``; jumps of unknown ones, and pairs with one,
        do not count.
      smoothing: added to every count.
    """
    category = jnp.asarray(category)
    before, after = category[..., :-1], category[..., 1:]
    pair = jnp.where((before >= 0) & (after >= 0), 3 * before + after, -1)
    real = jnp.result_type(float)
    counts = jnp.stack([(pair == k).sum(-1) for k in range(9)], -1).astype(real)
    counts = counts.reshape(*category.shape[:-1], 3, 3) + smoothing
    return counts / counts.sum(-1, keepdims=True)


def walk_similarity(
    p: Float[Any, "*B 3 3"], q: Float[Any, "*B 3 3"]
) -> Float[Array, "*B"]:
    """Similarity of two walks by their transition matrices, in [0, 1].

    The reference takes a divergence that rounding made negative for the largest one,
    so that near-equal rows count as opposites; here it is 0.
    """
    p, q = jnp.asarray(p), jnp.asarray(q)
    middle = (p + q) / 2
    divergence = (p * jnp.log2(p / middle) + q * jnp.log2(q / middle)).sum(-1) / 2
    return 1 - jnp.clip(divergence, 0, 1).mean(-1)
