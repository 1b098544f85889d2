"""Device meshes, sharding of a State by rules, and sharding of batches."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.method import path_name
from jaxpapers.ops.mesh_axes import AXES, batch_axes


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes of a mesh from text, e.g. of ``--mesh``.

    Raises:
      ValueError: unknown or repeated axis, or a size below 1.

    Example:
      >>> parse_mesh("data:4,model:2")
      {'data': 4, 'model': 2}
    """
    shape: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        if name not in AXES or name in shape or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"--mesh: cannot read {part!r} in {text!r}; expected e.g. "
                f"data:4,model:2 with each of {AXES} at most once"
            )
        shape[name] = int(size)
    return shape


def make_mesh(
    shape: dict[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
    *,
    every: bool = False,
) -> Mesh:
    """Mesh with Auto axes ``data`` and ``model``, and ``slice`` and ``replica`` if given.

    TPUs of several slices, which a slow network joins, need ``slice``: it alone lies
    across them. On other devices it is one more axis.

    Args:
      shape: size of each axis; None: all devices on ``data``, slices apart. ``data`` and
        ``model`` default to 1.
      devices: of the mesh; None: all.
      every: give the mesh all of ``AXES``, where not in ``shape`` with size 1.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or ``slice`` is
        not the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    count, slices = len(devices), _slices(devices)
    if shape is None:
        shape = {"slice": slices} if slices > 1 else {}
        shape["data"] = count // slices
    shape = {**dict.fromkeys(AXES if every else ("data", "model"), 1), **shape}
    names = [n for n in AXES if n in shape]
    sizes = [shape[n] for n in names]
    if math.prod(sizes) != count:
        raise ValueError(
            f"mesh {shape} needs {math.prod(sizes)} devices, got {count}; "
            "change --mesh, or try --fake-devices on a CPU"
        )
    if slices > 1 and shape.get("slice") != slices:
        raise ValueError(
            f"mesh {shape} on {slices} TPU slices: expected the axis slice:{slices}, as "
            f"no other may cross the network between slices; pass e.g. --mesh "
            f"slice:{slices},data:{count // slices}"
        )
    # jax.make_mesh defaults to Explicit axes, under which every output sharding must be
    # spelled out; with Auto axes the compiler shards activations.
    types = (AxisType.Auto,) * len(names)
    try:
        if slices == 1:
            return jax.make_mesh(sizes, names, axis_types=types, devices=devices)
        across = [size if n == "slice" else 1 for n, size in zip(names, sizes)]
        inside = [1 if n == "slice" else size for n, size in zip(names, sizes)]
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices)
        return Mesh(grid, names, axis_types=types)
    except NotImplementedError:
        last = tuple(getattr(devices[-1], "coords", ()))
        raise ValueError(
            f"mesh {shape} does not fit the topology, whose last chip is at {last}: each "
            "axis size must be a product of sizes of physical axes; change --mesh"
        ) from None


def _slices(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices, each of which is one network of its own."""
    tpus = [d for d in devices if d.platform == "tpu"]
    return len({getattr(d, "slice_index", 0) for d in tpus}) or 1


def state_shardings(state: Any, rules: Sequence[tuple[str, Any]], mesh: Mesh) -> Any:
    """NamedSharding of every leaf of a State, by rules.

    A leaf that no rule matches is replicated. The path of optimizer state ends with its
    parameter's path, so the parameter's rule applies to it as well: axes reduced to size
    1 are not sharded, and leaves of any other shape are replicated unless an earlier
    function rule applies (see ``Method.rules``).

    Args:
      state: State of arrays or shapes.
      rules: see ``Method.rules``.
      mesh: of the shardings.

    Raises:
      ValueError: a rule that matches no leaf, or an axis that the mesh does not divide.
    """
    used: set[int] = set()
    params = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]
    }

    def owner_of(name: str) -> tuple[str | None, str]:
        """The parameter of a leaf, and the end of its path that says so.

        An optimizer may keep an array for each matrix of a fused parameter.
        """
        last = name.rpartition("/")[2]
        block = f"/{last}" if last.isdigit() else ""
        ends = [(p, p + end) for p in params for end in {"", block}]
        found = [x for x in ends if f"/{name}".endswith(f"/{x[1]}")]
        return max(found, key=lambda x: len(x[1]), default=(None, ""))

    def spec_of(name: str, leaf: Any) -> P:
        owner, end = owner_of(name)
        before = name[: len(name) - len(end)]
        for i, (regex, spec) in enumerate(rules):
            # A function's regex applies to the part before the parameter's path.
            if not re.search(regex, before if callable(spec) else name):
                continue
            if callable(spec):
                if owner is None:
                    continue
                used.add(i)
                param_spec = spec_of(owner, params[owner])
                return spec(owner, leaf, params[owner], param_spec)
            used.add(i)
            if owner is None:
                return spec
            return _for_shape(spec, leaf.shape, params[owner].shape)
        return P()

    def sharding(path, leaf):
        name = path_name(path)
        spec = spec_of(name, leaf)
        check_divides(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    result = jax.tree_util.tree_map_with_path(sharding, state)
    unused = [
        regex
        for i, (regex, spec) in enumerate(rules)
        if i not in used and not callable(spec)
    ]
    if unused:
        raise ValueError(
            f"sharding rule {unused[0]!r} matches no leaf of the state; leaves are "
            f"{list(params)[:6]} ..."
        )
    return result


def _for_shape(spec: P, shape: Sequence[int], param_shape: Sequence[int]) -> P:
    """The parameter's spec for a leaf whose axes equal the parameter's or have size 1."""
    if tuple(shape) == tuple(param_shape):
        return spec
    if len(shape) != len(param_shape) or any(
        n not in (1, m) for n, m in zip(shape, param_shape)
    ):
        return P()
    entries = tuple(spec)
    return P(*(e if n == m else None for e, n, m in zip(entries, shape, param_shape)))


def check_divides(name: str, shape: Sequence[int], spec: P, mesh: Mesh) -> None:
    """Raises ValueError, with leaf, shape and axis, for a spec that does not fit."""
    if len(spec) > len(shape):
        raise ValueError(
            f"{name}: rule {spec} has more entries than shape {tuple(shape)}"
        )
    for axis, entry in enumerate(spec):
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        size = math.prod(mesh.shape[n] for n in names)
        if shape[axis] % size:
            raise ValueError(
                f"{name}: axis {axis} of shape {tuple(shape)} does not divide over mesh "
                f"axis {entry!r} of size {size}; change that size in the config to a "
                f"multiple of {size}, or the mesh"
            )


def check_memory(shapes: Any, mesh: Mesh) -> None:
    """Checks that the devices of this process can hold a state at all.

    Args:
      shapes: ShapeDtypeStructs with shardings.
      mesh: theirs.

    Raises:
      ValueError: its parts on one device are more bytes than the device has; on CPUs,
        than the device's share of the machine's memory.
    """
    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    size = _memory(here)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        )
        for path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]
    }
    total = sum(sizes.values())
    if size and total > size:
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(
            f"parameters and optimizer state take {total / 1e9:.1f} GB on each of "
            f"{mesh.size} devices, which have {size / 1e9:.1f} GB (the largest: "
            f"{largest}, {sizes[largest] / 1e9:.1f} GB); use a smaller model, or more "
            "devices and a mesh that splits them (--mesh)"
        )


def _memory(devices: Sequence[Any]) -> float | None:
    """Bytes of the smallest of some devices of this process; None if unknown."""
    try:
        stats = [d.memory_stats() for d in devices]
        if stats and all(stats):
            return min(s["bytes_limit"] for s in stats)
        if devices and all(d.platform == "cpu" for d in devices):
            pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            return pages / len(devices)
    except (KeyError, OSError, ValueError, AttributeError, RuntimeError):
        pass  # Devices that are only described, or a system that does not say.
    return None


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of the leading axis over ``slice``, ``replica`` and ``data``."""
    return NamedSharding(mesh, P(batch_axes(mesh.shape)))


def batch_rows(
    mesh: Mesh, size: int, *, parts: int = 1, name: str = "data.batch"
) -> slice:
    """Rows of a global batch that this process builds.

    Args:
      mesh: of ``make_mesh``.
      size: rows of the global batch.
      parts: micro-batches, each of which must divide over the mesh.
      name: config field of the size, for the error text.

    Raises:
      ValueError: the data axes do not divide the batch.
    """
    sharding = batch_sharding(mesh)
    count = math.prod(mesh.shape[n] for n in batch_axes(mesh.shape))
    if size % (count * parts):
        micro = f" in {parts} micro-batches" if parts > 1 else ""
        raise ValueError(
            f"{name}={size} does not divide over {count} data shards of mesh "
            f"{dict(mesh.shape)}{micro}; nearest batch that works: "
            f"{count * parts * max(round(size / count / parts), 1)}"
        )
    index = sharding.addressable_devices_indices_map((size,)).values()
    spans = [s[0].indices(size) for s in index if s is not None]
    return slice(min(a for a, _, _ in spans), max(b for _, b, _ in spans))


def put_batch(batch: Any, mesh: Mesh, size: int) -> Any:
    """Global arrays from this process's rows of a batch of ``size`` rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(
            sharding, np.asarray(x), (size, *np.shape(x)[1:])
        ),
        batch,
    )


def start_distributed(
    local_device_ids: Sequence[int] | None = None, heartbeat: int = 100
) -> None:
    """``jax.distributed.initialize`` for pods and SLURM jobs, before any device is used.

    JAX reads coordinator, number of processes and rank from the environment.

    Args:
      local_device_ids: devices of this process; None: chosen by JAX.
      heartbeat: seconds without a heartbeat until a process counts as dead and the others
        stop with an error; JAX's default is 100.

    Raises:
      ValueError: heartbeat below 1; no job around this process, or a wrong rank.
    """
    if heartbeat < 1:
        raise ValueError(f"--heartbeat must be at least 1 second, got {heartbeat}")
    try:
        jax.distributed.initialize(
            local_device_ids=local_device_ids, heartbeat_timeout_seconds=heartbeat
        )
    except ValueError as e:
        raise ValueError(
            f"--distributed: JAX finds no usable job around this process: {e} Start the "
            "processes by SLURM, Open MPI or Kubernetes, or on a TPU pod, or leave "
            "--distributed out"
        ) from e
