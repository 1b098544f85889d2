"""Choosing one answer of several sampled solutions: votes, and rewards of steps.

Names of shapes: Q questions, N solutions each, S steps. Answers are numbers of answers in
[0, A); -1 where a solution has none, which then has no vote.

Ties go to the answer that was seen first. What cannot be decided (no solution with an
answer, a reward that is NaN) gives -1, which is no answer and never correct.
"""

import math
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

HOW = ("min", "mean", "last", "max", "prod")
RULES = ("majority", "best_of_n", "weighted")


def aggregate(
    scores: Float[Array, "*batch S"],
    valid: Bool[Array, "*batch S"],
    how: str = "min",
) -> Float[Array, "*batch"]:
    """Reward of a solution from those of its steps.

    Args:
      scores: of steps.
      valid: which of them are steps; others may hold anything, NaN included.
      how: one of ``HOW``; ``last`` is the last valid step's.

    Returns:
      Rewards; 0 for a solution without steps, the least that a probability can be.

    Raises:
      ValueError: an unknown ``how``.

    Example:
      >>> aggregate(jnp.array([0.9, 0.4, 0.0]), jnp.array([True, True, False])).item()
      0.4000000059604645
    """
    check_how(how)
    some = valid.any(-1)
    if not valid.shape[-1]:
        return jnp.zeros(valid.shape[:-1], scores.dtype)
    if how == "last":
        place = jnp.arange(1, valid.shape[-1] + 1, dtype=jnp.int32)
        last = jnp.where(valid, jnp.broadcast_to(place, valid.shape), 0).max(-1)
        index = jnp.maximum(last - 1, 0)[..., None]
        value = jnp.take_along_axis(scores, index, -1)[..., 0]
    elif how == "mean":
        total = jnp.where(valid, scores, 0).sum(-1)
        value = total / jnp.maximum(valid.sum(-1), 1)
    else:
        fill = {"min": jnp.inf, "max": -jnp.inf, "prod": 1.0}[how]
        reduce = {"min": jnp.min, "max": jnp.max, "prod": jnp.prod}[how]
        value = reduce(jnp.where(valid, scores, fill), -1)
    return jnp.where(some, value, 0)


def majority(
    answers: Int[Array, "Q N"], mask: Bool[Array, "Q N"], n_answers: int
) -> Int[Array, " Q"]:
    """The commonest answer of each question.

    Args:
      answers: in [0, n_answers), or -1.
      mask: solutions that count.
      n_answers: A.

    Raises:
      ValueError: answers out of range, where they are known (outside of ``jit``).

    Example:
      >>> answers = np.array([[2, 1, 1, 2], [0, 3, 3, -1]])
      >>> vote = jax.jit(majority, static_argnums=2)
      >>> vote(answers, answers >= 0, 4).tolist()
      [2, 3]
    """
    return weighted_majority(
        answers, jnp.ones(answers.shape, jnp.float32), mask, n_answers
    )


def weighted_majority(
    answers: Int[Array, "Q N"],
    rewards: Float[Array, "Q N"],
    mask: Bool[Array, "Q N"],
    n_answers: int,
) -> Int[Array, " Q"]:
    """The answer with the largest sum of rewards of each question.

    Args:
      answers: in [0, n_answers), or -1.
      rewards: of the solutions, see ``aggregate``.
      mask: solutions that count.
      n_answers: A.

    Raises:
      ValueError: answers out of range, rewards that are no numbers, where they are known.
    """
    answers, counts = _counted(answers, rewards, mask, n_answers)
    weight = jnp.where(counts, rewards, 0)
    rows = jnp.arange(answers.shape[0])[:, None]
    index = jnp.where(counts, answers, 0)
    votes = jnp.zeros((answers.shape[0], n_answers), weight.dtype)
    votes = votes.at[rows, index].add(weight)
    return _first_best(jnp.take_along_axis(votes, index, 1), answers, counts)


def best_of_n(
    answers: Int[Array, "Q N"],
    rewards: Float[Array, "Q N"],
    mask: Bool[Array, "Q N"],
    n_answers: int,
) -> Int[Array, " Q"]:
    """The answer of the solution with the largest reward; see ``weighted_majority``."""
    answers, counts = _counted(answers, rewards, mask, n_answers)
    return _first_best(rewards, answers, counts)


def pass_at(correct: int, n: int, k: int) -> float:
    """Chance that k of n solutions, drawn without replacement, have a correct one.

    $1 - \\binom{n-c}{k} / \\binom{n}{k}$ (Chen et al., arXiv 2107.03374).

    Raises:
      ValueError: k > n, or counts out of range.

    Example:
      >>> pass_at(1, 4, 2)
      0.5
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(
            f"pass_at needs 0 <= correct <= n and 1 <= k <= n, got {correct=}, {n=}, {k=}"
        )
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def interval(
    values: Any, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over questions (Efron 1979).

    Args:
      values: (Q,), one number per question.
      level: of confidence.
      resamples: bootstrap samples.
      seed: of the draws.

    Raises:
      ValueError: no values, or values that are no finite numbers.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"interval needs finite values of at least one question, got {len(values)}, "
            f"{int((~np.isfinite(values)).sum())} of them not finite"
        )
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Solution(NamedTuple):
    """One sampled solution, on the host.

    Attributes:
      answer: anything that can be compared.
      correct: whether it is the question's answer.
      rewards: of its steps; one that stands for all is a list of one.
    """

    answer: Hashable
    correct: bool
    rewards: Sequence[float]


def subsample_curve(
    questions: Sequence[Sequence[Solution]],
    rule: str,
    how: str = "min",
    *,
    counts: Sequence[int],
    n_max: int = 0,
    seeds: Sequence[int] = range(10),
) -> dict[int, list[float]]:
    """Accuracy of a rule on n of the solutions of each question, for each seed.

    The draws are those of the paper's evaluation, to the number: for each n and seed one
    Mersenne generator, which goes through the questions in order and draws n solutions
    without replacement. A question with fewer than ``n_max`` solutions is filled up with
    wrong ones of reward 0 whose answers all differ.

    Args:
      questions: solutions of each.
      rule: one of ``RULES``.
      how: see ``aggregate``; majority does not read it.
      counts: the n.
      n_max: solutions drawn from; 0: those of the question that has most.
      seeds: of the generators.

    Returns:
      n -> accuracy of each seed.

    Raises:
      ValueError: unknown rules; n above ``n_max``; more solutions than ``n_max``; a
        question or solution without rewards, or rewards that are not finite.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
    check_how(how)
    n_max = n_max or max(map(len, questions), default=0)
    _check_questions(questions, counts, n_max)
    filled = [
        [(s.answer, s.correct, _reward(s.rewards, how)) for s in solutions]
        + [(_Nothing(j), False, 0.0) for j in range(n_max - len(solutions))]
        for solutions in questions
    ]
    curve = {}
    for n in counts:
        curve[n] = []
        for seed in seeds:
            draw = random.Random(seed)
            right = [_choose(draw.sample(x, n), rule) for x in filled]
            curve[n].append(sum(right) / len(right))
    return curve


class _Nothing(NamedTuple):
    """The answer of a solution that is not there; equal to itself alone."""

    number: int


def check_how(how: str) -> None:
    """Refuses an unknown aggregation with a ValueError."""
    if how not in HOW:
        raise ValueError(f"aggregation must be one of {HOW}, got {how!r}")


def reward(rewards: Sequence[int | float], how: str = "min") -> float:
    """``aggregate`` of one solution on the host, in float64.

    Raises:
      ValueError: an unknown ``how``, no rewards, rewards that are not finite.
    """
    check_how(how)
    if not len(rewards) or not all(map(math.isfinite, rewards)):
        raise ValueError(
            f"rewards must be finite numbers, one a step, got {list(rewards)[:8]}"
        )
    return _reward(rewards, how)


def _reward(rewards, how) -> float:
    if how == "last":
        return float(rewards[-1])
    if how == "mean":
        return float(sum(rewards) / len(rewards))
    return float({"min": min, "max": max, "prod": math.prod}[how](rewards))


def _choose(solutions, rule) -> bool:
    """Whether the chosen answer is right, as its first solution says."""
    if rule == "best_of_n":
        return max(solutions, key=lambda s: s[2])[1]
    votes: dict[Hashable, float] = {}
    right: dict[Hashable, bool] = {}
    for answer, correct, value in solutions:
        votes[answer] = votes.get(answer, 0) + (1 if rule == "majority" else value)
        right.setdefault(answer, correct)
    return right[max(votes, key=lambda a: votes[a])]


def _check_questions(questions, counts, n_max):
    if not len(questions):
        raise ValueError("subsample_curve needs at least one question, got none")
    out = [n for n in counts if not 1 <= n <= n_max]
    if out:
        raise ValueError(
            f"counts must be in 1 to n_max={n_max}, the solutions available, got {out}"
        )
    for i, solutions in enumerate(questions):
        if len(solutions) > n_max:
            raise ValueError(
                f"question {i} has {len(solutions)} solutions, n_max is {n_max}; raise "
                "n_max, or leave some out"
            )
        for j, s in enumerate(solutions):
            if not len(s.rewards) or not all(map(math.isfinite, s.rewards)):
                raise ValueError(
                    f"question {i}, solution {j}: rewards must be finite numbers, one a "
                    f"step, got {list(s.rewards)[:8]}; leave out what was not scored"
                )


def _counted(answers, rewards, mask, n_answers):
    """The answers as arrays, and which of them count."""
    if not answers.shape == rewards.shape == mask.shape or len(answers.shape) != 2:
        raise ValueError(
            "answers, rewards and mask must have one shape (Q, N), got "
            f"{answers.shape}, {rewards.shape} and {mask.shape}"
        )
    if n_answers < 1:
        raise ValueError(f"n_answers must be >= 1, got {n_answers}")
    if not any(isinstance(x, jax.core.Tracer) for x in (answers, rewards, mask)):
        a, r, m = (np.asarray(x) for x in (answers, rewards, mask))
        if (m & ((a < -1) | (a >= n_answers))).any():
            raise ValueError(
                f"answers must be in -1 to {n_answers - 1}, got {a.min()} to {a.max()}"
            )
        if np.isnan(r[m]).any():
            raise ValueError(f"{int(np.isnan(r[m]).sum())} rewards are NaN")
    answers, rewards, mask = map(jnp.asarray, (answers, rewards, mask))
    counts = mask & (answers >= 0) & (answers < n_answers)
    # Inside of jit a NaN cannot be refused: the question then has no answer.
    poisoned = (mask & jnp.isnan(rewards)).any(1, keepdims=True)
    return answers, counts & ~poisoned


def _first_best(value, answers, counts):
    """The answer of the first of the largest values that count; -1 if none does."""
    best = jnp.where(counts, value, -jnp.inf).argmax(1)
    chosen = jnp.take_along_axis(answers, best[:, None], 1)[:, 0]
    return jnp.where(counts.any(1), chosen, -1)


def solutions_of(
    records: Sequence[Mapping[str, Any]], *, answer: str = "parsed_answer",
    correct: str = "parsed_answer_correctness", rewards: str = "prm_reward",
) -> list[Solution]:  # fmt: skip
    """Solutions from the paper's records of one question.

    Raises:
      ValueError: a record without one of the fields, with its number.
    """
    found = []
    for i, record in enumerate(records):
        lacks = [k for k in (answer, correct, rewards) if record.get(k) is None]
        if lacks:
            raise ValueError(
                f"solution {i} lacks {', '.join(lacks)}; got {sorted(record)}"
            )
        found.append(Solution(record[answer], record[correct], record[rewards]))
    return found
