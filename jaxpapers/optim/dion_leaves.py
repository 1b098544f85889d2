"""What ``scale_by_dion`` does with single leaves, and its state and options."""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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
from jaxpapers.optim.power_iteration import RIGHT_FACTORS, SPLITS, dion_step


class DionState(NamedTuple):
    """State of ``scale_by_dion``; every leaf is an array, sharded like its parameter.

    Attributes:
      count: number of updates, int32 scalar.
      momentum: M, shaped as the parameters; with ``replicate_axis``, where the factors
        are averaged, one M for each replica on a leading axis.
      q: right factors Q, (batch axes, axes of the Q side, rank): ``Layout.q_shape``.
    """

    count: jax.Array
    momentum: Any
    q: Any


def read_layouts(
    named: Sequence[tuple[str, Any]],
    qs: Sequence[Any] | None = None,
    *,
    weight_dimension_numbers: Any,
    rank_fraction: Any,
    rank_multiple_of: Any,
    p_side: Any,
) -> list[Layout]:
    """Layouts of leaves.

    Args:
      named: leaves with their paths.
      qs: of a state, whose ranks stand for traced ones; the others must agree.
      weight_dimension_numbers: see ``scale_by_dion``, as for the rest.
      rank_fraction: see there.
      rank_multiple_of: see there.
      p_side: see there.
    """
    dimensions = dimension_numbers(weight_dimension_numbers, named)
    sides = per_leaf(p_side, named, lambda x: isinstance(x, str), "p_side")
    fractions = per_leaf(rank_fraction, named, is_number, "rank_fraction")
    layouts = []
    for i, (path, leaf) in enumerate(named):
        check_leaf(path, leaf, "Dion")
        rank = None if qs is None else qs[i].shape[-1]
        layout = make_layout(
            path,
            leaf.shape,
            dimensions[i],
            rank_fraction=static_fraction(path, fractions[i], rank),
            rank_multiple_of=static_multiple(rank_multiple_of, rank),
            p_side=sides[i],
            rank=rank if is_traced(fractions[i], rank_multiple_of) else None,
        )
        if qs is not None and qs[i].shape != layout.q_shape:
            raise ValueError(
                f"{path}: Dion state has Q of shape {qs[i].shape}, expected "
                f"{layout.q_shape} for rank_fraction={fractions[i]}; the state was "
                "made with another rank or other dimension numbers: use "
                "rescale_rank, start from init, or use the options that made it"
            )
        layouts.append(layout)
    return layouts


def with_replicas(axis: str | None, spec: P) -> P:
    """The spec of one momentum for each replica."""
    return P(axis, *spec)


def init_q(layout: Layout, seed: Any, dtype: Any, where: NamedSharding | None, like):
    """i.i.d. normal Q from (seed, path, shape): equal on every mesh, in any order."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(layout.path.encode()))

    def draw(key):
        return jax.random.normal(key, layout.q_shape, jnp.float32).astype(dtype)

    if where is None:
        return draw(key)
    where = NamedSharding(where.mesh, layout.q_spec(where.spec))
    if isinstance(like, jax.core.Tracer):
        return constrain(draw(key), where)
    return jax.jit(draw, out_shardings=where)(key)


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
    if not replicated and m.shape != layout.shape:
        raise ValueError(
            f"{layout.path}: momentum has shape {m.shape}, expected {layout.shape}: at "
            f"rank {layout.rank} this leaf's gradient is averaged; change the rank of a "
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
