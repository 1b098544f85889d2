"""MPC-PSRL: models of an episode, episodes, one program for a run, many seeds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxpapers.method import population
from jaxpapers.ops import environments as envs
from jaxpapers.ops import planning
from jaxpapers.ops import posterior as blr
from jaxpapers.papers import mpc_psrl as psrl
from jaxpapers.papers.mpc_psrl import models, network
from jaxpapers.papers.mpc_psrl.regression import NOISES
from tests.contract import grid
from tests.programs import COMPILED, KEY, params_like, together

PLANNER = planning.Options(horizon=3, population=8, elites=2, iterations=2)
NET = psrl.Net(hidden=6, reward_hidden=4)
PROBLEM = psrl.Problem(envs.CartPole(noise=0.01, horizon=6), psrl.rewards.cart_pole)


def config(steps=4, **fields):
    options = psrl.Options(epochs=2, reward_epochs=2, batch=4, noise=0.01, **fields)
    return ConfigDict(
        {
            "net": dataclasses.asdict(NET),
            "method": dataclasses.asdict(options),
            "planner": dataclasses.asdict(PLANNER),
            "optim": {"name": "adam", "lr": 1e-2},
            "train": {"steps": steps, "accumulate": 1},
        }
    )


def run(method, steps, key):
    """States after each episode, and the metrics, in one program."""

    def body(state, _):
        state, metrics = method.update(state, {})
        return state, (state, metrics)

    return jax.lax.scan(body, method.init(key, {}), None, steps)[1]


def model_by_hand(agent, seed=0):
    """A model with one hidden layer's features, and its pieces in NumPy."""
    sizes = (5, 6, 4)
    params = params_like(lambda k: network.init(k, sizes, 4), jax.random.key(0))
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(4, 4)).astype(np.float32)
    root = np.triu(rng.normal(size=(4, 4))).astype(np.float32) + 3 * np.eye(4)
    post = blr.Posterior(weights, root.astype(np.float32), np.zeros(4), 0.0)
    regression = psrl.Regression(post, np.float32(0.1))
    scaler = network.Scaler(np.zeros(5, np.float32), np.ones(5, np.float32))
    known = psrl.Known(scaler, regression, ())
    return {"dynamics": params}, known


def test_models_of_the_regressing_agents():
    """sample is mean + R^-1 eps; optimistic moves within the posterior's deviation."""
    params, known = model_by_hand("sample")
    options = {
        agent: psrl.Options(agent=agent, plan_noise=False, optimism=1.5)
        for agent in ("sample", "mean", "optimistic")
    }
    state = np.float32([0.1, 0.2, -0.1, 0.3])
    plans = np.random.default_rng(1).uniform(-1, 1, (8, 1, 5)).astype(np.float32)

    def oracle(observations, actions):
        return observations[:, 0] + 10 * actions[:, 0]

    problem = PROBLEM._replace(oracle=oracle)

    def body(params, known, state, plans, key):
        out = {}
        for name, o in options.items():
            model = psrl.draw(key, params, known, o)
            # A second step, of no action, shows where the first one led.
            longer = jnp.concatenate([plans, jnp.zeros_like(plans)], 1)
            given = longer if name == "optimistic" else longer[..., :1]
            out[name] = psrl.evaluator(model, problem, o)(state, given, key)
        model = psrl.draw(key, params, known, options["mean"])
        again = psrl.draw(jax.random.split(key)[0], params, known, options["sample"])
        return (
            out,
            model,
            again,
            psrl.predict(model, jnp.tile(state[None], (8, 1)), plans[:, 0, :1]),
        )

    returns, mean, sampled, (after, z) = together(
        body, params, known, state, plans, jax.random.key(0)
    )
    bias = params["dynamics"]["layer_2"]["bias"][:4]
    np.testing.assert_allclose(after, state + z @ mean.weights + bias, rtol=1e-5)
    first = state[0] + 10 * plans[:, 0, 0]
    np.testing.assert_allclose(returns["mean"], first + after[:, 0], rtol=1e-5)
    covariance = np.linalg.inv(
        known.dynamics.posterior.root.T @ known.dynamics.posterior.root
    )
    deviation = np.sqrt(np.einsum("pd,de,pe->p", z, covariance, z))
    moved = after[:, 0] + 1.5 * deviation * plans[:, 0, 1]
    np.testing.assert_allclose(returns["optimistic"], first + moved, rtol=1e-4)
    assert not np.allclose(sampled.weights, mean.weights)
    assert not np.allclose(returns["sample"], returns["mean"])
    wide = psrl.planner_space(PROBLEM, options["optimistic"])
    assert wide.low == (-1.0,) * 5 and wide.high == (1.0,) * 5


@pytest.mark.parametrize("propagation", ["ts_inf", "ts1"])
def test_an_ensemble_averages_over_its_networks(propagation):
    """With networks that only differ in the bias of the first mean."""
    params = params_like(lambda k: network.init(k, (5, 6, 4), 4), jax.random.key(0))
    biases = np.float32([1, 2, 4])
    several = jax.tree.map(lambda x: np.stack([x] * 3), params)
    for i, b in enumerate(biases):
        several["layer_2"]["kernel"][i] = 0
        several["layer_2"]["bias"][i, :4] = [b, 0, 0, 0]
    scaler = network.Scaler(np.zeros(5, np.float32), np.ones(5, np.float32))
    options = psrl.Options(
        agent="ensemble", members=3, particles=6, plan_noise=False,
        propagation=propagation,
    )  # fmt: skip
    problem = PROBLEM._replace(oracle=lambda s, a: s[:, 0] ** 2 + 0 * a[:, 0])
    plans = np.zeros((4, 3, 1), np.float32)

    def body(params, key):
        model = psrl.draw(
            key, {"dynamics": params}, psrl.Known(scaler, (), ()), options
        )
        return psrl.evaluator(model, problem, options)(jnp.zeros(4), plans, key)

    returns = together(body, several, jax.random.key(0))
    # After one step b, after two the sum of two draws: the same b, or any.
    first = (biases**2).mean()
    same = first + ((2 * biases) ** 2).mean()
    if propagation == "ts_inf":
        np.testing.assert_allclose(returns, same, rtol=1e-5)
    else:
        independent = first + ((biases[:, None] + biases) ** 2).mean()
        assert np.ptp(returns) > 0 and (returns < same - 1e-3).all()
        assert returns.mean() == pytest.approx(independent, rel=0.2)


def test_an_episode_is_remembered_and_regressed_on():
    """Buffers, counts, returns; the features' refit every second episode."""
    method = psrl.make(config(4, refit_every=2, reward="learned"), PROBLEM)
    states, metrics = together(lambda k: run(method, 4, k), jax.random.key(1))
    extra = states.extra
    assert states.step.tolist() == [1, 2, 3, 4]
    x, y = extra["x"][-1], extra["y"][-1]
    assert x.shape == (24, 5) and (extra["x"][1][12:] == 0).all()
    for k in range(4):
        rows = slice(6 * k, 6 * k + 6)
        # Differences lead from one observation to the next.
        np.testing.assert_allclose(
            x[rows][:-1, :4] + y[rows][:-1], x[rows][1:, :4], atol=1e-6
        )
        total = extra["r"][-1][rows].sum()
        assert extra["returns"][-1][k] == pytest.approx(total, rel=1e-5)
        assert metrics["return"][k] == pytest.approx(total, rel=1e-5)
    frozen = jax.tree.map(lambda a, b: np.array_equal(a, b), *(
        jax.tree.map(lambda v, i=i: v[i], states.params) for i in (0, 1)
    ))  # fmt: skip
    assert all(jax.tree.leaves(frozen))
    assert not np.array_equal(
        states.params["dynamics"]["layer_0"]["kernel"][1],
        states.params["dynamics"]["layer_0"]["kernel"][2],
    )
    # Two episodes by one update after the other are one regression on both.
    params, known = (
        jax.tree.map(lambda v: v[1], p) for p in (states.params, extra["known"])
    )

    def again(params, scaler, x, y):
        z = network.features(params["dynamics"], scaler, x)
        y = y - network.mean_bias(params["dynamics"])[None]
        return psrl.regress(z, y, prior=0.01, noise=0.01)

    post = together(again, params, known.scaler, x[:12], y[:12])
    for a, b in zip(known.dynamics.posterior, post):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert known.reward.posterior.count == 12


def test_sixty_four_seeds_in_one_program():
    """Each member is the run that its own key gives; no step compiles anything again."""
    method = psrl.make(config(3), PROBLEM)
    many = population(method, 64)

    def five(key):
        return run(method, 3, jax.random.split(key, 64)[5])[0].extra["returns"][-1]

    step = jax.jit(many.update, donate_argnums=0)
    init = jax.jit(lambda k: (many.init(k, {}), five(k)))
    state, alone = init(jax.random.key(0))
    state, _ = step(state, {})
    events = []

    def listen(event, seconds, **kwargs):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(2):
            state, metrics = step(state, {})
        jax.block_until_ready(metrics)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert COMPILED not in events and step._cache_size() == 1
    assert int(state.step) == 3
    returns = np.asarray(state.extra["returns"])
    assert returns.shape == (64, 3) and len(np.unique(returns[:, 1])) > 50
    np.testing.assert_allclose(returns[5], alone, rtol=1e-4)
    assert metrics["return_std"] > 0


# Each agent with either reward; the rest of the product is in the matrix.
KINDS = [("optimistic", "oracle"), ("ensemble", "learned")]
KINDS += [
    pytest.param(agent, reward, marks=pytest.mark.matrix)
    for agent in ("mean", "optimistic", "ensemble")
    for reward in ("oracle", "learned")
    if (agent, reward) not in KINDS
]


@pytest.mark.parametrize("agent, reward", KINDS)
def test_every_agent_learns_and_acts(agent, reward):
    """Old episodes are overwritten; the evidence chooses the noise."""
    method = psrl.make(
        config(3, agent=agent, reward=reward, members=2, particles=2, capacity=2,
               noise_from="evidence"),
        PROBLEM,
    )  # fmt: skip

    def body(key):
        states, metrics = run(method, 3, key)
        last = jax.tree.map(lambda x: x[-1], states)
        action = method.sampler(last.params, key, jnp.zeros(4), extra=last.extra)
        return metrics, action, states.extra

    metrics, action, extra = together(body, jax.random.key(0))
    assert all(np.isfinite(v).all() for v in metrics.values())
    assert action.shape == (1,) and np.abs(action) <= 1
    assert ("reward_loss" in metrics) == (reward == "learned")
    # The third episode takes the first one's place, the second one stays.
    assert extra["x"].shape == (3, 12, 5)
    np.testing.assert_array_equal(extra["x"][2][6:], extra["x"][1][6:])
    assert not np.array_equal(extra["x"][2][:6], extra["x"][1][:6])
    if agent != "ensemble":
        dynamics = extra["known"].dynamics
        assert dynamics.posterior.count.tolist() == [6, 12, 12]
        assert np.isin(dynamics.noise, np.float32(NOISES)).all()
        assert not np.isclose(dynamics.noise, 0.01).any()


def test_particles_are_divided_over_the_mesh():
    plans = jax.ShapeDtypeStruct((8, 3, 1), jnp.float32)
    with jax.set_mesh(grid("4x2")):
        text = jax.jit(lambda p: models.spread_plans(2 * p)).lower(plans).as_text()
    assert "sharding_constraint" in text
    alone = jax.jit(lambda p: models.spread_plans(2 * p)).lower(plans).as_text()
    assert "sharding_constraint" not in alone


def test_a_run_goes_on_with_longer_buffers():
    short, long = (psrl.make(config(n), PROBLEM) for n in (2, 5))
    state, target = (jax.eval_shape(m.init, KEY, {}) for m in (short, long))
    filled = jax.tree.map(lambda x: np.ones(x.shape, np.float32), state.extra)
    extra = together(
        lambda e: psrl.longer(state._replace(extra=e), target).extra, filled
    )
    assert extra["x"].shape == (30, 5) and extra["returns"].tolist() == [1, 1, 0, 0, 0]
    assert (extra["x"][:12] == 1).all() and (extra["x"][12:] == 0).all()
    with pytest.raises(ValueError, match=r"x has shape \(30, 5\), expected \(12, 5\)"):
        short.resize(target, state)


@pytest.mark.parametrize(
    "fields, problem, message",
    [
        ({"prior": 0.0}, PROBLEM, "method.prior must be > 0"),
        ({}, PROBLEM._replace(oracle=None), "use method.reward=learned"),
        ({"capacity": 3, "refit_every": 2}, PROBLEM, "use method.refit_every=1"),
        ({"epochs": 0}, PROBLEM, "method.epochs must be >= 1"),
    ],
)
def test_bad_options_are_refused(fields, problem, message):
    cfg = config()
    cfg.method.update(fields)
    with pytest.raises(ValueError, match=message):
        psrl.make(cfg, problem)
