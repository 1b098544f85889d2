"""MuJoCo as JAX operations: recorded runs, purity, resume, many environments, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import gymnasium, mujoco
from tests.programs import together

KINDS = {
    "gym_reacher": "Reacher-v5",
    "gym_pusher": "Pusher-v5",
    "gym_invertedpendulum": "InvertedPendulum-v5",
    "pointmaze_umaze": "PointMaze_UMaze-v3",
}
PENDULUM = """<mujoco><option timestep="0.01"/><worldbody><body name="arm" pos="0 0 1">
<joint name="hinge" type="hinge" axis="0 1 0" range="-180 180"/>
<geom type="capsule" fromto="0 0 0 0 0 -.5" size=".05"/>
<site name="tip" pos="0 0 -.5"/></body></worldbody>
<actuator><motor joint="hinge"/></actuator></mujoco>"""


def split(simulator, q):
    """Positions and velocities of a vector of both."""
    return q[: simulator.model.nq], q[simulator.model.nq :]


@pytest.mark.parity("rl", only=lambda entry: entry["kind"] in KINDS)
def test_recorded_runs(case, float64):
    """Rewards and observations as JAX functions of what a step reads."""
    name, z = KINDS[case.entry["kind"]], case.arrays
    env, task = gymnasium.unwrapped(name), gymnasium.task(name)
    simulator = mujoco.Simulator(env.model, **task.options)
    q = z["q"] if "q" in z else z["obs"]
    goal = (jnp.asarray(z["goal"]),) if "goal" in z else ()

    def step(state, action):
        state, reading = simulator.step(state, action)
        reward = task.reward(reading, action, *goal)
        at = jnp.concatenate([reading.qpos, reading.qvel])
        return state, (at, task.observe(reading), reward)

    start = simulator.start_on_host(*split(simulator, q[0]))
    at, observation, reward = together(
        lambda a: jax.lax.scan(step, jnp.asarray(start), a)[1], z["actions"]
    )
    np.testing.assert_allclose(at, q[1:], rtol=0, atol=1e-10)
    np.testing.assert_allclose(observation, z["obs"][1:], rtol=0, atol=1e-10)
    # gymnasium adds the squares of float32 actions in float32.
    atol = 1e-6 if z["actions"].dtype == np.float32 else 0
    np.testing.assert_allclose(reward, z["rewards"], rtol=0, atol=atol)


@pytest.fixture(scope="module")
def pendulum():
    return mujoco.Simulator(PENDULUM, frame_skip=2, sites=("tip",), fresh=True)


def controls(n, *shape):
    return np.random.default_rng(0).uniform(-1, 1, (n, *shape)).astype(np.float32)


def test_a_stopped_run_goes_on_bitwise(pendulum):
    """Through float32 programs and a file, where the state alone is kept."""
    scan = jax.jit(lambda state, a: jax.lax.scan(pendulum.step, state, a))
    start = pendulum.start(jnp.float32([0.3]), jnp.float32([0.0]))
    actions = controls(20, 1)
    whole, readings = scan(start, np.resize(actions, (40, 1)))
    half, first = scan(start, actions)
    half = np.frombuffer(np.asarray(half).tobytes(), np.uint32)
    rest, second = scan(half, actions)
    assert whole.dtype == jnp.uint32 and whole.shape == (pendulum.words,)
    np.testing.assert_array_equal(rest, whole)
    for a, b, c in zip(first, second, readings):
        np.testing.assert_array_equal(np.concatenate([a, b]), c)
    assert readings.qpos.dtype == jnp.float32
    # float32 would lose what the words keep.
    q = mujoco.from_words(np.asarray(whole))[1]
    assert np.float64(np.float32(q)) != q


def test_environments_of_one_call_are_independent(pendulum):
    many = mujoco.Simulator(
        PENDULUM, frame_skip=2, sites=("tip",), fresh=True, threads=3
    )
    q, v = controls(8, 1).reshape(2, 4, 1), np.zeros((2, 4, 1), np.float32)
    actions = controls(5, 2, 4, 1)

    def run(simulator, q, v, actions):
        state = simulator.start(q, v)
        return jax.lax.scan(simulator.step, state, actions)

    state, readings = together(lambda *a: run(many, *a), q, v, actions)
    calls = []
    host, many.step_on_host = many.step_on_host, lambda *a: calls.append(1) or host(*a)
    mapped = jax.vmap(jax.vmap(lambda *a: run(many, *a), (0, 0, 1)), (0, 0, 1))
    again, _ = together(mapped, q, v, actions)
    np.testing.assert_array_equal(again, state)
    assert len(calls) == 5  # One for all environments, at each step.
    assert state.shape == (2, 4, many.words) and readings.sites.shape == (5, 2, 4, 1, 3)
    for i, j in [(0, 0), (1, 2)]:
        one = together(lambda *a: run(pendulum, *a), q[i, j], v[i, j], actions[:, i, j])
        np.testing.assert_array_equal(one[0], state[i, j])
        np.testing.assert_array_equal(one[1].sites, readings.sites[:, i, j])


def test_fresh_positions_are_those_of_the_state(pendulum):
    stale = mujoco.Simulator(PENDULUM, sites=("tip",), bodies=("arm",))
    state = pendulum.start_on_host(np.float64([0.5]), np.float64([1.0]))
    _, fresh = pendulum.step_on_host(state, np.zeros(1))
    angle = fresh.qpos[0]
    tip = [-0.5 * np.sin(angle), 0, 1 - 0.5 * np.cos(angle)]
    np.testing.assert_allclose(fresh.sites[0], tip, atol=1e-12)
    new, old = stale.step_on_host(state, np.zeros(1))
    tip = [-0.5 * np.sin(0.5), 0, 1 - 0.5 * np.cos(0.5)]
    np.testing.assert_allclose(old.sites[0], tip, atol=1e-12)
    assert old.time == 0.01 and fresh.time == 0.02
    np.testing.assert_allclose(old.bodies[0], [0, 0, 1])
    read = together(stale.read, new)
    np.testing.assert_allclose(read.qpos, old.qpos, rtol=1e-6)
    tip = -0.5 * np.sin(old.qpos[0])
    np.testing.assert_allclose(read.sites[0, 0], tip, rtol=1e-5)


def test_steps_of_programs_share_their_data():
    """XLA's threads forget what is theirs after a call: data of theirs would be lost."""
    simulator = mujoco.Simulator(PENDULUM)
    start = simulator.start_on_host(np.zeros((2, 1)), np.zeros((2, 1)))
    for count in (3, 4):
        run = lambda s, a: jax.lax.scan(simulator.step, s, a)[0]  # noqa: E731
        together(run, start, np.zeros((count, 2, 1), np.float32))
    assert len(simulator._free) == 1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("<mujoco><a/></mujoco>",), ValueError, "unrecognized element"),
        (("no/such.xml",), FileNotFoundError, "no MuJoCo model at no/such.xml"),
        ((PENDULUM, {"bodies": ("leg",)}), ValueError, r"no body \['leg'\].*arm"),
        ((PENDULUM, {"sites": ("toe",)}), ValueError, r"no site \['toe'\].*tip"),
        ((PENDULUM, {"sites": "tip"}), TypeError, "must be a tuple"),
        ((PENDULUM, {"frame_skip": 0}), ValueError, "frame_skip must be >= 1, got 0"),
        ((PENDULUM, {"threads": 0}), ValueError, "threads must be >= 1, got 0"),
    ],
)
def test_refused_models(arguments, error, message):
    source, *options = arguments
    with pytest.raises(error, match=message):
        mujoco.Simulator(source, **(options[0] if options else {}))


def test_refused_shapes(pendulum):
    state = jnp.zeros((3, pendulum.words), jnp.uint32)
    with pytest.raises(ValueError, match="control must have a last axis of 1"):
        pendulum.step(state, jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="leading axes"):
        pendulum.step(state, jnp.zeros((2, 1)))
    with pytest.raises(TypeError, match="uint32|UInt32"):
        pendulum.step(jnp.zeros((3, pendulum.words), jnp.float32), jnp.zeros((3, 1)))
    with pytest.raises(ValueError, match="qvel must have a last axis of 1"):
        pendulum.start(jnp.zeros(1), jnp.zeros(2))


def test_no_silent_reset(pendulum):
    """MuJoCo sets an unstable simulation back to its start, and NaN controls to 0."""
    start = pendulum.start_on_host(np.zeros((2, 1)), np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"the control of environment \[1\]"):
        pendulum.step_on_host(start, np.float64([[0], [np.nan]]))
    with pytest.raises(ValueError, match="qpos of environment"):
        pendulum.start_on_host(np.float64([np.inf]), np.zeros(1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="the control of environment"):
        jax.block_until_ready(
            pendulum.step(jnp.asarray(start), jnp.full((2, 1), jnp.inf))
        )


def test_an_unstable_simulation_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log there.
    stiff = mujoco.Simulator(PENDULUM.replace("0.01", "10"), frame_skip=50)
    state = stiff.start_on_host(np.zeros((1, 1)), np.full((1, 1), 1e9))
    with pytest.raises(ValueError, match="became unstable"):
        for _ in range(50):
            state, _ = stiff.step_on_host(state, np.full((1, 1), 1e9))


def test_the_missing_extra_is_named(monkeypatch):
    mujoco.module.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "glfw", None)
    with pytest.raises(ModuleNotFoundError, match=r"jaxpapers\[rl\]"):
        mujoco.Simulator(PENDULUM)
