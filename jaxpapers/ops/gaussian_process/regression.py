"""Exact Gaussian-process regression in buffers of a fixed size."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from jaxpapers.ops.gaussian_process.kernels import Model, kernel_matrix
from jaxpapers.ops.linalg import HIGHEST

JITTERS = (1e-6, 1e-2)
"""First and last multiple of the variance that is added where a factorisation fails."""


class Link(NamedTuple):
    """Observations of differences f(x) - weight f(successor); see ``temporal.fit``.

    Attributes:
      successor: (N, D) inputs.
      weight: (N,), gamma, 0 where an episode ended.
    """

    successor: Any
    weight: Any


class Observations(NamedTuple):
    """What a posterior is conditioned on; of padding the covariance is the identity.

    Attributes:
      x, link, mask: see ``Posterior``.
      covariance: (N, N), C.
      residual: (N,), y minus its prior mean.
    """

    x: Any
    link: Link | None
    mask: Any
    covariance: Any
    residual: Any


class Posterior(NamedTuple):
    """A process given observations; rows of ``mask`` 0 are padding, and change nothing.

    Attributes:
      model: hyper-parameters.
      x: (N, D) inputs.
      link: None for observations of the values themselves.
      mask: (N,) bool.
      root: (N, N), lower Cholesky factor of C = cov(y), the identity for padding.
      residual: (N,), y minus its prior mean, 0 for padding.
      alpha: (N,), C^-1 residual.
      jitter: (), what was added to the diagonal of C; NaN: no jitter was enough.
    """

    model: Model
    x: Any
    link: Link | None
    mask: Any
    root: Any
    residual: Any
    alpha: Any
    jitter: Any


def fit(
    model: Model,
    x: Float[Array, "N _"],
    y: Float[Array, " _"],
    mask: Bool[Array, " N"] | None = None,
) -> Posterior:
    """The posterior of y = f(x) + N(0, s2).

    Args:
      model: hyper-parameters.
      x: inputs.
      y: observations.
      mask: False for padding, whose inputs and observations are never read; None: all
        are observations.

    Raises:
      ValueError: shapes that do not fit, and, unless traced, observations that are not
        finite or a covariance that no jitter makes positive definite. Inside ``jax.jit``
        the latter gives NaN; ``check_finite`` raises for it afterwards.

    Example:
      >>> from jaxpapers.ops import gaussian_process as gp
      >>> process = gp.model(1.0, [1.0], 0.25)
      >>> post = jax.jit(gp.fit)(process, np.ones((1, 1), "f"), np.ones(1, "f"))
      >>> mean, variance = jax.jit(gp.predict)(post, np.ones((1, 1), "f"))
      >>> round(float(mean[0]), 2), round(float(variance[0]), 2)
      (0.8, 0.2)
    """
    mask = jnp.ones(len(x), bool) if mask is None else mask
    check_rows(model, x, y, mask)
    return condition(model, observations(model, x, y, mask))


def observations(
    model: Model,
    x: Float[Array, "N _"],
    y: Float[Array, " N"],
    mask: Bool[Array, " N"],
) -> Observations:
    """Covariance and residual of y = f(x) + N(0, s2)."""
    x = jnp.where(mask[:, None], x, 0)
    covariance = kernel_matrix(model, x, x)
    noise = model.noise * jnp.eye(len(x), dtype=covariance.dtype)
    return padded(x, None, mask, covariance + noise, y - model.mean)


def padded(x, link, mask, covariance, residual) -> Observations:
    """Observations whose padding is the identity, with residual 0."""
    real = mask[:, None] & mask[None]
    covariance = jnp.where(real, covariance, jnp.eye(len(x), dtype=covariance.dtype))
    residual = jnp.where(mask, residual, 0).astype(covariance.dtype)
    return Observations(x, link, mask, covariance, residual)


def condition(model: Model, given: Observations) -> Posterior:
    """The posterior of observations, see ``fit``."""
    root, jitter = factor(given.covariance, given.mask * model.variance)
    alpha = solve(root, given.residual)
    x, link, mask, _, residual = given
    post = Posterior(model, x, link, mask, root, residual, alpha, jitter)
    if not isinstance(post.alpha, jax.core.Tracer):
        check_finite(post)
    return post


def factor(
    covariance: Float[Array, "N N"], scale: Float[Array, " N"]
) -> tuple[Float[Array, "N N"], Float[Array, ""]]:
    """Lower Cholesky factor of a covariance with the least jitter that makes it one.

    Args:
      covariance: symmetric.
      scale: of the jitter on each row: 0, then ``JITTERS[0]`` times this, ten times as
        much, ..., up to ``JITTERS[1]``.

    Returns:
      The factor, and the largest jitter; NaN if none was enough, the factor then is NaN.
    """
    scale = scale.astype(covariance.dtype)

    def cholesky(level):
        shifted = covariance + jnp.diag(level * scale)
        return jnp.tril(lax.linalg.cholesky(shifted, symmetrize_input=False))

    def failed(carry):
        level, root = carry
        # The last pivots of a factor are NaN whenever an earlier one was not positive.
        return ~jnp.isfinite(root[-1]).all() & (level < JITTERS[1] * 0.99)

    def raised(carry):
        level = jnp.maximum(10 * carry[0], JITTERS[0]).astype(carry[0].dtype)
        return level, cholesky(level)

    zero = jnp.zeros((), covariance.dtype)
    level, root = lax.while_loop(failed, raised, (zero, cholesky(zero)))
    good = jnp.isfinite(root).all()
    return jnp.where(good, root, jnp.nan), jnp.where(
        good, level * scale.max(initial=0), jnp.nan
    )


def solve(root: Float[Array, "N N"], b: Float[Array, " N *S"]) -> Float[Array, " N *S"]:
    """(L L^T)^-1 b."""
    half = solve_triangular(root, b, lower=True)
    return solve_triangular(root, half, lower=True, trans="T")


def refit(post: Posterior, y: Float[Array, " N"]) -> Posterior:
    """The posterior of other observations of the same inputs: no new factorisation."""
    means = post.model.mean * (1 if post.link is None else 1 - post.link.weight)
    residual = jnp.where(post.mask, y - means, 0).astype(post.root.dtype)
    return post._replace(residual=residual, alpha=solve(post.root, residual))


def cross(post: Posterior, q: Float[Array, "M _"]) -> Float[Array, "M N"]:
    """cov(f(q), y), 0 for padding."""
    k = kernel_matrix(post.model, q, post.x)
    if post.link is not None:
        after = kernel_matrix(post.model, q, post.link.successor)
        k = k - after * post.link.weight[None]
    return jnp.where(post.mask[None], k, 0)


def predict(
    post: Posterior, q: Float[Array, "M _"]
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Mean and variance of f at each query; those of the prior without observations.

    The variance is that of f, to which an observation adds s2.
    """
    k = cross(post, q)
    half = solve_triangular(post.root, k.T, lower=True)
    mean = post.model.mean + jnp.matmul(k, post.alpha, precision=HIGHEST)
    return mean, jnp.maximum(post.model.variance - jnp.square(half).sum(0), 0)


def covariance(
    post: Posterior, q: Float[Array, "M _"], other: Float[Array, "K _"] | None = None
) -> Float[Array, "M K"]:
    """cov(f(q), f(other)); None: of q with itself."""
    k1 = cross(post, q)
    k2 = k1 if other is None else cross(post, other)
    halves = (solve_triangular(post.root, k.T, lower=True) for k in (k1, k2))
    known = jnp.einsum("nm,nk->mk", *halves, precision=HIGHEST)
    return kernel_matrix(post.model, q, q if other is None else other) - known


def append(post: Posterior, x: Float[Array, " _"], y: Any) -> Posterior:
    """One more observation, in the first row of padding: O(N^2), no factorisation.

    Args:
      post: of values (``fit``), whose padding follows its observations.
      x: input (D,).
      y: observation.

    Raises:
      ValueError: a posterior of differences; unless traced, a full buffer or an input
        that is not finite. Inside ``jax.jit`` a full buffer gives NaN.
    """
    if post.link is not None:
        raise ValueError("append needs a posterior of values, got one of differences")
    count = post.mask.sum()
    full = count >= len(post.mask)
    if not isinstance(full, jax.core.Tracer) and full:
        raise ValueError(
            f"the buffer of {len(post.mask)} rows is full; keep some of them first, e.g. "
            "by keep_by_variance, or fit a larger one"
        )
    x = jnp.asarray(x, post.x.dtype)
    k = cross(post, x[None])[0]
    row = solve_triangular(post.root, k, lower=True)
    rest = post.model.variance + post.model.noise + post.jitter - jnp.square(row).sum()
    index = jnp.arange(len(k))
    row = jnp.where(index == count, jnp.sqrt(rest), row)
    here = index == count
    root = jnp.where(here[:, None], row[None], post.root)
    residual = jnp.where(here, y - post.model.mean, post.residual)
    residual = jnp.where(full, jnp.nan, residual)
    new = post._replace(
        x=jnp.where(here[:, None], x[None], post.x),
        mask=post.mask | here,
        root=root,
        residual=residual,
        alpha=solve(root, residual),
    )
    if not isinstance(new.alpha, jax.core.Tracer):
        check_finite(new)
    return new


def log_evidence(post: Posterior) -> Float[Array, ""]:
    """log N(y; its prior mean, C); padding adds 0."""
    return _log_density(post.root, post.residual, post.alpha, post.mask)


def _log_density(root, residual, alpha, mask):
    log_det = jnp.log(jnp.diagonal(root)).sum()
    square = jnp.vdot(residual, alpha, precision=HIGHEST)
    return -square / 2 - log_det - mask.sum() / 2 * math.log(2 * math.pi)


def evidence(model: Model, given: Observations) -> Float[Array, ""]:
    """``log_evidence``, differentiable with respect to the hyper-parameters.

    Args:
      model: hyper-parameters, for the jitter.
      given: of ``observations`` or ``temporal.differences`` with them.
    """
    return _evidence(given.covariance, given.residual, given.mask, model.variance)


@jax.custom_vjp
def _evidence(covariance, residual, mask, variance):
    return _evidence_and_rest(covariance, residual, mask, variance)[0]


def _evidence_and_rest(covariance, residual, mask, variance):
    root, _ = factor(covariance, mask * variance)
    alpha = solve(root, residual)
    return _log_density(root, residual, alpha, mask), (root, alpha)


def _evidence_gradient(rest, g):
    # Reverse mode does not pass the loop over jitters; the gradient has a closed form.
    root, alpha = rest
    inverse = solve(root, jnp.eye(len(alpha), dtype=root.dtype))
    return g * (alpha[:, None] * alpha[None] - inverse) / 2, -g * alpha, None, None


_evidence.defvjp(_evidence_and_rest, _evidence_gradient)


def information_gain(post: Posterior) -> Float[Array, ""]:
    """Mutual information of f and values observed with independent noise, in nats.

    $$ \\tfrac12 \\log\\det(I + K / s_2) $$

    Raises:
      ValueError: a posterior of differences.
    """
    if post.link is not None:
        raise ValueError("the information gain here is that of values (fit)")
    log_det = jnp.log(jnp.diagonal(post.root)).sum()
    return log_det - post.mask.sum() / 2 * post.model.log_noise


def expected_variance(
    post: Posterior,
    q: Float[Array, "M _"],
    weight: Float[Array, " M"] | None = None,
) -> Float[Array, ""]:
    """E_mu var(f(q)): mean posterior variance under the weights of the queries."""
    _, variance = predict(post, q)
    return jnp.average(variance, weights=weight)


def check_rows(model: Model, x: Any, y: Any, mask: Any) -> None:
    """Refuses observations of unequal numbers, and known ones that are not finite."""
    if not len(x) == len(y) == len(mask) or y.ndim != 1:
        raise ValueError(
            f"inputs (N, {model.columns}), observations (N,) and mask (N,) need the same "
            f"N, got {x.shape}, {y.shape} and {mask.shape}"
        )
    if any(isinstance(v, jax.core.Tracer) for v in (x, y, mask)):
        return
    kept = np.asarray(mask)
    for name, value in {"inputs": x, "observations": y}.items():
        rows = np.asarray(value).reshape(len(kept), -1)[kept]
        if not np.isfinite(rows).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")


def check_finite(post: Posterior) -> None:
    """Refuses a posterior whose covariance could not be factorised; on the host.

    Raises:
      ValueError: it holds NaN.
    """
    if np.isfinite(np.asarray(post.jitter)).all() and np.isfinite(post.alpha).all():
        return
    raise ValueError(
        "the covariance of the observations is not positive definite, even with a jitter "
        f"of {JITTERS[1]} times the variance, or an input is not finite: raise the "
        "noise, shorten the lengths, or use float64"
    )
