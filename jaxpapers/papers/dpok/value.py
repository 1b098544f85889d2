"""Value net, advantages and kept rollouts of DPOK."""

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
from jaxpapers.ops.shapes import one_per_row
from jaxpapers.papers.dpok.options import Options
from jaxpapers.papers.dpok.rollouts import Model, Rollout, Transitions, transitions


def value_loss(
    v: Callable, batch: Transitions, reward: Float[Array, " B"]
) -> Float[Array, ""]:
    """Mean of (V(x_k, k, z) - r)^2 over transitions."""
    value = v(batch.x, batch.k, batch.tokens)
    one_per_row("value_loss", len(batch.k), value=value, reward=reward)
    return jnp.square(value - reward).mean()


def fit_value(
    state: State,
    rollout: Rollout,
    key: Key[Array, ""],
    model: Model,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[dict, Any, dict[str, Array]]:
    """Fits the value net to a rollout's rewards.

    Args:
      state: before the update.
      rollout: whose rewards are regressed on.
      key: of the transitions in each step.
      model: see ``dpok.model``.
      txs: optimizers; "value" is used.

    Returns:
      Parameters, optimizer state, and the metrics value_loss and explained_variance (at
      the middle step).
    """
    options = model.options
    rows, steps = len(rollout.reward), len(model.schedule.std)
    reward = jnp.repeat(rollout.reward, options.value_transitions)

    def step(carry, key):
        params, opt = carry
        order = jax.random.uniform(key, (rows, steps)).argsort(-1)
        batch = transitions(rollout, order[:, : options.value_transitions])

        def objective(params):
            v = functools.partial(model.parts.value, params)
            return value_loss(v, batch, reward)

        value, grads = jax.value_and_grad(objective)(params)
        updates, opt = txs["value"].update(grads, opt, params)
        return (optax.apply_updates(params, updates), opt), value

    carry = (state.params["value"], state.opt_state["value"])
    keys = jax.random.split(key, options.value_steps)
    (params, opt), losses = lax.scan(step, carry, keys)
    middle = transitions(rollout, jnp.full((rows, 1), steps // 2))
    explained = policy.explained_variance(
        model.parts.value(params, middle.x, middle.k, middle.tokens), rollout.reward
    )
    return params, opt, {"value_loss": losses.mean(), "explained_variance": explained}


def advantages(
    state: State, rollout: Rollout, options: Options
) -> tuple[Float[Array, " B"], PromptStats, Float[Array, ""]]:
    """Advantages that are constant along a trajectory: all but ``advantage="value"``.

    Returns:
      The advantages, the prompts' statistics with this rollout, and the share of prompts
      whose rewards are all equal.
    """
    group, equal = policy.group_advantage(
        rollout.reward, rollout.prompt, options.prompts
    )
    stats = policy.push_prompt_stats(
        state.extra["stats"], rollout.reward, rollout.prompt
    )
    if options.advantage == "group":
        return group, stats, equal
    if options.advantage == "prompt":
        by_prompt = policy.prompt_advantage(stats, rollout.reward, rollout.prompt)
        return by_prompt, stats, equal
    return policy.standardize(rollout.reward), stats, equal


def value_advantage(
    params: dict, rollout: Rollout, batch: Transitions, model: Model
) -> Float[Array, " B"]:
    """r(y, z) - V(x_k, k, z) of transitions.

    Args:
      params: of the value net.
      rollout: the rollout.
      batch: ``transitions(rollout, k)``.
      model: see ``dpok.model``.
    """
    each = len(batch.k) // len(rollout.reward)
    v = model.parts.value(params, batch.x, batch.k, batch.tokens)
    return jnp.repeat(rollout.reward, each) - v


def later_cost(
    later: Float[Array, "B S"], k: Int[Array, "B N"], beta: Any, alpha: Any
) -> Float[Array, " M"]:
    """Cost of the KLs after steps k in units of the reward: beta / alpha times them."""
    return beta / alpha * jnp.take_along_axis(later, k, 1).reshape(-1)


def keep_rollout(
    state: State, rollout: Rollout, options: Options
) -> tuple[Rollout, Any, Any]:
    """Adds a rollout to the kept ones, in place of the oldest.

    Args:
      state: before the update; ``extra["pool"]`` if ``options.rollouts`` > 1.
      rollout: the new one.
      options: see ``Options``.

    Returns:
      Kept rollouts, stacked; how many of them are filled; the index of the newest.
    """
    newest = state.step % options.rollouts
    if options.rollouts == 1:
        return jax.tree.map(lambda v: v[None], rollout), 1, newest
    pool = jax.tree.map(
        lambda kept, v: kept.at[newest].set(v), state.extra["pool"], rollout
    )
    return pool, jnp.minimum(state.step + 1, options.rollouts), newest


def reward_metrics(rollout: Rollout, options: Options) -> dict[str, Array]:
    """The mean reward, and that of each prompt if there are at most 40."""
    metrics = {"reward": rollout.reward.mean()}
    if options.prompts > 40:  # More lines than a log is read for.
        return metrics
    zeros = jnp.zeros(options.prompts)
    count = zeros.at[rollout.prompt].add(1)
    total = zeros.at[rollout.prompt].add(rollout.reward)
    # Prompts that are not in the batch have the batch's mean.
    mean = jnp.where(
        count > 0, total / jnp.maximum(count, 1), jnp.nanmean(rollout.reward)
    )
    return metrics | {f"reward_prompt_{i}": mean[i] for i in range(options.prompts)}
