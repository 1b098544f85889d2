"""What crosses the network between TPU slices in a training step: compiled, not run.

    python benchmarks/plan_slices.py            every row (an hour or more on two cores)
    python benchmarks/plan_slices.py "dion 1/4" compiles rows whose label has the words
    python benchmarks/plan_slices.py none       closed forms only

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
        "| optimizer, what slices exchange | closed form | of float32 gradients | "
        "compiled: sent between slices | of float32 gradients | of the first row | "
        "sent inside a slice | optimizer state | peak | "
        "at least: matrix units, HBM, ICI, DCN | compile |",
        "|---" * 11 + "|",
    ]
    gradient = rows[BASE]["closed_form"]
    base = rows[BASE].get("links", {}).get("DCN")
    for label, row in rows.items():
        closed = row["closed_form"]
        cells = [label, f"{closed / 1e6:.2f} MB", f"{closed / gradient:.3f}"]
        if "links" in row:
            slow = row["links"]["DCN"]
            inside = sum(row["links"].values()) - slow
            least = ", ".join(f"{1000 * x:.1f}" for x in row["bounds"].values())
            cells += [
                f"{slow / 1e6:.2f} MB",
                f"{slow / gradient:.3f}",
                "" if base is None else f"{slow / base:.3f}",
                f"{inside / 1e6:,.0f} MB",
                f"{row['optimizer_bytes'] / 1e6:,.0f} MB",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
                f"{least} ms",
                f"{row['compile_seconds']:.0f} s",
            ]
        else:
            cells += [row.get("error", "not compiled"), *[""] * 7]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Closed forms of all rows, and the programs of those that are asked for."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    old = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    axes = ",".join(f"{k}:{v}" for k, v in MESH.items())
    rows = {}
    for label, fields in ROWS.items():
        arguments = command(PRESET, TOPOLOGY, axes, fields)
        arguments += ["--slices", str(SLICES)]
        asked = {"command": arguments, "closed_form": closed_form(fields)}
        kept = old.get(label, {})
        rows[label] = kept if asked.items() <= kept.items() else asked
    for label, row in rows.items():
        if word in label:
            row |= {"source": source(), **compute(row["command"])}
            print(label, row.get("error", row.get("links")), flush=True)
        found = header(
            "python benchmarks/plan_slices.py", "jax", "jaxlib", "libtpu", "optax"
        )
        OUT.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")
        write_table(markdown(rows), MARKS)


if __name__ == "__main__":
    main()
