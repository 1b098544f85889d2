"""Scores of a method's rows, for tasks that measure predictions."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def named(scores: Any) -> dict[str, Any]:
    """Scores by the prefix of their metric: "" for the net that is compared.

    A method of several nets predicts a NamedTuple, the net to compare first.
    """
    if not hasattr(scores, "_fields"):
        return {"": scores}
    first, *others = scores._fields
    return {"": getattr(scores, first)} | {
        f"{name}_": getattr(scores, name) for name in others
    }


@functools.lru_cache(maxsize=8)
def scorer(predict: Callable, mesh: Mesh) -> Callable:
    """``Method.predict``, its result whole on every device; compiled once per model."""
    return jax.jit(predict, out_shardings=NamedSharding(mesh, PartitionSpec()))
