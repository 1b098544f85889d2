"""A pole on a cart: CartPole-v1 with a continuous force, and a stochastic one."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers.ops.environments.spaces import (
    Box,
    Step,
    check,
    standard_normal,
    symmetric,
    vector,
)


class CartPoleState(NamedTuple):
    """State of a cart-pole.

    Attributes:
      position: (4,), x in m, its velocity, theta in rad (0 is upright), its velocity.
      failed: (), bool: a limit has been left in this episode.
    """

    position: Any
    failed: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class CartPole:
    """A pole on a cart that a force in [-1, 1] x ``force`` pushes.

    The defaults are the constants of gymnasium's CartPole-v1, whose actions 0 and 1 are
    -1 and 1 here. The reward is 1 in every state inside the limits and in the first
    outside, then 0; a state that comes back inside earns 1 again. Actions are not
    clipped.

    Attributes:
      gravity, cart, pole, half_length: in m/s^2, kg, kg, m.
      force: of the action 1, in N.
      dt: seconds of a step, by explicit Euler.
      max_position: limit of x.
      max_angle: limit of theta.
      noise: standard deviation of what is added to each of the four positions and to
        the reward.
      horizon: steps of an episode.
    """

    gravity: float = 9.8
    cart: float = 1.0
    pole: float = 0.1
    half_length: float = 0.5
    force: float = 10.0
    dt: float = 0.02
    max_position: float = 2.4
    max_angle: float = 12 * 2 * math.pi / 360
    noise: float = 0.0
    horizon: int = 500

    def __post_init__(self):
        check("CartPole", cart=self.cart, pole=self.pole, dt=self.dt,
              half_length=self.half_length, force=self.force,
              max_position=self.max_position, max_angle=self.max_angle,
              horizon=self.horizon)  # fmt: skip

    @property
    def action_space(self) -> Box:
        """Share of the force."""
        return symmetric(1.0)

    @property
    def observation_space(self) -> Box:
        """Twice the limits, as gymnasium has them."""
        return symmetric(2 * self.max_position, math.inf, 2 * self.max_angle, math.inf)

    def reset(self, key: Key[Array, ""]) -> CartPoleState:
        """The first state of an episode: uniform in [-0.05, 0.05]^4."""
        position = jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)
        return CartPoleState(position, jnp.zeros((), bool))

    def observe(self, state: CartPoleState) -> Float[Array, "4"]:
        """The four positions."""
        return state.position

    def step(self, state: CartPoleState, action: Any, noise: Any = None) -> Step:
        """One step.

        Args:
          state: see ``CartPoleState``.
          action: (1,), share of the force.
          noise: a key, or (5,) standard normal numbers for the positions and the
            reward; None: none is added.

        Raises:
          ValueError: an action or noise of another shape.
        """
        x, v, theta, w = state.position
        dtype = state.position.dtype
        force = self.force * vector(action, self.action_space, dtype)[0]
        sin, cos, mass = jnp.sin(theta), jnp.cos(theta), self.cart + self.pole
        moment = self.pole * self.half_length
        push = (force + moment * w**2 * sin) / mass
        turn = (self.gravity * sin - cos * push) / (
            self.half_length * (4 / 3 - self.pole * cos**2 / mass)
        )
        speed = push - moment * turn * cos / mass
        eps = self.noise * standard_normal(noise, 5, dtype)
        # The positions move with the old velocities.
        rate = jnp.stack([v, speed, w, turn])
        position = state.position + self.dt * rate + eps[:4]
        outside = (jnp.abs(position[0]) > self.max_position) | (
            jnp.abs(position[2]) > self.max_angle
        )
        reward = jnp.where(outside & state.failed, 0, 1).astype(dtype) + eps[4]
        after = CartPoleState(position, state.failed | outside)
        return Step(after, position, reward, outside)


STOCHASTIC_CART_POLE = CartPole(noise=0.01, horizon=200)
"""Noise on every position and reward, episodes of 200 steps. yingfan-bot/mbpsrl."""
