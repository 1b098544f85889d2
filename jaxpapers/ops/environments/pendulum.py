r"""Pendulum that is to be swung up: gymnasium's Pendulum-v1, and a stochastic one.

$$ \ddot\theta = \frac{3 g}{2 l} \sin\theta + \frac{3}{m l^2} u $$

theta = 0 is upright. The reward is that of the state before the step.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxpapers.ops.environments.spaces import (
    Box,
    Step,
    check,
    standard_normal,
    symmetric,
    vector,
)

HANGING = (3.14159, -0.02816067)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pendulum:
    """A pendulum; the defaults are gymnasium's Pendulum-v1.

    A state is (2,): theta, not wrapped, and its velocity. An observation is cos theta,
    sin theta and the velocity.

    Attributes:
      gravity, mass, length: in m/s^2, kg, m.
      dt: seconds of a step.
      max_speed: the velocity is clipped to it, in rad/s.
      max_torque: actions are clipped to it, in Nm.
      noise: standard deviation of what is added to velocity, angle and reward.
      clip_first: whether the velocity is clipped before the angle moves with it
        (gymnasium) or after (gym 0.9 and the stochastic pendulum).
      start: state of every reset; None: uniform in [-pi, pi] x [-1, 1].
      horizon: steps of an episode.
    """

    gravity: float = 10.0
    mass: float = 1.0
    length: float = 1.0
    dt: float = 0.05
    max_speed: float = 8.0
    max_torque: float = 2.0
    noise: float = 0.0
    clip_first: bool = True
    start: tuple[float, float] | None = None
    horizon: int = 200

    def __post_init__(self):
        check("Pendulum", mass=self.mass, length=self.length, dt=self.dt,
              max_speed=self.max_speed, max_torque=self.max_torque,
              horizon=self.horizon)  # fmt: skip

    @property
    def action_space(self) -> Box:
        """Torques."""
        return symmetric(self.max_torque)

    @property
    def observation_space(self) -> Box:
        """Of cos theta, sin theta, velocity."""
        return symmetric(1.0, 1.0, self.max_speed)

    def reset(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        """The first state of an episode."""
        if self.start is not None:
            return jnp.asarray(self.start, float)
        high = jnp.asarray([np.pi, 1.0], float)
        return jax.random.uniform(key, (2,), high.dtype, -high, high)

    def observe(self, state: Float[Array, "2"]) -> Float[Array, "3"]:
        """Cos theta, sin theta, velocity."""
        return jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1]])

    def cost(self, theta: Any, speed: Any, torque: Any) -> Any:
        """Squares of the angle in [-pi, pi), the velocity and the torque, weighted."""
        angle = jnp.mod(theta + np.pi, 2 * np.pi) - np.pi
        return angle**2 + 0.1 * speed**2 + 0.001 * torque**2

    def step(self, state: Float[Array, "2"], action: Any, noise: Any = None) -> Step:
        """One step.

        Args:
          state: theta and its velocity.
          action: (1,), the torque.
          noise: a key, or (3,) standard normal numbers for velocity, angle and cost;
            None: none is added.

        Raises:
          ValueError: an action or noise of another shape.
        """
        theta, speed = state
        u = vector(action, self.action_space, state.dtype)[0]
        u = jnp.clip(u, -self.max_torque, self.max_torque)
        eps = self.noise * standard_normal(noise, 3, state.dtype)
        cost = self.cost(theta, speed, u) + eps[2]
        pull = 3 * self.gravity / (2 * self.length) * jnp.sin(theta)
        push = 3 / (self.mass * self.length**2) * u
        speed = speed + (pull + push) * self.dt + eps[0]
        clipped = jnp.clip(speed, -self.max_speed, self.max_speed)
        theta = theta + (clipped if self.clip_first else speed) * self.dt + eps[1]
        state = jnp.stack([theta, clipped])
        return Step(state, self.observe(state), -cost, jnp.zeros((), bool))


PENDULUM_V1 = Pendulum()
"""gymnasium's Pendulum-v1."""
STOCHASTIC_PENDULUM = Pendulum(noise=0.01, clip_first=False, start=HANGING)
"""Noise on every state and reward; each episode starts hanging. yingfan-bot/mbpsrl."""
