r"""The bound: integrating factor, Theorem 1, its corollaries, the offset.

Arrays of K numbers belong to increasing times ``t``, and integrals are trapezoids over
them; ``t=None`` is a process in discrete steps, whose integrals are sums from the first
step to the step itself. Computations are in logarithms: values that overflow are infinite
and flagged, never NaN, and their logarithms stay finite.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LARGEST = 80.0
"""Logarithm above which a value is reported as infinite; float32 ends at 88."""
INEXACT = 20.0
"""Size of a logarithm above which float32 is too inexact, with a warning."""


class Factor(NamedTuple):
    """The integrating factor I(t).

    Attributes:
      log: (K,).
      value: (K,), infinite where the logarithm is above ``LARGEST``.
      overflow: whether any value is infinite.
    """

    log: Any
    value: Any
    overflow: Any


class Bound(NamedTuple):
    r"""A bound of W_2(p_0, q_0).

    Attributes:
      first_term: contribution of the loss.
      offset_term: I(T) W_2(p_T, q_T).
      total: their sum, the bound.
      log_intercept: c of the line $\log W_2 \le \tfrac12 \log J + c$ of the corollary;
        in Theorem 1's struct that of Corollary 1.
      log_total: logarithm of the total, finite also if the total is not.
      overflow: whether the total is infinite because its logarithm is above ``LARGEST``.
    """

    first_term: Any
    offset_term: Any
    total: Any
    log_intercept: Any
    log_total: Any
    overflow: Any


def integrating_factor(
    L_f: Float[Array, " K"],
    L_s: Float[Array, " K"],
    g2: Float[Array, " K"],
    t: Float[Array, " K"] | None,
) -> Factor:
    r"""$I(t) = \exp \int_0^t (L_f + L_s g^2)\,dr$ (eq 15).

    Args:
      L_f: constant of the drift, $-(x-y) \cdot (f(x)-f(y)) \le L_f |x-y|^2$: for
        f = -beta x / 2 it is +beta / 2.
      L_s: one-sided Lipschitz constant of the score, often negative.
      g2: squared diffusion; in discrete steps the betas.
      t: times from 0 on; None: discrete steps.

    Raises:
      ValueError: lengths that differ, times that do not increase, values that are not
        finite, g2 < 0.

    Warns:
      RuntimeWarning: a logarithm above 20 in size in float32.

    Example:
      >>> one, t = np.ones(3, np.float32), np.arange(3, dtype=np.float32)
      >>> jax.jit(integrating_factor)(0.5 * one, -one, one, t).log
      Array([ 0. , -0.5, -1. ], dtype=float32)
    """
    _check(t, L_f=L_f, L_s=L_s, g2=g2)
    _check_sign("g2", g2)
    rate = L_f + L_s * g2
    if t is None:
        log = jnp.cumsum(rate)
    else:
        parts = 0.5 * (rate[1:] + rate[:-1]) * jnp.diff(t)
        log = jnp.append(jnp.zeros(1, rate.dtype), jnp.cumsum(parts))
    if not _traced(log) and log.dtype != jnp.float64:
        warn_inexact(float(jnp.abs(log).max()))
    return Factor(log, _exp(log), (log > LARGEST).any())


def warn_inexact(largest: float) -> None:
    """Warns if |log I| in float32 is above ``INEXACT``."""
    if largest > INEXACT:
        warnings.warn(
            f"|log I| is above {INEXACT:g} in float32; a bound of that size needs "
            "float64: jax.enable_x64(True)",
            RuntimeWarning,
            stacklevel=3,
        )


def w2_bound_theorem1(
    g2: Float[Array, " K"],
    log_I: Float[Array, " K"],
    b: Float[Array, " K"],
    t: Float[Array, " K"] | None,
    offset: Any = 0.0,
) -> Bound:
    r"""$W_2(p_0,q_0) \le \int g^2 I \sqrt b\,dt + I(T)\,W_2(p_T,q_T)$ (eq 14).

    Args:
      g2: squared diffusion.
      log_I: logarithm of the integrating factor.
      b: $E_{p_t} |\nabla \log p_t - s|^2$, or an upper bound.
      t: see ``integrating_factor``.
      offset: W_2(p_T, q_T).

    Raises:
      ValueError: see ``integrating_factor``; negative b or offset.
    """
    _check(t, g2=g2, log_I=log_I, b=b)
    _check_sign("g2", g2)
    _check_sign("b", b)
    first = _log_integral(_log(g2) + log_I + 0.5 * _log(b), t)
    return _bound(first, _intercept(_log(g2) + 2 * log_I, t), log_I, offset)


def w2_bound_cor1(
    g2: Float[Array, " K"],
    log_I: Float[Array, " K"],
    J: Any,
    t: Float[Array, " K"] | None,
    offset: Any = 0.0,
) -> Bound:
    r"""$W_2 \le \sqrt{2 \int g^2 I^2\,dt\; J(g^2)} + I(T)\,W_2(p_T,q_T)$ (eq 16).

    Args:
      g2: squared diffusion.
      log_I: logarithm of the integrating factor.
      J: $\tfrac12 \int g^2 b\,dt$; the denoising loss is at least that (Theorem 2).
      t: see ``integrating_factor``.
      offset: W_2(p_T, q_T).

    Raises:
      ValueError: see ``integrating_factor``; negative J or offset.
    """
    return w2_bound_general(g2, log_I, g2, J, t, offset)


def w2_bound_general(
    g2: Float[Array, " K"],
    log_I: Float[Array, " K"],
    lam: Float[Array, " K"],
    J_lam: Any,
    t: Float[Array, " K"] | None,
    offset: Any = 0.0,
) -> Bound:
    r"""``w2_bound_cor1`` for a loss of any weight.

    $$ W_2 \le \sqrt{2 \int g^4 I^2/\lambda\,dt\; J(\lambda)} + I(T)\,W_2(p_T,q_T) $$

    Args:
      g2: squared diffusion.
      log_I: logarithm of the integrating factor.
      lam: weight $\lambda(t)$ of the loss.
      J_lam: $\tfrac12 \int \lambda b\,dt$.
      t: see ``integrating_factor``.
      offset: W_2(p_T, q_T).

    Raises:
      ValueError: see ``integrating_factor``; a weight that is negative, or zero where g
        is not; negative J or offset.
    """
    _check(t, g2=g2, log_I=log_I, lam=lam)
    for name, value in (("g2", g2), ("lam", lam)):
        _check_sign(name, value)
    if not _traced(lam, g2) and ((np.asarray(lam) == 0) & (np.asarray(g2) > 0)).any():
        raise ValueError("lam is zero where g2 is not: its loss bounds nothing there")
    _check_sign("J", J_lam)
    still = g2 == 0
    ratio = jnp.where(still, -jnp.inf, 2 * _log(g2) - _log(jnp.where(still, 1.0, lam)))
    intercept = _intercept(ratio + 2 * log_I, t)
    first = intercept + 0.5 * _log(jnp.asarray(J_lam, log_I.dtype))
    return _bound(first, intercept, log_I, offset)


def w2_offset_vp(
    L_s: Float[Array, " K"],
    g2: Float[Array, " K"],
    t: Float[Array, " K"] | None,
    distance: Any,
) -> Float[Array, ""]:
    r"""The offset's bound for a variance-preserving diffusion (eq 19).

    $\exp(\int g^2 L_s)\,W_2(p_0, N(0,\sigma^2 I))$ with $g^2 = \sigma^2\beta$ and q_T the
    prior: the forward contraction cancels L_f.

    Args:
      L_s: one-sided Lipschitz constant of the score.
      g2: squared diffusion.
      t: see ``integrating_factor``.
      distance: W_2 of the data and the prior.

    Raises:
      ValueError: see ``integrating_factor``; a negative distance.
    """
    _check_sign("distance", distance)
    factor = integrating_factor(jnp.zeros_like(L_s), L_s, g2, t)
    return _exp(factor.log[-1] + _log(jnp.asarray(distance, factor.log.dtype)))


def _bound(first, intercept, log_I, offset) -> Bound:
    _check_sign("offset", offset)
    later = log_I[-1] + _log(jnp.asarray(offset, log_I.dtype))
    total = jnp.logaddexp(first, later)
    return Bound(
        _exp(first), _exp(later), _exp(total), intercept, total, total > LARGEST
    )


def _intercept(log_integrand, t):
    return 0.5 * (jnp.log(2.0) + _log_integral(log_integrand, t))


def _log_integral(log_integrand, t):
    if t is None:
        return jax.scipy.special.logsumexp(log_integrand)
    steps = jnp.diff(t)
    zero = jnp.zeros(1, t.dtype)
    weights = 0.5 * (jnp.append(steps, zero) + jnp.append(zero, steps))
    return jax.scipy.special.logsumexp(log_integrand + jnp.log(weights))


def _exp(log):
    """Infinite above ``LARGEST``."""
    above = log > LARGEST  # Not "not below": NaN stays NaN.
    return jnp.where(above, jnp.inf, jnp.exp(jnp.where(above, 0.0, log)))


def _log(x):
    """-inf at 0, with a gradient of 0 there; NaN below."""
    zero = x == 0
    return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1.0, x)))


def _traced(*values):
    return any(isinstance(v, jax.core.Tracer) for v in values)


def _check(t, **arrays):
    """Checks lengths and, outside of jit, values."""
    named = arrays if t is None else {**arrays, "t": t}
    lengths = {name: len(x) for name, x in named.items()}
    if len(set(lengths.values())) > 1 or not min(lengths.values()):
        raise ValueError(f"lengths must be equal and not 0, got {lengths}")
    if t is not None and len(t) < 2:
        raise ValueError(
            "an integral needs two times or more; discrete steps have t=None"
        )
    for name, x in named.items():
        if not _traced(x) and not np.isfinite(np.asarray(x)).all():
            raise ValueError(
                f"{name} must be finite, got {np.asarray(x)}; is the score NaN?"
            )
    if t is not None and not _traced(t) and not (np.diff(np.asarray(t)) > 0).all():
        raise ValueError(f"t must increase, got {np.asarray(t)}")


def _check_sign(name, x):
    if not _traced(x) and not (np.asarray(x) >= 0).all():
        raise ValueError(f"{name} must be >= 0, got {np.asarray(x)}")
