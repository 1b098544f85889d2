"""What the optimizers of matrices share: reading leaves, grouping them, running steps."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.layout import Layout, is_dimensions, make_layout, per_leaf
from jaxpapers.optim.options import check_leaf
from jaxpapers.optim.sharded import blockwise, group_key


def read_layouts(named: Sequence[tuple[str, Any]], dimensions: Any, name: str):
    """Layouts of leaves for an optimizer without a rank."""
    numbers = per_leaf(dimensions, named, is_dimensions, "weight_dimension_numbers")
    for path, leaf in named:
        check_leaf(path, leaf, name)
    return [make_layout(path, leaf.shape, d) for (path, leaf), d in zip(named, numbers)]


def same_shape(layouts: Sequence[Layout]) -> list[Any]:
    """Keys for ``in_groups`` of leaves whose matrices have equal shapes."""
    return [(x.fan_in, x.fan_out) for x in layouts]


def check_shapes(
    named: Sequence[tuple[str, Any]], momenta: Sequence[jax.Array]
) -> None:
    """ValueError where a gradient has not its momentum's shape."""
    for (path, g), m in zip(named, momenta):
        if g.shape != m.shape:
            raise ValueError(
                f"{path}: gradient has shape {g.shape}, the state's momentum "
                f"{m.shape}; call init with the parameters of these gradients"
            )


def in_groups(
    step: Callable,
    layouts: Sequence[Layout],
    found: Sequence[NamedSharding | None],
    arrays: Sequence[Sequence[jax.Array]],
    specs: Sequence[Callable[[Layout, P], P]],
    options: Any,
    keys: Sequence[Any],
    replicas: Sequence[tuple[str, ...]] | None = None,
) -> list[tuple[jax.Array, ...]]:
    """``blockwise`` on groups of leaves; results leaf by leaf.

    Args:
      step: see ``blockwise``, as for all up to ``options``.
      layouts: of the leaves.
      found: shardings of the leaves.
      arrays: lists over the leaves: gradients, momenta, further state.
      specs: of each of ``arrays``.
      options: hyper-parameters.
      keys: leaves with equal ones may share a step, if ``group_key`` agrees.
      replicas: mesh axes that each leaf is averaged over.
    """
    groups: dict[Any, list[int]] = {}
    replicas = replicas or [()] * len(layouts)
    for i, (layout, where) in enumerate(zip(layouts, found)):
        key = (keys[i], replicas[i], group_key(layout, where, arrays[1][i].dtype))
        groups.setdefault(key, []).append(i)
    outputs: list[Any] = [None] * len(layouts)
    for members in groups.values():
        done = blockwise(
            step,
            [layouts[i] for i in members],
            [found[i] for i in members],
            [[xs[i] for i in members] for xs in arrays],
            specs,
            options,
            replicas[members[0]],
        )
        for i, *results in zip(members, *done):
            outputs[i] = tuple(results)
    return outputs
