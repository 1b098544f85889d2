"""Detection of inputs of no class, by classifiers trained with mined outliers."""

import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import figures
from jaxpapers import mesh as meshes
from jaxpapers.data import fetch, image_files, mnist, outliers, pools
from jaxpapers.data.files import refuse_path
from jaxpapers.data.outliers import Detection
from jaxpapers.ops import detection, ood
from jaxpapers.papers import poem
from jaxpapers.study import (
    Data,
    Finding,
    Row,
    Stage,
    Study,
    Table,
    with_fields,
    with_seed,
)
from jaxpapers.tasks.mining import Miner, ids
from jaxpapers.tasks.scores import all_finite, scorer

SOURCES = ("letters", "generated", *pools.ORIGINAL)
EASY = ("fashion", "patterns")
# Name of the detection score that goes with a loss.
SCORES = {"energy": "energy", "uniform": "max softmax", "extra_class": "log odds"}
RECENT = 3
"""Last rounds whose choice is measured."""


def abstract(config: Any) -> Data:
    """Shapes of a global training batch."""
    n, net = config.data.batch, config.net
    shape = (net.size, net.size, net.channels)
    shapes = {
        "image": jax.ShapeDtypeStruct((n, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((n,), jnp.int32),
    }
    if config.method.select != "none":
        each = (n, config.method.outliers, *shape)
        shapes["outlier"] = jax.ShapeDtypeStruct(each, jnp.float32)
    return Data(None, shapes, {"images": config.data.images}, unit="images")


def read(config: Any) -> Data:
    """ID images, and the outliers that each round chooses from the pool."""
    data, c = load(config), config.data
    plan = abstract(config)._replace(
        summary=f"{len(data.train.label):,} {data.name}: a pool of {len(data.pool):,}, "
        "tests against "
        + ", ".join(f"{len(x):,} {k}" for k, x in data.outliers.items())
    )
    if config.method.select == "none":
        return plan._replace(examples=ids(data, c.seed))
    miner = Miner(data, *poem.read(config), c.seed)
    every = math.ceil(c.images / c.batch)
    return plan._replace(examples=miner.examples, refresh=(every, miner.refresh))


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The mined model, other choices of outliers, and no outliers."""
    del data  # Each stage reads the data of its config.
    content, size = load(config), config.data.eval_batch
    meshes.batch_rows(mesh, size, name="data.eval_batch")
    near = next(iter(content.outliers))

    def row(label, own):
        measure = functools.partial(_measure, own, content, mesh)
        watch = functools.partial(_watch, own, content, mesh)
        return Row(label, Stage(name, own), measure, watch=watch)

    def rows(seed):
        own = with_seed(config, seed)
        labelled = {"this model": {}, **_variants(config)}
        return [row(label, with_fields(own, x)) for label, x in labelled.items()]

    return Study(
        title=f"FPR95 of {len(content.outliers[near]):,} {near} against "
        f"{len(content.test.label):,} {content.name}, score of the training loss",
        metric="fpr95_mean" if config.data.source in pools.ORIGINAL else "fpr95",
        rising=False,
        rows=rows,
        columns=("fpr95_mean", "auroc_mean", "accuracy", "found", "contaminants"),
        pictures={"mined.png": figures.mined},
        states=("mined.png",),
    )


def _variants(config: Any) -> dict[str, dict[str, Any]]:
    """Label -> fields: other choices of outliers, and what else can be left out."""
    if config.method.select != "poem":
        return {}
    choices = {
        "greedy": {"method.select": "greedy"},
        "random outliers": {"method.select": "random"},
    }
    if not config.data.ablations:
        return choices
    return choices | {
        "cross-entropy only": {"method.select": "none"},
        "reference covariance": {"method.covariance": "reference"},
        "separate batches": {"method.batch_norm": "separate"},
        "random, uniform labels": {"method.select": "random", "method.loss": "uniform"},
        "greedy, C + 1 classes": {
            "method.select": "greedy",
            "method.loss": "extra_class",
            "net.outlier_class": True,
        },
    }


def _watch(config, content, mesh, method, state) -> dict[str, float]:
    """FPR95 of the near outliers and ID accuracy."""
    near, images = next(iter(content.outliers.items()))
    run = functools.partial(_predictions, config, mesh, method, state)
    inside, outside = run(content.test.image), run(images)
    return _numbers(config, content, inside, {near: outside})


def _measure(config, content, mesh, method, state) -> Finding:
    """Numbers, tables by test set and score, the threshold, the mined images."""
    run = functools.partial(_predictions, config, mesh, method, state)
    inside, held_out = run(content.test.image), run(content.calibration.image)
    outside = {k: run(x) for k, x in content.outliers.items()}
    numbers = _numbers(config, content, inside, outside)
    numbers |= _choice(config, content, mesh, state)
    every = [inside, held_out, *outside.values()]
    if not all(np.isfinite(x.logits).all() for x in every):
        return Finding(numbers)
    scores = _scores(config, content, mesh, state, run)
    score = functools.partial(_detection, config)
    name = SCORES[poem.read(config)[1].loss]
    threshold = detection.fit_threshold(score(held_out), 0.95, score=name)
    accepted = {k: threshold.accepts(score(x)) for k, x in outside.items()}
    files: dict[str, Any] = {
        "threshold.json": json.dumps(
            {
                **threshold._asdict(),
                "calibrated on": f"{len(held_out.logits)} held-out ID images",
                "accepted": {k: float(x.mean()) for k, x in accepted.items()},
                "accepted of the test": float(threshold.accepts(score(inside)).mean()),
            },
            indent=1,
        )
        + "\n"
    }
    if "shown" in state.extra and int(state.extra["round"]):
        files["mined.npz"] = _mined(content, state)
    tables = (_by_set(name, score(inside), outside, score), _by_score(scores))
    return Finding(numbers, tables, files=files)


def _predictions(config, mesh, method, state, images) -> poem.Predictions:
    """Logits and features of uint8 images."""
    size, parts = config.data.eval_batch, []
    rows = meshes.batch_rows(mesh, size, name="data.eval_batch")
    score = scorer(method.predict, mesh)
    with jax.set_mesh(mesh):
        for start in range(0, len(images), size):
            cut = images[start : start + size]
            batch = np.zeros((size, *images.shape[1:]), np.float32)
            batch[: len(cut)] = cut.astype(np.float32) / 255
            placed = meshes.put_batch({"image": batch[rows]}, mesh, size)
            out = jax.device_get(score(state.params, state.extra, placed))
            parts.append(out)
    return poem.Predictions(*(np.concatenate(x)[: len(images)] for x in zip(*parts)))


def _numbers(config, content, inside, outside) -> dict[str, float]:
    """Metrics of the detection score; NaN, with a warning, of logits not finite."""
    best = inside.logits[:, : config.net.classes].argmax(-1)
    accuracy = float((best == content.test.label).mean())
    sets = {"ID test": inside, **outside}
    if not all(all_finite(x.logits, f"rows of {k}") for k, x in sets.items()):
        return {"fpr95": math.nan, "accuracy": math.nan}
    found = {
        k: detection.measures(_detection(config, inside), _detection(config, x))
        for k, x in outside.items()
    }
    near = next(iter(found))
    numbers = {"fpr95": found[near].fpr, "accuracy": accuracy}
    if len(found) > 1:
        means = np.mean(list(found.values()), 0)
        numbers |= dict(
            zip(("fpr95_mean", "auroc_mean", "aupr_mean"), map(float, means))
        )
        numbers |= {f"fpr95_{k}": m.fpr for k, m in found.items() if k != near}
    return numbers


def _choice(config, content, mesh, state) -> dict[str, float]:
    """Shares of the last rounds: near outliers found, ID images among the chosen."""
    if "ring" not in state.extra or not int(state.extra["round"]):
        return {}
    _, options = poem.read(config)
    done, ring = int(state.extra["round"]), np.asarray(state.extra["ring"])
    rounds = range(max(done - min(RECENT, len(ring)), 0), done)
    # A run that was loaded has no key: that of its seed, see ``method.start``.
    key = state.key
    if isinstance(key, tuple):
        key, _ = jax.random.split(jax.random.key(config.train.seed))
    with jax.set_mesh(mesh):
        seen = [
            np.asarray(poem.scanned(key, r, size=len(content.pool), options=options))
            for r in rounds
        ]
    taken = np.concatenate([ring[r % len(ring)] for r in rounds])
    offered, numbers = np.concatenate(seen), {}
    none = np.zeros(1, bool)
    letters, hidden = (content.marks.get(k, none) for k in ("letters", "contaminants"))
    if letters.any():
        numbers["found"] = float(letters[taken].sum() / max(letters[offered].sum(), 1))
    if hidden.any():
        numbers["contaminants"] = float(hidden[taken].mean())
    return numbers


def _scores(config, content, mesh, state, run) -> dict[str, dict[str, np.ndarray]]:
    """Score -> set -> values, higher for ID; of the test and all outliers."""
    net, _ = poem.read(config)
    train = run(content.train.image)
    fitted = jax.device_get(
        _fit_gaussians(train.features, content.train.label, content.classes)
    )
    params, extra = jax.device_get((state.params, state.extra["net"]))
    size, found = config.data.eval_batch, {}
    for name, images in {"ID": content.test.image, **content.outliers}.items():
        out, parts = run(images), []
        for i in range(0, len(images), size):
            logits, z, x = (v[i : i + size] for v in (*out, images))
            logits = logits[:, : net.classes]
            values = dict(_post_hoc(logits, z, fitted, train.features))
            x = x.astype(np.float32) / 255
            values["odin"] = _odin(params, extra, x, net)
            parts.append(jax.device_get(values))
        for score in parts[0]:
            whole = np.concatenate([part[score] for part in parts])
            found.setdefault(score, {})[name] = whole
    return found


@functools.partial(jax.jit, static_argnums=2)
def _fit_gaussians(z, labels, classes):
    return ood.fit_gaussians(z, labels, classes)


@jax.jit
def _post_hoc(logits, z, fitted, bank):
    """Scores of logits and features; the energy first."""
    return {
        "energy": -ood.energy(logits),
        "max softmax": ood.max_softmax(logits),
        "max logit": ood.max_logit(logits),
        "mahalanobis": ood.mahalanobis(fitted, z),
        "nearest": ood.nearest(bank, z, min(50, len(bank))),
    }


@functools.partial(jax.jit, static_argnums=3)
def _odin(params, state, x, net):
    def logits_of(x):
        return poem.apply(params, state, x, net=net, train=False)[0][:, : net.classes]

    return ood.odin(logits_of, x)


def _by_set(score_name, inside, outside, score) -> Table:
    rows = []
    for name, x in outside.items():
        pair = inside, score(x)
        each = {c: detection.measures(*pair, c) for c in detection.CONVENTIONS}
        rows.append(
            [name, each["poem"].fpr, each["poem"].auroc, each["poem"].aupr,
             each["oe"].fpr, each["oe"].aupr, each["openood"].fpr, each["openood"].aupr]
        )  # fmt: skip
    return Table(
        f"{score_name} by test set: ID positive (poem), outliers positive (oe, openood)",
        ("outliers", "FPR95", "AUROC", "AUPR", "FPR95 oe", "AUPR oe", "FPR95 openood",
         "AUPR openood"),
        rows,
    )  # fmt: skip


def _by_score(scores) -> Table:
    names = [k for k in next(iter(scores.values())) if k != "ID"]
    rows = [
        [score]
        + [
            value
            for name in names
            for value in detection.measures(values["ID"], values[name])[:2]
        ]
        for score, values in scores.items()
    ]
    columns = [f"{name} {m}" for name in names for m in ("FPR95", "AUROC")]
    return Table("post-hoc scores", ("score", *columns), rows)


def _detection(config: Any, predicted: poem.Predictions) -> np.ndarray:
    """``poem.detection_score`` in float64: ties of float32 are not the model's."""
    net, options = poem.read(config)  # Also of runs from before ``loss``.
    logits = predicted.logits.astype(np.float64)
    if options.loss == "uniform":
        return logits.max(-1) - np.logaddexp.reduce(logits, axis=-1)
    if net.outlier_class:
        return np.logaddexp.reduce(logits[:, :-1], axis=-1) - logits[:, -1]
    return np.logaddexp.reduce(logits, axis=-1)


def _mined(content, state) -> dict[str, np.ndarray]:
    """The outliers nearest to the boundary, of each round that is remembered."""
    shown, done = np.asarray(state.extra["shown"]), int(state.extra["round"])
    rounds = range(max(done - len(shown), 0), done)
    kept = [shown[r % len(shown)] for r in rounds]
    count = min((row >= 0).sum() for row in kept)
    index = np.stack([row[:count] for row in kept])
    image = content.pool.read(index.reshape(-1))
    kind = np.zeros(len(content.pool), np.int8)
    for i, marked in enumerate(content.marks.values(), 1):
        kind[marked] = i
    return {
        "image": image.reshape(*index.shape, *image.shape[1:]),
        "kind": kind[index],
        "kinds": np.array(["", *content.marks]),
        "round": np.array(rounds),
    }


def load(config: Any) -> Detection:
    """The data that ``config.data`` names.

    Raises:
      ValueError: unknown source, or images that do not fit ``config.net``.
      FileNotFoundError: no files.
    """
    c, net = config.data, config.net
    folders = (c.path, c.pool_path, c.outliers_path)
    data = _read(c.source, folders, c.easy, c.images, c.letters, c.contaminants)
    actual = (*data.train.image.shape, data.classes)
    expected = (c.images, net.size, net.size, net.channels, net.classes)
    if actual != expected:
        raise ValueError(
            f"config.data.images, config.net.size, channels and classes say {expected}, "
            f"but {c.source} has {actual}"
        )
    return data


@functools.lru_cache(maxsize=2)
def _read(source, folders, easy, images, letters, contaminants) -> Detection:
    if source not in SOURCES:
        raise ValueError(f"config.data.source must be one of {SOURCES}, got {source!r}")
    if easy not in EASY:
        raise ValueError(f"config.data.easy must be one of {EASY}, got {easy!r}")
    if source == "generated":
        for path in folders:
            refuse_path(path, source, SOURCES)
        return outliers.segments(images)
    if source != "letters":
        return pools.original(source, *folders)
    return outliers.digits_among_letters(
        mnist.digits(fetch.get("mnist-10k")),
        outliers.patterns() if easy == "patterns" else _fashion(folders[0]),
        fetch.get("sklearn-images"),
        fetch.get("skimage-images"),
        train=images,
        letters=letters,
        contaminants=contaminants,
    )


def _fashion(path: str) -> np.ndarray:
    """Fashion-MNIST of the user's folder, of the installed package, or fetched."""
    installed = image_files.FASHION_FOLDER
    if path or not installed.is_dir():
        return outliers.fashion_images(path or fetch.get("fashion-mnist"))
    return outliers.fashion_images(fetch.get("fashion-mnist", path=installed))
