"""Figures of runs and studies: metrics over steps, rows beside their baselines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read_metrics(run: str | Path) -> list[dict]:
    """Records of ``metrics.jsonl`` in step order, the last of each step and kind.

    Raises:
      FileNotFoundError: no such file.
    """
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise FileNotFoundError(
            f"no metrics.jsonl in {run}; train with --workdir={run}"
        )
    records: dict[tuple, dict] = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # A line cut off by a kill.
        kind = "+".join(sorted(record))  # Training, quick and full evaluation.
        records[record["step"], kind] = record
    return [records[k] for k in sorted(records)]


def plot(
    runs: Sequence[str | Path], metric: str, out: str | Path, levels: dict | None = None
) -> Path:
    """Draws a metric of one or more runs over the steps, with horizontal levels.

    Args:
      runs: workdirs.
      metric: name in ``metrics.jsonl``.
      out: image file.
      levels: name -> value of baselines.

    Raises:
      ModuleNotFoundError: without matplotlib.
      ValueError: a run has no such metric.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")  # No global pyplot state.
    axes = figure.subplots()
    shown: list[float] = []
    for run in runs:
        records = read_metrics(run)
        points = [(r["step"], r[metric]) for r in records if metric in r]
        if not points:
            known = sorted({k for r in records for k in r} - {"step", "time"})
            raise ValueError(f"{run} has no metric {metric!r}; it has {known}")
        shown += [value for _, value in points]
        (line,) = axes.plot(*zip(*points), lw=1, alpha=0.8, label=f"{Path(run).name}")
        for suffix, style, what in (("_quick", ".-", "part of "), ("", "D", "")):
            name = f"validation_{metric}{suffix}"
            evaluated = [(r["step"], r[name]) for r in records if name in r]
            if evaluated:
                axes.plot(
                    *zip(*evaluated), style, color=line.get_color(), mec="black",
                    label=f"{Path(run).name}, {what}validation",
                )  # fmt: skip
    for (name, value), style in zip((levels or {}).items(), (":", "--", "-.", "-") * 9):
        axes.axhline(value, color="grey", ls=style, lw=1, label=f"{name} {value:.2f}")
    if len(shown) > 20:  # The first steps would squeeze everything else.
        highest = sorted(shown)[int(0.97 * len(shown))]
        axes.set_ylim(top=1.1 * max([highest, *(levels or {}).values()]))
    axes.set(xlabel="step", ylabel=metric.replace("_", " "))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=150)
    return Path(out)


def plot_comparison(study: Any, results: Sequence[Any], out: str | Path) -> Path:
    """Draws the metric of every seed of every trained row, the others as lines.

    A baseline that is far from all of them is named in the legend only, and of a model
    that is far from most its mean is written where the axis ends. Where nothing was
    trained, every row is drawn as a point.

    Args:
      study, results: see ``study.Study`` and ``study.Results``.
      out: image file.
    """
    from matplotlib.figure import Figure

    trained = [r for r in results if r.row.stage] or list(results)
    runs = {_label(r): r.values(study.metric) for r in trained}
    runs = {k: [x for x in v if np.isfinite(x)] for k, v in runs.items()}
    runs = {label: values for label, values in runs.items() if values}
    levels = _levels(study, [r for r in results if r not in trained])
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(runs)), layout="constrained")
    axes = figure.subplots()
    means = np.array([sum(values) / len(values) for values in runs.values()])
    far = _far(means)
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
    room = 3 * (high - low or abs(high) or 1.0)
    for (name, value), style in zip(levels.items(), (":", "--", "-.", "-") * 9):
        label = f"{name} {value:.3f}"
        if low - room <= value <= high + room:
            axes.axvline(value, color="grey", ls=style, lw=1, label=label)
        else:  # It would squeeze the models into one spot.
            axes.plot([], [], " ", label=f"{label} (beyond the axis)")
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set_ylim(-0.6, len(runs) - 0.4)
    axes.set_xlabel(study.title)
    axes.grid(alpha=0.25, axis="x")
    if levels:
        figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    figure.savefig(out, dpi=150)
    return Path(out)


def plot_curves(results: Sequence[Any], out: str | Path) -> Path:
    """Draws the curves of all rows: a panel a name, a line a row, the mean over seeds.

    The band is the range of the seeds. Seeds whose x differ are drawn one by one.

    Args:
      results: with ``Finding.curves``, whose names read "y against x".
      out: image file.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(k for r in results for k in r.findings[0].curves))
    figure = Figure(figsize=(6 * len(names), 4.2), layout="constrained")
    row = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(row, names):
        drawn = [r for r in results if name in r.findings[0].curves]
        for i, r in enumerate(drawn):
            curves = [np.asarray(f.curves[name], float) for f in r.findings]
            style = {
                "color": f"C{i % 10}",
                "ls": ("-", "--", ":")[i // 10 % 3],
                "lw": 1.2,
            }
            same = all(np.array_equal(c[0], curves[0][0]) for c in curves)
            if not same:
                for j, (x, y) in enumerate(curves):
                    axes.plot(x, y, label=None if j else _label(r), **style)
                continue
            x, y = curves[0][0], np.stack([c[1] for c in curves])
            axes.plot(x, y.mean(0), label=_label(r), **style)
            if len(y) > 1:
                axes.fill_between(
                    x, y.min(0), y.max(0), color=style["color"], alpha=0.2
                )
        vertical, _, horizontal = name.partition(" against ")
        axes.set(xlabel=horizontal, ylabel=vertical)
        axes.grid(alpha=0.25)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(out, dpi=150)
    return Path(out)


def plot_study_samples(results: Sequence[Any], out: str | Path) -> None:
    """Draws every trained row's samples beside those of the stage that it started from.

    The paper's own go to ``out``, the others into their folders.

    Args:
      results: with a file ``samples.npz``, see ``plot_samples``.
      out: image file.
    """
    for i, r in enumerate(results):
        arrays = r.findings[0].files.get("samples.npz")
        if arrays is None:
            continue
        start = r.row.stage.after
        before = [x for x in results if start and x.row.stage == start]
        plot_samples(
            before[0].findings[0].files["samples.npz"] if before else None,
            arrays,
            out if i == 0 else r.folders[0] / Path(out).name,
        )


def plot_study_against(
    results: Sequence[Any], out: str | Path, *, x: str, panels: Mapping[str, str]
) -> None:
    """``plot_against`` for the trained rows whose evaluations have the metrics."""
    runs = {}
    for r in results:
        names = {k for f in r.folders for record in read_metrics(f) for k in record}
        if {x, *panels} <= names:
            runs[_label(r)] = r.folders
    if runs:
        plot_against(runs, x, panels, out)


def _label(result: Any) -> str:
    row = result.row
    return f"{row.label}, {row.column}" if row.column else row.label


def _levels(study: Any, results: Sequence[Any]) -> dict[str, float]:
    """Means of rows that nothing was trained for."""
    values = {_label(r): r.values(study.metric) for r in results}
    return {label: sum(v) / len(v) for label, v in values.items() if v}


def _far(means):
    """Which models would squeeze the others into a fifth of the axis; never the first."""
    apart = np.abs(means - np.median(means))
    far = apart > 8 * np.median(apart)
    far[:1] = False
    near = np.ptp(means[~far])
    return far & (0 < near < np.ptp(means) / 5)


def plot_against(
    runs: Mapping[str, Sequence[str | Path]],
    x: str,
    panels: Mapping[str, str],
    out: str | Path,
) -> Path:
    """Draws evaluations against each other, a panel for each metric, a colour a model.

    Args:
      runs: model -> workdirs of its seeds; a line each, a dot per evaluation.
      x: metric on the horizontal axis, e.g. "validation_path_kl". Points that are
        infinite, or not positive on a logarithmic axis, are left out.
      panels: metric on the vertical axis -> which axes are logarithmic, of "xy", and "="
        for the line where both metrics are equal.
      out: image file.

    Raises:
      ValueError: a run without such evaluations.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, options) in zip(row, panels.items()):
        log = options.removesuffix("=")
        for i, (label, folders) in enumerate(runs.items()):
            for j, folder in enumerate(folders):
                records = [r for r in read_metrics(folder) if x in r and name in r]
                if not records:
                    raise ValueError(f"{folder} has no evaluations of {x} and {name}")
                points = [
                    (r[x], r[name]) for r in records if _drawn(r[x], r[name], log)
                ]
                if not points:
                    continue
                axes.plot(
                    *zip(*points), ".-", color=f"C{i}", lw=0.8, alpha=0.7,
                    label=None if j else label,
                )  # fmt: skip
                axes.plot(*points[-1], "D", color=f"C{i}", mec="black")
        scales = {f"{v}scale": "log" for v in log}
        axes.set(xlabel=_words(x), ylabel=_words(name), **scales)
        if options != log:
            ends = axes.get_xlim()
            axes.plot(ends, ends, ":", color="grey", label="equal")
            axes.set_xlim(ends)
        axes.grid(alpha=0.25)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=8, loc="outside upper center", ncols=5
    )
    figure.savefig(out, dpi=150)
    return Path(out)


def _drawn(x, y, log):
    """Whether a point can be drawn: finite, and positive on logarithmic axes."""
    low = {"x": x, "y": y}
    return np.isfinite([x, y]).all() and all(low[axis] > 0 for axis in log)


def _words(metric: str) -> str:
    return metric.removeprefix("validation_").replace("_", " ")


def plot_samples(
    before: Mapping[str, Any] | None, after: Mapping[str, Any], out: str | Path
) -> Path:
    """Draws samples of a model, of what it started from, and data, side by side.

    Args:
      before: as ``after``, of the earlier model, drawn with the same noise; or None.
      after: ``samples`` (n, d) or images (n, H, W, C) in [-1, 1], ``data`` of the same
        kind, and for images optionally ``rows``, one name for each row of them.
      out: image file.
    """
    from matplotlib.figure import Figure

    panels = {} if before is None else {"before": before["samples"]}
    panels |= {"samples": after["samples"], "data": after["data"]}
    names = [str(x) for x in after["rows"]] if "rows" in after else []
    figure = Figure(figsize=(4 * len(panels), 4.2), layout="constrained")
    share = np.ndim(after["data"]) == 2
    row = figure.subplots(1, len(panels), squeeze=False, sharex=share, sharey=share)[0]
    for axes, (title, x) in zip(row, panels.items()):
        axes.set_title("after" if before is not None and title == "samples" else title)
        if np.ndim(x) == 4:
            sheet = contact_sheet(x, len(names) or round(len(x) ** 0.5))
            axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            step = sheet.shape[0] / max(len(names), 1)
            # Real images are not in the rows of the prompts.
            shown = names if title != "data" else []
            axes.set_yticks([step * (i + 0.5) for i in range(len(shown))], shown)
            axes.set_xticks([])
        elif np.shape(x)[1] == 1:
            axes.hist(after["data"][:, 0], 60, density=True, color="darkgrey")
            if title != "data":
                axes.hist(x[:, 0], 60, density=True, color="C0", histtype="step")
        else:
            data = after["data"]
            axes.plot(data[:, 0], data[:, 1], ".", ms=2, color="darkgrey")
            if title != "data":
                axes.plot(x[:, 0], x[:, 1], ".", ms=2, color="C0", alpha=0.6)
            axes.set_aspect("equal")
    figure.savefig(out, dpi=150)
    return Path(out)


def contact_sheet(images: Any, rows: int) -> np.ndarray:
    """Images (n, H, W, C) in [-1, 1] side by side, with a gap of a pixel, in [0, 1].

    Grey images become (height, width), colour images (height, width, 3). Images that do
    not fill the last column are left out.
    """
    x = np.clip((np.asarray(images) + 1) / 2, 0, 1)
    columns = len(x) // rows
    x = np.pad(
        x[: rows * columns], ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=0.5
    )
    _, height, width, channels = x.shape
    x = x.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    sheet = x.reshape(rows * height, columns * width, channels)[:-1, :-1]
    return sheet[..., 0] if channels == 1 else sheet
