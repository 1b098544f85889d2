r"""Bayesian linear regression: statistics, posterior, draws, evidence.

Rows z in R^D of features with targets y in R or R^S, each output with weights of its own:

$$ y = w^\top z + \varepsilon, \quad \varepsilon \sim N(0, \sigma_n), \quad
   w \sim N(0, \sigma I) $$
$$ A = Z^\top Z / \sigma_n + I / \sigma = R^\top R, \quad
   \mu = A^{-1} Z^\top y / \sigma_n, \quad w \mid y \sim N(\mu, A^{-1}) $$

sigma (``prior``) and sigma_n (``noise``) are variances. The precision A is the same for
all outputs. Two routes to the same posterior:

- ``statistics`` of chunks of rows, ``add``, ``posterior``: one product Z^T Z, which adds
  over chunks and devices; a Cholesky factorisation of A with unit diagonal. Loses half
  the digits of an ill-conditioned Z.
- ``prior`` and ``update``: a QR factorisation of [R; Z / sqrt(sigma_n)], rows at a time.
  For noise of 1e-8 in float32, or fewer rows than features.

Both compute in float32, or in float64 if the features are.

Reference: Bishop, Pattern Recognition and Machine Learning, 2006, 3.3; Riquelme, Tucker
and Snoek, Deep Bayesian Bandits Showdown, ICLR 2018 (on features of a network).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Key

from jaxpapers.ops.linalg import HIGHEST


class Statistics(NamedTuple):
    """Sufficient statistics of rows; those of disjoint sets of rows add.

    Attributes:
      gram: (D, D), sum of z z^T.
      moment: (D,) or (D, S), sum of z y^T.
      square: () or (S,), sum of y^2.
      count: (), number of rows.
    """

    gram: Any
    moment: Any
    square: Any
    count: Any


class Posterior(NamedTuple):
    """N(mean, (R^T R)^-1) of the weights, of each output.

    Attributes:
      mean: (D,) or (D, S).
      root: (D, D), R: upper triangular root of the precision, positive diagonal.
      residual: () or (S,), |y - Z mean|^2 / noise + |mean|^2 / prior.
      count: (), rows seen.
    """

    mean: Any
    root: Any
    residual: Any
    count: Any


def statistics(
    z: Float[Array, "N D"],
    y: Float[Array, " _ *S"],
    weight: Float[Array, " _"] | None = None,
    *,
    chunk: int = 0,
) -> Statistics:
    """Sufficient statistics of rows.

    Args:
      z: features.
      y: targets.
      weight: of each row, e.g. 0 for padding; r counts a row r times. None: 1.
      chunk: rows of a product. Sums of the products of 2,048 to 8,192 rows keep in
        float32 the digits that one long sum loses; 0: all rows at once.

    Raises:
      ValueError: another number of targets or weights than rows.
    """
    kept = jnp.ones(len(z)) if weight is None else weight
    if not len(z) == len(y) == len(kept):
        raise ValueError(
            f"features, targets and weights need as many rows, got {z.shape}, {y.shape} "
            f"and {kept.shape}"
        )
    dtype = jnp.promote_types(z.dtype, jnp.float32)

    def products(z, y, kept):
        z, y, kept = (x.astype(dtype) for x in (z, y, kept))
        heavy = z if weight is None else z * kept[:, None]
        gram = jnp.einsum("nd,ne->de", heavy, z, precision=HIGHEST)
        moment = jnp.einsum("nd,n...->d...", heavy, y, precision=HIGHEST)
        square = jnp.einsum("n,n...->...", kept, jnp.square(y), precision=HIGHEST)
        return Statistics(gram, moment, square, kept.sum())

    if not 0 < chunk < len(z):
        return products(z, y, kept)
    whole = len(z) // chunk * chunk

    def body(total, start):
        cut = (lax.dynamic_slice_in_dim(x, start, chunk) for x in (z, y, kept))
        return add(total, products(*cut)), None

    shapes = jax.eval_shape(products, z, y, kept)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = lax.scan(body, zeros, jnp.arange(0, whole, chunk))
    return add(total, products(z[whole:], y[whole:], kept[whole:]))


def add(one: Statistics, other: Statistics) -> Statistics:
    """Statistics of both sets of rows."""
    return jax.tree.map(jnp.add, one, other)


def posterior(stats: Statistics, prior: Any, noise: Any) -> Posterior:
    """Posterior of the rows whose statistics are given.

    Args:
      stats: see ``statistics``; all zero gives the prior.
      prior: variance of the weights.
      noise: variance of the targets.

    Raises:
      ValueError: a variance that is not above 0.

    Example:
      >>> import numpy as np
      >>> fit = jax.jit(lambda z, y: posterior(statistics(z, y), prior=1.0, noise=1.0))
      >>> round(float(fit(np.float32([[1.0]]), np.float32([2.0])).mean[0]), 3)
      1.0
    """
    check_variances(prior=prior, noise=noise)
    eye = jnp.eye(stats.gram.shape[-1], dtype=stats.gram.dtype)
    precision = (stats.gram + stats.gram.T) / (2 * noise) + eye / prior
    # Of unit diagonal: features of different sizes are no reason to lose digits.
    size = jnp.sqrt(jnp.diagonal(precision))
    lower = lax.linalg.cholesky(precision / size[:, None] / size[None])
    root = (jnp.tril(lower) * size[:, None]).T
    target = solve_triangular(root, stats.moment / noise, trans="T")
    residual = stats.square / noise - jnp.square(target).sum(0)
    mean = solve_triangular(root, target)
    return Posterior(mean, root, jnp.maximum(residual, 0), stats.count)


def prior(
    features: int, variance: Any, outputs: tuple[int, ...] = (), dtype: Any = None
) -> Posterior:
    """The posterior of no rows: N(0, variance I).

    Args:
      features: D.
      variance: of the weights.
      outputs: () for targets (N,), (S,) for targets (N, S).
      dtype: of all arrays; None: float32.

    Raises:
      ValueError: a variance that is not above 0.
    """
    check_variances(prior=variance)
    dtype = dtype or jnp.float32
    return Posterior(
        jnp.zeros((features, *outputs), dtype),
        jnp.eye(features, dtype=dtype) / jnp.sqrt(jnp.asarray(variance, dtype)),
        jnp.zeros(outputs, dtype),
        jnp.zeros((), dtype),
    )


def update(
    post: Posterior,
    z: Float[Array, "N D"],
    y: Float[Array, " N *S"],
    noise: Any,
    weight: Float[Array, " N"] | None = None,
) -> Posterior:
    """Posterior after more rows, by a QR factorisation of the root and the rows.

    Args:
      post: before them, see ``prior``.
      z: their features.
      y: their targets.
      noise: variance of the targets.
      weight: of each row, e.g. 0 for padding; None: 1.

    Raises:
      ValueError: features of another width, or a variance that is not above 0.
    """
    check_variances(noise=noise)
    check_width(post, z)
    dtype, d = post.root.dtype, post.root.shape[0]
    kept = jnp.ones(len(z), dtype) if weight is None else weight.astype(dtype)
    scale = jnp.sqrt(kept / noise).astype(dtype)
    y = y.reshape(len(y), -1).astype(dtype)
    mean = post.mean.reshape(d, -1)
    known = jnp.matmul(post.root, mean, precision=HIGHEST)
    old = jnp.concatenate([post.root, known], 1)
    new = jnp.concatenate([z.astype(dtype), y], 1) * scale[:, None]
    # As many rows as columns at least: the factor is then square.
    rest = jnp.zeros((max(y.shape[1] - len(z), 0), old.shape[1]), dtype)
    factor = jnp.linalg.qr(jnp.concatenate([old, new, rest]), mode="r")
    sign = jnp.where(jnp.diagonal(factor)[:d] < 0, -1, 1).astype(dtype)
    root, target = (factor[:d, :d] * sign[:, None], factor[:d, d:] * sign[:, None])
    left = jnp.square(factor[d:, d:]).sum(0).reshape(post.residual.shape)
    return Posterior(
        solve_triangular(root, target).reshape(post.mean.shape),
        jnp.triu(root),
        post.residual + left,
        post.count + kept.sum(),
    )


def sample(
    key: Key[Array, ""] | Float[Array, " D *S"],
    post: Posterior,
    *,
    scale: Any = 1.0,
    factor: str = "precision",
) -> Float[Array, " D *S"]:
    """Weights from the posterior: mean + sqrt(scale) R^-1 eps, of each output.

    Args:
      key: of the draw, or eps itself, standard normal, of the mean's shape.
      post: the posterior.
      scale: of the covariance.
      factor: precision, or covariance: mean + chol(scale A^-1) eps, of the same law, the
        lower root that most codes draw with.

    Raises:
      ValueError: unknown factor, or eps of another shape.
    """
    if factor not in ("precision", "covariance"):
        raise ValueError(f"factor must be precision or covariance, got {factor!r}")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        eps = jax.random.normal(key, post.mean.shape, post.mean.dtype)
    else:
        eps = key
    if eps.shape != post.mean.shape:
        raise ValueError(f"eps must have the shape {post.mean.shape}, got {eps.shape}")
    if factor == "precision":
        step = solve_triangular(post.root, eps)
    else:
        lower = lax.linalg.cholesky(covariance(post))
        step = jnp.tensordot(jnp.tril(lower), eps, 1, precision=HIGHEST)
    return post.mean + jnp.sqrt(jnp.asarray(scale, eps.dtype)) * step


def covariance(post: Posterior) -> Float[Array, "D D"]:
    """A^-1, of each output."""
    eye = jnp.eye(post.root.shape[0], dtype=post.root.dtype)
    inverse = solve_triangular(post.root, eye)
    return jnp.matmul(inverse, inverse.T, precision=HIGHEST)


def variance(post: Posterior, z: Float[Array, "N D"]) -> Float[Array, " N"]:
    """z^T A^-1 z of each row: variance of w^T z."""
    check_width(post, z)
    half = solve_triangular(post.root, z.astype(post.root.dtype).T, trans="T")
    return jnp.square(half).sum(0)


def log_evidence(post: Posterior, prior: Any, noise: Any) -> Float[Array, " *S"]:
    """log N(y; 0, noise I + prior Z Z^T) of each output.

    Args:
      post: the posterior for these variances.
      prior: variance of the weights.
      noise: variance of the targets.

    Raises:
      ValueError: a variance that is not above 0.
    """
    check_variances(prior=prior, noise=noise)
    d = post.root.shape[0]
    log_det = 2 * jnp.log(jnp.diagonal(post.root)).sum() + d * jnp.log(prior)
    log_noise = post.count * (math.log(2 * math.pi) + jnp.log(noise))
    return -(log_noise + log_det + post.residual) / 2


def check_variances(**variances: Any) -> None:
    """Raises ValueError for a variance that is known and not above 0."""
    for name, value in variances.items():
        known = not isinstance(value, jax.core.Tracer)
        if known and not np.all((np.asarray(value) > 0) & np.isfinite(value)):
            raise ValueError(f"{name} is a variance and must be > 0, got {value}")


def check_width(post: Posterior, z: Any) -> None:
    """Raises ValueError for features of another width than the posterior's."""
    if z.ndim != 2 or z.shape[1] != post.root.shape[0]:
        raise ValueError(
            f"features must be (N, {post.root.shape[0]}) as the posterior's, got "
            f"{z.shape}"
        )


def check_finite(post: Posterior) -> None:
    """Refuses a posterior of features or targets that are not finite; on the host.

    Raises:
      ValueError: it holds NaN or infinity.
    """
    bad = [n for n, x in post._asdict().items() if not np.isfinite(np.asarray(x)).all()]
    if bad:
        raise ValueError(
            f"the posterior's {', '.join(bad)} hold NaN or infinity: features or targets "
            "are not finite, or the precision is not positive definite in this dtype "
            "(use float64, or posterior.update)"
        )
