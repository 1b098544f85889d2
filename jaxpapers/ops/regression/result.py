"""The estimates of a regression, and the tests of its coefficients."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats


class Result(NamedTuple):
    """Estimates of one regression; NumPy float64.

    Attributes:
      names: of the coefficients.
      coef: (k,) estimates.
      se: (k,) standard errors.
      t: (k,) coef / se.
      p: (k,) two-sided p-values.
      ci: (k, 2) confidence interval at ``level``.
      vcov: (k, k) covariance of the estimates.
      n: rows that were used.
      df: degrees of freedom of the t distribution; infinite: the normal one.
      kind: of the covariance: iid, HC0 to HC3, CRV1, CRV3, jackknife, observed.
      stats: r2, adj_r2, r2_within, llf, aic, deviance, alpha, ... where they exist.
      dropped: rows and columns left out, by reason.
      residuals: (n,) y less the fit, fixed effects included.
    """

    names: tuple[str, ...]
    coef: np.ndarray
    se: np.ndarray
    t: np.ndarray
    p: np.ndarray
    ci: np.ndarray
    vcov: np.ndarray
    n: int
    df: float
    kind: str
    stats: Mapping[str, float]
    dropped: Mapping[str, Any]
    residuals: np.ndarray

    def __getitem__(self, key):  # type: ignore[override]
        """The row of a coefficient by its name: coef, se, t, p, low, high."""
        if not isinstance(key, str):
            return tuple.__getitem__(self, key)
        if key not in self.names:
            raise KeyError(f"no coefficient {key!r}; the model has {self.names}")
        i = self.names.index(key)
        values = (self.coef[i], self.se[i], self.t[i], self.p[i], *self.ci[i])
        return dict(zip(("coef", "se", "t", "p", "low", "high"), map(float, values)))


def finish(
    names: Sequence[str],
    coef: Any,
    vcov: Any,
    *,
    n: int,
    df: float,
    kind: str,
    numbers: Mapping[str, Any],
    dropped: Mapping[str, Any],
    residuals: Any,
    level: float = 0.95,
) -> Result:
    """Tests of the estimates from their covariance; see ``Result``.

    Raises:
      ValueError: a level outside (0, 1); estimates that are not finite.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    coef, vcov = np.asarray(coef, np.float64), np.asarray(vcov, np.float64)
    if not (np.isfinite(coef).all() and np.isfinite(vcov).all()):
        bad = [x for x, ok in zip(names, np.isfinite(coef)) if not ok]
        raise ValueError(
            f"the fit did not converge: {bad or 'the covariance'} is not finite; look "
            "for separated or badly scaled columns"
        )
    se = np.sqrt(np.maximum(np.diag(vcov), 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(se > 0, coef / se, np.nan)
    tail = stats.norm.sf if np.isinf(df) else lambda v: stats.t.sf(v, df)
    half = critical(df, level) * se
    return Result(
        tuple(names), coef, se, t, 2 * tail(np.abs(t)),
        np.stack([coef - half, coef + half], 1), vcov, n, float(df), kind,
        {k: float(v) for k, v in numbers.items()}, dict(dropped),
        np.asarray(residuals),
    )  # fmt: skip


def critical(df: float | int, level: float = 0.95) -> float:
    """Half-width of a confidence interval in standard errors; infinite df: normal."""
    if np.isinf(df):
        return float(stats.norm.ppf((1 + level) / 2))
    return float(stats.t.ppf((1 + level) / 2, df))


def in_float64(function, *args, **kwargs):
    """Calls a jitted function in float64; the result as NumPy arrays."""
    with jax.enable_x64(True):
        return jax.device_get(function(*args, **kwargs))
