"""Figures of value functions: where an agent has been, and what it believes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers import extras, plots


def values(results: Sequence[Any], out: str | Path) -> Path | None:
    """Draws the transitions of the first row, a drawn value function, its actions.

    Args:
      results: with a file ``values.npz``: ``values`` and ``actions`` on a grid (n, m) of
        the first two inputs, or (1, m) of one; ``visited`` (k, 2) or (k, 1); ``path``
        (t, 2), of the last episode, which had ``steps``; ``names`` of the inputs, their
        bounds ``low`` and ``high``; ``sea``: the first input is a step, drawn
        downwards; ``title`` of the values.
      out: image file; not written where no row has such a file.
    """
    with extras.named():
        from matplotlib.figure import Figure

    found = [f for r in results for f in r.findings if "values.npz" in f.files]
    if not found:
        return None
    arrays = found[0].files["values.npz"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    draw = _one if len(arrays["values"]) == 1 else _two
    draw(figure, panels, arrays)
    return plots.save(figure, out)


def _two(figure: Any, panels: Any, arrays: Any) -> None:
    """Two inputs: maps."""
    low, high = arrays["low"], arrays["high"]
    sea, visited = bool(arrays["sea"]), arrays["visited"]
    maps = {str(arrays["title"]): arrays["values"]}
    action = "move right" if arrays["sea"] else "best action"
    maps[action] = np.asarray(arrays["actions"], float)
    if sea:
        extent = (-0.5, high[1] + 0.5, high[0] + 0.5, -0.5)
        size = len(arrays["values"])
        counts = np.zeros((size, size))
        cells = visited.round().astype(int)
        np.add.at(counts, (cells[:, 0], cells[:, 1]), 1)
        # Columns beyond the step cannot be reached.
        beyond = np.triu(np.ones((size, size), bool), 1)
        maps = {"transitions kept": np.log10(np.maximum(counts, 0.5)), **maps}
        maps = {k: np.where(beyond, np.nan, v) for k, v in maps.items()}
        names = ("column", "step")
    else:
        extent = (low[0], high[0], low[1], high[1])
        maps = {k: v.T for k, v in maps.items()}
        panels[0].plot(visited[:, 0], visited[:, 1], ".", ms=3, alpha=0.6)
        panels[0].set(
            title="transitions kept", xlim=extent[:2], ylim=extent[2:], aspect="auto"
        )
        names = tuple(map(str, arrays["names"]))
    for axes, (title, grid) in zip(panels[len(panels) - len(maps) :], maps.items()):
        levels = np.unique(grid[np.isfinite(grid)])
        discrete = title == action and len(levels) < 10
        image = axes.imshow(
            grid, extent=extent, origin="upper" if sea else "lower", aspect="auto",
            cmap="cividis" if discrete else "viridis", interpolation="nearest",
        )  # fmt: skip
        bar = figure.colorbar(image, ax=axes, ticks=levels if discrete else None)
        if title == "transitions kept":
            bar.set_label("log10")
        axes.set_title(title)
    path = arrays["path"][: int(arrays["steps"]) + (0 if sea else 1)]
    x, y = path[:, ::-1].T if sea else path.T
    panels[0].plot(x, y, color="C1", lw=1.5, label="last episode")
    panels[0].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.set(xlabel=names[0], ylabel=names[1])


def _one(figure: Any, panels: Any, arrays: Any) -> None:
    """One input: curves."""
    del figure
    x = np.linspace(arrays["low"][0], arrays["high"][0], arrays["values"].shape[1])
    panels[0].hist(arrays["visited"][:, 0], 40)
    (name,) = map(str, arrays["names"])
    panels[0].set(title="transitions kept", xlabel=name, ylabel="number")
    panels[1].plot(x, arrays["values"][0])
    panels[1].set(title=str(arrays["title"]), xlabel=name)
    panels[2].plot(x, arrays["actions"][0], ".")
    panels[2].set(title="best action", xlabel=name)
