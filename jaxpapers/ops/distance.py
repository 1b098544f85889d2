"""Distances between distributions, from samples or from means and covariances.

Wasserstein distances are W, not W^2 (Euclidean ground cost, no factor 1/2 and none of
1/d). Functions that run on the host say so; the others can be jitted and differentiated.
Of NaN or infinite samples every distance is NaN, on the host a ValueError: a sampler that
has diverged is never near.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.ops.gaussian_distance import (
    check_points,
    frechet_distance,
    gaussian_kl,
    gaussian_w2,
    of_finite,
    root,
)
from jaxpapers.ops.host import non_finite_rows
from jaxpapers.ops.shapes import same_but_rows

__all__ = [
    "MOST", "directions", "energy_distance", "frechet_distance", "gaussian_kl",
    "gaussian_w2", "max_sliced_wasserstein", "mmd_rbf", "sinkhorn_divergence",
    "sliced_wasserstein", "wasserstein_1d", "wasserstein_assigned", "wasserstein_exact",
]  # fmt: skip

MOST = 4096
"""Largest number of points of ``wasserstein_exact``, whose cost is cubic."""


def wasserstein_1d(
    x: Float[Array, "N ..."], y: Float[Array, "M ..."], p: float = 2.0
) -> Float[Array, "..."]:
    r"""W_p on the line, $(\int_0^1 |F_x^{-1}(u) - F_y^{-1}(u)|^p du)^{1/p}$.

    Args:
      x: samples along the first axis.
      y: samples; their number may differ.
      p: exponent, >= 1 and finite.

    Raises:
      ValueError: another p, or no samples.

    Example:
      >>> x, y = jnp.array([0.0, 1.0]), jnp.array([3.0, 2.0])
      >>> float(jax.jit(wasserstein_1d)(x, y))
      2.0
    """
    n, m = len(x), len(y)
    _check_exponent("wasserstein_1d", p)
    if not n or not m:
        raise ValueError(f"wasserstein_1d needs samples, got {n} and {m}")
    same_but_rows("wasserstein_1d", x=x, y=y)
    finite = jnp.isfinite(x).all(0) & jnp.isfinite(y).all(0)
    x, y = jnp.sort(x, 0), jnp.sort(y, 0)
    if n == m:
        share = 1.0 / n
    else:
        # Both quantile functions are constant between these multiples of 1 / (n m).
        ends = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
        starts = np.append(0, ends[:-1])
        x, y = x[starts // m], y[starts // n]
        share = ((ends - starts) / (n * m)).reshape(-1, *(1,) * (x.ndim - 1))
        share = jnp.asarray(share, x.dtype)
    cost = (jnp.abs(x - y) ** p * share).sum(0)
    return jnp.where(finite, root(cost, p), jnp.nan)


def directions(key: Key[Array, ""], count: int, dim: int) -> Float[Array, "d P"]:
    """Unit vectors drawn uniformly from the sphere, as columns."""
    drawn = jax.random.normal(key, (dim, count))
    return drawn / jnp.linalg.norm(drawn, axis=0, keepdims=True)


def sliced_wasserstein(
    x: Float[Array, "N d"],
    y: Float[Array, "M d"],
    axes: Float[Array, "d P"],
    p: float = 2.0,
) -> Float[Array, ""]:
    r"""$(E_\theta W_p^p(\theta^T x, \theta^T y))^{1/p}$, at most W_p.

    Args:
      x: samples.
      y: samples.
      axes: unit vectors as columns, see ``directions``.
      p: exponent.
    """
    each = wasserstein_1d(x @ axes, y @ axes, p)
    return root((each**p).mean(), p)


def max_sliced_wasserstein(
    x: Float[Array, "N d"],
    y: Float[Array, "M d"],
    axes: Float[Array, "d P"],
    p: float = 2.0,
) -> Float[Array, ""]:
    """The largest W_p of the projections on given directions; at most W_p."""
    return wasserstein_1d(x @ axes, y @ axes, p).max()


def wasserstein_exact(x: Any, y: Any, p: float = 2.0) -> float:
    """W_p of two point sets of equal weights by optimal assignment, on the host.

    Args:
      x: (N, d) points.
      y: (M, d) points; if M differs, points are repeated to the least common multiple.
      p: exponent, >= 1 and finite.

    Raises:
      ValueError: another p, dimensions that differ, no points, more than ``MOST``, or
        points that are not finite, with their rows.
    """
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    _check_exponent("wasserstein_exact", p)
    check_points("wasserstein_exact", x, y)
    for name, points in (("x", x), ("y", y)):
        rows = non_finite_rows(points)
        if len(rows):
            raise ValueError(
                f"wasserstein_exact: {len(rows)} of {len(points)} points of {name} are "
                f"not finite: rows {rows[:10].tolist()}"
            )
    count = math.lcm(len(x), len(y))
    if not 0 < count <= MOST:
        raise ValueError(
            f"wasserstein_exact takes 1 to {MOST} points, got {len(x)} and {len(y)} with "
            f"the least common multiple {count}; use subsets of equal size, or "
            "sliced_wasserstein"
        )
    x, y = (np.repeat(a, count // len(a), 0) for a in (x, y))
    return float(_assignment(x, y, p)[0].mean() ** (1 / p))


def wasserstein_assigned(
    x: Float[Array, "N d"], y: Float[Array, "N d"], p: float = 2.0
) -> Float[Array, ""]:
    """``wasserstein_exact`` of as many points, for use under jit and grad.

    The assignment is found on the host, by a callback; gradients hold it fixed, which is
    exact wherever it is unique: of W_2^2, 2 (x - y) / N with y the point assigned to x.

    Args:
      x: points.
      y: points, as many.
      p: exponent, >= 1 and finite.

    Raises:
      ValueError: another p, no points or more than ``MOST``, shapes that differ.
    """
    check_points("wasserstein_assigned", x, y)
    if len(x) != len(y):
        raise ValueError(
            f"wasserstein_assigned needs as many points of each, got {len(x)} and "
            f"{len(y)}; wasserstein_exact takes any"
        )
    _check_exponent("wasserstein_assigned", p)
    if len(x) > MOST:
        raise ValueError(f"wasserstein_assigned takes 1 to {MOST} points, got {len(x)}")
    plan = jax.pure_callback(
        lambda x, y: _assignment(np.asarray(x), np.asarray(y), p)[1].astype(np.int32),
        jax.ShapeDtypeStruct((len(x),), jnp.int32),
        *lax.stop_gradient((x, y)),
        vmap_method="sequential",
    )
    square = jnp.square(x - y[plan]).sum(1)
    return of_finite(root(root(square, 2 / p).mean(), p), x, y)


def sinkhorn_divergence(
    x: Float[Array, "N d"],
    y: Float[Array, "M d"],
    eps: float,
    iterations: int = 200,
) -> Float[Array, ""]:
    r"""Debiased entropic W_2: a root, a length as W_2 is, 0 for equal sets.

    $$ \left(OT_\epsilon(x,y) - \tfrac12 OT_\epsilon(x,x)
       - \tfrac12 OT_\epsilon(y,y)\right)^{1/2}, \quad
       OT_\epsilon = \min_\pi \langle |x-y|^2, \pi \rangle
       + \epsilon KL(\pi | a \otimes b) $$

    It tends to W_2 as eps falls. Iterations start at the largest cost and halve down to
    eps; gradients hold the potentials fixed, which is exact once they have converged.

    Args:
      x: samples.
      y: samples.
      eps: weight of the entropy, a squared length.
      iterations: of each of the three problems; more for a small eps.

    Returns:
      The distance, NaN where the halving has not come down to eps or rounding is larger
      than eps: more iterations, a larger eps or float64.

    Raises:
      ValueError: eps or iterations that are not positive, no samples, or dimensions
        that differ.

    Reference:
      Feydy et al., arXiv 1810.08278.
    """
    check_points("sinkhorn_divergence", x, y)
    if not 0 < eps < math.inf or iterations < 1:
        raise ValueError(
            "sinkhorn_divergence needs a finite eps > 0 and iterations >= 1, got "
            f"{eps} and {iterations}"
        )
    between, own_x, own_y = (
        _entropic(_squares(a, b), eps, iterations, a is b)
        for a, b in ((x, y), (x, x), (y, y))
    )
    return of_finite(root(between - 0.5 * own_x - 0.5 * own_y, 2.0), x, y)


def energy_distance(x: Float[Array, "N d"], y: Float[Array, "M d"]) -> Float[Array, ""]:
    """2 E|x - y| - E|x - x'| - E|y - y'|, pairs of a point with itself included.

    Not negative, 0 for equal sets. Needs N M, N^2 and M^2 numbers.

    Raises:
      ValueError: no samples, or dimensions that differ.
    """
    check_points("energy_distance", x, y)
    pairs = (_distances(x, y), _distances(x, x), _distances(y, y))
    between, own_x, own_y = (d.mean() for d in pairs)
    return of_finite(2 * between - own_x - own_y, x, y)


def mmd_rbf(
    x: Float[Array, "N d"], y: Float[Array, "M d"], bandwidth: float
) -> Float[Array, ""]:
    r"""Squared maximum mean discrepancy with the kernel $\exp(-|x-y|^2 / 2 h^2)$.

    Pairs of a point with itself are included: not negative, and biased upwards.

    Args:
      x: samples.
      y: samples.
      bandwidth: h.

    Raises:
      ValueError: a bandwidth that is not positive, no samples, or dimensions that
        differ.
    """
    check_points("mmd_rbf", x, y)
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be > 0 and finite, got {bandwidth}")

    def mean(a, b):
        return jnp.exp(-_squares(a, b) / (2 * bandwidth**2)).mean()

    return of_finite(mean(x, x) + mean(y, y) - 2 * mean(x, y), x, y)


def _check_exponent(name, p):
    if not 1 <= p < math.inf:
        raise ValueError(f"{name} needs a finite p >= 1, got {p}")


def _assignment(x, y, p):
    """Costs of the best assignment, and the row of y that each row of x gets."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    cost = cdist(x, y) ** p
    if not np.isfinite(cost).all():  # The result is no distance either.
        return np.diagonal(cost), np.arange(len(x))
    rows, columns = linear_sum_assignment(cost)
    return cost[rows, columns], columns


def _entropic(cost, eps, iterations, symmetric):
    """The dual of entropic transport with equal weights; a lower bound at any moment."""
    fixed = lax.stop_gradient(cost)
    halvings = 0.5 ** jnp.arange(iterations, dtype=cost.dtype)
    levels = jnp.maximum(eps, fixed.max() * halvings)

    def soft_min(cost, potential, level, axis):
        scaled = (jnp.expand_dims(potential, 1 - axis) - cost) / level
        return -level * jax.scipy.special.logsumexp(
            scaled - math.log(cost.shape[axis]), axis
        )

    def body(potentials, level):
        f, g = potentials
        if symmetric:  # Half steps converge where whole ones swing.
            f = 0.5 * (f + soft_min(fixed, f, level, 1))
            return (f, f), None
        f = soft_min(fixed, g, level, 1)
        return (f, soft_min(fixed, f, level, 0)), None

    start = tuple(jnp.zeros(n, cost.dtype) for n in cost.shape)
    f, g = lax.scan(body, start, levels)[0]
    mass = jnp.exp((f[:, None] + g[None] - cost) / eps).mean()
    # 1 at the optimum; far from it the bound says nothing, and of its root nothing but 0
    # would be left.
    reached = (levels[-1] <= eps) & (jnp.abs(mass - 1) < 0.5)
    return jnp.where(reached, f.mean() + g.mean() - eps * (mass - 1), jnp.nan)


def _squares(x, y):
    """Squared distances of all pairs, not negative."""
    return jnp.square(x[:, None] - y[None]).sum(-1)


def _distances(x, y):
    """Distances of all pairs; the gradient is 0 where points are equal."""
    square = _squares(x, y)
    none = square <= 0  # Not "not positive": NaN stays NaN.
    return jnp.where(none, 0.0, jnp.sqrt(jnp.where(none, 1.0, square)))
