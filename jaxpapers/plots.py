"""Figures of runs and studies: metrics over steps, rows beside their baselines."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers import extras
from jaxpapers.workdir import replaced

# Metrics of evaluations have their name in front.
VALIDATION = "validation_"


def read_metrics(run: str | Path) -> list[dict]:
    """Records of ``metrics.jsonl`` in step order, the last of each step and kind.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a line is JSON and no record.
    """
    path = Path(run) / "metrics.jsonl" if Path(run).is_dir() else Path(run)
    if not path.exists():
        raise FileNotFoundError(
            f"no metrics.jsonl in {run}; train with --workdir={run}"
        )
    records: dict[tuple, dict] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # A line cut off by a kill.
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            raise ValueError(
                f"{path}, line {number}: no record of a run, expected an object with "
                f"an integer 'step', got {line[:60]!r}; remove the line"
            )
        kind = "+".join(sorted(record))  # Training, quick and full evaluation.
        records[record["step"], kind] = record
    return [records[k] for k in sorted(records)]


def has_metric(run: str | Path, metric: str) -> bool:
    """Whether a run recorded a metric."""
    return any(metric in record for record in read_metrics(run))


class Panel(NamedTuple):
    """A metric of some runs over the steps.

    Attributes:
      runs: workdirs.
      metric: name in ``metrics.jsonl``.
      label: of the vertical axis; "" for the metric's name.
      levels: name -> value of baselines, drawn as horizontal lines.
    """

    runs: Sequence[str | Path]
    metric: str
    label: str = ""
    levels: Mapping[str, float] = {}


def plot(runs: Sequence[str | Path], metric: str, out: str | Path) -> Path:
    """Draws a metric of one or more runs over the steps, a panel for each paper.

    Losses of two papers are two quantities: they have axes of their own.

    Args:
      runs: workdirs.
      metric: name in ``metrics.jsonl``.
      out: image file.

    Raises:
      ModuleNotFoundError: without matplotlib.
      ValueError: a run has no such metric.
    """
    papers: dict[str, list] = {}
    for run in runs:
        papers.setdefault(_paper(run), []).append(run)
    words = _words(metric)
    return draw(
        [Panel(x, metric, f"{name}: {words}" if len(papers) > 1 else words)
         for name, x in papers.items()],
        out,
    )  # fmt: skip


def draw(panels: Sequence[Panel], out: str | Path) -> Path:
    """Draws panels side by side; see ``plot``."""
    with extras.named():
        from matplotlib.figure import Figure

    # No global pyplot state.
    figure = Figure(figsize=(1 + 6 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        _draw_panel(axes, panel)
    return save(figure, out)


def _draw_panel(axes: Any, panel: Panel) -> None:
    metric, levels, shown = panel.metric, panel.levels, []
    for run in panel.runs:
        records = read_metrics(run)
        points = [(r["step"], r[metric]) for r in records if metric in r]
        if not points:
            known = sorted({k for r in records for k in r} - {"step", "time"})
            raise ValueError(f"{run} has no metric {metric!r}; it has {known}")
        for step, value in points:
            if isinstance(value, bool) or not isinstance(value, int | float):
                kind = type(value).__name__
                raise ValueError(
                    f"{run}: {metric!r} is {kind}, no number, at step {step}"
                )
        shown += [value for _, value in points]
        dots = {"marker": "D", "mec": "black"} if metric.startswith(VALIDATION) else {}
        (line,) = axes.plot(
            *zip(*points), lw=1, alpha=0.8, label=f"{Path(run).name}", **dots
        )
        for suffix, style, what in (("_quick", ".-", "part of "), ("", "D", "")):
            name = f"{VALIDATION}{metric}{suffix}"
            evaluated = [(r["step"], r[name]) for r in records if name in r]
            if evaluated:
                axes.plot(
                    *zip(*evaluated), style, color=line.get_color(), mec="black",
                    label=f"{Path(run).name}, {what}validation",
                )  # fmt: skip
    for (name, value), style in zip(levels.items(), (":", "--", "-.", "-") * 9):
        axes.axhline(value, color="grey", ls=style, lw=1, label=f"{name} {value:.4g}")
    if len(shown) > 20:  # The first steps would squeeze everything else.
        highest = sorted(shown)[int(0.97 * len(shown))]
        axes.set_ylim(top=1.1 * max([highest, *levels.values()]))
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.set(xlabel="step", ylabel=textwrap.fill(panel.label or _words(metric), 45))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(6, integer=True)


def _paper(run: str | Path) -> str:
    """The paper of a workdir; "" where no config.json says it."""
    try:
        stored = json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))
        return str(stored["paper"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


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
    with extras.named():
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
        axes.set(xlabel=_words(x), ylabel=_words(name))
        for v in log:
            _logarithmic(axes, v)
        if options != log:
            ends = axes.get_xlim()
            axes.plot(ends, ends, ":", color="grey", label="equal")
            axes.set_xlim(ends)
        axes.grid(alpha=0.25)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, fontsize=8, loc="outside upper center", ncols=5
    )
    return save(figure, out)


def _logarithmic(axes: Any, v: str) -> None:
    """A logarithmic axis whose ticks are few and plain numbers."""
    from matplotlib import ticker

    axes.set(**{f"{v}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[v]
    low, high = axis.get_view_interval()
    if high > 3 * low:
        many = high > 30 * low
        subs = (1,) if many else (1, 2, 3, 5, 7)
        axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=6))
    else:
        axis.set_major_locator(ticker.MaxNLocator(4))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def save(figure: Any, out: str | Path) -> Path:
    """Writes a figure as a whole.

    Raises:
      ValueError: a name without the suffix of a kind of image, or a folder.
    """
    suffix, known = Path(out).suffix[1:], figure.canvas.get_supported_filetypes()
    if suffix.lower() not in known or Path(out).is_dir():
        what = "is a folder" if Path(out).is_dir() else f"has the suffix {suffix!r}"
        raise ValueError(
            f"{out}: {what}, expected a file that ends in one of {', '.join(known)}"
        )
    with replaced(out) as part:
        figure.savefig(part, dpi=150)
    return Path(out)


def _drawn(x, y, log):
    """Whether a point can be drawn: finite, and positive on logarithmic axes."""
    low = {"x": x, "y": y}
    return np.isfinite([x, y]).all() and all(low[axis] > 0 for axis in log)


def _words(metric: str) -> str:
    return metric.removeprefix(VALIDATION).replace("_", " ")


def plot_samples(
    before: Mapping[str, Any] | None, after: Mapping[str, Any], out: str | Path
) -> Path:
    """Draws samples of a model, of what it started from, and data, side by side.

    Args:
      before: as ``after``, of the earlier model, drawn with the same noise; or None.
      after: ``samples`` (n, d) or images (n, H, W, C) in [-1, 1], ``data`` of the same
        kind, and for images optionally ``rows``, one name for each row of them, the
        data's too.
      out: image file.
    """
    with extras.named():
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
            axes.set_yticks([step * (i + 0.5) for i in range(len(names))], names)
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
    return save(figure, out)


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
