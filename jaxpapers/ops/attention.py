"""Pooling of a history: by the scores of its items, or plainly."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

NORMALIZE = ("none", "softmax", "softmax_scaled")


def attention_weights(
    scores: Float[Array, "*scores T"], mask: Bool[Array, "*mask T"], normalize: str
) -> Float[Array, "*scores T"]:
    """Attention weights of a history; zeros at padding, and for an empty history.

    Args:
      scores: finite at items; at padding anything.
      mask: True at items; leading axes broadcast.
      normalize: "none" or "softmax", see ``attention_pool``.

    Raises:
      ValueError: unknown ``normalize``.
    """
    if normalize not in NORMALIZE[:2]:
        raise ValueError(f"normalize must be one of {NORMALIZE[:2]}, got {normalize!r}")
    mask = jnp.broadcast_to(mask, scores.shape)
    weights = jnp.where(mask, scores, 0.0)
    if normalize == "none":
        return weights
    top = jnp.where(mask, weights, -jnp.inf).max(-1, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    # Masked before the exponential too, which must not overflow at padding.
    raised = jnp.where(mask, jnp.exp(jnp.where(mask, weights - top, 0.0)), 0.0)
    total = raised.sum(-1, keepdims=True)
    return raised / jnp.where(total == 0, 1.0, total)


def attention_pool(
    scores: Float[Array, "*scores T"],
    keys: Float[Array, "*keys T D"],
    mask: Bool[Array, "*mask T"],
    normalize: str = "none",
) -> Float[Array, "*scores D"]:
    """Weighted sum of a history (DIN, arXiv 1706.06978, eq 3); zero for an empty one.

    Args:
      scores: of the items.
      keys: their vectors.
      mask: True at items.
      normalize: weights are "none" the scores (the paper), "softmax" their softmax over
        the items, "softmax_scaled" that of scores / sqrt(D) (the released code).

    Raises:
      ValueError: unknown ``normalize``.
    """
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize must be one of {NORMALIZE}, got {normalize!r}")
    if normalize == "softmax_scaled":
        scores, normalize = scores / math.sqrt(keys.shape[-1]), "softmax"
    weights = attention_weights(scores, mask, normalize)
    return jnp.einsum("...t,...td->...d", weights, keys)


def pool_history(
    keys: Float[Array, "B T D"], mask: Bool[Array, "B T"], how: str
) -> Float[Array, "B D"]:
    """Sum or mean of a history's vectors; zero for an empty one.

    Args:
      keys: vectors.
      mask: True at items.
      how: "sum" or "mean".

    Raises:
      ValueError: unknown ``how``.
    """
    if how not in ("sum", "mean"):
        raise ValueError(f"a history is pooled by 'sum' or 'mean', got {how!r}")
    pooled = jnp.where(mask[..., None], keys, 0.0).sum(1)
    if how == "sum":
        return pooled
    return pooled / jnp.maximum(mask.sum(1), 1)[:, None].astype(pooled.dtype)
