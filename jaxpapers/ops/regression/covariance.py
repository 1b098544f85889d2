r"""Covariances of estimates that solve $\sum_i x_i u_i = 0$: sandwiches and jackknives.

With the bread $B = (X^\top W X)^{-1}$ and scores $s_i = x_i u_i$:

$$ HC0 = B (\textstyle\sum_i s_i s_i^\top) B, \quad
   CRV1 = \tfrac{G}{G-1} \tfrac{n-1}{n-K} B (\textstyle\sum_g s_g s_g^\top) B $$

Two packages count degrees of freedom differently (``RULES``):

``statsmodels``: k regressors as written (dummies are regressors); robust p-values are
normal. ``fixest``: fixed effects count, those nested in the clusters do not, p-values
are of t(n - K), clustered t(G - 1); HC1 is what it calls hetero.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpapers.ops.regression.demean import demean
from jaxpapers.ops.regression.design import Design

KINDS = ("iid", "HC0", "HC1", "HC2", "HC3", "CRV1", "CRV3", "jackknife")
RULES = ("statsmodels", "fixest")
HIGHEST = jax.lax.Precision.HIGHEST


def dot(a: Array, b: Array) -> Array:
    """Matrix product at full precision."""
    return jnp.matmul(a, b, precision=HIGHEST)


def sandwich(
    bread: Float[Array, "k k"],
    x: Float[Array, "n k"],
    u: Float[Array, " n"],
    cluster: Int[Array, " n"] | None = None,
    clusters: int = 0,
) -> Float[Array, "k k"]:
    """B (sum of outer products of scores, within clusters) B."""
    scores = x * u[:, None]
    if cluster is not None:
        scores = jax.ops.segment_sum(scores, cluster, clusters)
    half = dot(scores, bread)
    return dot(half.T, half)


def leverage(
    q: Float[Array, "n k"], fe: Int[Array, "D n"], levels: tuple[int, ...]
) -> Float[Array, " n"]:
    """Diagonal of the hat matrix of columns and at most one fixed effect.

    Args:
      q: orthonormal basis of the columns, demeaned where there is an effect.
      fe, levels: codes and numbers of levels. The effect's own part, orthogonal to q, is
        1 / (rows of the level).
    """
    h = jnp.square(q).sum(1)
    for f, n in zip(fe, levels):
        h = h + 1 / jax.ops.segment_sum(jnp.ones_like(h), f, n)[f]
    return h


def left_out(
    x: Float[Array, "n k"],
    y: Float[Array, " n"],
    beta: Float[Array, " k"],
    cluster: Int[Array, " n"],
    clusters: int,
    fe: Int[Array, "D n"],
    levels: tuple[int, ...],
    tol: float,
) -> Float[Array, "G k"]:
    """Estimates without each cluster, less the estimate of all; effects are refitted."""

    def without(g):
        kept = (cluster != g).astype(x.dtype)
        both = demean(jnp.concatenate([y[:, None], x], 1), fe, levels, kept, tol)
        y_, x_ = both[:, 0], both[:, 1:] * kept[:, None]
        return jnp.linalg.solve(dot(x_.T, x_), dot(x_.T, y_)) - beta

    return jax.lax.map(without, jnp.arange(clusters))


def check(kind: str, rule: str, design: Design) -> None:
    """Refuses unknown words, clustered kinds without clusters, leverage of many effects.

    Raises:
      ValueError.
    """
    if kind not in KINDS:
        raise ValueError(f"vcov must be one of {KINDS}, got {kind!r}")
    if rule not in RULES:
        raise ValueError(f"df_rule must be one of {RULES}, got {rule!r}")
    clustered = kind in ("CRV1", "CRV3", "jackknife")
    if clustered and design.cluster is None:
        raise ValueError(f"vcov={kind!r} needs cluster=, got none")
    if kind in ("HC2", "HC3") and len(design.levels) > 1:
        raise ValueError(
            f"vcov={kind!r} takes one fixed effect, got {len(design.levels)} "
            f"({', '.join(design.fe_names)}): the leverage of several is not computed; "
            "write all but one as regressors by dummies, or take HC1 or CRV1"
        )


def absorbed(design: Design, kind: str) -> int:
    """Fixed effects that count as coefficients under the rule ``fixest``.

    An effect nested in the clusters counts one in place of its levels; one is taken off
    for every effect after the first.
    """
    if kind not in ("CRV1", "CRV3"):
        return design.fixed
    nested = [n for n, inside in zip(design.levels, design.nested()) if inside]
    return design.fixed - sum(nested) + len(nested)


def correction(design: Design, kind: str, rule: str) -> float:
    """The small-sample factor of a kind of covariance."""
    n, k, g = len(design.y), design.x.shape[1], design.clusters
    full = k + (absorbed(design, kind) if rule == "fixest" else design.fixed)
    if kind == "HC1":
        return n / (n - full)
    if kind == "CRV1":
        return g / (g - 1) * (n - 1) / (n - full)
    if kind == "CRV3":
        factor = (n - 1) / (n - full) if rule == "fixest" else 1.0
        return g / (g - 1) * factor
    return (g - 1) / g if kind == "jackknife" else 1.0


def degrees(design: Design, kind: str, rule: str) -> float:
    """Degrees of freedom of the t distribution; infinite: normal."""
    n, k = len(design.y), design.x.shape[1]
    if kind == "iid":
        return float(n - k - design.fixed)
    if rule == "statsmodels":
        return np.inf
    if kind in ("CRV1", "CRV3", "jackknife"):
        return float(design.clusters - 1)
    return float(n - k - design.fixed)
