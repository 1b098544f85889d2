"""Ahead-of-time compilation of a training step: memory, collectives, FLOPs.

``libtpu`` compiles for TPU topologies of any size without a TPU. The numbers are the
compiler's analysis of the pod's program, not measurements.
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
from jaxpapers.chips import CHIPS, chip_of, least_seconds
from jaxpapers.method import Method
from jaxpapers.optim.orthonormalize import RESCUE
from jaxpapers.products import product_flops

PARTS = ("forward/backward", "optimizer", f"optimizer, {RESCUE}")


class DoesNotFit(ValueError):
    """The step does not fit into the memory of a chip."""


class Plan(NamedTuple):
    """The compiler's analysis of one step; bytes and FLOPs are per chip.

    Attributes:
      target: topology of a slice, or "cpu".
      mesh: axis sizes.
      devices: number of chips.
      parameters: number of parameters in all.
      parameter_bytes: of parameters.
      optimizer_bytes: of optimizer state.
      temporary_bytes: of activations and temporaries at the peak.
      peak_bytes: peak memory, arguments included.
      hbm_bytes: memory of a chip; None if unknown.
      fits: whether the peak is at most that; None if unknown.
      flops: of the matrix products of a step, including recomputation.
      collectives: rows with part, kind, axes, link (DCN between slices, ICI inside one,
        "" on other devices), count, result_bytes, wire_bytes, largest, matrix (see
        ``hlo.Collective``). Loops of unknown length count once, or as their name scope
        says (``scopes``); Dion's fallback for ill-conditioned factors is a part of its
        own.
      links: bytes that a chip sends, by link and axes: "DCN", "ICI data", "data" on
        other devices; "ICI ?" for groups that are those of no axes.
      bounds: seconds that a step takes at least, by resource, from the public figures of
        a TPU (``chips.least_seconds``); nothing measured. Of HBM, those to read all
        arguments and write all results once. Empty on other devices.
      compile_seconds: duration of the compilation.
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
    links: dict[str, int]
    bounds: dict[str, float]
    compile_seconds: float


def topology_devices(
    name: str | None, slices: int | None = None
) -> Sequence[Any] | None:
    """Abstract devices of TPU slices; None for the devices that are here.

    Args:
      name: of one slice, e.g. ``v5e:4x4``, ``v6e:16x16``, ``v5p:8x8x8``.
      slices: how many, joined by a network that is slower than theirs; None: one.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
      ValueError: unknown topology, ``slices`` below 1 or without a topology.
    """
    if slices is not None and slices < 1:
        raise ValueError(f"--slices must be >= 1, got {slices}")
    if name is None and slices is not None:
        raise ValueError(
            f"--slices={slices} needs the --topology of a slice, e.g. v5p:8x8x8; on CPUs "
            f"try --mesh slice:{slices},data:2 with --fake-devices={2 * slices}"
        )
    if name is None:
        return None
    import importlib.util

    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "compiling for TPUs needs libtpu: pip install 'jaxpapers[tpu]' (Linux "
            "x86-64), or use --fake-devices"
        )
    # Keeps libtpu from querying a metadata server for a TPU. Without one, importing jax
    # has set these variables to warnings.
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
        if kind not in CHIPS:
            raise ValueError(f"unknown kind of TPU {kind!r}")
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=slices or 1
        ).devices
    except (ValueError, RuntimeError) as e:
        raise ValueError(
            f"--topology: cannot describe {name!r} ({' '.join(str(e).split())[:200]}); "
            "expected e.g. v5e:4x4, v6e:16x16 or v5p:8x8x8"
        ) from None


def plan(
    method: Method, mesh: jax.sharding.Mesh, batch: Any, target: str = "cpu"
) -> Plan:
    """Compiles the step of a method for a mesh and analyses the program.

    Args:
      method: to be trained.
      mesh: of devices, abstract ones (``topology_devices``) included.
      batch: shapes of a global batch.
      target: topology of the mesh, whose kind of chip determines ``hbm_bytes``.

    Raises:
      DoesNotFit: the compiler runs out of memory.
    """
    began = time.monotonic()
    # Programs for abstract devices cannot be loaded from a compile cache.
    option = "jax_persistent_cache_min_compile_time_secs"
    write_after = getattr(jax.config, option)
    jax.config.update(option, math.inf)
    try:
        compiled = trainer.compile(method, mesh, batch, allocate=False)
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
    chip = chip_of(target)
    # The CPU compiler reports no useful peak.
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    if chip is not None:
        peak = memory.peak_memory_in_bytes
    rows = _rows(hlo.collectives(compiled.executable.as_text(), mesh), chip is not None)
    links = _links(rows)
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
        hbm_bytes=None if chip is None else chip.memory,
        fits=None if chip is None else peak <= chip.memory,
        flops=product_flops(compiled.jaxpr.jaxpr) / mesh.size,
        collectives=rows,
        links=links,
        bounds={}
        if chip is None
        else least_seconds(
            chip,
            flops=product_flops(compiled.jaxpr.jaxpr, passes=True) / mesh.size,
            memory=memory.argument_size_in_bytes + memory.output_size_in_bytes,
            ici=sum(size for link, size in links.items() if link != "DCN"),
            dcn=links.get("DCN", 0),
        ),
        compile_seconds=seconds,
    )


def local_bytes(tree: Any) -> int:
    """Bytes per device of arrays, or of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _rows(collectives: list[hlo.Collective], tpu: bool) -> list[dict[str, Any]]:
    """Collectives grouped by part of the step, kind, axes and link; most bytes first.

    An all-reduce that the compiler merged across parts counts for the part whose op name
    it kept.
    """
    groups: dict[tuple, list[hlo.Collective]] = {}
    for c in collectives:
        part = PARTS[("/optimizer/" in c.op_name) + (f"/{RESCUE}/" in c.op_name)]
        link = ("DCN" if c.between_slices else "ICI") if tpu else ""
        groups.setdefault((part, c.kind, c.axes, link), []).append(c)
    rows = [
        {
            "part": part,
            "kind": kind,
            "axes": "?" if axes is None else ",".join(axes),
            "link": link,
            "count": sum(c.count for c in members),
            "result_bytes": int(sum(c.result_bytes * c.count for c in members)),
            "wire_bytes": int(sum(c.wire_bytes * c.count for c in members)),
            "largest": max(c.elements for c in members),
            "matrix": max(c.matrix for c in members),
        }
        for (part, kind, axes, link), members in groups.items()
    ]
    return sorted(rows, key=lambda r: (r["part"], -r["wire_bytes"]))


def _links(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes that a chip sends by link, the slow one first, then most bytes first."""
    total: dict[str, int] = {}
    for row in rows:
        axes = row["axes"] if row["link"] != "DCN" else ""
        name = f"{row['link']} {axes}".strip()
        total[name] = total.get(name, 0) + row["wire_bytes"]
    return dict(sorted(total.items(), key=lambda x: (x[0] != "DCN", -x[1])))


def format_plan(p: Plan) -> list[str]:
    """A plan as lines of text."""
    size = functools.partial(_decimal, unit="B")
    mesh = " x ".join(f"{k} {v}" for k, v in p.mesh.items())
    slices = p.mesh.get(hlo.SLICE, 1) if p.hbm_bytes is not None else 1
    slices = f"{slices} slices of " if slices > 1 else ""
    lines = [
        f"compiled for {slices}{p.target}, {p.devices} devices, mesh {mesh}, in "
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
    if p.links:
        lines.append(
            "by link: " + ", ".join(f"{k} {size(x)}" for k, x in p.links.items())
        )
    if p.bounds:
        lines.append(
            "a step takes at least, by the chip's public figures (bounds, not measured): "
            + ", ".join(f"{k} {1000 * x:,.2f} ms" for k, x in p.bounds.items())
        )
    return lines


def _decimal(value: int | float, unit: str) -> str:
    prefix = ""
    for larger in "kMGTP":
        if abs(value) < 1000:
            break
        value, prefix = value / 1000, larger
    digits = f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
    return f"{digits} {prefix}{unit}".strip()
