"""Six algorithmic problems as unlimited data: generators, layouts and numbers of steps.

Fan, Du, Ramchandran, Lee. "Looped Transformers for Length Generalization", 2024, arXiv
2409.15647. A problem of length n is solved by one program applied T(n) times
(``ops.rasp`` has these programs):

| problem | query | answer | T(n) |
|---|---|---|---|
| parity | n bits | their sum modulo 2 | n |
| copy | n bits | the query | n |
| addition | a + b, n bits each, most significant first | n + 1 bits, the same order | n |
| sum_reverse | n bits | number of ones, least significant bit first | n |
| multi | a * b, n1 and n bits | n1 + n bits, least significant first | n1 n |
| dict | n symbols | the distinct ones in order of appearance | n |

Tokens: ``EOS`` ends the answer and pads, ``QUERY_END`` stands between query and answer,
then come the problem's symbols. Arithmetic is on arrays of bits: numbers of any length.
Names of shapes: B batch, M query, K answer, L sequence.
"""

import string
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

EOS, QUERY_END, ZERO, ONE, PLUS, TIMES = range(6)
SYMBOLS = "#>01+*"
NAMES = ("parity", "copy", "addition", "sum_reverse", "multi", "dict")
DEPTHS = {
    "parity": 1, "copy": 2, "addition": 3, "sum_reverse": 3, "multi": 4, "dict": 3,
}  # fmt: skip
"""Layers of the looped block that the paper takes for each problem."""


class Problem(NamedTuple):
    """A batch of problems of one length.

    Attributes:
      query: tokens (B, M).
      answer: tokens (B, K), padded with ``EOS``.
      answer_length: (B,), without the ``EOS`` that ends the answer.
      n_steps: T(n).
    """

    query: Int[Array, "B M"]
    answer: Int[Array, "B K"]
    answer_length: Int[Array, " B"]
    n_steps: int


def check(name: str, n: int = 1, first: int = 1) -> None:
    """Refuses what is no problem.

    Raises:
      ValueError: an unknown name, or lengths below 1.
    """
    if name not in NAMES:
        raise ValueError(f"the problem must be one of {NAMES}, got {name!r}")
    for what, length in (("problem", n), ("problem's first operand", first)):
        if length < 1:
            raise ValueError(f"the length of a {what} must be >= 1, got {length}")


def n_steps(name: str, n: int, first: int = 1) -> int:
    """T(n), the applications of the program that a problem of length n needs.

    Args:
      name: of the problem.
      n: length; of multi, of the second operand.
      first: multi: length of the first operand.
    """
    check(name, n, first)
    return n * first if name == "multi" else n


def sequence_length(name: str, n: int, first: int = 1) -> int:
    """L of a problem: query, ``QUERY_END`` and the longest answer."""
    check(name, n, first)
    query = {"addition": 2 * n + 1, "multi": first + 1 + n}.get(name, n)
    answer = {
        "parity": 1,
        "addition": n + 1,
        "sum_reverse": n.bit_length(),
        "multi": first + n,
    }.get(name, n)
    return query + 1 + answer


def vocabulary(name: str, alphabet: int = 50) -> int:
    """Number of tokens of a problem."""
    check(name)
    return 2 + alphabet if name == "dict" else len(SYMBOLS)


def draw(
    name: str,
    key: Key[Array, ""],
    n: int,
    batch: int,
    *,
    first: int = 1,
    alphabet: int = 50,
) -> Problem:
    """Independent problems of length n, every symbol uniform.

    Args:
      name: of the problem.
      key: of the draws.
      n: length, static.
      batch: B.
      first: multi: length of the first operand.
      alphabet: dict: number of symbols.

    Raises:
      ValueError: see ``check``; a batch or an alphabet below 1.
    """
    check(name, n, first)
    if batch < 1 or alphabet < 1:
        raise ValueError(f"batch and alphabet must be >= 1, got {batch} and {alphabet}")
    if name == "dict":
        symbols = jax.random.randint(key, (batch, n), 0, alphabet, jnp.int32)
        return _with_length(symbols + 2, *_distinct(symbols + 2), n)
    lengths = {"addition": (n, n), "multi": (first, n)}.get(name, (n,))
    bits = jax.random.bernoulli(key, 0.5, (batch, sum(lengths))).astype(jnp.int32)
    a, b = bits[:, : lengths[0]], bits[:, lengths[0] :]
    answer = {
        "parity": lambda: a.sum(1, keepdims=True) % 2,
        "copy": lambda: a,
        "addition": lambda: _sum(a, b),
        "sum_reverse": lambda: _ones(a),
        "multi": lambda: _product(a, b),
    }[name]()
    query = a + ZERO
    if len(lengths) == 2:
        sign = jnp.full((batch, 1), PLUS if name == "addition" else TIMES, jnp.int32)
        query = jnp.concatenate([a + ZERO, sign, b + ZERO], 1)
    size = jnp.full((batch,), answer.shape[1], jnp.int32)
    return _with_length(query, answer + ZERO, size, n_steps(name, n, first))


def _with_length(query, answer, size, steps) -> Problem:
    used = jnp.arange(answer.shape[1])[None, :] < size[:, None]
    return Problem(query, jnp.where(used, answer, EOS), size, steps)


def _sum(a: jax.Array, b: jax.Array) -> jax.Array:
    """Bits of a + b, most significant first."""

    def add(carry, pair):
        total = pair.sum(0) + carry
        return total // 2, total % 2

    columns = jnp.stack([a, b])[:, :, ::-1].transpose(2, 0, 1)
    carry, digits = jax.lax.scan(add, jnp.zeros_like(a[:, 0]), columns)
    return jnp.concatenate([carry[None], digits[::-1]]).T


def _ones(bits: jax.Array) -> jax.Array:
    """Bits of the number of ones, least significant first."""
    places = jnp.arange(bits.shape[1].bit_length(), dtype=jnp.int32)
    return (bits.sum(1, keepdims=True) >> places[None, :]) & 1


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Bits of a * b, least significant first."""
    m, n = a.shape[1], b.shape[1]
    columns = jnp.zeros((m + n, len(a)), jnp.int32)
    for i in range(m):
        column = (a[:, m - 1 - i : m - i] * b[:, ::-1]).T
        columns = columns.at[i : i + n].add(column)

    def carry(carried, column):
        total = column + carried
        return total // 2, total % 2

    return jax.lax.scan(carry, jnp.zeros_like(a[:, 0]), columns)[1].T


def _distinct(symbols: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distinct symbols in order of first appearance, and their number."""
    same = symbols[:, :, None] == symbols[:, None, :]
    earlier = np.tril(np.ones(same.shape[1:], bool), -1)
    new = ~(same & earlier[None]).any(2)
    order = jnp.argsort(~new, axis=1, stable=True)
    return jnp.take_along_axis(symbols, order, 1), new.sum(1).astype(jnp.int32)


def lay_out(
    problem: Problem,
    layout: str = "full",
    *,
    pauses: int = 0,
    pause: int = 0,
    length: int = 0,
    supervise_padding: bool = False,
) -> dict[str, Array]:
    """Sequences of a model's training step.

    full: query, ``QUERY_END``, then an ``EOS`` for each token of the answer, all of which
    are predicted at once, from ``QUERY_END`` on, with an ``EOS`` after the answer.
    next: query, ``QUERY_END``, the answer; every token predicts the next one.

    Args:
      problem: see ``draw``.
      layout: full or next.
      pauses: next: tokens between ``QUERY_END`` and the answer.
      pause: next: their id.
      length: pad with ``EOS`` to it; 0: not at all.
      supervise_padding: what follows the answer's ``EOS`` is to be ``EOS`` as well.

    Returns:
      ``tokens`` and ``targets`` int32 (B, L), ``weights`` float32 (B, L), 1 where a
      target counts, ``n_steps`` int32 (B,).

    Raises:
      ValueError: an unknown layout, or a sequence longer than ``length``.
    """
    if layout not in ("full", "next"):
        raise ValueError(f"the layout must be full or next, got {layout!r}")
    query, answer = problem.query, problem.answer
    rows, start, size = len(query), query.shape[1], answer.shape[1]
    if layout == "full":
        pauses, given = 0, jnp.full_like(answer, EOS)
    else:
        given = answer
    total = start + 1 + pauses + size
    if length and total > length:
        raise ValueError(
            f"a query of {start} and an answer of {size} tokens make a sequence of "
            f"{total}, longer than {length}"
        )
    end = jnp.full((rows, 1), QUERY_END, jnp.int32)
    between = jnp.full((rows, pauses), pause, jnp.int32)
    extra = ((0, 0), (0, max(length - total, 0)))
    tokens = jnp.pad(jnp.concatenate([query, end, between, given], 1), extra)
    targets = jnp.pad(answer, ((0, 0), (start + pauses, 1 + extra[1][1])))
    place = jnp.arange(targets.shape[1])[None, :] - start - pauses
    last = problem.answer_length[:, None]
    counted = place >= 0
    if not supervise_padding:
        counted &= place <= last
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": jnp.broadcast_to(counted, targets.shape).astype(jnp.float32),
        "n_steps": jnp.full((rows,), problem.n_steps, jnp.int32),
    }


def answer_positions(tokens: Int[Array, "B L"], pauses: int = 0) -> Float[Array, "B L"]:
    """1 where a part of the answer, or its ``EOS``, is predicted; known without labels.

    All positions from ``QUERY_END``, or the last pause, on: sequences without padding.
    """
    after = jnp.cumsum(tokens == QUERY_END, 1) > 0
    if pauses:
        after = jnp.pad(after, ((0, 0), (pauses, 0)))[:, : tokens.shape[1]]
    return after.astype(jnp.float32)


def encode(
    name: str, query: str, answer: str, width: int = 0
) -> tuple[list[int], list[int]]:
    """Tokens and targets of one problem given as text, in the layout ``full``.

    Args:
      name: of the problem; the symbols of dict are letters.
      query: such as "011+001".
      answer: such as "0100".
      width: places for the answer; 0: as many as it has.

    Returns:
      Tokens, and targets with -1 where none counts.

    Raises:
      ValueError: an unknown problem or symbol, an empty query or answer, or an answer
        longer than ``width``.

    Example:
      >>> encode("parity", "011", "0")
      ([2, 3, 3, 1, 0], [-1, -1, -1, 2, 0])
    """
    check(name)
    symbols = "#>" + string.ascii_letters if name == "dict" else SYMBOLS
    wrong = sorted(set(query + answer) - set(symbols[2:]))
    if wrong:
        raise ValueError(f"{name} has the symbols {symbols[2:]}, got {wrong}")
    if not query or not answer:
        raise ValueError(
            f"query and answer must have a symbol or more, got {query!r} and {answer!r}"
        )
    width = width or len(answer)
    if len(answer) > width:
        raise ValueError(
            f"the answer must have at most {width} symbols, got {len(answer)}: {answer}"
        )
    ids = [[symbols.index(x) for x in text] for text in (query, answer)]
    targets = [-1] * len(query) + ids[1] + [EOS]
    tokens = [*ids[0], QUERY_END] + [EOS] * width
    return tokens, targets + [-1] * (len(tokens) - len(targets))


def curriculum(
    first: int, last: int, interval: int, steps: int
) -> Sequence[tuple[int, int]]:
    """Largest training length and the step up to which it holds, one after the other.

    The length grows by 1 every ``interval`` steps; the last one holds to the end.

    Args:
      first: length of the start.
      last: largest length.
      interval: steps between; 0: ``last`` from the start.
      steps: of the run.

    Raises:
      ValueError: lengths that do not rise from 1 on, or a run that ends before the
        largest length.

    Example:
      >>> curriculum(1, 3, 100, 1000)
      [(1, 100), (2, 200), (3, 1000)]
    """
    if not 1 <= first <= last or interval < 0:
        raise ValueError(
            "a curriculum needs 1 <= first <= last length and an interval >= 0, got "
            f"{first}, {last} and {interval}"
        )
    lengths = range(first, last + 1) if interval else [last]
    until = [(i + 1) * interval for i in range(len(lengths) - 1)] + [steps]
    if len(until) > 1 and until[-2] >= steps:
        raise ValueError(
            f"a curriculum of {len(lengths)} lengths, {interval} steps each, does not "
            f"fit a run of {steps} steps"
        )
    return list(zip(lengths, until))
