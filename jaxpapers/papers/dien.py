r"""Deep Interest Evolution Network: interests as a process that a candidate steers.

Guorui Zhou, Na Mou, Ying Fan, Qi Pi, Weijie Bian, Chang Zhou, Xiaoqiang Zhu, Kun Gai.
"Deep Interest Evolution Network for Click-Through Rate Prediction", arXiv 1809.03672,
2018 (AAAI 2019).

DIN takes a user's past as a set. DIEN reads it in order: a GRU extracts an interest at
every step, and an auxiliary loss makes each state tell the next behaviour from a sampled
one. A second recurrent layer is steered by attention to the candidate, which scales its
update gate, so that steps that have nothing to do with the candidate leave the state
alone.

With e_t the behaviours (n_E), h_t the GRU's states (n_H), e_a the candidate (n_A):

$$ L_{aux} = -\tfrac1N \sum_{i,t} \log \sigma(h_t, e_{t+1})
   + \log(1 - \sigma(h_t, \hat e_{t+1})) $$
$$ a_t = \frac{\exp(h_t W e_a)}{\sum_j \exp(h_j W e_a)}, \quad
   \tilde u_t = a_t u_t, \quad
   h'_t = (1 - \tilde u_t) \odot h'_{t-1} + \tilde u_t \odot \tilde h'_t $$
$$ L = L_{target} + \alpha L_{aux} $$

The last h' goes to an MLP with the candidate, the user, the sum of the history and its
product with the candidate (the last two are the released code's).

Departures. The released cell differs from the paper: its gate keeps instead of writes,
so that steps of no attention still move the state; it is ``variant="augru_released"``.
The printed sigma(h, e) is no scalar: as in the code it is a network on both, or, with
``net.aux="inner"``, their inner product. Its normaliser differs between paper, code and
other libraries, see ``aux_loss``, and with it what alpha means: the code's cross-entropy
is a mean over both outputs of a softmax, half of ours, so its alpha of 1 is 2 here. One
logit replaces each 2-way softmax, without 1e-8 in the logarithm. Batch normalisation,
which never leaves its initial statistics in the code, is left out: it is an affine map
before a linear one. The write gates that attention scales start at bias 1, the others
keep with bias 1, as the code's do. Negatives that a batch does not bring are drawn from
the histories of the batch, so that a step reads no further rows.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpapers.method import Method
from jaxpapers.method.tables import row_gradient
from jaxpapers.nets import behaviour, embedding, evolution, mlp
from jaxpapers.nets.behaviour import check_batch
from jaxpapers.nets.evolution import bilinear_attention, din_attention, evolve
from jaxpapers.nets.gru import VARIANTS, augru_scan, gru_scan
from jaxpapers.ops.rows import replicate
from jaxpapers.optim import rows

__all__ = [
    "RULES", "VARIANTS", "augru_scan", "aux_loss", "bilinear_attention", "check_batch",
    "din_attention", "evolve", "forward", "gru_scan", "ids", "init", "loss", "make",
    "sample_negatives", "sampler", "score_candidates", "statistics",
]  # fmt: skip

RULES = (*rows.STATE_RULES, *embedding.RULES)
AUX = ("concat", "inner")
REDUCE = ("per_sample", "padded_mean", "valid_mean")


def sample_negatives(
    key: Key[Array, ""],
    pool: Int[Array, " P"],
    avoid: Int[Array, "*shape"],
    mask: Bool[Array, " P"] | None = None,
) -> Int[Array, "*shape"]:
    """Places in a pool of ids, drawn evenly, of other ids than those to avoid.

    A draw that hits its id is drawn again once; then the next place of the pool is taken.
    That may hit again if the pool has an id more than once: ``loss`` counts those.

    Args:
      key: of the draws.
      pool: ids; as rows of a log they are drawn by popularity.
      avoid: id that the draw of this place must not be.
      mask: False at places that are not drawn; None: all are.

    Returns:
      Indices into the pool; its last place if none can be drawn.

    Example:
      >>> pool, avoid = jnp.array([5, 6]), jnp.array([5, 5, 6])
      >>> pool[sample_negatives(jax.random.key(0), pool, avoid)].tolist()
      [6, 6, 5]
    """
    mask = jnp.ones(pool.shape, bool) if mask is None else mask
    number = jnp.cumsum(mask)
    count = jnp.maximum(number[-1], 1)
    first, again = (
        jax.random.randint(k, avoid.shape, 0, count) for k in jax.random.split(key)
    )

    def place(n):
        return jnp.minimum(jnp.searchsorted(number, n + 1), len(pool) - 1)

    drawn = jnp.where(pool[place(first)] == avoid, again, first)
    drawn = jnp.where(pool[place(drawn)] == avoid, (drawn + 1) % count, drawn)
    return place(drawn)


def aux_loss(
    params: dict,
    states: Float[Array, "B T H"],
    pos: Float[Array, "B T E"],
    neg: Float[Array, "B T E"],
    mask: Bool[Array, "B T"],
    reduce: str = "valid_mean",
    *,
    weight: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """How badly states tell the next behaviour from a sampled one (eq 6).

    Args:
      params: an ``nets.mlp`` from H + E to 1, sigmoids between; {}: the inner product.
      states: of the extractor.
      pos: behaviours; the state of step t is compared with that of t + 1.
      neg: sampled ones, aligned with ``pos``.
      mask: True at behaviours.
      reduce: of the sums of both logarithms: "valid_mean" over all steps that have a
        next one (twice the mean over positives and negatives that DeepCTR-Torch takes),
        "padded_mean" over all B (T - 1) steps (released code), "per_sample" over B (the
        paper).
      weight: of rows; None: ones.

    Returns:
      The loss, 0 where no step has a next one, and ``aux_accuracy``: how often the next
      behaviour scores above the sampled one, ties half.

    Raises:
      ValueError: unknown ``reduce``, or an inner product of vectors that differ in size.
    """
    if reduce not in REDUCE:
        raise ValueError(f"aux_reduce must be one of {REDUCE}, got {reduce!r}")
    if not params and states.shape[-1] != pos.shape[-1]:
        raise ValueError(
            f"the inner product needs states as wide as behaviours, got "
            f"{states.shape[-1]} and {pos.shape[-1]}; set net.state to the latter or "
            "net.aux to 'concat'"
        )
    states, mask = states[:, :-1], mask[:, :-1] & mask[:, 1:]
    items = jnp.stack([pos[:, 1:], neg[:, 1:]])
    if params:
        first = params["layer_0"]
        # The states' share of the first layer serves both.
        w_state, w_item = jnp.split(first["kernel"], [states.shape[-1]])
        shared = mlp.matmul(states, w_state) + first["bias"].reshape(1, 1, -1)
        x = jax.nn.sigmoid(mlp.matmul(items, w_item) + shared[None])
        rest = {f"layer_{i}": params[f"layer_{i + 1}"] for i in range(len(params) - 1)}
        logit = mlp.apply(rest, {}, x, activation="sigmoid", train=False)[0][..., 0]
    else:
        logit = (items * states[None]).sum(-1)
    weight = jnp.ones(len(mask), logit.dtype) if weight is None else weight
    counted = weight[:, None] * mask
    nats = jax.nn.softplus(-logit[0]) + jax.nn.softplus(logit[1])
    # Not 0 times what padding holds, which may be anything.
    total = jnp.where(counted > 0, nats * counted, 0.0).sum()
    terms = counted.sum()
    by = {"valid_mean": terms, "padded_mean": weight.sum() * mask.shape[1],
          "per_sample": weight.sum()}[reduce]  # fmt: skip
    above = (logit[0] > logit[1]) + 0.5 * (logit[0] == logit[1])
    accuracy = (above * counted).sum() / jnp.where(terms == 0, 1, terms)
    return total / jnp.where(by == 0, 1, by), {"aux_accuracy": accuracy}


def init(key: Key[Array, ""], net: Any, *, aux: bool = True) -> dict:
    """Parameters of ``config.net``: tables, ``nets.evolution``, MLP, auxiliary network.

    Args:
      key: of the draws.
      net: ``config.net``.
      aux: whether the auxiliary network is there, if ``net.aux`` has one.

    Raises:
      ValueError: sizes or names that are not known.
    """
    _check_net(net)
    key_tables, key_core, key_aux, key_mlp = jax.random.split(key, 4)
    sizes = (evolution.width(net), *net.hidden, 1)
    params = {
        "tables": behaviour.init(key_tables, net),
        **evolution.init(key_core, net),
        "mlp": mlp.init(key_mlp, sizes, net.activation),
    }
    if aux and net.aux == "concat":
        total = net.state + net.item_dim + net.cate_dim
        params["aux"] = mlp.init(key_aux, (total, *net.aux_hidden, 1), "sigmoid")
    return params


def statistics(params: dict) -> dict:
    """The first moving statistics of Dice; ``State.extra``."""
    return mlp.statistics(params["mlp"])


def forward(
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    *,
    net: Any,
    train: bool,
) -> tuple[Float[Array, "B ..."], Float[Array, "B T H"], dict]:
    """Logits of candidates.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      batch: see ``nets.behaviour``.
      net: ``config.net``.
      train: Dice takes the batch's statistics.

    Returns:
      Logits of the candidates' shape, the extractor's states, and the statistics to use
      next.

    Raises:
      ValueError: T = 0, or arrays whose shapes do not fit.
    """
    logit, _, states, state = _run(params, state, batch, net, train)
    return logit, states, state


def _run(params, state, batch, net, train):
    """Logits, behaviours, states of the extractor, statistics."""
    reads = evolution.read(params["tables"], batch, net=net)
    x, states = evolution.apply(params, reads, net=net, train=train)
    logit, _, state = behaviour.head(
        params["mlp"], state, x, batch, params["tables"], net=net, train=train
    )
    return logit, reads.keys, states, state


def loss(
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    net: Any,
    aux_weight: float = 1.0,
    aux_reduce: str = "valid_mean",
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """Cross-entropy of the labels plus the weighted auxiliary loss.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      batch: see ``nets.behaviour``, with label (B,); neg_hist_item and neg_hist_cate (B,
        T), aligned with the history, are optional negatives.
      key: of the negatives, if the batch has none.
      net: ``config.net``.
      aux_weight: alpha (paper: 1); 0 leaves the auxiliary loss out.
      aux_reduce: see ``aux_loss``.

    Returns:
      The sum; metrics ``target``, ``rate`` (the mean prediction) and, with the auxiliary
      loss, ``aux``, ``aux_accuracy`` and ``aux_collisions``: how many of the negatives
      are the clicked item; with weights ``weight``, their sum. The statistics to use
      next.
    """
    logit, keys, states, state = _run(params, state, batch, net, True)
    value, metrics = behaviour.cross_entropy(logit, batch)
    metrics["target"] = value
    if aux_weight:
        use = behaviour.fields(batch, net)
        weight = batch.get("weight", jnp.ones(logit.shape, logit.dtype))
        item, cate = _negatives(batch, use, key, net)
        neg = behaviour.embed(params["tables"], item, cate)
        given = params["aux"] if net.aux == "concat" else {}
        aux, found = aux_loss(
            given, states, keys, neg, use["mask"], aux_reduce, weight=weight
        )
        metrics |= {"aux": aux, **found}
        counted = weight[:, None] * use["mask"][:, 1:]
        same = (item == use["hist_item"])[:, 1:] * counted
        metrics["aux_collisions"] = same.sum() / jnp.maximum(counted.sum(), 1e-9)
        value = value + aux_weight * aux
    return value, (metrics, state)


def _negatives(batch, use, key, net):
    """Ids of the batch's negatives, or of drawn ones, zeros at padding."""
    mask = use["mask"]
    cate = None
    if "neg_hist_item" in batch:
        item = embedding.resolve(batch["neg_hist_item"], net.item_vocab)
        if net.cate_dim:
            cate = embedding.resolve(batch["neg_hist_cate"], net.cate_vocab)
    else:
        pool = replicate(use["hist_item"]).reshape(-1)
        keep = mask if use["row_mask"] is None else mask & use["row_mask"][:, None]
        place = sample_negatives(
            key, pool, use["hist_item"], replicate(keep).reshape(-1)
        )
        item = pool[place]
        if net.cate_dim:
            cate = replicate(use["hist_cate"]).reshape(-1)[place]
    zero = embedding.PADDING
    return jnp.where(mask, item, zero), cate if cate is None else jnp.where(
        mask, cate, zero
    )


def ids(batch: Mapping[str, Array], *, net: Any) -> dict[str, Int[Array, "..."]]:
    """The ids that a batch reads of every table, see ``nets.behaviour.ids``.

    Negatives that the batch brings are among them; drawn ones are of its histories.
    """
    found = behaviour.ids(batch, net=net)
    use = behaviour.fields(batch, net)
    keep = use["mask"]
    keep = keep if use["row_mask"] is None else keep & use["row_mask"][:, None]
    for name, vocab in (("item", net.item_vocab), ("cate", net.cate_vocab)):
        if f"neg_hist_{name}" in batch and name in found:
            neg = embedding.resolve(batch[f"neg_hist_{name}"], vocab)
            neg = jnp.where(keep, neg, embedding.PADDING)
            found[name] = jnp.concatenate([found[name], neg], 1)
    return found


def score_candidates(
    params: dict, state: dict, batch: Mapping[str, Array], *, net: Any
) -> Float[Array, "B ..."]:
    """Logits of N candidates for each user: ``forward`` with the moving statistics.

    The extractor runs once per user, the second layer once per candidate.

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


def ablations(config: Any) -> dict[str, dict[str, Any]]:
    """Label -> fields: without the auxiliary loss, or with it if it is off."""
    if config.method.aux_weight:
        return {"without auxiliary loss": {"method.aux_weight": 0.0}}
    return {"with auxiliary loss": {"method.aux_weight": 1.0}}


def make(config: Any) -> Method:
    """Binds ``config`` (see configs/dien.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.

    Raises:
      ValueError: unknown names, or values out of range.
    """
    net, c, own = config.net, config.optim, config.method
    _check_net(net)
    if own.aux_weight < 0 or own.aux_reduce not in REDUCE:
        raise ValueError(
            f"config.method: aux_weight must be >= 0 and aux_reduce one of {REDUCE}, got "
            f"{own.aux_weight} and {own.aux_reduce!r}"
        )

    def init_params(key, batch):
        del batch
        return init(key, net, aux=own.aux_weight > 0)

    value = functools.partial(
        loss, net=net, aux_weight=own.aux_weight, aux_reduce=own.aux_reduce
    )
    tx, table_tx = rows.from_config(c, config.train.steps)
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


def _check_net(net):
    evolution.check(net)
    behaviour.check_choices(net, aux=AUX)
    width = net.item_dim + net.cate_dim
    if net.aux == "inner" and net.state != width:
        raise ValueError(
            f"config.net.state must be item_dim + cate_dim = {width} with net.aux=inner; "
            f"got {net.state}"
        )
