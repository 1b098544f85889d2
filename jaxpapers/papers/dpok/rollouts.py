"""The policy, its rollouts with rewards, and its KL to the pretrained model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.nets.diffusion import Parts
from jaxpapers.nets.lora import lora_apply
from jaxpapers.ops import diffusion, policy, trajectories
from jaxpapers.ops.diffusion import Schedule
from jaxpapers.papers.dpok.options import Options

_UNTRACEABLE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Transitions(NamedTuple):
    """Steps of trajectories, as rows.

    Attributes:
      k: (B,) index of the step.
      x: (B, ...) states.
      x_next: (B, ...) next states.
      eps_old: (B, ...) guided noise predicted by the policy that acted.
      tokens: (B,) or (B, L) conditioning tokens.
    """

    k: Any
    x: Any
    x_next: Any
    eps_old: Any
    tokens: Any


class Rollout(NamedTuple):
    """A trajectory and its reward for each prompt of a batch.

    Attributes:
      states: (S + 1, B, ...), from noise to images.
      eps: (S, B, ...) guided noise that the policy predicted.
      tokens: (B,) or (B, L) conditioning tokens.
      prompt: (B,) prompt ids.
      reward: (B,).
    """

    states: Any
    eps: Any
    tokens: Any
    prompt: Any
    reward: Any


class Model(NamedTuple):
    """Nets, sampler, hyper-parameters and reward, see ``dpok.model``.

    Attributes:
      parts: functions of the nets' parameters.
      schedule: coefficients of the sampler's steps.
      alpha_bar: (T,) of the forward process.
      options: hyper-parameters.
      reward_fn: (images (B, ...), prompt ids (B,)) -> (B,).
    """

    parts: Parts
    schedule: Schedule
    alpha_bar: Any
    options: Options
    reward_fn: Callable


def policy_params(params: dict) -> dict:
    """Parameters of the policy's net: the pretrained ones with their adapters."""
    if "lora" not in params:
        return params["net"]
    return lora_apply(lax.stop_gradient(params["net"]), params["lora"])


def reference_params(params: dict) -> dict:
    """Parameters of the frozen pretrained net."""
    return lax.stop_gradient(params["net" if "lora" in params else "reference"])


def guided_eps(model: Model, net: dict) -> Callable:
    """(x, time, tokens) -> guided noise of a net's parameters.

    Guidance is part of the policy: rollout, likelihood ratio and KL all have it.
    """
    return diffusion.guided(
        functools.partial(model.parts.eps, net), model.options.guidance
    )


def rewards(
    reward_fn: Callable, x: Float[Array, "B ..."], prompt: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Rewards of images, without a gradient.

    Raises:
      TypeError: a function that JAX cannot trace, or a result that is no array.
      ValueError: another shape than (B,).
    """
    try:
        reward = reward_fn(x, prompt)
    except _UNTRACEABLE as error:
        raise TypeError(
            "reward_fn needs the values of its arguments (NumPy, float(), if), which are "
            "not there while JAX compiles; wrap it: ops.host.on_host(reward_fn, "
            "lambda x, prompt: jax.ShapeDtypeStruct(prompt.shape, jnp.float32), "
            "finite=True)"
        ) from error
    reward = _one_array(reward, prompt.shape)
    if reward.shape != prompt.shape:
        raise ValueError(
            f"reward_fn returned the shape {reward.shape}, expected "
            f"{prompt.shape}: one number for each image"
        )
    return lax.stop_gradient(reward.astype(jnp.float32))


def _one_array(reward: Any, shape: tuple[int, ...]) -> jax.Array:
    """A reward as an array; a list of numbers is one, a tuple of anything is not."""
    expected = f"expected one array of shape {shape}: one number for each image"
    if isinstance(reward, tuple | dict) or reward is None:
        parts = f" of {len(reward)}" if reward is not None else ""
        raise TypeError(
            f"reward_fn returned a {type(reward).__name__}{parts}, {expected}; if the "
            "rest is metadata, return the reward alone"
        )
    try:
        array = jnp.asarray(reward)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"reward_fn returned a {type(reward).__name__} that is no array of numbers, "
            f"{expected}"
        ) from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"reward_fn returned {array.dtype}, expected real numbers")
    return array


def draw_rollout(
    key: Key[Array, ""], params: dict, batch: dict, model: Model
) -> Rollout:
    """Draws a trajectory of the policy for each prompt, and its reward.

    Args:
      key: of the trajectories.
      params: see ``dpok.make``.
      batch: tokens (B,) or (B, L), prompt (B,).
      model: see ``dpok.model``.
    """
    eps = guided_eps(model, policy_params(params))
    tokens, prompt = batch["tokens"], batch["prompt"]
    trajectory = trajectories.rollout(
        key,
        lambda x, time: eps(x, time, tokens),
        model.schedule,
        (len(prompt), *model.parts.shape),
        store="all",
    )
    trajectory = lax.stop_gradient(trajectory)
    reward = rewards(model.reward_fn, trajectory.sample, prompt)
    return Rollout(trajectory.states, trajectory.eps, tokens, prompt, reward)


def transitions(rollout: Rollout, k: Int[Array, "B N"]) -> Transitions:
    """N steps of each trajectory as B N rows, those of a trajectory adjacent."""
    states = rollout.states
    pairs = ((states, k), (states, k + 1), (rollout.eps, k))
    x, x_next, eps = (
        v.reshape(-1, *v.shape[2:]) for v in (trajectories.of_each(*p) for p in pairs)
    )
    tokens = jnp.repeat(rollout.tokens, k.shape[1], axis=0)
    return Transitions(k.reshape(-1), x, x_next, eps, tokens)


def all_transitions(rollout: Rollout) -> Transitions:
    """All steps of each trajectory, see ``transitions``."""
    steps, rows = rollout.eps.shape[:2]
    return transitions(rollout, jnp.tile(jnp.arange(steps)[None], (rows, 1)))


def later_kl(rollout: Rollout, params: dict, model: Model) -> Float[Array, "S B"]:
    """Sum of the KLs of the steps after each, along the rollout's trajectories."""
    steps, rows = rollout.eps.shape[:2]
    # Trajectories are the outer axis, so that the rows of a device stay together.
    k = jnp.tile(jnp.arange(steps), rows)
    x, eps = (
        v.swapaxes(0, 1).reshape(-1, *v.shape[2:])
        for v in (rollout.states[:-1], rollout.eps)
    )
    time = jnp.asarray(model.schedule.time, jnp.float32)[k]
    tokens = jnp.repeat(rollout.tokens, steps, axis=0)
    reference = guided_eps(model, reference_params(params))(x, time, tokens)
    kl = diffusion.step_kl(model.schedule, k, eps, reference).reshape(rows, steps)
    return policy.to_go(kl.T)


def path_kl(
    params: dict, key: Key[Array, ""], tokens: Int[Array, "B ..."], *, model: Model
) -> Float[Array, ""]:
    """KL of the policy's paths to the frozen model's, in nats, on new trajectories.

    It bounds the KL of the distributions of images.
    """
    eps, reference = (
        guided_eps(model, net(params)) for net in (policy_params, reference_params)
    )
    shape = (len(tokens), *model.parts.shape)
    return policy.path_kl(
        key,
        lambda x, time: eps(x, time, tokens),
        lambda x, time: reference(x, time, tokens),
        model.schedule,
        shape,
    ).mean()
