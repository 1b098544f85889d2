"""Environments of PETS: recorded physics, rewards by hand, the arm in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import environments as envs
from jaxpapers.ops.environments import pets
from tests.programs import together

ENVIRONMENTS = {
    "pets_cartpole": envs.PetsCartPole(),
    "pets_pusher": envs.Pusher(),
    "pets_reacher3d": envs.Reacher3D(),
}


def reward_by_hand(kind, q, bodies, action):
    """Of the state that the environment's reward is about."""
    cost = np.square(action).sum()
    if kind == "pets_cartpole":
        tip = np.array([q[0] - 0.6 * np.sin(q[1]), -0.6 * np.cos(q[1])])
        return np.exp(-np.square(tip - [0, 0.6]).sum() / 0.6**2) - 0.01 * cost
    if kind == "pets_pusher":
        tip, thing, goal = bodies.reshape(3, 3)
        near, far = np.abs(thing - tip).sum(), np.abs(thing - goal).sum()
        return -0.5 * near - 1.25 * far - 0.1 * cost
    return None


@pytest.mark.parity("rl", only=lambda e: e["kind"] in ENVIRONMENTS)
def test_recorded_physics(case, float64):
    kind, z = case.entry["kind"], case.arrays
    env = ENVIRONMENTS[kind]
    simulator = env.simulator
    assert simulator.frame_skip == case.read("frame_skip")
    n = simulator.model.nq
    start = simulator.start_on_host(z["q"][0, :n], z["q"][0, n:])

    def body(physics, observation, actions):
        def step(state, action):
            after = env.step(state, action)
            reading = simulator.read(after.state.physics)
            at = jnp.concatenate([reading.qpos, reading.qvel])
            return after.state, (at, after.observation, after.reward)

        first = envs.PhysicsState(physics, observation)
        return jax.lax.scan(step, first, actions)[1]

    size = len(env.observation_space.low)
    first = np.zeros(size)
    if kind == "pets_pusher":
        first[14:] = z["bodies"][0, :6]
    at, seen, reward = together(body, start, first, z["actions"])
    np.testing.assert_allclose(at, z["q"][1:], rtol=0, atol=1e-6)
    if kind == "pets_pusher":
        np.testing.assert_allclose(seen[:, 14:], z["bodies"][1:, :6], atol=1e-6)
        np.testing.assert_allclose(seen[:, :7], z["q"][1:, :7], atol=1e-6)
        np.testing.assert_allclose(z["bodies"][:, 6:], [pets.GOAL] * 101, atol=1e-6)
    elif kind == "pets_reacher3d":
        np.testing.assert_allclose(seen, z["q"][1:, :17], atol=1e-6)
    else:
        np.testing.assert_allclose(seen, z["q"][1:], atol=1e-6)
    shift = 0 if kind == "pets_pusher" else 1
    for t in range(100):
        expected = reward_by_hand(
            kind, z["q"][t + shift], z["bodies"][t + shift], z["actions"][t]
        )
        if expected is not None:
            assert reward[t] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parity("rl", only=lambda e: e["kind"] == "reacher3d_fk")
def test_recorded_arm(case, float64):
    z = case.arrays

    def body(states):
        points = envs.arm_points(states[:, :7])
        reward = ENVIRONMENTS["pets_reacher3d"].reward(states, jnp.ones((64, 7)))
        # The first rows are stretched out, where a cross product is 0.
        slope = jax.grad(lambda a: envs.arm_points(a).sum())(states[:, :7])
        return points, reward, slope

    points, reward, slope = together(body, z["states"])
    np.testing.assert_allclose(points[:, -1], z["ee"], rtol=0, atol=1e-12)
    expected = -np.square(z["ee"] - z["states"][:, 7:10]).sum(1) - 0.07
    np.testing.assert_allclose(reward, expected, atol=1e-12)
    assert np.isfinite(slope).all()
    lengths = np.linalg.norm(np.diff(points, axis=1), axis=2)
    np.testing.assert_allclose(lengths, [[0.4, 0.321, 0.16828]] * 64)


def test_the_arm_is_where_mujoco_has_it():
    """The wrist of the closed form is the body of the simulation."""
    env = ENVIRONMENTS["pets_reacher3d"]
    model, data = env.simulator.model, None
    mujoco = pytest.importorskip("mujoco")
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    angles = rng.uniform(-1, 1, (5, 7)).astype(np.float32)
    points = together(envs.arm_points, angles)
    for q, own in zip(angles, points):
        data.qpos[:7] = q
        mujoco.mj_kinematics(model, data)
        # Bodies of the lifting joint, the elbow and the wrist.
        for point, joint in zip(own, ("shoulder_lift", "elbow_flex", "wrist_flex")):
            anchor = data.xanchor[mujoco.mj_name2id(
                model, mujoco.mjtObj.mjOBJ_JOINT, joint)]  # fmt: skip
            np.testing.assert_allclose(point, anchor, atol=1e-6)


def test_resets_and_many_environments(key):
    def body(key):
        out = {}
        for name, env in ENVIRONMENTS.items():
            keys = jax.random.split(key, 3)
            states = jax.vmap(env.reset)(keys)
            actions = jnp.zeros((3, len(env.action_space.low)))
            out[name] = (states.observation, jax.vmap(env.step)(states, actions))
        return out

    out = together(body, key)
    for name, (first, step) in out.items():
        size = len(ENVIRONMENTS[name].observation_space.low)
        assert first.shape == step.observation.shape == (3, size)
        assert len(np.unique(first, axis=0)) == 3 and step.reward.shape == (3,)
        assert not step.terminated.any()
    reacher, pusher = out["pets_reacher3d"][0], out["pets_pusher"][0]
    assert (reacher[:, :7] == 0).all() and (np.abs(reacher[:, 7:10]) < 1).all()
    # The cylinder slides along y and x of its place on the table.
    np.testing.assert_allclose(pusher[:, 17:], [[0.6, -0.3, -0.275]] * 3, atol=0.1)
    np.testing.assert_allclose(pusher[:, 19], -0.275, atol=1e-6)
    with pytest.raises(ValueError, match=r"shape \(7,\), got \(2,\)"):
        env = ENVIRONMENTS["pets_pusher"]
        env.step(envs.PhysicsState(jnp.zeros(3), jnp.zeros(20)), jnp.zeros(2))
