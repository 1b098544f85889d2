"""Critics that score samples, and the bounds that keep them Lipschitz.

Kernels are Kaiming-normal, biases zero. There are no batch statistics, so that a
gradient penalty is per sample.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jaxtyping import Array, Float

from jaxpapers.nets.lora import select
from jaxpapers.ops.convolution import conv_general_dilated

# Critics are trained inside loops, see ops.convolution.
Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
KAIMING = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class MLPCritic(nn.Module):
    """A ReLU perceptron of flattened samples with one output.

    Parameters are ``layer_i`` of kernel (in, out) and bias.

    Attributes:
      widths: of the hidden layers.
    """

    widths: tuple[int, ...] = (256, 256)

    @nn.compact
    def __call__(self, x: Float[Array, " B *X"]) -> Float[Array, " B"]:
        """Scores of samples."""
        h = _hidden(x, self.widths)
        name = f"layer_{len(self.widths)}"
        return nn.Dense(1, kernel_init=KAIMING, name=name)(h)[:, 0]


class ConvCritic(nn.Module):
    """4 x 4 convolutions of stride 2, one to 1 channel, and the mean over pixels.

    The last convolution is 4 x 4 without padding, as in SFT-PG's critic, but not larger
    than its input: images of 8 to 31 pixels leave fewer than 4 per side.

    Attributes:
      channels: of the convolutions of stride 2, which halve the sides, rounding down.
    """

    channels: tuple[int, ...] = (128, 256, 512)

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, " B"]:
        """Scores of images.

        Raises:
          ValueError: images smaller than 2 to the number of convolutions.
        """
        smallest = 2 ** len(self.channels)
        if min(x.shape[1:3]) < smallest:
            raise ValueError(
                f"ConvCritic with {len(self.channels)} convolutions of stride 2 needs "
                f"images of {smallest} x {smallest} at least, got {x.shape[1:3]}; use "
                "fewer channels"
            )
        for i, width in enumerate(self.channels):
            x = Conv(
                width,
                (4, 4),
                strides=2,
                padding=1,
                kernel_init=KAIMING,
                name=f"layer_{i}",
            )(x)
            x = nn.leaky_relu(x, 0.2)
        window = (min(4, x.shape[1]), min(4, x.shape[2]))
        last = Conv(
            1,
            window,
            padding="VALID",
            kernel_init=KAIMING,
            name=f"layer_{len(self.channels)}",
        )
        return last(x).mean((1, 2, 3))


class Classifier(nn.Module):
    """A ReLU perceptron with logits and features of flattened samples.

    Attributes:
      widths: of the hidden layers; the last one's activations are the features.
      classes: number of logits.
    """

    widths: tuple[int, ...] = (128, 64)
    classes: int = 10

    @nn.compact
    def __call__(
        self, x: Float[Array, " B *X"]
    ) -> tuple[Float[Array, "B classes"], Float[Array, "B F"]]:
        """(logits, features), the features after their ReLU."""
        features = _hidden(x, self.widths)
        name = f"layer_{len(self.widths)}"
        logits = nn.Dense(self.classes, kernel_init=KAIMING, name=name)(features)
        return logits, features


def spectral_normalize(
    params: Any, iterations: int = 0, match: str = r"kernel$"
) -> dict:
    r"""Kernels divided by their largest singular value where it exceeds 1.

    $$ W / \max(1, \sigma_1(W)) $$

    A perceptron with 1-Lipschitz activations and nothing else but kernels and biases is
    then 1-Lipschitz. A kernel with more than two axes is read as the matrix (prod of the
    others, out), which bounds each of stacked layers. A convolution whose windows
    overlap is then Lipschitz with the root of the number of windows over a pixel, 2 for
    the 4 x 4 ones of stride 2. Scales of norms and of steps are left alone.

    Args:
      params: of a net.
      iterations: of the power method from a fixed start, which approaches sigma_1 from
        below; for large kernels. 0: exact, by SVD.
      match: searched for in a leaf's path.

    Returns:
      Parameters of the same net; the gradient sees the division.

    Raises:
      ValueError: negative iterations, or no leaf that matches.

    Example:
      >>> spectral_normalize({"kernel": jnp.diag(jnp.array([4.0, 2.0]))})["kernel"]
      Array([[1. , 0. ],
             [0. , 0.5]], dtype=float32)

    Reference: Miyato et al., arXiv 1802.05957; their division has no max with 1.
    """
    if iterations < 0:
        raise ValueError(f"iterations must be >= 0, got {iterations}")
    leaves = dict(flatten_dict(params, sep="/"))
    for path, leaf in select(params, match).items():
        if leaf.ndim > 1:
            matrix = leaf.reshape(-1, leaf.shape[-1])
            leaves[path] = leaf / jnp.maximum(1.0, _largest(matrix, iterations))
    return unflatten_dict(leaves, sep="/")


def clip_weights(params: Any, bound: float) -> dict:
    """Every parameter clipped to [-bound, bound] (Arjovsky et al., arXiv 1701.07875).

    Args:
      params: of a net.
      bound: the paper's is 0.01.

    Raises:
      ValueError: a bound that is not positive.
    """
    if not bound > 0:
        raise ValueError(f"bound must be > 0, got {bound}")
    return jax.tree.map(lambda leaf: jnp.clip(leaf, -bound, bound), params)


def _hidden(x, widths):
    """ReLU layers ``layer_0``, ``layer_1``, ... of the calling module."""
    h = x.reshape(len(x), -1)
    for i, width in enumerate(widths):
        h = nn.relu(nn.Dense(width, kernel_init=KAIMING, name=f"layer_{i}")(h))
    return h


def _largest(matrix, iterations):
    """The largest singular value of a matrix."""
    if not iterations:
        return jnp.linalg.svd(matrix, compute_uv=False)[0]
    fixed = lax.stop_gradient(matrix)

    def unit(vector):
        tiny = jnp.finfo(vector.dtype).tiny
        return vector / jnp.maximum(jnp.linalg.norm(vector), tiny)

    def step(_, right):
        return unit(fixed.T @ unit(fixed @ right))

    start = jax.random.normal(jax.random.key(0), matrix.shape[1:], matrix.dtype)
    right = lax.fori_loop(0, iterations, step, unit(start))
    # With both vectors held the gradient of this product is that of the singular value.
    return unit(fixed @ right) @ matrix @ right
