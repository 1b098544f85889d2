"""Hyper-parameters of the largest evidence, within bounds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Maximum(NamedTuple):
    """The best hyper-parameters that an ascent has met.

    Attributes:
      model: of the largest value, within the bounds.
      value: (), that value.
      start: (), the value at the start.
      gradient: norm of the gradient at the start, of the logs.
    """

    model: Any
    value: Any
    start: Any
    gradient: Any


def maximise(
    objective: Callable[[Any], Float[Array, ""]],
    model: Any,
    low: Any,
    high: Any,
    optimizer: Any,
    steps: int = 50,
) -> Maximum:
    """Projected gradient ascent on the logs of the hyper-parameters.

    Args:
      objective: of a model, e.g. ``evidence`` of its ``observations``.
      model: where it starts; moved into the bounds first.
      low, high: models of the least and largest values.
      optimizer: has ``init`` and ``update``, e.g. ``optax.adam(0.05)``.
      steps: a step that would leave the bounds ends on them; one of a value or gradient
        that is not finite is not taken.

    Returns:
      The best model met, the start among them: its value is never below the start's.

    Raises:
      ValueError: fewer than 0 steps; unless traced, a bound above the other.
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    for a, b in zip(*(jax.tree.leaves(m) for m in (low, high))):
        if (
            not any(isinstance(v, jax.core.Tracer) for v in (a, b))
            and not (a <= b).all()
        ):
            raise ValueError(f"lower bounds must not exceed upper ones, got {a} > {b}")

    def clip(m):
        return jax.tree.map(
            lambda x, a, b: jnp.clip(x, a, b).astype(x.dtype), m, low, high
        )

    value_and_grad = jax.value_and_grad(objective)

    def step(carry, _):
        model, state, best, top = carry
        value, grads = value_and_grad(model)
        good = jnp.isfinite(value) & _finite(grads)
        better = good & (value > top)
        best = _choose(better, model, best)
        updates, after = optimizer.update(
            jax.tree.map(lambda g: -g, grads), state, model
        )
        moved = clip(jax.tree.map(lambda x, u: x + u, model, updates))
        # From a point without a gradient no step leads on: back to the best.
        model, state = _choose(good, (moved, after), (best, state))
        top = jnp.where(better, value, top)
        return (model, state, best, top), (value, _norm(grads))

    start = clip(jax.tree.map(jnp.asarray, model))
    low_value = jnp.full((), -jnp.inf, jax.tree.leaves(start)[0].dtype)
    carry = (start, optimizer.init(start), start, low_value)
    # One more, which looks at where the last step led.
    (_, _, best, top), (values, norms) = lax.scan(step, carry, None, steps + 1)
    return Maximum(best, top, values[0], norms[0])


def _finite(tree: Any) -> Array:
    return jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def _norm(tree: Any) -> Array:
    return jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(tree)))


def _choose(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
