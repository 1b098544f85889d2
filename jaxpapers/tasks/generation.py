"""Samples like those of a data set: points by distances, images by features.

Beside the samples' distances stand those of other real data (the two-sample floor) and of
a Gaussian fitted to the training data.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers import figures
from jaxpapers.data import arrays, fetch, image_files, images, points
from jaxpapers.data.files import refuse_path
from jaxpapers.ops import diffusion, distance
from jaxpapers.ops.schedules import NoiseSchedule, Sampler, reverse_schedule
from jaxpapers.papers import sft_pg
from jaxpapers.papers.score_wasserstein.bound import warn_inexact
from jaxpapers.study import Data, Finding, Row, Stage, Study, with_fields, with_seed
from jaxpapers.tasks import classifiers
from jaxpapers.tasks.scores import all_finite

POINTS = ("swiss_roll", "moons", "clusters", "gaussian", "digit_components")
IMAGES = ("digits", "fashion", "mnist-5k", "cifar-10")
BASELINES = ("two-sample floor", "fitted Gaussian")
DIRECTIONS = 100
# Points of an exact distance: the assignment costs their cube.
EXACT = 2000
# Points of the data distribution in a certificate.
CERTIFIED = 256
SHOWN = 64


class Source(NamedTuple):
    """Real data.

    Attributes:
      train: (n, *X), images in [-1, 1].
      held_out: (m, *X), which no model is trained on.
      classifier: of images, trained on ``held_out``; None for points.
      name: shown in titles.
    """

    train: np.ndarray
    held_out: np.ndarray
    classifier: Any
    name: str


def abstract(config: Any) -> Data:
    """Shapes of a global training batch."""
    shape = (config.data.batch, *config.net.shape)
    unit = "images" if config.data.source in IMAGES else "points"
    return Data(None, {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, unit=unit)


def read(config: Any) -> Data:
    """Training samples of the source that ``config.data`` names."""
    source = load(config)
    return abstract(config)._replace(
        examples=arrays.Examples({"x": source.train}, config.data.seed),
        summary=f"{source.name}: {len(source.train):,} to train on, "
        f"{len(source.held_out):,} held out",
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The model, its ablations, the model before tuning, and two untrained baselines."""
    del data  # Each stage reads the data of its config.
    source, certified = load(config), name == "score_wasserstein"
    points = source.classifier is None
    shown = EXACT if points else SHOWN
    # All rows sample by this config, the pretrained model too.
    sample = _sampling(config, mesh, source)
    numbers = functools.partial(_evaluate, config, mesh, source, sample)

    def measure(method, state):
        samples = sample(method, state, 2, shown)
        arrays = {"samples": samples, "data": source.held_out[:shown]}
        return Finding(numbers(method, state), files={"samples.npz": arrays})

    def measured(label, config, after=None):
        watch = functools.partial(numbers, quick=True)
        return Row(label, Stage(name, config, after), measure, watch=watch)

    def rows(seed):
        seeded = with_seed(config, seed)
        first = sft_pg.pretraining(seeded) if name == "sft_pg" else None
        before = [measured("before tuning", first)] if first else []
        rows = [measured("this model", seeded, *(row.stage for row in before)), *before]
        if certified and config.net.regularizer == "none":
            # The paper's two ways to lower the constant.
            for label, value in (
                ("spectral norm", "spectral"),
                ("weight clip", "clip"),
            ):
                rows.append(
                    measured(label, with_fields(seeded, {"net.regularizer": value}))
                )
        return rows + [
            Row(label, None, functools.partial(constant, label)) for label in BASELINES
        ]

    @functools.cache
    def constant(label):
        draws = baselines(source, config.data.eval_count)
        return Finding(_distances(source, draws[label], False))

    pictures = {"samples.png": figures.samples}
    if certified:
        pictures["against.png"] = functools.partial(
            figures.against,
            x="validation_certified_w2",
            panels={"validation_bound": "xy="},
        )
    return Study(
        title=("sliced W2" if points else "Frechet distance") + f" to {source.name}",
        metric="sliced_w2" if points else "frechet",
        rising=False,
        rows=rows,
        columns=("w1", "w2") if points else (),
        pictures=pictures,
        states=("samples.png",),
    )


def baselines(source: Source, count: int) -> dict[str, np.ndarray]:
    """Other real data, the floor of every distance, and samples of a fitted Gaussian."""
    flat = source.train.reshape(len(source.train), -1).astype(np.float64)
    rng = np.random.default_rng(0)
    cov = np.atleast_2d(np.cov(flat, rowvar=False))
    gaussian = rng.multivariate_normal(flat.mean(0), cov, count, method="eigh")
    gaussian = gaussian.reshape(count, *source.train.shape[1:]).astype(np.float32)
    # Points are compared with held-out data; images with training data, because the
    # held-out ones trained the classifier.
    other = source.train if source.classifier is None else source.held_out
    return dict(zip(BASELINES, (other[:count], gaussian)))


def load(config: Any) -> Source:
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
    if name not in POINTS + IMAGES:
        raise ValueError(
            f"config.data.source must be one of {POINTS + IMAGES}, got {name!r}"
        )
    if name == "digit_components":
        halves = points.digit_components(path or fetch.get("digits"), dim)
        return Source(*halves, None, f"scanned digits, {dim} components")
    if name in POINTS:
        refuse_path(path, name, ("digit_components", *IMAGES))
        make = getattr(points, name)
        if name in ("clusters", "gaussian"):  # In as many dimensions as the net has.
            make = functools.partial(make, dim=dim)
        # Other draws of the same distribution.
        held_out = make(eval_count, 1_000_003 + seed, spread)
        train = make(count, seed, spread)
        return Source(train, held_out, None, name.replace("_", " "))
    if name == "digits":
        train, held_out = images.digit_halves(path or fetch.get("digits"))
        return _classified(train, held_out, 10, "scanned digits")
    dataset = _files(name, path)
    return _classified(dataset.train, dataset.test, dataset.classes, dataset.name)


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


def _classified(train, held_out, classes, name):
    """Images, with a classifier trained on the held-out ones for its features."""
    signed = images.to_signed(held_out.image)
    classifier = classifiers.train(signed, held_out.label, classes)
    return Source(images.to_signed(train.image), signed, classifier, name)


def _evaluate(
    config, mesh, source, sample, method, state, quick=False
) -> dict[str, float]:
    """Distances of the samples and the method's diagnostics."""
    count = config.data.eval_count
    values = _distances(source, sample(method, state, 0, count), quick)
    if not quick and "sampler" in config and config.sampler.name != "ddpm":
        full = sample(method, state, 0, count, full=True)
        values |= {
            f"full_chain_{k}": v for k, v in _distances(source, full, True).items()
        }
    if not method.diagnose:
        return values
    # Bound and distance are of the same points: two sets of 256 points of one
    # distribution are far apart already.
    held = source.held_out[:CERTIFIED]
    with jax.set_mesh(mesh):
        diagnosis = _jitted(method.diagnose)(
            state.params, state.extra, {"x": jnp.asarray(held)}, jax.random.key(1)
        )
    if "log_factor" in diagnosis:  # Compiled, it could not warn by itself.
        warn_inexact(float(diagnosis["log_factor"]))
    samples = sample(method, state, 1, len(held), start=held)
    finite = all_finite(samples, "certified samples")
    return {
        **values,
        **{k: float(v) for k, v in diagnosis.items()},
        "certified_w2": distance.wasserstein_exact(samples, held, 2.0)
        if finite
        else math.nan,
    }


@functools.lru_cache(maxsize=4)
def _jitted(f: Callable) -> Callable:
    return jax.jit(f)


def _sampling(config: Any, mesh: Any, source: Source) -> Callable:
    """(method, state, seed, count, full, start) -> samples, numpy.

    ``full``: in all steps of training instead of the config's. ``start``: data that
    trajectories of ``method.start=data`` start from, noised; None: training data.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    from_data = config.method.get("start") == "data"

    @functools.cache
    def compiled(sampler, full):
        options = {}
        if "sampler" in config:
            noise = NoiseSchedule(**config.noise)
            options["schedule"] = (
                diffusion.ddpm_schedule(noise.variances())
                if full
                else reverse_schedule(noise, Sampler(**config.sampler))
            )

        @functools.partial(jax.jit, static_argnames="count")
        def draw(params, extra, key, start, count):
            start = start if from_data else (count, *config.net.shape)
            samples = sampler(params, key, start, extra=extra, **options)
            return jax.lax.with_sharding_constraint(samples, replicated)

        return draw

    def sample(method, state, seed, count, full=False, start=None):
        start = source.train[:count] if start is None else start
        start = start if from_data else None
        draw = functools.partial(
            compiled(method.sampler, full), state.params, state.extra
        )
        key = jax.random.key(seed)
        with jax.set_mesh(mesh):
            if config.net.get("model") != "unet":
                return np.asarray(draw(key, start, 0 if from_data else count))
            # In batches of pretraining, whose memory is known to suffice.
            size = min(config.get("pretrain", config.data).batch, count)
            parts = [
                np.asarray(draw(jax.random.fold_in(key, i), None, size))
                for i in range(-(-count // size))
            ]
            return np.concatenate(parts)[:count]

    return sample


def _distances(source: Source, x: np.ndarray, quick: bool) -> dict[str, float]:
    """Frechet distance of images, Wasserstein distances of points; quick: only sliced.

    NaN, with a warning, if a sample is not finite.
    """
    finite = all_finite(x, "samples")
    if source.classifier is not None:
        return {"frechet": classifiers.frechet(source.classifier, x, source.train)}
    held = source.held_out
    flat = [v.reshape(len(v), -1).astype(np.float32) for v in (x, held)]
    sliced = _sliced(*flat)
    if quick:
        return {"sliced_w2": float(sliced)}
    most = min(len(x), len(held), EXACT)
    exact = {
        f"w{p:g}": distance.wasserstein_exact(x[:most], held[:most], p)
        if finite
        else math.nan
        for p in (1.0, 2.0)
    }
    return {"sliced_w2": float(sliced), **exact}


@jax.jit
def _sliced(x, y):
    axes = distance.directions(jax.random.key(3), DIRECTIONS, x.shape[1])
    return distance.sliced_wasserstein(x, y, axes, 2.0)
