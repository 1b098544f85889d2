"""DEFER and its family: reference losses, identities, unbiasedness, the model's step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.config import load_config
from jaxpapers.papers import defer
from tests.contract import Contract
from tests.programs import KEY, params_like, together

CONTRACT = Contract(
    small={
        "data.clicks": 2000, "data.batch": 32, "train.steps": 20, "optim.lr": 0.03,
        "net.widths": (8, 4),
    },
    refused={
        "method.name": ("hope", "method.name"),
        "train.accumulate": (0, "train.accumulate"),
    },
)  # fmt: skip

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


# That of ``small``.
NUMBERS = defer.Net(
    features=5, bins=(), buckets=(), widths=(8, 4), slope=0.01, batch_norm=False
)


def small(name="defer", *overrides):
    fields = ["data.batch=64", "net.widths=(8, 4)", f"method.name={name}", *overrides]
    return load_config("defer:smoke", [f"--config.{f}" for f in fields])


def columns(n, seed=0, **more):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, 5)).astype(np.float32)
    ones = np.ones(n, np.float32)
    label = (x[:, 0] > 0).astype(np.float32)
    return {"x": x, "label": label, "elapsed": ones, "weight": ones, **more}


def resolved(n, seed=0):
    one = np.ones(n, np.float32)
    late = columns(n, seed)["label"] * (np.arange(n) % 2)
    return columns(n, seed, resolved=one, delayed=late.astype(np.float32))


def params_of(net, outputs, batch):
    return params_like(defer.network(net, outputs).init, KEY, batch)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


METHODS = ("pretrained", "fnw", "fnc", "es_dfm", "defer", "fsiw", "dfm")


def test_losses_and_predictions():
    """Those of the logits, for final labels unweighted; padding changes nothing."""
    batch = columns(12)
    batch["resolved"] = (np.arange(12) % 3 == 0).astype(np.float32)
    batch["elapsed"] = np.linspace(0.1, 3, 12).astype(np.float32)
    batch["weight"][10:] = 0
    batch["x"][10:], batch["label"][10:] = 1e3, 7
    batch["aux"] = np.stack([np.linspace(0.05, 0.4, 12), np.full(12, 0.7)], 1)
    batch["aux"] = batch["aux"].astype(np.float32)
    params = {n: params_of(NUMBERS, n, batch) for n in (1, 2)}

    def outputs(params, batch):
        values = {}
        for name in METHODS:
            options = defer.Options(name=name)
            variables = params[options.outputs]
            loss, metrics = defer.loss(variables, batch, net=NUMBERS, options=options)
            p = defer.predict(variables, (), batch, net=NUMBERS, options=options)
            logits = defer.network(NUMBERS, options.outputs).apply(variables, batch)
            if name == "dfm":
                args = batch["label"], batch["elapsed"]
                rows = defer.dfm_losses(logits[:, 0], logits[:, 1], *args)
            else:
                stream, q = name, jax.nn.sigmoid(logits[:, 0])
                stream = "vanilla" if name == "pretrained" else name
                w = defer.importance_weights(stream, q, *batch["aux"].T)
                w = [jnp.where(batch["resolved"] == 1, 1, x) for x in w]
                rows = defer.event_losses(logits[:, 0], batch["label"], *w)
            calibrated = defer.calibrate(name, jax.nn.sigmoid(logits[:, 0]))[0]
            values[name] = loss, metrics, p, rows, calibrated
        filled = jax.tree.map(lambda x: x[:10], batch)
        grads = [
            jax.grad(lambda p, b: defer.loss(p, b, net=NUMBERS)[0])(params[1], b)
            for b in (batch, filled)
        ]
        return values, grads

    values, grads = together(outputs, params, batch)
    close(*grads, rtol=1e-4, atol=1e-7)
    for name, (loss, metrics, p, rows, calibrated) in values.items():
        np.testing.assert_allclose(metrics["nll"], rows[:10].mean(), rtol=1e-5)
        kernels = params[2 if name == "dfm" else 1]["params"].values()
        squares = sum((layer["kernel"] ** 2).sum() for layer in kernels)
        np.testing.assert_allclose(loss, metrics["nll"] + 1e-6 * squares, rtol=1e-5)
        np.testing.assert_allclose(p, calibrated, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(metrics["mean_p"], p[:10].mean(), rtol=1e-5)
        assert metrics["weight"] == 10
    distinct = {round(float(loss), 5) for loss, *_ in values.values()}
    assert len(distinct) == len(METHODS) - 1  # FNC calibrates instead of weights.
    without_aux = {k: v for k, v in batch.items() if k != "aux"}
    with pytest.raises(ValueError, match="fsiw needs batch"):
        fsiw = functools.partial(
            defer.loss, net=NUMBERS, options=defer.Options(name="fsiw")
        )
        jax.eval_shape(fsiw, params[1], without_aux)


class Model:
    """The smoke config's method, each of its functions compiled once per shape."""

    def __init__(self):
        self.method = defer.make(small())
        self.init = jax.jit(self.method.init)
        self.update = jax.jit(self.method.update)
        self.predict = jax.jit(self.method.predict)


@pytest.fixture(scope="module")
def model():
    return Model()


def test_auxiliary_classifier_is_trained_on_resolved_clicks_then_frozen(model, key):
    start = model.init(key, resolved(64))
    state, metrics = model.update(start, resolved(64))
    assert float(metrics["aux_loss"]) > 0
    for a, b in zip(*map(jax.tree.leaves, (start.extra.params, state.extra.params))):
        assert (np.asarray(a) != np.asarray(b)).any()
    events = {**resolved(64, 1), "resolved": np.zeros(64, np.float32)}
    later, metrics = model.update(state, events)
    equal(later.extra[:3], state.extra[:3])
    head = [np.asarray(s.params["params"]["head"]["kernel"]) for s in (state, later)]
    assert (head[0] != head[1]).any()
    # Without the column its training is not compiled, and the step is the same.
    bare = {k: v for k, v in events.items() if k not in ("resolved", "delayed")}
    other, _ = model.update(state, bare)
    close(later.params, other.params, rtol=1e-5, atol=1e-7)
    # After the stream's end nothing changes.
    empty = {**resolved(64), "weight": np.zeros(64, np.float32)}
    after, metrics = model.update(state, empty)
    equal(after[1:3], state[1:3])
    equal(after.extra[:3], state.extra[:3])
    assert int(after.step) == 2 and np.isfinite(float(metrics["loss"]))


def test_events_are_weighted_by_the_auxiliary_classifier(model, key):
    """The step's gradient is delayed_loss's with p_dp of the frozen network."""
    batch = columns(64)
    state = model.init(key, resolved(64))
    _, metrics = model.update(state, batch)

    def reference(state, batch):
        aux = defer.probabilities(state.extra.params, batch, net=NUMBERS, outputs=2)

        def loss(params):
            s = defer.network(NUMBERS).apply(params, batch)[:, 0]
            y = batch["label"]
            return defer.delayed_loss("defer", s, y, dp=aux[:, 0], rn=aux[:, 1])

        value, grads = jax.value_and_grad(loss)(state.params)
        return aux, value, jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))

    aux, value, norm = together(reference, state, batch)
    np.testing.assert_allclose(metrics["nll"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)
    # Outputs that the batch brings are used as they are.
    _, given = model.update(state, {**batch, "aux": aux})
    np.testing.assert_allclose(given["nll"], metrics["nll"], rtol=1e-6)
    _, none = model.update(state, {**batch, "aux": 0 * aux})
    assert abs(float(none["nll"]) - float(metrics["nll"])) > 1e-3


def test_one_compiled_step_serves_every_bucket(model, key):
    """Buckets of any size: nothing is traced again after the first one."""
    draw, traces = np.random.default_rng(0), []
    click = draw.integers(0, 60, 1500).astype(float)
    conv = np.where(draw.random(1500) < 0.5, click + draw.exponential(12, 1500), -1.0)
    features = {"x": columns(1500)["x"]}

    @jax.jit
    def update(state, batch):
        traces.append("step")
        return model.method.update(state, batch)

    @jax.jit
    def predict(state, rows):
        traces.append("predict")
        return model.method.predict(state.params, state.extra, rows)

    s = defer.make_stream(click, conv, 2.0, 30.0, "defer")
    buckets = defer.make_buckets(s, click, 0.0, 80.0, 4.0)
    sizes = {len(b.events.ts) for b in buckets}
    assert len(sizes) > 5 and max(sizes) > 64 and not len(buckets[-1].clicks)
    state, found = defer.run_stream(
        update, predict, model.init(key, resolved(64)), buckets, features, click,
        batch=64,
    )  # fmt: skip
    assert sorted(traces) == ["predict", "step"]
    assert int(state.step) == sum(-(-len(b.events.ts) // 64) for b in buckets)
    assert [len(p) for p in found] == [len(b.clicks) for b in buckets]
    assert all((p > 0).all() and (p < 1).all() for p in found)
    # The predictions are those rows', not the padding's.
    rows = {"x": features["x"][buckets[-2].clicks[:64]]}
    direct = np.asarray(predict(state, rows))
    np.testing.assert_allclose(found[-2][: len(direct)], direct, rtol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("name", defer.NAMES)
def test_every_method_trains(name, key):
    method = defer.make(small(name, "optim.lr=0.02"))
    rows = resolved(64)
    if name == "dfm":  # A conversion after a day, none within thirty.
        rows["elapsed"] = np.where(rows["label"] == 1, 1, 30).astype(np.float32)
    if name == "fsiw":
        rows["aux"] = np.full((64, 2), 0.9, np.float32)

    def train(key, rows):
        start = method.init(key, rows)
        end, metrics = jax.lax.scan(
            lambda state, _: method.update(state, rows), start, length=40
        )
        return metrics["nll"], method.predict(end.params, end.extra, rows)

    losses, p = together(train, key, rows)
    assert losses[-1] < 0.8 * losses[0]
    assert p.shape == (64,) and p[rows["label"] == 1].mean() > p.mean()


def test_only_weights_of_es_dfm_and_defer_need_an_auxiliary_classifier():
    batch = resolved(4)
    for name in ("fnw_rn", "es_dfm", "defer", "dfm"):
        shapes = jax.eval_shape(defer.make(small(name)).init, KEY, batch)
        assert (shapes.extra != ()) == (name in ("es_dfm", "defer"))


@pytest.mark.parametrize(
    "field, message",
    [
        ("method.name=defr", "method.name must be one of .*defr"),
        ("method.variant=x", "method.variant must be one of"),
        ("optim.lr=0.0", "optim.lr must be > 0"),
        ("method.l2=-1.0", "method.l2 must be >= 0"),
        ("net.widths=(0, 4)", "net.widths must be >= 1"),
        ("net.bins=(4, 4)", "2 bins and 0 buckets"),
        ("net.init=zeros", "net.init must be one of"),
        ("train.accumulate=0", "accumulate"),
    ],
)
def test_make_refuses(field, message):
    with pytest.raises(ValueError, match=message):
        defer.make(small("defer", field))


def test_net_refuses():
    with pytest.raises(ValueError, match="net.widths must have at least one"):
        defer.Net(widths=())


def categories(net, n=6, seed=0):
    draw = np.random.default_rng(seed)
    x = [draw.integers(0, size, n) for size in (*net.bins, *net.buckets)]
    return {**columns(n), "x": np.stack(x, 1).astype(np.int32)}


def test_criteo_network_is_a_dense_one_on_one_hots():
    """Looking rows up is the product with concat(one-hots, embeddings)."""
    net = defer.Net(widths=(256,))
    batch = categories(net)
    module = defer.network(net)
    variables = params_of(net, 1, batch)
    out, seen = together(
        lambda variables: module.apply(
            variables, batch, capture_intermediates=True, mutable=["intermediates"]
        ),
        variables,
    )
    assert out.shape == (6, 1)
    p, x, split = variables["params"], batch["x"], len(net.bins)
    hots = [np.eye(n)[x[:, j]] for j, n in enumerate(net.bins)]
    starts = np.cumsum((0, *net.buckets[:-1]))
    table = p["hashed"]["embedding"]
    assert table.shape == (2000, 8)
    embedded = [table[x[:, split + j] + start] for j, start in enumerate(starts)]
    x = np.concatenate([*hots, *embedded], 1)
    assert x.shape == (6, 1488 + 72) and p["dense_0"]["kernel"].shape == (1560, 256)
    expected = x @ p["dense_0"]["kernel"] + p["dense_0"]["bias"]
    dense = seen["intermediates"]["dense_0"]["__call__"][0]
    np.testing.assert_allclose(dense, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics(key):
    """They follow the stream, ignore padding, and stay with the parameters."""
    net = defer.Net(features=3, bins=(3, 4), buckets=(5,), widths=(4,))
    method = defer.make(load_config("defer"), net)
    batch = categories(net)

    def outputs(key, batch, padded):
        start = method.init(key, batch)
        after, _ = method.update(start, padded)
        _, expected = defer.network(net).apply(
            start.params, batch, True, mutable=["batch_stats"]
        )
        p = method.predict(after.params, after.extra, batch)
        return start.params, after.params, after.extra.params, expected, p

    def mean(params):
        return params["batch_stats"]["norm_0"]["mean"]

    outcome = together(outputs, key, batch, defer.pad_rows(batch, 8))
    start, after, auxiliary, expected, p = outcome
    assert not mean(start).any() and mean(after).all()
    np.testing.assert_allclose(mean(after), mean(expected), rtol=1e-4, atol=1e-7)
    # The auxiliary network saw no resolved clicks: frozen, its statistics too.
    assert not mean(auxiliary).any()
    assert p.shape == (6,) and np.isfinite(p).all()
