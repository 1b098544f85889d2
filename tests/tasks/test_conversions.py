"""Late conversions: the training stream, the family's rows, the streaming protocol."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import stages
from jaxpapers.config import load_config
from jaxpapers.method import Method, State
from jaxpapers.papers import defer
from jaxpapers.study import Stage, last_step, with_seed
from jaxpapers.tasks import conversions, delayed_family


def config_of(*overrides):
    fields = ("data.batch=64", "data.epochs=2", "data.bucket=3.0", "net.widths=(8, 4)")
    fields += ("net.features=3",)
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


def test_training_stream_is_every_resolved_click_then_every_event(clicks):
    config = config_of()
    training = conversions.TrainingStream(clicks, config)
    size = config.data.batch
    batches = [training.batch(i * size, size) for i in range(training.steps)]
    shapes = conversions.abstract(config).shapes
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
    np.testing.assert_array_equal(label, training.stream.label)
    elapsed = np.concatenate([b["elapsed"][b["weight"] > 0] for b in events])
    assert elapsed.min() >= config.data.w1 * (1 - 1e-5) and elapsed.max() <= 30.001
    end = training.batch(training.steps * size, size)
    assert not end["weight"].any()
    part = training.batch(size, size, slice(16, 32))
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
    scores = defer.streaming_score(y, p)
    first = -(math.log(0.8) + math.log(0.6)) / 2
    assert scores["nll"] == pytest.approx((2 * first + 4 * math.log(2)) / 6)
    assert scores["mean_p"] == pytest.approx((0.8 + 4 * 0.5) / 6)
    assert scores["auc"] == 1.0  # The bucket with one class has none.


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.5])
def test_scores_of_what_is_no_probability_are_refused(value):
    """Clipped, 1.5 would be a certain prediction."""
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\].*at rows \[1\]"):
        defer.score(np.array([0.0, 1]), np.array([0.2, value]))
    with pytest.raises(ValueError, match="labels must be"):
        defer.score(np.array([0.0, 1, 2]), np.array([0.2, 0.3, 0.4]))


METHODS = ("pretrained", "oracle", "vanilla_win", "defer")


@pytest.fixture(scope="module")
def table(clicks):
    return delayed_family.table(config_of("optim.lr=0.01"), (0, 1), METHODS, clicks)


@pytest.mark.matrix
def test_weights_recover_what_waiting_alone_destroys(table):
    values = {row.method: row.values for row in table}
    assert tuple(values) == METHODS
    assert all(v.shape == (2,) for row in table for v in row.values.values())
    np.testing.assert_array_equal(values["pretrained"]["ri_nll"], 0)
    np.testing.assert_allclose(values["oracle"]["ri_nll"], 100)
    nll = {name: v["nll"].mean() for name, v in values.items()}
    assert nll["oracle"] < nll["pretrained"] < nll["vanilla_win"]
    assert nll["defer"] < nll["pretrained"]
    mean_p = {name: v["mean_p"].mean() for name, v in values.items()}
    assert mean_p["vanilla_win"] < 0.6 * mean_p["oracle"]
    assert abs(mean_p["defer"] - mean_p["oracle"]) < 0.25 * mean_p["oracle"]
    text = delayed_family.render(table)
    assert len(text.splitlines()) == 6 and "| defer | " in text


@pytest.mark.matrix
def test_seeds_of_a_table_are_those_of_single_runs(clicks, table):
    """Vmapping them changes nothing, nor does which methods ran before."""
    config = conversions.with_method(config_of("optim.lr=0.01"), "defer")
    start = delayed_family.pretrain(clicks, config, (1,))
    truths, predictions = delayed_family.stream(clicks, config, start)
    alone = defer.streaming_score(truths, [p[0] for p in predictions])
    together = table[-1].values
    for name in ("nll", "auc"):
        assert alone[name] == pytest.approx(together[name][1], rel=1e-4)
    assert together["nll"][0] != together["nll"][1]


@pytest.fixture
def rows(clicks, monkeypatch):
    """(names of methods beside DEFER, mesh) -> their rows for seed 4, by label."""
    monkeypatch.setattr(conversions, "_load", lambda *args: clicks)

    def rows(names, mesh, *fields):
        config = config_of(f"data.baselines={tuple(names)}", *fields)
        study = conversions.study("defer", config, conversions.read(config), mesh)
        assert study.metric == "nll" and not study.rising
        return {row.label: row for row in study.rows(4)}

    return rows


def grid():
    return meshes.make_mesh({"data": 1}, jax.devices()[:1])


def test_rows_are_scored_on_the_last_days_with_their_true_labels(clicks, rows):
    """On a mesh of several devices as without."""
    mesh = meshes.make_mesh({"data": 4, "model": 2})
    own = rows((), mesh)["this model"]
    method = defer.make(own.stage.config)
    held = (clicks.click_ts >= 95) & (clicks.click_ts < 100)
    shapes = conversions.abstract(own.stage.config).shapes

    @jax.jit
    def predicted(key):
        state = method.init(key, shapes)
        x = {"x": clicks.features["x"][held]}
        return state, method.predict(state.params, state.extra, x)

    state, p = jax.device_get(predicted(jax.random.key(0)))
    truth = np.isfinite(clicks.conv_ts[held]) * 1.0
    numbers = own.measure(method, state).numbers
    for name, value in defer.score(truth, p).items():
        assert numbers[name] == pytest.approx(value, rel=1e-4)


def constant(p):
    """A method that predicts ``p`` for all clicks."""
    return Method(None, None, None, predict=lambda w, e, b: jnp.full(len(b["x"]), p))


def test_predictions_that_are_not_finite_are_named(rows):
    own = rows((), grid())["this model"]
    with pytest.warns(RuntimeWarning, match="predictions of held-out .*: 0, 1, 2, "):
        numbers = own.measure(constant(np.nan), State(0, {}, (), (), 0)).numbers
    assert set(numbers) == set(defer.METRICS) and np.isnan([*numbers.values()]).all()


def test_auc_is_left_out_where_the_held_out_clicks_are_of_one_class(
    clicks, monkeypatch
):
    """With a note, before anything is trained."""
    late = clicks.click_ts >= 95
    conv = np.where(late, np.inf, clicks.conv_ts)
    monkeypatch.setattr(conversions, "_load", lambda *_: clicks._replace(conv_ts=conv))
    config = config_of()
    data = conversions.read(config)
    assert data.summary.endswith(conversions.WITHOUT_AUC)
    study = conversions.study("defer", config, data, grid())
    assert study.columns == []
    own = study.rows(0)[0]
    numbers = own.measure(constant(0.25), State(0, {}, (), (), 0)).numbers
    assert numbers == {
        "nll": pytest.approx(-np.log(0.75)), "mean_p": pytest.approx(0.25)
    }  # fmt: skip


def test_rows_of_the_family_are_runs_of_their_methods(clicks, rows):
    """Each as long as its own stream; the pretrained one ends where the stream begins."""
    models = rows(("pretrained", "oracle", "defer"), grid(), "train.steps=9")
    assert list(models) == ["this model", "pretrained", "oracle", "constant rate"]
    own = models["this model"].stage
    assert own.config.method.name == "defer" and last_step(own) == 9
    for name in ("pretrained", "oracle"):
        config = with_seed(conversions.with_method(config_of(), name), 4)
        steps = conversions.TrainingStream(clicks, config).steps
        assert models[name].stage.config.train.steps == steps != 9
    longer = rows((), grid(), "train.steps=99999")["this model"].stage
    assert last_step(longer) == conversions.TrainingStream(clicks, own.config).steps
    alone = rows((), grid(), "method.name=oracle", "train.steps=0")["this model"].stage
    same = with_baselines(models["oracle"].stage, ())
    assert stages.same(with_baselines(alone, ()), same)
    training = conversions.TrainingStream(clicks, own.config)
    assert last_step(models["pretrained"].stage) == training.first_event // 64
    rate = np.isfinite(clicks.conv_ts[clicks.click_ts < 40]).mean()
    held = np.isfinite(
        clicks.conv_ts[(clicks.click_ts >= 95) & (clicks.click_ts < 100)]
    )
    expected = -np.log(np.where(held, rate, 1 - rate)).mean()
    numbers = models["constant rate"].measure().numbers
    assert numbers["nll"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="baselines must be of .*'orcale'"):
        rows(("orcale",), grid())


def with_baselines(stage, names):
    config = conversions.with_fields(stage.config, {"data.baselines": names})
    return Stage(stage.paper, config, until=stage.until)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name",
    [
        "pretrained",
        *(pytest.param(x, marks=pytest.mark.matrix) for x in ("dfm", "es_dfm")),
    ],
)
def test_rows_of_the_family_are_trained(clicks, rows, tmp_path, name):
    """Also those with more outputs or more state than DEFER."""
    row = rows((name,), grid(), "data.epochs=1")[name]
    runs = stages.Stages(tmp_path, grid(), quiet=True)
    state = runs.train(row.stage, watch=lambda *run: row.measure(*run).numbers)
    assert int(state.step) == last_step(row.stage)
    before = runs.compiled(row.stage).init(jax.random.key(4))
    numbers = [row.measure(runs.method(row.stage), s).numbers for s in (before, state)]
    assert np.isfinite([*numbers[1].values()]).all()
    assert numbers[1]["auc"] != numbers[0]["auc"]


@pytest.mark.parametrize(
    "field, message",
    [("pretrain_until=0.0", "no pretraining clicks"), ("holdout=0.0", "no held-out")],
)
def test_empty_phases_are_refused(clicks, field, message):
    with pytest.raises(ValueError, match=message):
        conversions.bind(clicks, config_of(f"data.{field}"))


def test_sources_that_cannot_be_read():
    with pytest.raises(ValueError, match="'synthetic', 'cdnow', 'criteo'.*'avazu'"):
        conversions.load(config_of("data.source=avazu"))
    with pytest.raises(ValueError, match="data.path"):
        conversions.load(load_config("defer"))


@pytest.mark.slow
def test_learning_gate_on_repeat_purchases(capsys):
    """Mean of 3 seeds: DEFER recovers half of what the drift costs, waiting none."""
    config = load_config("defer:cdnow")
    try:
        clicks = conversions.load(config)
    except FileNotFoundError as reason:
        pytest.skip(f"CDNOW is not here and cannot be fetched: {reason}")
    rows = delayed_family.table(config, clicks=clicks)
    with capsys.disabled():
        print("\n" + delayed_family.render(rows))
    values = {row.method: row.values for row in rows}
    nll = {name: v["nll"].mean() for name, v in values.items()}
    assert values["defer"]["ri_nll"].mean() >= 50
    assert nll["defer"] < nll["vanilla_win"]
    assert nll["oracle"] < nll["pretrained"]
