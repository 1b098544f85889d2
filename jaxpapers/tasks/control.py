"""Continuous control: an agent learns an environment within a few episodes."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import frames
from jaxpapers.ops import environments as envs
from jaxpapers.papers import mpc_psrl
from jaxpapers.study import Data, Finding, Row, Stage, Study, with_fields, with_seed

LAST = 5
"""Episodes of which the compared return is the mean."""


class World(NamedTuple):
    """An environment of this task.

    Attributes:
      environment: see ``ops.environments``.
      oracle: the reward that the planner is given.
      solved: return of an episode that counts as solved; None: nobody has said, or
        the episodes have another length.
    """

    environment: Any
    oracle: Any
    solved: float | None = None


WORLDS = {
    "cartpole": World(envs.STOCHASTIC_CART_POLE, mpc_psrl.rewards.cart_pole, 195.0),
    "pendulum": World(envs.STOCHASTIC_PENDULUM, mpc_psrl.rewards.pendulum, -450.0),
    "swing_up": World(envs.PetsCartPole(), mpc_psrl.rewards.pets_cart_pole),
    "reacher3d": World(envs.Reacher3D(), mpc_psrl.rewards.reacher),
    "pusher": World(envs.Pusher(), mpc_psrl.rewards.pusher),
}
"""Those that need MuJoCo ask for it when they are stepped."""


def world(config: Any) -> World:
    """The environment that ``config.data.environment`` names.

    Raises:
      ValueError: unknown name, or a length below 1.
    """
    name, length = config.data.environment, config.data.length
    if name not in WORLDS:
        raise ValueError(f"data.environment must be one of {[*WORLDS]}, got {name!r}")
    if length < 0:
        raise ValueError(f"data.length must be >= 0, got {length}")
    found = WORLDS[name]
    if not length:
        return found
    shorter = dataclasses.replace(found.environment, horizon=length)
    return found._replace(environment=shorter, solved=None)


def abstract(config: Any) -> Data:
    """The environment; there is no data."""
    found = world(config)
    problem = mpc_psrl.Problem(found.environment, found.oracle)
    length = found.environment.horizon
    return Data(None, {}, {"problem": problem}, work=length, unit="environment steps")


def read(config: Any) -> Data:
    """The environment; there is no data."""
    found = world(config).environment
    return abstract(config)._replace(
        summary=f"{config.data.environment}: episodes of {found.horizon} steps"
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The agent, other agents on its model, another planner, random actions."""
    del data, mesh
    found = world(config)
    measure = functools.partial(_measure, found)
    variants = {
        "certainty equivalence": {"method.agent": "mean"},
        "H-UCRL": {"method.agent": "optimistic"},
        "PETS": {"method.agent": "ensemble"},
        "random shooting": {"planner.name": "shooting"},
        "learned reward": {"method.reward": "learned"},
    }

    def rows(seed):
        own = with_seed(config, seed)
        others = {
            label: with_fields(own, fields)
            for label, fields in variants.items()
            if any(_field(own, k) != v for k, v in fields.items())
        }
        return [
            Row("this model", Stage(name, own), measure),
            *(Row(label, Stage(name, c), measure) for label, c in others.items()),
            Row("random actions", None, functools.partial(_random, found, seed)),
        ]

    return Study(
        title=f"return of {config.data.environment}, mean of the last {LAST} of "
        f"{config.train.steps} episodes of {found.environment.horizon} steps",
        metric="return",
        rising=True,
        rows=rows,
        columns=("total", "solved", "steps_to_solve"),
        pictures={
            "frames.png": functools.partial(
                frames.episodes, kind=config.data.environment
            )
        },
        states=("frames.png",),
        curve="return",
        unit="return",
    )


def _field(config: Any, name: str) -> Any:
    group, field = name.split(".")
    return config[group][field]


def _measure(found: World, method: Any, state: Any) -> Finding:
    """Returns of the episodes so far, and the observations of the last one."""
    del method
    done, extra = int(state.step), jax.device_get(state.extra)
    kept = len(extra["returns"])
    # The oldest are overwritten where the buffer is shorter than the run.
    order = [k % kept for k in range(max(done - kept, 0), done)]
    length = found.environment.horizon
    files = {}
    if done:
        rows = slice(order[-1] * length, (order[-1] + 1) * length)
        files["episode.npz"] = {
            "observations": extra["x"][rows, : extra["y"].shape[1]],
            "rewards": extra["r"][rows],
        }
    return _finding(found, extra["returns"][order], done)._replace(files=files)


def _finding(found: World, returns: np.ndarray, done: int) -> Finding:
    length = found.environment.horizon
    first = done - len(returns)
    numbers = {
        "return": float(returns[-LAST:].mean()) if done else 0.0,
        "total": float(returns.sum()),
        "episodes": float(done),
    }
    if found.solved is not None:
        solved = np.flatnonzero(returns >= found.solved)
        numbers["solved"] = float(len(solved) > 0)
        if len(solved):
            numbers["steps_to_solve"] = float((first + solved[0] + 1) * length)
    steps = [length * (first + k + 1) for k in range(len(returns))]
    curve = (steps, [float(x) for x in returns])
    return Finding(numbers, curves={"return against environment steps": curve})


def _random(found: World, seed: int, episodes: int = LAST) -> Finding:
    """Episodes of uniform actions."""
    env = found.environment
    low, high = (np.float32(x) for x in env.action_space)

    def episode(key):
        key_reset, key_steps = jax.random.split(key)

        def body(state, key):
            key_action, key_noise = jax.random.split(key)
            action = jax.random.uniform(key_action, low.shape, jnp.float32, low, high)
            step = env.step(state, action, key_noise)
            return step.state, step.reward

        keys = jax.random.split(key_steps, env.horizon)
        return jax.lax.scan(body, env.reset(key_reset), keys)[1].sum()

    keys = jax.random.split(jax.random.key(seed), episodes)
    returns = np.asarray(jax.jit(lambda keys: jax.lax.map(episode, keys))(keys))
    return _finding(found, returns, episodes)._replace(curves={})
