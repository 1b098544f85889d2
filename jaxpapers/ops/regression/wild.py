"""The wild cluster bootstrap: tests that hold with few clusters."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Key

from jaxpapers.ops.regression import covariance
from jaxpapers.ops.regression.covariance import dot
from jaxpapers.ops.regression.demean import demean
from jaxpapers.ops.regression.design import design
from jaxpapers.ops.regression.result import in_float64

WEIGHTS = ("rademacher", "webb", "mammen")
CHUNK = 256


class Wild(NamedTuple):
    """A test of one coefficient.

    Attributes:
      t: of the data, clustered (CRV1).
      p: share of replicates whose |t| is at least that large.
      replicates: their number; every sign pattern where there are fewer.
      draws: (replicates,) t under the null.
    """

    t: float
    p: float
    replicates: int
    draws: np.ndarray


def wild_bootstrap(
    key: Key[Array, ""],
    y: Any,
    x: Mapping[str, Any],
    name: str,
    *,
    cluster: Any,
    fe: Mapping[str, Any] | None = None,
    replicates: int = 9999,
    weights: str = "rademacher",
    null: float = 0.0,
    impose_null: bool = True,
    intercept: bool = True,
    missing: str = "raise",
    collinear: str = "raise",
    singletons: str = "keep",
) -> Wild:
    """p-value of a coefficient from residuals that change sign cluster by cluster.

    Args:
      key: of the weights; unused where all sign patterns are enumerated.
      y, x, cluster, fe: see ``ols``.
      name: of the coefficient.
      replicates: number of draws; with Rademacher weights and 2^G patterns or fewer, all.
      weights: rademacher (two points), webb (six), mammen (two, skewed).
      null: value that is tested.
      impose_null: residuals of the restricted model (WCR), which is the more reliable;
        else of the free one (WCU).
      intercept, missing, collinear, singletons: see ``design``.

    Raises:
      ValueError: no such coefficient, unknown weights, and of ``design``.

    Reference: Cameron, Gelbach, Miller, "Bootstrap-based improvements for inference with
    clustered errors", 2008; Roodman et al., "Fast and wild", 2019.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    if replicates < 1:
        raise ValueError(f"replicates must be >= 1, got {replicates}")
    d = design(
        y, x, fe=fe, cluster=cluster, intercept=intercept, missing=missing,
        collinear=collinear, singletons=singletons,
    )  # fmt: skip
    if name not in d.names:
        raise ValueError(f"no coefficient {name!r}; the model has {d.names}")
    j = d.names.index(name)
    g = d.clusters
    if weights == "rademacher" and g < 31 and 2**g <= replicates:
        draws = np.array(list(itertools.product((1.0, -1.0), repeat=g)))
    else:
        draws = in_float64(_weights, key, replicates, g, kind=weights)
    size = -(-len(draws) // CHUNK) * CHUNK
    padded = np.concatenate([draws, np.ones((size - len(draws), g))])
    t, replicated = in_float64(
        _wild, d.x, d.y, d.fe, d.cluster, padded, null, levels=d.levels, clusters=g, j=j,
        impose=impose_null,
    )  # fmt: skip
    replicated = replicated[: len(draws)]
    # The identity pattern is the data's own t up to rounding.
    extreme = np.abs(replicated) >= abs(t) * (1 - 1e-9)
    factor = covariance.correction(d, "CRV1", "fixest") ** 0.5
    return Wild(
        float(t) / factor, float(extreme.mean()), len(draws), replicated / factor
    )


@functools.partial(jax.jit, static_argnums=(1, 2), static_argnames="kind")
def _weights(key, n, g, *, kind):
    if kind == "rademacher":
        return jax.random.rademacher(key, (n, g), jnp.float64)
    if kind == "webb":
        values = np.sqrt([0.5, 1.0, 1.5])
        return jax.random.choice(key, np.concatenate([-values, values]), (n, g))
    root = np.sqrt(5)
    low, high, share = (1 - root) / 2, (1 + root) / 2, (root + 1) / (2 * root)
    return jnp.where(jax.random.uniform(key, (n, g)) < share, low, high)


@functools.partial(jax.jit, static_argnames=("levels", "clusters", "j", "impose"))
def _wild(x, y, fe, cluster, draws, null, *, levels, clusters, j, impose):
    both = demean(jnp.concatenate([y[:, None], x], 1), fe, levels, tol=1e-10)
    y, x = both[:, 0], both[:, 1:]
    bread = jnp.linalg.inv(dot(x.T, x))
    project = dot(bread, x.T)

    def t_of(outcome, value):
        beta = dot(project, outcome)
        e = outcome - dot(x, beta)
        v = covariance.sandwich(bread, x, e, cluster, clusters)
        return (beta[j] - value) / jnp.sqrt(v[j, j])

    rest = jnp.delete(x, j, axis=1)
    if impose:
        gram = dot(rest.T, rest)
        shifted = y - null * x[:, j]
        fitted = dot(rest, jnp.linalg.solve(gram, dot(rest.T, shifted)))
        fitted, centre = fitted + null * x[:, j], null
    else:
        beta = dot(project, y)
        fitted, centre = dot(x, beta), beta[j]
    residual = y - fitted

    def replicate(w):
        outcome = fitted[:, None] + residual[:, None] * w.T[cluster]
        outcome = demean(outcome, fe, levels, tol=1e-10)
        return jax.vmap(t_of, (1, None))(outcome, centre)

    chunks = draws.reshape(-1, CHUNK, clusters)
    return t_of(y, null), lax.map(replicate, chunks).reshape(-1)
