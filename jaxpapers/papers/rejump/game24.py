"""Game of 24 in exact arithmetic: expressions, answers, all puzzles.

Expressions are parsed, never evaluated as code: whole numbers, ``+ - * /`` (also ``×``,
``÷``, ``−``) and parentheses. Values are fractions, so 8 / (3 - 8 / 3) is 24.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

TARGET = 24
OPERATORS = "+-*/"
MAX_LENGTH, MAX_DEPTH = 1000, 50
_TOKEN = re.compile(r"\s*(\d{1,9}(?![\d.])|[-+*/()])")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


class Value(NamedTuple):
    """An expression's value, and the numbers that it is made of, from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Value:
    """The value of an expression.

    Raises:
      ValueError: no such expression, one that is too long or nested too deep, a division
        by zero.

    Example:
      >>> evaluate("8 / (3 - 8/3)")
      Value(value=Fraction(24, 1), numbers=(8, 3, 8, 3))
    """
    numbers: list[int] = []
    return Value(_exact(_parse(text), text, numbers), tuple(numbers))


def _exact(tree: Any, text: str, numbers: list[int]) -> Fraction:
    """The value of a parsed expression; appends its numbers."""
    if isinstance(tree, int):
        numbers.append(tree)
        return Fraction(tree)
    operator, *parts = tree
    values = [_exact(part, text, numbers) for part in parts]
    if len(values) == 1:
        return -values[0]
    value = apply(operator, *values)
    if value is None:
        raise ValueError(f"{text!r} divides by zero")
    return value


def _parse(text: str) -> Any:
    """An expression as whole numbers and tuples (operator, part, part)."""
    tokens = _tokens(text)
    tree = _sum(tokens, text, 0)
    if tokens:
        raise ValueError(f"{text!r}: {tokens[-1]!r} is too much")
    return tree


def _tokens(text: str) -> list[str]:
    if len(text) > MAX_LENGTH:
        raise ValueError(
            f"an expression of {len(text):,} characters, expected at most {MAX_LENGTH}"
        )
    source, tokens, place = text.translate(_SIGNS).rstrip(), [], 0
    while place < len(source):
        match = _TOKEN.match(source, place)
        if match is None:
            raise ValueError(
                f"{text!r}: expected a whole number, + - * / or a parenthesis, got "
                f"{source[place:].strip()[:10]!r}"
            )
        tokens.append(match[1])
        place = match.end()
    return tokens[::-1]  # The next one is the last.


def _sum(tokens: list[str], text: str, depth: int) -> Any:
    return _chain(tokens, text, depth, "+-", _product)


def _product(tokens: list[str], text: str, depth: int) -> Any:
    return _chain(tokens, text, depth, "*/", _factor)


def _chain(
    tokens: list[str], text: str, depth: int, operators: str, part: Callable
) -> Any:
    left = part(tokens, text, depth)
    while tokens and tokens[-1] in operators:
        operator = tokens.pop()
        left = (operator, left, part(tokens, text, depth))
    return left


def _factor(tokens: list[str], text: str, depth: int) -> Any:
    if not tokens:
        raise ValueError(f"{text!r} ends where a number is expected")
    token = tokens.pop()
    if token.isdigit():
        return int(token)
    if token not in "-(":
        raise ValueError(f"{text!r}: expected a number, got {token!r}")
    if depth >= MAX_DEPTH:
        raise ValueError(f"an expression nested deeper than {MAX_DEPTH}")
    if token == "-":
        return ("-", _factor(tokens, text, depth + 1))
    inner = _sum(tokens, text, depth + 1)
    if not tokens or tokens.pop() != ")":
        raise ValueError(f"{text!r} has a parenthesis that is not closed")
    return inner


def apply(operator: str, a: Fraction, b: Fraction) -> Fraction | None:
    """The result of an operator; None where it divides by zero."""
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    return a / b if b else None


def problem_with(text: str, numbers: Sequence[int]) -> str:
    """Why an answer is wrong; "" for a right one.

    Args:
      text: an expression, with or without "= 24" behind it.
      numbers: of the puzzle; each must be used exactly once.
    """
    expression, _, result = text.partition("=")
    if result.strip() not in ("", str(TARGET)):
        return f"it says that the result is {result.strip()[:20]}"
    try:
        value, used = evaluate(expression)
    except ValueError as e:
        return str(e)
    if sorted(used) != sorted(numbers):
        return f"it uses {sorted(used)}, expected {sorted(numbers)}"
    return "" if value == TARGET else f"its value is {value}"


def is_correct(text: str, numbers: Sequence[int]) -> bool:
    """Whether an answer has the value 24 and uses the numbers, each once.

    Example:
      >>> is_correct("5*(5-1/5) = 24", [1, 5, 5, 5]), is_correct("24", [1, 5, 5, 5])
      (True, False)
    """
    return not problem_with(text, numbers)


def reference_correct(text: str) -> bool:
    """What the reference's checker says: the value in floating point, of any numbers.

    It takes "24" for an answer, and 8 / (3 - 8/3) for none.
    """
    try:
        return _float(_parse(text.partition("=")[0])) == TARGET
    except (ValueError, ZeroDivisionError, OverflowError):
        return False


def _float(tree: Any) -> int | float:
    """The value of a parsed expression as Python computes it."""
    if isinstance(tree, int):
        return tree
    operator, *parts = tree
    values = [_float(part) for part in parts]
    if len(values) == 1:
        return -values[0]
    a, b = values
    if operator == "/":
        return a / b
    return a * b if operator == "*" else a + b if operator == "+" else a - b


@functools.cache
def _values(numbers: tuple[int, ...]) -> frozenset[Fraction]:
    """Every value that uses all the (sorted) numbers."""
    if len(numbers) == 1:
        return frozenset([Fraction(numbers[0])])
    values = set()
    for left, right in _splits(numbers):
        for a, b in itertools.product(_values(left), _values(right)):
            values |= {a + b, a - b, b - a, a * b}
            values |= {x / y for x, y in ((a, b), (b, a)) if y}
    return frozenset(values)


def _splits(numbers: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The ways to divide sorted numbers into two parts, each once."""
    seen, n = set(), len(numbers)
    for mask in range(1, 2 ** (n - 1)):  # The last one is always to the right.
        left = tuple(x for i, x in enumerate(numbers) if mask >> i & 1)
        right = tuple(x for i, x in enumerate(numbers) if not mask >> i & 1)
        if (left, right) not in seen:
            seen.add((left, right))
            yield left, right


def is_solvable(numbers: Iterable[int]) -> bool:
    """Whether some expression of the numbers, each used once, is 24."""
    for left, right in _splits(tuple(sorted(numbers))):
        others = _values(right)
        for a in _values(left):
            wanted = {TARGET - a, a - TARGET, a + TARGET, TARGET * a}
            wanted |= {Fraction(TARGET) / a, a / TARGET} if a else set()
            # a / b = 24 and b / a = 24 need a divisor that is not zero.
            for b in wanted & others:
                orders = ((a, b), (b, a))
                if any(apply(o, *x) == TARGET for o in OPERATORS for x in orders):
                    return True
    return False


@functools.cache
def puzzles() -> tuple[tuple[int, ...], ...]:
    """The 1,362 of all 1,820 multisets of four numbers 1..13 that have a solution."""
    every = itertools.combinations_with_replacement(range(1, 14), 4)
    solvable = tuple(numbers for numbers in every if is_solvable(numbers))
    assert len(solvable) == 1362
    return solvable
