"""Search with a reward model, driven by the generator's stochastic solver."""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpapers.ops import reasoning
from jaxpapers.papers import versaprm
from jaxpapers.papers.versaprm import encoding, search
from jaxpapers.study import Table
from jaxpapers.tasks import process_examples as examples


class Step(NamedTuple):
    """A step of a path: its words, and where the solver stands after it."""

    words: tuple[str, ...]
    position: reasoning.Position


class Solver:
    """``extend`` and ``score`` of a problem for ``papers.versaprm.search``.

    Args:
      c: config group ``data``.
      problem: to solve.
      scores: (ids, segments) -> step scores.
      seed: of the solver.
    """

    def __init__(self, c: Any, problem: reasoning.Problem, scores: Any, seed: int):
        self.c, self.problem, self.scores = c, problem, scores
        self.rng = random.Random(f"{seed}/{problem.domain}/{problem.number}")
        self.drawn = 0
        self.seen: dict[bytes, float] = {}

    def extend(
        self, paths: Sequence[search.Path], active: Sequence[bool]
    ) -> list[tuple[Step, bool]]:
        """One step more of the solver for every active path."""
        grown = []
        for path, is_active in zip(paths, active):
            position = path[-1].position if path else reasoning.start(self.problem)
            if not is_active:
                grown.append((Step((), position), False))
                continue
            words, position, _ = reasoning.advance(
                self.problem, position, self.rng, error=self.c.error, habit=self.c.habit,
                errors=tuple(self.c.errors),
            )  # fmt: skip
            self.drawn += 1
            grown.append((Step(tuple(words), position), position.step < 0))
        return grown

    def score(
        self, paths: Sequence[search.Path], active: Sequence[bool]
    ) -> list[list[float]]:
        """Scores of the steps of all paths."""
        question = self.problem.question()
        rows = [
            examples.sequence(question, [s.words for s in path])
            if on
            else encoding.NONE
            for path, on in zip(paths, active)
        ]
        return step_scores(rows, self.c.eval_length, self.scores, self.seen)

    def right(self, best: search.Found) -> bool:
        """Whether a search ended with the right option."""
        return best.done and best.path[-1].position.answer == self.problem.answer


def step_scores(
    rows: Sequence[encoding.Encoded],
    length: int,
    scores: Callable,
    seen: dict[bytes, float],
) -> list[list[float]]:
    """Scores of the steps of sequences, in one call of one shape.

    Args:
      rows: the sequences.
      length: of a row.
      scores: (ids, segments) -> step scores.
      seen: of a search, empty at its beginning: see ``examples.share_beginnings``.
    """
    batch = encoding.fill(rows, [[i] for i in range(len(rows))], length)
    found = jax.device_get(scores(batch["ids"], batch["segments"]))
    values = [x[v].astype(np.float64) for x, v in zip(found.scores, found.valid)]
    examples.share_beginnings(rows, values, seen)
    return [x.tolist() for x in values]


METHODS = {
    "beam search": search.beam_search,
    "beam search, legacy order": functools.partial(
        search.beam_search, options=search.Beam(legacy_sort=True)
    ),
    "DVTS": search.dvts,
    "MCTS": search.mcts,
}


def compare(
    problems: Mapping[str, Sequence[reasoning.Problem]],
    solver: Callable[[reasoning.Problem], Any],
    methods: Mapping[str, Callable] = METHODS,
) -> tuple[Table, dict[str, float]]:
    """Accuracy of each search.

    Args:
      problems: of each domain.
      solver: problem -> object with ``extend`` and ``score`` for ``versaprm.search``,
        ``right`` (best ``Found`` -> bool) and ``drawn``, how many steps were drawn.
      methods: name -> (extend, score) -> list of ``Found``.

    Returns:
      A table of methods by domains, and the means as numbers ``search_<method>``.
    """
    rows, numbers = [], {}
    for name, run in methods.items():
        means, drawn = [], []
        for some in problems.values():
            right = []
            for problem in some:
                own = solver(problem)
                right.append(own.right(run(own.extend, own.score)[0]))
                drawn.append(own.drawn)
            means.append(float(np.mean(right)))
        key = name.lower().replace(",", "").replace(" ", "_")
        numbers[f"search_{key}"] = float(np.mean(means))
        rows.append((name, *means, float(np.mean(means)), float(np.mean(drawn))))
    count = max(map(len, problems.values()))
    title = f"search, accuracy on {count} questions a domain"
    return Table(title, ("method", *problems, "mean", "steps drawn"), rows), numbers


@functools.lru_cache(maxsize=8)
def scorer(net: versaprm.Net, steps: int):
    """The program (params, ids, segments) -> ``versaprm.step_scores``."""
    return jax.jit(functools.partial(versaprm.step_scores, net=net, steps=steps))
