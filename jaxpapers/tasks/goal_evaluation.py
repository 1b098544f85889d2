"""Episodes of a policy in a maze: which contexts' goals it reaches, and its paths."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers.data import mazes
from jaxpapers.ops import gymnasium
from jaxpapers.ops.host import on_host, vectorized
from jaxpapers.ops.mujoco import Simulator
from jaxpapers.tasks.goal_data import GOAL_RADIUS, Problem, point_maze

# OGBench has no rooms: those at its tasks' goals, and others where there is none.
ROOM_TASKS = {"medium": (4, 2, 2, 3, 3), "large": (4, 3, 2, 3, 2)}


class Regions(NamedTuple):
    """Goal sets of N episodes: within a box and a radius of a centre.

    Attributes:
      low, high: corners of the boxes, (N, 2), which are outside; infinite: no box.
      centre: (N, 2).
      radius: (N,), inside up to it.
    """

    low: Any
    high: Any
    centre: Any
    radius: Any


class Episodes(NamedTuple):
    """N episodes: where they start, their contexts and the sets to be reached."""

    starts: np.ndarray
    contexts: np.ndarray
    regions: Regions
    labels: tuple[str, ...]


class Paths(NamedTuple):
    """What T decisions of N episodes did.

    Attributes:
      xy: positions before each decision and at the end, (T + 1, N, 2); those of an
        episode that has ended stay.
      reached: (N,).
      decisions: until the goal was reached, T where it was not, (N,).
    """

    xy: Any
    reached: Any
    decisions: Any


def regions(problem: Problem, contexts: np.ndarray) -> Regions:
    """The goal sets of contexts (N, k)."""
    count, maze = len(contexts), problem.maze
    far = np.full((count, 2), np.inf)
    if problem.kind != "rooms":
        # A cell's radius itself is outside.
        cell = np.nextafter(mazes.RADIUS / 4, 0)
        radius = cell if problem.kind == "cells" else GOAL_RADIUS
        return Regions(-far, far, np.array(contexts), np.full(count, radius))
    boxes = np.array([mazes.ROOMS[maze.name][int(c[0])] for c in contexts])
    a, b = maze.from_ant(boxes[:, [0, 2]]), maze.from_ant(boxes[:, [1, 3]])
    nowhere = np.zeros((count, 2)), np.full(count, np.inf)
    return Regions(np.minimum(a, b), np.maximum(a, b), *nowhere)


def inside(r: Regions, xy: Any) -> Any:
    """Whether positions (N, 2) are in their goal sets."""
    distance = jnp.linalg.norm(xy - r.centre, axis=-1)
    return ((xy > r.low) & (xy < r.high)).all(-1) & (distance <= r.radius)


def authors_protocol(
    problem: Problem, count: int, *, hard: bool, seed: int
) -> Episodes:
    """``count`` episodes of each test context from the start cell.

    Rooms are those trained for; cells are five of the list, or of its hard part, moved
    as in training; goals are positions of five free cells.
    """
    rng = np.random.default_rng([seed, 3])
    maze = problem.maze
    if problem.kind == "rooms":
        contexts = problem.values
        labels = tuple(f"room {int(c[0])}" for c in contexts)
    else:
        centres = mazes.cells(maze, hard=hard) if problem.kind == "cells" else (
            maze.centre(maze.free)
        )  # fmt: skip
        chosen = centres[rng.integers(len(centres), size=5)]
        contexts = chosen + 0.25 * rng.uniform(-1, 1, chosen.shape)
        labels = tuple(f"{problem.kind[:-1]} {i + 1}" for i in range(5))
    cells = np.full((len(contexts), 2), 1)
    return _episodes(problem, cells, contexts, labels, count, rng)


def ogbench_protocol(problem: Problem, count: int, *, seed: int) -> Episodes:
    """OGBench's five tasks, ``count`` episodes each.

    Start and goal cells are OGBench's; goals that are rooms, see ``ROOM_TASKS``.

    Raises:
      ValueError: a maze that OGBench does not have.
    """
    maze = problem.maze
    if maze.name not in mazes.TASKS:
        raise ValueError(f"OGBench has tasks for {[*mazes.TASKS]}, got {maze.name!r}")
    starts, goals = zip(*mazes.TASKS[maze.name])
    contexts = maze.centre(np.array(goals))
    if problem.kind == "rooms":
        contexts = np.array(ROOM_TASKS[maze.name], np.float64)[:, None]
    labels = tuple(f"task {i + 1}" for i in range(len(starts)))
    rng = np.random.default_rng([seed, 4])
    return _episodes(problem, np.array(starts), contexts, labels, count, rng)


def _episodes(problem, cells, contexts, labels, count, rng) -> Episodes:
    contexts = np.float32(contexts).repeat(count, 0)
    starts = problem.maze.centre(cells).repeat(count, 0)
    starts = starts + rng.uniform(-0.25, 0.25, starts.shape)
    names = tuple(label for label in labels for _ in range(count))
    return Episodes(starts, contexts, regions(problem, contexts), names)


class Arena(NamedTuple):
    """A maze with dynamics, many environments per call.

    Attributes:
      start: positions (N, 2), NumPy -> state.
      observe: state -> position and velocity (N, 4).
      step: (state, actions (N, 2)) -> (state, position and velocity (N, 4)).
    """

    start: Callable
    observe: Callable
    step: Callable


@functools.lru_cache(maxsize=4)
def arena(source: str, maze_name: str, threads: int = 1) -> Arena:
    """PointMaze in MuJoCo, or the point mass without it."""
    maze = mazes.Maze(maze_name)
    if source == "point":
        glide = functools.partial(mazes.glide, maze.walls)

        def shape(state, action):
            return jax.ShapeDtypeStruct(state.shape, state.dtype)

        def step(state, action):
            state = vectorized(on_host(glide, shape))(state, action)
            return state, state

        def at_rest(xy):
            return np.float32(np.concatenate([xy, 0 * xy], -1))

        return Arena(at_rest, lambda state: state, step)
    simulator = Simulator(
        point_maze(maze).model, before=gymnasium.clip_velocity, threads=threads
    )

    def whole(reading):
        return jnp.concatenate([reading.qpos, reading.qvel], -1)

    def simulate(state, action):
        state, reading = simulator.step(state, jnp.clip(action, -1.0, 1.0))
        return state, whole(reading)

    return Arena(
        lambda xy: simulator.start_on_host(xy, 0 * xy),
        lambda state: whole(simulator.read(state)),
        simulate,
    )


@functools.lru_cache(maxsize=16)
def _roller(act: Callable, place: Arena, horizon: int, hold: int) -> Callable:
    @jax.jit
    def roll(params, state, contexts, r):
        def decide(carry, _):
            state, seen, reached, when, t = carry
            action = act(params, seen, contexts)

            def held(carry, _):
                state, _, reached = carry
                state, seen = place.step(state, action)
                return (state, seen, reached | inside(r, seen[:, :2])), None

            before = reached
            (state, after, reached), _ = jax.lax.scan(
                held, (state, seen, reached), None, hold
            )
            when = jnp.where(reached & ~before, t + 1, when)
            # A path ends where its goal was reached.
            xy = jnp.where(before[:, None], jnp.nan, after[:, :2])
            return (state, after, reached, when, t + 1), xy

        seen = place.observe(state)
        count = len(contexts)
        start = (
            state, seen, inside(r, seen[:, :2]), jnp.full(count, horizon), jnp.int32(0),
        )  # fmt: skip
        (_, _, reached, when, _), xy = jax.lax.scan(decide, start, None, horizon)
        return Paths(jnp.concatenate([seen[None, :, :2], xy]), reached, when)

    return roll


def roll_out(
    act: Callable,
    params: Any,
    episodes: Episodes,
    place: Arena,
    *,
    horizon: int,
    hold: int,
    contexts: Any = None,
) -> Paths:
    """Runs episodes, all at once.

    Args:
      act: (params, states, contexts) -> actions (N, 2); hashable: a program each.
      params: of the policy.
      episodes: see ``Episodes``.
      place: see ``Arena``.
      horizon: decisions.
      hold: environment steps of a decision.
      contexts: what the policy is told in place of the episodes' contexts.
    """
    told = jnp.asarray(episodes.contexts if contexts is None else contexts, jnp.float32)
    r = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), episodes.regions)
    state = jnp.asarray(place.start(episodes.starts))
    roll = _roller(act, place, horizon, hold)
    return Paths(*map(np.asarray, jax.device_get(roll(params, state, told, r))))


def success(episodes: Episodes, paths: Paths) -> dict[str, tuple[float, float]]:
    """Label -> share of its episodes that reached the goal, and their mean decisions."""
    names = np.array(episodes.labels)
    rates = {}
    for label in dict.fromkeys(episodes.labels):
        chosen = names == label
        reached = paths.reached[chosen]
        steps = paths.decisions[chosen][reached]
        rates[label] = (
            float(reached.mean()),
            float(steps.mean()) if len(steps) else np.nan,
        )
    return rates
