"""Rotary position embedding, and scalings of its frequencies for longer contexts."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """How frequencies change for contexts longer than those trained on.

    Attributes:
      kind: ``linear``: all are divided by ``factor``; ``llama3``: long wavelengths are,
        short ones are kept, and those between are interpolated.
      factor: of the context's length.
      low: llama3: wavelengths above ``trained / low`` are divided.
      high: llama3: wavelengths below ``trained / high`` are kept.
      trained: llama3: context of the pretraining.

    Raises:
      ValueError: an unknown kind, or numbers out of range.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    trained: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                "the scaling of RoPE must be linear or llama3, got "
                f"{self.kind!r}; none of the others is written"
            )
        if not self.factor > 0 or not 0 < self.low < self.high or self.trained < 1:
            raise ValueError(
                "the scaling of RoPE needs factor > 0, 0 < low < high and trained >= 1, "
                f"got {self.factor}, {self.low}, {self.high} and {self.trained}"
            )


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
