"""Samples like those of a data set: points by distances, pictures by features.

What a method samples is compared with data, beside what another draw of the data would
give (the two-sample floor) and a Gaussian fitted to the training data.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers.data import arrays, fetch, image_files, images, points
from jaxpapers.ops import chains, distance
from jaxpapers.papers.score_wasserstein.bound import warn_inexact
from jaxpapers.tasks import Task, judges

POINTS = ("swiss_roll", "moons", "clusters", "gaussian", "digit_components")
PICTURES = ("digits", "fashion", "mnist-5k", "cifar-10")
DIRECTIONS = 100
# Points of an exact distance: the assignment costs their cube.
EXACT = 2000
# Points that stand for the data's law where a method certifies a bound.
CERTIFIED = 256
SHOWN = 64


class Source(NamedTuple):
    """Real data.

    Attributes:
      train: (n, *X), pictures in [-1, 1].
      held_out: (m, *X), to compare with.
      judge: classifier that has seen neither ``train`` nor samples; None for points.
      name: for people.
    """

    train: np.ndarray
    held_out: np.ndarray
    judge: Any
    name: str


def batch_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global training batch."""
    shape = (config.data.batch, *config.net.shape)
    return {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}


def load(config: Any, method: Any, mesh: Any) -> Task:
    """Reads ``config.data`` and binds the evaluation to a method and mesh."""
    source = read(config)
    picture = source.judge is not None
    measure = functools.partial(_pictures if picture else _points, source)
    count = config.data.eval_count
    sample = _sampler(config, method, mesh, source)

    def evaluate(state, quick=False):
        found = measure(sample(state, 0, count), quick)
        values = {f"validation_{k}": v for k, v in found.items()}
        if not quick and _shortened(config):
            full = measure(sample(state, 0, count, full=True), True)
            values |= {f"validation_full_chain_{k}": v for k, v in full.items()}
        if not quick and not picture:
            # Beside the exact distances: those of as many points of the data themselves.
            floor = measure(source.train[:count], False)
            values |= {f"floor_{k}": v for k, v in floor.items() if k != "sliced_w2"}
        if method.diagnose:
            values |= _diagnosis(method, mesh, source, sample, state)
        return values

    return Task(
        arrays.Examples({"x": source.train}, config.data.seed),
        1,
        "pictures" if picture else "points",
        "frechet" if picture else "sliced_w2",
        ("Frechet distance" if picture else "sliced W2") + f" to {source.name}",
        evaluate,
        lambda: baselines(source, count),
        None,
        f"{source.name}: {len(source.train):,} to train on, "
        f"{len(source.held_out):,} held out",
        against=("certified_w2", {"bound": "xy="}) if method.diagnose else None,
        picture=lambda state: {
            "samples": sample(state, 2, SHOWN if picture else EXACT),
            "data": source.held_out[: SHOWN if picture else EXACT],
        },
    )


def baselines(source: Source, count: int) -> dict[str, float]:
    """The metric of training data, and of a Gaussian fitted to them."""
    measure = _points if source.judge is None else _pictures
    flat = source.train.reshape(len(source.train), -1).astype(np.float64)
    rng = np.random.default_rng(0)
    cov = np.atleast_2d(np.cov(flat, rowvar=False))
    drawn = rng.multivariate_normal(flat.mean(0), cov, count, method="eigh")
    drawn = drawn.reshape(count, *source.train.shape[1:]).astype(np.float32)
    # Samples are compared with what they were not learned from; pictures, whose held-out
    # part taught the judge, with what they were.
    other = source.train if source.judge is None else source.held_out
    found = {"two-sample floor": other[:count], "fitted Gaussian": drawn}
    return {
        name: next(iter(measure(source, x, True).values())) for name, x in found.items()
    }


def read(config: Any) -> Source:
    """The data that ``config.data`` names.

    Raises:
      ValueError: unknown source, or another shape than ``config.net.shape``.
      FileNotFoundError: no files.
    """
    c = config.data
    if c.eval_count < 2:
        raise ValueError(f"config.data.eval_count must be >= 2, got {c.eval_count}")
    shape = tuple(config.net.shape)
    dim = math.prod(shape)
    source = _read(c.source, c.path, c.spread, c.count, c.eval_count, c.seed, dim)
    if source.train.shape[1:] != shape:
        raise ValueError(
            f"config.net.shape is {shape}, but samples of {c.source} have the shape "
            f"{source.train.shape[1:]}"
        )
    return source


@functools.lru_cache(maxsize=2)
def _read(
    name: str,
    path: str,
    spread: float,
    count: int,
    eval_count: int,
    seed: int,
    dim: int,
) -> Source:
    if name not in POINTS + PICTURES:
        raise ValueError(
            f"config.data.source must be one of {POINTS + PICTURES}, got {name!r}"
        )
    if name == "digit_components":
        halves = points.digit_components(path or fetch.get("digits"), dim)
        return Source(*halves, None, f"scanned digits, {dim} components")
    if name in POINTS:
        make = getattr(points, name)
        if name in ("clusters", "gaussian"):  # In as many dimensions as the net has.
            make = functools.partial(make, dim=dim)
        # Other draws of the same law, never seen in training.
        held_out = make(eval_count, 1_000_003 + seed, spread)
        train = make(count, seed, spread)
        return Source(train, held_out, None, name.replace("_", " "))
    if name == "digits":
        own, other = images.digit_halves(path or fetch.get("digits"))
        return _judged(own, other, 10, "scanned digits")
    found = _files(name, path)
    return _judged(found.train, found.test, found.classes, found.name)


def _files(name, path):
    if name == "mnist-5k":
        return image_files.mnist_csv(path or fetch.get(name) / "mnist_5k.csv.gz")
    if not path:
        raise FileNotFoundError(
            f"config.data.path: not given; {name} needs its original files; "
            "--config.data.source=digits needs none"
        )
    if name == "fashion":
        return image_files.fashion(path, pooled=True)
    return images.cifar(path)


def _judged(own, other, classes, name):
    """A judge trained on ``other`` compares samples with the data they learned from."""
    signed = images.to_signed(other.image)
    judge = judges.train(signed, other.label, classes)
    return Source(images.to_signed(own.image), signed, judge, name)


def _sampler(config, method, mesh, source):
    """(state, seed, count, full) -> samples, numpy.

    Chains that start from noised data, where the method has such, get training data.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    from_data = config.method.get("start") == "data"

    @functools.partial(jax.jit, static_argnames=("count", "full"))
    def draw(state, key, start, count, full=False):
        options = {"chain": chains.full_chain(config.method)} if full else {}
        what = start if from_data else (count, *config.net.shape)
        found = method.sampler(state.params, key, what, extra=state.extra, **options)
        return jax.lax.with_sharding_constraint(found, replicated)

    def sample(state, seed, count, full=False, start=None):
        state = state._replace(opt_state=(), step=(), key=())
        start = source.train[:count] if start is None else start
        start = start if from_data else None
        key = jax.random.key(seed)
        with jax.set_mesh(mesh):
            if config.net.get("model") != "unet":
                return np.asarray(draw(state, key, start, count, full))
            # What a step of training holds, a rollout of as many rows holds too.
            size = min(config.pretrain.batch, count)
            parts = [
                np.asarray(draw(state, jax.random.fold_in(key, i), None, size, full))
                for i in range(-(-count // size))
            ]
            return np.concatenate(parts)[:count]

    return sample


def _diagnosis(method, mesh, source, sample, state):
    """What the method says of itself, and the distance that a certificate is for.

    Both take the same points for the data's law: two sets of 256 points of one law are a
    distance apart that has nothing to do with the model.
    """
    held = source.held_out[:CERTIFIED]
    with jax.set_mesh(mesh):
        found = jax.jit(method.diagnose)(
            state.params, state.extra, {"x": jnp.asarray(held)}, jax.random.key(1)
        )
    own = sample(state, 1, len(held), start=held)
    if "log_factor" in found:  # Compiled, it could not warn by itself.
        warn_inexact(float(found["log_factor"]))
    return {
        **{k: float(v) for k, v in found.items()},
        "certified_w2": distance.wasserstein_exact(own, held, 2.0),
    }


def _points(source, x, quick):
    held = source.held_out
    axes = distance.directions(jax.random.key(3), DIRECTIONS, math.prod(x.shape[1:]))
    own, other = (jnp.asarray(v.reshape(len(v), -1), jnp.float32) for v in (x, held))
    found = {"sliced_w2": float(distance.sliced_wasserstein(own, other, axes, 2.0))}
    if not quick:
        most = min(len(x), len(held), EXACT)
        for p in (1.0, 2.0):
            found[f"w{p:g}"] = distance.wasserstein_exact(x[:most], held[:most], p)
    return found


def _pictures(source, x, quick):
    del quick
    return {"frechet": judges.frechet(source.judge, x, source.train)}


def _shortened(config):
    return "sampler" in config.method and config.method.sampler != "ddpm"
