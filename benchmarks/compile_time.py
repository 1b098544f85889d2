"""What an optimizer's step costs the TPU compiler: CPU seconds, code, bytes sent.

    python benchmarks/compile_time.py            every row (minutes of CPU each)
    python benchmarks/compile_time.py "dion 1/4" one row

One group of 28 matrices 2048 x 8192 on a slice v5e:4x4 (data 4, model 4; ``data:16``: one
axis over the shorter side, where Dion exchanges whole matrices), compiled by the TPU
compiler without a TPU; nothing is run. Seconds are those of the CPU over all
threads, which other work on the machine changes little. Writes
results/compile_time.json beside this, row by row.
"""

import json
import subprocess
import sys
from pathlib import Path

OUT = Path(__file__).parent / "results" / "compile_time.json"
SHAPE, TOPOLOGY, MESH = (28, 2048, 8192), "v5e:4x4", {"data": 4, "model": 4}
FSDP = {"data": 16, "model": 1}
# Label -> function of ``optim``, or of optax, its arguments, and the mesh if another.
ROWS: dict[str, tuple] = {
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
    "dion 1/4, data:16": ("scale_by_dion", {"rank_fraction": 0.25}, FSDP),
    "dion 1/4, data:16, thin": (
        "scale_by_dion",
        {"rank_fraction": 0.25, "split_p": "thin"},
        FSDP,
    ),
}


def measure(name: str, options: dict, mesh: dict[str, int] = MESH) -> dict:
    """Compiles one step in this process."""
    from compiled_step import compile_step

    from jaxpapers import plan

    devices = plan.topology_devices(TOPOLOGY)
    step = compile_step(name, options, devices, mesh, SHAPE)
    memory = step.compiled.memory_analysis()
    return {
        "compile_cpu_seconds": round(step.cpu_seconds, 1),
        "compile_wall_seconds": round(step.wall_seconds, 1),
        "code_bytes": memory.generated_code_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "sent_bytes": step.sent_bytes,
        "largest_matrix": max(c.matrix for c in step.collectives),
    }


def main() -> None:
    """Computes the rows asked for, each in its own process."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(*ROWS[sys.argv[2]])))
        return
    from compiled_step import versions

    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    for label in sys.argv[1:] or ROWS:
        command = [sys.executable, __file__, "--child", label]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[label] = json.loads(done.stdout.splitlines()[-1])
        print(label, rows[label], flush=True)
        setting = {"topology": TOPOLOGY, "mesh": MESH, "shape": SHAPE}
        found = {"versions": versions(), **setting, "rows": rows}
        OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
