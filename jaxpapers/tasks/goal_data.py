"""Contextual goals in mazes: transitions, context-goal examples, and batches of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.data import mazes, transitions
from jaxpapers.ops import gymnasium

SOURCES = ("pointmaze", "point", "file")
PROBLEMS = ("rooms", "cells", "goals")
ROWS = ("coda", "real", "oracle", "hindsight")
TRAINED_ROOMS = (2, 3, 4)
GOAL_RADIUS = 0.45
"""Of PointMaze's goals."""
MOST = 20_000
"""Examples of a cell at most."""
# How hindsight goals are drawn, as OGBench's GCIQL: the state itself, a later one of the
# same trajectory, any.
VALUE_GOALS = (0.2, 0.5, 0.3)


class Problem(NamedTuple):
    """Transitions and examples; a context is a vector of k numbers.

    Attributes:
      maze: of the positions.
      kind: of ``PROBLEMS``.
      states, actions, next_states: transitions, N rows.
      ends: index of the last transition of each one's trajectory, (N,).
      contexts: of the examples, (P, k).
      examples: states of the examples, (P, n).
      groups: examples with equal contexts: bounds (C + 1,) into them.
    """

    maze: mazes.Maze
    kind: str
    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    ends: np.ndarray
    contexts: np.ndarray
    examples: np.ndarray
    groups: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """The contexts, one of each group, (C, k)."""
        return self.contexts[self.groups[:-1]]

    @property
    def known(self) -> tuple:
        """Values of contexts that are numbers; () for vectors."""
        if self.kind != "rooms":
            return ()
        return tuple(float(x) for x in self.values[:, 0])


FIELDS = ("source", "path", "maze", "problem", "steps", "hold", "noise", "per_context",
          "perturb", "ood", "seed")  # fmt: skip


def load(config: Any) -> Problem:
    """The problem of a config's group ``data``, read or walked once.

    Raises:
      ValueError: options that are not known or out of range; a context without examples.
      FileNotFoundError: no such file.
    """
    return _load(*(config.data[name] for name in FIELDS))


@functools.lru_cache(maxsize=4)
def _load(source, path, maze_name, kind, steps, hold, noise, per_context, perturb, ood,
          seed) -> Problem:  # fmt: skip
    checks = {"source": (source, SOURCES), "problem": (kind, PROBLEMS)}
    for name, (value, choices) in checks.items():
        if value not in choices:
            raise ValueError(f"data.{name} must be one of {choices}, got {value!r}")
    least = {"hold": (hold, 1), "per_context": (per_context, 0), "perturb": (perturb, 0),
             "noise": (noise, 0)}  # fmt: skip
    for name, (value, low) in least.items():
        if not value >= low:
            raise ValueError(f"data.{name} must be >= {low}, got {value}")
    if bool(path) != (source == "file"):
        raise ValueError(
            f"data.path is read with data.source=file, got {path!r} and {source!r}"
        )
    maze = mazes.Maze(maze_name)
    walk = _walk(source, path, maze, steps, hold, noise, seed)
    rng = np.random.default_rng([seed, 1])
    contexts, examples, groups = examples_of(
        kind, maze, walk, rng, per_context=per_context, perturb=perturb, ood=ood
    )
    return Problem(
        maze, kind, walk.states, walk.actions, walk.next_states, walk.ends, contexts,
        examples, groups,
    )  # fmt: skip


def _walk(source, path, maze, steps, hold, noise, seed) -> transitions.Transitions:
    if source == "file":
        read = transitions.read(path)
        if read.states.shape[1] != 4 or read.actions.shape[1] != 2:
            raise ValueError(
                f"{path}: states of {read.states.shape[1]} and actions of "
                f"{read.actions.shape[1]} numbers, expected PointMaze's 4 and 2"
            )
        cells = maze.cell(read.states[:, :2])
        outside = maze.walls[cells[:, 0], cells[:, 1]].mean()
        if outside > 0.01:
            raise ValueError(
                f"{path}: {outside:.0%} of the positions lie in walls of the maze "
                f"{maze.name}; set data.maze to that of the file"
            )
        return read
    if source == "point":
        env: Any = mazes.PointMass(maze)
        new_goal: Callable = mazes.PointMass.new_goal
    else:
        env, new_goal = point_maze(maze), _new_goal
    walk = mazes.collect(
        env, maze, steps, new_goal=new_goal, hold=hold, noise=noise, seed=seed
    )
    count = len(walk.states)
    return transitions.Transitions(
        states=walk.states,
        actions=walk.actions,
        next_states=walk.next_states,
        rewards=walk.reached.astype(np.float32),
        terminals=walk.reached,
        ends=np.full(count, count - 1),
        skipped=0,
    )


def point_maze(maze: mazes.Maze) -> Any:
    """PointMaze on the host, a continuing task, its goal drawn anew when reached."""
    names = {"umaze": "UMaze", "medium": "Medium", "large": "Large"}
    if maze.name not in names:
        raise ValueError(
            f"data.maze must be one of {[*names]} for PointMaze, got {maze.name!r}"
        )
    return gymnasium.unwrapped(
        f"PointMaze_{names[maze.name]}-v3", continuing_task=True, reset_target=True
    )


def _new_goal(env: Any) -> None:
    env.goal = env.add_xy_position_noise(env.generate_target_goal())
    env.update_target_site_pos()


def examples_of(
    kind: str,
    maze: mazes.Maze,
    walk: transitions.Transitions,
    rng: np.random.Generator,
    *,
    per_context: int = 0,
    perturb: float = 0.0,
    ood: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contexts (P, k), states (P, n) and bounds of the groups (C + 1,).

    Args:
      kind: ``rooms``: the number of a room, its examples all states inside; ``cells``: a
        position, drawn near centres of a list with replacement, its examples the states
        around, at most 20,000; ``goals``: the position of a state at which the data
        reached their goal.
      maze: of the positions.
      walk: the transitions.
      rng: of cells, perturbations and choices.
      per_context: examples kept of each context; 0: all.
      perturb: deviation of normal noise on the examples' states, added before a state
        is told to be inside.
      ood: of cells, adds copies that are shifted by 50 in all components.

    Raises:
      ValueError: no examples, or none of some context.
    """
    if kind == "goals":
        states = walk.next_states[walk.terminals]
        contexts = states[:, :2].copy()
        # The release perturbs the velocities alone.
        states = states + perturb * rng.standard_normal(states.shape) * [0, 0, 1, 1]
        parts = [(c[None], s[None]) for c, s in zip(contexts, states)]
    else:
        states = walk.states
        if perturb:
            states = states + perturb * rng.standard_normal(states.shape)
        xy = states[:, :2]
        if kind == "rooms":
            room = mazes.room_of(xy, maze)
            inside = {float(r): states[room == r] for r in TRAINED_ROOMS}
            parts = [(np.array([[r]]), found) for r, found in inside.items()]
        else:
            parts = []
            for centre in draw_cells(maze, rng):
                found = states[mazes.in_cell(xy, centre, maze)][:MOST]
                if ood:
                    found = np.concatenate([found, found[: MOST // 2] + 50])
                parts.append((centre[None], found))
    empty = [context[0].tolist() for context, found in parts if not len(found)]
    if empty or not parts:
        raise ValueError(
            f"no examples of the contexts {empty[:5] or kind}; collect more data.steps"
        )
    if per_context:
        parts = [(c, s[rng.permutation(len(s))[:per_context]]) for c, s in parts]
    contexts = np.concatenate([c.repeat(len(s), 0) for c, s in parts])
    states = np.concatenate([s for _, s in parts])
    groups = np.cumsum([0, *(len(s) for _, s in parts)])
    return contexts.astype(np.float32), states.astype(np.float32), groups


def draw_cells(maze: mazes.Maze, rng: np.random.Generator) -> np.ndarray:
    """Training contexts of Random Cells: as many draws as there are centres, moved."""
    centres = mazes.cells(maze)
    chosen = centres[rng.integers(len(centres), size=len(centres))]
    return chosen + rng.uniform(-1, 1, chosen.shape) * 0.25


def truth(problem: Problem, xy: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """Whether positions (..., 2) are in the goal sets of contexts (..., k)."""
    if problem.kind == "rooms":
        return mazes.room_of(xy, problem.maze) == contexts[..., 0]
    if problem.kind == "cells":
        return mazes.in_cell(xy, contexts, problem.maze)
    return np.linalg.norm(xy - contexts, axis=-1) <= GOAL_RADIUS


class Batches:
    """Batches for ``papers.coda``: rows (size, updates, ...).

    Args:
      problem: transitions and examples.
      rows: ``coda``: real transitions with contexts and, the last ``ratio`` of a batch,
        fictitious ones; ``real``: no fictitious ones; ``oracle``: real ones that know
        which states are goals; ``hindsight``: real ones whose contexts are later
        positions of the data.
      ratio: of the fictitious rows, in (0, 1).
      sampling: of contexts: ``uniform`` over them, or ``empirical``, as often as they
        have examples.
      updates: of a step.
      discount: of the later positions.
      goals: whether the batch is for the goal model: examples alone.
      seed: of the draws.

    Raises:
      ValueError: options that are not known or out of range.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        rows: str = "coda",
        ratio: float = 0.5,
        sampling: str = "uniform",
        updates: int = 1,
        discount: float = 0.99,
        goals: bool = False,
        seed: int = 0,
    ):
        checks = {
            "rows": (rows, ROWS),
            "sampling": (sampling, ("uniform", "empirical")),
        }
        for name, (value, choices) in checks.items():
            if value not in choices:
                raise ValueError(f"data.{name} must be one of {choices}, got {value!r}")
        if not 0 < ratio < 1:
            raise ValueError(f"data.ratio must be in (0, 1), got {ratio}")
        self.problem, self.rows, self.ratio, self.sampling = (
            problem, rows, ratio, sampling,
        )  # fmt: skip
        self.updates, self.discount, self.goals, self.seed = (
            updates, discount, goals, seed,
        )  # fmt: skip

    def fictitious(self, size: int) -> int:
        """Fictitious rows of a batch of a size.

        Raises:
          ValueError: none, or all.
        """
        count = round(size * self.ratio)
        if not 0 < count < size:
            raise ValueError(
                f"data.batch={size} with data.ratio={self.ratio} has {count} fictitious "
                "rows; expected some of both kinds"
            )
        return count

    def batch(self, start: int, size: int, rows: slice | None = None) -> dict:
        """The batch that begins at example ``start`` of the stream."""
        rng = np.random.default_rng([self.seed, 2, start])
        shape = (size, self.updates)
        if self.goals:
            drawn = self._examples(rng, shape)
            fields = {
                "example_context": self.problem.contexts[drawn],
                "example_goal": self.problem.examples[drawn][..., :2],
            }
        else:
            fields = {**self._value(rng, shape), **self._policy(rng, shape)}
        return {k: x[rows or slice(None)] for k, x in fields.items()}

    def _value(self, rng, shape) -> dict[str, np.ndarray]:
        p = self.problem
        index = rng.integers(len(p.states), size=shape)
        fictitious = np.zeros(shape, np.float32)
        goal = np.zeros(shape, np.float32)
        state, action, following = (
            x[index] for x in (p.states, p.actions, p.next_states)
        )
        if self.rows == "hindsight":
            context, goal = self._hindsight(rng, index, VALUE_GOALS)
        else:
            context = p.contexts[self._examples(rng, shape)]
        if self.rows == "oracle":
            goal = truth(p, state[..., :2], context).astype(np.float32)
        if self.rows == "coda":
            first = shape[0] - self.fictitious(shape[0])
            drawn = self._examples(rng, (shape[0] - first, shape[1]))
            fictitious[first:] = goal[first:] = 1
            state[first:] = following[first:] = p.examples[drawn]
            context[first:] = p.contexts[drawn]
            action[first:] = 0
        return {
            "state": state, "action": action, "next": following, "context": context,
            "fictitious": fictitious, "goal": goal,
        }  # fmt: skip

    def _policy(self, rng, shape) -> dict[str, np.ndarray]:
        p = self.problem
        index = rng.integers(len(p.states), size=shape)
        if self.rows == "hindsight":
            context, _ = self._hindsight(rng, index, (0.0, 1.0, 0.0))
        else:
            context = p.contexts[self._examples(rng, shape)]
        return {
            "policy_state": p.states[index],
            "policy_action": p.actions[index],
            "policy_context": context,
        }

    def _examples(self, rng, shape) -> np.ndarray:
        """Indices of examples; their contexts are independent of the transitions."""
        p = self.problem
        if self.sampling == "empirical":
            return rng.integers(len(p.contexts), size=shape)
        group = rng.integers(len(p.groups) - 1, size=shape)
        first, last = p.groups[group], p.groups[group + 1]
        return first + (rng.random(shape) * (last - first)).astype(int)

    def _hindsight(self, rng, index, shares) -> tuple[np.ndarray, np.ndarray]:
        """Positions as contexts, and whether they are the state's own."""
        p = self.problem
        later = np.minimum(index + rng.geometric(1 - self.discount, index.shape),
                           p.ends[index])  # fmt: skip
        anywhere = rng.integers(len(p.states), size=index.shape)
        kind = rng.choice(3, size=index.shape, p=shares)
        at = np.choose(kind, [index, later, anywhere])
        return p.states[at][..., :2], (at == index).astype(np.float32)
