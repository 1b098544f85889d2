"""Which observations a buffer keeps: those that the others say least about."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxpapers.ops.gaussian_process.kernels import Model, kernel_matrix
from jaxpapers.ops.linalg import HIGHEST


def keep_by_variance(
    model: Model,
    x: Float[Array, "N _"],
    mask: Bool[Array, " N"],
    count: int,
) -> tuple[Int[Array, " count"], Bool[Array, " count"]]:
    """Greedy choice by conditional variance: a pivoted Cholesky factorisation.

    The next input is that of the largest variance given noisy observations at those
    chosen so far. Among equals the first wins. O(N count^2).

    Args:
      model: hyper-parameters; the noise counts, so that many copies of an input are
        kept after all else is known.
      x: inputs.
      mask: False for padding, which is chosen last.
      count: number to keep, at most N.

    Returns:
      Indices of the chosen, ascending with padding last, and which are no padding.

    Raises:
      ValueError: more than there are.
    """
    n = len(x)
    if not 0 < count <= n:
        raise ValueError(f"count must be in [1, {n}], got {count}")
    x = jnp.where(mask[:, None], x, 0)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    variance = jnp.where(mask, model.variance, -jnp.inf).astype(dtype)
    columns = jnp.zeros((count, n), dtype)

    def choose(t, carry):
        variance, columns, chosen = carry
        pivot = jnp.argmax(variance)
        k = kernel_matrix(model, x[pivot][None], x)[0]
        known = jnp.matmul(columns[:, pivot], columns, precision=HIGHEST)
        # Of the observation: its own variance and the noise.
        size = jnp.sqrt(jnp.maximum(variance[pivot], 0) + model.noise)
        column = jnp.where(mask[pivot], (k - known) / size, 0)
        taken = variance.at[pivot].set(-jnp.inf)
        # A copy of a chosen input stays a candidate; the chosen itself does not.
        left = jnp.where(jnp.isneginf(taken), taken, taken - jnp.square(column))
        return left, columns.at[t].set(column), chosen.at[t].set(pivot)

    carry = (variance, columns, jnp.zeros(count, jnp.int32))
    chosen = lax.fori_loop(0, count, choose, carry)[2]
    # Padding has index N + its own, so that it comes last. When the observations are used
    # up, argmax gives 0 again and again: as many rows of padding take its place.
    used = jnp.arange(count) < mask.sum()
    chosen = jnp.sort(jnp.where(used, chosen, n))
    return jnp.minimum(chosen, n - 1), used
