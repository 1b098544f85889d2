"""Compiles a training step for a mesh that is not here: memory, collectives, FLOPs.

A TPU topology needs no TPU: ``libtpu`` compiles for a described slice of any size. What
comes out is the compiler's own account of the program that the pod would run, not a
measurement of a run.
"""

import functools
import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxpapers import hlo
from jaxpapers import train as trainer
from jaxpapers.method import Method
from jaxpapers.optim.orthonormalize import RESCUE

# Bytes of memory of one chip.
HBM = {"v5e": 16e9, "v5p": 95e9, "v6e": 32e9}
PARTS = ("forward/backward", "optimizer", f"optimizer, {RESCUE}")


class DoesNotFit(ValueError):
    """The compiler found no way to fit a step into a chip's memory."""


class Plan(NamedTuple):
    """What the compiler says of one step, per chip.

    Attributes:
      target: topology or "cpu".
      mesh: size of every axis.
      devices: chips.
      parameters: number of parameters, over all chips.
      parameter_bytes: per chip.
      optimizer_bytes: optimizer state, per chip.
      temporary_bytes: activations and all else that is no argument, at the peak.
      peak_bytes: all that the chip's memory has to hold at once.
      hbm_bytes: memory of the chip; None if unknown.
      fits: whether the peak is below that; None if unknown.
      flops: of the matrix products of a step, per chip, recomputation included.
      collectives: rows of part, kind, axes, count, result_bytes, wire_bytes, largest,
        matrix (see ``hlo.Collective``). Loops of unknown length count once: Dion's of
        well-conditioned factors; what others need is a part of its own.
      compile_seconds: spent here.
    """

    target: str
    mesh: dict[str, int]
    devices: int
    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    temporary_bytes: int
    peak_bytes: int
    hbm_bytes: float | None
    fits: bool | None
    flops: float
    collectives: list[dict[str, Any]]
    compile_seconds: float


def topology_devices(name: str) -> Sequence[Any]:
    """Devices of a described TPU slice, e.g. ``v5e:4x4``, ``v6e:16x16``, ``v5p:8x8x8``.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      ValueError: unknown topology.
    """
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for TPUs needs libtpu: pip install 'jaxpapers[tpu]' (Linux "
            "x86-64), or use --fake-devices"
        )
    # libtpu must not look for a TPU, nor ask a metadata server for one. Importing jax
    # without a TPU has left warnings as values.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
    }.items():
        if os.environ.get(key, "WARNING").startswith("WARNING"):
            os.environ[key] = value
    # No TPU is opened, so several compilations may run at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    kind = name.partition(":")[0]
    try:
        if kind not in HBM:
            raise ValueError(f"unknown kind of TPU {kind!r}")
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (ValueError, RuntimeError) as e:
        raise ValueError(
            f"--topology: cannot describe {name!r} ({' '.join(str(e).split())[:200]}); "
            "expected e.g. v5e:4x4, v6e:16x16 or v5p:8x8x8"
        ) from None


def plan(
    method: Method, mesh: jax.sharding.Mesh, batch: Any, target: str = "cpu"
) -> Plan:
    """Compiles ``method``'s step for ``mesh`` and reads what the compiler made of it.

    Args:
      method: pure functions.
      mesh: of devices that need not exist (``topology_devices``).
      batch: shapes of a global batch.
      target: topology of the mesh; its kind of chip gives the memory to compare with.
    """
    began = time.monotonic()
    # A program for devices that are not here cannot be read back from a compile cache.
    option = "jax_persistent_cache_min_compile_time_secs"
    write_after = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        compiled = trainer.compile(method, mesh, batch)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise DoesNotFit(
            f"does NOT fit on {target} with mesh {dict(mesh.shape)}: "
            + " ".join(str(e).split())[:300]
            + "; use a larger slice, a smaller data.batch, a larger train.accumulate, "
            "or net.remat=True"
        ) from None
    finally:
        jax.config.update(option, write_after)
    seconds = time.monotonic() - began
    memory = compiled.executable.memory_analysis()
    hbm = HBM.get(target.partition(":")[0])
    # The peak is the TPU compiler's; the CPU's reports none of use.
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if hbm is not None:
        peak = memory.peak_memory_in_bytes
    found = hlo.collectives(compiled.executable.as_text(), mesh)
    return Plan(
        target=target,
        mesh=dict(mesh.shape),
        devices=mesh.size,
        parameters=sum(
            math.prod(x.shape) for x in jax.tree.leaves(compiled.shapes.params)
        ),
        parameter_bytes=local_bytes(compiled.shapes.params),
        optimizer_bytes=local_bytes(compiled.shapes.opt_state),
        temporary_bytes=peak - memory.argument_size_in_bytes,
        peak_bytes=peak,
        hbm_bytes=hbm,
        fits=None if hbm is None else peak <= hbm,
        flops=product_flops(compiled.jaxpr.jaxpr) / mesh.size,
        collectives=_rows(found),
        compile_seconds=seconds,
    )


def local_bytes(tree: Any) -> int:
    """Bytes on one device of arrays or shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def product_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products of a jaxpr on all devices, loops unrolled.

    The compiler's own count takes the body of a loop once. A ``while`` loop of unknown
    length counts once here as well.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if RESCUE in str(eqn.source_info.name_stack):
            continue  # What only ill-conditioned factors need.
        if eqn.primitive.name == "dot_general":
            total += _dot_flops(eqn)
            continue
        times = 1
        if eqn.primitive.name == "scan":
            times = eqn.params["length"]
        elif eqn.primitive.name == "shard_map":
            # The body is one device's work along the manual axes.
            sizes = dict(eqn.params["mesh"].shape)
            times = math.prod(sizes[a] for a in eqn.params["newly_manual_axes"])
        inner = [product_flops(j) for j in _inner_jaxprs(eqn.params)]
        if eqn.primitive.name in ("cond", "platform_index"):
            inner = [max(inner, default=0.0)]
        total += times * sum(inner)
    return total


def _dot_flops(eqn: Any) -> float:
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    left, right = (v.aval.shape for v in eqn.invars)
    rows = math.prod(left) / math.prod(left[a] for a in contract)
    free = math.prod(right) / math.prod(left[a] for a in (*contract, *batch))
    return 2.0 * rows * free * math.prod(left[a] for a in contract)


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def _rows(found: list[hlo.Collective]) -> list[dict[str, Any]]:
    """Collectives by part of the step, kind and axes; most bytes first.

    Where the compiler merged an all-reduce of the optimizer with one of the backward
    pass, the merged one counts for the part whose note it kept.
    """
    groups: dict[tuple, list[hlo.Collective]] = {}
    for c in found:
        part = PARTS[("/optimizer/" in c.op_name) + (f"/{RESCUE}/" in c.op_name)]
        groups.setdefault((part, c.kind, c.axes), []).append(c)
    rows = [
        {
            "part": part,
            "kind": kind,
            "axes": "?" if axes is None else ",".join(axes),
            "count": sum(c.count for c in members),
            "result_bytes": int(sum(c.result_bytes * c.count for c in members)),
            "wire_bytes": int(sum(c.wire_bytes * c.count for c in members)),
            "largest": max(c.elements for c in members),
            "matrix": max(c.matrix for c in members),
        }
        for (part, kind, axes), members in groups.items()
    ]
    return sorted(rows, key=lambda r: (r["part"], -r["wire_bytes"]))


def format_plan(p: Plan) -> list[str]:
    """Lines for a terminal."""
    size = functools.partial(_decimal, unit="B")
    mesh = " x ".join(f"{k} {v}" for k, v in p.mesh.items())
    lines = [
        f"compiled for {p.target}, {p.devices} devices, mesh {mesh}, in "
        f"{p.compile_seconds:.0f} s (nothing was run)",
        f"per chip: parameters {size(p.parameter_bytes)} (of "
        f"{_decimal(p.parameters, '')} in all), optimizer {size(p.optimizer_bytes)}, "
        f"activations and temporaries {size(p.temporary_bytes)}, peak "
        f"{size(p.peak_bytes)}",
    ]
    if p.hbm_bytes is not None:
        verb = "fits" if p.fits else "does NOT fit"
        lines.append(f"{verb} in the chip's {size(p.hbm_bytes)}")
    lines.append(f"matrix products: {_decimal(p.flops, 'FLOP')} per chip and step")
    lines.append(
        f"{'part':<26} {'collective':<19} {'axes':<14} {'count':>6} "
        f"{'sent':>10} {'largest result':>15}"
    )
    for row in p.collectives:
        lines.append(
            f"{row['part']:<26} {row['kind']:<19} {row['axes']:<14} "
            f"{row['count']:>6} {size(row['wire_bytes']):>10} "
            f"{row['largest']:>15,}"
        )
    for part in PARTS:
        sent = sum(r["wire_bytes"] for r in p.collectives if r["part"] == part)
        if sent or part in PARTS[:2]:
            lines.append(f"{part}: {size(sent)} sent per chip and step")
    return lines


def _decimal(value: int | float, unit: str) -> str:
    prefix = ""
    for larger in "kMGTP":
        if abs(value) < 1000:
            break
        value, prefix = value / 1000, larger
    digits = f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
    return f"{digits} {prefix}{unit}".strip()
