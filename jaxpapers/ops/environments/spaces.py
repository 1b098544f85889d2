"""Spaces of actions and observations, and what a step returns."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Box(NamedTuple):
    """Vectors between two bounds.

    Attributes:
      low, high: a number per component; infinite where there is no bound.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]


class Discrete(NamedTuple):
    """The numbers 0, ..., n - 1.

    Attributes:
      n: of values.
    """

    n: int


class Step(NamedTuple):
    """What ``step`` returns.

    Attributes:
      state: after the step.
      observation: of that state.
      reward: (), of the step.
      terminated: (), bool: the episode ends here, and not for its length.
    """

    state: Any
    observation: Any
    reward: Any
    terminated: Any


def symmetric(*bounds: float) -> Box:
    """The box of vectors whose components are at most these in size."""
    return Box(tuple(-x for x in bounds), bounds)


def vector(action: Any, space: Box, dtype: Any) -> Float[Array, " A"]:
    """An action as an array of the box's width.

    Raises:
      ValueError: another shape.
    """
    shape = (len(space.low),)
    if np.shape(action) != shape:
        raise ValueError(
            f"an action must have shape {shape}, got {np.shape(action)}; use jax.vmap "
            "for many"
        )
    return jnp.asarray(action, dtype)


def index(action: Any, n: int) -> Any:
    """An action that numbers one of n choices.

    Raises:
      ValueError: not a scalar, or known and not one of the choices.
      TypeError: not an integer.
    """
    if np.shape(action):
        raise ValueError(
            f"an action must be a scalar, got shape {np.shape(action)}; use jax.vmap for "
            "many"
        )
    known = not isinstance(action, jax.core.Tracer)
    action = jnp.asarray(action)
    if not jnp.issubdtype(action.dtype, jnp.integer):
        raise TypeError(f"an action must be an integer, got {action.dtype}")
    if known and not 0 <= int(action) < n:
        raise ValueError(f"an action must be one of 0 to {n - 1}, got {action}")
    return jnp.clip(action, 0, n - 1)


def standard_normal(noise: Any, count: int, dtype: Any) -> Float[Array, " N"]:
    """Standard normal numbers: of a key, those given, or zeros for None.

    Raises:
      ValueError: given numbers of another shape.
    """
    if noise is None:
        return jnp.zeros(count, dtype)
    if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        return jax.random.normal(noise, (count,), dtype)
    if noise.shape != (count,):
        raise ValueError(f"noise must have shape {(count,)}, got {noise.shape}")
    return jnp.asarray(noise, dtype)


def check(name: str, **positive: int | float) -> None:
    """Raises ValueError for constants that must be above 0."""
    for field, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name}.{field} must be > 0, got {value}")
