"""What a study writes into its folder besides its runs: numbers, files, figures."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console

from jaxpapers import figures, plots, workdir
from jaxpapers.study import Results, Study


def write(summary: dict, results: Results, folder: Path) -> None:
    """``comparison.json``, and the files of the findings in the folders of their rows.

    Rows that train nothing, and those whose run is another row's too, have a folder
    below ``rows``; the paper's own row has the study's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    workdir.write(folder / "comparison.json", json.dumps(summary) + "\n")
    written: set[Path] = set()
    for i, result in enumerate(results):
        for j, finding in enumerate(result.findings):
            row = result.row
            label = f"{row.label}-{row.column}" if row.column else row.label
            place = folder / "rows" / re.sub(r"[^\w.=-]+", "-", label)
            place = folder if i == 0 else place
            place = place / f"seed{j}" if len(result.findings) > 1 else place
            if result.folders and result.folders[j] not in written:
                place = result.folders[j]
            if finding.files:
                written.add(place)
            for name, content in finding.files.items():
                place.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Mapping):
                    with workdir.replaced(place / name) as part:
                        np.savez(part, **content)
                else:
                    workdir.write(place / name, content)


def _panels(study, runs, levels) -> list[plots.Panel]:
    """The training curve, and beside it the metric where that is another one."""
    metric = f"{plots.VALIDATION}{study.metric}"
    if study.curve == study.metric:
        return [plots.Panel(runs, study.curve, study.unit, levels)]
    panels = [plots.Panel(runs, study.curve, study.unit)]
    if all(plots.has_metric(run, metric) for run in runs):
        panels.append(plots.Panel(runs, metric, study.title, levels))
    return panels


def draw(study: Study, results: Results, folder: Path, console: Console) -> None:
    """The study's figures; says so where matplotlib is missing."""
    own = results[0]
    try:
        untrained = [r for r in results if r.row.stage is None]
        levels = {r.row.label: x[0] for r in untrained if (x := r.values(study.metric))}
        # A run of no steps has no metrics.
        curves = [f for f in own.folders if plots.has_metric(f, study.curve)]
        if curves:
            plots.draw(_panels(study, curves, levels), folder / "loss.png")
        several = len(own.findings) > 1 or len([r for r in results if r.row.stage]) > 1
        if several or not own.folders:
            figures.comparison(study, results, folder / "comparison.png")
        if any(finding.curves for r in results for finding in r.findings):
            figures.curves(results, folder / "curves.png")
        for name, draw in study.pictures.items():
            draw(results, folder / name)
    except ModuleNotFoundError as e:
        console.print(f"figures not drawn: {e}")
