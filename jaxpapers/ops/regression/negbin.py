"""Negative binomial regression of the second kind: Var = mu + alpha mu^2."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import gammaln

from jaxpapers.ops.regression.covariance import dot
from jaxpapers.ops.regression.design import design
from jaxpapers.ops.regression.poisson import check_counts, check_done, ppml
from jaxpapers.ops.regression.result import Result, finish, in_float64

STEPS = 100


def negbin(
    y: Any,
    x: Mapping[str, Any],
    *,
    level: float = 0.95,
    intercept: bool = True,
    missing: str = "raise",
    collinear: str = "raise",
) -> Result:
    r"""Maximum likelihood of NB2 by Newton's method on (b, log alpha).

    $$ \log p = \log\Gamma(y + 1/\alpha) - \log\Gamma(1/\alpha) - \log y!
       + y \log \tfrac{\alpha\mu}{1 + \alpha\mu} - \tfrac1\alpha \log(1 + \alpha\mu) $$

    Standard errors are of the observed information; the last coefficient is ``alpha``.
    Where counts are not overdispersed the maximum is at alpha = 0: a warning, and the
    Poisson fit with alpha 0.

    Args:
      y: (n,) counts.
      x: name -> (n,) regressor; fixed effects as ``dummies``.
      level: of the confidence intervals.
      intercept, missing, collinear: see ``design``.

    Raises:
      ValueError: negative counts, regressors that separate zeros (see ``ppml``), no
        convergence, and of ``design``.

    Reference: Cameron and Trivedi, "Regression analysis of count data", 3.3.
    """
    check_counts(y)
    checks = {"intercept": intercept, "missing": missing, "collinear": collinear}
    d = design(y, x, **checks)
    start = ppml(y, x, vcov="iid", level=level, **checks)
    mu = d.y - start.residuals
    excess = float(np.sum(np.square(d.y - mu) - d.y) / np.sum(np.square(mu)))
    if excess <= 0:
        return _poisson(start, level)
    theta = np.append(start.coef, np.log(excess))
    theta, hessian, llf, moved = in_float64(_fit, d.x, d.y, theta)
    alpha = np.exp(theta[-1])
    if alpha < 1e-7:
        return _poisson(start, level)
    check_done(moved, "negative binomial")
    scale = np.append(np.ones(len(theta) - 1), alpha)  # From log alpha to alpha.
    v = np.linalg.inv(-hessian) * scale[:, None] * scale
    mu = np.exp(d.x @ theta[:-1])
    return finish(
        (*d.names, "alpha"), np.append(theta[:-1], alpha), v, n=len(d.y), df=np.inf,
        kind="observed", numbers={"llf": llf, "alpha": alpha}, dropped=d.dropped,
        residuals=d.y - mu, level=level,
    )  # fmt: skip


def log_likelihood(theta, x, y):
    """Sum over rows; ``theta`` is (b, log alpha)."""
    mu, alpha = jnp.exp(dot(x, theta[:-1])), jnp.exp(theta[-1])
    size = 1 / alpha
    spread = jnp.log1p(alpha * mu)
    return jnp.sum(
        gammaln(y + size) - gammaln(size) - gammaln(y + 1)
        + y * (theta[-1] + jnp.log(mu) - spread) - size * spread
    )  # fmt: skip


@jax.jit
def _fit(x, y, theta):
    gradient = jax.grad(log_likelihood)

    def value(theta):
        return log_likelihood(theta, x, y)

    def unfinished(carry):
        _, moved, _, i = carry
        return (moved > 1e-9) & (i < STEPS)

    def body(carry):
        theta, _, before, i = carry
        g, h = gradient(theta, x, y), _hessian(theta, x, y)
        root = jnp.linalg.cholesky(-h)
        safe = -jnp.abs(jnp.diag(h)) * 4
        h = jnp.where(jnp.isfinite(root).all(), h, jnp.diag(safe))
        step = jnp.linalg.solve(-h, g)

        def worse(c):
            size, new = c
            return ~(value(new) >= before - 1e-9 * jnp.abs(before)) & (size > 1e-6)

        def halve(c):
            size = c[0] / 2
            return size, theta + size * step

        one = jnp.ones((), x.dtype)
        _, new = lax.while_loop(worse, halve, (one, theta + step))
        return new, jnp.abs(new - theta).max(), value(new), i + 1

    inf = jnp.full((), jnp.inf, x.dtype)
    theta, moved, llf, _ = lax.while_loop(
        unfinished, body, (theta, inf, value(theta), 0)
    )
    return theta, _hessian(theta, x, y), llf, moved <= 1e-9


def _hessian(theta, x, y):
    return jax.jacfwd(jax.grad(log_likelihood))(theta, x, y)


def _poisson(start: Result, level: float) -> Result:
    warnings.warn(
        "the counts are not overdispersed: alpha is 0 and the fit is Poisson's",
        stacklevel=3,
    )
    v = np.pad(start.vcov, ((0, 1), (0, 1)))
    return finish(
        (*start.names, "alpha"), np.append(start.coef, 0.0), v, n=start.n, df=np.inf,
        kind="observed", numbers={**start.stats, "alpha": 0.0}, dropped=start.dropped,
        residuals=start.residuals, level=level,
    )  # fmt: skip
