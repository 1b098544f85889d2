"""How each matrix is sharded, which the step under ``jax.shard_map`` has to know.

* On a mesh with Explicit axes it is part of the traced value's type;
* outside jit it is the array's ``sharding``;
* inside jit on a mesh with Auto axes it is not known: the user's ``sharding=`` counts,
  else what ``init`` saw; without either the update warns or raises, as chosen.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.layout import Layout, is_sharding, mesh_axes
from jaxpapers.optim.paths import per_leaf


class Placement:
    """How the leaves of one transformation are sharded.

    Args:
      declared: the user's ``sharding=``: NamedSharding or PartitionSpec per leaf.
      unknown: ``warn`` (once) or ``raise`` where the sharding is unknown.
    """

    def __init__(self, declared: Any, unknown: str):
        self._declared, self._unknown = declared, unknown
        # Of the concrete arrays that init was given, by path: under Auto axes the
        # traced update cannot see them.
        self._seen: dict[str, NamedSharding] = {}
        self._told = False

    def see(self, named: Sequence[tuple[str, Any]]) -> None:
        """Remembers the shardings of concrete leaves."""
        for path, leaf in named:
            if isinstance(leaf, jax.core.Tracer):
                continue
            self._seen.pop(path, None)
            actual = getattr(leaf, "sharding", None)
            if isinstance(actual, NamedSharding):
                self._seen[path] = actual

    def find(
        self, layouts: Sequence[Layout], leaves: Sequence[Any], *, report: bool = False
    ) -> list[NamedSharding | None]:
        """The sharding of each leaf, None if not sharded.

        Args:
          layouts: of the leaves.
          leaves: parameters or momenta.
          report: warn or raise about leaves whose sharding is unknown.
        """
        named = [(x.path, leaf) for x, leaf in zip(layouts, leaves)]
        declared = per_leaf(self._declared, named, is_sharding, "sharding")
        shardings = [
            find_sharding(x, leaf, given, self._seen.get(x.path))
            for x, leaf, given in zip(layouts, leaves, declared)
        ]
        unknown = [x.path for x, (_, known) in zip(layouts, shardings) if not known]
        if report and unknown and (self._unknown == "raise" or not self._told):
            self._told = True
            report_unknown(unknown, self._unknown)
        return [where for where, _ in shardings]


def find_sharding(
    layout: Layout, leaf: Any, declared: Any, seen: NamedSharding | None
) -> tuple[NamedSharding | None, bool]:
    """How a leaf is sharded, and whether that is known.

    Args:
      layout: the leaf's layout (its path and shape appear in errors).
      leaf: momentum or parameter, concrete (also of NumPy) or traced.
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
            declared = NamedSharding(mesh, check_spec(layout, declared, mesh))
        elif not isinstance(declared, NamedSharding):
            raise TypeError(
                f"{layout.path}: sharding must be a NamedSharding or PartitionSpec, "
                f"got {type(declared).__name__}"
            )
        sharding = declared
    elif isinstance(actual, NamedSharding):
        sharding = actual
    elif not mesh.empty and AxisType.Explicit in mesh.axis_types:
        sharding = NamedSharding(mesh, inferred.spec)
    elif seen is not None:
        sharding = seen
    else:
        automatic = [
            size
            for size, kind in zip(mesh.axis_sizes, mesh.axis_types)
            if kind == AxisType.Auto
        ]
        return None, mesh.empty or math.prod(automatic) == 1
    check_spec(layout, sharding.spec, sharding.mesh)
    scope = jax.sharding.get_abstract_mesh()
    if (
        AxisType.Manual in scope.axis_types
        and scope.axis_names == sharding.mesh.axis_names
    ):
        # Inside the caller's shard_map over some axes: the same mesh, seen from there.
        sharding = NamedSharding(scope, sharding.spec)
    manual = {
        name
        for name, kind in zip(sharding.mesh.axis_names, sharding.mesh.axis_types)
        if kind == AxisType.Manual
    }
    split_already = [
        n for e in tuple(sharding.spec) for n in mesh_axes(e) if n in manual
    ]
    if split_already:
        raise ValueError(
            f"{layout.path}: {sharding.spec} splits the leaf over {split_already[0]!r}, "
            "which is a manual axis here; call update inside a shard_map over "
            "replicate_axis alone (axis_names={replicate_axis})"
        )
    kinds = zip(sharding.mesh.axis_sizes, sharding.mesh.axis_types)
    free = [(size, kind) for size, kind in kinds if kind != AxisType.Manual]
    # Explicit types name axes of size 1 as well, and a product over them is refused.
    split = any(size > 1 or kind == AxisType.Explicit for size, kind in free)
    return (sharding if split else None), True


def report_unknown(paths: Sequence[str], action: str) -> None:
    """Warns or raises: leaves on a mesh with Auto axes have no known sharding."""
    message = (
        f"the optimizer cannot see how {len(paths)} parameter(s), {paths[0]!r} first, "
        "are sharded on this mesh with Auto axes, so the compiler partitions their step "
        "and may gather whole matrices; pass sharding= (a tree of NamedSharding or "
        "PartitionSpec, or a function of (path, leaf)), call init on the sharded "
        "arrays outside jit, or use Explicit axes"
    )
    if action == "raise":
        raise ValueError(message)
    warnings.warn(message, UserWarning, stacklevel=4)


def check_spec(layout: Layout, spec: P, mesh) -> P:
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
        names = mesh_axes(entry)
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


def placed(x: jax.Array, where: NamedSharding | None) -> jax.Array:
    """``x`` with the sharding, if there is one."""
    return x if where is None else constrain(x, where)


def constrain(x: jax.Array, where: NamedSharding) -> jax.Array:
    """Gives a traced or concrete value the sharding."""
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(x, where)
    if AxisType.Explicit in where.mesh.axis_types:
        return jax.sharding.reshard(x, where)
    return jax.lax.with_sharding_constraint(x, where)
