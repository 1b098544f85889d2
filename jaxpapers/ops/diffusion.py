r"""Denoising diffusion in discrete steps: noise schedules, samplers, log-probabilities.

The forward process is $x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1-\bar\alpha_t} \epsilon$
for t = 0 .. T-1. A ``Schedule`` has the coefficients of a reverse process of S Gaussian
steps, counted from noise to data, k = 0 .. S-1, whose net predicts the noise:

$$ x_{k+1} \sim N(a_k x_k + c_k\,\epsilon(x_k, t_k),\ \sigma_k^2 I) $$

DDPM, DDIM and FastDPM differ in these coefficients only, which are computed on the host
in float64. Sampling, log-probabilities and KL divergences are the same for all of them.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxpapers.ops.coefficients import (
    Schedule,
    alpha_bars,
    check_betas,
    check_density,
    cosine_betas,
    ddim_schedule,
    ddim_times,
    ddpm_schedule,
    linear_betas,
    scaled_linear_betas,
    sigmoid_betas,
)
from jaxpapers.ops.shapes import same_shape

__all__ = [
    "REDUCTIONS", "Schedule", "alpha_bars", "check_betas", "check_density",
    "cosine_betas", "ddim_schedule", "ddim_times", "ddpm_schedule", "guided",
    "linear_betas", "noise_loss", "posterior", "predict_x0", "q_sample",
    "scaled_linear_betas", "sigmoid_betas", "step_kl", "step_log_prob",
    "step_log_ratio", "step_mean",
]  # fmt: skip

REDUCTIONS = ("sum", "mean")


def q_sample(
    x: Float[Array, "B ..."],
    alpha_bar: Float[Array, " B"],
    noise: Float[Array, "B ..."],
) -> Float[Array, "B ..."]:
    """A draw of the forward process; ``alpha_bar`` is that of each row's t."""
    same_shape("q_sample", x=x, noise=noise)
    a = _rows(alpha_bar, x)
    return jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise


def predict_x0(
    x: Float[Array, "B ..."], alpha_bar: Float[Array, " B"], eps: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Clean samples for states and their predicted noise."""
    a = _rows(alpha_bar, x)
    return (x - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)


def posterior(
    x0: Float[Array, "B ..."], x: Float[Array, "B ..."], betas: Any, t: Int[Array, " B"]
) -> tuple[Float[Array, "B ..."], Float[Array, " B"]]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), DDPM eq 7; t = 0 has variance 0."""
    betas = check_betas(betas)
    bars = alpha_bars(betas)
    before = np.append(1.0, bars[:-1])
    c0 = jnp.asarray(np.sqrt(before) * betas / (1 - bars), x.dtype)[t]
    c1 = jnp.asarray(np.sqrt(1 - betas) * (1 - before) / (1 - bars), x.dtype)[t]
    var = jnp.asarray(betas * (1 - before) / (1 - bars), x.dtype)[t]
    return _rows(c0, x) * x0 + _rows(c1, x) * x, var


def noise_loss(
    eps_fn: Callable,
    x: Float[Array, "B ..."],
    key: Key[Array, ""],
    alpha_bar: Any,
) -> Float[Array, " B"]:
    r"""$|\epsilon - \epsilon_\theta(x_t, t)|^2$, mean over coordinates, at drawn t.

    Args:
      eps_fn: (x, time (B,)) -> predicted noise.
      x: clean samples.
      key: of times and noise.
      alpha_bar: (T,) of the forward process.
    """
    key_time, key_noise = jax.random.split(key)
    bars = jnp.asarray(alpha_bar, x.dtype)
    t = jax.random.randint(key_time, (len(x),), 0, len(bars))
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    eps = eps_fn(q_sample(x, bars[t], noise), t.astype(jnp.float32))
    return jnp.square(noise - eps).reshape(len(x), -1).mean(1)


def step_mean(
    schedule: Schedule, k: Any, x: Float[Array, "B ..."], eps: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Mean of x_{k+1} given x_k and the predicted noise; k (B,) or one number.

    NaN for a traced k outside 0 .. S - 1.

    Raises:
      ValueError: another k, if it is concrete.
    """
    a, c = (_rows(_at(v, k, x.dtype), x) for v in (schedule.x_mult, schedule.eps_mult))
    return a * x + c * eps


def step_log_prob(
    schedule: Schedule,
    k: Any,
    x: Float[Array, "B ..."],
    x_next: Float[Array, "B ..."],
    eps: Float[Array, "B ..."],
    reduce: str = "sum",
) -> Float[Array, " B"]:
    """Log-density of a step, nats.

    Args:
      schedule: with a density in every step, see ``check_density``.
      k: step of each row, (B,), or of all.
      x: states.
      x_next: next states.
      eps: predicted noise.
      reduce: "sum" over the coordinates, or "mean", as in released code.

    Raises:
      ValueError: see ``check_density`` and ``step_mean``.
    """
    check_density(schedule)
    same_shape("step_log_prob", x=x, x_next=x_next, eps=eps)
    std = _rows(_at(schedule.std, k, x.dtype), x)
    z = (x_next - step_mean(schedule, k, x, eps)) / std
    return _reduce(
        -0.5 * jnp.square(z) - jnp.log(std) - 0.5 * math.log(2 * math.pi), reduce
    )


def step_log_ratio(
    schedule: Schedule,
    k: Any,
    x: Float[Array, "B ..."],
    x_next: Float[Array, "B ..."],
    eps: Float[Array, "B ..."],
    eps_old: Float[Array, "B ..."],
    reduce: str = "sum",
) -> Float[Array, " B"]:
    r"""$\log p_\theta / p_{old}$ of a step, without the cancellation of two densities.

    $$ -\sum \left( \kappa \Delta z + \tfrac12 \kappa^2 \Delta^2 \right), \quad
       \kappa = c_k/\sigma_k,\ \Delta = \epsilon_{old} - \epsilon $$

    with z the old policy's noise. It is exactly 0 where the nets agree, and its error is
    that of the nets; the difference of two log-probabilities has an error of
    $10^{-7} |x| / \sigma_k$ a coordinate, which reaches 1e-4 at the last step.

    Args:
      schedule, k, x, x_next, reduce: see ``step_log_prob``.
      eps: noise predicted by the policy that is trained.
      eps_old: noise predicted by the policy that took the step.
    """
    check_density(schedule)
    same_shape("step_log_ratio", x=x, x_next=x_next, eps=eps, eps_old=eps_old)
    std = _rows(_at(schedule.std, k, x.dtype), x)
    kappa = _rows(_at(schedule.eps_mult, k, x.dtype), x) / std
    z = lax.stop_gradient((x_next - step_mean(schedule, k, x, eps_old)) / std)
    delta = kappa * (lax.stop_gradient(eps_old) - eps)
    return _reduce(-delta * (z + 0.5 * delta), reduce)


def step_kl(
    schedule: Schedule,
    k: Any,
    eps: Float[Array, "B ..."],
    eps_ref: Float[Array, "B ..."],
    reduce: str = "sum",
) -> Float[Array, " B"]:
    r"""KL of two policies' steps from one state, nats: $|\mu - \mu'|^2 / 2\sigma_k^2$.

    Means differ by $c_k (\epsilon - \epsilon')$; the variance is the same.
    """
    check_density(schedule)
    same_shape("step_kl", eps=eps, eps_ref=eps_ref)
    mult = _at(schedule.eps_mult / schedule.std, k, eps.dtype)
    return _reduce(0.5 * jnp.square(_rows(mult, eps) * (eps - eps_ref)), reduce)


def guided(
    eps_fn: Callable, weight: float | Float[Array, ""]
) -> Callable[[Array, Array, Array], Array]:
    r"""Classifier-free guidance, $\epsilon_0 + w (\epsilon_z - \epsilon_0)$.

    Both predictions come from one call on 2B rows (arXiv 2207.12598; released code's w:
    1 is the conditional prediction, 0 the unconditional one).

    Args:
      eps_fn: (x, time, tokens) -> predicted noise; token 0 is the null token.
      weight: w.

    Returns:
      A function of the same arguments.
    """

    def apply(x, time, tokens):
        # Both rows of a sample beside each other, so that they stay on its device.
        pairs = [jnp.repeat(v, 2, axis=0) for v in (x, time)]
        with_null = jnp.stack([tokens, jnp.zeros_like(tokens)], 1)
        both = eps_fn(*pairs, with_null.reshape(-1, *tokens.shape[1:]))
        both = both.reshape(len(x), 2, *x.shape[1:])
        conditional, unconditional = both[:, 0], both[:, 1]
        return unconditional + weight * (conditional - unconditional)

    return apply


def _at(values, k, dtype):
    """Coefficients of the steps k; an index beyond them would read the last one."""
    if not isinstance(k, jax.core.Tracer):
        steps = np.asarray(k)
        if steps.size and not (0 <= steps.min() and steps.max() < len(values)):
            raise ValueError(
                f"k must be in 0 .. {len(values) - 1}, the steps of the schedule, got "
                f"{steps.min()} .. {steps.max()}"
            )
    return jnp.asarray(values, dtype).at[k].get(mode="fill", fill_value=jnp.nan)


def _reduce(x, reduce):
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {REDUCTIONS}, got {reduce!r}")
    flat = x.reshape(len(x), -1)
    return flat.sum(1) if reduce == "sum" else flat.mean(1)


def _rows(v: Shaped[Array, "..."], x: Array) -> Array:
    """One number for each row of x, or for all of them, ready to multiply with it."""
    return jnp.reshape(v, (-1, *(1,) * (x.ndim - 1)))
