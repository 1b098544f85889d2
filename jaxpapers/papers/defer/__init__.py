r"""DEFER: click models with delayed conversions, trained on real negatives.

Siyu Gu, Xiang-Rong Sheng, Ying Fan, Guorui Zhou, Xiaoqiang Zhu. "Real Negatives Matter:
Continuous Training with Real Negatives for Delayed Feedback Modeling", arXiv 2104.14121,
KDD 2021.

A model trained on fresh clicks labels clicks that have not converted yet as negatives and
inserts a click again, as a positive, once it converts; converting clicks are then too
frequent in its stream. DEFER inserts EVERY click again once its label is final, so the
feature distribution of the stream is that of the clicks. Importance weights remove the
remaining bias of the labels; an auxiliary classifier estimates the probability of a
delayed conversion for them.

A click x at time t_c converts after a delay z; w1 is the waiting window, w2 the
attribution window; y = 1[z <= w2], p = p(y=1|x), p_dp = p(y=1, z > w1|x). Events of each
method (``make_stream``):

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

where p is the sigmoid of the current model and p_dp the output of the auxiliary
classifier, which is trained on clicks with final labels and then frozen; no gradient
flows through the weights. A batch has either clicks with final labels (``resolved`` 1:
pretraining with unweighted cross-entropy) or events of the stream.

Departures. The equations are reconstructed from secondary accounts that agree with each
other. w_+ is clipped to [1, 2], its range for true probabilities, and denominators to
1e-6: the paper does not say what to do when estimates violate p_dp <= p.
``variant="released"`` is the authors' repository, which differs from the paper: its
stream lacks the second copy of immediate positives, and its weights differ accordingly.
DFM counts days, not seconds. ``params`` includes the running statistics of batch norm.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from jaxpapers import optim
from jaxpapers.method import Method, State, gradient
from jaxpapers.ops.means import weighted_mean
from jaxpapers.options import check_choices, check_least, from_config
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
)

__all__ = [
    "METRICS", "NAMES", "RULES", "STREAMS", "Bucket", "Net", "Options", "Stream",
    "aux_loss", "calibrate", "check_labels", "delayed_loss", "delays", "dfm_loss",
    "dfm_losses", "event_losses", "event_rows", "importance_weights", "loss", "make",
    "make_buckets", "make_stream", "network", "offline_loss", "pad_rows", "predict",
    "predict_rows", "probabilities", "relative_improvement", "run_stream", "score",
    "streaming_score", "update",
]  # fmt: skip

# Column-parallel first layer, row-parallel second layer; the embedding table is small.
RULES = (
    (r"dense_0/kernel", P(None, "model")),
    (r"dense_0/bias", P("model")),
    (r"dense_1/kernel", P("model", None)),
)
# Names of methods. "pretrained" is the baseline without training on the stream.
NAMES = ("pretrained", *STREAMS)
# Methods whose weights need the auxiliary classifier.
_AUXILIARY = ("es_dfm", "defer")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which method of the family, and its hyper-parameters.

    Attributes:
      name: one of ``NAMES``.
      variant: "paper", or "released" for the authors' repository, see
        ``importance_weights``.
      clip: see ``importance_weights``.
      l2: coefficient of the sum of squares of all kernels.
    """

    name: str = "defer"
    variant: str = "paper"
    clip: bool = True
    l2: float = 1e-6

    def __post_init__(self):
        check_choices(self, "method", name=NAMES, variant=("paper", "released"))
        check_least(self, "method", l2=0)

    @property
    def outputs(self) -> int:
        """Logits per click: DFM has one more, of the rate of conversion."""
        return 2 if self.name == "dfm" else 1


PAPER = Options()


def loss(
    params: Any,
    batch: Mapping[str, Any],
    key: Key[Array, ""] | None = None,
    *,
    net: Net | nn.Module,
    options: Options = PAPER,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted cross-entropy of events, unweighted where labels are final.

    Args:
      params: variables of ``network(net, options.outputs)``.
      batch: ``x`` (B, F); ``label`` and ``weight`` (B,), weight 0 for padding; for
        ``dfm`` ``elapsed`` (B,), days; optional ``resolved`` (B,), 1 where the label is
        final; optional ``aux`` (B, 2), p_dp and p_rn of the auxiliary classifier. Without
        ``aux`` no conversion is delayed: p_dp = 0, p_rn = 1.
      key: unused, the loss is deterministic.
      net: options of the network, or a module (see ``network``).
      options: the method and its hyper-parameters.

    Returns:
      The loss; metrics ``nll``, the loss without L2, ``mean_p``, the mean prediction, and
      ``weight``, the sum of the batch's weights.

    Raises:
      ValueError: ``fsiw`` without ``aux``.
    """
    del key
    value, metrics = _loss(params, batch, net=net, options=options)
    return value, {k: v for k, v in metrics.items() if k != "batch_stats"}


def _loss(params, batch, key=None, *, net, options):
    """``loss`` with the updated running statistics among the metrics."""
    del key
    name = options.name
    module: Any = network(net, options.outputs)
    logits, changed = module.apply(params, batch, True, mutable=["batch_stats"])
    logits, y, weight = logits.astype(jnp.float32), batch["label"], batch["weight"]
    s, p = logits[:, 0], jax.nn.sigmoid(logits[:, 0])
    if name == "dfm":
        rows = dfm_losses(s, logits[:, 1], y, batch["elapsed"])
    else:
        aux = batch.get("aux")
        if aux is None and name == "fsiw":
            raise ValueError(
                "fsiw needs batch['aux'] (B, 2): p(observed | converts) and p(real "
                "negative | negative), of two classifiers with the elapsed time as input"
            )
        dp = jnp.zeros_like(s) if aux is None else aux[:, 0]
        rn = jnp.ones_like(s) if aux is None else aux[:, 1]
        stream = "vanilla" if name == "pretrained" else name
        w_pos, w_neg = importance_weights(
            stream, p, dp, rn, options.clip, variant=options.variant
        )
        if "resolved" in batch:
            final = batch["resolved"] > 0
            w_pos, w_neg = (jnp.where(final, 1, w) for w in (w_pos, w_neg))
        rows = event_losses(s, y, w_pos, w_neg)
    nll = weighted_mean(rows, weight)
    metrics = {
        "nll": nll,
        "mean_p": weighted_mean(calibrate(name, p)[0], weight),
        "weight": weight.sum(),
        "batch_stats": changed.get("batch_stats", {}),
    }
    return nll + options.l2 * _squares(params["params"]), metrics


def _squares(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return sum(jnp.sum(x**2) for path, x in leaves if path[-1].key == "kernel")


def _auxiliary_loss(params, batch, key=None, *, net, options):
    """``aux_loss`` of a network with two logits, on the resolved clicks of a batch."""
    del key
    module: Any = network(net, 2)
    logits, changed = module.apply(params, batch, True, mutable=["batch_stats"])
    weight = batch["weight"] * batch["resolved"]
    value, metrics = aux_loss(
        logits[:, 1], logits[:, 0], batch["label"], batch["delayed"], weight
    )
    stats = changed.get("batch_stats", {})
    metrics = {**metrics, "weight": weight.sum(), "batch_stats": stats}
    return value + options.l2 * _squares(params["params"]), metrics


def update(
    state: State, batch: Mapping[str, Any], *, model: Method, auxiliary: Method | None
) -> tuple[State, dict[str, Array]]:
    """One step on a batch of events or of resolved clicks.

    The auxiliary classifier, whose ``State`` is ``state.extra``, is trained on batches of
    resolved clicks and frozen on batches of events. A batch of weight 0, after the end of
    the stream, advances ``step`` only.

    Args:
      state: of the model.
      batch: see ``loss``. A batch with a column ``resolved`` needs ``delayed`` too;
        without one, no training of the auxiliary classifier is compiled.
      model: the method of the main network.
      auxiliary: the method of the classifier, whose ``predict`` returns (p_dp, p_rn);
        None for methods without one.
    """
    metrics = {}
    extra = state.extra
    if auxiliary is not None:
        if "aux" not in batch:
            assert auxiliary.predict is not None
            aux = auxiliary.predict(extra.params, (), batch)
            batch = {**batch, "aux": jax.lax.stop_gradient(aux)}
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

    # A zero gradient would not freeze it: Adam's momentum moves parameters on.
    due = (batch["weight"] * batch["resolved"]).sum() > 0
    extra, value = jax.lax.cond(due, train, lambda x: (x, jnp.zeros(())), extra)
    return extra, {"aux_loss": value}


def _with_statistics(state, metrics):
    """Moves the updated running statistics from the metrics into the parameters."""
    metrics = dict(metrics)
    stats = metrics.pop("batch_stats")
    if stats:
        state = state._replace(params={**state.params, "batch_stats": stats})
    return state, metrics


def probabilities(
    params: Any, batch: Mapping[str, Any], *, net: Net | nn.Module, outputs: int = 1
) -> Float[Array, "B K"]:
    """Sigmoid of the K logits of the network, with running statistics.

    Args:
      params: variables of ``network(net, outputs)``.
      batch: ``x`` (B, F).
      net: options of the network, or a module.
      outputs: K.
    """
    logits: Any = network(net, outputs).apply(params, batch)
    return jax.nn.sigmoid(logits.astype(jnp.float32))


def predict(
    params: Any,
    extra: Any,
    batch: Mapping[str, Any],
    *,
    net: Net | nn.Module,
    options: Options = PAPER,
) -> Float[Array, " B"]:
    """Conversion probabilities p(y=1|x) of clicks, calibrated.

    Args:
      params: variables of the network.
      extra: ``State.extra``, unused: the auxiliary classifier serves training alone.
      batch: ``x`` (B, F).
      net: options of the network, or a module.
      options: see ``calibrate`` for the methods with a calibration.
    """
    del extra
    p = probabilities(params, batch, net=net, outputs=options.outputs)
    return calibrate(options.name, p[:, 0])[0]


def make(
    config: Any,
    net: Net | nn.Module | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Method:
    """The method of a config (see configs/defer.py).

    Args:
      config: groups ``net`` (``Net``), ``method`` (``Options``), ``optim``, ``train``.
      net: options or a module in place of ``config.net``, see ``network``.
      tx: an optimizer in place of ``config.optim``.

    Raises:
      ValueError: an option out of its range, or of another name.
    """
    options = from_config(Options, config.method, "method")
    layers: Any = net or from_config(Net, config.net, "net")
    tx = tx or optim.from_config(config.optim, config.train.steps)

    def learner(loss: Callable, predict: Callable, outputs: int) -> Method:
        module = network(layers, outputs)
        return gradient(
            lambda key, batch: module.init(key, _zeros(batch)),
            functools.partial(loss, net=layers, options=options),
            tx,
            predict=predict,
            accumulate=config.train.accumulate,
        )

    model = learner(
        _loss, functools.partial(predict, net=layers, options=options), options.outputs
    )
    auxiliary = None
    if options.name in _AUXILIARY:

        def auxiliary_probabilities(params, extra, batch):
            del extra
            return probabilities(params, batch, net=layers, outputs=2)

        auxiliary = learner(_auxiliary_loss, auxiliary_probabilities, 2)

    def init(key, batch):
        state = model.init(key, batch)
        if auxiliary is None:
            return state
        return state._replace(
            extra=auxiliary.init(jax.random.fold_in(state.key, 0xA0), batch)
        )

    deep = len(layers.widths) > 1
    return model._replace(
        init=init,
        loss=functools.partial(loss, net=layers, options=options),
        update=functools.partial(update, model=model, auxiliary=auxiliary),
        rules=RULES if deep else RULES[:2],
    )


def _zeros(batch):
    """One row of every column: initialisation needs no more."""
    return {k: jnp.zeros((1, *v.shape[1:]), v.dtype) for k, v in batch.items()}
