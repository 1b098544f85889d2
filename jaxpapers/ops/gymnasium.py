"""MuJoCo environments of gymnasium and gymnasium-robotics as JAX operations.

Their own Python code steps, rewards and observes, on the host. All that it depends on
is in the state: the physics, positions that it reads before a step, attributes such as
a goal, and the environment's random generator. So a step is a pure function.

``task`` has the rewards and observations of some of them as JAX functions of what
``ops.mujoco.Simulator`` reads: the same numbers, with gradients.
"""

import contextlib
import io
import math
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxpapers import extras
from jaxpapers.ops import mujoco
from jaxpapers.ops.host import on_host, vectorized

DERIVED = ("xpos", "xipos")
"""Arrays of MjData that environments read before they step, e.g. Ant's position."""
RANDOM = 10
"""Words of a PCG64 generator: state and increment of 128 bits, a cached half."""


class Outcome(NamedTuple):
    """What a step returns besides the state, in the program's float type.

    Attributes:
      observation: array, or dict of arrays.
      reward: of the step.
      terminated: whether the episode has ended; time limits are the caller's.
    """

    observation: Any
    reward: Any
    terminated: Any


class Environment:
    """An environment of gymnasium whose step is a pure function of its state.

    A state is an array (..., words) of uint32; leading axes are environments.

    Args:
      name: of gymnasium's registry, e.g. ``Reacher-v5``, ``PointMaze_Medium-v3``.
      carry: attributes of ``env.unwrapped`` that its steps read or change, float arrays
        of constant shape; mazes carry ``goal`` in any case.
      options: of ``gymnasium.make``.

    Attributes:
      unwrapped: the environment on the host.
      words: size of a state.
      low, high: bounds of an action.

    Raises:
      ModuleNotFoundError: gymnasium, gymnasium-robotics or MuJoCo is not installed.
      ValueError: no such environment, or one without MuJoCo.

    Example:
      >>> arm = Environment("Reacher-v5")
      >>> state, observation = arm.reset(jnp.arange(3, dtype=jnp.uint32))
      >>> state, outcome = jax.jit(arm.step)(state, jnp.zeros((3, 2)))
      >>> outcome.observation.shape, outcome.reward.shape
      ((3, 10), (3,))
    """

    def __init__(self, name: str, carry: tuple[str, ...] = (), **options: Any):
        self.unwrapped = unwrapped(name, **options)
        self.name, self._lock = name, threading.Lock()
        observation, _ = self.unwrapped.reset(seed=0)
        if hasattr(self.unwrapped, "goal") and "goal" not in carry:
            carry = (*carry, "goal")
        self.carry = {
            attribute: np.shape(getattr(self.unwrapped, attribute))
            for attribute in carry
        }
        space = self.unwrapped.action_space
        self.low, self.high = space.low, space.high
        self._observation = jax.tree.map(np.shape, observation)
        self._size = len(self._floats())
        self.words = 2 * self._size + RANDOM

    def reset(
        self, seeds: UInt32[Array, "..."], options: Mapping[str, Any] | None = None
    ) -> tuple[UInt32[Array, "... words"], Any]:
        """States and observations that ``env.reset(seed=, options=)`` gives.

        Args:
          seeds: e.g. ``jax.random.bits(key, (n,), jnp.uint32)``.
          options: of the environment's reset, e.g. ``goal_cell`` of a maze.

        Raises:
          TypeError: seeds that are not uint32.
        """
        seeds = jnp.asarray(seeds)
        if seeds.dtype != jnp.uint32:
            raise TypeError(f"seeds must be uint32, got {seeds.dtype}")

        def call(seeds):
            with self._lock:
                rows = [self._reset(int(seed), options) for seed in seeds.ravel()]
            return _stacked(rows, seeds.shape)

        def operation(seeds):
            lead = seeds.shape
            return on_host(call, (self._words(lead), self._observations(lead)))(seeds)

        return vectorized(operation)(seeds)

    def step(
        self, state: UInt32[Array, "... words"], action: Float[Array, "... nu"]
    ) -> tuple[UInt32[Array, "... words"], Outcome]:
        """States and outcomes of ``env.step(action)``.

        Raises:
          ValueError: shapes that do not fit. While running, as JAX's runtime error:
            actions that are not finite, simulations that became unstable.
        """
        state, action = jnp.asarray(state), jnp.asarray(action)
        lead = state.shape[:-1]
        expected = {"state": (*lead, self.words), "action": (*lead, *self.low.shape)}
        got = {"state": state.shape, "action": action.shape}
        if got != expected:
            raise ValueError(f"{self.name}: got shapes {got}, expected {expected}")
        if state.dtype != jnp.uint32:
            raise TypeError(f"a state is uint32 words, got {state.dtype}; see reset")

        def call(state, action):
            lead = state.shape[:-1]
            states = state.reshape(-1, self.words)
            actions = action.reshape(-1, action.shape[-1])
            mujoco.check_size({"the action": actions})
            with self._lock:
                rows = [self._step(*x, i) for i, x in enumerate(zip(states, actions))]
            return _stacked(rows, lead)

        def operation(state, action):
            lead = state.shape[:-1]
            number = jax.ShapeDtypeStruct(lead, jnp.result_type(float))
            flag = jax.ShapeDtypeStruct(lead, jnp.bool_)
            outcome = Outcome(self._observations(lead), number, flag)
            return on_host(call, (self._words(lead), outcome))(state, action)

        return vectorized(operation)(state, action)

    def _reset(self, seed: int, options: Any) -> tuple[np.ndarray, Any]:
        observation, _ = self.unwrapped.reset(
            seed=seed, **({"options": dict(options)} if options else {})
        )
        return self._save(), observation

    def _step(self, words: np.ndarray, action: np.ndarray, index: int):
        env = self.unwrapped
        self._load(words)
        count, time = mujoco.unstable(env.data), env.data.time
        observation, reward, terminated, _, _ = env.step(action)
        mujoco.check_stable(
            env.data, count, np.array([time]), np.array([env.data.time]), index
        )
        reward, terminated = np.float64(reward), np.bool_(terminated)
        return self._save(), Outcome(observation, reward, terminated)

    def _floats(self) -> np.ndarray:
        env = self.unwrapped
        physics = np.empty(mujoco.state_size(env.model))
        mujoco.read_state(env.model, env.data, physics)
        derived = [getattr(env.data, name).ravel() for name in DERIVED]
        carried = [np.ravel(np.float64(getattr(env, name))) for name in self.carry]
        return np.concatenate([physics, *derived, *carried])

    def _save(self) -> np.ndarray:
        """The words of the environment on the host."""
        generator = self.unwrapped.np_random.bit_generator.state
        inner = generator["state"]
        numbers = inner["state"].to_bytes(16, "little") + inner["inc"].to_bytes(
            16, "little"
        )
        cached = np.array([generator["has_uint32"], generator["uinteger"]], np.uint32)
        return np.concatenate(
            [mujoco.to_words(self._floats()), np.frombuffer(numbers, np.uint32), cached]
        )

    def _load(self, words: np.ndarray) -> None:
        """Makes the environment on the host that of the words."""
        env, floats = self.unwrapped, mujoco.from_words(words[:-RANDOM])
        end = mujoco.state_size(env.model)
        mujoco.write_state(env.model, env.data, floats[:end])
        for name in DERIVED:
            array = getattr(env.data, name)
            start, end = end, end + array.size
            array[:] = floats[start:end].reshape(array.shape)
        for name, shape in self.carry.items():
            start, end = end, end + math.prod(shape)
            setattr(env, name, floats[start:end].reshape(shape).copy())
        inner = words[-RANDOM:-2].tobytes()
        env.np_random.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {
                "state": int.from_bytes(inner[:16], "little"),
                "inc": int.from_bytes(inner[16:], "little"),
            },
            "has_uint32": int(words[-2]),
            "uinteger": int(words[-1]),
        }

    def _words(self, lead: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, self.words), jnp.uint32)

    def _observations(self, lead: tuple[int, ...]) -> Any:
        return jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct((*lead, *shape), jnp.result_type(float)),
            self._observation,
            is_leaf=lambda x: isinstance(x, tuple),
        )


def unwrapped(name: str, **options: Any) -> Any:
    """``gymnasium.make(name, **options).unwrapped``, without prints and warnings.

    Raises:
      ModuleNotFoundError: a package of the extra ``rl`` is not installed.
      ValueError: gymnasium cannot make it, or it is no MuJoCo environment.
    """
    gymnasium = module()
    with quiet():
        try:
            env = gymnasium.make(name, disable_env_checker=True, **options).unwrapped
        except (gymnasium.error.Error, TypeError) as e:
            raise ValueError(f"gymnasium cannot make {name!r}: {e}") from e
    if path := getattr(env, "tmp_xml_file_path", None):
        # Each maze leaves the model that it has read in the folder of temporary files.
        Path(path).unlink(missing_ok=True)
    if not (hasattr(env, "model") and hasattr(env, "data")):
        raise ValueError(
            f"{name} is no MuJoCo environment; ops.environments has classic control"
        )
    return env


def module() -> Any:
    """The package gymnasium, with the environments of gymnasium-robotics registered.

    Raises:
      ModuleNotFoundError: either, or MuJoCo, is not installed.
    """
    mujoco.module()
    with extras.named(), quiet():
        import gymnasium
        import gymnasium_robotics  # noqa: F401

    return gymnasium


@contextlib.contextmanager
def quiet():
    """Contains what the packages print and warn of: versions of other environments."""
    lost = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(lost),
        contextlib.redirect_stderr(lost),
    ):
        warnings.simplefilter("ignore")
        yield


class Task(NamedTuple):
    """An environment's definition, for ``Simulator(unwrapped(name).model, ...)``.

    Attributes:
      options: of ``Simulator``: frame_skip, bodies, before.
      observe: Reading -> observation.
      reward: (Reading, action) -> reward; of a maze (Reading, action, goal).
    """

    options: Mapping[str, Any]
    observe: Callable
    reward: Callable


def task(name: str) -> Task:
    """Rewards and observations as JAX functions.

    Args:
      name: ``Reacher-v5``, ``Pusher-v5``, ``InvertedPendulum-v5``, or a
        ``PointMaze_*-v3`` with sparse reward.

    Raises:
      ValueError: another name.
    """
    if name.startswith("PointMaze_") and "Dense" not in name:
        return TASKS["PointMaze"]
    if name not in TASKS or name == "PointMaze":
        raise ValueError(
            f"no JAX functions for {name}; there are {[*TASKS]}; Environment has others"
        )
    return TASKS[name]


def clip_velocity(model: Any, data: Any) -> None:
    """Velocities within 5 m/s before a step, as PointMaze's."""
    data.qvel[:] = np.clip(data.qvel, -5.0, 5.0)
    mujoco.module().mj_forward(model, data)


def _positions_and_velocities(r: mujoco.Reading) -> Array:
    return jnp.concatenate([r.qpos, r.qvel], -1)


def _reacher(r: mujoco.Reading) -> Array:
    angles, offset = r.qpos[..., :2], r.bodies[..., 0, :] - r.bodies[..., 1, :]
    parts = [jnp.cos(angles), jnp.sin(angles), r.qpos[..., 2:], r.qvel[..., :2]]
    return jnp.concatenate([*parts, offset[..., :2]], -1)


def _reacher_reward(r: mujoco.Reading, action: Array) -> Array:
    distance = jnp.linalg.norm(r.bodies[..., 0, :] - r.bodies[..., 1, :], axis=-1)
    return -distance - jnp.square(action).sum(-1)


def _pusher(r: mujoco.Reading) -> Array:
    bodies = r.bodies.reshape(*r.bodies.shape[:-2], 9)
    return jnp.concatenate([r.qpos[..., :7], r.qvel[..., :7], bodies], -1)


def _pusher_reward(r: mujoco.Reading, action: Array) -> Array:
    tip, thing, goal = (r.bodies[..., i, :] for i in range(3))
    near = jnp.linalg.norm(thing - tip, axis=-1)
    far = jnp.linalg.norm(thing - goal, axis=-1)
    return -far - 0.1 * jnp.square(action).sum(-1) - 0.5 * near


def _upright(r: mujoco.Reading, action: Array) -> Array:
    del action
    fallen = ~jnp.isfinite(_positions_and_velocities(r)).all(-1)
    return jnp.where(fallen | (jnp.abs(r.qpos[..., 1]) > 0.2), 0.0, 1.0)


def _at_goal(r: mujoco.Reading, action: Array, goal: Array) -> Array:
    del action
    return jnp.where(jnp.linalg.norm(r.qpos - goal, axis=-1) <= 0.45, 1.0, 0.0)


TASKS = {
    "Reacher-v5": Task(
        {"frame_skip": 2, "bodies": ("fingertip", "target")}, _reacher, _reacher_reward
    ),
    "Pusher-v5": Task(
        {"frame_skip": 5, "bodies": ("tips_arm", "object", "goal")},
        _pusher,
        _pusher_reward,
    ),
    "InvertedPendulum-v5": Task(
        {"frame_skip": 2}, _positions_and_velocities, _upright
    ),
    "PointMaze": Task({"before": clip_velocity}, _positions_and_velocities, _at_goal),
}  # fmt: skip


def _stacked(rows: list, lead: tuple[int, ...]) -> Any:
    """Equal pytrees as one whose arrays have the leading axes."""

    def stack(*arrays):
        array = np.stack(arrays)
        return array.reshape((*lead, *array.shape[1:]))

    return jax.tree.map(stack, *rows)
