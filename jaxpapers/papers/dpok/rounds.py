"""Chains of the policy: what acts, what it did, what it was paid, how far it went."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.nets import diffusion as nets
from jaxpapers.nets.lora import lora_apply
from jaxpapers.ops import diffusion, policy, trajectories
from jaxpapers.ops.diffusion import Chain


class Transitions(NamedTuple):
    """Steps of chains, as rows.

    Attributes:
      k: (B,) which step.
      x: (B, ...) states.
      x_next: (B, ...) where they went.
      eps_old: (B, ...) guided noise that the policy which acted predicted.
      word: (B,) or (B, L) prompts.
    """

    k: Any
    x: Any
    x_next: Any
    eps_old: Any
    word: Any


class Round(NamedTuple):
    """Chains of one round: states (S+1, B, ...), eps (S, B, ...), prompts, rewards."""

    states: Any
    eps: Any
    word: Any
    prompt: Any
    reward: Any


class Bound(NamedTuple):
    """What ``make`` binds.

    Attributes:
      parts: functions of the nets.
      chain: see ``ops.chains.chain``.
      options: ``config.method``.
      reward_fn: (pictures (B, ...), prompt ids (B,)) -> (B,).
    """

    parts: nets.Parts
    chain: Chain
    options: Any
    reward_fn: Callable


def policy_params(params: dict) -> dict:
    """Parameters of the net that acts: the pretrained ones with their adapters."""
    if "lora" not in params:
        return params["net"]
    return lora_apply(lax.stop_gradient(params["net"]), params["lora"])


def reference_params(params: dict) -> dict:
    """Parameters of the frozen pretrained net."""
    return lax.stop_gradient(params["net" if "lora" in params else "reference"])


def guided_eps(bound: Bound, net: dict) -> Callable:
    """(x, time, word) -> guided noise of a net's parameters.

    Guidance is part of the policy: it is in the rollout, in the ratio and in the KL.
    """
    return diffusion.guided(
        functools.partial(bound.parts.eps, net), bound.options.guidance
    )


def reward_of(
    reward_fn: Callable, x: Float[Array, "B ..."], prompt: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Rewards, whose shape is checked.

    Raises:
      ValueError: another shape than (B,).
    """
    found = reward_fn(x, prompt)
    if jnp.shape(found) != prompt.shape:
        raise ValueError(
            f"reward_fn gave the shape {jnp.shape(found)}, expected {prompt.shape}: one "
            "number for each picture"
        )
    return lax.stop_gradient(found.astype(jnp.float32))


def take_round(key: Key[Array, ""], params: dict, batch: dict, bound: Bound) -> Round:
    """Draws a chain for each prompt of a batch, and asks for its reward."""
    eps = guided_eps(bound, policy_params(params))
    word, prompt = batch["word"], batch["prompt"]
    found = trajectories.rollout(
        key,
        lambda x, time: eps(x, time, word),
        bound.chain,
        (len(prompt), *bound.parts.shape),
        store="all",
    )
    # Stopped before the reward: a host's has no derivative.
    found = lax.stop_gradient(found)
    reward = reward_of(bound.reward_fn, found.sample, prompt)
    return Round(found.states, found.eps, word, prompt, reward)


def transitions(chains_: Round, k: Int[Array, "B N"]) -> Transitions:
    """N steps of each chain, as B N rows, the chains' own beside each other."""
    states = chains_.states
    pairs = ((states, k), (states, k + 1), (chains_.eps, k))
    x, x_next, eps = (
        v.reshape(-1, *v.shape[2:]) for v in (trajectories.of_each(*p) for p in pairs)
    )
    return Transitions(
        k.reshape(-1), x, x_next, eps, jnp.repeat(chains_.word, k.shape[1], axis=0)
    )


def later_kl(chains_: Round, params: dict, bound: Bound) -> Float[Array, "S B"]:
    """Sum of the KLs of the steps after each, along the chains that were drawn."""
    steps, rows = chains_.eps.shape[:2]
    # Chains first, so that the rows of a device stay together.
    k = jnp.tile(jnp.arange(steps), rows)
    x, eps = (
        v.swapaxes(0, 1).reshape(-1, *v.shape[2:])
        for v in (chains_.states[:-1], chains_.eps)
    )
    time = jnp.asarray(bound.chain.time, jnp.float32)[k]
    word = jnp.repeat(chains_.word, steps, axis=0)
    ref = guided_eps(bound, reference_params(params))(x, time, word)
    kl = diffusion.step_kl(bound.chain, k, eps, ref).reshape(rows, steps)
    return policy.to_go(kl.T)


def path_kl(
    params: dict, key: Key[Array, ""], word: Int[Array, "B ..."], *, bound: Bound
) -> Float[Array, ""]:
    """Mean over fresh chains of the sum of their steps' KLs to the frozen model, nats.

    It bounds the KL of the pictures' laws.
    """
    eps, ref = (
        guided_eps(bound, of(params)) for of in (policy_params, reference_params)
    )
    shape = (len(word), *bound.parts.shape)
    return policy.path_kl(
        key,
        lambda x, time: eps(x, time, word),
        lambda x, time: ref(x, time, word),
        bound.chain,
        shape,
    ).mean()
