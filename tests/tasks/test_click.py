"""The click task as a command runs it, on the original files' formats."""

import gzip
import json

import jax
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import papers, run, tasks
from jaxpapers.data import ctr, ctr_files
from jaxpapers.tasks import click

SMALL = {
    "data.source": "amazon", "data.batch": 8, "data.eval_batch": 8, "data.history": 4,
    "net.item_dim": 4, "net.cate_dim": 4, "train.steps": 2, "train.eval_every": 0,
}  # fmt: skip


@pytest.fixture
def amazon(tmp_path):
    """A folder as the Amazon files lie in it: 30 users, 12 products."""
    rng, folder = np.random.default_rng(0), tmp_path / "amazon"
    folder.mkdir()
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


@pytest.mark.parametrize("name", ["din", "dien"])
def test_each_paper_reads_its_own_protocol(amazon, name):
    config = run.load_config(f"{name}:paper", fields(amazon))
    assert config.data.protocol == name
    files = sorted(amazon.glob("reviews*")) + sorted(amazon.glob("meta*"))
    expected = ctr_files.amazon(*files, protocol=name)
    found = click.read(config)
    for split in ("train", "test"):
        for a, b in zip(getattr(found, split), getattr(expected, split)):
            np.testing.assert_array_equal(a, b)
    sizes = len(found.train.label), len(found.test.label)
    assert sizes != (0, 0) and (name == "dien") == (sum(sizes) == 60)


def test_a_run_beside_its_baselines(amazon, tmp_path):
    """Two seeds of DIN and its rivals, then the evaluation of what was saved."""
    workdir = str(tmp_path / "run")
    given = fields(amazon, **{"data.rivals": True})
    result = run.train("din:smoke", given, workdir=workdir, seeds=2, quiet=True)
    found = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert set(found["baselines"]) == {"popularity", "item mean"}
    names = {"this model", "Base, mean pooling", "logistic regression"}
    assert set(found["evaluations"]) == names
    assert all(len(x) == 2 for x in found["evaluations"].values())
    every = [
        x["validation_auc"] for rows in found["evaluations"].values() for x in rows
    ]
    assert all(0 <= x <= 1 for x in every) and len(set(every)) > 1
    assert 0 <= result["validation_auc"] <= 1
    again = run.evaluate(f"{workdir}/seed0")
    assert again["validation_auc"] == pytest.approx(
        found["evaluations"]["this model"][0]["validation_auc"], abs=1e-6
    )


def test_another_papers_models_are_trained_beside(amazon, tmp_path):
    """DIEN beside DIN and what DIN is beside, each in a folder of its own."""
    folder = tmp_path / "run"
    given = fields(amazon, **{"data.rivals": True})
    run.train("dien:smoke", given, workdir=str(folder), quiet=True)
    found = json.loads((folder / "comparison.json").read_text())["runs"]
    own = {"this model", "without auxiliary loss"}
    assert set(found) == own | {"DIN", "Base, mean pooling", "logistic regression"}
    assert json.loads((folder / "DIN" / "config.json").read_text())["paper"] == "din"
    alone = run.evaluate(str(folder / "DIN"))
    assert alone["validation_auc"] == pytest.approx(found["DIN"][0], abs=1e-6)


@pytest.mark.parametrize(
    "target, source, own",
    [
        ("dien:smoke", "ml-100k", True),
        ("sim:paper", "taobao", True),
        ("rocket:ml100k", "ml-100k", False),
        ("rocket:dien", "ml-100k", True),
        ("din:released", "amazon", False),
    ],
)
def test_every_click_model_has_the_same_rivals(target, source, own):
    """On the same rows, steps and seed; each is a config that its paper accepts."""
    given = ["--config.data.batch=100", "--config.data.rivals=True"]
    config = run.load_config(target, given)
    found = tasks.rivals(target.split(":")[0], config)
    names = {"Base, mean pooling", "logistic regression"} | ({"DIN"} if own else set())
    assert set(found) == names
    for name, rival in found.values():
        assert name == "din"
        assert config.data.source == source
        for group in ("data", "train"):
            mine, theirs = config[group].to_dict(), rival[group].to_dict()
            shared = set(mine) & set(theirs) - {"accumulate", "init_from"}
            assert len(shared) >= 7
            assert {k: mine[k] for k in shared} == {k: theirs[k] for k in shared}
        assert rival.method.mba == config.method.get("mba", 0.0)
        method = papers.load(name).make(rival)
        shapes = tasks.batch_shapes(rival)
        state = jax.eval_shape(method.init, jax.random.key(0), shapes)
        jax.eval_shape(method.update, state, shapes)
    linear = found["logistic regression"][1].net
    assert linear.item_dim == 1 and not linear.hidden
    if own:
        assert found["DIN"][1].net.pooling == "attention"
    assert not tasks.rivals("din", found["Base, mean pooling"][1])


def test_items_share_rows_by_a_hash(amazon):
    """Everywhere alike; padding and unknown stay; the table has the buckets' rows."""
    plain = run.load_config("din:paper", fields(amazon))
    config = run.load_config("din:paper", fields(amazon, **{"data.item_buckets": 5}))
    a, b = click.read(plain), click.read(config)
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
    complete, _ = click.prepare(config)
    assert complete.net.item_vocab == 7
    for name in ("popularity", "item_mean"):  # Of items, not of buckets.
        assert (getattr(ctr, name)(a) != getattr(ctr, name)(b)).any()
    mesh = meshes.make_mesh()
    found = [
        tasks.load(c, papers.load("din").make(c), mesh).baselines()
        for c in (click.prepare(plain)[0], complete)
    ]
    assert found[0] == found[1]


def test_missing_files_are_named():
    with pytest.raises(FileNotFoundError, match="reviews_.*and meta_.*ml-100k"):
        click.read(run.load_config("din:paper", ["--config.data.source=amazon"]))
