"""The n largest scores of a stream that fits no memory, on any number of devices.

Equal scores go to the lower index, whatever the order of the chunks and the number of
shards: (score, index) is a total order, so the n largest of parts contain the n largest
of the whole.

The n-th largest pair is found by bisection over the bits of the scores, then of the
indices where some are equal: 32 passes of a comparison and a count over the candidates,
or 64, which are memory bound and need neither a sort nor ``lax.top_k``, slow for n in
the thousands.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

NO_ITEM = np.iinfo(np.int32).max
"""Indices of slots of a ``Top`` that no item has filled count down from this."""


class Top(NamedTuple):
    """The largest scores so far and the indices of their items, (n,) each.

    Slots that no item has filled have score -inf.
    """

    score: Any
    index: Any


def empty(n: int, dtype: Any = jnp.float32) -> Top:
    """No items yet, n slots."""
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    index = NO_ITEM - jnp.arange(n, dtype=jnp.int32)
    return Top(jnp.full(n, -jnp.inf, dtype), index)


def top_n(
    scores: Float[Array, " P"],
    n: int,
    *,
    index: Int[Array, " P"] | None = None,
    valid: Bool[Array, " P"] | None = None,
    ordered: bool = True,
) -> Top:
    """The n largest scores, of equal ones those of the lower index.

    Args:
      scores: of the candidates; NaN counts as -inf.
      n: number to keep.
      index: of each candidate, all different; None: its position.
      valid: False at candidates to leave out, whose score becomes -inf.
      ordered: from the largest to the lowest; False: in the candidates' order.

    Raises:
      ValueError: n below 1 or above the number of candidates.

    Example:
      >>> import jax, numpy as np
      >>> jax.jit(top_n, static_argnums=1)(np.float32([1, 3, 2, 3]), 3).index.tolist()
      [1, 3, 2]
    """
    if not 1 <= n <= len(scores):
        raise ValueError(
            f"top_n keeps between 1 and all {len(scores)} candidates, got n={n}"
        )
    index = jnp.arange(len(scores), dtype=jnp.int32) if index is None else index
    scores = jnp.asarray(scores).astype(jnp.promote_types(scores.dtype, jnp.float32))
    kept = ~jnp.isnan(scores) if valid is None else valid & ~jnp.isnan(scores)
    # Both zeros are one score; compilers drop an addition of 0.
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = jnp.where(kept, scores, -jnp.inf)
    bits, early = _bits(scores), ~index.astype(jnp.uint32)
    every = jnp.ones(len(scores), bool)
    least = _nth_largest(bits, n, every)
    above, equal = bits > least, bits == least
    wanted = n - above.sum()
    # Where all equal ones are wanted, the least of their indices' bits is as good as any.
    first = lax.cond(
        equal.sum() > wanted,
        lambda: _nth_largest(early, wanted, equal),
        lambda: early[0] & jnp.uint32(0),
    )
    chosen = above | (equal & (early >= first))
    place = jnp.where(chosen, _rank(chosen), n)
    at = (
        jnp.zeros(n, jnp.int32)
        .at[place]
        .set(jnp.arange(len(scores), dtype=jnp.int32), mode="drop")
    )
    top = Top(scores[at], index[at])
    if ordered:
        _, _, score, index = lax.sort((~bits[at], top.index, *top), num_keys=2)
        top = Top(score, index)
    return top


def merge(
    top: Top,
    scores: Float[Array, " P"],
    index: Int[Array, " P"],
    valid: Bool[Array, " P"] | None = None,
) -> Top:
    """The n largest after a chunk of further items; memory is n plus the chunk.

    Args:
      top: so far, see ``empty``.
      scores: of the chunk.
      index: of its items, all different from those before.
      valid: False at items to leave out, such as padding.

    Returns:
      As many as before, in no order; ``ordered`` sorts them.
    """
    if valid is not None:
        scores = jnp.where(valid, scores, -jnp.inf)
        # What is left out must lose against an item whose score is -inf.
        spare = NO_ITEM - len(top.score) - jnp.arange(len(scores), dtype=jnp.int32)
        index = jnp.where(valid, index, spare)
    return top_n(
        jnp.concatenate([top.score, scores.astype(top.score.dtype)]),
        len(top.score),
        index=jnp.concatenate([top.index, index.astype(jnp.int32)]),
        ordered=False,
    )


def across(top: Top, axis_name: str | tuple[str, ...]) -> Top:
    """The n largest over the devices of a mesh axis, inside ``jax.shard_map``.

    Sends 8 bytes per slot and device; every device gets the same result.
    """
    gathered = [lax.all_gather(x, axis_name, tiled=True) for x in top]
    n, (score, index) = len(top.score), gathered
    # Slots that are empty on several devices have the same index.
    position = jnp.arange(len(index), dtype=jnp.int32)
    index = jnp.where(score == -jnp.inf, NO_ITEM - position, index)
    return top_n(score, n, index=index)


def ordered(top: Top) -> Top:
    """From the largest score to the lowest, of equal ones the lower index first."""
    return top_n(top.score, len(top.score), index=top.index)


def check_full(top: Top, what: str = "items") -> None:
    """Raises ValueError if fewer items than slots were offered; on the host."""
    filled = int(np.sum(np.asarray(top.score) > -np.inf))
    if filled < len(top.score):
        raise ValueError(
            f"{len(top.score):,} {what} are to be chosen of {filled:,} with a score: "
            "offer more, or choose fewer"
        )


def _rank(chosen: Bool[Array, " P"], block: int = 64) -> Array:
    """Number of chosen ones before each: sums of blocks, and in them by a product.

    XLA's ``cumsum`` makes as many passes as its length has bits.
    """
    size = -len(chosen) % block
    ones = jnp.pad(chosen, (0, size)).reshape(-1, block).astype(jnp.float32)
    before = jnp.triu(jnp.ones((block, block)), 1)
    inside = jnp.matmul(ones, before).astype(jnp.int32)
    counts = ones.sum(1).astype(jnp.int32)
    ends = jnp.cumsum(counts)
    return (inside + (ends - counts)[:, None]).reshape(-1)[: len(chosen)]


def _bits(x: Float[Array, " P"]) -> Array:
    """Unsigned integers in the order of the numbers."""
    kind = {4: jnp.uint32, 8: jnp.uint64}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, kind)
    sign = jnp.asarray(1, kind) << (8 * x.dtype.itemsize - 1)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)


def _nth_largest(keys: Array, n: Any, among: Bool[Array, " P"]) -> Array:
    """The largest t of which n of the chosen keys are at least t; bit by bit."""
    width, one = 8 * keys.dtype.itemsize, jnp.asarray(1, keys.dtype)

    def body(i, t):
        larger = t | (one << (width - 1 - i).astype(keys.dtype))
        enough = jnp.sum(among & (keys >= larger)) >= n
        return jnp.where(enough, larger, t)

    # Varies over the mesh axes that the keys do, which a constant would not.
    start = keys[0] & jnp.zeros((), keys.dtype)
    return lax.fori_loop(0, width, body, start)
