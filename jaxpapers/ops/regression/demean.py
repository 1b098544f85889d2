"""Fixed effects by alternating demeaning, on the device."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def demean(
    x: Float[Array, "n k"],
    fe: Int[Array, "D n"],
    levels: tuple[int, ...],
    weights: Float[Array, " n"] | None = None,
    tol: float = 1e-8,
    most: int = 10_000,
) -> Float[Array, "n k"]:
    """Residuals of a weighted regression of the columns on all fixed effects.

    Each round subtracts the weighted mean of every level of one effect after the other
    (von Neumann's alternating projections), until no mean exceeds ``tol`` times the
    largest value of its column. One effect needs one round.

    Args:
      x: columns.
      fe: codes of each effect.
      levels: number of levels of each.
      weights: not negative; levels whose weights are all 0 keep their values.
      tol: see above; below the precision of the dtype it is that.
      most: rounds at most; what has not converged then is NaN.

    Reference: Gaure, "OLS with multiple high dimensional category variables", 2013.
    """
    if not levels:
        return x
    weights = jnp.ones_like(x[:, 0]) if weights is None else weights
    totals = [jax.ops.segment_sum(weights, f, n) for f, n in zip(fe, levels)]
    inverse = [1 / jnp.where(t > 0, t, jnp.inf) for t in totals]
    scale = jnp.maximum(jnp.abs(x).max(0), jnp.finfo(x.dtype).tiny)
    tol = max(tol, 8 * float(jnp.finfo(x.dtype).eps))

    def sweep(x):
        moved = jnp.zeros_like(x[0])
        for f, n, each in zip(fe, levels, inverse):
            mean = jax.ops.segment_sum(x * weights[:, None], f, n) * each[:, None]
            x = x - mean[f]
            moved = jnp.maximum(moved, jnp.abs(mean).max(0))
        return x, (moved / scale).max(initial=0.0)

    if len(levels) == 1:
        return sweep(x)[0]

    def unfinished(carry):
        _, moved, i = carry
        return (moved > tol) & (i < most)

    def body(carry):
        x, _, i = carry
        x, moved = sweep(x)
        return x, moved, i + 1

    start = (x, jnp.full((), jnp.inf, x.dtype), 0)
    x, moved, _ = lax.while_loop(unfinished, body, start)
    return jnp.where(moved > tol, jnp.nan, x)
