"""Semantic IDs of a catalogue, and the next item of its users by generating them.

``config.method.stage``: ``retrieve`` trains a tokenizer and then a transformer of SIDs;
the rows are other tokenizers with the same transformer, SASRec, and baselines that train
nothing. ``tokenize`` compares tokenizers alone, by ``papers.r3_vae.diagnose``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.data import arrays, catalogue, fetch, sequences
from jaxpapers.ops import trie as tries
from jaxpapers.papers import r3_vae
from jaxpapers.papers.r3_vae import starts
from jaxpapers.study import (
    ONCE,
    Data,
    Finding,
    Row,
    Stage,
    Study,
    with_fields,
    with_seed,
)
from jaxpapers.tasks import item_vectors, tokenizers
from jaxpapers.tasks.scores import all_finite

CUTOFFS = (5, 10)


def abstract(config: Any) -> Data:
    """Shapes of a global batch; ``data.count`` items of ``tokenizer.features``."""
    tokenizer, method, net = r3_vae.read(config)
    facts = {"items": config.data.count, "features": tokenizer.features}
    n = config.data.batch
    if method is None or net is None:
        shape = jax.ShapeDtypeStruct((n, tokenizer.features), jnp.float32)
        return Data(None, {"x": shape}, facts, unit="items")
    shapes = {
        "items": jax.ShapeDtypeStruct((n, net.history + 1), jnp.int32),
        "user": jax.ShapeDtypeStruct((n,), jnp.int32),
    }
    return Data(None, shapes, facts, unit="windows")


def read(config: Any) -> Data:
    """Item vectors for a tokenizer, windows of users' items for retrieval."""
    items, x = load(config)
    tokenizer, method, net = r3_vae.read(config)
    data = abstract(config)
    facts = {"items": len(x), "features": x.shape[1]}
    own = items.sequences
    summary = (
        f"{config.data.source}: {len(x):,} items of {x.shape[1]} features, "
        f"{own.users:,} users, {len(own.items):,} events of {len(own.candidates):,} items"
        + (f"; {items.notes}" if items.notes else "")
    )
    data = data._replace(facts=facts, summary=summary)
    if method is None or net is None:
        return data._replace(
            examples=arrays.Examples({"x": x}, config.data.seed),
            refresh=(tokenizer.dead_every or ONCE, _codes_refreshed(x, tokenizer)),
        )

    def place(state):
        return r3_vae.placed(state, _key(state), x, config)

    length = net.history + 1
    train = sequences.training(own)
    return data._replace(
        examples=sequences.Windows(train, length, config.data.seed),
        refresh=(ONCE, place),
    )


def _codes_refreshed(x: np.ndarray, tokenizer: Any) -> Any:
    """k-means before the first step, dead codes replaced after that."""

    def refresh(state):
        step = int(state.step)
        if step == 0:
            return starts.start(state, x, tokenizer, _key(state))
        key = jax.random.fold_in(_key(state), step)
        return starts.revive(state, x, tokenizer, key)[0]

    return refresh


def _key(state: Any) -> Any:
    return jax.random.fold_in(state.key, 2**20)


def load(config: Any) -> tuple[catalogue.Catalogue, np.ndarray]:
    """The catalogue and its item vectors, see ``data.catalogue``.

    Raises:
      FileNotFoundError, ValueError: see ``data.catalogue``; items without text and
        vector.
    """
    c = config.data
    return _load(c.source, c.path, c.core, c.count, config.tokenizer.features, c.seed)


@functools.lru_cache(maxsize=2)
def _load(source, path, core, items, features, seed):
    del seed  # Of the batches.
    sizes = {}
    if source == "generated":
        sizes = {"items": items, "features": features}
    folder = fetch.get("ml-100k", path=path) if source == "ml-100k" else path
    found = catalogue.read(source, folder, core=core, **sizes)
    x = found.vectors
    if x is None:
        x = item_vectors.of_texts(found.texts, found.names)
    return found, starts.check_vectors(x)


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """Retrieval by SIDs of several tokenizers, or the tokenizers alone."""
    del data
    items, x = load(config)
    if config.method.stage == "tokenize":
        return tokenizers.compared(name, config, x)
    test = sequences.targets(items.sequences, config.data.split, config.net.history)
    meshes.batch_rows(mesh, config.data.eval_batch, name="data.eval_batch")

    def trained(label, own):
        after = None
        if own.method.source in r3_vae.TRAINED:
            after = Stage(name, r3_vae.tokenizer_config(own))
        measure = functools.partial(_measured, own, items, x, mesh, config.data.split)
        watch = functools.partial(_watched, own, items, mesh)
        return Row(label, Stage(name, own, after), measure, watch=watch)

    def rows(seed):
        own = with_seed(config, seed)
        variants = {"R3-VAE, reconstruction": {}, **_variants(config)}
        return [
            *(trained(k, with_fields(own, fields)) for k, fields in variants.items()),
            Row("Markov", None, lambda: _markov(config, items, test)),
            Row("popularity", None, lambda: _popularity(config, items, test)),
        ]

    excluded = (
        "seen items excluded" if config.method.exclude_seen else "seen items kept"
    )
    return Study(
        title=f"Next item of {len(test.target):,} users among "
        f"{len(items.sequences.candidates):,}, {config.data.source}, {excluded}",
        metric="recall_10",
        rising=True,
        rows=rows,
        columns=("recall_5", "ndcg_5", "ndcg_10", "unique", "sc_x_1", "pd"),
        unit="recall@10",
    )


def _variants(config: Any) -> dict[str, dict]:
    """Label -> fields of the other trained rows."""
    # Tokenizers are trained by the group ``pretrain`` here.
    alone = {
        label: {
            f"pretrain.{k}" if k.startswith("optim.") else k: v
            for k, v in fields.items()
        }
        for label, fields in tokenizers.variants(config).items()
    }
    known = {
        "R3-VAE, soft tau .05": alone["R3-VAE soft tau .05"],
        "RQ-VAE": alone["RQ-VAE"],
        "RQ-KMeans": {"method.source": "rq_kmeans"},
        "RQ-KMeans, balanced": {"method.source": "rq_kmeans_balanced"},
        "PQ-KMeans": {"method.source": "pq_kmeans"},
        "random SIDs": {"method.source": "random"},
        "SASRec": {"method.source": "item", "net.tied": True},
    }
    return tokenizers.chosen(config, known)


def _measured(config, items, x, mesh, split, method, state) -> Finding:
    """Recall and NDCG of the split, and the report on the SIDs."""
    numbers = recommended(config, items, mesh, split, method, state)
    table = np.asarray(state.extra["sid"])
    codes = report(config, x, state)
    curves = {}
    if config.method.source != "item":
        counts = np.bincount(table[:, 0], minlength=config.tokenizer.codes)
        share = -np.sort(-counts) / len(table)
        curves = {
            "share of items against first code": (
                list(range(1, len(share) + 1)), share.tolist(),
            )
        }  # fmt: skip
    return Finding(
        {**numbers, **codes}, curves=curves, files={"sids.npz": {"table": table}}
    )


def _watched(config, items, mesh, method, state) -> dict[str, float]:
    if int(state.step) == config.train.steps:
        return {}  # The final state is measured right after training.
    return recommended(config, items, mesh, "validation", method, state)


def report(config: Any, x: np.ndarray, state: Any) -> dict[str, float]:
    """``r3_vae.diagnose`` of the SIDs of a state, before collisions are resolved."""
    tokenizer, method, _ = r3_vae.read(config)
    assert method is not None
    if method.source == "item":
        return {}
    trained = jax.device_get(state.extra["tokenizer"]) or None
    sid, q, _ = starts.assign(_key(state), x, tokenizer, method, trained)
    numbers = r3_vae.diagnose(sid, tokenizer.codes, x, q, t=tokenizer.t)
    return {k: v for k, v in numbers.items() if np.isfinite(v)}


def recommended(
    config: Any, items: Any, mesh: Any, split: str, method: Any, state: Any
) -> dict[str, float]:
    """Recall@k and NDCG@k of a state's recommendations for the rows of a split.

    NaN, with a warning, if a score is not finite.
    """
    del method
    tokenizer, options, net = r3_vae.read(config)
    assert options is not None and net is not None
    table = np.asarray(state.extra["sid"])
    sizes = options.sizes(tokenizer, len(table))
    rows = sequences.targets(items.sequences, split, net.history)
    popular = sequences.popularity(
        sequences.training(items.sequences), items.sequences.count
    )
    found = items.sequences.candidates
    trie = tries.build(table[found], found, popular[found])
    search = _search(options, net, sizes, mesh)
    arrays_of_trie = tries.padded(trie, len(table))
    seen = sequences.seen_table(rows, len(table)) if options.exclude_seen else None
    size = config.data.eval_batch
    leaves, scores = [], []
    for start in range(0, len(rows.target), size):
        index = np.arange(start, start + size) % len(rows.target)
        batch = {"history": rows.history[index], "user": rows.user[index]}
        if seen is not None:
            batch["seen"] = seen[index]
        own = meshes.batch_rows(mesh, size, name="data.eval_batch")
        placed = meshes.put_batch({k: v[own] for k, v in batch.items()}, mesh, size)
        with jax.set_mesh(mesh):
            result = search(state.params, state.extra["sid"], arrays_of_trie, placed)
        leaves.append(np.asarray(result.leaf))
        scores.append(np.asarray(result.score))
    n = len(rows.target)
    result = tries.Found(np.concatenate(leaves)[:n], np.concatenate(scores)[:n])
    names = [f"{m}_{k}" for k in CUTOFFS for m in ("recall", "ndcg")]
    if not all_finite(result.score[:, 0], "scores of test rows"):
        return dict.fromkeys(names, float("nan"))
    allowed = None if seen is None else ~seen[:, trie.items]
    ranked, _ = tries.items_of(result, trie, max(CUTOFFS), allowed)
    return _hits(ranked, rows.target)


@functools.lru_cache(maxsize=8)
def _search(options, net, sizes, mesh):
    """The compiled search, for any trie of these sizes, its result on every device."""
    whole = jax.sharding.NamedSharding(mesh, jax.P())

    @functools.partial(jax.jit, out_shardings=whole)
    def search(params, table, trie, batch):
        return r3_vae.retrieval.recommend(
            params, table, batch["history"], batch["user"], trie, net=net, sizes=sizes,
            beam=max(options.beam, max(CUTOFFS)), seen=batch.get("seen"),
        )  # fmt: skip

    return search


def _hits(ranked: np.ndarray, target: np.ndarray) -> dict[str, float]:
    numbers = {}
    for k in CUTOFFS:
        recall, ndcg = tries.hits(ranked, target, k)
        numbers[f"recall_{k}"] = float(recall.mean())
        numbers[f"ndcg_{k}"] = float(ndcg.mean())
    return numbers


def _markov(config, items, rows) -> Finding:
    own = items.sequences
    table = sequences.markov(sequences.training(own), own.count)
    scores = table[[seen[-1] for seen in rows.seen]]
    return _counted(config, scores, items, rows)


def _popularity(config, items, rows) -> Finding:
    own = items.sequences
    scores = sequences.popularity(sequences.training(own), own.count)
    return _counted(config, scores, items, rows)


def _counted(config, scores, items, rows) -> Finding:
    candidates = items.sequences.candidates
    exclude = config.method.exclude_seen
    ranked = sequences.ranked(scores, rows, candidates, max(CUTOFFS), exclude)
    return Finding(_hits(ranked, rows.target))
