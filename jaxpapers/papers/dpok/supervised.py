"""Baselines: reward-weighted denoising of the pretrained model's own images."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.method import State, only_if
from jaxpapers.ops import diffusion, trajectories
from jaxpapers.ops.shapes import one_per_row
from jaxpapers.papers.dpok.options import MODES
from jaxpapers.papers.dpok.rollouts import (
    Model,
    guided_eps,
    policy_params,
    reference_params,
    rewards,
)


def sft_loss(
    eps_fn: Callable,
    pretrained: Callable,
    x: Float[Array, "B ..."],
    tokens: Int[Array, "B ..."],
    reward: Float[Array, " B"],
    key: Key[Array, ""],
    *,
    alpha_bar: Any,
    mode: str = "sft",
    gamma: float = 0.0,
) -> Float[Array, ""]:
    r"""Reward-weighted denoising loss.

    $$ \mathrm{sft}: r |\epsilon - \epsilon_\theta|^2, \quad
       \mathrm{kl\_d}: (r + \gamma) |\epsilon - \epsilon_\theta|^2, \quad
       \mathrm{kl\_o}: r |\epsilon - \epsilon_\theta|^2
         + \gamma |\epsilon_{pre} - \epsilon_\theta|^2 $$

    Means over coordinates, rows and timesteps. The names and the uniform weight of the
    timesteps follow the paper's section 4.3 from memory.

    Args:
      eps_fn: the model, (x, time, tokens) -> noise, without guidance.
      pretrained: the frozen model, likewise.
      x: images drawn from the pretrained model.
      tokens: conditioning tokens of the images.
      reward: not negative.
      key: of timesteps and noise.
      alpha_bar: (T,) of the forward process.
      mode: one of ``MODES``.
      gamma: weight of the pretrained model.

    Raises:
      ValueError: unknown mode, gamma < 0.
    """
    if mode not in MODES or not gamma >= 0:
        raise ValueError(
            f"mode must be one of {MODES} and gamma >= 0, got {mode!r}, {gamma}"
        )
    one_per_row("sft_loss", len(x), reward=reward)
    key_time, key_noise = jax.random.split(key)
    bars = jnp.asarray(alpha_bar, x.dtype)
    t = jax.random.randint(key_time, (len(x),), 0, len(bars))
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    noisy = diffusion.q_sample(x, bars[t], noise)
    time = t.astype(jnp.float32)
    eps = eps_fn(noisy, time, tokens)
    weight = reward + (gamma if mode == "kl_d" else 0.0)
    # With a negative weight the loss has no lower bound.
    weight = jnp.where(weight < 0, jnp.nan, weight)
    total = weight * _mean_square(noise - eps)
    if mode == "kl_o":
        target = lax.stop_gradient(pretrained(noisy, time, tokens))
        total = total + gamma * _mean_square(target - eps)
    return total.mean()


def supervised_update(
    state: State,
    batch: dict,
    key: Key[Array, ""],
    model: Model,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[State, dict[str, Array]]:
    """Draws images from the pretrained model, then takes denoising steps on them.

    One image and reward for each prompt of the batch, as in ``dpok.update``.

    Args:
      state, batch, model, txs: see ``dpok.update``.
      key: of images and steps.
    """
    options = model.options
    key_rollout, key_steps = jax.random.split(key)
    frozen = reference_params(state.params)
    tokens = batch["tokens"]
    reference = guided_eps(model, frozen)
    x = trajectories.rollout(
        key_rollout, lambda x, time: reference(x, time, tokens), model.schedule,
        (len(tokens), *model.parts.shape),
    ).sample  # fmt: skip
    reward = rewards(model.reward_fn, x, batch["prompt"]) + options.reward_shift
    name = "lora" if "lora" in state.params else "net"

    def step(carry, key):
        trained, opt = carry

        def objective(trained):
            net = policy_params({**state.params, **trained})
            return sft_loss(
                functools.partial(model.parts.eps, net),
                functools.partial(model.parts.eps, frozen),
                x, tokens, reward, key, alpha_bar=model.alpha_bar, mode=options.name,
                gamma=options.gamma,
            )  # fmt: skip

        value, grads = jax.value_and_grad(objective)(trained)
        updates, opt = txs["policy"].update(grads, opt, trained)
        trained = optax.apply_updates(trained, updates)
        return (trained, opt), (value, optax.tree.norm(grads))

    keys = jax.random.split(key_steps, options.policy_steps)
    carry = ({name: state.params[name]}, state.opt_state["policy"])
    (trained, opt), (losses, norms) = lax.scan(step, carry, keys)
    new = state._replace(
        params={**state.params, **trained},
        opt_state={**state.opt_state, "policy": opt},
    )
    valid = jnp.isfinite(reward).all() & (reward >= 0).all()
    metrics = {
        "loss": losses.mean(),
        "grad_norm": norms.mean(),
        "reward": reward.mean() - options.reward_shift,
        # NaN if a weight is negative, which stops the run.
        "least_weight": jnp.where(valid, reward.min(), jnp.nan),
    }
    return only_if(valid, new, state), metrics


def _mean_square(x):
    return jnp.square(x).reshape(len(x), -1).mean(1)
