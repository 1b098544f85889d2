r"""Deep Interest Evolution Network: interests as a process that a candidate steers.

Guorui Zhou, Na Mou, Ying Fan, Qi Pi, Weijie Bian, Chang Zhou, Xiaoqiang Zhu, Kun Gai.
"Deep Interest Evolution Network for Click-Through Rate Prediction", arXiv 1809.03672,
2018 (AAAI 2019).

DIN treats a user's behaviours as a set. DIEN reads them in order: a GRU extracts an
interest at every step, and an auxiliary loss trains each state to tell the next behaviour
from a sampled one. Attention to the candidate scales the update gate of a second
recurrent layer, whose state therefore changes only at steps relevant to the candidate.

With e_t the behaviours (n_E), h_t the GRU's states (n_H), e_a the candidate (n_A):

$$ L_{aux} = -\tfrac1N \sum_{i,t} \log \sigma(h_t, e_{t+1})
   + \log(1 - \sigma(h_t, \hat e_{t+1})) $$
$$ a_t = \frac{\exp(h_t W e_a)}{\sum_j \exp(h_j W e_a)}, \quad
   \tilde u_t = a_t u_t, \quad
   h'_t = (1 - \tilde u_t) \odot h'_{t-1} + \tilde u_t \odot \tilde h'_t $$
$$ L = L_{target} + \alpha L_{aux} $$

The last h' goes to an MLP with the candidate, the user, the sum of the history and its
product with the candidate (the last two are the released code's).

Departures. In the released cell the update gate keeps the state instead of writing it,
so that steps without attention still change it: ``variant="augru_released"``. The printed
sigma(h, e) is not a scalar: as in the code it is an MLP of both, or, with
``aux="inner"``, the sigmoid of their inner product. The normaliser of L_aux differs
between paper, code and other libraries, see ``aux_loss``, and with it the scale of alpha:
the code's cross-entropy is a mean over both outputs of a softmax, half of ours, so that
its alpha = 1 is alpha = 2 here. One logit replaces each 2-way softmax, without 1e-8 in
the logarithm. Batch normalisation, which never leaves its initial statistics in the code,
is left out: it is an affine map before a linear one. As in the code, update gates that
attention scales start at bias 1, the others at -1. Negatives that are not in the batch
are drawn from its histories, so that a step reads no further rows of the tables.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxpapers import options
from jaxpapers.method import Method
from jaxpapers.method.tables import row_gradient
from jaxpapers.nets import behaviour, embedding, evolution, mlp
from jaxpapers.nets.behaviour import check_batch
from jaxpapers.nets.evolution import bilinear_attention, din_attention, evolve
from jaxpapers.nets.gru import VARIANTS, augru_scan, gru_scan
from jaxpapers.nets.mlp import DiceState
from jaxpapers.ops.means import weighted_mean
from jaxpapers.ops.rows import replicate
from jaxpapers.optim import rows
from jaxpapers.papers.dien.auxiliary import REDUCE, aux_loss, sample_negatives

__all__ = [
    "AUX", "REDUCE", "RULES", "VARIANTS", "Net", "augru_scan", "aux_loss",
    "bilinear_attention", "check_batch", "din_attention", "evolve", "forward",
    "gru_scan", "ids", "init", "loss", "make", "predict", "sample_negatives",
    "statistics",
]  # fmt: skip

RULES = (*rows.STATE_RULES, *embedding.RULES)
AUX = ("concat", "inner")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net(evolution.Net):
    """Hyper-parameters of DIEN, the released code's as defaults."""

    aux: str = "concat"
    """Score of a state and a behaviour: concat is an MLP of both, inner their product."""
    aux_hidden: tuple[int, ...] = (100, 50)
    """Widths of that MLP's hidden layers."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        super().__post_init__()
        options.check_choices(self, "net", aux=AUX)
        options.check_least(self, "net", aux_hidden=1)
        if self.aux == "inner" and self.state != self.width:
            raise ValueError(
                f"net.state must be item_dim + cate_dim = {self.width} with "
                f"net.aux=inner; got {self.state}"
            )


def init(key: Key[Array, ""], net: Net, *, aux: bool = True) -> dict:
    """Parameters: ``tables``, those of ``nets.evolution``, ``mlp`` and ``aux``.

    Args:
      key: of the draws.
      net: hyper-parameters.
      aux: whether ``aux`` is among them; not with an inner product anyway.
    """
    key_tables, key_core, key_aux, key_mlp = jax.random.split(key, 4)
    sizes = (evolution.width(net), *net.hidden, 1)
    params = {
        "tables": behaviour.init(key_tables, net),
        **evolution.init(key_core, net),
        "mlp": mlp.init(key_mlp, sizes, net.activation),
    }
    if aux and net.aux == "concat":
        sizes = (net.state + net.width, *net.aux_hidden, 1)
        params["aux"] = mlp.init(key_aux, sizes, "sigmoid")
    return params


def statistics(params: dict) -> dict[str, DiceState]:
    """Initial moving statistics of the MLP's Dice: ``State.extra``."""
    return mlp.statistics(params["mlp"])


def forward(
    params: dict,
    extra: dict[str, DiceState],
    batch: Mapping[str, Array],
    *,
    net: Net,
    train: bool,
) -> tuple[Float[Array, "B ..."], Float[Array, "B T H"], dict[str, DiceState]]:
    """Logits of candidates.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``nets.behaviour``; item and cate (B,), or (B, N).
      net: hyper-parameters.
      train: whether Dice takes the batch's statistics.

    Returns:
      Logits of the candidates' shape, the extractor's states, and the new statistics.

    Raises:
      ValueError: T = 0, or arrays whose shapes do not fit.
    """
    embedded = evolution.embed(params["tables"], batch, net=net)
    return _forward(params, extra, batch, embedded, net, train)


def _forward(params, extra, batch, embedded, net, train):
    x, states = evolution.apply(params, embedded, net=net, train=train)
    logit, _, extra = behaviour.head(
        params["mlp"], extra, x, batch, params["tables"], net=net, train=train
    )
    return logit, states, extra


def loss(
    params: dict,
    extra: dict[str, DiceState],
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    net: Net,
    aux_weight: float = 1.0,
    aux_reduce: str = "valid_mean",
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict[str, DiceState]]]:
    """Cross-entropy of the labels plus the weighted auxiliary loss.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``nets.behaviour``, with label; neg_hist_item and neg_hist_cate (B, T),
        aligned with the history, are optional negatives.
      key: of the negatives, if the batch has none.
      net: hyper-parameters.
      aux_weight: alpha (paper: 1); 0 leaves the auxiliary loss out.
      aux_reduce: see ``aux_loss``.

    Returns:
      Nats; the metrics of ``nets.behaviour.cross_entropy`` and ``target`` (its value)
      and, with the auxiliary loss, ``aux``, ``aux_accuracy`` and ``aux_collisions``
      (share of the negatives that are the clicked item); the new statistics.
    """
    embedded = evolution.embed(params["tables"], batch, net=net)
    logit, states, extra = _forward(params, extra, batch, embedded, net, True)
    value, metrics = behaviour.cross_entropy(logit, batch)
    metrics["target"] = value
    if aux_weight:
        read = behaviour.fields(batch, net)
        weight = batch.get("weight", jnp.ones(logit.shape, logit.dtype))
        item, cate = _negatives(batch, read, key, net)
        neg = behaviour.embed(params["tables"], item, cate)
        aux, aux_metrics = aux_loss(
            params["aux"] if net.aux == "concat" else {},
            states, embedded.keys, neg, read["mask"], aux_reduce, weight=weight,
        )  # fmt: skip
        collisions = (item == read["hist_item"])[:, 1:].astype(logit.dtype)
        of_steps = weight[:, None] * read["mask"][:, 1:]
        metrics |= {"aux": aux, **aux_metrics}
        metrics["aux_collisions"] = weighted_mean(collisions, of_steps)
        value = value + aux_weight * aux
    return value, (metrics, extra)


def _negatives(batch, read, key, net):
    """Ids of the batch's negatives, or of drawn ones; zeros at padding."""
    mask, cate = read["mask"], None
    if "neg_hist_item" in batch:
        item = embedding.resolve(batch["neg_hist_item"], net.item_vocab)
        if net.cate_dim:
            cate = embedding.resolve(batch["neg_hist_cate"], net.cate_vocab)
    else:
        pool = replicate(read["hist_item"]).reshape(-1)
        drawable = replicate(_weighted(mask, read)).reshape(-1)
        position = sample_negatives(key, pool, read["hist_item"], drawable)
        item = pool[position]
        if net.cate_dim:
            cate = replicate(read["hist_cate"]).reshape(-1)[position]
    return (
        jnp.where(mask, item, embedding.PADDING),
        None if cate is None else jnp.where(mask, cate, embedding.PADDING),
    )


def _weighted(mask, read):
    """The history's mask without the rows of weight 0."""
    return mask if read["row_mask"] is None else mask & read["row_mask"][:, None]


def ids(batch: Mapping[str, Array], *, net: Net) -> dict[str, Int[Array, "..."]]:
    """Ids that a batch reads of every table, see ``nets.behaviour.ids``.

    Negatives of the batch are among them; drawn ones are ids of its histories anyway.
    """
    tables = behaviour.ids(batch, net=net)
    read = behaviour.fields(batch, net)
    kept = _weighted(read["mask"], read)
    for name, vocab in (("item", net.item_vocab), ("cate", net.cate_vocab)):
        if f"neg_hist_{name}" in batch and name in tables:
            neg = embedding.resolve(batch[f"neg_hist_{name}"], vocab)
            neg = jnp.where(kept, neg, embedding.PADDING)
            tables[name] = jnp.concatenate([tables[name], neg], 1)
    return tables


def predict(
    params: dict,
    extra: dict[str, DiceState],
    batch: Mapping[str, Array],
    *,
    net: Net,
) -> Float[Array, "B ..."]:
    """Logits of candidates, by the moving statistics.

    The extractor runs once per user, the second layer once per candidate.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``nets.behaviour``; item and cate (B, N) for N candidates, or (B,).
      net: hyper-parameters.
    """
    return forward(params, extra, batch, net=net, train=False)[0]


def ablations(config: Any) -> dict[str, dict[str, Any]]:
    """Label -> fields: without the auxiliary loss, or with it if it is off."""
    if config.method.aux_weight:
        return {"without auxiliary loss": {"method.aux_weight": 0.0}}
    return {"with auxiliary loss": {"method.aux_weight": 1.0}}


def make(config: Any) -> Method:
    """The method of a config (configs/dien.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.

    Raises:
      ValueError: a field that is unknown or out of range.
    """
    net = options.from_config(Net, config.net, "net")
    c, aux = config.optim, config.method
    options.check_least(aux, "method", aux_weight=0)
    options.check_choices(aux, "method", aux_reduce=REDUCE)

    def init_params(key, batch):
        del batch
        return init(key, net, aux=aux.aux_weight > 0)

    tx, table_tx = rows.from_config(c, config.train.steps)
    return row_gradient(
        init_params,
        functools.partial(
            loss, net=net, aux_weight=aux.aux_weight, aux_reduce=aux.aux_reduce
        ),
        tx,
        table_tx=table_tx,
        ids=functools.partial(ids, net=net),
        clip=c.clip,
        predict=functools.partial(predict, net=net),
        rules=RULES,
        accumulate=config.train.accumulate,
        init_extra=statistics,
    )
