"""Classifiers that reward and judge generated pictures, trained on real ones."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpapers.nets.critic import Classifier
from jaxpapers.ops import distance

BATCH, STEPS, RATE = 128, 600, 1e-3


class Judge(NamedTuple):
    """A classifier of pictures in [-1, 1], hidden layers of 128 and 64 units.

    Attributes:
      net: the module; gives logits (B, C) and features (B, 64).
      params: numpy arrays, so that any mesh can use them.
    """

    net: Any
    params: Any

    def __call__(self, x: Any) -> tuple[jax.Array, jax.Array]:
        """(logits, features) of pictures (B, H, W, C); jits."""
        return self.net.apply({"params": self.params}, x)


def untrained(shape: tuple[int, ...], classes: int, seed: int = 0) -> Judge:
    """A classifier with drawn parameters: the shapes and cost of a trained one."""
    net = Classifier(classes=classes)
    params = net.init(jax.random.key(seed), jnp.zeros((1, *shape)))["params"]
    return Judge(net, jax.device_get(params))


def train(image: np.ndarray, label: np.ndarray, classes: int, seed: int = 0) -> Judge:
    """A classifier after ``STEPS`` steps of Adam on ``BATCH`` pictures each.

    Args:
      image: (n, H, W, C) in [-1, 1].
      label: (n,) classes.
      classes: their number.
      seed: of parameters and batches.
    """
    judge = untrained(image.shape[1:], classes, seed)
    tx = optax.adam(RATE)
    x, y = jnp.asarray(image, jnp.float32), jnp.asarray(label, jnp.int32)

    def loss(params, index):
        logits, _ = judge.net.apply({"params": params}, x[index])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[index]).mean()

    def step(carry, key):
        params, opt_state = carry
        index = jax.random.randint(key, (BATCH,), 0, len(y))
        updates, opt_state = tx.update(jax.grad(loss)(params, index), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def fit(params):
        keys = jax.random.split(jax.random.key(seed + 1), STEPS)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    return judge._replace(params=jax.device_get(fit(judge.params)))


def accuracy(judge: Judge, x: np.ndarray, label: np.ndarray) -> float:
    """Share of pictures that the judge takes for what they should be."""
    return float((_judge(judge, x)[0].argmax(-1) == label).mean())


def logits(judge: Judge, x: np.ndarray) -> np.ndarray:
    """Logits (n, C) of pictures."""
    return _judge(judge, x)[0]


def features(judge: Judge, x: np.ndarray) -> np.ndarray:
    """Features (n, 64) of pictures."""
    return _judge(judge, x)[1]


def frechet(judge: Judge, x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of two sets of pictures in the judge's features, float64.

    The square of a distance, as FID is; not comparable with FID, whose features are
    Inception's.
    """
    found = [features(judge, part) for part in (x, y)]
    with jax.enable_x64():
        wide = (jnp.asarray(f, jnp.float64) for f in found)
        return float(distance.frechet_distance(*wide))


def _judge(judge, x):
    return jax.device_get(_apply(judge.net, judge.params, x))


@functools.partial(jax.jit, static_argnums=0)
def _apply(net, params, x):
    return net.apply({"params": params}, x)
