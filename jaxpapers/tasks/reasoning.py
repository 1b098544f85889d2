"""Reasoning traces: search programs on the Game of 24, or the user's own traces.

Nothing is trained. Every puzzle is searched by each program and by a weak sampler; rows
are programs and ways to choose among samples, measured by the puzzles that they solve.
"""

import csv
import functools
import io
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpapers.papers import rejump
from jaxpapers.study import Data, Finding, Row, Study, Table
from jaxpapers.tasks import reasoning_files
from jaxpapers.tasks.reasoning_choices import interval, programs_table, text

SEPARATED = ("depth first", "breadth first", "random restart")
# Metrics that need no checker of answers.
LABEL_FREE = ("num_solutions", "jump_distance", "verification_rate", "forgetting")
# Puzzles whose trees are compared between programs.
COMPARED = 100


def abstract(config: Any) -> Data:
    """Nothing is trained: no batches."""
    del config
    return Data(None, {})


def read(config: Any) -> Data:
    """The user's traces (``data.path``), or puzzles.

    Raises:
      ValueError: what ``reasoning_files.read`` raises, counts out of range.
    """
    if config.data.path:
        return reasoning_files.read(config)
    every = rejump.puzzles()
    count = config.data.count
    if not 4 <= count <= len(every):
        raise ValueError(f"data.count must be 4 .. {len(every):,}, got {count}")
    for name, low in (("samples", 1), ("leaves", 1), ("replicates", 10)):
        if not config.method[name] >= low:
            raise ValueError(
                f"method.{name} must be >= {low}, got {config.method[name]}"
            )
    if not config.method.penalty > 0:
        raise ValueError(f"method.penalty must be > 0, got {config.method.penalty}")
    chosen = sorted(random.Random(config.data.seed).sample(range(len(every)), count))
    summary = (
        f"{count:,} of the {len(every):,} puzzles of four numbers 1..13 with a solution"
    )
    return Data(
        None, {}, facts={"puzzles": [every[i] for i in chosen]}, summary=summary
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """Ways to choose among samples, and search programs; or a row for each trace."""
    del name
    several = mesh if mesh.size > 1 else None
    if config.data.path:
        return reasoning_files.study(config, data, several)
    puzzles = data.facts["puzzles"]

    def rows(seed):
        result = functools.cache(lambda: _search(config, puzzles, seed, several))
        chosen = [
            f"best of {config.method.samples} by jump distance",
            *_choices(config),
        ]
        labels = [*chosen, *rejump.STRATEGIES]

        def measure(label):
            found = result()
            numbers = found.numbers[label]
            curves = {}
            if label in found.curves:
                curves["puzzles solved against samples"] = found.curves[label]
            if label != labels[0]:
                return Finding(numbers, curves=curves, files=found.files.get(label, {}))
            return Finding(numbers, found.tables, curves, found.files[label])

        return [Row(x, None, functools.partial(measure, x)) for x in labels]

    return Study(
        title=f"share of {len(puzzles):,} puzzles solved",
        metric="solved",
        rising=True,
        rows=rows,
        columns=("low", "high", *rejump.NAMES, "nodes"),
    )


def _choices(config: Any) -> list[str]:
    n = config.method.samples
    return [f"best of {n} by number of solutions", f"least verification of {n}",
            "first sample", "a sample at random", f"any of {n} (bound)"]  # fmt: skip


class _Result(NamedTuple):
    numbers: Mapping[str, Mapping[str, float]]
    tables: Sequence[Table]
    curves: Mapping[str, tuple]
    files: Mapping[str, Mapping[str, str]]


class _Set(NamedTuple):
    """Traces of a program: one of each puzzle, or several samples."""

    traces: list
    values: np.ndarray  # (Q, N, 6)
    solved: np.ndarray  # (Q, N)
    nodes: np.ndarray


def _search(config: Any, puzzles: Sequence, seed: int, mesh: Any) -> _Result:
    """Everything about one seed."""
    options = rejump.Options(**config.search)
    m, seed = config.method, config.data.seed + seed
    programs: dict[str, Callable[[Any, int], Any]] = {
        s: functools.partial(_run, s, options) for s in rejump.STRATEGIES
    }
    programs["sampler"] = lambda p, i: rejump.sample(p, i, options, m.leaves)
    counts = {label: m.samples if label == "sampler" else 1 for label in programs}
    sets, traces = {}, []
    for label, program in programs.items():
        own = [program(p, m.samples * seed + i) for p in puzzles
               for i in range(counts[label])]  # fmt: skip
        sets[label] = own
        traces += own
    measures = rejump.measure(traces, mesh)
    assert measures.known.all()  # Search programs walk, and their leaves are judged.
    start = 0
    for label, own in sets.items():
        part = slice(start, start + len(own))
        shape = (len(puzzles), counts[label])
        solved = np.array([t.correct for t in own], float).reshape(shape)
        nodes = np.array([len(t.nodes) for t in own], float).reshape(shape)
        values = measures.values[part].reshape(*shape, -1)
        sets[label] = _Set(own, values, solved, nodes)
        start += len(own)
    samples = sets.pop("sampler")
    picks = _picks(config, samples)
    numbers, intervals = _numbers(config, sets, samples, picks, seed)
    tables = [
        _strategies_table(sets, intervals),
        _choices_table(picks, intervals),
        programs_table(sets, samples, seed, m.replicates),
        _similarity_table(sets, mesh),
        *_classifier_tables(config, sets, samples, seed),
        _extraction_table(config, puzzles, options, seed, mesh),
    ]
    first = f"best of {m.samples} by jump distance"
    files = {first: {"traces.csv": _csv(puzzles, sets)}}
    for label, own in sets.items():
        files[label] = drawings(own.traces[0], label)
    return _Result(numbers, tables, _curves(samples, picks), files)


def _run(strategy, options, puzzle, seed):
    return rejump.run(strategy, puzzle, seed, options)


def drawings(trace: Any, title: str, numbers: Mapping | None = None) -> dict[str, str]:
    """Files that show a trace."""
    return {
        "trace.svg": rejump.to_svg(trace, title),
        "trace.html": rejump.to_html(trace, title, numbers or {}),
        "trace.dot": rejump.to_dot(trace),
        "trace.mmd": rejump.to_mermaid(trace),
        "trace.json": rejump.to_json(trace),
    }


def _picks(config: Any, samples: _Set) -> dict[str, np.ndarray]:
    """Way of choosing -> weights (Q, N) of the samples; the bound's are the solved."""
    count, n = samples.solved.shape
    used = ("jump_distance", "num_solutions", "verification_rate")
    columns = tuple(rejump.NAMES.index(name) for name in used)
    chosen = jax.device_get(_best(samples.values, columns, (1, 1, -1)))
    first = np.zeros((count, n))
    first[:, 0] = 1
    bound = np.eye(n)[samples.solved.argmax(1)]
    ways = [*(np.eye(n)[x] for x in chosen), first, np.full((count, n), 1 / n), bound]
    labels = [f"best of {config.method.samples} by jump distance", *_choices(config)]
    return dict(zip(labels, ways))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _best(values, columns, directions):
    return [rejump.best_of_n(values[..., i], d) for i, d in zip(columns, directions)]


def _numbers(config, sets, samples, picks, seed):
    """Row -> numbers; (row, metric) -> (mean, low, high), all over the same puzzles."""
    names = ("solved", *rejump.NAMES, "nodes")

    def columns(own: _Set, weights: np.ndarray) -> list[np.ndarray]:
        every = [own.solved, *np.moveaxis(own.values, -1, 0), own.nodes]
        return [(weights * x).sum(1) for x in every]

    one = np.ones((len(samples.solved), 1))
    rows = {label: columns(samples, w) for label, w in picks.items()}
    rows |= {label: columns(own, one) for label, own in sets.items()}
    chance = rows["a sample at random"][0]
    stacked = [x for own in rows.values() for x in own]
    stacked += [own[0] - chance for own in rows.values()]
    found = interval(np.stack(stacked), seed, config.method.replicates)
    keys = [(label, name) for label in rows for name in names]
    keys += [(label, "gain") for label in rows]
    intervals = dict(zip(keys, np.stack(found, 1).tolist()))
    numbers = {}
    for label in rows:
        _, low, high = intervals[label, "solved"]
        means = {name: intervals[label, name][0] for name in names}
        numbers[label] = {**means, "low": low, "high": high}
    return numbers, intervals


def _strategies_table(sets, intervals) -> Table:
    names = ("solved", *rejump.NAMES)
    rows = [
        (label, *(text(intervals[label, name]) for name in names)) for label in sets
    ]
    title = "programs: means over puzzles, 95 % bootstrap intervals"
    return Table(title, ("program", *(n.replace("_", " ") for n in names)), rows)


def _choices_table(picks, intervals) -> Table:
    rows = [
        (label, text(intervals[label, "solved"]), text(intervals[label, "gain"]))
        for label in picks
    ]
    columns = ("choice", "puzzles solved", "more than at random, paired")
    return Table("samples of the weak searcher", columns, rows)


def _similarity_table(sets, mesh) -> Table:
    """Mean similarities of the programs' traces of the same puzzle."""
    labels = list(sets)
    pairs = [(a, b) for i, a in enumerate(labels) for b in labels[i + 1 :]]
    traces = {label: own.traces[:COMPARED] for label, own in sets.items()}
    a = [t for x, _ in pairs for t in traces[x]]
    b = [t for _, y in pairs for t in traces[y]]
    trees, walks = rejump.similarities(a, b, mesh)
    shape = (len(pairs), -1)
    means = zip(trees.reshape(shape).mean(1), walks.reshape(shape).mean(1))
    rows = [(f"{x}, {y}", float(t), float(w)) for (x, y), (t, w) in zip(pairs, means)]
    count = len(traces[labels[0]])
    return Table(f"similarity, {count} puzzles", ("programs", "trees", "walks"), rows)


def _classifier_tables(config, sets, samples, seed) -> list[Table]:
    """Which program it is, and whether the answer is right; other puzzles are tested."""
    penalty, replicates = config.method.penalty, config.method.replicates
    count = len(samples.solved)
    test = np.arange(count) % 2 == 1
    free = np.isin(rejump.NAMES, LABEL_FREE)
    everything = np.ones(len(free), bool)

    def classified(values, classes, used, number):
        """(Q, K) whether each is right, on the tested puzzles; the fit."""
        # Metrics that are not used are constant: their weights are 0.
        x = np.where(used, values, 0)
        train = x[~test].reshape(-1, len(used)), classes[~test].ravel()
        rest = x[test].reshape(-1, len(used))
        with jax.enable_x64(True):  # Nearly separable classes have large weights.
            found = _classify(*train, rest, penalty, number)
        model, chosen = jax.device_get(found)
        return (chosen.reshape(classes[test].shape) == classes[test]).astype(
            float
        ), model

    rows, weights = [], []
    for title, labels in (
        ("three programs", SEPARATED),
        ("five programs", tuple(sets)),
    ):
        values = np.concatenate([sets[label].values for label in labels], 1)
        classes = np.tile(np.arange(len(labels)), (count, 1))
        hits, _ = classified(values, classes, everything, len(labels))
        rows.append((title, "six metrics", hits, 1 / len(labels)))
    classes = samples.solved.astype(int)
    share = float(classes[test].mean())
    for title, used in (("without labels", free), ("six metrics", everything)):
        hits, model = classified(samples.values, classes, used, 2)
        rows.append(("right answer", title, hits, max(share, 1 - share)))
        if used is free:
            low, high = model.interval
            names = [*rejump.NAMES, "intercept"]
            weights = [
                (n.replace("_", " "), text((w, a, b)))
                for n, w, a, b in zip(names, model.weights[0], low[0], high[0])
                if n in (*LABEL_FREE, "intercept")
            ]
    accuracy = np.stack([hits.mean(1) for _, _, hits, _ in rows])
    found = np.stack(interval(accuracy, seed, replicates), 1)
    table = [
        (title, metrics, text(x), chance)
        for (title, metrics, _, chance), x in zip(rows, found)
    ]
    return [
        Table(
            "logistic classifiers, accuracy on the other half of the puzzles",
            ("what", "from", "accuracy", "most frequent class"),
            table,
        ),
        Table(
            "right answer of a sample: weights of standardised metrics",
            ("metric", "weight"),
            weights,
        ),
    ]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _classify(x, y, rest, penalty, classes):
    """A fit of the classifier, and the classes of other rows."""
    model = rejump.fit(x, y, classes, penalty)
    return model, rejump.log_probability(model, rest).argmax(1)


def _extraction_table(config, puzzles, options, seed, mesh) -> Table:
    """Traces of new seeds, read back from their words."""
    count, exact, labels = config.method.held_out, 0, list(rejump.STRATEGIES)
    a, b = [], []
    for i in range(count):
        puzzle = puzzles[i % len(puzzles)]
        # Programs of each puzzle in turn, and no seed of the study's.
        program = labels[(i + i // len(puzzles)) % len(labels)]
        trace = rejump.run(program, puzzle, 1_000_000 + seed + i, options)
        found = rejump.read(rejump.render(trace, i))
        exact += found == trace
        a.append(trace)
        b.append(found)
    both = rejump.measure([*a, *b], mesh).transitions
    walks = rejump.similar_walks(both[:count], both[count:])
    row = (count, exact / count, float(np.mean(walks)))
    return Table(
        "rule extractor on held-out texts", ("texts", "exact", "walk similarity"), [row]
    )


def _curves(samples: _Set, picks) -> dict[str, tuple]:
    """Share of puzzles solved with the first 1, 2, 4, .. samples."""
    n = samples.solved.shape[1]
    sizes = sorted({min(2**i, n) for i in range(n.bit_length() + 1)})
    jumps = samples.values[:, :, rejump.NAMES.index("jump_distance")]
    labels = list(picks)
    by_jump, bound, chance = [], [], []
    for size in sizes:
        chosen = jumps[:, :size].argmax(1)
        by_jump.append(float(samples.solved[np.arange(len(chosen)), chosen].mean()))
        bound.append(float(samples.solved[:, :size].max(1).mean()))
        chance.append(float(samples.solved[:, :size].mean()))
    return {
        labels[0]: (sizes, by_jump),
        labels[-2]: (sizes, chance),
        labels[-1]: (sizes, bound),
    }


def _csv(puzzles, sets) -> str:
    """``traces.csv``: metrics of every program's trace."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("program", "puzzle", "solved", *rejump.NAMES, "nodes"))
    for label, own in sets.items():
        for i, puzzle in enumerate(puzzles):
            values = (f"{x:.6g}" for x in own.values[i, 0])
            solved, nodes = int(own.solved[i, 0]), int(own.nodes[i, 0])
            writer.writerow((label, " ".join(map(str, puzzle)), solved, *values, nodes))
    return file.getvalue()
