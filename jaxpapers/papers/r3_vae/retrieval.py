"""Generative retrieval: a decoder-only transformer of SIDs, and its search.

Names of shapes: B users, H items of a history, P codes of an SID, V tokens, N items.
Histories are padded on the left by -1. A row of the transformer is a first token (the
user's bucket, or one for all), then the P codes of each item.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpapers.nets import transformer
from jaxpapers.ops import trie as tries
from jaxpapers.papers.r3_vae.options import Net

NONE = -1


def rules(net: Net) -> list[tuple[str, Any]]:
    """Sharding rules of the network's parameters."""
    return [r for r in transformer.RULES if not (net.tied and r[0].startswith("head"))]


def network(net: Net, sizes: Sequence[int]) -> transformer.Transformer:
    """The transformer of a vocabulary: codes of each place, then the first tokens."""
    return transformer.Transformer(
        vocab_size=vocabulary(net, sizes), width=net.width, layers=net.layers,
        heads=net.heads, hidden=net.hidden, tied=net.tied, unroll=net.layers,
    )  # fmt: skip


def vocabulary(net: Net, sizes: Sequence[int]) -> int:
    """V, rounded up to a multiple of 8, so that a mesh divides the table."""
    return -(-(sum(sizes) + 1 + net.users) // 8) * 8


def init(key: Key[Array, ""], net: Net, sizes: Sequence[int]) -> dict:
    """Parameters of the transformer."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return dict(network(net, sizes).init(key, tokens)["params"])


def enumerated(items: int, sizes: Sequence[int]) -> np.ndarray:
    """SIDs that number the items, (N, P): those of a state before it has others.

    Raises:
      ValueError: fewer SIDs than items.
    """
    if np.prod([float(s) for s in sizes]) < items:
        raise ValueError(
            f"{items} items need as many SIDs, codes {tuple(sizes)} have fewer; raise "
            "tokenizer.codes or tokenizer.levels"
        )
    numbers, codes = np.arange(items), []
    for size in reversed(sizes):
        codes.insert(0, numbers % size)
        numbers = numbers // size
    return np.stack(codes, 1).astype(np.int32)


def tokens_of(
    items: Int[Array, "B T"], table: Int[Array, "N P"], sizes: Sequence[int]
) -> Int[Array, "B TP"]:
    """Codes of items as tokens; those of ``NONE`` are any."""
    offsets = jnp.asarray(np.cumsum((0, *sizes[:-1])), jnp.int32)
    codes = jnp.asarray(table)[jnp.maximum(items, 0)] + offsets[None, None]
    return codes.reshape(len(items), -1)


def first_tokens(user: Int[Array, " B"], net: Net, sizes: Sequence[int]):
    """The token before a history: of all users, or of a user's bucket."""
    base = sum(sizes)
    if not net.users:
        return jnp.full(user.shape, base, jnp.int32)
    # Knuth's multiplicative hash, the upper bits.
    mixed = (user.astype(jnp.uint32) * jnp.uint32(2654435761)) >> 8
    return base + 1 + (mixed % net.users).astype(jnp.int32)


def _inputs(items, user, table, net, sizes, drop: int = 0):
    """Tokens, their positions, and which of them are seen.

    The first token stands right before the first item, so that this item is predicted
    from it however long the padding is. ``drop``: codes at the end that are left out.
    """
    places = len(sizes)
    first = first_tokens(user, net, sizes)[:, None]
    real = jnp.repeat(items != NONE, places, axis=1)
    tokens = jnp.where(real, tokens_of(items, table, sizes), first)
    tokens = jnp.concatenate([first, tokens], 1)
    real = jnp.concatenate([real, jnp.ones((len(items), 1), bool)], 1)
    positions = jnp.cumsum(real, 1, dtype=jnp.int32) - 1
    keep = tokens.shape[1] - drop
    return tokens[:, :keep], positions[:, :keep], real[:, :keep]


def _of_place(logits, place: int, sizes):
    """Log-probabilities of the codes of a place."""
    begin = sum(sizes[:place])
    return jax.nn.log_softmax(logits[..., begin : begin + sizes[place]], -1)


def log_probs(
    params: dict,
    table: Int[Array, "N P"],
    items: Int[Array, "B T"],
    user: Int[Array, " B"],
    *,
    net: Net,
    sizes: Sequence[int],
) -> Float[Array, "B T P"]:
    """Log-probability of each code of each item, given all before it.

    Args:
      params: of ``init``.
      table: SIDs.
      items: of users, in time order, padded on the left (only there) by ``NONE``.
      user: numbers of the users.
      net: options.
      sizes: codes of each place.

    Returns:
      Values; those of padding mean nothing.
    """
    places = len(sizes)
    tokens, positions, real = _inputs(items, user, table, net, sizes, drop=1)
    mask = jnp.broadcast_to(real[:, None], (*real.shape, real.shape[1]))
    logits: Any = network(net, sizes).apply(
        {"params": params}, tokens, positions=positions, mask=mask
    )
    logits = logits.reshape(len(items), items.shape[1], places, -1)
    codes = jnp.asarray(table)[jnp.maximum(items, 0)]
    each = [
        jnp.take_along_axis(
            _of_place(logits[:, :, place], place, sizes), codes[..., place, None], -1
        )[..., 0]
        for place in range(places)
    ]
    return jnp.stack(each, -1)


def loss(
    params: dict,
    extra: dict,
    batch: Any,
    key: Key[Array, ""],
    *,
    net: Net,
    sizes: Sequence[int],
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """Mean cross-entropy of the codes of all items of a batch, each given those before.

    The weight of a step is the number of its items.

    Args:
      params: of ``init``.
      extra: with ``sid`` (N, P).
      batch: ``items`` (B, H + 1), ``user`` (B).
      key: ignored.
      net: options.
      sizes: codes of each place.

    Returns:
      Nats per code; metrics ``nats_per_item`` and ``weight``; extra.
    """
    del key
    items = batch["items"]
    values = log_probs(params, extra["sid"], items, batch["user"], net=net, sizes=sizes)
    kept = (items != NONE).astype(values.dtype)
    count = kept.sum()
    per_item = -(values.sum(-1) * kept).sum() / jnp.maximum(count, 1)
    metrics = {"nats_per_item": per_item, "weight": count}
    return per_item / len(sizes), (metrics, extra)


def predict(
    params: dict, extra: dict, batch: Any, *, net: Net, sizes: Sequence[int]
) -> Float[Array, " B"]:
    """Log-probability of the last item of each row, given those before it."""
    values = log_probs(
        params, extra["sid"], batch["items"], batch["user"], net=net, sizes=sizes
    )
    return values[:, -1].sum(-1)


def score_items(
    params: dict,
    table: Int[Array, "N P"],
    history: Int[Array, "B H"],
    user: Int[Array, " B"],
    candidates: Int[Array, " M"],
    *,
    net: Net,
    sizes: Sequence[int],
) -> Float[Array, "B M"]:
    """Log-probability of each candidate as the next item: exhaustive, for catalogues.

    One pass of the transformer for each candidate.
    """

    def one(candidate):
        last = jnp.full((len(history), 1), candidate, history.dtype)
        items = jnp.concatenate([history, last], 1)
        values = log_probs(params, table, items, user, net=net, sizes=sizes)
        return values[:, -1].sum(-1)

    return lax.map(one, candidates).T


def recommend(
    params: dict,
    table: Int[Array, "N P"],
    history: Int[Array, "B H"],
    user: Int[Array, " B"],
    trie: tries.Trie,
    *,
    net: Net,
    sizes: Sequence[int],
    beam: int,
    seen: Bool[Array, "B N"] | None = None,
) -> tries.Found:
    """The best SIDs as the next item, by beam search on the trie.

    Args:
      params: of ``init``.
      table: SIDs.
      history: padded on the left by ``NONE``.
      user: numbers of the users.
      trie: of the candidates.
      net: options.
      sizes: codes of each place.
      beam: SIDs that are kept.
      seen: items, by number, that are never found; None: all may be.

    Raises:
      ValueError: an empty history, a trie of another number of codes.
    """
    places, batch = len(sizes), len(history)
    if not history.shape[1]:
        raise ValueError(
            f"the history must have at least one place, got shape {history.shape}; "
            f"pad it on the left by {NONE}"
        )
    if len(trie.depths) != places:
        raise ValueError(
            f"expected a trie of {places} codes, got one of {len(trie.depths)}"
        )
    model = network(net, sizes)
    tokens, positions, real = _inputs(history, user, table, net, sizes)
    count = tokens.shape[1]
    slots = count + (places - 1) * beam
    # Beams are further positions of one row that see its history and their own codes, so
    # that no cache is copied.
    past = jnp.pad(real, ((0, 0), (0, slots - count)))
    mask = jnp.broadcast_to(past[:, None], (batch, count, slots))
    cache = model.init_cache(batch, slots)
    apply = functools.partial(model.apply, {"params": params}, hidden=True)
    hidden, cache = apply(tokens, cache, positions=positions, mask=mask)
    start = _of_place(_logits(params, hidden[:, -1], net), 0, sizes)
    after = real.sum(1, dtype=jnp.int32)
    none = jnp.zeros((batch, 1, 0), jnp.int32)

    def step(carry, parent, code, depth):
        cache, slot_of, used = carry
        width = code.shape[1]
        older = jnp.take_along_axis(slot_of, parent[..., None], 1)
        newest = jnp.broadcast_to(used + jnp.arange(width), (batch, width))
        slot_of = jnp.concatenate([older, newest[..., None].astype(jnp.int32)], -1)
        own = (slot_of[..., None] == jnp.arange(slots)[None, None, None]).any(2)
        where = jnp.broadcast_to((after + depth - 1)[:, None], (batch, width))
        hidden, cache = apply(
            code + sum(sizes[: depth - 1]), cache, positions=where,
            mask=past[:, None] | own,
        )  # fmt: skip
        values = _of_place(_logits(params, hidden, net), depth, sizes)
        return (cache, slot_of, used + width), values

    allowed = None if seen is None else ~seen[:, jnp.asarray(trie.items)]
    return tries.beam_search(
        start, step, (cache, none, count), trie, beam, allowed, branch=sizes
    )


def _logits(params, hidden, net):
    """Logits of chosen states."""
    kernel = params["embed"]["embedding"].T if net.tied else params["head"]["kernel"]
    return jnp.matmul(hidden, kernel).astype(jnp.float32)
