"""The U-Net of denoising diffusion, which predicts the noise in an image.

Ho et al., "Denoising Diffusion Probabilistic Models", arXiv 2006.11239. Residual blocks
(group norm, swish, 3 x 3 convolution, twice) at every level, half the size and more
channels from one level to the next, and skip connections from every layer of the downward
path to one of the upward path. ``UNet(128, (1, 2, 2, 2), 2, dropout=0.1, groups=32)`` is
DDPM's net for CIFAR-10, which SFT-PG fine-tunes, but for three things: only the last
convolution is initialised to zero, not each block's last as well, so that every parameter
has a gradient from the second step on; kernels have variance 1 / fan in; keys have no
bias, to which the softmax is invariant.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Real

from jaxpapers.nets.denoiser import check_tokens, time_embedding, token_embedding
from jaxpapers.ops.convolution import conv_general_dilated, conv_of_doubled

# Out-channels of the first map of each block, in-channels of its second, so that one sum
# per block crosses devices; whole groups of the norm between stay on one device where the
# axis divides their number. Replicated: the stream between blocks with its norms, stem,
# shortcuts, convolutions that change the size and the last one; the token table.
RULES = (
    (r"conv_0/kernel$", P(None, None, None, "model")),
    (r"conv_1/kernel$", P(None, None, "model", None)),
    (
        r"(block_\d+/condition|attention(_\d+)?/(query|key|value)|time_0)/kernel$",
        P(None, "model"),
    ),
    (r"(attention(_\d+)?/out|time_1)/kernel$", P("model", None)),
    (
        r"(conv_0|norm_1|condition|query|value|time_0)/(bias|scale)$",
        P("model"),
    ),
)


# Policies are trained inside loops, see ops.convolution.
Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)


class GroupNorm(nn.Module):
    """``flax.linen.GroupNorm`` of images, with the same parameters.

    Sums over pixels first, then over the channels of a group: on XLA's CPU backend 2 to
    4 times as fast as one sum over both.

    Attributes:
      groups: of channels.
      dtype: of statistics and result.
    """

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Groups normalised to mean 0 and variance 1, then scaled and shifted."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = x.astype(self.dtype)

        def of_groups(means):
            groups = means.reshape(-1, self.groups, channels // self.groups).mean(-1)
            return jnp.repeat(groups, channels // self.groups, -1)

        mean = of_groups(x.mean((1, 2)))
        variance = of_groups(jnp.square(x).mean((1, 2))) - jnp.square(mean)
        factor = scale[None] * jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-6)
        shift = bias[None] - mean * factor
        return x * factor[:, None, None] + shift[:, None, None]


class ResidualBlock(nn.Module):
    """x + conv(drop(swish(norm(conv(swish(norm(x))) + condition)))).

    If the number of channels changes, x is mapped by a linear shortcut.
    """

    channels: int
    groups: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        condition: Float[Array, "B E"],
        train: bool,
    ) -> Float[Array, "B H W O"]:
        """``condition`` is the embedding of time and tokens, before its swish."""
        conv = functools.partial(Conv, self.channels, (3, 3), dtype=self.dtype)
        dense = functools.partial(nn.Dense, self.channels, dtype=self.dtype)
        y = conv(name="conv_0")(_norm_swish(x, self.groups, self.dtype, "norm_0"))
        y = y + dense(name="condition")(nn.silu(condition))[:, None, None, :]
        y = _norm_swish(y, self.groups, self.dtype, "norm_1")
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = conv(name="conv_1")(y)
        if x.shape[-1] != self.channels:
            rows = dense(name="shortcut")(x.reshape(-1, x.shape[-1]))
            x = rows.reshape(y.shape)
        return x + y


class SelfAttention(nn.Module):
    """x + out(attention(norm(x))) between all pixels of an image."""

    heads: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Softmax in float32."""
        batch, height, width, channels = x.shape
        dense = functools.partial(nn.Dense, channels, dtype=self.dtype)
        # Rows, because XLA's CPU backend is slower on products with more axes.
        rows = _norm(x, self.groups, self.dtype, "norm").reshape(-1, channels)

        def project(name):
            y = dense(use_bias=name != "key", name=name)(rows)
            return y.reshape(batch, height * width, self.heads, -1)

        query, key, value = (project(name) for name in ("query", "key", "value"))
        y = jax.nn.dot_product_attention(query, key, value)
        return x + dense(name="out")(y.reshape(-1, channels)).reshape(x.shape)


class UNet(nn.Module):
    """Noise in images at given times, optionally conditioned on tokens.

    Attributes:
      channels: of the stem; ``groups`` divides it.
      multipliers: channels of each level over those of the stem. Each level has half the
        size of the one before.
      blocks: residual blocks per level on the way down, one more on the way up.
      attention: levels with self-attention after every block; with any, the middle has
        it too.
      heads: of the attention; divides the channels of its levels.
      dropout: rate inside the blocks, in training.
      vocab: conditioning tokens, the null token included; 0: unconditional.
      groups: of the group norms.
      dtype: of the products, e.g. bfloat16; parameters, norms and the output are float32.
    """

    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (1,)
    heads: int = 1
    dropout: float = 0.0
    vocab: int = 0
    groups: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W C"],
        time: Real[Array, " B"],
        tokens: Int[Array, " B"] | Int[Array, "B L"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B H W C"]:
        """The noise in x.

        Args:
          x: images, channels last.
          time: see ``nets.denoiser.time_embedding``.
          tokens: see ``nets.denoiser.token_embedding``; None for an unconditional net.
          train: apply dropout, with the key "dropout" of ``rngs``.

        Raises:
          ValueError: inconsistent fields, sides that cannot be halved for every level;
            see also ``nets.denoiser.check_tokens``.
        """
        self._check(x.shape)
        check_tokens(self.vocab, tokens)
        condition = self._condition(time, tokens)
        conv = functools.partial(Conv, kernel_size=(3, 3), dtype=self.dtype)
        h = conv(self.channels, name="stem")(x)
        skips, last = [h], len(self.multipliers) - 1
        for level, multiplier in enumerate(self.multipliers):
            width = self.channels * multiplier
            for i in range(self.blocks):
                h = self._block(f"down_{level}", i, level, h, condition, train)
                skips.append(h)
            if level < last:
                h = conv(width, strides=2, name=f"down_{level}_conv")(h)
                skips.append(h)
        h = self._middle(h, condition, train)
        for level in reversed(range(last + 1)):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], -1)
                h = self._block(f"up_{level}", i, level, h, condition, train)
            if level:
                h = conv(
                    h.shape[-1],
                    conv_general_dilated=conv_of_doubled,
                    name=f"up_{level}_conv",
                )(h)
        # The output is float32, and at first 0, the mean of the noise.
        kind = jnp.promote_types(self.dtype, jnp.float32)
        h = _norm_swish(h, self.groups, self.dtype, "norm")
        zeros = nn.initializers.zeros
        return Conv(x.shape[-1], (3, 3), dtype=kind, kernel_init=zeros, name="last")(h)

    def _condition(self, time, tokens):
        """Embedding of time and tokens, 4 times as wide as the stem."""
        dense = functools.partial(nn.Dense, 4 * self.channels, dtype=self.dtype)
        embedded = time_embedding(time, self.channels)
        y = dense(name="time_1")(nn.silu(dense(name="time_0")(embedded)))
        if tokens is None:
            return y
        shape = (self.vocab, 4 * self.channels)
        table = self.param("token_table", nn.initializers.normal(1.0), shape)
        return y + token_embedding(table, tokens).astype(y.dtype)

    def _block(self, name, i, level, h, condition, train):
        """A residual block of a level, and its attention."""
        width = self.channels * self.multipliers[level]
        block = ResidualBlock(
            width, self.groups, self.dropout, self.dtype, name=f"{name}_block_{i}"
        )
        h = block(h, condition, train)
        if level not in self.attention:
            return h
        return SelfAttention(
            self.heads, self.groups, self.dtype, name=f"{name}_attention_{i}"
        )(h)

    def _middle(self, h, condition, train):
        """Two blocks of the lowest level with attention between."""
        block = functools.partial(
            ResidualBlock, h.shape[-1], self.groups, self.dropout, self.dtype
        )
        h = block(name="middle_block_0")(h, condition, train)
        if self.attention:
            h = SelfAttention(
                self.heads, self.groups, self.dtype, name="middle_attention"
            )(h)
        return block(name="middle_block_1")(h, condition, train)

    def _check(self, shape) -> None:
        """Raises ValueError for inconsistent fields or image sizes."""
        levels = len(self.multipliers)
        smallest = min(self.channels, self.blocks, self.groups, self.heads)
        if not levels or min(smallest, *self.multipliers) < 1 or self.vocab < 0:
            raise ValueError(
                "UNet needs channels, multipliers, blocks, groups and heads >= 1 and "
                f"vocab >= 0, got {self}"
            )
        if self.channels % self.groups:
            raise ValueError(
                f"channels={self.channels} must be a multiple of groups={self.groups}"
            )
        if not set(self.attention) <= set(range(levels)):
            raise ValueError(
                f"attention={self.attention} names levels other than 0 .. {levels - 1}"
            )
        attended = {*self.attention, levels - 1} if self.attention else set()
        widths = [self.channels * self.multipliers[level] for level in attended]
        if any(width % self.heads for width in widths):
            raise ValueError(f"heads={self.heads} must divide the channels {widths}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        stride = 2 ** (levels - 1)
        if shape[1] % stride or shape[2] % stride:
            raise ValueError(
                f"images of {shape[1]} x {shape[2]} cannot be halved {levels - 1} "
                f"times for multipliers={self.multipliers}, {levels} levels; pad them "
                f"to a multiple of {stride}, or use fewer levels"
            )


def _norm(x, groups, dtype, name):
    """Group norm with its statistics and result in float32 or wider."""
    kind = jnp.promote_types(dtype, jnp.float32)
    return GroupNorm(groups, kind, name=name)(x)


def _norm_swish(x, groups, dtype, name):
    return nn.silu(_norm(x, groups, dtype, name))
