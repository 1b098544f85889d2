r"""Functions drawn from a posterior, as a whole: they can be evaluated anywhere, again.

Pathwise (Matheron's rule; Wilson et al., "Efficiently sampling functions from Gaussian
process posteriors", ICML 2020): a draw of the prior, corrected by the data,

$$ f(\cdot) = f_0(\cdot) + \mathrm{cov}(f(\cdot), y) C^{-1} (y - H f_0 - n), \qquad
   f_0(x) = m_0 + w_a^\top \phi(x) $$

with F random Fourier features phi (Rahimi and Recht, 2007), weights w of their own for
each discrete action, and n a draw of the noise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.ops.gaussian_process.kernels import Model, split
from jaxpapers.ops.gaussian_process.regression import (
    Posterior,
    covariance,
    predict,
    solve,
)
from jaxpapers.ops.gaussian_process.regression import cross as cross_covariance
from jaxpapers.ops.linalg import HIGHEST


class Features(NamedTuple):
    """Random Fourier features, for any length scales.

    Attributes:
      frequencies: (F, D), of length scales 1.
      phases: (F,), in [0, 2 pi).
    """

    frequencies: Any
    phases: Any


class Function(NamedTuple):
    """A draw of the prior, or with ``alpha`` of a posterior.

    Attributes:
      model: hyper-parameters.
      features: of the draw.
      weights: (F,), with discrete actions (A, F).
      alpha: (N,), weights of cov(f, y); None: a draw of the prior.
    """

    model: Model
    features: Features
    weights: Any
    alpha: Any = None


def random_features(
    key: Key[Array, ""], model: Model, count: int, dtype: Any = jnp.float32
) -> Features:
    """Frequencies from the kernel's spectral density.

    Normal for "rbf"; Student's t of 5 degrees of freedom for "matern52".

    Args:
      key: of the draw.
      model: its kind and number of inputs count, not its values.
      count: F.
      dtype: of the features.

    Raises:
      ValueError: no features.
    """
    if count < 1:
        raise ValueError(f"at least 1 random feature is needed, got {count}")
    key_w, key_b, key_u = jax.random.split(key, 3)
    frequencies = jax.random.normal(key_w, (count, len(model.log_lengths)), dtype)
    if model.kind == "matern52":
        # 2 Gamma(5/2) is chi-squared of 5 degrees.
        mixing = 2 * jax.random.gamma(key_u, 2.5, (count,), dtype)
        frequencies = frequencies / jnp.sqrt(mixing / 5)[:, None]
    phases = jax.random.uniform(key_b, (count,), dtype, maxval=2 * jnp.pi)
    return Features(frequencies, phases)


def feature_map(
    features: Features, model: Model, states: Float[Array, "N D"]
) -> Float[Array, "N F"]:
    """sqrt(2 v / F) cos(w . x / l + b); inputs without a column of the action."""
    scaled = states / jnp.exp(model.log_lengths)[None]
    angles = jnp.matmul(scaled, features.frequencies.T, precision=HIGHEST)
    size = jnp.sqrt(2 * model.variance / len(features.phases))
    return size * jnp.cos(angles + features.phases[None])


def draw_prior(
    key: Key[Array, ""], model: Model, count: int, dtype: Any = jnp.float32
) -> Function:
    """A function of the prior, up to the error of ``count`` random features."""
    key_features, key_weights = jax.random.split(key)
    shape = (model.actions, count) if model.actions else (count,)
    weights = jax.random.normal(key_weights, shape, dtype)
    return Function(model, random_features(key_features, model, count, dtype), weights)


def evaluate_prior(function: Function, q: Float[Array, "M _"]) -> Float[Array, " M"]:
    """f_0 at each query, without what the data add."""
    model = function.model
    states, actions = split(model, q)
    phi = feature_map(function.features, model, states)
    if actions is None:
        values = jnp.matmul(phi, function.weights, precision=HIGHEST)
    else:
        values = (phi * function.weights[actions.astype(int)]).sum(1)
    return model.mean + values


def draw_noise(key: Key[Array, ""], post: Posterior) -> Float[Array, " N"]:
    """Independent noise N(0, s2) of each observation, 0 for padding."""
    eps = jax.random.normal(key, post.residual.shape, post.residual.dtype)
    return jnp.where(post.mask, jnp.sqrt(post.model.noise) * eps, 0)


def observed(post: Posterior, function: Function) -> Float[Array, " N"]:
    """H f_0: what the observations would be of a draw of the prior, without noise."""
    values = evaluate_prior(function, post.x)
    if post.link is not None:
        after = evaluate_prior(function, post.link.successor)
        values = values - post.link.weight * after
    return values


def pathwise(
    post: Posterior, function: Function, noise: Float[Array, " N"]
) -> Function:
    """A draw of the posterior from a draw of the prior and of the noise.

    Args:
      post: the posterior.
      function: see ``draw_prior``.
      noise: of the law of the observations' noise: ``draw_noise``, and with
        ``monte_carlo`` noise its differences.
    """
    means = post.model.mean * (1 if post.link is None else 1 - post.link.weight)
    missing = post.residual + means - observed(post, function) - noise
    alpha = solve(post.root, jnp.where(post.mask, missing, 0))
    return function._replace(alpha=alpha)


def sample(key: Key[Array, ""], post: Posterior, count: int) -> Function:
    """A function of the posterior of values, with ``count`` random features.

    Raises:
      ValueError: a posterior of differences, whose noise ``pathwise`` is told.
    """
    if post.link is not None:
        raise ValueError("sample draws from posteriors of values (fit); see pathwise")
    key_prior, key_noise = jax.random.split(key)
    function = draw_prior(key_prior, post.model, count, post.residual.dtype)
    return pathwise(post, function, draw_noise(key_noise, post))


def evaluate(
    function: Function, post: Posterior, q: Float[Array, "M _"]
) -> Float[Array, " M"]:
    """A drawn function at each query: O(F + N) each.

    Args:
      function: a draw of ``post``, or of the prior.
      post: whose inputs ``function.alpha`` weighs.
      q: queries.
    """
    values = evaluate_prior(function, q)
    if function.alpha is None:
        return values
    added = cross_covariance(post, q)
    return values + jnp.matmul(added, function.alpha, precision=HIGHEST)


def sample_joint(
    key: Key[Array, ""] | Float[Array, " _"],
    post: Posterior,
    q: Float[Array, "M _"],
    *,
    jitter: float = 1e-10,
) -> Float[Array, " M"]:
    """Values of one function at a finite set, exactly: mean + chol(cov + jitter I) z.

    Args:
      key: of the draw, or z itself, standard normal.
      post: the posterior.
      q: queries; O(M^3).
      jitter: float32 needs about 1e-6 times the variance.

    Raises:
      ValueError: z of another shape.
    """
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        z = jax.random.normal(key, (len(q),), post.alpha.dtype)
    else:
        z = key
    if z.shape != (len(q),):
        raise ValueError(f"z must have the shape {(len(q),)}, got {z.shape}")
    mean, _ = predict(post, q)
    cov = covariance(post, q) + jitter * jnp.eye(len(q), dtype=post.alpha.dtype)
    root = jnp.tril(lax.linalg.cholesky(cov))
    return mean + jnp.matmul(root, z, precision=HIGHEST)


def prior_covariance(function: Function, q: Float[Array, "M _"]) -> Float[Array, "M M"]:
    """cov(f_0(q)) over the weights: the kernel, up to the error of the features."""
    states, actions = split(function.model, q)
    phi = feature_map(function.features, function.model, states)
    k = jnp.matmul(phi, phi.T, precision=HIGHEST)
    return k if actions is None else jnp.where(actions[:, None] == actions[None], k, 0)
