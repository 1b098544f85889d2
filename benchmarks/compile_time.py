"""What an optimizer's step costs the TPU compiler: CPU seconds, code, bytes sent.

    python benchmarks/compile_time.py            every row (minutes of CPU each)
    python benchmarks/compile_time.py "dion 1/4" one row

One group of 28 matrices 2048 x 8192 on a slice v5e:4x4 (data 4, model 4), compiled by
the TPU compiler without a TPU; nothing is run. Seconds are those of the CPU over all
threads, which other work on the machine changes little. Writes
results/compile_time.json beside this, row by row.
"""

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

OUT = Path(__file__).parent / "results" / "compile_time.json"
SHAPE, TOPOLOGY, MESH = (28, 2048, 8192), "v5e:4x4", {"data": 4, "model": 4}
# Label -> function of ``optim``, or of optax, and its arguments.
ROWS: dict[str, tuple[str, dict]] = {
    "optax muon": ("optax_muon", {}),
    "dion 1/4": ("scale_by_dion", {"rank_fraction": 0.25}),
    "dion 1/4, ahead": (
        "scale_by_dion",
        {
            "rank_fraction": 0.25,
            "nesterov": True,
            "residual": 1.0,
            "normalize_rows": True,
        },
    ),
    "dion 1/4, highest": (
        "scale_by_dion",
        {"rank_fraction": 0.25, "precision": "highest"},
    ),
    "muon": ("scale_by_muon", {}),
}


def measure(name: str, options: dict) -> dict:
    """Compiles one step in this process."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jaxpapers import hlo, optim, plan
    from jaxpapers.optim.orthonormalize import RESCUE

    devices = plan.topology_devices(TOPOLOGY)
    mesh = jax.sharding.Mesh(
        np.asarray(devices).reshape(tuple(MESH.values())),
        tuple(MESH),
        axis_types=(jax.sharding.AxisType.Auto,) * len(MESH),
    )
    where = NamedSharding(mesh, P(None, *MESH))
    if name == "optax_muon":
        numbers = optax.contrib.MuonDimensionNumbers(1, 2)
        tx = optax.contrib.scale_by_muon(weight_dimension_numbers={"w": numbers})
    else:
        numbers = optim.DimensionNumbers(1, 2)
        tx = getattr(optim, name)(
            weight_dimension_numbers=numbers, sharding={"w": where}, **options
        )
    params = {"w": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=where)}
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, params)
        everywhere = NamedSharding(mesh, P())
        if name == "scale_by_dion":
            numbers_of = {"weight_dimension_numbers": numbers}
            placed = optim.dion_state_sharding(
                state, params, {"w": where}, **numbers_of
            )
        else:
            placed = jax.tree.map(
                lambda x: where if x.shape == SHAPE else everywhere, state
            )
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            placed,
        )
        lowered = jax.jit(lambda g, s: tx.update(g, s, None)).lower(params, state)
    began, wall = time.process_time(), time.monotonic()
    compiled = lowered.compile()
    seconds, wall = time.process_time() - began, time.monotonic() - wall
    memory = compiled.memory_analysis()
    # Of well-conditioned matrices.
    collectives = [
        c for c in hlo.collectives(compiled.as_text(), mesh) if RESCUE not in c.op_name
    ]
    return {
        "compile_cpu_seconds": round(seconds, 1),
        "compile_wall_seconds": round(wall, 1),
        "code_bytes": memory.generated_code_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "sent_bytes": int(sum(c.wire_bytes * c.count for c in collectives)),
        "largest_matrix": max(c.matrix for c in collectives),
    }


def main() -> None:
    """Computes the rows asked for, each in its own process."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(*ROWS[sys.argv[2]])))
        return
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    for label in sys.argv[1:] or ROWS:
        command = [sys.executable, __file__, "--child", label]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[label] = json.loads(done.stdout.splitlines()[-1])
        print(label, rows[label], flush=True)
        versions = {p: version(p) for p in ("jax", "jaxlib", "libtpu", "optax")}
        setting = {"topology": TOPOLOGY, "mesh": MESH, "shape": SHAPE}
        found = {"versions": versions, **setting, "rows": rows}
        OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
