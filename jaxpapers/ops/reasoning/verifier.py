"""Reads the words of a solution and recomputes every step."""

from collections.abc import Sequence
from typing import Any

from jaxpapers.ops.reasoning.domains import DOMAINS
from jaxpapers.ops.reasoning.problems import OPTIONS, STEP, Problem


def parse_step(problem: Problem, words: Sequence[str]) -> tuple[Any, str, Any, Any]:
    """(state before, operation, operand, state after) of a step's words.

    Raises:
      ValueError: words that are no step of the domain.
    """
    domain = DOMAINS[problem.domain]
    words = list(words)
    if words[-1:] != [STEP] or STEP in words[:-1]:
        raise ValueError(f"a step ends with {STEP}, got {' '.join(words)}")
    at = [i for i, w in enumerate(words) if w in domain.ops]
    if len(at) != 1 or words.count("=") != 1 or words.index("=") < at[0]:
        raise ValueError(
            f"expected a state, one of {domain.ops}, an operand, = and a state, got "
            f"{' '.join(words)}"
        )
    i, j = at[0], words.index("=")
    return (
        domain.read(words[:i]),
        words[i],
        domain.read_operand(words[i + 1 : j]),
        domain.read(words[j + 1 : -1]),
    )


def first_error(problem: Problem, steps: Sequence[Sequence[str]]) -> int:
    """Index of the first step that does not follow; -1 if all do.

    A step follows if it starts from the state before it, does what the question says next
    and computes it right; the answer, if it names the option that the last state is. What
    cannot be read does not follow. A solution that ends early has no error so far.
    """
    domain, state = DOMAINS[problem.domain], problem.start
    for k, words in enumerate(steps):
        if k > len(problem.program):
            return k
        if k == len(problem.program):
            letters = OPTIONS[: len(problem.options)]
            right = [x for x, s in zip(letters, problem.options) if s == state]
            if list(words) not in [["answer", x, STEP] for x in right]:
                return k
            continue
        try:
            before, op, operand, after = parse_step(problem, words)
        except ValueError:
            return k
        if before != state or (op, operand) != problem.program[k]:
            return k
        state = domain.apply(op, before, operand)
        if after != state:
            return k
    return -1
