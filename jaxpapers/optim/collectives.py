"""Sums and maxima over mesh axes, and the packed form in which Gram matrices travel.

Every function takes the names of mesh axes; without names it is the identity, so that
one code serves a whole matrix and its blocks inside ``jax.shard_map``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

AxisNames = str | Sequence[str]


def psum(x, axis_name: AxisNames):
    """Sum over mesh axes."""
    return lax.psum(x, axis_name) if axis_name else x


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


def _pad(x, rows, columns):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [rows, columns])
