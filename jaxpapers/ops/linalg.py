"""Linear algebra on stacks of matrices, in the form that each platform compiles well."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Gram matrices lose half the digits by construction: TPU's default (one bfloat16
# pass) makes Cholesky fail at cond(p) = 1e2.
HIGHEST = lax.Precision.HIGHEST
# Columns that ``blocked_inverse_factor`` eliminates at once: the width of a matrix unit.
BLOCK = 128
# Multiplications of one product of a stack, below which a TPU multiplies all at once.
WORTH_A_LOOP = 2**26
# Of one product, above which a TPU makes it in pieces, and of a piece. Its compiler takes
# 1 s, and 1 s more for every 2**30 in six passes.
WORTH_PIECES, PIECE = 2**30, 2**28
# Rows of a piece: with fewer a chip reads the other factor for longer than it multiplies.
LEAST_ROWS = 256


def per_matrix(f: Callable, *xs: Array) -> Any:
    """``f`` on each (m, n) of the leading axes: one after the other on a CPU.

    A batched LAPACK call of jaxlib 0.10 waits for workers of the thread pool that it
    runs on: two at once on two cores wait for ever. Single ones do not, and cost no more.

    Args:
      f: of one matrix of each x, e.g. a Cholesky factorisation; gives a tree of arrays.
      *xs: stacks with the same leading axes.
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


def stack_product(spec: str, x: Array, y: Array, precision: Any = HIGHEST) -> Array:
    """Products of two stacks of matrices, such as ``ls,sr->lr``.

    A TPU multiplies large ones in a loop, very large ones in pieces of their rows: its
    compiler takes 10 s for a batched product of six passes, 1 s for a single one, and as
    much more as that is large.

    Args:
      spec: of one matrix of each stack.
      x: (..., a, b).
      y: (..., c, d), with the same leading axes.
      precision: of the product; it changes nothing on a CPU.
    """
    left, right = spec.split("->")
    first, second = left.split(",")
    sizes = dict(zip(first + second, x.shape[-2:] + y.shape[-2:]))
    batch = x.shape[:-2]

    def batched(x, y):
        stacked = f"...{first},...{second}->...{right}"
        return jnp.einsum(stacked, x, y, precision=precision)

    work, matrices = math.prod(sizes.values()), math.prod(batch)
    rows, pieces = sizes[right[0]], 1
    while WORTH_PIECES < work > pieces * PIECE and rows % (2 * pieces) == 0:
        if rows // (2 * pieces) < LEAST_ROWS:
            break
        pieces *= 2
    if matrices * pieces == 1 or work < WORTH_A_LOOP:
        return batched(x, y)

    def one_by_one(x, y):
        flat = [z.reshape(-1, *z.shape[-2:]) for z in (x, y)]

        def piece(i):
            """Some rows of one product."""
            factors = []
            for z, letters in zip(flat, (first, second)):
                z = lax.dynamic_index_in_dim(z, i // pieces, keepdims=False)
                if right[0] in letters:
                    size, axis = rows // pieces, letters.index(right[0])
                    start = i % pieces * size
                    z = lax.dynamic_slice_in_dim(z, start, size, axis)
                factors.append(z)
            return jnp.einsum(spec, *factors, precision=precision)

        if pieces == 1:
            out = lax.map(lambda z: jnp.einsum(spec, *z, precision=precision), flat)
        else:
            out = lax.map(piece, jnp.arange(matrices * pieces))
        return out.reshape(*batch, rows, sizes[right[1]])

    return lax.platform_dependent(x, y, tpu=one_by_one, default=batched)


def inverse_factor(
    gram: Float[Array, "*batch r r"],
) -> tuple[Float[Array, "*batch r r"], Float[Array, "*batch r r"]]:
    """Cholesky factors L of symmetric matrices, and L^-1; NaN where there is none.

    LAPACK's or cuSOLVER's, which read lower triangles; ``blocked_inverse_factor`` on a
    TPU, whose compiler expands a factorisation into hundreds of blocks.
    """

    def invert(gram):
        lower = lax.linalg.cholesky(gram, symmetrize_input=False)
        eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
        return lower, lax.linalg.triangular_solve(
            lower, eye, left_side=True, lower=True
        )

    return lax.platform_dependent(
        gram,
        tpu=blocked_inverse_factor,
        default=lambda gram: per_matrix(invert, gram),
    )


@jax.jit
def blocked_inverse_factor(
    gram: Float[Array, "*batch r r"],
) -> tuple[Float[Array, "*batch r r"], Float[Array, "*batch r r"]]:
    """``inverse_factor`` as a program whose size does not depend on r.

    Elimination turns the rows [A, 1] into [L^T, L^-1], ``BLOCK`` rows per iteration of a
    loop: one product with the rows above, the elimination of a square block, and one
    product with the inverse of its factor. 4 r^3 FLOPs.

    Example:
      >>> import jax, numpy as np
      >>> gram = np.float32([[4, 2], [2, 5]])
      >>> lower, inverse = jax.jit(blocked_inverse_factor)(gram)
      >>> np.asarray(lower).tolist(), np.asarray(inverse).tolist()
      ([[2.0, 0.0], [1.0, 2.0]], [[0.5, 0.0], [-0.25, 0.5]])
    """
    r, dtype = gram.shape[-1], gram.dtype
    b = min(r, BLOCK)
    blocks = math.ceil(r / b)
    rest = blocks * b - r
    a = gram.reshape(-1, r, r)
    # Padded by an identity.
    a = jnp.pad(a, ((0, 0), (0, rest), (0, rest)))
    a = a + jnp.diag((jnp.arange(r + rest) >= r).astype(dtype))[None]
    eye = jnp.broadcast_to(jnp.eye(r + rest, dtype=dtype), a.shape)
    start = jnp.concatenate([a, eye], axis=-1)
    columns = jnp.arange(2 * (r + rest))[None, None]

    def one_block(j, done):
        first = j * b

        def less_those_above(x):
            start, done = x
            rows = lax.dynamic_slice_in_dim(start, first, b, axis=0)
            upper = lax.dynamic_slice_in_dim(done, first, b, axis=1)
            return rows - jnp.einsum("kb,kc->bc", upper, done, precision=HIGHEST)

        rows = lax.map(less_those_above, (start, done))
        upper, inverse = _eliminate(lax.dynamic_slice_in_dim(rows, first, b, axis=2))
        rows = lax.map(lambda x: jnp.matmul(*x, precision=HIGHEST), (inverse, rows))
        # To the left are rounding errors of zero.
        rows = jnp.where(columns < first, 0, rows)
        rows = lax.dynamic_update_slice_in_dim(rows, upper, first, axis=2)
        return lax.dynamic_update_slice_in_dim(done, rows, first, axis=1)

    # Zeros that vary over the mesh axes that ``gram`` does.
    done = jnp.where(start > jnp.inf, start, 0)
    done = lax.fori_loop(0, blocks, one_block, done)
    lower = jnp.swapaxes(done[:, :r, :r], -1, -2)
    inverse = done[:, :r, r + rest : 2 * r + rest]
    failed = ~jnp.isfinite(inverse).all((-2, -1), keepdims=True)
    lower, inverse = (jnp.where(failed, jnp.nan, x) for x in (lower, inverse))
    return lower.reshape(gram.shape), inverse.reshape(gram.shape)


def _eliminate(block: Array) -> tuple[Array, Array]:
    """L^T and L^-1 of (n, b, b), row after row; NaN where a pivot is not positive."""
    b = block.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(b, dtype=block.dtype), block.shape)
    index = jnp.arange(b)[None, :, None]

    def one_row(j, x):
        row = lax.dynamic_slice_in_dim(x, j, 1, axis=1)
        row = row / jnp.sqrt(lax.dynamic_slice_in_dim(row, j, 1, axis=2))
        # What is left is symmetric: the row is the column too.
        column = jnp.swapaxes(row[..., :b], -1, -2)
        x = x - jnp.where(index > j, column, 0) * row
        return jnp.where(index == j, row, x)

    x = lax.fori_loop(0, b, one_row, jnp.concatenate([block, eye], axis=-1))
    return jnp.triu(x[..., :b]), jnp.tril(x[..., b:])
