"""Leaves that hold several matrices side by side, each stepped as one of its own.

q, k and v in one kernel, an MLP's gate and up: one wide product for the model, but the
matrices of a step that orthonormalises. They lie along the first output axis, in sizes
that may differ (fewer heads of k and v than of q). State of the leaf's shape stays whole;
what a matrix has besides (Dion's Q) is a tuple of the blocks'.

On a mesh each device needs its part of every block. It has it where the split axis is
whole, and nothing is sent. Where that axis is sharded, its mesh axes go to another axis
for the step, by an all-to-all of the gradient and of each array of the state, and back
by one of the update and of each array: 2 (1 + arrays) (n - 1) / n of a device's part.
"""

import functools
import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.layout import Layout, make_layout, mesh_axes
from jaxpapers.optim.paths import dimension_numbers, per_leaf
from jaxpapers.optim.placement import placed


def by_leaf(layouts: Sequence[Layout], parts: Sequence[Any]) -> list[Any]:
    """What belongs to the parts of leaves, leaf by leaf: of a fused one a tuple."""
    rest = iter(parts)
    return [
        tuple(next(rest) for _ in x.blocks) if x.blocks else next(rest) for x in layouts
    ]


def is_sizes(x: Any) -> bool:
    """Whether ``x`` is one value of a ``split_sizes`` option, right or wrong."""
    if x is None or isinstance(x, int | float | np.ndarray):
        return True
    if not isinstance(x, tuple | list) or not x:
        return False
    return all(isinstance(n, int | float | np.number) for n in x)


def read_sizes(
    option: Any, named: Sequence[tuple[str, Any]]
) -> list[tuple[int, ...] | None]:
    """The option ``split_sizes`` of each leaf; None where it is one matrix.

    Raises:
      TypeError: sizes that are no tuple of integers.
      ValueError: sizes below 1.
    """
    if option is None:
        return [None] * len(named)
    values = per_leaf(option, named, is_sizes, "split_sizes")
    return [_checked(path, value) for (path, _), value in zip(named, values)]


def _checked(path: str, sizes: Any) -> tuple[int, ...] | None:
    if sizes is None:
        return None
    integers = isinstance(sizes, tuple | list) and all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) for n in sizes
    )
    if not integers:
        raise TypeError(
            f"{path}: split_sizes must be a tuple of integers or None, got {sizes!r}; "
            "give the sizes of the blocks along the first output axis, such as "
            "(2048, 512, 512)"
        )
    if min(sizes, default=0) < 1:
        raise ValueError(f"{path}: split_sizes must be at least 1, got {tuple(sizes)}")
    return tuple(int(n) for n in sizes)


def with_blocks(
    layout: Layout,
    sizes: tuple[int, ...] | None,
    make: Callable[[str, tuple[int, ...]], Layout],
) -> Layout:
    """The layout of a leaf that holds blocks of these sizes.

    Args:
      layout: of the whole leaf.
      sizes: along its ``split_axis``; None or one size: it is one matrix.
      make: (path, shape) -> layout of a block, called in their order.

    Raises:
      ValueError: the sizes do not sum to the axis.
    """
    if sizes is None:
        return layout
    axis, shape = layout.split_axis, layout.shape
    if sum(sizes) != shape[axis]:
        raise ValueError(
            f"{layout.path}: split_sizes {sizes} sum to {sum(sizes)}, expected "
            f"{shape[axis]}, axis {axis} of shape {shape} (the first output axis); give "
            "the size of every block, or name another axis first in output_axis of "
            "weight_dimension_numbers"
        )
    if len(sizes) == 1:
        return layout
    blocks = [
        make(f"{layout.path}/{i}", (*shape[:axis], n, *shape[axis + 1 :]))
        for i, n in enumerate(sizes)
    ]
    return layout._replace(blocks=tuple(blocks))


def read_layout(
    path: str,
    leaf: Any,
    *,
    weight_dimension_numbers: Any = None,
    split_sizes: Any = None,
    **options: Any,
) -> Layout:
    """The layout of one leaf, its blocks included, outside an optimizer.

    Args:
      path: of the leaf.
      leaf: array or shape.
      weight_dimension_numbers: see ``scale_by_dion``.
      split_sizes: see ``scale_by_dion``.
      **options: of ``make_layout``.
    """
    named = [(path, leaf)]
    dimensions = dimension_numbers(weight_dimension_numbers, named)[0]
    make = functools.partial(make_layout, dimensions=dimensions, **options)
    return with_blocks(make(path, leaf.shape), read_sizes(split_sizes, named)[0], make)


def owner(name: str, params: Container[str]) -> str:
    """The parameter that a matrix of this name is, or is a block of."""
    head, _, last = name.rpartition("/")
    return head if name not in params and last.isdigit() and head in params else name


def part_of(layout: Layout, name: str) -> Layout:
    """The layout of the matrix of this name in a leaf.

    Raises:
      ValueError: the leaf has no such block.
    """
    for part in layout.parts:
        if part.path == name:
            return part
    raise ValueError(
        f"{name}: the state has a matrix of this name, expected "
        f"{[x.path for x in layout.parts]}; pass the split_sizes that made the state"
    )


def without_split_axis(layout: Layout, spec: P) -> P:
    """A spec of the leaf's axes with the split axis of a fused leaf whole."""
    if not layout.blocks:
        return spec
    entries = list(spec)
    if layout.split_axis < len(entries):
        entries[layout.split_axis] = None
    return P(*entries)


def block_sharding(layout: Layout, where: NamedSharding) -> NamedSharding:
    """How the blocks of a leaf are sharded in a step, given the leaf's sharding.

    Mesh axes of the split axis go to the first batch axis that divides over them, so
    that a device has whole rows or matrices, else to one of the inputs, else of the
    outputs.

    Raises:
      ValueError: no axis divides.
    """
    if not layout.blocks:
        return where
    axis, shape, sizes = layout.split_axis, layout.shape, dict(where.mesh.shape)
    entries = [*where.spec, *(None,) * (len(shape) - len(where.spec))]
    names = mesh_axes(entries[axis])
    if not names:
        return where
    further = [a for a in range(len(shape)) if a not in (*layout.batch, axis)]
    further.sort(key=lambda a: a not in layout.reduction)
    for a in (*layout.batch, *further):
        moved = mesh_axes(entries[a]) + names
        if shape[a] % math.prod(sizes[n] for n in moved) == 0:
            entries[a], entries[axis] = moved, None
            return NamedSharding(where.mesh, P(*entries))
    raise ValueError(
        f"{layout.path}: axis {axis} of shape {shape}, which split_sizes splits, is "
        f"sharded over {names}, and no other axis divides over "
        f"{math.prod(sizes[n] for n in names)} further devices; shard another axis than "
        f"{axis}, or fewer devices"
    )


def separate(
    layout: Layout,
    where: NamedSharding | None,
    x: Any,
    spec: Callable[[Layout, P], P],
) -> list[Any]:
    """The blocks of an array of a leaf.

    Args:
      layout: of the leaf.
      where: sharding of the leaf.
      x: array with the leaf's split axis, or a tuple that holds the blocks already.
      spec: partition of ``x`` given the leaf's spec.
    """
    if not layout.blocks:
        return [x]
    if isinstance(x, tuple):
        return list(x)
    x = _moved(layout, where and block_sharding(layout, where), x, spec)
    axis = layout.split_axis
    ends = np.cumsum([block.shape[axis] for block in layout.blocks])[:-1]
    return jnp.split(x, ends.tolist(), axis)


def joined(
    layout: Layout,
    where: NamedSharding | None,
    blocks: tuple[Any, ...],
    spec: Callable[[Layout, P], P],
) -> Any:
    """A leaf's array of its blocks; see ``separate``."""
    x = jnp.concatenate(blocks, layout.split_axis)
    return _moved(layout, where, x, spec)


def _moved(layout, where, x, spec):
    if where is None:
        return x
    return placed(x, NamedSharding(where.mesh, spec(layout, where.spec)))
