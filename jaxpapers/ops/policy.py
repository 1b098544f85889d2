r"""Policy gradients: surrogates, advantages, statistics by prompt.

Objectives are losses, to be minimised. $\rho = p_\theta / p_{old}$ is the likelihood
ratio of the trained policy to the one that acted, A the advantage, without a gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.ops import diffusion, trajectories
from jaxpapers.ops.diffusion import Schedule
from jaxpapers.ops.shapes import one_per_row, same_shape, whole_numbers

CLIPS = ("ppo", "hard", "none")


class PromptStats(NamedTuple):
    """Ring buffers of the last rewards of every prompt.

    Attributes:
      reward: (P, N).
      count: (P,) int32, rewards added so far.
    """

    reward: Any
    count: Any


def reinforce(
    log_prob: Float[Array, "..."], advantage: Float[Array, "..."]
) -> Float[Array, "..."]:
    r"""$-A \log p_\theta$: its gradient is that of the expected reward, negated.

    Williams, 1992. With A = reward - baseline, where the baseline does not depend on the
    action, the expectation of the gradient is unchanged and its variance falls.
    """
    same_shape("reinforce", log_prob=log_prob, advantage=advantage)
    return -lax.stop_gradient(advantage) * log_prob


def clipped_surrogate(
    log_ratio: Float[Array, "..."],
    advantage: Float[Array, "..."],
    clip: float = 0.2,
    mode: str = "ppo",
) -> Float[Array, "..."]:
    r"""Importance-weighted policy gradient, bounded.

    Args:
      log_ratio: $\log \rho$.
      advantage: A.
      clip: half width of the band, > 0.
      mode: "ppo": $-\min(\rho A, \mathrm{clip}(\rho) A)$ (arXiv 1707.06347, eq 7), whose
        gradient is zero only beyond the band in the direction of the advantage; "hard":
        $-A\,\mathrm{clip}(\rho)$ (DPOK's released code), whose gradient is zero
        outside the band whatever the sign of A; "none": $-A \rho$.

    Raises:
      ValueError: unknown mode, clip <= 0.
    """
    if mode not in CLIPS:
        raise ValueError(f"clip mode must be one of {CLIPS}, got {mode!r}")
    if not clip > 0:
        raise ValueError(f"clip must be > 0, got {clip}")
    same_shape("clipped_surrogate", log_ratio=log_ratio, advantage=advantage)
    ratio = _ratio(log_ratio)
    advantage = lax.stop_gradient(advantage)
    bounded = jnp.clip(ratio, 1 - clip, 1 + clip)
    if mode == "none":
        return -advantage * ratio
    if mode == "hard":
        return -advantage * bounded
    return -jnp.minimum(advantage * ratio, advantage * bounded)


def ratio_metrics(
    log_ratio: Float[Array, "..."], clip: float
) -> dict[str, Float[Array, ""]]:
    """Mean ratio, largest deviation from 1, share outside the band, effective size.

    ``ratio_ess`` is the effective sample size over the number of samples, at most 1. All
    are NaN if one of the logarithms is not finite.
    """
    ratio = _ratio(log_ratio)
    metrics = {
        "ratio": ratio.mean(),
        "ratio_deviation": jnp.abs(ratio - 1).max(),
        "clip_fraction": (jnp.abs(ratio - 1) > clip).mean(),
        "ratio_ess": jnp.square(ratio.mean()) / jnp.square(ratio).mean(),
    }
    finite = jnp.isfinite(log_ratio).all()
    return {name: jnp.where(finite, v, jnp.nan) for name, v in metrics.items()}


def to_go(cost: Float[Array, "S B"]) -> Float[Array, "S B"]:
    """Sum of the costs after each step, its own excluded."""
    return jnp.flip(jnp.cumsum(jnp.flip(cost, 0), 0), 0) - cost


def path_kl(
    key: Key[Array, ""],
    eps: Callable[[Array, Array], Array],
    eps_ref: Callable[[Array, Array], Array],
    schedule: Schedule,
    shape: tuple[int, ...],
) -> Float[Array, " B"]:
    r"""KL of two policies along new trajectories of the first, nats per trajectory.

    $\sum_k KL(p(x_{k+1} | x_k) || p_{ref}(x_{k+1} | x_k))$, each exact (Gaussians of one
    variance). Its mean is the KL of the distributions of whole paths, which bounds that
    of the samples. Stores keys, not states.

    Args:
      key: of the trajectories.
      eps: (x, time (B,)) -> predicted noise of the policy that acts.
      eps_ref: of the other.
      schedule: with noise in every step, see ``ops.schedules.reverse_schedule``.
      shape: (B, ...) of the samples.
    """
    kept = trajectories.rollout(key, eps, schedule, shape, store="keys")

    def visit(total, k, x, x_next, eps_k):
        del x_next
        time = jnp.broadcast_to(jnp.asarray(schedule.time, jnp.float32)[k], len(x))
        return total + diffusion.step_kl(schedule, k, eps_k, eps_ref(x, time))

    return trajectories.replay(kept, eps, schedule, visit, jnp.zeros(shape[0]))


def standardize(x: Float[Array, " B"], eps: float = 1e-6) -> Float[Array, " B"]:
    """Minus the mean, over the standard deviation of the batch."""
    return (x - x.mean()) / (x.std() + eps)


def group_advantage(
    reward: Float[Array, " B"],
    prompt: Int[Array, " B"],
    prompts: int,
    eps: float = 1e-6,
) -> tuple[Float[Array, " B"], Float[Array, ""]]:
    """Rewards standardised within each prompt's group of the batch (GRPO).

    Args:
      reward: of the batch.
      prompt: its prompts, 0 .. prompts - 1.
      prompts: their number.
      eps: added to the standard deviation.

    Returns:
      The advantages, NaN for a prompt out of range, and the share of groups whose rewards
      are all equal and give no gradient, NaN if a reward is not finite.
    """
    _check_groups("group_advantage", reward, prompt)
    reward = _in_range(reward, prompt, prompts)
    mean, std = _moments(reward, prompt, prompts)
    highest = jnp.full(prompts, -jnp.inf).at[prompt].max(reward)
    lowest = jnp.full(prompts, jnp.inf).at[prompt].min(reward)
    present = jnp.isfinite(highest)
    equal = (present & (highest == lowest)).sum() / jnp.maximum(present.sum(), 1)
    equal = jnp.where(jnp.isfinite(reward).all(), equal, jnp.nan)
    return (reward - mean[prompt]) / (std[prompt] + eps), equal


def init_prompt_stats(prompts: int, size: int = 16) -> PromptStats:
    """Empty buffers of ``size`` rewards for each prompt."""
    return PromptStats(jnp.zeros((prompts, size)), jnp.zeros(prompts, jnp.int32))


def push_prompt_stats(
    stats: PromptStats, reward: Float[Array, " B"], prompt: Int[Array, " B"]
) -> PromptStats:
    """Buffers with a batch's rewards appended in order, the oldest dropped.

    Rewards of prompts out of range are left out.
    """
    _check_groups("push_prompt_stats", reward, prompt)
    prompts, size = stats.reward.shape
    prompt = jnp.where(prompt < 0, prompts, prompt)  # Not from the end.
    rank = _rank(prompt)
    total = jnp.zeros_like(stats.count).at[prompt].add(1, mode="drop")
    # A prompt that comes more than ``size`` times keeps its last ones.
    kept = rank >= total[prompt] - size
    slot = (stats.count[prompt] + rank) % size
    row = jnp.where(kept, prompt, prompts)
    return PromptStats(
        stats.reward.at[row, slot].set(reward, mode="drop"), stats.count + total
    )


def prompt_advantage(
    stats: PromptStats,
    reward: Float[Array, " B"],
    prompt: Int[Array, " B"],
    least: int = 16,
    eps: float = 1e-6,
) -> Float[Array, " B"]:
    """Rewards standardised by their prompt's last ones (DDPO, arXiv 2305.13301).

    Args:
      stats: after the batch was pushed.
      reward: of the batch.
      prompt: its prompts.
      least: rewards that a prompt needs; with fewer, the batch standardises.
      eps: added to the standard deviation.

    Returns:
      The advantages; of a batch with a prompt out of range NaN, of that prompt or of all
      that the batch standardises.
    """
    _check_groups("prompt_advantage", reward, prompt)
    prompts, size = stats.reward.shape
    reward = _in_range(reward, prompt, prompts)
    filled = jnp.arange(size)[None] < stats.count[:, None]
    count = jnp.maximum(filled.sum(1), 1)
    mean = (stats.reward * filled).sum(1) / count
    var = (jnp.square(stats.reward - mean[:, None]) * filled).sum(1) / count
    by_prompt = (reward - mean[prompt]) / (jnp.sqrt(var)[prompt] + eps)
    return jnp.where(stats.count[prompt] >= least, by_prompt, standardize(reward, eps))


def explained_variance(
    value: Float[Array, "..."], target: Float[Array, "..."]
) -> Float[Array, ""]:
    """1 - Var(target - value) / Var(target); 0 if the targets are constant."""
    same_shape("explained_variance", value=value, target=target)
    var, rest = target.var(), (target - value).var()
    share = jnp.where(var == 0, 0, 1 - rest / jnp.where(var == 0, 1, var))
    return jnp.where(jnp.isfinite(rest), share, jnp.nan)


def _check_groups(function, reward, prompt):
    one_per_row(function, len(reward), reward=reward, prompt=prompt)
    whole_numbers(function, prompt=prompt)


def _in_range(reward, prompt, prompts):
    """Rewards, NaN where the prompt is none of 0 .. prompts - 1: indices would wrap."""
    return jnp.where((prompt >= 0) & (prompt < prompts), reward, jnp.nan)


def _ratio(log_ratio):
    """exp, of logarithms up to 20 in size: beyond, a float32 would overflow into NaN."""
    return jnp.exp(jnp.clip(log_ratio, -20.0, 20.0))


def _moments(reward, prompt, prompts):
    count = jnp.zeros(prompts).at[prompt].add(1)
    some = jnp.maximum(count, 1)
    mean = jnp.zeros(prompts).at[prompt].add(reward) / some
    var = jnp.zeros(prompts).at[prompt].add(jnp.square(reward - mean[prompt])) / some
    return mean, jnp.sqrt(var)


def _rank(prompt):
    """How many earlier rows have the same prompt."""
    same = prompt[:, None] == prompt[None]
    return jnp.tril(same, -1).sum(1)
