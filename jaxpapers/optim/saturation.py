"""Finite numbers stay finite: sums and narrower dtypes without infinities."""

from typing import Any

import jax
import jax.numpy as jnp


def saturated_sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y, where finite summands give the largest finite number, not infinity."""
    total = x + y
    over = jnp.isinf(total) & jnp.isfinite(x) & jnp.isfinite(y)
    largest = jnp.asarray(jnp.finfo(total.dtype).max, total.dtype)
    return jnp.where(over, jnp.copysign(largest, total), total)


def saturate(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` in a dtype; what is finite does not become infinite in a narrower one."""
    largest = jnp.finfo(dtype).max
    if largest >= jnp.finfo(x.dtype).max:
        return x.astype(dtype)
    bound = jnp.asarray(largest, x.dtype)
    return jnp.where(jnp.isinf(x), x, jnp.clip(x, -bound, bound)).astype(dtype)
