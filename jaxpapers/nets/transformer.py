"""Decoder transformer in the Llama block: pre-norm, RMSNorm, RoPE, SwiGLU, grouped KV.

Names of shapes: B batch, T positions of the call, S positions of the cache, L layers,
D width, N query heads, K key/value heads, H head size, F hidden size, V vocabulary.
Kernels are (in, out), stacked over layers by ``nn.scan`` to (L, in, out).
"""

import math
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

# FSDP over `data`, tensor parallel over `model`: each matrix uses both axes.
RULES = (
    (r"(query|key|value|gate|up)/kernel", P(None, "data", "model")),
    (r"(attention/out|down)/kernel", P(None, "model", "data")),
    (r"embed/embedding", P("model", "data")),
    (r"head/kernel", P("data", "model")),
)


class Cache(NamedTuple):
    """Keys and values of the positions seen so far, for decoding.

    Attributes:
      key: (L, B, S, K, H), after RoPE.
      value: (L, B, S, K, H).
      length: int32 scalar, number of positions filled.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array


def _look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding, gathered over ``data`` first, as FSDP does with a weight.

    Left to itself the compiler moves activations instead, and under a ``shard_map`` over
    replicas XLA aborts where table and tokens are split over one axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    if {kinds.get(name) for name in ("data", "model")} != {AxisType.Auto}:
        return jnp.take(table, tokens, axis=0)
    table = jax.lax.with_sharding_constraint(table, P("model", None))
    rows = jnp.take(table, tokens, axis=0)
    # Inside a shard_map over replicas the batch is split over `data` alone.
    axes = tuple(n for n in ("replica", "data") if kinds.get(n) == AxisType.Auto)
    if tokens.shape[0] % math.prod(mesh.shape[n] for n in axes):
        return rows
    return jax.lax.with_sharding_constraint(rows, P(axes, None, None))


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32 (Zhang and Sennrich, arXiv 1910.07467)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


def rope(
    x: Float[Array, "B T N H"], positions: Int[Array, " T"], theta: float
) -> Float[Array, "B T N H"]:
    """Rotary position embedding, halves layout (Su et al., arXiv 2104.09864).

    Pairs (x_i, x_{i + H/2}) turn by positions * theta^(-2 i / H), as in Llama checkpoints
    of the Hugging Face layout.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, None] * frequency[None, :]
    cos, sin = (
        jnp.broadcast_to(f(angle)[None, :, None, :], (*x.shape[:-1], half))
        for f in (jnp.cos, jnp.sin)
    )
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    qk_norm: bool
    epsilon: float
    window: int
    out_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, x, positions, key_cache: Any = None, value_cache: Any = None):
        """(B, T, D) -> (B, T, D) and the caches with this call's keys and values."""
        rows = x.reshape(-1, x.shape[-1])

        def project(name: str, heads: int) -> jax.Array:
            y = nn.Dense(
                heads * self.head_dim, use_bias=False, dtype=self.dtype, name=name
            )(rows)
            return y.reshape(*x.shape[:2], heads, self.head_dim)

        query = project("query", self.heads)
        key, value = (project(name, self.kv_heads) for name in ("key", "value"))
        if self.qk_norm:
            query = RMSNorm(self.epsilon, name="query_norm")(query)
            key = RMSNorm(self.epsilon, name="key_norm")(key)
        query = rope(query, positions, self.rope_theta)
        key = rope(key, positions, self.rope_theta)
        if key_cache is None:
            y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            start = (0, positions[0], 0, 0)
            key_cache = jax.lax.dynamic_update_slice(key_cache, key, start)
            value_cache = jax.lax.dynamic_update_slice(value_cache, value, start)
            distance = positions[:, None] - jnp.arange(key_cache.shape[1])[None, :]
            visible = distance >= 0
            if self.window:
                visible &= distance < self.window
            y = jax.nn.dot_product_attention(
                query, key_cache, value_cache, mask=visible[None, None]
            )
        y = nn.Dense(
            x.shape[-1],
            use_bias=False,
            dtype=self.dtype,
            kernel_init=self.out_init,
            name="out",
        )(y.reshape(-1, self.heads * self.head_dim))
        return y.reshape(x.shape), (key_cache, value_cache)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    hidden: int
    out_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Position-wise."""

        def dense(features, name, **kwargs):
            return nn.Dense(
                features, use_bias=False, dtype=self.dtype, name=name, **kwargs
            )

        # Rows, not (B, T, .): XLA's CPU backend is half as fast on the gradients of
        # three-axis products.
        rows = x.reshape(-1, x.shape[-1])
        y = nn.silu(dense(self.hidden, "gate")(rows)) * dense(self.hidden, "up")(rows)
        y = dense(x.shape[-1], "down", kernel_init=self.out_init)(y)
        return y.reshape(x.shape)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the body of the layer scan."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    rope_theta: float
    qk_norm: bool
    epsilon: float
    window: int
    out_init: Any
    dtype: Any

    @nn.compact
    def __call__(self, x, caches: Any, positions):
        """Carry x (B, T, D); scanned input and output: this layer's caches or None."""
        y, caches = Attention(
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.rope_theta,
            self.qk_norm,
            self.epsilon,
            self.window,
            self.out_init,
            self.dtype,
            name="attention",
        )(RMSNorm(self.epsilon, name="attention_norm")(x), positions, *caches)
        x = x + y
        y = SwiGLU(self.hidden, self.out_init, self.dtype, name="mlp")(
            RMSNorm(self.epsilon, name="mlp_norm")(x)
        )
        return x + y, caches


class Transformer(nn.Module):
    """Decoder-only language model.

    Attributes:
      vocab_size: V.
      width: D.
      layers: L.
      heads: N.
      kv_heads: K, divides N; 0 means N.
      head_dim: H, even; 0 means D / N.
      hidden: F; 0 means 8/3 D rounded up to a multiple of 32.
      rope_theta: base of the rotary frequencies.
      qk_norm: RMSNorm of queries and keys per head (Qwen3).
      tied: the output head is the transposed embedding.
      remat: recompute each block in the backward pass.
      dtype: of activations; parameters are float32.
      epsilon: of the norms.
      init_residual: ``scaled`` draws the projections into the residual stream with
        variance
        1 / (2 L fan_in); ``zero`` starts every block as the identity.
      unroll: layers per iteration of the scan. All of them compiles longer, but a
        CPU runs the body of a loop on fewer threads. Ignored with ``remat``, which
        works on the loop's iterations.
      window: with a cache, attend to this many positions at most; 0: to all.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int = 0
    head_dim: int = 0
    hidden: int = 0
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    tied: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    epsilon: float = 1e-6
    init_residual: str = "scaled"
    unroll: int = 1
    window: int = 0

    def sizes(self) -> tuple[int, int, int]:
        """(K, H, F) with defaults filled in.

        Raises:
          ValueError: heads that do not fit the width or each other.
        """
        head_dim = self.head_dim or self.width // self.heads
        kv_heads = self.kv_heads or self.heads
        hidden = self.hidden or -(-8 * self.width // 3 // 32) * 32
        if not self.head_dim and self.width % self.heads:
            raise ValueError(
                "net.width must be a multiple of net.heads, got "
                f"{self.width} and {self.heads}; or set net.head_dim"
            )
        if self.heads % kv_heads:
            raise ValueError(
                "net.heads must be a multiple of net.kv_heads, got "
                f"{self.heads} and {kv_heads}"
            )
        if self.init_residual not in ("scaled", "zero"):
            raise ValueError(
                f"net.init_residual must be scaled or zero, got {self.init_residual!r}"
            )
        if head_dim % 2:
            raise ValueError(f"net.head_dim must be even for RoPE, got {head_dim}")
        return kv_heads, head_dim, hidden

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], cache: Cache | None = None) -> Any:
        """Next-token logits.

        Args:
          tokens: ids in [0, V).
          cache: positions before these; T more must fit. See ``init_cache``.

        Returns:
          float32 logits (B, T, V); with a cache, (logits, cache).
        """
        kv_heads, head_dim, hidden = self.sizes()
        embed = nn.Embed(
            self.vocab_size,
            self.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(self.width**-0.5 if self.tied else 1),
            name="embed",
        )
        x = _look_up(embed.embedding, tokens).astype(self.dtype)
        if self.init_residual == "zero":
            out_init = nn.initializers.zeros
        else:
            out_init = nn.initializers.variance_scaling(
                1 / (2 * self.layers), "fan_in", "truncated_normal"
            )
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        x, caches = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.layers,
            unroll=1 if self.remat else self.unroll,
        )(
            self.heads,
            kv_heads,
            head_dim,
            hidden,
            self.rope_theta,
            self.qk_norm,
            self.epsilon,
            self.window,
            out_init,
            self.dtype,
            name="layers",
        )(x, () if cache is None else (cache.key, cache.value), positions)
        x = RMSNorm(self.epsilon, name="norm")(x)
        if self.tied:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(
                self.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.zeros,
                name="head",
            )(x)
        logits = logits.astype(jnp.float32)
        if cache is None:
            return logits
        key, value = cast(tuple[jax.Array, jax.Array], caches)
        return logits, Cache(key, value, cache.length + tokens.shape[1])

    def init_cache(self, batch: int, length: int) -> Cache:
        """Empty cache for ``length`` positions of ``batch`` sequences."""
        kv_heads, head_dim, _ = self.sizes()
        shape = (self.layers, batch, length, kv_heads, head_dim)
        empty = jnp.zeros(shape, self.dtype)
        return Cache(empty, empty, jnp.zeros((), jnp.int32))
