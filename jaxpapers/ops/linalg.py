"""Linear algebra on stacks of matrices."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

# Gram matrices lose half the digits by construction: TPU's default (one bfloat16
# pass) makes Cholesky fail at cond(p) = 1e2.
HIGHEST = lax.Precision.HIGHEST


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
