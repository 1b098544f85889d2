"""The network: a perceptron on numbers, or on one-hot bins and embedded categories."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

INITS = {
    "glorot": nn.initializers.glorot_uniform(),
    "fan_in": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


class Net(nn.Module):
    """Leaky-ReLU layers, optionally batch-normalised after the activation.

    Attributes:
      widths: of the hidden layers.
      outputs: logits per click.
      slope: of the leaky ReLU.
      batch_norm: after each activation; rows of weight 0 do not enter its statistics.
      bins: sizes of the one-hot features, the first columns of ``x``; () if ``x`` holds
        numbers.
      buckets: sizes of the embedded features, its other columns.
      embedding: their width.
      init_scheme: of the kernels: "glorot", or the narrower "fan_in", uniform in
        ±1/sqrt(fan in), which extrapolates more calmly to features that drift.
    """

    widths: tuple[int, ...] = (64, 32)
    outputs: int = 1
    slope: float = 0.01
    batch_norm: bool = False
    bins: tuple[int, ...] = ()
    buckets: tuple[int, ...] = ()
    embedding: int = 8
    init_scheme: str = "glorot"

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Any], train: bool = False
    ) -> Float[Array, "B K"]:
        """Logits of the features ``x``, (B, F) float32 numbers or int32 categories.

        Args:
          batch: ``x``; to train with batch norm also ``weight``.
          train: normalise by the batch's statistics.
        """
        h, init = jnp.asarray(batch["x"]), INITS[self.init_scheme]
        for i, width in enumerate(self.widths):
            name, count = f"dense_{i}", len(self.bins)
            if i == 0 and count:
                table = HashedEmbedding(self.buckets, self.embedding, name="hashed")
                first = OneHotDense(width, self.bins, init, name=name)
                h = first(h[:, :count], table(h[:, count:]))
            else:
                h = nn.Dense(width, kernel_init=init, name=name)(h)
            h = nn.leaky_relu(h, self.slope)
            if self.batch_norm:
                norm = nn.BatchNorm(
                    not train, momentum=0.99, epsilon=1e-3, name=f"norm_{i}"
                )
                mask = batch["weight"][:, None] > 0 if train else None
                h = norm(h, mask=mask)
        return nn.Dense(self.outputs, kernel_init=init, name="head")(h)


class OneHotDense(nn.Module):
    """A dense layer on one-hot features and others: rows are looked up, not multiplied.

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
    """One table for all categorical features, each with rows of its own.

    Attributes:
      buckets: rows of each feature.
      width: of an embedding.
    """

    buckets: tuple[int, ...]
    width: int

    @nn.compact
    def __call__(self, hashed: Int[Array, "B F"]) -> Float[Array, "B D"]:
        """The features' embeddings, side by side."""
        init = nn.initializers.truncated_normal(self.width**-0.5)
        table = self.param("embedding", init, (sum(self.buckets), self.width))
        start = np.cumsum((0, *self.buckets[:-1]))[None]
        return table[hashed + start].reshape(len(hashed), -1)


def network(config: Any, outputs: int = 1) -> Net:
    """The network of ``config.net``.

    Args:
      config: group ``net``.
      outputs: logits per click.

    Raises:
      ValueError: no hidden layer, unknown init, or sizes that do not make
        ``features`` columns.
    """
    c = config.net
    if not c.widths or min(c.widths) < 1:
        raise ValueError(f"config.net.widths must be positive sizes, got {c.widths}")
    if bool(c.bins) != bool(c.buckets) or (
        c.bins and len(c.bins) + len(c.buckets) != c.features
    ):
        raise ValueError(
            f"config.net: {len(c.bins)} bins and {len(c.buckets)} buckets must make "
            f"features={c.features} columns, or both be empty for numbers"
        )
    if c.init not in INITS:
        raise ValueError(f"config.net.init must be one of {(*INITS,)}, got {c.init!r}")
    return Net(
        tuple(c.widths),
        outputs,
        c.slope,
        c.batch_norm,
        tuple(c.bins),
        tuple(c.buckets),
        c.embedding,
        c.init,
    )
