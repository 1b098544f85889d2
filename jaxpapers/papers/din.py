r"""Deep Interest Network: attention from a candidate to a user's past behaviour.

Guorui Zhou, Chengru Song, Xiaoqiang Zhu, Ying Fan, Han Zhu, Xiao Ma, Yanghui Yan, Junqi
Jin, Han Li, Kun Gai. "Deep Interest Network for Click-Through Rate Prediction", arXiv
1706.06978, 2017 (KDD 2018).

A click model that pools a user's past items into one vector gives every candidate the
same user. DIN weighs the past items by a small network that sees both, and does not
normalise the weights: their sum carries the strength of the interest. Mini-batch aware
regularisation makes L2 on large tables cost what a batch touches, and the activation Dice
turns where its input's distribution is.

With q the candidate's embedding (D) and k_j those of the history (T, D), m_j = [j < L]:

$$ a_j = W_3\,\sigma(W_2\,\sigma(W_1 [q; k_j; q - k_j; q \odot k_j] + b_1) + b_2) + b_3,
   \quad v = \sum_j m_j a_j k_j $$
$$ \mathcal L = -\tfrac1B \sum y \log p + (1-y) \log(1-p), \quad
   w_j \leftarrow w_j - \eta\,(g_j + \lambda \tfrac{\alpha_{mj}}{n_j} w_j) $$

Departures. The unit's features are the released code's (the paper: an outer product, not
specified). Its first layer is computed as (W_q + W_d) q + (W_k - W_d) k + W_p (q * k),
the same function without the (B, T, 4D) array. ``normalize="softmax_scaled"`` is the
released pooling. Dice's statistics leave padding out (``net.dice_padding`` counts it, as
other libraries do), and its moving averages decay by 0.99 (the paper does not say). One
logit replaces the 2-way softmax. An empty history gives v = 0 in every mode. The released
code's batch normalisation never leaves its initial statistics, so it is an affine map,
which ``net.affine`` gives; its Dice variant, which depends on that, is not here.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpapers.method import Method
from jaxpapers.method.tables import row_gradient
from jaxpapers.nets import behaviour, embedding, interest, mlp
from jaxpapers.nets.attention import activation_unit
from jaxpapers.nets.behaviour import check_batch, embed, ids
from jaxpapers.nets.mlp import DiceState, dice
from jaxpapers.ops.attention import attention_pool
from jaxpapers.optim import rows

__all__ = [
    "RULES", "DiceState", "activation_unit", "attention_pool", "check_batch", "dice",
    "embed", "forward", "ids", "init", "loss", "make", "mba_regularizer", "mba_transform",
    "sampler", "score_candidates", "statistics",
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

    Each id of the batch counts once. Its gradient is what ``mba_transform`` adds to the
    rows of a sparse one, without reading the table.

    Args:
      table: w.
      ids: of the batch.
      mask: False where an id does not count; None: where it is 0, padding.
      counts: n_j, training samples that contain the id; ids with 0 have no penalty.
      lam: weight.
    """
    mask = ids != embedding.PADDING if mask is None else mask
    used = jnp.where(mask, embedding.resolve(ids, len(table)), len(table)).reshape(-1)
    seen = jnp.zeros(len(table), bool).at[used].set(True, mode="drop")
    some = seen & (counts > 0)
    share = jnp.where(some, 1.0 / jnp.where(some, counts, 1), 0.0)
    return 0.5 * lam * (share * jnp.square(table).sum(-1)).sum()


def init(key: Key[Array, ""], net: Any) -> dict:
    """Parameters of ``config.net``: those of ``nets.interest``, and the MLP.

    Raises:
      ValueError: sizes or names that are not known.
    """
    key_interest, key_mlp = jax.random.split(key)
    params = interest.init(key_interest, net)
    sizes = (interest.width(net), *net.hidden, 1)
    return {**params, "mlp": mlp.init(key_mlp, sizes, net.activation)}


def statistics(params: dict) -> dict[str, dict[str, DiceState]]:
    """The first moving statistics of Dice, per network; ``State.extra``."""
    return {n: mlp.statistics(params[n]) for n in ("unit", "mlp") if n in params}


def forward(
    params: dict,
    state: dict[str, dict[str, DiceState]],
    batch: Mapping[str, Array],
    *,
    net: Any,
    train: bool,
) -> tuple[Float[Array, "B ..."], dict[str, dict[str, DiceState]]]:
    """Logits of candidates.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      batch: int32 item (B,) or (B, N) for N candidates of each history, cate as item,
        hist_item and hist_cate (B, T), length (B,), user (B,) if the net has a table of
        users; float32 weight (B,) is optional, rows of weight 0 are in no statistics.
      net: ``config.net``.
      train: statistics of the batch.

    Returns:
      Logits of the candidates' shape, and the statistics to use next.

    Raises:
      ValueError: T = 0, or arrays whose shapes do not fit.
    """
    x, unit = interest.apply(params, state.get("unit", {}), batch, net=net, train=train)
    logit, _, head = behaviour.head(
        params["mlp"], state["mlp"], x, batch, params["tables"], net=net, train=train
    )
    return logit, {**state, **({"unit": unit} if "unit" in state else {}), "mlp": head}


def loss(
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    net: Any,
    lam: float = 0.0,
    counts: Mapping[str, Any] | None = None,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """Mean cross-entropy of the labels, plus the mini-batch aware penalty.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      batch: see ``forward``, with label (B,).
      key: unused, the model has no noise.
      net: ``config.net``.
      lam: weight of the penalty, for dense gradients; 0 where the optimizer adds it.
      counts: per table, see ``mba_regularizer``.

    Returns:
      Nats per row; metrics ``rate``, the mean prediction, and with weights ``weight``,
      their sum; the statistics to use next.
    """
    del key
    logit, state = forward(params, state, batch, net=net, train=True)
    value, metrics = behaviour.cross_entropy(logit, batch)
    if lam:
        used = ids(batch, net=net)
        for name, n in (counts or {}).items():
            table, n = params["tables"][name], jnp.asarray(n)
            value += mba_regularizer(table, used[name], None, n, lam)
    return value, (metrics, state)


def score_candidates(
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    *,
    net: Any,
) -> Float[Array, "B ..."]:
    """Logits of N candidates for each user: ``forward`` with the moving statistics.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      batch: see ``forward``; item and cate (B, N), or (B,) for one candidate each.
      net: ``config.net``.
    """
    return forward(params, state, batch, net=net, train=False)[0]


def sampler(
    params: dict,
    key: Key[Array, ""],
    batch: Mapping[str, Array],
    extra: dict,
    *,
    net: Any,
) -> Float[Array, "B ..."]:
    """``score_candidates`` as ``Method.sampler``; nothing is drawn, key is unused.

    Args:
      params: see ``init``.
      key: unused.
      batch: see ``score_candidates``.
      extra: ``State.extra``.
      net: ``config.net``.
    """
    del key
    return score_candidates(params, extra, batch, net=net)


def make(config: Any, counts: Mapping[str, Any] | None = None) -> Method:
    """Binds ``config`` (see configs/din.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.
      counts: per table, training samples that contain each id; for ``method.mba``.

    Raises:
      ValueError: unknown names, sizes that are not positive, or ``method.mba`` without
        counts.
    """
    net, c, lam = config.net, config.optim, config.method.mba
    interest.check(net)
    if lam < 0:
        raise ValueError(f"method.mba must be >= 0, got {lam}")
    if lam and counts is None:
        raise ValueError(
            f"config.method.mba={lam} needs the number of training samples of every id: "
            "pass counts= to din.make"
        )
    if lam and c.tables == "dense" and config.train.accumulate > 1:
        raise ValueError(
            "config.method.mba with optim.tables=dense counts the ids of a micro-batch, "
            "not of the batch: set train.accumulate=1 or optim.tables=row_adagrad"
        )
    if counts:
        counts = {n: _padded(x, n, net) for n, x in counts.items()}
    tx, table_tx = rows.from_config(c, config.train.steps)

    def init_params(key, batch):
        del batch
        return init(key, net)

    value = functools.partial(loss, net=net)
    if table_tx is None:
        value = functools.partial(value, lam=lam, counts=counts)
    elif lam:
        names = jax.eval_shape(lambda key: init(key, net), jax.random.key(0))["tables"]
        every = {n: (counts or {}).get(n, np.zeros(len(t))) for n, t in names.items()}
        table_tx = optax.chain(mba_transform(lam, {"tables": every}), table_tx)
    return row_gradient(
        init_params,
        value,
        tx,
        table_tx=table_tx,
        ids=functools.partial(ids, net=net),
        clip=c.clip,
        sampler=functools.partial(sampler, net=net),
        rules=RULES,
        accumulate=config.train.accumulate,
        init_extra=statistics,
    )


def _padded(counts, name, net):
    """Counts of a vocabulary as counts of the table's rows."""
    vocab = {"item": net.item_vocab, "item_bias": net.item_vocab, "cate": net.cate_vocab,
             "user": net.user_vocab}.get(name)  # fmt: skip
    counts = np.asarray(counts, np.float32)
    if vocab is None or counts.ndim != 1 or len(counts) > vocab:
        raise ValueError(
            f"counts[{name!r}] of shape {counts.shape}: expected a vector of at most "
            f"{vocab} entries, one per id, for item, cate, user or item_bias"
        )
    count = embedding.padded_rows(vocab, net.rows_multiple)
    return np.pad(counts, (0, count - len(counts)))
