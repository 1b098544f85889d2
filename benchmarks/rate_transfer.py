"""Does a learning rate that is best at one width stay the best at others?

    python benchmarks/rate_transfer.py             all cells that are not done yet: hours
    python benchmarks/rate_transfer.py --optimizers dion --widths 64,128
    python benchmarks/rate_transfer.py --seeds 1 --out FILE    a part, on another core
    python benchmarks/rate_transfer.py --table --add FILE   with that part, as Markdown
    ... --quick                                    a few steps, to see that it works

The small model of ``dion_vs_adamw_muon.py`` at widths 64, 128 and 256, heads of 32,
everything else fixed: steps, batches, and one grid of learning rates for all widths. Dion
is at rank 1/4 with the options of ``jaxpapers run dion``; Muon is optax's. Learning rates
are those of the hidden matrices, all else is trained by AdamW at SCALAR_LR, but AdamW
uses one rate for all. The loss is that on the first half of the validation text, the mean
of the seeds. ``drift`` is the best rate at the largest width divided by that at the
smallest; ``price`` what the best rate of the smallest width costs at the largest, in bits
per byte above the best there. Writes results/rate_transfer.json (or --out) beside this.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

# First: it limits the threads of SciPy's libraries.
from dion_vs_adamw_muon import OUT, SMALL, one_run, versions

from jaxpapers.data import text

WIDTHS, SEEDS = (64, 128, 256), (0, 1, 2)
HEAD = 32
# Label -> row of ``dion_vs_adamw_muon.py``, learning rates.
OPTIMIZERS = {
    "dion": ("ahead_4", (0.005, 0.01, 0.02, 0.04)),
    "muon": ("muon", (0.005, 0.01, 0.02, 0.04)),
    "adamw": ("adamw", (0.002, 0.004, 0.008, 0.016)),
}


def summary(cells: list[dict]) -> dict:
    """Mean losses by optimizer, width and rate; best rates, drift and price.

    Args:
      cells: one run each; ``select`` is None where it diverged.

    Example:
      >>> losses = {(64, 1): 3.0, (64, 2): 2.5, (256, 1): 2.0, (256, 2): 2.125}
      >>> found = summary([
      ...     {"optimizer": "dion", "width": width, "lr": lr, "select": loss}
      ...     for (width, lr), loss in losses.items()
      ... ])["dion"]
      >>> found["best"], found["drift"], found["price"]
      ({64: 2, 256: 1}, 0.5, 0.125)
    """
    groups: dict[str, dict[int, dict[float, list[float]]]] = {}
    for c in cells:
        rates = groups.setdefault(c["optimizer"], {}).setdefault(c["width"], {})
        loss = math.inf if c["select"] is None else c["select"]
        rates.setdefault(c["lr"], []).append(loss)
    found = {}
    for name, widths in groups.items():
        means = {
            width: {lr: statistics.mean(x) for lr, x in sorted(rates.items())}
            for width, rates in sorted(widths.items())
        }
        best = {width: min(x, key=lambda lr, x=x: x[lr]) for width, x in means.items()}
        narrow, wide = best[min(best)], best[max(best)]
        losses = means[max(means)]
        found[name] = {
            "losses": means,
            "best": best,
            "drift": wide / narrow,
            "price": losses[narrow] - losses[wide] if narrow in losses else math.nan,
        }
    return found


def table(found: dict) -> str:
    """The summary as Markdown, the best rate of every width in bold."""
    lines = []
    for name, row in found.items():
        rates = sorted({lr for x in row["losses"].values() for lr in x})
        lines += [
            "| width | " + " | ".join(f"{name} {lr:g}" for lr in rates) + " |",
            "|---" * (len(rates) + 1) + "|",
        ]
        for width, losses in row["losses"].items():
            shown = [f"{losses[lr]:.3f}" if lr in losses else "" for lr in rates]
            at = rates.index(row["best"][width])
            shown[at] = f"**{shown[at]}**"
            lines.append(f"| {width} | " + " | ".join(shown) + " |")
        lines += [f"drift {row['drift']:g}, price {row['price']:.3f} bits", ""]
    return "\n".join(lines)


def write(path: Path, setting: dict, cells: list[dict]) -> None:
    """Writes the JSON, which has null for infinities."""
    record = setting | {"cells": cells, "summary": summary(cells)}
    content = json.dumps(record, indent=1).replace("Infinity", "null")
    path.write_text(content.replace("NaN", "null") + "\n")


def main() -> None:
    """Runs the cells that are not in the JSON, and summarises all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--add", type=Path, metavar="FILE", help="cells run elsewhere")
    parser.add_argument("--out", type=Path, default=OUT / "rate_transfer.json")
    options = parser.parse_args()
    setting = {"model": SMALL, "head": HEAD, "versions": versions()}
    cells: list[dict] = []
    if options.out.exists():
        record = json.loads(options.out.read_text())
        if not options.table and {k: record[k] for k in setting} != setting:
            parser.error(f"{options.out} is of another setting: remove it, or --out")
        cells = record["cells"]
    keys = ("optimizer", "width", "lr", "seed")
    done = {tuple(c[k] for k in keys) for c in cells}
    if options.add:
        other = json.loads(options.add.read_text())
        if other["model"] != SMALL or other["head"] != HEAD:
            parser.error(f"{options.add} is of another setting")
        new = [c for c in other["cells"] if tuple(c[k] for k in keys) not in done]
        cells += new
        write(options.out, setting, cells)
    if options.table:
        print(table(summary(cells)))
        return
    names = options.optimizers.split(",")
    if unknown := sorted(set(names) - set(OPTIMIZERS)):
        parser.error(f"--optimizers: got {unknown}, expected some of {[*OPTIMIZERS]}")
    corpus = text.load()
    if options.quick:
        corpus = corpus._replace(validation=[corpus.validation[0][:40_000]])
    done = {tuple(c[k] for k in keys) for c in cells}
    widths = [int(w) for w in options.widths.split(",")]
    todo = [
        (name, width, lr, seed)
        for seed in map(int, options.seeds.split(","))  # Every rate once first.
        for name in names
        for width in widths
        for lr in OPTIMIZERS[name][1]
        if (name, width, lr, seed) not in done
    ]
    for name, width, lr, seed in todo[:4] if options.quick else todo:
        model = SMALL | {"net.width": width, "net.heads": width // HEAD}
        steps = 10 if options.quick else None
        found = one_run(OPTIMIZERS[name][0], lr, seed, corpus, model, steps)
        select = found["select"] if math.isfinite(found["select"]) else None
        cell = dict(zip(keys, (name, width, lr, seed))) | {"select": select}
        cells.append(cell)
        print(cell, flush=True)
        write(options.out, setting, cells)
    print(table(summary(cells)))


if __name__ == "__main__":
    main()
