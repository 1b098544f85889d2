"""Weights and losses of DEFER's family: recorded numbers, identities, unbiasedness."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.papers import defer
from tests.programs import together

RECORDED = {
    "vanilla": ("vanilla", {}),
    "fnw": ("fnw", {}),
    "esdfm": ("es_dfm", {}),
    "fnw_rn": ("fnw_rn", {}),
    "defer": ("defer", {"clip": False}),
    "defer_clipped": ("defer", {}),
    "defer_released": ("defer", {"variant": "released"}),
}


@pytest.mark.parity("ctr", only=lambda entry: entry["file"].startswith("delayed"))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_parity(case, dtype):
    with jax.enable_x64(dtype == "float64"):
        arrays = {k: v.astype(dtype) for k, v in case.arrays.items()}

        def outputs(d):
            values = {}
            for name, (method, options) in RECORDED.items():
                values[f"loss_{name}"], values[f"grad_{name}"] = jax.value_and_grad(
                    lambda s, method=method, options=options: defer.delayed_loss(
                        method, s, d["y"], dp=d["f_dp"], rn=d["f_rn"], **options
                    )
                )(d["logit"])
            values["loss_dfm"], grads = jax.value_and_grad(defer.dfm_loss, (0, 1))(
                d["logit"], d["raw_lambda"], d["y"], d["elapsed"]
            )
            values["grad_dfm"], values["grad_dfm_raw_lambda"] = grads
            q = jax.nn.sigmoid(d["logit"])
            for name in ("fnc", "fnc_rn"):
                raw, count = defer.calibrate(name, q, clip=False)
                values[f"{name}_calibrated"] = raw
                values[f"{name} above 1"] = count, defer.calibrate(name, q)[0]
            return values

        values = together(outputs, arrays)
    close = functools.partial(np.testing.assert_allclose, err_msg=case.name)
    tolerance = case.tolerance(dtype)
    inputs = {"logit", "y", "f_dp", "f_rn", "elapsed", "raw_lambda"}
    for name in arrays.keys() - inputs:
        close(values[name], arrays[name], atol=tolerance, rtol=tolerance)
    for name in ("fnc", "fnc_rn"):
        expected = arrays[f"{name}_calibrated"]
        count, clipped = values[f"{name} above 1"]
        assert count == (expected > 1).sum() > 0
        close(clipped, np.minimum(values[f"{name}_calibrated"], 1))


def grid():
    """Pairs of p in (0, 1) and p_dp in [0, p]."""
    p, share = np.meshgrid(np.linspace(0.01, 0.99, 25), np.linspace(0, 1, 21))
    return p.ravel(), (p * share).ravel()


def event_rates(method, p, dp, variant):
    """Unnormalised rates of positive and negative events of a click."""
    if method == "fnw":
        return p, np.ones_like(p)
    if method == "fnw_rn":
        return p, 2 - p
    if method == "es_dfm":
        return p, 1 - p + dp
    if variant == "released":
        return p, 2 * (1 - p) + dp
    return 2 * p - dp, 2 * (1 - p) + dp


WEIGHTED = [
    ("fnw", "paper"), ("fnw_rn", "paper"), ("es_dfm", "paper"), ("defer", "paper"),
    ("defer", "released"),
]  # fmt: skip


def test_weighted_events_have_the_expected_loss_of_final_labels(float64):
    p, dp = grid()
    rn, s = (1 - p) / (1 - p + dp), np.linspace(-3, 3, len(p))

    def outputs(p, dp, rn, s):
        weights = {
            (method, variant): defer.importance_weights(
                method, p, dp, rn, variant=variant
            )
            for method, variant in WEIGHTED
        }
        ones = jnp.ones_like(p)
        losses = {
            name: [defer.event_losses(s, y * ones, *w) for y in (1, 0)]
            for name, w in weights.items()
        }
        return weights, losses

    weights, losses = together(outputs, p, dp, rn, s)
    oracle = p * np.logaddexp(0, -s) + (1 - p) * np.logaddexp(0, s)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    for (method, variant), (w_pos, w_neg) in weights.items():
        positive, negative = event_rates(method, p, dp, variant)
        q = positive / (positive + negative)
        close(q * w_pos, p, err_msg=f"{method} {variant}")
        close((1 - q) * w_neg, 1 - p)
        positive, negative = losses[method, variant]
        close(q * positive + (1 - q) * negative, oracle)


def test_values_and_range_of_weights(float64):
    p, dp = grid()
    weights = defer.importance_weights
    # The last two estimates violate p_dp <= p.
    odd_p, odd_dp = np.array([0.2, 0.1, 0.1]), np.array([0.1, 0.15, 0.4])

    def outputs(p, dp, odd_p, odd_dp):
        zero, one = jnp.zeros_like(p), jnp.ones_like(p)
        return {
            "odd": weights("defer", odd_p, odd_dp),
            "odd, not clipped": weights("defer", odd_p, odd_dp, clip=False)[0],
            "not clipped": weights("defer", p, dp, clip=False)[0],
            "no delays": [weights(m, p, zero, one) for m in ("defer", "es_dfm")],
            "fnw_rn": weights("fnw_rn", p),
            "half": weights("fnw_rn", p, variant="released"),
            "es_dfm, all delayed": weights("es_dfm", p, dp=p, rn=1 - p),
            "fnw": weights("fnw", p),
            "fsiw": weights("fsiw", one * 0.3, one * 0.5, one * 0.8),
        }

    w = together(outputs, p, dp, odd_p, odd_dp)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    close(w["odd"][0], [0.2 / 0.15, 2, 2])
    close(w["odd"][1], [0.8 / 0.85, 0.9 / 0.975, 0.9 / 1.1])
    close(w["odd, not clipped"], [0.2 / 0.15, 0.1 / 0.025, 0.1 / 1e-6])
    assert 1 <= w["not clipped"].min() and w["not clipped"].max() <= 2 + 1e-12
    close(w["no delays"], np.ones((2, 2, len(p))))
    close(np.array(w["half"]) * 2, w["fnw_rn"])
    close(w["es_dfm, all delayed"], w["fnw"])
    close(w["fsiw"], [np.full(len(p), 2.0), np.full(len(p), 0.8)], rtol=1e-7)


def test_no_gradient_through_weights():
    """The gradient is that of a loss with constant weights, and f_dp, f_rn get none."""
    s, y = np.float32([0.3, -0.7]), np.float32([1, 0])
    dp, rn = np.float32([0.1, 0.2]), np.float32([0.7, 0.6])
    methods = ("fnw", "fnw_rn", "es_dfm", "defer")

    def outputs(s, y, dp, rn):
        grads = {}
        for m in methods:
            w = defer.importance_weights(m, jax.nn.sigmoid(s), dp, rn)
            grads[m] = (
                jax.grad(
                    lambda s, dp, rn, m=m: defer.delayed_loss(m, s, y, dp=dp, rn=rn),
                    (0, 1, 2),
                )(s, dp, rn),
                jax.grad(lambda s, w=w: defer.event_losses(s, y, *w).mean())(s),
            )
        return grads

    for grads, expected in together(outputs, s, y, dp, rn).values():
        np.testing.assert_allclose(grads[0], expected, rtol=1e-6)
        assert not np.any(grads[1:])


def test_dfm(float64):
    """A closed form; gradients by finite differences; rows without weight."""
    s = np.array([-50.0, -3.0, -0.5, 0.2, 2.0, 40.0])
    raw = np.array([-30.0, -8.0, 0.3, -0.6, 2.0, 1.0])
    y, t = np.array([1.0, 0, 1, 0, 0, 1]), np.array([3.0, 10, 0, 5, 0.1, 2])
    h = 1e-6
    moves = h * np.concatenate([np.eye(6), -np.eye(6)])
    half = np.full(2, math.log(math.expm1(0.5)))  # lambda = 1/2; p = 1/2, too.

    def outputs(s, raw, y, t, moves, half):
        ends = [
            jax.vmap(lambda m: defer.dfm_loss(s + m, raw, y, t))(moves),
            jax.vmap(lambda m: defer.dfm_loss(s, raw + m, y, t))(moves),
        ]
        weight = jnp.arange(6.0) % 2
        weighted = [
            defer.delayed_loss("dfm", s, y, raw_lambda=raw, elapsed=t, weight=weight),
            defer.dfm_loss(s[1::2], raw[1::2], y[1::2], t[1::2]),
        ]
        closed = defer.dfm_losses(
            jnp.zeros(2), half, jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0])
        )
        return jax.grad(defer.dfm_loss, (0, 1))(s, raw, y, t), ends, weighted, closed

    grads, ends, weighted, closed = together(outputs, s, raw, y, t, moves, half)
    for grad, values in zip(grads, ends):
        numeric = (values[:6] - values[6:]) / (2 * h)
        np.testing.assert_allclose(grad, numeric, rtol=0, atol=1e-8)
    np.testing.assert_allclose(*weighted, rtol=1e-12)
    # A conversion after 1; none until 2.
    none = -math.log(0.5 + 0.5 * math.exp(-1.0))
    np.testing.assert_allclose(closed, [math.log(4) + 0.5, none], rtol=1e-12)


def test_finite_at_extreme_logits():
    y, aux = np.float32([0, 1, 0, 1]), np.float32([0, 1, 1, 0])
    t = np.float32([0, 0, 500, 30])
    extreme = np.float32([-50, 50])[:, None] * np.ones(4, np.float32)
    raw = np.float32([-200, -50, 50])[:, None] * np.ones(4, np.float32)

    def outputs(extreme, raw, y, aux, t):
        values = {
            m: jax.vmap(
                jax.value_and_grad(
                    lambda s, m=m: defer.delayed_loss(m, s, y, dp=aux, rn=1 - aux)
                )
            )(extreme)
            for m in ("vanilla", "fnw", "fnw_rn", "es_dfm", "defer", "fnc")
        }
        dfm = jax.value_and_grad(lambda s, r: defer.dfm_loss(s, r, y, t), (0, 1))
        values["dfm"] = jax.vmap(lambda s: jax.vmap(lambda r: dfm(s, r))(raw))(extreme)
        p, _ = defer.calibrate("fnc", jax.nn.sigmoid(extreme))
        return values, p

    values, p = together(outputs, extreme, raw, y, aux, t)
    for name, arrays in values.items():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(arrays)), name
    assert np.isfinite(p).all() and p.max() <= 1


def test_auxiliary_and_multi_task_losses():
    """f_rn is not trained on immediate positives, heads not on too recent clicks."""
    rn, dp = np.float32([0.3, -1, 2]), np.float32([0.1, 0.2, 0.3])
    label, delayed = np.float32([1, 1, 0]), np.float32([0, 1, 0])
    logits = np.float32([[0.5, -0.2, 1], [0.1, 0.4, -1]])
    labels = np.float32([[0, 1, 1], [0, 0, 0]])
    elapsed = np.float32([5, 0.5])

    def outputs(rn, dp, label, delayed, logits, labels, elapsed):
        aux = jax.value_and_grad(
            lambda rn: defer.aux_loss(rn, dp, label, delayed), has_aux=True
        )(rn)
        heads = jax.value_and_grad(
            lambda x: defer.offline_loss(x, labels, elapsed, (1.0, 3.0)), has_aux=True
        )(logits)
        return aux, heads

    aux, heads = together(outputs, rn, dp, label, delayed, logits, labels, elapsed)
    (value, metrics), grad = aux
    expected_rn = (np.logaddexp(0, -1.0) + np.logaddexp(0, -2.0)) / 2
    expected_dp = np.mean([np.logaddexp(0, x) for x in (0.1, -0.2, 0.3)])
    np.testing.assert_allclose(metrics["aux_rn"], expected_rn, rtol=1e-6)
    np.testing.assert_allclose(value, expected_rn + expected_dp, rtol=1e-6)
    np.testing.assert_array_equal(grad != 0, [False, True, True])
    (value, metrics), grad = heads
    ce = np.logaddexp(0, np.where(labels == 1, -logits, logits))
    np.testing.assert_allclose(value, (ce[0].sum() + ce[1, 2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["coverage"], 4 / 6, rtol=1e-6)
    np.testing.assert_array_equal(grad != 0, [[1, 1, 1], [0, 0, 1]])


@pytest.fixture(scope="module")
def simulated():
    """Clicks with known p and p_dp, and the weights from these.

    x ~ N(0, I), p = sigmoid(x.a - 1), delays exponential and truncated at w2 = 30.
    """
    n, w1, w2, draw = 200_000, 1.0, 30.0, np.random.default_rng(0)
    x = draw.standard_normal((n, 5))
    a, b = np.array([1, -0.5, 0.5, 0, 0]), np.array([0, 0.5, 0, 1, -1])
    p, rate = 1 / (1 + np.exp(1 - x @ a)), np.exp(0.5 * x @ b)
    click = draw.uniform(0, 100, n)
    z = -np.log1p(draw.random(n) * np.expm1(-rate * w2)) / rate
    conv = np.where(draw.random(n) < p, click + z, -1.0)
    late = (np.exp(-rate * w1) - np.exp(-rate * w2)) / -np.expm1(-rate * w2)
    dp = p * late

    def weights(p, dp, rn):
        methods = ("defer", "es_dfm", "vanilla_defer")
        return {m: defer.importance_weights(m, p, dp, rn) for m in methods}

    with jax.enable_x64(True):
        return x, click, conv, together(weights, p, dp, (1 - p) / (1 - p + dp))


def estimate(simulated, method, values):
    """Weighted mean over events of values(x, label), and its standard error.

    Events of one click are dependent, so the error is that of the sums per click.
    """
    x, click, conv, weights = simulated
    s = defer.make_stream(click, conv, 1.0, 30.0, method)
    w = np.where(s.label == 1, *(side[s.index] for side in weights[method]))
    value = w * values(x[s.index], s.label)
    mean = value.sum() / len(value)
    per_click = np.bincount(s.index, value - mean, len(click))
    return mean, per_click.std() * len(click) ** 0.5 / len(value)


FUNCTIONS = {
    "positives": lambda x, y: y * 1.0,
    "x_0": lambda x, y: x[:, 0],
    "x_3 of positives": lambda x, y: x[:, 3] * y,
    "x_0 x_4 of negatives": lambda x, y: x[:, 0] * x[:, 4] * (1 - y),
    "loss": lambda x, y: np.logaddexp(0, x[:, 1] * (1 - 2 * y)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defer_is_unbiased(simulated, name):
    x, _, conv, _ = simulated
    values = FUNCTIONS[name]
    truth = values(x, (conv >= 0) * 1)
    mean, error = estimate(simulated, "defer", values)
    # Same clicks: the oracle's own noise is common to both.
    assert abs(mean - truth.mean()) < 4 * error
    assert error < 0.01


def test_es_dfm_and_unweighted_defer_are_biased(simulated):
    x, _, conv, _ = simulated
    mean, error = estimate(simulated, "es_dfm", FUNCTIONS["x_0"])
    assert mean - x[:, 0].mean() > 10 * error
    assert mean == pytest.approx(0.0604, abs=4 * 0.0022)  # The digest's measurement.
    mean, error = estimate(simulated, "es_dfm", FUNCTIONS["positives"])
    assert mean - (conv >= 0).mean() > 10 * error
    # Without weights delayed positives are missing.
    mean, error = estimate(simulated, "vanilla_defer", FUNCTIONS["positives"])
    assert (conv >= 0).mean() - mean > 10 * error


def test_errors():
    one, two, half = (jnp.asarray(np.full(2, x, np.float32)) for x in (1, 2, 0.5))
    two_heads, three_heads = (jnp.asarray(np.ones((2, n), np.float32)) for n in (2, 3))
    with pytest.raises(ValueError, match="method must be one of"):
        defer.importance_weights("nope", one)
    with pytest.raises(ValueError, match="variant must be"):
        defer.importance_weights("fnw", one, variant="nope")
    for method, missing in (("defer", "dp"), ("es_dfm", "dp"), ("fsiw", "dp")):
        with pytest.raises(ValueError, match=f"{method} needs {missing}"):
            defer.importance_weights(method, one)
    with pytest.raises(ValueError, match="es_dfm needs rn"):
        defer.importance_weights("es_dfm", one, dp=one)
    with pytest.raises(ValueError, match="labels must be 0 or 1, got 2"):
        defer.delayed_loss("fnw", one, two)
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        defer.dfm_loss(one, one, half, one)
    with pytest.raises(ValueError, match="dfm needs raw_lambda"):
        defer.delayed_loss("dfm", one, one)
    with pytest.raises(ValueError, match="need 3 heads"):
        defer.offline_loss(two_heads, two_heads, one, (1.0, 2.0))
    with pytest.raises(ValueError, match="ascending"):
        defer.offline_loss(three_heads, three_heads, one, (2.0, 1.0))
