"""A problem with its options, as words and as numbers of words."""

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.ops.reasoning.domains import (
    ABSENT,
    BITS,
    DAYS,
    DIGITS,
    DOMAINS,
    LETTERS,
    NODES,
    UNITS,
    Operation,
)

PAD, QUESTION, STEP = "<pad>", "<question>", "<step>"
MOST_TRIES = 1000  # States that are drawn for the options of a problem.
OPTIONS = ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J")

VOCABULARY: dict[str, int] = {
    word: i
    for i, word in enumerate(
        dict.fromkeys(
            [
                PAD, QUESTION, STEP, "+", "-", *DIGITS, *DOMAINS,
                *(op for domain in DOMAINS.values() for op in domain.ops),
                "from", "x", "is", "neg", "base", "rest", "=", "answer",
                "options", *DAYS, *LETTERS, ABSENT, *BITS, *NODES,
                *(unit for chain in UNITS for unit, _ in chain), *OPTIONS,
            ]
        )
    )
}  # fmt: skip
"""Word -> id; ``<step>`` ends a step and ``<question>`` the question."""


class Problem(NamedTuple):
    """A problem.

    Attributes:
      domain: name.
      start: first state.
      program: operations of the right solution.
      told: words of the question, without the options.
      options: states, one of them the answer.
      number: of the problem, which the solver's habits depend on.
    """

    domain: str
    start: Any
    program: Sequence[Operation]
    told: Sequence[str]
    options: Sequence[Any]
    number: int

    @property
    def answer(self) -> str:
        """Letter of the right option."""
        return OPTIONS[self.options.index(result(self))]

    def question(self) -> list[str]:
        """Words of the question and its options, with the token that ends them."""
        write = DOMAINS[self.domain].write
        told = [w for x, s in zip(OPTIONS, self.options) for w in (x, *write(s))]
        return [self.domain, *self.told, "options", *told, QUESTION]


def problem(
    domain: str,
    number: int,
    *,
    steps: tuple[int, int] = (3, 5),
    below: int = 100,
    options: int = 5,
    seed: int = 0,
) -> Problem:
    """Problem ``number`` of a domain, a function of its arguments alone.

    Args:
      domain: one of ``DOMAINS``.
      number: of the problem.
      steps: fewest and most operations.
      below: bound of operands and of the numbers of a right solution.
      options: choices, 2 to 10; wrong ones are where errors lead.
      seed: of all problems.

    Raises:
      ValueError: an unknown domain, arguments out of range, more options than the domain
        has results.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {tuple(DOMAINS)}, got {domain!r}")
    if not 1 <= steps[0] <= steps[1] or not 10 <= below <= 1000:
        raise ValueError(
            "steps must be 1 <= fewest <= most and below in 10 to 1000, got "
            f"{steps=}, {below=}"
        )
    if not 2 <= options <= len(OPTIONS):
        raise ValueError(f"options must be in 2 to {len(OPTIONS)}, got {options}")
    rng = random.Random(f"{seed}/{domain}/{number}")
    start, program, told = DOMAINS[domain].draw(rng, rng.randint(*steps), below)
    new = Problem(domain, start, tuple(program), tuple(told), (), number)
    right = result(new)
    wrong: list[Any] = []
    for _ in range(MOST_TRIES):
        state = _mistaken(rng, new)
        if state != right and state not in wrong:
            wrong.append(state)
        if len(wrong) == options - 1:
            break
    else:
        raise ValueError(
            f"errors in {domain} lead to {len(wrong) + 1} results, and options={options} "
            "were asked for; take fewer"
        )
    wrong.insert(rng.randrange(options), right)
    return new._replace(options=tuple(wrong))


def result(problem: Problem) -> Any:
    """State after the whole program."""
    state = problem.start
    for op, operand in problem.program:
        state = DOMAINS[problem.domain].apply(op, state, operand)
    return state


def _mistaken(rng, problem) -> Any:
    """Where the program leads with an error in one of its steps."""
    domain, state = DOMAINS[problem.domain], problem.start
    at = rng.randrange(len(problem.program))
    for k, (op, operand) in enumerate(problem.program):
        if k == at and rng.random() < 0.5:
            operand = domain.other_operand(rng, operand)
        elif k == at:
            state = domain.other(rng, state)
        state = domain.apply(op, state, operand)
    # Where errors vanish (sets, truth values) the state itself is another.
    return domain.other(rng, state) if rng.random() < 0.2 else state


def ids(words: Iterable[str]) -> np.ndarray:
    """Numbers of words, int32; ValueError for a word that is not in the vocabulary."""
    words = list(words)
    unknown = [w for w in words if w not in VOCABULARY]
    if unknown:
        raise ValueError(f"not in the vocabulary: {sorted(set(unknown))[:6]}")
    return np.array([VOCABULARY[w] for w in words], np.int32)


def text(words: Iterable[str]) -> str:
    """Words as text for a language model: numbers whole, without the marks of steps.

    Example:
      >>> text(["3", "4", "plus", "0", "5", "=", "3", "9", "<step>"])
      '34 plus 5 = 39'
    """
    told: list[str] = []
    for is_digit, group in itertools.groupby(words, key=DIGITS.__contains__):
        run = [w for w in group if w not in (QUESTION, STEP, PAD)]
        # Rests are digits of their own.
        whole = is_digit and told[-1:] != ["rest"]
        told += [str(int("".join(run)))] if whole else run
    return " ".join(told)


def words(told: str) -> list[str]:
    """Words of a text, the inverse of ``text``; numbers have at least two digits.

    Words that are not in the vocabulary stay as they are.

    Example:
      >>> words("34 plus 5 = 39")
      ['3', '4', 'plus', '0', '5', '=', '3', '9']
    """
    made: list[str] = []
    rest = False
    for word in told.split():
        number = word.isascii() and word.isdigit()
        made += f"{int(word):02d}" if number and not rest else [word]
        rest = word == "rest" or rest and number
    return made
