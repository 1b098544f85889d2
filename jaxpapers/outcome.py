"""What a study found, for notebooks and scripts: rows, curves, pictures, a comparison.

``run.run`` returns an ``Outcome``; ``study.load`` reads one back from a folder. Both hold
what ``comparison.json`` holds and no model: that is in the folders of the rows
(``checkpoints``; ``jaxpapers export``).
"""

import base64
import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpapers import plots, tables, workdir
from jaxpapers.study import Finding, Result, Results, Row, Stage, Study

# Fields of a record besides the numbers of its row.
FIELDS = ("label", "column", "seed", "trained", "folder")
_FIELDS_OF_FILE = {
    "title": str,
    "metric": str,
    "rising": bool,
    "seeds": list,
    "rows": list,
}
# Bytes of a picture that a notebook is given whole.
_SHOWN = 2**20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A study after its measurements.

    Shown by a notebook as its table with the pictures below.

    Attributes:
      content: of ``comparison.json``, see ``summary``.
      folder: where it lies.
      seconds: that the call took; None for one that was read.
    """

    content: dict[str, Any] = dataclasses.field(repr=False)
    folder: Path
    seconds: float | None = None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A record for each row and seed: ``FIELDS``, and the row's numbers.

        As ``pandas.DataFrame`` and ``polars.DataFrame`` take them. ``folder`` is that of
        the training run, None where nothing was trained, ``seed`` None for a row that is
        measured once for all seeds; a number that is not finite is None.
        """
        return [
            {**own, **row["numbers"][j]}
            for row in self.content["rows"]
            for j, own in self._each(row)
        ]

    @property
    def curves(self) -> list[dict[str, Any]]:
        """A record for each point of ``curves.png``: ``FIELDS``, curve, member, x, y.

        ``member`` is that of a population, else None.
        """
        records = []
        for row in self.content["rows"]:
            for j, own in self._each(row):
                for name, (x, y) in row["curves"][j].items():
                    lines = (
                        enumerate(y) if y and isinstance(y[0], list) else [(None, y)]
                    )
                    records += [
                        {**own, "curve": name, "member": member, "x": a, "y": b}
                        for member, line in lines
                        for a, b in zip(x, line)
                    ]
        return records

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A record for each line of the runs' metrics.jsonl, after ``FIELDS``."""
        return [
            {**own, **record}
            for row in self.content["rows"]
            for j, own in self._each(row)
            if own["folder"] is not None and (own["folder"] / "metrics.jsonl").exists()
            for record in plots.read_metrics(own["folder"])
        ]

    @property
    def pictures(self) -> list[Path]:
        """Image files in the study's folder, by name."""
        return sorted(self.folder.glob("*.png"))

    @property
    def parts(self) -> tuple[Study, Results]:
        """The study and its results as ``tables`` and ``figures`` take them."""
        return parts(self.content, self.folder)

    def _each(self, row):
        for j in range(len(row["numbers"])):
            folder = self.folder / row["folders"][j] if row["folders"] else None
            alone = len(row["numbers"]) < len(self.content["seeds"])
            seed = None if alone else self.content["seeds"][j]
            values = (row["label"], row["column"], seed, row["trained"], folder)
            yield j, dict(zip(FIELDS, values))

    def __str__(self) -> str:
        """The table that ``jaxpapers run`` prints."""
        return tables.text_of(tables.comparison(*self.parts))

    def _repr_html_(self) -> str:
        """Table and pictures, complete in themselves."""
        study, results = self.parts
        table = tables.text_of(tables.comparison(study, results))
        shown = [f"<pre>{html.escape(table)}</pre>"]
        for path in self.pictures:
            name = html.escape(path.name)
            if path.stat().st_size > _SHOWN:
                shown.append(f"<p>{name}: {html.escape(str(path))}</p>")
                continue
            data = base64.b64encode(path.read_bytes()).decode()
            shown.append(
                f'<img alt="{name}" style="max-width:100%" '
                f'src="data:image/png;base64,{data}">'
            )
        return "\n".join(shown)


def summary(
    study: Study,
    results: Results,
    seeds: Sequence[int],
    root: Path,
    *,
    command: str = "",
    data: str = "",
) -> dict:
    """``comparison.json``: title, metric, seeds, and every number of every row.

    Args:
      study: what was compared.
      results: its rows.
      seeds: of the runs.
      root: folder that the rows' folders are given relative to.
      command: that ran it.
      data: what it read, in a line.

    Returns:
      Plain data. Numbers that JSON does not know (NaN, infinities) are null.
    """

    def relative(folder: Path) -> str:
        return str(folder.relative_to(root)) if folder.is_relative_to(root) else "."

    content = {
        "title": study.title,
        "command": command,
        "data": data,
        "metric": study.metric,
        "rising": study.rising,
        "unit": study.unit,
        "columns": list(study.columns),
        "errors": study.errors,
        "seeds": list(seeds),
        "rows": [
            {
                "label": r.row.label,
                "column": r.row.column,
                "trained": r.row.stage is not None,
                "folders": [relative(folder) for folder in r.folders],
                "numbers": [
                    {k: _finite(v) for k, v in f.numbers.items()} for f in r.findings
                ],
                "tables": [
                    {**t._asdict(), "rows": [list(map(_cell, x)) for x in t.rows]}
                    for t in r.findings[0].tables
                ],
                "curves": [
                    {k: _finite(xy) for k, xy in f.curves.items()} for f in r.findings
                ],
            }
            for r in results
        ],
    }
    # As the file gives it back: lists, and numbers of Python.
    return json.loads(json.dumps(content, default=lambda x: x.item()))


def load(folder: str | Path) -> Outcome:
    """The outcome that a run wrote into its folder.

    Raises:
      FileNotFoundError: no ``comparison.json`` there.
      ValueError: it is damaged; names the field.
    """
    place = workdir.local(folder, "WORKDIR")
    path = place / "comparison.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder} holds no finished study (no comparison.json); run it, or name the "
            "folder given as --workdir"
        ) from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}; {_REMEDY}") from e
    _check(path, content)
    return Outcome(content, place)


_REMEDY = "the same `run` command writes it anew"


def _check(path: Path, content: Any) -> None:
    """Raises ValueError for what ``summary`` does not write."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no study: expected an object; {_REMEDY}")
    for field, kind in _FIELDS_OF_FILE.items():
        if not isinstance(content.get(field), kind):
            raise ValueError(
                f"{path}: field {field!r} must be of type {kind.__name__}, got "
                f"{content.get(field)!r}; {_REMEDY}"
            )
    for i, row in enumerate(content["rows"]):
        fields = {"label": str, "column": str, "trained": bool, "folders": list,
                  "numbers": list, "tables": list, "curves": list}  # fmt: skip
        for field, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(field), kind):
                raise ValueError(
                    f"{path}: field 'rows[{i}].{field}' must be of type {kind.__name__}; "
                    f"{_REMEDY}"
                )
        for folder in row["folders"]:
            if (
                not (path.parent / folder)
                .resolve()
                .is_relative_to(path.parent.resolve())
            ):
                raise ValueError(
                    f"{path}: field 'rows[{i}].folders' leaves the study's folder, got "
                    f"{folder!r}; {_REMEDY}"
                )


def parts(content: dict[str, Any], folder: Path) -> tuple[Study, Results]:
    """Study and results without what trains and measures them.

    Args:
      content: see ``summary``.
      folder: of the study.
    """
    study = Study(
        title=content["title"],
        metric=content["metric"],
        rising=content["rising"],
        rows=lambda seed: [],
        columns=content.get("columns", ()),
        unit=content.get("unit", ""),
        errors=content.get("errors", False),
    )
    results = []
    for row in content["rows"]:
        stage = Stage("", None) if row["trained"] else None
        findings = [
            Finding(
                {k: float("nan") if v is None else v for k, v in numbers.items()},
                curves={k: tuple(xy) for k, xy in curves.items()},
            )
            for numbers, curves in zip(row["numbers"], row["curves"])
        ]
        folders = [folder / x for x in row["folders"]]
        results.append(
            Result(Row(row["label"], stage, Finding, row["column"]), findings, folders)
        )
    return study, results


def together(outcomes: Sequence[Outcome]) -> tuple[Study, Results]:
    """Several studies of one metric as one, their rows named by their folders.

    Rows that no study trains and that have the same numbers everywhere stand once.

    Raises:
      ValueError: no studies; studies of different metrics.
    """
    if not outcomes:
        raise ValueError("no studies to compare")
    first = outcomes[0].parts[0]
    for other in outcomes[1:]:
        study = other.parts[0]
        if (study.metric, study.rising) != (first.metric, first.rising):
            raise ValueError(
                f"{other.folder} measures {study.heading!r} by {study.metric!r}, "
                f"{outcomes[0].folder} {first.heading!r} by {first.metric!r}: compare "
                "studies of one metric"
            )
    names = _short([x.folder for x in outcomes])
    found: dict[Any, set] = {}  # What rows have found, the seeds that agree once.
    for outcome in outcomes:
        for result in outcome.parts[1]:
            numbers = dict.fromkeys(
                json.dumps(dict(f.numbers), sort_keys=True) for f in result.findings
            )
            trained = id(outcome) if result.row.stage else None
            found.setdefault(_key(result), set()).add((trained, *numbers))
    merged: dict[Any, Result] = {}
    for outcome, name in zip(outcomes, names):
        for result in outcome.parts[1]:
            if result.row.stage or len(found[_key(result)]) > 1:
                row = result.row._replace(label=f"{name}: {result.row.label}")
                result = result._replace(row=row)
            merged.setdefault(_key(result), result)
    titles = dict.fromkeys(x.parts[0].title for x in outcomes)
    columns = dict.fromkeys(c for x in outcomes for c in x.parts[0].columns)
    study = first._replace(title=" | ".join(titles), columns=list(columns))
    return study, list(merged.values())


def _key(result: Result) -> tuple[str, str]:
    return result.row.label, result.row.column


def _short(folders: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts_of = [x.resolve().parts for x in folders]
    for n in range(1, max(map(len, parts_of)) + 1):
        names = ["/".join(x[-n:]) for x in parts_of]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"a study is named twice: {', '.join(map(str, folders))}")


def _cell(value: Any) -> Any:
    """A table's cell: NumPy scalars as Python's, non-finite numbers as None."""
    value = value.item() if hasattr(value, "item") else value
    return _finite(value) if isinstance(value, float) else value


def _finite(value: Any) -> Any:
    if isinstance(value, Sequence) or getattr(value, "ndim", 0):
        return [_finite(v) for v in value]
    value = float(value)
    return value if math.isfinite(value) else None
