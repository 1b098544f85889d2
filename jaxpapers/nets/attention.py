"""DIN's local activation unit: an MLP that scores a history's items for a candidate."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxpapers.nets import mlp
from jaxpapers.nets.mlp import DiceState


def activation_unit(
    params: dict,
    query: Float[Array, "*batch D"],
    keys: Float[Array, "*keys T D"],
    mask: Bool[Array, "*keys T"] | None = None,
    *,
    state: dict[str, DiceState] | None = None,
    activation: str = "sigmoid",
    train: bool = False,
    dtype: Any = None,
    chunk: int = 0,
    **options: Any,
) -> tuple[Float[Array, "*scores T"], dict[str, DiceState]]:
    """Scores of history items for a candidate (DIN, arXiv 1706.06978, section 4.3).

    Args:
      params: a ``nets.mlp`` from 4 D features to 1.
      query: candidates.
      keys: histories; their leading axes broadcast against those of ``query``, so that
        (B, N, D) candidates and (B, 1, T, D) histories share the products with the keys.
      mask: True at items, for Dice's statistics; None: all.
      state: Dice's statistics.
      activation: of the hidden layers.
      train: whether Dice takes the batch's statistics.
      dtype: of the first layer's products, e.g. bfloat16, accumulated in float32.
      chunk: rows computed at a time in training, and again in the backward pass, to bound
        memory and stay in a CPU's cache; 0: all. Not with Dice, whose statistics are
        those of the whole batch. Within a chunk each candidate is folded into the first
        layer's weights, which halves its products: faster on CPUs, not on TPUs.
      options: of ``nets.mlp.dice``.

    Returns:
      Scores, one per item and candidate, and the new statistics.

    Raises:
      ValueError: widths that do not fit; a chunk with Dice, or that does not divide the
        batch.
    """
    if chunk and train:
        if activation == "dice" or query.ndim != 2 or len(query) % chunk:
            raise ValueError(
                f"net.unit_chunk={chunk} must divide the batch of {len(query)} rows with "
                "one candidate each, and not be used with net.unit_activation=dice; set "
                "it to 0"
            )
        return _in_chunks(
            lambda q, k: _unit(
                params, q, k, {}, activation, dtype, fold=True, train=False, **options
            )[0],
            chunk, query, keys,
        ), state or {}  # fmt: skip
    options = {"train": train, "mask": mask, **options}
    return _unit(params, query, keys, state or {}, activation, dtype, **options)


def _unit(params, query, keys, state, activation, dtype, *, fold=False, **options):
    """``activation_unit`` of all rows; ``fold``: candidates (B, D) join the weights."""
    first = params["layer_0"]
    width = query.shape[-1]
    w_query, w_key, w_difference, w_product = jnp.split(first["kernel"], 4)
    if first["kernel"].shape[0] != 4 * width or keys.shape[-1] != width:
        raise ValueError(
            f"the unit takes 4 x D features, got D {width} of the query, "
            f"{keys.shape[-1]} of the keys and {first['kernel'].shape[0]} inputs"
        )

    product = functools.partial(mlp.matmul, dtype=dtype)
    query = jnp.expand_dims(query, -2)
    if fold:
        of_query = jnp.swapaxes(query, 1, 2) * w_product[None]
        kernel = of_query + (w_key - w_difference)[None]
        of_keys = jnp.matmul(
            keys.astype(dtype or keys.dtype),
            kernel.astype(dtype or kernel.dtype),
            preferred_element_type=kernel.dtype,
        )
    else:
        of_keys = product(query * keys, w_product) + product(keys, w_key - w_difference)
    hidden = of_keys + product(query, w_query + w_difference)
    hidden = hidden + mlp.channels(first["bias"], hidden)
    hidden, state = mlp.activate(first, state, hidden, "layer_0", activation, **options)
    scores, state = mlp.apply(
        params, state, hidden, activation=activation, start=1, **options
    )
    return scores[..., 0], state


def _in_chunks(score, chunk, query, keys):
    """score(query, keys) by ``chunk`` rows; the backward pass computes them again."""
    # On a mesh interleaved, so that every chunk keeps the batch's sharding.
    mesh = jax.sharding.get_abstract_mesh()
    interleave = not mesh.empty and mesh.size > 1

    def cut(x):
        if interleave:
            return x.reshape(chunk, -1, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(-1, chunk, *x.shape[1:])

    part = jax.checkpoint(lambda rows: score(*rows))
    scores = lax.map(part, (cut(query), cut(keys)))
    scores = scores.swapaxes(0, 1) if interleave else scores
    return scores.reshape(len(query), -1)
