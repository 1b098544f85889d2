"""DEFER's model: loss and predictions of every method, its step, its network."""

import functools

import chex
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
    chex.assert_trees_all_equal(a, b)


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


@pytest.mark.matrix
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


@pytest.mark.matrix
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
        nothing = {**padded, "weight": jnp.zeros_like(padded["weight"])}
        past, _ = method.update(after, nothing)
        return start.params, after.params, after.extra.params, expected, p, past.params

    def mean(params):
        return params["batch_stats"]["norm_0"]["mean"]

    outcome = together(outputs, key, batch, defer.pad_rows(batch, 8))
    start, after, auxiliary, expected, p, past = outcome
    assert not mean(start).any() and mean(after).all()
    np.testing.assert_allclose(mean(after), mean(expected), rtol=1e-4, atol=1e-7)
    # The auxiliary network saw no resolved clicks: frozen, its statistics too.
    assert not mean(auxiliary).any()
    assert p.shape == (6,) and np.isfinite(p).all()
    # A batch of padding alone has no statistics; they were NaN from then on.
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(past))
