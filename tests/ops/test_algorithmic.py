"""Algorithmic problems: recorded layouts, answers by plain Python, programs by hand."""

import itertools
import json

import jax
import numpy as np
import pytest

from jaxpapers.ops import algorithmic, rasp
from tests.programs import together


@pytest.mark.parity("lm", only=lambda entry: entry.get("kind") == "looped_tasks")
def test_recorded_layouts(case):
    examples = json.loads((case.folder / case.entry["file"]).read_text())
    assert examples
    for x in examples:
        tokens, targets = algorithmic.encode(x["task"], x["query"], x["answer"])
        assert (tokens, targets) == (x["input_ids"], x["target_ids"])
        first = len(x["query"].partition("*")[0])
        n = len(x["query"].rpartition("*" if x["task"] == "multi" else "+")[2])
        assert algorithmic.n_steps(x["task"], n, first) == x["T"]
        assert algorithmic.sequence_length(x["task"], n, first) == len(tokens)


def answers(name, query, n):
    """The answer in tokens, by Python's numbers."""
    bits = "".join(algorithmic.SYMBOLS[t] for t in query) if name != "dict" else ""
    if name == "dict":
        return list(dict.fromkeys(query))
    if name == "addition":
        a, b = bits.split("+")
        text = f"{int(a, 2) + int(b, 2):0{n + 1}b}"
    elif name == "multi":
        a, b = bits.split("*")
        text = f"{int(a, 2) * int(b, 2):0{len(a) + len(b)}b}"[::-1]
    elif name == "sum_reverse":
        text = f"{bits.count('1'):0{n.bit_length()}b}"[::-1]
    else:
        text = bits if name == "copy" else str(bits.count("1") % 2)
    return [algorithmic.SYMBOLS.index(x) for x in text]


@pytest.mark.parametrize("name", algorithmic.NAMES)
def test_answers_and_programs(name):
    """Drawn problems against Python, and the hand-written program against both."""
    sizes = ((5, 2), (70, 3)) if name == "multi" else ((1, 1), (70, 1))
    count = 300

    def compute(key):
        found = []
        for n, first in sizes:
            problem = algorithmic.draw(name, key, n, count, first=first)
            batch = algorithmic.lay_out(problem)
            found.append(
                (problem, batch, rasp.solve(name, batch["tokens"], problem.n_steps))
            )
        return found

    for (n, first), (problem, batch, solved) in zip(
        sizes, together(compute, jax.random.key(3))
    ):
        assert int(problem.n_steps) == n * first
        expected = np.zeros_like(batch["targets"])
        for row, query in enumerate(problem.query.tolist()):
            answer = answers(name, query, n)
            assert problem.answer[row, : len(answer)].tolist() == answer
            assert int(problem.answer_length[row]) == len(answer)
            start = len(query)
            expected[row, start : start + len(answer)] = answer
            weights = np.zeros(len(expected[row]))
            weights[start : start + len(answer) + 1] = 1
            np.testing.assert_array_equal(batch["weights"][row], weights)
        np.testing.assert_array_equal(batch["targets"], expected)
        np.testing.assert_array_equal(solved, expected)
        assert (batch["tokens"][:, problem.query.shape[1] + 1 :] == 0).all()


@pytest.mark.matrix
@pytest.mark.parametrize("name", algorithmic.NAMES)
def test_programs_on_many_lengths(name):
    """10,000 problems of lengths to 128."""
    for n in (2, 3, 17, 64, 128):
        first = 4 if name == "multi" else 1

        def compute(key, n=n, first=first):
            problem = algorithmic.draw(name, key, n, 2000, first=first)
            batch = algorithmic.lay_out(problem)
            solved = rasp.solve(name, batch["tokens"], problem.n_steps)
            return solved, batch["targets"]

        np.testing.assert_array_equal(*together(compute, jax.random.key(n)))


def test_one_step_less_is_wrong_for_half_of_the_parities():
    n = 8
    bits = np.array(list(itertools.product((0, 1), repeat=n)), np.int32)
    tokens = np.concatenate([bits + 2, np.full((2**n, 1), 1), np.zeros((2**n, 1))], 1)

    def compute(tokens):
        return [rasp.parity(tokens, steps)[:, n] for steps in (n, n - 1)]

    solved, short = together(compute, tokens.astype(np.int32))
    np.testing.assert_array_equal(solved, bits.sum(1) % 2 + 2)
    assert (short != solved).mean() == 0.5


def test_layout_of_the_next_token():
    """The answer is the input, one place later; pauses stand before it; padding after."""

    def compute(key):
        problem = algorithmic.draw("copy", key, 3, 2)
        plain = algorithmic.lay_out(problem, "next", pauses=2, pause=6, length=12)
        full = algorithmic.lay_out(problem, length=12, supervise_padding=True)
        mask = algorithmic.answer_positions(plain["tokens"], 2)
        return problem, plain, full, mask

    problem, plain, full, mask = together(compute, jax.random.key(0))
    q = problem.query[0].tolist()
    assert plain["tokens"][0].tolist() == [*q, 1, 6, 6, *q, 0, 0, 0]
    assert plain["targets"][0].tolist() == [0] * 5 + [*q] + [0] * 4
    assert plain["weights"][0].tolist() == [0] * 5 + [1] * 4 + [0] * 3
    assert mask[0].tolist() == [0] * 5 + [1] * 7
    assert full["tokens"][0].tolist() == [*q, 1] + [0] * 8
    assert full["weights"][0].tolist() == [0] * 3 + [1] * 9


def test_refuses():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="must be one of .*'parity'.*, got 'sorting'"):
        algorithmic.draw("sorting", key, 3, 2)
    with pytest.raises(ValueError, match="alphabet must be >= 1, got 3 and 0"):
        algorithmic.draw("dict", jax.random.key(0), 3, 3, alphabet=0)
    with pytest.raises(ValueError, match="length of a problem must be >= 1, got 0"):
        algorithmic.draw("copy", key, 0, 2)
    with pytest.raises(ValueError, match="at most 1 symbols, got 2: 10"):
        algorithmic.encode("parity", "110", "10", width=1)
    with pytest.raises(ValueError, match=r"symbols 01\+\*, got \['2'\]"):
        algorithmic.encode("copy", "2", "2")
    with pytest.raises(ValueError, match="a symbol or more"):
        algorithmic.encode("copy", "", "")
    problem = algorithmic.Problem(*np.zeros((2, 2, 3), int), np.zeros(2, int), 3)
    with pytest.raises(ValueError, match="a sequence of 7, longer than 6"):
        algorithmic.lay_out(problem, length=6)
    with pytest.raises(ValueError, match="full or next, got 'half'"):
        algorithmic.lay_out(problem, "half")
    with pytest.raises(ValueError, match="1 <= first <= last"):
        algorithmic.curriculum(3, 2, 10, 100)
    with pytest.raises(ValueError, match="does not fit a run of 20 steps"):
        algorithmic.curriculum(1, 3, 10, 20)
