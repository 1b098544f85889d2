"""DIN's local activation unit: a small network scores a history for a candidate."""

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
      params: an ``nets.mlp`` from 4 D features to 1.
      query: candidates.
      keys: histories; their leading axes broadcast against those of ``query``, so that
        (B, N, D) candidates and (B, 1, T, D) histories share the histories' part.
      mask: True at items, for Dice's statistics; None: all.
      state: Dice's statistics.
      activation: of the hidden layers.
      train: statistics of the batch.
      dtype: of the first layer's products, e.g. bfloat16, summed in float32.
      chunk: rows that are computed at a time in training, again for the gradient, which
        bounds memory and keeps a CPU in its cache; 0: all. Not for Dice, whose statistics
        are the whole batch's. The first layer is linear in the keys, so a chunk folds
        each candidate into its weights: half of that layer's products, which a CPU likes
        and a TPU's large tiles do not.
      options: of ``nets.mlp.dice``.

    Returns:
      Scores, one per item and candidate, and Dice's statistics to use next.

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
    """All rows of ``activation_unit``; ``fold``: (B, D) candidates join the weights."""
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
        own = jnp.swapaxes(query, 1, 2) * w_product[None]
        kernel = own + (w_key - w_difference)[None]
        of_keys = jnp.matmul(
            keys.astype(dtype or keys.dtype),
            kernel.astype(dtype or kernel.dtype),
            preferred_element_type=kernel.dtype,
        )
    else:
        of_keys = product(query * keys, w_product) + product(keys, w_key - w_difference)
    hidden = of_keys + product(query, w_query + w_difference)
    hidden = hidden + first["bias"].reshape((1,) * (hidden.ndim - 1) + (-1,))
    hidden, state = mlp.activate(first, state, hidden, "layer_0", activation, **options)
    rest = {f"layer_{i}": params[f"layer_{i + 1}"] for i in range(len(params) - 1)}
    # The later layers' statistics keep their names.
    own = {f"layer_{i}": state[f"layer_{i + 1}"] for i in range(len(params) - 2)
           if f"layer_{i + 1}" in state}  # fmt: skip
    scores, own = mlp.apply(rest, own, hidden, activation=activation, **options)
    moved = {f"layer_{int(name[6:]) + 1}": s for name, s in own.items()}
    return scores[..., 0], {**state, **moved}


def _in_chunks(score, chunk, query, keys):
    """score(query, keys), ``chunk`` rows at a time, nothing inside of it kept."""

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
