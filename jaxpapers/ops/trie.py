r"""A trie of semantic IDs as arrays, and beam search that never leaves it.

The SIDs of a catalogue, all of one length L, are sorted; a node of depth l is a run of
items that share their first l codes. Children of a node are neighbours in the arrays of
the next depth, so that a step of the search reads as many candidates as the largest node
has children and not a whole vocabulary.

The score of an item is the sum of the log-probabilities of its codes. With a beam as wide
as the catalogue the search is the exhaustive ranking.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Depth(NamedTuple):
    """Nodes of one depth, the root first.

    Attributes:
      first: (nodes,) number of the first child, among those of the next depth.
      children: (nodes,) number of children.
      token: (children,) code of each child, of the whole depth.
      begin, end: (nodes,) items below, a slice of ``Trie.items``.
    """

    first: Any
    children: Any
    token: Any
    begin: Any
    end: Any


class Trie(NamedTuple):
    """SIDs of a catalogue.

    Attributes:
      depths: of 0 to L - 1 codes.
      begin, end: (leaves,) items of a SID, a slice of ``items``.
      items: (N,) numbers of the items, by SID and then in the order of ``build``.
    """

    depths: tuple[Depth, ...]
    begin: Any
    end: Any
    items: Any

    @property
    def leaves(self) -> int:
        """Number of distinct SIDs."""
        return len(self.begin)


class Found(NamedTuple):
    """Result of a search, the best first.

    Attributes:
      leaf: int32 (B, W), number of a SID in the trie, -1 where there are fewer.
      score: (B, W), sum of log-probabilities, -inf there.
    """

    leaf: Any
    score: Any


def build(sid: Any, items: Any = None, priority: Any = None) -> Trie:
    """The trie of SIDs, on the host.

    Args:
      sid: (N, L) codes, not negative.
      items: (N,) numbers of the items; None: 0 to N - 1.
      priority: (N,) items of one SID are ordered by it, the largest first (popularity);
        None, and of equal ones: by their number.

    Raises:
      ValueError: no items, no levels, negative codes, or other shapes.
    """
    sid = np.asarray(sid)
    if sid.ndim != 2 or not sid.size:
        raise ValueError(f"a trie needs SIDs (items, levels), got shape {sid.shape}")
    if sid.min() < 0:
        rows = np.flatnonzero((sid < 0).any(1))
        raise ValueError(f"codes must not be negative, got some in rows {rows[:10]}")
    n, levels = sid.shape
    items = np.arange(n) if items is None else np.asarray(items)
    priority = np.zeros(n) if priority is None else np.asarray(priority, np.float64)
    if items.shape != (n,) or priority.shape != (n,):
        raise ValueError(
            f"expected {n} items and priorities, got {items.shape}, {priority.shape}"
        )
    keys = (items, -priority, *(sid[:, level] for level in reversed(range(levels))))
    order = np.lexsort(keys)
    ordered = sid[order]
    new = np.zeros(n, bool)
    new[0] = True
    starts = [np.zeros(1, np.int64)]
    for level in range(levels):
        new[1:] |= ordered[1:, level] != ordered[:-1, level]
        starts.append(np.flatnonzero(new))
    depths = []
    for level in range(levels):
        begin, below = starts[level], starts[level + 1]
        first = np.searchsorted(below, begin)
        children = np.diff(np.append(first, len(below)))
        depths.append(
            Depth(
                *(np.asarray(x, np.int32)
                  for x in (first, children, ordered[below, level], begin,
                            np.append(begin[1:], n)))
            )
        )  # fmt: skip
    begin = starts[-1]
    end = np.append(begin[1:], n)
    return Trie(
        tuple(depths), *(np.asarray(x, np.int32) for x in (begin, end, items[order]))
    )


def padded(trie: Trie, items: int) -> Trie:
    """The trie with arrays of one length, so that a compiled search serves others too.

    Args:
      trie: of ``build``.
      items: length of each array, the most items that a trie has.
    """

    def grow(x):
        if len(x) > items:
            raise ValueError(f"a trie of {len(x)} items was to have at most {items}")
        return np.pad(x, (0, items - len(x)))

    return jax.tree.map(grow, trie)


def sids(trie: Trie) -> tuple[np.ndarray, np.ndarray]:
    """SIDs (N, L) and items (N,) of a trie: the inverse of ``build``."""
    nodes = np.zeros(len(trie.items), np.int64)
    codes = []
    places = np.arange(len(nodes))
    for level, depth in enumerate(trie.depths):
        last = level + 1 == len(trie.depths)
        begin = np.asarray(trie.begin if last else trie.depths[level + 1].begin)
        nodes = np.searchsorted(begin, places, side="right") - 1
        codes.append(np.asarray(depth.token)[nodes])
    return np.stack(codes, 1), np.asarray(trie.items)


def beam_search(
    start: Float[Array, "B V"],
    step: Callable[[Any, Int[Array, "B W"], Int[Array, "B W"], int], tuple[Any, Any]],
    carry: Any,
    trie: Trie,
    width: int,
    allowed: Bool[Array, "B N"] | None = None,
    branch: Sequence[int] | None = None,
) -> Found:
    """The best SIDs of a batch of contexts.

    Args:
      start: log-probabilities of the first code.
      step: (carry, parent (B, W) among the beams of the depth before, code (B, W), depth
        >= 1) -> (carry, log-probabilities (B, W, V) of that depth's code). The first
        depth's parent is 0. Where the search has fewer candidates than beams, parent and
        code are 0.
      carry: what ``step`` keeps, e.g. a cache.
      trie: of the catalogue.
      width: W, beams that are kept; more than the trie has are no error.
      allowed: whether an item may be found, in the order of ``Trie.items``; nodes whose
        items are all forbidden are never entered. None: all may.
      branch: bound of the children of a node of each depth, for a trie that is an
        argument of a compiled function; None: those of the trie.

    Raises:
      ValueError: ``width`` below 1.
    """
    if width < 1:
        raise ValueError(f"the beam must be >= 1 wide, got {width}")
    batch = len(start)
    node = jnp.zeros((batch, 1), jnp.int32)
    score = jnp.zeros((batch, 1), start.dtype)
    log_probs = start[:, None]
    below = None
    if allowed is not None:
        zero = jnp.zeros((batch, 1), jnp.int32)
        below = jnp.concatenate([zero, jnp.cumsum(allowed, 1, dtype=jnp.int32)], 1)
    depths = len(trie.depths)
    for level, depth in enumerate(trie.depths):
        after = trie.depths[level + 1] if level + 1 < depths else trie
        child, parent, token, score = _extend(
            depth, after, node, score, log_probs, width, below,
            branch[level] if branch else depth.token.shape[0],
        )  # fmt: skip
        node = child
        if level + 1 < depths:
            carry, log_probs = step(carry, parent, token, level + 1)
    return Found(jnp.where(score > -jnp.inf, node, -1), score)


def _extend(depth, after, node, score, log_probs, width, below, branch):
    """The best children of all beams."""
    if not isinstance(depth.children, jax.core.Tracer):
        branch = min(branch, int(np.max(np.asarray(depth.children))))
    offset = jnp.arange(branch, dtype=jnp.int32)
    first = jnp.asarray(depth.first)[node][..., None]
    child = first + offset[None, None]
    valid = offset[None, None] < jnp.asarray(depth.children)[node][..., None]
    child = jnp.where(valid, child, 0)
    token = jnp.asarray(depth.token)[child]
    value = score[..., None] + jnp.take_along_axis(log_probs, token, -1)
    if below is not None:
        left = _left(below, jnp.asarray(after.end), jnp.asarray(after.begin), child)
        valid &= left > 0
    value = jnp.where(valid, value, -jnp.inf)
    batch, beams, _ = value.shape
    flat = value.reshape(batch, -1)
    score, place = lax.top_k(flat, min(width, flat.shape[1]))
    found = score > -jnp.inf

    def pick(x):
        x = jnp.take_along_axis(x.reshape(batch, -1), place, 1)
        return jnp.where(found, x, 0)

    parent = jnp.broadcast_to(jnp.arange(beams)[None, :, None], value.shape)
    return pick(child), pick(parent), pick(token), score


def _left(below, end, begin, child):
    """Items below a node that may be found."""
    rows = jnp.arange(len(below))[:, None, None]
    return below[rows, end[child]] - below[rows, begin[child]]


def items_of(
    found: Found, trie: Trie, k: int, allowed: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Items of the SIDs that a search found, on the host.

    Items of one SID have its score and follow each other in the trie's order.

    Args:
      found: of a search at least as wide as k, or as the trie.
      trie: of the search.
      k: items per row.
      allowed: that of the search.

    Returns:
      Items (B, k), -1 where there are fewer, and their scores.

    Raises:
      ValueError: k below 1, or a search narrower than k SIDs.
    """
    leaves, scores = (np.asarray(x) for x in found)
    if not 1 <= k or leaves.shape[1] < min(k, trie.leaves):
        raise ValueError(
            f"{k} items need a beam of at least that many SIDs, got {leaves.shape[1]}; "
            "widen the beam"
        )
    begin, end, items = (np.asarray(x) for x in (trie.begin, trie.end, trie.items))
    chosen = np.full((len(leaves), k), -1, np.int64)
    values = np.full((len(leaves), k), -np.inf)
    for row, (own, score) in enumerate(zip(leaves, scores)):
        real = own >= 0
        places = [np.arange(begin[i], end[i]) for i in own[real]]
        counts = [len(p) for p in places]
        where = np.concatenate(places) if places else np.zeros(0, np.int64)
        value = np.repeat(score[real], counts)
        if allowed is not None:
            kept = np.asarray(allowed[row])[where]
            where, value = where[kept], value[kept]
        count = min(k, len(where))
        chosen[row, :count], values[row, :count] = items[where[:k]], value[:k]
    return chosen, values


def longest(trie: Trie) -> int:
    """Items of the SID that most items share."""
    return int(np.max(np.asarray(trie.end) - np.asarray(trie.begin)))


def hits(items: Any, target: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Recall@k and NDCG@k of each row with one target, full ranking.

    With the target's rank r from 0: [r < k], and [r < k] / log2(r + 2).

    Args:
      items: (B, >= k) ranked, -1 for none.
      target: (B,) not negative.
      k: cutoff.

    Raises:
      ValueError: fewer than k ranked items, negative targets.
    """
    items, target = np.asarray(items), np.asarray(target)
    if items.ndim != 2 or items.shape[1] < k or len(items) != len(target):
        raise ValueError(
            f"expected (rows, >= {k}) ranked items and one target each, got "
            f"{items.shape} and {target.shape}"
        )
    if len(target) and target.min() < 0:
        raise ValueError("targets must be items, got a negative one")
    match = items[:, :k] == target[:, None]
    hit = match.any(1)
    rank = match.argmax(1)
    return hit.astype(float), np.where(hit, 1 / np.log2(rank + 2.0), 0.0)
