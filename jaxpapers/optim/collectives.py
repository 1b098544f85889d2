"""Sums and maxima over mesh axes, and the packed form in which Gram matrices travel.

Every function takes the names of mesh axes; without names it is the identity, so that
one code serves a whole matrix and its blocks inside ``jax.shard_map``.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

AxisNames = str | Sequence[str]


def psum(x, axis_name: AxisNames):
    """Sum over mesh axes."""
    return lax.psum(x, axis_name) if axis_name else x


def mean(x, summed: Sequence[str], averaged: Sequence[str], dtype=None, flat=False):
    """One reduction for a sum over some mesh axes and a mean over others.

    Args:
      x: a summand.
      summed: axes of the sum.
      averaged: axes of the mean.
      dtype: of what is sent; None: that of x.
      flat: send a vector of all numbers, where no axis of x is Auto. A TPU pads the
        innermost axis to 128, be it the columns of a small rank or a stack of few
        matrices, and sends the padding to other slices.
    """
    axes = (*summed, *averaged)

    def wide(x):
        return psum(x.astype(jnp.float32), axes).astype(x.dtype)

    sent = x.astype(dtype or x.dtype)
    if flat and averaged:
        sent = sent.reshape(-1)
    if sent.dtype.itemsize < 4 and axes:
        # XLA's CPU compiler sums 16-bit numbers as float32, and aborts as it makes them
        # that where some mesh axes are not manual.
        total = lax.platform_dependent(sent, cpu=wide, default=lambda x: psum(x, axes))
    else:
        total = psum(sent, axes)
    return total.reshape(x.shape).astype(x.dtype) / axis_size(averaged)


def replica_dtype(communication_dtype):
    """In which replicas send R and gradients, whose scale is any; None: in their own."""
    if communication_dtype and jnp.finfo(communication_dtype).max > 1e30:
        return communication_dtype
    return None


def pmax(x, axis_name: AxisNames):
    """Maximum over mesh axes."""
    return lax.pmax(x, axis_name) if axis_name else x


def axis_size(axis_name: AxisNames) -> int:
    """Devices along mesh axes; 1 without names."""
    return lax.axis_size(axis_name) if axis_name else 1


def pack(x: jax.Array) -> jax.Array:
    """Lower triangles of (..., r, r) without their zeros: r (r + 1) / 2 entries each.

    Rectangular full packed storage (Gustavson et al., ACM TOMS 37, 2010): of the four
    blocks, the two triangles interlock to one rectangle. Slices and masks only, as
    gathers of single entries are slow on TPUs.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0, 0.0], [2.0, 3.0, 0.0], [4.0, 5.0, 6.0]])
      >>> pack(x)
      Array([[1., 6.],
             [2., 3.],
             [4., 5.]], dtype=float32)
    """
    r = x.shape[-1]
    h = (r + 1) // 2
    even = 1 - r % 2
    first = jnp.tril(x[..., :h, :h])
    second = jnp.triu(jnp.swapaxes(x[..., h:, h:], -1, -2))
    # The second triangle lies above the first: shifted right if r is odd, else the
    # first one shifted down.
    first = _pad(first, (even, 0), (0, 0))
    second = _pad(second, (0, 1), (1 - even, 0))
    return jnp.concatenate([first + second, x[..., h:, :h]], axis=-2)


def unpack(packed: jax.Array, r: int) -> jax.Array:
    """Lower triangular (..., r, r) of ``pack``; zeros above the diagonal."""
    h = (r + 1) // 2
    even = 1 - r % 2
    top, corner = packed[..., : h + even, :], packed[..., h + even :, :]
    first = jnp.tril(top[..., even:, :])
    second = top[..., : r - h, 1 - even :]
    second = jnp.tril(jnp.swapaxes(second, -1, -2))
    return jnp.concatenate(
        [
            _pad(first, (0, 0), (0, r - h)),
            jnp.concatenate([corner, second], axis=-1),
        ],
        axis=-2,
    )


def symmetric(lower: jax.Array) -> jax.Array:
    """The symmetric matrix with this lower triangle."""
    return lower + jnp.swapaxes(jnp.tril(lower, -1), -1, -2)


def all_to_all(
    x: jax.Array, axis_name: AxisNames, give: int, take: int
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """From its part of one axis, a device gets all of it for a share of another.

    Args:
      x: block of a device, whole along ``give`` and split along ``take``.
      axis_name: mesh axes that split ``take``.
      give: axis that is split afterwards, filled up with zeros.
      take: axis that is whole afterwards.

    Returns:
      The device's share, and the way back of what is shaped like it.
    """
    size = x.shape[give]
    fill = [(0, 0)] * x.ndim
    fill[give] = (0, -size % axis_size(axis_name))
    x = jnp.pad(x, fill)

    def move(x, give, take):
        # XLA's CPU backend sends slices, and what they are slices of (stacks of leaves,
        # zeros) may have several layouts, which it then refuses: one array has one.
        return lax.all_to_all(
            lax.optimization_barrier(x),
            axis_name,
            split_axis=give,
            concat_axis=take,
            tiled=True,
        )

    def back(y):
        return lax.slice_in_dim(move(y, take, give), 0, size, axis=give)

    return move(x, give, take), back


def share_axes(matrices: int, sizes: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """Mesh axes whose devices each factorise a share of a batch of Gram matrices.

    The largest product of axes that the batch fills, with at most a third of padding.

    Args:
      matrices: in the batch.
      sizes: of the mesh axes over which the Gram matrices are summed.

    Returns:
      The axes, () if every device has to do all, and the padded size of the batch.

    Example:
      >>> share_axes(28, {"data": 64, "model": 8})
      (('model',), 32)
    """
    best: tuple[tuple[str, ...], int] = ((), matrices)
    devices = 1
    for k in range(1, len(sizes) + 1):
        for axes in itertools.combinations(sizes, k):
            count = math.prod(sizes[a] for a in axes)
            padded = count * math.ceil(matrices / count)
            if 3 * padded <= 4 * matrices and (count, -padded) > (devices, -best[1]):
                best, devices = (axes, padded), count
    return best


def share_sum(
    x: jax.Array, axis_name: AxisNames
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Sum of symmetric matrices over devices, of which each gets a share to work on.

    Only triangles are sent. Where the batch fills a mesh axis (``share_axes``), the sum
    is scattered and results of the shares are gathered: the bytes of a plain sum, a
    fraction of the work. Else every device has the whole sum, and nothing is gathered.

    Args:
      x: (n, r, r), a summand.
      axis_name: mesh axes to sum over.

    Returns:
      The share (k, r, r) of the sum, and a function that gathers the lower triangles of
      matrices (k, r, r), or numbers (k, c), from all shares.
    """
    n, r = x.shape[:2]
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if not names:
        return x, lambda y: y
    shared, padded = share_axes(n, {name: lax.axis_size(name) for name in names})
    if not shared:
        return symmetric(unpack(psum(pack(x), names), r)), lambda y: y
    # Scatter, sum the share over the other axes, gather: the bytes of one all-reduce.
    # The batch is padded with identities, which can be factorised.
    eye = jnp.broadcast_to(jnp.eye(r, dtype=x.dtype), (padded - n, r, r))
    packed = pack(jnp.concatenate([x, eye]))
    mine = lax.psum_scatter(packed, shared, scatter_dimension=0, tiled=True)
    mine = psum(mine, tuple(name for name in names if name not in shared))

    def gather(y):
        if y.ndim == 2:
            return lax.all_gather(y, shared, tiled=True)[:n]
        return unpack(lax.all_gather(pack(y), shared, tiled=True)[:n], r)

    return symmetric(unpack(mine, r)), gather


def _pad(x, rows, columns):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [rows, columns])
