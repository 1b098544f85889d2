"""The bound of a trained score model, with its parts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.ops import diffusion
from jaxpapers.papers.score_wasserstein.bound import (
    Bound,
    Factor,
    w2_bound_cor1,
    w2_bound_theorem1,
)
from jaxpapers.papers.score_wasserstein.discrete import (
    Model,
    factor,
    sampler,
    score_lipschitz,
)
from jaxpapers.papers.score_wasserstein.lipschitz import Lipschitz
from jaxpapers.papers.score_wasserstein.options import STARTS


class Certificate(NamedTuple):
    """Parts of a bound in K discrete steps.

    Attributes:
      J: denoising loss with weight g^2, summed over coordinates.
      b: (K,), denoising error of the score, at least that of eq 14.
      lipschitz: one-sided constants of the score.
      factor: integrating factor.
      theorem1: eq 14.
      corollary1: eq 16, a line over log J.
      start_distance: at least W_2(p_T, q_T); 0 where sampling starts from noised data.
    """

    J: Any
    b: Any
    lipschitz: Lipschitz
    factor: Factor
    theorem1: Bound
    corollary1: Bound
    start_distance: Any


def certificate(
    params: dict,
    data: Float[Array, "N d"],
    key: Key[Array, ""],
    *,
    model: Model,
    starts: str = "data",
    points: Float[Array, "M d"] | None = None,
    mode: str = "jacobian",
    draws: int = 8,
) -> tuple[Float[Array, ""], Certificate]:
    """The bound of W_2 between the data and a trained net's samples.

    Args:
      params: of the net.
      data: draws of p_0.
      key: of the noise.
      model: net and forward process.
      starts: see ``sampler``; "data" has no offset.
      points: where L_s is estimated besides the data and the data noised to every step,
        e.g. samples.
      mode: see ``score_lipschitz``.
      draws: noise draws for every data point and step.

    Returns:
      The bound of Theorem 1, and its parts.

    Raises:
      ValueError: unknown names, no data, no draws; outside of jit also a score or a loss
        that is not finite.
    """
    if starts not in STARTS:
        raise ValueError(f"starts must be one of {STARTS}, got {starts!r}")
    if not len(data) or draws < 1:
        raise ValueError(f"needs data and draws >= 1, got {len(data)} and {draws}")
    bars = model.alpha_bar
    rows = jnp.repeat(data, draws, 0)
    eps = model.eps(params)

    def at_step(part):
        k, key = part
        noise = jax.random.normal(key, rows.shape, rows.dtype)
        step = jnp.full(len(rows), k)
        x = diffusion.q_sample(rows, jnp.asarray(bars, rows.dtype)[step], noise)
        return jnp.square(noise - eps(x, step)).sum(1).mean(), x[::draws]

    steps = jnp.arange(len(bars))
    error, noised = lax.map(at_step, (steps, jax.random.split(key, len(bars))))
    b = error / jnp.asarray(1 - bars, error.dtype)
    betas = jnp.asarray(model.betas, error.dtype)
    J = 0.5 * (betas * b).sum()
    nearby = [data, noised.reshape(-1, data.shape[1])]
    nearby += [] if points is None else [points]
    constant = score_lipschitz(params, jnp.concatenate(nearby), model=model, mode=mode)
    integral = factor(constant.value, model=model)
    offset = jnp.zeros((), b.dtype)
    if starts == "prior":
        # Coupling of x_T = sqrt(a) x_0 + sqrt(1 - a) z with its z, which is N(0, I).
        square = bars[-1] * jnp.square(data).sum(1).mean()
        offset = jnp.sqrt(square + (1 - np.sqrt(1 - bars[-1])) ** 2 * data.shape[1])
    theorem1 = w2_bound_theorem1(betas, integral.log, b, None, offset)
    corollary1 = w2_bound_cor1(betas, integral.log, J, None, offset)
    parts = Certificate(J, b, constant, integral, theorem1, corollary1, offset)
    return theorem1.total, parts


def diagnose(
    params: dict,
    data: Float[Array, "N d"],
    key: Key[Array, ""],
    *,
    model: Model,
    starts: str = "data",
) -> dict[str, Array]:
    """Numbers of the certificate along a training run.

    Args:
      params: of the net.
      data: draws of p_0.
      key: of noise and samples.
      model: net and forward process.
      starts: see ``sampler``.

    Returns:
      ``log_J`` and ``log_intercept``, point and line of eq 16; ``bound`` (eq 14) and
      ``bound_line`` (eq 16), infinite if they overflow, with ``log_bound``; ``offset``,
      their second term; ``lipschitz``, the largest L_s of all steps; ``log_factor``, the
      largest |log I|: above 20 (``INEXACT``) float32 is not enough.
    """
    key_sample, key = jax.random.split(key)
    samples = sampler(params, key_sample, data, model=model, starts=starts)
    bound, parts = certificate(
        params, data, key, model=model, starts=starts, points=samples
    )
    return {
        "log_J": jnp.log(parts.J),
        "log_intercept": parts.corollary1.log_intercept,
        "bound": bound,
        "bound_line": parts.corollary1.total,
        "log_bound": parts.theorem1.log_total,
        "offset": parts.theorem1.offset_term,
        "lipschitz": parts.lipschitz.value.max(),
        "log_factor": jnp.abs(parts.factor.log).max(),
    }
