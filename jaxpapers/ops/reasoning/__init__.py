"""Problems of eight domains whose solutions have an exact label for every step.

A problem is a start and a program of operations; a solution writes one step for each and
names one of the options. A stochastic solver makes typed errors and goes on from where
they lead; the verifier reads the words of a solution and finds its first wrong step.

All of it is host code on words; ``VOCABULARY`` numbers them. A digit is a word, and so
are a truth value, a letter of a set and a day: a small model learns rules of digits,
where it would have to learn a sum of two-digit words by heart.
"""

from jaxpapers.ops.reasoning.domains import DOMAINS, MATH, Domain
from jaxpapers.ops.reasoning.problems import (
    PAD,
    QUESTION,
    STEP,
    VOCABULARY,
    Problem,
    ids,
    problem,
    result,
    text,
    words,
)
from jaxpapers.ops.reasoning.solver import (
    ERRORS,
    Position,
    Trace,
    advance,
    corrupt,
    labels_of,
    solve,
    start,
)
from jaxpapers.ops.reasoning.verifier import first_error, parse_step

__all__ = [
    "DOMAINS", "ERRORS", "MATH", "PAD", "QUESTION", "STEP", "VOCABULARY", "Domain",
    "Position", "Problem", "Trace", "advance", "corrupt", "first_error", "ids",
    "labels_of", "parse_step", "problem", "result", "solve", "start", "text", "words",
]  # fmt: skip
