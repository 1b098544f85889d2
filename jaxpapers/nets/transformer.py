"""Pre-norm transformer: blocks of one kind, a stack of them, and the language model.

The default kind is the Llama block: RMSNorm, RoPE, SwiGLU, grouped keys and values.
``Kind`` describes all others, GPT-2's among them.

Names of shapes: B batch, T positions of the call, S positions of the cache, L layers,
D width, N query heads, K key/value heads, H head size, F hidden size, V vocabulary.
Kernels are (in, out), stacked over layers by ``nn.scan`` to (L, in, out).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxpapers.nets.block import Block, Kind, RMSNorm
from jaxpapers.nets.rope import Scaling, rope
from jaxpapers.ops.mesh_axes import auto_axes, split_axes

__all__ = [
    "BIAS_RULES", "RULES", "Cache", "Kind", "RMSNorm", "Stack", "Transformer",
    "empty_cache", "look_up", "readout", "rope",
]  # fmt: skip

# FSDP over `data`, tensor parallel over `model`: each matrix uses both axes.
RULES = (
    (r"(query|key|value|gate|up)/kernel", P(None, "data", "model")),
    (r"(attention/out|down)/kernel", P(None, "model", "data")),
    (r"embed/embedding", P("model", "data")),
    (r"head/kernel", P("data", "model")),
)
# Of kinds that have them.
BIAS_RULES = ((r"(query|key|value|gate|up)/bias", P(None, "model")),)


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


def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Rows of the embedding, gathered over ``data`` first, as FSDP does with a weight.

    Left to itself the compiler moves activations instead. The gradient adds up the rows
    of a device's own tokens and is then scattered over ``data``, as a weight's is.

    Args:
      table: of the embedding; its rows divide over ``model``.
      tokens: rows to read.
    """
    if not {"data", "model"} <= set(auto_axes()):
        return jnp.take(table, tokens, axis=0)
    return _look_up(table, tokens)


@jax.custom_vjp
def _look_up(table, tokens):
    table = jax.lax.with_sharding_constraint(table, P("model", None))
    rows = jnp.take(table, tokens, axis=0)
    axes = split_axes(tokens.shape[0])
    return jax.lax.with_sharding_constraint(rows, P(axes, None, None)) if axes else rows


def _look_up_forward(table, tokens):
    return _look_up(table, tokens), (
        tokens,
        jax.ShapeDtypeStruct(table.shape, table.dtype),
    )


def _look_up_backward(saved, rows):
    """Not the compiler's: inside a shard_map XLA aborts as it partitions the scatter."""
    tokens, table = saved  # Only the shape of the table is used.
    mesh, axes = jax.sharding.get_abstract_mesh(), split_axes(tokens.shape[0])
    scatters = "data" in axes and table.shape[1] % mesh.shape["data"] == 0
    rest = tuple(n for n in axes if not (scatters and n == "data"))
    count = table.shape[0] // mesh.shape["model"]

    def local(tokens, rows):
        place = tokens - jax.lax.axis_index("model") * count
        # Negative ones would count from the end.
        place = jnp.where((place >= 0) & (place < count), place, count)
        grad = jnp.zeros((count, table.shape[1]), rows.dtype)
        grad = grad.at[place].add(rows, mode="drop")
        if scatters:
            grad = jax.lax.psum_scatter(grad, "data", scatter_dimension=1, tiled=True)
        return jax.lax.psum(grad, rest) if rest else grad

    grad = jax.shard_map(
        local,
        in_specs=(P(axes), P(axes)),
        out_specs=P("model", "data" if scatters else None),
        axis_names=set(auto_axes()),
    )(tokens, rows)
    return grad, None


_look_up.defvjp(_look_up_forward, _look_up_backward)


class Stack(nn.Module):
    """Blocks and the final norm: hidden states to hidden states.

    A looped model applies one stack many times.

    Attributes:
      kind: of the blocks.
      layers: L.
      remat: recompute each block in the backward pass.
      unroll: layers per iteration of the scan. All of them compiles longer, but a
        CPU runs the body of a loop on fewer threads. Ignored with ``remat``, which
        works on the loop's iterations.
      final_norm: whether the norm after the last block is part of it.
    """

    kind: Kind
    layers: int
    remat: bool = False
    unroll: int = 1
    final_norm: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: Cache | None = None,
        *,
        positions: Int[Array, " T"] | Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T S"] | None = None,
    ) -> Any:
        """Hidden states after the blocks.

        Args:
          x: of the residual stream.
          cache: positions before these; T more must fit. See ``empty_cache``.
          positions: for RoPE; by default those after the cache's. Rows that are padded
            on the left count from their first token.
          mask: keys (without a cache S = T, with one its slots) that a query may see,
            of those that the kind lets it see.

        Returns:
          The states; with a cache, (states, cache).
        """
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        if positions is None:
            positions = start + jnp.arange(x.shape[1], dtype=jnp.int32)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        x, caches = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.layers,
            unroll=1 if self.remat else self.unroll,
        )(self.kind, self.kind.residual_init(self.layers), name="layers")(
            x,
            () if cache is None else (cache.key, cache.value),
            positions,
            start,
            mask,
        )
        if self.final_norm:
            x = self.kind.normalise("norm")(x)
        if cache is None:
            return x
        key, value = cast(tuple[jax.Array, jax.Array], caches)
        return x, Cache(key, value, cache.length + x.shape[1])


def empty_cache(kind: Kind, layers: int, width: int, batch: int, length: int) -> Cache:
    """Cache of a ``Stack`` for ``length`` positions of ``batch`` sequences."""
    kv_heads, head_dim, _ = kind.sizes(width)
    empty = jnp.zeros((layers, batch, length, kv_heads, head_dim), kind.dtype)
    return Cache(empty, empty, jnp.zeros((), jnp.int32))


class Transformer(nn.Module):
    """Language model: embedding, ``Stack``, head; the fields are flat for configs.

    Attributes:
      vocab_size: V.
      width: D.
      layers: L.
      tied: the output head is the transposed embedding.
      remat: see ``Stack``.
      unroll: see ``Stack``.
      heads, kv_heads, ...: all others, of the blocks; see ``Kind``.
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
    norm: str = "rms"
    mlp: str = "swiglu"
    bias: str = "none"
    position: str = "rope"
    rope_scaling: Scaling | None = None
    causal: bool = True
    init_std: float = 0.0

    @property
    def kind(self) -> Kind:
        """The description of the blocks."""
        return Kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Kind)})

    def sizes(self) -> tuple[int, int, int]:
        """(K, H, F) with defaults filled in.

        Raises:
          ValueError: see ``Kind``.
        """
        return self.kind.sizes(self.width)

    def setup(self):
        """The stack, whose parameters are named as this module's own."""
        self.stack = Stack(self.kind, self.layers, self.remat, self.unroll)
        nn.share_scope(self, self.stack)

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache | None = None,
        *,
        positions: Int[Array, " T"] | Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T S"] | None = None,
        hidden: bool = False,
    ) -> Any:
        """Logits, of the next token if the kind is causal.

        Args:
          tokens: ids in [0, V).
          cache: positions before these; T more must fit. See ``init_cache``.
          positions: see ``Stack``.
          mask: see ``Stack``.
          hidden: give the states after the final norm, (B, T, D), and no logits.

        Returns:
          float32 logits (B, T, V); with a cache, (logits, cache).
        """
        self.sizes()
        std = self.init_std or (self.width**-0.5 if self.tied else 1)
        embed = nn.Embed(
            self.vocab_size,
            self.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(std),
            name="embed",
        )
        x = look_up(embed.embedding, tokens).astype(self.dtype)
        y = self.stack(x, cache, positions=positions, mask=mask)
        x, cache = y if cache is not None else (y, None)
        if not hidden:
            x = self._logits(embed, x)
        return x if cache is None else (x, cache)

    def _logits(self, embed: nn.Embed, x: jax.Array) -> jax.Array:
        if self.tied:
            return embed.attend(x).astype(jnp.float32)
        if self.init_std:
            init = nn.initializers.normal(self.init_std)
        else:
            init = nn.initializers.zeros
        head = self.kind.dense(self.vocab_size, "head", biased=False, init=init)
        return head(x).astype(jnp.float32)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Empty cache for ``length`` positions of ``batch`` sequences."""
        return empty_cache(self.kind, self.layers, self.width, batch, length)


def readout(
    net: Transformer, params: Mapping[str, Any], x: Float[Array, "*rows D"]
) -> Float[Array, "*rows V"]:
    """float32 logits of states after the final norm, as ``Transformer`` computes them.

    For the few states of which logits are wanted; see ``hidden`` of a call.
    """
    if net.tied:
        matrix = params["embed"]["embedding"].T
    else:
        matrix = params["head"]["kernel"]
    return (x.astype(net.dtype) @ matrix.astype(net.dtype)).astype(jnp.float32)
