"""Tables of a study of domains: means, standard errors, what was chosen."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.papers.nuclear_norm import select_loo
from jaxpapers.study import Results

WITHOUT = " without "
"""Before the name of a further domain that a row was not trained on."""


class Chosen(NamedTuple):
    """A method in a fold and seed, after the choice among its trials.

    Attributes:
      label: of the method.
      fold: name of the test domain.
      seed: number of the seed.
      accuracy: on the test domain.
      validation: on the training domains.
      trial: that had the best validation accuracy; the first of equals.
      hyper: its hyper-parameters.
    """

    label: str
    fold: str
    seed: int
    accuracy: float
    validation: float
    trial: int
    hyper: dict[str, float]


def chosen(results: Results) -> list[Chosen]:
    """The best trial of every method, fold and seed, by validation accuracy."""
    best: dict[tuple[str, str, int], Chosen] = {}
    for r in results:
        if WITHOUT in r.row.label:
            continue
        label, _, trial = r.row.label.partition(", trial ")
        for seed, finding in enumerate(r.findings):
            n = finding.numbers
            hyper = {
                k.removeprefix("hyper_"): v
                for k, v in n.items()
                if k.startswith("hyper_")
            }
            new = Chosen(
                label, r.row.column, seed, n["accuracy"], n["validation"],
                int(trial or 0), hyper,
            )  # fmt: skip
            key = new[:3]
            if key not in best or new.validation > best[key].validation:
                best[key] = new
    return list(best.values())


def write_csv(results: Results, out: str | Path) -> None:
    """A line for every method, fold and seed, with the hyper-parameters chosen."""
    rows = chosen(results)
    names = sorted({k for row in rows for k in row.hyper})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*Chosen._fields[:-1], *names])
    for row in rows:
        table.writerow([*row[:-1], *(row.hyper.get(k, "") for k in names)])
    Path(out).write_text(text.getvalue())


def write_loo(
    names: Sequence[str], folds: Sequence[int], results: Results, out: str | Path
) -> None:
    """The step that ``nuclear_norm.select_loo`` takes of the records of every method.

    Args:
      names: of all domains.
      folds: test domains.
      results: with rows that leave out every further domain in turn.
      out: CSV file.
    """
    rows = {(r.row.label, r.row.column): r.findings for r in results}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["label", "fold", "seed", "step", "accuracy", "validation"])
    for (label, column), findings in rows.items():
        if WITHOUT in label or ", trial " in label:
            continue
        fold = names.index(column) if column else folds[0]
        others = [e for e in range(len(names)) if e != fold]
        for seed, finding in enumerate(findings):
            files = {
                e: rows[f"{label}{WITHOUT}{names[e]}", column][seed].files["record.npz"]
                for e in others
            }
            own = finding.files["record.npz"]
            records = {e: f["record"] for e, f in files.items()}
            choice = select_loo(own["record"], (fold,), records)
            step = int(own["steps"][choice.index])
            table.writerow(
                [label, names[fold], seed, step, choice.accuracy, choice.validation]
            )
    Path(out).write_text(text.getvalue())


def write_text(results: Results, out: str | Path) -> None:
    """Mean +- standard error over seeds, in percent: methods by folds, and their mean."""
    Path(out).write_text(text(chosen(results)))


def text(rows: Sequence[Chosen]) -> str:
    """The table of ``write_text``."""
    labels = list(dict.fromkeys(r.label for r in rows))
    folds = list(dict.fromkeys(r.fold for r in rows))
    heads = [*(f or "accuracy" for f in folds), *(["mean"] if len(folds) > 1 else [])]
    lines = [["method", *heads]]
    for label in labels:
        own = [r for r in rows if r.label == label]
        by_fold = {f: [r.accuracy for r in own if r.fold == f] for f in folds}
        cells = [_cell(by_fold[f]) for f in folds]
        if len(folds) > 1:
            cells.append(_cell(np.mean(list(by_fold.values()), 0)))
        lines.append([label, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    count = max(r.seed for r in rows) + 1
    note = f"accuracy in %, mean and standard error of {count} seeds\n"
    return note + "".join(
        "  ".join(c.ljust(w) if not i else c.rjust(w)
                  for i, (c, w) in enumerate(zip(line, widths))).rstrip() + "\n"
        for line in lines
    )  # fmt: skip


def _cell(values: Any) -> str:
    values = 100 * np.asarray(values, float)
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{values.mean():.1f} +- {values.std(ddof=1) / len(values) ** 0.5:.1f}"
