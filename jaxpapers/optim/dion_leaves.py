"""What ``scale_by_dion`` does with single leaves, and its state and options."""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.layout import SCALES, Layout
from jaxpapers.optim.options import check_choice, check_range
from jaxpapers.optim.orthonormalize import METHODS
from jaxpapers.optim.placement import constrain
from jaxpapers.optim.power_iteration import RIGHT_FACTORS, dion_step


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
    return (
        [
            x.from_matrices(y, s, x.order)
            for x, y, s in zip(layouts, directions, shapes)
        ],
        [
            x.from_matrices(y, s, x.order)
            for x, y, s in zip(layouts, new_momenta, shapes)
        ],
        [y.reshape(q.shape) for y, q in zip(new_qs, qs)],
    )


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
