"""What a training step needs and sends on TPU slices, by optimizer: compiled, not run.

    python benchmarks/plan_tables.py            every row (half an hour on two cores)
    python benchmarks/plan_tables.py dion:3b    rows whose first column contains the word
    ... --again                                 those that are there already too

Each row is one ``jaxpapers plan`` in its own process, compiled by the TPU compiler for
a slice that is not here. Writes results/plans.json beside this, row by row, and the
table of docs/scale.md; without ``--again``, a row that is there already is computed again
only if its command or the optimizer's source changed (the table marks such rows with a
dagger), or it had failed.
"""

import argparse
import hashlib
import json
import re
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

OUT = Path(__file__).parent / "results" / "plans.json"
DOC = Path(__file__).parents[1] / "docs" / "scale.md"
MARKS = ("<!-- plans: begin -->", "<!-- plans: end -->")
TIMEOUT = 2400
SOURCE = Path(__file__).parents[1] / "jaxpapers"
PROGRAM = (
    "ops/linalg.py",
    *(
        f"optim/{name}.py"
        for name in (
            "collectives",
            "orthonormalize",
            "power_iteration",
            "exchange",
            "dion_step",
            "dion",
        )
    ),
)

# preset, topology, mesh, fields. Batches of the small slice are those of a small slice.
SLICES = [
    ("dion:3b", "v5p:8x8x8", "data:64,model:8", {}),
    ("dion:3b", "v6e:16x16", "data:16,model:16", {"train.accumulate": 2}),
    ("dion:160m", "v5p:8x8x8", "replica:8,data:64", {}),
    # Few enough shards of a replica that compressed synchronisation sends less.
    ("dion:160m", "v5p:8x8x8", "replica:64,data:8", {}),
    ("dion:160m", "v6e:16x16", "data:256", {}),
    ("dion:160m", "v5e:4x4", "data:16", {"data.batch": 256}),
    ("dion:3b", "v5e:4x4", "data:4,model:4", {"data.batch": 32, "train.accumulate": 4}),
]
# A click model whose table fits no chip: 128 GB of items (docs/recsys.md).
TABLE = ("din", "v5p:8x8x8", "data:64,model:8", {
    "net.item_vocab": 1_000_000_000, "net.item_dim": 32, "net.item_bias": False,
    "data.batch": 65_536, "optim.name": "adagrad", "optim.tables": "row_adagrad",
    "optim.lr": 0.01,
})  # fmt: skip
# The largest v5p slice that is a cube.
CUBE = ("dion:160m", "v5p:16x16x16", "replica:16,data:256", {"data.batch": 4096})
OPTIMIZERS = {
    "dion 1/4": {"optim.name": "dion", "optim.rank_fraction": 0.25},
    "muon (optax)": {"optim.name": "optax_muon", "optim.scalar": "adamw"},
    "adamw": {"optim.name": "adamw", "optim.scalar": "adamw"},
    # Only where there are replicas.
    "dion 1/4, lowrank sync": {
        "optim.name": "dion", "optim.rank_fraction": 0.25, "optim.clip": 0.0,
        "optim.residual": 0.0, "train.replica_sync": "lowrank",
    },
}  # fmt: skip


def command(preset: str, topology: str, mesh: str, fields: dict) -> list[str]:
    """The command line of one row, without the interpreter."""
    overrides = [f"--config.{k}={v}" for k, v in sorted(fields.items())]
    return [
        "plan",
        preset,
        "--topology",
        topology,
        "--mesh",
        mesh,
        "--json",
        *overrides,
    ]


def source() -> str:
    """Digest of the files that say what a Dion step compiles to."""
    return hashlib.sha256(
        b"".join((SOURCE / n).read_bytes() for n in PROGRAM)
    ).hexdigest()


def compute(arguments: list[str]) -> dict:
    """Runs one command; its JSON, or why there is none."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jaxpapers", *arguments],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not compiled within {TIMEOUT} s"}
    if done.returncode:
        lines = [x for x in done.stderr.splitlines() if x.startswith("jaxpapers:")]
        return {"error": (lines or done.stderr.splitlines() or ["?"])[-1]}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    wall = time.monotonic() - began
    return {**json.loads(done.stdout), "wall_seconds": wall, "cpu_seconds": cpu}


def markdown(rows: dict) -> str:
    """The rows as the table of docs/scale.md."""
    lines = [
        "| slice, mesh, optimizer | parameters | optimizer | temporaries | peak | fits | "
        "sent, forward/backward | sent, optimizer | its largest matrix | "
        "PFLOP | at least: matrix units, HBM, ICI | compile |",
        "|---" * 12 + "|",
    ]
    for label, row in rows.items():
        if "error" in row:
            reason = row["error"].removeprefix("jaxpapers: ").split(" on ")[0]
            need = re.search(r"temporaries \(([\d.]+G)\)", row["error"])
            need = f" ({need.group(1)}B of temporaries)" if need else ""
            lines.append(f"| {label} | {reason}{need} |" + " |" * 10)
            continue
        sent = [
            sum(r["wire_bytes"] for r in row["collectives"] if r["part"] == part)
            for part in ("forward/backward", "optimizer")
        ]
        optimizer = [r for r in row["collectives"] if r["part"].startswith("optimizer")]
        of_dion = "--config.optim.name=dion" in row["command"]
        if of_dion and row.get("source") != source():
            label += " †"
        cells = [
            *(
                f"{row[x] / 1e6:,.0f} MB"
                for x in ("parameter_bytes", "optimizer_bytes")
            ),
            *(f"{row[x] / 1e9:.2f} GB" for x in ("temporary_bytes", "peak_bytes")),
            "yes" if row["fits"] else "no",
            *(f"{x / 1e6:,.0f} MB" for x in sent),
            _largest_matrix(optimizer),
            f"{row['flops'] / 1e15:.3f}",
            _bounds(row),
            f"{row['cpu_seconds']:.0f} CPU s"
            if "cpu_seconds" in row
            else f"{row['compile_seconds']:.0f} s",
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _bounds(row: dict) -> str:
    """Milliseconds by resource; rows of before there were bounds have none."""
    found = row.get("bounds", {})
    names = ("matrix units", "HBM", "ICI")
    return ", ".join(f"{1000 * found[n]:.1f}" for n in names) + " ms" if found else ""


def _largest_matrix(rows: list[dict]) -> str:
    """Of what the optimizer's collectives carry, stacked matrices apart."""
    if not rows:
        return "none"
    return f"{max(r['matrix'] for r in rows) / 1e6:.2f} M"


def write_table(table: str, marks: tuple[str, str] = MARKS) -> None:
    """Puts a table between its marks in docs/scale.md."""
    text = DOC.read_text()
    before, rest = text.split(marks[0])
    after = rest.split(marks[1])[1]
    DOC.write_text(before + marks[0] + "\n" + table + marks[1] + after)


def main() -> None:
    """Computes the missing rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    word, again = options.word, options.again
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    wanted = {}
    for preset, topology, mesh, fields in SLICES:
        for name, optimizer in OPTIMIZERS.items():
            if "lowrank" not in name or "replica" in mesh:
                arguments = command(preset, topology, mesh, {**fields, **optimizer})
                row = {"command": arguments}
                if optimizer["optim.name"] == "dion":
                    row["source"] = source()
                wanted[f"{preset} {topology} {mesh} {name}"] = row
    preset, topology, mesh, fields = CUBE
    wanted[f"{preset} {topology} {mesh} dion 1/4"] = {
        "command": command(
            preset, topology, mesh, {**fields, **OPTIMIZERS["dion 1/4"]}
        ),
        "source": source(),
    }
    preset, topology, mesh, fields = TABLE
    name = f"{preset} {topology} {mesh} row_adagrad, 1e9 items"
    wanted[name] = {"command": command(*TABLE)}
    rows = {key: rows[key] for key in wanted if key in rows}
    for key, asked in wanted.items():
        row = rows.get(key, {})
        done = asked.items() <= row.items() and "error" not in row
        # Rows of before CPU seconds were counted, where they are asked for.
        done = done and not again and (not word or "cpu_seconds" in row)
        if word not in key or done:
            continue
        rows[key] = {**asked, **compute(asked["command"])}
        peak = f"{rows[key].get('peak_bytes')} bytes"
        print(key, rows[key].get("error", peak), flush=True)
        rows = {key: rows[key] for key in wanted if key in rows}
        versions = {p: version(p) for p in ("jax", "jaxlib", "libtpu", "optax")}
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(
            json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n"
        )
    write_table(markdown(rows))


if __name__ == "__main__":
    main()
