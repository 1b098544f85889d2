"""Mazes of cells, regions of them as goals, and walks of a noisy waypoint controller.

Positions are those of PointMaze: cells of 1 x 1 around the centre of the map, x to the
right, y up. AntMaze's coordinates, in which the papers state regions, have the start
cell as origin, cells of 4 x 4, and y down: ``Maze.to_ant``.
"""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MAPS = {
    "umaze": "11111/10001/11101/10001/11111",
    "medium": "11111111/10011001/10010001/11000111/10010001/10100101/10001001/11111111",
    "large": "111111111111/100001000001/101101010101/100000010001/101111011101/"
    "100101000001/110101010111/100100010001/111111111111",
}
"""Rows from top to bottom; 1 is a wall."""
HORIZON = {"umaze": 300, "medium": 600, "large": 800}
"""Environment steps after which the controller takes another goal."""
ROOMS = {
    "medium": {
        1: (0, 12, 0, 8), 2: (14, 20, 0, 6), 3: (0, 4, 18, 20), 4: (13, 20, 13, 20),
    },
    "large": {
        1: (0, 12, 0, 8), 2: (24, 36, 0, 9), 3: (0, 6, 16, 24), 4: (28, 36, 16, 24),
    },
}  # fmt: skip
"""Four Rooms: x from, x to, y from, y to in AntMaze's coordinates; edges are outside."""
CELLS = {
    "medium": "12 4,16 4,20 4,8 8,12 8,4 12,12 12,16 12,0 16,12 16,0 20,4 20,8 20,"
    "16 20,20 20",
    "large": "20 0,24 0,20 4,12 8,16 8,20 8,36 8,0 12,20 12,36 12,4 16,24 16,20 20,12 24,"
    "16 24,20 24,32 24,36 24",
}
"""Random Cells: centres in AntMaze's coordinates."""
HARD = {"medium": 10.0, "large": 18.0}
"""Both coordinates of a hard test cell are at least this."""
RADIUS = 2.0
"""Of a cell's goal set, AntMaze's coordinates."""
TASKS = {
    "medium": (((1, 1), (6, 6)), ((6, 1), (1, 6)), ((5, 3), (4, 2)), ((6, 5), (6, 1)),
               ((2, 6), (1, 1))),
    "large": (((1, 1), (7, 10)), ((5, 4), (7, 1)), ((7, 4), (1, 10)), ((3, 8), (5, 4)),
              ((1, 1), (5, 4))),
}  # fmt: skip
"""OGBench's five evaluation tasks: start and goal cell."""


class Maze:
    """A map of walls and free cells.

    Args:
      name: of ``MAPS``, or rows of 0 and 1 separated by slashes.

    Attributes:
      walls: bool (H, W).
      free: cells (row, column) without a wall, (F, 2).

    Raises:
      ValueError: an unknown name; rows of different lengths, an open border, no free
        cell, or free cells that cannot reach each other.

    Example:
      >>> maze = Maze("umaze")
      >>> maze.path((1, 1), (3, 1))[:3], maze.centre((1, 1)).tolist()
      ([(1, 2), (1, 3), (2, 3)], [-1.0, 1.0])
    """

    def __init__(self, name: str):
        rows = MAPS.get(name, name).split("/")
        if len(rows) < 3 or len({len(row) for row in rows}) != 1 or len(rows[0]) < 3:
            raise ValueError(
                f"a maze must be one of {[*MAPS]} or at least 3 rows of equal length, "
                f"of 0 and 1 with slashes between, got {name!r}"
            )
        if set("".join(rows)) - {"0", "1"}:
            raise ValueError(f"a maze must have 0 (free) and 1 (wall), got {name!r}")
        self.name = name
        # Of this maze: a cache of the class would keep every maze.
        self._path = functools.lru_cache(maxsize=4096)(self._shortest)
        self.walls = np.array([[cell == "1" for cell in row] for row in rows])
        border = np.pad(np.zeros(np.subtract(self.walls.shape, 2), bool), 1,
                        constant_values=True)  # fmt: skip
        if not self.walls[border].all():
            raise ValueError(f"the border of a maze must be walls, got {name!r}")
        self.free = np.argwhere(~self.walls)
        if not len(self.free):
            raise ValueError(f"a maze must have a free cell, got {name!r}")
        distance = self.distances(self.free[0])
        if (distance[~self.walls] < 0).any():
            raise ValueError(f"some free cells of {name!r} cannot reach each other")

    def centre(self, cell: Any) -> np.ndarray:
        """Positions (..., 2) of the centres of cells (..., 2)."""
        height, width = self.walls.shape
        row, column = np.moveaxis(np.asarray(cell), -1, 0)
        return np.stack([column + 0.5 - width / 2, height / 2 - row - 0.5], -1)

    def cell(self, xy: Any) -> np.ndarray:
        """Cells (..., 2), row and column, of positions (..., 2)."""
        height, width = self.walls.shape
        x, y = np.moveaxis(np.asarray(xy), -1, 0)
        cell = np.floor(np.stack([height / 2 - y, x + width / 2], -1)).astype(int)
        return np.clip(cell, 0, np.array([height, width]) - 1)

    def to_ant(self, xy: Any) -> np.ndarray:
        """Positions (..., 2) in AntMaze's coordinates."""
        return (np.asarray(xy) - self.centre((1, 1))) * [4.0, -4.0]

    def from_ant(self, xy: Any) -> np.ndarray:
        """The inverse of ``to_ant``."""
        return np.asarray(xy) * [0.25, -0.25] + self.centre((1, 1))

    def distances(self, goal: Any) -> np.ndarray:
        """Cells to walk from each cell to a goal, (H, W); -1 where there is no way."""
        goal = (int(goal[0]), int(goal[1]))
        distance = np.full(self.walls.shape, -1)
        distance[goal] = 0
        queue = deque([goal])
        while queue:
            row, column = queue.popleft()
            for near in _neighbours(row, column):
                if not self.walls[near] and distance[near] < 0:
                    distance[near] = distance[row, column] + 1
                    queue.append(near)
        return distance

    def path(self, start: Any, goal: Any) -> list[tuple[int, int]]:
        """Cells of a shortest path, without the first one.

        Raises:
          ValueError: a cell that is a wall or outside.
        """
        start, goal = (int(start[0]), int(start[1])), (int(goal[0]), int(goal[1]))
        for cell in (start, goal):
            self.check(cell)
        return list(self._path(start, goal))

    def check(self, cell: Any) -> None:
        """Raises ValueError for a cell that is a wall or outside."""
        row, column = cell
        height, width = self.walls.shape
        if not (0 <= row < height and 0 <= column < width) or self.walls[row, column]:
            raise ValueError(f"the cell {tuple(cell)} of the maze is not free")

    def _shortest(self, start, goal):
        distance, path = self.distances(goal), []
        while start != goal:
            start = min(
                (c for c in _neighbours(*start) if distance[c] >= 0),
                key=distance.__getitem__,
            )
            path.append(start)
        return tuple(path)


class Walk(NamedTuple):
    """Decisions of the controller, one row each; N rows.

    Attributes:
      states: position and velocity before, (N, 4).
      actions: (N, 2) in [-1, 1].
      next_states: after the action was held, (N, 4).
      goals: where the controller was going, (N, 2).
      reached: whether the goal was reached while the action was held, (N,).
    """

    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    goals: np.ndarray
    reached: np.ndarray


class Controller:
    """Follows a shortest path of cells by a proportional-derivative law.

    $$ a = clip(10 (w - p) - v + 0.5 \\epsilon) $$

    with waypoints w near the centres of the cells, the goal itself the last. (D4RL's
    recipe for maze2d; its waypoints come from a Q-iteration with the same paths.)

    Args:
      maze: to walk in.
      rng: of the noise.
      noise: its standard deviation.
    """

    def __init__(self, maze: Maze, rng: np.random.Generator, noise: float = 0.5):
        self.maze, self.rng, self.noise = maze, rng, noise
        self.goal: np.ndarray | None = None
        self._waypoints: list[np.ndarray] = []
        self._last: np.ndarray | None = None

    def act(self, state: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """The action (2,) in a state (4,) towards a goal (2,)."""
        position, velocity = state[:2], state[2:]
        if self.goal is None or not np.array_equal(goal, self.goal):
            self.goal = np.array(goal)
            cells = self.maze.path(self.maze.cell(position), self.maze.cell(goal))
            shift = self.rng.uniform(0, 0.2, (max(len(cells) - 1, 0), 2))
            centres = [self.maze.centre(c) - d for c, d in zip(cells, shift)]
            self._waypoints, self._last = [*centres, self.goal], None
        near = np.linalg.norm(position - self._waypoints[0]) < 0.1
        slow = self._last is None or np.linalg.norm(position - self._last) < 0.1
        if near and slow and len(self._waypoints) > 1:
            del self._waypoints[0]
        self._last = position.copy()
        action = 10 * (self._waypoints[0] - position) - velocity
        action = action + self.noise * self.rng.standard_normal(2)
        return np.clip(action, -1.0, 1.0)


def collect(
    env: Any,
    maze: Maze,
    steps: int,
    *,
    new_goal: Callable[[Any], None],
    hold: int = 5,
    noise: float = 0.5,
    horizon: int = 0,
    seed: int = 0,
) -> Walk:
    """One endless walk between random goals, without a reset.

    Args:
      env: PointMaze without wrappers, of a continuing task with ``reset_target``, or
        ``PointMass``: ``reset(seed=)``, ``step(action)``, and ``goal``, which is read
        after each step since the observation at a reached goal still has the old one.
      maze: of the environment.
      steps: environment steps; decisions are ``steps // hold``.
      new_goal: gives the environment another goal; called after ``horizon``.
      hold: environment steps of a decision, with the action held.
      noise: of the controller.
      horizon: environment steps towards one goal; 0: those of D4RL.
      seed: of the environment and of the noise.

    Raises:
      ValueError: counts below 1.
    """
    for name, value in {
        "steps": steps // hold if hold > 0 else 1,
        "hold": hold,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must give at least 1 decision, got {value}")
    horizon = horizon or HORIZON.get(maze.name, 600)
    controller = Controller(maze, np.random.default_rng(seed), noise)
    observation, _ = env.reset(seed=seed)
    state, towards = np.asarray(observation["observation"], np.float64), 0
    rows = []
    for _ in range(steps // hold):
        goal = np.array(env.goal)
        action, reached = controller.act(state, goal), False
        before = state
        for _ in range(hold):
            observation, reward, *_ = env.step(action)
            reached = reached or reward > 0
        state = np.asarray(observation["observation"], np.float64)
        rows.append((before, action, state, goal, reached))
        towards = 0 if reached else towards + hold
        if towards >= horizon:
            new_goal(env)
            towards = 0
    columns = [np.array(x) for x in zip(*rows)]
    states, actions, next_states, goals = (x.astype(np.float32) for x in columns[:4])
    return Walk(states, actions, next_states, goals, columns[4].astype(bool))


def room_of(xy: np.ndarray, maze: Maze) -> np.ndarray:
    """The room 1 to 4 of positions (..., 2), 0 outside all. Edges are outside.

    Raises:
      ValueError: a maze without rooms.

    Example:
      >>> maze = Maze("medium")
      >>> room_of(maze.from_ant([[16, 2], [14, 2], [2, 19]]), maze).tolist()
      [2, 0, 3]
    """
    if maze.name not in ROOMS:
        raise ValueError(f"rooms are those of {[*ROOMS]}, got the maze {maze.name!r}")
    x, y = np.moveaxis(maze.to_ant(xy), -1, 0)
    room = np.zeros(x.shape, np.int32)
    # Room 1 last: it gives way where rectangles overlap.
    for number, (left, right, low, high) in sorted(ROOMS[maze.name].items()):
        inside = (left < x) & (x < right) & (low < y) & (y < high)
        room = np.where(inside & (room == 0), number, room)
    return room


def in_cell(xy: np.ndarray, centre: np.ndarray, maze: Maze) -> np.ndarray:
    """Whether positions (..., 2) lie within ``RADIUS`` of centres (..., 2)."""
    offset = maze.to_ant(xy) - maze.to_ant(centre)
    return np.linalg.norm(offset, axis=-1) < RADIUS


def cells(maze: Maze, *, hard: bool = False) -> np.ndarray:
    """Centres (N, 2) of Random Cells, or those of its hard test.

    Raises:
      ValueError: a maze without a list of cells.
    """
    if maze.name not in CELLS:
        raise ValueError(f"cells are those of {[*CELLS]}, got the maze {maze.name!r}")
    pairs = [pair.split() for pair in CELLS[maze.name].split(",")]
    centres = np.array(pairs, np.float64)
    if hard:
        centres = centres[(centres >= HARD[maze.name]).all(1)]
    return maze.from_ant(centres)


class PointMass:
    """A point mass between walls, without a physics engine: PointMaze in outline.

    Unit forces of gear 100 on a sphere of 4.19 kg, damping 1 kg/s, 0.01 s, velocities
    within 5 m/s; walls stop the velocity towards them.

    Args:
      maze: to walk in.
    """

    def __init__(self, maze: Maze):
        self.maze = maze

    def reset(self, *, seed: int) -> tuple[dict[str, np.ndarray], dict]:
        """At rest in a random cell; observation and an empty dict."""
        self.rng = np.random.default_rng(seed)
        self.goal = self._place()
        self.state = np.concatenate([self._place(), np.zeros(2)])
        return {"observation": self.state}, {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
        """Observation and reward; a reached goal gives way to another one."""
        self.state = glide(self.maze.walls, self.state, action)
        reward = float(np.linalg.norm(self.state[:2] - self.goal) <= 0.45)
        while np.linalg.norm(self.state[:2] - self.goal) <= 0.45:
            self.goal = self._place()
        return {"observation": self.state}, reward

    def new_goal(self) -> None:
        """Draws a goal."""
        self.goal = self._place()

    def _place(self) -> np.ndarray:
        cell = self.maze.free[self.rng.integers(len(self.maze.free))]
        return self.maze.centre(cell) + self.rng.uniform(-0.25, 0.25, 2)


def glide(walls: np.ndarray, state: np.ndarray, action: np.ndarray) -> np.ndarray:
    """States (..., 4) of ``PointMass`` 0.01 s after, under actions (..., 2)."""
    height, width = walls.shape
    velocity = np.clip(state[..., 2:], -5.0, 5.0)
    force = 100 * np.clip(action, -1.0, 1.0)
    velocity = (velocity + 0.01 * force / MASS) / (1 + 0.01 / MASS)
    position, velocity = np.array(state[..., :2], np.float64), np.array(velocity)
    for axis in (0, 1):
        moved = position.copy()
        moved[..., axis] += 0.01 * velocity[..., axis]
        # The side of the sphere that leads.
        edge = moved.copy()
        edge[..., axis] += 0.1 * np.sign(velocity[..., axis])
        row = np.floor(height / 2 - edge[..., 1]).astype(int)
        column = np.floor(edge[..., 0] + width / 2).astype(int)
        hit = walls[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
        position = np.where(hit[..., None], position, moved)
        velocity[..., axis] = np.where(hit, 0.0, velocity[..., axis])
    return np.concatenate([position, velocity], -1)


MASS = 1000 * 4 / 3 * np.pi * 0.1**3
"""Of PointMaze's sphere, kg."""


def _neighbours(row: int, column: int) -> list[tuple[int, int]]:
    return [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
