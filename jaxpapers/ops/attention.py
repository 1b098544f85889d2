"""Pooling of a history by the scores of its items."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NORMALIZE = ("none", "softmax", "softmax_scaled")


def attention_pool(
    scores: Float[Array, "*scores T"],
    keys: Float[Array, "*keys T D"],
    mask: Bool[Array, "*mask T"],
    normalize: str = "none",
) -> Float[Array, "*scores D"]:
    """Weighted sum of a history (DIN, arXiv 1706.06978, eq 3); zero for an empty one.

    Args:
      scores: of the unit.
      keys: history.
      mask: True at items.
      normalize: "none" takes the scores as weights (the paper), "softmax" their softmax
        over the items, "softmax_scaled" that of scores / sqrt(D) (the released code).

    Raises:
      ValueError: unknown ``normalize``.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {NORMALIZE}, got {normalize!r}")
    mask = jnp.broadcast_to(mask, scores.shape)
    weights = jnp.where(mask, scores, 0.0)
    if normalize != "none":
        if normalize == "softmax_scaled":
            weights = weights / math.sqrt(keys.shape[-1])
        top = jnp.where(mask, weights, -jnp.inf).max(-1, keepdims=True)
        top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
        # Masked before the exponential too: it must not overflow where it is not used.
        raised = jnp.where(mask, jnp.exp(jnp.where(mask, weights - top, 0.0)), 0.0)
        total = raised.sum(-1, keepdims=True)
        weights = raised / jnp.where(total == 0, 1.0, total)
    return jnp.einsum("...t,...td->...d", weights, keys)
