r"""Search-based Interest Model: click prediction from lifelong behaviour sequences.

Qi Pi, Xiaoqiang Zhu, Guorui Zhou, Yujing Zhang, Zhe Wang, Lejian Ren, Ying Fan, Kun Gai.
"Search-based User Interest Modeling with Lifelong Sequential Behavior Data for
Click-Through Rate Prediction", arXiv 2006.05639, 2020 (CIKM 2020).

Attention costs time in proportion to the history, so models read the last hundred
behaviours. SIM reads thousands: a General Search Unit (GSU) selects the K relevant to the
candidate, by category (hard) or by a learned inner product (soft), and an Exact Search
Unit (ESU) attends to those alone, with the time since each. Serving looks the category up
in an index, at a cost independent of the history's length.

With e_i (D) the embedding of behaviour i, e_a (D) the candidate's, C categories:

$$ r_i = [C_i = C_a] \;\text{or}\; (W_b e_i) \cdot (W_a e_a), \quad
   U_r = \textstyle\sum_i r_i e_i, \quad \text{GSU: } \mathrm{MLP}([U_r; e_a]) $$
$$ z_j = [e_j; e^t_j], \quad
   a^h_j = \mathrm{softmax}_j\,(W^h_b z_j) \cdot (W^h_a e_a), \quad
   U_{lt} = \mathrm{concat}_h \textstyle\sum_j a^h_j z_j $$
$$ \mathcal L = \alpha \mathcal L_{GSU} + \beta \mathcal L_{ESU} $$

j runs over the K best of the valid behaviours. The logit is an MLP of U_lt, DIN's
interest in the recent behaviours, the candidate and the user.

Departures. The paper writes the soft score as an element-wise product; we take the inner
product. It gives neither the buckets of time gaps nor sizes: gaps are embedded by
``ops.search.time_bucket``. ``gsu_pool="mean"`` divides U_r by the number of behaviours,
which bounds it for long histories. The short-term part is DIN's, not DIEN's. Padding is
never selected; in FuxiCTR, which has SIM, it outranks negative scores.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers import options
from jaxpapers.method import Method
from jaxpapers.method.tables import row_gradient
from jaxpapers.nets import behaviour, embedding, mlp
from jaxpapers.nets.mlp import DiceState
from jaxpapers.ops.attention import pool_history
from jaxpapers.ops.behaviour_tree import build_ubt, ubt_query
from jaxpapers.ops.means import weighted_mean
from jaxpapers.ops.search import (
    hard_search,
    time_bucket,
    topk_masked,
    topk_sharded,
)
from jaxpapers.optim import rows
from jaxpapers.papers.sim import units
from jaxpapers.papers.sim.gsu import gsu_aux, gsu_pool, soft_scores
from jaxpapers.papers.sim.net import SEARCH, Net
from jaxpapers.papers.sim.serving import projected, serve
from jaxpapers.papers.sim.units import esu

__all__ = [
    "RULES", "SEARCH", "Interests", "Net", "build_ubt", "check_batch", "esu", "forward",
    "gsu_aux", "gsu_pool", "hard_search", "ids", "init", "loss", "make", "predict",
    "projected", "serve", "soft_scores", "statistics", "time_bucket", "topk_masked",
    "topk_sharded", "ubt_query",
]  # fmt: skip

RULES = (*rows.STATE_RULES, *embedding.RULES)


class Interests(NamedTuple):
    """Output of ``forward``.

    Attributes:
      logit: ESU's logits of the candidates.
      gsu: GSU's logits of the candidates, in training with a soft search; else None.
      valid: (.., K), slots of the search that hold a behaviour; None for the average.
    """

    logit: Any
    gsu: Any
    valid: Any


def init(key: Key[Array, ""], net: Net) -> dict:
    """Parameters: ``tables``, ``mlp``, and the parts that the search needs.

    ``gsu`` is only there for the soft search, ``esu`` and ``gaps`` not for the average,
    and ``unit`` if there is a short-term part.

    Args:
      key: of the draws.
      net: hyper-parameters.
    """
    keys = jax.random.split(key, 7)
    params: dict = {"tables": behaviour.init(keys[0], net)}
    long = net.width
    if net.search != "average":
        width = net.width + net.time_dim
        params["esu"] = {
            "W_a": _projection(keys[1], (net.heads, net.head_dim, net.width)),
            "W_b": _projection(keys[2], (net.heads, net.head_dim, width)),
        }
        if net.time_dim:
            shape = (net.time_buckets, net.time_dim)
            params["gaps"] = 0.05 * jax.random.normal(keys[3], shape)
        long = net.heads * width
    if net.search == "soft":
        key_a, key_b, key_mlp = jax.random.split(keys[4], 3)
        sizes = (2 * net.width, *net.gsu_hidden, 1)
        params["gsu"] = {
            "W_a": _projection(key_a, (net.gsu_dim, net.width)),
            "W_b": _projection(key_b, (net.gsu_dim, net.width)),
            "mlp": mlp.init(key_mlp, sizes, net.activation),
        }
    if net.short:
        params["unit"] = mlp.init(
            keys[5], (4 * net.width, *net.unit, 1), net.unit_activation,
            last_bias=net.normalize == "none",  # A softmax does not see a bias.
        )  # fmt: skip
    features = long + (net.width if net.short else 0) + net.width + net.user_dim
    params["mlp"] = mlp.init(keys[6], (features, *net.hidden, 1), net.activation)
    return params


def statistics(params: dict) -> dict[str, dict[str, DiceState]]:
    """Initial moving statistics of Dice, per network: ``State.extra``."""
    networks = {n: params[n] for n in ("unit", "mlp") if n in params}
    if "gsu" in params:
        networks["gsu"] = params["gsu"]["mlp"]
    return {name: mlp.statistics(p) for name, p in networks.items()}


def forward(
    params: dict,
    extra: dict[str, dict[str, DiceState]],
    batch: Mapping[str, Array],
    *,
    net: Net,
    train: bool,
    key: Key[Array, ""] | None = None,
    distinct: int = 20,
) -> tuple[Interests, dict[str, dict[str, DiceState]]]:
    """Logits of candidates, from their whole histories.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``nets.behaviour``, with categories if the search is hard; int32 time
        (B,) of the request and hist_time (B, T) if the net embeds time gaps.
      net: hyper-parameters.
      train: whether Dice takes the batch's statistics.
      key: of the behaviours that GSU trains on, with ``net.gsu_sample``.
      distinct: with N candidates, the hard search runs once for each of up to so many
        categories; where a user's candidates have more, once per candidate.

    Returns:
      Interests, and the new statistics.

    Raises:
      ValueError: T = 0, or arrays that are missing or whose shapes do not fit.
    """
    read = units.fields(batch, net)
    tables, extra = params["tables"], dict(extra)
    query = behaviour.embed(tables, read["item"], read["cate"])
    dice = units.dice_options(net, batch, query, train)
    gsu = valid = None
    if net.search == "hard":

        def select(cates):
            selected = units.hard(read, cates, net)
            return units.embed_selected(params, read, selected, net), selected.valid

        z, valid = units.per_category(select, batch["cate"], distinct)
        long = esu(params["esu"], z, valid, query)
    else:
        keys, mask = units.embed_history(tables, read), read["long_mask"]
        if net.search == "soft":
            weights = params["gsu"]
            scores = soft_scores(weights["W_a"], weights["W_b"], keys, query)
            selected = units.soft(lax.stop_gradient(scores), mask, net)
            valid = selected.valid
            z = units.with_gaps(params, units.take(keys, selected), read, selected, net)
            long = esu(params["esu"], z, valid, query)
            if train:
                scores, keys, mask = units.subset(scores, keys, mask, key, net)
                gsu, extra["gsu"] = gsu_aux(
                    weights["mlp"], extra["gsu"], scores, keys, mask, query,
                    pool=net.gsu_pool, activation=net.activation, **dice,
                )  # fmt: skip
        else:
            long = pool_history(keys, mask, "mean")
            if query.ndim == 3:
                long = jnp.broadcast_to(long[:, None], query.shape)
    logit, extra = units.click(params, extra, batch, read, query, long, net, train)
    return Interests(logit, gsu, valid), extra


def loss(
    params: dict,
    extra: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""] | None = None,
    *,
    net: Net,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """alpha L_GSU + beta L_ESU (section 3.3), cross-entropies of the same labels.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``forward``, with label (B,).
      key: see ``forward``.
      net: hyper-parameters.
      alpha: weight of L_GSU, which only the soft search has.
      beta: weight of L_ESU.

    Returns:
      The loss per row; metrics ``esu`` and ``gsu`` in nats, ``rate`` (mean predicted
      probability), ``filled`` (share of the search's slots that hold a behaviour) and,
      with weights, ``weight`` (their sum); the new statistics.
    """
    out, extra = forward(params, extra, batch, net=net, train=True, key=key)
    label = batch["label"].astype(out.logit.dtype)
    mean = functools.partial(weighted_mean, weight=batch.get("weight"))
    metrics = {
        "esu": mean(optax.sigmoid_binary_cross_entropy(out.logit, label)),
        "rate": mean(jax.nn.sigmoid(out.logit)),
    }
    value = beta * metrics["esu"]
    if out.valid is not None:
        metrics["filled"] = mean(out.valid.mean(-1, dtype=label.dtype))
    if out.gsu is not None:
        metrics["gsu"] = mean(optax.sigmoid_binary_cross_entropy(out.gsu, label))
        value = value + alpha * metrics["gsu"]
    if "weight" in batch:
        metrics["weight"] = batch["weight"].sum()
    return value, (metrics, extra)


def predict(
    params: dict,
    extra: dict,
    batch: Mapping[str, Array],
    *,
    net: Net,
    distinct: int = 20,
) -> Float[Array, "B ..."]:
    """Logits of candidates, by the moving statistics.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``forward``; item and cate (B, N) for N candidates, or (B,).
      net: hyper-parameters.
      distinct: see ``forward``.
    """
    interests, _ = forward(
        params, extra, batch, net=net, train=False, distinct=distinct
    )
    return interests.logit


def ids(batch: Mapping[str, Array], *, net: Net) -> dict[str, Int[Array, "..."]]:
    """Ids that a batch reads of every table; of a hard search K, not T, per row."""
    if net.search != "hard":
        return behaviour.ids(batch, net=net)
    read = units.fields(batch, net)
    selected = units.hard(read, batch["cate"], net)
    parts = {}
    for name in ("hist_item", "hist_cate"):
        if read[name] is not None:
            both = [units.take(read[name], x) for x in (selected, read["recent"])]
            parts[name] = jnp.concatenate(both, 1)
    slots = parts["hist_item"].shape[1]
    length = jnp.full_like(batch["length"], slots)
    return behaviour.ids({**batch, **parts, "length": length}, net=net)


def check_batch(batch: Mapping[str, Any], *, net: Net) -> None:
    """Checks the values of a batch on the host, where a traced function cannot.

    Unchecked behaviours after the request count as just now, and of histories out of time
    order the last positions count as the most recent.

    Args:
      batch: see ``forward``.
      net: hyper-parameters.

    Raises:
      ValueError: naming the array, its values and the values expected.
    """
    behaviour.check_batch(batch, net=net)
    x = {k: np.asarray(v) for k, v in batch.items()}
    units.check_shapes(x, net)
    if "hist_time" not in x:
        return
    present = np.arange(x["hist_time"].shape[1])[None] < x["length"][:, None]
    if (present[:, 1:] & (x["hist_time"][:, 1:] < x["hist_time"][:, :-1])).any():
        raise ValueError(
            "hist_time must not fall within a history: sort it, oldest first"
        )
    late = (
        present & (x["hist_time"] > x["time"][:, None])
        if "time" in x
        else present[:, :0]
    )
    if late.any():
        row = int(np.flatnonzero(late.any(1))[0])
        raise ValueError(
            f"hist_time of row {row} reaches {x['hist_time'][row][present[row]].max()}, "
            f"after the request at time {x['time'][row]}; cut histories before it"
        )


def ablations(config: Any) -> dict[str, dict[str, Any]]:
    """Label -> fields: an average of the long history instead of a search."""
    if config.net.search == "average":
        return {}
    return {"average of the long history": {"net.search": "average"}}


def make(config: Any) -> Method:
    """The method of a config (configs/sim.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.

    Raises:
      ValueError: a field that is unknown or out of range.
    """
    net = options.from_config(Net, config.net, "net")
    c, weights = config.optim, config.method
    options.check_least(weights, "method", alpha=0)
    options.check_positive(weights, "method", "beta")
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
        predict=functools.partial(predict, net=net),
        rules=RULES,
        accumulate=config.train.accumulate,
        init_extra=statistics,
    )


def _projection(key, shape):
    heads = tuple(range(len(shape) - 2))
    return jax.nn.initializers.glorot_uniform(-1, -2, batch_axis=heads)(key, shape)
