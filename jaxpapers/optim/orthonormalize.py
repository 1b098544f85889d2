"""Orthonormal bases of tall matrices whose rows may be spread over mesh axes.

Every method returns a matrix with the column space of ``p``. They differ in
cost, in communication and in the condition numbers that they bear; ``l`` is the number
of rows over all devices, ``r`` the number of columns, ``u`` the unit round-off.

============ ============================================== =====================
method       passes                                         sent per matrix
============ ============================================== =====================
``scqr``     Cholesky QR until the Gram matrix is the       a Gram each
             identity: 2 passes for well-conditioned p,
             shifted ones where Cholesky is not safe
``cqr2``     2 Cholesky QR (accurate for cond(p) < 1e3)     2 Grams
``rcqr``     sketch, Householder QR of it, 2 Cholesky QR    (k, r) + 2 Grams
``qr``       Householder QR of each shard, then of the      shards' R factors
             stacked R factors (tall-skinny QR)
============ ============================================== =====================

``scqr`` decides by the Gram matrices, which all devices that share a matrix see, so it
needs no choice of the user: a language model's momentum takes its extra passes in the
first ten steps or so and two afterwards. A pass is safe if no column is within 3 % of
the span of the others; where the first is not, ``p`` starts anew with jitter. Columns
are then orthonormal to 2e-6 (4e-6 for long columns of equal numbers, whose sums round one
way), and span ``p`` to 4e-7 of its norm (5e-6 where its condition is near 1 / u).

Of a Gram matrix, which is symmetric, r (r + 1) / 2 entries are sent. Of a batch large
enough to fill a mesh axis (``share_axes``) each device receives and factorises a share,
and the triangular inverses are gathered: the bytes of a plain sum, a fraction of the
work.

``rcqr`` is not orthonormal when an exactly singular ``p`` is square, ``cqr2`` when it is
ill-conditioned; both then stay finite, with columns no longer than 1.

All of them first divide by a power of two near max|p| (one scalar maximum), so that
neither tiny nor huge momenta leave float32's range, and return zeros for a zero
matrix. The three Cholesky methods add a jitter of relative size ``u`` (``scqr`` only
where it is needed): it makes an exactly singular ``p`` (dead units, small batches)
numerically full rank. The triangular factor has a positive diagonal in every method, so
signs are deterministic.

Reference: Ahn et al., Dion, arXiv 2504.05295 (``cqr``, ``rcqr``); Fukaya et al.,
Shifted Cholesky QR, SIAM J. Sci. Comput. 42 (2020) for the shift.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpapers import scopes
from jaxpapers.ops.linalg import (
    HIGHEST,
    inverse_factor,
    per_matrix,
    stack_product,
)
from jaxpapers.optim.collectives import AxisNames, pmax, psum, share_sum

METHODS = ("scqr", "cqr2", "rcqr", "qr")
# Gram passes of a well-conditioned matrix, and the most of any matrix. The first pass of
# scqr may be done twice.
GRAM_PASSES = {"scqr": 2, "cqr2": 2, "rcqr": 2, "qr": 0}
SCQR_MAX_PASSES = 12
# Name scope, in compiled programs, of operations for ill-conditioned batches only.
RESCUE = "ill_conditioned"
# Least squared distance of a unit column from the span of all others (scqr), or of those
# before it (the last pass of cqr2 and rcqr), at which a Cholesky factor is trusted.
_SAFE, _LAST = 1e-3, 0.1


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
      >>> import jax, numpy as np
      >>> q = jax.jit(orthonormalize)(np.float32([[3, 1], [4, 0], [0, 2]]))
      >>> np.allclose(np.transpose(q) @ np.asarray(q), np.eye(2), atol=1e-6)
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
    # A zero matrix must not cost its batch more passes: it counts as an orthonormal one.
    unit = (rows[:, None] == jnp.arange(p.shape[-1])[None]).astype(p.dtype)
    unit = jnp.broadcast_to(unit, p.shape)
    p = jnp.where(zero, unit, jnp.ldexp(p, -exponent))
    if method == "qr":
        basis = _tall_skinny_qr(p, axis_name)
    elif method == "scqr":
        basis = _shifted_cholesky_qr(p, axis_name, rows)[0]
    else:
        p = _jitter(p, axis_name, rows)
        if method == "rcqr":
            # The reference stops after one pass and is not orthonormal when p has fewer
            # than r non-zero rows.
            p = _sketch_qr(p, axis_name, rows)
        p = _cholesky_qr(p, axis_name, 0.0)
        basis = _cholesky_qr(p, axis_name, _LAST)
    return jnp.where(zero, 0, basis), zero


def _shifted_cholesky_qr(
    p: Array, axis_name: AxisNames, rows: Array
) -> tuple[Array, Array]:
    """Cholesky QR passes over a batch until every matrix is orthonormal; their number.

    A matrix that is done waits unchanged for the others of its batch. After the first
    pass only is an unsafe matrix put back, with jitter. All passes are one loop: a
    compiler works on what is in a program, not on how often that runs.
    """
    shape = p.shape
    p = p.reshape(-1, *shape[-2:])
    # Adds nothing: under vmap the choices below select between both results, which have
    # to vary over the same mesh axes, and the rows alone may vary over fewer than p.
    rows = rows + (p[0, :, 0] > jnp.inf).astype(rows.dtype)

    # None is done yet; a constant would not vary over the mesh axes that p does.
    no = p[:, :1, :1] > jnp.inf

    def unfinished(carry):
        count, _, done, _ = carry
        return (count < SCQR_MAX_PASSES) & ~jnp.all(done)

    def one_pass(carry):
        count, p, done, jittered = carry
        gram, gather = share_sum(_gram(p), axis_name)
        attempts = jnp.where(count == 0, 1, 3)
        # As ``rows`` above: a share of the batch may vary over fewer axes than p.
        gram = gram + (p[0, 0, 0] > jnp.inf).astype(gram.dtype)
        lower, inverse, facts = _factor(gram, _SAFE, attempts)
        inverse = gather(inverse)
        unsafe, last = _gather_facts(facts, gather, p.dtype)
        unsafe = unsafe & (count == 0)

        @jax.named_scope(RESCUE)
        def gather_lower():
            return gather(lower)

        @jax.named_scope(RESCUE)
        def put_back():
            return jnp.where(unsafe, _jitter(p, axis_name, rows), basis)

        with jax.named_scope(scopes.ONCE):
            # Nothing reads it where nothing is refined.
            lower = lax.cond(jnp.any(jittered), gather_lower, lambda: inverse)
        basis = _solve(p, lower, inverse, jittered)
        with jax.named_scope(scopes.ONCE):
            better = lax.cond(jnp.any(unsafe), put_back, lambda: basis)
        return count + 1, jnp.where(done, p, better), done | last, unsafe | no

    with jax.named_scope(scopes.usual_trips(GRAM_PASSES["scqr"])):
        count, p, *_ = lax.while_loop(unfinished, one_pass, (jnp.int32(0), p, no, no))
    return p.reshape(shape), count


def _gather_facts(facts: tuple[Array, ...], gather: Callable, dtype) -> list[Array]:
    """(n, 1, 1) of whether the factor was not safe, and whether this pass was the last.

    One number per matrix is gathered. NaNs never become safe, and must not cost the
    others their passes: they are done.
    """
    safe, near, finite = facts
    code = jnp.where(finite, jnp.where(safe, jnp.where(near, 2, 1), 0), 2)
    code = gather(code.astype(dtype)[:, None])[:, None]
    return [code == 0, code == 2]


def _solve(p: Array, lower: Array, inverse: Array, refined: Array) -> Array:
    """X with X L^T = p: p L^-T, and where ``refined`` a step of iterative refinement.

    A shifted pass lifts the smallest singular value of a jittered p, u, by
    1 / sqrt(shift). No later pass recovers the part of the span that the explicit
    inverse loses there.

    Args:
      p: (n, l, r).
      lower: L; not read where none is ``refined``.
      inverse: L^-1.
      refined: (n, 1, 1).
    """

    def three_products(p, lower, inverse, refined):
        x = _times_upper(p, inverse)

        @jax.named_scope(RESCUE)
        def refine():
            rest = p - _times_upper(x, lower)
            return jnp.where(refined, x + _times_upper(rest, inverse), x)

        with jax.named_scope(scopes.ONCE):
            return lax.cond(jnp.any(refined), refine, lambda: x)

    # On a CPU the loop's copies cost time, and compiling one product saves little.
    return lax.platform_dependent(
        p, lower, inverse, refined, tpu=_solve_in_a_loop, default=three_products
    )


def _solve_in_a_loop(p: Array, lower: Array, inverse: Array, refined: Array) -> Array:
    """``_solve`` as a program of one product: a TPU's compiler works on less.

    X <- p L^-T, D <- p - X L^T, X <- X + D L^-T; only the first where nothing is refined.
    """

    def one_product(i, carry):
        x, rest = carry
        second = i == 1
        factor = jnp.where(second, lower, inverse)
        y = _times_upper(jnp.where(second, x, rest), factor)
        rest = jnp.where(second, p - y, rest)
        return jnp.where(i == 0, y, jnp.where(refined & (i == 2), x + y, x)), rest

    return lax.fori_loop(0, jnp.where(jnp.any(refined), 3, 1), one_product, (p, p))[0]


def _cholesky_qr(p: Array, axis_name: AxisNames, least: float) -> Array:
    """p L^-T with L L^T = p^T p, shifted where that is not safe."""
    flat = p.reshape(-1, *p.shape[-2:])
    gram, gather = share_sum(_gram(flat), axis_name)
    return _times_upper(flat, gather(_factor(gram, least)[1])).reshape(p.shape)


def _gram(p: Array) -> Array:
    return stack_product("lr,ls->rs", p, p)


def _times_upper(p: Array, lower: Array) -> Array:
    """p L^T, given L; p L^-T, given L^-1.

    The small inverse, then one product with p: products run at full speed everywhere,
    triangular solves with many right-hand sides nowhere. The next pass repairs the
    orthonormality that the explicit inverse of an ill-conditioned L loses.
    """
    return stack_product("lr,sr->ls", p, jnp.tril(lower))


def _factor(
    gram: Array, least: float, attempts: int | Array = 3
) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """L, L^-1, and (n,) of whether it is safe, near the identity, and finite.

    Textbook shifts, 11 (l r + r (r + 1)) u |p|^2, swamp the small directions. Unsafe
    matrices are shifted by four times the smaller of u tr(A) and 4 sqrt(r) u max(A_jj),
    which makes up for the rounding of a Gram matrix in nearly all cases; where that
    does not, sixteen times as much does.

    The attempts are a loop, so that a program holds one factorisation.

    Args:
      gram: (n, r, r).
      least: squared distance of a column from the span of others, relative to its
        square, below which the factor is not safe.
      attempts: without a shift, with one, with a larger one.
    """
    r, unit = gram.shape[-1], jnp.finfo(gram.dtype).eps
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    trace = diagonal.sum(-1)
    finite = jnp.isfinite(trace)
    size = jnp.minimum(trace, 4 * math.sqrt(r) * diagonal.max(-1))
    eye = jnp.eye(r, dtype=gram.dtype)[None]

    def unfinished(carry):
        attempt, fine, *_ = carry
        return (attempt < attempts) & ~jnp.all(fine)

    def one_attempt(carry):
        attempt, fine, safe, *factors = carry
        times = jnp.asarray([0.0, 4.0, 64.0], gram.dtype)[attempt]
        shift = (times * unit) * size[:, None, None] * eye
        inverse = inverse_factor(gram + shift)
        safe = jnp.where(attempt == 0, _is_safe(*inverse, diagonal, least), safe)
        factors = [jnp.where(fine[:, None, None], *xs) for xs in zip(factors, inverse)]
        usable = jnp.isfinite(factors[1]).all((-2, -1))
        return attempt + 1, safe | ~finite | ((attempt > 0) & usable), safe, *factors

    # None is fine yet; a constant would not vary over the mesh axes that gram does.
    no = trace > jnp.inf
    start = (jnp.int32(0), no, no, gram, gram)
    _, _, safe, lower, inverse = lax.while_loop(unfinished, one_attempt, start)
    inverse = jnp.where(finite[:, None, None], inverse, jnp.nan)
    off = jnp.square(gram - eye)
    return lower, inverse, (safe, off.sum((-2, -1)) < 0.25, finite)


def _is_safe(lower: Array, inverse: Array, diagonal: Array, least: float) -> Array:
    """(n,) of whether all columns keep their distance, see ``_factor``."""
    if least == _SAFE:
        # The diagonal of G^-1: pivots alone let triangular p's of condition 1e9 pass.
        away = 1 / jnp.square(jnp.tril(inverse)).sum(-2)
    else:
        away = jnp.square(jnp.diagonal(lower, axis1=-2, axis2=-1))
    # Where Cholesky fails, all is NaN. It also succeeds on mere rounding error, and
    # columns longer than 1 come out: a last pass must not let them.
    return jnp.all(away > least * diagonal, axis=-1)


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

    return per_matrix(solve, p, upper)


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
    basis, upper = per_matrix(lambda p: jnp.linalg.qr(p, mode="reduced"), p)
    diagonal = jnp.diagonal(upper, axis1=-2, axis2=-1)
    sign = jnp.where(diagonal < 0, -1, 1).astype(p.dtype)
    return basis * sign[..., None, :], upper * sign[..., :, None]


def _jitter(p: Array, axis_name: AxisNames, rows: Array) -> Array:
    """Adds noise of one unit round-off relative to the root mean square of ``p``."""
    square = psum(jnp.sum(jnp.square(p), axis=(-2, -1), keepdims=True), axis_name)
    count = psum(p.shape[-2] * p.shape[-1], axis_name)
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
