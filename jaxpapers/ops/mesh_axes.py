"""Names of mesh axes, and which of them the compiler partitions."""

import math
from collections.abc import Container

import jax
from jax.sharding import AxisType

BATCH = ("slice", "replica", "data")
"""Axes that split a batch, the slowest network first: parameters are whole on each
``slice`` and each ``replica``, and may be split over ``data``."""
AXES = (*BATCH, "model")
"""All axes of a mesh, in its order."""


def batch_axes(names: Container[str]) -> tuple[str, ...]:
    """Those of some axes that split a batch.

    Args:
      names: of a mesh.

    Example:
      >>> batch_axes(["replica", "data", "model"])
      ('replica', 'data')
    """
    return tuple(n for n in BATCH if n in names)


def auto_axes() -> tuple[str, ...]:
    """Auto axes of the mesh in scope; not those that a ``jax.shard_map`` is inside of."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    return tuple(n for n in AXES if kinds.get(n) == AxisType.Auto)


def split_axes(rows: int) -> tuple[str, ...]:
    """Auto axes of the mesh in scope that split a batch; () if they do not divide it.

    Inside a ``jax.shard_map`` these are the axes that it leaves to the compiler.

    Args:
      rows: of the batch.
    """
    mesh, axes = jax.sharding.get_abstract_mesh(), batch_axes(auto_axes())
    return () if rows % math.prod(mesh.shape[n] for n in axes) else axes
