"""Layouts, groups of leaves, init and update of all optimizers of matrices."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.fused import (
    block_sharding,
    by_leaf,
    joined,
    read_sizes,
    separate,
    with_blocks,
)
from jaxpapers.optim.layout import Layout, make_layout
from jaxpapers.optim.options import (
    check_choice,
    check_dtype,
    check_leaf,
    check_paths,
    leaf_dtype,
)
from jaxpapers.optim.paths import dimension_numbers, named_leaves, with_leaves
from jaxpapers.optim.placement import Placement, placed
from jaxpapers.optim.saturation import saturate
from jaxpapers.optim.sharded import blockwise, group_key, leaf_spec


def momentum_method(
    name: str,
    step: Callable,
    options: Any,
    make_state: Callable[..., Any],
    *statistics: tuple[Callable[[Layout, Any], jax.Array], Callable[[Layout, P], P]],
    weight_dimension_numbers: Any,
    momentum_dtype: Any,
    split_sizes: Any,
    sharding: Any,
    scale: str | None,
    unknown_sharding: str,
) -> optax.GradientTransformation:
    """A direction for matrices from a momentum shaped as they are: Muon, Dion2.

    Args:
      name: of the optimizer, for messages.
      step: see ``blockwise``; its arrays are gradients, momenta and ``statistics``.
      options: NamedTuple of the step's hyper-parameters.
      make_state: (count, momentum, *statistics) -> state, a NamedTuple whose fields
        after the first two are ``statistics``.
      *statistics: (init, spec) of further state: init gives a leaf's from (layout,
        parameter), spec its partition from (layout, the parameter's spec).
      weight_dimension_numbers: see ``scale_by_dion``, as for all that follow.
      momentum_dtype: dtype of the momentum; default the parameter's.
      split_sizes: see ``scale_by_dion``.
      sharding: see ``scale_by_dion``.
      scale: see ``Layout.update_scale``.
      unknown_sharding: see ``scale_by_dion``.
    """
    check_dtype("momentum_dtype", momentum_dtype)
    check_choice("unknown_sharding", unknown_sharding, ("warn", "raise"))
    placement = Placement(sharding, unknown_sharding)

    def read_layouts(named):
        numbers = dimension_numbers(weight_dimension_numbers, named)
        for path, leaf in named:
            check_leaf(path, leaf, name)
        layouts = []
        for (path, leaf), d, sizes in zip(
            named, numbers, read_sizes(split_sizes, named)
        ):
            make = functools.partial(make_layout, dimensions=d)
            layouts.append(with_blocks(make(path, leaf.shape), sizes, make))
        return layouts

    def init(params):
        named, _ = named_leaves(params)
        layouts = read_layouts(named)
        placement.see(named)
        leaves = [leaf for _, leaf in named]
        shardings = placement.find(layouts, leaves)

        def zeros(layout, x):
            del layout
            return jnp.zeros_like(x, dtype=momentum_dtype or leaf_dtype(x))

        def tree(make, spec):
            specs = [functools.partial(spec, layout) for layout in layouts]
            new = [
                placed(
                    make(layout, x), where and NamedSharding(where.mesh, of(where.spec))
                )
                for layout, x, where, of in zip(layouts, leaves, shardings, specs)
            ]
            return with_leaves(params, new, specs)

        momentum = tree(zeros, leaf_spec)
        return make_state(
            jnp.zeros((), jnp.int32), momentum, *(tree(*x) for x in statistics)
        )

    def update(updates, state, params=None):
        del params
        named, treedef = named_leaves(updates)
        check_paths(name, named, named_leaves(state.momentum)[0])
        momenta = jax.tree.leaves(state.momentum)
        check_shapes(named, momenta)
        layouts = read_layouts(named)
        further = [jax.tree.leaves(x) for x in state[2 : 2 + len(statistics)]]
        directions, states = step_leaves(
            step,
            layouts,
            placement.find(layouts, momenta, report=True),
            [jnp.asarray(g) for _, g in named],
            [momenta, *further],
            [leaf_spec, *(spec for _, spec in statistics)],
            options,
            scale=scale,
            key=lambda x: (x.fan_in, x.fan_out),
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        # In the boxes of the state, which may be others than those of the gradients.
        forms = [jax.tree.structure(x) for x in state[1 : 2 + len(statistics)]]
        return treedef.unflatten(directions), make_state(
            count, *(form.unflatten(x) for form, x in zip(forms, states))
        )

    return optax.GradientTransformation(init, update)


def check_shapes(
    named: Sequence[tuple[str, Any]], momenta: Sequence[jax.Array], replicas: int = 0
) -> None:
    """ValueError where a gradient has not its momentum's shape.

    Args:
      named: gradients with their paths.
      momenta: of the state.
      replicas: leading axes that a momentum may have besides the gradient's: 0 or 1.
    """
    for (path, g), m in zip(named, momenta):
        if g.shape != m.shape and not (replicas and g.shape == m.shape[1:]):
            raise ValueError(
                f"{path}: gradient has shape {g.shape}, the state's momentum "
                f"{m.shape}; call init with the parameters of these gradients"
            )


def step_leaves(
    step: Callable,
    layouts: Sequence[Layout],
    shardings: Sequence[NamedSharding | None],
    grads: Sequence[jax.Array],
    states: Sequence[Sequence[Any]],
    specs: Sequence[Callable[[Layout, P], P]],
    options: Any,
    *,
    scale: str | None,
    key: Callable[[Layout], Any],
    replicas: Sequence[tuple[str, ...]] | None = None,
) -> tuple[list[jax.Array], list[list[Any]]]:
    """Scaled directions and new states of all leaves, in the dtypes of the old ones.

    Blocks of fused leaves take the step as leaves do.

    Args:
      step: see ``in_groups``, as for all that follow.
      layouts: of the leaves.
      shardings: of the leaves.
      grads: gradients.
      states: lists over the leaves: momenta, further state; of a fused leaf one array of
        its shape, or a tuple of the blocks'.
      specs: of each of ``states``.
      options: hyper-parameters.
      scale: see ``Layout.update_scale``.
      key: of a layout: those with equal ones may share a step.
      replicas: of the leaves.
    """
    leaves = list(zip(layouts, shardings))
    replicas = replicas or [()] * len(layouts)
    specs = [leaf_spec, *specs]
    parts = [part for layout in layouts for part in layout.parts]
    own = [where and block_sharding(layout, where) for layout, where in leaves]
    arrays = [
        [y for leaf, x in zip(leaves, xs) for y in separate(*leaf, x, of)]
        for xs, of in zip([grads, *states], specs)
    ]
    residual = getattr(options, "residual", None)
    outputs = in_groups(
        step,
        parts,
        [where for layout, where in zip(layouts, own) for _ in layout.parts],
        arrays,
        specs,
        options,
        [key(part) for part in parts],
        [over for layout, over in zip(layouts, replicas) for _ in layout.parts],
    )
    directions = [
        (part.update_scale(scale, residual) * output[0]).astype(g.dtype)
        for part, g, output in zip(parts, arrays[0], outputs)
    ]
    new = [
        [saturate(output[i], x.dtype) for output, x in zip(outputs, xs)]
        for i, xs in enumerate(arrays[1:], 1)
    ]

    def of_leaves(xs, like, spec):
        return [
            joined(*leaf, x, spec)
            if isinstance(x, tuple) and not isinstance(old, tuple)
            else x
            for leaf, x, old in zip(leaves, by_leaf(layouts, xs), like)
        ]

    return of_leaves(directions, grads, leaf_spec), [
        of_leaves(*args) for args in zip(new, states, specs[1:])
    ]


def in_groups(
    step: Callable,
    layouts: Sequence[Layout],
    shardings: Sequence[NamedSharding | None],
    arrays: Sequence[Sequence[jax.Array]],
    specs: Sequence[Callable[[Layout, P], P]],
    options: Any,
    keys: Sequence[Any],
    replicas: Sequence[tuple[str, ...]],
) -> list[tuple[jax.Array, ...]]:
    """``blockwise`` on groups of leaves; results leaf by leaf.

    Args:
      step: see ``blockwise``, as for all up to ``options``.
      layouts: of the leaves.
      shardings: of the leaves.
      arrays: lists over the leaves: gradients, momenta, further state.
      specs: of each of ``arrays``.
      options: hyper-parameters.
      keys: leaves with equal ones may share a step, if ``group_key`` agrees.
      replicas: mesh axes that each leaf is averaged over.
    """
    groups: dict[Any, list[int]] = {}
    for i, (layout, where) in enumerate(zip(layouts, shardings)):
        key = (keys[i], replicas[i], group_key(layout, where, arrays[1][i].dtype))
        groups.setdefault(key, []).append(i)
    outputs: list[Any] = [None] * len(layouts)
    for members in groups.values():
        done = blockwise(
            step,
            [layouts[i] for i in members],
            [shardings[i] for i in members],
            [[xs[i] for i in members] for xs in arrays],
            specs,
            options,
            replicas[members[0]],
        )
        for i, *results in zip(members, *done):
            outputs[i] = tuple(results)
    return outputs
