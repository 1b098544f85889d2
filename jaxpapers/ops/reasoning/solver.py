"""A solver that makes errors of known types, and goes on from where they lead."""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxpapers.ops.reasoning.domains import DOMAINS, Domain
from jaxpapers.ops.reasoning.problems import OPTIONS, STEP, Problem

ERRORS = ("operation", "operand", "slip", "premise", "non_sequitur")
"""Another operation, another operand, a wrong result (a carry dropped), another state
than the last one's, and a step that has to do with nothing before it."""


class Position(NamedTuple):
    """Where a solution stands.

    Attributes:
      step: number of the next step; -1 after the answer.
      state: that the steps so far lead to.
      answer: letter, once given.
      wrong: whether a step so far was wrong.
    """

    step: int
    state: Any
    answer: str = ""
    wrong: bool = False


class Trace(NamedTuple):
    """A whole solution.

    Attributes:
      steps: words of each step, ended by ``<step>``.
      first_error: index of the first wrong step; -1: none.
      error: its type, "" if there is none.
      answer: letter.
      correct: whether it is the right one.
      first_word: index in the first wrong step of its first word that is not that of the
        right step; -1: none.
    """

    steps: Sequence[Sequence[str]]
    first_error: int
    error: str
    answer: str
    correct: bool
    first_word: int = -1

    @property
    def labels(self) -> list[int]:
        """Of the steps, see ``labels_of``."""
        return labels_of(self.first_error, len(self.steps))


def labels_of(first_error: int, count: int) -> list[int]:
    """1 for the steps before the first error, -1 from it on, as the paper has it."""
    good = count if first_error < 0 else first_error
    return [1] * good + [-1] * (count - good)


def start(problem: Problem) -> Position:
    """The position before the first step."""
    return Position(0, problem.start)


def advance(
    problem: Problem,
    position: Position,
    rng: random.Random,
    *,
    error: float,
    habit: float = 0.0,
    errors: Sequence[str] = ERRORS,
) -> tuple[list[str], Position, str]:
    """One more step.

    Args:
      problem: to solve.
      position: of the solution so far.
      rng: what is drawn from.
      error: chance of an error.
      habit: share of the errors that are the same whenever this problem is solved, so
        that wrong answers agree, as those of a language model do.
      errors: types.

    Returns:
      Words of the step, the position after it, and the type of its error, "" if none.

    Raises:
      ValueError: a position after the answer, or an unknown type.
    """
    if position.step < 0:
        raise ValueError(f"the solution has ended with the answer {position.answer}")
    unknown = set(errors) - set(ERRORS)
    if unknown or not errors:
        raise ValueError(f"errors must be among {ERRORS}, got {tuple(errors)}")
    kind = ""
    if rng.random() < error:
        if rng.random() < habit:
            rng = random.Random(f"{problem.domain}/{problem.number}/{position.step}")
        kind = rng.choice(errors)
    if position.step == len(problem.program):
        return _answer(problem, position, rng, kind)
    if kind:
        words, state, kind = corrupt(problem, position, rng, kind)
    else:
        words, state = _right(problem, position)
    wrong = position.wrong or bool(kind)
    return words, Position(position.step + 1, state, wrong=wrong), kind


def solve(
    problem: Problem,
    rng: random.Random,
    *,
    error: float,
    habit: float = 0.0,
    errors: Sequence[str] = ERRORS,
) -> Trace:
    """A whole solution; see ``advance``."""
    position, steps, first, kind, word = start(problem), [], -1, "", -1
    while position.step >= 0:
        before = position
        words, position, made = advance(
            problem, position, rng, error=error, habit=habit, errors=errors
        )
        if position.wrong and not before.wrong:
            first, kind, word = len(steps), made, _first_word(problem, before, words)
        steps.append(words)
    correct = position.answer == problem.answer
    return Trace(steps, first, kind, position.answer, correct, word)


def _first_word(problem, position, words) -> int:
    """Index of the first word that is not that of the right step."""
    if position.step == len(problem.program):
        return 1  # The letter.
    right, _ = _right(problem, position)
    return next(i for i, (x, y) in enumerate(zip(words, right)) if x != y)


def corrupt(
    problem: Problem, position: Position, rng: random.Random, kind: str
) -> tuple[list[str], Any, str]:
    """A step with an error of a type, which leads to another state than the right one.

    Where the domain has no such error (one operation only), or it would change nothing,
    the result is slipped.

    Returns:
      Words, the state that the step leads to, and the type.
    """
    domain = DOMAINS[problem.domain]
    op, operand = problem.program[position.step]
    state = position.state
    right = domain.apply(op, state, operand)
    for _ in range(8):
        before, o, x = state, op, operand
        if kind == "premise" or kind == "non_sequitur":
            before = domain.other(rng, state)
        if kind == "operation" or kind == "non_sequitur":
            o, x = _other_operation(domain, problem, rng, op, operand)
        if kind == "operand" or kind == "non_sequitur":
            x = domain.other_operand(rng, x)
        after = domain.apply(o, before, x)
        if kind == "non_sequitur":
            after = domain.other(rng, after)
        if after != right:
            return _write(domain, before, o, x, after), after, kind
    after = domain.other(rng, right)
    return _write(domain, state, op, operand, after), after, "slip"


def _other_operation(domain: Domain, problem, rng, op, operand):
    """Another operation that takes such an operand."""
    kind = type(operand)
    if problem.domain == "units":  # One takes a unit, the other a number.
        return op, operand
    others = [o for o in domain.ops if o != op]
    return (rng.choice(others), kind(operand)) if others else (op, operand)


def _right(problem, position):
    domain = DOMAINS[problem.domain]
    op, operand = problem.program[position.step]
    after = domain.apply(op, position.state, operand)
    return _write(domain, position.state, op, operand, after), after


def _write(domain: Domain, before, op, operand, after) -> list[str]:
    return [
        *domain.write(before), op, *domain.write_operand(operand), "=",
        *domain.write(after), STEP,
    ]  # fmt: skip


def _answer(problem, position, rng, kind):
    """The last step: the option that the state is, or any where it is none."""
    letters = OPTIONS[: len(problem.options)]
    found = [x for x, s in zip(letters, problem.options) if s == position.state]
    if kind or not found:
        kind = kind and "non_sequitur"
        letter = rng.choice([x for x in letters if x not in found])
    else:
        letter = found[0]
    wrong = position.wrong or bool(kind)
    words = ["answer", letter, STEP]
    return words, Position(-1, position.state, letter, wrong), kind
