"""Click prediction on users' histories, measured by AUC and GAUC on held-out rows."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers import mesh as meshes
from jaxpapers.config import load_config
from jaxpapers.data import ctr, ctr_files, ctr_tasks, fetch, lines
from jaxpapers.nets import embedding
from jaxpapers.ops import ranking
from jaxpapers.tasks import Task, named

# Files that a source's folder has to hold, as patterns.
FILES = {
    "movielens-20m": ("ratings.csv", "movies.csv"),
    "amazon": ("reviews_*.json.gz", "meta_*.json.gz"),
    "taobao": ("UserBehavior.csv",),
    "dien": ("local_train_splitByUser", "local_test_splitByUser"),
    "mimn": ("*train*.txt", "*test*.txt"),
}
_READERS: dict[str, Callable] = {
    "movielens-20m": ctr_files.movielens_20m,
    "amazon": ctr_files.amazon,
    "taobao": ctr_files.taobao,
    "dien": ctr_files.dien_text,
    "mimn": ctr_files.mimn_text,
}
TARGETS = ("next_item", "rating")
SPLITS = ("test", "validation")
_VOCABULARIES = {"item": "item_vocab", "cate": "cate_vocab", "user": "user_vocab"}


def prepare(config: Any) -> tuple[Any, dict[str, Any]]:
    """The config with the data's vocabularies; counts of ids if the method wants them."""
    clicks = read(config)
    config = config.copy_and_resolve_references()
    for name, field in _VOCABULARIES.items():
        config.net[field] = clicks.rows[name]
    if not config.method.get("mba", 0.0):
        return config, {}
    counts = ctr.occurrences(clicks, config.data.history)
    return config, {
        "counts": {k: v for k, v in counts.items() if k in ("item", "cate")}
    }


def rivals(name: str, config: Any) -> dict[str, tuple[str, Any]]:
    """Logistic regression, Base (mean pooling) and DIN, on the same rows for as long.

    None where ``data.rivals`` says so, and beside those models themselves.
    Those of DIN have its own sizes. Beside another model they have those of DIN's preset
    for the source, and on other sources than ml-100k the optimizer and the constant part
    of the learning rate of that model: its schedule is made for its own number of steps.
    """
    if not config.data.get("rivals", True):
        return {}
    if name == "din":
        if config.net.pooling != "attention":
            return {}
        own = config
    else:
        small = config.data.source == "ml-100k"
        own = load_config(
            "din:ml100k" if small else "din"
        ).copy_and_resolve_references()
        _take(own.data, config.data)
        _take(own.train, config.train)
        # DIN's steps need no cutting where the other model's do, nor its first stage.
        own.train.accumulate, own.train.init_from = 1, ""
        own.net.rows_multiple = config.net.rows_multiple
        if not small:
            own.optim.schedule = "constant"
            _take(own.optim, config.optim)
        if own.net.unit_chunk and own.data.batch % own.net.unit_chunk:
            own.net.unit_chunk = 0
    base, linear = (own.copy_and_resolve_references() for _ in range(2))
    base.net.pooling = "mean"
    # One number per id and a linear map: the features are the ids themselves.
    linear.net.update(pooling="sum", item_dim=1, cate_dim=1, user_dim=0, hidden=())
    linear.net.update(product=False, project=0, affine=False)
    found = {
        "Base, mean pooling": ("din", base),
        "logistic regression": ("din", linear),
    }
    if config.net.get("model", name) != "din":
        found["DIN"] = ("din", own)
    return found


def _take(group: Any, other: Any) -> None:
    """Sets a group's fields to those of another one that have the same name."""
    for field in group:
        if field in other:
            group[field] = other[field]


def batch_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global training batch."""
    n, slots = config.data.batch, config.data.history
    times, negatives = _needs(config)
    single = ["user", "item", "cate", "length"] + (["time"] if times else [])
    lists = ["hist_item", "hist_cate"] + (["hist_time"] if times else [])
    lists += ["neg_hist_item", "neg_hist_cate"] if negatives else []
    return {
        **{k: jax.ShapeDtypeStruct((n,), jnp.int32) for k in single},
        **{k: jax.ShapeDtypeStruct((n, slots), jnp.int32) for k in lists},
        "label": jax.ShapeDtypeStruct((n,), jnp.float32),
    }


def load(config: Any, method: Any, mesh: Any) -> Task:
    """Reads ``config.data`` and binds the evaluation to a method and mesh.

    The test rows are those of the source's protocol. Scores are the method's sampler's,
    one candidate to a row.
    """
    clicks, c = read(config), config.data
    times, negatives = _needs(config)
    make = functools.partial(ctr.Examples, clicks, c.history, seed=c.seed, times=times)
    examples = make(negatives=negatives)
    test = make(split="test", shuffle=False)
    size = c.eval_batch
    rows = meshes.batch_rows(mesh, size, name="data.eval_batch")
    score = jax.jit(
        lambda state, batch: method.sampler(
            state.params, jax.random.key(0), batch, state.extra
        ),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )

    def evaluate(state, quick=False):
        del quick
        state = state._replace(opt_state=(), step=(), key=())
        scores, newest = [], None
        with jax.set_mesh(mesh):
            for batch in test.score_batches(size):
                local = jax.tree.map(lambda x: x[rows], batch)
                # Two in flight: see tasks.language_model.
                last, newest = newest, score(state, meshes.put_batch(local, mesh, size))
                if last is not None:
                    scores.append(jax.tree.map(np.asarray, named(last)))
        scores.append(jax.tree.map(np.asarray, named(newest)))
        return {
            f"validation_{name}{metric}": value
            for name in scores[0]
            for metric, value in _measure(
                test.samples, np.concatenate([x[name] for x in scores])[: len(test)]
            ).items()
        }

    def baselines():
        known = _plain(config)  # Of items, not of the buckets that they share.
        guesses = {"popularity": ctr.popularity(known)}
        guesses["item mean"] = ctr.item_mean(known)
        return {k: ranking.auc(test.samples.label, v) for k, v in guesses.items()}

    return Task(
        examples,
        1,
        "rows",
        "auc",
        f"AUC of {len(test):,} test rows, {c.source} ({clicks.name})",
        evaluate,
        baselines,
        None,
        f"{c.source}, {clicks.name}: {len(examples):,} rows to train on, {len(test):,} "
        f"to test; {clicks.rows['item']:,} items",
        rising=True,
    )


def read(config: Any) -> ctr.Clicks:
    """The data that ``config.data`` names: source, path, target, order, split, shuffled.

    Of amazon also the protocol, where the config has one; else DIN's. Items share
    ``item_buckets`` rows, where the config has some.

    Raises:
      FileNotFoundError: files that are not there; says which, and where to get them.
      ValueError: unknown names.
    """
    clicks, buckets = _plain(config), config.data.get("item_buckets", 0)
    return hash_items(clicks, buckets) if buckets else clicks


def _plain(config: Any) -> ctr.Clicks:
    """The data with an id for every item."""
    c = config.data
    clicks = _read(
        c.source, c.path, c.target, c.order, c.categories, c.get("protocol", "din")
    )
    if c.split not in SPLITS:
        raise ValueError(f"config.data.split must be one of {SPLITS}, got {c.split!r}")
    if c.split == "validation":
        clicks = ctr.hold_out(clicks, seed=c.seed)
    return ctr.shuffle_labels(clicks, c.seed) if c.shuffled else clicks


def hash_items(clicks: ctr.Clicks, buckets: int) -> ctr.Clicks:
    """Items share ``buckets`` rows by ``nets.embedding.hash_ids``; 0 and 1 stay.

    Raises:
      ValueError: fewer buckets than 1.
    """
    every = np.asarray(embedding.hash_ids(jnp.arange(clicks.rows["item"]), buckets))
    every = np.concatenate([np.arange(ctr.FIRST, dtype=np.int32), every[ctr.FIRST :]])

    def hashed(table):
        return table._replace(item=every[table.item])

    negatives = clicks.negatives
    return clicks._replace(
        train=hashed(clicks.train),
        test=hashed(clicks.test),
        log=hashed(clicks.log),
        negatives=negatives and (every[negatives[0]], negatives[1]),
        rows={**clicks.rows, "item": buckets + ctr.FIRST},
    )


@functools.lru_cache(maxsize=2)
def _read(source, path, target, order, categories, protocol) -> ctr.Clicks:
    if target not in TARGETS:
        raise ValueError(f"config.data.target must be one of {TARGETS}, got {target!r}")
    if source == "ml-100k":
        ratings = ctr_files.ml_100k(path or fetch.get("ml-100k"), category=categories)
        task = (
            ctr_tasks.task_next_item if target == "next_item" else ctr_tasks.task_rating
        )
        clicks = task(ratings, order=order)
    elif source in _READERS:
        own = {"protocol": protocol} if source == "amazon" else {}
        files = _files(source, path)
        clicks = _READERS[source](*files, progress=lines.print_progress, **own)
    else:
        raise ValueError(
            f"config.data.source must be one of {('ml-100k', *_READERS)}, got {source!r}"
        )
    return clicks


def _files(source: str, path: str) -> list[Path]:
    folder, found = Path(path).expanduser(), []
    for pattern in FILES[source]:
        matches = sorted(folder.glob(pattern)) if path else []
        if not matches:
            raise FileNotFoundError(
                f"config.data.path: {path or 'not given'}; {source} needs a folder with "
                f"{' and '.join(FILES[source])}, which its owners offer for download; "
                "--config.data.source=ml-100k needs none"
            )
        found.append(matches[0])
    return found


def _needs(config: Any) -> tuple[bool, bool]:
    """Whether the model reads times, and negatives of the history."""
    times = bool(config.net.get("time_dim", 0))
    return times, bool(config.method.get("aux_weight", 0.0))


def _measure(samples: ctr.Samples, scores: np.ndarray) -> dict[str, float]:
    return {
        "auc": ranking.auc(samples.label, scores),
        "gauc": ranking.gauc(samples.user, samples.label, scores),
    }
