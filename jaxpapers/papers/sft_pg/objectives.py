"""Losses of critic, value net and policy, and transitions of trajectories."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.ops import diffusion, policy, trajectories
from jaxpapers.ops.diffusion import Schedule
from jaxpapers.ops.shapes import one_per_row
from jaxpapers.ops.trajectories import Trajectory


def gradient_penalty(
    f: Callable, x: Float[Array, "B ..."], y: Float[Array, "B ..."], mix: Any
) -> Float[Array, ""]:
    r"""$E (|\nabla f(\hat x)| - 1)^2$ at points between data and samples (WGAN-GP).

    With weight w the critic's estimate of a translation by d tends to d (1 + d / 2 w).

    Args:
      f: (B, *X) -> (B,).
      x: data.
      y: samples.
      mix: (B,) drawn from U(0, 1), weights of the data.
    """
    mix = jnp.reshape(mix, (-1, *(1,) * (x.ndim - 1)))
    grads = jax.grad(lambda z: f(z).sum())(mix * x + (1 - mix) * y)
    square = jnp.square(grads.reshape(len(x), -1)).sum(1)
    # The square root has an infinite gradient where a ReLU net is flat.
    flat = square == 0
    norm = jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, square)))
    return jnp.square(norm - 1).mean()


def value_loss(
    v: Callable, states: Float[Array, "S B ..."], cost: Float[Array, " B"]
) -> Float[Array, ""]:
    """Mean over steps and trajectories of (V(x_k, k) - f(y))^2."""
    count, rows = states.shape[:2]
    one_per_row("value_loss", rows, cost=cost)
    # Trajectories are the outer axis, so that the rows of a device stay together.
    flat = states.swapaxes(0, 1).reshape(rows * count, *states.shape[2:])
    value = v(flat, jnp.tile(jnp.arange(count), rows)).reshape(rows, count)
    return jnp.square(value - cost[:, None]).mean()


def critic_loss(
    f: Callable,
    v: Callable,
    x: Float[Array, "B ..."],
    trajectory: Trajectory,
    key: Key[Array, ""],
    *,
    leak: bool = True,
    value_weight: float = 1.0,
    penalty: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""$L_f + L_w$, the loss of critic and value net.

    Args:
      f: critic, (B, *X) -> (B,).
      v: value net, (B, *X), k (B,) -> (B,).
      x: data.
      trajectory: of the present policy, with states.
      key: of the gradient penalty's points.
      leak: whether the value net's loss has a gradient to f.
      value_weight: of the value net's loss; S makes the mean over steps their sum.
      penalty: weight of the gradient penalty.

    Returns:
      The loss; metrics wasserstein (the critic's estimate of the distance), value_loss,
      critic_max, and gradient_penalty if its weight is not 0.
    """
    y = trajectory.sample
    real, cost = f(x), f(y)
    gap = real.mean() - cost.mean()
    target = cost if leak else lax.stop_gradient(cost)
    value = value_loss(v, trajectory.states[:-1], target)
    total = gap + value_weight * value
    metrics = {
        "wasserstein": -gap,
        "value_loss": value,
        "critic_max": jnp.abs(cost).max(),
    }
    if penalty:
        mix = jax.random.uniform(key, (len(x),))
        metrics["gradient_penalty"] = gradient_penalty(f, x, y, mix)
        total = total + penalty * metrics["gradient_penalty"]
    return total, metrics


def advantage(
    f: Callable,
    v: Callable,
    x: Float[Array, "B ..."],
    k: Int[Array, " B"],
    y: Float[Array, "B ..."],
    *,
    normalize: bool = False,
    clip: float = 0.0,
) -> Float[Array, " B"]:
    """f(y) - V(x_k, k), the cost of a trajectory less its baseline; no gradient.

    Args:
      f, v: see ``critic_loss``.
      x: states.
      k: their steps.
      y: last states of the same trajectories.
      normalize: whether to standardise (not in the paper).
      clip: bound of its size (not in the paper); 0: none.
    """
    critic, value = f(y), v(x, k)
    one_per_row("advantage", len(x), f=critic, v=value)
    cost = critic - value
    cost = policy.standardize(cost) if normalize else cost
    return lax.stop_gradient(jnp.clip(cost, -clip, clip) if clip else cost)


def policy_loss(
    eps_fn: Callable,
    schedule: Schedule,
    k: Int[Array, " B"],
    x: Float[Array, "B ..."],
    x_next: Float[Array, "B ..."],
    cost: Float[Array, " B"],
    *,
    reduce: str = "sum",
) -> Float[Array, ""]:
    r"""$L_\theta$: mean of the advantage times the step's log-probability.

    Args:
      eps_fn: the policy, (x, time) -> predicted noise.
      schedule: coefficients of the sampler's steps.
      k: steps of the transitions.
      x: states.
      x_next: next states.
      cost: advantages; positive is worse than the baseline.
      reduce: of the log-probability over coordinates; the toy's code sums, that for
        images takes the mean.
    """
    time = jnp.asarray(schedule.time, jnp.float32)[k]
    score = diffusion.step_log_prob(schedule, k, x, x_next, eps_fn(x, time), reduce)
    return policy.reinforce(score, -cost).mean()


def pathwise_loss(
    key: Key[Array, ""],
    f: Callable,
    eps_fn: Callable,
    schedule: Schedule,
    shape: tuple[int, ...],
) -> Float[Array, ""]:
    """E f(y), differentiable through the whole sampler, which the paper avoids.

    For comparisons. Memory is that of S states and the activations of one step.
    """
    trajectory = trajectories.rollout(key, eps_fn, schedule, shape, remat=True)
    return f(trajectory.sample).mean()


def transitions(
    trajectory: Trajectory, k: Int[Array, " B"]
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."], Float[Array, "B ..."]]:
    """(x_k, x_{k+1}, predicted noise) of each trajectory at its step k."""
    step, states = k[:, None], trajectory.states
    x, x_next, eps = (
        trajectories.of_each(*pair)[:, 0]
        for pair in ((states, step), (states, step + 1), (trajectory.eps, step))
    )
    return x, x_next, eps
