"""Search with a reward model, driven by the generator's stochastic solver."""

import functools
import random
from collections.abc import Mapping, Sequence
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
        """Scores of the steps of all paths, in one call of one shape."""
        question = self.problem.question()
        rows = [
            examples.sequence(question, [s.words for s in path])
            if is_active
            else encoding.Encoded(np.zeros(0, np.int32), np.zeros(0, np.float32))
            for path, is_active in zip(paths, active)
        ]
        places = [[i] for i in range(len(rows))]
        batch = encoding.fill(rows, places, self.c.eval_length)
        found = jax.device_get(self.scores(batch["ids"], batch["segments"]))
        return [x[v].tolist() for x, v in zip(found.scores, found.valid)]


METHODS = {
    "beam search": lambda s: search.beam_search(s.extend, s.score),
    "beam search, legacy order": lambda s: search.beam_search(
        s.extend, s.score, search.Beam(legacy_sort=True)
    ),
    "DVTS": lambda s: search.dvts(s.extend, s.score),
    "MCTS": lambda s: search.mcts(s.extend, s.score),
}


def compare(
    config: Any, solved: Mapping[str, Any], vocab_size: int, method: Any, state: Any
) -> tuple[Table, dict[str, float]]:
    """Accuracy of each search on the first problems of each domain.

    Returns:
      A table of methods by domains, and the means as numbers ``search_<method>``.
    """
    del method
    c = config.data
    net = versaprm.net_of(config, vocab_size)
    scores = functools.partial(_scorer(net, max(c.steps) + 2), state.params)
    rows, numbers = [], {}
    for name, run in METHODS.items():
        means, drawn = [], []
        for problems in solved.values():
            right = []
            for s in problems[: c.search_questions]:
                solver = Solver(c, s.problem, scores, c.seed)
                best = run(solver)[0]
                answer = best.path[-1].position.answer
                right.append(best.done and answer == s.problem.answer)
                drawn.append(solver.drawn)
            means.append(float(np.mean(right)))
        key = name.lower().replace(",", "").replace(" ", "_")
        numbers[f"search_{key}"] = float(np.mean(means))
        rows.append((name, *means, float(np.mean(means)), float(np.mean(drawn))))
    title = f"search, accuracy on {c.search_questions} questions a domain"
    return Table(title, ("method", *solved, "mean", "steps drawn"), rows), numbers


@functools.lru_cache(maxsize=8)
def _scorer(net: versaprm.Net, steps: int):
    return jax.jit(functools.partial(versaprm.step_scores, net=net, steps=steps))
