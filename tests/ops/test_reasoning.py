"""Problems with exact labels: the verifier against the solver, and both by hand."""

import random
from collections import Counter

import numpy as np
import pytest

from jaxpapers.ops import reasoning
from jaxpapers.ops.reasoning import DOMAINS, ERRORS
from jaxpapers.ops.reasoning.domains import read_number, write_number


def traces(domain, count=40, **fields):
    for number in range(count):
        problem = reasoning.problem(domain, number)
        rng = random.Random(number)
        for _ in range(3):
            yield problem, reasoning.solve(problem, rng, error=0.3, **fields)


@pytest.mark.parametrize("domain", DOMAINS)
def test_verifier_finds_the_solvers_first_error(domain):
    """Two independent ways: one knows what it did, the other reads the words."""
    kinds, wrong = Counter(), 0
    for problem, trace in traces(domain):
        assert reasoning.first_error(problem, trace.steps) == trace.first_error
        kinds[trace.error] += 1
        wrong += not trace.correct
        good = len(trace.steps) if trace.first_error < 0 else trace.first_error
        assert trace.labels == [1] * good + [-1] * (len(trace.steps) - good)
        if trace.first_error < 0:
            assert trace.correct
        for words in (problem.question(), *trace.steps):
            reasoning.ids(words)
            assert reasoning.words(reasoning.text(words)) == list(words[:-1])
    assert wrong > 20
    most = {"slip", "operand", "premise", "non_sequitur"}
    assert most < set(kinds) <= {"", *ERRORS}


@pytest.mark.parametrize("domain", DOMAINS)
def test_right_solution_is_right_and_every_corruption_is_not(domain):
    for number in range(20):
        problem = reasoning.problem(domain, number, below=50, options=4)
        assert len(set(map(str, problem.options))) == 4
        trace = reasoning.solve(problem, random.Random(0), error=0.0)
        assert trace.correct and trace.first_error == -1
        assert trace.steps[-1][1] == problem.answer
        rng = random.Random(number)
        position, at = reasoning.start(problem), rng.randrange(len(problem.program))
        for _ in range(at):
            _, position, _ = reasoning.advance(problem, position, rng, error=0.0)
        for kind in ERRORS:
            words, state, _ = reasoning.corrupt(problem, position, rng, kind)
            op, operand = problem.program[at]
            right = DOMAINS[domain].apply(op, position.state, operand)
            assert state != right
            steps = [*trace.steps[:at], words]
            assert reasoning.first_error(problem, steps) == at


def test_words_of_a_problem_by_hand():
    problem = reasoning.Problem(
        "arithmetic", 34, (("plus", 57), ("times", 2)), ("from", "3", "4"), (91, 182), 0
    )
    trace = reasoning.solve(problem, random.Random(0), error=0.0)
    assert list(map(" ".join, trace.steps)) == [
        "3 4 plus 5 7 = 9 1 <step>", "9 1 times 0 2 = 1 8 2 <step>", "answer B <step>",
    ]  # fmt: skip
    assert list(map(reasoning.text, trace.steps)) == [
        "34 plus 57 = 91", "91 times 2 = 182", "answer B",
    ]  # fmt: skip
    assert problem.answer == "B"
    assert reasoning.parse_step(problem, trace.steps[1]) == (91, "times", 2, 182)


@pytest.mark.parametrize("n", [0, 7, 99, 100, 105, 12345, -3, -250, 10**6])
def test_numbers_are_read_as_written(n):
    assert read_number(write_number(n)) == n


@pytest.mark.parametrize(
    "words",
    [[], ["neg"], ["x"], ["7"], ["07"], ["0", "1", "2"], ["1", "neg"], ["1", "²"]],
)
def test_no_numbers(words):
    with pytest.raises(ValueError, match="not a number"):
        read_number(words)


def test_steps_that_do_not_follow():
    """Each has one thing wrong; the right ones around them are the same."""
    problem = reasoning.Problem(
        "arithmetic", 34, (("plus", 57), ("minus", 1)), (), (90, 91), 0
    )

    def first(*steps):
        words = [
            [c for w in s.split() for c in (f"{w:0>2}" if w.isdigit() else [w])]
            + [reasoning.STEP]
            for s in steps
        ]
        return reasoning.first_error(problem, words)

    right = ("34 plus 57 = 91", "91 minus 1 = 90", "answer A")
    assert first(*right) == -1 and first(*right[:1]) == -1
    assert first("35 plus 57 = 92", *right[1:]) == 0
    assert first("34 minus 57 = neg 23") == 0
    assert first("34 plus 56 = 90") == 0
    assert first("34 plus 57 = 81") == 0
    assert first(right[0], "90 minus 1 = 89") == 1
    assert first(right[0], "91 minus 1 minus 1 = 89") == 1
    assert first(right[0], "so it is") == 1
    assert first(*right[:2], "answer B") == 2
    assert first(*right[:2], "answer F") == 2
    assert first(*right, "answer A") == 3


def test_habits_repeat_an_error():
    """With habit 1 all errors of a step are one; without they differ."""
    problem = reasoning.problem("arithmetic", 5)

    def wrong(habit):
        position = reasoning.start(problem)
        rng = random.Random(1)
        steps = (
            reasoning.advance(problem, position, rng, error=1.0, habit=habit)[0]
            for _ in range(30)
        )
        return len(set(map(tuple, steps)))

    assert wrong(1.0) == 1
    assert wrong(0.0) > 10


def test_problems_are_functions_of_their_arguments():
    one = reasoning.problem("sets", 3, seed=1)
    assert one == reasoning.problem("sets", 3, seed=1)
    assert one != reasoning.problem("sets", 3, seed=2)
    letters = Counter(reasoning.problem("dates", i).answer for i in range(300))
    assert min(letters[x] for x in "ABCDE") > 30  # The answer is anywhere.


@pytest.mark.parametrize("domain", DOMAINS)
def test_first_wrong_word_is_where_the_step_leaves_the_right_one(domain):
    seen = 0
    for problem, trace in traces(domain, 20):
        if trace.first_error < 0:
            assert trace.first_word == -1
            continue
        # The steps before are right, and so the right solution's own.
        right = reasoning.solve(problem, random.Random(0), error=0.0)
        words, expected = (x.steps[trace.first_error] for x in (trace, right))
        at = trace.first_word
        assert list(words[:at]) == list(expected[:at]) and words[at] != expected[at]
        seen += 1
    assert seen > 10


def test_digits_in_another_base_take_the_steps_that_fit():
    for number in range(40):
        assert len(reasoning.problem("bases", number, steps=(6, 6)).program) == 6
        # 8 and 9 have four digits in base 2, and no number below 10 has five.
        few = reasoning.problem("bases", number, steps=(5, 5), below=10)
        assert len(few.program) == 4


def test_refused():
    problem = reasoning.problem("dates", 0)
    ended = reasoning.Position(-1, 0, "A")
    rng = random.Random(0)
    calls = {
        "domain must be one of": lambda: reasoning.problem("law", 0),
        "steps must be": lambda: reasoning.problem("dates", 0, steps=(0, 2)),
        "below in 10 to": lambda: reasoning.problem("dates", 0, below=5),
        "options must be in": lambda: reasoning.problem("dates", 0, options=1),
        "lead to 7 results": lambda: reasoning.problem("dates", 0, options=8),
        "has ended": lambda: reasoning.advance(problem, ended, rng, error=0.0),
        "errors must be among": lambda: reasoning.solve(
            problem, rng, error=0.1, errors=("typo",)
        ),
        "not in the vocabulary": lambda: reasoning.ids(["word"]),
        "a step ends with": lambda: reasoning.parse_step(problem, ["monday"]),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_vocabulary():
    """Every word of every domain has a number of its own, the separator among them."""
    numbers = list(reasoning.VOCABULARY.values())
    assert numbers == list(range(len(numbers)))
    assert reasoning.ids(["<step>", "+", "-"]).tolist() == [2, 3, 4]
    assert reasoning.ids(["9"]).dtype == np.int32


@pytest.mark.parametrize(
    ("domain", "state", "words"),
    [
        ("logic", (True, False, True), "T F T"),
        ("sets", frozenset("ac"), "a . c ."),
        ("sets", frozenset(), ". . . ."),
        ("bases", (7, (1, 0)), "0 7 rest 1 0"),
        ("units", (120, "feet"), "1 2 0 feet"),
        ("dates", 2, "wednesday"),
    ],
)
def test_states_are_read_as_written(domain, state, words):
    read, write = DOMAINS[domain].read, DOMAINS[domain].write
    assert " ".join(write(state)) == words
    assert read(words.split()) == state
    for wrong in ([*words.split(), "a"], ["x", *words.split()[1:]]):
        with pytest.raises(ValueError, match=r"\w"):
            read(wrong)
