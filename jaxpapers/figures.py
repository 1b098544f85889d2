"""Figures of a study: rows beside their baselines, curves, samples."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers import extras, plots


def comparison(study: Any, results: Sequence[Any], out: str | Path) -> Path | None:
    """Draws the metric of every seed of every trained row, the others as lines.

    A baseline that is far from all of them is named in the legend only, and of a model
    that is far from most its mean is written where the axis ends. The axis is at least
    5 % of the values long. Where nothing was trained, every row is drawn as a point.

    Args:
      study, results: see ``study.Study`` and ``study.Results``.
      out: image file; not written if no row has a finite value.
    """
    with extras.named():
        from matplotlib.figure import Figure

    trained = [r for r in results if r.row.stage] or list(results)
    runs = {_label(r): r.values(study.metric) for r in trained}
    runs = {k: [x for x in v if np.isfinite(x)] for k, v in runs.items()}
    runs = {label: values for label, values in runs.items() if values}
    if not runs:
        return None
    # The best on top, as in the table.
    ranked = sorted(runs, key=lambda k: np.mean(runs[k]), reverse=study.rising)
    runs = {label: runs[label] for label in ranked}
    levels = _levels(study, [r for r in results if r not in trained])
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(runs)), layout="constrained")
    axes = figure.subplots()
    means = np.array([sum(values) / len(values) for values in runs.values()])
    far = _far(means, [label == _label(trained[0]) for label in runs])
    shown: list[float] = []
    for i, values in enumerate(runs.values()):
        if far[i]:
            right = means[i] > np.median(means)
            text = f"{means[i]:.3g} →" if right else f"← {means[i]:.3g}"
            axes.text(
                0.99 if right else 0.01, i, text, va="center",
                ha="right" if right else "left", transform=axes.get_yaxis_transform(),
            )  # fmt: skip
            continue
        shown += values
        axes.plot(values, [i] * len(values), "o", color="C0", alpha=0.6)
        axes.plot(means[i], i, "|", color="black", ms=18)
    low, high = min(shown), max(shown)
    # Rows that agree to a per cent should look as if they did.
    least = 0.05 * max(abs(low), abs(high))
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
        axes.plot([low, high], [0, 0], " ")
    # Seeds of one model may be squeezed: how far it is from a baseline is the finding.
    room = (3 if len(runs) - sum(far) > 1 else 30) * (high - low or abs(high) or 1.0)
    for (name, value), style in zip(levels.items(), (":", "--", "-.", "-") * 9):
        label = f"{name} {value:.3f}"
        if low - room <= value <= high + room:
            axes.axvline(value, color="grey", ls=style, lw=1, label=label)
        else:  # It would squeeze the models into one spot.
            axes.plot([], [], " ", label=f"{label} (beyond the axis)")
    _widen(axes, 0.02)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set_ylim(len(runs) - 0.4, -0.6)
    axes.set_xlabel(textwrap.fill(study.heading, 64))
    axes.locator_params(axis="x", nbins=7)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.grid(alpha=0.25, axis="x")
    if levels:
        figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return plots.save(figure, out)


def curves(results: Sequence[Any], out: str | Path) -> Path:
    """Draws the curves of all rows: a panel a name, a line a row, the mean over seeds.

    The band is the range of seeds and members. Seeds whose x differ are drawn singly.

    Args:
      results: with ``Finding.curves``, whose names read "y against x".
      out: image file.
    """
    with extras.named():
        from matplotlib.figure import Figure

    names = list(dict.fromkeys(k for r in results for k in r.findings[0].curves))
    figure = Figure(figsize=(6 * len(names), 4.2), layout="constrained")
    row = figure.subplots(1, len(names), squeeze=False)[0]
    lines: dict[str, Any] = {}
    for axes, name in zip(row, names):
        for i, r in enumerate(results):
            if name not in r.findings[0].curves:
                continue
            seeds = [f.curves[name] for f in r.findings]
            curves = [(np.asarray(x, float), np.atleast_2d(y)) for x, y in seeds]
            dash = ("-", "--", ":")[i // 10 % 3]
            style = {"color": f"C{i % 10}", "ls": dash, "lw": 1.2}
            if not all(np.array_equal(c[0], curves[0][0]) for c in curves):
                for x, y in curves:
                    (lines[_label(r)],) = axes.plot(x, y.mean(0), **style)
                continue
            x, y = curves[0][0], np.concatenate([y for _, y in curves])
            (lines[_label(r)],) = axes.plot(x, y.mean(0), **style)
            if len(y) > 1:
                axes.fill_between(x, y.min(0), y.max(0), color=f"C{i % 10}", alpha=0.2)
        vertical, _, horizontal = name.partition(" against ")
        axes.set(xlabel=horizontal, ylabel=vertical)
        axes.grid(alpha=0.25)
    figure.legend(
        lines.values(), lines, frameon=False, fontsize=8, loc="outside right upper"
    )
    return plots.save(figure, out)


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
    for i, result in enumerate(results):
        label = result.row.label
        _curve_of(axes, result, name, f"C{i}", label, marker="osD^vP*X"[i % 8])
    rules = [k for k in results[0].findings[0].curves if k.startswith(f"{name}, stop")]
    for rule, style in zip(rules, ("--", ":", "-.")):
        label = f"{results[0].row.label}, {rule.partition(', ')[2]}"
        _curve_of(axes, results[0], rule, "black", label, ls=style, lw=1.2)
    axes.set(xlabel="length", ylabel="exact match", ylim=(-0.03, 1.03))
    axes.set_xlim(left=0.5)
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
            _curve_of(axes, result, name, f"C{i}", result.row.label)
        length = int(name[len(start) :])
        axes.axvline(length, color="grey", lw=1, ls=":", label="length")
        axes.set(xlabel="steps", ylabel="exact match", ylim=(-0.03, 1.03))
        axes.set_title(f"length {length}", fontsize=10)
        axes.locator_params(axis="x", integer=True)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    return plots.save(figure, path)


def _curve_of(axes, result, name, color, label, **style) -> None:
    seeds = [f.curves[name] for f in result.findings if name in f.curves]
    if not seeds:
        return
    x, values = seeds[0][0], np.array([y for _, y in seeds], float)
    if len(values) > 1:
        for y in values:
            axes.plot(x, y, color=color, lw=0.6, alpha=0.4)
    style = {"lw": 1.8, "ms": 4, **style}
    axes.plot(x, values.mean(0), color=color, label=label, **style)


def samples(results: Sequence[Any], out: str | Path) -> None:
    """Draws every trained row's samples beside those of the stage that it started from.

    The paper's own go to ``out``, the others into their folders.

    Args:
      results: with a file ``samples.npz``, see ``plots.plot_samples``.
      out: image file of the first seed of the paper's own row; each run's folder has a
        file of the same name.
    """
    for i, r in enumerate(results):
        for j, folder in enumerate(r.folders):
            arrays = r.findings[j].files.get("samples.npz")
            if arrays is None:
                continue
            before = _before(r.row.stage, results, j)
            plots.plot_samples(before, arrays, folder / Path(out).name)
            if (i, j) == (0, 0) and folder != Path(out).parent:
                plots.plot_samples(before, arrays, out)


def _before(stage: Any, results: Sequence[Any], seed: int) -> Any:
    """Samples of the run that a stage started from; None if there are none."""
    for r in results:
        if stage.after is not None and r.row.stage == stage.after:
            return r.findings[seed].files.get("samples.npz")
    start = stage.config.train.init_from
    path = Path(start) / "samples.npz" if start else None
    return np.load(path) if path and path.exists() else None


def against(
    results: Sequence[Any], out: str | Path, *, x: str, panels: Mapping[str, str]
) -> None:
    """``plots.plot_against`` for the trained rows whose evaluations have the metrics."""
    runs = {}
    for r in results:
        names = {
            k for f in r.folders for record in plots.read_metrics(f) for k in record
        }
        if {x, *panels} <= names:
            runs[_label(r)] = r.folders
    if runs:
        plots.plot_against(runs, x, panels, out)


def _widen(axes: Any, share: float) -> None:
    """A range of ``share`` of the values at least: rounding is not magnified."""
    low, high = axes.get_xlim()
    missing = share * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_xlim(low - missing / 2, high + missing / 2)


def _label(result: Any) -> str:
    row = result.row
    return f"{row.label}, {row.column}" if row.column else row.label


def _levels(study: Any, results: Sequence[Any]) -> dict[str, float]:
    """Means of rows that nothing was trained for."""
    values = {_label(r): r.values(study.metric) for r in results}
    return {label: sum(v) / len(v) for label, v in values.items() if v}


def _far(means, own):
    """Mask of outliers, never ``own``, that would compress the other means into a fifth
    of the axis."""
    apart = np.abs(means - np.median(means))
    far = apart > 8 * np.median(apart)
    far[own] = False
    near = np.ptp(means[~far])
    return far & (0 < near < np.ptp(means) / 5)


def images(rows: Mapping[str, Any], out: str | Path) -> Path:
    """Draws images (n, height, width, channels) of several kinds, a row each.

    Args:
      rows: name -> images, bytes or in [0, 1]; two channels are red and green.
      out: image file.
    """
    with extras.named():
        from matplotlib.figure import Figure

    count = max(len(x) for x in rows.values())
    figure = Figure(figsize=(0.8 * count + 1.6, 0.85 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes, (name, each) in zip(grid, rows.items()):
        each = np.asarray(each)
        each = each / 255 if each.dtype == np.uint8 else each
        if each.shape[-1] == 2:
            each = np.pad(each, ((0, 0), (0, 0), (0, 0), (0, 1)))
        for ax in axes:
            ax.axis("off")
        for ax, image in zip(axes, each):
            ax.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=1)
        axes[0].text(
            -0.15, 0.5, name, ha="right", va="center", transform=axes[0].transAxes
        )
    return plots.save(figure, out)


def mined(results: Sequence[Any], out: str | Path) -> None:
    """Draws the outliers that each row mined nearest to its boundary, a line a round.

    Known kinds have a coloured frame. The first seed of every row with ``mined.npz``: its
    ``image`` (rounds, n, H, W, C) uint8, ``round``, ``kind`` (rounds, n), ``kinds``.

    Args:
      results: see ``study.Results``.
      out: image file.
    """
    with extras.named():
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

    drawn = {
        _label(r): files["mined.npz"]
        for r in results
        if "mined.npz" in (files := r.findings[0].files)
    }
    if not drawn:
        return
    colours = ("white", "tab:orange", "tab:red", "tab:purple")
    first = next(iter(drawn.values()))
    rounds, count = first["kind"].shape
    figure = Figure(
        figsize=(0.5 + 0.42 * count, (0.42 * rounds + 0.5) * len(drawn) + 0.4),
        layout="constrained",
    )
    for axes, (label, arrays) in zip(figure.subplots(len(drawn), 1, squeeze=False)[:, 0],
                                     drawn.items()):  # fmt: skip
        sheet = _framed(arrays["image"], arrays["kind"], colours)
        axes.imshow(sheet, interpolation="nearest")
        step = len(sheet) / len(arrays["round"])
        places = [step * (i + 0.5) for i in range(len(arrays["round"]))]
        axes.set_yticks(places, [f"round {r + 1}" for r in arrays["round"]])
        axes.set_xticks([])
        axes.set_title(label, fontsize=9)
    shown = set(np.unique(np.concatenate([x["kind"] for x in drawn.values()])))
    patches = [
        Patch(color=colours[i], label=str(k))
        for i, k in enumerate(first["kinds"])
        if i and i in shown
    ]
    figure.legend(
        handles=patches, frameon=False, fontsize=8, loc="outside upper right", ncols=3
    )
    plots.save(figure, out)


def _framed(images: np.ndarray, kind: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """Images (rounds, n, H, W, C) in a sheet of colours, each in a frame of its kind."""
    from matplotlib.colors import to_rgb

    rounds, count, height, width, channels = images.shape
    frame = np.array([to_rgb(colours[k % len(colours)]) for k in range(kind.max() + 1)])
    sheet = np.ones((rounds, count, height + 6, width + 6, 3))
    sheet[:, :, 1:-1, 1:-1] = frame[kind][:, :, None, None]
    shown = np.broadcast_to(images / 255, (*images.shape[:4], 3))
    sheet[:, :, 3:-3, 3:-3] = shown
    sheet = sheet.transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rounds * (height + 6), count * (width + 6), 3)
