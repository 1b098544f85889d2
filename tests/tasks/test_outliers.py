"""Rounds of mining end to end: the posterior, the scan, resuming, what is measured."""

import functools
import json

import chex
import jax
import numpy as np
import pytest

from jaxpapers import run, tasks
from jaxpapers import train as trainer
from jaxpapers.data import outliers
from jaxpapers.method import State
from jaxpapers.papers import poem
from jaxpapers.study import with_fields
from jaxpapers.tasks import outliers as task
from jaxpapers.tasks.mining import Miner
from tests.contract import grid
from tests.programs import together

SMALL = {
    "data.images": 32, "data.batch": 16, "data.eval_batch": 64, "net.hidden": (4, 4, 8),
    "net.norm": "group", "method.pool": 96, "method.pool_batch": 40, "train.steps": 8,
}  # fmt: skip


def small(**fields):
    arguments = {**SMALL, **{k.replace("__", "."): v for k, v in fields.items()}}
    return run.load_config(
        "poem:smoke", [f"--config.{k}={v}" for k, v in arguments.items()]
    )


@functools.cache
def method(select="poem"):
    config = small(method__select=select)
    return config, poem.make(config, images=config.data.images)


@functools.cache
def compiled(mesh="1x1", select="poem"):
    config, made = method(select)
    return trainer.compile(made, grid(mesh), tasks.abstract(config).shapes)


def miner(config):
    return Miner(task.load(config), *poem.read(config), 0)


def outputs(state, images, net):
    """Logits and features, in float64."""

    @jax.jit
    def apply(params, statistics, images):
        return poem.apply(params, statistics, images, net=net, train=False)[:2]

    images = images.astype(np.float32) / 255
    out = jax.device_get(apply(state.params, state.extra["net"], images))
    return [np.asarray(x, np.float64) for x in out]


# Init and the six programs of a round, on two meshes.
@pytest.mark.programs(40)
@pytest.mark.parametrize(
    "several",
    ["8x1", *(pytest.param(m, marks=pytest.mark.matrix) for m in ("4x2", "2x4"))],
)
def test_a_round_by_hand_on_one_device_and_on_several(several):
    """The posterior of the buffer in the features of now, and the nearest items."""
    config, _ = method()
    net, options = poem.read(config)
    own = miner(config)
    found = {}
    for mesh in ("1x1", several):
        state = compiled().init(jax.random.key(0))
        placed = jax.device_put(state, jax.NamedSharding(grid(mesh), jax.P()))
        ring = np.random.default_rng(0).integers(0, 2000, (4, 32)).astype(np.int32)
        state = placed._replace(
            extra={**placed.extra, "ring": jax.numpy.asarray(ring), "round": 6}
        )
        with jax.set_mesh(grid(mesh)):
            new = own.refresh(state)
        found[mesh] = jax.device_get(new.extra)
    got, sharded = found["1x1"], found[several]
    with jax.set_mesh(grid("1x1")):
        state = compiled().init(jax.random.key(0))
        items = np.asarray(poem.scanned(state.key, 6, size=2000, options=options))
        mined = own.data.pool.read(ring.reshape(-1))
        whole = np.concatenate([own.data.train.image, mined, own.data.pool.read(items)])
        _, z = outputs(state, whole, net)
    ids, *z = np.split(z, [32, 32 + ring.size])
    rows = np.concatenate([np.tile(ids, (4, 1)), z[0]])
    y = np.repeat([-3.0, 3.0], [4 * len(ids), ring.size])
    precision = rows.T @ rows / options.noise + np.eye(8) / options.prior
    mean = np.linalg.solve(precision, rows.T @ y / options.noise)
    np.testing.assert_allclose(got["posterior"].mean, mean, rtol=2e-3, atol=1e-3)
    order = items[np.argsort(np.abs(z[1] @ np.float64(got["w"])), kind="stable")[:32]]
    assert len(set(order) & set(got["ring"][2])) >= 31
    assert got["round"] == 7 and (got["ring"][[0, 1, 3]] == ring[[0, 1, 3]]).all()
    # The same choice on several devices, exactly; weights to rounding.
    np.testing.assert_array_equal(sharded["ring"], got["ring"])
    np.testing.assert_allclose(sharded["w"], got["w"], rtol=1e-3, atol=1e-4)


@pytest.mark.programs(40)
@pytest.mark.parametrize("select", ["greedy", "random"])
def test_other_choices(select):
    config, _ = method(select)
    net, options = poem.read(config)
    state = compiled(select=select).init(jax.random.key(0))
    with jax.set_mesh(grid("1x1")):
        got = miner(config).refresh(state).extra
        skipping = miner(with_fields(config, {"method.quantile": 0.25}))
        later = np.asarray(skipping.refresh(state).extra["ring"][0])
        items = np.asarray(poem.scanned(state.key, 0, size=2000, options=options))
        logits, _ = outputs(state, task.load(config).pool.read(items), net)
    chosen = np.asarray(got["ring"][0])
    assert set(chosen) <= set(items) and len(set(chosen)) == 32
    if select == "greedy":
        energy = np.log(np.exp(logits).sum(1))
        ranked = items[np.argsort(-energy)]
        assert len(set(ranked[:32]) & set(chosen)) >= 31
        assert len(set(ranked[24 : 24 + 32]) & set(later)) >= 31
    else:
        assert not (np.diff(chosen) > 0).all()


# Two runs of one program, the rounds', the checkpoints' own.
@pytest.mark.programs(40)
def test_resumed_between_and_in_rounds_bitwise(tmp_path):
    config, made = method()
    data = tasks.read(config)
    assert data.refresh[0] == 2

    def fit(steps, workdir=None):
        return trainer.fit(
            made, data.examples, compiled=compiled(), refresh=data.refresh, steps=steps,
            batch=16, mesh=grid("1x1"), workdir=workdir,
        )  # fmt: skip

    whole = fit(8)
    for steps in (3, 4, 8):
        parts = fit(steps, tmp_path / "run")
    keys = [jax.random.key_data(x.key) for x in (whole, parts)]
    chex.assert_trees_all_equal(*keys)
    chex.assert_trees_all_equal(whole._replace(key=0), parts._replace(key=0))
    assert (
        int(parts.extra["round"]) == 4 and (np.asarray(parts.extra["ring"]) >= 0).all()
    )
    assert np.asarray(parts.extra["posterior"].count) == 32 * 3 * 2


def test_batches_pair_images_with_the_rounds_outliers():
    config = small(method__outliers=2)
    own = miner(config)
    ring = np.full((4, 64), -1, np.int32)
    ring[1] = np.random.default_rng(0).permutation(2000)[:64]
    extra = {"ring": ring, "round": np.int32(2)}
    state = State(np.int32(4), {}, (), extra, ())
    pairs = own.examples(state)
    batches = [pairs.batch(start, 16) for start in (64, 80)]
    assert batches[0]["outlier"].shape == (16, 2, 8, 8, 1)
    assert batches[0]["image"].dtype == batches[0]["outlier"].dtype == np.float32
    # A round trains on each of its outliers once.
    seen = np.concatenate([b["outlier"].reshape(-1, 64) for b in batches])
    given = own.data.pool.read(ring[1]).reshape(-1, 64).astype(np.float32) / 255
    np.testing.assert_array_equal(seen[np.lexsort(seen.T)], given[np.lexsort(given.T)])
    part = pairs.batch(64, 16, slice(4, 8))
    np.testing.assert_array_equal(part["outlier"], batches[0]["outlier"][4:8])
    np.testing.assert_array_equal(part["image"], batches[0]["image"][4:8])


@pytest.mark.programs(60)
def test_what_a_row_reports(tmp_path, figures):
    """Numbers, tables, a threshold kept with the model, a picture of what was mined."""
    config = small(train__steps=4)
    study = tasks.study("poem", config, tasks.read(config), grid("1x1"))
    rows = study.rows(0)
    assert [r.label for r in rows] == [
        "this model", "greedy", "random outliers", "cross-entropy only",
        "reference covariance", "separate batches", "random, uniform labels",
        "greedy, C + 1 classes",
    ]  # fmt: skip
    for row in rows:
        poem.read(row.stage.config)  # Losses and nets of all rows fit.
    plain = with_fields(config, {"data.ablations": False})
    choices = tasks.study("poem", plain, tasks.read(plain), grid("1x1")).rows(0)
    assert [r.label for r in choices] == ["this model", "greedy", "random outliers"]
    _, made = method()
    data = tasks.read(config)
    state = trainer.fit(
        made, data.examples, compiled=compiled(), refresh=data.refresh, steps=4,
        batch=16, mesh=grid("1x1"),
    )  # fmt: skip
    finding = rows[0].measure(made, state)
    numbers = finding.numbers
    assert all(np.isfinite(x) for x in numbers.values())
    assert {"fpr95", "fpr95_mean", "auroc_mean", "accuracy", "found"} <= set(numbers)
    by_set, by_score = finding.tables
    assert [r[0] for r in by_set.rows] == ["letters", "noise"]
    assert by_set.rows[0][1] == numbers["fpr95"]
    (energy,) = [r for r in by_score.rows if r[0] == "energy"]
    assert energy[1] == pytest.approx(numbers["fpr95"], abs=0.02)
    scores = {r[0] for r in by_score.rows}
    assert scores == {
        "energy", "max softmax", "max logit", "odin", "mahalanobis", "nearest"
    }  # fmt: skip
    threshold = json.loads(finding.files["threshold.json"])
    assert threshold["score"] == "energy" and 0.95 <= threshold["tpr"] <= 1
    assert set(threshold["accepted"]) == {"letters", "noise"}
    mined = finding.files["mined.npz"]
    assert mined["image"].shape == (2, 24, 8, 8, 1) and mined["kind"].max() == 1
    # Letters found: by hand, of the choice of both rounds.
    letters = task.load(config).marks["letters"]
    with jax.set_mesh(grid("1x1")):
        offered = [
            np.asarray(
                poem.scanned(state.key, r, size=2000, options=poem.read(config)[1])
            )
            for r in (0, 1)
        ]
    taken = np.asarray(state.extra["ring"][:2])
    assert numbers["found"] == letters[taken].sum() / letters[np.array(offered)].sum()
    # As ``jaxpapers eval`` loads it, without a key.
    assert rows[0].measure(made, state._replace(key=())).numbers == numbers
    result = run.studies.Result(rows[0], [finding], [tmp_path])
    study.pictures["mined.png"]([result], tmp_path / "mined.png")
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes] == ["this model"]


def test_detection_scores_on_the_host(float64):
    """Those of ``poem.detection_score``, for each loss, and names of all."""
    logits = np.random.default_rng(0).normal(size=(5, 4))
    for loss in task.SCORES:
        extra = loss == "extra_class"
        config = small(
            method__loss=loss, net__outlier_class=extra, method__select="random"
        )
        score = functools.partial(poem.detection_score, options=poem.read(config)[1])
        got = task._detection(config, poem.Predictions(logits, None))
        np.testing.assert_allclose(got, together(score, logits), rtol=1e-12)
    assert set(task.SCORES) == set(poem.objective.LOSSES)
    older = small().unlock()
    del older.method.loss, older.net.outlier_class
    got = task._detection(older, poem.Predictions(logits, None))
    np.testing.assert_allclose(got, np.log(np.exp(logits).sum(1)))


def test_refuses(monkeypatch, tmp_path):
    for fields, words in (
        ({"data__source": "words"}, "config.data.source"),
        ({"data__easy": "none"}, "config.data.easy"),
        ({"net__size": 16}, r"say \(32, 16, 16, 1, 10\), but generated has \(32, 8, 8"),
    ):
        with pytest.raises(ValueError, match=words):
            tasks.read(small(**fields))
    few = miner(small(method__pool=40, method__pool_batch=40))
    state = compiled().init(jax.random.key(0))
    few = few._replace(
        data=few.data._replace(pool=outliers.Pool(few.data.pool.images[:20]))
    )
    with jax.set_mesh(grid("1x1")):
        with pytest.raises(ValueError, match="32 outliers are to be chosen of 20"):
            few.refresh(state)
        broken = jax.tree.map(lambda x: np.full(x.shape, np.nan), state.params)
        with pytest.raises(
            ValueError, match="40 of 40 scores of the pool are not fini"
        ):
            miner(small(method__pool=40, method__pool_batch=40)).refresh(
                state._replace(params=broken)
            )


@pytest.mark.slow
def test_letters_among_clothes(tmp_path):
    """The gates of docs/results.md; fetches digits, clothes and photos."""
    fields = ["--config.data.ablations=False", "--config.train.eval_every=0"]
    try:
        summary = run.run(
            "poem", fields, workdir=str(tmp_path), seeds=3, mesh="data:1", quiet=True
        )
    except FileNotFoundError as e:
        pytest.skip(str(e))
    found = {
        row["label"]: {k: [n[k] for n in row["numbers"]] for k in row["numbers"][0]}
        for row in summary.content["rows"]
    }
    own, random = found["this model"], found["random outliers"]
    assert np.mean(own["fpr95"]) <= min(0.10, 0.65 * np.mean(random["fpr95"]))
    assert all(a < b for a, b in zip(own["fpr95"], random["fpr95"]))
    assert np.mean(own["auroc_mean"]) >= 0.992
    assert np.mean(own["accuracy"]) >= np.mean(random["accuracy"]) - 0.01
    assert np.mean(own["found"]) >= 0.85
