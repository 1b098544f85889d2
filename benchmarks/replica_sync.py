"""The loss curve of averaged gradients and of replicas that average P and R.

    python benchmarks/replica_sync.py             two runs of 200 steps (four minutes)

The paper preset at width 128 on this Python's sources, on 8 devices of the CPU, as
`replica:2,data:2,model:2`. Writes results/replica_sync.json beside this and prints the
table of docs/dion.md.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import header

OUT = Path(__file__).parent / "results" / "replica_sync.json"
MESH, STEPS, SHOWN = "replica:2,data:2,model:2", 200, (10, 50, 100, 150, 200)
MODES = {"averaged gradients": "gradient", "averaged P and R": "lowrank"}


def losses(mode: str, folder: Path) -> dict[int, float]:
    """Step -> loss of one run, as its log has it."""
    command = [
        sys.executable, "-m", "jaxpapers", "run", "dion:paper", "--quiet", "--alone",
        "--fake-devices=8", f"--mesh={MESH}", f"--workdir={folder / mode}",
        f"--config.train.steps={STEPS}", f"--config.train.replica_sync={mode}",
        "--config.optim.clip=0.0", "--config.train.sample=0",
        "--config.net.width=128", "--config.optim.cooldown=0.4",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    lines = (folder / mode / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def main() -> None:
    """Runs both modes and writes what they say."""
    with tempfile.TemporaryDirectory() as folder:
        curves = {n: losses(mode, Path(folder)) for n, mode in MODES.items()}
    mean, low = curves.values()
    gap = {step: abs(low[step] - mean[step]) / mean[step] for step in mean}
    result = {
        **header("python benchmarks/replica_sync.py", "jax", "jaxlib", "flax", "optax"),
        "mesh": MESH,
        "losses": {name: list(curve.values()) for name, curve in curves.items()},
        "largest_relative_difference": max(gap.values()),
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print("| step | " + " | ".join(str(s) for s in SHOWN) + " |")
    print("|---" * (1 + len(SHOWN)) + "|")
    for name, curve in curves.items():
        print(f"| {name} | " + " | ".join(f"{curve[s]:.4f}" for s in SHOWN) + " |")
    print(f"largest relative difference of {len(gap)} losses: {max(gap.values()):.1e}")


if __name__ == "__main__":
    main()
