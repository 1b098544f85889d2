"""Network of the delayed-feedback models: a perceptron on numbers or on categories."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpapers.options import check_choices, check_least

INITS = {
    "glorot": nn.initializers.glorot_uniform(),
    "fan_in": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


@dataclasses.dataclass(frozen=True)
class Net:
    """Options of the network; the defaults are those for Criteo's conversion logs.

    Attributes:
      features: columns of ``x``.
      bins: sizes of its first columns, which are one-hot encoded; () if ``x`` holds
        numbers.
      buckets: sizes of its other columns, which are embedded.
      embedding: width of an embedding.
      widths: of the hidden layers.
      slope: of the leaky ReLU for negative inputs.
      init: of the kernels: "glorot", or "fan_in", uniform in ±1/sqrt(fan-in), which
        extrapolates better to features that drift.
      batch_norm: after each activation; rows of weight 0 do not enter its statistics.
    """

    features: int = 17
    bins: tuple[int, ...] = (64, 16, 128, 64, 128, 64, 512, 512)
    buckets: tuple[int, ...] = (512, 128, 256, 256, 64, 256, 256, 16, 256)
    embedding: int = 8
    widths: tuple[int, ...] = (256, 256, 128)
    slope: float = 0.2
    init: str = "glorot"
    batch_norm: bool = True

    def __post_init__(self):
        check_least(self, "net", features=1, bins=2, buckets=1, embedding=1, widths=1)
        check_choices(self, "net", init=(*INITS,))
        if not self.widths:
            raise ValueError("net.widths must have at least one hidden layer, got ()")
        if bool(self.bins) != bool(self.buckets) or (
            self.bins and len(self.bins) + len(self.buckets) != self.features
        ):
            raise ValueError(
                f"net: {len(self.bins)} bins and {len(self.buckets)} buckets must make "
                f"features={self.features} columns, or both be empty for numbers"
            )


class Perceptron(nn.Module):
    """Leaky-ReLU layers, optionally batch-normalised after the activation.

    Attributes:
      options: of the layers.
      outputs: logits per click.
    """

    options: Net
    outputs: int = 1

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], train: bool = False
    ) -> Float[Array, "B K"]:
        """Logits of the features ``x``, (B, F) float32 numbers or int32 categories.

        Args:
          batch: ``x``; for training with batch norm also ``weight``.
          train: normalise by the statistics of the batch.
        """
        c = self.options
        h, init = jnp.asarray(batch["x"]), INITS[c.init]
        for i, width in enumerate(c.widths):
            name, count = f"dense_{i}", len(c.bins)
            if i == 0 and count:
                table = HashedEmbedding(c.buckets, c.embedding, name="hashed")
                first = OneHotDense(width, c.bins, init, name=name)
                h = first(h[:, :count], table(h[:, count:]))
            else:
                h = nn.Dense(width, kernel_init=init, name=name)(h)
            h = nn.leaky_relu(h, c.slope)
            if c.batch_norm:
                norm = nn.BatchNorm(
                    not train, momentum=0.99, epsilon=1e-3, name=f"norm_{i}"
                )
                h = norm(h, mask=_rows(batch["weight"]) if train else None)
        return nn.Dense(self.outputs, kernel_init=init, name="head")(h)


def _rows(weight):
    """(B, 1) mask of the rows that are no padding; of all where all are.

    Statistics of no rows are NaN, and stay it.
    """
    mask = weight[:, None] > 0
    return mask | ~mask.any()


class OneHotDense(nn.Module):
    """Dense layer on one-hot features and others, by look-up of the kernel's rows.

    Attributes:
      width: of the output.
      bins: sizes of the one-hot features.
      kernel_init: of the kernel.
    """

    width: int
    bins: tuple[int, ...]
    kernel_init: Any = nn.initializers.glorot_uniform()

    @nn.compact
    def __call__(
        self, bins: Int[Array, "B F"], dense: Float[Array, "B D"]
    ) -> Float[Array, "B W"]:
        """concat(one_hot(bins), dense) @ kernel + bias."""
        rows = sum(self.bins)
        shape = (rows + dense.shape[-1], self.width)
        kernel = self.param("kernel", self.kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        start = np.cumsum((0, *self.bins[:-1]))[None]
        return kernel[bins + start].sum(1) + dense @ kernel[rows:] + bias[None]


class HashedEmbedding(nn.Module):
    """Embedding table whose rows are divided among the categorical features.

    Attributes:
      buckets: rows of each feature.
      width: of an embedding.
    """

    buckets: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, hashed: Int[Array, "B F"]) -> Float[Array, "B D"]:
        """The features' embeddings, concatenated."""
        init = nn.initializers.truncated_normal(self.width**-0.5)
        table = self.param("embedding", init, (sum(self.buckets), self.width))
        start = np.cumsum((0, *self.buckets[:-1]))[None]
        return table[hashed + start].reshape(len(hashed), -1)


def network(net: Net | nn.Module, outputs: int = 1) -> nn.Module:
    """The flax module of the options.

    Args:
      net: options, or another module with the call of ``Perceptron`` and a field
        ``outputs``, of which a copy is returned.
      outputs: logits per click.
    """
    if isinstance(net, nn.Module):
        return net.clone(outputs=outputs, name=None)
    return Perceptron(net, outputs)
