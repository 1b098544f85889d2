"""Click prediction on users' histories, measured by AUC and GAUC on held-out rows."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.config import load_config
from jaxpapers.data import ctr, ctr_files, ctr_tasks, fetch, lines, movielens
from jaxpapers.data.files import refuse_path
from jaxpapers.nets import embedding
from jaxpapers.ops import ranking
from jaxpapers.papers import dien, rocket, sim
from jaxpapers.study import Data, Finding, Row, Stage, Study, with_fields, with_seed
from jaxpapers.tasks.scores import all_finite, named, scorer

# Files that a source's folder has to hold, as patterns; of some, first come first served.
FILES = {
    "movielens-20m": ("ratings.csv", "movies.csv"),
    "amazon": ("reviews_*.json*|*_5.json*|[!m]*.jsonl*", "meta_*.json*"),
    "taobao": ("UserBehavior.csv",),
    "dien": ("local_train_splitByUser", "local_test_splitByUser"),
    "mimn": ("*train*.txt", "*test*.txt"),
}
_READERS: dict[str, Callable] = {
    "movielens-20m": movielens.movielens_20m,
    "amazon": ctr_files.amazon,
    "taobao": ctr_files.taobao,
    "dien": ctr_files.dien_text,
    "mimn": ctr_files.mimn_text,
}
SOURCES = ("ml-100k", "generated", *_READERS)
TARGETS = ("next_item", "rating")
SPLITS = ("test", "validation")
WITHOUT_GAUC = "no GAUC, because no user has test rows of both classes"
_VOCABULARIES = {"item": "item_vocab", "cate": "cate_vocab", "user": "user_vocab"}


def abstract(config: Any) -> Data:
    """Shapes of a global training batch; equal counts of all ids for ``method.mba``."""
    n, slots = config.data.batch, config.data.history
    times, negatives = _reads(config)
    single = ["user", "item", "cate", "length"] + (["time"] if times else [])
    lists = ["hist_item", "hist_cate"] + (["hist_time"] if times else [])
    lists += ["neg_hist_item", "neg_hist_cate"] if negatives else []
    shapes = {
        **{k: jax.ShapeDtypeStruct((n,), jnp.int32) for k in single},
        **{k: jax.ShapeDtypeStruct((n, slots), jnp.int32) for k in lists},
        "label": jax.ShapeDtypeStruct((n,), jnp.float32),
    }
    if not config.method.get("mba", 0.0):
        return Data(None, shapes)
    sizes = {"item": config.net.item_vocab, "cate": config.net.cate_vocab}
    return Data(None, shapes, {"counts": {k: np.ones(n) for k, n in sizes.items()}})


def read(config: Any) -> Data:
    """Training rows of the source that ``config.data`` names, and counts of their ids."""
    clicks, c = load(config), config.data
    times, negatives = _reads(config)
    examples = ctr.Examples(
        clicks, c.history, seed=c.seed, times=times, negatives=negatives
    )
    data = abstract(config)
    if data.facts:
        counts = ctr.occurrences(clicks, c.history)
        data = data._replace(facts={"counts": {k: counts[k] for k in ("item", "cate")}})
    return data._replace(
        examples=examples,
        summary=f"{c.source}, {clicks.name}: {len(examples):,} rows to train on, "
        f"{len(clicks.test.label):,} to test; {clicks.rows['item']:,} items"
        + (f"; {clicks.notes}" if clicks.notes else "")
        + ("" if _has_gauc(clicks.test) else f"; {WITHOUT_GAUC}"),
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The model, its ablations and the baselines of the task, on the same test rows."""
    del data  # Each stage reads the data of its config.
    clicks, c = load(config), config.data
    meshes.batch_rows(mesh, c.eval_batch, name="data.eval_batch")
    label = clicks.test.label

    def trained(title, paper, config):
        config = _with_vocabularies(config, clicks)
        measure = functools.partial(_evaluate, config, clicks, mesh)
        return Row(title, Stage(paper, config), lambda *run: Finding(measure(*run)))

    @functools.cache
    def auc(score):
        # Of items, not of the buckets that they share.
        return Finding({"auc": ranking.auc(label, score(_load_unhashed(config)))})

    def rows(seed):
        models = {"this model": (name, config)}
        models |= {k: (name, v) for k, v in ablations(name, config).items()}
        models |= baselines(name, config)
        return [
            *(
                trained(k, paper, with_seed(v, seed))
                for k, (paper, v) in models.items()
            ),
            Row("popularity", None, functools.partial(auc, ctr.popularity)),
            Row("item mean", None, functools.partial(auc, ctr.item_mean)),
        ]

    return Study(
        title=f"AUC of {len(label):,} test rows, {c.source} ({clicks.name})",
        metric="auc",
        rising=True,
        rows=rows,
        columns=("gauc",) if _has_gauc(clicks.test) else (),
    )


def ablations(name: str, config: Any) -> dict[str, Any]:
    """Label -> config of the paper's variants."""
    variants = {"dien": dien, "rocket": rocket, "sim": sim}
    fields = variants[name].ablations(config) if name in variants else {}
    return {label: with_fields(config, values) for label, values in fields.items()}


def baselines(name: str, config: Any) -> dict[str, tuple[str, Any]]:
    """Label -> paper and config of logistic regression, Base and DIN, trained as long.

    None with ``data.baselines=False``, and beside one of these models. Beside DIN they
    have its sizes. Beside another model they have the sizes of DIN's preset for the
    source, and on other sources than ml-100k that model's optimizer at a constant
    learning rate, because its schedule fits its number of steps only.
    """
    if not config.data.get("baselines", True):
        return {}
    if name == "din":
        if config.net.pooling != "attention":
            return {}
        attention = config
    else:
        attention = _din_beside(config)
    # One number per id and a linear map: the features are the ids themselves.
    linear = {
        "net.pooling": "sum", "net.item_dim": 1, "net.cate_dim": 1, "net.user_dim": 0,
        "net.hidden": (), "net.product": False, "net.project": 0, "net.affine": False,
    }  # fmt: skip
    models = {
        "Base, mean pooling": with_fields(attention, {"net.pooling": "mean"}),
        "logistic regression": with_fields(attention, linear),
    }
    if config.net.get("model", name) != "din":
        models["DIN"] = attention
    return {label: ("din", model) for label, model in models.items()}


def _din_beside(config: Any) -> Any:
    """DIN's config on the data and for the steps of another model's."""
    small = config.data.source in ("ml-100k", "generated")
    din = load_config("din:ml100k" if small else "din")
    din = din.copy_and_resolve_references().unlock()
    _copy_shared(din.data, config.data)
    _copy_shared(din.train, config.train)
    # DIN's steps fit into memory whole, and it has no stage before.
    din.train.accumulate, din.train.init_from = 1, ""
    din.net.rows_multiple = config.net.rows_multiple
    if not small:
        _copy_shared(din.optim, config.optim)
        din.optim.schedule = "constant"
    if din.net.unit_chunk and din.data.batch % din.net.unit_chunk:
        din.net.unit_chunk = 0
    return din.lock()


def _copy_shared(group: Any, other: Any) -> None:
    """Sets a group's fields to those of another one that have the same name."""
    for field in group:
        if field in other:
            group[field] = other[field]


def _evaluate(config, clicks, mesh, method, state) -> dict[str, float]:
    """AUC and, where it is defined, GAUC of the test rows, of each net's scores.

    NaN, with a warning, if a score is not finite.
    """
    times, _ = _reads(config)
    test = ctr.Examples(
        clicks, config.data.history, split="test", shuffle=False, seed=config.data.seed,
        times=times,
    )  # fmt: skip
    size = config.data.eval_batch
    rows = meshes.batch_rows(mesh, size, name="data.eval_batch")
    score, scores, newest = scorer(method.predict, mesh), [], None
    with jax.set_mesh(mesh):
        for batch in test.score_batches(size):
            local = jax.tree.map(lambda x: x[rows], batch)
            placed = meshes.put_batch(local, mesh, size)
            # Two in flight: see tasks.language_model.
            last, newest = newest, score(state.params, state.extra, placed)
            if last is not None:
                scores.append(jax.tree.map(np.asarray, named(last)))
    scores.append(jax.tree.map(np.asarray, named(newest)))
    values = {}
    for net in scores[0]:
        of_net = np.concatenate([x[net] for x in scores])[: len(test)]
        for metric, value in _measure(test.samples, of_net, net).items():
            values[f"{net}{metric}"] = value
    return values


def _with_vocabularies(config: Any, clicks: ctr.Clicks) -> Any:
    sizes = {f"net.{_VOCABULARIES[k]}": clicks.rows[k] for k in _VOCABULARIES}
    return with_fields(config, sizes)


def load(config: Any) -> ctr.Clicks:
    """The data that ``config.data`` names: source, path, target, order, split, shuffled.

    Of amazon also the protocol, where the config has one; else DIN's. Items share
    ``item_buckets`` rows, where the config has some.

    Raises:
      FileNotFoundError: missing files, with where to get them.
      ValueError: unknown names; test rows of one class only.
    """
    c = config.data
    clicks, buckets = _load_unhashed(config), c.get("item_buckets", 0)
    return hash_items(clicks, buckets) if buckets else clicks


def _load_unhashed(config: Any) -> ctr.Clicks:
    """The data with an id for every item."""
    c = config.data
    return _load(
        c.source, c.path, c.target, c.order, c.categories, c.get("protocol", "din"),
        c.get("max_id", 0), c.split, c.seed, c.shuffled,
    )  # fmt: skip


@functools.lru_cache(maxsize=2)
def _load(
    source, path, target, order, categories, protocol, max_id, split, seed, shuffled
) -> ctr.Clicks:
    if split not in SPLITS:
        raise ValueError(f"config.data.split must be one of {SPLITS}, got {split!r}")
    clicks = _read(source, path, target, order, categories, protocol, max_id)
    if split == "validation":
        clicks = ctr.hold_out(clicks, seed=seed)
    for part in ("train", "test"):
        ctr.check(clicks, part)
    positives = int(clicks.test.label.sum())
    if positives in (0, len(clicks.test.label)):
        raise ValueError(
            f"{source}, {clicks.name}: {positives} of {len(clicks.test.label)} test rows "
            "are positive, and AUC needs both classes; use more data or another "
            "config.data.target or config.data.split"
        )
    return ctr.shuffle_labels(clicks, seed) if shuffled else clicks


def hash_items(clicks: ctr.Clicks, buckets: int) -> ctr.Clicks:
    """Items share ``buckets`` rows by ``nets.embedding.hash_ids``; 0 and 1 stay.

    Raises:
      ValueError: fewer buckets than 1.
    """
    hash_ids = jax.jit(embedding.hash_ids, static_argnums=1)
    bucket = np.array(hash_ids(jnp.arange(clicks.rows["item"]), buckets))
    bucket[: ctr.FIRST] = np.arange(ctr.FIRST)

    def hashed(table):
        return table._replace(item=bucket[table.item])

    negatives = clicks.negatives
    return clicks._replace(
        train=hashed(clicks.train),
        test=hashed(clicks.test),
        log=hashed(clicks.log),
        negatives=negatives and (bucket[negatives[0]], negatives[1]),
        rows={**clicks.rows, "item": buckets + ctr.FIRST},
    )


@functools.lru_cache(maxsize=2)
def _read(source, path, target, order, categories, protocol, max_id) -> ctr.Clicks:
    if target not in TARGETS:
        raise ValueError(f"config.data.target must be one of {TARGETS}, got {target!r}")
    if source in ("ml-100k", "generated"):
        if source == "generated":
            refuse_path(path, source, SOURCES)
            ratings = ctr_tasks.generated()
        else:
            folder = path or fetch.get("ml-100k")
            ratings = movielens.ml_100k(folder, category=categories, max_id=max_id)
        task = (
            ctr_tasks.task_next_item if target == "next_item" else ctr_tasks.task_rating
        )
        clicks = task(ratings, order=order)
    elif source in _READERS:
        options: dict[str, Any] = {}
        if source == "amazon":
            options["protocol"] = protocol
        elif source != "taobao":  # Both number their ids anew.
            options["max_id"] = max_id
        files = _files(source, path)
        clicks = _READERS[source](*files, progress=lines.print_progress, **options)
    else:
        raise ValueError(f"config.data.source must be one of {SOURCES}, got {source!r}")
    return clicks


def _files(source: str, path: str) -> list[Path]:
    folder, files = Path(path).expanduser(), []
    if path and folder.is_file() and len(FILES[source]) == 1:
        return [folder]  # Of whatever name.
    for patterns in FILES[source]:
        found = (sorted(folder.glob(x)) if path else [] for x in patterns.split("|"))
        matches = next(filter(None, found), [])
        if not matches:
            raise FileNotFoundError(
                f"config.data.path: {path or 'not given'}; {source} needs a folder with "
                f"{' and '.join(FILES[source])}, which its owners offer for download; "
                "--config.data.source=ml-100k needs none"
            )
        if len(matches) > 1:
            names = ", ".join(x.name for x in matches[:4])
            raise ValueError(
                f"config.data.path: {path} has several files like {patterns}: {names}; "
                "put one set of files into a folder of its own"
            )
        files.append(matches[0])
    return files


def _reads(config: Any) -> tuple[bool, bool]:
    """Whether the model reads times, and negatives of the history."""
    times = bool(config.net.get("time_dim", 0))
    return times, bool(config.method.get("aux_weight", 0.0))


def _measure(samples: ctr.Samples, scores: np.ndarray, net: str) -> dict[str, float]:
    metrics = ("auc", "gauc") if _has_gauc(samples) else ("auc",)
    if not all_finite(scores, f"{net}scores of test rows"):
        return dict.fromkeys(metrics, math.nan)
    values = {"auc": ranking.auc(samples.label, scores)}
    if "gauc" in metrics:
        values["gauc"] = ranking.gauc(samples.user, samples.label, scores)
    return values


def _has_gauc(samples: ctr.Samples) -> bool:
    return ranking.gauc_is_defined(samples.user, samples.label)
