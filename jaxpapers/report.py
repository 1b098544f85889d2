"""What a run shows and writes: tables, a progress line, metrics."""

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jaxpapers.method import path_name
from jaxpapers.pace import Pace
from jaxpapers.trackers import Tracker


def make_console(quiet: bool = False) -> Console:
    """Console of the first process; wide lines where nothing is a terminal."""
    # Without markup: labels, paths and titles may hold square brackets.
    quiet = quiet or jax.process_index() > 0
    console = Console(quiet=quiet, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 120
    return console


def bold(text: str) -> Text:
    """Text in bold, as it is."""
    return Text(text, style="bold")


class Report:
    """Progress and metrics of one run; silent on all processes but the first."""

    def __init__(
        self,
        *,
        tokens_per_step: int,
        trackers: Sequence[Tracker] = (),
        quiet: bool = False,
        every: int = 10,
        unit: str = "tokens",
        eval_every: int = 0,
        console: Console | None = None,
    ):
        """Args: units of work per step and their name, trackers, steps between lines and
        between evaluations (0: only at the end)."""
        main = jax.process_index() == 0
        self.console = console or make_console(quiet=quiet)
        self.trackers = list(trackers) if main else []
        self._work, self._unit, self._every = tokens_per_step, unit, every
        self._live = self.console.is_terminal and not quiet and main
        self._cell: _Cell | None = None
        if self.console.is_jupyter and not quiet and main:
            self._cell = _Cell()
        self._progress: Progress | None = None
        self._pace: Pace | None = None
        self._eval_every = eval_every

    def start(self, compiled: Any, method: Any, first: int, steps: int) -> None:
        """Prints the parameter table and the memory of a step, starts the clock."""
        labels = method.labels(compiled.shapes.params) if method.labels else None
        self.console.print(parameter_table(compiled.shapes.params, labels))
        self.console.print(memory_line(compiled))
        if first:
            self.console.print(f"continuing from step {first}")
        for tracker in self.trackers:
            tracker.start(first)
        self._steps = steps
        self._pace = Pace(first, steps, self._eval_every, time.monotonic())
        if self._progress:  # Of an earlier part of the run.
            self._progress.stop()
        if self._live:
            self._progress = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "", total=steps, completed=first, text=""
            )
            self._progress.start()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of a finished step."""
        assert self._pace is not None
        self._pace.step(step, time.monotonic())
        rate, left = self._pace.rate, self._pace.seconds_left
        if step % self._every == 0 or step == self._steps:
            for tracker in self.trackers:
                tracker.write(step, {**metrics, "steps_per_second": round(rate, 4)})
        text = (
            f"loss {metrics['loss']:.4f}  {rate:.2f} steps/s  "
            f"{_short(rate * self._work)} {self._unit}/s  ETA {left:.0f} s"
        ) + ("" if self._pace.complete else " and evaluations")
        if self._progress:
            self._progress.update(self._task, completed=step, text=text)
        elif self._cell:
            self._cell.show(f"{step}/{self._steps}  {text}")
        elif step % max(self._steps // 20, 1) == 0 or step == self._steps:
            self.console.print(f"{step}/{self._steps}  {text}")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Takes the result of an evaluation."""
        if self._pace:  # None: no training in this call.
            self._pace.evaluation(time.monotonic())
        for tracker in self.trackers:
            tracker.write(step, values)
        shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        self.console.print(f"step {step}: {shown}")

    def picture(self, step: int, path: Path) -> None:
        """Takes a picture of the model at a step, a PNG file."""
        for tracker in self.trackers:
            tracker.picture(step, path)

    def close(self) -> None:
        """Stops the progress line and closes the trackers, all of them."""
        with contextlib.ExitStack() as closed:
            for tracker in reversed(self.trackers):
                closed.callback(tracker.close)
            if self._progress:
                self._progress.stop()

    def __enter__(self) -> "Report":
        """Closed at the end of the block."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Closes; what goes wrong then does not hide an error of the block."""
        try:
            self.close()
        except Exception as e:
            if error is None:
                raise
            self.console.print(f"a tracker was not closed: {e}")


class _Cell:
    """A line in the output of a notebook's cell that replaces itself."""

    def __init__(self):
        self._handle: Any = None

    def show(self, text: str) -> None:
        """Shows a line in place of the one before."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display({"text/plain": text}, raw=True, display_id=True)
        else:
            self._handle.update({"text/plain": text}, raw=True)


def parameter_table(params: Any, labels: Any = None) -> Table:
    """Path, shape, dtype, partition, bytes per device and optimizer of every leaf."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    names = jax.tree.leaves(labels) if labels is not None else [""] * len(flat)
    table = Table(box=None, pad_edge=False)
    for column in (
        "parameter",
        "shape",
        "dtype",
        "partition",
        "bytes/device",
        "optimizer",
    ):
        right = column == "bytes/device"
        table.add_column(column, justify="right" if right else "left", no_wrap=True)
    count = 0
    for (path, leaf), label in zip(flat, names):
        sharding = getattr(leaf, "sharding", None)
        local = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        spec = getattr(sharding, "spec", None)
        count += math.prod(leaf.shape)
        cells = (
            path_name(path),
            "x".join(map(str, leaf.shape)),
            str(leaf.dtype),
            "whole" if not spec else "(" + ", ".join(str(s or "-") for s in spec) + ")",
            f"{math.prod(local) * leaf.dtype.itemsize:,}",
            label,
        )
        table.add_row(*map(Text, cells))
    table.add_row("total", f"{count:,} parameters")
    return table


def memory_line(compiled: Any) -> str:
    """Bytes of parameters and optimizer state per device, and the step's peak."""

    def local_bytes(tree: Any) -> int:
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(tree)
        )

    analysis = compiled.executable.memory_analysis()
    temporary = _short(analysis.temp_size_in_bytes) + "B" if analysis else "n/a"
    cost = compiled.executable.cost_analysis() or {}
    flops = _short(cost["flops"]) if cost.get("flops", 0) > 0 else "n/a"
    return (
        f"per device: parameters {_short(local_bytes(compiled.shapes.params))}B, "
        f"optimizer {_short(local_bytes(compiled.shapes.opt_state))}B, "
        f"temporary {temporary}, {flops} FLOPs a step"
    )


def _short(value: int | float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            return f"{value:.3g} {unit}" if unit else f"{value:.0f} "
        value /= 1000
    return ""
