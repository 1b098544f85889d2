"""Planners: recorded plans, closed forms, LQR, what every planner promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxpapers.ops import environments as envs
from jaxpapers.ops import planning
from jaxpapers.ops.environments import Box
from tests.programs import together

SPACE = Box((-1.0, -2.0), (1.0, 2.0))
SMALL = {
    "cem": planning.Options(horizon=4, population=200, elites=20),
    "icem": planning.Options(name="icem", horizon=4, population=64, elites=8),
    "mppi": planning.Options(
        name="mppi", horizon=4, population=200, variance=0.1, temperature=0.1
    ),
    "shooting": planning.Options(name="shooting", horizon=1, population=400),
}


def cart_pole_reward(states, actions):
    del actions
    return jnp.cos(states[:, 2]) - 0.01 * states[:, 0] ** 2


def pendulum_reward(states, actions):
    angle = jnp.arctan2(states[:, 1], states[:, 0])
    return -envs.STOCHASTIC_PENDULUM.cost(angle, states[:, 2], actions[:, 0])


@pytest.mark.parametrize("dtype, tol", [("float64", 1e-6), ("float32", 1e-4)])
@pytest.mark.parity("rl", only=lambda e: e["kind"] == "cem")
def test_recorded_plans(case, dtype, tol):
    z = case.arrays
    reward = {"cartpole": cart_pole_reward, "pendulum": pendulum_reward}
    reward = reward[case.read("reward")]
    sizes, rest = z["cfg"].astype(int), z["cfg"][[5, 6, 8, 9]]
    (_, a, h, p, e), iterations = sizes[:5], sizes[7]
    alpha, variance, low, high = map(float, rest)
    options = planning.Options(
        horizon=int(h), population=int(p), elites=int(e), iterations=int(iterations),
        alpha=alpha, variance=variance,
    )  # fmt: skip

    def body(s0, M, B, warm, noise):
        def step(states, actions, key):
            del key
            after = states @ M + jnp.tanh(actions @ B)
            return after, reward(states, actions)

        warm = planning.Warm(warm, jnp.zeros((0, *warm.shape), warm.dtype))
        return planning.plan(
            planning.rollout(step), s0, jax.random.key(0), warm, options,
            Box((low,) * a, (high,) * a), noise,
        )  # fmt: skip

    noise = z["noise"][:iterations].reshape(iterations, p, h, a)
    with jax.enable_x64(dtype == "float64"):
        given = (z["s0"], z["M"], z["B"], z["warm"].reshape(h, a), noise)
        got = together(body, *(x.astype(dtype) for x in given))
    close = {"rtol": tol, "atol": tol}
    np.testing.assert_allclose(got.trace.returns, z["returns"], **close)
    np.testing.assert_array_equal(got.trace.elites, z["elites"])
    flat = (iterations, h * a)
    np.testing.assert_allclose(got.trace.means.reshape(flat), z["means"], **close)
    np.testing.assert_allclose(got.trace.variances.reshape(flat), z["vars"], **close)
    np.testing.assert_allclose(got.action, z["action"], **close)
    np.testing.assert_allclose(got.warm.mean.reshape(-1), z["means"][-1], **close)


def quadratic(target):
    def evaluate(state, plans, key):
        wanted = jnp.broadcast_to(target + state, plans.shape[-1:])
        return -jnp.square(plans - wanted[None, None]).sum((1, 2))

    return evaluate


def solved(options, target, *, seeds=3, space=SPACE, steps=1):
    """Plans of several seeds, in one program."""

    def one(key):
        def step(carry, key):
            found = planning.plan(
                quadratic(target), jnp.zeros(()), key, carry, options, space
            )
            return found.warm, found

        warm = planning.start(options, space)
        keys = jax.random.split(key, steps)
        return jax.lax.scan(step, warm, keys)[1]

    return together(jax.vmap(one), jax.random.split(jax.random.key(0), seeds))


@pytest.mark.parametrize("name", planning.NAMES)
def test_every_planner_finds_the_clipped_optimum(name):
    """With a target inside the bounds in one component and outside in the other."""
    iterations = 5 if name == "icem" else 12
    options = dataclasses.replace(SMALL[name], iterations=iterations)
    got = solved(options, jnp.array([0.4, 3.0]), steps=2)
    inside, outside = got.action[:, 1, 0], got.action[:, 1, 1]
    np.testing.assert_allclose(inside, 0.4, atol=0.25)
    assert (outside > 1.8).all() and (outside <= 2).all()
    # Two steps are planned with two keys.
    assert not np.array_equal(got.warm.mean[:, 0], got.warm.mean[:, 1])
    assert not np.array_equal(got.warm.mean[0], got.warm.mean[1])


def test_limits_of_cem():
    """alpha 1 keeps the distribution, E = P is the plain mean; plans stay in the box."""
    seen = []

    def evaluate(state, plans, key):
        seen.append(plans.shape)
        # How far outside of the box.
        low, high = (jnp.array(x)[None, None] for x in SPACE)
        return jnp.maximum(plans - high, low - plans).max((1, 2))

    def body(key):
        warm = planning.Warm(jnp.full((4, 2), 0.9), jnp.zeros((0, 4, 2)))

        def run(**fields):
            options = dataclasses.replace(SMALL["cem"], variance=9.0, **fields)
            return planning.plan(evaluate, (), key, warm, options, SPACE)

        return (
            run(alpha=1.0),
            run(elites=200, alpha=0.0, iterations=1),
            run(execute="best"),
        )

    still, plain, best = together(body, jax.random.key(0))
    np.testing.assert_allclose(still.trace.means[-1, :3], 0.9)
    np.testing.assert_allclose(still.trace.variances, 9, rtol=1e-6)
    assert (still.trace.returns <= 1e-6).all() and (best.trace.returns <= 1e-6).all()
    assert np.abs(plain.action - 0.9).max() < 0.1
    # Shifted, with no action at the end.
    np.testing.assert_allclose(still.warm.mean[-1], 0)
    assert best.value == best.trace.returns.max()
    assert not np.array_equal(best.action, best.warm.mean[0])
    assert set(seen) == {(200, 4, 2)}


def test_cem_stops_and_nan_is_never_elite():
    options = dataclasses.replace(SMALL["cem"], iterations=30, alpha=0.0)

    def evaluate(state, plans, key):
        values = quadratic(0.2)(0.0, plans, key)
        return jnp.where(plans[:, 0, 0] > 0.3, jnp.nan, values)

    def body(key):
        warm = planning.start(options, SPACE)
        good = planning.plan(evaluate, (), key, warm, options, SPACE)
        none = {
            name: planning.plan(
                lambda s, u, k: jnp.full(len(u), jnp.nan), (), key,
                planning.start(o, SPACE), o, SPACE,
            )
            for name, o in SMALL.items()
        }  # fmt: skip
        return good, none

    got, none = together(body, jax.random.key(0))
    largest = got.trace.variances.max((1, 2))
    done = int((largest > options.stop).sum()) + 1
    assert done < 20
    assert (got.trace.returns[done:] == -np.inf).all()
    assert np.isfinite(got.trace.returns[:done].max(1)).all()
    np.testing.assert_array_equal(got.trace.means[done - 1], got.trace.means[-1])
    np.testing.assert_allclose(got.action, 0.2, atol=0.1)
    for found in none.values():
        assert np.isfinite(found.action).all() and found.value == -np.inf


def test_lqr_within_a_percent_of_riccati(float64):
    """A double integrator with the true model and the value beyond the horizon."""
    A, B = np.array([[1.0, 0.1], [0.0, 1.0]]), np.array([[0.0], [0.1]])
    Q, R = np.diag([1.0, 0.1]), np.array([[0.1]])
    value = scipy.linalg.solve_discrete_are(A, B, Q, R)
    options = planning.Options(
        horizon=20, population=300, elites=30, iterations=30, stop=1e-5
    )
    space, first = Box((-5.0,), (5.0,)), np.array([1.0, 0.0])

    def evaluate(state, plans, key):
        def step(s, a):
            return A @ s + B @ a, s @ Q @ s + a @ R @ a

        def cost(actions):
            s, costs = jax.lax.scan(step, state, actions)
            return costs.sum() + s @ value @ s

        return -jax.vmap(cost)(plans)

    def body(s, key):
        warm = planning.start(options, space)
        return planning.plan(evaluate, s, key, warm, options, space).value

    cost, best = -together(body, first, jax.random.key(0)), first @ value @ first
    assert best <= cost < 1.01 * best


def test_coloured_noise():
    white, red = planning.coloured(32, 0.0), planning.coloured(32, 2.0)
    np.testing.assert_allclose(white @ white.T, np.eye(32), atol=1e-12)
    covariance = red @ red.T
    np.testing.assert_allclose(np.diag(covariance), 1)
    spectrum = np.fft.rfft(covariance[0]).real
    frequency = np.fft.rfftfreq(32)[1:]
    np.testing.assert_allclose(spectrum[1:] * frequency**2, spectrum[1] / 32**2)
    assert planning.coloured(1, 2.0) == pytest.approx(1)


def test_sizes_of_icem():
    options = planning.Options(
        name="icem", population=100, elites=10, iterations=4, decay=2.0
    )
    assert options.sizes == (100, 50, 25, 20) and options.kept == 3
    seen = []

    def evaluate(state, plans, key):
        seen.append(len(plans))
        return -jnp.square(plans).sum((1, 2))

    jax.eval_shape(
        lambda key: planning.plan(
            evaluate, (), key, planning.start(options, SPACE), options, SPACE
        ),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    # The kept ones, and the mean at the end.
    assert seen == [103, 53, 28, 24]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"elites": 501}, "elites must be at most the population 500, got 501"),
        ({"elites": 0}, "elites must be >= 1, got 0"),
        ({"horizon": 0}, "horizon must be >= 1, got 0"),
        ({"variance": 0.0}, "variance must be > 0"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"temperature": float("nan")}, "temperature must be > 0, got nan"),
        ({"name": "cma"}, "name must be one of"),
        ({"execute": "worst"}, "execute must be one of"),
    ],
)
def test_bad_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        planning.Options(**fields)


def test_bad_bounds_and_shapes_are_refused():
    options = SMALL["cem"]
    for space in (Box((1.0,), (1.0,)), Box((-np.inf,), (1.0,)), Box((2.0,), (1.0,))):
        with pytest.raises(ValueError, match="finite bounds .* low < high"):
            planning.start(options, space)
    key = jax.eval_shape(lambda: jax.random.key(0))
    mean = jax.ShapeDtypeStruct((3, 2), jnp.float32)
    warm = planning.Warm(mean, jax.ShapeDtypeStruct((0, 3, 2), jnp.float32))

    def run(options, noise, key, warm):
        return planning.plan(quadratic(0.0), 0.0, key, warm, options, SPACE, noise)

    with pytest.raises(ValueError, match=r"must have shape \(4, 2\), got \(3, 2\)"):
        jax.eval_shape(lambda k, w: run(options, None, k, w), key, warm)
    noise = np.zeros((5, 400, 1, 2), np.float32)
    with pytest.raises(ValueError, match="noise can be given for cem"):
        jax.eval_shape(
            lambda k: run(
                SMALL["shooting"], jnp.asarray(noise), k,
                planning.start(SMALL["shooting"], SPACE),
            ),
            key,
        )  # fmt: skip
