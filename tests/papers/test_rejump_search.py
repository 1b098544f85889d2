"""ReJump on the Game of 24: exact answers, search programs, their texts read back."""

import itertools
import random
from fractions import Fraction

import pytest

from jaxpapers.papers import rejump
from jaxpapers.papers.rejump import game24, search, text

PUZZLE = (3, 3, 8, 8)


@pytest.mark.parametrize(
    "answer, numbers",
    [
        ("8 / (3 - 8/3)", (3, 3, 8, 8)),
        ("5*(5-1/5) = 24", (1, 5, 5, 5)),
        ("5×(10−4)−6", (4, 5, 6, 10)),
        ("(((13 - 1)) * 2) * -1 * -1", (13, 1, 2, 1, 1)),
        ("8 ÷ 2 ÷ 2 + 22", (8, 2, 2, 22)),
    ],
)
def test_right_answers(answer, numbers):
    assert rejump.is_correct(answer, numbers)


@pytest.mark.parametrize(
    "answer, numbers, problem",
    [
        ("24", PUZZLE, r"it uses \[24\]"),
        ("8*3", PUZZLE, r"it uses \[3, 8\]"),
        ("8 / (3 - 8/3) = 25", PUZZLE, "says that the result is 25"),
        ("(3+3)*8/8", PUZZLE, "its value is 6"),
        ("8/(3-3)+8", PUZZLE, "divides by zero"),
        ("__import__('os')", PUZZLE, "expected a whole number"),
        ("3**8", PUZZLE, r"expected a number, got '\*'"),
        ("2.5*4", PUZZLE, "expected a whole number"),
        ("(3+3", PUZZLE, "not closed"),
        ("3+", PUZZLE, "ends where"),
        ("3 3", PUZZLE, "too much"),
        ("(" * 100 + "3", PUZZLE, "nested deeper"),
        ("1+" * 600 + "1", PUZZLE, "characters"),
        ("1" * 400, PUZZLE, "expected a whole number"),
        ("", PUZZLE, "ends where"),
    ],
)
def test_wrong_answers(answer, numbers, problem):
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(game24.problem_with(answer, numbers))


def test_the_references_checker():
    """Floats miss 8 / (3 - 8/3); numbers that are not the puzzle's pass."""
    assert not rejump.reference_correct("8/(3-8/3)")
    assert rejump.reference_correct("24") and rejump.reference_correct("30-6 = 1")
    assert not rejump.reference_correct("1/0") and not rejump.reference_correct("x")


def solutions(numbers):
    """All values, by the definition: any order, any operators, any parentheses."""
    if len(numbers) == 1:
        yield numbers[0]
    for a, b in itertools.permutations(range(len(numbers)), 2):
        rest = [x for i, x in enumerate(numbers) if i not in (a, b)]
        for operator in game24.OPERATORS:
            value = game24.apply(operator, numbers[a], numbers[b])
            if value is not None:
                yield from solutions([*rest, value])


def test_solvable_puzzles():
    assert len(rejump.puzzles()) == 1362
    rng = random.Random(0)
    every = list(itertools.combinations_with_replacement(range(1, 14), 4))
    for numbers in rng.sample(every, 1) + [PUZZLE, (1, 1, 1, 1)]:
        expected = 24 in solutions([Fraction(x) for x in numbers])
        assert game24.is_solvable(numbers) == expected
        assert (numbers in rejump.puzzles()) == expected


@pytest.fixture(scope="module")
def traces():
    puzzles = random.Random(1).sample(rejump.puzzles(), 4)
    found = {s: [rejump.run(s, p, 0) for p in puzzles] for s in rejump.STRATEGIES}
    return found | {"sample": [rejump.sample(p, 1) for p in puzzles]}


def test_search_traces_are_sound(traces):
    for strategy, own in traces.items():
        for t in own:
            assert not rejump.validate(t), strategy
            assert len(t.nodes) <= 40
            problems = [node.problem for node in t.nodes]
            assert len(set(problems)) == len(problems)
            inner = {node.parent for node in t.nodes}
            for node in t.nodes:
                assert (node.correct is None) == (node.name in inner)
                if node.result is not None:
                    assert str(game24.evaluate(node.problem).value) == node.result
            found = [node.name for node in t.nodes if node.correct]
            assert t.correct == bool(found) and (
                not found or t.walk[-1].target == found[0]
            )
    # The same seed, the same trace; another one, another.
    assert rejump.run("beam", PUZZLE, 3) == rejump.run("beam", PUZZLE, 3)
    assert rejump.run("beam", PUZZLE, 3) != rejump.run("beam", PUZZLE, 4)


def levels(t):
    """Depths of the nodes in the order in which they are first derived."""
    depth = {}
    for node in t.nodes:
        depth[node.name] = depth.get(node.parent, -1) + 1
    return list(depth.values())


def test_programs_search_in_their_order(traces):
    for t in traces["breadth first"] + traces["beam"]:
        assert levels(t) == sorted(levels(t))
    for t in traces["depth first"]:
        # A node's parent is on the path of the node before it.
        path = ["node1"]
        for node in t.nodes[1:]:
            assert node.parent in path
            path = [*path[: path.index(node.parent) + 1], node.name]
    for t in traces["random restart"]:
        assert {s.target for s in t.walk if "back" in s.category} == {"node1"}


def test_texts_are_read_back_exactly(traces):
    for own in traces.values():
        for i, t in enumerate(own):
            written = rejump.render(t, i)
            assert rejump.is_search_text(written)
            assert rejump.read(written) == t
            assert rejump.parse_trace(rejump.to_dict(t)) == t


def test_wordings_differ(traces):
    t = traces["beam"][0]
    assert len({rejump.render(t, seed) for seed in range(5)}) == 5
    assert rejump.render(t, 1) == rejump.render(t, 1)


START = "Make 24 from 3,3,8,8.\n"
STEP = "Combine 8 / 3 = 8/3, which leaves 3, 8, (8/3).\n"


@pytest.mark.parametrize(
    "written, message",
    [
        ("", "no sentence"),
        ("Hello.", "line 1: expected the numbers"),
        (f"{START}\nHm.", "line 3: cannot read 'Hm.'"),
        (f"{START}{STEP}Back to 3, 8.", "line 3: '3, 8' was not reached"),
        (START + STEP.replace("= 8/3", "= 3"), r"line 2: \(8/3\) is not 3"),
        (START + STEP.replace("3, 8, (8/3)", "3, 9, (8/3)"), "does not follow from"),
        (START + STEP.replace("8 / 3 =", "3 / 8 ="), "does not make"),
        (f"{START}No answer was found.\n{STEP}", "line 3: nothing is expected"),
        (f"{START}Combine 8 / 3 = 8/3, which leaves (8/3), 3, 8.", "expected an expr"),
    ],
)
def test_texts_that_are_refused(written, message):
    with pytest.raises(ValueError, match=message):
        rejump.read(written)


def test_other_traces_have_no_text():
    nodes = (rejump.Node("node1", "1,2", None), rejump.Node("node2", "x", "node9"))
    with pytest.raises(ValueError, match="not a sound trace: unknown parent"):
        text.render(rejump.Trace(nodes, ()))
    with pytest.raises(ValueError, match="must list whole numbers, got 'x'"):
        rejump.label(rejump.Trace((rejump.Node("node1", "x", None),), ()))
    with pytest.raises(ValueError, match="strategy must be one of"):
        rejump.run("breadth", PUZZLE, 0)
    with pytest.raises(ValueError, match="search.nodes must be >= 2"):
        search.Options(nodes=1)
    with pytest.raises(ValueError, match=r"search.check must be in \[0, 1\]"):
        search.Options(check=1.5)
