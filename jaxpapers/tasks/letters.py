"""The user's letters: parsed, coded and measured, a row each; regressions with citations.

``letters.csv`` has a line for each letter, ``points.csv`` one for each point with its
answer, ``<letter>.json`` the whole parse.
"""

import collections
import csv
import functools
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

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


ALL = "all letters"  # The first row.
MOST_ROWS = 50  # Of a table of what failed.


class Coded(NamedTuple):
    """Opinions of each letter, and how a language model came to them.

    Attributes:
      opinions: of each letter.
      lost: (letter, what, why) of reports that failed and opinions that were dropped.
      usage: what was asked and spent; "": the rules coded.
    """

    opinions: list[list[pr.Opinion]]
    lost: list[tuple[str, str, str]]
    usage: str


def read(paths: list[str], extract: Any = None) -> Data:
    """Parses files and the files of folders; those that cannot be are named.

    Args:
      paths: of letters.
      extract: the config's group; where it names a model, the summary says what coding
        is going to cost.

    Raises:
      ValueError: none can be parsed; a single file that cannot be.
    """
    files, skipped = {}, {}
    found = corpora.letters(paths)
    for label, path in zip(labels_of(found), found):
        try:
            files[label] = pr.parse_bytes(corpora.read_file(path))
        except (ValueError, OSError) as e:
            reason = str(e).removeprefix(f"{path}: ")
            if len(found) == 1:
                raise ValueError(f"{path}: {reason}") from e
            skipped[str(path)] = reason
    if not files:
        first = next(iter(skipped.items()))
        raise ValueError(
            f"none of {len(found)} files can be read; {first[0]}: {first[1]}"
        )
    points = sum(len(f.points) for f in files.values())
    summary = f"{len(files)} letters, {points} points, {len(skipped)} files skipped"
    facts: dict[str, Any] = {"files": files, "skipped": skipped}
    if extract is not None and extract.model:
        facts["coder"] = model_coder.Coder(extract)
        cost = facts["coder"].estimate(files.values())
        summary += (
            f"; {extract.model} codes them, at first {cost} (an estimate; linking the "
            "answers costs as much again)"
        )
    return Data(None, {}, facts=facts, summary=summary)


def labels_of(paths: list[Path]) -> list[str]:
    """A label for each file, no two alike: its name, with as much of its folders, or its
    suffix, as no other file has; the same file again is numbered.

    Example:
      >>> labels_of([Path(x) for x in ("/a/x.txt", "/b/x.txt", "/b/y.txt", "/b/y.xml")])
      ['a/x', 'b/x', 'y.txt', 'y.xml']
    """
    choices = []
    for path in paths:
        folders = path.absolute().parts[1:-1]
        starts = ["/".join((*folders[len(folders) - n :], "")).lstrip("/")
                  for n in range(len(folders) + 1)]  # fmt: skip
        choices.append([s + end for end in (path.stem, path.name) for s in starts])
    count = collections.Counter(x for own in choices for x in set(own))
    count[ALL] += 1
    made: list[str] = []
    for path, own in zip(paths, choices):
        label = next((x for x in own if count[x] == 1), None)
        number = 1
        while label is None or label in made:
            label = f"{path.name} ({number})"
            label = None if count[label] else label
            number += 1
        made.append(label)
    return made


def study(config: Any, data: Data, mesh: Any) -> Study:
    """A row for each letter, by pressure: summed strength of critical opinions."""
    del mesh
    files, skipped = data.facts["files"], data.facts["skipped"]

    @functools.cache
    def measured():
        coded = _coded(data.facts.get("coder"), files)
        return coded, numbers_of(list(files.values()), coded.opinions)

    def measure(i: int) -> Finding:
        numbers = measured()[1]
        return Finding(
            {k: float(v[i]) for k, v in numbers.items() if np.isfinite(v[i])}
        )

    def measure_all() -> Finding:
        given, numbers = measured()
        coded = given.opinions
        own = {k: float(numbers[k].sum()) for k in SUMS}
        kept: dict[str, Any] = {}
        for label, file in files.items():
            parse = json.dumps(pr.to_dict(file), ensure_ascii=False, indent=1)
            name = label.replace("/", "-")
            while f"{name}.json" in (*kept, "comparison.json"):
                name += "-"
            kept[f"{name}.json"] = parse + "\n"
        kept["letters.csv"] = _letters_csv(files, numbers)
        kept["points.csv"] = _points_csv(files, coded)
        tables = [_points_table(files, coded)]
        if skipped:
            tables.append(
                Table("files skipped", ("file", "why"), list(skipped.items()))
            )
        tables += _model_tables(given)
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
        return [Row(ALL, None, measure_all), *each]

    return Study(
        title="pressure (summed strength of critical opinions)",
        metric="pressure",
        rising=True,
        rows=rows,
        columns=COLUMNS,
    )


def _coded(coder: Any, files: dict) -> Coded:
    """Opinions of each file: of the rules, or of a language model where there is one."""
    if coder is None:
        return Coded([pr.rule_extract(f) for f in files.values()], [], "")
    opinions, lost = [], []
    for label, file in files.items():
        made = coder(file)
        opinions.append(made.opinions)
        for n, reviewer, why in made.failed:
            who = f"reviewer {reviewer}" if reviewer else "the editor"
            lost.append((label, f"round {n}, {who}", why))
        lost += [(label, f"opinion {quote[:60]!r}", why) for quote, why in made.dropped]
    return Coded(opinions, lost, coder.usage())


def _model_tables(coded: Coded) -> list[Table]:
    """What a language model left out, and what it took."""
    if not coded.usage:
        return []
    tables = [Table("language model", ("usage",), [(coded.usage,)])]
    if coded.lost:
        title = f"{len(coded.lost)} reports failed or opinions dropped"
        heads = ("letter", "what", "why")
        tables.append(Table(title, heads, coded.lost[:MOST_ROWS]))
    return tables


def numbers_of(files: list[pr.ReviewFile], coded: list[list[pr.Opinion]]) -> dict:
    """Measures of letters by name, (n,) each; NaN where one is not defined."""
    rounds = max(max((f.rounds for f in files), default=1), 1)
    seats = max((max((*f.reviewers, 0)) for f in files), default=0) + 1
    found = pr.measures(pr.opinions(coded), len(files), rounds, seats, editor=True)
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
    """Regressions of the letters' citations, where enough of them have some.

    Citations of a window of years where any letter has yearly counts, else of all years:
    never some of both.
    """
    known = corpora.citations(config.data.citations)
    years = config.method.window
    every = [known.get(corpora.bare_doi(f.paper.get("doi"))) for f in files.values()]
    yearly = any(c is not None and c.by_year for c in every)
    names = ("strength", "quality", "burden")
    rows, cites, field, year = [], [], [], []
    unknown = unmeasured = 0
    for i, (file, c) in enumerate(zip(files.values(), every)):
        if c is None:
            continue
        count = c.within(years) if yearly else c.total
        if count is None or c.year is None:
            unknown += 1
            continue
        stated = file.paper.get("year")
        if stated and abs(int(stated) - c.year) > 1:
            raise ValueError(
                f"{file.paper['doi']} is of {stated} by its letter and of {c.year} by "
                f"{config.data.citations}; correct one of them"
            )
        if not all(np.isfinite(numbers[k][i]) for k in names):
            unmeasured += 1
            continue
        rows.append(i)
        cites.append(float(count))
        field.append(c.field)
        year.append(c.year)
    kind = f"within {years} years" if yearly else "of all years"
    note = f"{len(rows)} of {len(files)} letters have citations {kind}"
    if unknown:
        note += f", of {unknown} they are not known"
    if unmeasured:
        note += f", {unmeasured} have no reviewer's opinion"
    if known.skipped:
        note += "".join(f", {n} {why}" for why, n in known.skipped.items())
    if len(rows) < LEAST_PAPERS:
        text = f"{note}; regressions need {LEAST_PAPERS}"
        return [Table("regressions of citations", ("",), [(text,)])], {}
    x = pr.standardise({k: numbers[k][rows] for k in names})
    fitted = models.fit(np.array(cites), x, field, year, missing="drop")
    heads, cells = models.columns(fitted), models.regression_rows(fitted, list(x))
    files_made = {
        "regressions.txt": models.text_table(heads, cells, models.NOTE),
        "regressions.tex": models.latex_table(heads, cells, models.NOTE),
    }
    return [Table(f"regressions of citations; {note}", heads, cells)], files_made
