"""The environments of PETS, on MuJoCo: cart-pole swing-up, Reacher 3D, Pusher.

Rewards and observations are JAX functions; physics runs on the host
(``ops.mujoco.Simulator``) and is a pure function of the state, in float64 whatever the
program's dtype. Needs the extra ``rl``.

Reference: Chua et al., 2018, arXiv 1805.12114; kchua/handful-of-trials 77fd880.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers.ops import mujoco
from jaxpapers.ops.environments import pets_models
from jaxpapers.ops.environments.spaces import Box, Step, check, symmetric, vector

GOAL = (0.45, -0.05, -0.323)
"""Where the pusher's cylinder is to go."""


class PhysicsState(NamedTuple):
    """State of an environment on MuJoCo.

    Attributes:
      physics: (words,), uint32, see ``ops.mujoco``.
      observation: (S,), what was observed of it; Pusher's positions are those that
        MuJoCo leaves after the last physics step, from the state before it.
    """

    physics: Any
    observation: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PetsCartPole:
    """Swings up a pole that hangs from a cart, with a force in [-3, 3] x 100 N.

    An observation is x, theta (0 hangs) and their velocities. The reward is
    exp(-|tip - (0, 0.6)|^2 / 0.36) - 0.01 a^2, of the state after the step.

    Attributes:
      horizon: steps of an episode, of two physics steps of 0.02 s.
    """

    horizon: int = 200

    def __post_init__(self):
        check("PetsCartPole", horizon=self.horizon)

    @functools.cached_property
    def simulator(self) -> mujoco.Simulator:
        """The physics."""
        return mujoco.Simulator(pets_models.CART_POLE, frame_skip=2)

    @property
    def action_space(self) -> Box:
        """Controls."""
        return symmetric(3.0)

    @property
    def observation_space(self) -> Box:
        """Of x, theta and their velocities."""
        return symmetric(*(math.inf,) * 4)

    def reset(self, key: Key[Array, ""]) -> PhysicsState:
        """Normal with deviation 0.1 in every component."""
        at = 0.1 * jax.random.normal(key, (4,), float)
        return PhysicsState(self.simulator.start(at[:2], at[2:]), at)

    def observe(self, state: PhysicsState) -> Float[Array, "4"]:
        """X, theta, and their velocities."""
        return state.observation

    def reward(self, observation: Any, action: Any) -> Any:
        """Of an observation (..., 4) and an action (..., 1)."""
        x, theta = observation[..., 0], observation[..., 1]
        tip = (x - 0.6 * jnp.sin(theta)) ** 2 + (0.6 * jnp.cos(theta) + 0.6) ** 2
        return jnp.exp(-tip / 0.36) - 0.01 * jnp.square(action).sum(-1)

    def step(self, state: PhysicsState, action: Any, noise: Any = None) -> Step:
        """One step; the noise is not read: there is none.

        Raises:
          ValueError: an action that is not (1,).
        """
        del noise
        action = vector(action, self.action_space, state.observation.dtype)
        physics, reading = self.simulator.step(state.physics, action)
        seen = jnp.concatenate([reading.qpos, reading.qvel])
        reward = self.reward(seen, action)
        return Step(PhysicsState(physics, seen), seen, reward, jnp.zeros((), bool))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reacher3D:
    """Moves the hand of a seven-jointed arm to a target.

    An observation is (17,): seven angles, the target, seven angular velocities. The
    reward is -|hand - target|^2 - 0.01 |a|^2, of the state after the step.

    Attributes:
      horizon: steps of an episode, of two physics steps of 0.01 s.
    """

    horizon: int = 150

    def __post_init__(self):
        check("Reacher3D", horizon=self.horizon)

    @functools.cached_property
    def simulator(self) -> mujoco.Simulator:
        """The physics."""
        return mujoco.Simulator(pets_models.arm(pets_models.REACHER), frame_skip=2)

    @property
    def action_space(self) -> Box:
        """Torques."""
        return symmetric(*(pets_models.REACHER.torque,) * 7)

    @property
    def observation_space(self) -> Box:
        """Of angles, target, angular velocities."""
        return symmetric(*(math.inf,) * 17)

    def reset(self, key: Key[Array, ""]) -> PhysicsState:
        """The arm stretched out; the target (0, 0.25, 0) and normal noise of 0.1."""
        target = jnp.asarray([0, 0.25, 0], float)
        target += 0.1 * jax.random.normal(key, (3,), float)
        qpos, rest = jnp.concatenate([jnp.zeros(7), target]), jnp.zeros(10)
        seen = jnp.concatenate([qpos, rest[:7]])
        return PhysicsState(self.simulator.start(qpos, rest), seen)

    def observe(self, state: PhysicsState) -> Float[Array, "17"]:
        """Angles, target, angular velocities."""
        return state.observation

    def reward(self, observation: Any, action: Any) -> Any:
        """Of an observation (..., 17) and an action (..., 7)."""
        hand = arm_points(observation[..., :7])[..., -1, :]
        distance = jnp.square(hand - observation[..., 7:10]).sum(-1)
        return -distance - 0.01 * jnp.square(action).sum(-1)

    def step(self, state: PhysicsState, action: Any, noise: Any = None) -> Step:
        """One step; the noise is not read: there is none.

        Raises:
          ValueError: an action that is not (7,).
        """
        del noise
        action = vector(action, self.action_space, state.observation.dtype)
        physics, reading = self.simulator.step(state.physics, action)
        seen = jnp.concatenate([reading.qpos, reading.qvel[:7]])
        reward = self.reward(seen, action)
        return Step(PhysicsState(physics, seen), seen, reward, jnp.zeros((), bool))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pusher:
    """Pushes a cylinder on a table to a goal, with the fork at the end of the arm.

    An observation is (20,): seven angles, seven angular velocities, the positions of the
    fork and of the cylinder. The reward is -0.5 |fork - cylinder|_1
    - 1.25 |goal - cylinder|_1 - 0.1 |a|^2, of the state before the step.

    Attributes:
      horizon: steps of an episode, of four physics steps of 0.01 s.
    """

    horizon: int = 150

    def __post_init__(self):
        check("Pusher", horizon=self.horizon)

    @functools.cached_property
    def simulator(self) -> mujoco.Simulator:
        """The physics."""
        xml = pets_models.arm(pets_models.PUSHER)
        return mujoco.Simulator(xml, frame_skip=4, bodies=("tips_arm", "object"))

    @property
    def action_space(self) -> Box:
        """Torques."""
        return symmetric(*(pets_models.PUSHER.torque,) * 7)

    @property
    def observation_space(self) -> Box:
        """Of angles, angular velocities, fork and cylinder."""
        return symmetric(*(math.inf,) * 20)

    def reset(self, key: Key[Array, ""]) -> PhysicsState:
        """The cylinder at (-0.25, 0.15) of its slides, and normal noise of 0.025."""
        key_place, key_speed = jax.random.split(key)
        place = jnp.asarray([-0.25, 0.15], float)
        place += 0.025 * jax.random.normal(key_place, (2,), float)
        qpos = jnp.concatenate([jnp.zeros(7), place, jnp.zeros(2)])
        speed = jax.random.uniform(key_speed, (7,), float, -0.005, 0.005)
        qvel = jnp.concatenate([speed, jnp.zeros(4)])
        physics = self.simulator.start(qpos, qvel)
        return PhysicsState(physics, _pushing(self.simulator.read(physics)))

    def observe(self, state: PhysicsState) -> Float[Array, "20"]:
        """Angles, angular velocities, fork, cylinder."""
        return state.observation

    def reward(self, observation: Any, action: Any) -> Any:
        """Of an observation (..., 20) and an action (..., 7)."""
        fork, thing = observation[..., 14:17], observation[..., 17:]
        goal = jnp.asarray(GOAL, observation.dtype)
        goal = jnp.broadcast_to(goal, thing.shape)
        near, far = (jnp.abs(x - thing).sum(-1) for x in (fork, goal))
        return -0.5 * near - 1.25 * far - 0.1 * jnp.square(action).sum(-1)

    def step(self, state: PhysicsState, action: Any, noise: Any = None) -> Step:
        """One step; the noise is not read: there is none.

        Raises:
          ValueError: an action that is not (7,).
        """
        del noise
        action = vector(action, self.action_space, state.observation.dtype)
        reward = self.reward(state.observation, action)
        physics, reading = self.simulator.step(state.physics, action)
        seen = _pushing(reading)
        return Step(PhysicsState(physics, seen), seen, reward, jnp.zeros((), bool))


def _pushing(reading: mujoco.Reading) -> Float[Array, "20"]:
    return jnp.concatenate(
        [reading.qpos[:7], reading.qvel[:7], reading.bodies.reshape(-1)]
    )


def arm_points(angles: Float[Array, "*batch 7"]) -> Float[Array, "*batch 4 3"]:
    """Positions of Reacher 3D's lifting joint, elbow, wrist and hand, in closed form.

    Gradients are finite where the arm is stretched out.

    Args:
      angles: of the seven joints; the last one turns the hand about itself.
    """
    t = [angles[..., i] for i in range(6)]
    sin, cos = jnp.sin, jnp.cos
    zero = jnp.zeros_like(t[0])
    base = jnp.asarray(pets_models.REACHER.base, angles.dtype)
    base = jnp.broadcast_to(base, (*zero.shape, 3))
    to_lift, to_elbow, to_wrist = pets_models.REACH
    ahead = jnp.stack([cos(t[0]), sin(t[0]), zero], -1)
    axis = jnp.stack([cos(t[1]) * cos(t[0]), cos(t[1]) * sin(t[0]), -sin(t[1])], -1)
    side = jnp.stack([-sin(t[0]), cos(t[0]), zero], -1)
    points = [base + to_lift * ahead]
    points.append(points[0] + to_elbow * axis)
    for length, hinge, roll in ((to_wrist, t[3], t[2]), (0.16828, t[5], t[4])):
        up = jnp.cross(axis, side)
        new = cos(hinge)[..., None] * axis
        new += (sin(hinge) * sin(roll))[..., None] * side
        new -= (sin(hinge) * cos(roll))[..., None] * up
        turned = jnp.cross(new, axis)
        square = jnp.square(turned).sum(-1, keepdims=True)
        straight = square < 1e-60 if angles.dtype == jnp.float64 else square < 1e-30
        # The root is taken of 1 where the arm is straight, so that its gradient exists.
        size = jnp.sqrt(jnp.where(straight, 1, square))
        side = jnp.where(straight, side, turned / size)
        axis = new
        points.append(points[-1] + length * axis)
    return jnp.stack(points, -2)
