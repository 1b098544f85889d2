"""The regressions of citations on measures of the review, and what they are shown as.

M1 least squares of log(1 + citations), M2 Poisson pseudo-likelihood, both within cells of
field and year; M3 negative binomial and M4 logit of the top tenth with dummies; M5 means
of normalised citations by tenths of a regressor.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from jaxpapers.ops import agreement, hypothesis
from jaxpapers.ops import regression as fits
from jaxpapers.ops.regression import covariance, linear, poisson, resampling
from jaxpapers.ops.regression.covariance import dot
from jaxpapers.ops.regression.design import (
    complete_rows,
    encode,
    labels,
    numbers,
    positive_levels,
)
from jaxpapers.ops.regression.result import in_float64
from jaxpapers.papers.peer_review import world as worlds
from jaxpapers.papers.peer_review.measuring import ranked


class Models(NamedTuple):
    """Fits of one table.

    Attributes:
      joint: model -> all regressors together.
      alone: regressor -> M1 with it alone.
      adjusted: regressor -> Benjamini-Hochberg p-value of ``alone``.
      vif: variance inflation factors.
    """

    joint: dict[str, fits.Result]
    alone: dict[str, fits.Result]
    adjusted: dict[str, float]
    vif: dict[str, float]


class Coverage(NamedTuple):
    """Repeated draws of the outcome with the regressors fixed.

    Attributes:
      names: of the regressors.
      truth: (k,) coefficients.
      mean, deviation: model -> (k,) of the estimates.
      covered: model -> (k,) share of 95 % intervals that have the truth.
      rejected: model -> (k,) share of tests at 5 % that reject 0.
      replications: their number.
    """

    names: tuple[str, ...]
    truth: np.ndarray
    mean: dict[str, np.ndarray]
    deviation: dict[str, np.ndarray]
    covered: dict[str, np.ndarray]
    rejected: dict[str, np.ndarray]
    replications: int

    def bias_in_errors(self, model: str) -> np.ndarray:
        """Bias by its Monte-Carlo standard error."""
        error = self.deviation[model] / np.sqrt(self.replications)
        return (self.mean[model] - self.truth) / error


def fit(
    cites: Any, x: Mapping[str, Any], field: Any, year: Any, missing: str = "raise"
) -> Models:
    """All models of one table of papers, on the same rows.

    Cells without a citation leave PPML, fields and years without one NB2: they have no
    estimate there.

    Args:
      cites: (n,) citation counts.
      x: name -> (n,) regressors, z-scores.
      field, year: (n,) labels.
      missing: raise, or drop: rows with any missing value. The top tenth is one of all
        papers whose citations, field and year are known.

    Raises:
      ValueError: see the models.
    """
    cites = numbers("the citations", cites)
    x = {k: numbers(k, v) for k, v in x.items()}
    groups = {"field": labels(field), "year": labels(year)}
    counts = {"the citations": cites}
    keep, _ = complete_rows({**counts, **x}, groups, missing)
    known, _ = complete_rows(counts, groups, "drop")
    cell = np.array([f"{f}_{y}" for f, y in zip(*groups.values())])
    top = np.zeros(len(cell))
    top[known] = ranked(cites[known], cell[known])["top"]
    top, cell = top[keep], cell[keep]
    x, cites = {k: v[keep] for k, v in x.items()}, cites[keep]
    log, groups = np.log1p(cites), {k: v[keep] for k, v in groups.items()}
    every = np.ones(len(cites), bool)
    codes = [encode(v, every) for v in groups.values()]
    some = positive_levels(cites, codes, every)
    effects: dict[str, Any] = {}
    for name, v in groups.items():
        effects |= fits.dummies(name, v[some])
    counted = {k: v[some] for k, v in x.items()}
    within = {"fe": {"cell": cell}}
    clustered = {"vcov": "CRV1", "cluster": cell, **within}
    joint = {
        "OLS, HC1": fits.ols(log, x, **within),
        "OLS, CRV1": fits.ols(log, x, **clustered),
        "PPML, CRV1": fits.ppml(cites, x, **clustered),
        "NB2": fits.negbin(cites[some], {**counted, **effects}),
        "logit, top 10 %": fits.logit(top, x),
    }
    alone = {k: fits.ols(log, {k: v}, **within) for k, v in x.items()}
    adjusted = hypothesis.benjamini_hochberg([r.p[0] for r in alone.values()])
    factors = fits.vif(x) if len(x) > 1 else dict.fromkeys(x, 1.0)
    return Models(joint, alone, dict(zip(x, adjusted.tolist())), factors)


def regression_rows(models: Models, names: Sequence[str]) -> list[list[str]]:
    """Cells of a table: a row a regressor, "0.123*** (0.045)" a model."""
    rows = []
    for name in names:
        row = [name]
        for result in models.joint.values():
            e = result[name]
            row.append(f"{e['coef']:.3f}{stars(e['p'])} ({e['se']:.3f})")
        rows.append([*row, f"{models.adjusted[name]:.3g}", f"{models.vif[name]:.2f}"])
    counts = [str(r.n) for r in models.joint.values()]
    fit = [
        next(f"{r.stats[s]:.3f}" for s in ("r2", "pseudo_r2", "llf") if s in r.stats)
        for r in models.joint.values()
    ]
    return [*rows, ["n", *counts, "", ""], ["R2, pseudo-R2, log L", *fit, "", ""]]


def columns(models: Models) -> list[str]:
    """Headings of ``regression_rows``."""
    return ["", *models.joint, "BH p, alone", "VIF"]


def stars(p: float) -> str:
    """*** below .001, ** below .01, * below .05."""
    return "*" * sum(p < level for level in (0.05, 0.01, 0.001))


def text_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], note: str) -> str:
    """A table in plain text."""
    cells = [list(map(str, heads)), *(list(map(str, r)) for r in rows)]
    width = [max(len(r[i]) for r in cells) for i in range(len(heads))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, width)).rstrip() for r in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", note]) + "\n"


def latex_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], note: str) -> str:
    """A table for LaTeX with booktabs."""

    def line(cells):
        return " & ".join(map(_escaped, map(str, cells))) + r" \\"

    return "\n".join(
        [
            r"\begin{tabular}{l" + "c" * (len(heads) - 1) + "}", r"\toprule",
            line(heads), r"\midrule", *map(line, rows), r"\bottomrule", r"\end{tabular}",
            r"% " + note,
        ]
    ) + "\n"  # fmt: skip


def _escaped(text: str) -> str:
    for a in "&%_#$":
        text = text.replace(a, "\\" + a)
    return text.replace("R2", "$R^2$")


NOTE = (
    "Standard errors in parentheses; * p < .05, ** p < .01, *** p < .001. OLS of "
    "log(1 + citations) and PPML within field x year; NB2 with dummies of both."
)


def deciles(
    key: Key[Array, ""],
    x: Mapping[str, Any],
    y: Any,
    replicates: int = 10_000,
    bins: int = 10,
    mesh: Any = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Mean of y by tenths of each column, with 95 % percentile intervals.

    Args:
      key: of the resamples, the same for all columns.
      x: name -> (n,).
      y: (n,).
      replicates: number of resamples, of rows of all bins together.
      bins: number of them, of equal counts.
      mesh: see ``regression.bootstrap``.

    Returns:
      Name -> ``mean``, ``low``, ``high``, ``x`` (bins,): of y, and the mean of x.

    Raises:
      ValueError: fewer rows than bins.
    """
    y = np.asarray(y, np.float64)
    if len(y) < bins:
        raise ValueError(f"{len(y)} rows are fewer than {bins} bins")
    columns = {k: np.asarray(v, np.float64) for k, v in x.items()}
    hot = np.concatenate([np.eye(bins)[_bin_of(v, bins)] for v in columns.values()], 1)

    def sums(keys, table):
        return dot(resampling.resample_counts(keys, len(table)).T, table)

    table = np.concatenate([hot, hot * y[:, None]], 1)
    drawn = resampling.spread(
        key, sums, table, replicates, mesh=mesh, chunk=256, together=True
    )
    count, total = np.split(drawn, 2, axis=1)
    means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    made = {}
    for i, (name, v) in enumerate(columns.items()):
        part = slice(i * bins, (i + 1) * bins)
        own = hot[:, part]
        made[name] = {
            "mean": own.T @ y / own.sum(0), "low": low[part], "high": high[part],
            "x": own.T @ v / own.sum(0),
        }  # fmt: skip
    return made


def _bin_of(v: np.ndarray, bins: int) -> np.ndarray:
    """Bins of equal counts; of equal values the earlier row is in the lower one."""
    place = np.argsort(np.argsort(v, kind="stable"), kind="stable")
    return place * bins // len(v)


class Field(NamedTuple):
    """How far fields differ in a measure.

    Attributes:
      eta2: variance between fields by all variance.
      low, high: of its bootstrap, 95 %.
      h, p: of Kruskal and Wallis.
    """

    eta2: float
    low: float
    high: float
    h: float
    p: float


def compare_fields(
    key: Key[Array, ""], values: Mapping[str, Any], field: Any, replicates: int = 2000
) -> dict[str, Field]:
    """Between-field shares of variance of measures (style, length), with intervals.

    Args:
      key: of the resamples, the same for all measures.
      values: measure -> (n,); rows with a missing value are left out of it.
      field: (n,) labels.
      replicates: of the bootstrap.
    """
    field = np.unique(np.asarray(field), return_inverse=True)[1].astype(np.int32)
    n = int(field.max()) + 1
    columns = {k: np.asarray(v, np.float64) for k, v in values.items()}
    # Measures of the same rows share a program.
    rows: dict[bytes, list[str]] = {}
    for name, v in columns.items():
        rows.setdefault(np.isfinite(v).tobytes(), []).append(name)
    statistic = functools.partial(_eta2, n=n)
    made: dict[str, Field] = {}
    for names in rows.values():
        kept = np.isfinite(columns[names[0]])
        code = field[kept]
        table = np.stack([columns[k][kept] for k in names], 1)
        draws = fits.bootstrap(
            key, statistic, (table, code), replicates, chunk=max(1, 250 // len(names))
        )
        own = in_float64(jax.jit(statistic), (table, code))
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        for i, name in enumerate(names):
            test = hypothesis.kruskal([table[code == f, i] for f in np.unique(code)])
            share, a, b = (float(v[i]) for v in (own, low, high))
            made[name] = Field(share, a, b, test.statistic, test.p)
    return {name: made[name] for name in columns}


def _eta2(data, *, n):
    """Of the columns of a table; see ``Field``."""
    table, code = data
    count = jax.ops.segment_sum(jnp.ones(len(code)), code, n)[:, None]
    sums = jax.ops.segment_sum(table, code, n)
    centre = table.mean(0, keepdims=True)
    between = count * jnp.square(sums / jnp.maximum(count, 1) - centre)
    return between.sum(0) / jnp.square(table - centre).sum(0)


def coverage(
    world: worlds.World, options: worlds.Options, replications: int = 200
) -> Coverage:
    """Refits the models to outcomes that are drawn anew; the opinions stay.

    Least squares gets an outcome that is linear with uneven noise, Poisson the counts.

    Args:
      world: of ``simulate``.
      options: that it was drawn with.
      replications: number of draws.

    Raises:
      ValueError: fewer than 2 replications.
    """
    if replications < 2:
        raise ValueError(f"replications must be >= 2, got {replications}")
    rng = np.random.default_rng([options.seed, 3])
    truth = options.truth
    linear_y = np.stack([worlds.draw_outcome(rng, world) for _ in range(replications)])
    counts = np.stack(
        [worlds.draw_counts(rng, world.eta, options.alpha) for _ in range(replications)]
    )
    d = fits.design(
        world.eta, dict(zip(worlds.REGRESSORS, world.x.T)), fe={"cell": world.cell},
        cluster=world.cell,
    )  # fmt: skip
    with jax.enable_x64(True):
        found = jax.device_get(_refits(d.x, d.fe, linear_y, counts, d.levels))
    mean, deviation, covered, rejected = {}, {}, {}, {}
    for name, (beta, variance) in found.items():
        kind = name.split(", ")[1]
        normal = name.startswith("PPML")  # As ``ppml``.
        df = np.inf if normal else covariance.degrees(d, kind, "fixest")
        scale = covariance.correction(d, kind, "fixest")
        half = fits.critical(df) * np.sqrt(scale * variance)
        mean[name], deviation[name] = beta.mean(0), beta.std(0, ddof=1)
        covered[name] = (np.abs(beta - truth) <= half).mean(0)
        rejected[name] = (np.abs(beta) > half).mean(0)
    return Coverage(
        worlds.REGRESSORS, truth, mean, deviation, covered, rejected, replications
    )


@functools.partial(jax.jit, static_argnums=4)
def _refits(x, fe, linear_y, counts, levels):
    """Estimates and variances (replications, k) without their small-sample factors."""
    shared = {"levels": levels, "fixed": sum(levels), "tol": 1e-10}
    by_cell = {"cluster": fe[0], "clusters": levels[0]}

    def one(y_and_count):
        y, count = y_and_count
        beta, v, *_ = linear.least_squares(
            x, y, fe, None, kind="HC1", clusters=0, **shared
        )
        clustered = linear.least_squares(x, y, fe, kind="CRV1", **by_cell, **shared)[1]
        b, bread, x_, score, *_ = poisson.irls(
            x, count, fe, levels=levels, tol=1e-9, last=False
        )
        counted = covariance.sandwich(bread, x_, score, **by_cell)
        return {
            "OLS, HC1": (beta, jnp.diag(v)), "OLS, CRV1": (beta, jnp.diag(clustered)),
            "PPML, CRV1": (b, jnp.diag(counted)),
        }  # fmt: skip

    return jax.lax.map(one, (linear_y, counts))


def attenuation(
    world: worlds.World, options: worlds.Options, noise: float, raters: int = 2
) -> tuple[float, float, float]:
    """What measurement error does to a coefficient, and how reliability corrects it.

    The outcome is the true strength and noise of half its deviation.

    Args:
      world, options: drawn papers.
      noise: deviation of each rater's error, in standard deviations of the strength.
      raters: number of independent raters, at least 2.

    Returns:
      ICC(1,1) of the raters' scores; the coefficient of one rater's strength over that of
      the true strength; that ratio after division by the reliability.
    """
    rng = np.random.default_rng([options.seed, 4])
    true = world.x[:, 0]
    scores = true[:, None] + rng.normal(0, noise, (len(true), raters))
    y = true + rng.normal(0, 0.5, len(true))
    exact = fits.ols(y, {"strength": true}).coef[1]
    rough = fits.ols(y, {"strength": scores[:, 0]}).coef[1]
    reliability = agreement.icc(scores, "1,1")
    return reliability, float(rough / exact), float(rough / exact / reliability)
