"""The decoder and the two columns of its head that a reward reads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxpapers import options
from jaxpapers.nets import transformer
from jaxpapers.nets.lora import lora_apply, lora_init

HEADS = ("tokens", "classes")
RULES = (*transformer.RULES, (r"classes/kernel", P("data", None)))
LORA = r"(query|key|value|attention/out|gate|up|down)/kernel"
LAYERS = "layers/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """A decoder of Llama's form and its reward head.

    Attributes:
      vocab_size: V.
      width: D.
      layers: L.
      heads: of queries.
      kv_heads: of keys and values; 0: as many.
      hidden: of the MLP; 0: 8/3 D, rounded up.
      tied: the head's columns are rows of the embedding.
      head: ``tokens`` reads the logits of the tokens - and +, which a language model
        has already; ``classes`` has two columns of its own.
      plus: id of the token "+".
      minus: id of the token "-".
      separator: id that ends every step.
      rope_theta: base of the rotary frequencies.
      epsilon: of the norms.
      remat: recompute each block in the backward pass.
      unroll: layers per iteration of the scan over them.
      init_std: standard deviation of new matrices; 0: 1 / sqrt(fan-in), and a head of
        zeros.
      dtype: of activations: ``float32`` or ``bfloat16``; losses are float32.
      lora_rank: of adapters on all linear layers, all else frozen; 0: none.
      lora_alpha: adapters are scaled by this over the rank.
      lora_dropout: share of the adapters' inputs that a training step drops.
    """

    vocab_size: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 0
    hidden: int = 0
    tied: bool = False
    head: str = "tokens"
    plus: int = 3
    minus: int = 4
    separator: int = 2
    rope_theta: float = 10_000.0
    epsilon: float = 1e-6
    remat: bool = False
    unroll: int = 1
    init_std: float = 0.0
    dtype: str = "float32"
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0

    def __post_init__(self):
        options.check_choices(
            self, "net", head=HEADS, dtype=("float32", "bfloat16", "float64")
        )
        options.check_least(
            self, "net", width=1, layers=1, heads=1, kv_heads=0, hidden=0, init_std=0,
            lora_rank=0, plus=0, minus=0, separator=0,
        )  # fmt: skip
        options.check_positive(self, "net", "lora_alpha")
        if not 0 <= self.lora_dropout < 1 or self.lora_dropout and not self.lora_rank:
            raise ValueError(
                "net.lora_dropout is a share below 1 of the inputs of adapters, which "
                f"net.lora_rank has; got {self.lora_dropout} and {self.lora_rank}"
            )
        tokens = {"plus": self.plus, "minus": self.minus, "separator": self.separator}
        for name, token in tokens.items():
            if token >= self.vocab_size:
                raise ValueError(
                    f"net.{name} must be below the {self.vocab_size} tokens, got {token}"
                )
        if len(set(tokens.values())) < 3:
            raise ValueError(f"net.plus, minus and separator must differ, got {tokens}")
        self.module.sizes()

    def logits(self, decoder: Any, hidden: Float[Array, "*batch D"]) -> jax.Array:
        """Logits of all tokens, float32, for training the base model.

        Raises:
          ValueError: a net that has none.
        """
        if self.tied:
            kernel = decoder["embed"]["embedding"].T
        elif self.head == "tokens":
            kernel = decoder["head"]["kernel"]
        else:
            raise ValueError("net.head=classes has no logits of tokens; set net.tied")
        return hidden.astype(jnp.float32) @ kernel

    @property
    def module(self) -> transformer.Transformer:
        """The network; of ``classes`` its hidden states alone are used."""
        return transformer.Transformer(
            vocab_size=self.vocab_size, width=self.width, layers=self.layers,
            heads=self.heads, kv_heads=self.kv_heads, hidden=self.hidden,
            tied=self.tied, rope_theta=self.rope_theta, epsilon=self.epsilon,
            remat=self.remat, unroll=self.unroll, init_std=self.init_std,
            dtype=jnp.dtype(self.dtype),
        )  # fmt: skip


def init(key: Key[Array, ""], net: Net) -> dict[str, Any]:
    """Parameters: ``decoder``, with ``classes`` or ``lora`` where the net has them."""
    key_net, key_head, key_lora = jax.random.split(key, 3)
    tokens = jnp.zeros((1, 1), jnp.int32)
    classes = net.head == "classes"
    decoder = net.module.init(key_net, tokens, hidden=classes)["params"]
    params = {"decoder": decoder}
    if classes:
        kernel = jax.random.normal(key_head, (net.width, 2)) * net.width**-0.5
        params["classes"] = {"kernel": kernel, "bias": jnp.zeros(2)}
    if net.lora_rank:
        params["lora"] = lora_init(
            key_lora, decoder, net.lora_rank, LORA, stacked=LAYERS
        )
    return params


def decoder_params(params: Any, net: Net) -> Any:
    """The decoder's parameters with the adapters in them; these alone get a gradient."""
    if "lora" not in params:
        return params["decoder"]
    frozen = jax.lax.stop_gradient(params["decoder"])
    return lora_apply(frozen, params["lora"], net.lora_alpha / net.lora_rank)


def states(
    params: Any, ids: Int[Array, "B L"], segments: Int[Array, "B L"], net: Net
) -> tuple[Float[Array, "B L D"], Any]:
    """Hidden states after the final norm, and the decoder's parameters.

    Args:
      params: of ``init``.
      ids: tokens.
      segments: number of a position's sequence in its row; a position sees those of its
        own sequence, and counts from its start.
      net: the network.
    """
    decoder = decoder_params(params, net)
    return _hidden(decoder, ids, segments, net), decoder


def _within(segments):
    """Positions and attention mask of rows of several sequences."""
    place = jnp.arange(segments.shape[1], dtype=jnp.int32)[None]
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first = jax.lax.cummax(jnp.where(segments != before, place, 0), axis=1)
    mask = segments[:, :, None] == segments[:, None, :]
    return {"positions": place - first, "mask": mask}


def all_logits(
    params: Any, ids: Int[Array, "B L"], segments: Int[Array, "B L"], net: Net
) -> Float[Array, "B L V"]:
    """Logits of the next token: what the base model learns, and generates from."""
    hidden, decoder = states(params, ids, segments, net)
    return net.logits(decoder, hidden)


def _hidden(decoder, ids, segments, net) -> Any:
    within = _within(segments)
    return net.module.apply({"params": decoder}, ids, hidden=True, **within)


def two_logits(
    params: Any, decoder: Any, hidden: Float[Array, "*batch D"], net: Net
) -> Float[Array, "*batch 2"]:
    """Logits of wrong and right at hidden states, float32 or wider.

    Only two of the V columns of the head are read: the same numbers as of all logits
    without the memory of B x L x V of them.
    """
    kind = jnp.promote_types(hidden.dtype, jnp.float32)
    hidden = hidden.astype(kind)
    if net.head == "classes":
        w = params["classes"]
        logits = hidden @ w["kernel"].astype(kind)
        return logits + jnp.broadcast_to(w["bias"].astype(kind), logits.shape)
    return hidden @ columns(decoder, net).astype(kind)


def columns(decoder: Any, net: Net) -> Float[Array, "D 2"]:
    """Columns - and + of the head."""
    both = jnp.array([net.minus, net.plus])
    if net.tied:
        return decoder["embed"]["embedding"][both].T
    return decoder["head"]["kernel"][:, both]
