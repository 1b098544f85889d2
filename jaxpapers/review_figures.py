"""Figures of peer review: coefficients against their truth, citations by tenths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers import extras, plots


def coefficients(results: Sequence[Any], out: str | Path) -> None:
    """Draws each model's estimates with 95 % intervals beside the truth.

    Args:
      results: the first has a file ``coefficients.npz`` with ``names``, ``truth``,
        ``models``, ``coef``, ``low``, ``high`` (models, names).
      out: image file; nothing is drawn without the file.
    """
    arrays = results[0].findings[0].files.get("coefficients.npz")
    if arrays is None:
        return
    with extras.named():
        from matplotlib.figure import Figure

    names, models = list(arrays["names"]), list(arrays["models"])
    figure = Figure(figsize=(7, 1 + 0.8 * len(names)), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(names), dtype=float)
    for i, model in enumerate(models):
        shift = 0.16 * (i - (len(models) - 1) / 2)
        middle = arrays["coef"][i]
        axes.errorbar(
            middle, place + shift, fmt="o", ms=4, capsize=2, lw=1, label=str(model),
            xerr=[middle - arrays["low"][i], arrays["high"][i] - middle],
        )  # fmt: skip
    if np.isfinite(arrays["truth"]).all():
        axes.vlines(
            arrays["truth"], place - 0.35, place + 0.35, color="black", label="truth"
        )
    axes.axvline(0, color="grey", lw=0.8)
    axes.set_yticks(place, [str(x).replace("_", " ") for x in names])
    axes.invert_yaxis()
    axes.set_xlabel("coefficient of the z-score, 95 % interval")
    axes.grid(alpha=0.25, axis="x")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    plots.save(figure, out)


def deciles(results: Sequence[Any], out: str | Path) -> None:
    """Draws mean normalised citations by tenths of each regressor, 95 % intervals.

    Args:
      results: the first has a file ``deciles.npz`` with ``names`` and ``x``, ``mean``,
        ``low``, ``high`` (names, 10).
      out: image file; nothing is drawn without the file.
    """
    arrays = results[0].findings[0].files.get("deciles.npz")
    if arrays is None:
        return
    with extras.named():
        from matplotlib.figure import Figure

    names = list(arrays["names"])
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    row = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for i, (axes, name) in enumerate(zip(row, names)):
        tenth = np.arange(1, arrays["mean"].shape[1] + 1)
        axes.fill_between(tenth, arrays["low"][i], arrays["high"][i], alpha=0.2)
        axes.plot(tenth, arrays["mean"][i], ".-")
        axes.axhline(1, color="grey", lw=0.8, ls=":")
        axes.set(xlabel=f"tenth of {str(name).replace('_', ' ')}")
        axes.set_xticks(tenth[::3])
        axes.grid(alpha=0.25)
    row[0].set_ylabel("citations / mean of field and year")
    plots.save(figure, out)
