"""Baselines and advantages of DPOK's rounds."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.method import State
from jaxpapers.ops import policy
from jaxpapers.ops.policy import PromptStats
from jaxpapers.papers.dpok.rounds import Bound, Round, Transitions, transitions


def value_loss(
    v: Callable, batch: Transitions, reward: Float[Array, " B"]
) -> Float[Array, ""]:
    """Mean of (V(x_k, k, z) - r)^2 over transitions."""
    return jnp.square(v(batch.x, batch.k, batch.word) - reward).mean()


def fit_value(
    state: State,
    found: Round,
    key: Key[Array, ""],
    bound: Bound,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[dict, Any, dict[str, Array]]:
    """Fits the value net to a round's rewards: its parameters, optimizer state, metrics.

    Args:
      state: before the round.
      found: the round.
      key: of the steps that are looked at.
      bound: see ``Bound``.
      txs: optimizers; "value" is used.
    """
    c = bound.options
    rows, steps = len(found.reward), len(bound.chain.std)
    reward = jnp.repeat(found.reward, c.value_transitions)

    def step(carry, key):
        params, opt = carry
        k = jax.random.uniform(key, (rows, steps)).argsort(-1)[:, : c.value_transitions]
        chosen = transitions(found, k)

        def objective(params):
            v = functools.partial(bound.parts.value, params)
            return value_loss(v, chosen, reward)

        value, grads = jax.value_and_grad(objective)(params)
        updates, opt = txs["value"].update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    carry = (state.params["value"], state.opt_state["value"])
    keys = jax.random.split(key, c.value_steps)
    (value, opt), losses = lax.scan(step, carry, keys)
    middle = jnp.full((rows, 1), steps // 2)
    seen = transitions(found, middle)
    explained = policy.explained_variance(
        bound.parts.value(value, seen.x, seen.k, seen.word), found.reward
    )
    return value, opt, {"value_loss": losses.mean(), "explained_variance": explained}


def advantages(
    state: State, found: Round, bound: Bound
) -> tuple[Float[Array, " B"], PromptStats, Float[Array, ""]]:
    """Advantages that are the same along a chain, for all but ``advantage="value"``.

    Returns:
      The advantages, the prompts' statistics with this round, and the share of prompts
      whose rewards are all equal.
    """
    c = bound.options
    group, equal = policy.group_advantage(found.reward, found.prompt, c.prompts)
    stats = state.extra["stats"]
    stats = policy.push_prompt_stats(stats, found.reward, found.prompt)
    if c.advantage == "group":
        return group, stats, equal
    if c.advantage == "prompt":
        own = policy.prompt_advantage(stats, found.reward, found.prompt)
        return own, stats, equal
    return policy.standardize(found.reward), stats, equal


def value_advantage(
    value: dict, found: Round, chosen: Transitions, bound: Bound
) -> Float[Array, " B"]:
    """r(y, z) - V(x_k, k, z) of transitions of a round, as ``transitions`` gave them.

    Args:
      value: parameters of the value net.
      found: the round.
      chosen: as many steps of each of its chains.
      bound: see ``Bound``.
    """
    each = len(chosen.k) // len(found.reward)
    v = bound.parts.value(value, chosen.x, chosen.k, chosen.word)
    return jnp.repeat(found.reward, each) - v


def later_cost(
    later: Float[Array, "B S"], k: Int[Array, "B N"], beta: Any, alpha: Any
) -> Float[Array, " M"]:
    """What the KLs after steps k cost, in units of the reward: beta / alpha of them."""
    return beta / alpha * jnp.take_along_axis(later, k, 1).reshape(-1)


def keep_round(state: State, found: Round, c: Any) -> tuple[Round, Any, Any]:
    """Kept rounds with this one, how many are there, and where the newest is.

    Args:
      state: before the round; ``extra["pool"]`` where ``c.rounds`` > 1.
      found: the round.
      c: ``config.method``.
    """
    newest = state.step % c.rounds
    if c.rounds == 1:
        return jax.tree.map(lambda v: v[None], found), 1, newest
    pool = jax.tree.map(
        lambda kept, v: kept.at[newest].set(v), state.extra["pool"], found
    )
    return pool, jnp.minimum(state.step + 1, c.rounds), newest


def reward_metrics(found: Round, c: Any) -> dict[str, Array]:
    """The mean reward, and that of each prompt where there are at most 40."""
    mean = found.reward.mean()
    metrics = {"reward": mean}
    if c.prompts > 40:  # A line for each would hide the rest.
        return metrics
    count = jnp.zeros(c.prompts).at[found.prompt].add(1)
    total = jnp.zeros(c.prompts).at[found.prompt].add(found.reward)
    # A prompt that was not asked has no reward of its own.
    own = jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nanmean(found.reward))
    return metrics | {f"reward_prompt_{i}": own[i] for i in range(c.prompts)}
