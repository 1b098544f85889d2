"""The small convolutional net that DomainBed trains on digits.

Four 3 x 3 convolutions, the second with stride 2, each followed by ReLU and group
normalisation, then the mean over pixels. Images (B, H, W, C), parameters ``conv_0`` ..
of kernel, bias and norm.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers.nets.convolution import conv, conv_kernel, group_norm, init_norm
from jaxpapers.nets.mlp import channels

STRIDES = (1, 2, 1, 1)
WIDTHS = (64, 128, 128, 128)


def init(key: Key[Array, ""], inputs: int, widths: Sequence[int] = WIDTHS) -> dict:
    """Parameters.

    Args:
      key: of the kernels.
      inputs: channels of an image.
      widths: channels of each convolution.
    """
    sizes = (inputs, *widths)
    return {
        f"conv_{i}": {
            "kernel": conv_kernel(k, 3, fan_in, fan_out),
            "bias": jnp.zeros(fan_out),
            "norm": init_norm(fan_out),
        }
        for i, (k, fan_in, fan_out) in enumerate(
            zip(jax.random.split(key, len(widths)), sizes, sizes[1:])
        )
    }


def apply(
    params: dict, x: Float[Array, "B H W C"], groups: int = 8
) -> Float[Array, "B F"]:
    """Features of images, before any head; groups of the normalisation."""
    for layer, stride in zip(params.values(), STRIDES):
        x = conv(x, layer["kernel"], stride)
        x = jax.nn.relu(x + channels(layer["bias"], x))
        x = group_norm(layer["norm"], x, groups)
    return x.mean((1, 2))
