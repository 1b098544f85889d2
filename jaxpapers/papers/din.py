r"""Deep Interest Network: attention from a candidate to a user's past behaviour.

Guorui Zhou, Chengru Song, Xiaoqiang Zhu, Ying Fan, Han Zhu, Xiao Ma, Yanghui Yan, Junqi
Jin, Han Li, Kun Gai. "Deep Interest Network for Click-Through Rate Prediction", arXiv
1706.06978, 2017 (KDD 2018).

A click model that pools a user's behaviours into one vector represents the user alike
for every candidate. DIN weighs the behaviours by a small network of candidate and
behaviour, and does not normalise the weights: their sum measures the strength of the
interest. Mini-batch aware regularisation restricts the L2 penalty of large tables to the
rows of a batch, and the activation Dice bends at the mean of its input.

With q the candidate's embedding (D) and k_j those of the history (T, D), m_j = [j < L]:

$$ a_j = W_3\,\sigma(W_2\,\sigma(W_1 [q; k_j; q - k_j; q \odot k_j] + b_1) + b_2) + b_3,
   \quad v = \sum_j m_j a_j k_j $$
$$ \mathcal L = -\tfrac1B \sum y \log p + (1-y) \log(1-p), \quad
   w_j \leftarrow w_j - \eta\,(g_j + \lambda \tfrac{\alpha_{mj}}{n_j} w_j) $$

Departures. The unit's features are the released code's (the paper names an outer product
without its form). Its first layer is computed as (W_q + W_d) q + (W_k - W_d) k +
W_p (q * k), the same function without the (B, T, 4D) array.
``normalize="softmax_scaled"`` is the released pooling. Dice's statistics exclude padding
(``dice_padding`` includes it, as other libraries do), and its moving averages decay by
0.99 (not in the paper). One logit replaces the 2-way softmax. An empty history gives
v = 0 in every mode. The released code's batch normalisation never leaves its initial
statistics, so it is an affine map, which ``affine`` gives; its variant of Dice, which
depends on that, is left out.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpapers import options
from jaxpapers.method import Method
from jaxpapers.method.tables import row_gradient
from jaxpapers.nets import behaviour, embedding, interest, mlp
from jaxpapers.nets.attention import activation_unit
from jaxpapers.nets.behaviour import check_batch, embed, ids
from jaxpapers.nets.interest import Net
from jaxpapers.nets.mlp import DiceState, dice
from jaxpapers.ops.attention import attention_pool
from jaxpapers.optim import rows

__all__ = [
    "RULES", "DiceState", "Net", "activation_unit", "attention_pool", "check_batch",
    "dice", "embed", "forward", "ids", "init", "loss", "make", "mba_regularizer",
    "mba_transform", "predict", "statistics",
]  # fmt: skip

RULES = (*rows.STATE_RULES, *embedding.RULES)
mba_transform = rows.mba_transform


def mba_regularizer(
    table: Float[Array, "V D"],
    ids: Int[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None,
    counts: Float[Array, " V"] | Int[Array, " V"],
    lam: float = 0.01,
) -> Float[Array, ""]:
    r"""Mini-batch aware L2 (eq 4-6): $\tfrac\lambda2 \sum_j \alpha_j/n_j \|w_j\|^2$.

    Each distinct id of the batch counts once. ``mba_transform`` adds the gradient of this
    penalty to the rows of a sparse gradient, without reading the whole table.

    Args:
      table: w.
      ids: of the batch.
      mask: False at ids to leave out; None: those that are 0, padding.
      counts: n_j, training samples that contain the id; ids with 0 are not penalised.
      lam: weight.
    """
    mask = ids != embedding.PADDING if mask is None else mask
    places = jnp.where(mask, embedding.resolve(ids, len(table)), len(table)).reshape(-1)
    present = jnp.zeros(len(table), bool).at[places].set(True, mode="drop")
    counted = present & (counts > 0)
    scale = jnp.where(counted, 1.0 / jnp.where(counted, counts, 1), 0.0)
    return 0.5 * lam * (scale * jnp.square(table).sum(-1)).sum()


def init(key: Key[Array, ""], net: Net) -> dict:
    """Parameters: those of ``nets.interest``, and ``mlp``.

    Args:
      key: of the draws.
      net: hyper-parameters.
    """
    key_interest, key_mlp = jax.random.split(key)
    sizes = (interest.width(net), *net.hidden, 1)
    return {
        **interest.init(key_interest, net),
        "mlp": mlp.init(key_mlp, sizes, net.activation),
    }


def statistics(params: dict) -> dict[str, dict[str, DiceState]]:
    """Initial moving statistics of Dice, per network: ``State.extra``."""
    return {n: mlp.statistics(params[n]) for n in ("unit", "mlp") if n in params}


def forward(
    params: dict,
    extra: dict[str, dict[str, DiceState]],
    batch: Mapping[str, Array],
    *,
    net: Net,
    train: bool,
) -> tuple[Float[Array, "B ..."], dict[str, dict[str, DiceState]]]:
    """Logits of candidates.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``nets.behaviour``; item and cate (B,), or (B, N).
      net: hyper-parameters.
      train: whether Dice takes the batch's statistics.

    Returns:
      Logits of the candidates' shape, and the new statistics.

    Raises:
      ValueError: T = 0, or arrays whose shapes do not fit.
    """
    x, unit = interest.apply(params, extra.get("unit", {}), batch, net=net, train=train)
    logit, _, head = behaviour.head(
        params["mlp"], extra["mlp"], x, batch, params["tables"], net=net, train=train
    )
    return logit, {**extra, **({"unit": unit} if "unit" in extra else {}), "mlp": head}


def loss(
    params: dict,
    extra: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""] | None = None,
    *,
    net: Net,
    lam: float = 0.0,
    counts: Mapping[str, Any] | None = None,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """Mean cross-entropy of the labels, plus the mini-batch aware penalty.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``nets.behaviour``, with label.
      key: ignored; the loss is deterministic.
      net: hyper-parameters.
      lam: weight of the penalty; 0 where the optimizer adds its gradient.
      counts: of the penalised tables by name, see ``mba_regularizer``.

    Returns:
      Nats per row; the metrics of ``nets.behaviour.cross_entropy``; the new statistics.
    """
    del key
    logit, extra = forward(params, extra, batch, net=net, train=True)
    value, metrics = behaviour.cross_entropy(logit, batch)
    if lam:
        read = ids(batch, net=net)
        for name, n in (counts or {}).items():
            table, n = params["tables"][name], jnp.asarray(n)
            value += mba_regularizer(table, read[name], None, n, lam)
    return value, (metrics, extra)


def predict(
    params: dict, extra: dict, batch: Mapping[str, Array], *, net: Net
) -> Float[Array, "B ..."]:
    """Logits of candidates, by the moving statistics.

    Parts that do not depend on the candidate are computed once per user.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``nets.behaviour``; item and cate (B, N) for N candidates, or (B,).
      net: hyper-parameters.
    """
    return forward(params, extra, batch, net=net, train=False)[0]


def make(config: Any, counts: Mapping[str, Any] | None = None) -> Method:
    """The method of a config (configs/din.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.
      counts: per table, training samples that contain each id; for ``method.mba``.

    Raises:
      ValueError: a field that is unknown or out of range, or ``method.mba`` without
        counts.
    """
    net = options.from_config(Net, config.net, "net")
    c, lam = config.optim, config.method.mba
    options.check_least(config.method, "method", mba=0)
    if lam and counts is None:
        raise ValueError(
            f"method.mba={lam} needs the number of training samples of every id: pass "
            "counts= to din.make"
        )
    if lam and c.tables == "dense" and config.train.accumulate > 1:
        raise ValueError(
            "method.mba with optim.tables=dense counts the ids of a micro-batch, not of "
            "the batch: set train.accumulate=1 or optim.tables=row_adagrad"
        )
    if counts:
        counts = {n: _padded(x, n, net) for n, x in counts.items()}
    tx, table_tx = rows.from_config(c, config.train.steps)

    def init_params(key, batch):
        del batch
        return init(key, net)

    method_loss = functools.partial(loss, net=net)
    if table_tx is None:
        method_loss = functools.partial(method_loss, lam=lam, counts=counts)
    elif lam:
        tables = jax.eval_shape(lambda key: init(key, net), jax.random.key(0))["tables"]
        table_counts = {
            n: (counts or {}).get(n, np.zeros(len(t))) for n, t in tables.items()
        }
        table_tx = optax.chain(mba_transform(lam, {"tables": table_counts}), table_tx)
    return row_gradient(
        init_params,
        method_loss,
        tx,
        table_tx=table_tx,
        ids=functools.partial(ids, net=net),
        clip=c.clip,
        predict=functools.partial(predict, net=net),
        rules=RULES,
        accumulate=config.train.accumulate,
        init_extra=statistics,
    )


def _padded(counts, name, net):
    """Counts of the ids of a vocabulary as counts of the rows of its table."""
    vocab = {"item": net.item_vocab, "item_bias": net.item_vocab, "cate": net.cate_vocab,
             "user": net.user_vocab}.get(name)  # fmt: skip
    counts = np.asarray(counts, np.float32)
    if vocab is None or counts.ndim != 1 or len(counts) > vocab:
        raise ValueError(
            f"counts[{name!r}] of shape {counts.shape}: expected a vector of at most "
            f"{vocab} entries, one per id, for item, cate, user or item_bias"
        )
    table_rows = embedding.padded_rows(vocab, net.rows_multiple)
    return np.pad(counts, (0, table_rows - len(counts)))
