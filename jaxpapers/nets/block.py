"""A pre-norm transformer block, and the description of its kind.

Names of shapes: B batch, T positions of the call, S positions of the cache, D width,
N query heads, K key/value heads, H head size, F hidden size. Kernels are (in, out).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxpapers.nets.rope import Scaling, rope
from jaxpapers.ops.mesh_axes import split_axes


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32 (Zhang and Sennrich, arXiv 1910.07467).

    Attributes:
      epsilon: added to the mean square.
      stream: x is the residual stream (B, T, D), see ``_over_batch``.
    """

    epsilon: float = 1e-6
    stream: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        over = _over_batch if self.stream else lambda x: x
        return (y * over(jnp.broadcast_to(scale, y.shape))).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias, in float32 at least (Ba et al., 1607.06450).

    Attributes:
      epsilon: added to the variance.
      stream: see ``RMSNorm``.
    """

    epsilon: float = 1e-5
    stream: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        over = _over_batch if self.stream else lambda x: x
        scale, bias = (over(jnp.broadcast_to(p, y.shape)) for p in (scale, bias))
        return (y * scale + bias).astype(x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What a block is made of; the default is the Llama block.

    Attributes:
      heads: N.
      kv_heads: K, divides N; 0 means N.
      head_dim: H; 0 means D / N.
      hidden: F; 0 means 8/3 D rounded up to a multiple of 32 for swiglu, 4 D for gelu.
      norm: ``rms``, or ``layer`` with a bias.
      mlp: ``swiglu``, or ``gelu`` (tanh form) between two matrices.
      bias: of the linear layers: ``none``, ``qkv`` (Qwen2) or ``all`` (GPT-2). Keys
        without a position have none: it would change no attention.
      position: ``rope``, or ``none``: order is known from the causal mask alone.
      rope_theta: base of the rotary frequencies.
      rope_scaling: of these frequencies, for contexts longer than those trained on.
      causal: a position sees those before it and itself.
      qk_norm: RMSNorm of queries and keys per head (Qwen3).
      epsilon: of the norms.
      window: with a cache, attend to this many positions at most; 0: to all.
      dtype: of activations; parameters are float32.
      init_std: matrices are normal with this standard deviation; 0: with that of
        LeCun's rule, 1 / sqrt(fan_in).
      init_residual: ``scaled`` divides the variance of the projections into the residual
        stream by 2 L; ``zero`` starts every block as the identity.

    Raises:
      ValueError: unknown choices.
    """

    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0
    norm: str = "rms"
    mlp: str = "swiglu"
    bias: str = "none"
    position: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: Scaling | None = None
    causal: bool = True
    qk_norm: bool = False
    epsilon: float = 1e-6
    window: int = 0
    dtype: Any = jnp.float32
    init_std: float = 0.0
    init_residual: str = "scaled"

    def __post_init__(self):
        choices = {
            "norm": ("rms", "layer"),
            "mlp": ("swiglu", "gelu"),
            "bias": ("none", "qkv", "all"),
            "position": ("rope", "none"),
            "init_residual": ("scaled", "zero"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"net.{name} must be {' or '.join(known)}, got {value!r}"
                )

    def sizes(self, width: int) -> tuple[int, int, int]:
        """(K, H, F) of a width D, with defaults filled in.

        Raises:
          ValueError: heads that do not fit the width or each other.
        """
        head_dim = self.head_dim or width // self.heads
        kv_heads = self.kv_heads or self.heads
        fourfold = 4 * width if self.mlp == "gelu" else -(-8 * width // 3 // 32) * 32
        if not self.head_dim and width % self.heads:
            raise ValueError(
                "net.width must be a multiple of net.heads, got "
                f"{width} and {self.heads}; or set net.head_dim"
            )
        if self.heads % kv_heads:
            raise ValueError(
                "net.heads must be a multiple of net.kv_heads, got "
                f"{self.heads} and {kv_heads}"
            )
        if self.position == "rope" and head_dim % 2:
            raise ValueError(f"net.head_dim must be even for RoPE, got {head_dim}")
        return kv_heads, head_dim, self.hidden or fourfold

    def dense(self, features: int, name: str, *, biased: bool, init: Any = None) -> Any:
        """A linear layer of the kind's dtype and initialisation."""
        return nn.Dense(
            features,
            use_bias=biased,
            dtype=self.dtype,
            kernel_init=init or _kernel_init(self.init_std),
            name=name,
        )

    def normalise(self, name: str) -> nn.Module:
        """A norm of the kind, of the residual stream."""
        make = RMSNorm if self.norm == "rms" else LayerNorm
        return make(self.epsilon, stream=True, name=name)

    def residual_init(self, layers: int) -> Any:
        """Initialiser of the projections into the residual stream."""
        if self.init_residual == "zero":
            return nn.initializers.zeros
        if self.init_std:
            return nn.initializers.normal(self.init_std / (2 * layers) ** 0.5)
        return nn.initializers.variance_scaling(
            1 / (2 * layers), "fan_in", "truncated_normal"
        )


def _kernel_init(std: float) -> Any:
    return nn.initializers.normal(std) if std else nn.initializers.lecun_normal()


class Attention(nn.Module):
    """Self-attention with grouped key/value heads."""

    kind: Kind
    out_init: Any

    @nn.compact
    def __call__(
        self,
        x,
        positions,
        start,
        mask: Any = None,
        key_cache: Any = None,
        value_cache: Any = None,
    ):
        """(B, T, D) -> (B, T, D) and the caches with this call's keys and values."""
        kind, width = self.kind, x.shape[-1]
        kv_heads, head_dim, _ = kind.sizes(width)
        rows = _over_batch(x.reshape(-1, width), len(x))

        def project(name: str, heads: int) -> jax.Array:
            biased = kind.bias != "none"
            if name == "key" and kind.position == "none":
                biased = False  # It would add the same to all scores of a query.
            y = kind.dense(heads * head_dim, name, biased=biased)(rows)
            return y.reshape(*x.shape[:2], heads, head_dim)

        query = project("query", kind.heads)
        key, value = (project(name, kv_heads) for name in ("key", "value"))
        if kind.qk_norm:
            query = RMSNorm(kind.epsilon, name="query_norm")(query)
            key = RMSNorm(kind.epsilon, name="key_norm")(key)
        if kind.position == "rope":
            query, key = (
                rope(x, positions, kind.rope_theta, kind.rope_scaling)
                for x in (query, key)
            )
        if key_cache is None:
            each = None if mask is None else mask[:, None]
            y = jax.nn.dot_product_attention(
                query, key, value, mask=each, is_causal=kind.causal
            )
        else:
            key_cache, value_cache = (
                jax.lax.dynamic_update_slice(cache, new, (0, start, 0, 0))
                for cache, new in ((key_cache, key), (value_cache, value))
            )
            slots = start + jnp.arange(x.shape[1], dtype=jnp.int32)
            visible = _visible(kind, slots, key_cache.shape[1])
            if mask is not None:
                visible &= mask[:, None]
            y = jax.nn.dot_product_attention(
                query, key_cache, value_cache, mask=visible
            )
        out = kind.dense(width, "out", biased=kind.bias == "all", init=self.out_init)
        y = out(y.reshape(-1, kind.heads * head_dim))
        return y.reshape(x.shape), (key_cache, value_cache)


def _visible(kind: Kind, slots: Int[Array, " T"], size: int) -> Bool[Array, "1 1 T S"]:
    """Which slots of a cache the queries in ``slots`` see."""
    filled = jnp.arange(size)[None, :] <= slots[-1]
    distance = slots[:, None] - jnp.arange(size)[None, :]
    visible = distance >= 0 if kind.causal else filled
    if kind.window:
        visible &= distance < kind.window
    return jnp.broadcast_to(visible, distance.shape)[None, None]


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202), or down(gelu(up(x)))."""

    kind: Kind
    out_init: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Position-wise."""
        kind, width = self.kind, x.shape[-1]
        hidden = kind.sizes(width)[2]
        biased = kind.bias == "all"
        # Rows, not (B, T, .): XLA's CPU backend is half as fast on the gradients of
        # three-axis products.
        rows = _over_batch(x.reshape(-1, width), len(x))
        if kind.mlp == "swiglu":
            gate = nn.silu(kind.dense(hidden, "gate", biased=biased)(rows))
            y = gate * kind.dense(hidden, "up", biased=biased)(rows)
        else:
            y = kind.dense(hidden, "up", biased=biased)(rows)
            y = nn.gelu(y, approximate=True)
        y = kind.dense(width, "down", biased=biased, init=self.out_init)(y)
        return y.reshape(x.shape)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the body of the layer scan."""

    kind: Kind
    out_init: Any

    @nn.compact
    def __call__(self, x, caches: Any, positions, start, mask):
        """Carry x (B, T, D); scanned input and output: this layer's caches or None."""
        kind = self.kind
        y, caches = Attention(kind, self.out_init, name="attention")(
            kind.normalise("attention_norm")(x), positions, start, mask, *caches
        )
        x = _over_batch(x + y)
        y = MLP(kind, self.out_init, name="mlp")(kind.normalise("mlp_norm")(x))
        return _over_batch(x + y), caches


def _over_batch(x, batch: int = 0):
    """The stream, the rows that products read, a norm's gain: split over the batch alone.

    Inside a shard_map over slices the compiler splits them over ``model``, too, as it
    may split the gradients of the gains, and gathers the stream for every product:
    twice the bytes inside a slice. ``batch``: B, where the first axis is of B T rows.
    """
    axes = split_axes(batch or len(x))
    return jax.lax.with_sharding_constraint(x, jax.P(axes)) if axes else x
