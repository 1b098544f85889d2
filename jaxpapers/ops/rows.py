"""Rows of tables whose rows lie over the mesh axis ``model``: read, add to, replace.

A table is (V, D) with the PartitionSpec ``P("model", None)``. Every function here works
on plain arrays too. Inside ``jax.jit`` under a mesh with Auto axes they run under
``jax.shard_map``: a shard reads and writes the rows it owns, so that what crosses devices
is as large as the batch, never as the table, forward or backward.

Conventions: row 0 is padding, row 1 stands for every id that is out of range.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

PADDING = 0
OOV = 1
FILL = int(np.iinfo(np.int32).max)
"""Id of an empty place in ``Rows``: reads as zeros, is never written."""


class Rows(NamedTuple):
    """Some rows of a table: a sparse gradient, a sparse update, or the rows of a batch.

    Attributes:
      ids: int32 (U,), increasing, each row once; the rest is ``FILL``.
      values: (U, D).
    """

    ids: Any
    values: Any


def is_rows(x: Any) -> bool:
    """Whether a leaf of a tree is ``Rows``, for ``is_leaf``."""
    return isinstance(x, Rows)


def resolve(ids: Int[Array, "*shape"], vocab: int) -> Int[Array, "*shape"]:
    """Ids below 0 or not below ``vocab`` become the out-of-vocabulary row 1.

    Args:
      ids: any.
      vocab: number of ids, the rows 0 and 1 included.

    Example:
      >>> resolve(jnp.array([0, 4, 5, -1]), 5).tolist()
      [0, 4, 1, 1]
    """
    return jnp.where((ids >= 0) & (ids < vocab), ids, OOV).astype(jnp.int32)


def unique(ids: Int[Array, "*shape"], vocab: int) -> Int[Array, " U"]:
    """The distinct ids without padding, increasing, then ``FILL``.

    Args:
      ids: any; what is out of range counts as row 1.
      vocab: rows of the table.

    Returns:
      min(number of ids, vocab) places, on every device.

    Example:
      >>> ids = jax.jit(unique, static_argnums=1)(jnp.array([7, 3, 0, 7]), 100)
      >>> ids.tolist() == [3, 7, FILL, FILL]
      True
    """
    flat = resolve(replicate(ids).reshape(-1), vocab)
    size = min(flat.size, vocab)
    # Sorting is most of the work: of a small table the rows are marked instead.
    if vocab <= 4 * flat.size:
        seen = jnp.zeros((vocab,), bool).at[flat].set(True).at[PADDING].set(False)
        found = jnp.nonzero(seen, size=size, fill_value=FILL)[0]
        return found.astype(jnp.int32)
    ordered = jnp.sort(jnp.where(flat == PADDING, FILL, flat))
    first = jnp.append(True, ordered[1:] != ordered[:-1])
    place = jnp.where(first, jnp.cumsum(first) - 1, size)
    return jnp.full((size,), FILL, jnp.int32).at[place].set(ordered, mode="drop")


def select(rows: Rows, ids: Int[Array, "*shape"]) -> Shaped[Array, "*shape D"]:
    """Values of ids from the rows of a batch, as ``gather`` from the whole table.

    An id that is not among the rows counts as row 1, and as zeros if that is not there.
    """
    ids = resolve(ids, FILL)
    last = rows.ids.shape[0] - 1
    place = jnp.minimum(jnp.searchsorted(rows.ids, ids), last)
    oov = jnp.minimum(jnp.searchsorted(rows.ids, OOV), last)
    found = rows.ids[place] == ids
    hit = (ids != PADDING) & (found | (rows.ids[oov] == OOV))
    place = jnp.where(found, place, oov)
    values = rows.values.at[place].get(mode="promise_in_bounds")
    return jnp.where(hit[..., None], values, jnp.zeros((), values.dtype))


@jax.custom_vjp
def gather(
    table: Shaped[Array, "V D"], ids: Int[Array, "*shape"]
) -> Shaped[Array, "*shape D"]:
    """Rows of a table; zeros for ids outside of it.

    Under a mesh each shard of the table gathers the rows it owns, and their sum over
    ``model`` is exact: all other summands are zero. The leading axis of ``ids`` stays
    split over ``data`` if it divides. The gradient gathers ids and cotangents over
    ``data``, which are as large as the batch, and adds them up where the rows are.

    Raises:
      ValueError: the rows do not divide over ``model``.
    """
    return _gather(table, ids)


def _gather(table, ids, whole=False):
    auto, _, batch = _axes(table.shape[0])
    if not auto:
        return _read(table, ids, 0)
    mesh = jax.sharding.get_abstract_mesh()
    split = math.prod(mesh.shape[n] for n in batch)
    divides = ids.ndim and ids.shape[0] % split == 0
    where = P(batch) if divides and not whole else P()

    def local(table, ids):
        first = lax.axis_index("model") * table.shape[0]
        return lax.psum(_read(table, ids, first), "model")

    return jax.shard_map(
        local, in_specs=(P("model"), where), out_specs=where, axis_names=auto
    )(table, ids)


def _gather_forward(table, ids):
    return _gather(table, ids), (table, ids)


def _gather_backward(saved, cotangent):
    table, ids = saved  # Of the table only the shape is used.
    width = table.shape[1]
    return _zeros_plus(table, ids.reshape(-1), cotangent.reshape(-1, width)), None


def add(
    table: Shaped[Array, "V ..."], ids: Int[Array, " U"], values: Shaped[Array, "U ..."]
) -> Shaped[Array, "V ..."]:
    """Adds to rows of a table; ids outside of it are left out, repeated ones add up."""
    return _write(table, ids, values, lambda at, x: at.add(x, mode="drop"))


def put(
    table: Shaped[Array, "V ..."], ids: Int[Array, " U"], values: Shaped[Array, "U ..."]
) -> Shaped[Array, "V ..."]:
    """Replaces rows of a table; ids outside of it are left out."""
    return _write(table, ids, values, lambda at, x: at.set(x, mode="drop"))


def take(
    table: Shaped[Array, "V ..."], ids: Int[Array, " U"]
) -> Shaped[Array, "U ..."]:
    """``gather`` of any rank, with the same rows on every device; has no gradient."""
    return _gather(table, ids, whole=True)


def replicate(x: Array) -> Array:
    """The same array on every device of the mesh, if there is one with Auto axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Auto not in mesh.axis_types:
        return x
    return lax.with_sharding_constraint(x, P())


def _axes(rows: int) -> tuple[set[str], int, tuple[str, ...]]:
    """Auto axes to take part, shards of the table, axes of the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    auto = {n for n in ("replica", "data", "model") if kinds.get(n) == AxisType.Auto}
    if "model" not in auto or math.prod(mesh.shape[n] for n in auto) == 1:
        return set(), 1, ()
    shards = mesh.shape["model"]
    if rows % shards:
        raise ValueError(
            f"a table of {rows} rows does not divide over mesh axis 'model' of size "
            f"{shards}; allocate nets.embedding.padded_rows({rows}, {shards}) rows"
        )
    return auto, shards, tuple(n for n in ("replica", "data") if n in auto)


def _read(table, ids, first):
    """Rows [first, first + len) that are here, zeros for others."""
    place = _place(ids, first, table.shape[0])
    return table.at[place].get(mode="fill", fill_value=0)


def _place(ids, first, count):
    place = ids - first
    return jnp.where((place >= 0) & (place < count), place, count)


def _write(table, ids, values, how):
    auto, _, _ = _axes(table.shape[0])
    if not auto:
        return how(table.at[_place(ids, 0, table.shape[0])], values)

    def local(table, ids, values):
        first = lax.axis_index("model") * table.shape[0]
        return how(table.at[_place(ids, first, table.shape[0])], values)

    return jax.shard_map(
        local, in_specs=(P("model"), P(), P()), out_specs=P("model"), axis_names=auto
    )(table, ids, values)


def _zeros_plus(table, ids, values):
    """A table of zeros plus values at ids, each shard its own."""
    auto, shards, _ = _axes(table.shape[0])

    def local(ids, values):
        count = table.shape[0] // shards
        first = lax.axis_index("model") * count if auto else 0
        zeros = jnp.zeros((count, table.shape[1]), values.dtype)
        if auto:
            zeros = lax.pcast(zeros, "model", to="varying")
        return zeros.at[_place(ids, first, count)].add(values, mode="drop")

    if auto:
        local = jax.shard_map(
            local, in_specs=(P(), P()), out_specs=P("model"), axis_names=auto
        )
    return local(ids, values).astype(table.dtype)


gather.defvjp(_gather_forward, _gather_backward)
