r"""Some columns of matrices whose columns are split over devices: to whole rows and back.

Which columns are wanted depends on the data, and a device may hold many of them or none.
``lax.ragged_all_to_all`` sends them and nothing else. On a CPU, where XLA has no such
collective, slices travel padded to the most that a device can hold.

Of k columns of n matrices (l, s), s split over f devices, b = min(k, s / f) at most on
one, a device sends on average these numbers, there and back:

============ ============================ ===========================
choice       accelerators                 CPU
============ ============================ ===========================
``matrices`` 2 (f-1)/f ceil(n / f) l k    2 (f-1) ceil(n / f) l b
``rows``     2 (f-1)/f n (l / f) k        2 (f-1) n (l / f) b
============ ============================ ===========================

and on a CPU where each slice begins, an integer for every one. ``rows`` also sums Gram
matrices over the f devices, see ``choose_exchange``. A sum of the n l k columns over the
devices, each adding its own to zeros, sends 2 (f-1)/f n l k, and whole rows of all
columns 2 (f-1)/f ceil(n / f) l s.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpapers.optim.collectives import AxisNames, axis_size
from jaxpapers.optim.newton_schulz import choose_exchange
from jaxpapers.optim.power_iteration import MeshAxes


class Columns(NamedTuple):
    """Chosen columns of a share of the matrices, or of their rows.

    Attributes:
      values: (m, k, l'), columns first.
      summed: mesh axes over which Gram matrices of their l' entries are summed.
      chosen: which columns of this device they are: shaped as x, with l of size 1.
      back: from (m, k, l') to an array like x, zero in all other columns.
    """

    values: jax.Array
    summed: tuple[str, ...]
    chosen: jax.Array
    back: Callable[[jax.Array], jax.Array]


def gather_columns(
    x: jax.Array, index: jax.Array, axes: MeshAxes, order: str = "ls"
) -> Columns:
    """Columns of matrices, whole as far as l is not split.

    Args:
      x: (n, l, s), or (n, s, l); the block of a device inside ``jax.shard_map``.
      index: (n, k), the columns over all devices, in ascending order; equal on all.
      axes: mesh axes that split l (``p``) and s (``q``).
      order: of the sides of ``x``, ``ls`` or ``sl``.
    """
    axis = order.index("s")
    columns, l = x.shape[1 + axis], x.shape[2 - axis]
    (n, k), f = index.shape, axis_size(axes.q)

    def turn(y):  # Columns first, or as x is.
        return y if order == "sl" else jnp.swapaxes(y, 1, 2)

    most = min(k, columns)
    me = lax.axis_index(axes.q) if axes.q else 0
    # A device's columns are neighbours among the k.
    starts = _smaller(index, columns * jnp.arange(f))
    counts = jnp.diff(starts, axis=-1, append=k)
    first = jnp.take(starts, me, axis=1)[:, None]
    slots = jnp.minimum(first + jnp.arange(most)[None], k - 1)
    local = jnp.clip(_take(index, slots) - me * columns, 0, columns - 1)
    mine = turn(_take(x, local, axis))
    own = me * columns + jnp.arange(columns)
    chosen = turn((index[:, None, :] == own[None, :, None]).any(-1)[..., None])

    def scatter(y, first):
        slots = jnp.clip(_smaller(index, own) - first, 0, y.shape[1] - 1)
        return jnp.where(chosen, _take(turn(y), slots, axis), 0)

    if f == 1:
        return Columns(mine, axes.p, chosen, lambda y: scatter(y, 0))
    if choose_exchange(n, l, k, f, gather=False) == "matrices":
        # Matrices of which nothing is sent fill the batch.
        fill = ((0, -n % f), (0, 0))
        values, back = _exchange(
            mine, jnp.pad(starts, fill), jnp.pad(counts, fill), k, axes.q
        )
        return Columns(values, axes.p, chosen, lambda y: scatter(back(y)[:n], first))
    # A part of the rows of a matrix is a matrix.
    mine = mine.reshape(n, most, f, l // f).transpose(2, 0, 1, 3)
    values, back = _exchange(
        mine.reshape(f * n, most, l // f),
        jnp.tile(starts, (f, 1)),
        jnp.tile(counts, (f, 1)),
        k,
        axes.q,
    )

    def join(y):
        y = back(y).reshape(f, n, most, l // f).transpose(1, 2, 0, 3)
        return scatter(y.reshape(n, most, l), first)

    return Columns(values, axes.p + axes.q, chosen, join)


def _exchange(
    mine: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    k: int,
    axis_name: tuple[str, ...],
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Columns of all devices for this device's share of the matrices, and the way back.

    Args:
      mine: (n, b, l), this device's columns first; of matrices after these nothing is
        sent.
      starts: (f m, f), the place of a device's first column among the k of a matrix.
      counts: (f m, f), columns that a device has of a matrix.
      k: columns of a matrix.
      axis_name: mesh axes of the f devices.

    Returns:
      (m, k, l), and a function from such an array to (f m, b, l).
    """
    f, (_, most, l) = starts.shape[1], mine.shape
    m, me = starts.shape[0] // f, lax.axis_index(axis_name)
    # A slice is what goes from one device to another of one matrix.
    slices = jnp.arange(f * m)
    share = slices % m
    start, count = (jnp.take(z, me, axis=1) for z in (starts, counts))
    theirs, sizes = (
        lax.dynamic_slice_in_dim(z, me * m, m).T.reshape(-1) for z in (starts, counts)
    )
    values = ragged_all_to_all(
        mine.reshape(-1, l),
        m * k,
        jnp.where(count > 0, slices * most, 0),
        count,
        share * k + start,
        sizes,
        axis_name,
        most,
    )

    def back(y):
        y = ragged_all_to_all(
            y.reshape(-1, l),
            f * m * most,
            share * k + theirs,
            sizes,
            (me * m + share) * most,
            count,
            axis_name,
            most,
        )
        return y.reshape(f * m, most, l)

    return values.reshape(m, k, l), back


def ragged_all_to_all(
    x: jax.Array,
    rows: int,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    axis_name: AxisNames,
    most: int,
) -> jax.Array:
    """``lax.ragged_all_to_all`` into zeros, also on a CPU.

    Args:
      x: (i, c).
      rows: of the result (rows, c).
      input_offsets: see ``lax.ragged_all_to_all``, as for all up to ``axis_name``.
      send_sizes: see there.
      output_offsets: see there.
      recv_sizes: see there.
      axis_name: see there.
      most: bound of the sizes, to which slices are padded on a CPU.
    """
    # They vary over the mesh axes that x does.
    output = jnp.broadcast_to(jnp.where(x[:1] > jnp.inf, x[:1], 0), (rows, x.shape[1]))

    def ragged(x, output, *slices):
        return lax.ragged_all_to_all(x, output, *slices, axis_name=axis_name)

    def padded(x, output, input_offsets, send_sizes, output_offsets, recv_sizes):
        del send_sizes

        def send(x):
            return lax.all_to_all(x, axis_name, 0, 0, tiled=True)

        row = jnp.arange(most)[None]
        rows = jnp.minimum(input_offsets[:, None] + row, x.shape[0] - 1)
        to = send(output_offsets)[:, None] + row
        to = jnp.where(row < recv_sizes[:, None], to, output.shape[0])
        return output.at[to].set(send(x[rows]), mode="drop")

    return lax.platform_dependent(
        x, output, input_offsets, send_sizes, output_offsets, recv_sizes,
        cpu=padded, default=ragged,
    )  # fmt: skip


def _smaller(index: jax.Array, columns: jax.Array) -> jax.Array:
    """How many of the (n, k) indices are smaller than each of (c,) columns: (n, c)."""
    return (index[:, None, :] < columns[None, :, None]).sum(-1, dtype=jnp.int32)


def _take(x: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
    """Of every matrix of x (n, ...) the entries (n, i) along an axis."""
    return jax.vmap(lambda x, i: jnp.take(x, i, axis=axis))(x, index)
