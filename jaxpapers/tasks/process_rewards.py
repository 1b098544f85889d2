"""Process rewards on generated solutions of several domains.

Two reward models, of many domains and of mathematics alone, weigh the votes of N sampled
solutions, beside the majority, and what a perfect choice would give. With ``base.steps``
both start from one language model of right solutions in all domains.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.ops import reasoning, voting
from jaxpapers.papers import versaprm
from jaxpapers.study import (
    Data,
    Finding,
    Row,
    Stage,
    Study,
    Table,
    with_fields,
    with_seed,
)
from jaxpapers.tasks import process_examples as examples
from jaxpapers.tasks import process_search
from jaxpapers.tasks.scores import all_finite, scorer

HOW = ("min", "mean", "last")  # Aggregations that are compared.


def abstract(config: Any) -> Data:
    """Shapes of a global training batch."""
    size = -(-len(reasoning.VOCABULARY) // 8) * 8
    return examples.abstract(config.data, size)


def read(config: Any) -> Data:
    """The stream of solutions of ``data.domains``.

    Raises:
      ValueError: unknown domains or types of errors, numbers out of range.
    """
    c = config.data
    _check(c)
    kind = config.method.objective
    stream = examples.Stream(c, kind)
    long = stream.too_long()
    left = f"; {long:.1%} of them longer than a row, left out" if long else ""
    return abstract(config)._replace(
        examples=stream,
        work=round(c.examples / c.batch),
        unit="solutions",
        summary=f"generated solutions of {', '.join(c.domains)}{left}",
    )


def _check(c: Any) -> None:
    if c.path:
        raise ValueError(
            f"data.path: solutions are generated, not read; got {c.path!r}"
        )
    examples.check(c)
    examples.check_least(c, examples=1, search_questions=0)


class Scored(NamedTuple):
    """Scores of the test set.

    Attributes:
      scores: of the steps of each solution, domain by domain, question by question.
      solved: the problems.
    """

    scores: dict[str, list[list[np.ndarray]]]
    solved: dict[str, list[examples.Solved]]


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The reward models beside the majority, one solution, and a perfect choice."""
    c = config.data
    meshes.batch_rows(mesh, c.eval_batch, name="data.eval_batch")
    vocab_size = data.facts["vocab_size"]

    @functools.cache
    def solved():
        return dict(examples.test_set(c))

    def measure(method, state):
        return _measure(config, mesh, solved(), vocab_size, method, state)

    def rows(seed):
        own = with_seed(config, seed)
        math = tuple(d for d in c.domains if d in reasoning.MATH)
        models = {"multi-domain PRM": own}
        if math and len(math) < len(c.domains):
            models["math-only PRM"] = with_fields(own, {"data.domains": math})
        return [
            *(
                Row(label, _stage(name, model, config), measure)
                for label, model in models.items()
            ),
            Row("majority", None, lambda: _untrained(c, solved(), "majority")),
            Row("one solution", None, lambda: _untrained(c, solved(), "one")),
            Row(
                "pass@N (a perfect choice)",
                None,
                lambda: _untrained(c, solved(), "pass"),
            ),
        ]

    return Study(
        title=f"accuracy of weighted majority ({c.how}), {c.solutions} solutions, "
        f"{c.questions} questions of each of {len(c.test_domains)} domains",
        metric="accuracy",
        rising=True,
        rows=rows,
        columns=(
            "gain", "best_of_n", "auc_trained", "auc_others", "auc_unseen", "f1_index",
        ),
        errors=True,
    )  # fmt: skip


def _stage(name: str, config: Any, whole: Any) -> Stage:
    """A reward model's run, after that of the language model of all domains."""
    own = config.copy_and_resolve_references().unlock()
    base = own.get("base")
    if base is not None:
        del own.base
    own = own.lock()
    if base is None or not base.steps:
        return Stage(name, own)
    fields = {
        "method.objective": "language", "net.head": "tokens", "net.lora_rank": 0,
        "data.domains": tuple(whole.data.test_domains), "data.label_last_n": 0,
        "train.steps": base.steps, "optim.lr": base.lr,
    }  # fmt: skip
    return Stage(name, own, after=Stage(name, with_fields(own, fields)))


def _untrained(c: Any, solved: Any, what: str) -> Finding:
    """Accuracy without a reward model, in all domains and in each."""
    every = {}
    counts = _counts(c.solutions)
    for domain, problems in solved.items():
        questions = [_solutions(s, None, c.how) for s in problems]
        if what == "majority":
            every[domain] = voting.subsample_curve(questions, what, counts=counts)
        else:
            right = [sum(x.correct for x in q) for q in questions]
            ks = counts if what == "pass" else [1]
            every[domain] = {
                k: [float(np.mean([voting.pass_at(r, c.solutions, k) for r in right]))]
                for k in ks
            }
    numbers = {f"accuracy_{d}": float(np.mean(x[max(x)])) for d, x in every.items()}
    numbers["accuracy"] = float(np.mean(list(numbers.values())))
    curve = [
        float(np.mean([np.mean(x[n]) for x in every.values()])) for n in every[domain]
    ]
    curves = {} if what == "one" else {"accuracy against N": (counts, curve)}
    return Finding(numbers, curves=curves)


def _measure(config, mesh, solved, vocab_size, method, state) -> Finding:
    """Votes, metrics of steps, and search, by domain."""
    c = config.data
    scores = {d: score(c, mesh, method, state, s) for d, s in solved.items()}
    flat = np.concatenate([x for per in scores.values() for q in per for x in q])
    if not all_finite(flat, "scores of test steps"):
        return Finding({"accuracy": float("nan")})
    rows, numbers, curves, gains = [], {}, {}, []
    for domain, problems in solved.items():
        found = _domain(c, problems, scores[domain])
        numbers |= {f"{k}_{domain}": v for k, v in found["numbers"].items()}
        gains.append(found["gains"])
        for name, curve in found["curves"].items():
            curves.setdefault(name, []).append(curve)
        rows.append((domain, *found["row"]))
    means: dict[str, list[float]] = {}
    for domain in solved:
        for k in ("accuracy", "best_of_n", "majority", "f1_index", *_HOW_NAMES):
            means.setdefault(k, []).append(numbers[f"{k}_{domain}"])
    numbers |= {k: float(np.mean(v)) for k, v in means.items()}
    every = np.concatenate(gains)
    numbers["gain"] = float(every.mean())
    numbers["gain_low"], numbers["gain_high"] = voting.interval(every, seed=c.seed)
    numbers |= _aucs(config, numbers)
    counts = _counts(c.solutions)
    lines = {
        name: (counts, np.mean(np.array(x), 0).tolist()) for name, x in curves.items()
    }
    tables = [
        Table(
            f"by domain: accuracy at N = {c.solutions} with 95 % bootstrap intervals "
            "over questions",
            ("domain", "majority", "weighted", "low", "high", "gain", "gain low",
             "gain high", "best of N", "pass@N", "step AUC", "index F1"),
            rows,
        )
    ]  # fmt: skip
    if c.search_questions:
        scores = functools.partial(
            process_search.scorer(
                versaprm.net_of(config, vocab_size), max(c.steps) + 2
            ),
            state.params,
        )
        problems = {
            d: [s.problem for s in some[: c.search_questions]]
            for d, some in solved.items()
        }
        table, extra = process_search.compare(
            problems, lambda p: process_search.Solver(c, p, scores, c.seed)
        )
        tables.append(table)
        numbers |= extra
    return Finding(numbers, tables, lines)


_HOW_NAMES = tuple(f"weighted_{how}" for how in HOW)


def _domain(c, problems, scores) -> dict[str, Any]:
    """Numbers of a domain: of votes over questions, and of steps."""
    answers = np.array([[_letter(t.answer) for t in s.traces] for s in problems])
    truth = np.array([_letter(s.problem.answer) for s in problems])
    steps = max(len(x) for q in scores for x in q)
    padded = np.zeros((*answers.shape, steps), np.float32)
    valid = np.zeros(padded.shape, bool)
    for i, question in enumerate(scores):
        for j, x in enumerate(question):
            padded[i, j, : len(x)], valid[i, j, : len(x)] = x, True
    chosen = jax.device_get(
        _votes(answers, padded, valid, how=c.how, n_answers=c.options)
    )
    right = {k: (v == truth).astype(float) for k, v in chosen.items()}
    gains = right["accuracy"] - right["majority"]
    told = examples.step_metrics(
        [t.first_error for s in problems for t in s.traces],
        [x for question in scores for x in question],
    )
    numbers = {
        **{k: float(v.mean()) for k, v in right.items()},
        "gain": float(gains.mean()),
        **{k: told[k] for k in ("auc", "f1_wrong", "f1_index")},
    }
    questions = [_solutions(s, q, c.how) for s, q in zip(problems, scores)]
    counts = _counts(c.solutions)
    curves = {
        name: [
            float(np.mean(x))
            for x in voting.subsample_curve(
                questions, rule, c.how, counts=counts
            ).values()
        ]
        for name, rule in (
            ("accuracy against N", "weighted"),
            ("accuracy, best of N against N", "best_of_n"),
        )
    }
    some = np.mean([any(t.correct for t in s.traces) for s in problems])
    row = (
        numbers["majority"], numbers["accuracy"],
        *voting.interval(right["accuracy"], seed=c.seed), numbers["gain"],
        *voting.interval(gains, seed=c.seed), numbers["best_of_n"], float(some),
        numbers["auc"], numbers["f1_index"],
    )  # fmt: skip
    return {"numbers": numbers, "gains": gains, "curves": curves, "row": row}


@functools.partial(jax.jit, static_argnames=("how", "n_answers"))
def _votes(answers, scores, valid, *, how, n_answers):
    mask = jnp.ones(answers.shape, bool)
    rewards = {h: voting.aggregate(scores, valid, h) for h in {how, *HOW}}
    return {
        "majority": voting.majority(answers, mask, n_answers),
        "accuracy": voting.weighted_majority(answers, rewards[how], mask, n_answers),
        "best_of_n": voting.best_of_n(answers, rewards[how], mask, n_answers),
        **{
            f"weighted_{h}": voting.weighted_majority(
                answers, rewards[h], mask, n_answers
            )
            for h in HOW
        },
    }


def _aucs(config: Any, numbers: dict[str, float]) -> dict[str, float]:
    """Mean AUC of the steps in the domains of the multi-domain model, and in others."""
    c = config.data
    groups = {
        "auc_trained": [d for d in c.test_domains if d in c.domains],
        "auc_others": [
            d for d in c.test_domains if d in c.domains and d not in reasoning.MATH
        ],
        "auc_unseen": [d for d in c.test_domains if d not in c.domains],
    }
    return {
        k: float(np.mean([numbers[f"auc_{d}"] for d in domains]))
        for k, domains in groups.items()
        if domains
    }


def score(
    c: Any, mesh: Any, method: Any, state: Any, solved: Sequence[examples.Solved]
) -> list[list[np.ndarray]]:
    """Scores of the steps of every solution of every problem, float64.

    Raises:
      ValueError: a solution longer than ``data.eval_length``.
    """
    sequences = [
        examples.sequence(s.problem.question(), t.steps)
        for s in solved
        for t in s.traces
    ]
    run = scorer(method.predict, mesh)
    found = examples.scores(c, mesh, sequences, run, state.params, state.extra)
    every = iter(found)
    return [[next(every) for _ in s.traces] for s in solved]


def _solutions(solved, scores, how) -> list[voting.Solution]:
    """Solutions for ``subsample_curve``; of reward 1 without scores."""
    rewards = [[1.0]] * len(solved.traces) if scores is None else scores
    return [
        voting.Solution(t.answer, t.correct, [float(v) for v in x])
        for t, x in zip(solved.traces, rewards)
    ]


def _counts(n: int) -> list[int]:
    """1, 2, 4, ... and n."""
    return sorted({n, *(2**k for k in range(n.bit_length()) if 2**k < n)})


def _letter(answer: str) -> int:
    return ord(answer) - ord("A")
