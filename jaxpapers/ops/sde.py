r"""Diffusions in continuous time, their reverse, and the flow with the same marginals.

Forward: $dx = f(x,t)\,dt + g(t)\,dw$ from data at t = 0 to t = T. Reverse, with a score
$s \approx \nabla \log p_t$: $dx = (f - g^2 s)\,dt + g\,d\bar w$ from T to 0. The ordinary
equation $dx = (f - \tfrac12 g^2 s)\,dt$ has the same marginals if the score is exact.

Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations",
arXiv 2011.13456.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.ops.diffusion import check_betas

METHODS = ("em", "ancestral", "heun")


class SDE(NamedTuple):
    r"""A diffusion with Gaussian transitions; functions of arrays, times of shape (B,).

    Attributes:
      drift: (x (B, d), t) -> f (B, d); linear in x.
      diffusion: t -> g.
      transition: (s, t) -> scale r and variance v of x_t given x_s, s <= t:
        N(r x_s, v I).
      marginal: (x0 (B, d), t) -> mean (B, d) and standard deviation (B,) of x_t.
      prior_sample: (key, shape) -> draws of the prior, near the distribution of x_T.
      L_f: t -> constant with $-(x-y) \cdot (f(x)-f(y)) \le L_f |x-y|^2$. For
        f = -b x / 2 it is +b / 2, not -b / 2.
      T: last time.
    """

    drift: Callable
    diffusion: Callable
    transition: Callable
    marginal: Callable
    prior_sample: Callable
    L_f: Callable
    T: float


def vp_sde(
    beta_min: float = 0.1, beta_max: float = 20.0, T: float = 1.0, sigma: float = 1.0
) -> SDE:
    r"""$f = -\tfrac12\beta x$, $g = \sigma\sqrt\beta$, with a beta that rises linearly.

    Args:
      beta_min: rate at 0.
      beta_max: rate at T.
      T: last time.
      sigma: standard deviation of the prior.

    Raises:
      ValueError: rates or T that are not positive, or a rate that falls.

    Example:
      >>> sde = vp_sde()
      >>> mean, std = jax.jit(sde.marginal)(jnp.ones((1, 2)), jnp.ones(1))
      >>> round(float(mean[0, 0]), 4), round(float(std[0]), 4)
      (0.0066, 1.0)
    """
    _check(beta_min=beta_min, beta_max=beta_max, T=T, sigma=sigma)
    rate, integral = _linear(beta_min, beta_max, T)
    return _vp(rate, integral, T, sigma)


def discrete_vp(betas: Any, sigma: float = 1.0) -> SDE:
    r"""The variance-preserving diffusion that interpolates a discrete process.

    On (k - 1, k] the rate is $-\log(1 - \beta_k)$, so that at t = k the scale is exactly
    $\sqrt{\bar\alpha_k}$ and one "ancestral" step from k is that of the discrete
    process; T is the number of steps.

    Args:
      betas: variances of the steps.
      sigma: standard deviation of the prior.

    Raises:
      ValueError: betas outside (0, 1), sigma that is not positive.
    """
    _check(sigma=sigma)
    rates = -np.log1p(-check_betas(betas))
    knots = np.append(0.0, np.cumsum(rates))
    steps = np.arange(len(knots))

    def rate(t):
        part = jnp.clip(jnp.ceil(t).astype(jnp.int32) - 1, 0, len(rates) - 1)
        return jnp.asarray(rates, t.dtype)[part]

    def integral(s, t):
        grid, values = jnp.asarray(steps, t.dtype), jnp.asarray(knots, t.dtype)
        return jnp.interp(t, grid, values) - jnp.interp(s, grid, values)

    return _vp(rate, integral, float(len(rates)), sigma)


def ve_sde(sig_min: float = 0.01, sig_max: float = 50.0, T: float = 1.0) -> SDE:
    r"""f = 0 and a noise level $\sigma(t)$ that grows geometrically.

    The variance at t is $\sigma(t)^2 - \sigma(0)^2$; the paper drops the second term.

    Args:
      sig_min: noise level at 0.
      sig_max: noise level at T, and the prior's.
      T: last time.

    Raises:
      ValueError: values that are not positive, or a level that falls.
    """
    _check(sig_min=sig_min, sig_max=sig_max, T=T)
    if sig_min >= sig_max:
        raise ValueError(f"sig_min must be < sig_max, got {sig_min} and {sig_max}")
    growth = float(np.log(sig_max / sig_min)) / T

    def diffusion(t):
        return sig_min * jnp.exp(growth * t) * (2 * growth) ** 0.5

    def transition(s, t):
        # Of the start's level, without a difference of large numbers.
        var = sig_min**2 * jnp.exp(2 * growth * s) * jnp.expm1(2 * growth * (t - s))
        return jnp.ones_like(t), var

    return _sde(
        lambda x, t: jnp.zeros_like(x),
        diffusion,
        transition,
        jnp.zeros_like,
        T,
        sig_max,
    )


def subvp_sde(beta_min: float = 0.1, beta_max: float = 20.0, T: float = 1.0) -> SDE:
    r"""``vp_sde``'s drift with $g^2 = \beta (1 - e^{-2\int_0^t \beta})$.

    g is 0 at t = 0: bounds that divide by g need to start later.

    Args:
      beta_min: rate at 0.
      beta_max: rate at T.
      T: last time.

    Raises:
      ValueError: see ``vp_sde``.
    """
    _check(beta_min=beta_min, beta_max=beta_max, T=T)
    rate, integral = _linear(beta_min, beta_max, T)

    def diffusion(t):
        return jnp.sqrt(-rate(t) * jnp.expm1(-2 * integral(jnp.zeros_like(t), t)))

    def transition(s, t):
        passed = integral(s, t)
        both = jnp.exp(-integral(jnp.zeros_like(s), s) - integral(jnp.zeros_like(t), t))
        return jnp.exp(-passed / 2), -jnp.expm1(-passed) * (1 - both)

    return _sde(_shrink(rate), diffusion, transition, lambda t: rate(t) / 2, T, 1.0)


def score_from_eps(
    eps: Float[Array, "B d"], std: Float[Array, " B"]
) -> Float[Array, "B d"]:
    """Score of a noise prediction, -eps / std."""
    return -eps / std[:, None]


def eps_from_score(
    score: Float[Array, "B d"], std: Float[Array, " B"]
) -> Float[Array, "B d"]:
    """Noise prediction of a score, -std score."""
    return -std[:, None] * score


def reverse_sde_sample(
    key: Key[Array, ""],
    score_fn: Callable,
    sde: SDE,
    x: Float[Array, "B d"],
    n_steps: int,
    method: str = "em",
    *,
    noise_last: bool = True,
    t_min: float = 0.0,
    trajectory: bool = False,
) -> Float[Array, "*S B d"]:
    r"""Runs the reverse diffusion from T to ``t_min`` in equal steps, one ``lax.scan``.

    With s the score at the step's start, "em" (Euler-Maruyama) takes the reverse equation
    as it is; "heun" averages its drift over both ends, but for the last step, where a
    score may not exist; "ancestral" takes the transition's scale r and variance v:
    $x' = (x + v s)/r + \sqrt v z$, which for ``discrete_vp`` is DDPM sampling with
    variances beta.

    Args:
      key: of the noise.
      score_fn: (x (B, d), t (B,)) -> (B, d); not evaluated at ``t_min``.
      sde: the forward diffusion.
      x: states at T.
      n_steps: steps.
      method: "em", "ancestral" or "heun".
      noise_last: whether the last step adds noise.
      t_min: where to stop.
      trajectory: return all n_steps + 1 states, from T on, stacked in front.

    Raises:
      ValueError: unknown method, no steps, ``t_min`` outside [0, T).
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    times = _times(sde, n_steps, t_min).astype(x.dtype)

    def body(x, step):
        k, start, end = step
        t, to = (jnp.broadcast_to(v, x.shape[:1]) for v in (start, end))
        last = k == n_steps - 1
        noise = jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype)
        noise = noise if noise_last else jnp.where(last, 0.0, noise)
        x = _reverse_step(method, score_fn, sde, x, t, to, noise, last)
        return x, x if trajectory else None

    steps = (jnp.arange(n_steps), jnp.asarray(times[:-1]), jnp.asarray(times[1:]))
    final, states = lax.scan(body, x, steps)
    return jnp.concatenate([x[None], jnp.asarray(states)]) if trajectory else final


def probability_flow(
    score_fn: Callable,
    sde: SDE,
    x: Float[Array, "B d"],
    n_steps: int,
    *,
    reverse: bool = True,
    t_min: float = 1e-3,
) -> Float[Array, "B d"]:
    r"""Follows $dx = (f - \tfrac12 g^2 s)\,dt$ by the classical Runge-Kutta method.

    Args:
      score_fn: (x (B, d), t (B,)) -> (B, d).
      sde: the forward diffusion.
      x: states at T, or at ``t_min`` if not reverse.
      n_steps: steps, each of four scores.
      reverse: from T to ``t_min``; else from there to T.
      t_min: the end at the data; a score may not exist at 0.

    Raises:
      ValueError: no steps, ``t_min`` outside [0, T).
    """
    times = _times(sde, n_steps, t_min).astype(x.dtype)
    times = jnp.asarray(times if reverse else times[::-1])

    def velocity(x, t):
        t = jnp.broadcast_to(t, x.shape[:1])
        weight = jnp.square(sde.diffusion(t))[:, None]
        return sde.drift(x, t) - 0.5 * weight * score_fn(x, t)

    def body(x, step):
        return _runge_kutta(velocity, x, *step), None

    return lax.scan(body, x, (times[:-1], times[1:]))[0]


def gaussian_reverse_moments(
    sde: SDE,
    mean: Float[Array, " d"],
    cov: Float[Array, "d d"],
    score_A: Callable,
    score_c: Callable,
    n_steps: int,
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Mean and covariance at 0 of the reverse diffusion with an affine score.

    Args:
      sde: the forward diffusion.
      mean: at T.
      cov: at T.
      score_A: t -> A (d, d) of the score -A (x - c).
      score_c: t -> c (d,).
      n_steps: Runge-Kutta steps of the moments' ordinary equations.

    Raises:
      ValueError: no steps.
    """
    times = jnp.asarray(_times(sde, n_steps, 0.0).astype(mean.dtype))
    eye = jnp.eye(len(mean), dtype=mean.dtype)

    def velocity(moments, t):
        m, v = moments
        t_rows = jnp.broadcast_to(t, (len(m),))
        g2, A = jnp.square(sde.diffusion(t_rows[:1]))[0], score_A(t)
        pull = sde.drift(eye, t_rows).T + g2 * A  # drift(eye) has f(e_i) as rows.
        dm = pull @ m - g2 * A @ score_c(t)
        # The noise adds while t falls.
        return dm, pull @ v + v @ pull.T - g2 * eye

    def body(moments, step):
        return _runge_kutta(velocity, moments, *step), None

    return lax.scan(body, (mean, cov), (times[:-1], times[1:]))[0]


def _reverse_step(method, score_fn, sde, x, t, to, noise, last):
    if method == "ancestral":
        scale, var = (v[:, None] for v in sde.transition(to, t))
        return (x + var * score_fn(x, t)) / scale + jnp.sqrt(var) * noise

    def drift(x, t):
        weight = jnp.square(sde.diffusion(t))[:, None]
        return sde.drift(x, t) - weight * score_fn(x, t)

    dt = (t - to)[:, None]
    first = drift(x, t)
    moved = sde.diffusion(t)[:, None] * jnp.sqrt(dt) * noise
    guess = x - dt * first + moved
    if method == "em":
        return guess
    # The score may not exist at the last step's end: evaluated at its start, unused.
    second = drift(guess, jnp.where(last, t, to))
    return jnp.where(last, guess, x - 0.5 * dt * (first + second) + moved)


def _runge_kutta(velocity, x, t, to):
    """One classical step of a pytree from t to another time."""
    dt = to - t

    def add(x, k, share):
        return jax.tree.map(lambda a, b: a + share * dt * b, x, k)

    k1 = velocity(x, t)
    k2 = velocity(add(x, k1, 0.5), t + 0.5 * dt)
    k3 = velocity(add(x, k2, 0.5), t + 0.5 * dt)
    k4 = velocity(add(x, k3, 1.0), to)
    total = jax.tree.map(lambda a, b, c, d: a + 2 * b + 2 * c + d, k1, k2, k3, k4)
    return add(x, total, 1 / 6)


def _times(sde, n_steps, t_min):
    """Decreasing times, computed in float64 so that whole times are exact."""
    if n_steps < 1 or not 0 <= t_min < sde.T:
        raise ValueError(
            f"needs n_steps >= 1 and 0 <= t_min < T = {sde.T}, got {n_steps} and {t_min}"
        )
    share = np.arange(n_steps, -1, -1) / n_steps
    return t_min + (sde.T - t_min) * share


def _linear(beta_min, beta_max, T):
    """A linear rate, and its integral between two times."""
    if beta_min > beta_max:
        raise ValueError(f"beta_min must be <= beta_max, got {beta_min} and {beta_max}")
    slope = (beta_max - beta_min) / T

    def integral(s, t):
        return (t - s) * (beta_min + 0.5 * slope * (s + t))

    return lambda t: beta_min + slope * t, integral


def _shrink(rate):
    return lambda x, t: -0.5 * rate(t)[:, None] * x


def _vp(rate, integral, T, sigma):
    def transition(s, t):
        passed = integral(s, t)
        return jnp.exp(-passed / 2), -(sigma**2) * jnp.expm1(-passed)

    def diffusion(t):
        return sigma * jnp.sqrt(rate(t))

    return _sde(_shrink(rate), diffusion, transition, lambda t: rate(t) / 2, T, sigma)


def _sde(drift, diffusion, transition, L_f, T, prior_std) -> SDE:
    def marginal(x0, t):
        scale, var = transition(jnp.zeros_like(t), t)
        return scale[:, None] * x0, jnp.sqrt(var)

    def prior_sample(key, shape):
        return prior_std * jax.random.normal(key, shape)

    return SDE(drift, diffusion, transition, marginal, prior_sample, L_f, float(T))


def _check(**values):
    wrong = {name: v for name, v in values.items() if not 0 < v < float("inf")}
    if wrong:
        raise ValueError(f"must be positive and finite, got {wrong}")
