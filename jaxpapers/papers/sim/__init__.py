r"""Search-based Interest Model: click prediction from behaviour of a whole life.

Qi Pi, Xiaoqiang Zhu, Guorui Zhou, Yujing Zhang, Zhe Wang, Lejian Ren, Ying Fan, Kun Gai.
"Search-based User Interest Modeling with Lifelong Sequential Behavior Data for
Click-Through Rate Prediction", arXiv 2006.05639, 2020 (CIKM 2020).

Attention over a history costs its length, so models read the last hundred behaviours. SIM
reads thousands: a General Search Unit picks the K that have to do with the candidate, by
category (hard) or by an inner product that it learns (soft), and an Exact Search Unit
attends to those alone, with the time since each. Serving looks the category up in an
index, whose cost does not depend on the history's length.

With e_i (D) the embedding of behaviour i, e_a (D) the candidate's, C categories:

$$ r_i = [C_i = C_a] \;\text{or}\; (W_b e_i) \cdot (W_a e_a), \quad
   U_r = \textstyle\sum_i r_i e_i, \quad \text{GSU: } \mathrm{MLP}([U_r; e_a]) $$
$$ z_j = [e_j; e^t_j], \quad
   a^h_j = \mathrm{softmax}_j\,(W^h_b z_j) \cdot (W^h_a e_a), \quad
   U_{lt} = \mathrm{concat}_h \textstyle\sum_j a^h_j z_j $$
$$ \mathcal L = \alpha \mathcal L_{GSU} + \beta \mathcal L_{ESU} $$

j runs over the K best of the valid behaviours. ESU is an MLP on U_lt, DIN's interest in
the recent behaviours, candidate and user.

Departures. The paper writes the soft score as an element-wise product; it is read as the
inner product. It gives neither buckets of time gaps nor sizes: gaps are embedded by
``ops.search.time_bucket``. ``net.gsu_pool="mean"`` divides U_r by the number of
behaviours, which keeps its size for long histories. The short-term part is DIN's, not
DIEN's. Padding never enters the search; in the library that has SIM it outranks negative
scores.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpapers.method import Method
from jaxpapers.method.tables import row_gradient
from jaxpapers.nets import behaviour, embedding, mlp
from jaxpapers.nets.mlp import DiceState
from jaxpapers.ops.attention import NORMALIZE
from jaxpapers.ops.behaviour_tree import build_ubt, ubt_query
from jaxpapers.ops.search import (
    hard_search,
    time_bucket,
    topk_masked,
    topk_sharded,
)
from jaxpapers.optim import rows
from jaxpapers.papers.sim import units
from jaxpapers.papers.sim.serving import projected, serve
from jaxpapers.papers.sim.units import esu

__all__ = [
    "RULES", "Interests", "build_ubt", "check_batch", "esu", "forward", "gsu_aux",
    "hard_search", "ids", "init", "loss", "make", "projected", "sampler",
    "score_candidates", "serve", "soft_scores", "statistics", "time_bucket",
    "topk_masked", "topk_sharded", "ubt_query",
]  # fmt: skip

RULES = (*rows.STATE_RULES, *embedding.RULES)
SEARCH = ("hard", "soft", "average")


class Interests(NamedTuple):
    """What ``forward`` gives.

    Attributes:
      logit: of the candidates, of ESU.
      gsu: of the candidates, of the search unit's own task; None without it.
      valid: (.., K) slots of the search that hold a behaviour; None for the average.
    """

    logit: Any
    gsu: Any
    valid: Any


def soft_scores(
    w_a: Float[Array, "H D"],
    w_b: Float[Array, "H D"],
    hist_emb: Float[Array, "B T D"],
    target: Float[Array, "*candidates D"],
) -> Float[Array, "*candidates T"]:
    """r_i = (W_b e_i) . (W_a e_a), as (W_b^T W_a e_a) . e_i (eq 1, soft).

    The candidate is projected once, so that no weight is applied to T behaviours.

    Args:
      w_a: of the candidate.
      w_b: of the behaviours.
      hist_emb: e_i.
      target: e_a, (B, D) or (B, N, D).
    """
    return jnp.einsum("b...d,btd->b...t", (target @ w_a.T) @ w_b, hist_emb)


def gsu_aux(
    params: dict,
    state: dict[str, DiceState],
    scores: Float[Array, "*candidates T"],
    hist_emb: Float[Array, "B T D"],
    hist_mask: Bool[Array, "B T"],
    target: Float[Array, "*candidates D"],
    *,
    pool: str = "sum",
    **options: Any,
) -> tuple[Float[Array, "*candidates"], dict[str, DiceState]]:
    """The search unit's own click model: an MLP on [sum_i r_i e_i; e_a].

    Args:
      params: an ``nets.mlp`` from 2 D to 1.
      state: its statistics.
      scores: r_i.
      hist_emb: e_i.
      hist_mask: True at behaviours.
      target: e_a.
      pool: "sum" (the paper) or "mean", over the behaviours.
      options: of ``nets.mlp.apply``; its mask is of the rows.

    Returns:
      Logits, and the statistics to use next.

    Raises:
      ValueError: unknown pool.
    """
    pooled = gsu_pool(scores, hist_emb, hist_mask, pool=pool)
    features = jnp.concatenate([pooled, target], -1)
    logit, state = mlp.apply(params, state, features, **options)
    return logit[..., 0], state


def gsu_pool(
    scores: Float[Array, "*candidates T"],
    hist_emb: Float[Array, "B T D"],
    hist_mask: Bool[Array, "B T"],
    *,
    pool: str = "sum",
) -> Float[Array, "*candidates D"]:
    """U_r = sum_i r_i e_i over the behaviours; see ``gsu_aux``."""
    if pool not in ("sum", "mean"):
        raise ValueError(f"pool must be sum or mean, got {pool!r}")
    own = hist_mask[:, None] if scores.ndim == 3 else hist_mask
    pooled = jnp.einsum("b...t,btd->b...d", jnp.where(own, scores, 0.0), hist_emb)
    if pool == "mean":
        count = jnp.maximum(hist_mask.sum(1), 1).astype(pooled.dtype)
        pooled = pooled / count.reshape((-1,) + (1,) * (pooled.ndim - 1))
    return pooled


def init(key: Key[Array, ""], net: Any) -> dict:
    """Parameters of ``config.net``; those of GSU only if the search is soft.

    Raises:
      ValueError: sizes or names that are not known.
    """
    _check_net(net)
    keys = jax.random.split(key, 7)
    width = net.item_dim + net.cate_dim
    params: dict = {"tables": behaviour.init(keys[0], net)}
    long = width
    if net.search != "average":
        both = width + net.time_dim
        params["esu"] = {
            "W_a": _projection(keys[1], (net.heads, net.head_dim, width)),
            "W_b": _projection(keys[2], (net.heads, net.head_dim, both)),
        }
        if net.time_dim:
            shape = (net.time_buckets, net.time_dim)
            params["gaps"] = 0.05 * jax.random.normal(keys[3], shape)
        long = net.heads * both
    if net.search == "soft":
        key_a, key_b, key_mlp = jax.random.split(keys[4], 3)
        params["gsu"] = {
            "W_a": _projection(key_a, (net.gsu_dim, width)),
            "W_b": _projection(key_b, (net.gsu_dim, width)),
            "mlp": mlp.init(key_mlp, (2 * width, *net.gsu_hidden, 1), net.activation),
        }
    if net.short:
        # A softmax does not see a bias.
        params["unit"] = mlp.init(
            keys[5], (4 * width, *net.unit, 1), net.unit_activation,
            last_bias=net.normalize == "none",
        )  # fmt: skip
    total = long + (width if net.short else 0) + width + net.user_dim
    params["mlp"] = mlp.init(keys[6], (total, *net.hidden, 1), net.activation)
    return params


def statistics(params: dict) -> dict[str, dict[str, DiceState]]:
    """The first moving statistics of Dice, per network; ``State.extra``."""
    found = {n: mlp.statistics(params[n]) for n in ("unit", "mlp") if n in params}
    if "gsu" in params:
        found["gsu"] = mlp.statistics(params["gsu"]["mlp"])
    return found


def forward(
    params: dict,
    state: dict[str, dict[str, DiceState]],
    batch: Mapping[str, Array],
    *,
    net: Any,
    train: bool,
    key: Key[Array, ""] | None = None,
    distinct: int = 20,
) -> tuple[Interests, dict[str, dict[str, DiceState]]]:
    """Logits of candidates, from their whole histories.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      batch: see ``nets.behaviour``, with categories; also int32 time (B,) of the request
        and hist_time (B, T) if the net embeds time gaps. Histories are oldest first.
      net: ``config.net``.
      train: statistics of the batch.
      key: of the behaviours that GSU's task sees, if ``net.gsu_sample``.
      distinct: with N candidates, the hard search runs once for each of so many
        categories; where a user's candidates have more, once per candidate.

    Returns:
      Interests, and the statistics to use next.

    Raises:
      ValueError: T = 0, or arrays that are missing or whose shapes do not fit.
    """
    use = units.fields(batch, net)
    tables, state = params["tables"], dict(state)
    query = behaviour.embed(tables, use["item"], use["cate"])
    options = units.options(net, use, train, query.ndim == 3)
    gsu = valid = None
    if net.search == "hard":

        def find(cates):
            found = units.hard(use, cates, net)
            return units.selected(params, use, found, net), found.valid

        z, valid = units.per_category(find, batch["cate"], distinct)
        long = esu(params["esu"], z, valid, query)
    else:
        keys, mask = units.read_history(tables, use), use["long_mask"]
        if net.search == "soft":
            unit = params["gsu"]
            scores = soft_scores(unit["W_a"], unit["W_b"], keys, query)
            found = units.soft(lax.stop_gradient(scores), mask, net)
            valid = found.valid
            z = units.with_gaps(params, units.pick(keys, found), use, found, net)
            long = esu(params["esu"], z, valid, query)
            if train:
                scores, keys, mask = units.some(scores, keys, mask, key, net)
                gsu, state["gsu"] = gsu_aux(
                    unit["mlp"], state["gsu"], scores, keys, mask, query,
                    pool=net.gsu_pool, activation=net.activation, **options,
                )  # fmt: skip
        else:
            long = jnp.where(mask[..., None], keys, 0.0).sum(1)
            long = long / jnp.maximum(mask.sum(1), 1)[:, None].astype(long.dtype)
            if query.ndim == 3:
                long = jnp.broadcast_to(long[:, None], query.shape)
    logit, state = units.click(params, state, use, query, long, net, options)
    return Interests(logit, gsu, valid), state


def loss(
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    net: Any,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """alpha L_GSU + beta L_ESU (section 3.3), cross-entropies of the same labels.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      batch: see ``forward``, with label (B,).
      key: see ``forward``.
      net: ``config.net``.
      alpha: weight of L_GSU; without a soft search there is none (the paper's alpha 0).
      beta: weight of L_ESU.

    Returns:
      The loss per row; metrics ``esu`` and ``gsu`` in nats, ``rate``, the mean
      prediction, ``found``, the share of slots that the search filled, and with weights
      ``weight``, their sum; the statistics to use next.
    """
    out, state = forward(params, state, batch, net=net, train=True, key=key)
    label = batch["label"].astype(out.logit.dtype)
    weight = batch.get("weight", jnp.ones_like(label))
    total = weight.sum()
    share = weight / jnp.where(total == 0, 1, total)

    def mean(x):
        return (x * share).sum()

    metrics = {
        "esu": mean(optax.sigmoid_binary_cross_entropy(out.logit, label)),
        "rate": mean(jax.nn.sigmoid(out.logit)),
    }
    value = beta * metrics["esu"]
    if out.valid is not None:
        metrics["found"] = mean(out.valid.mean(-1, dtype=label.dtype))
    if out.gsu is not None:
        metrics["gsu"] = mean(optax.sigmoid_binary_cross_entropy(out.gsu, label))
        value = value + alpha * metrics["gsu"]
    if "weight" in batch:
        metrics["weight"] = total
    return value, (metrics, state)


def score_candidates(
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    *,
    net: Any,
    distinct: int = 20,
) -> Float[Array, "B ..."]:
    """Logits of N candidates for each user: ``forward`` with the moving statistics.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      batch: see ``forward``; item and cate (B, N), or (B,) for one candidate each.
      net: ``config.net``.
      distinct: see ``forward``.
    """
    return forward(params, state, batch, net=net, train=False, distinct=distinct)[
        0
    ].logit


def sampler(
    params: dict,
    key: Key[Array, ""],
    batch: Mapping[str, Array],
    extra: dict,
    *,
    net: Any,
    distinct: int = 20,
) -> Float[Array, "B ..."]:
    """``score_candidates`` as ``Method.sampler``; nothing is drawn, key is unused.

    Args:
      params: see ``init``.
      key: unused.
      batch: see ``score_candidates``.
      extra: ``State.extra``.
      net: ``config.net``.
      distinct: see ``forward``.
    """
    del key
    return score_candidates(params, extra, batch, net=net, distinct=distinct)


def ids(batch: Mapping[str, Array], *, net: Any) -> dict[str, Int[Array, "..."]]:
    """The ids that a batch reads of every table; of a hard search K, not T, per row."""
    if net.search != "hard":
        return behaviour.ids(batch, net=net)
    use = units.fields(batch, net)
    found = units.hard(use, batch["cate"], net)
    parts = {}
    for name in ("hist_item", "hist_cate"):
        if use[name] is not None:
            both = [units.pick(use[name], x) for x in (found, use["recent"])]
            parts[name] = jnp.concatenate(both, 1)
    slots = parts["hist_item"].shape[1]
    length = jnp.full_like(batch["length"], slots)
    return behaviour.ids({**batch, **parts, "length": length}, net=net)


def check_batch(batch: Mapping[str, Any], *, net: Any) -> None:
    """Checks the values of a batch on the host; inside jit only shapes can be.

    Without it, behaviours after the request count as just now, and histories that are
    not in time order have another "most recent".

    Args:
      batch: arrays of ``forward`` and label.
      net: ``config.net``.

    Raises:
      ValueError: naming the field, what it holds and what it should hold.
    """
    behaviour.check_batch(batch, net=net)
    x = {k: np.asarray(v) for k, v in batch.items()}
    units.check_shapes(x, net)
    if "hist_time" not in x:
        return
    here = np.arange(x["hist_time"].shape[1])[None] < x["length"][:, None]
    if (here[:, 1:] & (np.diff(x["hist_time"], axis=1) < 0)).any():
        raise ValueError(
            "hist_time must not fall within a history: sort it, oldest first"
        )
    late = here & (x["hist_time"] > x["time"][:, None]) if "time" in x else here[:, :0]
    if late.any():
        row = int(np.flatnonzero(late.any(1))[0])
        raise ValueError(
            f"hist_time of row {row} reaches {x['hist_time'][row][here[row]].max()}, "
            f"after the request at time {x['time'][row]}; cut histories before it"
        )


def ablations(config: Any) -> dict[str, dict[str, Any]]:
    """Label -> fields: an average of the long history instead of a search."""
    if config.net.search == "average":
        return {}
    return {"average of the long history": {"net.search": "average"}}


def make(config: Any) -> Method:
    """Binds ``config`` (see configs/sim.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.

    Raises:
      ValueError: unknown names, or sizes, weights and rates that are out of range.
    """
    net, c, weights = config.net, config.optim, config.method
    _check_net(net)
    if weights.alpha < 0 or weights.beta <= 0:
        raise ValueError(
            "config.method.beta must be > 0 and method.alpha >= 0, got "
            f"{weights.beta} and {weights.alpha}"
        )

    tx, table_tx = rows.from_config(c, config.train.steps)

    def init_params(key, batch):
        del batch
        return init(key, net)

    return row_gradient(
        init_params,
        functools.partial(loss, net=net, alpha=weights.alpha, beta=weights.beta),
        tx,
        table_tx=table_tx,
        ids=functools.partial(ids, net=net),
        clip=c.clip,
        sampler=functools.partial(sampler, net=net),
        rules=RULES,
        accumulate=config.train.accumulate,
        init_extra=statistics,
    )


def _projection(key, shape):
    heads = tuple(range(len(shape) - 2))
    return jax.nn.initializers.glorot_uniform(-1, -2, batch_axis=heads)(key, shape)


def _check_net(net):
    choices = {"search": SEARCH, "normalize": NORMALIZE, "gsu_pool": ("sum", "mean")}
    for name, known in choices.items():
        value = getattr(net, name)
        if value not in known:
            raise ValueError(f"config.net.{name} must be one of {known}, got {value!r}")
    mlp.check(net.activation, "config.net.activation")
    mlp.check(net.unit_activation, "config.net.unit_activation")
    behaviour.check_sizes(net)
    least = {"k": 1, "heads": 1, "head_dim": 1, "gsu_dim": 1, "time_buckets": 1,
             "time_unit": 1, "time_dim": 0, "short": 0, "skip": 0, "chunk": 0,
             "gsu_sample": 0}  # fmt: skip
    for name, low in least.items():
        if getattr(net, name) < low:
            raise ValueError(
                f"config.net.{name} must be >= {low}, got {getattr(net, name)}"
            )
