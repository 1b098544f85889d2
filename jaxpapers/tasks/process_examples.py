"""Generated solutions as sequences with a label at every step: streams and test sets."""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.ops import reasoning
from jaxpapers.papers.versaprm import encoding, metrics
from jaxpapers.study import Data

TEST, TRAIN = 0, 1  # Seeds of problems: no test problem is trained on.


def abstract(c: Any, vocab_size: int) -> Data:
    """Shapes of a global training batch."""
    shape = (c.batch, c.length)
    shapes = {
        "ids": jax.ShapeDtypeStruct(shape, jnp.int32),
        "labels": jax.ShapeDtypeStruct(shape, jnp.float32),
        "segments": jax.ShapeDtypeStruct(shape, jnp.int32),
    }
    return Data(None, shapes, {"vocab_size": vocab_size}, unit="rows")


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
        made = [x for x in self.made(start, size) if len(x.ids) <= self.c.length]
        batch = encoding.pack(made, self.c.length, count=size)
        return {name: array[rows or slice(None)] for name, array in batch.items()}

    def made(self, start: int, size: int) -> list[encoding.Encoded]:
        """The solutions of these rows, those too long for one among them."""
        c = self.c
        count = max(round(c.examples * size / c.batch), size)
        rng = random.Random(f"{c.seed}/{self.kind}/{start}")
        domains = tuple(c.domains)
        return [one(c, rng, rng.choice(domains), self.kind) for _ in range(count)]

    def too_long(self, count: int = 200) -> float:
        """Share of the first solutions that are longer than a row, and left out.

        Raises:
          ValueError: all are.
        """
        sizes = [len(x.ids) for x in self.made(0, count)]
        share = float(np.mean(np.array(sizes) > self.c.length))
        if share == 1:
            raise ValueError(
                f"data.length={self.c.length}: solutions have {min(sizes)} to "
                f"{max(sizes)} tokens"
            )
        return share


def one(c: Any, rng: random.Random, domain: str, kind: str) -> encoding.Encoded:
    """The sequence of a solution of a new problem."""
    problem = draw(c, domain, rng.getrandbits(40), TRAIN)
    error = c.error if kind == "process" else 0.0
    trace = reasoning.solve(
        problem, rng, error=error, habit=c.habit, errors=tuple(c.errors)
    )
    return sequence(
        problem.question(), trace.steps, trace.labels, c.label_last_n, trace.first_word
    )


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
    first_word: int = 0,
) -> encoding.Encoded:
    """Ids and labels of words; without labels of all steps, which are then 1.

    Args:
      question: its words.
      steps: words of each.
      labels: 1 and -1; what follows the first -1 is left out.
      label_last_n: labelled words of a step, its last ones; 0: all, those of the wrong
        step by whether the step is right so far.
      first_word: of the wrong step, from which on it is not.
    """
    labels = [1] * len(steps) if labels is None else list(labels)
    count = labels.index(-1) + 1 if -1 in labels else len(steps)
    ids = reasoning.ids([*question, *(w for step in steps[:count] for w in step)])
    targets, at = np.full(len(ids), encoding.IGNORE, np.float32), len(question)
    for step, y in zip(steps[:count], labels):
        end = at + len(step)
        first = max(at, end - label_last_n) if label_last_n else at
        targets[first:end] = max(y, 0)
        if y < 0 and not label_last_n:
            targets[at : at + first_word] = 1
        at = end
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


def scores(
    c: Any,
    mesh: jax.sharding.Mesh,
    sequences: Sequence[encoding.Encoded],
    run: Callable,
    params: Any,
    extra: Any,
) -> list[np.ndarray]:
    """Scores at the labels of every sequence, float64; none of an empty one.

    Sequences that begin alike have the same scores there, see ``share_beginnings``.

    Args:
      c: ``eval_length`` and ``eval_batch``.
      mesh: that batches are laid out on.
      sequences: with a label, whatever it is, at the end of every step.
      run: (params, extra, batch) -> scores of every position.
      params, extra: of the model.

    Raises:
      ValueError: a sequence longer than ``data.eval_length``.
    """
    sizes = [len(x.ids) for x in sequences]
    if max(sizes) > c.eval_length:
        raise ValueError(
            f"data.eval_length={c.eval_length}: a solution has {max(sizes)} tokens"
        )
    places = encoding.bins(sizes, c.eval_length)
    rows = meshes.batch_rows(mesh, c.eval_batch, name="data.eval_batch")
    found: list[Any] = [None] * len(sequences)
    with jax.set_mesh(mesh):
        for at in range(0, len(places), c.eval_batch):
            part = places[at : at + c.eval_batch]
            empty: list[list[int]] = [[]] * (c.eval_batch - len(part))
            batch = encoding.fill(sequences, [*part, *empty], c.eval_length)
            placed = meshes.put_batch(
                {k: v[rows] for k, v in batch.items()}, mesh, c.eval_batch
            )
            values = np.asarray(run(params, extra, placed), np.float64)
            ends = batch["labels"] >= 0
            for i, numbers in enumerate(part):
                for j, number in enumerate(numbers):
                    mine = ends[i] & (batch["segments"][i] == j + 1)
                    found[number] = values[i][mine]
    share_beginnings(sequences, found, {})
    return found


def share_beginnings(
    sequences: Sequence[encoding.Encoded],
    found: Sequence[np.ndarray],
    seen: dict[bytes, float],
) -> None:
    """Gives sequences that begin alike the same scores there, in place.

    Rounding differs from row to row of a batch and of a mesh: it must not decide between
    equal solutions.

    Args:
      sequences: with a label, whatever it is, at the end of every step.
      found: scores of their steps, or of the first ones.
      seen: score of every beginning by its digest, those of earlier calls among them.
    """
    for x, values in zip(sequences, found, strict=True):
        before, start = hashlib.blake2b(digest_size=16), 0
        ends = np.flatnonzero(np.asarray(x.labels) >= 0) + 1
        for k, end in enumerate(ends[: len(values)]):
            before.update(np.asarray(x.ids[start:end], np.int64).tobytes())
            start = end
            # What is not finite stays where it is, for the caller to find.
            if np.isfinite(values[k]):
                values[k] = seen.setdefault(before.digest(), values[k])


def step_metrics(
    first_errors: Sequence[int], scores: Sequence[np.ndarray]
) -> dict[str, float]:
    """Metrics of the steps up to the first error of each solution, and of its index.

    Args:
      first_errors: index of each solution's first wrong step; -1: none.
      scores: of its steps; a solution without any is left out.

    Returns:
      ``auc``, ``f1_wrong``, ``f1_index``; ``steps``, how many there are, and ``right``,
      their share of right ones. NaN without any step.
    """
    labels, flat, first, whole = [], [], [], []
    for error, p in zip(first_errors, scores):
        if not len(p):
            continue
        last = len(p) if error < 0 else error + 1
        labels += [int(error < 0 or i < error) for i in range(last)]
        flat += list(p[:last])
        first.append(error)
        whole.append([float(v) for v in p])
    if not labels:
        names = ("auc", "f1_wrong", "f1_index", "right")
        return {**dict.fromkeys(names, math.nan), "steps": 0}
    told = metrics.step_metrics(labels, flat)
    return {
        "auc": told["auc"],
        "f1_wrong": told["f1_wrong"],
        "f1_index": metrics.error_index_f1(first, whole)["f1"],
        "steps": len(labels),
        "right": float(np.mean(labels)),
    }


def check(c: Any) -> None:
    """Refuses fields of generated problems that are out of range.

    Raises:
      ValueError: unknown domains, numbers out of range.
    """
    for name in ("domains", "test_domains"):
        unknown = sorted(set(c[name]) - set(reasoning.DOMAINS))
        if unknown or not c[name]:
            raise ValueError(
                f"data.{name} must be among {tuple(reasoning.DOMAINS)}, got "
                f"{tuple(c[name])}"
            )
    check_least(c, questions=1, solutions=1, length=8, label_last_n=0)
    if not 0 <= c.error <= 1 or not 0 <= c.habit <= 1:
        raise ValueError(
            f"data.error and data.habit are shares, got {c.error} and {c.habit}"
        )


def check_least(c: Any, **least: int) -> None:
    """Refuses fields below a number; ValueError with both."""
    for name, low in least.items():
        if c[name] < low:
            raise ValueError(f"data.{name} must be >= {low}, got {c[name]}")
