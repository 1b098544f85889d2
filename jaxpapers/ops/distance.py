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

from jaxpapers.ops.host import non_finite_rows
from jaxpapers.ops.shapes import same_but_rows, same_shape

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
    return jnp.where(finite, _root(cost, p), jnp.nan)


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
    return _root((each**p).mean(), p)


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
    _check_points("wasserstein_exact", x, y)
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
    _check_points("wasserstein_assigned", x, y)
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
    return _of_finite(_root(_root(square, 2 / p).mean(), p), x, y)


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
    _check_points("sinkhorn_divergence", x, y)
    if not 0 < eps < math.inf or iterations < 1:
        raise ValueError(
            "sinkhorn_divergence needs a finite eps > 0 and iterations >= 1, got "
            f"{eps} and {iterations}"
        )
    between, own_x, own_y = (
        _entropic(_squares(a, b), eps, iterations, a is b)
        for a, b in ((x, y), (x, x), (y, y))
    )
    return _of_finite(_root(between - 0.5 * own_x - 0.5 * own_y, 2.0), x, y)


def energy_distance(x: Float[Array, "N d"], y: Float[Array, "M d"]) -> Float[Array, ""]:
    """2 E|x - y| - E|x - x'| - E|y - y'|, pairs of a point with itself included.

    Not negative, 0 for equal sets. Needs N M, N^2 and M^2 numbers.

    Raises:
      ValueError: no samples, or dimensions that differ.
    """
    _check_points("energy_distance", x, y)
    pairs = (_distances(x, y), _distances(x, x), _distances(y, y))
    between, own_x, own_y = (d.mean() for d in pairs)
    return _of_finite(2 * between - own_x - own_y, x, y)


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
    _check_points("mmd_rbf", x, y)
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be > 0 and finite, got {bandwidth}")

    def mean(a, b):
        return jnp.exp(-_squares(a, b) / (2 * bandwidth**2)).mean()

    return _of_finite(mean(x, x) + mean(y, y) - 2 * mean(x, y), x, y)


def gaussian_w2(
    mean_x: Float[Array, " d"],
    cov_x: Float[Array, "d d"],
    mean_y: Float[Array, " d"],
    cov_y: Float[Array, "d d"],
) -> Float[Array, ""]:
    r"""W_2 of Gaussians: root of $|m_1-m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^{1/2})$.

    Singular covariances are fine; of matrices with eigenvalues below zero by more than
    rounding, which are none, the result is NaN. The trace of the root is the sum of the
    singular values of $S_1^{1/2} S_2^{1/2}$.
    """
    same_shape("gaussian_w2", mean_x=mean_x, mean_y=mean_y)
    same_shape("gaussian_w2", cov_x=cov_x, cov_y=cov_y)
    left, right = _symmetric_root(cov_x), _symmetric_root(cov_y)
    cross = jnp.linalg.svd(left @ right, compute_uv=False).sum()
    shift = jnp.square(mean_x - mean_y).sum()
    square = shift + jnp.trace(cov_x) + jnp.trace(cov_y) - 2 * cross
    return _of_finite(_root(square, 2.0), mean_x, cov_x, mean_y, cov_y)


def frechet_distance(
    x: Float[Array, "N d"], y: Float[Array, "M d"]
) -> Float[Array, ""]:
    """``gaussian_w2`` squared of Gaussians fitted to features, as FID takes it.

    Covariances divide by N - 1 and M - 1.

    Args:
      x: features of one set.
      y: features of the other.

    Raises:
      ValueError: fewer than two rows, or widths that differ.
    """
    _check_points("frechet_distance", x, y)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"needs two rows each, got {len(x)} and {len(y)}")

    def moments(a):
        centred = a - a.mean(0, keepdims=True)
        return a.mean(0), centred.T @ centred / (len(a) - 1)

    return jnp.square(gaussian_w2(*moments(x), *moments(y)))


def gaussian_kl(
    mean_x: Float[Array, " d"],
    cov_x: Float[Array, "d d"],
    mean_y: Float[Array, " d"],
    cov_y: Float[Array, "d d"],
) -> Float[Array, ""]:
    """KL(x || y) of two Gaussians in nats; covariances must be positive definite."""
    same_shape("gaussian_kl", mean_x=mean_x, mean_y=mean_y)
    same_shape("gaussian_kl", cov_x=cov_x, cov_y=cov_y)
    factor = jnp.linalg.cholesky(cov_y)
    shift = jax.scipy.linalg.solve_triangular(factor, mean_y - mean_x, lower=True)
    whitened = jax.scipy.linalg.solve_triangular(
        factor, jnp.linalg.cholesky(cov_x), lower=True
    )
    logdet = (jnp.log(jnp.diagonal(factor))).sum() - jnp.log(
        jnp.diagonal(jnp.linalg.cholesky(cov_x))
    ).sum()
    trace = jnp.square(whitened).sum()
    kl = 0.5 * (trace + jnp.square(shift).sum() - len(mean_x)) + logdet
    return _of_finite(kl, mean_x, cov_x, mean_y, cov_y)


def _check_exponent(name, p):
    if not 1 <= p < math.inf:
        raise ValueError(f"{name} needs a finite p >= 1, got {p}")


def _check_points(name, x, y):
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in x.shape + y.shape:
        raise ValueError(
            f"{name} needs points (N, d) and (M, d), one or more of each, got "
            f"{x.shape} and {y.shape}"
        )


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


def _root(value, p):
    """The p-th root of what is >= 0 but for rounding, or NaN; its gradient at 0 is 0."""
    none = value <= 0  # Not "not positive": NaN stays NaN.
    return jnp.where(none, 0.0, jnp.where(none, 1.0, value) ** (1 / p))


def _of_finite(value, *inputs):
    """``value``, NaN where one of the arrays that it is computed from is not finite."""
    finite = jnp.stack([jnp.isfinite(x).all() for x in inputs]).all()
    return jnp.where(finite, value, jnp.nan)


def _symmetric_root(matrix):
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    rounding = jnp.sqrt(jnp.finfo(values.dtype).eps) * jnp.abs(values).max()
    values = jnp.where(values < -rounding, jnp.nan, jnp.maximum(values, 0.0))
    return (vectors * jnp.sqrt(values)[None]) @ vectors.T
