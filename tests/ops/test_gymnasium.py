"""Environments of gymnasium as JAX operations, beside gymnasium itself."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import gymnasium
from tests.ops.test_mujoco import KINDS
from tests.programs import together


@pytest.mark.parity("rl", only=lambda entry: entry["kind"] in KINDS)
def test_recorded_runs(case, float64):
    """The environments' own code, from the recorded first state."""
    name, z = KINDS[case.entry["kind"]], case.arrays
    env = gymnasium.Environment(name)
    at = (z["q"] if "q" in z else z["obs"])[0]
    host = env.unwrapped
    with gymnasium.quiet():
        host.reset(seed=0)
    inner = getattr(host, "point_env", host)
    inner.set_state(at[: host.model.nq], at[host.model.nq :])
    if "goal" in z:
        host.goal = z["goal"]
    host.data.qacc_warmstart[:] = 0
    _, outcome = together(
        lambda a: jax.lax.scan(env.step, jnp.asarray(env._save()), a),
        z["actions"],
    )
    observation = outcome.observation
    if isinstance(observation, dict):
        np.testing.assert_allclose(observation["desired_goal"][0], z["goal"])
        observation = observation["observation"]
    np.testing.assert_allclose(observation, z["obs"][1:], rtol=0, atol=1e-10)
    np.testing.assert_allclose(outcome.reward, z["rewards"], rtol=0, atol=1e-10)
    assert outcome.terminated.dtype == bool


@pytest.mark.parametrize("name", ["Ant-v5", "PointMaze_UMaze-v3"])
def test_the_state_is_everything(name, float64):
    """Two runs in turn on one host are gymnasium's two: goals, draws, stale positions."""
    env = gymnasium.Environment(name, **goals(name))
    rng = np.random.default_rng(0)
    count = 300 if name.startswith("Point") else 20
    actions = rng.uniform(-1, 1, (count // 20, 2, *env.low.shape)).repeat(20, 0)
    seeds = np.uint32([3, 4])

    def run(seeds, actions):
        state, first = env.reset(seeds)
        return first, jax.lax.scan(env.step, state, actions)[1]

    first, outcome = together(run, seeds, actions)
    reached = 0
    for i, seed in enumerate(seeds):
        other = gymnasium.unwrapped(name, **goals(name))
        observation, _ = other.reset(seed=int(seed))
        compare(at(first, i), observation)
        for t, action in enumerate(actions[:, i]):
            observation, reward, terminated, _, _ = other.step(action)
            compare(at(outcome.observation, (t, i)), observation)
            assert abs(outcome.reward[t, i] - reward) < 1e-10
            assert outcome.terminated[t, i] == terminated
            reached += reward if name.startswith("Point") else 0
    assert reached or not name.startswith("Point")  # A new goal was drawn.


def goals(name):
    return {"reset_target": True} if name.startswith("PointMaze") else {}


def at(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


def compare(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), a, b)


def test_options_of_reset():
    env = gymnasium.Environment("PointMaze_UMaze-v3")
    cells = {"goal_cell": (3, 1), "reset_cell": (1, 1)}
    state, first = env.reset(jnp.arange(2, dtype=jnp.uint32), cells)
    assert state.shape == (2, env.words)
    assert (np.abs(np.asarray(first["observation"])[:, :2] - [-1, 1]) <= 0.25).all()
    assert (np.abs(np.asarray(first["desired_goal"]) - [-1, -1]) <= 0.25).all()


def test_refused():
    env = gymnasium.Environment("Reacher-v5")
    state, _ = env.reset(jnp.zeros(1, jnp.uint32))
    with pytest.raises(ValueError, match="got shapes"):
        env.step(state, jnp.zeros((1, 3)))
    with pytest.raises(TypeError, match="uint32|UInt32"):
        env.reset(jnp.zeros(1, jnp.int32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="the action of environment"):
        jax.block_until_ready(env.step(state, jnp.full((1, 2), jnp.nan)))
    with pytest.raises(ValueError, match="gymnasium cannot make 'Reacher-v99'"):
        gymnasium.Environment("Reacher-v99")
    with pytest.raises(ValueError, match="no MuJoCo environment"):
        gymnasium.Environment("CartPole-v1")
    with pytest.raises(ValueError, match="no JAX functions for Ant-v5"):
        gymnasium.task("Ant-v5")


def test_imports_are_quiet(tmp_path):
    """gymnasium-robotics prints when imported; mazes of version 4 are deprecated."""
    code = (
        "from jaxpapers.ops import gymnasium; "
        "gymnasium.unwrapped('AntMaze_UMaze-v4'); "
        "import pathlib, tempfile; "
        "assert not list(pathlib.Path(tempfile.gettempdir()).glob('ant_maze*'))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
