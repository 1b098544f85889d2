"""Tables of a study for the terminal, and what they show in a sentence."""

import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxpapers.study import Result, Results, Study, ahead


def comparison(study: Study, results: Results) -> Table:
    """The study's metric, mean and spread over seeds; best rows first.

    Rows of several columns (test domains, folds) have a cell for each and their mean,
    with the standard error over seeds if the study asks for it.

    Args:
      study: title, metric, direction, further metrics.
      results: of its rows.
    """
    several = any(len(r.findings) > 1 for r in results if r.row.stage)
    columns = [c for c in dict.fromkeys(r.row.column for r in results) if c]
    extra = [c for c in study.columns if any(r.values(c) for r in results)]
    table = Table(box=None, pad_edge=False)
    table.add_column(Text(study.heading))
    headers = [*columns, "mean"] if columns else [study.metric if extra else ""]
    headers += ["max - min"] if several and not columns else []
    for header in (*headers, *extra):
        table.add_column(Text(header.replace("_", " ")), justify="right")
    cells: dict[str, dict[str, Result]] = {}
    for r in results:
        cells.setdefault(r.row.label, {})[r.row.column] = r
    means = {
        label: [_mean(r.values(study.metric)) for r in row.values()]
        for label, row in cells.items()
    }

    def rank(label: str) -> float:
        value = _mean(means[label])
        if not math.isfinite(value):
            return math.inf
        return -value if study.rising else value

    for label in sorted(cells, key=rank):
        row = cells[label]
        every = {c: row[c].values(study.metric) for c in columns if c in row}
        cell = _with_error if study.errors else _cell
        texts = [cell(every[c]) if c in every else "" for c in columns]
        if study.errors and columns:
            texts.append(cell(_over(every.values())))
        else:
            texts.append(_cell(means[label]))
        first = next(iter(row.values()))
        if several and not columns:
            values = first.values(study.metric)
            trained = first.row.stage is not None and len(values) > 1
            texts.append(f"{max(values) - min(values):.4f}" if trained else "")
        texts += [_cell(first.values(c)) for c in extra]
        style = "bold" if first is results[0] else None
        table.add_row(*map(Text, (label, *texts)), style=style)
    return table


def text_of(table: Table) -> str:
    """A table as it is printed where there is no terminal."""
    text = io.StringIO()
    console = Console(file=text, width=160, highlight=False, markup=False, emoji=False)
    console.print(table)
    return text.getvalue()


def verdict(study: Study, results: Results, expected: float | None) -> list[str]:
    """What the table shows, a line each: the expected value, and who beats this model.

    Args:
      study: title, metric, direction.
      results: of its rows.
      expected: the preset's value of the paper's own row; None: not known.
    """
    lines = []
    if expected is not None:
        lines.append(f"expected of {results[0].row.label}: about {expected:g}")
    better = ahead(study, results)
    if better:
        labels = ", ".join(f"{label} ({value:.4f})" for label, value in better.items())
        lines.append(f"better than {results[0].row.label} in this run: {labels}")
    return lines


def small_table(table: Any) -> Table:
    """A ``study.Table`` for the console."""
    title = Text(table.title, style="table.title")
    shown = Table(title=title, box=None, pad_edge=False, title_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(Text(str(column)), justify="right" if i else "left")
    for row in table.rows:
        shown.add_row(
            *(Text(f"{x:.4g}" if isinstance(x, float) else str(x)) for x in row)
        )
    return shown


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _over(columns: Iterable[Sequence[float]]) -> list[float]:
    """Means over the columns, seed by seed."""
    return [_mean(values) for values in zip(*columns)]


def _with_error(values: Sequence[float]) -> str:
    """A cell with the standard error of its mean, where there are several seeds."""
    n = len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return _cell(values)
    return f"{_cell(values)} ± {statistics.stdev(values) / n**0.5:.4f}"


def _cell(values: Sequence[float]) -> str:
    """Mean, to four decimals or six digits; empty for a row without the metric."""
    mean = _mean(values)
    return "" if not values else f"{mean:.4f}" if abs(mean) < 100 else f"{mean:.6g}"
