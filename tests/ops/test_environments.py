"""Environments: recorded episodes, gymnasium step for step, exploration by hand."""

import dataclasses
import functools

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpapers.ops import environments as envs
from tests.programs import together


def of_kind(kind):
    return lambda entry: entry["kind"] == kind


def episode(env, state, actions, noise=None):
    """States, observations, rewards and terminations of an episode."""

    def body(state, x):
        step = env.step(state, *x)
        return step.state, step

    xs = (actions,) if noise is None else (actions, noise)
    return lax.scan(body, state, xs)[1]


def cart(position):
    return envs.CartPoleState(position, jnp.zeros((), bool))


def states_of(states):
    return getattr(states, "position", states)


@pytest.mark.parametrize("dtype, tol", [("float64", 1e-9), ("float32", 1e-3)])
@pytest.mark.parity("rl", only=lambda e: e["kind"].startswith("env_"))
def test_recorded_stochastic_episodes(case, dtype, tol):
    z = case.arrays
    pole = "cartpole" in case.entry["kind"]
    env = envs.STOCHASTIC_CART_POLE if pole else envs.STOCHASTIC_PENDULUM

    def run(state, actions, noise):
        return episode(env, cart(state) if pole else state, actions, noise)

    with jax.enable_x64(dtype == "float64"):
        given = (z["state0"], z["actions"][:, None], z["noise"])
        got = together(run, *(x.astype(dtype) for x in given))
    np.testing.assert_allclose(got.observation, z["obs"][1:], rtol=tol, atol=tol)
    np.testing.assert_allclose(got.reward, z["rewards"], rtol=tol, atol=tol)
    np.testing.assert_array_equal(got.terminated, z["done"])


@pytest.mark.parity("rl", only=of_kind("env_cartpole"))
def test_one_step_of_float32(case):
    """From each recorded state."""
    z = case.arrays
    env = envs.STOCHASTIC_CART_POLE
    given = (z["obs"][:-1], z["actions"][:, None], z["noise"])
    step = together(
        jax.vmap(lambda s, a, e: env.step(cart(s), a, e)),
        *(x.astype(np.float32) for x in given),
    )
    np.testing.assert_allclose(step.observation, z["obs"][1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parity("rl", only=of_kind("gym_pendulum"))
def test_recorded_pendulum(case, float64):
    z = case.arrays
    run = functools.partial(episode, envs.PENDULUM_V1)
    got = together(run, z["state"][0], z["actions"])
    np.testing.assert_allclose(got.state, z["state"][1:], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got.observation, z["obs"][1:], atol=1e-6)
    np.testing.assert_allclose(got.reward, z["rewards"], rtol=1e-9)
    assert not got.terminated.any()


@pytest.mark.parity("rl", only=of_kind("gym_cartpole"))
def test_recorded_cart_pole(case, float64):
    z = case.arrays
    run = functools.partial(episode, envs.CartPole())
    actions = 2.0 * z["actions"][:, None] - 1
    got = together(lambda s, a: run(cart(s), a), z["state"][0], actions)
    np.testing.assert_allclose(states_of(got.state), z["state"][1:], rtol=1e-9)
    np.testing.assert_allclose(got.observation, z["obs"][1:], rtol=1e-6)
    np.testing.assert_array_equal(got.reward, z["rewards"])
    np.testing.assert_array_equal(got.terminated, z["done"])


def stepped(name, states, actions):
    """What gymnasium makes of each state and action."""
    env = gymnasium.make(name).unwrapped
    env.reset(seed=0)
    after, rewards, ended = [], [], []
    for state, action in zip(states, actions):
        env.state = state
        _, reward, terminated, _, _ = env.step(action)
        after.append(np.array(env.state, np.float64))
        rewards.append(float(reward))
        ended.append(terminated)
    return np.array(after), np.array(rewards), np.array(ended)


@pytest.mark.parametrize(
    "name, env",
    [
        ("MountainCar-v0", envs.MountainCar()),
        ("MountainCarContinuous-v0", envs.MountainCarContinuous()),
    ],
)
def test_mountain_car_as_gymnasium_has_it(name, env, float64):
    """From states all over the valley: at the wall, at the goal, at full speed."""
    rng = np.random.default_rng(0)
    states = rng.uniform((-1.2, -0.07), (0.6, 0.07), (300, 2))
    states[::10, 0] = -1.19
    states[5::10, 0] = 0.48
    discrete = isinstance(env.action_space, envs.Discrete)
    actions = rng.integers(0, 3, 300) if discrete else rng.normal(0, 1, (300, 1))
    after, rewards, ended = stepped(name, states, actions)
    got = together(jax.vmap(env.step), states, actions)
    # The continuous one keeps its state in float32.
    tol = 1e-12 if discrete else 1e-7
    np.testing.assert_allclose(got.state, after, rtol=tol, atol=tol)
    np.testing.assert_allclose(got.reward, rewards, rtol=1e-12)
    np.testing.assert_array_equal(got.terminated, ended)
    assert 0 < ended.sum() < 300 and (after[:, 0] < -1.1999).any()


def test_the_pendulum_at_its_largest_velocity(float64):
    """gymnasium clips before the angle moves, the stochastic pendulum after."""
    states = np.float64([[1.5, 7.9], [-1.5, -7.9], [0.3, 2.0]])
    actions = np.float64([[2.0], [-5.0], [1.0]])
    after, rewards, _ = stepped("Pendulum-v1", states, actions)

    def body(states, actions):
        quiet = dataclasses.replace(envs.STOCHASTIC_PENDULUM, noise=0.0)
        return [jax.vmap(e.step)(states, actions) for e in (envs.PENDULUM_V1, quiet)]

    own, late = together(body, states, actions)
    np.testing.assert_allclose(own.state, after, rtol=1e-12)
    np.testing.assert_allclose(own.reward, rewards, rtol=1e-12)
    u = np.clip(actions[:, 0], -2, 2)
    speed = states[:, 1] + 0.05 * (15 * np.sin(states[:, 0]) + 3 * u)
    assert (np.abs(speed[:2]) > 8).all() and (np.abs(late.state[:2, 1]) == 8).all()
    np.testing.assert_allclose(
        late.state[:, 0], states[:, 0] + 0.05 * speed, rtol=1e-12
    )


def test_horizons_and_spaces_as_gymnasium_has_them():
    for name, env in {
        "Pendulum-v1": envs.PENDULUM_V1,
        "MountainCar-v0": envs.MountainCar(),
        "MountainCarContinuous-v0": envs.MountainCarContinuous(),
        "CartPole-v1": envs.CartPole(),
    }.items():
        gym = gymnasium.make(name)
        assert gym.spec.max_episode_steps == env.horizon
        for bound in ("low", "high"):
            expected = getattr(gym.observation_space, bound)
            own = np.float32(getattr(env.observation_space, bound))
            np.testing.assert_allclose(own, expected)
        if hasattr(gym.action_space, "low"):
            assert env.action_space.high == tuple(gym.action_space.high)
        elif isinstance(env.action_space, envs.Discrete):
            assert env.action_space.n == gym.action_space.n


def test_resets_lie_where_gymnasium_draws_them(key):
    cases = {
        "pendulum": (envs.PENDULUM_V1, (-np.pi, -1), (np.pi, 1)),
        "car": (envs.MountainCar(), (-0.6, 0), (-0.4, 0)),
        "cart": (envs.CartPole(), (-0.05,) * 4, (0.05,) * 4),
    }

    def body(key):
        keys = jax.random.split(key, 2000)
        states = {k: jax.vmap(env.reset)(keys) for k, (env, *_) in cases.items()}
        # A key adds the noise of N(0, 0.01^2).
        hanging = envs.STOCHASTIC_PENDULUM.reset(key)
        step = functools.partial(envs.STOCHASTIC_PENDULUM.step, hanging, jnp.zeros(1))
        return states, jax.vmap(step)(keys).reward, step().reward

    states, noisy, quiet = together(body, key)
    for name, (_, low, high) in cases.items():
        drawn = states_of(states[name])
        assert (drawn >= np.float32(low)).all() and (drawn <= np.float32(high)).all()
        width = np.subtract(high, low)
        np.testing.assert_allclose(
            np.ptp(drawn, axis=0), width, atol=0.01 * width.max()
        )
    assert noisy.std() == pytest.approx(0.01, rel=0.1)
    assert noisy.mean() == pytest.approx(quiet, abs=0.001)


def bsuite(n, cost, right, actions, noise):
    """Deep Sea in plain Python: rewards and cells of one episode."""
    column, rewards, cells = 0, [], []
    for row, (action, (normal, uniform)) in enumerate(zip(actions, noise)):
        reward = 0.0
        moves = action == right[row, column]
        if column == n - 1 and moves:
            reward += 1
        if row == n - 1 and column in (0, n - 1):
            reward += normal
        if moves:
            reward -= cost / n
            if uniform > 1 / n:
                column = min(column + 1, n - 1)
        else:
            column = max(column - 1, 0)
        rewards.append(reward)
        cells.append((row + 1, column))
    return rewards, cells


def test_deep_sea(float64):
    n, sea = 5, envs.DeepSea(size=5, cost=0.02, mapping_seed=3)
    right = sea.mapping()
    assert 0 < right.mean() < 1 and right.shape == (n, n)
    best = right[np.arange(n), np.arange(n)]
    rng = np.random.default_rng(0)
    several = np.stack([best, *rng.integers(0, 2, (30, n))])
    noise = np.stack([rng.normal(size=(31, n)), rng.uniform(size=(31, n))], -1)
    calm = np.zeros_like(noise) + [0, 1]

    def body(actions, noise):
        windy = envs.DeepSea(size=n, cost=0.02, mapping_seed=3, windy=True)
        return [
            jax.vmap(lambda a: episode(sea, sea.reset(), a))(actions),
            jax.vmap(lambda a, e: episode(windy, windy.reset(), a, e))(actions, noise),
        ]

    results = together(body, several, noise)
    for got, eps in zip(results, (calm, noise)):
        for i, actions in enumerate(several):
            rewards, cells = bsuite(n, 0.02, right, actions, eps[i])
            np.testing.assert_allclose(got.reward[i], rewards, atol=1e-12)
            assert got.terminated[i].tolist() == [False] * (n - 1) + [True]
            for (row, column), seen in zip(cells, got.observation[i]):
                assert seen.sum() == (row < n)
                assert row == n or seen[row * n + column] == 1
    found = (several == best).all(1)
    returns = results[0].reward.sum(1)
    np.testing.assert_allclose(returns[found], 0.98)
    assert (returns[~found] < 0).all() and found.sum() < 10


def test_chain():
    chain, noise = envs.Chain(), np.zeros((20, 1), np.float32)

    def body(noise):
        ways = [jnp.full(20, a) for a in (0, 1)]
        return [episode(chain, chain.reset(), a, noise) for a in ways]

    left, right = together(body, noise)
    np.testing.assert_allclose(left.state[:3], [0.1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(left.reward[:3], [0, 0.01, 0.01], atol=1e-6)
    places = np.minimum(0.2 + 0.1 * np.arange(1, 21), 1)
    np.testing.assert_allclose(right.state, places, rtol=1e-6)
    assert right.reward.sum() == 13
    noisy = together(body, np.ones_like(noise))[1]
    assert noisy.state[0] == pytest.approx(0.31)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: envs.Pendulum(mass=0.0), ValueError, "Pendulum.mass must be > 0"),
        (lambda: envs.DeepSea(size=0), ValueError, "DeepSea.size must be > 0"),
        (lambda: envs.Chain(start=2.0), ValueError, "start must lie in"),
        (lambda: envs.MountainCar(goal=3.0), ValueError, "MountainCar.goal must lie"),
        (
            lambda: envs.MountainCarContinuous(power=0.0),
            ValueError,
            "MountainCarContinuous.power",
        ),
        (
            lambda: envs.PENDULUM_V1.step(jnp.zeros(2), jnp.zeros(())),
            ValueError,
            r"shape \(1,\), got \(\)",
        ),
        (
            lambda: envs.PENDULUM_V1.step(jnp.zeros(2), jnp.zeros(1), jnp.zeros(2)),
            ValueError,
            r"noise must have shape \(3,\)",
        ),
        (
            lambda: envs.MountainCar().step(jnp.zeros(2), 1.5),
            TypeError,
            "must be an integer, got float32",
        ),
        (lambda: envs.MountainCar().step(jnp.zeros(2), 3), ValueError, "one of 0 to 2"),
        (
            lambda: envs.MountainCar().step(jnp.zeros(2), np.zeros(2, int)),
            ValueError,
            "must be a scalar",
        ),
    ],
)
def test_bad_constants_and_actions_are_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
