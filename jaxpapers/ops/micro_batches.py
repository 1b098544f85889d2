"""Gradient accumulation over micro-batches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def value_and_grad(
    loss: Callable, accumulate: int = 1, axis: str | None = None
) -> Callable:
    """Gradients of a loss, its metrics and its updated extra state.

    Args:
      loss: (params, extra, batch, key) -> (scalar, (metrics, extra)). With a metric
        ``weight`` the loss and all other metrics are weighted means.
      accumulate: number of micro-batches, cut along the batch's leading axis; each
        continues from the extra of the previous one.
      axis: mesh axis over which the batch varies inside ``shard_map``.

    Returns:
      (params, extra, batch, key) -> (gradients, metrics with ``loss``, extra).

    Raises:
      ValueError: ``accumulate`` below 1, or a batch that it does not divide.
    """
    if accumulate < 1:
        raise ValueError(f"train.accumulate must be >= 1, got {accumulate}")

    def whole(params, extra, batch, key):
        (value, (metrics, extra)), grads = jax.value_and_grad(loss, has_aux=True)(
            params, extra, batch, key
        )
        return grads, {"loss": value, **metrics}, extra

    def cut(x):
        if x.shape[0] % accumulate:
            raise ValueError(
                f"train.accumulate={accumulate} does not divide the batch of "
                f"{x.shape[0]}; nearest batch that works: "
                f"{accumulate * max(round(x.shape[0] / accumulate), 1)}"
            )
        # Strided rows: every micro-batch keeps the sharding of the batch.
        return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def accumulated(params, extra, batch, key):
        def body(carry, micro):
            (total, extra), (part, i) = carry, micro
            grads, metrics, extra = whole(
                params, extra, part, jax.random.fold_in(key, i)
            )
            weight = metrics.get("weight", jnp.ones(()))
            # The mean of a micro-batch of weight 0 may be NaN.
            scaled = jax.tree.map(
                lambda x: jnp.where(weight == 0, 0, x * weight), (grads, metrics)
            )
            return (jax.tree.map(jnp.add, total, (scaled, weight)), extra), None

        parts = jax.tree.map(cut, batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(whole, params, extra, first, key)[:2]
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        start = (zero, jnp.zeros(()))
        if axis:
            start = lax.pcast(start, axis, to="varying")
        ((sums, weight), extra), _ = lax.scan(
            body, (start, extra), (parts, jnp.arange(accumulate))
        )
        grads, metrics = jax.tree.map(
            lambda x: x / jnp.where(weight == 0, 1, weight), sums
        )
        if "weight" in metrics:
            metrics["weight"] = weight
        return grads, metrics, extra

    return whole if accumulate == 1 else accumulated
