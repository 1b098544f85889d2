"""Test lengths, and figures of exact match over lengths and over steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers import extras, plots

SHARES = (0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.5, 2, 2.5, 3, 4)


def tested(trained: int, lengths: Sequence[int] = ()) -> list[int]:
    """Lengths to measure: those given, or shares of the largest training length.

    The training length, its double and its fourfold are among them.

    Example:
      >>> tested(10)
      [2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40]
    """
    chosen = lengths or [max(round(share * trained), 1) for share in SHARES]
    return sorted({*chosen, trained, 2 * trained, 4 * trained})


def by_length(results: Sequence[Any], path: str | Path, *, trained: int) -> Path:
    """Exact match of every row over the length; training lengths are shaded.

    A line is the mean over the seeds, thin lines are the seeds. The stopping rules of the
    first row are dashed.

    Args:
      results: see ``study.Results``.
      path: image file.
      trained: largest training length.
    """
    with extras.named():
        from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0.5, trained + 0.5, color="0.92", label="training lengths")
    name = "exact match against length"
    markers = "osD^vP*X"
    for i, result in enumerate(results):
        color, label = f"C{i}", result.row.label
        _line(axes, result, name, color, label, marker=markers[i % len(markers)])
    rules = [k for k in results[0].findings[0].curves if k.startswith(f"{name}, stop")]
    for rule, style in zip(rules, ("--", ":", "-.")):
        label = f"{results[0].row.label}, {rule.partition(', ')[2]}"
        _line(axes, results[0], rule, "black", label, ls=style, lw=1.2)
    axes.set(
        xlabel="length", ylabel="exact match", ylim=(-0.03, 1.03), xlim=(0.5, None)
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return plots.save(figure, path)


def by_step(results: Sequence[Any], path: str | Path) -> Path:
    """Exact match of the first row over the steps of the loop, a panel per length."""
    with extras.named():
        from matplotlib.figure import Figure

    start = "exact match against step, length "
    names = [k for k in results[0].findings[0].curves if k.startswith(start)]
    figure = Figure(figsize=(1 + 4.5 * max(len(names), 1), 3.6), layout="constrained")
    panels = figure.subplots(1, max(len(names), 1), squeeze=False)[0]
    for axes, name in zip(panels, names):
        for i, result in enumerate(r for r in results if name in r.findings[0].curves):
            _line(axes, result, name, f"C{i}", result.row.label)
        axes.axvline(
            int(name[len(start) :]), color="grey", lw=1, ls=":", label="length"
        )
        axes.set(xlabel="steps", ylabel="exact match", ylim=(-0.03, 1.03))
        axes.set_title(f"length {name[len(start) :]}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return plots.save(figure, path)


def _line(axes, result, name, color, label, **style) -> None:
    seeds = [f.curves[name] for f in result.findings if name in f.curves]
    if not seeds:
        return
    x, values = seeds[0][0], np.array([y for _, y in seeds], float)
    if len(values) > 1:
        for y in values:
            axes.plot(x, y, color=color, lw=0.6, alpha=0.4)
    style = {"lw": 1.8, "ms": 4, **style}
    axes.plot(x, values.mean(0), color=color, label=label, **style)
