"""Supervised fine-tuning on the pretrained model's own pictures, weighted by rewards."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.method import State, only_if
from jaxpapers.ops import chains, diffusion, trajectories
from jaxpapers.papers.dpok.rounds import (
    Bound,
    guided_eps,
    policy_params,
    reference_params,
    reward_of,
)

MODES = ("sft", "kl_d", "kl_o")


def sft_loss(
    eps_fn: Callable,
    pretrained: Callable,
    x: Float[Array, "B ..."],
    word: Int[Array, "B ..."],
    reward: Float[Array, " B"],
    key: Key[Array, ""],
    *,
    alpha_bar: Any,
    mode: str = "sft",
    gamma: float = 0.0,
) -> Float[Array, ""]:
    r"""Reward-weighted denoising of the pretrained model's own pictures.

    $$ \mathrm{sft}: r |\epsilon - \epsilon_\theta|^2, \quad
       \mathrm{kl\_d}: (r + \gamma) |\epsilon - \epsilon_\theta|^2, \quad
       \mathrm{kl\_o}: r |\epsilon - \epsilon_\theta|^2
         + \gamma |\epsilon_{pre} - \epsilon_\theta|^2 $$

    means over coordinates, rows and drawn steps. The names and the simple weighting by
    steps are from memory of the paper's section 4.3.

    Args:
      eps_fn: the model, (x, time, word) -> noise, without guidance.
      pretrained: the frozen model, likewise.
      x: pictures that it made.
      word: their prompts.
      reward: not negative.
      key: of steps and noise.
      alpha_bar: (T,) of the forward process.
      mode: as above.
      gamma: weight of staying near.

    Raises:
      ValueError: unknown mode, gamma < 0.
    """
    if mode not in MODES or gamma < 0:
        raise ValueError(
            f"mode must be one of {MODES} and gamma >= 0, got {mode!r}, {gamma}"
        )
    key_time, key_noise = jax.random.split(key)
    bars = jnp.asarray(alpha_bar, x.dtype)
    t = jax.random.randint(key_time, (len(x),), 0, len(bars))
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    noisy = diffusion.q_sample(x, bars[t], noise)
    time = t.astype(jnp.float32)
    eps = eps_fn(noisy, time, word)
    weight = reward + (gamma if mode == "kl_d" else 0.0)
    # A negative weight would teach the model to miss without bound.
    weight = jnp.where(weight < 0, jnp.nan, weight)
    total = weight * _square(noise - eps)
    if mode == "kl_o":
        near = lax.stop_gradient(pretrained(noisy, time, word))
        total = total + gamma * _square(near - eps)
    return total.mean()


def supervised_round(
    state: State,
    batch: dict,
    key: Key[Array, ""],
    bound: Bound,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[State, dict[str, Array]]:
    """A round of as many rewards as DPOK's: pretrained pictures, then denoising steps.

    Args:
      state, batch, bound, txs: see ``update``.
      key: of pictures and steps.
    """
    c = bound.options
    key_roll, key_steps = jax.random.split(key)
    frozen = reference_params(state.params)
    word = batch["word"]
    ref = guided_eps(bound, frozen)
    x = trajectories.rollout(
        key_roll, lambda x, time: ref(x, time, word), bound.chain,
        (len(word), *bound.parts.shape),
    ).sample  # fmt: skip
    reward = reward_of(bound.reward_fn, x, batch["prompt"]) + c.reward_shift
    alpha_bar = diffusion.alpha_bars(chains.betas(c))
    name = "lora" if "lora" in state.params else "net"

    def step(carry, key):
        own, opt = carry

        def objective(own):
            net = policy_params({**state.params, **own})
            return sft_loss(
                functools.partial(bound.parts.eps, net),
                functools.partial(bound.parts.eps, frozen),
                x, word, reward, key, alpha_bar=alpha_bar, mode=c.name, gamma=c.gamma,
            )  # fmt: skip

        value, grads = jax.value_and_grad(objective)(own)
        updates, opt = txs["policy"].update(grads, opt, own)
        return (optax.apply_updates(own, updates), opt), (
            value, optax.tree.norm(grads),
        )  # fmt: skip

    keys = jax.random.split(key_steps, c.policy_steps)
    carry = ({name: state.params[name]}, state.opt_state["policy"])
    (own, opt), (losses, norms) = lax.scan(step, carry, keys)
    new = state._replace(
        params={**state.params, **own}, opt_state={**state.opt_state, "policy": opt}
    )
    good = jnp.isfinite(reward).all() & (reward >= 0).all()
    metrics = {
        "loss": losses.mean(),
        "grad_norm": norms.mean(),
        "reward": reward.mean() - c.reward_shift,
        # Not finite where a weight is negative, which stops the run.
        "least_weight": jnp.where(good, reward.min(), jnp.nan),
    }
    return only_if(good, new, state), metrics


def _square(x):
    return jnp.square(x).reshape(len(x), -1).mean(1)
