"""DIEN's interests: a GRU over the history, and a second one steered by the candidate.

``net`` is the group of configs/dien.py; batches are those of ``nets.behaviour``.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxpapers.nets import behaviour, embedding, gru, mlp
from jaxpapers.nets.attention import activation_unit
from jaxpapers.nets.gru import VARIANTS, augru_scan, gru_scan
from jaxpapers.ops.attention import attention_weights

ATTENTION = ("bilinear", "din")
POOLED = ("sum", "mean", "none")


class Reads(NamedTuple):
    """What a batch reads of the tables.

    Attributes:
      query: (B, D) or (B, N, D), candidates.
      keys: (B, T, D), the history, zeros at padding.
      mask: (B, T), True at behaviours.
      user: (B, U), or None.
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
    """The released code's attention: softmax over the steps of DIN's unit.

    Args:
      params: ``unit``, see ``nets.attention.activation_unit``; ``query``, optional, a
        dense layer with PReLU (kernel, bias, alpha) that takes A to H.
      states: see ``bilinear_attention``.
      target: see ``bilinear_attention``.
      mask: see ``bilinear_attention``.
      dtype: of the unit's products.
      train: see ``nets.attention.activation_unit``.
      unit_chunk: its ``chunk``.
    """
    if "query" in params:
        p = {k: v.reshape((1,) * (target.ndim - v.ndim) + v.shape)
             for k, v in params["query"].items() if k != "kernel"}  # fmt: skip
        target = target @ params["query"]["kernel"] + p["bias"]
        target = jnp.where(target >= 0, target, p["alpha"] * target)
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
    """What became of the interests, as the candidate sees it (eq 9-12).

    Args:
      params: ``cell``, see ``nets.gru``, and ``attention``: ``kernel`` of
        ``bilinear_attention``, or what ``din_attention`` takes.
      states: of the extractor; (B, 1, T, H) with N candidates (B, N, A).
      target: candidates.
      mask: (.., T), True at behaviours.
      variant: "gru" weighs the states of a second GRU with attention on them; the other
        ``VARIANTS`` give the last state.
      unroll: see ``augru_scan``.
      chunk: see ``augru_scan``.
      dtype: of the products that no state is in.
      train: see ``din_attention``.
      unit_chunk: see ``din_attention``.

    Raises:
      ValueError: unknown variant.
    """
    options = {"unroll": unroll, "chunk": chunk, "dtype": dtype}
    given = params["attention"]

    def attend(states):
        if "kernel" in given:
            return bilinear_attention(given["kernel"], states, target, mask)
        return din_attention(
            given, states, target, mask, dtype=dtype, train=train, unit_chunk=unit_chunk
        )

    if variant == "gru":
        states, _ = gru_scan(params["cell"], states, mask, **options)
        return jnp.einsum("...t,...th->...h", attend(states), states)
    return augru_scan(params["cell"], states, attend(states), mask, variant, **options)[
        1
    ]


def width(net: Any) -> int:
    """Numbers that ``apply`` gives for a candidate."""
    own = net.item_dim + net.cate_dim
    pooled = 0 if net.pooled == "none" else own * (2 if net.product else 1)
    return net.user_dim + own + net.state + pooled


def init(key: Key[Array, ""], net: Any) -> dict:
    """Parameters ``extractor`` and ``evolve``.

    Raises:
      ValueError: sizes or names that are not known.
    """
    check(net)
    key_extractor, key_cell, key_query, key_unit = jax.random.split(key, 4)
    own, state = net.item_dim + net.cate_dim, net.state
    glorot = jax.nn.initializers.glorot_uniform()
    if net.attention == "bilinear":
        attention: dict = {"kernel": glorot(key_query, (state, own))}
    else:
        query = glorot(key_query, (own, state))
        bias, alpha = jnp.zeros(state), jnp.full(state, 0.1)
        attention = {
            "query": {"kernel": query, "bias": bias, "alpha": alpha},
            "unit": mlp.init(
                key_unit, (4 * state, *net.unit, 1), "sigmoid", last_bias=False
            ),
        }
    steered = net.variant in ("agru", "augru", "augru_released")
    cell = gru.init(key_cell, state, state, update_bias=1.0 if steered else -1.0)
    return {
        "extractor": gru.init(key_extractor, own, state),
        "evolve": {"attention": attention, "cell": cell},
    }


def read(tables: Mapping[str, Any], batch: Mapping[str, Array], *, net: Any) -> Reads:
    """Embeddings of a batch.

    Raises:
      ValueError: T = 0, or arrays whose shapes do not fit.
    """
    use = behaviour.fields(batch, net)
    query = behaviour.embed(tables, use["item"], use["cate"])
    keys = behaviour.embed(tables, use["hist_item"], use["hist_cate"])
    user = embedding.lookup(tables["user"], use["user"]) if net.user_dim else None
    return Reads(query, keys, use["mask"], user)


def apply(
    params: dict, reads: Reads, *, net: Any, train: bool = False
) -> tuple[Float[Array, "*candidates F"], Float[Array, "B T H"]]:
    """Features of candidates: user, candidate, evolved interest, pooled history.

    With N candidates the extractor runs once per user.

    Args:
      params: see ``init``.
      reads: see ``read``.
      net: see above.
      train: see ``din_attention``.

    Returns:
      Features, and the extractor's states.
    """
    query, keys, mask, user = reads
    options = {
        "unroll": net.unroll, "chunk": net.chunk,
        "dtype": behaviour.compute_dtype(net),
    }  # fmt: skip
    states, _ = gru_scan(params["extractor"], keys, mask, **options)
    pooled = keys.sum(1)  # Padding reads zeros.
    if net.pooled == "mean":
        pooled = pooled / jnp.maximum(mask.sum(1), 1)[:, None].astype(pooled.dtype)
    shared, seen = states, mask
    if query.ndim == 3:
        # One history, N candidates: what has no candidate in it is computed once.
        shared, seen, pooled = states[:, None], mask[:, None], pooled[:, None]
        user = user if user is None else user[:, None]
    final = evolve(
        params["evolve"], shared, query, seen, variant=net.variant, train=train,
        unit_chunk=net.unit_chunk, **options,
    )  # fmt: skip

    def spread(x):
        return jnp.broadcast_to(x, (*query.shape[:-1], x.shape[-1]))

    parts = [query, final] if user is None else [spread(user), query, final]
    if net.pooled != "none":
        parts += [spread(pooled)] + ([spread(pooled) * query] if net.product else [])
    return jnp.concatenate(parts, -1), states


def check(net: Any) -> None:
    """Raises ValueError naming the field of ``net`` that is wrong."""
    behaviour.check_choices(
        net, variant=VARIANTS, attention=ATTENTION, pooled=POOLED,
        dtype=behaviour.DTYPES,
    )  # fmt: skip
    mlp.check(net.activation, "config.net.activation")
    behaviour.check_sizes(net)
    if net.state < 1:
        raise ValueError(f"config.net.state must be >= 1, got {net.state}")
