"""Score-matching losses, in continuous time and in discrete steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpapers.ops.sde import SDE
from jaxpapers.papers.score_wasserstein.options import WEIGHTS

SAMPLERS = ("uniform", "antithetic", "importance")
_CELLS = 1000


def sm_loss(
    score_fn: Callable,
    true_score_fn: Callable,
    sde: SDE,
    x_t: Float[Array, "K B d"],
    t: Float[Array, " K"],
    weight: str | Callable = "g2",
) -> Float[Array, ""]:
    r"""$\tfrac12 \int \lambda(t)\, E_{p_t} |\nabla \log p_t - s|^2\,dt$ (eq 5).

    Args:
      score_fn: (x (B, d), t (B,)) -> (B, d).
      true_score_fn: of the forward marginals, the same.
      sde: forward diffusion.
      x_t: draws of p_t for each time.
      t: increasing times, nodes of the trapezoidal rule.
      weight: "g2" or a function of t.

    Raises:
      ValueError: unknown weight, one time only.
    """
    if len(t) < 2:
        raise ValueError(f"an integral over t needs two times or more, got {len(t)}")

    def error(x, time):
        time = jnp.broadcast_to(time, x.shape[:1])
        return jnp.square(true_score_fn(x, time) - score_fn(x, time)).sum(1).mean()

    error_t = jax.lax.map(lambda part: error(*part), (x_t, t))
    return 0.5 * jnp.trapezoid(_weight(weight, sde, None)(t) * error_t, t)


def dsm_loss(
    params: Any,
    apply: Callable,
    sde: SDE,
    x0: Float[Array, "B d"],
    key: Key[Array, ""],
    weight: str | Callable = "g2",
    t_sampler: str = "uniform",
    *,
    log_factor: Callable | None = None,
    t_min: float = 1e-3,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""$\tfrac12 \int \lambda\, E |\nabla \log p_{0t}(x_t|x_0) - s(x_t,t)|^2 dt$ (eq 20).

    An unbiased estimate of the integral over [t_min, T]; with lambda = g^2 it grows
    without bound as ``t_min`` falls to 0. It is at least ``sm_loss`` (Theorem 2).

    Args:
      params: of the score.
      apply: (params, x (B, d), t (B,)) -> (B, d).
      sde: forward diffusion.
      x0: data.
      key: of times and noise.
      weight: "g2"; "I2" for g^2 I^2, which needs ``log_factor``; or a function of t.
      t_sampler: "uniform"; "antithetic", where t comes with T + t_min - t; "importance",
        times drawn as lambda / std^2.
      log_factor: t -> log I(t).
      t_min: earliest time.

    Returns:
      The loss, and of each sample ``t`` and ``per_t``, its squared error.

    Raises:
      ValueError: unknown names, ``t_min`` outside (0, T), "I2" without ``log_factor``.
    """
    if t_sampler not in SAMPLERS or not 0 < t_min < sde.T:
        raise ValueError(
            f"t_sampler must be one of {SAMPLERS} and t_min in (0, {sde.T}), got "
            f"{t_sampler!r} and {t_min}"
        )
    lam = _weight(weight, sde, log_factor)
    key_time, key_noise = jax.random.split(key)
    if t_sampler == "importance":
        t, density = _by_importance(key_time, len(x0), lam, sde, t_min, x0.dtype)
    else:
        t = _even(key_time, len(x0), t_sampler, t_min, sde.T).astype(x0.dtype)
        density = jnp.full_like(t, 1 / (sde.T - t_min))
    mean, std = sde.marginal(x0, t)
    noise = jax.random.normal(key_noise, x0.shape, x0.dtype)
    score = apply(params, mean + std[:, None] * noise, t)
    error = jnp.square(noise / std[:, None] + score).sum(1)
    return 0.5 * (lam(t) / density * error).mean(), {"t": t, "per_t": error}


def discrete_terms(
    eps: Float[Array, "K B d"],
    noise: Float[Array, "*K B d"],
    betas: Float[Array, " K"],
    alpha_bar: Float[Array, " K"],
    coord_mean: bool = False,
) -> Float[Array, " K"]:
    r"""Terms $\beta_k/(1-\bar\alpha_k)\, E |\epsilon_\theta - \epsilon|^2$ of 2 J.

    Args:
      eps: noise that a net predicts at every step.
      noise: that was added; the same at all steps if it has no axis K.
      betas: of the forward process.
      alpha_bar: of the forward process.
      coord_mean: mean over coordinates instead of their sum, as in the released code,
        whose J is smaller than the theorem's by the factor d.
    """
    noise = noise if noise.ndim == 3 else noise[None]
    square = jnp.square(eps - noise)
    square = square.mean(2) if coord_mean else square.sum(2)
    return betas / (1 - alpha_bar) * square.mean(1)


def antithetic_steps(key: Key[Array, ""], count: int, steps: int) -> Int[Array, " n"]:
    """Antithetic steps of ``count`` samples: t for one half, K - 1 - t for the other."""
    drawn = jax.random.randint(key, (count // 2 + 1,), 0, steps)
    return jnp.concatenate([drawn, steps - 1 - drawn])[:count]


def discrete_weights(
    name: str, betas: Any, alpha_bar: Any, log_I: Float[Array, " K"] | None = None
) -> Float[Array, " K"]:
    r"""Weights $\lambda_k$ of the discrete loss, of sum $\sum_k \beta_k$.

    Args:
      name: "g2": beta; "g2I": beta I, closest to Theorem 1; "I2": beta I^2, whose
        intercept does not depend on the net; "simple": $1-\bar\alpha$, the unweighted
        noise-prediction loss.
      betas: of the forward process.
      alpha_bar: of the forward process.
      log_I: logarithm of the integrating factor, for the two with I.

    Raises:
      ValueError: unknown name, or no ``log_I`` where it is needed.
    """
    if name not in WEIGHTS or ("I" in name and log_I is None):
        raise ValueError(
            f"weight must be one of {WEIGHTS}, those with I need log_I; got {name!r}"
        )
    betas, alpha_bar = (np.asarray(v, np.float64) for v in (betas, alpha_bar))
    unweighted = 1 - alpha_bar if name == "simple" else betas
    log = jnp.asarray(np.log(unweighted), jnp.result_type(float))
    if log_I is not None and "I" in name:
        log = log + (2 if name == "I2" else 1) * log_I
    # A softmax, because I overflows and only ratios of the weights matter.
    return jnp.asarray(betas.sum(), log.dtype) * jax.nn.softmax(log)


def _weight(weight, sde, log_factor) -> Callable:
    if callable(weight):
        return weight
    if weight not in ("g2", "I2") or (weight == "I2" and log_factor is None):
        raise ValueError(
            "weight must be 'g2', 'I2' with log_factor=, or a function of t, got "
            f"{weight!r}"
        )
    if weight == "g2":
        return lambda t: jnp.square(sde.diffusion(t))
    return lambda t: jnp.square(sde.diffusion(t) * jnp.exp(log_factor(t)))


def _even(key, count, t_sampler, t_min, last):
    if t_sampler == "uniform":
        return jax.random.uniform(key, (count,), minval=t_min, maxval=last)
    drawn = jax.random.uniform(key, (count // 2 + 1,), minval=t_min, maxval=last)
    return jnp.concatenate([drawn, last + t_min - drawn])[:count]


def _by_importance(key, count, lam, sde, t_min, dtype):
    """Times from a piecewise constant density, and their density."""
    ends = jnp.asarray(np.geomspace(t_min, sde.T, _CELLS + 1), dtype)
    middle, width = 0.5 * (ends[1:] + ends[:-1]), jnp.diff(ends)
    _, std = sde.marginal(jnp.zeros((_CELLS, 1), dtype), middle)
    share = lam(middle) / jnp.square(std) * width
    share = share / share.sum()
    key_cell, key_place = jax.random.split(key)
    cell = jax.random.categorical(key_cell, jnp.log(share), shape=(count,))
    place = jax.random.uniform(key_place, (count,), dtype)
    return ends[cell] + place * width[cell], (share / width)[cell]
