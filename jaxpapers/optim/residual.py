r"""What a low rank leaves of a matrix, as a part of its update.

With P orthonormal and R = N^T P, the residual D = N - P R^T is orthogonal to P's columns.
An orthonormal (l, s) matrix has the squared Frobenius norm min(l, s), and P Q^T with unit
columns of Q has r of it; the residual gets the rest, k = min(l, s) - r, so that with
weight 1 the whole has the root mean square of Muon's update. k counts the directions that
are left: rectangular shapes, P on either side and ranks near min(l, s) need no further
factor, and at full rank nothing is left:

    w sqrt(k) D / |D|_F

D is orthogonal to P R^T, so |D|^2 = |N|^2 - |R|^2: one more number per matrix is summed
over devices, and P Q^T and D need one product together.

Replicas that exchange P and R alone cannot have it: the residual of the mean needs the
mean of N.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpapers.optim.collectives import axis_size, psum

# Least |D|^2 / |N|^2, in unit round-offs. Below it a difference of squares is rounding
# error, and P's span of an ill-conditioned N Q is known no better. What is smaller counts
# as that much: a residual that is rounding error stays one in the update, which is
# continuous.
FLOOR = 1024


def with_residual(
    weight: Any,
    dot: Callable,
    n: jax.Array,
    p: jax.Array,
    r: jax.Array,
    q: jax.Array,
    norm: jax.Array,
    zero: jax.Array,
    axes: Any,
) -> jax.Array:
    """P Q^T + w sqrt(k) D / |D|_F, stored as N is.

    Args:
      weight: w.
      dot: (P, X) -> P X^T, stored as N is.
      n: N, (batch, l, s) or (batch, s, l), as all that follow this device's block.
      p: P, (batch, l, rank).
      r: R, (batch, s, rank).
      q: Q, like R.
      norm: |R_j| of the whole R, (batch, 1, rank).
      zero: (batch, 1, 1), where P is 0 and R is not N^T P.
      axes: ``MeshAxes`` that split l and s.
    """
    # P (Q - c R)^T + c N: one product for both parts.
    c = weight * residual_scale(n, r, norm, zero, axes)
    return dot(p, q - c * r) + c * n


def residual_scale(
    n: jax.Array, r: jax.Array, norm: jax.Array, zero: jax.Array, axes: Any
) -> jax.Array:
    """sqrt(k) / |D|_F of each matrix, (batch, 1, 1); 0 for a zero N.

    Args:
      n: see ``with_residual``, as for the rest.
      r: see there.
      norm: see there.
      zero: see there.
      axes: see there.
    """
    left = directions_left(n, r, axes)
    if left == 0:
        return jnp.zeros(zero.shape, n.dtype)
    exponent = _exponent(norm)
    square = jnp.square(jnp.ldexp(n, -exponent)).sum((-2, -1), keepdims=True)
    whole = psum(square, axes.p + axes.q)
    taken = _taken(norm, zero, exponent)
    floor = FLOOR * float(jnp.finfo(n.dtype).eps)
    rest = jnp.maximum(whole - taken, floor * whole)
    # NaN is not 0: it must reach the update.
    scale = math.sqrt(left) / jnp.sqrt(jnp.where(rest == 0, 1, rest))
    return jnp.where(rest == 0, 0, jnp.ldexp(scale, -exponent))


def directions_left(n: jax.Array, r: jax.Array, axes: Any) -> int:
    """k = min(l, s) - r, of l and s over all devices."""
    s, rank = r.shape[-2:]
    l = n.shape[-1] * n.shape[-2] // s
    l, s = l * axis_size(axes.p), s * axis_size(axes.q)
    return min(l, s) - rank


def _exponent(norm: jax.Array) -> jax.Array:
    """Of a power of two near N, so that no square overflows; at least -120."""
    return jnp.maximum(jnp.frexp(jnp.max(norm, axis=-1, keepdims=True))[1], -120)


def _taken(norm: jax.Array, zero: jax.Array, exponent: jax.Array) -> jax.Array:
    """|P R^T|^2."""
    square = jnp.square(jnp.ldexp(norm, -exponent)).sum(-1, keepdims=True)
    return jnp.where(zero, 0, square)
