r"""Model-predictive planners: CEM, iCEM, MPPI and random shooting, one signature.

``plan`` maximises the return of a sequence of H actions over a model and gives the first
action, with what the next step's plan starts from. A plan's return comes from any
function of (state, plans (P, H, A), key); ``rollout`` makes one of a model's step. All
loops are ``lax.scan`` with static shapes: ``jax.vmap`` plans for many tasks at once.

CEM draws P plans from a truncated normal whose variance the distance to the bounds
limits, so that none needs clipping:

$$ u = m + \sqrt{\min(v, ((m - l) / 2)^2, ((h - m) / 2)^2)}\, z, \quad z \in [-2, 2] $$

and moves mean and variance to those of the E best, 1 - ``alpha`` of the way.

References: CEM as in Chua et al., Deep Reinforcement Learning in a Handful of Trials,
2018, arXiv 1805.12114; iCEM: Pinneri et al., Sample-efficient Cross-Entropy Method for
Real-time Planning, 2020, arXiv 2008.06389; MPPI: Williams et al., Information Theoretic
MPC, ICRA 2017.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.ops.environments.spaces import Box
from jaxpapers.ops.planning.methods import cem, coloured, icem, mppi, shooting
from jaxpapers.ops.planning.options import (
    NAMES,
    Evaluate,
    Options,
    Planned,
    Trace,
    Warm,
)

__all__ = [
    "NAMES", "Evaluate", "Options", "Planned", "Trace", "Warm", "coloured", "plan",
    "rollout", "start",
]  # fmt: skip


def rollout(step: Callable) -> Evaluate:
    """Sum of a model's rewards along plans.

    Args:
      step: (states with a leading axis P, actions (P, A), key) -> (states, rewards (P,)),
        of all plans at once.
    """

    def evaluate(state, plans, key):
        count, horizon, _ = plans.shape
        states = jax.tree.map(
            lambda x: jnp.broadcast_to(x[None], (count, *x.shape)), state
        )

        def body(states, x):
            states, reward = step(states, *x)
            return states, reward

        xs = (plans.swapaxes(0, 1), jax.random.split(key, horizon))
        _, rewards = lax.scan(body, states, xs)
        return rewards.sum(0)

    return evaluate


def start(options: Options, space: Box) -> Warm:
    """What the first plan of an episode starts from: no action at all.

    Raises:
      ValueError: bounds that are not finite or not in order.
    """
    rest = _rest(space)
    mean = jnp.tile(jnp.asarray(rest, float)[None], (options.horizon, 1))
    return Warm(mean, jnp.tile(mean[None], (options.kept, 1, 1)))


def plan(
    evaluate: Evaluate,
    state: Any,
    key: Key[Array, ""],
    warm: Warm,
    options: Options,
    space: Box,
    noise: Float[Array, "I P H A"] | None = None,
) -> Planned:
    """The best sequence of actions from a state, as far as a planner finds it.

    Args:
      evaluate: see ``Evaluate``; what is not finite counts as -inf.
      state: where the plans start.
      key: of the draws and of ``evaluate``.
      warm: of the step before, which is shifted by one step, or ``start``.
      options: see ``Options``.
      space: bounds of the actions.
      noise: cem: standard normal numbers truncated to [-2, 2], in place of a draw.

    Raises:
      ValueError: bounds that are not finite or not in order; a warm start or noise of
        another shape.

    Example:
      >>> options = Options(horizon=2, population=64, elites=8)
      >>> space = Box((-1.0,), (1.0,))
      >>> def evaluate(state, plans, key):
      ...     return -jnp.square(plans - 0.5).sum((1, 2))
      >>> first = start(options, space)
      >>> solve = jax.jit(lambda key: plan(evaluate, (), key, first, options, space))
      >>> round(float(solve(jax.random.key(0)).action[0]), 1)
      0.5
    """
    rest = _rest(space)
    if jnp.shape(warm.mean) != (options.horizon, len(rest)):
        raise ValueError(
            f"the warm start must have shape {(options.horizon, len(rest))}, got "
            f"{jnp.shape(warm.mean)}; planning.start makes one"
        )
    drawn = (options.iterations, options.population, options.horizon, len(rest))
    if noise is not None and (options.name != "cem" or noise.shape != drawn):
        raise ValueError(
            f"noise can be given for cem, of shape {drawn}, got {noise.shape} for "
            f"{options.name}"
        )

    def shifted(x):
        end = jnp.broadcast_to(
            jnp.asarray(rest, x.dtype), (*x.shape[:-2], 1, len(rest))
        )
        return jnp.concatenate([x[..., 1:, :], end], -2)

    def returns(plans, key):
        values = evaluate(state, plans, key)
        return jnp.where(jnp.isfinite(values), values, -jnp.inf)

    warm = Warm(shifted(warm.mean), jax.vmap(shifted)(warm.kept))
    bounds = tuple(_rows(x, warm.mean) for x in space)
    if options.name == "icem":
        return icem(returns, key, warm, options, bounds)
    solve = {"cem": cem, "mppi": mppi, "shooting": shooting}[options.name]
    return solve(returns, key, warm, options, bounds, noise)


def _rest(space: Box) -> np.ndarray:
    """No action: zero, or the middle of bounds that do not have it inside."""
    low, high = (np.asarray(x, np.float64) for x in space)
    if not np.isfinite([low, high]).all() or not (low < high).all():
        raise ValueError(
            "a planner needs finite bounds of the actions with low < high, got low "
            f"{space.low}, high {space.high}"
        )
    return np.where((low < 0) & (high > 0), 0, (low + high) / 2)


def _rows(bound: Any, mean: Any) -> Any:
    """A bound of the actions for every step."""
    return jnp.tile(jnp.asarray(bound, mean.dtype)[None], (len(mean), 1))
