"""Process rewards of text with a real language model, tuned by adapters.

Steps to learn from are generated solutions put into text, solutions that the model
itself wrote and the verifier read, and those of a file of the user's. What is measured is
how well the model tells right steps from wrong ones before and after, and what that is
worth as votes among the solutions it wrote.
"""

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.data import arrays, process_labels
from jaxpapers.method import State
from jaxpapers.ops import reasoning, voting
from jaxpapers.papers import versaprm
from jaxpapers.papers.versaprm import encoding, search
from jaxpapers.study import (
    ONCE,
    Data,
    Finding,
    Row,
    Stage,
    Study,
    Table,
    with_seed,
)
from jaxpapers.tasks import process_examples as examples
from jaxpapers.tasks import process_search
from jaxpapers.tasks import step_writer as writer
from jaxpapers.tasks.scores import all_finite, scorer

# Tokens of a written solution at most, and solutions that are written at a time.
LONGEST, AT_ONCE = 64, 16
WRITTEN = "written"
"""The test set of solutions that the model wrote."""


class Solved(NamedTuple):
    """A problem and solutions of it in text."""

    problem: reasoning.Problem
    solutions: Sequence[writer.Written]


def abstract(config: Any) -> Data:
    """Shapes of a global training batch."""
    return examples.abstract(config.data, config.data.vocab_size)


def read(config: Any) -> Data:
    """Solutions with labels, and the model's weights before the first step.

    Raises:
      ValueError: a model of another size than ``net`` and ``data.vocab_size`` say; see
        ``data.process_labels.read`` and ``papers.versaprm.encode_all``.
    """
    c = config.data
    examples.check(c)
    examples.check_least(c, generated=0, written=0, search_questions=0)
    model = writer.load(c.model)
    check_size(config, model.net)
    records, told = _records(config, model)
    rows, counts = versaprm.encode_all(
        model.tokens.encode, records, max_length=c.length, separator=config.net.separator,
        label_last_n=c.label_last_n or None,
    )  # fmt: skip
    if not rows:
        raise ValueError(f"no solution fits into data.length={c.length} tokens")
    places = encoding.bins([len(x.ids) for x in rows], c.length)
    packed = encoding.fill(rows, places, c.length)
    left = f", {counts.too_long:,} too long" if counts.too_long else ""
    return abstract(config)._replace(
        examples=arrays.Examples(packed, c.seed),
        refresh=(ONCE, functools.partial(with_weights, params=model.params)),
        summary=f"{c.model}; {told}; {counts.encoded:,} sequences in "
        f"{len(places):,} rows{left}",
    )


def with_weights(state: State, *, params: Any) -> State:
    """The state with the model's weights, laid out as the initial ones were."""
    old = state.params["decoder"]
    if jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, old):
        raise ValueError("the model's parameters are not those of config.net")
    new = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), params, old)
    return state._replace(params={**state.params, "decoder": new})


def check_size(config: Any, net: Mapping[str, Any]) -> None:
    """Refuses a config whose network is not the model's.

    Raises:
      ValueError: with the fields that differ.
    """
    own = versaprm.net_of(config, config.data.vocab_size)
    mine = {**dataclasses.asdict(own), "kv_heads": own.kv_heads or own.heads}
    differ = {k: v for k, v in net.items() if k in mine and v != mine[k]}
    if differ:
        raise ValueError(
            f"{config.data.model} has {differ}: set config.net and data.vocab_size so"
        )
    odd = {k: net[k] for k in ("rope_scaling", "qk_norm") if net.get(k)}
    if odd or net.get("bias", "none") != "none":
        raise ValueError(
            f"{config.data.model} has {odd or net['bias']}, which the reward model's "
            "network has not"
        )


def _sizes(c: Any) -> dict[str, Any]:
    return {"steps": tuple(c.steps), "below": c.below, "options": c.options}


def _records(config: Any, model: writer.Model) -> tuple[list[dict[str, Any]], str]:
    """Generated, written and read solutions, and a line about them."""
    c = config.data
    generated = []
    for i in range(c.generated):
        domain = c.domains[i % len(c.domains)]
        problem = examples.draw(c, domain, i, examples.TRAIN)
        rng = random.Random(f"{c.seed}/text/{i}")
        trace = reasoning.solve(
            problem, rng, error=c.error, habit=c.habit, errors=tuple(c.errors)
        )
        generated.append(Solved(problem, [writer.told(problem, trace)]))
    written = write(c, model, c.written, 1, examples.TRAIN)
    records = [
        {
            "question": writer.question(s.problem),
            "chain_of_thoughts": [
                {"steps": list(x.steps), "labels": x.labels}
                for x in s.solutions
                if x.steps
            ],
        }
        for s in [*generated, *written]
    ]
    wrong = sum(x.first_error >= 0 for s in written for x in s.solutions)
    told = (
        f"{len(generated):,} generated solutions, {len(written):,} that the model wrote "
        f"({wrong:,} of them wrong)"
    )
    if c.path:
        loaded = process_labels.read(c.path, c.kind)
        records += loaded.records
        told += f", {c.path}: {loaded.summary}"
    return records, told


def write(
    c: Any, model: writer.Model, count: int, each: int, part: int
) -> list[Solved]:
    """Problems of ``data.write_domain``, and solutions of them that the model writes."""
    if not count:
        return []
    problems = [examples.draw(c, c.write_domain, i, part) for i in range(count)]
    program = _program(c.model, min(AT_ONCE, count * each), c.temperature)
    prompts = [writer.prompt(p, **_sizes(c)) for p in problems for _ in range(each)]
    answers = program(prompts, jax.random.fold_in(jax.random.key(c.seed), part))
    return [
        Solved(p, [writer.read(p, x) for x in answers[i * each : (i + 1) * each]])
        for i, p in enumerate(problems)
    ]


@functools.lru_cache(maxsize=4)
def _program(
    name: str, batch: int, temperature: float, stop: str = writer.END
) -> writer.Writer:
    return writer.Writer(writer.load(name), batch, LONGEST, temperature, stop)


class TextSolver:
    """``extend`` and ``score`` of a problem whose steps a language model writes.

    Args:
      config: of the run.
      problem: to solve.
      scores: (ids, segments) -> step scores.
    """

    def __init__(self, config: Any, problem: reasoning.Problem, scores: Any):
        self.c, self.net = config.data, config.net
        self.problem, self.scores = problem, scores
        self.model = writer.load(self.c.model)
        self.drawn = 0
        self.seen: dict[bytes, float] = {}

    def extend(
        self, paths: Sequence[search.Path], active: Sequence[bool]
    ) -> list[tuple[str, bool]]:
        """A line more of every path."""
        program = _program(self.c.model, len(paths), self.c.temperature, "\n")
        prompts = [writer.prompt(self.problem, p, **_sizes(self.c)) for p in paths]
        key = jax.random.fold_in(jax.random.key(self.c.seed), self.problem.number)
        lines = program(prompts, jax.random.fold_in(key, self.drawn))
        self.drawn += sum(active)
        last = len(self.problem.program) - 1
        return [(x.strip() or "?", len(p) >= last) for p, x in zip(paths, lines)]

    def score(
        self, paths: Sequence[search.Path], active: Sequence[bool]
    ) -> list[list[float]]:
        """Scores of the steps of all paths."""
        question = writer.question(self.problem)
        rows = [
            _encoded(self.model, self.net, question, path) if on else encoding.NONE
            for path, on in zip(paths, active)
        ]
        return process_search.step_scores(
            rows, self.c.eval_length, self.scores, self.seen
        )

    def right(self, best: search.Found) -> bool:
        """Whether a search ended with the right result."""
        return best.done and writer.read(self.problem, "\n".join(best.path)).correct


def _encoded(model, net, question, steps) -> encoding.Encoded:
    """The sequence of a solution, with a label at the end of each step."""
    if not steps:
        return encoding.NONE
    [row] = versaprm.encode_example(
        model.tokens.encode, question, steps, [1] * len(steps),
        separator=net.separator, stop_at_error=False,
    )  # fmt: skip
    return row


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The tuned model beside the one it was."""
    del data
    c = config.data
    meshes.batch_rows(mesh, c.eval_batch, name="data.eval_batch")
    tests = functools.cache(lambda: _tests(config))

    def untuned():
        net = dataclasses.replace(
            versaprm.net_of(config, c.vocab_size), lora_rank=0, head="tokens"
        )
        predict = functools.partial(versaprm.token_scores, net=net)
        params = {"decoder": writer.load(c.model).params}
        return _measure(config, mesh, tests(), predict, params, (), net)

    def tuned(method, state):
        net = versaprm.net_of(config, c.vocab_size)
        return _measure(
            config, mesh, tests(), method.predict, state.params, state.extra, net
        )

    def rows(seed):
        return [
            Row("tuned", Stage(name, with_seed(config, seed)), tuned),
            Row("as it is", None, untuned),
        ]

    return Study(
        title=f"steps of {c.model} and of generated solutions in text: AUC of right "
        "against wrong",
        metric="auc",
        rising=True,
        rows=rows,
        columns=("auc_written", "accuracy", "majority", "f1_index"),
    )


def _tests(config: Any) -> dict[str, list[Solved]]:
    """Test problems of each domain with generated solutions, and with written ones."""
    c = config.data
    sets = {
        domain: [
            Solved(s.problem, [writer.told(s.problem, t) for t in s.traces])
            for s in solved
        ]
        for domain, solved in examples.test_set(c).items()
    }
    model = writer.load(c.model)
    sets[WRITTEN] = write(c, model, c.questions, c.solutions, examples.TEST)
    return sets


def _measure(config, mesh, tests, predict, params, extra, net) -> Finding:
    """AUC of the steps in each test set, and votes among written solutions."""
    numbers, rows = {}, []
    for name, solved in tests.items():
        scores = _score(config, mesh, solved, predict, params, extra)
        flat = np.concatenate([x for q in scores for x in q])
        if not all_finite(flat, "scores of test steps"):
            return Finding({"auc": float("nan")})
        told = examples.step_metrics(
            [x.first_error for s in solved for x in s.solutions],
            [x for question in scores for x in question],
        )
        numbers |= {f"{k}_{name}": told[k] for k in ("auc", "f1_index")}
        votes = _votes(solved, scores)
        numbers |= {f"{k}_{name}": v for k, v in votes.items()}
        rows.append(
            (name, told["steps"], told["right"], told["auc"], told["f1_index"],
             votes["majority"], votes["accuracy"], votes["best_of_n"])
        )  # fmt: skip
    generated = [n for n in tests if n != WRITTEN]
    numbers["auc"] = float(np.mean([numbers[f"auc_{n}"] for n in generated]))
    numbers["f1_index"] = float(np.mean([numbers[f"f1_index_{n}"] for n in generated]))
    numbers |= {k: numbers[f"{k}_{WRITTEN}"] for k in ("accuracy", "majority")}
    table = Table(
        f"by test set; votes of {config.data.solutions} solutions a question",
        ("set", "steps", "right", "step AUC", "index F1", "majority", "weighted",
         "best of N"),
        rows,
    )  # fmt: skip
    tables = [table]
    if config.data.search_questions:
        c = config.data
        scores = process_search.scorer(net, max(c.steps))
        problems = [s.problem for s in tests[WRITTEN][: c.search_questions]]
        found, more = process_search.compare(
            {c.write_domain: problems},
            lambda p: TextSolver(config, p, functools.partial(scores, params)),
            {"beam search": search.beam_search, "DVTS": search.dvts},
        )
        tables.append(found)
        numbers |= more
    return Finding(numbers, tables)


def _votes(solved: Sequence[Solved], scores: Any) -> dict[str, float]:
    """Accuracy of votes; a solution that ended early agrees with no other."""
    questions = [
        [
            voting.Solution(x.answer or (i,), x.correct, [float(v) for v in p] or [0.0])
            for i, (x, p) in enumerate(zip(s.solutions, question))
        ]
        for s, question in zip(solved, scores)
    ]
    n = max(map(len, questions))
    rules = {"majority": "majority", "accuracy": "weighted", "best_of_n": "best_of_n"}
    return {
        name: float(np.mean(voting.subsample_curve(questions, rule, counts=[n])[n]))
        for name, rule in rules.items()
    }


def _score(config, mesh, solved, predict, params, extra) -> list[list[np.ndarray]]:
    """Scores of the steps of every solution, float64; none where it has no step."""
    c = config.data
    model = writer.load(c.model)
    made = [
        _encoded(model, config.net, writer.question(s.problem), x.steps)
        for s in solved
        for x in s.solutions
    ]
    found = examples.scores(c, mesh, made, scorer(predict, mesh), params, extra)
    every = iter(found)
    return [[next(every) for _ in s.solutions] for s in solved]
