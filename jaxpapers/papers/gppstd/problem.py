"""An environment as the process sees it: inputs in [0, 1], experts to learn from."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxpapers.ops import environments as envs
from jaxpapers.ops import gaussian_process as gp
from jaxpapers.papers.gppstd.options import Prior


@dataclasses.dataclass(frozen=True)
class Problem:
    """An environment with its inputs.

    Attributes:
      environment: of ``ops.environments``, or any with ``reset``, ``step``, ``observe``,
        ``action_space``, ``observation_space`` and ``horizon``.

    Raises:
      ValueError: observations without bounds, which have no range to be scaled to.
    """

    environment: Any

    def __post_init__(self):
        low, high = self.bounds
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(
                f"{type(self.environment).__name__} has observations without bounds, "
                f"{low} to {high}; inputs of the process are scaled to [0, 1]"
            )

    @property
    def bounds(self) -> tuple[Any, Any]:
        """Of the inputs before they are scaled."""
        if isinstance(self.environment, envs.DeepSea):
            return np.zeros(2), np.full(2, max(self.environment.size - 1, 1))
        space = self.environment.observation_space
        return np.asarray(space.low, float), np.asarray(space.high, float)

    @property
    def width(self) -> int:
        """Numbers of a state."""
        return len(self.bounds[0])

    @property
    def actions(self) -> int:
        """Number of discrete actions; 0 where they are continuous."""
        space = self.environment.action_space
        return space.n if isinstance(space, envs.Discrete) else 0

    @property
    def action_width(self) -> int:
        """Columns of an action: its index, or its components."""
        return 1 if self.actions else len(self.environment.action_space.low)

    @property
    def horizon(self) -> int:
        """Steps of an episode."""
        return self.environment.horizon

    def layout(self, key: Key[Array, ""]) -> Any:
        """What is drawn once in an agent's life: of Deep Sea, which action moves right.

        Without a ``mapping_seed`` 1 is right everywhere.
        """
        environment = self.environment
        if not isinstance(environment, envs.DeepSea):
            return ()
        if environment.mapping_seed is None:
            return jnp.asarray(environment.mapping())
        shape = (environment.size, environment.size)
        return jax.random.bernoulli(key, 0.5, shape).astype(jnp.int32)

    def reset(self, key: Key[Array, ""], layout: Any) -> Any:
        """The first state of an episode."""
        if isinstance(self.environment, envs.DeepSea):
            return self.environment.reset(key, layout)
        return self.environment.reset(key)

    def inputs(self, state: Any) -> Float[Array, " D"]:
        """A state in [0, 1]^D: its observation; of Deep Sea row and column.

        Values of Deep Sea are those of neighbours then, not of N^2 unrelated cells.
        """
        if isinstance(self.environment, envs.DeepSea):
            seen = jnp.stack([state.row, state.column])
        else:
            seen = self.environment.observe(state)
        low, high = (x.astype(np.float32) for x in self.bounds)
        return (seen - low) / (high - low)

    def action(self, columns: Float[Array, " A"]) -> Any:
        """The environment's action of its columns."""
        if self.actions:
            return columns[0].astype(jnp.int32)
        space = self.environment.action_space
        low, high = (np.asarray(x, np.float32) for x in (space.low, space.high))
        return low + columns * (high - low)

    def columns(self, action: Any) -> Float[Array, " A"]:
        """The inverse of ``action``."""
        if self.actions:
            return jnp.asarray(action, jnp.float32)[None]
        space = self.environment.action_space
        low, high = (np.asarray(x, np.float32) for x in (space.low, space.high))
        return (jnp.asarray(action) - low) / (high - low)

    def uniform(self, key: Key[Array, ""]) -> Float[Array, " A"]:
        """Columns of an action at random."""
        if self.actions:
            return jax.random.randint(key, (1,), 0, self.actions).astype(jnp.float32)
        return jax.random.uniform(key, (self.action_width,))

    def expert(self, state: Any) -> Float[Array, " A"]:
        """Columns of what somebody who knows the problem does.

        Mountain car: push the way that it moves, which pumps energy. Deep Sea and
        chain: right.

        Raises:
          ValueError: no expert of this environment is known.
        """
        environment = self.environment
        if isinstance(environment, envs.MountainCarContinuous):
            return self.columns(jnp.where(state[1] < 0, -1.0, 1.0)[None])
        if isinstance(environment, envs.MountainCar):
            return self.columns(jnp.where(state[1] < 0, 0, 2))
        if isinstance(environment, envs.DeepSea):
            row = jnp.minimum(state.row, environment.size - 1)
            return self.columns(state.right[row, state.column])
        if isinstance(environment, envs.Chain):
            return self.columns(1)
        return self.expert_known()

    def expert_known(self) -> Any:
        """Raises ValueError for an environment without ``expert``."""
        known = (envs.MountainCar, envs.DeepSea, envs.Chain)
        if not isinstance(self.environment, known):
            raise ValueError(
                f"no expert of {type(self.environment).__name__} is known; choose "
                "method.demonstrations of none or random"
            )

    def params(self, prior: Prior) -> dict[str, Any]:
        """Logs of the prior's hyper-parameters: what the ascent of the evidence moves.

        Raises:
          ValueError: another number of lengths than of inputs.
        """
        return {
            name: getattr(self.model(prior), name)
            for name in ("log_variance", "log_lengths", "log_noise")
        }

    def model(self, prior: Prior, params: Any = None) -> gp.Model:
        """The process of a prior, with other hyper-parameters if ``params`` are given."""
        lengths = prior.lengths
        if len(lengths) not in (1, self.width):
            raise ValueError(
                f"prior.lengths must be 1 or {self.width} numbers, one for each input, "
                f"got {lengths}"
            )
        lengths = lengths * self.width if len(lengths) == 1 else lengths
        if not self.actions:
            lengths = (*lengths, *[prior.action_length] * self.action_width)
        fixed = gp.model(
            prior.variance, lengths, prior.noise, kind=prior.kind, actions=self.actions,
            mean=prior.mean,
        )  # fmt: skip
        return fixed if params is None else dataclasses.replace(fixed, **params)

    def box(self, prior: Prior) -> tuple[gp.Model, gp.Model]:
        """Bounds of the ascent of the evidence.

        Lengths 0.01 to 10 ranges, noise 1e-4 to 1, both widened to a start outside; the
        variance within a factor of 100 of its start.
        """
        start = self.model(prior)
        logs: dict[str, Any] = {
            "log_variance": (
                start.log_variance - math.log(100),
                start.log_variance + math.log(100),
            ),
            "log_lengths": (
                np.minimum(start.log_lengths, np.log(0.01)),
                np.maximum(start.log_lengths, np.log(10.0)),
            ),
            "log_noise": (
                np.minimum(start.log_noise, np.log(1e-4)),
                np.maximum(start.log_noise, 0.0),
            ),
        }
        single: list[dict[str, Any]] = [
            {k: np.asarray(v[i], np.float32) for k, v in logs.items()} for i in (0, 1)
        ]
        low, high = (dataclasses.replace(start, **x) for x in single)
        return low, high
