"""Rotary position embedding, and scalings of its frequencies for longer contexts."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpapers.ops.rope_scaling import Scaling

__all__ = ["Scaling", "frequencies", "rope"]


def frequencies(
    half: int, theta: float, scaling: Scaling | None = None
) -> Float[Array, " half"]:
    """Angle per position of each of the ``half`` pairs of a head: theta^(-i / half)."""
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None:
        return frequency
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    waves = scaling.trained * frequency / (2 * math.pi)  # Of the pretraining's context.
    kept = jnp.clip((waves - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return kept * frequency + (1 - kept) * slow


def rope(
    x: Float[Array, "B T N H"],
    positions: Int[Array, " T"] | Int[Array, "B T"],
    theta: float,
    scaling: Scaling | None = None,
) -> Float[Array, "B T N H"]:
    """Rotary position embedding, halves layout (Su et al., arXiv 2104.09864).

    Pairs (x_i, x_{i + H/2}) turn by positions * theta^(-2 i / H), as in Llama checkpoints
    of the Hugging Face layout.

    Args:
      x: queries or keys.
      positions: of all rows, or of each.
      theta: base of the frequencies.
      scaling: of the frequencies.
    """
    half = x.shape[-1] // 2
    frequency = frequencies(half, theta, scaling)
    positions = positions.astype(jnp.float32)
    if positions.ndim == 1:
        positions = positions[None, :]
    angle = positions[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = (
        jnp.broadcast_to(f(angle), (*x.shape[:-1], half)) for f in (jnp.cos, jnp.sin)
    )
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
