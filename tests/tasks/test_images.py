"""The task of pictures: errors counted by hand, several nets, what does not fit."""

import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers import run, tasks
from jaxpapers.method import Method, State
from jaxpapers.papers.rocket import Predictions
from jaxpapers.tasks import images


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


def method(sampler):
    return Method(lambda *a: None, lambda *a: None, lambda *a: None, sampler)


def test_errors_are_those_counted_by_hand(config):
    def sampler(params, key, batch, extra):
        on = batch["image"][..., 0].reshape(len(batch["image"]), -1)[:, :10]
        guess = jnp.argmin(jnp.pad(on > 1.5, ((0, 0), (0, 1))), 1)
        logits = jnp.eye(10)[jnp.minimum(guess, 9)]
        return Predictions(logits, jnp.roll(logits, 1, 1))

    grid = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    task = tasks.load(config, method(sampler), grid)
    state = State(jnp.zeros(()), {}, (), (), jnp.zeros(()))
    found = task.evaluate(state)
    assert set(found) == {"validation_error", "validation_booster_error"}
    assert found["validation_error"] == 0
    assert found["validation_booster_error"] == 1
    base = task.baselines()
    labels = images.read(config).test.label
    train = np.bincount(images.read(config).train.label)
    expected = (labels != train.argmax()).mean()
    assert base["most frequent class"] == pytest.approx(expected)
    assert base["nearest class mean"] < 0.2


def test_pictures_have_to_fit_the_net(config):
    other = config.copy_and_resolve_references().unlock()
    other.net.size = 32
    with pytest.raises(ValueError, match="8, 8, 1"):
        images.read(other)
    other = run.load_config("rocket")
    with pytest.raises(FileNotFoundError, match="data.path"):
        images.read(other)
    wrong = run.load_config("rocket", ["--config.data.source=mnist"])
    with pytest.raises(ValueError, match="cifar-10"):
        images.read(wrong)


def test_shapes_are_those_of_the_batches(config):
    shapes = tasks.batch_shapes(config)
    grid = meshes.make_mesh({"data": 1}, jax.devices()[:1])
    task = tasks.load(config, method(lambda *a: jnp.zeros((16, 10))), grid)
    batch = task.examples.batch(0, config.data.batch)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in shapes.items()
    }
