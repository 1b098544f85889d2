"""Acting: greedy on a drawn function, an episode at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.papers.gppstd.buffer import Transitions
from jaxpapers.papers.gppstd.options import Options
from jaxpapers.papers.gppstd.problem import Problem
from jaxpapers.papers.gppstd.values import (
    Values,
    candidates,
    q_values,
    with_actions,
)

TIE = 1e-6
"""Values closer than this, in units of the prior's standard deviation, are equal."""


class Episode(NamedTuple):
    """What happened.

    Attributes:
      rows: (horizon, ...) transitions, see ``Transitions``.
      inputs: (horizon + 1, D), the states, for pictures.
      reward: (horizon,), unscaled, 0 after the end.
      steps: () int32, until the end.
      terminated: () bool, before the horizon or at it.
    """

    rows: Transitions
    inputs: Any
    reward: Any
    steps: Any
    terminated: Any


def act(
    key: Key[Array, ""],
    values: Values,
    state: Float[Array, " D"],
    problem: Problem,
    options: Options,
) -> Float[Array, " A"]:
    """Columns of the action of one stage's function: argmax_a Q(s, a), or at random.

    Discrete actions: ties are broken uniformly. Continuous ones: the best of
    ``options.candidates`` uniform actions, then gradient steps that halve where they do
    not lead up.

    Args:
      key: of ties, candidates and exploration.
      values: of one stage, without its axis.
      state: in [0, 1]^D.
      problem, options: of the agent.
    """
    key_tie, key_tried, key_mix, key_random = jax.random.split(key, 4)
    tried = candidates(key_tried, problem, options)
    q = q_values(values, with_actions(state[None], tried), options)
    if problem.actions:
        near = TIE * jnp.sqrt(values.function.model.variance)
        best = q >= q.max() - near
        action = tried[jax.random.categorical(key_tie, jnp.where(best, 0.0, -jnp.inf))]
    else:
        action = _ascend(values, state, tried[q.argmax()], options)
    if options.explore == "epsilon":
        mixed = jax.random.uniform(key_mix) < options.epsilon
        action = jnp.where(mixed, problem.uniform(key_random), action)
    return action


def _ascend(values, state, action, options) -> Array:
    """A local maximum of Q(s, .) from an action, in the box [0, 1]^A."""

    def value(action):
        return q_values(values, jnp.concatenate([state, action])[None], options)[0]

    def step(carry, _):
        action, top, size = carry
        slope = jax.grad(value)(action)
        way = slope / jnp.maximum(jnp.linalg.norm(slope), 1e-12)
        moved = jnp.clip(action + size * way, 0, 1)
        height = value(moved)
        up = height > top
        action = jnp.where(up, moved, action)
        return (action, jnp.maximum(top, height), jnp.where(up, size, size / 2)), None

    start = (action, value(action), jnp.asarray(0.1, action.dtype))
    return lax.scan(step, start, None, options.ascent)[0][0]


def run(
    key: Key[Array, ""],
    start: Any,
    policy: Any,
    first_time: Any,
    problem: Problem,
    options: Options,
) -> Episode:
    """One episode of a policy.

    Args:
      key: of the policy and of the environment's noise.
      start: the environment's first state.
      policy: (key, state of the environment, step) -> columns of an action.
      first_time: number of the first transition in the agent's life.
      problem, options: of the agent.
    """
    key_first, key_steps = jax.random.split(key)

    def step(carry, xs):
        state, action, alive = carry
        t, key = xs
        key_noise, key_policy = jax.random.split(key)
        after, _, reward, done = problem.environment.step(
            state, problem.action(action), key_noise
        )
        follower = policy(key_policy, after, t + 1)
        row = Transitions(
            jnp.concatenate([problem.inputs(state), action]),
            options.reward_scale * reward,
            problem.inputs(after),
            follower,
            done,
            first_time + t,
            alive,
        )
        return (after, follower, alive & ~done), (row, jnp.where(alive, reward, 0))

    action = policy(key_first, start, jnp.zeros((), jnp.int32))
    xs = (jnp.arange(problem.horizon), jax.random.split(key_steps, problem.horizon))
    carry = (start, action, jnp.ones((), bool))
    (_, _, alive), (rows, reward) = lax.scan(step, carry, xs)
    seen = jnp.concatenate([problem.inputs(start)[None], rows.successor])
    return Episode(rows, seen, reward, rows.mask.sum().astype(jnp.int32), ~alive)


def greedy(values: Values, problem: Problem, options: Options) -> Any:
    """The policy of drawn functions, for ``run``: step t acts on stage t's."""
    # No action needs the factor, the largest part of a posterior.
    light = values._replace(post=values.post._replace(root=None))
    count = len(values.target)

    def policy(key, state, t):
        index = jnp.minimum(t, count - 1)
        stage = jax.tree.map(lambda v: v[index], light)
        return act(key, stage, problem.inputs(state), problem, options)

    return policy


def demonstrator(problem: Problem, options: Options) -> Any:
    """The policy of ``options.demonstrations``, for ``run``.

    expert and partial: the expert's; noisy: with 30 percent uniform actions; random:
    uniform ones alone.
    """
    kind = options.demonstrations

    def policy(key, state, t):
        del t
        key_mix, key_random = jax.random.split(key)
        random = problem.uniform(key_random)
        if kind == "random":
            return random
        expert = problem.expert(state)
        if kind != "noisy":
            return expert
        return jnp.where(jax.random.uniform(key_mix) < 0.3, random, expert)

    return policy


def demonstrate(
    key: Key[Array, ""], starts: Any, problem: Problem, options: Options
) -> Episode:
    """Episodes of ``options.demonstrations``, (episodes, horizon, ...).

    "partial" keeps the first half of each.

    Args:
      key: of the policy and the environment.
      starts: first states, with a leading axis of episodes.
      problem, options: of the agent.
    """
    policy = demonstrator(problem, options)
    count = options.demonstration_episodes
    # Times of demonstrations come before those of the agent, and do not touch.
    first = (jnp.arange(count) - count) * (problem.horizon + 1)

    def one(xs):
        key, start, first = xs
        return run(key, start, policy, first, problem, options)

    episodes = lax.map(one, (jax.random.split(key, count), starts, first))
    if options.demonstrations == "partial":
        half = jnp.arange(problem.horizon)[None] < (episodes.steps[:, None] + 1) // 2
        rows = episodes.rows
        episodes = episodes._replace(rows=rows._replace(mask=rows.mask & half))
    return episodes
