"""Convolutions and normalisations of images (B, H, W, C), as pure functions.

Parameters are plain arrays: a kernel (S, S, in, out), a norm's {scale, bias}. Batch
normalisation has its moving statistics in a tree of its own, ``Moments``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from jaxpapers.nets.mlp import channels

MOMENTUM = 0.1
EPS = 1e-5


class Moments(NamedTuple):
    """Moving mean and variance of a batch normalisation, (C,) each."""

    mean: Any
    var: Any


def conv_kernel(
    key: Key[Array, ""], size: int, fan_in: int, fan_out: int
) -> Float[Array, "S S I O"]:
    """He-normal kernel of a size x size convolution."""
    init = jax.nn.initializers.he_normal()
    return init(key, (size, size, fan_in, fan_out))


def conv(
    x: Float[Array, "B H W I"], kernel: Float[Array, "S S I O"], stride: int = 1
) -> Float[Array, "B _ _ O"]:
    """Convolution, padded such that stride 1 keeps height and width."""
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), ((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def init_norm(
    count: int, key: Key[Array, ""] | None = None
) -> dict[str, Float[Array, " C"]]:
    """Scale and bias of a normalisation: ones, or uniform in [0, 1) by a key; zeros.

    Args:
      count: channels.
      key: of the scales; None: they are ones.
    """
    scale = jnp.ones(count) if key is None else jax.random.uniform(key, (count,))
    return {"scale": scale, "bias": jnp.zeros(count)}


def init_moments(norm: dict[str, Float[Array | np.ndarray, " C"]]) -> Moments:
    """Moving statistics of a normalisation at the start: mean 0, variance 1."""
    return Moments(jnp.zeros_like(norm["bias"]), jnp.ones_like(norm["bias"]))


def batch_norm(
    params: dict,
    moments: Moments,
    x: Float[Array, "B H W C"],
    *,
    train: bool,
    mask: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, "B H W C"], Moments]:
    """Batch normalisation over rows and pixels, with the unbiased moving variance.

    Args:
      params: scale and bias.
      moments: moving statistics.
      x: input.
      train: use the batch's statistics; under ``jax.jit`` the batch is the global one.
      mask: False at rows to leave out of the statistics.

    Returns:
      The normalised input, and the new moving statistics.
    """
    if train:
        kept = jnp.ones(len(x)) if mask is None else mask.astype(jnp.float32)
        kept = kept[:, None, None, None]
        count = jnp.maximum(kept.sum() * x.shape[1] * x.shape[2], 1)
        mean = (x * kept).sum((0, 1, 2)) / count
        var = (jnp.square(x - channels(mean, x)) * kept).sum((0, 1, 2)) / count
        unbiased = var * count / jnp.maximum(count - 1, 1)
        moved = (mean, unbiased)
        moments = Moments(
            *((1 - MOMENTUM) * old + MOMENTUM * lax.stop_gradient(new)
              for old, new in zip(moments, moved))
        )  # fmt: skip
    else:
        mean, var = moments
    x = (x - channels(mean, x)) * lax.rsqrt(channels(var, x) + EPS)
    return x * channels(params["scale"], x) + channels(params["bias"], x), moments


def group_norm(
    params: dict, x: Float[Array, "B H W C"], groups: int
) -> Float[Array, "B H W C"]:
    """Normalisation of each image over its pixels and C / groups channels.

    Args:
      params: scale and bias.
      x: input.
      groups: number of groups, which divides C.

    Raises:
      ValueError: groups that do not divide the channels.
    """
    count = x.shape[-1]
    if groups < 1 or count % groups:
        raise ValueError(f"group_norm: {groups} groups do not divide {count} channels")
    parts = x.reshape(*x.shape[:3], groups, count // groups)
    mean = parts.mean((1, 2, 4), keepdims=True)
    var = jnp.square(parts - mean).mean((1, 2, 4), keepdims=True)
    x = ((parts - mean) * lax.rsqrt(var + EPS)).reshape(x.shape)
    return x * channels(params["scale"], x) + channels(params["bias"], x)
