"""Generated papers and reviews with known truth; letters of the user's own.

Nothing is trained: rows are extractors, compared by the rank correlation of their
strength with the truth. The first row prints what the regressions recover.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxpapers import review_figures
from jaxpapers.data import reviews as corpora
from jaxpapers.ops import agreement, hypothesis
from jaxpapers.papers import peer_review as pr
from jaxpapers.papers.peer_review import models, rules, schema
from jaxpapers.papers.peer_review import world as worlds
from jaxpapers.study import Data, Finding, Row, Study, Table
from jaxpapers.tasks import letters, model_coder


def abstract(config: Any) -> Data:
    """Nothing is trained: no batches."""
    del config
    return Data(None, {})


def read(config: Any) -> Data:
    """Letters of ``data.path``, else drawn papers; facts ``files`` or ``world``.

    Raises:
      ValueError: no letter can be parsed, or an option is out of range.
    """
    paths = [p for p in config.data.path if p]
    if paths:
        return letters.read(paths, config.extract)
    options = _options(config)
    world = worlds.simulate(options)
    m = config.method
    for name, least in (("replications", 2), ("bootstrap", 20), ("permutations", 9)):
        if m[name] < least:
            raise ValueError(f"method.{name} must be >= {least}, got {m[name]}")
    if not 0 < config.data.texts <= options.papers:
        raise ValueError(
            f"data.texts must be in 1 .. {options.papers}, got {config.data.texts}"
        )
    summary = (
        f"{options.papers:,} generated papers, {len(world.opinions.paper):,} opinions, "
        f"{options.fields} fields in {options.years} years"
    )
    return Data(None, {}, facts={"world": world, "options": options}, summary=summary)


def _options(config: Any) -> worlds.Options:
    names = {f.name for f in dataclasses.fields(worlds.Options)}
    return worlds.Options(**{k: v for k, v in config.data.items() if k in names})


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """Extractors against the truth, or the user's letters, a row each."""
    del name
    if "files" in data.facts:
        return letters.study(config, data, mesh)
    world, options = data.facts["world"], data.facts["options"]

    @functools.cache
    def parsed():
        return [_parsed(world, i, options.seed) for i in range(config.data.texts)]

    def measure_rules():
        finding = _against_truth(parsed(), world, "rules")
        tables, files = _analysis(config, world, options, mesh)
        return Finding(
            {**finding, **_recovered(parsed())},
            [_parser_table(parsed()), *tables], files=files,
        )  # fmt: skip

    def rows(seed):
        del seed  # Data have a seed of their own.
        made = [
            Row("rule extractor", None, measure_rules),
            Row("length only", None,
                lambda: Finding(_against_truth(parsed(), world, "length"))),
        ]  # fmt: skip
        if config.extract.model:
            made.append(
                Row(f"model {config.extract.model}", None,
                    lambda: _coded(config, parsed(), world))
            )  # fmt: skip
        for label, path, reader in (
            ("NLPeer", config.data.nlpeer, corpora.nlpeer),
            ("RottenReviews", config.data.rotten, corpora.rotten_reviews),
        ):
            if path:
                one = functools.partial(_corpus, reader, path)
                made.append(Row(f"rule extractor, {label}", None, one))
        return made

    return Study(
        title="rank correlation of extracted with true strength",
        metric="spearman",
        rising=True,
        rows=rows,
        columns=("kappa_type", "kappa_strength", "icc_strength", "recall", "precision",
                 "structure", "labels"),
        pictures={"coefficients.png": review_figures.coefficients,
                  "deciles.png": review_figures.deciles},
    )  # fmt: skip


def _parsed(world: Any, paper: int, seed: int) -> tuple[Any, Any]:
    """A letter and its parse; layouts in turn."""
    letter = pr.render(world, paper, pr.LAYOUTS[paper % 3], seed)
    return letter, pr.parse_review_file(letter.text)


def is_recovered(letter: Any, file: Any) -> bool:
    """Whether rounds, reviewers, points and answers are those of the letter."""
    points = sorted(file.points, key=lambda p: p.spans[0])
    found = tuple((p.round, p.reviewer, any(x.reply for x in p.links)) for p in points)
    by_round = tuple(
        tuple(r.reviewer for r in file.reports if r.round == n + 1 and r.reviewer)
        for n in range(file.rounds)
    )
    return found == letter.points and by_round == letter.reviewers


def _recovered(parsed: Any) -> dict[str, float]:
    return {"structure": float(np.mean([is_recovered(*x) for x in parsed]))}


def _parser_table(parsed: Any) -> Table:
    rows = []
    for layout in pr.LAYOUTS:
        own = [x for x in parsed if x[0].layout == layout]
        if not own:
            continue
        right = sum(is_recovered(*x) for x in own)
        true = sum(len(x[0].points) for x in own)
        points = sum(len(x[1].points) for x in own)
        linked = sum(any(k.reply for k in p.links) for x in own for p in x[1].points)
        answered = sum(p[2] for x in own for p in x[0].points)
        rows.append((layout, len(own), right, true, points, answered, linked))
    heads = ("layout", "letters", "exact", "points", "found", "answered", "linked")
    return Table("letters parsed", heads, rows)


def _against_truth(parsed: Any, world: Any, kind: str) -> dict[str, float]:
    """Agreement of an extractor's opinions with the drawn ones, matched by order."""
    got, true, types, true_types = [], [], [], []
    found = total = 0
    for letter, file in parsed:
        opinions = pr.rule_extract(file)
        total += len(letter.rows)
        found += len(opinions)
        if not is_recovered(letter, file):
            continue
        opinions.sort(key=lambda o: o.span or (0, 0))
        for o, row in zip(opinions, letter.rows):
            level = (
                rules.levels(o.quote)["strength"] if kind == "rules"
                else float(len(o.quote.split()))
            )  # fmt: skip
            got.append(level)
            true.append(world.opinions.scores[row, 0])
            types.append(o.opinion_type)
            true_types.append(schema.TYPES[world.opinions.codes[row, 0]])
    if len(got) < 3:
        raise ValueError("no generated letter was parsed; this is a bug of the parser")
    numbers = {"spearman": hypothesis.spearman(got, true).statistic}
    if kind == "rules":
        step, exact = np.round(4 * np.array(got)), np.round(4 * np.array(true))
        numbers |= {
            "kappa_type": agreement.kappa(types, true_types, categories=schema.TYPES),
            "kappa_strength": agreement.kappa(step, exact, "quadratic", range(5)),
            "icc_strength": agreement.icc(np.stack([got, true], 1)),
            "recall": len(got) / total,
            "precision": len(got) / max(found, 1),
        }
    return numbers


def _coded(config: Any, parsed: Any, world: Any) -> Finding:
    """A language model's opinions against the drawn ones, matched by overlap."""
    coder = model_coder.Coder(config.extract)
    got, true = [], []
    found = total = matched = failed = 0
    for letter, file in parsed[: config.extract.texts]:
        made = coder(file)
        failed += len(made.failed)
        points = sorted(file.points, key=lambda p: p.spans[0])
        if len(points) != len(letter.rows):
            continue
        spans = [(p.spans[0].start, p.spans[-1].end) for p in points]
        pairs = agreement.match_spans(
            [o.span or (0, 0) for o in made.opinions], spans, 0.2
        )
        found, total = found + len(made.opinions), total + len(spans)
        matched += len(pairs.pairs)
        for i, j in pairs.pairs:
            got.append(made.opinions[i].strength)
            true.append(world.opinions.scores[letter.rows[j], 0])
    numbers = {"failed_reports": float(failed), "recall": matched / max(total, 1),
               "precision": matched / max(found, 1)}  # fmt: skip
    if len(got) >= 3 and np.ptp(got) > 0:
        numbers["spearman"] = hypothesis.spearman(got, true).statistic
    rows = [("usage", coder.usage())]
    return Finding(numbers, [Table("language model", ("", ""), rows)])


def _corpus(reader: Any, path: str) -> Finding:
    """The rules' mean strength of reviews against the labels that people gave."""
    corpus = reader(path)
    strength = np.array([_strength_of(r.text) for r in corpus.reviews])
    names = sorted({k for r in corpus.reviews for k in r.labels})
    rows, best = [], []
    for label in names:
        has = [i for i, r in enumerate(corpus.reviews) if label in r.labels]
        values = [corpus.reviews[i].labels[label] for i in has]
        if len(has) < 10 or np.ptp(values) == 0 or np.ptp(strength[has]) == 0:
            continue
        test = hypothesis.spearman(strength[has], values)
        words = [len(corpus.reviews[i].text.split()) for i in has]
        length = hypothesis.spearman(words, values)
        rows.append((label, len(has), test.statistic, test.p, length.statistic))
        best.append(abs(test.statistic))
    heads = ("label", "reviews", "strength", "p", "length")
    skipped = ", ".join(f"{n} {why}" for why, n in corpus.skipped.items()) or "none"
    numbers = {"labels": float(len(rows))}
    if best:
        numbers["spearman"] = float(max(best))
    return Finding(
        numbers, [Table(f"rank correlations; skipped: {skipped}", heads, rows)]
    )


def _strength_of(text: str) -> float:
    """Mean strength over the paragraphs of a review."""
    parts = [p for p in text.split("\n") if len(p.split()) > 3] or [text]
    return float(np.mean([rules.levels(p)["strength"] for p in parts]))


def _analysis(config, world, options, mesh) -> tuple[list[Table], dict[str, Any]]:
    """Tables and files of the regressions on the drawn opinions."""
    m = config.method
    several = mesh if mesh is not None and mesh.size > 1 else None
    x = dict(zip(worlds.REGRESSORS, world.x.T))
    fitted = models.fit(world.cites, x, world.field, world.year)
    tables = [_truth_table(fitted, options), _coverage_table(world, options, m)]
    heads, rows = models.columns(fitted), models.regression_rows(fitted, list(x))
    tables.append(Table("regressions of citations", heads, rows))
    norm = pr.outcomes(world.cites, world.cell)["norm"]
    key = jax.random.key(options.seed)
    curves = models.deciles(key, x, norm, m.bootstrap, mesh=several)
    tables.append(
        Table(
            "citations / mean of field and year, by tenths of strength (95 %)",
            ("tenth", "mean", "low", "high"),
            [(i + 1, *(curves["strength"][k][i] for k in ("mean", "low", "high")))
             for i in range(10)],
        )
    )  # fmt: skip
    tables += [
        _fields_table(world, key, m),
        _checks_table(world, options, key, m, several),
    ]
    note = models.NOTE
    files = {
        "regressions.txt": models.text_table(heads, rows, note),
        "regressions.tex": models.latex_table(heads, rows, note),
        "deciles.npz": {
            "names": np.array(list(curves)),
            **{k: np.stack([c[k] for c in curves.values()])
               for k in ("x", "mean", "low", "high")},
        },
        "coefficients.npz": coefficient_arrays(fitted, list(x), options.truth),
    }  # fmt: skip
    return tables, files


def coefficient_arrays(fitted: Any, names: list[str], truth: Any) -> dict[str, Any]:
    """Arrays of ``review_figures.coefficients``: models of the log of the mean."""
    chosen = [k for k in fitted.joint if not k.startswith("logit")]
    cells = [[fitted.joint[k][n] for n in names] for k in chosen]

    def of(field):
        return np.array([[c[field] for c in row] for row in cells])

    return {
        "names": np.array(names), "models": np.array(chosen), "truth": np.asarray(truth),
        "coef": of("coef"), "low": of("low"), "high": of("high"),
    }  # fmt: skip


def _truth_table(fitted: Any, options: Any) -> Table:
    rows = []
    for name, true in zip(worlds.REGRESSORS, options.truth):
        row: list[Any] = [name, float(true)]
        for model in ("PPML, CRV1", "NB2", "OLS, CRV1"):
            e = fitted.joint[model][name]
            row.append(f"{e['coef']:.3f} [{e['low']:.3f}, {e['high']:.3f}]")
        rows.append(tuple(row))
    heads = ("coefficient", "truth", "PPML", "NB2", "OLS of log(1 + c)")
    return Table("coefficients against the truth, 95 %", heads, rows)


def _coverage_table(world: Any, options: Any, m: Any) -> Table:
    c = models.coverage(world, options, m.replications)
    rows = []
    for model in c.mean:
        bias = c.bias_in_errors(model)
        for i, name in enumerate(c.names):
            rows.append(
                (f"{model}: {name}", float(c.truth[i]), float(c.mean[model][i]),
                 float(bias[i]), float(c.covered[model][i]), float(c.rejected[model][i]))
            )  # fmt: skip
    heads = ("", "truth", "mean", "bias / MC error", "covered 95 %", "rejected 5 %")
    return Table(f"{c.replications} replications", heads, rows)


def _fields_table(world: Any, key: Any, m: Any) -> Table:
    found = world.measures
    measured = {
        "strength": found["strength"], "quality": found["quality"],
        "burden": found["burden"], "rebuttal": found["rebuttal"],
        "opinions (length)": found["opinions"], "disagreement": found["disagreement"],
    }  # fmt: skip
    made = models.compare_fields(jax.random.fold_in(key, 101), measured, world.field,
                                 m.fields)  # fmt: skip
    rows = [(k, v.eta2, v.low, v.high, v.h, v.p) for k, v in made.items()]
    heads = ("measure", "between-field share", "low", "high", "Kruskal H", "p")
    return Table("fields compared", heads, rows)


def _checks_table(world: Any, options: Any, key: Any, m: Any, mesh: Any) -> Table:
    """Reviewers' disagreement against its null; attenuation by a noisy rater."""
    given = world.opinions
    seat = given.paper * 8 + given.reviewer
    first = given.round == 1
    seats, code = np.unique(seat[first], return_inverse=True)
    means = np.bincount(code, given.scores[first, 0]) / np.bincount(code)
    paper = seats // 8
    observed, p, null = pr.disagreement_null(
        jax.random.fold_in(key, 102), means, paper, world.cell[paper], len(world.cites),
        m.permutations, mesh,
    )  # fmt: skip
    reliability, ratio, corrected = models.attenuation(world, options, m.noise)
    rows = [
        ("squared distance of reviewers from their paper's mean", observed),
        ("  with reviewers dealt anew within field and year", float(null.mean())),
        ("  p", p),
        ("reliability of a rater, ICC(1,1)", reliability),
        ("coefficient with a rater's strength / with the true one", ratio),
        ("  divided by the reliability", corrected),
    ]
    return Table("disagreement and measurement error", ("", "value"), rows)
