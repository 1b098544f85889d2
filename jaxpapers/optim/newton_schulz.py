r"""Polar factors by odd polynomials, of matrices that stay sharded.

For B = U S V^T the polar factor is U V^T. Each step maps the singular values by
sigma (a + b sigma^2 + c sigma^4), on X scaled to a spectral norm of at most 1:

$$ A = X^\top X, \quad X \leftarrow X (a I + b A + c A^2) $$

All steps are polynomials in the Gram matrix G of the first X on its shorter side, so
X_k = X_0 W_k with a symmetric W_k that commutes with G:

$$ A_k = G W_k^2, \quad W_{k+1} = W_k (a I + b A_k + c A_k^2) $$

Only G crosses the devices that split the longer side, once and not at every step; and
they share its steps where there are several matrices (``collectives.share_sum``). The
devices that split the shorter side exchange their blocks, so that each has whole rows: of
a share of the matrices, a share of the rows of all, or, if that sends less (one or two
nearly square matrices), all of them. G is formed and iterated in float32 with full
precision. Its rounding shows where singular values are far below the largest: the result
is then up to 2e-3 (Frobenius norm, one dominant value, the others 1e-3 of it) from that
of the plain iteration, which is 1e-5 from exact arithmetic.

References: Jordan et al., Muon, 2024; Amsel et al., Polar Express, arXiv 2505.16932.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxpapers.ops.linalg import HIGHEST, stack_product
from jaxpapers.optim.collectives import (
    all_to_all,
    axis_size,
    pmax,
    psum,
    share_sum,
    symmetric,
)
from jaxpapers.optim.power_iteration import ONE_DEVICE, MeshAxes

# Each step's (a, b, c).
COEFFICIENTS = {
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
# Polar Express is tuned for a spectral norm that stays below 1.
_MARGIN = {"jordan": 1.0, "dion": 1.0, "polar_express": 1.02}


def newton_schulz(
    x: jax.Array,
    coefficients: str = "jordan",
    *,
    axes: MeshAxes = ONE_DEVICE,
    eps: float = 1e-7,
    precision: lax.Precision = HIGHEST,
) -> jax.Array:
    """Approximate polar factors of matrices.

    Args:
      x: (n, l, s) with l >= s over all devices; the block of a device inside
        ``jax.shard_map``.
      coefficients: ``jordan`` (singular values end in [0.7, 1.2]), ``dion``,
        ``polar_express`` (closer to 1).
      axes: mesh axes that split l (``p``) and s (``q``).
      eps: added to the Frobenius norm that x is divided by, when its largest entry is
        scaled to 1.
      precision: of the product X W.

    Returns:
      Like ``x``, float32 at least; zero for a zero matrix.

    Example:
      >>> import jax, numpy as np
      >>> g = np.diag(np.float32([3, 0.5]))[None]
      >>> y = jax.jit(newton_schulz, static_argnums=1)(g, "polar_express")
      >>> np.allclose(y, np.eye(2), atol=0.15)
      True
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # A power of two near the largest entry first: squares of 1e20 overflow.
    largest = pmax(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True), axes.p + axes.q)
    x = jnp.ldexp(x, -jnp.maximum(jnp.frexp(largest)[1], -120))
    square = psum(jnp.square(x).sum((-2, -1), keepdims=True), axes.p + axes.q)
    x = x / (_MARGIN[coefficients] * jnp.sqrt(square) + eps)
    rows, summed, own_columns = _whole_rows(x, axes)
    gram = jnp.einsum("nls,nlt->nst", rows, rows, precision=HIGHEST)

    mine, gather = share_sum(gram, summed)
    w = _polynomial(mine, COEFFICIENTS[coefficients])
    if mine.shape != gram.shape:
        # Only triangles are gathered. Rounding makes the two of W differ, by as much as
        # W itself for a matrix of low rank: the mean of both is as good as all of W.
        w = symmetric(jnp.tril(gather((w + jnp.swapaxes(w, -1, -2)) / 2)))
    return own_columns(jnp.einsum("nls,nst->nlt", rows, w, precision=precision))


def choose_exchange(
    n: int, l: int, s: int, devices: int, *, gather: bool = True
) -> str:
    """How devices that split the shorter side get whole rows with the fewest bytes.

    ============ ================================= ==============================
    choice       a device then has                 numbers that it receives
    ============ ================================= ==============================
    ``all``      all rows                          n l s
    ``matrices`` the rows of ceil(n / f) matrices  2 ceil(n / f) l s
    ``rows``     l / f rows of all                 2 n l s / f, and n s^2 for Grams
    ============ ================================= ==============================

    Args:
      n: matrices.
      l: rows of the devices that share them.
      s: columns over all devices.
      devices: f, that split s.
      gather: whether the choice may be ``all``.

    Example:
      >>> choose_exchange(56, 1024, 1024, 64), choose_exchange(1, 4096, 1024, 64)
      ('matrices', 'rows')
    """
    if devices == 1:
        return "all"
    sent = {"matrices": 2 * math.ceil(n / devices) * l * s}
    if gather:
        sent["all"] = n * l * s
    if l % devices == 0:
        sent["rows"] = 2 * n * l * s // devices + n * s * s
    return min(sent, key=lambda choice: sent[choice])


def _polynomial(gram: jax.Array, coefficients) -> jax.Array:
    """W with X W = the image of X under all steps, from G = X^T X.

    A loop: accelerators' compilers take seconds for each batched product.
    """
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    dot = functools.partial(stack_product, "ij,jk->ik")

    def factor(a_k, abc):
        a, b, c = abc
        return a * eye + b * a_k + c * dot(a_k, a_k)

    def one_step(carry, abc):
        w, a_k, step = carry
        a_k = dot(dot(a_k, step), step)  # G W^2, as everything commutes.
        step = factor(a_k, abc)
        return (dot(w, step), a_k, step), None

    step = factor(gram, coefficients[0])
    rest = tuple(jnp.asarray(x, gram.dtype) for x in zip(*coefficients[1:]))
    (w, *_), _ = lax.scan(one_step, (step, gram, step), rest)
    return w


def _whole_rows(
    x: jax.Array, axes: MeshAxes
) -> tuple[jax.Array, tuple[str, ...], Callable[[jax.Array], jax.Array]]:
    """Whole rows, as ``choose_exchange`` says, and how to go on with them.

    Returns:
      The rows, the axes that their Gram matrices are summed over, and the way back to
      every device's own columns of the whole batch.
    """
    n, l, columns = x.shape
    f = axis_size(axes.q)
    choice = choose_exchange(n, l, columns * f, f)
    if f == 1:
        return x, axes.p, lambda y: y
    if choice == "all":

        def own_columns(y):
            start = lax.axis_index(axes.q) * columns
            return lax.dynamic_slice_in_dim(y, start, columns, axis=2)

        return lax.all_gather(x, axes.q, axis=2, tiled=True), axes.p, own_columns
    axis = 0 if choice == "matrices" else 1
    rows, back = all_to_all(x, axes.q, axis, 2)
    return rows, axes.p if axis == 0 else axes.p + axes.q, back
