"""Search in long histories: masked top-k, by category, in chunks, over devices.

Everywhere ties are broken by the smaller index. Histories are in time order, oldest
first. Empty slots of a result have index -1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Integer, Num, Shaped, UInt16

from jaxpapers.ops import rows
from jaxpapers.ops.mesh_axes import auto_axes, batch_axes
from jaxpapers.ops.shapes import whole_numbers


class Selection(NamedTuple):
    """Results of a search, best first, then empty slots.

    Attributes:
      idx: int32 (.., K), positions; -1 in empty slots.
      valid: bool (.., K), idx >= 0.
      values: (.., K), scores; -inf (or the least integer) in empty slots.
    """

    idx: Any
    valid: Any
    values: Any


def topk_masked(
    scores: Num[Array, "*batch T"],
    mask: Bool[Array, "*batch T"],
    k: int,
    *,
    chunk: int = 0,
    recall: float = 1.0,
) -> Selection:
    """The k largest scores among the valid positions.

    Positions are masked before the selection, so that padding never outranks a valid
    position with a negative score.

    Args:
      scores: any; a valid -inf counts as masked, as does NaN, which takes a slot.
      mask: True where a position may be selected.
      k: slots of the result.
      chunk: positions of a chunk in a two-level selection, the k best of each chunk and
        then of those: exact, with shorter sorts. 0: one ``lax.top_k``, on CPUs 3 to 10
        times faster.
      recall: below 1 uses ``lax.approx_max_k`` with this recall target, which is
        approximate on TPUs only, and breaks ties in any order.

    Raises:
      ValueError: k below 1, a negative chunk, or a recall out of (0, 1].

    Example:
      >>> scores = jnp.array([-3.0, 9.0, -1.0, -1.0])
      >>> topk_masked(scores, jnp.array([True, False, True, True]), 4).idx.tolist()
      [2, 3, 0, -1]
    """
    check_k(k)
    if chunk < 0 or not 0 < recall <= 1:
        raise ValueError(
            f"topk_masked needs chunk >= 0 and 0 < recall <= 1, got {chunk}, {recall}"
        )
    least = _least(scores.dtype)
    # top_k puts 0.0 before -0.0, which are equal.
    scores = jnp.where(scores == 0, 0, scores).astype(scores.dtype)
    scores = jnp.where(mask, scores, least)
    length, short = scores.shape[-1], max(k - scores.shape[-1], 0)
    if chunk and length > max(chunk, k):
        values, idx = _two_level(scores, k, chunk)
    elif recall < 1 and jnp.issubdtype(scores.dtype, jnp.floating):
        values, idx = lax.approx_max_k(scores, k - short, recall_target=recall)
    else:
        values, idx = lax.top_k(scores, k - short)
    values, idx = (
        jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)], constant_values=fill)
        for x, fill in ((values, least), (idx, -1))
    )
    valid = values > least
    return Selection(jnp.where(valid, idx, -1).astype(jnp.int32), valid, values)


def _two_level(scores, k, chunk):
    *batch, length = scores.shape
    count = -(-length // chunk)
    pad = [(0, 0)] * len(batch) + [(0, count * chunk - length)]
    scores = jnp.pad(scores, pad, constant_values=_least(scores.dtype))
    values, idx = lax.top_k(scores.reshape(*batch, count, chunk), min(k, chunk))
    # Chunks are in order, so ties stay in the order of their indices.
    first = lax.broadcasted_iota(idx.dtype, idx.shape, len(batch)) * chunk
    values, place = lax.top_k(values.reshape(*batch, -1), k)
    idx = (first + idx).reshape(*batch, -1)
    return values, jnp.take_along_axis(idx, place, -1)


def topk_sharded(
    scores_local: Num[Array, "*batch S"],
    ids_local: Int[Array, "*batch S"],
    k: int,
    axis_name: str,
    *,
    chunk: int = 0,
) -> Selection:
    """``topk_masked`` of a sequence split over a mesh axis, inside ``jax.shard_map``.

    Each of the M shards sends its k best: M k entries are communicated instead of T. The
    result is exact, ties included, if ids increase along the axis.

    Args:
      scores_local: of this shard's positions.
      ids_local: their ids, e.g. positions in the whole sequence; -1 where masked.
      k: slots of the result.
      axis_name: of the mesh.
      chunk: see ``topk_masked``.

    Returns:
      ids and scores, the same on every shard.

    Raises:
      ValueError: see ``topk_masked``.
    """
    check_k(k)
    slots = min(k, scores_local.shape[-1])
    local = topk_masked(scores_local, ids_local >= 0, slots, chunk=chunk)
    ids = jnp.where(local.valid, take(ids_local, local), -1)
    values, ids = (
        lax.all_gather(x, axis_name, axis=x.ndim - 1, tiled=True)
        for x in (local.values, ids)
    )
    selected = topk_masked(values, ids >= 0, k)
    return selected._replace(idx=jnp.where(selected.valid, take(ids, selected), -1))


def topk_on_mesh(
    scores: Num[Array, "B *batch T"],
    mask: Bool[Array, "B *batch T"],
    k: int,
    *,
    chunk: int = 0,
) -> Selection:
    """``topk_masked`` of sequences split over the mesh axis ``model``.

    Under ``jax.jit`` and a mesh with Auto axes this is ``topk_sharded``; without, or if T
    does not divide, ``topk_masked``.

    Args:
      scores: the leading axis is the batch's.
      mask: see ``topk_masked``.
      k: results.
      chunk: see ``topk_masked``.
    """
    check_k(k)
    mesh, auto = jax.sharding.get_abstract_mesh(), auto_axes()
    shards = mesh.shape["model"] if "model" in auto else 1
    if shards == 1 or scores.shape[-1] % shards:
        return topk_masked(scores, mask, k, chunk=chunk)
    batch = batch_axes(auto)
    parts = math.prod(mesh.shape[n] for n in batch)
    lead = batch if scores.shape[0] % parts == 0 else None
    ids = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)

    whole = [None] * (scores.ndim - 2)
    return jax.shard_map(
        lambda scores, ids: topk_sharded(scores, ids, k, "model", chunk=chunk),
        in_specs=(P(lead, *whole, "model"),) * 2,
        out_specs=P(lead),
        axis_names=set(auto),
        check_vma=False,  # Gathered values are equal, which it cannot know.
    )(scores, jnp.where(mask, ids, -1))


def take(
    values: Shaped[Array, "*batch T"] | Shaped[Array, "*batch T D"], selected: Selection
) -> Shaped[Array, "..."]:
    """Values at the positions of a search's results; zeros in empty slots.

    Args:
      values: a number or vector per position; as many leading axes as ``selected.idx``.
      selected: of ``topk_masked`` or ``hard_search``.

    Example:
      >>> selected = topk_masked(jnp.array([3, 9]), jnp.array([True, False]), 2)
      >>> take(jnp.array([5, 7]), selected).tolist()
      [5, 0]
    """
    idx, valid, axis = (
        jnp.maximum(selected.idx, 0),
        selected.valid,
        selected.idx.ndim - 1,
    )
    if values.ndim > selected.idx.ndim:
        idx, valid = idx[..., None], valid[..., None]
    picked = jnp.take_along_axis(values, idx, axis, mode="promise_in_bounds")
    return jnp.where(valid, picked, jnp.zeros((), values.dtype))


def hard_search(
    cat_hist: Int[Array, "*batch T"],
    mask: Bool[Array, "*batch T"],
    cat_target: Int[Array, "*batch"],
    k: int,
) -> Selection:
    """The k most recent behaviours of the candidate's category, newest first.

    SIM, arXiv 2006.05639, eq 1 (hard). A cumulative sum counts the matches and k binary
    searches find them, without sorting. Of equal times the later position is newer.

    Args:
      cat_hist: categories, oldest first.
      mask: True at behaviours.
      cat_target: the candidate's category.
      k: slots of the result.

    Returns:
      Positions; ``values`` are the positions too.

    Raises:
      ValueError: k below 1.

    Example:
      >>> cats = jnp.array([7, 5, 7, 7, 5])
      >>> mask = jnp.array([True] * 4 + [False])
      >>> jax.jit(hard_search, static_argnums=3)(cats, mask, 7, 2).idx.tolist()
      [3, 2]
    """
    check_k(k)
    match = mask & (cat_hist == cat_target[..., None])
    seen = jnp.cumsum(match, -1, dtype=jnp.int32)
    wanted = seen[..., -1:] - jnp.arange(k, dtype=jnp.int32).reshape(
        (1,) * cat_target.ndim + (k,)
    )
    flat = seen.reshape(-1, seen.shape[-1]), wanted.reshape(-1, k)
    place = jax.vmap(lambda s, w: jnp.searchsorted(s, w))(*flat)
    valid = wanted > 0
    idx = jnp.where(valid, place.reshape(wanted.shape), -1).astype(jnp.int32)
    return Selection(idx, valid, idx)


def soft_search(
    parts: tuple[tuple[Num[Array, "_ H"], Int[Array, "B T"]], ...],
    lengths: Int[Array, " B"],
    query: Float[Array, "B H"],
    k: int,
    *,
    chunk: int = 512,
) -> Selection:
    """The k behaviours of the largest inner product, from tables of projected items.

    The history is read in chunks: memory holds ids, the vectors of one chunk and the k
    best so far, never (B, T, H). Not differentiable.

    Args:
      parts: pairs of a table (V, H), e.g. W_b e_i, of floats or from ``pack``, and the
        ids (B, T) to read from it, 0 for padding; the vector of a position is the sum of
        its rows.
      lengths: behaviours of each history; positions whose first id is 0 are masked too.
      query: e.g. W_a e_a.
      k: slots of the result.
      chunk: positions per step.

    Returns:
      Positions and their scores, float32.

    Raises:
      ValueError: k or chunk below 1.
    """
    check_k(k)
    if chunk < 1:
        raise ValueError(f"soft_search needs chunk >= 1, got {chunk}")
    batch, length = parts[0][1].shape
    chunk = min(chunk, length)
    query = lax.stop_gradient(query)

    def body(i, best):
        # The last chunk starts earlier, to fit; positions it repeats are masked.
        start = jnp.minimum(i * chunk, length - chunk)
        place = start + jnp.arange(chunk, dtype=jnp.int32)[None]
        fresh = (place >= i * chunk) & (place < lengths[:, None])
        scores = jnp.zeros((batch, chunk), jnp.float32)
        for n, (table, ids) in enumerate(parts):
            some = lax.dynamic_slice_in_dim(ids, start, chunk, 1)
            fresh = fresh if n else fresh & (some != rows.PADDING)
            vectors = rows.gather(lax.stop_gradient(table), some)
            if vectors.dtype == jnp.uint16:
                vectors = lax.bitcast_convert_type(vectors, jnp.bfloat16)
            scores += jnp.einsum(
                "bth,bh->bt", vectors, query.astype(vectors.dtype),
                preferred_element_type=jnp.float32,
            )  # fmt: skip
        # The best so far are earlier positions, so they come first in ties.
        values, valid, idx = (
            jnp.concatenate([old, jnp.broadcast_to(new, scores.shape)], 1)
            for old, new in (
                (best.values, scores), (best.valid, fresh), (best.idx, place)
            )
        )  # fmt: skip
        selected = topk_masked(values, valid, k)
        return selected._replace(idx=jnp.where(selected.valid, take(idx, selected), -1))

    none = Selection(
        jnp.full((batch, k), -1, jnp.int32),
        jnp.zeros((batch, k), bool),
        jnp.full((batch, k), -jnp.inf, jnp.float32),
    )
    return lax.fori_loop(0, -(-length // chunk), body, none)


def pack(table: Float[Array, "V H"]) -> UInt16[Array, "V H"]:
    """A table in bfloat16, as its bits in integers, for ``soft_search``.

    On CPUs XLA converts a whole bfloat16 table to float32 before it gathers rows. Zero
    stays zero, and sums of integers over the shards of a table are exact.

    Example:
      >>> hex(int(pack(jnp.ones((1, 1)))[0, 0]))
      '0x3f80'
    """
    return lax.bitcast_convert_type(table.astype(jnp.bfloat16), jnp.uint16)


def time_gap(
    now: Integer[Array, "*#shape"], past: Integer[Array, "*#shape"]
) -> Integer[Array, "*shape"]:
    """``now - past``; gaps beyond the integers' range are the nearest integer in it.

    Logs have times of all 32 bits, whose difference needs 33.

    Args:
      now, past: seconds, of one dtype.

    Example:
      >>> int(time_gap(jnp.int32(2_000_000_000), jnp.int32(-2_000_000_000)))
      2147483647
    """
    whole_numbers("time_gap", now=now, past=past)
    gap, limits = now - past, jnp.iinfo(now.dtype)
    most, least = (jnp.asarray(x, now.dtype) for x in (limits.max, limits.min))
    gap = jnp.where((now >= past) & (gap < 0), most, gap)
    return jnp.where((now < past) & (gap > 0), least, gap)


def time_bucket(
    dt: Int[Array, "*shape"], *, buckets: int = 26, unit: int = 1
) -> Int[Array, "*shape"]:
    r"""Logarithmic buckets of time gaps: $\min(b - 1, \lfloor\log_2(1 + dt)\rfloor)$.

    Computed exactly, from the position of the leading bit. Negative gaps are in bucket 0.

    Args:
      dt: seconds.
      buckets: b, their number.
      unit: seconds per unit of the logarithm; 86400 for data stamped by days.

    Raises:
      ValueError: buckets or unit below 1.

    Example:
      >>> time_bucket(jnp.array([-5, 0, 1, 2, 3, 1023, 1 << 30])).tolist()
      [0, 0, 1, 1, 2, 10, 25]
    """
    if buckets < 1 or unit < 1:
        raise ValueError(
            f"time_bucket needs buckets >= 1 and unit >= 1, got {buckets}, {unit}"
        )
    units = jnp.clip(dt, 0, np.iinfo(np.int32).max) // unit
    bits = 31 - lax.clz(units.astype(jnp.uint32) + 1).astype(jnp.int32)
    return jnp.minimum(bits, buckets - 1)


def check_k(k: int) -> None:
    """Raises ValueError if a search has no slots for results."""
    if k < 1:
        raise ValueError(f"a search needs k >= 1 results, got k={k}")


def _least(dtype):
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min
