"""Classification of images, measured by the error on held-out ones."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.data import fetch, images
from jaxpapers.papers import rocket
from jaxpapers.study import Data, Finding, Row, Stage, Study, with_fields, with_seed
from jaxpapers.tasks.scores import all_finite, named, scorer

BASELINES = ("most frequent class", "nearest class mean")
SOURCES = ("digits", "cifar-10", "cifar-100", "svhn")


def abstract(config: Any) -> Data:
    """Shapes of a global training batch."""
    n, net = config.data.batch, config.net
    shape = (n, net.size, net.size, net.channels)
    return Data(
        None,
        {
            "image": jax.ShapeDtypeStruct(shape, jnp.float32),
            "label": jax.ShapeDtypeStruct((n,), jnp.int32),
        },
        unit="images",
    )


def read(config: Any) -> Data:
    """Training images of the source that ``config.data`` names."""
    dataset = load(config)
    examples = images.examples(dataset, config.data.seed)
    return abstract(config)._replace(
        examples=examples,
        summary=f"{dataset.name}: {len(examples):,} images to train on, "
        f"{len(dataset.test.label):,} to test, {dataset.classes} classes",
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The model, its ablations, and two classifiers without training."""
    del data  # Each stage reads the data of its config.
    dataset, size = load(config), config.data.eval_batch
    meshes.batch_rows(mesh, size, name="data.eval_batch")

    def trained(label, config):
        measure = functools.partial(_evaluate, size, dataset, mesh)
        return Row(label, Stage(name, config), lambda *run: Finding(measure(*run)))

    @functools.cache
    def errors():
        return baselines(dataset)

    def constant(label):
        return Row(label, None, lambda: Finding({"error": errors()[label]}))

    def rows(seed):
        seeded = with_seed(config, seed)
        variants = rocket.ablations(config) if name == "rocket" else {}
        return [
            trained("this model", seeded),
            *(trained(k, with_fields(seeded, v)) for k, v in variants.items()),
            *map(constant, BASELINES),
        ]

    return Study(
        title=f"error on {len(dataset.test.label):,} test images, {dataset.name}",
        metric="error",
        rising=False,
        rows=rows,
    )


def _evaluate(size, dataset, mesh, method, state) -> dict[str, float]:
    """Share of test images that each net of the method classifies wrongly.

    NaN, with a warning, if logits are not finite.
    """
    rows = meshes.batch_rows(mesh, size, name="data.eval_batch")
    score, test = scorer(method.predict, mesh), dataset.test
    every: dict[str, list[np.ndarray]] = {}
    with jax.set_mesh(mesh):
        for start in range(0, len(test.label), size):
            label = test.label[start : start + size]
            image = np.zeros((size, *test.image.shape[1:]), np.float32)
            image[: len(label)] = images.normalize(
                dataset, test.image[start : start + size]
            )
            batch = meshes.put_batch({"image": image[rows]}, mesh, size)
            for net, logits in named(score(state.params, state.extra, batch)).items():
                every.setdefault(net, []).append(np.asarray(logits)[: len(label)])
    return {
        f"{net}error": _error(np.concatenate(parts), test.label, net)
        for net, parts in every.items()
    }


def _error(logits, label, net):
    """Share of rows whose largest logit is that of another class."""
    if not all_finite(logits, f"rows of {net}logits"):
        return math.nan
    return float((logits.argmax(-1) != label).mean())


def baselines(dataset: images.Dataset) -> dict[str, float]:
    """Errors of the most frequent class and of the nearest class mean."""
    train, test = dataset.train, dataset.test
    most = np.bincount(train.label).argmax()
    x, y = (s.image.reshape(len(s.label), -1) for s in (train, test))
    means = np.stack([x[train.label == c].mean(0) for c in range(dataset.classes)])
    distance = np.square(means).sum(1) - 2 * y @ means.T
    guesses = (np.full(len(test.label), most), distance.argmin(1))
    return {k: float((x != test.label).mean()) for k, x in zip(BASELINES, guesses)}


def load(config: Any) -> images.Dataset:
    """The images that ``config.data`` names.

    Raises:
      ValueError: unknown source, or images that do not fit ``config.net``.
      FileNotFoundError: no files.
    """
    source, net = config.data.source, config.net
    dataset = _read(source, config.data.path)
    shape = (net.size, net.size, net.channels)
    actual = dataset.train.image.shape[1:]
    if actual != shape or dataset.classes != net.classes:
        raise ValueError(
            f"config.net: size, channels and classes are {shape[1:]} and {net.classes}, "
            f"but {source} has {actual} and {dataset.classes}"
        )
    return dataset


@functools.lru_cache(maxsize=2)
def _read(source: str, path: str) -> images.Dataset:
    if source not in SOURCES:
        raise ValueError(f"config.data.source must be one of {SOURCES}, got {source!r}")
    if source == "digits":
        return images.digits(path or fetch.get("digits"))
    if not path:
        raise FileNotFoundError(
            f"config.data.path: not given; {source} needs its original files, which its "
            "authors offer for download; --config.data.source=digits needs none"
        )
    if source == "svhn":
        return images.svhn(path)
    return images.cifar(path, int(source.removeprefix("cifar-")))
