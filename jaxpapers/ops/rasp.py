"""The looped programs that solve the problems of ``ops.algorithmic``, written by hand.

An n-RASP-L program (Fan et al., arXiv 2409.15647) is a fixed preparation, one program P'
applied T(n) times, and a fixed reading of the answer; each part uses element-wise
operations, shifts and selections and no loop. Here they are on int32 arrays: exact
answers for tests, and what a looped transformer has to find.

All take ``tokens`` (B, L) in the layout ``full`` and the number of applications, and give
the predictions (B, L): the answer from ``QUERY_END`` on and ``EOS`` everywhere else.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxpapers.ops.algorithmic import EOS, ONE, PLUS, QUERY_END, TIMES, ZERO, check

Tokens = Int[Array, "B L"]


def parity(tokens: Tokens, n_steps: int | Array) -> Tokens:
    """P': the running answer, shifted right by one, XOR the query."""
    query, place = _query(tokens), _place(tokens)
    bits = jnp.where(query, tokens == ONE, False).astype(jnp.int32)
    state = _repeat(lambda s: _right(s) ^ bits, bits, n_steps)
    return jnp.where(place == 0, state + ZERO, EOS)


def copy(tokens: Tokens, n_steps: int | Array) -> Tokens:
    """P': everything shifted right by one."""
    place, length = _place(tokens), _length(_query(tokens))
    query = jnp.where(_query(tokens), tokens, EOS)
    state = _repeat(_right, query, n_steps)
    return jnp.where((place >= 0) & (place < length), state, EOS)


def addition(tokens: Tokens, n_steps: int | Array) -> Tokens:
    """P': sum without carry (XOR), and the carries (AND) one place to the left.

    The preparation puts both operands under the places of the answer, most significant
    first, and applies P' once; so T(n) = n, as in the paper's experiments.
    """
    place, n = _place(tokens), _length(_before(tokens, PLUS))
    digit = (place >= 1) & (place <= n)
    a = jnp.where(digit, _at(tokens, place - 1) == ONE, False).astype(jnp.int32)
    b = jnp.where(digit, _at(tokens, n + place) == ONE, False).astype(jnp.int32)

    def program(state):
        total, carry = state
        return total ^ carry, _left(total & carry)

    total, _ = _repeat(program, program((a, b)), n_steps)
    return jnp.where((place >= 0) & (place <= n), total + ZERO, EOS)


def sum_reverse(tokens: Tokens, n_steps: int | Array) -> Tokens:
    """P': the query shifts right, the bit that reaches its end is counted.

    A digit of the counter flips if all less significant ones, which stand before it,
    are 1.
    """
    query, place = _query(tokens), _place(tokens)
    length = _length(query)
    width = jnp.ceil(jnp.log2(length + 1.0)).astype(jnp.int32)
    bits = jnp.where(query, tokens == ONE, False).astype(jnp.int32)
    zero = jnp.zeros_like(bits)

    def program(state):
        bits, counter = state
        bits = _right(bits)
        new = jnp.where(place == 0, bits, 0).sum(1, keepdims=True)
        return bits, _increment(counter, new * jnp.ones_like(bits), place, 0)

    _, counter = _repeat(program, (bits, zero), n_steps)
    return jnp.where((place >= 0) & (place < width), counter + ZERO, EOS)


def multi(tokens: Tokens, n_steps: int | Array) -> Tokens:
    """P': the next product of two bits, a_i b_j, is added at place i + j.

    A pointer goes over the bits of b and, at their end, moves on in a.
    """
    place = _place(tokens)
    m = _length(_before(tokens, TIMES))
    n = _length(_query(tokens)) - m - 1
    zero = jnp.zeros_like(m)

    def program(state):
        i, j, counter = state
        a, b = _at(tokens, m - 1 - i) == ONE, _at(tokens, m + n - j) == ONE
        counter = _increment(counter, (a & b).astype(jnp.int32), place, i + j)
        last = j == n - 1
        return jnp.where(last, i + 1, i), jnp.where(last, 0, j + 1), counter

    start = (zero, zero, jnp.zeros_like(tokens))
    counter = _repeat(program, start, n_steps)[2]
    return jnp.where((place >= 0) & (place < m + n), counter + ZERO, EOS)


def distinct(tokens: Tokens, n_steps: int | Array) -> Tokens:
    """P': the query's next symbol is appended to the answer unless it is there."""
    place, query = _place(tokens), _query(tokens)
    length = _length(query)
    start = (jnp.zeros_like(length), jnp.zeros_like(length), jnp.zeros_like(tokens))

    def program(state):
        t, size, answer = state
        symbol = _at(tokens, t)
        known = ((place >= 0) & (answer == symbol)).any(1, keepdims=True)
        new = ~known & (t < length)
        answer = jnp.where(new & (place == size), symbol, answer)
        return t + 1, size + new, answer

    return _repeat(program, start, n_steps)[2]


def solve(name: str, tokens: Tokens, n_steps: int | Array) -> Tokens:
    """The program of a problem.

    Raises:
      ValueError: an unknown name.
    """
    check(name)
    programs = {
        "parity": parity, "copy": copy, "addition": addition,
        "sum_reverse": sum_reverse, "multi": multi, "dict": distinct,
    }  # fmt: skip
    return programs[name](tokens, n_steps)


def _repeat(program: Callable, state, n_steps):
    return jax.lax.fori_loop(0, n_steps, lambda _, state: program(state), state)


def _query(tokens):
    """Whether a position is before ``QUERY_END``."""
    return _before(tokens, QUERY_END)


def _before(tokens, token):
    return jnp.cumsum(tokens == token, 1) == 0


def _length(positions):
    """Number of positions, (B, 1)."""
    return positions.sum(1, keepdims=True, dtype=jnp.int32)


def _place(tokens):
    """Places of the answer: 0 at ``QUERY_END``, negative before it."""
    length = _length(_query(tokens))
    return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] - length


def _at(tokens, index):
    """tokens[b, index[b, ...]], for an index within bounds."""
    index = jnp.clip(index, 0, tokens.shape[1] - 1)
    return jnp.take_along_axis(tokens, index, 1)


def _right(x):
    return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


def _left(x):
    return jnp.pad(x, ((0, 0), (0, 1)))[:, 1:]


def _increment(counter, bit, place, at):
    """A counter, least significant digit first, with ``bit`` added at place ``at``."""
    zeros = (place >= at) & (counter == 0)
    before = jnp.cumsum(zeros, 1) - zeros
    return counter ^ jnp.where((place >= at) & (before == 0), bit, 0)
