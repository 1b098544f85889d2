"""The click task as a command runs it, on the original files' formats."""

import gzip
import json

import numpy as np
import pytest

from jaxpapers import run
from jaxpapers.data import ctr_files
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
    result = run.train(
        "din:smoke", fields(amazon), workdir=workdir, seeds=2, quiet=True
    )
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


def test_missing_files_are_named():
    with pytest.raises(FileNotFoundError, match="reviews_.*and meta_.*ml-100k"):
        click.read(run.load_config("din:paper", ["--config.data.source=amazon"]))
