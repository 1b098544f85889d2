"""Transitions in buffers of a fixed size, one for each stage."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxpapers.ops import gaussian_process as gp
from jaxpapers.papers.gppstd.options import Options
from jaxpapers.papers.gppstd.problem import Problem


class Transitions(NamedTuple):
    """Rows of transitions; leading axes as the place has them.

    Attributes:
      x: (..., D + A), state and action.
      reward: scaled.
      successor: (..., D), the next state.
      follower: (..., A), the action there.
      done: bool, the episode terminated: no value follows.
      time: int32, number of the transition in the agent's life; of a transition that
        starts where another ended one more than that one's.
      mask: bool, False for padding.
    """

    x: Any
    reward: Any
    successor: Any
    follower: Any
    done: Any
    time: Any
    mask: Any


def stages(problem: Problem, options: Options) -> int:
    """Number of processes: one for each step of an episode, or one."""
    return problem.horizon if options.form == "staged" else 1


def empty(problem: Problem, options: Options) -> Transitions:
    """A buffer without transitions, (stages, rows, ...)."""
    shape = (stages(problem, options), options.buffer)
    return Transitions(
        jnp.zeros((*shape, problem.width + problem.action_width)),
        jnp.zeros(shape),
        jnp.zeros((*shape, problem.width)),
        jnp.zeros((*shape, problem.action_width)),
        jnp.zeros(shape, bool),
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
    )


def add(
    buffer: Transitions, episode: Transitions, model: gp.Model, options: Options
) -> Transitions:
    """The buffer with an episode's transitions.

    Args:
      buffer: (stages, rows, ...).
      episode: (horizon, ...); step t belongs to stage t, or all to the only stage.
      model: whose conditional variance says which to keep, when they do not fit.
      options: of the agent.
    """
    count = len(buffer.mask)
    new = jax.tree.map(
        lambda v: v[:, None] if count > 1 or len(v) == 1 else v[None], episode
    )
    return lax.map(lambda both: _added(both[0], both[1], model, options), (buffer, new))


def _added(old, new, model, options) -> Transitions:
    """One stage's buffer with more rows; its observations come first, in order."""
    every = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), old, new)
    rows = len(old.mask)

    def all_fit() -> tuple[Int[Array, " n"], Any]:
        kept = jnp.argsort(~every.mask, stable=True)[:rows].astype(jnp.int32)
        return kept, every.mask[kept]

    def choose() -> tuple[Int[Array, " n"], Any]:
        kept, real = gp.keep_by_variance(model, every.x, every.mask, rows)
        return kept.astype(jnp.int32), real

    if options.eviction == "none":
        kept, mask = all_fit()
    else:
        kept, mask = lax.cond(every.mask.sum() <= rows, all_fit, choose)
    return jax.tree.map(lambda v: v[kept], every)._replace(mask=mask)


def check_fits(problem: Problem, options: Options, episodes: int) -> None:
    """Refuses a run whose transitions do not fit, if none may be evicted.

    Raises:
      ValueError: names what is needed.
    """
    per_episode = 1 if options.form == "staged" else problem.horizon
    needed = per_episode * (episodes + options.demonstration_episodes)
    if options.eviction == "none" and needed > options.buffer:
        raise ValueError(
            f"method.buffer={options.buffer} holds no {needed} transitions "
            f"({episodes} episodes and {options.demonstration_episodes} demonstrations "
            "with at most "
            f"{per_episode} each); raise it, or set method.eviction=variance"
        )


def states(rows: Transitions) -> Float[Array, "n D"]:
    """The states of one stage's rows."""
    return rows.x[:, : rows.successor.shape[-1]]
