"""Matrix steps on a mesh: one ``jax.shard_map`` around the step of a group of leaves.

Automatic partitioning gathers a factor and replicates whole rows of the update as soon
as it meets a QR, Cholesky or triangular solve of a sharded operand. So a step runs under
``jax.shard_map`` with collectives of its own: of thin factors, or exchanges.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.layout import Layout, axis_names
from jaxpapers.optim.power_iteration import MeshAxes


def leaf_spec(layout: Layout, spec: P) -> P:
    """Partition of an array of the leaf's shape."""
    del layout
    return spec


def q_spec(layout: Layout, spec: P) -> P:
    """Partition of the leaf's Q."""
    return layout.q_spec(spec)


def row_spec(layout: Layout, spec: P) -> P:
    """Partition of one number per output row."""
    return layout.row_spec(spec)


def blockwise(
    step: Callable,
    layouts: Sequence[Layout],
    shardings: Sequence[NamedSharding | None],
    arrays: Sequence[Sequence[jax.Array]],
    specs: Sequence[Callable[[Layout, P], P]],
    options: Any,
    replica: tuple[str, ...] = (),
) -> tuple[list[jax.Array], ...]:
    """A step on the leaves of one group (see ``group_key``), on each device's blocks.

    Args:
      step: (options, axes, layouts, specs of the leaves, *arrays) -> tuple of lists; the
        first result is shaped as the leaves, the others as the arrays after the first.
      layouts: of the leaves.
      shardings: of the leaves; None: not sharded.
      arrays: lists over the leaves: gradients, then state.
      specs: how each of ``arrays`` is partitioned, given the leaf's spec.
      options: NamedTuple of hyper-parameters; arrays in it may be traced.
      replica: mesh axes, manual already, over which the step averages.

    Returns:
      The results of ``step``, sharded by the specs of the leaves and ``specs``.
    """
    mesh = shardings[0].mesh if shardings[0] is not None else None
    leaf_specs = tuple(P() if s is None else s.spec for s in shardings)
    # Schedules and inject_hyperparams make these arrays: they enter as arguments.
    traced = {k: v for k, v in options._asdict().items() if isinstance(v, jax.Array)}
    without: dict[str, Any] = dict.fromkeys(traced)
    options = options._replace(**without)
    if mesh is not None:
        arrays = [
            [
                _reshard(x, of(layout, spec))
                for x, layout, spec in zip(xs, layouts, leaf_specs)
            ]
            for xs, of in zip(arrays, specs)
        ]
    return _blockwise(
        traced,
        tuple(list(xs) for xs in arrays),
        step,
        tuple(layouts),
        leaf_specs,
        tuple(specs),
        mesh,
        options,
        replica,
    )


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7, 8))
def _blockwise(
    traced, arrays, step, layouts, leaf_specs, specs, mesh, options, replica
):
    """Jitted, so that an update outside jit compiles once as well."""
    axes = MeshAxes(
        axis_names(layouts[0].p_axes, leaf_specs[0]),
        axis_names(layouts[0].q_axes, leaf_specs[0]),
        replica,
    )

    def body(traced, arrays):
        return step(options._replace(**traced), axes, layouts, leaf_specs, *arrays)

    if mesh is None:
        return body(traced, arrays)
    array_specs = tuple(
        [of(layout, spec) for layout, spec in zip(layouts, leaf_specs)] for of in specs
    )
    return on_blocks(body, mesh, in_specs=(P(), array_specs), out_specs=array_specs)(
        traced, arrays
    )


def on_blocks(body, mesh, in_specs, out_specs):
    """``jax.shard_map`` over those of the mesh's axes that are not manual already."""
    kinds = zip(mesh.axis_names, mesh.axis_types)
    free = {name for name, kind in kinds if kind != AxisType.Manual}
    return jax.shard_map(
        body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free
    )


def group_key(layout: Layout, sharding: NamedSharding | None, dtype: Any) -> tuple:
    """Leaves with equal keys share l, r and axes: they are factorised as one batch."""
    spec = P() if sharding is None else sharding.spec
    side = tuple(
        (layout.shape[a], spec[a] if a < len(tuple(spec)) else None)
        for a in layout.p_axes
    )
    return (
        side,
        axis_names(layout.q_axes, spec),
        axis_names(layout.batch, spec),
        layout.rank,
        None if sharding is None else sharding.mesh,
        jnp.dtype(dtype),
    )


def _reshard(x: jax.Array, spec: P) -> jax.Array:
    """Moves a value with an Explicit type to the spec that shard_map expects."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types and sharding.spec != spec:
        return jax.sharding.reshard(x, spec)
    return x
