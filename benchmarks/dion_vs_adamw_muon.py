"""Dion, AdamW, Muon and relatives on the standard library's text, each well tuned.

    python benchmarks/dion_vs_adamw_muon.py            the small model, 40 minutes
    python benchmarks/dion_vs_adamw_muon.py --model medium     4 layers of width 128
    ... --only muon,dion_4     these rows; the others of the JSON stay
    taskset -c 0 python ... --equal-time   then: known rows again, with the CPU time of
                               Muon's steps, on an idle machine
    ... --quick --out FOLDER   a few steps, to see that it works

One model, one stream of batches per seed. For each optimizer the learning rate of the
hidden matrices is chosen on GRID (factors of 2) by the loss on the first half of the
validation text with seed 0; everything that is no hidden matrix is trained by AdamW at
SCALAR_LR in all, except that AdamW's rows use one learning rate for all. If the best
value lies on an edge of the grid, the grid is extended until it does not. Then three
seeds are run at the chosen value and measured on the second half of the validation text,
which chose nothing; a byte is scored after a quarter of a window. ``ahead`` is Dion with
``nesterov``, ``residual=1`` and ``normalize_rows``, ``weight`` the same with
``residual=1.5``; dion_4 has a rank of 1/4 of the shorter side. ``--equal-time`` measures
the CPU time of a training step of every row in turn, and trains again at the chosen rate
for as many steps as take what Muon's took (a row of as many steps as before is not
trained again).
Writes results/dion_vs_adamw_muon.json (dion_medium_model.json) and .png beside this.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

# As the command line does, and before SciPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxpapers import mesh, papers, run, train  # noqa: E402
from jaxpapers.data import text  # noqa: E402

SMALL = {
    "data.context": 128,
    "data.batch": 8,
    "net.width": 96,
    "net.layers": 2,
    "net.heads": 2,
    "net.unroll": 2,
    "train.steps": 500,
    "optim.clip": 1.0,
    "optim.cooldown": 0.4,
}
MEDIUM = SMALL | {
    "net.width": 128,
    "net.layers": 4,
    "net.unroll": 4,
    "train.steps": 1600,
}
MODELS = {"small": SMALL, "medium": MEDIUM}
FILES = {"small": "dion_vs_adamw_muon", "medium": "dion_medium_model"}
SCALAR_LR = 0.01
MATRICES = (0.005, 0.01, 0.02, 0.04)
PLAIN = {"nesterov": False, "residual": 0.0, "normalize_rows": False}
AHEAD = {
    "nesterov": True,
    "residual": 1.0,
    "normalize_rows": True,
}
SHARES = (16, 4, 2, 1)
# Steps of a run whose time is measured.
TIMED = 60


def dion(share: int, **options) -> dict:
    """Fields of Dion with a rank of 1 / share."""
    return {"name": "dion", "rank_fraction": 1 / share, **options}


OPTIMIZER = {
    "adamw": {"name": "adamw", "scalar_lr": 0.0},
    "muon": {"name": "optax_muon"},
    "our_muon": {"name": "muon", "nesterov": True},
    "normuon": {"name": "normuon", "nesterov": True},
    "dion2_4": {"name": "dion2", "rank_fraction": 0.25},
    **{f"dion_{n}": dion(n, **PLAIN) for n in SHARES},
    **{f"ahead_{n}": dion(n, **AHEAD) for n in SHARES},
    "weight_4": dion(4, **AHEAD | {"residual": 1.5}),
}
GRID = {n: MATRICES for n in OPTIMIZER} | {"adamw": (0.002, 0.004, 0.008, 0.016)}
# The medium model's grid starts with one value and grows both ways.
START = {n: (0.01,) for n in OPTIMIZER} | {"adamw": (0.004,)}
SEEDS = (0, 1, 2)
OUT = Path(__file__).parent / "results"


class Curve:
    """Collects bits and CPU time of every step; a stand-in for ``report.Report``."""

    def __init__(self):
        """Empty."""
        self.bits: list[float] = []
        self.cpu: list[float] = []

    def start(self, *arguments):
        """Nothing to print."""

    def step(self, step, metrics):
        """Keeps the bits, and the time when they are there."""
        self.bits.append(metrics["bits"])
        self.cpu.append(time.process_time())

    def evaluation(self, step, values):
        """Not used."""


def one_run(name: str, lr: float, seed: int, corpus, model: dict, steps=None) -> dict:
    """Trains once; returns bits per byte on both halves of validation, time, curve.

    A run of `TIMED` steps is not evaluated and returns its time alone.
    """
    values = {**model, "optim.scalar_lr": SCALAR_LR, "optim.lr": lr}
    values |= {f"optim.{k}": v for k, v in OPTIMIZER[name].items()}
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
        # The last half: nothing is compiled there.
        "step_s": (curve.cpu[-1] - curve.cpu[half := len(curve.cpu) // 2])
        / (len(curve.cpu) - 1 - half),
    }
    if steps == TIMED:
        return seconds
    loss = jax.jit(lambda p, b: method.loss(p, b, jax.random.key(0)))

    def bits(stream):
        total = 0.0
        for batch in text.score_windows([stream], config.data.context, 64, 0.25):
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
        **{k: round(v, 4) for k, v in seconds.items()},
        "curve": [round(b, 4) for b in curve.bits],
    }


def choose(name: str, one, grid) -> tuple[float, list[dict]]:
    """Learning rate with the best selection loss, from a grid without it on an edge."""
    done: dict[float, dict] = {}
    todo = list(grid)
    while todo:
        for lr in todo:
            done[lr] = one(name, lr, 0)
            print(f"{name:9s} lr {lr:<8g} select {done[lr]['select']:.4f}", flush=True)
        best = min(done, key=lambda lr: done[lr]["select"])
        if len(done) > len(grid) + 4 or done[best]["select"] == math.inf:
            raise RuntimeError(f"{name}: no optimum inside {sorted(done)}")
        todo = []
        if best == max(done):
            todo = [best * 2]
        elif best == min(done):
            todo = [best / 2]
    return best, [done[lr] for lr in sorted(done)]


def equal_time(stem: Path, names: list[str], one) -> None:
    """Trains known rows for the CPU time of Muon's steps; adds that to the JSON.

    Args:
      stem: of the JSON.
      names: rows.
      one: of a run: (row, learning rate, seed, steps).
    """
    record = json.loads(stem.with_suffix(".json").read_text())
    rows = {n: record["results"][n] for n in ["muon", *names]}
    full = record["model"]["train.steps"]
    turns = [
        {n: one(n, row["lr"], 0, TIMED)["step_s"] for n, row in rows.items()}
        for _ in range(5)
    ]
    costs = {n: min(turn[n] for turn in turns) for n in rows}
    for name, seconds in costs.items():
        print(f"{name:9s} {1e3 * seconds:.1f} ms of CPU time a step", flush=True)
    for name, row in rows.items():
        steps = round(full * costs["muon"] / costs[name])
        tests = [r["test"] for r in row["runs"]]
        if steps != full:
            tests = [one(name, row["lr"], seed, steps)["test"] for seed in SEEDS]
        value = {
            "step_s": costs[name],
            "muon_step_s": costs["muon"],
            "cores": len(os.sched_getaffinity(0)),
            "steps": steps,
            "mean": statistics.mean(tests),
            "spread": max(tests) - min(tests),
        }
        print(f"{name:9s} {steps} steps: {value['mean']:.4f}", flush=True)
        with locked(stem):
            record = json.loads(stem.with_suffix(".json").read_text())
            record["results"][name]["equal_time"] = value
            stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


@contextlib.contextmanager
def locked(stem: Path) -> Iterator[None]:
    """Rows may be run at the same time: one of them writes."""
    with (Path(tempfile.gettempdir()) / f"{stem.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Rows of the picture and their labels; "ahead" are the options of ``jaxpapers run dion``.
DRAWN = {
    "adamw": "AdamW", "muon": "Muon (optax)", "dion_4": "Dion 1/4",
    "ahead_16": "Dion 1/16, ahead", "ahead_4": "Dion 1/4, ahead",
}  # fmt: skip


def draw(results: dict, path: Path) -> None:
    """Mean training curves, smoothed, with the spread over seeds; loss against rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for name in DRAWN:
        if name not in results:
            continue
        curves = np.array([r["curve"] for r in results[name]["runs"] if r["curve"]])
        kernel = np.ones(3) / 3
        smooth = np.array([np.convolve(c, kernel, "valid") for c in curves])
        steps = 10 * np.arange(1, smooth.shape[1] + 1)
        (line,) = axes[0].plot(steps, smooth.mean(0), label=DRAWN[name])
        axes[0].fill_between(
            steps, smooth.min(0), smooth.max(0), color=line.get_color(), alpha=0.2
        )
        rates = [(r["lr"], r["select"]) for r in results[name]["grid"] if r["select"]]
        axes[1].plot(*zip(*rates), "o-", color=line.get_color())
    for kind in ("dion", "ahead"):
        known = [n for n in SHARES if f"{kind}_{n}" in results]
        means = [results[f"{kind}_{n}"]["mean"] for n in known]
        if known:
            label = "Dion" if kind == "dion" else "Dion, ahead"
            axes[2].plot([1 / n for n in known], means, "o-", label=label)
    for name in ("muon", "adamw"):
        if name in results and axes[2].lines:
            axes[2].axhline(results[name]["mean"], ls=":", c="0.3")
            place = (1, results[name]["mean"])
            axes[2].annotate(DRAWN[name], place, ha="right", va="top")
    ticks = (0.002, 0.005, 0.01, 0.02, 0.04)
    axes[1].set_xscale("log")
    axes[1].set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes[1].minorticks_off()
    if axes[2].lines:
        axes[2].margins(y=0.08)  # Room for the lowest label.
        axes[2].set_xscale("log", base=2)
        axes[2].set_xticks([1 / n for n in SHARES], ["1/16", "1/4", "1/2", "1"])
    axes[0].set(xlabel="step", ylabel="training bits per byte (mean of 30 steps)")
    axes[0].set_ylim(top=4.5)
    axes[1].set(xlabel="learning rate", ylabel="selection bits per byte")
    axes[2].set(xlabel="rank / shorter side", ylabel="test bits per byte, 3 seeds")
    axes[0].legend(frameon=False)
    if axes[2].lines:
        axes[2].legend(frameon=False)
    for ax in axes:
        ax.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {p: version(p) for p in ("jax", "jaxlib", "flax", "optax", "numpy")}


def main() -> None:
    """Runs the rows that are asked for and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--only", default=",".join(OPTIMIZER))
    parser.add_argument("--equal-time", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = sorted(set(names) - set(OPTIMIZER))
    if unknown:
        parser.error(f"--only: got {unknown}, expected some of {list(OPTIMIZER)}")
    model, stem = MODELS[options.model], options.out / FILES[options.model]
    if options.quick and options.out == OUT:
        parser.error("--quick needs another --out: it measures nothing")
    corpus = text.load()
    if options.quick:
        corpus = corpus._replace(validation=[corpus.validation[0][:40_000]])

    def one(name, lr, seed, steps=None):
        steps = 30 if options.quick else steps
        return one_run(name, lr, seed, corpus, model, steps)

    if options.equal_time:
        equal_time(stem, [n for n in names if n != "muon"], one)
        return
    for name in names:
        start = GRID if options.model == "small" else START
        best, grid = choose(name, one, start[name])
        runs = [r for r in grid if r["lr"] == best]
        runs += [one(name, best, seed) for seed in SEEDS[1:]]
        tests = [r["test"] for r in runs]
        result = {
            "lr": best,
            "options": OPTIMIZER[name],
            "mean": statistics.mean(tests),
            "spread": max(tests) - min(tests),
            "cpu_s": statistics.mean(r["cpu_s"] for r in runs),
            "grid": [{k: v for k, v in r.items() if k != "curve"} for r in grid],
            "runs": [{**r, "curve": r["curve"][::10]} for r in runs],
        }
        print(f"{name:9s} lr {best:g}: {result['mean']:.4f} bits per byte", flush=True)
        write(stem, name, result, model, corpus, options.quick)
    print(f"wrote {stem}.json and .png")


def write(stem, name: str, result: dict, model: dict, corpus, quick: bool) -> None:
    """Puts a row into the JSON beside those of the same versions, and draws all."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    path, stream = stem.with_suffix(".json"), np.concatenate(corpus.validation)
    record = {
        "question": __doc__.splitlines()[0],
        "command": "python benchmarks/dion_vs_adamw_muon.py"
        + (" --model medium" if model == MEDIUM else "")
        + (" --quick" if quick else ""),
        "model": model,
        "scalar_lr": SCALAR_LR,
        "baselines_second_half": text.baselines(stream[len(stream) // 2 :]),
        "versions": versions(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "results": {},
    }
    with locked(stem):
        if path.exists():
            old = json.loads(path.read_text())
            if {k: old.get(k) for k in ("versions", "command")} == {
                k: record[k] for k in ("versions", "command")
            }:
                record["results"] = {
                    k: v for k, v in old["results"].items() if k in OPTIMIZER
                }
        record["results"][name] = result
        results = {k: record["results"][k] for k in OPTIMIZER if k in record["results"]}
        record["results"] = results
        if "muon" in results:
            record["above_muon"] = {
                k: v["mean"] - results["muon"]["mean"] for k, v in results.items()
            }
        text_record = json.dumps(record, indent=1).replace("Infinity", "null")
        path.write_text(text_record + "\n")
        draw(json.loads(text_record)["results"], stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
