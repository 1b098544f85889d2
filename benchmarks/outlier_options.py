"""POEM's options on the contaminated pool, chosen on data that no result is measured on.

    python benchmarks/outlier_options.py             25 minutes of a core
    python benchmarks/outlier_options.py --runs=6    the first runs only

Each run is ``jaxpapers run poem:contaminated --alone`` with other options and seeds than
those of docs/results.md. Validation: the 1,000 digits that calibrate the threshold,
against 2,000 letters of the pool's fonts, drawn anew; FPR95 with digits positive, and
the digits among the chosen. Writes results/outlier_options.json beside this.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from timing import header

from jaxpapers import run
from jaxpapers.data import outliers
from jaxpapers.folder import load_run
from jaxpapers.ops import detection
from jaxpapers.tasks import outliers as task

OUT = Path(__file__).parent / "results" / "outlier_options.json"
SEEDS = (20, 21)
OPTIONS = {
    "greedy": {"select": "greedy"},
    "preset": {},
    "prior 2": {"prior": 2.0},
    "noise 5": {"noise": 5.0},
    "noise 0.05": {"noise": 0.05},
    "pool 16,000": {"pool": 16_000},
    "prior 200": {"prior": 200.0},
}


def validated(options: dict, seed: int) -> dict[str, float]:
    """Validation FPR95 of a run, the digits among its choice, and its seconds."""
    began = time.process_time()
    fields = [f"--config.method.{k}={v}" for k, v in options.items()]
    fields += [f"--config.train.seed={seed}", "--config.train.eval_every=0"]
    with tempfile.TemporaryDirectory() as folder:
        summary = run.run(
            "poem:contaminated", fields, workdir=folder, alone=True, quiet=True
        )
        _, config, method, mesh, state = load_run(folder)
    letters = outliers.glyphs(2000, 5, outliers.POOL_FONTS)
    digits = task.load(config).calibration.image
    scores = [
        task._detection(config, task._predictions(config, mesh, method, state, x))
        for x in (digits, letters)
    ]
    return {
        "fpr95": detection.measures(*scores).fpr,
        "contaminants": summary["rows"][0]["numbers"][0]["contaminants"],
        "cpu_seconds": time.process_time() - began,
    }


def main() -> None:
    """Runs, prints and writes after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=len(OPTIONS) * len(SEEDS))
    count = parser.parse_args().runs
    result = header("python benchmarks/outlier_options.py", "jax", "jaxlib")
    result["runs"] = {name: {} for name in OPTIONS}
    every = [(seed, name) for seed in SEEDS for name in OPTIONS]
    for seed, name in every[:count]:
        result["runs"][name][seed] = validated(OPTIONS[name], seed)
        print(name, seed, result["runs"][name][seed], flush=True)
        OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
