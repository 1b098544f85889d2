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
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpapers.method import Method, row_gradient
from jaxpapers.nets import behaviour, embedding, mlp
from jaxpapers.nets.attention import activation_unit
from jaxpapers.nets.mlp import DiceState
from jaxpapers.ops import search
from jaxpapers.ops.attention import NORMALIZE, attention_pool
from jaxpapers.ops.search import (
    BehaviourTree,
    Found,
    build_ubt,
    hard_search,
    time_bucket,
    topk_masked,
    topk_sharded,
    ubt_query,
)
from jaxpapers.optim import rows

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


def esu(
    params: dict,
    z: Float[Array, "*batch K Z"],
    valid: Bool[Array, "*batch K"],
    target: Float[Array, "*batch D"],
    *,
    scaled: bool = False,
) -> Float[Array, "*batch U"]:
    """Exact search attention: every head a weighted sum of the selected (section 3.2).

    Args:
      params: W_a of the candidate (heads, H, D) and W_b of the selected (heads, H, Z); if
        there, W_v (heads, H', Z) makes values of z, and W_o (U, heads H') mixes heads.
      z: selected behaviours with their time gaps.
      valid: False at empty slots; a row without any gives zeros.
      target: e_a.
      scaled: divide the logits by sqrt(H) (not in the paper).

    Returns:
      The heads side by side.
    """
    width = params["W_a"].shape[1]
    candidate = jnp.einsum("...d,qhd->...qh", target, params["W_a"])
    # As in ``soft_scores``: the weights of z are applied to the candidate.
    candidate = jnp.einsum("...qh,qhz->...qz", candidate, params["W_b"])
    logits = jnp.einsum("...qz,...kz->...qk", candidate, z)
    logits = logits / np.sqrt(width).astype(logits.dtype) if scaled else logits
    heads = attention_pool(logits, z[..., None, :, :], valid[..., None, :], "softmax")
    if "W_v" in params:
        heads = jnp.einsum("...qz,qhz->...qh", heads, params["W_v"])
    heads = heads.reshape(*heads.shape[:-2], -1)
    return heads @ params["W_o"].T if "W_o" in params else heads


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
    use = _fields(batch, net)
    tables, state = params["tables"], dict(state)
    query = behaviour.read(tables, use["item"], use["cate"])
    options = _options(net, use, train, query.ndim == 3)
    gsu = valid = None
    if net.search == "hard":

        def find(cates):
            found = _hard(use, cates, net)
            return _selected(params, use, found, net), found.valid

        z, valid = _per_category(find, batch["cate"], distinct)
        long = esu(params["esu"], z, valid, query)
    else:
        keys, mask = _read_history(tables, use), use["long_mask"]
        if net.search == "soft":
            unit = params["gsu"]
            scores = soft_scores(unit["W_a"], unit["W_b"], keys, query)
            found = _soft(lax.stop_gradient(scores), mask, net)
            valid = found.valid
            z = _with_gaps(params, _pick(keys, found), use, found, net)
            long = esu(params["esu"], z, valid, query)
            if train:
                scores, keys, mask = _some(scores, keys, mask, key, net)
                gsu, state["gsu"] = gsu_aux(
                    unit["mlp"], state["gsu"], scores, keys, mask, query,
                    pool=net.gsu_pool, activation=net.activation, **options,
                )  # fmt: skip
        else:
            long = jnp.where(mask[..., None], keys, 0.0).sum(1)
            long = long / jnp.maximum(mask.sum(1), 1)[:, None].astype(long.dtype)
            if query.ndim == 3:
                long = jnp.broadcast_to(long[:, None], query.shape)
    logit, state = _click(params, state, use, query, long, net, options)
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


def serve(
    params: dict,
    state: dict,
    ubt: BehaviourTree,
    batch: Mapping[str, Array],
    *,
    net: Any,
    distinct: int = 20,
) -> Float[Array, "B ..."]:
    """``score_candidates`` of the hard search, from the user behaviour tree.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      ubt: see ``build_ubt``; all its behaviours must be older than the request.
      batch: user (B,), as in the tree, item and cate (B, N), time (B,), and histories of
        the recent behaviours alone, any T >= ``net.short``.
      net: ``config.net``.
      distinct: see ``forward``.

    Raises:
      ValueError: the search is not hard.
    """
    if net.search != "hard":
        raise ValueError(
            f"serve reads the index of the hard search, got net.search={net.search!r}; "
            "use score_candidates"
        )
    use = _fields(batch, net)
    query = behaviour.read(params["tables"], use["item"], use["cate"])

    def find(cates):
        user = jnp.broadcast_to(batch["user"][:, None], cates.shape)
        known = ubt_query(ubt, user, cates, net.k)
        valid = known.valid & (cates != embedding.PADDING)[..., None]
        item = jnp.where(valid, embedding.resolve(known.items, net.item_vocab), 0)
        cate = None
        if net.cate_dim:
            cate = embedding.resolve(cates, net.cate_vocab)[..., None]
            cate = jnp.where(valid, cate, 0)
        z = behaviour.read(params["tables"], item, cate)
        return _append_gaps(params, z, use["time"], known.times, net), valid

    z, valid = _per_category(find, batch["cate"], distinct)
    long = esu(params["esu"], z, valid, query)
    options = _options(net, use, False, query.ndim == 3)
    return _click(params, state, use, query, long, net, options)[0]


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


def projected(params: dict, net: Any) -> dict[str, Array]:
    """W_b e_i of every item and category in bfloat16, for ``search.soft_search``.

    e_i is item and category side by side, so W_b e_i is a sum of two rows. Nothing keeps
    the copies up to date: make them again after training.

    Args:
      params: see ``init``.
      net: ``config.net``.

    Raises:
      ValueError: the search is not soft.
    """
    if net.search != "soft":
        raise ValueError(
            f"only the soft search projects, got net.search={net.search!r}"
        )
    tables, w_b = params["tables"], params["gsu"]["W_b"]
    parts = {"item": w_b[:, : net.item_dim]}
    if net.cate_dim:
        parts["cate"] = w_b[:, net.item_dim :]
    return {n: search.pack(tables[n] @ w.T) for n, w in parts.items()}


def ids(batch: Mapping[str, Array], *, net: Any) -> dict[str, Int[Array, "..."]]:
    """The ids that a batch reads of every table; of a hard search K, not T, per row."""
    if net.search != "hard":
        return behaviour.ids(batch, net=net)
    use = _fields(batch, net)
    found = _hard(use, batch["cate"], net)
    parts = {}
    for name in ("hist_item", "hist_cate"):
        if use[name] is not None:
            both = [_pick(use[name], x) for x in (found, use["recent"])]
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
    _check_shapes(x, net)
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


def rivals(config: Any) -> dict[str, Any]:
    """The same model with an average of the long history instead of a search."""
    if config.net.search == "average":
        return {}
    other = config.copy_and_resolve_references()
    other.net.search = "average"
    return {"average of the long history": other}


def make(config: Any) -> Method:
    """Binds ``config`` (see configs/sim.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.

    Raises:
      ValueError: unknown names, or sizes, weights and rates that are out of range.
    """
    net, c, weights = config.net, config.optim, config.method
    _check_net(net)
    if c.lr <= 0 or c.clip < 0 or weights.alpha < 0 or weights.beta <= 0:
        raise ValueError(
            "config.optim.lr and method.beta must be > 0, optim.clip and method.alpha "
            f">= 0, got {c.lr}, {weights.beta}, {c.clip} and {weights.alpha}"
        )

    tx, table_tx = rows.by_name(c.name, c.tables, c.lr)

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


def _fields(batch, net) -> dict[str, Any]:
    """``behaviour.fields`` with raw categories, times, and what each part may see."""
    _check_shapes(batch, net)
    use = behaviour.fields(batch, net)
    place = jnp.arange(batch["hist_item"].shape[1], dtype=jnp.int32)[None]
    use["long_mask"] = use["mask"] & (place < batch["length"][:, None] - net.skip)
    use["time"], use["hist_time"] = batch.get("time"), batch.get("hist_time")
    # Raw: two unknown categories are not the same. 0 is none and matches nothing.
    use["raw_cate"] = batch.get("hist_cate")
    back = jnp.arange(net.short, dtype=jnp.int32)[None]
    last = batch["length"][:, None] - 1 - back
    idx = jnp.where(last >= 0, last, -1)
    use["recent"] = Found(idx, last >= 0, idx)
    return use


def _hard(use, cates, net) -> Found:
    mask = use["long_mask"] & (use["raw_cate"] != embedding.PADDING)
    hist = use["raw_cate"]
    if cates.ndim == 2:
        shape = (*cates.shape, hist.shape[1])
        mask, hist = (jnp.broadcast_to(x[:, None], shape) for x in (mask, hist))
    return hard_search(hist, mask, cates, net.k)


def _soft(scores, mask, net) -> Found:
    if scores.ndim == 3:
        mask = jnp.broadcast_to(mask[:, None], scores.shape)
    return search.topk_on_mesh(scores, mask, net.k, chunk=net.chunk)


def _read_history(tables, use):
    return behaviour.read(tables, use["hist_item"], use["hist_cate"])


def _selected(params, use, found, net):
    """z of a search's results: ids are gathered first, K rows embedded."""
    z = _read_at(params["tables"], use, found)
    return _with_gaps(params, z, use, found, net)


def _read_at(tables, use, found):
    """Embeddings of the behaviours at positions; no others are read."""
    cate = None if use["hist_cate"] is None else _pick(use["hist_cate"], found)
    return behaviour.read(tables, _pick(use["hist_item"], found), cate)


def _with_gaps(params, z, use, found, net):
    if not net.time_dim:
        return z
    return _append_gaps(params, z, use["time"], _pick(use["hist_time"], found), net)


def _append_gaps(params, z, now, times, net):
    if not net.time_dim:
        return z
    gaps = now.reshape((-1,) + (1,) * (times.ndim - 1)) - times
    bucket = time_bucket(gaps, buckets=net.time_buckets, unit=net.time_unit)
    return jnp.concatenate([z, params["gaps"][bucket]], -1)


def _pick(values, found):
    """``search.take`` of (B, T, ..) at (B, K) or (B, N, K) positions."""
    shape = found.idx.shape
    flat = jax.tree.map(lambda x: x.reshape(shape[0], -1), found)
    picked = search.take(values, flat)
    return picked.reshape(*shape, *values.shape[2:])


def _per_category(find: Callable, cates, distinct: int):
    """find((B, S) categories) for candidates, once per distinct category of a user."""
    if cates.ndim == 1:
        return jax.tree.map(lambda x: x[:, 0], find(cates[:, None]))
    count = cates.shape[1]
    size = min(count, distinct)
    own, place = jax.vmap(
        lambda x: jnp.unique(
            x, size=min(size + 1, count), fill_value=0, return_inverse=True
        )
    )(cates)

    def spread(x):
        index = place.reshape(*place.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, 1)

    def once():
        return jax.tree.map(spread, find(own[:, :size]))

    if size == count:
        return once()
    return lax.cond((place >= size).any(), lambda: find(cates), once)


def _some(scores, keys, mask, key, net):
    """A random subset of the behaviours, for histories too long to train on."""
    if not net.gsu_sample or net.gsu_sample >= mask.shape[1]:
        return scores, keys, mask
    if key is None:
        raise ValueError(
            "net.gsu_sample draws behaviours: forward needs a key to train"
        )
    kept = topk_masked(jax.random.uniform(key, mask.shape), mask, net.gsu_sample)
    return search.take(scores, kept), search.take(keys, kept), kept.valid


def _options(net, use, train, apart) -> dict[str, Any]:
    mask = use["row_mask"]
    mask = mask[:, None] if mask is not None and apart else mask
    return {"train": train, "decay": net.dice_decay, "eps": net.dice_eps, "mask": mask}


def _click(params, state, use, query, long, net, options):
    """ESU's logit: long-term and short-term interest, candidate and user."""
    tables, state, apart = params["tables"], dict(state), query.ndim == 3
    parts = [long]
    if net.short:
        keys = _read_at(tables, use, use["recent"])
        mask = search.take(use["mask"], use["recent"])
        if apart:
            keys, mask = keys[:, None], mask[:, None]
        rest = dict(options)
        row_mask = rest.pop("mask")
        counted = mask if row_mask is None else mask & row_mask[..., None]
        scores, state["unit"] = activation_unit(
            params["unit"], query, keys, counted, state=state["unit"],
            activation=net.unit_activation, chunk=net.unit_chunk, **rest,
        )  # fmt: skip
        parts.append(attention_pool(scores, keys, mask, net.normalize))
    parts.append(query)
    if net.user_dim:
        user = embedding.lookup(tables["user"], use["user"])
        shape = (*query.shape[:-1], net.user_dim)
        parts.append(jnp.broadcast_to(user[:, None] if apart else user, shape))
    x = jnp.concatenate(parts, -1)
    logit, state["mlp"] = mlp.apply(
        params["mlp"], state["mlp"], x, activation=net.activation, **options
    )
    logit = logit[..., 0]
    if net.item_bias:
        logit = logit + embedding.lookup(tables["item_bias"], use["item"])[..., 0]
    return logit, state


def _projection(key, shape):
    heads = tuple(range(len(shape) - 2))
    return jax.nn.initializers.glorot_uniform(-1, -2, batch_axis=heads)(key, shape)


def _check_shapes(batch, net):
    behaviour.check_shapes(batch, net)
    hist = batch["hist_item"].shape
    needed = {"cate": batch["item"].shape, "hist_cate": hist}
    needed = needed if net.search == "hard" else {}
    if net.time_dim and net.search != "average":
        needed.update(time=hist[:1], hist_time=hist)
    for name, shape in needed.items():
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; got {sorted(batch)}")
        if batch[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {batch[name].shape}")


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
