"""An agent and its episodes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Key

from jaxpapers.ops import planning
from jaxpapers.papers.mpc_psrl.models import Model, evaluator, planner_space
from jaxpapers.papers.mpc_psrl.network import Net
from jaxpapers.papers.mpc_psrl.options import Options, Problem


class Agent(NamedTuple):
    """Everything that defines a learning agent.

    Attributes:
      problem: environment and oracle.
      net, options, planner: hyper-parameters.
      episodes: that the buffers hold.
    """

    problem: Problem
    net: Net
    options: Options
    planner: planning.Options
    episodes: int


class Episode(NamedTuple):
    """What happened in an episode of T steps.

    Attributes:
      observations: (T + 1, S).
      actions: (T, A).
      rewards: (T,).
      values: (T,), return of the best plan in the model; 0 for random actions.
    """

    observations: Any
    actions: Any
    rewards: Any
    values: Any


def run_episode(
    model: Model, key: Key[Array, ""], random: Any, agent: Agent
) -> Episode:
    """An episode of uniform actions or of plans in a model.

    Args:
      model: of ``draw``.
      key: of the environment and of the plans.
      random: (), bool: uniform actions.
      agent: problem, options and planner.
    """
    env, space = agent.problem.environment, planner_space(agent.problem, agent.options)
    evaluate = evaluator(model, agent.problem, agent.options)
    low, high = (jnp.asarray(x, jnp.float32) for x in env.action_space)
    key_reset, key_steps = jax.random.split(key)
    state = env.reset(key_reset)

    def plan(observation, warm, key):
        found = planning.plan(evaluate, observation, key, warm, agent.planner, space)
        return found.action[: len(low)], found.warm, found.value

    def guess(observation, warm, key):
        action = jax.random.uniform(key, low.shape, low.dtype, low, high)
        return action, warm, jnp.zeros((), low.dtype)

    def body(carry, key):
        state, observation, warm = carry
        key_plan, key_noise = jax.random.split(key)
        action, warm, value = lax.cond(random, guess, plan, observation, warm, key_plan)
        step = env.step(state, action, key_noise)
        after = step.observation
        return (step.state, after, warm), (observation, action, step.reward, value)

    start = (state, env.observe(state), planning.start(agent.planner, space))
    keys = jax.random.split(key_steps, env.horizon)
    (_, last, _), (seen, actions, rewards, values) = lax.scan(body, start, keys)
    return Episode(jnp.concatenate([seen, last[None]]), actions, rewards, values)
