"""MPC-PSRL: contract; recorded regressions, identities, networks by hand, regret."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate
from scipy import stats as scipy_stats

from jaxpapers.ops import posterior as blr
from jaxpapers.papers.mpc_psrl import bound, evident_noise, network, regress
from tests.contract import Contract
from tests.programs import params_like, together


def transitions(config):
    """A batch of the loss: a linear system."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 5)).astype(np.float32)
    return {"x": x, "y": 0.1 * x[:, :4], "r": x[:, 0]}


CONTRACT = Contract(
    small={
        "data.length": 8, "net.hidden": 6, "net.reward_hidden": 4, "train.steps": 20,
        "optim.name": "sgd", "optim.lr": 0.02, "method.epochs": 3, "method.batch": 8,
        "planner.population": 8, "planner.elites": 2, "planner.iterations": 2,
        "planner.horizon": 3, "method.reward": "learned", "method.reward_epochs": 3,
        "method.noise": 0.01,
    },
    refused={
        "method.noise": (0.0, "method.noise must be > 0"),
        "method.agent": ("greedy", "method.agent must be one of"),
        "planner.elites": (9, "planner.elites must be at most the population 8"),
        "train.accumulate": (2, "train.accumulate divides a batch"),
        "method.particles": (7, "method.particles must be a multiple of the 5"),
    },
    falling=("loss", 0.8),
    batch=transitions,
)  # fmt: skip


@pytest.mark.parity("rl", only=lambda e: e["kind"] == "blr")
def test_recorded_regressions(case, float64):
    """Features are tanh of a linear map there; ours regresses on what it is given."""
    a = case.arrays
    prior, noise = float(a["sigma2"]) ** 0.5, float(a["sigma_n2"]) ** 0.5

    def body(z, y, query):
        post = regress(z, y, prior=prior, noise=noise)
        return post, blr.covariance(post), query @ post.mean

    z = np.tanh(a["X"] @ a["featW"] + a["featb"])
    np.testing.assert_allclose(z, a["z"], rtol=1e-12, atol=1e-12)
    query = np.tanh(a["query"] @ a["featW"] + a["featb"])
    post, covariance, change = together(body, z, a["Y"] - a["bias"], query)
    np.testing.assert_allclose(post.mean.T, a["mu"], rtol=1e-8)
    np.testing.assert_allclose(covariance, a["cov"], rtol=1e-8)
    seen = a["query"][:, : len(a["bias"])]
    prediction = seen + change + a["bias"] + noise * a["eps"]
    np.testing.assert_allclose(prediction, a["pred"], rtol=1e-8)


@pytest.mark.parity("rl", only=lambda e: e["kind"] == "blr")
def test_recorded_regressions_in_float32(case):
    a = case.arrays
    prior, noise = float(a["sigma2"]) ** 0.5, float(a["sigma_n2"]) ** 0.5
    z, y = (x.astype(np.float32) for x in (a["z"], a["Y"] - a["bias"]))
    mean = together(lambda z, y: regress(z, y, prior=prior, noise=noise).mean, z, y)
    expected = a["z"] @ a["mu"].T
    assert np.abs(a["z"] @ mean - expected).max() < 1e-3 * np.abs(expected).max()


def test_float32_at_the_conditioning_of_real_runs():
    """Nearly collinear features, sigma 10, noise 1e-3: a precision of condition 1e13."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(400, 3))
    z = np.concatenate([base, base + 1e-3 * rng.normal(size=(400, 3))], 1)
    y = base @ rng.normal(size=(3, 2)) + 1e-3 * rng.normal(size=(400, 2))
    prior, noise = 10.0, 1e-3
    precision = z.T @ z / noise**2 + np.eye(6) / prior**2
    assert np.linalg.cond(precision) > 1e6
    expected = z @ np.linalg.solve(precision, z.T @ y / noise**2)

    def body(z, y, z32, y32):
        exact = blr.posterior(blr.statistics(z, y), prior**2, noise**2)
        return exact.mean, regress(z32, y32, prior=prior, noise=noise).mean

    with jax.enable_x64(True):
        single = (x.astype(np.float32) for x in (z, y))
        exact, mean = together(body, z, y, *single)
    np.testing.assert_allclose(z @ exact, expected, atol=1e-6)
    assert np.abs(z @ mean - expected).max() < 1e-3 * np.abs(expected).max()


def test_identities_of_the_regression(float64):
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 2))
    z[:, 3] = 0.7  # A constant feature.
    weight = np.r_[np.ones(30), np.zeros(10)]
    padded = [np.concatenate([x, np.ones((10, x.shape[1]))]) for x in (z, y)]

    def body(z, y, z_padded, y_padded, key):
        half = regress(z[:12], y[:12], prior=2.0, noise=0.3)
        whole = regress(z, y, prior=2.0, noise=0.3)
        draws = jax.vmap(lambda k: blr.sample(k, whole))(jax.random.split(key, 20_000))
        return {
            "flat": regress(z, y, prior=1e6, noise=0.3).mean,
            "none": regress(z[:0], y[:0], prior=2.0, noise=0.3),
            "half": blr.covariance(half),
            "whole": whole,
            "covariance": blr.covariance(whole),
            "streamed": blr.update(half, z[12:], y[12:], 0.3**2),
            "padded": regress(
                z_padded, y_padded, prior=2.0, noise=0.3, weight=jnp.asarray(weight)
            ),
            "evidence": blr.log_evidence(whole, 4.0, 0.3**2),
            "noise": evident_noise(z, z @ jnp.ones((4, 2)) + 0.1 * y, 2.0),
            "draws": draws,
        }

    got = together(body, z, y, *padded, jax.random.key(0))
    least = np.linalg.lstsq(z, y, rcond=None)[0]
    np.testing.assert_allclose(got["flat"], least, rtol=1e-6)
    np.testing.assert_allclose(got["none"].mean, 0)
    np.testing.assert_allclose(got["none"].root, np.eye(4) / 2)
    for name in ("streamed", "padded"):
        for a, b in zip(got[name], got["whole"]):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    # More data, less spread, in Loewner's order.
    assert np.linalg.eigvalsh(got["half"] - got["covariance"]).min() > 0
    for i in range(2):
        expected = scipy_stats.multivariate_normal.logpdf(
            y[:, i], np.zeros(30), 0.09 * np.eye(30) + 4 * z @ z.T
        )
        assert got["evidence"][i] == pytest.approx(expected, rel=1e-9)
    assert got["noise"] == pytest.approx(0.1, rel=0.01)
    draws, mean = got["draws"], got["whole"].mean
    variance = np.diag(got["covariance"])[:, None]
    error = np.sqrt(variance / len(draws))
    assert (np.abs(draws.mean(0) - mean) < 5 * error).all()
    spread = draws.var(0) / variance
    assert (np.abs(spread - 1) < 5 * np.sqrt(2 / len(draws))).all()


def by_hand(params, x, mean, std):
    """Features, mean and log-variance in NumPy."""
    h = (x - mean) / std
    count = sum(name.startswith("layer") for name in params)
    for i in range(count):
        z, h = h, h @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        if i < count - 1:
            h = h / (1 + np.exp(-h))
    m, v = np.split(h, 2, axis=1)
    high, low = params["max_logvar"], params["min_logvar"]
    v = high - np.log1p(np.exp(high - v))
    return z, m, low + np.log1p(np.exp(v - low))


def test_network_by_hand(float64):
    rng = np.random.default_rng(0)
    net = network.Net(hidden=7, features=4)
    sizes = net.sizes(3, net.hidden)
    assert sizes == (3, 7, 7, 4) and network.Net().sizes(5, 200)[-1] == 10
    params = jax.tree.map(
        lambda x: x.astype(np.float64),
        params_like(lambda k: network.init(k, sizes, 2), jax.random.key(0)),
    )
    x, y = rng.normal(2, 3, (6, 3)), rng.normal(size=(6, 2))
    x[:, 1] = 5.0  # Its deviation is 0, and counts as 1.
    weight = np.float64([1, 1, 1, 1, 0, 0])
    decay = (0.1, 0.2, 0.3, 0.4)

    def body(params, x, y, weight):
        scaler = network.fit_scaler(x, 4)
        value, metrics = network.likelihood(params, x, y, weight, scaler, decay)
        return scaler, value, metrics, network.features(params, scaler, x)

    scaler, value, metrics, z = together(body, params, x, y, weight)
    mean, std = x[:4].mean(0), x[:4].std(0)
    std[1] = 1
    np.testing.assert_allclose(scaler.mean, mean)
    np.testing.assert_allclose(scaler.std, std)
    expected_z, m, v = by_hand(params, x, mean, std)
    np.testing.assert_allclose(z, expected_z)
    square = (m - y)[:4] ** 2
    expected = (square * np.exp(-v[:4]) + v[:4]).mean()
    for i, c in enumerate(decay):
        expected += c / 2 * (params[f"layer_{i}"]["kernel"] ** 2).sum()
    expected += 0.01 * (params["max_logvar"] - params["min_logvar"]).sum()
    assert value == pytest.approx(expected, rel=1e-9)
    assert metrics["mse"] == pytest.approx(square.mean(), rel=1e-9)


def test_initial_network(key):
    params = together(lambda k: network.init(k, (5, 200, 200, 10), 4), key)
    assert (params["max_logvar"] == 0.5).all() and (params["min_logvar"] == -10).all()
    for i, fan_in in enumerate((5, 200, 200, 10)):
        kernel = params[f"layer_{i}"]["kernel"]
        largest = 2 / (2 * fan_in**0.5)
        assert np.abs(kernel).max() <= largest * 1.0001
        # A normal cut at two deviations has 0.88 of its deviation left.
        assert kernel.std() == pytest.approx(0.88 * largest / 2, rel=0.25)
        assert not params[f"layer_{i}"]["bias"].any()
    assert params["layer_3"]["kernel"].shape == (10, 8)


def test_training_does_not_see_the_room_of_its_buffers(key):
    """One bootstrap sample; rows beyond the count change nothing, whatever they hold."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(72, 3)).astype(np.float32)
    y = x[:, :2] * 0.5
    start = params_like(lambda k: network.init(k, (3, 8, 6), 2), jax.random.key(0))
    tx = optax.adam(1e-2)

    def body(params, x, y, count, key):
        def fit(x, y, epochs):
            return network.fit(
                params, tx.init(params), x, y, count, key,
                network.fit_scaler(x, count), tx=tx, decay=(0.0,) * 3, epochs=epochs,
                batch=16,
            )  # fmt: skip

        other = jnp.where(jnp.arange(72)[:, None] < count, y, 1e3)
        return fit(x, y, 40), fit(x[:48], y[:48], 40), fit(x, other, 40), fit(x, y, 1)

    whole, shorter, dirty, first = together(body, start, x, y, np.int32(40), key)
    for a, b, c in zip(*(jax.tree.leaves(f) for f in (whole, shorter, dirty))):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(a, c)
    assert whole.loss < first.loss - 0.5


def test_bounds_by_quadrature():
    noise, gaps = 0.7, np.array([[0.0], [0.1], [0.5], [2.0], [9.0]])

    def body(one):
        other = jnp.zeros_like(one)
        gap = bound.value_gap(one, other, noise, horizon=10, reward=2.0)
        return bound.total_variation(one, other, noise), gap

    tv, gap = together(body, gaps)
    density = scipy_stats.norm(0, noise).pdf
    for value, limit, (distance,) in zip(tv, gap, gaps):
        integral = integrate.quad(
            lambda x, d=distance: abs(density(x - d) - density(x)), -10, 20, limit=200
        )[0]
        assert value == pytest.approx(integral / 2, abs=1e-5)
        assert 10 * 2.0 * value <= limit + 1e-5
    assert gap[1] == pytest.approx(20 * tv[1], rel=0.01)


def test_regret_of_posterior_sampling_in_a_linear_system():
    """S = 2, A = 1, phi = x: 20 seeds, 100 episodes, the gains of the drawn system.

    The error of the posterior mean falls as 1 / sqrt T, cumulative regret slower than
    linearly.
    """
    seeds, episodes, length, noise = 20, 100, 10, 0.1
    truth = np.float32([[0.9, 0.0], [0.3, 0.9], [0.1, 0.3]])  # (S + A, S)

    def gain(w):
        a, b = w[:2].T, w[2:].T

        def riccati(p, _):
            k = jnp.linalg.inv(0.1 * jnp.eye(1) + b.T @ p @ b) @ (b.T @ p @ a)
            return jnp.eye(2) + a.T @ p @ (a - b @ k), None

        p, _ = jax.lax.scan(riccati, jnp.eye(2), None, 30)
        return jnp.linalg.inv(0.1 * jnp.eye(1) + b.T @ p @ b) @ (b.T @ p @ a)

    def cost(k, key):
        """Cost and rows of an episode with the gain k; the noise is the key's."""

        def body(s, eps):
            u = jnp.clip(-k @ s, -5, 5)
            x = jnp.concatenate([s, u])
            after = x @ truth + noise * eps
            return after, (s @ s + 0.1 * u @ u, x, after)

        eps = jax.random.normal(key, (length, 2))
        _, (costs, x, y) = jax.lax.scan(body, jnp.ones(2), eps)
        return costs.sum(), x, y

    def run(key, scale):
        best = gain(jnp.asarray(truth))

        def episode(post, key):
            key_draw, key_run = jax.random.split(key)
            eps = scale * jax.random.normal(key_draw, (3, 2))
            paid, x, y = cost(gain(blr.sample(eps, post)), key_run)
            least, _, _ = cost(best, key_run)
            error = jnp.linalg.norm(post.mean - truth)
            return blr.update(post, x, y, noise**2), (paid - least, error)

        start = blr.prior(3, 1.0, (2,))
        return jax.lax.scan(episode, start, jax.random.split(key, episodes))[1]

    def both(key):
        keys = jax.random.split(key, seeds)
        each = jax.lax.map(lambda k: (run(k, 1.0), run(k, 0.0)), keys)
        return each

    (regret, error), (greedy, _) = together(both, jax.random.key(0))
    t = np.arange(1, episodes + 1)
    total = regret.cumsum(1).mean(0)
    slope = np.polyfit(np.log(t[10:]), np.log(total[10:]), 1)[0]
    assert total[-1] > 0 and slope < 0.75
    mean_error = error[:, 5:].mean(0)
    rate = np.polyfit(np.log(t[5:]), np.log(mean_error), 1)[0]
    assert -0.8 < rate < -0.3
    # The mean's gain is 0 at first: without a draw no action is ever tried or learned.
    assert greedy.cumsum(1).mean(0)[-1] > 3 * total[-1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda z, y: regress(z, y, prior=0.0, noise=1.0), "prior is a standard dev"),
        (lambda z, y: regress(z, y, prior=1.0, noise=-1.0), "noise is a standard dev"),
        (lambda z, y: regress(z + np.nan, y, prior=1.0, noise=1.0), "z holds NaN"),
        (lambda z, y: regress(z, y / 0, prior=1.0, noise=1.0), "y holds NaN"),
        (lambda z, y: regress(z, y[1:], prior=1.0, noise=1.0), "as many rows"),
        (lambda z, y: bound.total_variation(z, z, 0.0), "noise is a standard dev"),
        (lambda z, y: network.Net(decay=(1.0,)), "one number for each of 4 layers"),
        (lambda z, y: network.Net(hidden=0), "net.hidden must be >= 1"),
    ],
)
def test_bad_input_is_refused(call, message):
    z, y = np.ones((3, 2), np.float32), np.ones((3, 1), np.float32)
    with pytest.raises(ValueError, match=message), np.errstate(all="ignore"):
        call(jnp.asarray(z), jnp.asarray(y))
