r"""What a low rank leaves of a matrix, as a part of its update.

With P orthonormal and R = N^T P, the residual N - P R^T is orthogonal to P's columns. An
orthonormal (l, s) matrix has the squared Frobenius norm min(l, s), and P Q^T with unit
columns of Q has r of it; the residual gets the rest, k = min(l, s) - r, so that with
weight 1 the whole has the root mean square of Muon's update. k counts the directions that
are left: rectangular shapes, P on either side and ranks near min(l, s) need no further
factor, and at full rank nothing is left.

The two parts are orthogonal, so |N - P R^T|^2 = |N|^2 - |R|^2: one more number per
matrix to be summed over devices, and no product of its own.

Replicas that exchange P and R alone cannot have it: the residual of the mean needs the
mean of N.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxpapers.optim.collectives import axis_size, psum

# Least |N - P R^T|^2 / |N|^2, in unit round-offs, that a difference of squares tells from
# rounding error. What is smaller counts as that much: a residual that is rounding error
# stays one in the update, which is continuous.
FLOOR = 1024


def residual_scale(
    n: jax.Array, r: jax.Array, norm: jax.Array, zero: jax.Array, axes: Any
) -> jax.Array:
    """sqrt(k) / |N - P R^T|_F of each matrix, (batch, 1, 1); 0 for a zero N.

    Args:
      n: N, (batch, l, s) or (batch, s, l), this device's block.
      r: R, (batch, s, rank), this device's block.
      norm: |R_j| of the whole R, (batch, 1, rank).
      zero: (batch, 1, 1), where P is 0 and R is not N^T P.
      axes: ``MeshAxes`` that split l and s.
    """
    s, rank = r.shape[-2:]
    l = n.shape[-1] * n.shape[-2] // s
    left = min(l * axis_size(axes.p), s * axis_size(axes.q)) - rank
    if left == 0:
        return jnp.zeros(zero.shape, n.dtype)
    # A power of two, so that no square overflows. At least 2^-120, as for |R_j|.
    exponent = jnp.maximum(jnp.frexp(jnp.max(norm, axis=-1, keepdims=True))[1], -120)
    square = jnp.square(jnp.ldexp(n, -exponent)).sum((-2, -1), keepdims=True)
    whole = psum(square, axes.p + axes.q)
    taken = jnp.square(jnp.ldexp(norm, -exponent)).sum(-1, keepdims=True)
    floor = FLOOR * float(jnp.finfo(n.dtype).eps)
    rest = jnp.maximum(whole - jnp.where(zero, 0, taken), floor * whole)
    # NaN is not 0: it must reach the update.
    scale = math.sqrt(left) / jnp.sqrt(jnp.where(rest == 0, 1, rest))
    return jnp.where(rest == 0, 0, jnp.ldexp(scale, -exponent))
