"""Late conversions: pretraining on resolved clicks, then one pass over the stream."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.data import conversions, fetch, lines
from jaxpapers.data.files import refuse_path
from jaxpapers.papers import defer
from jaxpapers.study import Data, Finding, Row, Stage, Study, with_fields, with_seed
from jaxpapers.tasks.scores import all_finite, scorer

SOURCES = ("synthetic", "cdnow", "criteo")
WITHOUT_AUC = "no AUC and PR-AUC, because the held-out clicks are of one class"


class Clicks(NamedTuple):
    """All clicks of a source; times in days.

    Attributes:
      features: columns with one row per click.
      click_ts: times.
      conv_ts: times of the conversions, -1 or inf for none.
      name: shown in titles.
    """

    features: dict[str, np.ndarray]
    click_ts: np.ndarray
    conv_ts: np.ndarray
    name: str


def abstract(config: Any) -> Data:
    """Shapes of a global training batch."""
    n = config.data.batch
    dtype = jnp.int32 if config.net.bins else jnp.float32
    names = ("label", "elapsed", "weight", "resolved", "delayed")
    shapes = {
        "x": jax.ShapeDtypeStruct((n, config.net.features), dtype),
        **{k: jax.ShapeDtypeStruct((n,), jnp.float32) for k in names},
    }
    return Data(None, shapes, unit="clicks")


def read(config: Any) -> Data:
    """Resolved clicks, then the events of the configured method's stream.

    Raises:
      ValueError: an empty phase.
    """
    return bind(load(config), config)


def bind(clicks: Clicks, config: Any) -> Data:
    """``read`` with clicks in memory."""
    c, examples = config.data, TrainingStream(clicks, config)
    for phase, rows in (
        ("pretraining", examples.pretrain),
        ("streamed", examples.stream.ts),
        ("held-out", _held_out(clicks, config)),
    ):
        if not len(rows):
            raise ValueError(
                f"{c.path or clicks.name}: no {phase} clicks between config.data's times "
                "(pretrain_until, stream_from, stream_until, holdout); clicks lie in "
                f"[{clicks.click_ts.min():.2f}, {clicks.click_ts.max():.2f}] days"
            )
    return abstract(config)._replace(
        examples=examples,
        summary=f"{clicks.name}: {len(examples.pretrain)} resolved clicks x {c.epochs} "
        f"epochs, then {len(examples.stream.ts)} events of {config.method.name}; "
        f"{examples.steps} steps in all"
        + ("" if "auc" in _metrics(clicks, config) else f"; {WITHOUT_AUC}"),
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The method beside others of the family, by the NLL of the last days' clicks.

    A run is pretraining and the stream up to ``holdout`` days before its end. The numbers
    are of the clicks of those days, with their true labels. The protocol of the paper,
    which evaluates all along the stream, is ``delayed_family.table``.
    """
    return compare(load(config), name, config, mesh)


def compare(clicks: Clicks, name: str, config: Any, mesh: Any) -> Study:
    """``study`` with clicks in memory."""
    c, training = config.data, TrainingStream(clicks, config)
    held = _held_out(clicks, config)
    labels, metrics = truth(clicks, c.w2)[held], _metrics(clicks, config)
    others = c.get("baselines", ())
    unknown = set(others) - set(defer.NAMES)
    if unknown:
        raise ValueError(
            f"config.data.baselines must be of {defer.NAMES}, got {sorted(unknown)}"
        )

    def measure(method, state):
        score, served = scorer(method.predict, mesh), (state.params, state.extra)
        with jax.set_mesh(mesh):
            parts = defer.predict_rows(
                lambda served, rows: score(
                    *served, meshes.put_batch(rows, mesh, c.batch)
                ),
                served,
                clicks.features,
                held,
                c.batch,
            )
            p = np.concatenate([np.asarray(x) for x in parts])[: len(held)]
        if not all_finite(p, "predictions of held-out clicks"):
            return Finding(dict.fromkeys(metrics, math.nan))
        scores = defer.score(labels, p)
        return Finding({name: scores[name] for name in metrics})

    @functools.cache
    def steps(method_name):
        return TrainingStream(clicks, with_method(config, method_name)).steps

    def stage(method_name, seed):
        seeded = with_method(with_seed(config, seed), method_name)
        most = steps(method_name)  # After the stream's end there is nothing to learn.
        if method_name != config.method.name or not 0 < seeded.train.steps <= most:
            seeded = with_fields(seeded, {"train.steps": most})
        until = training.first_event // c.batch if method_name == "pretrained" else 0
        return Stage(name, seeded, until=until)

    def constant():
        rate = truth(clicks, c.w2)[training.pretrain].mean()
        return Finding({"nll": defer.score(labels, np.full(len(labels), rate))["nll"]})

    def rows(seed):
        models = {"this model": config.method.name}
        models |= {other: other for other in others if other != config.method.name}
        trained = [Row(k, stage(v, seed), measure) for k, v in models.items()]
        return [*trained, Row("constant rate", None, constant)]

    return Study(
        title=f"NLL of the last clicks, nats, {clicks.name}",
        metric="nll",
        rising=False,
        rows=rows,
        columns=[name for name in ("auc", "pr_auc") if name in metrics],
    )


def _metrics(clicks: Clicks, config: Any) -> tuple[str, ...]:
    """Those of ``defer.METRICS`` that the held-out clicks have."""
    labels = truth(clicks, config.data.w2)[_held_out(clicks, config)]
    both = 0 < labels.sum() < len(labels)
    return tuple(x for x in defer.METRICS if both or "auc" not in x)


def _held_out(clicks: Clicks, config: Any) -> np.ndarray:
    """Rows of the clicks of the stream's last ``holdout`` days."""
    c = config.data
    first = c.stream_until - c.holdout
    return np.flatnonzero(
        (clicks.click_ts >= first) & (clicks.click_ts < c.stream_until)
    )


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


class TrainingStream:
    """Resolved clicks for some epochs, then the stream's events in time order.

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
        """The slice ``rows`` of rows [start, start + size) of the training stream."""
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


def load(config: Any) -> Clicks:
    """The clicks that ``config.data.source`` names.

    Raises:
      ValueError: unknown source, or another number of features than the network's.
    """
    c, net = config.data, config.net
    clicks = _load(c.source, c.path, c.clicks, c.seed, c.w1, c.w2)
    x = clicks.features["x"]
    if x.shape[1] != net.features:
        raise ValueError(
            f"{c.source} has {x.shape[1]} features, config.net.features is {net.features}"
        )
    return clicks if net.bins else clicks._replace(features={"x": x.astype(np.float32)})


@functools.lru_cache(maxsize=2)
def _load(
    source: str, path: str, count: int, seed: int, w1: float, w2: float
) -> Clicks:
    if source not in SOURCES:
        raise ValueError(f"config.data.source must be one of {SOURCES}, got {source!r}")
    if source == "synthetic":
        refuse_path(path, source, SOURCES)
        data = conversions.synthetic(count, seed=seed, w1=w1, w2=w2)
    elif source == "cdnow":
        data = conversions.cdnow(path or fetch.get("cdnow"))
    elif not path:
        raise ValueError(
            "Criteo's conversion logs are downloaded under Criteo's terms; pass "
            "--config.data.path=data.txt, or try the preset defer:cdnow"
        )
    else:
        data = conversions.criteo(path, window_days=w2, progress=lines.print_progress)
    day = conversions.DAY if source == "criteo" else 1.0
    return Clicks({"x": data.features}, data.click_ts / day, data.conv_ts / day, source)


def with_method(config: Any, name: str) -> Any:
    """A copy of a config that names another method."""
    return with_fields(config, {"method.name": name})


def truth(clicks: Clicks, w2: float) -> np.ndarray:
    """Labels of all clicks: 1 where they convert within ``w2``, float64."""
    return (defer.delays(clicks.click_ts, clicks.conv_ts) <= w2).astype(np.float64)
