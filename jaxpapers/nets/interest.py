"""DIN's interest: the history pooled for a candidate, and the features of the click MLP.

Batches are those of ``nets.behaviour``.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers import options
from jaxpapers.nets import behaviour, embedding, mlp
from jaxpapers.nets.attention import activation_unit
from jaxpapers.nets.mlp import DiceState, channels
from jaxpapers.ops.attention import NORMALIZE, attention_pool, pool_history

POOLING = ("attention", "mean", "sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net(behaviour.Net):
    """Hyper-parameters of DIN (arXiv 1706.06978), the paper's on Amazon as defaults."""

    item_bias: bool = True
    """Whether each item adds a bias to its logit."""
    pooling: str = "attention"
    """Of the history, one of ``POOLING``; mean and sum ignore the candidate."""
    normalize: str = "none"
    """Of the attention weights, one of ``ops.attention.NORMALIZE``."""
    unit_activation: str = "sigmoid"
    """Of the attention unit, one of ``nets.mlp.ACTIVATIONS``."""
    product: bool = False
    """Whether candidate * pooled history is a further feature."""
    project: int = 0
    """Width of a linear map after the pooling; 0: none."""
    affine: bool = False
    """Affine maps in place of the released code's frozen batch normalisation."""
    dice_padding: bool = False
    """Whether padding counts in the statistics of the unit's Dice."""
    dtype: str = "float32"
    """Of the products in the unit's first layer, one of ``nets.behaviour.DTYPES``."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        super().__post_init__()
        options.check_choices(
            self, "net", pooling=POOLING, normalize=NORMALIZE,
            unit_activation=mlp.ACTIVATIONS, dtype=behaviour.DTYPES,
        )  # fmt: skip
        options.check_least(self, "net", project=0)
        if self.product and self.project not in (0, self.width):
            raise ValueError(
                f"net.project must be 0 or {self.width} (item_dim + cate_dim) with "
                f"net.product, which multiplies it with the candidate; got {self.project}"
            )


def width(net: Net) -> int:
    """F: number of features that ``apply`` gives."""
    pooled, product = net.project or net.width, net.width if net.product else 0
    return pooled + net.width + net.user_dim + product


def init(key: Key[Array, ""], net: Net) -> dict:
    """Parameters ``tables``, and those of ``unit``, ``project``, ``affine`` in use.

    Args:
      key: of the draws.
      net: hyper-parameters.
    """
    key_tables, key_unit, key_project = jax.random.split(key, 3)
    params: dict = {"tables": behaviour.init(key_tables, net)}
    if net.pooling == "attention":
        params["unit"] = mlp.init(
            key_unit,
            (4 * net.width, *net.unit, 1),
            net.unit_activation,
            last_bias=net.normalize == "none",  # A softmax does not see a bias.
        )
    if net.project:
        params["project"] = mlp.init(key_project, (net.width, net.project))
    if net.affine:
        params["affine"] = {
            name: {"scale": jnp.ones(n), "bias": jnp.zeros(n)}
            for name, n in (("pooled", net.width), ("input", width(net)))
        }
    return params


def apply(
    params: dict,
    state: dict[str, DiceState],
    batch: Mapping[str, Array],
    *,
    net: Net,
    train: bool,
) -> tuple[Float[Array, "B ..."], dict[str, DiceState]]:
    """Features of candidates: pooled history, candidate, their product, user.

    Args:
      params: see ``init``.
      state: statistics of the attention unit's Dice, {} without.
      batch: see ``nets.behaviour``; item (B,) or (B, N).
      net: hyper-parameters.
      train: whether Dice takes the batch's statistics.

    Returns:
      (B, F) or (B, N, F), and the new statistics.

    Raises:
      ValueError: T = 0, or arrays whose shapes do not fit.
    """
    read, tables = behaviour.fields(batch, net), params["tables"]
    query = behaviour.embed(tables, read["item"], read["cate"])
    keys = behaviour.embed(tables, read["hist_item"], read["hist_cate"])
    pooled, state = _pool(params, state, query, keys, read, net, train)
    pooled = _affine(params, "pooled", pooled)
    if net.project:
        pooled, _ = mlp.apply(
            params["project"], {}, pooled, activation="relu", train=train
        )
    features = [pooled, query]
    if net.product:
        features.append(pooled * query)
    if net.user_dim:
        features.append(user_vectors(tables, read, query))
    return _affine(params, "input", jnp.concatenate(features, -1)), state


def user_vectors(
    tables: Mapping[str, Any],
    read: Mapping[str, Any],
    query: Float[Array, "*candidates D"],
) -> Float[Array, "*candidates U"]:
    """Embeddings of users, repeated for each of their candidates.

    Args:
      tables: see ``nets.behaviour.init``.
      read: of ``nets.behaviour.fields``.
      query: candidates, for their number.
    """
    user = embedding.lookup(tables["user"], read["user"])
    user = user[:, None] if query.ndim == 3 else user
    return jnp.broadcast_to(user, (*query.shape[:-1], user.shape[-1]))


def _pool(params, state, query, keys, read, net, train):
    """The history's vector for each candidate, and the new statistics."""
    mask = read["mask"]
    if net.pooling != "attention":
        pooled = pool_history(keys, mask, net.pooling)
        pooled = pooled[:, None] if query.ndim == 3 else pooled
        return jnp.broadcast_to(pooled, query.shape), state
    counted = jnp.ones_like(mask) if net.dice_padding else mask
    if read["row_mask"] is not None:
        counted = counted & read["row_mask"][:, None]
    if query.ndim == 3:
        # The history is shared by the candidates: (B, N, 1, D) with (B, 1, T, D).
        keys, mask, counted = keys[:, None], mask[:, None], counted[:, None]
    scores, state = activation_unit(
        params["unit"], query, keys, counted, state=state, train=train,
        activation=net.unit_activation, dtype=behaviour.compute_dtype(net.dtype),
        decay=net.dice_decay, eps=net.dice_eps, chunk=net.unit_chunk,
    )  # fmt: skip
    return attention_pool(scores, keys, mask, net.normalize), state


def _affine(params, name, x):
    """The released code's batch normalisation, whose statistics stay 0 and 1."""
    if "affine" not in params:
        return x
    scale, bias = (channels(params["affine"][name][n], x)
                   for n in ("scale", "bias"))  # fmt: skip
    return scale * x / math.sqrt(1.001) + bias
