"""DIEN's interests: a GRU over the history, and one gated by attention to the candidate.

Batches are those of ``nets.behaviour``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxpapers import options
from jaxpapers.nets import behaviour, gru, interest, mlp
from jaxpapers.nets.attention import activation_unit
from jaxpapers.nets.gru import VARIANTS, augru_scan, gru_scan
from jaxpapers.ops.attention import attention_weights, pool_history

ATTENTION = ("bilinear", "din")
POOLED = ("sum", "mean", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net(behaviour.Net):
    """Hyper-parameters of DIEN (arXiv 1809.03672), the released code's as defaults."""

    item_dim: int = 18
    """Width of an item's embedding."""
    cate_dim: int = 18
    """Width of a category's embedding; 0: the model reads no categories."""
    user_dim: int = 18
    """Width of a user's embedding; 0: the model reads no users."""
    hidden: tuple[int, ...] = (200, 80)
    """Widths of the MLP's hidden layers."""
    state: int = 36
    """H: width of both recurrent layers."""
    variant: str = "augru"
    """Of the second layer, one of ``nets.gru.VARIANTS``."""
    attention: str = "bilinear"
    """One of ``ATTENTION``; din is the released code's."""
    pooled: str = "sum"
    """Of the history, as a feature of the MLP, one of ``POOLED``."""
    product: bool = True
    """Whether candidate * pooled history is a further feature."""
    unroll: int = 1
    """Steps of a recurrent layer per iteration of its compiled loop."""
    chunk: int = 0
    """Steps between the states kept for the backward pass; 0: all are kept."""
    dtype: str = "float32"
    """Of the products that no state enters, one of ``nets.behaviour.DTYPES``."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        super().__post_init__()
        options.check_choices(
            self, "net", variant=VARIANTS, attention=ATTENTION, pooled=POOLED,
            dtype=behaviour.DTYPES,
        )  # fmt: skip
        options.check_least(self, "net", state=1, unroll=1, chunk=0)


class Embedded(NamedTuple):
    """Embeddings of a batch.

    Attributes:
      query: (B, D) or (B, N, D), candidates.
      keys: (B, T, D), the history, zeros at padding.
      mask: (B, T), True at behaviours.
      user: query's shape but for the width, or None.
    """

    query: Any
    keys: Any
    mask: Any
    user: Any


def bilinear_attention(
    kernel: Float[Array, "H A"],
    states: Float[Array, "*states T H"],
    target: Float[Array, "*batch A"],
    mask: Bool[Array, "..."],
) -> Float[Array, "*batch T"]:
    """Softmax over the steps of h_t W e_a (eq 8); zeros for an empty history.

    Args:
      kernel: W.
      states: h; leading axes broadcast against the candidates'.
      target: e_a.
      mask: (.., T), True at behaviours.
    """
    scores = jnp.einsum("...th,...h->...t", states, target @ kernel.T)
    return attention_weights(scores, mask, "softmax")


def din_attention(
    params: dict,
    states: Float[Array, "*states T H"],
    target: Float[Array, "*batch A"],
    mask: Bool[Array, "..."],
    *,
    dtype: Any = None,
    train: bool = False,
    unit_chunk: int = 0,
) -> Float[Array, "*batch T"]:
    """The released code's attention: softmax over the steps of DIN's unit's scores.

    Args:
      params: ``unit``, see ``nets.attention.activation_unit``; ``query``, optional, a
        dense layer with PReLU (kernel, bias, alpha) that takes A to H.
      states: see ``bilinear_attention``.
      target: see ``bilinear_attention``.
      mask: see ``bilinear_attention``.
      dtype: of the products in the unit's first layer.
      train: see ``nets.attention.activation_unit``.
      unit_chunk: its ``chunk``.
    """
    if "query" in params:
        query = params["query"]
        target = target @ query["kernel"] + mlp.channels(query["bias"], target)
        left = mlp.channels(query["alpha"], target) * target
        target = jnp.where(target >= 0, target, left)
    scores, _ = activation_unit(
        params["unit"], target, states, activation="sigmoid", dtype=dtype, train=train,
        chunk=unit_chunk,
    )  # fmt: skip
    return attention_weights(scores, mask, "softmax")


def evolve(
    params: dict,
    states: Float[Array, "*states T H"],
    target: Float[Array, "*batch A"],
    mask: Bool[Array, "..."],
    *,
    variant: str = "augru",
    unroll: int = 1,
    chunk: int = 0,
    dtype: Any = None,
    train: bool = False,
    unit_chunk: int = 0,
) -> Float[Array, "*batch H"]:
    """The evolved interest: the extracted ones filtered by the candidate (eq 9-12).

    Args:
      params: ``cell``, see ``nets.gru``, and ``attention``: ``kernel`` of
        ``bilinear_attention``, or the params of ``din_attention``.
      states: of the extractor; (B, 1, T, H) with N candidates (B, N, A).
      target: candidates.
      mask: (.., T), True at behaviours.
      variant: "gru" pools the states of a plain second GRU by attention; the other
        ``VARIANTS`` return the last state.
      unroll, chunk, dtype: see ``augru_scan``.
      train, unit_chunk: see ``din_attention``.

    Raises:
      ValueError: unknown variant.
    """
    scan = {"unroll": unroll, "chunk": chunk, "dtype": dtype}
    attention = params["attention"]

    def attend(states):
        if "kernel" in attention:
            return bilinear_attention(attention["kernel"], states, target, mask)
        return din_attention(
            attention, states, target, mask,
            dtype=dtype, train=train, unit_chunk=unit_chunk,
        )  # fmt: skip

    if variant == "gru":
        states, _ = gru_scan(params["cell"], states, mask, **scan)
        return jnp.einsum("...t,...th->...h", attend(states), states)
    weights = attend(states)
    return augru_scan(params["cell"], states, weights, mask, variant, **scan)[1]


def width(net: Net) -> int:
    """F: number of features that ``apply`` gives."""
    pooled = 0 if net.pooled == "none" else net.width * (2 if net.product else 1)
    return net.user_dim + net.width + net.state + pooled


def init(key: Key[Array, ""], net: Net) -> dict:
    """Parameters ``extractor`` and ``evolve``.

    Args:
      key: of the draws.
      net: hyper-parameters.
    """
    key_extractor, key_cell, key_query, key_unit = jax.random.split(key, 4)
    glorot = jax.nn.initializers.glorot_uniform()
    if net.attention == "bilinear":
        attention: dict = {"kernel": glorot(key_query, (net.state, net.width))}
    else:
        query = glorot(key_query, (net.width, net.state))
        bias, alpha = jnp.zeros(net.state), jnp.full(net.state, 0.1)
        sizes = (4 * net.state, *net.unit, 1)
        attention = {
            "query": {"kernel": query, "bias": bias, "alpha": alpha},
            "unit": mlp.init(key_unit, sizes, "sigmoid", last_bias=False),
        }
    steered = net.variant in ("agru", "augru", "augru_released")
    update_bias = 1.0 if steered else -1.0
    cell = gru.init(key_cell, net.state, net.state, update_bias=update_bias)
    return {
        "extractor": gru.init(key_extractor, net.width, net.state),
        "evolve": {"attention": attention, "cell": cell},
    }


def embed(
    tables: Mapping[str, Any], batch: Mapping[str, Array], *, net: Net
) -> Embedded:
    """Embeddings of a batch.

    Args:
      tables: see ``nets.behaviour.init``.
      batch: see ``nets.behaviour``.
      net: hyper-parameters.

    Raises:
      ValueError: T = 0, or arrays whose shapes do not fit.
    """
    read = behaviour.fields(batch, net)
    query = behaviour.embed(tables, read["item"], read["cate"])
    keys = behaviour.embed(tables, read["hist_item"], read["hist_cate"])
    user = interest.user_vectors(tables, read, query) if net.user_dim else None
    return Embedded(query, keys, read["mask"], user)


def apply(
    params: dict, embedded: Embedded, *, net: Net, train: bool = False
) -> tuple[Float[Array, "*candidates F"], Float[Array, "B T H"]]:
    """Features of candidates: user, candidate, evolved interest, pooled history.

    With N candidates the extractor runs once per user.

    Args:
      params: see ``init``.
      embedded: see ``embed``.
      net: hyper-parameters.
      train: see ``din_attention``.

    Returns:
      Features, and the extractor's states.
    """
    query, keys, mask, user = embedded
    scan = {
        "unroll": net.unroll, "chunk": net.chunk,
        "dtype": behaviour.compute_dtype(net.dtype),
    }  # fmt: skip
    states, _ = gru_scan(params["extractor"], keys, mask, **scan)
    shared, shared_mask = states, mask
    if query.ndim == 3:
        # The history is shared by the candidates.
        shared, shared_mask = states[:, None], mask[:, None]
    final = evolve(
        params["evolve"], shared, query, shared_mask, variant=net.variant, train=train,
        unit_chunk=net.unit_chunk, **scan,
    )  # fmt: skip
    features = [query, final] if user is None else [user, query, final]
    if net.pooled != "none":
        pooled = pool_history(keys, mask, net.pooled)
        pooled = pooled[:, None] if query.ndim == 3 else pooled
        pooled = jnp.broadcast_to(pooled, query.shape)
        features += [pooled, pooled * query] if net.product else [pooled]
    return jnp.concatenate(features, -1), states
