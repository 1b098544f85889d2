"""The user's letters: parsed, coded and measured, a row each; regressions with citations.

``letters.csv`` has a line for each letter, ``points.csv`` one for each point with its
answer, ``<letter>.json`` the whole parse.
"""

import csv
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers.data import reviews as corpora
from jaxpapers.papers import peer_review as pr
from jaxpapers.papers.peer_review import models
from jaxpapers.study import Data, Finding, Row, Study, Table
from jaxpapers.tasks import model_coder

LEAST_PAPERS = 30  # Below it, regressions of papers say nothing.
SUMS = ("points", "answered", "words_reviews", "words_replies")
COLUMNS = (
    "rounds", "reviewers", "points", "answered", "strength", "burden", "core_share",
    "disagreement", "agreement", "words_reviews", "words_replies",
)  # fmt: skip


def read(paths: list[str]) -> Data:
    """Parses files and the files of folders; those that cannot be are named.

    Raises:
      ValueError: none can be parsed; a single file that cannot be.
    """
    files, skipped = {}, {}
    found = corpora.letters(paths)
    for path in found:
        try:
            files[_name(path, files)] = pr.parse_bytes(corpora.read_file(path))
        except (ValueError, OSError) as e:
            if len(found) == 1:
                raise ValueError(f"{path}: {e}") from e
            skipped[str(path)] = str(e)
    if not files:
        first = next(iter(skipped.items()))
        raise ValueError(
            f"none of {len(found)} files can be read; {first[0]}: {first[1]}"
        )
    points = sum(len(f.points) for f in files.values())
    summary = f"{len(files)} letters, {points} points, {len(skipped)} files skipped"
    return Data(None, {}, facts={"files": files, "skipped": skipped}, summary=summary)


def _name(path: Path, known: dict) -> str:
    """A label for a file: its name, with its folder where names repeat."""
    return path.stem if path.stem not in known else f"{path.parent.name}/{path.stem}"


def study(config: Any, data: Data, mesh: Any) -> Study:
    """A row for each letter, by pressure: summed strength of critical opinions."""
    del mesh
    files, skipped = data.facts["files"], data.facts["skipped"]

    @functools.cache
    def measured():
        coded = _coded(config, files)
        return coded, numbers_of(list(files.values()), coded)

    def measure(i: int) -> Finding:
        numbers = measured()[1]
        return Finding(
            {k: float(v[i]) for k, v in numbers.items() if np.isfinite(v[i])}
        )

    def measure_all() -> Finding:
        coded, numbers = measured()
        own = {k: float(numbers[k].sum()) for k in SUMS}
        kept: dict[str, Any] = {}
        for label, file in files.items():
            parse = json.dumps(pr.to_dict(file), ensure_ascii=False, indent=1)
            kept[f"{label.replace('/', '-')}.json"] = parse + "\n"
        kept["letters.csv"] = _letters_csv(files, numbers)
        kept["points.csv"] = _points_csv(files, coded)
        tables = [_points_table(files, coded)]
        if skipped:
            tables.append(
                Table("files skipped", ("file", "why"), list(skipped.items()))
            )
        if config.data.citations:
            extra, more = _regressions(config, files, numbers)
            tables += extra
            kept |= more
        return Finding(own, tables, files=kept)

    def rows(seed):
        del seed
        each = [
            Row(label, None, functools.partial(measure, i))
            for i, label in enumerate(files)
        ]
        return [Row("all letters", None, measure_all), *each]

    return Study(
        title="pressure (summed strength of critical opinions)",
        metric="pressure",
        rising=True,
        rows=rows,
        columns=COLUMNS,
    )


def _coded(config: Any, files: dict) -> list[list[pr.Opinion]]:
    """Opinions of each file: of the rules, or of a language model where one is named."""
    if not config.extract.model:
        return [pr.rule_extract(f) for f in files.values()]
    coder = model_coder.Coder(config.extract)
    return [coder(f).opinions for f in files.values()]


def numbers_of(files: list[pr.ReviewFile], coded: list[list[pr.Opinion]]) -> dict:
    """Measures of letters by name, (n,) each; NaN where one is not defined."""
    rounds = max(max((f.rounds for f in files), default=1), 1)
    seats = max((max((*f.reviewers, 0)) for f in files), default=0) + 1
    found = pr.measures(pr.opinions(coded), len(files), rounds, seats)
    share = found.pop("share")
    return {
        **found,
        "first_round_share": share[:, 0],
        "rounds": np.array([f.rounds for f in files], float),
        "reviewers": np.array([len(f.reviewers) for f in files], float),
        "points": np.array([len(f.points) for f in files], float),
        "answered": np.array(
            [sum(any(x.reply for x in p.links) for p in f.points) for f in files], float
        ),
        "words_reviews": np.array(
            [f.words("point", "summary", "letter") for f in files], float
        ),
        "words_replies": np.array([f.words("reply", "response") for f in files], float),
    }


def _points_table(files: dict, coded: list) -> Table:
    """Types of opinions over all letters, with mean scores."""
    rows = []
    every = [o for own in coded for o in own]
    for kind in sorted({o.opinion_type for o in every}):
        own = [o for o in every if o.opinion_type == kind]
        answered = [o for o in own if o.response_type != "no_response"]
        rows.append(
            (kind, len(own), float(np.mean([o.strength for o in own])),
             float(np.mean([o.revision_cost for o in own])), len(answered),
             sum(o.response_type == "rebut" for o in own))
        )  # fmt: skip
    heads = ("opinion", "number", "strength", "cost", "answered", "rebutted")
    return Table(f"opinions of {len(files)} letters", heads, rows)


def _letters_csv(files: dict, numbers: dict) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["letter", "doi", "year", *numbers])
    for i, (label, file) in enumerate(files.items()):
        cells = [
            "" if not np.isfinite(v[i]) else f"{v[i]:.6g}" for v in numbers.values()
        ]
        writer.writerow([label, file.paper.get("doi", ""), file.paper.get("year", ""),
                         *cells])  # fmt: skip
    return out.getvalue()


def _points_csv(files: dict, coded: list) -> str:
    """A line for each opinion, with offsets of its quote: for coding by hand, too."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["letter", "id", "round", "reviewer", "start", "end", "type", "target",
         "polarity", "strength", "constructiveness", "quality", "revision_cost",
         "response_type", "quote", "reply"]
    )  # fmt: skip
    for label, own in zip(files, coded):
        for o in own:
            writer.writerow(
                [label, o.id, o.round, o.reviewer, o.span.start if o.span else "",
                 o.span.end if o.span else "", o.opinion_type, o.target, o.polarity,
                 o.strength, o.constructiveness, o.quality, o.revision_cost,
                 o.response_type, o.quote, o.response_quote or ""]
            )  # fmt: skip
    return out.getvalue()


def _regressions(config: Any, files: dict, numbers: dict) -> tuple[list, dict]:
    """Regressions of the letters' citations, where enough of them have some."""
    known = corpora.citations(config.data.citations)
    years = config.method.window
    rows, cites, field, year = [], [], [], []
    for i, file in enumerate(files.values()):
        c = known.get(corpora.bare_doi(file.paper.get("doi")))
        count = None if c is None else (c.within(years) if c.by_year else c.total)
        if c is None or count is None or c.year is None:
            continue
        stated = file.paper.get("year")
        if stated and abs(int(stated) - c.year) > 1:
            raise ValueError(
                f"{file.paper['doi']} is of {stated} by its letter and of {c.year} by "
                f"{config.data.citations}; correct one of them"
            )
        rows.append(i)
        cites.append(float(count))
        field.append(c.field)
        year.append(c.year)
    note = f"{len(rows)} of {len(files)} letters have citations"
    if len(rows) < LEAST_PAPERS:
        text = f"{note}; regressions need {LEAST_PAPERS}"
        return [Table("regressions of citations", ("",), [(text,)])], {}
    names = ("strength", "quality", "burden")
    x = pr.standardise({k: numbers[k][rows] for k in names})
    fitted = models.fit(np.array(cites), x, field, year, missing="drop")
    heads, cells = models.columns(fitted), models.regression_rows(fitted, list(x))
    files_made = {
        "regressions.txt": models.text_table(heads, cells, models.NOTE),
        "regressions.tex": models.latex_table(heads, cells, models.NOTE),
    }
    return [Table(f"regressions of citations; {note}", heads, cells)], files_made
