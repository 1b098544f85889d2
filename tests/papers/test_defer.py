"""DEFER and its family: reference losses, identities, streams, unbiasedness."""

import functools
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.config import load_config
from jaxpapers.papers import defer

OWN_WEIGHTS = {
    "vanilla": ("vanilla", {}),
    "fnw": ("fnw", {}),
    "esdfm": ("es_dfm", {}),
    "fnw_rn": ("fnw_rn", {}),
    "defer": ("defer", {"clip": False}),
    "defer_clipped": ("defer", {}),
    "defer_released": ("defer", {"variant": "released"}),
}


def is_delayed(entry):
    return entry["file"].startswith("delayed")


def cast(folder, entry, dtype):
    with np.load(folder / entry["file"]) as file:
        return {k: jnp.asarray(v, dtype) for k, v in file.items()}


@pytest.mark.parity("ctr", only=is_delayed)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", OWN_WEIGHTS)
def test_parity_losses(case, name, dtype):
    folder, _, entry = case
    method, options = OWN_WEIGHTS[name]
    with jax.enable_x64(dtype == "float64"):
        d = cast(folder, entry, dtype)
        value, grad = jax.value_and_grad(
            lambda s: defer.delayed_loss(
                method, s, d["y"], dp=d["f_dp"], rn=d["f_rn"], **options
            )
        )(d["logit"])
        tol = entry[f"tolerance_{dtype}"]
        np.testing.assert_allclose(value, d[f"loss_{name}"], atol=tol, rtol=tol)
        np.testing.assert_allclose(grad, d[f"grad_{name}"], atol=tol, rtol=0)


@pytest.mark.parity("ctr", only=is_delayed)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_parity_dfm_and_calibration(case, dtype):
    folder, _, entry = case
    with jax.enable_x64(dtype == "float64"):
        d = cast(folder, entry, dtype)
        tol = entry[f"tolerance_{dtype}"]
        close = functools.partial(np.testing.assert_allclose, atol=tol, rtol=tol)
        value, grads = jax.value_and_grad(defer.dfm_loss, (0, 1))(
            d["logit"], d["raw_lambda"], d["y"], d["elapsed"]
        )
        close(value, d["loss_dfm"])
        close(grads[0], d["grad_dfm"])
        close(grads[1], d["grad_dfm_raw_lambda"])
        q = jax.nn.sigmoid(d["logit"])
        for name in ("fnc", "fnc_rn"):
            expected = d[f"{name}_calibrated"]
            raw, count = defer.calibrate(name, q, clip=False)
            close(raw, expected)
            assert int(count) == int((expected > 1).sum()) > 0
            close(defer.calibrate(name, q)[0], np.minimum(raw, 1))


def grid():
    """p in (0, 1) and p_dp in [0, p]."""
    p, share = np.meshgrid(np.linspace(0.01, 0.99, 25), np.linspace(0, 1, 21))
    return jnp.asarray(p.ravel()), jnp.asarray((p * share).ravel())


def observed(method, p, dp, variant="paper"):
    """The unnormalised rates of positive and negative events of a click."""
    if method == "fnw":
        return p, jnp.ones_like(p)
    if method == "fnw_rn":
        return p, 2 - p
    if method == "es_dfm":
        return p, 1 - p + dp
    if variant == "released":
        return p, 2 * (1 - p) + dp
    return 2 * p - dp, 2 * (1 - p) + dp


@pytest.mark.parametrize(
    "method, variant",
    [("fnw", "paper"), ("fnw_rn", "paper"), ("es_dfm", "paper"), ("defer", "paper"),
     ("defer", "released")],
)  # fmt: skip
def test_weights_turn_the_stream_into_the_truth(method, variant):
    with jax.enable_x64(True):
        p, dp = grid()
        positive, negative = observed(method, p, dp, variant)
        q = positive / (positive + negative)
        rn = (1 - p) / (1 - p + dp)
        w_pos, w_neg = defer.importance_weights(method, p, dp, rn, variant=variant)
        np.testing.assert_allclose(q * w_pos, p, rtol=0, atol=1e-12)
        np.testing.assert_allclose((1 - q) * w_neg, 1 - p, rtol=0, atol=1e-12)
        np.testing.assert_allclose(q * w_pos + (1 - q) * w_neg, 1, rtol=0, atol=1e-12)
        # Hence the expected loss is the oracle's, whatever the model says.
        s = jnp.linspace(-3, 3, len(p))
        ones = jnp.ones_like(p)
        expected = sum(
            rate * defer.event_losses(s, y * ones, w_pos, w_neg)
            for rate, y in ((q, 1), (1 - q, 0))
        )
        oracle = p * jax.nn.softplus(-s) + (1 - p) * jax.nn.softplus(s)
        np.testing.assert_allclose(expected, oracle, rtol=0, atol=1e-12)


def test_weights_of_the_digest_and_their_range():
    with jax.enable_x64(True):
        pos, neg = defer.importance_weights("defer", jnp.array([0.2]), jnp.array([0.1]))
        np.testing.assert_allclose([pos[0], neg[0]], [0.2 / 0.15, 0.8 / 0.85])
        p, dp = grid()
        pos, _ = defer.importance_weights("defer", p, dp, clip=False)
        assert 1 <= float(pos.min()) and float(pos.max()) <= 2 + 1e-12
        for method, variant in (("defer", "paper"), ("es_dfm", "paper")):
            weights = defer.importance_weights(
                method, p, 0 * p, jnp.ones_like(p), variant=variant
            )
            np.testing.assert_allclose(weights, np.ones((2, len(p))), atol=1e-12)
        full = defer.importance_weights("fnw_rn", p)
        half = defer.importance_weights("fnw_rn", p, variant="released")
        np.testing.assert_allclose(np.array(half) * 2, full)
    # An estimate that violates p_dp <= p.
    p, dp = jnp.array([0.1, 0.1]), jnp.array([0.15, 0.4])
    np.testing.assert_allclose(defer.importance_weights("defer", p, dp)[0], [2, 2])
    raw = defer.importance_weights("defer", p, dp, clip=False)[0]
    assert raw[0] > 3 and raw[1] < 0


def test_without_waiting_es_dfm_is_fnw():
    with jax.enable_x64(True):
        p, _ = grid()
        ours = defer.importance_weights("es_dfm", p, dp=p, rn=1 - p)
        fnw = defer.importance_weights("fnw", p)
        np.testing.assert_allclose(ours, fnw, rtol=0, atol=1e-12)
    click, conv = defer_clicks()
    clicks = click, np.where(conv > click, conv, -1.0)  # Both never wait: none at once.
    a = defer.make_stream(*clicks, 0.0, 30.0, "es_dfm")
    b = defer.make_stream(*clicks, 0.0, 30.0, "fnw")
    for x, y in zip(a, b):
        np.testing.assert_array_equal(x, y)


def test_fsiw_weights():
    dp, rn = jnp.array([0.5]), jnp.array([0.8])
    pos, neg = defer.importance_weights("fsiw", jnp.array([0.3]), dp, rn)
    np.testing.assert_allclose([pos[0], neg[0]], [2.0, 0.8])


@pytest.mark.parametrize("method", ["fnw", "fnw_rn", "es_dfm", "defer"])
def test_no_gradient_through_weights(method):
    """The gradient is that of a loss whose weights are numbers, and f gets none."""
    s, y = jnp.array([0.3, -0.7]), jnp.array([1.0, 0.0])
    dp, rn = jnp.array([0.1, 0.2]), jnp.array([0.7, 0.6])
    w = defer.importance_weights(method, jax.nn.sigmoid(s), dp, rn)
    grads = jax.grad(
        lambda s, dp, rn: defer.delayed_loss(method, s, y, dp=dp, rn=rn), (0, 1, 2)
    )(s, dp, rn)
    expected = jax.grad(lambda s: defer.event_losses(s, y, *w).mean())(s)
    np.testing.assert_allclose(grads[0], expected, rtol=1e-6)
    assert not np.any(grads[1:])


@pytest.mark.slow
def test_stream_of_criteos_size():
    """16 million clicks: less than 3 GB beside the clicks."""
    draw = np.random.default_rng(0)
    n, day = 16_000_000, 86_400
    click = np.sort(draw.integers(0, 60 * day, n)).astype(float)
    z = np.floor(draw.exponential(3 * day, n))
    conv = np.where(draw.random(n) < 0.23, click + z, -1.0)
    tracemalloc.start()
    s = defer.make_stream(click, conv, 900.0, 30.0 * day, "defer")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(s.ts) == 2 * n and peak < 3e9, peak


def test_dfm_gradient_by_finite_differences():
    with jax.enable_x64(True):
        s = jnp.array([-50.0, -3.0, -0.5, 0.2, 2.0, 40.0])
        raw = jnp.array([-30.0, -8.0, 0.3, -0.6, 2.0, 1.0])
        y = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
        t = jnp.array([3.0, 10.0, 0.0, 5.0, 0.1, 2.0])
        for argument in (0, 1):
            args = [s, raw, y, t]
            grad = jax.grad(defer.dfm_loss, argument)(*args)
            for i in range(len(s)):
                h = 1e-6
                ends = []
                for sign in (1, -1):
                    moved = args.copy()
                    moved[argument] = args[argument].at[i].add(sign * h)
                    ends.append(float(defer.dfm_loss(*moved)))
                assert float(grad[i]) == pytest.approx(
                    (ends[0] - ends[1]) / (2 * h), abs=1e-8
                )


def test_dfm_closed_form():
    """p = lambda = 1/2: -log(1/4) + 1/2 for a conversion after 1, and none until 2."""
    zero = jnp.zeros(2)
    raw = jnp.full(2, math.log(math.expm1(0.5)))
    rows = defer.dfm_losses(zero, raw, jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0]))
    none = -math.log(0.5 + 0.5 * math.exp(-1.0))
    np.testing.assert_allclose(rows, [math.log(4) + 0.5, none], rtol=1e-6)


@pytest.mark.parametrize("extreme", [-50.0, 50.0])
def test_no_nan_at_extreme_logits(extreme):
    s = jnp.full(4, extreme)
    y = jnp.array([0.0, 1.0, 0.0, 1.0])
    aux = jnp.array([0.0, 1.0, 1.0, 0.0])
    for method in ("vanilla", "fnw", "fnw_rn", "es_dfm", "defer", "fnc"):
        value, grad = jax.value_and_grad(
            lambda s, m=method: defer.delayed_loss(m, s, y, dp=aux, rn=1 - aux)
        )(s)
        assert np.isfinite(value) and np.isfinite(grad).all(), method
    for raw in (-200.0, -50.0, 50.0):
        t = jnp.array([0.0, 0.0, 500.0, 30.0])
        value, grads = jax.value_and_grad(defer.dfm_loss, (0, 1))(
            s, jnp.full(4, raw), y, t
        )
        assert np.isfinite(value) and np.isfinite(grads).all(), raw
    p, _ = defer.calibrate("fnc", jax.nn.sigmoid(s))
    assert np.isfinite(p).all() and float(p.max()) <= 1


def test_aux_loss_masks_immediate_positives():
    rn, dp = jnp.array([0.3, -1.0, 2.0]), jnp.array([0.1, 0.2, 0.3])
    label, delayed = jnp.array([1.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 0.0])
    value, metrics = defer.aux_loss(rn, dp, label, delayed)
    expected_rn = (np.logaddexp(0, -1.0) + np.logaddexp(0, -2.0)) / 2
    expected_dp = np.mean([np.logaddexp(0, x) for x in (0.1, -0.2, 0.3)])
    np.testing.assert_allclose(metrics["aux_rn"], expected_rn, rtol=1e-6)
    np.testing.assert_allclose(value, expected_rn + expected_dp, rtol=1e-6)
    grad = jax.grad(lambda rn: defer.aux_loss(rn, dp, label, delayed)[0])(rn)
    assert grad[0] == 0 and grad[1] != 0 and grad[2] != 0


def test_offline_loss_trains_only_heads_whose_window_has_passed():
    logits = jnp.array([[0.5, -0.2, 1.0], [0.1, 0.4, -1.0]])
    labels = jnp.array([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    elapsed = jnp.array([5.0, 0.5])
    value, metrics = defer.offline_loss(logits, labels, elapsed, (1.0, 3.0))
    ce = np.logaddexp(0, np.where(labels == 1, -logits, logits))
    np.testing.assert_allclose(value, (ce[0].sum() + ce[1, 2]) / 2, rtol=1e-6)
    assert float(metrics["coverage"]) == pytest.approx(4 / 6)
    grad = jax.grad(lambda x: defer.offline_loss(x, labels, elapsed, (1.0, 3.0))[0])(
        logits
    )
    np.testing.assert_array_equal(grad != 0, [[1, 1, 1], [0, 0, 1]])


def defer_clicks(n=500, seed=0):
    """Half of the clicks convert; of those some at once, some too late; times tie."""
    draw = np.random.default_rng(seed)
    click = draw.integers(0, 60, n).astype(float)
    z = np.where(draw.random(n) < 0.2, 0.0, np.round(draw.exponential(12, n), 1))
    return click, np.where(draw.random(n) < 0.5, click + z, -1.0)


def brute_force(click, conv, w1, w2, method, w3=None, variant="paper"):
    """The table, click by click."""
    events = []
    for i, (t, c) in enumerate(zip(click, conv)):
        z = c - t if c >= 0 else math.inf
        if method == "oracle":
            events.append((t, i, 0, int(z <= w2)))
            continue
        waits = method not in ("fnw", "fnc", "fnw_rn", "fnc_rn")
        early = waits and z <= w1
        events.append((t + w1 if waits else t, i, 0, int(early)))
        if method == "vanilla_win":
            continue
        if z <= w2 and not early:
            events.append((t + z, i, 1, 1))
        if method in REAL and z > (w3 or w2):
            events.append((t + (w3 or w2), i, 3, 0))
        twice = method in ("defer", "vanilla_defer") and variant == "paper"
        if twice and early:
            events.append((t + w2, i, 2, 1))
    return sorted(events, key=lambda e: e[:2])


REAL = ("defer", "vanilla_defer", "fnw_rn", "fnc_rn")


@pytest.mark.parametrize(
    "method, w3", [*((m, None) for m in defer.STREAMS), *((m, 9.0) for m in REAL)]
)
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_stream_is_that_of_the_table(method, variant, w3):
    click, conv = defer_clicks(200)
    s = defer.make_stream(click, conv, 2.0, 30.0, method, w3, variant=variant)
    expected = brute_force(click, conv, 2.0, 30.0, method, w3, variant)
    rows = np.array([(e[0], e[1], e[3]) for e in expected])
    np.testing.assert_array_equal(s.ts, rows[:, 0])
    np.testing.assert_array_equal(s.index, rows[:, 1])
    np.testing.assert_array_equal(s.label, rows[:, 2])
    np.testing.assert_array_equal(s.kind, [e[2] for e in expected])


@pytest.mark.parametrize("seed", range(3))
def test_stream_counts(seed):
    click, conv = defer_clicks(seed=seed)
    z = defer.delays(click, conv)
    n, w1, w2 = len(click), 2.0, 30.0
    converts, late = (z <= w2).sum(), ((z > w1) & (z <= w2)).sum()
    build = functools.partial(defer.make_stream, click, conv, w1, w2)
    count = {m: len(build(m).ts) for m in defer.STREAMS}
    assert count["oracle"] == count["vanilla_win"] == n
    assert count["vanilla"] == count["es_dfm"] == n + late
    assert count["fnw"] == count["fnc"] == n + converts
    assert count["fnw_rn"] == count["fnc_rn"] == count["defer"] == 2 * n
    stream = build("defer")
    np.testing.assert_array_equal(np.bincount(stream.index), 2)
    # The last word about every click is the truth.
    last = dict(zip(stream.index.tolist(), stream.label.tolist()))
    np.testing.assert_array_equal([last[i] for i in range(n)], z <= w2)
    # With w3 who converts after it is a wrong negative and a later positive.
    wrong = ((z > 9) & (z <= w2)).sum()
    assert wrong > 0 and len(build("defer", 9.0).ts) == 2 * n + wrong
    immediate = (z <= w1).sum()
    assert len(build("defer", variant="released").ts) == 2 * n - immediate


def generator(n, seed=0):
    """x ~ N(0, I), p = sig(x.a - 1), delays exponential and truncated at w2 = 30."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, 5))
    a, b = np.array([1, -0.5, 0.5, 0, 0]), np.array([0, 0.5, 0, 1, -1])
    p, rate, w1, w2 = 1 / (1 + np.exp(1 - x @ a)), np.exp(0.5 * x @ b), 1.0, 30.0
    click = draw.uniform(0, 100, n)
    z = -np.log1p(draw.random(n) * np.expm1(-rate * w2)) / rate
    conv = np.where(draw.random(n) < p, click + z, -1.0)
    late = (np.exp(-rate * w1) - np.exp(-rate * w2)) / -np.expm1(-rate * w2)
    return x, p, p * late, click, conv


@pytest.fixture(scope="module")
def simulated():
    return generator(200_000)


def estimate(simulated, method, values):
    """Weighted mean over events of values(x, label), and its standard error.

    The weights are those of the exact p and p_dp; events of one click are dependent, so
    the error is that of the sums per click.
    """
    x, p, dp, click, conv = simulated
    s = defer.make_stream(click, conv, 1.0, 30.0, method)
    with jax.enable_x64(True):
        rn = (1 - p) / (1 - p + dp)
        w = defer.importance_weights(method, *map(jnp.asarray, (p, dp, rn)))
        w = np.where(s.label == 1, np.asarray(w[0])[s.index], np.asarray(w[1])[s.index])
    value = w * values(x[s.index], s.label)
    mean = value.sum() / len(value)
    per_click = np.bincount(s.index, value - mean, len(p))
    return mean, per_click.std() * len(p) ** 0.5 / len(value)


FUNCTIONS = {
    "positives": lambda x, y: y * 1.0,
    "x_0": lambda x, y: x[:, 0],
    "x_3 of positives": lambda x, y: x[:, 3] * y,
    "x_0 x_4 of negatives": lambda x, y: x[:, 0] * x[:, 4] * (1 - y),
    "loss": lambda x, y: np.logaddexp(0, x[:, 1] * (1 - 2 * y)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_defer_is_unbiased(simulated, name):
    x, *_, click, conv = simulated
    values = FUNCTIONS[name]
    truth = values(x, (conv >= 0) * 1)
    mean, error = estimate(simulated, "defer", values)
    # Same clicks: the oracle's own noise is common to both.
    assert abs(mean - truth.mean()) < 4 * error
    assert error < 0.01


def test_es_dfm_is_biased_where_defer_is_not(simulated):
    x, *_, conv = simulated
    truth = x[:, 0].mean()
    mean, error = estimate(simulated, "es_dfm", FUNCTIONS["x_0"])
    assert mean - truth > 10 * error
    assert mean == pytest.approx(0.0604, abs=4 * 0.0022)  # The digest's measurement.
    mean, error = estimate(simulated, "es_dfm", FUNCTIONS["positives"])
    assert mean - (conv >= 0).mean() > 10 * error


def test_unweighted_defer_stream_is_biased(simulated):
    """The weights do something: without them late positives are missing."""
    mean, error = estimate(simulated, "vanilla_defer", FUNCTIONS["positives"])
    assert (simulated[4] >= 0).mean() - mean > 10 * error


@pytest.mark.parametrize(
    "change, message",
    [
        ({"conv_ts": np.array([2.0, 3.0])}, "conversion before its click"),
        ({"w1": 8.0}, "0 <= w1 < w2"),
        ({"w1": -1.0}, "0 <= w1 < w2"),
        ({"w3": 1.0}, r"w3 must lie in \(w1, w2\)"),
        ({"w3": 8.0}, r"w3 must lie in \(w1, w2\)"),
        ({"w3": 3.0, "method": "fnw"}, "no real negatives"),
        ({"click_ts": np.array([1.0, -5.0])}, r"click_ts\[1\]: expected finite"),
        ({"click_ts": np.array([np.nan, 5.0])}, r"click_ts\[0\]"),
        ({"conv_ts": np.array([np.nan, 6.0])}, r"conv_ts\[0\]"),
        ({"conv_ts": np.array([-7.0, 6.0])}, r"conv_ts\[0\]: .*-1 or inf"),
        ({"conv_ts": np.array([7.0])}, "one length"),
        ({"method": "defr"}, "method must be one of"),
        ({"variant": "beta"}, "paper or released"),
    ],
)
def test_make_stream_refuses(change, message):
    options = {
        "click_ts": np.array([1.0, 5.0]), "conv_ts": np.array([2.0, np.inf]),
        "w1": 1.0, "w2": 7.0, "method": "defer", **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        defer.make_stream(**options)


def test_other_errors():
    one = jnp.ones(2)
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
        defer.delayed_loss("fnw", one, 2 * one)
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        defer.dfm_loss(one, one, one / 2, one)
    with pytest.raises(ValueError, match="dfm needs raw_lambda"):
        defer.delayed_loss("dfm", one, one)
    given = {"raw_lambda": 0.3 * one, "elapsed": 2 * one, "weight": jnp.array([1.0, 0])}
    np.testing.assert_array_equal(
        defer.delayed_loss("dfm", one, one, **given),
        defer.dfm_loss(one, 0.3 * one, one, 2 * one, given["weight"]),
    )
    with pytest.raises(ValueError, match="need 3 heads"):
        defer.offline_loss(jnp.ones((2, 2)), jnp.ones((2, 2)), one, (1.0, 2.0))
    with pytest.raises(ValueError, match="ascending"):
        defer.offline_loss(jnp.ones((2, 3)), jnp.ones((2, 3)), one, (2.0, 1.0))


def test_buckets_refuse():
    click, conv = defer_clicks()
    s = defer.make_stream(click, conv, 2.0, 30.0, "defer")
    with pytest.raises(ValueError, match="sorted by time"):
        defer.make_buckets(s._replace(ts=s.ts[::-1]), click, 0.0, 60.0, 1.0)
    with pytest.raises(ValueError, match=r"label\[0\]: expected 0 or 1"):
        defer.make_buckets(s._replace(label=s.label + 3), click, 0.0, 60.0, 1.0)
    with pytest.raises(ValueError, match="two or more"):
        defer.make_buckets(s, click, 0.0, 1.0, 1.0)
    buckets = defer.make_buckets(s, click, 0.0, 60.0, 20.0)
    with pytest.raises(ValueError, match="ascending start"):
        defer.run_stream(len, len, None, buckets[::-1], {}, click, batch=4)


def test_buckets_part_events_and_clicks():
    click, conv = defer_clicks()
    s = defer.make_stream(click, conv, 2.0, 30.0, "defer")
    buckets = defer.make_buckets(s, click, 5.0, 60.0, 10.0)
    assert [b.start for b in buckets] == [5.0, 15.0, 25.0, 35.0]
    for b in buckets:
        assert (b.events.ts >= b.start).all() and (b.events.ts < b.start + 10).all()
        expected = np.flatnonzero((click >= b.start + 10) & (click < b.start + 20))
        np.testing.assert_array_equal(np.sort(b.clicks), expected)
    trained = sum(len(b.events.ts) for b in buckets)
    assert trained == ((s.ts >= 5) & (s.ts < 45)).sum()


def test_relative_improvement_is_guarded():
    assert defer.relative_improvement(0.5, 0.6, 0.4) == pytest.approx(50)
    assert defer.relative_improvement(1.0, 0.6, 0.4) == pytest.approx(-200)
    assert math.isnan(defer.relative_improvement(0.5, 0.6, 0.6 + 1e-9))
    assert math.isnan(defer.relative_improvement(0.5, math.nan, 0.6))


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


def test_one_compiled_step_serves_every_bucket(key):
    """Buckets of any size: nothing is compiled again after the first one."""
    click, conv = defer_clicks(1500)
    features = {"x": columns(1500)["x"]}
    config = small()
    method = defer.make(config)
    first = columns(64)
    traces = []

    def update(state, batch):
        traces.append("step")
        return method.update(state, batch)

    def predict(state, rows):
        traces.append("predict")
        return method.sampler(state.params, None, rows)

    s = defer.make_stream(click, conv, 2.0, 30.0, "defer")
    buckets = defer.make_buckets(s, click, 0.0, 80.0, 4.0)
    sizes = {len(b.events.ts) for b in buckets}
    assert len(sizes) > 5 and max(sizes) > 64 and not len(buckets[-1].clicks)
    state, found = defer.run_stream(
        jax.jit(update), jax.jit(predict), method.init(key, first), buckets,
        features, click, batch=64,
    )  # fmt: skip
    assert sorted(traces) == ["predict", "step"]
    assert int(state.step) == sum(-(-len(b.events.ts) // 64) for b in buckets)
    assert [len(p) for p in found] == [len(b.clicks) for b in buckets]
    assert all((p > 0).all() and (p < 1).all() for p in found)
    # The predictions are those rows', not the padding's.
    rows = {"x": features["x"][buckets[-2].clicks]}
    direct = method.sampler(state.params, None, rows)
    np.testing.assert_allclose(found[-1], direct[: len(found[-1])], rtol=1e-5)


@pytest.fixture(scope="module")
def method():
    return defer.make(small())


def test_padding_changes_nothing(method, key):
    rows = columns(40)
    state = method.init(key, rows)
    padded = defer.pad_rows(rows, 64)
    padded["x"][40:], padded["label"][40:] = np.nan, 7.0
    padded["x"][40:] = 1e3
    update = jax.jit(method.update)
    whole, a = update(state, rows)
    more, b = update(state, padded)
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        whole.params, more.params,
    )  # fmt: skip


def test_an_empty_batch_changes_nothing(method, key):
    state, _ = jax.jit(method.update)(method.init(key, columns(64)), resolved(64))
    empty = {**resolved(64), "weight": np.zeros(64, np.float32)}
    after, metrics = jax.jit(method.update)(state, empty)
    for old, new in zip(state[1:3], after[1:3]):
        jax.tree.map(np.testing.assert_array_equal, old, new)
    jax.tree.map(np.testing.assert_array_equal, state.extra[:3], after.extra[:3])
    assert int(after.step) == 2 and np.isfinite(float(metrics["loss"]))


def test_auxiliary_classifier_learns_on_resolved_clicks_and_is_frozen_after(
    method, key
):
    update = jax.jit(method.update)
    start = method.init(key, resolved(64))
    state, metrics = update(start, resolved(64))
    assert float(metrics["aux_loss"]) > 0
    changed = jax.tree.map(lambda a, b: (a != b).any(), start.extra, state.extra)
    assert all(jax.tree.leaves(changed.params))
    events = {**resolved(64, 1), "resolved": np.zeros(64, np.float32)}
    later, metrics = update(state, events)
    jax.tree.map(np.testing.assert_array_equal, later.extra[:3], state.extra[:3])
    assert (later.params["params"]["head"]["kernel"]
            != state.params["params"]["head"]["kernel"]).any()  # fmt: skip
    # Without the column it is not even compiled, and the step is the same.
    bare = {k: v for k, v in events.items() if k not in ("resolved", "delayed")}
    other, _ = update(state, bare)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
        later.params, other.params,
    )  # fmt: skip


def test_events_are_weighed_by_the_auxiliary_classifier(method, key):
    """The step's gradient is delayed_loss's with the frozen net's p_dp."""
    batch = columns(64)
    state = method.init(key, batch)
    net = defer.network(small())
    both = defer.probabilities(state.extra.params, batch, net=net.clone(outputs=2))
    _, metrics = jax.jit(method.update)(state, batch)

    def reference(params):
        s = net.apply(params, batch)[:, 0]
        y = jnp.asarray(batch["label"])
        return defer.delayed_loss("defer", s, y, dp=both[:, 0], rn=both[:, 1])

    value, grads = jax.value_and_grad(reference)(state.params)
    np.testing.assert_allclose(metrics["nll"], value, rtol=1e-5)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)
    # Precomputed outputs, once per event, are used as they are.
    _, given = jax.jit(method.update)(state, {**batch, "aux": both})
    np.testing.assert_allclose(given["nll"], metrics["nll"], rtol=1e-6)
    _, none = jax.jit(method.update)(state, {**batch, "aux": 0 * both})
    assert abs(float(none["nll"] - metrics["nll"])) > 1e-3


@pytest.mark.parametrize("name", defer.NAMES)
def test_every_method_trains(name, key):
    method = defer.make(small(name, "optim.lr=0.02"))
    rows = resolved(64)
    if name == "dfm":  # A conversion after a day, none within thirty.
        rows["elapsed"] = np.where(rows["label"] == 1, 1, 30).astype(np.float32)
    if name == "fsiw":
        rows["aux"] = np.full((64, 2), 0.9, np.float32)
        with pytest.raises(ValueError, match="fsiw needs batch"):
            method.loss(method.init(key, rows).params, resolved(64), key)
    state = method.init(key, rows)
    update = jax.jit(method.update)
    losses = []
    for _ in range(40):
        state, metrics = update(state, rows)
        losses.append(float(metrics["nll"]))
    assert losses[-1] < 0.8 * losses[0]
    p = method.sampler(state.params, key, rows)
    assert p.shape == (64,) and (p[rows["label"] == 1].mean() > p.mean())


def test_method_of_another_stream_shares_no_state(key):
    assert defer.make(small("fnw")).init(key, columns(4)).extra == ()
    assert defer.make(small("es_dfm")).init(key, columns(4)).extra != ()


@pytest.mark.parametrize(
    "field, message",
    [
        ("method.name=defr", "config.method.name"),
        ("method.variant=x", "config.method.variant"),
        ("optim.lr=0.0", "lr must be > 0"),
        ("optim.l2=-1.0", "l2 must be >= 0"),
        ("net.widths=(0, 4)", "positive sizes"),
        ("net.bins=(4, 4)", "2 bins and 0 buckets"),
        ("train.accumulate=0", "accumulate"),
    ],
)
def test_make_refuses(field, message):
    with pytest.raises(ValueError, match=message):
        defer.make(small("defer", field))


def categories(config, n=6, seed=0):
    draw = np.random.default_rng(seed)
    sizes = (*config.net.bins, *config.net.buckets)
    x = [draw.integers(0, size, n) for size in sizes]
    return {**columns(n), "x": np.stack(x, 1).astype(np.int32)}


def test_criteo_net_is_the_dense_one_on_one_hots(key):
    """Looking rows up is the product with concat(one-hots, embeddings)."""
    config = load_config("defer", ["--config.net.widths=(256,)"])
    batch, bins, buckets = categories(config), config.net.bins, config.net.buckets
    net = defer.network(config)
    variables = net.init(key, batch)
    out, seen = net.apply(
        variables, batch, capture_intermediates=True, mutable=["intermediates"]
    )
    assert out.shape == (6, 1)
    p = variables["params"]
    x, split = batch["x"], len(bins)
    hots = [np.eye(n)[x[:, j]] for j, n in enumerate(bins)]
    starts = np.cumsum((0, *buckets[:-1]))
    table = np.asarray(p["hashed"]["embedding"])
    assert table.shape == (2000, 8)
    embedded = [table[x[:, split + j] + start] for j, start in enumerate(starts)]
    x = np.concatenate([*hots, *embedded], 1)
    assert x.shape == (6, 1488 + 72) and p["dense_0"]["kernel"].shape == (1560, 256)
    expected = x @ np.asarray(p["dense_0"]["kernel"]) + np.asarray(p["dense_0"]["bias"])
    found = seen["intermediates"]["dense_0"]["__call__"][0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_statistics(key):
    """They follow the stream, ignore padding, and stay with the parameters."""
    fields = [
        "net.widths=(4,)",
        "net.bins=(3, 4)",
        "net.buckets=(5,)",
        "net.features=3",
    ]
    config = load_config("defer", [f"--config.{f}" for f in fields])
    method = defer.make(config)
    batch = categories(config)
    state = jax.jit(method.init)(key, batch)
    update = jax.jit(method.update)
    after, _ = update(state, batch)

    def mean(params):
        return params["batch_stats"]["norm_0"]["mean"]

    assert not mean(state.params).any() and mean(after.params).all()
    # The auxiliary net saw no resolved clicks: frozen, its statistics too.
    assert not mean(after.extra.params).any()
    padded, _ = update(state, defer.pad_rows(batch, 8))
    np.testing.assert_allclose(
        mean(padded.params), mean(after.params), rtol=1e-4, atol=1e-7
    )
    p = method.sampler(after.params, key, batch)
    assert p.shape == (6,) and np.isfinite(p).all()
