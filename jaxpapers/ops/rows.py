"""Reading, adding to and replacing rows of tables split over the mesh axis ``model``.

A table is (V, D) with the PartitionSpec ``P("model", None)``, or a plain array. Inside
``jax.jit`` under a mesh with Auto axes these functions run under ``jax.shard_map``: a
shard reads and writes the rows that it owns, so that communication is proportional to the
batch, never to the table, forward and backward.

Row 0 is padding, row 1 out of vocabulary: every id out of range reads it.
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

from jaxpapers.ops.mesh_axes import auto_axes, batch_axes

PADDING = 0
OOV = 1
FILL = int(np.iinfo(np.int32).max)
"""Id of an empty slot in ``Rows``: it reads zeros and is never written."""


class Rows(NamedTuple):
    """Some rows of a table: a sparse gradient or update, or the rows that a batch reads.

    Attributes:
      ids: int32 (U,), increasing and distinct, then ``FILL``.
      values: (U, D).
    """

    ids: Any
    values: Any


def is_rows(x: Any) -> bool:
    """Whether a leaf of a tree is ``Rows``, for ``is_leaf``."""
    return isinstance(x, Rows)


def resolve(ids: Int[Array, "*shape"], vocab: int) -> Int[Array, "*shape"]:
    """Replaces ids outside of 0 .. vocab - 1 by 1, the out-of-vocabulary row.

    Args:
      ids: any integers.
      vocab: number of ids, 0 and 1 included.

    Example:
      >>> resolve(jnp.array([0, 4, 5, -1]), 5).tolist()
      [0, 4, 1, 1]
    """
    return jnp.where((ids >= 0) & (ids < vocab), ids, OOV).astype(jnp.int32)


def unique(ids: Int[Array, "*shape"], vocab: int) -> Int[Array, " U"]:
    """Distinct ids, increasing, without padding, then ``FILL``.

    Args:
      ids: any; those out of range count as 1.
      vocab: rows of the table.

    Returns:
      U = min(number of ids, vocab) slots, replicated over devices.

    Example:
      >>> ids = jax.jit(unique, static_argnums=1)(jnp.array([7, 3, 0, 7]), 100)
      >>> ids.tolist() == [3, 7, FILL, FILL]
      True
    """
    flat = resolve(replicate(ids).reshape(-1), vocab)
    size = min(flat.size, vocab)
    # For small tables marking the rows is cheaper than sorting the ids.
    if vocab <= 4 * flat.size:
        seen = jnp.zeros((vocab,), bool).at[flat].set(True).at[PADDING].set(False)
        found = jnp.nonzero(seen, size=size, fill_value=FILL)[0]
        return found.astype(jnp.int32)
    ordered = jnp.sort(jnp.where(flat == PADDING, FILL, flat))
    first = jnp.append(True, ordered[1:] != ordered[:-1])
    place = jnp.where(first, jnp.cumsum(first) - 1, size)
    return jnp.full((size,), FILL, jnp.int32).at[place].set(ordered, mode="drop")


def select(rows: Rows, ids: Int[Array, "*shape"]) -> Shaped[Array, "*shape D"]:
    """``gather`` of ids from the rows of a batch instead of the whole table.

    An id that is not among the rows reads row 1, or zeros if that is not there either.
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

    Under a mesh each shard of the table gathers the rows that it owns, and a sum over
    ``model`` combines them, exactly, as all other summands are zero. The leading axis of
    ``ids`` stays split over ``data`` if it divides. The gradient gathers the batch's ids
    and cotangents over ``data`` and adds them up on the shards that own the rows.

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
    table, ids = saved  # Only the table's shape is used.
    width = table.shape[1]
    return _zeros_plus(table, ids.reshape(-1), cotangent.reshape(-1, width)), None


def add(
    table: Shaped[Array, "V ..."], ids: Int[Array, " U"], values: Shaped[Array, "U ..."]
) -> Shaped[Array, "V ..."]:
    """Adds values to rows of a table; drops ids out of range, sums repeated ones."""
    return _write(table, ids, values, lambda at, x: at.add(x, mode="drop"))


def put(
    table: Shaped[Array, "V ..."], ids: Int[Array, " U"], values: Shaped[Array, "U ..."]
) -> Shaped[Array, "V ..."]:
    """Replaces rows of a table; drops ids out of range."""
    return _write(table, ids, values, lambda at, x: at.set(x, mode="drop"))


def take(
    table: Shaped[Array, "V ..."], ids: Int[Array, " U"]
) -> Shaped[Array, "U ..."]:
    """``gather`` of tables of any rank, replicated over devices; not differentiable."""
    return _gather(table, ids, whole=True)


def replicate(x: Array) -> Array:
    """Replicates an array over the mesh, if there is one with Auto axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Auto not in mesh.axis_types:
        return x
    return lax.with_sharding_constraint(x, P())


def _axes(rows: int) -> tuple[set[str], int, tuple[str, ...]]:
    """Auto axes of the mesh, number of the table's shards, axes of the batch."""
    mesh, auto = jax.sharding.get_abstract_mesh(), set(auto_axes())
    if "model" not in auto or math.prod(mesh.shape[n] for n in auto) == 1:
        return set(), 1, ()
    shards = mesh.shape["model"]
    if rows % shards:
        raise ValueError(
            f"a table of {rows} rows does not divide over mesh axis 'model' of size "
            f"{shards}; allocate nets.embedding.padded_rows({rows}, {shards}) rows"
        )
    return auto, shards, batch_axes(auto)


def _read(table, ids, first):
    """The ids' rows in [first, first + len(table)), zeros for others."""
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
    """Values scattered to a table of zeros, shard by shard."""
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
