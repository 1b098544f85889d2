"""A car in a valley: gymnasium's MountainCar-v0 and MountainCarContinuous-v0."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers.ops.environments.spaces import (
    Box,
    Discrete,
    Step,
    check,
    index,
    vector,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MountainCar:
    """MountainCar-v0: push left, not at all or right; every step costs 1.

    A state is (2,): position and velocity, which is what is observed.

    Attributes:
      min_position, max_position: the car stops at the left one.
      max_speed: the velocity is clipped to it.
      gravity: largest loss of velocity in a step.
      power: gain of velocity in a step, of a whole push.
      goal: an episode terminates at positions from it on, with
      goal_velocity: or more.
      horizon: steps of an episode.
    """

    min_position: float = -1.2
    max_position: float = 0.6
    max_speed: float = 0.07
    gravity: float = 0.0025
    power: float = 0.001
    goal: float = 0.5
    goal_velocity: float = 0.0
    horizon: int = 200

    def __post_init__(self):
        name = type(self).__name__
        check(name, max_speed=self.max_speed, power=self.power, horizon=self.horizon)
        if not self.min_position < self.goal <= self.max_position:
            raise ValueError(
                f"{name}.goal must lie in (min_position, max_position], got {self.goal} "
                f"for ({self.min_position}, {self.max_position}]"
            )

    @property
    def action_space(self) -> Discrete | Box:
        """Left, none, right."""
        return Discrete(3)

    @property
    def observation_space(self) -> Box:
        """Of position and velocity."""
        return Box(
            (self.min_position, -self.max_speed), (self.max_position, self.max_speed)
        )

    def reset(self, key: Key[Array, ""]) -> Float[Array, "2"]:
        """The first state of an episode: at rest, uniform in [-0.6, -0.4]."""
        position = jax.random.uniform(key, minval=-0.6, maxval=-0.4)
        return jnp.stack([position, jnp.zeros_like(position)])

    def observe(self, state: Float[Array, "2"]) -> Float[Array, "2"]:
        """The state."""
        return state

    def step(self, state: Float[Array, "2"], action: Any, noise: Any = None) -> Step:
        """One step.

        Args:
          state: position and velocity.
          action: (), integer in 0, 1, 2.
          noise: not read: the car has none.

        Raises:
          ValueError, TypeError: an action that is no scalar, no integer or, where its
            value is known, not one of the three.
        """
        del noise
        push = index(action, 3).astype(state.dtype) - 1
        state, there = self._move(state, push)
        return Step(state, state, -jnp.ones((), state.dtype), there)

    def _move(self, state: Any, push: Any) -> tuple[Any, Any]:
        """The next state, and whether it is at the goal."""
        position, speed = state
        speed = speed + push * self.power - self.gravity * jnp.cos(3 * position)
        speed = jnp.clip(speed, -self.max_speed, self.max_speed)
        position = jnp.clip(position + speed, self.min_position, self.max_position)
        stopped = (position == self.min_position) & (speed < 0)
        speed = jnp.where(stopped, 0, speed)
        there = (position >= self.goal) & (speed >= self.goal_velocity)
        return jnp.stack([position, speed]), there


@dataclasses.dataclass(frozen=True, kw_only=True)
class MountainCarContinuous(MountainCar):
    """MountainCarContinuous-v0: 100 at the goal, less 0.1 of the squared actions.

    State and constants are those of ``MountainCar``.
    """

    power: float = 0.0015
    goal: float = 0.45
    horizon: int = 999

    @property
    def action_space(self) -> Box:
        """Share of the power."""
        return Box((-1.0,), (1.0,))

    def step(self, state: Float[Array, "2"], action: Any, noise: Any = None) -> Step:
        """One step.

        Args:
          state: position and velocity.
          action: (1,), clipped to [-1, 1] where it pushes; the cost is that of the
            action as it is given, as in gymnasium.
          noise: not read: the car has none.

        Raises:
          ValueError: an action of another shape.
        """
        del noise
        action = vector(action, self.action_space, state.dtype)[0]
        state, there = self._move(state, jnp.clip(action, -1, 1))
        reward = jnp.where(there, 100, 0).astype(state.dtype) - 0.1 * action**2
        return Step(state, state, reward, there)
