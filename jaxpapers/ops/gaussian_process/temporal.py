r"""Gaussian-process temporal-difference learning: values observed through rewards.

$$ r_i = f(x_i) - \gamma_i f(x'_i) + n_i, \qquad
   \gamma_i = 0 \text{ at the end of an episode} $$

Noise n ~ N(0, Sigma): ``deterministic`` Sigma = s2 I (Engel, Mannor and Meir, "Bayes
meets Bellman", ICML 2003); ``monte_carlo`` n_i = N_i - gamma_i N_{i+1} with white N of
variance s2, Sigma = s2 H H^T (the same, "Reinforcement learning with Gaussian
processes", ICML 2005), under which a finished episode says as much as its discounted
returns.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxpapers.ops.gaussian_process.kernels import Model, kernel_matrix
from jaxpapers.ops.gaussian_process.regression import (
    Link,
    Observations,
    Posterior,
    check_rows,
    condition,
    padded,
)

NOISES = ("deterministic", "monte_carlo")


def fit_td(
    model: Model,
    x: Float[Array, "N _"],
    successor: Float[Array, "_ _"],
    reward: Float[Array, " N"],
    done: Bool[Array, " N"],
    gamma: Any,
    *,
    noise: str = "deterministic",
    order: Int[Array, " N"] | None = None,
    mask: Bool[Array, " N"] | None = None,
) -> Posterior:
    """The posterior of values given rewards.

    Args:
      model: hyper-parameters.
      x: inputs (state, action).
      successor: the next state with the next action: that taken (SARSA), or the best of
        a sample. Not read where ``done``.
      reward: of the transition.
      done: whether the episode ended in it, so that no value follows.
      gamma: discount in [0, 1].
      noise: of ``NOISES``.
      order: time of each row; a row of time t + 1 starts where that of time t ended,
        unless that is ``done``. Only the correlations of ``monte_carlo`` depend on it.
        None: rows follow each other.
      mask: see ``regression.fit``.

    Raises:
      ValueError: unknown noise, gamma outside [0, 1], or of ``regression.fit``.
    """
    mask = jnp.ones(len(x), bool) if mask is None else mask
    check_rows(model, x, reward, mask)
    given = differences(
        model, x, successor, reward, done, gamma, noise=noise, order=order, mask=mask
    )
    return condition(model, given)


def differences(
    model: Model,
    x: Float[Array, "N _"],
    successor: Float[Array, "_ _"],
    reward: Float[Array, " N"],
    done: Bool[Array, " N"],
    gamma: Any,
    *,
    noise: str,
    order: Int[Array, " N"] | None,
    mask: Bool[Array, " N"],
) -> Observations:
    """Covariance and residual of the rewards, see ``fit_td``."""
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {NOISES}, got {noise!r}")
    if not isinstance(gamma, jax.core.Tracer) and not np.all(
        (np.asarray(gamma) >= 0) & (np.asarray(gamma) <= 1)
    ):
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    order = jnp.arange(len(x)) if order is None else order
    if successor.shape != x.shape or done.shape != reward.shape:
        raise ValueError(
            f"successors and ends must have the shapes {x.shape} and {reward.shape}, got "
            f"{successor.shape} and {done.shape}"
        )
    x = jnp.where(mask[:, None], x, 0)
    follows = mask & ~done
    successor = jnp.where(follows[:, None], successor, 0)
    weight = jnp.where(follows, gamma, 0).astype(x.dtype)
    across = kernel_matrix(model, x, successor) * weight[None]
    after = kernel_matrix(model, successor, successor)
    cov = kernel_matrix(model, x, x) - across - across.T
    cov = cov + after * weight[:, None] * weight[None]
    eye = jnp.eye(len(x), dtype=cov.dtype)
    if noise == "deterministic":
        sigma = eye
    else:
        # N at the end of a row is that at the start of the next.
        shared = (order[None] == order[:, None] + 1) * weight[:, None]
        sigma = eye * (1 + jnp.square(weight))[None] - shared - shared.T
    residual = reward - model.mean * (1 - weight)
    link = Link(successor, weight)
    return padded(x, link, mask, cov + model.noise * sigma, residual)


def draw_td_noise(
    key: Key[Array, ""],
    post: Posterior,
    noise: str,
    order: Int[Array, " N"] | None = None,
) -> Float[Array, " N"]:
    """A draw of n ~ N(0, Sigma) of each row, 0 for padding.

    Args:
      key: of the draw.
      post: of ``fit_td``.
      noise, order: as that was given.
    """
    key_start, key_end = jax.random.split(key)
    count = len(post.mask)
    order = jnp.arange(count) if order is None else order
    white = jnp.sqrt(post.model.noise) * jnp.stack(
        [jax.random.normal(k, (count,), post.root.dtype) for k in (key_start, key_end)]
    )
    if noise == "deterministic":
        return jnp.where(post.mask, white[0], 0)
    follows = (order[None] == order[:, None] + 1) & post.mask[None]
    # Where no row starts there, the end of a row has noise of its own.
    assert post.link is not None
    end = jnp.where(follows.any(1), jnp.where(follows, white[:1], 0).sum(1), white[1])
    return jnp.where(post.mask, white[0] - post.link.weight * end, 0)
