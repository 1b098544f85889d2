"""Environments as pure functions: classic control, exploration, PETS on MuJoCo.

An environment is a frozen dataclass of constants. ``reset(key)`` gives a state, a pytree
of arrays; ``step(state, action, noise)`` the next state with an observation, a reward
and whether the episode has terminated; ``observe(state)`` the observation alone. Nothing
has side effects: ``jax.vmap`` runs many at once, ``lax.scan`` a whole
episode. Stepping goes on after termination, as in gymnasium; ``horizon`` is where
gymnasium truncates.

    env = PENDULUM_V1
    state = env.reset(key)
    state, observation, reward, terminated = env.step(state, action)

Dtypes follow the state: float32, or float64 under ``jax.enable_x64``.
"""

from jaxpapers.ops.environments.cart_pole import (
    STOCHASTIC_CART_POLE as STOCHASTIC_CART_POLE,
)
from jaxpapers.ops.environments.cart_pole import CartPole as CartPole
from jaxpapers.ops.environments.cart_pole import CartPoleState as CartPoleState
from jaxpapers.ops.environments.exploration import Chain as Chain
from jaxpapers.ops.environments.exploration import DeepSea as DeepSea
from jaxpapers.ops.environments.exploration import DeepSeaState as DeepSeaState
from jaxpapers.ops.environments.mountain_car import MountainCar as MountainCar
from jaxpapers.ops.environments.mountain_car import (
    MountainCarContinuous as MountainCarContinuous,
)
from jaxpapers.ops.environments.pendulum import PENDULUM_V1 as PENDULUM_V1
from jaxpapers.ops.environments.pendulum import (
    STOCHASTIC_PENDULUM as STOCHASTIC_PENDULUM,
)
from jaxpapers.ops.environments.pendulum import Pendulum as Pendulum
from jaxpapers.ops.environments.pets import PetsCartPole as PetsCartPole
from jaxpapers.ops.environments.pets import PhysicsState as PhysicsState
from jaxpapers.ops.environments.pets import Pusher as Pusher
from jaxpapers.ops.environments.pets import Reacher3D as Reacher3D
from jaxpapers.ops.environments.pets import arm_points as arm_points
from jaxpapers.ops.environments.spaces import Box as Box
from jaxpapers.ops.environments.spaces import Discrete as Discrete
from jaxpapers.ops.environments.spaces import Step as Step
