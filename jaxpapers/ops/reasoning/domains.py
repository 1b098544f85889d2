"""Eight domains: their states, operations, and how both are written in words."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Words = list[str]
Operation = tuple[str, Any]

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
LETTERS = ("a", "b", "c", "d")
ABSENT = "."  # In the place of a letter that a set does not have.
BITS = ("F", "T")
DIGITS = tuple(map(str, range(10)))
NODES = ("p", "q", "r", "s", "t")
# Each chain: units from large to small, and how many of the next one each has.
UNITS = (
    (("gallons", 4), ("quarts", 2), ("pints", 2), ("cups", 1)),
    (("yards", 3), ("feet", 3), ("hands", 4), ("inches", 1)),
    (("dollars", 4), ("quarters", 5), ("nickels", 5), ("pennies", 1)),
)


class Domain(NamedTuple):
    """A domain: how its problems are drawn, computed, written and read.

    Attributes:
      ops: operations, by name; no other word of the domain has one of these names.
      draw: (rng, steps, below) -> (start, program, words of the question).
      apply: (op, state, operand) -> state; defined for every state that errors lead to.
      write: state -> words.
      read: words -> state; ValueError for others.
      write_operand: operand -> words.
      read_operand: words -> operand; ValueError for others.
      other: (rng, state) -> another state, near it.
      other_operand: (rng, operand) -> another operand.
    """

    ops: tuple[str, ...]
    draw: Callable
    apply: Callable
    write: Callable
    read: Callable
    write_operand: Callable
    read_operand: Callable
    other: Callable
    other_operand: Callable


def write_number(n: int) -> Words:
    """Digits of an integer, at least two: ``0 7``, ``3 1 2``, ``neg 1 0``."""
    return [*["neg"] * (n < 0), *f"{abs(n):02d}"]


def read_number(words: Sequence[str]) -> int:
    """The number that ``write_number`` wrote; ValueError for anything else."""
    negative = words[:1] == ["neg"]
    digits = words[negative:]
    if digits and all(w in DIGITS for w in digits):
        n = int("".join(digits)) * (-1 if negative else 1)
        if write_number(n) == list(words):
            return n
    raise ValueError(f"not a number: {' '.join(words)}")


def _near(rng: random.Random, n: Any) -> Any:
    """A number with another last or second digit."""
    return n + rng.choice((-10, -2, -1, 1, 2, 10))


def _near_operand(rng: random.Random, n: Any) -> Any:
    """A positive integer near another."""
    return rng.choice([m for m in (n - 2, n - 1, n + 1, n + 2, n + 3) if m > 0])


def _compute(op: str, state: Any, operand: Any) -> Any:
    if op == "divide":
        return state // operand
    return {"plus": state + operand, "minus": state - operand}.get(op, state * operand)


def _chain(rng, steps, below):
    """Numbers below a bound, and the operations from one to the next."""
    value, program = rng.randrange(1, below), []
    values = [value]
    while len(program) < steps:
        op = rng.choice(("plus", "minus", "times"))
        operand = rng.randrange(2, 6) if op == "times" else rng.randrange(1, below)
        after = _compute(op, value, operand)
        if 0 < after < below:
            program.append((op, operand))
            value = after
            values.append(value)
        elif below < 6 and rng.random() < 0.1:  # No product fits.
            value, program, values = rng.randrange(1, below), [], []
            values = [value]
    return values, program


def _draw_arithmetic(rng, steps, below):
    values, program = _chain(rng, steps, below)
    return values[0], program, ["from", *write_number(values[0]), *_told(program)]


def _told(program) -> Words:
    return [w for op, n in program for w in (op, *write_number(n))]


def _draw_equation(rng, steps, below):
    """x with some operations is y: they are undone, the last one first."""
    values, forward = _chain(rng, steps, below)
    undo = {"plus": "minus", "minus": "plus", "times": "divide"}
    program = [(undo[op], n) for op, n in reversed(forward)]
    return values[-1], program, ["x", *_told(forward), "is", *write_number(values[-1])]


_FACTORS = {unit: n for chain in UNITS for unit, n in chain}
_CHAIN = {unit: chain for chain in UNITS for unit, _ in chain}


def _convert(op, state, operand):
    value, unit = state
    if op == "add":
        return value + operand, unit
    names = [name for name, _ in _CHAIN[unit]]
    if operand not in names:
        return value, operand
    i, j = names.index(unit), names.index(operand)
    for name in names[min(i, j) : max(i, j)]:
        value = value * _FACTORS[name] if i < j else value // _FACTORS[name]
    return value, operand


def _draw_units(rng, steps, below):
    while True:
        names = [name for name, _ in rng.choice(UNITS)]
        first = rng.randrange(3)
        unit, state, program = first, (rng.randrange(1, 10), names[first]), []
        begin, ok = state, True
        while len(program) < steps:
            if unit + 1 < len(names) and rng.random() < 0.5:
                unit += 1
                program.append(("to", names[unit]))
            else:
                program.append(("add", rng.randrange(1, max(2, min(below, 30)))))
            state = _convert(program[-1][0], state, program[-1][1])
            ok = ok and state[0] < below
        if ok and any(op == "to" for op, _ in program):
            told = [w for op, x in program for w in (op, *_unit_operand(x))]
            return begin, program, ["from", *_write_amount(begin), *told]


def _write_amount(state) -> Words:
    return [*write_number(state[0]), state[1]]


def _read_amount(words):
    if not words or words[-1] not in _FACTORS:
        raise ValueError(f"not an amount: {' '.join(words)}")
    return read_number(words[:-1]), words[-1]


def _unit_operand(x) -> Words:
    return [x] if isinstance(x, str) else write_number(x)


def _read_unit_operand(words):
    return words[0] if words[:1] and words[0] in _FACTORS else read_number(words)


def _other_unit_operand(rng, x):
    if not isinstance(x, str):
        return _near_operand(rng, x)
    return rng.choice([name for name, _ in _CHAIN[x] if name != x])


def _draw_dates(rng, steps, below):
    day = rng.randrange(7)
    program = [
        (rng.choice(("after", "before")), rng.randrange(1, max(2, min(below, 31))))
        for _ in range(steps)
    ]
    return day, program, ["from", DAYS[day], *_told(program)]


def _word(words, known) -> int:
    if len(words) != 1 or words[0] not in known:
        raise ValueError(f"expected one of {known}, got {' '.join(words)}")
    return known.index(words[0])


def _bits(rng):
    return tuple(rng.random() < 0.5 for _ in range(3))


def _draw_logic(rng, steps, below):
    state = _bits(rng)
    program = [(rng.choice(_LOGIC), _bits(rng)) for _ in range(steps)]
    told = [w for op, x in program for w in (op, *_write_bits(x))]
    return state, program, ["from", *_write_bits(state), *told]


_LOGIC = ("and", "or", "xor", "implies")


def _connect(op, state, operand):
    connect = {
        "and": lambda p, q: p and q,
        "or": lambda p, q: p or q,
        "xor": lambda p, q: p != q,
        "implies": lambda p, q: not p or q,
    }[op]
    return tuple(map(connect, state, operand))


def _write_bits(bits) -> Words:
    return [BITS[x] for x in bits]


def _read_bits(words):
    if len(words) != 3 or not all(w in BITS for w in words):
        raise ValueError(f"expected three truth values, got {' '.join(words)}")
    return tuple(w == "T" for w in words)


def _other_bits(rng, bits):
    flip = rng.randrange(1, 8)
    return tuple(x != bool(flip >> i & 1) for i, x in enumerate(bits))


def _draw_path(rng, steps, below):
    """Every node has one arrow: the walk is where they lead, its length is asked."""
    longest = max(2, min(below // max(steps, 1), 20))
    arrows = {
        x: (rng.choice([y for y in NODES if y != x]), rng.randrange(1, longest))
        for x in NODES
    }
    node = rng.choice(NODES)
    begin, program = (node, 0), []
    for _ in range(steps):
        program.append(("go", arrows[node]))
        node = arrows[node][0]
    told = [w for x in NODES for w in (x, *_write_node(arrows[x]))]
    return begin, program, [*told, "from", begin[0]]


def _write_node(state) -> Words:
    return [state[0], *write_number(state[1])]


def _read_node(words):
    if words[:1] and words[0] in NODES:
        return words[0], read_number(words[1:])
    raise ValueError(f"expected a node and a number, got {' '.join(words)}")


def _other_node(rng, state):
    node, n = state
    if rng.random() < 0.5:
        return rng.choice([x for x in NODES if x != node]), n
    return node, n + rng.choice((1, 2, 3, 10))


def _draw_base(rng, steps, below):
    """Digits in another base, the last one first, by repeated division."""
    base = rng.randrange(2, 8)
    low, high = base ** (steps - 1), min(base**steps, max(below, 2))
    while low >= high:  # A number below the bound has fewer digits in this base.
        steps, base = (steps - 1, 2) if base == 2 else (steps, base - 1)
        low, high = base ** max(steps - 1, 0), min(base**steps, max(below, 2))
    n = rng.randrange(low, high)
    program = [("divide", base)] * steps
    return (n, ()), program, ["from", *write_number(n), "base", *write_number(base)]


def _divide(op, state, operand):
    quotient, rests = state
    return quotient // operand, (*rests, quotient % operand)


def _write_rests(state) -> Words:
    return [*write_number(state[0]), "rest", *(DIGITS[r] for r in state[1])]


def _read_rests(words):
    if words.count("rest") != 1:
        raise ValueError(f"expected a number and its rests, got {' '.join(words)}")
    i = words.index("rest")
    if not all(w in DIGITS for w in words[i + 1 :]):
        raise ValueError(f"rests are digits, got {' '.join(words[i + 1 :])}")
    return read_number(words[:i]), tuple(map(int, words[i + 1 :]))


def _other_rests(rng, state):
    quotient, rests = state
    if rests and rng.random() < 0.5:
        new = rng.choice([r for r in range(7) if r != rests[-1]])
        return quotient, (*rests[:-1], new)
    return quotient + rng.choice((-1, 1, 2) if quotient else (1, 2)), rests


def _other_base(rng, base):
    return rng.choice([b for b in range(2, 8) if b != base])


def _some(rng):
    return frozenset(rng.sample(LETTERS, rng.randrange(1, 4)))


def _draw_sets(rng, steps, below):
    state = _some(rng)
    program = [(rng.choice(_SETS), _some(rng)) for _ in range(steps)]
    told = [w for op, x in program for w in (op, *_write_set(x))]
    return state, program, ["from", *_write_set(state), *told]


_SETS = ("union", "without", "common", "either")


def _combine(op, state, operand):
    return {
        "union": state | operand,
        "without": state - operand,
        "common": state & operand,
        "either": state ^ operand,
    }[op]


def _write_set(state) -> Words:
    """Every letter has its place, as truth values have: an operation is one for each."""
    return [x if x in state else ABSENT for x in LETTERS]


def _read_set(words):
    state = frozenset(words) - {ABSENT}
    if _write_set(state) != list(words):
        raise ValueError(f"expected a set of letters, got {' '.join(words)}")
    return state


def _other_set(rng, state):
    return state ^ {rng.choice(LETTERS)}


def _numbers(ops, draw):
    return Domain(
        ops, draw, _compute, write_number, read_number, write_number, read_number,
        _near, _near_operand,
    )  # fmt: skip


DOMAINS: dict[str, Domain] = {
    "arithmetic": _numbers(("plus", "minus", "times"), _draw_arithmetic),
    "equations": _numbers(("plus", "minus", "divide", "times"), _draw_equation),
    "units": Domain(
        ("to", "add"), _draw_units, _convert, _write_amount, _read_amount,
        _unit_operand, _read_unit_operand,
        lambda rng, s: (_near(rng, s[0]), s[1]), _other_unit_operand,
    ),
    "dates": Domain(
        ("after", "before"), _draw_dates,
        lambda op, s, n: (s + n if op == "after" else s - n) % 7,
        lambda s: [DAYS[s]], lambda words: _word(words, DAYS), write_number, read_number,
        lambda rng, s: (s + rng.randrange(1, 7)) % 7, _near_operand,
    ),
    "logic": Domain(
        _LOGIC, _draw_logic, _connect, _write_bits, _read_bits, _write_bits, _read_bits,
        _other_bits, _other_bits,
    ),
    "paths": Domain(
        ("go",), _draw_path, lambda op, s, x: (x[0], s[1] + x[1]), _write_node,
        _read_node, _write_node, _read_node, _other_node, _other_node,
    ),
    "bases": Domain(
        ("divide",), _draw_base, _divide, _write_rests, _read_rests, write_number,
        read_number, _other_rests, _other_base,
    ),
    "sets": Domain(
        _SETS, _draw_sets, _combine, _write_set, _read_set, _write_set, _read_set,
        _other_set, _other_set,
    ),
}  # fmt: skip
MATH = ("arithmetic", "equations")
