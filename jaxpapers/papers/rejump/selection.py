"""Choosing among samples and among prompts by a metric, with bootstrap intervals."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key


def best_of_n(
    values: Float[Any, "Q N"],
    direction: int = 1,
    defined: Bool[Any, "Q N"] | None = None,
) -> Int[Array, " Q"]:
    """The sample with the largest metric for every problem; of ties the first.

    Args:
      values: a metric of N samples each.
      direction: 1; -1 for the smallest.
      defined: where the metric is; other samples come last.
    """
    if direction not in (1, -1):
        raise ValueError(f"direction must be 1 or -1, got {direction}")
    scores = direction * jnp.asarray(values)
    if defined is not None:
        scores = jnp.where(jnp.asarray(defined), scores, -jnp.inf)
    return scores.argmax(1).astype(jnp.int32)


def select_prompt(
    means: Float[Any, "K M"],
    *,
    metric: int | None = None,
    direction: int = 1,
    target: Float[Any, " M"] | None = None,
) -> int:
    """The prompt to use on the rest, from mean metrics of K prompts on a small set.

    Args:
      means: mean metrics of each prompt; NaN where it has none: such a prompt is not
        chosen by that metric.
      metric: index of the one to maximise, or minimise with ``direction=-1``.
      direction: see ``best_of_n``.
      target: instead, metrics to be closest to, each metric in units of its spread over
        the prompts; those that do not differ count nothing.

    Raises:
      ValueError: neither or both of metric and target; no prompt has the means.
    """
    means = np.asarray(means, float)
    if (metric is None) == (target is None):
        raise ValueError("expected a metric or a target, and not both")
    if metric is not None:
        loss = -direction * means[:, metric]
    else:
        known = np.isfinite(means)
        spread = np.array(
            [x[ok].std() if ok.any() else 0 for x, ok in zip(means.T, known.T)]
        )
        apart = (means - np.asarray(target)) / np.where(spread > 0, spread, 1)
        loss = np.square(apart[:, spread > 0]).sum(1)
    if np.isnan(loss).all():
        raise ValueError("no prompt has these means: all are NaN")
    return int(np.nanargmin(loss))


class Interval(NamedTuple):
    """Mean over problems, and the percentile bootstrap's interval of it."""

    mean: Any
    low: Any
    high: Any


def bootstrap(
    values: Float[Any, "M Q"],
    key: Key[Array, ""],
    replicates: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Intervals of means over problems, the same resamples for all M rows.

    Args:
      values: of every problem; a row of differences gives a paired interval.
      key: of the resamples.
      replicates: of them.
      level: probability that the interval has.
    """
    values = jnp.asarray(values)
    count = values.shape[1]

    def one(key):
        chosen = jax.random.randint(key, (count,), 0, count)
        return jnp.take(values, chosen, axis=1).mean(1)

    means = lax.map(one, jax.random.split(key, replicates))
    tail = (1 - level) / 2
    low, high = jnp.quantile(means, jnp.array([tail, 1 - tail]), axis=0)
    return Interval(values.mean(1), low, high)
