"""Generated solutions as sequences with a label at every step: streams and test sets."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.ops import reasoning
from jaxpapers.papers.versaprm import encoding

TEST, TRAIN = 0, 1  # Seeds of problems: no test problem is trained on.


class Solved(NamedTuple):
    """A problem of the test set and its solutions."""

    problem: reasoning.Problem
    traces: Sequence[reasoning.Trace]


class Stream:
    """An unlimited stream of batches of packed solutions of new problems.

    Args:
      c: config group ``data``.
      kind: ``process`` stops after the first wrong step; ``language`` has whole right
        solutions.
    """

    def __init__(self, c: Any, kind: str):
        self.c, self.kind = c, kind

    def batch(self, start: int, size: int, rows: slice | None = None) -> dict:
        """Rows ``start`` .. ``start + size - 1`` of the stream."""
        c = self.c
        count = max(round(c.examples * size / c.batch), size)
        rng = random.Random(f"{c.seed}/{self.kind}/{start}")
        made = [
            one(c, rng, rng.choice(tuple(c.domains)), self.kind) for _ in range(count)
        ]
        made = [x for x in made if len(x.ids) <= c.length]
        batch = encoding.pack(made, c.length, count=size)
        return {name: array[rows or slice(None)] for name, array in batch.items()}


def one(c: Any, rng: random.Random, domain: str, kind: str) -> encoding.Encoded:
    """The sequence of a solution of a new problem."""
    problem = draw(c, domain, rng.getrandbits(40), TRAIN)
    error = c.error if kind == "process" else 0.0
    trace = reasoning.solve(
        problem, rng, error=error, habit=c.habit, errors=tuple(c.errors)
    )
    return sequence(problem.question(), trace.steps, trace.labels, c.label_last_n)


def draw(c: Any, domain: str, number: int, part: int) -> reasoning.Problem:
    """A problem of the training or the test part."""
    return reasoning.problem(
        domain, number, steps=tuple(c.steps), below=c.below, options=c.options,
        seed=2 * c.seed + part,
    )  # fmt: skip


def sequence(
    question: Sequence[str],
    steps: Sequence[Sequence[str]],
    labels: Sequence[int] | None = None,
    label_last_n: int = 1,
) -> encoding.Encoded:
    """Ids and labels of words; without labels of all steps, which are then 1.

    Args:
      question: its words.
      steps: words of each.
      labels: 1 and -1; what follows the first -1 is left out.
      label_last_n: labelled words of a step, its last ones; 0: all.
    """
    labels = [1] * len(steps) if labels is None else list(labels)
    count = labels.index(-1) + 1 if -1 in labels else len(steps)
    ids = reasoning.ids([*question, *(w for step in steps[:count] for w in step)])
    targets, at = np.full(len(ids), encoding.IGNORE, np.float32), len(question)
    for step, y in zip(steps[:count], labels):
        end = at + len(step)
        first = max(at, end - label_last_n) if label_last_n else at
        targets[first:end], at = max(y, 0), end
    return encoding.Encoded(ids, targets)


def test_set(c: Any) -> Mapping[str, list[Solved]]:
    """Domain -> problems of the test part, each with ``data.solutions`` solutions."""
    sets = {}
    for domain in c.test_domains:
        sets[domain] = []
        for number in range(c.questions):
            problem = draw(c, domain, number, TEST)
            rng = random.Random(f"{c.seed}/test/{domain}/{number}")
            traces = [
                reasoning.solve(
                    problem, rng, error=c.error, habit=c.habit, errors=tuple(c.errors)
                )
                for _ in range(c.solutions)
            ]
            sets[domain].append(Solved(problem, traces))
    return sets
