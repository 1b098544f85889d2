"""Distances between Gaussians, from means and covariances; see ``ops.distance``."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpapers.ops.shapes import same_shape


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
    return of_finite(root(square, 2.0), mean_x, cov_x, mean_y, cov_y)


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
    check_points("frechet_distance", x, y)
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
    return of_finite(kl, mean_x, cov_x, mean_y, cov_y)


def check_points(name, x, y):
    """Raises ValueError unless both are points (N, d) and (M, d), one or more of each."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in x.shape + y.shape:
        raise ValueError(
            f"{name} needs points (N, d) and (M, d), one or more of each, got "
            f"{x.shape} and {y.shape}"
        )


def root(value, p):
    """The p-th root of what is >= 0 but for rounding, or NaN; its gradient at 0 is 0."""
    none = value <= 0  # Not "not positive": NaN stays NaN.
    return jnp.where(none, 0.0, jnp.where(none, 1.0, value) ** (1 / p))


def of_finite(value, *inputs):
    """``value``, NaN where one of the arrays that it is computed from is not finite."""
    finite = jnp.stack([jnp.isfinite(x).all() for x in inputs]).all()
    return jnp.where(finite, value, jnp.nan)


def _symmetric_root(matrix):
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    rounding = jnp.sqrt(jnp.finfo(values.dtype).eps) * jnp.abs(values).max()
    values = jnp.where(values < -rounding, jnp.nan, jnp.maximum(values, 0.0))
    return (vectors * jnp.sqrt(values)[None]) @ vectors.T
