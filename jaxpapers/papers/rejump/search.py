"""Search programs on the Game of 24 whose trees and walks are known.

A state is the partial expressions that are left; a move combines two of them. Every
program walks its tree as a person would write it down: giving up A for B is a jump from A
to B's parent, then a derivation. A text names one node: a state that is reached on a
second way is not entered again.
"""

import dataclasses
import heapq
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from jaxpapers.options import check_least
from jaxpapers.papers.rejump import game24
from jaxpapers.papers.rejump.trace import (
    BACKTRACKING,
    CALCULATION,
    VERIFICATION,
    Node,
    Step,
    Trace,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the programs.

    Attributes:
      nodes: of a tree, at most; then the program gives up.
      branch: moves that are tried at a node, drawn from all.
      beam: states that beam search keeps of a level.
      check: probability that a wrong leaf is checked by doing an earlier step again.
    """

    nodes: int = 40
    branch: int = 4
    beam: int = 3
    check: float = 0.15

    def __post_init__(self):
        check_least(self, "search", nodes=2, branch=1, beam=1, check=0)
        if self.check > 1:
            raise ValueError(f"search.check must be in [0, 1], got {self.check}")


class State(NamedTuple):
    """Expressions that are left, and their values; ``path``: node names from the root."""

    texts: tuple[str, ...]
    values: tuple[Fraction, ...]
    path: tuple[str, ...]


class _Walker:
    """A trace that grows; where it is now."""

    def __init__(self, numbers: Sequence[int], rng: random.Random, options: Options):
        texts = tuple(map(str, numbers))
        self.root = State(texts, tuple(map(Fraction, numbers)), ("node1",))
        self.nodes = [Node("node1", ",".join(texts), None)]
        self.walk: list[Step] = []
        self.rng, self.options = rng, options
        self.states = {self.nodes[0].problem: self.root}
        self.here = self.root
        self.answer: State | None = None

    @property
    def done(self) -> bool:
        return self.answer is not None or len(self.nodes) >= self.options.nodes

    def jump(self, target: State, category: str) -> None:
        self.walk.append(Step(self.here.path[-1], target.path[-1], category))
        self.here = target

    def back(self, target: State) -> None:
        if target.path[-1] != self.here.path[-1]:
            self.jump(target, BACKTRACKING)

    def moves(self, state: State, count: int) -> list[State]:
        """``count`` drawn states one move on, that are new or children of this one."""
        n, found = len(state.texts), []
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        every = [
            (i, j, o) for i, j in pairs for o in (game24.OPERATORS if i < j else "-/")
        ]
        self.rng.shuffle(every)
        names = set()
        for i, j, operator in every:
            value = game24.apply(operator, state.values[i], state.values[j])
            if value is None:
                continue
            rest = [k for k in range(n) if k not in (i, j)]
            new = f"({state.texts[i]}{operator}{state.texts[j]})"
            texts = (*(state.texts[k] for k in rest), new)
            problem = ", ".join(texts)
            known = self.states.get(problem)
            if problem in names or (known and known.path[:-1] != state.path):
                continue
            names.add(problem)
            values = (*(state.values[k] for k in rest), value)
            found.append(known or State(texts, values, state.path))
            if len(found) == count:
                break
        return found

    def derive(self, state: State, parent: State) -> State:
        """Goes to a state of ``moves(parent)``, which is where the walk is."""
        problem = ", ".join(state.texts)
        if problem not in self.states:
            name = f"node{len(self.nodes) + 1}"
            leaf = len(state.texts) == 1
            result = str(state.values[0]) if leaf else None
            self.nodes.append(Node(name, problem, parent.path[-1], result))
            self.states[problem] = state._replace(path=(*parent.path, name))
        state = self.states[problem]
        self.jump(state, CALCULATION)
        if len(state.texts) == 1:
            self._look_at(state)
        return state

    def _look_at(self, leaf: State) -> None:
        right = leaf.values[0] == game24.TARGET
        if right:
            self.answer, again = leaf, self.root
        elif self.rng.random() < self.options.check:
            name = self.rng.choice(leaf.path[1:-1])
            again = next(s for s in self.states.values() if s.path[-1] == name)
        else:
            return
        self.jump(again, VERIFICATION)
        self.jump(leaf, VERIFICATION)

    def trace(self) -> Trace:
        trace = Trace(tuple(self.nodes), tuple(self.walk))
        return label(trace)


def numbers_of(problem: str) -> list[int]:
    """The numbers of a puzzle that is written as "a,b,c,d".

    Raises:
      ValueError: no list of whole numbers.
    """
    parts = [part.strip() for part in problem.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"the root must list whole numbers, got {problem[:50]!r}")
    return [int(part) for part in parts]


def label(trace: Trace) -> Trace:
    """A Game-of-24 trace with the correctness of its leaves and its answer.

    The answer is the last node of the walk. Numbers are those of the root's text.

    Raises:
      ValueError: the root's text is no list of whole numbers.
    """
    root = next(node for node in trace.nodes if node.parent is None)
    numbers = numbers_of(root.problem)
    inner = {node.parent for node in trace.nodes}
    nodes = tuple(
        node
        if node.name in inner
        else node._replace(correct=game24.is_correct(node.problem, numbers))
        for node in trace.nodes
    )
    last = trace.walk[-1].target if trace.walk else root.name
    right = any(bool(node.correct) for node in nodes if node.name == last)
    return Trace(nodes, trace.walk, right)


def depth_first(walker: _Walker) -> None:
    """Follows a move to its end before the next one."""

    def follow(state: State) -> None:
        if len(state.texts) == 1:
            return
        for move in walker.moves(state, walker.options.branch):
            if walker.done:
                return
            walker.back(state)
            follow(walker.derive(move, state))

    follow(walker.root)


def breadth_first(walker: _Walker) -> None:
    """All moves of a level before the next level."""
    level = [walker.root]
    while level and not walker.done:
        level = _expand(walker, level)


def beam(walker: _Walker) -> None:
    """The most promising states of a level."""
    level = [walker.root]
    while level and not walker.done:
        level = _expand(walker, level)
        level = sorted(level, key=promise)[: walker.options.beam]


def _expand(walker: _Walker, level: Sequence[State]) -> list[State]:
    """The states one move on from those of a level."""
    after = []
    for state in level:
        for move in walker.moves(state, walker.options.branch):
            if walker.done:
                return after
            walker.back(state)
            after.append(walker.derive(move, state))
    return [state for state in after if len(state.texts) > 1]


def best_first(walker: _Walker) -> None:
    """The most promising state of all that were seen."""
    heap = [(promise(walker.root), 0, walker.root)]
    while heap and not walker.done:
        state = heapq.heappop(heap)[2]
        for move in walker.moves(state, walker.options.branch):
            if walker.done:
                return
            walker.back(state)
            after = walker.derive(move, state)
            if len(after.texts) > 1:
                heapq.heappush(heap, (promise(after), len(walker.walk), after))


def random_restart(walker: _Walker) -> None:
    """Random moves to a leaf, then from the root again."""
    wander(walker, 1.0)


def wander(walker: _Walker, restart: float, leaves: int = 0) -> None:
    """Random moves to a leaf, then from the root, or from where a state or two were left.

    Args:
      walker: the trace.
      restart: probability of the root; otherwise the leaf's parent.
      leaves: visits of leaves after which it gives up; 0: no limit.
    """
    state, idle, seen = walker.root, 0, 0
    while not walker.done and idle < 50 and (not leaves or seen < leaves):
        size = len(walker.nodes)
        walker.back(state)
        while len(state.texts) > 1 and not walker.done:
            moves = walker.moves(state, 1)
            if not moves:
                break
            state = walker.derive(moves[0], state)
        idle = 0 if len(walker.nodes) > size else idle + 1
        seen += 1
        path = state.path
        again = walker.rng.random() < restart or len(path) < 2
        name = path[0] if again else path[-2]
        state = next(s for s in walker.states.values() if s.path[-1] == name)


def promise(state: State) -> tuple[int, Fraction]:
    """Smaller is better: fractions, then the distance of the nearest value to 24."""
    fractions = sum(value.denominator > 1 for value in state.values)
    return fractions, min(abs(value - game24.TARGET) for value in state.values)


STRATEGIES: dict[str, Callable[[_Walker], None]] = {
    "depth first": depth_first,
    "breadth first": breadth_first,
    "beam": beam,
    "best first": best_first,
    "random restart": random_restart,
}


def run(
    strategy: str, numbers: Sequence[int], seed: int, options: Options | None = None
) -> Trace:
    """The trace of a search program on a puzzle.

    Args:
      strategy: of ``STRATEGIES``.
      numbers: of the puzzle.
      seed: of its draws.
      options: of the programs.

    Raises:
      ValueError: unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy must be one of {tuple(STRATEGIES)}, got {strategy!r}"
        )
    rng = random.Random(f"{strategy} {list(numbers)} {seed}")
    walker = _Walker(numbers, rng, options or Options())
    STRATEGIES[strategy](walker)
    return walker.trace()


def sample(
    numbers: Sequence[int], seed: int, options: Options | None = None, leaves: int = 8
) -> Trace:
    """A trace of a weak searcher that does not know how far to go back.

    How often it starts again from the root, rather than change the last step, is drawn
    from [0, 1] for each trace.
    """
    rng = random.Random(f"sample {list(numbers)} {seed}")
    walker = _Walker(numbers, rng, options or Options())
    wander(walker, rng.random(), leaves)
    return walker.trace()
