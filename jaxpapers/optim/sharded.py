"""The Dion step on a mesh: where each matrix lies, and one shard_map around its step.

Automatic partitioning gathers a factor and replicates whole rows of the update as soon
as it meets a QR, Cholesky or triangular solve of a sharded operand. So the step runs
under ``jax.shard_map`` with collectives on thin factors only. For that it must know how
each parameter is sharded:

* on a mesh with Explicit axes the traced value says so;
* outside jit the array says so;
* on a mesh with Auto axes, inside jit, nothing does: the user's ``sharding=`` is asked,
  then what ``init`` saw; without either the update warns or raises, as chosen.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.layout import Layout
from jaxpapers.optim.power_iteration import StepOptions, dion_step


def mesh_step(
    layouts: Sequence[Layout],
    shardings: Sequence[NamedSharding | None],
    grads: Sequence[jax.Array],
    momenta: Sequence[jax.Array],
    qs: Sequence[jax.Array],
    options: StepOptions,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """``dion_step`` on leaves of one group (see ``group_key``), each with its sharding.

    Returns:
      Directions and momenta shaped and sharded as the leaves, Qs as the given ones.
    """
    mesh = shardings[0].mesh if shardings[0] is not None else None
    specs = tuple(P() if s is None else s.spec for s in shardings)
    # Schedules and inject_hyperparams make these arrays: they enter as arguments.
    traced = {k: v for k, v in options._asdict().items() if isinstance(v, jax.Array)}
    without: dict[str, Any] = dict.fromkeys(traced)
    options = options._replace(**without)
    if mesh is not None:
        q_specs = [x.q_spec(spec) for x, spec in zip(layouts, specs)]
        grads, momenta, qs = (
            [_reshard(x, spec) for x, spec in zip(xs, which)]
            for xs, which in ((grads, specs), (momenta, specs), (qs, q_specs))
        )
    return _mesh_step(
        traced,
        list(grads),
        list(momenta),
        list(qs),
        tuple(layouts),
        specs,
        mesh,
        options,
    )


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _mesh_step(traced, grads, momenta, qs, layouts, specs, mesh, options):
    """Jitted, so that an update outside jit compiles once as well."""
    p_names = _names(layouts[0].p_axes, specs[0])
    q_names = _names(layouts[0].q_axes, specs[0])

    def body(traced, grads, momenta, qs):
        shapes = [g.shape for g in grads]
        directions, new_momenta, new_qs = dion_step(
            [x.to_matrices(g) for x, g in zip(layouts, grads)],
            [x.to_matrices(m) for x, m in zip(layouts, momenta)],
            [x.q_to_matrices(q) for x, q in zip(layouts, qs)],
            options._replace(**traced),
            p_names=p_names,
            q_names=q_names,
            p_rows=layouts[0].rows(layouts[0].p_axes, shapes[0], specs[0]),
            q_rows=[
                x.rows(x.q_axes, s, spec) for x, s, spec in zip(layouts, shapes, specs)
            ],
        )
        return (
            [x.from_matrices(y, s) for x, y, s in zip(layouts, directions, shapes)],
            [x.from_matrices(y, s) for x, y, s in zip(layouts, new_momenta, shapes)],
            [y.reshape(q.shape) for y, q in zip(new_qs, qs)],
        )

    if mesh is None:
        return body(traced, grads, momenta, qs)
    leaf_specs = list(specs)
    q_specs = [x.q_spec(spec) for x, spec in zip(layouts, specs)]
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P(), leaf_specs, leaf_specs, q_specs),
        out_specs=(leaf_specs, leaf_specs, q_specs),
        axis_names={name for name, kind in kinds if kind != AxisType.Manual},
    )(traced, grads, momenta, qs)


def group_key(layout: Layout, sharding: NamedSharding | None, dtype: Any) -> tuple:
    """Leaves with equal keys share l, r and axes: they are factorised as one batch."""
    spec = P() if sharding is None else sharding.spec
    side = tuple(
        (layout.shape[a], spec[a] if a < len(tuple(spec)) else None)
        for a in layout.p_axes
    )
    return (
        side,
        _names(layout.q_axes, spec),
        _names(layout.batch, spec),
        layout.rank,
        None if sharding is None else sharding.mesh,
        jnp.dtype(dtype),
    )


def find_sharding(
    layout: Layout, leaf: jax.Array, declared: Any, seen: NamedSharding | None
) -> tuple[NamedSharding | None, bool]:
    """How a leaf is sharded, and whether that is known.

    Args:
      layout: the leaf's layout (its path and shape appear in errors).
      leaf: momentum or parameter, concrete or traced.
      declared: NamedSharding, PartitionSpec or None, from the user's ``sharding=``.
      seen: sharding of the concrete array that ``init`` was given, if any.

    Raises:
      ValueError: the declared spec does not fit the leaf or the mesh.
    """
    traced = isinstance(leaf, jax.core.Tracer)
    actual = None if traced else getattr(leaf, "sharding", None)
    inferred = jax.typeof(leaf).sharding
    mesh = (
        inferred.mesh if not inferred.mesh.empty else jax.sharding.get_abstract_mesh()
    )
    if declared is not None:
        if isinstance(declared, P):
            if isinstance(actual, NamedSharding):
                mesh = actual.mesh
            if mesh.empty:  # A PartitionSpec without any mesh: one device.
                return None, True
            if not traced and not isinstance(mesh, jax.sharding.Mesh):
                mesh = jax.sharding.get_mesh()
            declared = NamedSharding(mesh, _check(layout, declared, mesh))
        elif not isinstance(declared, NamedSharding):
            raise TypeError(
                f"{layout.path}: sharding must be a NamedSharding or PartitionSpec, "
                f"got {type(declared).__name__}"
            )
        found = declared
    elif isinstance(actual, NamedSharding):
        found = actual
    elif not mesh.empty and AxisType.Explicit in mesh.axis_types:
        found = NamedSharding(mesh, inferred.spec)
    elif seen is not None:
        found = seen
    else:
        automatic = [
            size
            for size, kind in zip(mesh.axis_sizes, mesh.axis_types)
            if kind == AxisType.Auto
        ]
        return None, mesh.empty or math.prod(automatic) == 1
    _check(layout, found.spec, found.mesh)
    auto_size = math.prod(
        size
        for size, kind in zip(found.mesh.axis_sizes, found.mesh.axis_types)
        if kind != AxisType.Manual
    )
    return (found if auto_size > 1 else None), True


def report_unknown(paths: Sequence[str], action: str) -> None:
    """Says that leaves on a mesh with Auto axes have no known sharding."""
    message = (
        f"dion cannot see how {len(paths)} parameter(s), {paths[0]!r} first, are "
        "sharded on this mesh with Auto axes, so the compiler partitions their step "
        "and may gather whole matrices; pass sharding= (a tree of NamedSharding or "
        "PartitionSpec, or a function of (path, leaf)), call init on the sharded "
        "arrays outside jit, or use Explicit axes"
    )
    if action == "raise":
        raise ValueError(message)
    warnings.warn(message, UserWarning, stacklevel=4)


def _check(layout: Layout, spec: P, mesh) -> P:
    """Refuses a spec that names unknown or repeated axes, or does not divide."""
    entries = tuple(spec)
    if len(entries) > len(layout.shape):
        raise ValueError(
            f"{layout.path}: {spec} has more entries than shape {layout.shape} has axes"
        )
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes))
    used: list[str] = []
    for axis, entry in enumerate(entries):
        if entry is P.UNCONSTRAINED:
            raise ValueError(
                f"{layout.path}: {spec} leaves axis {axis} unconstrained; name mesh "
                "axes or None"
            )
        names = _tuple(entry)
        unknown = [n for n in names if n not in sizes]
        if unknown:
            raise ValueError(
                f"{layout.path}: {spec} names the mesh axis {unknown[0]!r}, but the "
                f"mesh has {sizes}"
            )
        count = math.prod(sizes[n] for n in names)
        if layout.shape[axis] % count:
            raise ValueError(
                f"{layout.path}: axis {axis} of shape {layout.shape} does not divide "
                f"over {names} of size {count}; pad it to a multiple of {count}, or "
                "leave that axis unsharded"
            )
        used += names
    if len(set(used)) != len(used):
        raise ValueError(f"{layout.path}: {spec} uses a mesh axis twice")
    return spec


def _reshard(x: jax.Array, spec: P) -> jax.Array:
    """Moves a value with an Explicit type to the spec that shard_map expects."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types and sharding.spec != spec:
        return jax.sharding.reshard(x, spec)
    return x


def _names(axes: Sequence[int], spec: P) -> tuple[str, ...]:
    """Mesh axes that split the given array axes, in order."""
    entries = tuple(spec)
    return tuple(n for a in axes if a < len(entries) for n in _tuple(entries[a]))


def _tuple(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
