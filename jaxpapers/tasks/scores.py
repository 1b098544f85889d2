"""Scores of a method's rows, for tasks that measure predictions."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpapers.ops.host import non_finite_rows


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


def all_finite(values: Any, what: str) -> bool:
    """Whether an array is finite; if not, a warning says which of its rows are not.

    A task gives NaN for every metric of such an array: a rank, the nearest neighbour or
    the largest of NaN exists, and makes a model that has diverged look like one that has
    not.

    Args:
      values: (N, ...).
      what: name of the rows, in the plural.
    """
    values = np.asarray(values)
    rows = non_finite_rows(values)
    if len(rows):
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        warnings.warn(
            f"{len(rows)} of {len(values)} {what} are NaN or infinite: {shown}; the "
            "metrics of all of them are NaN. The model has diverged: lower "
            "config.optim.lr, or evaluate an earlier checkpoint",
            RuntimeWarning,
            stacklevel=2,
        )
    return not len(rows)
