"""Classification of images: errors counted by hand, several nets, what does not fit."""

import gzip

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import run, tasks
from jaxpapers.method import Method, State
from jaxpapers.papers.rocket import Predictions
from jaxpapers.study import with_fields
from jaxpapers.tasks import images

STATE = State(0, {}, (), (), 0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(0)
    with gzip.open(folder / "digits.csv.gz", "wt") as f:
        for i in range(1400):
            # The class is how many of the first pixels are on.
            row = rng.integers(0, 8, 64)
            row[: i % 10] = 16
            f.write(",".join(map(str, [*row, i % 10])) + "\n")
    return run.load_config(
        "rocket:digits",
        [f"--config.data.path={folder}", "--config.data.eval_batch=16"],
    )


@pytest.fixture(scope="module")
def grid():
    return meshes.make_mesh({"data": 1}, jax.devices()[:1])


def test_errors_are_those_counted_by_hand(config, grid):
    """Of the net that is compared, of the one beside it, and of no net."""

    chex.clear_trace_counter()

    @chex.assert_max_traces(n=1)  # The last batch is padded to the shape of the others.
    def predict(params, extra, batch):
        assert set(batch) == {"image"}
        on = batch["image"][..., 0].reshape(len(batch["image"]), -1)[:, :10]
        guess = jnp.argmin(jnp.pad(on > 1.5, ((0, 0), (0, 1))), 1)
        logits = jnp.eye(10)[jnp.minimum(guess, 9)]
        return Predictions(logits, jnp.roll(logits, 1, 1))

    study = tasks.study("rocket", config, tasks.read(config), grid)
    assert study.metric == "error" and not study.rising
    rows = {row.label: row for row in study.rows(3)}
    own, *others = rows.values()
    assert own.label == "this model" and own.stage.config.train.seed == 3
    finding = own.measure(Method(None, None, None, predict=predict), STATE)
    assert finding.numbers == {"error": 0, "booster_error": 1}
    dataset = images.load(config)
    most = np.bincount(dataset.train.label).argmax()
    expected = (dataset.test.label != most).mean()
    constant = rows["most frequent class"].measure().numbers
    assert constant["error"] == pytest.approx(expected)
    assert rows["nearest class mean"].measure().numbers["error"] < 0.2
    # The ablations differ from the model and are trained as long, with the same seed.
    trained = [row.stage.config for row in others if row.stage]
    assert {c.method.nets for c in trained} >= {"light", "booster"}
    assert all(c.train == own.stage.config.train for c in trained)


def test_logits_that_are_not_finite_have_no_error(config, grid):
    """The largest of NaN would be class 0."""

    def predict(params, extra, batch):
        first = (jnp.arange(len(batch["image"])) == 1)[:, None]
        logits = jnp.eye(10)[jnp.zeros(len(batch["image"]), jnp.int32)]
        return Predictions(logits, jnp.where(first, jnp.nan, logits))

    own = tasks.study("rocket", config, tasks.read(config), grid).rows(0)[0]
    with pytest.warns(
        RuntimeWarning, match="rows of booster_logits are NaN or inf.*: 1"
    ):
        numbers = own.measure(Method(None, None, None, predict=predict), STATE).numbers
    assert 0 < numbers["error"] < 1 and np.isnan(numbers["booster_error"])


def test_images_have_to_fit_the_net(config):
    with pytest.raises(ValueError, match="8, 8, 1"):
        images.load(with_fields(config, {"net.size": 32}))
    with pytest.raises(FileNotFoundError, match="data.path"):
        images.load(run.load_config("rocket"))
    wrong = run.load_config("rocket", ["--config.data.source=mnist"])
    with pytest.raises(ValueError, match="cifar-10"):
        images.load(wrong)


def test_shapes_are_those_of_the_batches(config):
    data = tasks.read(config)
    batch = data.examples.batch(0, config.data.batch)
    expected = {k: (v.shape, v.dtype) for k, v in batch.items()}
    for shapes in (data.shapes, tasks.abstract(config).shapes):
        assert {k: (v.shape, v.dtype) for k, v in shapes.items()} == expected
    assert data.unit == "images" and "1,348 images" in data.summary
