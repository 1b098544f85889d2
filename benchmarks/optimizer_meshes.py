"""What optimizers of matrices send and compute, by the shape of the mesh.

    python benchmarks/optimizer_meshes.py                   every row (an hour of CPU)
    python benchmarks/optimizer_meshes.py --meshes 16x1 --rows "dion2 1/4;muon"
    python benchmarks/optimizer_meshes.py --table           writes it into docs/dion.md
    ... --topology cpu:16 --shape 28,64,256 --out FILE      this machine's compiler

One group of stacked float32 kernels, 28 of 2048 x 8192, inputs split over the first axis
of the mesh and outputs over the second, compiled for a slice that is not here; nothing is
run. Bytes are those that a chip sends in rings per step, of well-conditioned matrices;
FLOPs those of the matrix products, per chip if the chips share them evenly (ours do, of
optax's Muon the partitioner decides). ``residual`` is ``nesterov``, ``residual=1`` and
``normalize_rows``. The table adds the loss that ``dion_vs_adamw_muon.py`` found. Writes
results/optimizer_meshes.json beside this, row by row.
"""

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OUT = RESULTS / "optimizer_meshes.json"
PAGE = Path(__file__).parent.parent / "docs" / "dion.md"
BEGIN, END = "<!-- meshes: begin -->", "<!-- meshes: end -->"
MESHES = ("16x1", "4x4", "1x16")
AHEAD = {"nesterov": True, "residual": 1.0, "normalize_rows": True}
# Label -> function of ``optim``, or of optax, and its arguments.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "optax muon": ("optax_muon", {}),
    "muon": ("scale_by_muon", {"nesterov": True}),
    "normuon": ("scale_by_muon", {"nesterov": True, "b2": 0.95}),
    "dion 1/4": ("scale_by_dion", {"rank_fraction": 1 / 4}),
    "dion 1/16": ("scale_by_dion", {"rank_fraction": 1 / 16}),
    "dion 1/4, residual": ("scale_by_dion", {"rank_fraction": 1 / 4, **AHEAD}),
    "dion 1/16, residual": ("scale_by_dion", {"rank_fraction": 1 / 16, **AHEAD}),
    "dion2 1/4": ("scale_by_dion2", {"fraction": 1 / 4}),
}


# Rows of ``dion_vs_adamw_muon.py``, whose mean loss the table repeats.
LEARNING = {
    "optax muon": "muon",
    "muon": "our_muon",
    "normuon": "normuon",
    "dion 1/4": "dion_4",
    "dion 1/16": "dion_16",
    "dion 1/4, residual": "ahead_4",
    "dion 1/16, residual": "ahead_16",
    "dion2 1/4": "dion2_4",
}


def devices(topology: str) -> Any:
    """Of a TPU slice, or of ``cpu:N``."""
    kind, _, count = topology.partition(":")
    if kind == "cpu":
        import jax

        jax.config.update("jax_num_cpu_devices", int(count))
        return jax.devices("cpu")
    from jaxpapers import plan

    return plan.topology_devices(topology)


def table(record: dict) -> str:
    """The record as Markdown: MB sent on every mesh, GFLOP, and bits per byte."""
    learned = json.loads((RESULTS / "dion_vs_adamw_muon.json").read_text())["results"]
    meshes = sorted(record["meshes"], key=lambda m: -int(m.partition("x")[0]))
    lines = [
        "| optimizer | " + " | ".join(f"{m}, MB" for m in meshes) + " | GFLOP | bits |",
        "|---" * (len(meshes) + 3) + "|",
    ]
    for label in ROWS:
        rows = [record["meshes"][m].get(label) for m in meshes]
        sent = [f"{row['sent_bytes'] / 1e6:,.0f}" if row else "" for row in rows]
        flops = [round(row["flops"] / 1e9) for row in rows if row]
        # One number where all meshes share the work alike.
        ends = dict.fromkeys((min(flops), max(flops))) if flops else ()
        work = " to ".join(f"{n:,}" for n in ends)
        bits = learned.get(LEARNING[label])
        shown = f"{bits['mean']:.3f}" if bits else ""
        lines.append("| " + " | ".join([label, *sent, work, shown]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compiles the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--meshes", default=",".join(MESHES))
    parser.add_argument("--shape", default="28,2048,8192")
    parser.add_argument("--rows", default="", help="labels, separated by semicolons")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        text = table(json.loads(options.out.read_text()))
        print(text)
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
        return
    available = devices(options.topology)
    from compiled_step import compile_step, versions

    shape = [int(n) for n in options.shape.split(",")]
    setting = {"topology": options.topology, "shape": shape, "versions": versions()}
    for mesh in options.meshes.split(","):
        sizes = dict(zip(("data", "model"), map(int, mesh.split("x"))))
        for label in options.rows.split(";") if options.rows else ROWS:
            step = compile_step(*ROWS[label], available, sizes, shape)
            row = {
                "sent_bytes": step.sent_bytes,
                "largest": max((c.elements for c in step.collectives), default=0),
                "flops": step.flops,
                "compile_cpu_seconds": round(step.cpu_seconds, 1),
            }
            print(mesh, label, row, flush=True)
            # Another process may have written rows since.
            old = json.loads(options.out.read_text()) if options.out.exists() else {}
            record = {**setting, "meshes": old.get("meshes", {})}
            record["meshes"].setdefault(mesh, {})[label] = row
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
