"""Orthonormal bases of tall matrices whose rows may be spread over mesh axes.

Every method returns a matrix with the column space of ``p``. They differ in what
they cost, what they survive and what they send; ``l`` is the number of rows over
all devices, ``r`` the number of columns, ``u`` the unit round-off.

============ ============================================== =====================
method       passes                                         sent per matrix
============ ============================================== =====================
``scqr``     3 shifted + 2 plain Cholesky QR, jittered      5 Grams
``cqr2``     2 Cholesky QR (accurate for cond(p) < 1e3)     2 Grams
``rcqr``     sketch, Householder QR of it, 2 Cholesky QR    (k, r) + 2 Grams
``qr``       Householder QR of each shard, then of the      shards' R factors
             stacked R factors (tall-skinny QR)
============ ============================================== =====================

Of a Gram matrix, which is symmetric, r (r + 1) / 2 entries are sent. Of a batch large
enough to fill a mesh axis (``share_axes``) each device receives and factorises a share,
and the triangular inverses are gathered: the bytes of a plain sum, a fraction of the
work.

``rcqr`` is not orthonormal when an exactly singular ``p`` is square, ``cqr2`` when it is
ill-conditioned; both then stay finite, with columns no longer than 1.

All of them first divide by a power of two near max|p| (one scalar maximum), so that
neither tiny nor huge momenta leave float32's range, and return zeros for a zero
matrix. The three Cholesky methods add a jitter of relative size ``u``: it makes an
exactly singular ``p`` (dead units, small batches) numerically full rank. The
triangular factor has a positive diagonal in every method, so signs are deterministic.

Reference: Ahn et al., Dion, arXiv 2504.05295 (``cqr``, ``rcqr``); Fukaya et al.,
Shifted Cholesky QR, SIAM J. Sci. Comput. 42 (2020) for the shift.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpapers.optim.collectives import AxisNames, map_sum, pmax, psum

METHODS = ("scqr", "cqr2", "rcqr", "qr")
GRAM_PASSES = {"scqr": 5, "cqr2": 2, "rcqr": 2, "qr": 0}
# Gram matrices lose half the digits by construction: TPU's default (one bfloat16
# pass) makes Cholesky fail at cond(p) = 1e2.
HIGHEST = lax.Precision.HIGHEST


def orthonormalize(
    p: Float[Array, "*batch l r"],
    method: str = "scqr",
    *,
    axis_name: AxisNames = (),
    rows: Int[Array, " l"] | None = None,
) -> Float[Array, "*batch l r"]:
    """Orthonormal basis of the columns of ``p``, with positive triangular factor.

    Inside ``jax.shard_map`` each device passes its own rows and the names of the mesh
    axes that split them; the result does not depend on that split beyond rounding.

    Args:
      p: matrix with at least as many rows (over all devices) as columns. Computed in
        float64 if ``p`` is float64, otherwise in float32.
      method: one of ``scqr``, ``cqr2``, ``rcqr``, ``qr``; see the module's table.
      axis_name: mesh axis or axes over which the rows are split; none by default.
      rows: global index of each local row (needed only when the rows are split).

    Returns:
      A matrix with orthonormal columns; zeros where ``p`` is all zero; NaN where ``p``
      has a NaN.

    Raises:
      ValueError: unknown method, or more columns than rows on one device.

    Example:
      >>> import jax.numpy as jnp
      >>> q = orthonormalize(jnp.array([[3.0, 1.0], [4.0, 0.0], [0.0, 2.0]]))
      >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-6))
      True
    """
    if method not in METHODS:
        raise ValueError(
            f"unknown orthogonalize method: got {method!r}, expected one of {METHODS}"
        )
    if not axis_name and p.shape[-2] < p.shape[-1]:
        raise ValueError(
            f"orthonormalize needs at least as many rows as columns, got {p.shape}; "
            "pass the matrix with its longer side first"
        )
    return _orthonormalize(p, method, axis_name, rows)[0]


def _orthonormalize(
    p: Array, method: str, axis_name: AxisNames, rows: Array | None
) -> tuple[Array, Bool[Array, "*batch 1 1"]]:
    """``orthonormalize`` without checks; also tells which matrices are all zero."""
    p = p.astype(jnp.promote_types(p.dtype, jnp.float32))
    if rows is None:
        rows = jnp.arange(p.shape[-2])
    largest = pmax(jnp.max(jnp.abs(p), axis=(-2, -1), keepdims=True), axis_name)
    zero = largest == 0
    # A power of two, so that scaling does not round.
    exponent = jnp.maximum(jnp.frexp(largest)[1], -120)
    p = jnp.ldexp(p, -exponent)
    if method == "qr":
        basis = _tall_skinny_qr(p, axis_name)
    else:
        p = _jitter(p, axis_name, rows)
        if method == "scqr":
            # Each shifted pass lifts the smallest singular value, from the jitter's u, by
            # 1/sqrt(shift). Two such passes are enough at r = 64; the early gradients of
            # a transformer broke them at r = l = 96.
            p = _cholesky_qr(p, axis_name, "always", refine=True)
            for shift in ("always", "always", "on_failure"):
                p = _cholesky_qr(p, axis_name, shift)
            basis = _cholesky_qr(p, axis_name, "if_skewed")
        elif method == "cqr2":
            p = _cholesky_qr(p, axis_name, "on_failure")
            basis = _cholesky_qr(p, axis_name, "if_skewed")
        else:
            # The reference stops after one pass and is not orthonormal when p has fewer
            # than r non-zero rows.
            p = _sketch_qr(p, axis_name, rows)
            p = _cholesky_qr(p, axis_name, "on_failure")
            basis = _cholesky_qr(p, axis_name, "if_skewed")
    return jnp.where(zero, 0, basis), zero


def _cholesky_qr(
    p: Array, axis_name: AxisNames, shift: str, *, refine: bool = False
) -> Array:
    """p L^-T with L L^T = p^T p + shift: one Gram matrix of communication."""
    gram = jnp.einsum("...lr,...ls->...rs", p, p, precision=HIGHEST)
    if axis_name:
        lower, inverse = _factor_of_sum(gram, axis_name, shift, refine)
    else:
        lower, inverse = _factor(gram, shift)
    basis = jnp.matmul(p, inverse, precision=HIGHEST)
    if refine:
        lost = p - jnp.matmul(basis, jnp.swapaxes(lower, -1, -2), precision=HIGHEST)
        basis += jnp.matmul(lost, inverse, precision=HIGHEST)
    return basis


def _factor_of_sum(
    gram: Array, axis_name: AxisNames, shift: str, with_lower: bool
) -> tuple[Array, Array]:
    """``_factor`` of the sum over devices; L is anything unless asked for."""

    def factor(gram):
        lower, inverse = _factor(gram, shift)
        upper = jnp.swapaxes(inverse, -1, -2)
        return (upper, lower) if with_lower else (upper,)

    flat = gram.reshape(-1, *gram.shape[-2:])
    factors = map_sum(factor, flat, axis_name)
    upper, lower = (factors[i].reshape(gram.shape) for i in (0, -1))
    return lower, jnp.swapaxes(upper, -1, -2)


def _factor(gram: Array, shift: str) -> tuple[Array, Array]:
    """L and L^-T with L L^T = gram + shift."""
    # Textbook shifts, 11 (l r + r (r + 1)) u |p|^2, swamp the small directions; u tr(A)
    # is what rounding of the Gram matrix may have cost at worst, 4 sqrt(r) u max(A_jj)
    # at any size seen here.
    r, unit = gram.shape[-1], jnp.finfo(gram.dtype).eps
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    size = jnp.minimum(diagonal.sum(-1), 4 * math.sqrt(r) * diagonal.max(-1))
    eye = jnp.broadcast_to(jnp.eye(r, dtype=gram.dtype), gram.shape)
    shifted = gram + unit * size[..., None, None] * eye
    if shift == "always":
        return _inverse_factor(shifted)
    lower, inverse = _inverse_factor(gram)
    pivots = jnp.diagonal(inverse, axis1=-2, axis2=-1)[..., None]
    spread = jnp.min(pivots, -2) / jnp.max(pivots, -2)
    # Where Cholesky fails, pivots are NaN. It also succeeds on mere rounding error, and
    # columns longer than 1 come out: a last pass must not let them.
    fine = spread > (0.1 if shift == "if_skewed" else 0)
    return lower, jnp.where(fine[..., None], inverse, _inverse_factor(shifted)[1])


def _inverse_factor(gram: Array) -> tuple[Array, Array]:
    """Cholesky factor L and L^-T.

    The small inverse, then one product with p: products run at full speed everywhere,
    triangular solves with many right-hand sides nowhere. What the explicit inverse of
    an ill-conditioned L loses of the orthonormality the next pass repairs; what it
    loses of the span only ``refine`` does.
    """

    def invert(gram):
        lower = lax.linalg.cholesky(gram, symmetrize_input=False)
        eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
        inverse = lax.linalg.triangular_solve(
            lower, eye, left_side=False, lower=True, transpose_a=True
        )
        return lower, inverse

    return _per_matrix(invert, gram)


def sketch_rows(r: int) -> int:
    """Rows of ``rcqr``'s sketch: the reference's oversampling by 1.25, in 128s."""
    return 128 * math.ceil(1.25 * r / 128)


def _sketch_qr(p: Array, axis_name: AxisNames, rows: Array) -> Array:
    """p R^-1 with R from a Householder QR of a random (k, l) sketch of p.

    Departs from the reference code in the sketch's entries: uniform with variance 1/k
    and a function of (row, column) alone instead of a Gaussian stream, so that the
    sketch is the same on every mesh. The column space does not depend on it.
    """
    k = sketch_rows(p.shape[-1])
    sketch = _noise(rows, k, p.dtype, stream=1) / math.sqrt(k)
    small = psum(jnp.einsum("lk,...lr->...kr", sketch, p, precision=HIGHEST), axis_name)
    upper = _positive_qr(small)[1]

    def solve(p, upper):
        return lax.linalg.triangular_solve(upper, p, left_side=False, lower=False)

    return _per_matrix(solve, p, upper)


def _tall_skinny_qr(p: Array, axis_name: AxisNames) -> Array:
    """Householder QR; over several devices, QR of the stacked R factors.

    Departs from the reference code, which refuses a sharded p here.
    """
    basis, upper = _positive_qr(p)
    if not axis_name:
        return basis
    k = upper.shape[-2]
    stacked = lax.all_gather(upper, axis_name, axis=upper.ndim - 2, tiled=True)
    outer = _positive_qr(stacked)[0]
    start = lax.axis_index(axis_name) * k
    mine = lax.dynamic_slice_in_dim(outer, start, k, axis=outer.ndim - 2)
    return jnp.matmul(basis, mine, precision=HIGHEST)


def _positive_qr(p: Array) -> tuple[Array, Array]:
    """Reduced Householder QR with a non-negative diagonal of the upper factor."""
    basis, upper = _per_matrix(lambda p: jnp.linalg.qr(p, mode="reduced"), p)
    diagonal = jnp.diagonal(upper, axis1=-2, axis2=-1)
    sign = jnp.where(diagonal < 0, -1, 1).astype(p.dtype)
    return basis * sign[..., None, :], upper * sign[..., :, None]


def _per_matrix(f: Callable, *xs: Array) -> Any:
    """``f`` on each (m, n) of the leading axes: one after the other on a CPU.

    A batched LAPACK call of jaxlib 0.10 waits for workers of the thread pool that it
    runs on: two at once on two cores wait for ever. Single ones do not, and cost no more.
    """
    batch = xs[0].shape[:-2]
    if math.prod(batch) == 1:
        out = f(*(x.reshape(x.shape[-2:]) for x in xs))
        return jax.tree.map(lambda y: y.reshape(*batch, *y.shape), out)
    flat = [x.reshape(-1, *x.shape[-2:]) for x in xs]
    out = lax.platform_dependent(
        *flat, cpu=lambda *x: lax.map(lambda x: f(*x), x), default=jax.vmap(f)
    )
    return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[1:]), out)


def _jitter(p: Array, axis_name: AxisNames, rows: Array) -> Array:
    """Adds noise of one unit round-off relative to the root mean square of ``p``."""
    count = psum(p.shape[-2] * p.shape[-1], axis_name)
    square = psum(jnp.sum(jnp.square(p), axis=(-2, -1), keepdims=True), axis_name)
    size = jnp.finfo(p.dtype).eps * jnp.sqrt(square / count)
    noise = _noise(rows, p.shape[-1], p.dtype, stream=0)
    return p + size * jnp.broadcast_to(noise, p.shape)


def _noise(rows: Array, columns: int, dtype, *, stream: int) -> Array:
    """Uniform noise of variance 1 that depends on (global row, column) alone.

    A 32-bit integer hash, not ``jax.random``: a shard must produce its own rows of one
    global matrix without generating the others.
    """
    column = jnp.arange(columns, dtype=jnp.uint32) + jnp.uint32(stream << 24)
    x = rows.astype(jnp.uint32)[:, None] * jnp.uint32(0x9E3779B1)
    x = x ^ (column * jnp.uint32(0x85EBCA77))[None, :]
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    x = (x ^ (x >> 16)).astype(jnp.int32)
    return x.astype(dtype) * (math.sqrt(3.0) / 2**31)
