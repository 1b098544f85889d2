"""The delayed-feedback family by the paper's streaming protocol, all seeds at once."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers.method import Method
from jaxpapers.papers import defer
from jaxpapers.tasks import conversions

# Rows of the family's table, the two that RI is measured between first.
FAMILY = (
    "pretrained", "oracle", "vanilla_win", "vanilla", "vanilla_defer", "fnw", "fnc",
    "fnw_rn", "fnc_rn", "es_dfm", "defer", "dfm",
)  # fmt: skip


class FamilyRow(NamedTuple):
    """One method of the family's table by the streaming protocol.

    Attributes:
      method: its name.
      values: metric -> one number per seed; of ``defer.METRICS``, ``ri_nll`` and
        ``clipped``: share of predictions at 1, where calibration clips.
    """

    method: str
    values: dict[str, np.ndarray]


def table(
    config: Any,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] = FAMILY,
    clicks: conversions.Clicks | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[FamilyRow]:
    """The family by the streaming protocol, from one pretrained model per seed.

    All seeds run at once, vmapped: parameters and the order of pretraining differ. Each
    method trains on the events of a bucket and is evaluated on the next one's clicks.

    Args:
      config: see configs/defer.py; ``method.name`` is not read.
      seeds: of the runs.
      methods: of ``defer.NAMES``; "pretrained" and "oracle" are always run.
      clicks: instead of ``config.data.source``.
      progress: called with each method's name before it starts.

    Returns:
      A row per method.
    """
    clicks = conversions.load(config) if clicks is None else clicks
    methods = [*dict.fromkeys(("pretrained", "oracle", *methods))]
    shared = pretrain(clicks, conversions.with_method(config, "defer"), seeds)
    rows = []
    for name in methods:
        if progress:
            progress(name)
        variant = conversions.with_method(config, name)
        # Its network has one more output, and learns delays.
        start = pretrain(clicks, variant, seeds) if name == "dfm" else shared
        truths, predictions = stream(clicks, variant, start)
        scores = [
            defer.streaming_score(truths, [p[i] for p in predictions])
            for i in range(len(seeds))
        ]
        values = {k: np.array([s[k] for s in scores]) for k in defer.METRICS}
        every = np.concatenate(predictions, -1)
        values["clipped"] = (every >= 1).mean(-1)
        rows.append(FamilyRow(name, values))
    low, high = (rows[i].values["nll"] for i in (0, 1))
    for row in rows:
        row.values["ri_nll"] = np.array(
            [defer.relative_improvement(*x) for x in zip(row.values["nll"], low, high)]
        )
    return rows


def render(rows: Sequence[FamilyRow]) -> str:
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


def pretrain(clicks: conversions.Clicks, config: Any, seeds: Sequence[int]) -> Any:
    """States of the configured method after its epochs, stacked over seeds."""
    c = config.data
    method = defer.make(config)
    index = np.flatnonzero(clicks.click_ts < c.pretrain_until)
    columns = defer.pad_rows(
        conversions.resolved_rows(clicks, index, c.w1, c.w2), c.batch
    )
    n = len(columns["weight"])
    shapes = {k: jax.ShapeDtypeStruct((c.batch, *v.shape[1:]), v.dtype)
              for k, v in columns.items()}  # fmt: skip
    init = jax.vmap(lambda seed: method.init(jax.random.key(seed), shapes))
    state = jax.jit(init)(np.asarray(seeds))
    step = jax.jit(jax.vmap(method.update), donate_argnums=0)
    draws = [np.random.default_rng((c.seed, s)) for s in seeds]
    for _ in range(c.epochs):
        order = np.stack([r.permutation(n) for r in draws])
        for i in range(0, n, c.batch):
            at = order[:, i : i + c.batch]
            state, _ = step(state, {k: v[at] for k, v in columns.items()})
    return state


def stream(
    clicks: conversions.Clicks, config: Any, state: Any
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
    state = _copied(state)
    step = jax.jit(jax.vmap(method.update, (0, None)), donate_argnums=0)
    predict = jax.jit(jax.vmap(functools.partial(_predict, method), (0, None)))
    if config.method.name == "pretrained":
        step = _stay
    buckets = defer.make_buckets(
        conversions.stream_events(clicks, config, c.stream_until),
        clicks.click_ts,
        c.stream_from,
        c.stream_until,
        c.bucket,
    )
    _, predictions = defer.run_stream(
        step, predict, state, buckets, clicks.features, clicks.click_ts, batch=c.batch
    )
    truth = conversions.truth(clicks, c.w2)
    return [truth[b.clicks] for b in buckets], predictions


@jax.jit
def _copied(state: Any) -> Any:
    """A copy that may be donated."""
    return jax.tree.map(jnp.copy, state)


def _predict(method: Method, state: Any, rows: Mapping) -> jax.Array:
    assert method.predict is not None
    return method.predict(state.params, state.extra, rows)


def _stay(state: Any, batch: Mapping) -> tuple[Any, dict]:
    del batch
    return state, {}
