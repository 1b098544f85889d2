"""Click prediction: protocols, rows beside the model, items that share a table's rows."""

import gzip
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import papers, run, tasks
from jaxpapers.data import ctr, ctr_files
from jaxpapers.method import Method, State
from jaxpapers.study import with_fields
from jaxpapers.tasks import click
from tests import clicks

SMALL = {
    "data.source": "amazon", "data.batch": 8, "data.eval_batch": 8, "data.history": 4,
    "net.item_dim": 4, "net.cate_dim": 4, "train.steps": 2, "train.eval_every": 0,
}  # fmt: skip
STATE = State(0, {}, (), (), 0)


@pytest.fixture(scope="module")
def amazon(tmp_path_factory):
    """A folder as the Amazon files lie in it: 30 users, 12 products."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("amazon")
    reviews, meta = folder / "reviews_X.json.gz", folder / "meta_X.json.gz"
    with gzip.open(reviews, "wt") as f:
        for user in range(30):
            for t, item in enumerate(rng.permutation(12)[: 3 + user % 4]):
                row = {
                    "asin": f"p{item}",
                    "reviewerID": f"u{user}",
                    "unixReviewTime": t,
                }
                f.write(f"{row}\n")
    with gzip.open(meta, "wt") as f:
        for item in range(12):
            f.write(
                f"{ {'asin': f'p{item}', 'categories': [['x', f'c{item % 3}']]} }\n"
            )
    return folder


def fields(folder, **more):
    given = {**SMALL, "data.path": folder, **more}
    return [f"--config.{k}={v}" for k, v in given.items()]


def rows_of(name, config, seed=0, mesh="data:1"):
    shape = meshes.parse_mesh(mesh)
    grid = meshes.make_mesh(shape, jax.devices()[: shape["data"]])
    study = tasks.study(name, config, tasks.read(config), grid)
    assert study.metric == "auc" and study.rising
    return {row.label: row for row in study.rows(seed)}


@pytest.mark.parametrize("name", ["din", "dien"])
def test_each_paper_reads_its_own_protocol(amazon, name):
    config = run.load_config(f"{name}:paper", fields(amazon))
    assert config.data.protocol == name
    files = sorted(amazon.glob("reviews*")) + sorted(amazon.glob("meta*"))
    expected = ctr_files.amazon(*files, protocol=name)
    clicks = click.load(config)
    for split in ("train", "test"):
        for a, b in zip(getattr(clicks, split), getattr(expected, split)):
            np.testing.assert_array_equal(a, b)
    sizes = len(clicks.train.label), len(clicks.test.label)
    assert sizes != (0, 0) and (name == "dien") == (sum(sizes) == 60)


@pytest.mark.parametrize("mesh", ["data:1", "data:8"])
def test_scores_are_measured_on_the_test_rows(amazon, mesh):
    """In batches that do not divide their number, on one device and on several."""
    config = run.load_config("din:smoke", fields(amazon))
    own = rows_of("din", config, mesh=mesh)["this model"]
    samples = click.load(config).test
    assert len(samples.label) % config.data.eval_batch

    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)  # The last batch is padded to the shape of the others.
    def predict(params, extra, batch):
        return batch["item"] + 100.0 * batch["user"]

    numbers = own.measure(Method(None, None, None, predict=predict), STATE).numbers
    score = samples.item + 100.0 * samples.user
    pairs = [
        (score[i] > score[j]) + 0.5 * (score[i] == score[j])
        for i in np.flatnonzero(samples.label)
        for j in np.flatnonzero(samples.label == 0)
    ]
    assert numbers["auc"] == pytest.approx(np.mean(pairs))
    assert set(numbers) == {"auc", "gauc"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_named(amazon, value):
    config = run.load_config("din:smoke", fields(amazon))
    own = rows_of("din", config)["this model"]
    user = click.load(config).test.user

    def predict(params, extra, batch):
        return jnp.where(batch["user"] == user[0], value, batch["item"] * 1.0)

    broken = np.flatnonzero(user == user[0])
    text = f"{len(broken)} of {len(user)} scores of test rows are NaN or infinite: "
    with pytest.warns(RuntimeWarning, match=text + ", ".join(map(str, broken[:10]))):
        measured = own.measure(Method(None, None, None, predict=predict), STATE)
    assert all(map(np.isnan, measured.numbers.values()))
    assert set(measured.numbers) == {"auc", "gauc"}


@pytest.fixture
def taobao(tmp_path):
    """A log from which one test row for each user is made."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "UserBehavior.csv", "w") as f:
        for user in range(1, 41):
            for _ in range(rng.integers(4, 9)):
                item, at = rng.integers(1, 30), 1511539200 + rng.integers(0, 800000)
                f.write(f"{user},{item},{item % 5 + 1},pv,{at}\n")
    return tmp_path


def test_gauc_is_left_out_where_no_user_has_both_classes(taobao, mesh="data:1"):
    """With a note, before anything is trained."""
    config = run.load_config("din:smoke", fields(taobao, **{"data.source": "taobao"}))
    data = tasks.read(config)
    assert data.summary.endswith(click.WITHOUT_GAUC)
    grid = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    study = tasks.study("din", config, data, grid)
    assert study.columns == ()
    method = Method(
        None, None, None, predict=lambda params, extra, batch: batch["item"]
    )
    numbers = study.rows(0)[0].measure(method, STATE).numbers
    assert list(numbers) == ["auc"] and 0 <= numbers["auc"] <= 1


def test_test_rows_of_one_class_are_refused(amazon, monkeypatch):
    config = run.load_config("din:smoke", fields(amazon))
    clicks = click.load(config)
    ones = clicks.test._replace(label=np.ones_like(clicks.test.label))
    monkeypatch.setattr(click, "_read", lambda *_: clicks._replace(test=ones))
    click._load.cache_clear()
    with pytest.raises(ValueError, match=f"{len(ones.label)} test rows are positive"):
        tasks.read(config)
    click._load.cache_clear()


def test_rows_of_a_model_and_of_those_beside_it(amazon):
    """Stages of the same data, seed and steps; each is a config of its paper."""
    config = run.load_config("dien:smoke", fields(amazon, **{"data.baselines": True}))
    rows = rows_of("dien", config, seed=5)
    assert list(rows) == [
        "this model", "without auxiliary loss", "Base, mean pooling",
        "logistic regression", "DIN", "popularity", "item mean",
    ]  # fmt: skip
    clicks, own = click.load(config), ("this model", "without auxiliary loss")
    for label, row in rows.items():
        if label in ("popularity", "item mean"):
            assert row.stage is None and 0 <= row.measure().numbers["auc"] <= 1
            continue
        c = row.stage.config
        assert row.stage.paper == ("dien" if label in own else "din")
        assert (c.train.seed, c.train.steps, c.data.batch) == (5, 2, 8)
        assert c.net.item_vocab == clicks.rows["item"] and c.data.path == str(amazon)
    plain = rows["without auxiliary loss"].stage.config
    assert config.method.aux_weight and plain.method.aux_weight == 0
    assert rows["Base, mean pooling"].stage.config.net.pooling == "mean"


@pytest.mark.matrix
@pytest.mark.programs(80)  # Four models of two papers.
def test_a_run_beside_its_baselines(amazon, tmp_path):
    """Two seeds of DIN and its baselines, then the evaluation of what was saved."""
    given = fields(amazon, **{"train.alone": False})
    summary = run.run("din:smoke", given, workdir=str(tmp_path), seeds=2, quiet=True)
    rows = {row["label"]: row for row in summary.content["rows"]}
    trained = {"this model", "Base, mean pooling", "logistic regression"}
    assert set(rows) == trained | {"popularity", "item mean"}
    values = {k: [n["auc"] for n in row["numbers"]] for k, row in rows.items()}
    assert all(len(x) == 2 for x in values.values())
    every = [x for k in trained for x in values[k]]
    assert all(0 <= x <= 1 for x in every) and len(set(every)) > 1
    for label in trained:
        folder = tmp_path / rows[label]["folders"][0]
        stored = json.loads((folder / "config.json").read_text())
        assert stored["paper"] == "din" and stored["label"] == label
        again = run.evaluate(str(folder))
        assert again["auc"] == pytest.approx(values[label][0], abs=1e-6)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "target, source, own",
    [
        ("dien:smoke", "generated", True),
        pytest.param("sim:paper", "taobao", True, marks=pytest.mark.matrix),
        ("rocket:ml100k", "ml-100k", False),
        pytest.param("rocket:dien", "ml-100k", True, marks=pytest.mark.matrix),
        ("din:released", "amazon", False),
    ],
)
def test_every_click_model_has_the_same_baselines(target, source, own):
    """On the same rows, steps and seed; each is a config that its paper accepts."""
    given = ["--config.data.batch=100", "--config.data.baselines=True"]
    config = run.load_config(target, given)
    models = click.baselines(target.split(":")[0], config)
    names = {"Base, mean pooling", "logistic regression"} | ({"DIN"} if own else set())
    assert set(models) == names
    for name, model in models.values():
        assert name == "din"
        assert config.data.source == source
        for group in ("data", "train"):
            mine, theirs = config[group].to_dict(), model[group].to_dict()
            shared = set(mine) & set(theirs) - {"accumulate", "init_from"}
            assert len(shared) >= 7
            assert {k: mine[k] for k in shared} == {k: theirs[k] for k in shared}
        assert model.method.mba == config.method.get("mba", 0.0)
        data = tasks.abstract(model)
        method, shapes = papers.load(name).make(model, **data.facts), data.shapes
        state = jax.eval_shape(method.init, jax.random.key(0), shapes)
        jax.eval_shape(method.update, state, shapes)
    linear = models["logistic regression"][1].net
    assert linear.item_dim == 1 and not linear.hidden
    if own:
        assert models["DIN"][1].net.pooling == "attention"
    assert not click.baselines("din", models["Base, mean pooling"][1])
    alone = with_fields(config, {"data.baselines": False})
    assert not click.baselines(target.split(":")[0], alone)


def test_items_share_rows_by_a_hash(amazon):
    """Everywhere alike; padding and unknown stay; the table has the buckets' rows."""
    plain = run.load_config("din:paper", fields(amazon))
    config = run.load_config("din:paper", fields(amazon, **{"data.item_buckets": 5}))
    a, b = click.load(plain), click.load(config)
    pairs = set()
    for old, new in ((a.train, b.train), (a.test, b.test), (a.log, b.log)):
        assert not set(old.item) & {0, 1}
        pairs |= set(zip(old.item.tolist(), new.item.tolist()))
        np.testing.assert_array_equal(old.cate, new.cate)
    assert len(pairs) == len({old for old, _ in pairs}) > 5  # A function of the item.
    assert {new for _, new in pairs} <= set(range(2, 7))
    # Negatives that a source brings are items too; their categories stay.
    brought = a._replace(negatives=(a.log.item[::-1], a.log.cate[::-1]))
    item, cate = click.hash_items(brought, 5).negatives
    np.testing.assert_array_equal(item, b.log.item[::-1])
    np.testing.assert_array_equal(cate, a.log.cate[::-1])
    # Popularity is of items, not of buckets; the model has the buckets' rows.
    for name in ("popularity", "item_mean"):
        assert (getattr(ctr, name)(a) != getattr(ctr, name)(b)).any()
    each, shared = (rows_of("din", c) for c in (plain, config))
    assert shared["this model"].stage.config.net.item_vocab == 7
    for label in ("popularity", "item mean"):
        assert shared[label].measure() == each[label].measure()


@pytest.mark.parametrize(
    "names, found",
    [
        ("reviews_E_5.json.gz meta_E.json.gz", "reviews_E_5.json.gz"),  # 2014
        ("E_5.json.gz meta_E.json.gz", "E_5.json.gz"),  # 2018
        ("E.jsonl.gz meta_E.jsonl.gz", "E.jsonl.gz"),  # 2023
        ("reviews_E.json reviews_F.json meta_E.json", None),
        ("E.jsonl meta_E.jsonl meta_F.jsonl", None),
    ],
)
def test_files_of_every_release_and_of_one_department(tmp_path, names, found):
    for name in names.split():
        (tmp_path / name).touch()
    if found is None:
        with pytest.raises(
            ValueError, match="has several files like .*a folder of its"
        ):
            click._files("amazon", str(tmp_path))
        return
    reviews, meta = click._files("amazon", str(tmp_path))
    assert reviews.name == found and meta.name.startswith("meta_E")


def test_data_without_a_test_split_are_refused_before_training(monkeypatch):
    """Not after it, when they are to be measured."""
    config = clicks.config("din:smoke", clicks.SIZES)
    data = click.load(config)
    nothing = ctr.Samples(*(x[:0] for x in data.test))
    click._load.cache_clear()
    monkeypatch.setattr(click, "_read", lambda *_: data._replace(test=nothing))
    with pytest.raises(ValueError, match="test: no samples"):
        click.load(config)
    click._load.cache_clear()


def test_missing_files_are_named():
    with pytest.raises(FileNotFoundError, match="reviews_.*and meta_.*ml-100k"):
        click.load(run.load_config("din:paper", ["--config.data.source=amazon"]))
