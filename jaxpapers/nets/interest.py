"""DIN's interest: a history pooled for a candidate, and what the click MLP reads.

``net`` is the group of configs/din.py; batches are those of ``nets.behaviour``.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers.nets import behaviour, embedding, mlp
from jaxpapers.nets.attention import activation_unit
from jaxpapers.nets.mlp import DiceState
from jaxpapers.ops.attention import NORMALIZE, attention_pool

POOLING = ("attention", "mean", "sum")


def width(net: Any) -> int:
    """Numbers that ``apply`` gives for a candidate."""
    own = net.item_dim + net.cate_dim
    return (net.project or own) + own + net.user_dim + (own if net.product else 0)


def init(key: Key[Array, ""], net: Any) -> dict:
    """Tables, attention unit, projection and affine maps, as far as ``net`` has them.

    Raises:
      ValueError: sizes or names that are not known.
    """
    check(net)
    key_tables, key_unit, key_project = jax.random.split(key, 3)
    own = net.item_dim + net.cate_dim
    params: dict = {"tables": behaviour.init(key_tables, net)}
    if net.pooling == "attention":
        params["unit"] = mlp.init(
            key_unit,
            (4 * own, *net.unit, 1),
            net.unit_activation,
            last_bias=net.normalize == "none",
        )
    if net.project:
        params["project"] = mlp.init(key_project, (own, net.project))
    if net.affine:
        params["affine"] = {
            name: {"scale": jnp.ones(n), "bias": jnp.zeros(n)}
            for name, n in (("pooled", own), ("input", width(net)))
        }
    return params


def apply(
    params: dict,
    state: dict[str, DiceState],
    batch: Mapping[str, Array],
    *,
    net: Any,
    train: bool,
) -> tuple[Float[Array, "B ..."], dict[str, DiceState]]:
    """Features of candidates: pooled history, candidate, their product, user.

    Args:
      params: see ``init``.
      state: statistics of the attention unit, {} without it.
      batch: see ``nets.behaviour``; item (B,) or (B, N).
      net: see above.
      train: statistics of the batch.

    Returns:
      (B, width) or (B, N, width), and the statistics to use next.

    Raises:
      ValueError: T = 0, or arrays whose shapes do not fit.
    """
    use, tables = behaviour.fields(batch, net), params["tables"]
    query = behaviour.embed(tables, use["item"], use["cate"])
    keys = behaviour.embed(tables, use["hist_item"], use["hist_cate"])
    pooled, state = _pool(params, state, query, keys, use, net, train)
    pooled = _affine(params, "pooled", pooled)
    if net.project:
        pooled, _ = mlp.apply(
            params["project"], {}, pooled, activation="relu", train=train
        )
    parts = [pooled, query]
    if net.product:
        parts.append(pooled * query)
    if net.user_dim:
        user = embedding.lookup(tables["user"], use["user"])
        user = user[:, None] if query.ndim == 3 else user
        parts.append(jnp.broadcast_to(user, (*query.shape[:-1], net.user_dim)))
    return _affine(params, "input", jnp.concatenate(parts, -1)), state


def _pool(params, state, query, keys, use, net, train):
    """The history's vector for each candidate, and the statistics to use next."""
    mask = use["mask"]
    if net.pooling != "attention":
        pooled = jnp.where(mask[..., None], keys, 0.0).sum(1)
        if net.pooling == "mean":
            pooled = pooled / jnp.maximum(mask.sum(1), 1)[:, None].astype(pooled.dtype)
        pooled = pooled[:, None] if query.ndim == 3 else pooled
        return jnp.broadcast_to(pooled, query.shape), state
    counted = jnp.ones_like(mask) if net.dice_padding else mask
    if use["row_mask"] is not None:
        counted = counted & use["row_mask"][:, None]
    if query.ndim == 3:
        # Histories are read once for all candidates: (B, N, 1, D) with (B, 1, T, D).
        keys, mask, counted = keys[:, None], mask[:, None], counted[:, None]
    scores, state = activation_unit(
        params["unit"], query, keys, counted, state=state, train=train,
        activation=net.unit_activation, dtype=behaviour.compute_dtype(net),
        decay=net.dice_decay, eps=net.dice_eps, chunk=net.unit_chunk,
    )  # fmt: skip
    return attention_pool(scores, keys, mask, net.normalize), state


def _affine(params, name, x):
    """The released code's batch normalisation, whose statistics stay 0 and 1."""
    if "affine" not in params:
        return x
    p = {k: v.reshape((1,) * (x.ndim - 1) + v.shape) for k, v in
         params["affine"][name].items()}  # fmt: skip
    return p["scale"] * x / math.sqrt(1.001) + p["bias"]


def check(net: Any) -> None:
    """Raises ValueError naming the field of ``net`` that is wrong."""
    behaviour.check_choices(
        net, pooling=POOLING, normalize=NORMALIZE, dtype=behaviour.DTYPES
    )
    mlp.check(net.activation, "config.net.activation")
    mlp.check(net.unit_activation, "config.net.unit_activation")
    behaviour.check_sizes(net)
    own = net.item_dim + net.cate_dim
    if net.project < 0 or (net.product and net.project not in (0, own)):
        raise ValueError(
            f"config.net.project must be >= 0, and 0 or {own} with config.net.product, "
            f"which multiplies with the candidate; got {net.project}"
        )
