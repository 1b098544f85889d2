"""Poisson pseudo-maximum likelihood with fixed effects, and logit."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import gammaln, xlogy

from jaxpapers.ops.regression import covariance, separation
from jaxpapers.ops.regression.covariance import dot
from jaxpapers.ops.regression.demean import demean
from jaxpapers.ops.regression.design import Design, design, missing_labels, numbers
from jaxpapers.ops.regression.design import labels as as_labels
from jaxpapers.ops.regression.result import Result, finish, in_float64

KINDS = ("iid", "HC0", "HC1", "CRV1")
STEPS = 100  # Of IRLS; a fit takes about six.


def ppml(
    y: Any,
    x: Mapping[str, Any],
    *,
    vcov: str = "HC1",
    fe: Mapping[str, Any] | None = None,
    cluster: Any = None,
    df_rule: str = "fixest",
    level: float = 0.95,
    tol: float = 1e-10,
    last_step: bool = False,
    intercept: bool = True,
    missing: str = "raise",
    collinear: str = "raise",
    singletons: str = "keep",
) -> Result:
    r"""Poisson pseudo-maximum likelihood: $E[y|x] = \exp(x^\top b + a)$, by IRLS.

    Levels of fixed effects whose outcome is 0 throughout have no estimate: their rows are
    dropped and counted (``separated``). Regressors that set rows of outcome 0 apart have
    none either and are refused by name. Only the mean is assumed: use robust errors.

    Args:
      y: (n,) counts, or any numbers >= 0.
      x: name -> (n,) regressor.
      vcov: iid (inverse information), HC0, HC1 or CRV1.
      fe: name -> (n,) labels of a fixed effect.
      cluster: (n,) labels, for CRV1.
      df_rule: fixest or statsmodels; p-values are normal in both.
      level: of the confidence intervals.
      tol: relative change of the deviance that ends the iteration.
      last_step: standard errors of the weights that the last step started from, as
        fixest has them, which with its ``tol`` of 1e-8 are off by some 1e-5; else of
        those at the estimate.
      intercept, missing, collinear, singletons: see ``design``.

    Raises:
      ValueError: negative outcomes, regressors that separate zeros, no convergence, and
        of ``design``.

    Reference: Santos Silva and Tenreyro, "The log of gravity", 2006; Correia, Guimaraes,
    Zylkin, "Fast Poisson estimation with high-dimensional fixed effects", 2020.
    """
    check_counts(y)
    d = design(
        y, x, fe=fe, cluster=cluster, intercept=intercept, missing=missing,
        collinear=collinear, singletons=singletons, zeros="drop",
    )  # fmt: skip
    _check_kind(vcov, df_rule, d)
    beta, bread, x, score, mu, deviance, done = in_float64(
        irls, d.x, d.y, d.fe, levels=d.levels, tol=tol, last=last_step
    )
    # The iteration ends once the means of separated rows are of the size of its tol.
    small = max(1e-8 * d.y.mean(), 10 * tol * (0.1 + abs(deviance))) if done else np.inf
    if np.any((d.y == 0) & ~(mu > small)):
        separation.refuse(d)
    check_done(done, "Poisson")
    v = _robust(d, vcov, df_rule, bread, x, score)
    llf = float(np.sum(xlogy_host(d.y, mu) - mu - _log_factorial(d.y)))
    return finish(
        d.names, beta, v, n=len(d.y), df=np.inf, kind=vcov,
        numbers={"llf": llf, "deviance": deviance, **_pseudo_r2(d, llf)},
        dropped=d.dropped, residuals=d.y - mu, level=level,
    )  # fmt: skip


def logit(
    y: Any,
    x: Mapping[str, Any],
    *,
    vcov: str = "iid",
    cluster: Any = None,
    df_rule: str = "statsmodels",
    level: float = 0.95,
    intercept: bool = True,
    missing: str = "raise",
    collinear: str = "raise",
) -> Result:
    """Logistic regression by Newton's method; iid is the inverse observed information.

    Args:
      y: (n,) of 0 and 1.
      x: name -> (n,) regressor; fixed effects as ``dummies``.
      vcov: iid, HC0, HC1 or CRV1.
      cluster: (n,) labels, for CRV1.
      df_rule: fixest or statsmodels.
      level: of the confidence intervals.
      intercept, missing, collinear: see ``design``.

    Raises:
      ValueError: other outcomes, classes that the regressors separate, and of ``design``.
    """
    values = numbers("the outcome", y)
    bad = values[np.isfinite(values) & (values != 0) & (values != 1)]
    if len(bad):
        raise ValueError(f"logit takes outcomes 0 and 1, got {bad[:3].tolist()}")
    d = design(
        y, x, cluster=cluster, intercept=intercept, missing=missing, collinear=collinear
    )
    _check_kind(vcov, df_rule, d)
    beta, bread, score, llf, done = in_float64(_logit, d.x, d.y)
    if not done or not np.isfinite(llf) or llf > -1e-6 * len(d.y):
        raise ValueError(
            "logit does not converge: the regressors separate the classes; leave out the "
            "column that does, or take fewer"
        )
    v = _robust(d, vcov, df_rule, bread, d.x, score)
    return finish(
        d.names, beta, v, n=len(d.y), df=np.inf, kind=vcov,
        numbers={"llf": llf}, dropped=d.dropped, residuals=score, level=level,
    )  # fmt: skip


def dummies(name: str, labels: Any) -> dict[str, np.ndarray]:
    """Columns of a fixed effect but its first level, named "C(name)[T.level]".

    Missing labels are NaN in all columns.

    Example:
      >>> list(dummies("field", ["a", "b", "a", "c"]))
      ['C(field)[T.b]', 'C(field)[T.c]']
    """
    given = as_labels(labels)
    none = missing_labels(given)
    return {
        f"C({name})[T.{v}]": np.where(none, np.nan, (given == v) * 1.0)
        for v in np.unique(given[~none])[1:]
    }


@functools.partial(jax.jit, static_argnames=("levels", "tol", "last"))
def irls(x, y, fe, *, levels, tol, last):
    """One Poisson fit of checked columns; the arguments are those of a ``Design``.

    Returns:
      Coefficients (k,), bread, the weighted demeaned columns and residuals that make the
      scores, means, deviance, and whether the iteration ended by ``tol``.
    """

    def working(eta, mu):
        """Weighted demeaned columns and the next coefficients."""
        z = eta + (y - mu) / mu
        both = demean(jnp.concatenate([z[:, None], x], 1), fe, levels, mu, tol=1e-11)
        z_, x_ = both[:, 0], both[:, 1:]
        gram = dot(x_.T, x_ * mu[:, None])
        beta = jnp.linalg.solve(gram, dot(x_.T, mu * z_))
        return z, z_, x_, gram, beta

    def unfinished(carry):
        _, deviance, before, i, _, _ = carry
        moved = jnp.abs(deviance - before) > tol * (0.1 + jnp.abs(before))
        return (moved | (i == 0)) & (i < STEPS)

    def body(carry):
        eta, deviance, _, i, _, _ = carry
        mu = jnp.exp(eta)
        z, z_, x_, _, beta = working(eta, mu)
        new = z - (z_ - dot(x_, beta))
        return new, poisson_deviance(y, new), deviance, i + 1, beta, eta

    mu = (y + y.mean()) / 2
    eta = jnp.log(mu)
    inf = jnp.full((), jnp.inf, x.dtype)
    start = (eta, poisson_deviance(y, eta), inf, 0, jnp.zeros_like(x[0]), eta)
    eta, deviance, _, i, beta, before = lax.while_loop(unfinished, body, start)
    mu = jnp.exp(eta)
    at = before if last else eta
    _, z_, x_, gram, new = working(at, jnp.exp(at))
    bread = jnp.linalg.inv(gram)
    score = jnp.exp(at) * (z_ - dot(x_, beta)) if last else y - mu
    return beta if last else new, bread, x_, score, mu, deviance, i < STEPS


def poisson_deviance(y, eta):
    """Twice the sum of y log(y / mu) - (y - mu)."""
    return 2 * jnp.sum(xlogy(y, y) - y * eta - y + jnp.exp(eta))


@jax.jit
def _logit(x, y):
    def body(carry):
        beta, _, i = carry
        p = jax.nn.sigmoid(dot(x, beta))
        gram = dot(x.T, x * (p * (1 - p))[:, None])
        step = jnp.linalg.solve(gram, dot(x.T, y - p))
        return beta + step, jnp.abs(step).max(), i + 1

    start = (jnp.zeros_like(x[0]), jnp.full((), jnp.inf, x.dtype), 0)
    beta, moved, i = lax.while_loop(lambda c: (c[1] > 1e-10) & (c[2] < 50), body, start)
    eta = dot(x, beta)
    p = jax.nn.sigmoid(eta)
    bread = jnp.linalg.inv(dot(x.T, x * (p * (1 - p))[:, None]))
    llf = jnp.sum(y * eta - jax.nn.softplus(eta))
    return beta, bread, y - p, llf, (moved <= 1e-10) & jnp.isfinite(beta).all()


def _robust(d: Design, kind: str, rule: str, bread, x, score) -> np.ndarray:
    if kind == "iid":
        return bread
    clusters = d.clusters if kind == "CRV1" else 0
    v = in_float64(
        _sandwich, bread, x, score, d.cluster if clusters else None, clusters=clusters
    )
    return v * covariance.correction(d, kind, rule)


@functools.partial(jax.jit, static_argnames="clusters")
def _sandwich(bread, x, score, cluster, *, clusters):
    return covariance.sandwich(bread, x, score, cluster, clusters)


def _check_kind(kind: str, rule: str, d: Design) -> None:
    covariance.check(kind, rule, d)
    if kind not in KINDS:
        raise ValueError(f"vcov must be one of {KINDS} here, got {kind!r}")


def check_counts(y: Any) -> None:
    """Refuses negative outcomes."""
    values = numbers("the outcome", y)
    if (values < 0).any():
        raise ValueError(
            f"counts must be >= 0, got {values.min():g} and {int((values < 0).sum())} "
            "negative values in all; check the outcome's column"
        )


def check_done(done: Any, what: str) -> None:
    """Refuses a fit that did not converge."""
    if not done:
        raise ValueError(
            f"the {what} fit did not converge; look for regressors that separate zeros "
            "from the rest, or for badly scaled columns"
        )


def _pseudo_r2(d: Design, llf: float) -> dict[str, float]:
    mean = d.y.mean()
    null = float(np.sum(d.y * np.log(mean) - mean - _log_factorial(d.y)))
    return {"pseudo_r2": 1 - llf / null} if null else {}


def _log_factorial(y: np.ndarray) -> np.ndarray:
    return np.asarray(in_float64(gammaln, y + 1.0))


def xlogy_host(y: np.ndarray, mu: np.ndarray) -> np.ndarray:
    """y log(mu), 0 where y is 0; NumPy."""
    return np.where(y > 0, y * np.log(np.maximum(mu, 1e-300)), 0.0)
