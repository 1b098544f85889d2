"""Late conversions: pretraining on resolved clicks, then one pass over the stream."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.method import Method
from jaxpapers.papers import defer
from jaxpapers.tasks import Task

# Rows of the family's table, the two that RI is measured between first.
FAMILY = (
    "pretrained", "oracle", "vanilla_win", "vanilla", "vanilla_defer", "fnw", "fnc",
    "fnw_rn", "fnc_rn", "es_dfm", "defer", "dfm",
)  # fmt: skip


class Clicks(NamedTuple):
    """All clicks of a source; times in days.

    Attributes:
      features: columns with one row per click.
      click_ts: times.
      conv_ts: times of the conversions, -1 or inf for none.
      name: for people.
    """

    features: dict[str, np.ndarray]
    click_ts: np.ndarray
    conv_ts: np.ndarray
    name: str


class Row(NamedTuple):
    """One method of the family's table.

    Attributes:
      method: its name.
      values: metric -> one number per seed; of ``defer.METRICS``, ``ri_nll`` and
        ``clipped``: share of predictions at 1, where calibration clips.
    """

    method: str
    values: dict[str, np.ndarray]


def prepare(config: Any) -> tuple[Any, dict[str, Any]]:
    """The config with the steps of the whole journey, if it leaves them open."""
    if config.train.steps:
        return config, {}
    config = config.copy_and_resolve_references()
    config.train.steps = Journey(read(config), config).steps
    return config, {}


def batch_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global training batch."""
    n = config.data.batch
    dtype = jnp.int32 if config.net.bins else jnp.float32
    names = ("label", "elapsed", "weight", "resolved", "delayed")
    return {
        "x": jax.ShapeDtypeStruct((n, config.net.features), dtype),
        **{k: jax.ShapeDtypeStruct((n,), jnp.float32) for k in names},
    }


def resolved_rows(clicks: Clicks, index: np.ndarray, w1: float, w2: float) -> dict:
    """Batch columns of clicks whose labels are final.

    Args:
      clicks: of a source.
      index: rows.
      w1: waiting window.
      w2: attribution window.
    """
    z = defer.delays(clicks.click_ts[index], clicks.conv_ts[index])
    ones = np.ones(len(index), np.float32)
    return {
        **{k: v[index] for k, v in clicks.features.items()},
        "label": (z <= w2).astype(np.float32),
        "delayed": ((z > w1) & (z <= w2)).astype(np.float32),
        "elapsed": np.minimum(z, w2).astype(np.float32),
        "weight": ones,
        "resolved": ones,
    }


class Journey:
    """Epochs over the resolved clicks, then the events of the stream in their order.

    Each phase fills whole batches (rows of weight 0 at its end), so that no batch mixes
    the two. After the last event all rows have weight 0.

    Attributes:
      steps: batches in all.
      first_event: position of the stream's first row.
    """

    def __init__(self, clicks: Clicks, config: Any):
        c = config.data
        self.clicks, self.c = clicks, c
        self.pretrain = np.flatnonzero(clicks.click_ts < c.pretrain_until)
        self.stream = stream_events(clicks, config, c.stream_until - c.holdout)
        whole = [math.ceil(len(x) / c.batch) for x in (self.pretrain, self.stream.ts)]
        self.first_event = c.epochs * whole[0] * c.batch
        self.steps = c.epochs * whole[0] + whole[1]

    def batch(self, start: int, size: int, rows: slice = slice(None)) -> dict:
        """Rows [start, start + size) of the journey, of which ``rows`` are built."""
        at = np.arange(start, start + size)[rows]
        if start >= self.first_event:
            at = at - self.first_event
            return self._events(at)
        length = self.first_event // self.c.epochs
        return self._resolved(at // length, at % length)

    def _resolved(self, epoch, at):
        n = len(self.pretrain)
        index = np.zeros(len(at), np.int64)
        for e in np.unique(epoch):
            order = np.random.default_rng((self.c.seed, int(e))).permutation(n)
            index[epoch == e] = order[at[epoch == e] % n]
        out = resolved_rows(self.clicks, self.pretrain[index], self.c.w1, self.c.w2)
        out["weight"] = (at < n).astype(np.float32)
        return out

    def _events(self, at):
        n = len(self.stream.ts)
        events = defer.Stream(*(x[np.minimum(at, n - 1)] for x in self.stream))
        out = defer.event_rows(events, self.clicks.features, self.clicks.click_ts)
        out["weight"] = (at < n).astype(np.float32)
        return {**out, "resolved": np.zeros_like(out["label"]),
                "delayed": np.zeros_like(out["label"])}  # fmt: skip


def stream_events(clicks: Clicks, config: Any, until: float) -> defer.Stream:
    """The configured method's events from ``stream_from`` to ``until``.

    They are of all clicks after pretraining: of those between it and the stream only what
    becomes known during the stream. Without them the first w2 of the stream would miss
    all that comes late, and no weight is right for that.
    """
    c, method = config.data, config.method
    name = "oracle" if method.name == "pretrained" else method.name
    keep = (clicks.click_ts >= c.pretrain_until) & (clicks.click_ts < until)
    rows = np.flatnonzero(keep)
    real = name in ("defer", "vanilla_defer", "fnw_rn", "fnc_rn")
    stream = defer.make_stream(
        clicks.click_ts[rows],
        clicks.conv_ts[rows],
        c.w1,
        c.w2,
        name,
        (c.w3 or None) if real else None,
        variant=method.variant,
    )
    start, stop = np.searchsorted(stream.ts, (c.stream_from, until))
    stream = defer.Stream(*(x[start:stop] for x in stream))
    return stream._replace(index=rows[stream.index].astype(np.int32))


def read(config: Any) -> Clicks:
    """The clicks that ``config.data.source`` names.

    Raises:
      ValueError: unknown source, or another number of features than the network's.
    """
    c = config.data
    if c.source not in ("synthetic", "cdnow", "criteo"):
        raise ValueError(
            "config.data.source must be synthetic, cdnow or criteo, got "
            f"{config.data.source!r}"
        )
    if c.source == "criteo" and not c.path:
        raise ValueError(
            "Criteo's conversion logs are downloaded under Criteo's terms; pass "
            "--config.data.path=data.txt, or try the preset defer:cdnow"
        )
    from jaxpapers.data import conversions, fetch, lines

    if c.source == "synthetic":
        data = conversions.synthetic(c.clicks, seed=c.seed, w1=c.w1, w2=c.w2)
    elif c.source == "cdnow":
        data = conversions.cdnow(c.path or fetch.get("cdnow"))
    else:
        data = conversions.criteo(
            c.path, window_days=c.w2, progress=lines.print_progress
        )
    day = conversions.DAY if c.source == "criteo" else 1.0
    x = data.features
    if x.shape[1] != config.net.features:
        raise ValueError(
            f"{c.source} has {x.shape[1]} features, config.net.features is "
            f"{config.net.features}"
        )
    x = x if config.net.bins else x.astype(np.float32)
    return Clicks({"x": x}, data.click_ts / day, data.conv_ts / day, c.source)


def load(config: Any, method: Any, mesh: Any) -> Task:
    """Reads ``config.data`` and binds the evaluation to a method and mesh.

    The run is pretraining and the stream up to ``holdout`` days before its end. The
    validation numbers are of the clicks of those days, with their true labels. The
    protocol of the paper, which evaluates all along the stream, is ``table``.

    Raises:
      ValueError: an empty phase.
    """
    return bind(read(config), config, method, mesh)


def bind(clicks: Clicks, config: Any, method: Any, mesh: Any) -> Task:
    """``load`` for clicks that are here already."""
    c = config.data
    examples = Journey(clicks, config)
    held = (clicks.click_ts >= c.stream_until - c.holdout) & (
        clicks.click_ts < c.stream_until
    )
    held = np.flatnonzero(held)
    for name, rows in (
        ("pretraining", examples.pretrain),
        ("streamed", examples.stream.ts),
        ("held-out", held),
    ):
        if not len(rows):
            raise ValueError(
                f"no {name} clicks between config.data's times; clicks lie in "
                f"[{clicks.click_ts.min():.2f}, {clicks.click_ts.max():.2f}]"
            )
    truth = _truth(clicks, c.w2)[held]
    predict = jax.jit(method.predict)

    def evaluate(state, quick=False):
        del quick
        with jax.set_mesh(mesh):
            parts = defer.predict_rows(
                lambda state, rows: predict(
                    state.params, state.extra, meshes.put_batch(rows, mesh, c.batch)
                ),
                state,
                clicks.features,
                held,
                c.batch,
            )
            p = np.concatenate([np.asarray(x) for x in parts])[: len(held)]
        return {f"validation_{k}": v for k, v in defer.score(truth, p).items()}

    rivals = config.method.get("rivals", ())
    unknown = set(rivals) - set(defer.NAMES)
    if unknown:
        raise ValueError(
            f"config.method.rivals must be of {defer.NAMES}, got {sorted(unknown)}"
        )
    family = {
        name: functools.partial(
            _final_nll, clicks, with_method(config, name), held, truth
        )
        for name in rivals
        if name != config.method.name
    }

    rate = float(_truth(clicks, c.w2)[examples.pretrain].mean())
    one_number = defer.score(truth, np.full(len(truth), rate))["nll"]
    return Task(
        examples,
        1,
        "clicks",
        "nll",
        f"NLL of the last clicks, nats, {clicks.name}",
        evaluate,
        lambda: {"one number": one_number},
        None,
        f"{clicks.name}: {len(examples.pretrain)} resolved clicks x {c.epochs} epochs, "
        f"then {len(examples.stream.ts)} events of {config.method.name}; "
        f"{examples.steps} steps in all",
        family=family,
    )


def table(
    config: Any,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = FAMILY,
    clicks: Clicks | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """The family by the streaming protocol, from one pretrained model per seed.

    All seeds run at once, vmapped: parameters and the order of pretraining differ. Each
    method trains on the events of a bucket and is evaluated on the next one's clicks.

    Args:
      config: see configs/defer.py; ``method.name`` is not read.
      seeds: of the runs.
      methods: of ``defer.NAMES``; "pretrained" and "oracle" are always run.
      clicks: instead of ``config.data.source``.
      progress: told each method's name when it starts.

    Returns:
      A row per method.
    """
    clicks = read(config) if clicks is None else clicks
    methods = [*dict.fromkeys(("pretrained", "oracle", *methods))]
    shared = pretrain(clicks, with_method(config, "defer"), seeds)
    rows = []
    for name in methods:
        if progress:
            progress(name)
        own = with_method(config, name)
        # Its network has one more output, and learns delays.
        start = pretrain(clicks, own, seeds) if name == "dfm" else shared
        truths, found = stream(clicks, own, start)
        scores = [
            defer.streaming_score(truths, [p[i] for p in found])
            for i in range(len(seeds))
        ]
        values = {k: np.array([s[k] for s in scores]) for k in defer.METRICS}
        every = np.concatenate(found, -1)
        values["clipped"] = (every >= 1).mean(-1)
        rows.append(Row(name, values))
    low, high = (rows[i].values["nll"] for i in (0, 1))
    for row in rows:
        row.values["ri_nll"] = np.array(
            [defer.relative_improvement(*x) for x in zip(row.values["nll"], low, high)]
        )
    return rows


def render(rows: Sequence[Row]) -> str:
    """The table as Markdown: mean and standard deviation over seeds."""
    names = ("auc", "pr_auc", "nll", "mean_p", "ri_nll")
    lines = ["| method | AUC | PR-AUC | NLL | mean p | RI-NLL |", "|" + "---|" * 6]
    for row in rows:
        cells = []
        for name in names:
            x, digits = row.values[name], 1 if name == "ri_nll" else 4
            spread = x.std(ddof=1) if len(x) > 1 else math.nan
            cells.append(f"{x.mean():.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| {row.method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pretrain(clicks: Clicks, config: Any, seeds: Sequence[int]) -> Any:
    """States of the configured method after its epochs, stacked over seeds."""
    c = config.data
    method = defer.make(config)
    index = np.flatnonzero(clicks.click_ts < c.pretrain_until)
    columns = defer.pad_rows(resolved_rows(clicks, index, c.w1, c.w2), c.batch)
    n = len(columns["weight"])
    shapes = {k: jax.ShapeDtypeStruct((c.batch, *v.shape[1:]), v.dtype)
              for k, v in columns.items()}  # fmt: skip
    keys = jnp.stack([jax.random.key(s) for s in seeds])
    state = jax.jit(jax.vmap(lambda key: method.init(key, shapes)))(keys)
    step = jax.jit(jax.vmap(method.update), donate_argnums=0)
    draws = [np.random.default_rng((c.seed, s)) for s in seeds]
    for _ in range(c.epochs):
        order = np.stack([r.permutation(n) for r in draws])
        for i in range(0, n, c.batch):
            at = order[:, i : i + c.batch]
            state, _ = step(state, {k: v[at] for k, v in columns.items()})
    return state


def stream(
    clicks: Clicks, config: Any, state: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Runs the configured method over the stream, from stacked pretrained states.

    Args:
      clicks: of a source.
      config: with the method's name.
      state: of ``pretrain``; it is not consumed.

    Returns:
      True labels of each bucket's clicks, and predictions (seeds, clicks).
    """
    c = config.data
    method = defer.make(config)
    if config.method.name not in ("es_dfm", "defer"):
        state = state._replace(extra=())
    state = jax.tree.map(jnp.copy, state)
    step = jax.jit(jax.vmap(method.update, (0, None)), donate_argnums=0)
    predict = jax.jit(jax.vmap(functools.partial(_predict, method), (0, None)))
    if config.method.name == "pretrained":
        step = _stay
    buckets = defer.make_buckets(
        stream_events(clicks, config, c.stream_until),
        clicks.click_ts,
        c.stream_from,
        c.stream_until,
        c.bucket,
    )
    _, found = defer.run_stream(
        step, predict, state, buckets, clicks.features, clicks.click_ts, batch=c.batch
    )
    truth = _truth(clicks, c.w2)
    return [truth[b.clicks] for b in buckets], found


def with_method(config: Any, name: str) -> Any:
    """A copy of a config that names another method."""
    config = config.copy_and_resolve_references()
    config.method.name = name
    return config


def _predict(method: Method, state: Any, rows: Mapping) -> jax.Array:
    assert method.predict is not None
    return method.predict(state.params, state.extra, rows)


def _stay(state: Any, batch: Mapping) -> tuple[Any, dict]:
    del batch
    return state, {}


def _truth(clicks: Clicks, w2: float) -> np.ndarray:
    return (defer.delays(clicks.click_ts, clicks.conv_ts) <= w2).astype(np.float64)


def _final_nll(clicks, config, held, truth, seeds) -> list[float]:
    """NLL of the held-out clicks after another method's whole journey, per seed."""
    method, examples, c = defer.make(config), Journey(clicks, config), config.data
    keys = jnp.stack([jax.random.key(s) for s in seeds])
    shapes = batch_shapes(config)
    state = jax.jit(jax.vmap(lambda key: method.init(key, shapes)))(keys)
    step = jax.jit(jax.vmap(method.update, (0, None)), donate_argnums=0)
    last = examples.steps
    if config.method.name == "pretrained":
        last = examples.first_event // c.batch
    for i in range(last):
        state, _ = step(state, examples.batch(i * c.batch, c.batch))
    predict = jax.jit(jax.vmap(functools.partial(_predict, method), (0, None)))
    parts = defer.predict_rows(predict, state, clicks.features, held, c.batch)
    p = np.concatenate([np.asarray(x) for x in parts], -1)[:, : len(held)]
    return [defer.score(truth, x)["nll"] for x in p]
