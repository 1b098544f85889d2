"""Searches on paths whose rewards are known: by hand, and against all paths."""

import itertools
import random

import pytest

from jaxpapers.papers.versaprm import search
from jaxpapers.papers.versaprm.search import Beam, Tree


class Script:
    """Steps are digits in an order; a score is a function of the path so far.

    Args:
      steps: what ``extend`` gives, one after the other.
      depth: steps of a done path.
      value: path -> score of its last step.
    """

    def __init__(self, steps, depth, value):
        self.steps, self.depth, self.value = itertools.cycle(steps), depth, value
        self.sizes, self.drawn = set(), 0

    def extend(self, paths, active):
        self.sizes.add((len(paths), len(active)))
        grown = []
        for path, a in zip(paths, active):
            self.drawn += bool(a)
            step = next(self.steps) if a else None
            grown.append((step, a and len(path) + 1 == self.depth))
        return grown

    def score(self, paths, active):
        self.sizes.add((len(paths), len(active)))
        return [
            [self.value(p[: i + 1]) for i in range(len(p))] if a else []
            for p, a in zip(paths, active)
        ]


def last(path):
    return path[-1] / 10


def test_beam_search_by_hand():
    """Four beams, two kept: the best beginnings are repeated."""
    script = Script([1, 9, 5, 7, 8, 2, 3, 6], 2, last)
    found = search.beam_search(script.extend, script.score, Beam(beams=4, rounds=3))
    # First steps 1, 9, 5, 7; kept 9 and 7, twice each; then 8, 2 and 3, 6.
    assert [x.path for x in found] == [(9, 8), (7, 6), (7, 3), (9, 2)]
    assert [x.reward for x in found] == pytest.approx([0.8, 0.6, 0.3, 0.2])
    assert all(x.done for x in found)
    assert script.sizes == {(4, 4)}


def test_order_of_beams_is_that_of_aggregates():
    """The authors' code compares first steps first, whatever comes after."""
    steps = [9, 6, 1, 5]
    for legacy, best in ((False, (6, 5)), (True, (9, 1))):
        script = Script(steps, 2, last)
        options = Beam(beams=2, width=1, rounds=2, legacy_sort=legacy)
        found = search.beam_search(script.extend, script.score, options)
        assert found[0].path == best


def test_done_beams_leave_and_shapes_stay():
    """A path is done after a 9; what remains is never more than what is kept."""

    class Early(Script):
        def extend(self, paths, active):
            grown = super().extend(paths, active)
            return [(s, s == 9) for s, _ in grown]

    script = Early([9, 1, 2, 3, 9, 4, 5, 9, 1], 0, last)
    found = search.beam_search(
        script.extend, script.score, Beam(beams=4, rounds=4, how="mean")
    )
    assert script.sizes == {(4, 4)}
    assert all(x.done and x.path[-1] == 9 for x in found)
    assert [x.path for x in found] == [(9,), (3, 9), (3, 4, 9), (3, 4, 5, 9)]
    # Of the three that go on one is kept, twice; then of the one the same.
    assert script.drawn == 4 + 2 + 2 + 2


def test_none_done():
    script = Script([1, 2], 9, last)
    found = search.beam_search(script.extend, script.score, Beam(beams=2, rounds=2))
    assert not any(x.done for x in found) and len(found[0].path) == 2


def test_trees_of_dvts_do_not_compete():
    """Two trees of two continuations: the worse tree is kept."""
    script = Script([9, 8, 2, 1, 5, 4, 7, 6], 2, last)
    found = search.dvts(script.extend, script.score, Beam(beams=4, rounds=5))
    assert [x.path for x in found] == [(9, 5), (2, 7)]
    assert script.sizes == {(4, 4)} and script.drawn == 8


def test_dvts_stops_with_its_trees():
    script = Script([9, 8], 1, last)
    found = search.dvts(script.extend, script.score, Beam(beams=4, rounds=5))
    assert script.drawn == 4 and len(found) == 2


def test_mcts_by_hand():
    """Values and visits of two iterations, as the formulas have them."""
    script = Script([4, 5, 3, 2, 8, 1], 2, last)
    options = Tree(branching=2, iterations=2, depth=2)
    found = search.mcts(script.extend, script.score, options)
    # First: 4 and 5 below the root, then 3 and 2 below 5, both done. The branch of 5 is
    # exhausted, so that the second iteration expands 4: 8 and 1.
    assert [x.path for x in found] == [(4, 8), (5, 3), (5, 2), (4, 1)]
    assert [x.reward for x in found] == pytest.approx([0.8, 0.3, 0.2, 0.1])
    assert script.drawn == 6 and script.sizes == {(2, 2)}


def leaf(value, visits, parent=None):
    node = search._Node((0,), (value,), parent)
    node.visits = visits
    return node


@pytest.mark.parametrize(
    # log 9 = 2.20: the better child of 4 visits against the one of 2 visits, by
    # 0.6 + 0.741 c and 0.5 + 1.048 c: they are equal at c = 0.326.
    ("explore", "expected"),
    [(0.0, 0), (0.25, 0), (0.4, 1), (2**0.5, 1)],
)
def test_the_bound_weighs_value_against_visits(explore, expected):
    root = search._Node((), (), None)
    root.visits = 9
    root.children = [leaf(0.6, 4, root), leaf(0.5, 2, root)]
    found = search._select(root, Tree(depth=3, explore=explore))
    assert found is root.children[expected]


def test_ancestors_have_the_visits_and_the_best_value_of_what_is_below():
    root = search._Node((), (), None)
    node = leaf(0.5, 1, root)
    root.children, node.children = [node, leaf(0.4, 1)], [leaf(0.2, 1), leaf(0.3, 1)]
    search._back_up(node, 2)
    assert (node.visits, node.value) == (3, 0.3)
    assert (root.visits, root.value) == (3, 0.4)


def test_exhaustive_tree_finds_the_best_path():
    """Enough iterations see every path of a tree of two choices a step."""
    rng = random.Random(0)
    table: dict = {}

    def value(path):
        return table.setdefault(path, rng.random())

    count = itertools.count()

    class Two(Script):
        def extend(self, paths, active):
            return [(next(count), len(p) + 1 == 3) for p in paths]

    script = Two([0], 3, value)
    found = search.mcts(script.extend, script.score, Tree(iterations=50, depth=3))
    assert len(found) == 8
    assert found[0].reward == max(x.reward for x in found)
    again = search.mcts(
        Two([0], 3, value).extend, script.score, Tree(iterations=1, depth=3)
    )
    assert len(again) == 2


def test_refused():
    script = Script([1], 2, last)
    for message, call in {
        "search.beams must be a multiple": lambda: Beam(beams=3),
        "search.rounds must be >= 1": lambda: Beam(rounds=0),
        "aggregation must be one of": lambda: Tree(how="median"),
        "search.branching must be >= 1": lambda: Tree(branching=0),
        "extend gave 0 results": lambda: search.beam_search(
            lambda paths, active: [], script.score
        ),
        "score gave 0 scores": lambda: search.beam_search(
            script.extend, lambda paths, active: [[]] * len(paths)
        ),
        "rewards must be finite": lambda: search.dvts(
            script.extend, lambda paths, active: [[float("nan")] for _ in paths]
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
