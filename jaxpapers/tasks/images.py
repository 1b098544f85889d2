"""Classification of pictures, measured by the error on held-out ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers import mesh as meshes
from jaxpapers.data import fetch, images
from jaxpapers.tasks import Task, named

SOURCES = ("digits", "cifar-10", "cifar-100", "svhn")


def batch_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global training batch."""
    n, net = config.data.batch, config.net
    shape = (n, net.size, net.size, net.channels)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32),
        "label": jax.ShapeDtypeStruct((n,), jnp.int32),
    }


def load(config: Any, method: Any, mesh: Any) -> Task:
    """Reads ``config.data`` and binds the evaluation to a method and mesh.

    The method's sampler gives logits; where it gives several nets' as a NamedTuple, the
    first is what is compared and each has its own number.
    """
    pictures = read(config)
    examples = images.examples(pictures, config.data.seed)
    size = config.data.eval_batch
    rows = meshes.batch_rows(mesh, size, name="data.eval_batch")
    score = jax.jit(
        lambda state, batch: method.sampler(
            state.params, jax.random.key(0), batch, state.extra
        ),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    test = pictures.test

    def evaluate(state, quick=False):
        del quick
        state = state._replace(opt_state=(), step=(), key=())
        wrong: dict[str, int] = {}
        with jax.set_mesh(mesh):
            for start in range(0, len(test.label), size):
                label = test.label[start : start + size]
                image = np.zeros((size, *test.image.shape[1:]), np.float32)
                image[: len(label)] = images.normalize(
                    pictures, test.image[start : start + size]
                )
                batch = meshes.put_batch({"image": image[rows]}, mesh, size)
                for name, logits in named(score(state, batch)).items():
                    guess = np.asarray(logits).argmax(-1)[: len(label)]
                    wrong[name] = wrong.get(name, 0) + int((guess != label).sum())
        return {
            f"validation_{name}error": count / len(test.label)
            for name, count in wrong.items()
        }

    return Task(
        examples,
        1,
        "pictures",
        "error",
        f"share of {len(test.label):,} test pictures that are wrong, {pictures.name}",
        evaluate,
        lambda: baselines(pictures),
        None,
        f"{pictures.name}: {len(examples):,} pictures to train on, "
        f"{len(test.label):,} to test, {pictures.classes} classes",
    )


def baselines(pictures: images.Pictures) -> dict[str, float]:
    """Errors of the most frequent class and of the nearest class mean."""
    train, test = pictures.train, pictures.test
    most = np.bincount(train.label).argmax()
    x, y = (s.image.reshape(len(s.label), -1) for s in (train, test))
    means = np.stack([x[train.label == c].mean(0) for c in range(pictures.classes)])
    distance = np.square(means).sum(1) - 2 * y @ means.T
    return {
        "most frequent class": float((test.label != most).mean()),
        "nearest class mean": float((distance.argmin(1) != test.label).mean()),
    }


def read(config: Any) -> images.Pictures:
    """The pictures that ``config.data`` names.

    Raises:
      ValueError: unknown source, or pictures that do not fit ``config.net``.
      FileNotFoundError: no files.
    """
    source, net = config.data.source, config.net
    pictures = _read(source, config.data.path)
    shape = (net.size, net.size, net.channels)
    found = pictures.train.image.shape[1:]
    if found != shape or pictures.classes != net.classes:
        raise ValueError(
            f"config.net: size, channels and classes are {shape[1:]} and {net.classes}, "
            f"but {source} has {found} and {pictures.classes}"
        )
    return pictures


@functools.lru_cache(maxsize=2)
def _read(source: str, path: str) -> images.Pictures:
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
