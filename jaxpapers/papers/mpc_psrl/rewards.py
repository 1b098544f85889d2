"""Rewards that the authors' planner is given, functions of observations and actions."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpapers.ops.environments import (
    STOCHASTIC_PENDULUM,
    PetsCartPole,
    Pusher,
    Reacher3D,
)


def cart_pole(
    observations: Float[Array, "B 4"], actions: Float[Array, "B 1"]
) -> Float[Array, " B"]:
    """cos theta - 0.01 x^2: a stand-in for the environment's reward, which is 0 or 1."""
    del actions
    return jnp.cos(observations[:, 2]) - 0.01 * observations[:, 0] ** 2


def pendulum(
    observations: Float[Array, "B 3"], actions: Float[Array, "B 1"]
) -> Float[Array, " B"]:
    """The environment's reward, of cos theta, sin theta and the velocity."""
    angle = jnp.arctan2(observations[:, 1], observations[:, 0])
    return -STOCHASTIC_PENDULUM.cost(angle, observations[:, 2], actions[:, 0])


def pets_cart_pole(
    observations: Float[Array, "B 4"], actions: Float[Array, "B 1"]
) -> Float[Array, " B"]:
    """The environment's reward, of the state before the step."""
    return PetsCartPole().reward(observations, actions)


def reacher(
    observations: Float[Array, "B 17"], actions: Float[Array, "B 7"]
) -> Float[Array, " B"]:
    """The environment's reward, of the state before the step."""
    return Reacher3D().reward(observations, actions)


def pusher(
    observations: Float[Array, "B 20"], actions: Float[Array, "B 7"]
) -> Float[Array, " B"]:
    """The environment's reward."""
    return Pusher().reward(observations, actions)
