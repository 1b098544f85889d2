"""Least squares with fixed effects and robust standard errors."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers.ops.regression import covariance
from jaxpapers.ops.regression.covariance import dot
from jaxpapers.ops.regression.demean import demean
from jaxpapers.ops.regression.design import Design, design
from jaxpapers.ops.regression.result import Result, finish, in_float64


def ols(
    y: Any,
    x: Mapping[str, Any],
    *,
    vcov: str = "HC1",
    fe: Mapping[str, Any] | None = None,
    cluster: Any = None,
    df_rule: str = "fixest",
    level: float = 0.95,
    tol: float = 1e-10,
    intercept: bool = True,
    missing: str = "raise",
    collinear: str = "raise",
    singletons: str = "keep",
) -> Result:
    """Least squares by QR, of demeaned columns where there are fixed effects.

    Args:
      y: (n,) outcome.
      x: name -> (n,) regressor.
      vcov: iid, HC0, HC1, HC2, HC3, CRV1, CRV3 or jackknife (CRV3 with the factor
        (G - 1) / G), see ``covariance``; HC2 and HC3 with one fixed effect at most.
      fe: name -> (n,) labels of a fixed effect.
      cluster: (n,) labels, for clustered kinds.
      df_rule: fixest or statsmodels.
      level: of the confidence intervals.
      tol: of the demeaning.
      intercept, missing, collinear, singletons: see ``design``.

    Raises:
      ValueError: see ``design``; unknown words; no convergence; HC2 or HC3 with several
        fixed effects or a row of leverage 1.

    Example:
      >>> result = ols([1.0, 3.0, 5.0, 8.0], {"x": [0.0, 1.0, 2.0, 3.0]}, vcov="iid")
      >>> [round(float(b), 3) for b in result.coef]
      [0.8, 2.3]
    """
    d = design(
        y, x, fe=fe, cluster=cluster, intercept=intercept, missing=missing,
        collinear=collinear, singletons=singletons,
    )  # fmt: skip
    covariance.check(vcov, df_rule, d)
    clusters = d.clusters if vcov in ("CRV1", "CRV3", "jackknife") else 0
    beta, v, residuals, within, h = in_float64(
        least_squares, d.x, d.y, d.fe, d.cluster if clusters else None,
        levels=d.levels, kind=vcov, clusters=clusters, fixed=d.fixed, tol=tol,
    )  # fmt: skip
    if h is not None:
        _check_leverage(h, d, vcov)
    v = v * covariance.correction(d, vcov, df_rule)
    return finish(
        d.names, beta, v, n=len(d.y), df=covariance.degrees(d, vcov, df_rule), kind=vcov,
        numbers=_numbers(d, residuals, within), dropped=d.dropped, residuals=residuals,
        level=level,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("levels", "kind", "clusters", "fixed", "tol")
)
def least_squares(x, y, fe, cluster, *, levels, kind, clusters, fixed, tol):
    """One fit of checked columns; the arguments are those of a ``Design``.

    Returns:
      Coefficients (k,), their covariance without ``covariance.correction``, residuals,
      the demeaned outcome, and leverages, which HC2 and HC3 alone need (else None).
    """
    given = x, y
    both = demean(jnp.concatenate([y[:, None], x], 1), fe, levels, tol=tol)
    y, x = both[:, 0], both[:, 1:]
    q, r = jnp.linalg.qr(x)
    inverse = jax.scipy.linalg.solve_triangular(r, jnp.eye(r.shape[0]))
    beta, bread = dot(inverse, dot(q.T, y)), dot(inverse, inverse.T)
    e = y - dot(x, beta)
    if kind in ("CRV3", "jackknife"):
        apart = covariance.left_out(*given, beta, cluster, clusters, fe, levels, tol)
        return beta, dot(apart.T, apart), e, y, None
    if kind == "iid":
        return beta, bread * (e @ e) / (x.shape[0] - x.shape[1] - fixed), e, y, None
    if kind in ("HC2", "HC3"):
        h = covariance.leverage(q, fe, levels)
        scaled = e / jnp.sqrt(1 - h) if kind == "HC2" else e / (1 - h)
        return beta, covariance.sandwich(bread, x, scaled), e, y, h
    v = covariance.sandwich(bread, x, e, cluster if clusters else None, clusters)
    return beta, v, e, y, None


def _check_leverage(h: np.ndarray, d: Design, kind: str) -> None:
    """Refuses rows that alone determine a coefficient: their residual is 0 / 0."""
    full = d.rows[~(h < 1 - 1e-10)]
    if len(full):
        raise ValueError(
            f"{kind} is not defined: row {full[0]} has leverage 1 ({len(full)} such rows "
            "in all), it alone determines a coefficient (as a dummy for one row does, or "
            "a level of one row); leave it out (singletons='drop' for levels), or take "
            "vcov='HC1'"
        )


def _numbers(d: Design, e: np.ndarray, within: np.ndarray) -> dict[str, float]:
    """Fit of the model: R2 of all, within the fixed effects, likelihood, AIC."""
    n, k = d.x.shape
    rss = float(e @ e)
    centred = "Intercept" in d.names or d.levels
    tss = float(np.square(d.y - (d.y.mean() if centred else 0)).sum())
    r2 = 1 - rss / tss
    full = k + d.fixed
    llf = -n / 2 * (np.log(2 * np.pi) + np.log(max(rss / n, 1e-300)) + 1)
    numbers = {
        "r2": r2,
        "adj_r2": 1 - (1 - r2) * (n - bool(centred)) / (n - full),
        "llf": llf,
        "aic": 2 * full - 2 * llf,
    }
    if d.levels:
        numbers["r2_within"] = 1 - rss / max(float(within @ within), 1e-300)
    return numbers


def vif(x: Mapping[str, Any], *, missing: str = "raise") -> dict[str, float]:
    """Variance inflation factor of every column, from the inverse correlation matrix.

    Args:
      x: name -> (n,) regressor.
      missing: see ``design``.

    Raises:
      ValueError: columns that are collinear or constant; missing values.
    """
    names = list(x)
    rows = np.arange(len(next(iter(x.values()))), dtype=float)
    columns = design(rows, x, missing=missing).x[:, 1:]
    z = (columns - columns.mean(0)) / columns.std(0)
    return dict(zip(names, np.diag(np.linalg.inv(z.T @ z / len(z))).tolist()))
