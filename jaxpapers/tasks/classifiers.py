"""Classifiers that reward and evaluate generated images, trained on real ones."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpapers.nets.critic import Classifier
from jaxpapers.ops import distance

BATCH, STEPS, RATE = 128, 600, 1e-3


class Trained(NamedTuple):
    """A classifier of images in [-1, 1], hidden layers of 128 and 64 units.

    Attributes:
      net: the module; gives logits (B, C) and features (B, 64).
      params: numpy arrays, so that any mesh can use them.
    """

    net: Any
    params: Any

    def __call__(self, x: Any) -> tuple[jax.Array, jax.Array]:
        """(logits, features) of images (B, H, W, C); jits."""
        return self.net.apply({"params": self.params}, x)


def zeros(shape: tuple[int, ...], classes: int) -> Trained:
    """A classifier of zeros: the shapes and cost of a trained one."""
    net = Classifier(classes=classes)
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(net.init, key, x)["params"]
    return Trained(net, jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), params))


def untrained(shape: tuple[int, ...], classes: int, seed: int = 0) -> Trained:
    """A classifier with drawn parameters."""
    net = Classifier(classes=classes)
    params = net.init(jax.random.key(seed), jnp.zeros((1, *shape)))["params"]
    return Trained(net, jax.device_get(params))


def train(image: np.ndarray, label: np.ndarray, classes: int, seed: int = 0) -> Trained:
    """A classifier after ``STEPS`` steps of Adam on ``BATCH`` images each.

    Args:
      image: (n, H, W, C) in [-1, 1].
      label: (n,) classes.
      classes: their number.
      seed: of parameters and batches.
    """
    classifier = untrained(image.shape[1:], classes, seed)
    x, y = jnp.asarray(image, jnp.float32), jnp.asarray(label, jnp.int32)
    params = _fit(classifier.net, classifier.params, x, y, jax.random.key(seed + 1))
    return classifier._replace(params=jax.device_get(params))


@functools.partial(jax.jit, static_argnums=0)
def _fit(net, params, x, y, key):
    """Parameters after training on images x of classes y; ``key`` draws the batches."""
    tx = optax.adam(RATE)

    def loss(params, index):
        logits, _ = net.apply({"params": params}, x[index])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[index]).mean()

    def step(carry, key):
        params, opt_state = carry
        index = jax.random.randint(key, (BATCH,), 0, len(y))
        updates, opt_state = tx.update(jax.grad(loss)(params, index), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    keys = jax.random.split(key, STEPS)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


def accuracy(classifier: Trained, x: np.ndarray, label: np.ndarray) -> float:
    """Accuracy of a classifier on images (n, H, W, C) of classes (n,).

    NaN if an image is not finite.
    """
    if not np.isfinite(x).all():
        return math.nan
    return float((predicted(classifier, x) == label).mean())


def predicted(classifier: Trained, x: np.ndarray) -> np.ndarray:
    """Classes (n,) of images; -1, which is none, where the logits are not finite."""
    scores = logits(classifier, x)
    return np.where(np.isfinite(scores).all(-1), scores.argmax(-1), -1)


def logits(classifier: Trained, x: np.ndarray) -> np.ndarray:
    """Logits (n, C) of images."""
    return _outputs(classifier, x)[0]


def features(classifier: Trained, x: np.ndarray) -> np.ndarray:
    """Features (n, 64) of images."""
    return _outputs(classifier, x)[1]


def frechet(classifier: Trained, x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of two sets of images in a classifier's features, float64.

    The square of a distance, as FID is; not comparable with FID, whose features are
    Inception's.
    """
    return frechet_of_features(features(classifier, x), features(classifier, y))


def frechet_of_features(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of two sets of features (n, F) and (m, F), in float64."""
    with jax.enable_x64():
        return float(_frechet(np.asarray(x, np.float64), np.asarray(y, np.float64)))


_frechet = jax.jit(distance.frechet_distance)


def _outputs(classifier, x):
    return jax.device_get(_apply(classifier.net, classifier.params, x))


@functools.partial(jax.jit, static_argnums=0)
def _apply(net, params, x):
    return net.apply({"params": params}, x)
