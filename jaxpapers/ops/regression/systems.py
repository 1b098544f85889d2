"""Many small symmetric systems at a time."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def solve(a: Float[Array, "B k k"], b: Float[Array, "B k"]) -> Float[Array, "B k"]:
    """Solutions of many small positive definite systems; NaN where one is singular.

    Cholesky in plain loops over columns, all systems at a time: batched LAPACK calls of
    jaxlib on CPUs are slow and can hang.
    """
    k = a.shape[-1]
    lower = jnp.moveaxis(a, 0, -1)  # (k, k, B)
    floor = 1e-13 * jnp.moveaxis(jnp.diagonal(a, axis1=1, axis2=2), 0, -1)
    x = b.T

    def eliminate(j, carry):
        m, x = carry
        pivot = m[j, j]
        pivot = jnp.where(pivot > floor[j], pivot, jnp.nan)
        ratio = m[:, j] / pivot[None]
        below = (jnp.arange(k) > j)[:, None]
        ratio = jnp.where(below, ratio, 0.0)
        return m - ratio[:, None] * m[j][None], x - ratio * x[j][None]

    m, x = lax.fori_loop(0, k, eliminate, (lower, x))

    def back(i, x):
        j = k - 1 - i
        later = (jnp.arange(k) > j)[:, None]
        value = (x[j] - jnp.sum(jnp.where(later, m[j] * x, 0.0), 0)) / m[j, j]
        return x.at[j].set(value)

    return lax.fori_loop(0, k, back, x).T


def symmetric(values, upper, k):
    """Matrices (B, k, k) from some of their entries (B, m) in the upper triangle."""
    out = jnp.zeros((len(values), k, k), values.dtype)
    out = out.at[:, upper[0], upper[1]].set(values)
    return out.at[:, upper[1], upper[0]].set(values)
