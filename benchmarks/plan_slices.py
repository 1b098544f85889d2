"""What crosses the network between TPU slices in a training step: compiled, not run.

    python benchmarks/plan_slices.py            every row (an hour or more on two cores)
    python benchmarks/plan_slices.py "dion 1/4" rows whose label contains the words

The 3b preset on four slices of v5p:8x8x8, each with all parameters and a quarter of the
batch. Each row is one ``jaxpapers plan`` in its own process. Beside what the compiled
program sends is the closed form of ``optim.plan_dion``, which needs no compiler. Writes
results/plan_slices.json beside this, row by row, and the table of docs/scale.md.
"""

import json
import math
import sys
from pathlib import Path

from plan_tables import command, compute, source, write_table
from timing import header

OUT = Path(__file__).parent / "results" / "plan_slices.json"
MARKS = ("<!-- slices: begin -->", "<!-- slices: end -->")
PRESET, TOPOLOGY, SLICES = "dion:3b", "v5p:8x8x8", 4
MESH = {"slice": SLICES, "data": 64, "model": 8}
BASE = "adamw, averaged gradients"
LOWRANK = {
    "optim.name": "dion", "optim.clip": 0.0, "optim.residual": 0.0,
    "train.replica_sync": "lowrank", "train.replica_axis": "slice",
}  # fmt: skip
HALF = {"optim.communication_dtype": "bfloat16"}
ROWS = {
    BASE: {"optim.name": "adamw"},
    "dion 1/4, P and R, bfloat16": {**LOWRANK, **HALF, "optim.rank_fraction": 1 / 4},
    "dion 1/16, P and R, bfloat16": {**LOWRANK, **HALF, "optim.rank_fraction": 1 / 16},
    "dion 1/4, P and R": {**LOWRANK, "optim.rank_fraction": 1 / 4},
    "dion 1/16, P and R": {**LOWRANK, "optim.rank_fraction": 1 / 16},
    "muon, averaged gradients": {"optim.name": "muon"},
    "dion 1/4, averaged gradients": {"optim.name": "dion"},
}


def closed_form(fields: dict) -> float:
    """Bytes that a chip sends to other slices, without compiling anything."""
    import jax
    from jax.sharding import NamedSharding

    from jaxpapers import optim, tasks
    from jaxpapers.config import load_config
    from jaxpapers.hlo import ring_bytes
    from jaxpapers.method import param_spec, path_name
    from jaxpapers.nets import transformer
    from jaxpapers.optim import routing
    from jaxpapers.papers import dion

    config = load_config(PRESET, [f"--config.{k}={v}" for k, v in fields.items()])
    c, low = config.optim, config.train.replica_sync == "lowrank"
    mesh = jax.sharding.AbstractMesh(tuple(MESH.values()), tuple(MESH))
    with jax.sharding.use_abstract_mesh(mesh):
        batch = tasks.abstract(config).shapes
        state = jax.eval_shape(dion.make(config).init, jax.random.key(0), batch)
    labels = jax.tree.leaves(routing.route(state.params, dion.dimensions))
    total = 0.0
    named = jax.tree_util.tree_flatten_with_path(state.params)[0]
    for (path, leaf), label in zip(named, labels, strict=True):
        name = path_name(path)
        spec = param_spec(transformer.RULES, name)
        if low and label == "dion":
            cost = optim.plan_dion(
                leaf.shape, spec, MESH, c.rank_fraction, c.rank_multiple_of,
                dimensions=dion.dimensions(name, leaf), replicate_axis="slice",
                slices="slice", communication_dtype=c.communication_dtype or None,
            )  # fmt: skip
            total += cost.bytes_per_step["all-reduce", ("slice",)]
            continue
        block = math.prod(NamedSharding(mesh, spec).shard_shape(leaf.shape))
        if "data" not in jax.tree.leaves(tuple(spec)):
            block /= MESH["data"]  # The compiler scatters its sum before it crosses.
        item = 2 if low and c.communication_dtype == "bfloat16" else 4
        total += ring_bytes("all-reduce", block * item, SLICES)
    return total


def markdown(rows: dict) -> str:
    """The rows as the table of docs/scale.md."""
    lines = [
        "| optimizer, what slices exchange | sent between slices | of the gradient's | "
        "closed form | its largest array | inside a slice | optimizer state | peak | "
        "at least: matrix units, HBM, ICI, DCN | compile |",
        "|---" * 10 + "|",
    ]
    base = rows.get(BASE, {}).get("links", {}).get("DCN")
    for label, row in rows.items():
        if "error" in row:
            closed = f"{row['closed_form'] / 1e6:.2f} MB"
            lines.append(f"| {label} | {row['error']} | | {closed} |" + " |" * 6)
            continue
        slow = [r for r in row["collectives"] if r["link"] == "DCN"]
        inside = sum(size for link, size in row["links"].items() if link != "DCN")
        least = ", ".join(f"{1000 * x:.1f}" for x in row["bounds"].values())
        cells = [
            f"{row['links']['DCN'] / 1e6:.2f} MB",
            "" if base is None else f"{row['links']['DCN'] / base:.3f}",
            f"{row['closed_form'] / 1e6:.2f} MB",
            f"{max(r['largest'] for r in slow) / 1e6:.2f} M",
            f"{inside / 1e6:,.0f} MB",
            f"{row['optimizer_bytes'] / 1e6:,.0f} MB",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{least} ms",
            f"{row['compile_seconds']:.0f} s",
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Computes the rows that are asked for, and the table of all that there are."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    axes = ",".join(f"{k}:{v}" for k, v in MESH.items())
    for label, fields in ROWS.items():
        if word not in label:
            continue
        arguments = command(PRESET, TOPOLOGY, axes, fields)
        arguments += ["--slices", str(SLICES)]
        rows[label] = {
            "command": arguments,
            "source": source(),
            "closed_form": closed_form(fields),
            **compute(arguments),
        }
        print(label, rows[label].get("error", rows[label].get("links")), flush=True)
        rows = {key: rows[key] for key in ROWS if key in rows}
        found = header(
            "python benchmarks/plan_slices.py", "jax", "jaxlib", "libtpu", "optax"
        )
        OUT.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")
    write_table(markdown(rows), MARKS)


if __name__ == "__main__":
    main()
