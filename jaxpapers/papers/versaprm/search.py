"""Search for a solution that a reward model likes: beams, diverse trees, tree search.

Host loops around two functions of the user's, which see a list of one length in every
call, so that what they compile has one shape:

- ``extend(paths, active) -> list of (step, done)``: one more step for every path; what it
  gives for a path that is not active is not read.
- ``score(paths, active) -> list of lists``: a score in [0, 1] for each step of each path.

A path is a tuple of steps, of whatever type; done says that it has an answer.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxpapers.ops.voting import check_how, reward
from jaxpapers.options import check_least

Path = tuple[Any, ...]
Extend = Callable[[Sequence[Path], Sequence[bool]], Sequence[tuple[Any, bool]]]
Score = Callable[[Sequence[Path], Sequence[bool]], Sequence[Sequence[float]]]


class Found(NamedTuple):
    """A path with the scores of its steps.

    Attributes:
      path: steps.
      scores: of the steps.
      reward: their aggregate.
      done: whether it has an answer.
    """

    path: Path
    scores: tuple[float, ...]
    reward: float
    done: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam:
    """Options of ``beam_search`` and ``dvts``, with the paper's values.

    Attributes:
      beams: N.
      width: continuations of each path that is kept; divides N.
      rounds: steps at most.
      how: aggregation, see ``ops.voting.aggregate``.
      legacy_sort: compare the lists of step scores, so that the first step decides, as
        the authors' code does, instead of the aggregates.
    """

    beams: int = 8
    width: int = 2
    rounds: int = 10
    how: str = "min"
    legacy_sort: bool = False

    def __post_init__(self):
        check_least(self, "search", beams=1, width=1, rounds=1)
        check_how(self.how)
        if self.beams % self.width:
            raise ValueError(
                "search.beams must be a multiple of search.width, got "
                f"{self.beams} and {self.width}"
            )


def beam_search(extend: Extend, score: Score, options: Beam = Beam()) -> list[Found]:
    """Beams of the best beginnings; what is done leaves them.

    Each round extends every beam by one step; of the paths that go on the best N / width
    (fewer, as beams are done) are kept and repeated ``width`` times.

    Returns:
      The done paths, best first, or if none is, those of the last round.

    Raises:
      ValueError: another number of results than of paths, scores that are not finite.
    """
    size = options.beams
    live: list[Path] = [()] * size
    done: list[Found] = []
    last: list[Found] = []
    for _ in range(options.rounds):
        last = _grow(extend, score, live, size, options.how)
        done += [x for x in last if x.done]
        going = [x for x in last if not x.done]
        keep = max(len(going) // options.width, 1)
        best = _sorted(going, options)[:keep]
        live = [x.path for x in best for _ in range(options.width)][:size]
        if not live:
            break
    return _sorted(done or last, options)


def dvts(extend: Extend, score: Score, options: Beam = Beam()) -> list[Found]:
    """Diverse verifier tree search: N / width trees that do not compete.

    Each tree draws ``width`` continuations of its path and goes on from the best one; it
    ends when that one is done (Beeching et al., search-and-learn, 2024).

    Returns:
      The path of each tree, best first.
    """
    width, count = options.width, options.beams // options.width
    trees: list[Found | None] = [None] * count
    for _ in range(options.rounds):
        open_ = [t is None or not t.done for t in trees]
        if not any(open_):
            break
        paths = [() if t is None else t.path for t in trees for _ in range(width)]
        active = [x for x in open_ for _ in range(width)]
        grown = _grow(extend, score, paths, options.beams, options.how, active)
        every = iter(grown)
        for i, is_open in enumerate(open_):
            if is_open:
                trees[i] = _sorted([next(every) for _ in range(width)], options)[0]
    return _sorted([t for t in trees if t is not None], options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """Options of ``mcts``, with the paper's values.

    Attributes:
      branching: children of an expanded node.
      iterations: of selection, expansion and backup.
      depth: steps at most.
      how: aggregation of a done path.
      explore: weight of the exploration term.
    """

    branching: int = 2
    iterations: int = 10
    depth: int = 10
    how: str = "last"
    explore: float = 2**0.5

    def __post_init__(self):
        check_least(self, "search", branching=1, iterations=1, depth=1, explore=0)
        check_how(self.how)


class _Node:
    """A path in the tree: its value is the largest score below it."""

    def __init__(self, path: Path, scores: tuple[float, ...], parent: "_Node | None"):
        self.path, self.scores, self.parent = path, scores, parent
        self.children: list[_Node] = []
        self.visits, self.value = 1, scores[-1] if scores else 1.0
        self.done = False

    def closed(self, depth: int) -> bool:
        """Whether nothing below it can be expanded."""
        if self.done or len(self.path) >= depth:
            return True
        return bool(self.children) and all(c.closed(depth) for c in self.children)


def mcts(extend: Extend, score: Score, options: Tree = Tree()) -> list[Found]:
    """Monte Carlo tree search with the reward of steps in place of rollouts.

    From the root the child of largest value + c sqrt(log n_parent / n_child) is taken,
    branches that have nothing to expand left out; a leaf is expanded by ``branching``
    children, and on from the best one until it is done or as deep as allowed; the visits
    of the ancestors grow by ``branching``, their value is the largest of their children.

    Returns:
      The done paths, best first, those found first first among equals; if none is done,
      the deepest.
    """
    root = _Node((), (), None)
    every: list[_Node] = []
    for _ in range(options.iterations):
        if root.closed(options.depth):
            break
        node = _select(root, options)
        while not node.done and len(node.path) < options.depth:
            grown = _grow(
                extend, score, [node.path] * options.branching, options.branching,
                options.how,
            )  # fmt: skip
            for x in grown:
                child = _Node(x.path, x.scores, node)
                child.done = x.done
                node.children.append(child)
            every += node.children
            _back_up(node, options.branching)
            node = max(node.children, key=lambda c: c.value)
    done = [n for n in every if n.done]
    deepest = max(len(n.path) for n in every)
    chosen = done or [n for n in every if len(n.path) == deepest]
    found = [
        Found(n.path, n.scores, reward(n.scores, options.how), n.done) for n in chosen
    ]
    return sorted(found, key=lambda x: -x.reward)


def _select(root: _Node, options: Tree) -> _Node:
    node = root
    while node.children:
        going = [c for c in node.children if not c.closed(options.depth)]
        log = math.log(node.visits)
        node = max(
            going, key=lambda c: c.value + options.explore * math.sqrt(log / c.visits)
        )
    return node


def _back_up(node: "_Node | None", count: int) -> None:
    while node is not None:
        node.visits += count
        node.value = max(c.value for c in node.children)
        node = node.parent


def _grow(extend, score, paths, size, how, active=None) -> list[Found]:
    """The active paths with one step more, scored; calls have ``size`` paths."""
    active = [True] * len(paths) if active is None else list(active)
    paths = list(paths) + [()] * (size - len(paths))
    active = active + [False] * (size - len(active))
    steps = list(extend(paths, active))
    _check_count("extend", steps, size)
    longer = [
        (*path, step) if a else path for path, (step, _), a in zip(paths, steps, active)
    ]
    scores = list(score(longer, active))
    _check_count("score", scores, size)
    grown = []
    for path, (_, done), given, a in zip(longer, steps, scores, active):
        if not a:
            continue
        if len(given) != len(path):
            raise ValueError(
                f"score gave {len(given)} scores for a path of {len(path)} steps"
            )
        values = tuple(float(x) for x in given)
        grown.append(Found(path, values, reward(values, how), bool(done)))
    return grown


def _check_count(name, results, size):
    if len(results) != size:
        raise ValueError(f"{name} gave {len(results)} results for {size} paths")


def _sorted(found: Sequence[Found], options: Beam) -> list[Found]:
    """Best first; equal ones in the order in which they were found."""
    if options.legacy_sort:
        return sorted(found, key=lambda x: x.scores, reverse=True)
    return sorted(found, key=lambda x: x.reward, reverse=True)
