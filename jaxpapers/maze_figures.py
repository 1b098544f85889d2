"""Figures of agents in mazes: learning curves of all rows, paths between walls."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers import extras, plots

COLUMNS = 4


def learning(
    results: Sequence[Any], out: str | Path, *, metric: str, per_step: int = 1
) -> Path | None:
    """Draws a metric of every trained row over its updates: the mean and range of seeds.

    Args:
      results: see ``study.Results``.
      out: image file; not written if no run was evaluated before its end.
      metric: of the evaluations in the runs' ``metrics.jsonl``.
      per_step: updates of a step.
    """
    with extras.named():
        from matplotlib.figure import Figure

    name = f"{plots.VALIDATION}{metric}"
    lines = {}
    for result in results:
        runs = []
        for folder in result.folders:
            records = [r for r in plots.read_metrics(folder) if name in r]
            runs.append({r["step"] * per_step: r[name] for r in records})
        shared = sorted(set.intersection(*map(set, runs))) if runs else []
        if len(shared) > 1:
            values = np.array([[run[step] for step in shared] for run in runs], float)
            lines[result.row.label] = (shared, values)
    if not lines:
        return None
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (label, (steps, values)) in enumerate(lines.items()):
        style = {"color": f"C{i % 10}", "ls": "-" if i < 5 else "--"}
        axes.plot(
            steps, values.mean(0), label=label, lw=2.5 if i == 0 else 1.3, **style
        )
        if len(values) > 1:
            axes.fill_between(steps, values.min(0), values.max(0), alpha=0.12,
                              color=f"C{i % 10}", lw=0)  # fmt: skip
    seeds = max(len(v) for _, v in lines.values())
    axes.set_xlabel("updates")
    axes.set_ylabel(
        metric + (f", mean and range of {seeds} seeds" if seeds > 1 else "")
    )
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return plots.save(figure, out)


def paths(results: Sequence[Any], out: str | Path) -> Path | None:
    """Draws the paths of every row's first seed in its maze, a colour a context.

    Goal sets are shaded; a dot is a start, a cross the end of a path that missed.

    Args:
      results: with ``paths.npz``: ``walls`` (H, W), ``xy`` (T, N, 2) with NaN after the
        end, ``reached`` and ``label`` (N,), ``labels``, ``box`` (N, 4) and ``circle``
        (N, 3).
      out: image file; not written without such rows.
    """
    with extras.named():
        from matplotlib.figure import Figure

    drawn = {
        r.row.label: r.findings[0].files["paths.npz"]
        for r in results
        if "paths.npz" in r.findings[0].files
    }
    if not drawn:
        return None
    columns = min(len(drawn), COLUMNS)
    lines = -(-len(drawn) // columns)
    height, width = next(iter(drawn.values()))["walls"].shape
    side = 2.7
    figure = Figure(
        figsize=(max(side * columns, 5.4), side * lines * height / width + 0.7),
        layout="constrained",
    )
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axes, (label, files) in zip(panels, drawn.items()):
        _panel(axes, files)
        axes.set_title(label, fontsize=9)
    files = next(iter(drawn.values()))
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=f"C{i}", label=str(x))
        for i, x in enumerate(files["labels"])
    ]
    handles.append(Line2D([], [], color="black", marker="x", ls="", label="missed"))
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=6,
                  loc="outside lower center")  # fmt: skip
    return plots.save(figure, out)


def _panel(axes: Any, files: Any) -> None:
    """One row's maze and paths."""
    from matplotlib.patches import Circle, Rectangle

    walls = files["walls"]
    height, width = walls.shape
    x, y = width / 2, height / 2
    axes.imshow(walls, cmap="Greys", vmax=2, extent=(-x, x, -y, y), zorder=0)
    for i in range(len(files["label"])):
        colour = f"C{files['label'][i]}"
        box, circle = files["box"][i], files["circle"][i]
        if files["label"][i] not in files["label"][:i]:
            if np.isfinite(box).all():
                low, high = box[:2], box[2:]
                axes.add_patch(Rectangle(low, *(high - low), color=colour, alpha=0.25))
            if np.isfinite(circle).all():
                axes.add_patch(Circle(circle[:2], circle[2], color=colour, alpha=0.25))
        xy = files["xy"][:, i]
        xy = xy[np.isfinite(xy).all(1)]
        axes.plot(*xy.T, color=colour, lw=1)
        axes.plot(*xy[0], "o", color=colour, ms=3)
        if not files["reached"][i]:
            axes.plot(*xy[-1], "x", color="black", ms=5)
    axes.set_xlim(-x, x)
    axes.set_ylim(-y, y)
    axes.set_xticks([])
    axes.set_yticks([])
