"""Dion, AdamW and Muon on the standard library's text: equal steps, each well tuned.

    python benchmarks/dion_vs_adamw_muon.py            all of it, about half an hour
    python benchmarks/dion_vs_adamw_muon.py --quick    a few steps, to see that it works

One model (MODEL), one stream of batches per seed. For each optimizer the learning rate of
the hidden matrices is chosen on GRID (factors of 2) by the loss on the first half of the
validation text with seed 0; everything that is no hidden matrix is trained by AdamW at
SCALAR_LR in all three, except that AdamW's rows use one learning rate for all. If the
best value lies on an edge of the grid, the grid is extended until it does not. Then
three seeds are run at the chosen value and measured on the second half of the validation
text, which chose nothing. Writes results/dion_vs_adamw_muon.json and .png beside this.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

# As the command line does, and before SciPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxpapers import mesh, papers, run, train  # noqa: E402
from jaxpapers.data import text  # noqa: E402

MODEL = {
    "data.context": 128,
    "data.batch": 8,
    "net.width": 96,
    "net.layers": 2,
    "net.heads": 2,
    "net.unroll": 2,
    "train.steps": 500,
    "optim.clip": 1.0,
}
SCALAR_LR = 0.01
GRID = {
    "adamw": (0.002, 0.004, 0.008, 0.016),
    "muon": (0.005, 0.01, 0.02, 0.04),
    "dion": (0.005, 0.01, 0.02, 0.04),
    "dion_full": (0.005, 0.01, 0.02, 0.04),
}
OPTIMIZER = {
    "adamw": {"optim.name": "adamw"},
    "muon": {"optim.name": "optax_muon", "optim.scalar_lr": SCALAR_LR},
    "dion": {"optim.rank_fraction": 0.25, "optim.scalar_lr": SCALAR_LR},
    "dion_full": {"optim.rank_fraction": 1.0, "optim.scalar_lr": SCALAR_LR},
}
SEEDS = (0, 1, 2)
OUT = Path(__file__).parent / "results"


class Curve:
    """Collects the training bits of every step; a stand-in for ``report.Report``."""

    def __init__(self):
        """Empty."""
        self.bits: list[float] = []

    def start(self, *arguments):
        """Nothing to print."""

    def step(self, step, metrics):
        """Keeps the bits."""
        self.bits.append(metrics["bits"])

    def evaluation(self, step, values):
        """Not used."""


def one_run(name: str, lr: float, seed: int, steps: int | None, corpus) -> dict:
    """Trains once; returns bits per byte on both halves of validation, time, curve."""
    values = {**MODEL, **OPTIMIZER[name], "optim.lr": lr}
    values |= {"train.seed": seed, "data.seed": seed}
    if steps:
        values["train.steps"] = steps
    config = run.load_config("dion", [f"--config.{k}={v}" for k, v in values.items()])
    method = papers.load("dion").make(config)
    grid = mesh.make_mesh()
    examples = text.Windows(corpus.train, config.data.context, config.data.seed)
    curve = Curve()
    began, cpu = time.perf_counter(), time.process_time()
    try:
        state = train.fit(
            method, examples, steps=config.train.steps, batch=config.data.batch,
            mesh=grid, seed=seed, report=curve,
        )  # fmt: skip
    except train.NonFiniteError:
        # Diverged: worse than anything, and said so in the record.
        return {
            "lr": lr,
            "seed": seed,
            "select": math.inf,
            "test": math.inf,
            "curve": [],
        }
    seconds = {
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu,
    }
    loss = jax.jit(lambda p, b: method.loss(p, b, jax.random.key(0)))

    def bits(stream):
        total = 0.0
        for batch in text.score_windows([stream], config.data.context, 64):
            value, metrics = loss(state.params, batch)
            total += float(value) * float(metrics["weight"])
        return text.bits_per_byte(total, int((stream < 256).sum()))

    stream = np.concatenate(corpus.validation)
    half = len(stream) // 2
    return {
        "lr": lr,
        "seed": seed,
        "select": bits(stream[:half]),
        "test": bits(stream[half:]),
        **{k: round(v, 2) for k, v in seconds.items()},
        "curve": [round(b, 4) for b in curve.bits],
    }


def choose(name: str, steps: int | None, corpus) -> tuple[float, list[dict]]:
    """Learning rate with the best selection loss, from a grid without it on an edge."""
    done: dict[float, dict] = {}
    todo = list(GRID[name])
    while todo:
        for lr in todo:
            done[lr] = one_run(name, lr, 0, steps, corpus)
            print(f"{name:9s} lr {lr:<8g} select {done[lr]['select']:.4f}", flush=True)
        best = min(done, key=lambda lr: done[lr]["select"])
        if len(done) > len(GRID[name]) + 4 or done[best]["select"] == math.inf:
            raise RuntimeError(f"{name}: no optimum inside {sorted(done)}")
        todo = []
        if best == max(done):
            todo = [best * 2]
        elif best == min(done):
            todo = [best / 2]
    return best, [done[lr] for lr in sorted(done)]


def draw(results: dict, path: Path) -> None:
    """Mean training curves, smoothed, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, result in results.items():
        curves = np.array([r["curve"] for r in result["runs"] if r["curve"]])
        kernel = np.ones(20) / 20
        smooth = np.array([np.convolve(c, kernel, "valid") for c in curves])
        steps = np.arange(smooth.shape[1]) + 20
        (line,) = axes[0].plot(steps, smooth.mean(0), label=name)
        axes[0].fill_between(
            steps, smooth.min(0), smooth.max(0), color=line.get_color(), alpha=0.2
        )
        rates = [
            (r["lr"], r["select"]) for r in result["grid"] if r["select"] < math.inf
        ]
        axes[1].plot(*zip(*rates), "o-", color=line.get_color(), label=name)
    ticks = sorted({r["lr"] for result in results.values() for r in result["grid"]})
    axes[1].set_xscale("log")
    axes[1].set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    axes[1].minorticks_off()
    axes[0].set(xlabel="step", ylabel="training bits per byte (20-step mean)")
    axes[0].set_ylim(top=4.5)
    axes[1].set(xlabel="learning rate", ylabel="selection bits per byte")
    axes[0].legend(frameon=False)
    for ax in axes:
        ax.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    steps = 30 if options.quick else None
    corpus = text.load()
    if options.quick:
        corpus = corpus._replace(validation=[corpus.validation[0][:40_000]])
    results = {}
    for name in OPTIMIZER:
        best, grid = choose(name, steps, corpus)
        runs = [r for r in grid if r["lr"] == best]
        runs += [one_run(name, best, seed, steps, corpus) for seed in SEEDS[1:]]
        tests = [r["test"] for r in runs]
        results[name] = {
            "lr": best,
            "mean": statistics.mean(tests),
            "spread": max(tests) - min(tests),
            "grid": [{k: v for k, v in r.items() if k != "curve"} for r in grid],
            "runs": runs,
        }
        print(
            f"{name:9s} lr {best:g}: {results[name]['mean']:.4f} bits per byte",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / Path(__file__).stem
    draw(results, stem.with_suffix(".png"))
    stream = np.concatenate(corpus.validation)
    record = {
        "question": __doc__.splitlines()[0],
        "command": "python benchmarks/dion_vs_adamw_muon.py"
        + (" --quick" if options.quick else ""),
        "model": MODEL,
        "scalar_lr": SCALAR_LR,
        "baselines_second_half": text.baselines(stream[len(stream) // 2 :]),
        "versions": {
            p: version(p) for p in ("jax", "jaxlib", "flax", "optax", "numpy")
        },
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "results": {
            name: {
                **result,
                "runs": [{**r, "curve": r["curve"][::10]} for r in result["runs"]],
            }
            for name, result in results.items()
        },
        "ratio_to_adamw": {
            n: r["mean"] / results["adamw"]["mean"] for n, r in results.items()
        },
    }
    text_record = json.dumps(record, indent=1).replace("Infinity", "null")
    stem.with_suffix(".json").write_text(text_record + "\n")
    print(f"wrote {stem}.json and .png")


if __name__ == "__main__":
    main()
