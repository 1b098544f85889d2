"""Mazes: maps, regions by hand, paths, the controller, the point mass."""

import numpy as np
import pytest

from jaxpapers.data import mazes
from jaxpapers.ops import gymnasium


@pytest.mark.parametrize("name", ["medium", "large", "umaze"])
def test_maps_are_those_of_the_environments(name):
    maze = mazes.Maze(name)
    title = {"umaze": "UMaze"}.get(name, name.title())
    env = gymnasium.unwrapped(f"PointMaze_{title}-v3")
    np.testing.assert_array_equal(maze.walls, np.array(env.maze.maze_map) == 1)
    for cell in maze.free:
        xy = env.maze.cell_rowcol_to_xy(cell)
        np.testing.assert_allclose(maze.centre(cell), xy)
        np.testing.assert_array_equal(maze.cell(xy + [0.49, -0.49]), cell)


def test_units_of_the_antmaze():
    """x4 = 4 (x + 2.5), y4 = 4 (2.5 - y) in the medium maze."""
    maze = mazes.Maze("medium")
    xy = np.random.default_rng(0).uniform(-4, 4, (9, 2))
    ant = np.stack([4 * (xy[:, 0] + 2.5), 4 * (2.5 - xy[:, 1])], 1)
    np.testing.assert_allclose(maze.to_ant(xy), ant)
    np.testing.assert_allclose(maze.from_ant(ant), xy)


@pytest.mark.parametrize("name", ["medium", "large"])
def test_rooms_on_a_grid(name):
    """Labels of half-integer grid points; points on an edge are outside."""
    maze = mazes.Maze(name)
    grid = np.stack(np.meshgrid(np.arange(-2, 40, 0.5), np.arange(-2, 40, 0.5)), -1)
    labels = mazes.room_of(maze.from_ant(grid), maze)
    expected = np.zeros(labels.shape, int)
    for index in np.ndindex(labels.shape):
        x, y = grid[index]
        for number, (left, right, low, high) in mazes.ROOMS[name].items():
            if left < x < right and low < y < high and not expected[index]:
                expected[index] = number
    np.testing.assert_array_equal(labels, expected)
    assert set(np.unique(labels)) == {0, 1, 2, 3, 4}
    for number, (left, right, low, high) in mazes.ROOMS[name].items():
        edge = maze.from_ant([[left, low], [right, high], [left, (low + high) / 2]])
        assert number not in mazes.room_of(edge, maze)


def test_cells():
    maze = mazes.Maze("medium")
    centres = maze.to_ant(mazes.cells(maze))
    assert len(centres) == 15 and centres[0].tolist() == [12, 4]
    hard = maze.to_ant(mazes.cells(maze, hard=True))
    assert (hard >= 10).all() and 0 < len(hard) < 15
    free = maze.cell(mazes.cells(maze))
    assert not maze.walls[free[:, 0], free[:, 1]].any()
    assert len(mazes.cells(mazes.Maze("large"))) == 18
    centre = maze.from_ant([8.0, 8.0])
    xy = maze.from_ant([[9.9, 8.0], [10.0, 8.0], [8.0, 6.1]])
    assert mazes.in_cell(xy, centre, maze).tolist() == [True, False, True]


def test_shortest_paths():
    maze = mazes.Maze("medium")
    distance = maze.distances((6, 1))
    for start in maze.free:
        path = maze.path(start, (6, 1))
        assert len(path) == distance[tuple(start)]
        steps = np.abs(np.diff([tuple(start), *path], axis=0)).sum(1)
        assert (steps == 1).all()
        assert not any(maze.walls[cell] for cell in path)
    with pytest.raises(ValueError, match="is not free"):
        maze.path((0, 0), (1, 1))


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "must be one of"),
        ("111/1x1/111", "must have 0"),
        ("111/101/101", "border"),
        ("111/111/111", "free cell"),
        ("11111/10101/11111", "cannot reach each other"),
        ("111/11/111", "equal length"),
    ],
)
def test_refused_mazes(name, message):
    with pytest.raises(ValueError, match=message):
        mazes.Maze(name)


class Recorded:
    """PointMaze that remembers the goals before and after each step."""

    def __init__(self, env):
        self.env, self.goals, self.told = env, [], []

    @property
    def goal(self):
        return self.env.goal

    def reset(self, **options):
        return self.env.reset(**options)

    def step(self, action):
        self.goals.append(np.array(self.env.goal))
        result = self.env.step(action)
        self.told.append(result[0]["desired_goal"])
        return result


def test_the_controller_follows_the_environments_own_goal():
    """The observation at a reached goal still has the old one."""
    env = Recorded(
        gymnasium.unwrapped(
            "PointMaze_UMaze-v3", continuing_task=True, reset_target=True
        )
    )
    maze = mazes.Maze("umaze")
    walk = mazes.collect(env, maze, 3000, new_goal=lambda env: None, horizon=10**9)
    assert walk.reached.sum() > 5
    goals, told = np.array(env.goals), np.array(env.told)
    np.testing.assert_array_equal(walk.goals, np.float32(goals[::5]))
    changed = np.flatnonzero((goals[1:] != goals[:-1]).any(1))
    # The observation of the step that reached it has the goal of before.
    np.testing.assert_array_equal(told[changed], goals[changed])
    assert len(changed) >= walk.reached.sum()


def test_a_walk_continues_and_is_reproducible():
    maze = mazes.Maze("medium")
    renewed = []

    def new_goal(env):
        renewed.append(1)
        env.new_goal()

    run = lambda: mazes.collect(  # noqa: E731
        mazes.PointMass(maze),
        maze,
        2000,
        new_goal=new_goal,
        hold=5,
        horizon=100,
        seed=3,
    )
    walk = run()
    assert len(walk.states) == 400 and renewed
    np.testing.assert_array_equal(walk.next_states[:-1], walk.states[1:])
    assert np.abs(walk.actions).max() <= 1
    cells = maze.cell(walk.states[:, :2])
    assert not maze.walls[cells[:, 0], cells[:, 1]].any()
    for a, b in zip(walk, run()):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="at least 1 decision"):
        mazes.collect(mazes.PointMass(maze), maze, 3, new_goal=new_goal, hold=5)


def test_the_point_mass_moves_as_pointmaze_in_the_open():
    """Free motion of one second; and it stops at walls."""
    env = gymnasium.unwrapped("PointMaze_UMaze-v3")
    env.reset(seed=0)
    start = np.array([-1.0, 1.0, 0.0, 0.0])
    env.point_env.set_state(start[:2], start[2:])
    maze, state = mazes.Maze("umaze"), start
    for t in range(60):
        action = np.array([0.3 * np.cos(t / 9), 0.1 * np.sin(t / 5)])
        observation, *_ = env.step(action)
        state = mazes.glide(maze.walls, state, action)
    np.testing.assert_allclose(state, observation["observation"], atol=2e-3)
    for _ in range(200):
        state = mazes.glide(maze.walls, state, np.array([0.0, 1.0]))
    assert state[1] <= 1.5 - 0.1 and state[3] == 0
