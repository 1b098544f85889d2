"""When to stop a loop whose number of steps is not told; steps count from 1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def self_cross_entropy(
    logits: Float[Array, "T B L V"], mask: Float[Array, "B L"]
) -> Float[Array, "T B"]:
    """Mean cross-entropy of each step's own predictions, over the answer's positions.

    Args:
      logits: of every step, see ``forward_all``.
      mask: 1 at the positions of the answer, see ``algorithmic.answer_positions``.
    """
    surprise = -jax.nn.log_softmax(logits).max(-1)
    mask = mask.astype(jnp.float32)[None]
    total = (surprise * jnp.broadcast_to(mask, surprise.shape)).sum(-1)
    return total / jnp.broadcast_to(mask.sum(-1), total.shape)


def stop_max_confidence(
    logits: Float[Array, "T B L V"], mask: Float[Array, "B L"], per: str = "sample"
) -> Int[Array, "*B"]:
    """Step of the smallest ``self_cross_entropy``, the first of equal ones.

    The paper's formula has the largest; its text, and its results, the smallest.

    Args:
      logits: of every step.
      mask: 1 at the positions of the answer.
      per: ``sample``: a step for each row; ``batch``: one for all, by their mean.

    Raises:
      ValueError: ``per`` is neither.
    """
    if per not in ("sample", "batch"):
        raise ValueError(f"per must be sample or batch, got {per!r}")
    entropy = self_cross_entropy(logits, mask)
    entropy = entropy.mean(1) if per == "batch" else entropy
    return entropy.argmin(0).astype(jnp.int32) + 1


def stop_fixed_point(
    distance: Float[Array, "T B"], tolerance: float = 0.05
) -> Int[Array, " B"]:
    """First step in which the state moves by at most ``tolerance`` of its norm.

    The last step for rows that never do.

    Args:
      distance: see ``Trace``.
      tolerance: share of the state's norm.
    """
    small = distance <= tolerance
    first = small.argmax(0) + 1
    return jnp.where(small.any(0), first, len(distance)).astype(jnp.int32)


def at_step(
    logits: Float[Array, "T B L V"], stop: Int[Array, "*B"]
) -> Float[Array, "B L V"]:
    """Logits of each row at its step."""
    rows = jnp.arange(logits.shape[1])
    return logits[jnp.broadcast_to(stop, rows.shape) - 1, rows]
