r"""What a low rank leaves of a matrix, as a part of its update.

With P orthonormal and R = N^T P, the residual D = N - P R^T is orthogonal to P's columns.
An orthonormal (l, s) matrix has the squared Frobenius norm min(l, s), and P Q^T with unit
columns of Q has r of it; the residual gets the rest, k = min(l, s) - r, so that with
weight 1 the whole has the root mean square of Muon's update. k counts the directions that
are left: rectangular shapes, P on either side and ranks near min(l, s) need no further
factor, and at full rank nothing is left:

    w sqrt(k) D / (|D|_F + sqrt(k) eps)

with Dion's absolute eps: a matrix whose gradients have all but vanished fades as a whole.
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
from jax import lax

from jaxpapers.optim.collectives import axis_size, psum

# Least |D|^2 / |N|^2, in unit round-offs. Below it a difference of squares is rounding
# error, and P's span of an ill-conditioned N Q is known no better. What is smaller counts
# as that much: a residual that is rounding error stays one in the update, which is
# continuous.
FLOOR = 1024
# The same for |D| / |N|, in round-offs of products that are made in fewer passes.
PASSES = 16
UNITS = {lax.Precision.DEFAULT: 2.0**-8, lax.Precision.HIGH: 2.0**-16}
# Exponent of N below which its smaller entries are no normal numbers of float32: what is
# left of it is noise, and moves nothing.
LEAST = -104


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
    *,
    eps: Any,
    precision: lax.Precision,
) -> jax.Array:
    """P Q^T + w sqrt(k) D / (|D|_F + sqrt(k) eps), stored as N is.

    Args:
      weight: w.
      dot: (P, X) -> P X^T, stored as N is.
      n: N, (batch, l, s) or (batch, s, l), as all that follow this device's block.
      p: P, (batch, l, rank).
      r: R, (batch, s, rank).
      q: Q, like R.
      norm: |R_j| of the whole R, (batch, 1, rank).
      zero: (batch, 1, 1), where N Q is all zero: P is 0 and R is not N^T P. There the
        update is 0.
      axes: ``MeshAxes`` that split l and s.
      eps: in N's units.
      precision: of ``dot``.
    """
    # By a power of two near N, so that no square overflows and no scale does.
    exponent = jnp.maximum(jnp.frexp(jnp.max(norm, axis=-1, keepdims=True))[1], -120)
    n, r, norm = (jnp.ldexp(x, -exponent) for x in (n, r, norm))
    c = weight * residual_scale(n, r, norm, jnp.ldexp(eps, -exponent), precision, axes)
    c = jnp.where(zero | (exponent < LEAST), 0, c)
    # P (Q - c R)^T + c N: one product for both parts.
    return dot(p, q - c * r) + c * n


def residual_scale(
    n: jax.Array,
    r: jax.Array,
    norm: jax.Array,
    eps: jax.Array,
    precision: lax.Precision,
    axes: Any,
) -> jax.Array:
    """sqrt(k) / (|D|_F + sqrt(k) eps) of each matrix, (batch, 1, 1); 0 for a zero N.

    Args:
      n: see ``with_residual``, as for the rest; scaled.
      r: see there.
      norm: see there.
      eps: see there; scaled.
      precision: see there.
      axes: see there.
    """
    left = directions_left(n, r, axes)
    if left == 0:
        return jnp.zeros_like(norm[..., :1])
    whole = psum(jnp.square(n).sum((-2, -1), keepdims=True), axes.p + axes.q)
    taken = jnp.square(norm).sum(-1, keepdims=True)
    floor = FLOOR * float(jnp.finfo(n.dtype).eps)
    floor = max(floor, (PASSES * UNITS.get(precision, 0.0)) ** 2)
    rest = jnp.sqrt(jnp.maximum(whole - taken, floor * whole))
    size = rest + math.sqrt(left) * eps
    # NaN is not 0: it must reach the update.
    return math.sqrt(left) / jnp.where(size == 0, jnp.inf, size)


def directions_left(n: jax.Array, r: jax.Array, axes: Any) -> int:
    """k = min(l, s) - r, of l and s over all devices."""
    s, rank = r.shape[-2:]
    l = n.shape[-1] * n.shape[-2] // s
    l, s = l * axis_size(axes.p), s * axis_size(axes.q)
    return min(l, s) - rank
