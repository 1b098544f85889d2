"""Means of batches of which some rows are padding."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxpapers.ops.shapes import same_shape


def weighted_mean(
    values: Float[Array, "*shape"],
    weight: Float[Array, "*shape"] | Bool[Array, "*shape"] | None = None,
) -> Float[Array, ""]:
    """Mean of all entries, weighted; 0 where every weight is 0.

    An entry of weight 0 adds nothing, even if it is NaN or infinite.

    Args:
      values: any shape.
      weight: non-negative, of that shape; None: all 1.

    Example:
      >>> weighted_mean(jnp.array([1.0, 4.0, jnp.nan]), jnp.array([2.0, 1.0, 0.0])).item()
      2.0
    """
    if weight is None:
        return values.mean()
    same_shape("weighted_mean", values=values, weight=weight)
    total = weight.sum()
    weighted = jnp.where(weight == 0, 0, values * weight)
    return weighted.sum() / jnp.where(total == 0, 1, total)
