"""Two environments that only deep exploration solves: Deep Sea and a chain."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxpapers.ops.environments.spaces import (
    Box,
    Discrete,
    Step,
    check,
    index,
    standard_normal,
)


class DeepSeaState(NamedTuple):
    """State of Deep Sea.

    Attributes:
      row: (), int32, the step of the episode; size after the last.
      column: (), int32.
      right: (N, N), int32, the action that moves right in each cell.
    """

    row: Any
    column: Any
    right: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSea:
    """Deep Sea of N x N cells, as in bsuite.

    A diver starts in the upper left cell, sinks one row a step and moves a column left
    or right. Moving right costs ``cost`` / N; the right action in the last column, which
    only the one path of N right moves reaches, pays 1. Which of the two actions moves
    right is drawn for every cell. The best return is 1 - ``cost``; an agent that dithers
    needs about 2^N episodes to see it once.

    Attributes:
      size: N.
      cost: of N right moves.
      windy: whether right moves fail with probability 1 / N and the rewards of the lower
        corners have standard normal noise.
      mapping_seed: of the actions' meaning, as bsuite draws it; None: 1 is right
        everywhere.

    Reference: Osband et al., Behaviour Suite for Reinforcement Learning, ICLR 2020,
    arXiv 1908.03568.
    """

    size: int = 10
    cost: float = 0.01
    windy: bool = False
    mapping_seed: int | None = 0

    def __post_init__(self):
        check("DeepSea", size=self.size)

    @property
    def horizon(self) -> int:
        """Steps of an episode: N."""
        return self.size

    @property
    def action_space(self) -> Discrete:
        """Two moves."""
        return Discrete(2)

    @property
    def observation_space(self) -> Box:
        """The cells, flattened row by row."""
        count = self.size**2
        return Box((0.0,) * count, (1.0,) * count)

    def mapping(self) -> np.ndarray:
        """(N, N), the action that moves right in each cell."""
        shape = (self.size, self.size)
        if self.mapping_seed is None:
            return np.ones(shape, np.int32)
        rng = np.random.RandomState(self.mapping_seed)
        return rng.binomial(1, 0.5, shape).astype(np.int32)

    def reset(
        self, key: Key[Array, ""] | None = None, right: Any = None
    ) -> DeepSeaState:
        """The first state of an episode.

        Args:
          key: not read: every episode starts in the same cell.
          right: (N, N), the actions that move right; None: ``mapping()``. Members of a
            population can have one each.
        """
        del key
        right = jnp.asarray(self.mapping() if right is None else right, jnp.int32)
        zero = jnp.zeros((), jnp.int32)
        return DeepSeaState(zero, zero, right)

    def observe(self, state: DeepSeaState) -> Float[Array, " cells"]:
        """(N^2,), one in the diver's cell, row by row; all zero after the last step."""
        cell = state.row * self.size + state.column
        return jax.nn.one_hot(cell, self.size**2, dtype=float)

    def step(self, state: DeepSeaState, action: Any, noise: Any = None) -> Step:
        """One step.

        Args:
          state: see ``DeepSeaState``.
          action: (), 0 or 1.
          noise: for a windy sea a key, or (2,): a standard normal number for the reward
            and a uniform one, below 1 / N where a right move fails; None: no wind.

        Raises:
          ValueError, TypeError: an action that is no scalar or no integer.
        """
        n, row, column = self.size, state.row, state.column
        right = index(action, 2) == state.right[jnp.minimum(row, n - 1), column]
        reward = (right & (column == n - 1)).astype(float)
        reward -= jnp.where(right, self.cost / n, 0)
        moves = right
        if self.windy and noise is not None:
            normal, uniform = _wind(noise)
            corner = (row == n - 1) & ((column == 0) | (column == n - 1))
            reward += jnp.where(corner, normal, 0)
            moves = right & (uniform > 1 / n)
        column = jnp.where(moves, column + 1, jnp.where(right, column, column - 1))
        after = DeepSeaState(row + 1, jnp.clip(column, 0, n - 1), state.right)
        return Step(after, self.observe(after), reward, after.row >= n)


def _wind(noise: Any) -> tuple[Any, Any]:
    if jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        one, other = jax.random.split(noise)
        return jax.random.normal(one), jax.random.uniform(other)
    if noise.shape != (2,):
        raise ValueError(f"noise must have shape (2,), got {noise.shape}")
    return noise[0], noise[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chain:
    """Positions in [0, 1], moves left or right: the left end pays little, the right much.

    A state is a position. The reward is that of the position after the move.

    Attributes:
      start: position of every reset.
      move: length of a move.
      noise: standard deviation of a move.
      near: distance from an end within which it pays.
      left, right: what the ends pay.
      horizon: steps of an episode.
    """

    start: float = 0.2
    move: float = 0.1
    noise: float = 0.01
    near: float = 0.05
    left: float = 0.01
    right: float = 1.0
    horizon: int = 20

    def __post_init__(self):
        check("Chain", move=self.move, near=self.near, horizon=self.horizon)
        if not 0 <= self.start <= 1:
            raise ValueError(f"Chain.start must lie in [0, 1], got {self.start}")

    @property
    def action_space(self) -> Discrete:
        """Left, right."""
        return Discrete(2)

    @property
    def observation_space(self) -> Box:
        """Of the position."""
        return Box((0.0,), (1.0,))

    def reset(self, key: Key[Array, ""] | None = None) -> Float[Array, ""]:
        """The first state of an episode; the key is not read."""
        del key
        return jnp.asarray(self.start, float)

    def observe(self, state: Float[Array, ""]) -> Float[Array, "1"]:
        """The position."""
        return state[None]

    def step(self, state: Float[Array, ""], action: Any, noise: Any = None) -> Step:
        """One step.

        Args:
          state: the position.
          action: (), 0 (left) or 1 (right).
          noise: a key, or (1,) a standard normal number; None: none is added.

        Raises:
          ValueError, TypeError: an action that is no scalar or no integer.
        """
        way = self.move * (2 * index(action, 2) - 1).astype(state.dtype)
        eps = self.noise * standard_normal(noise, 1, state.dtype)[0]
        state = jnp.clip(state + way + eps, 0, 1)
        low = jnp.where(state <= self.near, self.left, 0).astype(state.dtype)
        reward = low + jnp.where(state >= 1 - self.near, self.right, 0)
        return Step(state, self.observe(state), reward, jnp.zeros((), bool))
