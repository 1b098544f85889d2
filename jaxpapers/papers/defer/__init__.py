r"""DEFER: conversions that come late, learnt from real negatives.

Siyu Gu, Xiang-Rong Sheng, Ying Fan, Guorui Zhou, Xiaoqiang Zhu. "Real Negatives Matter:
Continuous Training with Real Negatives for Delayed Feedback Modeling", arXiv 2104.14121,
KDD 2021.

A model trained on fresh clicks must label "not yet converted" as negative, and re-inserts
a click as positive once it converts; so converting clicks are too frequent in its stream.
DEFER re-inserts EVERY click once its label is final, which makes the stream's features
those of the clicks. The bias of the labels that remains is removed by importance weights,
for which one more classifier estimates how many conversions are late.

A click x at t_c converts after z; y = 1[z <= w2]; p = p(y=1|x), p_dp = p(y=1, z > w1|x).
Events by method (``make_stream``):

| method | first event | later events |
|---|---|---|
| oracle | t_c: y | none |
| vanilla_win | t_c + w1: 1[z <= w1] | none |
| vanilla, es_dfm, dfm | t_c + w1: 1[z <= w1] | late positives: t_c + z, 1 |
| fnw, fnc | t_c: 0 | positives: t_c + z, 1 |
| fnw_rn, fnc_rn | t_c: 0 | positives: t_c + z, 1; others: t_c + w2, 0 |
| defer, vanilla_defer | t_c + w1: 1[z <= w1] | late positives: t_c + z, 1; all others \
again at t_c + w2: their label |

With q(x) = p(x), q(1|x) = p - p_dp/2 and q(0|x) = 1 - p + p_dp/2, DEFER's weights are

$$ w_+ = \frac{p}{p - p_{dp}/2}, \qquad w_- = \frac{1 - p}{1 - p + p_{dp}/2}, $$
$$ L = \frac{1}{B} \sum_i y_i w_+ \mathrm{softplus}(-s_i)
     + (1 - y_i) w_- \mathrm{softplus}(s_i) \qquad (s, y, w: (B,)) $$

with p the sigmoid of the current model, p_dp the output of a classifier trained on clicks
whose label is final and frozen after that, and no gradient through the weights. A batch
has either such clicks (``resolved`` 1: pretraining with plain cross-entropy) or events
of the stream.

Departures. The equations are reconstructed from accounts of the paper that agree; w_+ is
clipped to [1, 2], its range for true probabilities, and denominators to 1e-6, because the
paper does not say what to do when estimates violate p_dp <= p. ``variant="released"`` is
what the authors' repository runs, not the paper: its stream lacks the second copy of
immediate positives, and its weights are others. DFM counts days, not seconds. Running
statistics of batch norm lie beside the parameters, so that these alone give predictions.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from jaxpapers import optim
from jaxpapers.method import Method, State, gradient
from jaxpapers.papers.defer.metrics import (
    METRICS,
    relative_improvement,
    score,
    streaming_score,
)
from jaxpapers.papers.defer.network import Net, network
from jaxpapers.papers.defer.streams import (
    STREAMS,
    Bucket,
    Stream,
    delays,
    event_rows,
    make_buckets,
    make_stream,
    pad_rows,
    predict_rows,
    run_stream,
)
from jaxpapers.papers.defer.weights import (
    aux_loss,
    calibrate,
    check_labels,
    delayed_loss,
    dfm_loss,
    dfm_losses,
    event_losses,
    importance_weights,
    offline_loss,
    weighted_mean,
)

__all__ = [
    "METRICS", "NAMES", "RULES", "STREAMS", "Bucket", "Net", "Stream", "aux_loss",
    "calibrate", "check_labels", "delayed_loss", "delays", "dfm_loss", "dfm_losses",
    "event_losses", "event_rows", "importance_weights", "loss", "make",
    "make_buckets", "make_stream", "network", "offline_loss", "pad_rows",
    "predict_rows", "probabilities", "relative_improvement", "run_stream", "sampler",
    "score", "streaming_score", "update", "weighted_mean",
]  # fmt: skip

# Columns of the first layer, rows of the second; tables here are small.
RULES = (
    (r"dense_0/kernel", P(None, "model")),
    (r"dense_0/bias", P("model")),
    (r"dense_1/kernel", P("model", None)),
)
# Methods of ``make``. "pretrained" is the baseline that never sees the stream.
NAMES = ("pretrained", *STREAMS)
_AUXILIARY = ("es_dfm", "defer")


def loss(
    params: Any,
    batch: Mapping[str, Any],
    key: Key[Array, ""] | None = None,
    *,
    net: Net,
    method: str = "defer",
    variant: str = "paper",
    clip: bool = True,
    l2: float = 1e-6,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted cross-entropy of events, plain cross-entropy of resolved clicks.

    Args:
      params: variables of the network.
      batch: features; ``label`` and ``weight`` (B,), weight 0 for padding; for ``dfm``
        ``elapsed``, days; optional ``resolved``, 1 where the label is final; optional
        ``aux`` (B, 2): p_dp and p_rn. Without it no conversion is taken to be late:
        p_dp = 0 and p_rn = 1.
      key: unused, the model has no noise.
      net: the network.
      method: one of ``NAMES``.
      variant: see ``importance_weights``.
      clip: see ``importance_weights``.
      l2: times the sum of squares of all kernels.

    Returns:
      The loss, and ``nll``: it without L2; ``mean_p``: mean prediction; ``weight``: sum
      of the batch's.

    Raises:
      ValueError: ``fsiw`` without ``aux``.
    """
    del key
    value, metrics = _loss(
        params, batch, net=net, method=method, variant=variant, clip=clip, l2=l2
    )
    metrics.pop("batch_stats")
    return value, metrics


def _loss(params, batch, key=None, *, net, method, variant, clip, l2):
    """``loss``, with the new running statistics among the metrics."""
    del key
    logits, changed = net.apply(params, batch, True, mutable=["batch_stats"])
    logits, y, weight = logits.astype(jnp.float32), batch["label"], batch["weight"]
    s, p = logits[:, 0], jax.nn.sigmoid(logits[:, 0])
    if method == "dfm":
        rows = dfm_losses(s, logits[:, 1], y, batch["elapsed"])
    else:
        name = "vanilla" if method == "pretrained" else method
        aux = batch.get("aux")
        if aux is None and method == "fsiw":
            raise ValueError(
                "fsiw needs batch['aux'] (B, 2): p(observed | converts) and p(real "
                "negative | negative), of two classifiers that see the elapsed time"
            )
        dp = jnp.zeros_like(s) if aux is None else aux[:, 0]
        rn = jnp.ones_like(s) if aux is None else aux[:, 1]
        w_pos, w_neg = importance_weights(name, p, dp, rn, clip, variant=variant)
        if "resolved" in batch:
            final = batch["resolved"] > 0
            w_pos, w_neg = (jnp.where(final, 1, w) for w in (w_pos, w_neg))
        rows = event_losses(s, y, w_pos, w_neg)
    nll = weighted_mean(rows, weight)
    metrics = {
        "nll": nll,
        "mean_p": weighted_mean(calibrate(method, p)[0], weight),
        "weight": weight.sum(),
        "batch_stats": changed.get("batch_stats", {}),
    }
    return nll + l2 * _squares(params["params"]), metrics


def _squares(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return sum(jnp.sum(x**2) for path, x in leaves if path[-1].key == "kernel")


def _auxiliary_loss(params, batch, key=None, *, net, l2):
    """``aux_loss`` of a network with two logits, on the resolved clicks of a batch."""
    del key
    logits, changed = net.apply(params, batch, True, mutable=["batch_stats"])
    weight = batch["weight"] * batch["resolved"]
    value, metrics = aux_loss(
        logits[:, 1], logits[:, 0], batch["label"], batch["delayed"], weight
    )
    stats = changed.get("batch_stats", {})
    metrics = {**metrics, "weight": weight.sum(), "batch_stats": stats}
    return value + l2 * _squares(params["params"]), metrics


def update(
    state: State, batch: Mapping[str, Any], *, model: Method, auxiliary: Method | None
) -> tuple[State, dict[str, Array]]:
    """One step on a batch of events or of resolved clicks.

    The auxiliary classifier, a ``State`` of its own in ``state.extra``, is trained while
    the batch has resolved clicks, and weighs the events after that without changing. A
    batch without weight, after the stream's end, changes nothing but ``step``.

    Args:
      state: of the model.
      batch: see ``loss``. Without a column ``resolved`` nothing of the auxiliary
        classifier's training is compiled. With ``resolved`` also ``delayed``.
      model: of the main network.
      auxiliary: of the classifier, with a sampler that gives (p_dp, p_rn); None if the
        method has none.
    """
    metrics = {}
    extra = state.extra
    if auxiliary is not None:
        if "aux" not in batch:
            assert auxiliary.sampler is not None
            known = auxiliary.sampler(extra.params, batch)
            batch = {**batch, "aux": jax.lax.stop_gradient(known)}
        if "resolved" in batch:
            extra, metrics = _train_auxiliary(extra, batch, auxiliary)
    after, main = _with_statistics(*model.update(state, batch))
    idle = batch["weight"].sum() == 0
    kept = jax.tree.map(
        lambda new, old: jnp.where(idle, old, new), after[1:3], state[1:3]
    )
    state = after._replace(params=kept[0], opt_state=kept[1], extra=extra)
    return state, {**metrics, **main}


def _train_auxiliary(extra, batch, auxiliary):
    def train(extra):
        extra, metrics = _with_statistics(*auxiliary.update(extra, batch))
        return extra, metrics["loss"]

    # Not merely a zero gradient: Adam's momentum would go on changing a frozen net.
    due = (batch["weight"] * batch["resolved"]).sum() > 0
    extra, value = jax.lax.cond(due, train, lambda x: (x, jnp.zeros(())), extra)
    return extra, {"aux_loss": value}


def _with_statistics(state, metrics):
    """Moves new running statistics from the metrics into the parameters."""
    metrics = dict(metrics)
    stats = metrics.pop("batch_stats")
    if stats:
        state = state._replace(params={**state.params, "batch_stats": stats})
    return state, metrics


def probabilities(
    params: Any, batch: Mapping[str, Any], *, net: Net
) -> Float[Array, "B K"]:
    """Sigmoid of every logit of the network, with running statistics."""
    logits: Any = net.apply(params, batch)
    return jax.nn.sigmoid(logits.astype(jnp.float32))


def sampler(
    params: Any,
    key: Key[Array, ""] | None,
    batch: Mapping[str, Any],
    extra: Any = None,
    *,
    net: Net,
    method: str = "defer",
) -> Float[Array, " B"]:
    """p(y=1|x) of N clicks or candidates, calibrated.

    Args:
      params: of the network.
      key: unused: nothing is drawn.
      batch: features.
      extra: ``State.extra``, unused: the auxiliary classifier serves training only.
      net: the network.
      method: see ``calibrate``.
    """
    del key, extra
    return calibrate(method, probabilities(params, batch, net=net)[:, 0])[0]


def make(
    config: Any,
    net: Net | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Method:
    """Binds ``config`` (see configs/defer.py).

    Args:
      config: groups ``net``, ``method``, ``optim``, ``train``.
      net: another network with the same call, instead of ``config.net``; the auxiliary
        classifier is a copy of it with two outputs.
      tx: another optimizer, instead of ``config.optim``.

    Raises:
      ValueError: unknown method or variant, rates out of range; see ``network``.
    """
    name, variant, c = config.method.name, config.method.variant, config.optim
    if name not in NAMES:
        raise ValueError(f"config.method.name must be one of {NAMES}, got {name!r}")
    if variant not in ("paper", "released"):
        raise ValueError(
            f"config.method.variant must be paper or released, got {variant!r}"
        )
    if c.l2 < 0:
        raise ValueError(f"optim.l2 must be >= 0, got {c.l2}")
    net = net or network(config, 2 if name == "dfm" else 1)
    tx = tx or optim.from_config(c, config.train.steps)
    bind: dict[str, Any] = dict(method=name, variant=variant, clip=config.method.clip)
    accumulate = config.train.accumulate

    def learner(net: Net, loss: Callable, sampler: Callable) -> Method:
        return gradient(
            lambda key, batch: net.init(key, _zeros(batch)),
            functools.partial(loss, net=net, l2=c.l2),
            tx,
            sampler=sampler,
            accumulate=accumulate,
        )

    model = learner(
        net,
        functools.partial(_loss, **bind),
        functools.partial(sampler, net=net, method=name),
    )
    auxiliary = None
    if name in _AUXILIARY:
        second = net.clone(outputs=2, name=None)
        auxiliary = learner(
            second, _auxiliary_loss, functools.partial(probabilities, net=second)
        )

    def init(key, batch):
        state = model.init(key, batch)
        if auxiliary is None:
            return state
        return state._replace(
            extra=auxiliary.init(jax.random.fold_in(state.key, 0xA0), batch)
        )

    deep = len(net.widths) > 1
    return model._replace(
        init=init,
        loss=functools.partial(loss, net=net, l2=c.l2, **bind),
        update=functools.partial(update, model=model, auxiliary=auxiliary),
        rules=RULES if deep else RULES[:2],
    )


def _zeros(batch):
    """One row of every column: initialisation needs no more."""
    return {k: jnp.zeros((1, *v.shape[1:]), v.dtype) for k, v in batch.items()}
