"""The streaming protocol on synthetic clicks, and the learning gate on CDNOW."""

import math

import jax
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers.config import load_config
from jaxpapers.papers import defer
from jaxpapers.tasks import conversions


def config_of(*overrides):
    fields = ("data.batch=64", "data.epochs=2", "net.widths=(8, 4)", "net.features=3")
    return load_config("defer:smoke", [f"--config.{f}" for f in (*fields, *overrides)])


@pytest.fixture(scope="module")
def clicks():
    """More clicks convert, and sooner, where x_0 is large; the rate doubles at day 60."""
    draw = np.random.default_rng(0)
    n = 4000
    x = draw.standard_normal((n, 3)).astype(np.float32)
    click = np.sort(draw.uniform(0, 100, n))
    p = np.minimum((0.15 + 0.15 * (click > 60)) * np.exp(0.5 * x[:, 0]), 0.9)
    z = draw.exponential(6, n)
    converts = (draw.random(n) < p) & (z < 30)
    conv = np.where(converts, click + z, np.inf)
    return conversions.Clicks({"x": x}, click, conv, "test")


def test_journey_is_every_resolved_click_then_every_event(clicks):
    config = config_of()
    journey = conversions.Journey(clicks, config)
    size = config.data.batch
    batches = [journey.batch(i * size, size) for i in range(journey.steps)]
    shapes = conversions.batch_shapes(config)
    for batch in (batches[0], batches[-1]):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: (s.shape, s.dtype) for k, s in shapes.items()
        }
    kinds = [b["resolved"].max() for b in batches]
    pretraining = int(sum(kinds))
    assert kinds == [1] * pretraining + [0] * (len(kinds) - pretraining)

    n = (clicks.click_ts < config.data.pretrain_until).sum()
    epoch = batches[: pretraining // 2]
    seen = np.concatenate([b["x"][b["weight"] > 0] for b in epoch])
    expected = clicks.features["x"][:n]
    assert len(seen) == n
    np.testing.assert_array_equal(np.sort(seen, 0), np.sort(expected, 0))
    assert (batches[0]["x"] != batches[pretraining // 2]["x"]).any()  # Another order.

    events = batches[pretraining:]
    label = np.concatenate([b["label"][b["weight"] > 0] for b in events])
    np.testing.assert_array_equal(label, journey.stream.label)
    elapsed = np.concatenate([b["elapsed"][b["weight"] > 0] for b in events])
    assert elapsed.min() >= config.data.w1 * (1 - 1e-5) and elapsed.max() <= 30.001
    end = journey.batch(journey.steps * size, size)
    assert not end["weight"].any()
    part = journey.batch(size, size, slice(16, 32))
    np.testing.assert_array_equal(part["x"], batches[1]["x"][16:32])


def test_stream_events_lie_in_the_stream_and_never_touch_pretraining(clicks):
    config = config_of()
    stream = conversions.stream_events(clicks, config, 95.0)
    assert stream.ts.min() >= 70 and stream.ts.max() < 95
    at = clicks.click_ts[stream.index]
    assert at.min() >= 40 and (at < 70).any()  # What came late of clicks in between.
    oracle = conversions.with_method(config, "oracle")
    stream = conversions.stream_events(clicks, oracle, 95.0)
    np.testing.assert_array_equal(stream.ts, clicks.click_ts[stream.index])


def test_resolved_rows():
    clicks = conversions.Clicks(
        {"x": np.eye(4, dtype=np.float32)},
        np.zeros(4), np.array([0.5, 3.0, 40.0, np.inf]), "",
    )  # fmt: skip
    rows = conversions.resolved_rows(clicks, np.array([0, 1, 2, 3]), 1.0, 30.0)
    assert rows["label"].tolist() == [1, 1, 0, 0]
    assert rows["delayed"].tolist() == [0, 1, 0, 0]
    assert rows["elapsed"].tolist() == [0.5, 3, 30, 30]


def test_streaming_score_is_the_mean_weighted_by_clicks():
    y = [np.array([0.0, 1]), np.array([]), np.array([1.0, 1, 1, 1])]
    p = [np.array([0.2, 0.6]), np.array([]), np.full(4, 0.5)]
    found = defer.streaming_score(y, p)
    first = -(math.log(0.8) + math.log(0.6)) / 2
    assert found["nll"] == pytest.approx((2 * first + 4 * math.log(2)) / 6)
    assert found["mean_p"] == pytest.approx((0.8 + 4 * 0.5) / 6)
    assert found["auc"] == 1.0  # The bucket with one class has none.


@pytest.fixture(scope="module")
def rows(clicks):
    methods = ("pretrained", "oracle", "vanilla_win", "defer")
    config = config_of("optim.lr=0.01")
    return conversions.table(config, (0, 1), methods, clicks)


def test_table(rows):
    """The weights recover what waiting alone destroys."""
    values = {row.method: row.values for row in rows}
    assert list(values) == ["pretrained", "oracle", "vanilla_win", "defer"]
    assert all(v.shape == (2,) for row in rows for v in row.values.values())
    np.testing.assert_array_equal(values["pretrained"]["ri_nll"], 0)
    np.testing.assert_allclose(values["oracle"]["ri_nll"], 100)
    nll = {name: v["nll"].mean() for name, v in values.items()}
    assert nll["oracle"] < nll["pretrained"] < nll["vanilla_win"]
    assert nll["defer"] < nll["pretrained"]
    mean_p = {name: v["mean_p"].mean() for name, v in values.items()}
    assert mean_p["vanilla_win"] < 0.6 * mean_p["oracle"]
    assert abs(mean_p["defer"] - mean_p["oracle"]) < 0.25 * mean_p["oracle"]
    text = conversions.render(rows)
    assert len(text.splitlines()) == 6 and "| defer | " in text


def test_seeds_of_a_table_are_those_of_single_runs(clicks, rows):
    """Vmapping them changes nothing, nor does which methods ran before."""
    alone = conversions.table(config_of("optim.lr=0.01"), (1,), ("defer",), clicks)
    for name in ("nll", "auc"):
        assert alone[-1].values[name][0] == pytest.approx(
            rows[-1].values[name][1], rel=1e-4
        )
    assert rows[-1].values["nll"][0] != rows[-1].values["nll"][1]


def test_task(clicks):
    config = config_of('method.rivals=("pretrained","oracle","defer")')
    method = defer.make(config)
    mesh = meshes.make_mesh({"data": 4, "model": 2})
    task = conversions.bind(clicks, config, method, mesh)
    held = (clicks.click_ts >= 95) & (clicks.click_ts < 100)
    with jax.set_mesh(mesh):
        state = jax.jit(method.init)(jax.random.key(0), task.examples.batch(0, 64))
    found = task.evaluate(state)
    p = method.predict(state.params, state.extra, {"x": clicks.features["x"][held]})
    truth = np.isfinite(clicks.conv_ts[held]) * 1.0
    expected = defer.score(truth, np.asarray(p))
    for name, value in expected.items():
        assert found[f"validation_{name}"] == pytest.approx(value, rel=1e-4)
    assert set(task.baselines()) == {"one number"}


def test_family_is_trained_for_every_seed_as_a_run_is(clicks):
    config = config_of('method.rivals=("pretrained","oracle","defer")', "optim.lr=0.01")
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    task = conversions.bind(clicks, config, defer.make(config), mesh)
    assert set(task.family) == {"pretrained", "oracle"}  # Not the run's own method.
    found = {name: fit((3, 4)) for name, fit in task.family.items()}
    assert {len(x) for x in found.values()} == {2}
    assert max(found["oracle"]) < min(found["pretrained"])
    own = conversions.with_method(config, "oracle")
    method, size = defer.make(own), config.data.batch
    alone = conversions.bind(clicks, own, method, mesh)
    state = jax.jit(method.init)(jax.random.key(4), alone.examples.batch(0, size))
    step = jax.jit(method.update)
    for i in range(alone.examples.steps):
        state, _ = step(state, alone.examples.batch(i * size, size))
    expected = alone.evaluate(state)["validation_nll"]
    assert found["oracle"][1] == pytest.approx(expected, rel=1e-5)
    wrong = config_of('method.rivals=("orcale",)')
    with pytest.raises(ValueError, match="rivals must be of .*'orcale'"):
        conversions.bind(clicks, wrong, defer.make(wrong), mesh)


@pytest.mark.parametrize("name", ["dfm", "es_dfm"])
def test_families_with_more_state_are_trained_too(clicks, name):
    config = config_of(f'method.rivals=("{name}",)')
    mesh = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    task = conversions.bind(clicks, config, defer.make(config), mesh)
    found = task.family[name]((0, 1))
    assert np.isfinite(found).all() and found[0] != found[1]


@pytest.mark.parametrize(
    "field, message",
    [("pretrain_until=0.0", "no pretraining clicks"), ("holdout=0.0", "no held-out")],
)
def test_task_refuses_empty_phases(clicks, field, message):
    config = config_of(f"data.{field}")
    with pytest.raises(ValueError, match=message):
        conversions.bind(clicks, config, defer.make(config), meshes.make_mesh())


def test_read_refuses_an_unknown_source():
    with pytest.raises(ValueError, match="synthetic, cdnow or criteo, got 'avazu'"):
        conversions.read(config_of("data.source=avazu"))


def test_criteo_needs_a_path():
    with pytest.raises(ValueError, match="data.path"):
        conversions.read(load_config("defer"))


@pytest.mark.slow
def test_learning_gate_on_repeat_purchases(capsys):
    """Mean of 3 seeds: DEFER recovers half of what the drift costs, waiting none."""
    config = load_config("defer:cdnow")
    try:
        clicks = conversions.read(config)
    except FileNotFoundError as reason:
        pytest.skip(f"CDNOW is not here and cannot be fetched: {reason}")
    rows = conversions.table(config, clicks=clicks)
    with capsys.disabled():
        print("\n" + conversions.render(rows))
    values = {row.method: row.values for row in rows}
    nll = {name: v["nll"].mean() for name, v in values.items()}
    assert values["defer"]["ri_nll"].mean() >= 50
    assert nll["defer"] < nll["vanilla_win"]
    assert nll["oracle"] < nll["pretrained"]
