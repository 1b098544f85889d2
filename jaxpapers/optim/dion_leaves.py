"""What ``scale_by_dion`` does with single leaves, and its state and options."""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.dion_step import RIGHT_FACTORS, dion_step
from jaxpapers.optim.fused import (
    block_sharding,
    read_sizes,
    with_blocks,
    without_split_axis,
)
from jaxpapers.optim.layout import SCALES, Layout, make_layout
from jaxpapers.optim.neurons import divide_rows, row_mean_square
from jaxpapers.optim.options import (
    PRECISIONS,
    check_choice,
    check_flag,
    check_leaf,
    check_range,
    is_number,
    is_traced,
    static_fraction,
    static_multiple,
)
from jaxpapers.optim.orthonormalize import METHODS
from jaxpapers.optim.paths import dimension_numbers, per_leaf
from jaxpapers.optim.placement import constrain
from jaxpapers.optim.power_iteration import SPLITS
from jaxpapers.optim.replicas import count_replicas


class DionState(NamedTuple):
    """State of ``scale_by_dion``; every leaf is an array, sharded like its parameter.

    Attributes:
      count: number of updates, int32 scalar.
      momentum: M, shaped as the parameters; with ``replicate_axis``, where the factors
        are averaged, one M for each replica on a leading axis.
      q: right factors Q, (batch axes, axes of the Q side, rank): ``Layout.q_shape``; a
        tuple of the blocks' where ``split_sizes`` splits a leaf.
    """

    count: jax.Array
    momentum: Any
    q: Any


def read_layouts(
    named: Sequence[tuple[str, Any]],
    qs: Sequence[tuple[str, Any]] | None = None,
    *,
    weight_dimension_numbers: Any,
    rank_fraction: Any,
    rank_multiple_of: Any,
    split_sizes: Any,
    p_side: Any,
) -> list[Layout]:
    """Layouts of leaves.

    Args:
      named: leaves with their paths.
      qs: of a state, with their paths; their ranks stand for traced ones, and the others
        must agree.
      weight_dimension_numbers: see ``scale_by_dion``, as for the rest.
      rank_fraction: see there.
      rank_multiple_of: see there.
      split_sizes: see there.
      p_side: see there.
    """
    dimensions = dimension_numbers(weight_dimension_numbers, named)
    sides = per_leaf(p_side, named, lambda x: isinstance(x, str), "p_side")
    fractions = per_leaf(rank_fraction, named, is_number, "rank_fraction")
    sizes = read_sizes(split_sizes, named)
    found = None if qs is None else iter(qs)

    def layout_of(path, shape, i, q=None):
        rank = None if q is None else q.shape[-1]
        return make_layout(
            path,
            shape,
            dimensions[i],
            rank_fraction=static_fraction(path, fractions[i], rank),
            rank_multiple_of=static_multiple(rank_multiple_of, rank),
            p_side=sides[i],
            rank=rank if is_traced(fractions[i], rank_multiple_of) else None,
        )

    def with_q(path, shape, i):
        if found is None:
            return layout_of(path, shape, i)
        name, q = next(found, ("", np.zeros(0)))
        _check_q(path, name)
        layout = layout_of(path, shape, i, q)
        if q.shape != layout.q_shape:
            raise ValueError(
                f"{path}: Dion state has Q of shape {q.shape}, expected "
                f"{layout.q_shape} for rank_fraction={fractions[i]}; the state was "
                "made with another rank or other dimension numbers: use "
                "rescale_rank, start from init, or use the options that made it"
            )
        return layout

    layouts = []
    for i, (path, leaf) in enumerate(named):
        check_leaf(path, leaf, "Dion")
        whole = make_layout(path, leaf.shape, dimensions[i], p_side=sides[i], rank=1)
        one = functools.partial(with_q, i=i)
        layout = with_blocks(whole, sizes[i], one)
        layouts.append(layout if layout.blocks else one(path, leaf.shape))
    if found is not None:
        _check_q("", next(found, ("",))[0])
    return layouts


def _check_q(path: str, name: str) -> None:
    """ValueError unless the state's next Q is that of the next matrix."""
    if name != path:
        raise ValueError(
            f"{path or name}: Dion state has {f'Q of {name}' if name else 'no Q'}, "
            f"expected {f'that of {path}' if path else 'none'}; the state was made with "
            "other split_sizes: start from init, or use the options that made it"
        )


def init_momentum(
    layout: Layout,
    dtype: Any,
    where: NamedSharding | None,
    like: Any,
    replicate_axis: str | None,
) -> tuple[jax.Array, Callable[[P], P]]:
    """Zeros, one matrix for each replica that keeps its own, and the names of their axes.

    Args:
      layout: of the leaf.
      dtype: of the momentum.
      where: sharding of the leaf.
      like: the leaf.
      replicate_axis: see ``scale_by_dion``.

    Returns:
      M, and the names in its box given those of the parameter's axes.
    """
    if not (replicate_axis and layout.compresses):
        m = jnp.zeros_like(like, dtype=dtype)
        return m if where is None else constrain(m, where), lambda spec: spec
    count = count_replicas(replicate_axis, where)
    m = jnp.zeros((count, *layout.shape), dtype)
    if count == 1:
        return m, lambda spec: P(None, *spec)
    if where is not None:
        m = constrain(m, NamedSharding(where.mesh, P(replicate_axis, *where.spec)))
    return m, lambda spec: P(replicate_axis, *spec)


def init_q(layout: Layout, seed: Any, dtype: Any, where: NamedSharding | None, like):
    """i.i.d. normal Q from (seed, path, shape): equal on every mesh, in any order.

    Of a fused leaf a tuple of the blocks'.
    """
    if layout.blocks:
        where = where and block_sharding(layout, where)
        return tuple(init_q(x, seed, dtype, where, like) for x in layout.blocks)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(layout.path.encode()))

    def draw(key):
        return jax.random.normal(key, layout.q_shape, jnp.float32).astype(dtype)

    if where is None:
        return draw(key)
    where = NamedSharding(where.mesh, layout.q_spec(where.spec))
    if isinstance(like, jax.core.Tracer):
        return constrain(draw(key), where)
    return jax.jit(draw, out_shardings=where)(key)


def q_names(layout: Layout) -> Any:
    """Names of the axes of Q's box given those of the parameter's, see ``with_leaves``.

    Of a fused leaf a tuple; only where the leaf lies tells where the mesh axes of its
    split axis go, and the names do not.
    """
    if not layout.blocks:
        return layout.q_spec

    def names(block, spec):
        return block.q_spec(without_split_axis(layout, spec))

    return tuple(functools.partial(names, x) for x in layout.blocks)


def dion_blocks(options, axes, layouts, specs, grads, momenta, qs):
    """``dion_step`` on one device's blocks of the leaves of a group."""
    shapes = [g.shape for g in grads]
    directions, new_momenta, new_qs = dion_step(
        [x.to_matrices(g, x.order) for x, g in zip(layouts, grads)],
        [x.to_matrices(m, x.order) for x, m in zip(layouts, momenta)],
        [x.q_to_matrices(q) for x, q in zip(layouts, qs)],
        options,
        axes=axes,
        p_rows=layouts[0].rows(layouts[0].p_axes, shapes[0], specs[0]),
        q_rows=[
            x.rows(x.q_axes, s, spec) for x, s, spec in zip(layouts, shapes, specs)
        ],
        orders=[x.order for x in layouts],
    )
    directions = [
        x.from_matrices(y, s, x.order) for x, y, s in zip(layouts, directions, shapes)
    ]
    if options.normalize_rows:
        directions = [
            _equal_rows(x, spec, y) for x, spec, y in zip(layouts, specs, directions)
        ]
    return (
        directions,
        [
            x.from_matrices(y, s, x.order)
            for x, y, s in zip(layouts, new_momenta, shapes)
        ],
        [y.reshape(q.shape) for y, q in zip(new_qs, qs)],
    )


def _equal_rows(layout, spec, o):
    """NorMuon's division of rows by their own mean squares."""
    square = row_mean_square(layout, spec, o)
    return divide_rows(layout, spec, o, square, square, 1e-8)


def own_momentum(layout: Layout, m: jax.Array, replicated: bool) -> jax.Array:
    """This replica's M."""
    ranks = ", ".join(str(x.rank) for x in layout.parts)
    if not replicated and m.shape != layout.shape:
        raise ValueError(
            f"{layout.path}: momentum has shape {m.shape}, expected {layout.shape}: at "
            f"rank {ranks} this leaf's gradient is averaged; change the rank of a "
            "state with rescale_rank(..., replicas=...)"
        )
    if replicated and m.shape != (1, *layout.shape):
        raise ValueError(
            f"{layout.path}: momentum has shape {m.shape}, expected one replica's, "
            f"{(1, *layout.shape)}; split the state over replicas as replica_specs says"
        )
    return m[0] if replicated else m


def check_beyond_paper(nesterov, residual, normalize_rows, replicate_axis):
    """Raises TypeError or ValueError naming an option that the paper does not have."""
    check_flag("nesterov", nesterov)
    check_flag("normalize_rows", normalize_rows)
    if residual is None:
        return
    check_range("residual", residual, 0)
    if replicate_axis:
        raise ValueError(
            f"residual={residual} and replicate_axis={replicate_axis!r} do not go "
            "together: replicas exchange P and R alone, and what these leave of the mean "
            "momentum is known to none of them; average the gradients instead (no "
            "replicate_axis), or use residual=None (optim.residual=0 in a config)"
        )


def check_program(split_p, precision, unknown_sharding, noise_guard):
    """Raises ValueError naming an option of the program that is out of range."""
    check_choice("split_p", split_p, SPLITS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("unknown_sharding", unknown_sharding, ("warn", "raise"))
    if noise_guard is not None:
        check_range("noise_guard", noise_guard, 0, 1, open_right=True)


def check_options(mu, eps, power_iters, orthogonalize, right_factor, batch, scale):
    """Raises ValueError naming an option of ``scale_by_dion`` that is out of range."""
    check_range("mu", mu, 0, 1)
    check_range("eps", eps, 0)
    check_range("power_iters", power_iters, 1)
    if not jnp.issubdtype(jnp.result_type(power_iters), jnp.integer):
        raise ValueError(f"power_iters must be an integer, got {power_iters}")
    check_choice("orthogonalize", orthogonalize, METHODS)
    check_choice("right_factor", right_factor, RIGHT_FACTORS)
    check_choice("batch", batch, ("same_shape", "none"))
    check_choice("scale", scale, SCALES)
