"""Back ends of the nuclear norm: singular values and the polar factor of a matrix.

See ``penalty`` for what each is good for. Matrices are scaled to at most 1 before, so
that their squares are in range; finite ones never give NaN.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

# Ratio of singular values below which the squared matrix has lost too much of the smaller
# ones; in float32 it is larger, for a gradient to 1e-5.
WELL_CONDITIONED = 1e-2
# Relative growth of a residual that is more than rounding.
GROWTH = 1e-4
# Products of at least so many rows are computed in blocks.
LARGE, BLOCKS = 256, 4

dot = functools.partial(jnp.matmul, precision="highest")


class Factor(NamedTuple):
    """Nuclear norm, largest singular value and polar factor of a matrix."""

    nuclear: Any
    largest: Any
    polar: Any


def factor(
    features: jax.Array, method: str, tau: float, steps: int, gather: Callable
) -> Factor:
    """Nuclear norm, largest singular value and polar factor of a matrix.

    Args:
      features: (B, D) float32 or float64.
      method, tau, steps: see ``penalty.Norm``.
      gather: of the scaled features, on a mesh.
    """
    largest = lax.stop_gradient(jnp.abs(features).max())
    good = jnp.isfinite(largest)
    tiny = largest < jnp.finfo(features.dtype).tiny
    size = jnp.where(good & ~tiny, largest, 1)
    # NaN would send LAPACK into long searches.
    scaled = gather(jnp.where(good, features * (1 / size), 0))
    wide = scaled.shape[0] <= scaled.shape[1]
    backends: dict[str, Callable] = {
        "svd": _svd, "gram": _gram, "newton_schulz": _newton_schulz,
    }  # fmt: skip
    # A factor of small matrices, where it costs less than on the features.
    one = jnp.where(good, 1, jnp.nan).astype(features.dtype)
    nuclear, largest, polar = backends[method](scaled, tau, steps, wide, one)
    return Factor(nuclear * size * one, largest * size * one, polar)


def _svd(a, tau, steps, wide, one):
    del steps, wide
    tau = tau or min(a.shape) * float(jnp.finfo(a.dtype).eps)
    nuclear, largest, polar = _decomposed(a, tau)
    return nuclear, largest, polar * one


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _decomposed(a, tau):
    nuclear, largest, polar, _ = _decompose(a, tau)
    return nuclear, largest, polar


def _decompose(a, tau):
    u, s, vt = thin_svd(a)
    kept = s > tau * s[0]
    u, vt = u * kept[None], vt * kept[:, None]
    return jnp.where(kept, s, 0).sum(), s[0], dot(u, vt), (u, s, vt, kept)


@_decomposed.defjvp
def _decomposed_jvp(tau, primals, tangents):
    """Of the polar factor too, which needs sums of singular values, no differences."""
    (a,), (change,) = primals, tangents
    nuclear, largest, polar, (u, s, vt, kept) = _decompose(a, tau)
    inner = dot(dot(u.T, change), vt.T)
    sums = jnp.where(kept[None] & kept[:, None], s[None] + s[:, None], 1)
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    left = dot(change - dot(u, dot(u.T, change)), vt.T * inverse[None])
    right = dot((inverse[:, None] * u.T), change - dot(dot(change, vt.T), vt))
    turned = dot(u, (inner - inner.T) / sums) + left
    turned = dot(turned, vt) + dot(u, right)
    tangents = ((polar * change).sum(), jnp.zeros_like(largest), turned)
    return (nuclear, largest, polar), tangents


def _gram(a, tau, steps, wide, one):
    del steps
    values, vectors = eigh(products_of(a, wide))
    s = jnp.sqrt(jnp.maximum(values, 0))
    kept = s > (tau or 3 * _root_eps(a.dtype)) * s[-1]
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    root = products_of(vectors * jnp.sqrt(inverse * one)[None], True)
    return jnp.where(kept, s, 0).sum(), s[-1], applied(root, a, wide)


def _newton_schulz(a, tau, steps, wide, one):
    products = products_of(a, wide)
    largest = jnp.sqrt(_spectral_norm(products))
    # Power iterations come from below.
    bound = jnp.maximum(1.02 * largest, jnp.finfo(a.dtype).tiny)
    root, good = _coupled(products / bound**2, steps)

    def squared(a):
        polar = applied(root, a, wide) / bound
        return (polar * a).sum(), polar

    def direct(a):
        ratio = tau or 1e3 * float(jnp.finfo(a.dtype).eps)
        polar = _direct(a / bound, min(steps, _warmup(ratio) + 5), wide)
        return (polar * a).sum(), polar

    nuclear, polar = lax.cond(good, squared, direct, a)
    return nuclear, largest, polar * one


def _coupled(g, steps):
    """Inverse square root of a matrix with eigenvalues in (0, 1], and whether to use it.

    Y -> g^{1/2} and Z -> g^{-1/2} by Y (3 - Z Y) / 2 and (3 - Z Y) / 2 Z, until they
    change no more or rounding makes |Z Y - 1| grow again.
    """
    eye = jnp.eye(len(g), dtype=g.dtype)
    small = 10 * len(g) ** 0.5 * float(jnp.finfo(g.dtype).eps)

    def residual(y, z):
        product = dot(z, y)
        return jnp.sqrt(jnp.square(product - eye).sum()), product

    def running(carry):
        count, _, _, _, now, better = carry
        return (count < steps) & better & (now > small)

    def step(carry):
        count, y, z, product, now, _ = carry
        t = 1.5 * eye - 0.5 * product
        new_y, new_z = dot(y, t), dot(t, z)
        after, product = residual(new_y, new_z)
        # Also refuses NaN: the last good iterate stays.
        better = after <= now * (1 + GROWTH)
        y, z = (jnp.where(better, *pair) for pair in ((new_y, y), (new_z, z)))
        return count + 1, y, z, product, after, better

    start, product = residual(g, eye)
    carry = (0, g, eye, product, start, jnp.array(True))
    _, y, z, _, left, _ = lax.while_loop(running, step, carry)
    smallest = 1 / jnp.maximum(_spectral_norm(z), 1)
    # 1e-2 of the values: how far Z may be off where the products' rounding is amplified.
    least = max(WELL_CONDITIONED, 250 * _root_eps(g.dtype))
    return z, (left < 1e-2) & (smallest > least)


def _direct(x, steps, wide):
    """Polar factor of a matrix of spectral norm at most 1, by X (3 - X^T X) / 2."""
    k = min(x.shape)
    eye = jnp.eye(k, dtype=x.dtype)
    small = 10 * k**0.5 * float(jnp.finfo(x.dtype).eps)

    def residual(products):
        return jnp.sqrt(jnp.square(products - eye).sum())

    def running(carry):
        count, _, _, now, better = carry
        return (count < steps) & better & (now > small)

    def step(carry):
        count, x, products, now, _ = carry
        new = applied(1.5 * eye - 0.5 * products, x, wide)
        products = products_of(new, wide)
        after = residual(products)
        better = after <= now * (1 + GROWTH)
        x = jnp.where(better, new, x)
        return count + 1, x, products, after, better

    products = products_of(x, wide)
    now = residual(products)
    carry = (0, x, products, now, jnp.array(True))
    return lax.while_loop(running, step, carry)[1]


def _warmup(tau: float) -> int:
    """Steps until a singular value tau, which grows by 1.5 in each, is about 1."""
    count = 0
    while tau * 1.5**count < 1:
        count += 1
    return count


def _spectral_norm(g, steps: int = 16):
    """Largest eigenvalue of a positive matrix by power iteration, from below."""
    # Not orthogonal to the largest eigenvector of products of non-negative features.
    v = 1 + 0.1 * jnp.cos(jnp.arange(len(g), dtype=g.dtype))

    def step(_, v):
        w = dot(g, v)
        return w / jnp.maximum(jnp.linalg.norm(w), jnp.finfo(g.dtype).tiny)

    return jnp.linalg.norm(dot(g, lax.fori_loop(0, steps, step, v)))


def products_of(a, wide):
    """a a^T or a^T a, the smaller one; of large ones the upper half alone is computed."""
    a = a if wide else a.T
    if len(a) % BLOCKS or len(a) < LARGE:
        return dot(a, a.T)
    k = len(a) // BLOCKS
    columns = [dot(a[: (i + 1) * k], a[i * k : (i + 1) * k].T) for i in range(BLOCKS)]

    def whole(i):
        below = [c[i * k : (i + 1) * k].T for c in columns[i + 1 :]]
        return jnp.concatenate([columns[i], *below])

    return jnp.concatenate([whole(i) for i in range(BLOCKS)], 1)


def applied(root, a, wide):
    """A matrix of the shorter side times the features."""
    return dot(root, a) if wide else dot(a, root)


def _root_eps(dtype) -> float:
    return float(jnp.finfo(dtype).eps) ** 0.5


@sequential_vmap
def eigh(a):
    """One matrix at a time where it is mapped: see ``ops.linalg.per_matrix``."""
    return tuple(jnp.linalg.eigh(a, symmetrize_input=False))


@sequential_vmap
def thin_svd(a):
    """Likewise."""
    return tuple(jnp.linalg.svd(a, full_matrices=False))
