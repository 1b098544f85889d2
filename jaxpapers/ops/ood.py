r"""Out-of-distribution scores and losses of a classifier.

Scores are higher for in-distribution (ID) inputs. With logits f(x) in R^C and features
z(x) in R^D, the free energy is

$$ E(x) = -T \log \sum_c e^{f_c(x) / T} $$

References: Hendrycks and Gimpel, arXiv 1610.02136 (``max_softmax``); Hendrycks, Mazeika
and Dietterich, arXiv 1812.04606 (``uniform_loss``); Chen, Li, Wu, Liang and Jha, arXiv
2006.15207 (``extra_class_loss``, ``id_log_odds``); Liu, Wang, Owens and Li, arXiv
2010.03759 (``energy``, ``energy_loss``); Liang, Li and Srikant, arXiv 1706.02690
(``odin``); Lee, Lee, Lee and Shin, arXiv 1807.03888 (``mahalanobis``); Sun, Ming, Zhu and
Li, arXiv 2204.06507 (``nearest``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from jaxpapers.ops.linalg import HIGHEST


class Gaussians(NamedTuple):
    """Class-conditional Gaussians of features with one covariance.

    Attributes:
      mean: (C, D).
      lower: (D, D), Cholesky factor of the covariance.
    """

    mean: Any
    lower: Any


def energy(logits: Float[Array, "B C"], temperature: float = 1.0) -> Float[Array, " B"]:
    """E = -T logsumexp(logits / T), low for ID inputs."""
    return -temperature * jax.nn.logsumexp(logits / temperature, -1)


def max_softmax(
    logits: Float[Array, "B C"], temperature: float = 1.0
) -> Float[Array, " B"]:
    """Largest probability of a class."""
    return jax.nn.softmax(logits / temperature, -1).max(-1)


def max_logit(logits: Float[Array, "B C"]) -> Float[Array, " B"]:
    """Largest logit."""
    return logits.max(-1)


def odin(
    logits_of: Callable[[Array], Array],
    x: Float[Array, " B *shape"],
    *,
    temperature: float = 1000.0,
    step: float = 0.0014,
) -> Float[Array, " B"]:
    """``max_softmax`` after a step of each input towards its likeliest class.

    Args:
      logits_of: inputs -> logits (B, C), each row of its own input alone.
      x: inputs.
      temperature: of the softmax.
      step: of every number of an input, along the sign of the gradient.
    """

    def confidence(x):
        return jax.nn.log_softmax(logits_of(x) / temperature, -1).max(-1).sum()

    moved = x + step * jnp.sign(jax.grad(confidence)(x))
    return max_softmax(logits_of(moved), temperature)


def fit_gaussians(
    z: Float[Array, "N D"],
    labels: Int[Array, " N"],
    classes: int,
    *,
    ridge: float = 1e-6,
) -> Gaussians:
    """Class means and the covariance within classes; NaN for a label outside 0 .. C-1.

    Args:
      z: features of training images.
      labels: their classes.
      classes: C.
      ridge: of the mean variance, added to every variance: features that are always 0
        have none.
    """
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    z = jnp.where((0 <= labels) & (labels < classes), z.T, jnp.nan).T
    member = jax.nn.one_hot(labels, classes, dtype=z.dtype)
    count = jnp.maximum(member.sum(0), 1)
    mean = jnp.matmul(member.T, z, precision=HIGHEST) / count[:, None]
    centred = z - mean[labels]
    covariance = jnp.matmul(centred.T, centred, precision=HIGHEST) / len(z)
    size = jnp.trace(covariance) / z.shape[1]
    eye = jnp.eye(z.shape[1], dtype=z.dtype)
    return Gaussians(mean, jnp.linalg.cholesky(covariance + ridge * size * eye))


def mahalanobis(fitted: Gaussians, z: Float[Array, "B D"]) -> Float[Array, " B"]:
    """-(squared distance to the nearest class mean), in the fitted covariance."""
    white = solve_triangular(fitted.lower, z.T, lower=True).T
    means = solve_triangular(fitted.lower, fitted.mean.T, lower=True).T
    return -jnp.square(white[:, None] - means[None]).sum(-1).min(-1)


def nearest(
    bank: Float[Array, "N D"], z: Float[Array, "B D"], k: int = 50
) -> Float[Array, " B"]:
    """-(distance to the k-th nearest of the bank), features scaled to length 1.

    NaN where a feature is not finite; in the bank, for all.

    Raises:
      ValueError: k below 1 or above the size of the bank.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be 1 .. {len(bank)}, the size of the bank, got {k}")

    def unit(x):
        # First by the largest, so that no square leaves the range.
        x = x / jnp.maximum(jnp.abs(x).max(-1, keepdims=True), jnp.finfo(x.dtype).tiny)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 0.5)

    similar = jnp.matmul(unit(z), unit(bank).T, precision=HIGHEST)
    kth = jax.lax.top_k(similar, k)[0][:, -1]
    kth = jnp.where(jnp.isfinite(bank).all(), kth, jnp.nan)
    return -jnp.sqrt(jnp.maximum(2 - 2 * kth, 0))


def energy_loss(
    logits_in: Float[Array, "I C"],
    labels: Int[Array, " I"],
    logits_out: Float[Array, "O C"],
    *,
    m_in: float,
    m_out: float,
    beta: float,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""Cross-entropy and squared hinges of the energies of both halves.

    $$ CE + \beta (E_{in} (E(x) - m_{in})_+^2 + E_{out} (m_{out} - E(x))_+^2) $$

    Each mean is over its own half, so that sizes may differ.

    Args:
      logits_in: of ID inputs.
      labels: their classes; outliers have none.
      logits_out: of outliers.
      m_in: energy above which an ID input costs.
      m_out: energy below which an outlier costs; above ``m_in``.
      beta: weight of both.

    Returns:
      The loss, and its terms ``ce``, ``in_energy``, ``out_energy``.
    """
    ce = cross_entropy(logits_in, labels)
    inside = jnp.square(jax.nn.relu(energy(logits_in) - m_in)).mean()
    outside = jnp.square(jax.nn.relu(m_out - energy(logits_out))).mean()
    terms = {"ce": ce, "in_energy": inside, "out_energy": outside}
    return ce + beta * (inside + outside), terms


def cross_entropy(
    logits: Float[Array, "B C"], labels: Int[Array, " B"]
) -> Float[Array, ""]:
    """Mean cross-entropy of labelled inputs."""
    log_p = jax.nn.log_softmax(logits, -1)
    return -jnp.take_along_axis(log_p, labels[:, None], 1).mean()


def uniform_loss(logits_out: Float[Array, "O C"]) -> Float[Array, ""]:
    """Cross-entropy of outliers against the uniform distribution (outlier exposure)."""
    return (jax.nn.logsumexp(logits_out, -1) - logits_out.mean(-1)).mean()


def extra_class_loss(logits_out: Float[Array, "O K"]) -> Float[Array, ""]:
    """Cross-entropy of outliers in a class of their own, the last of K = C + 1."""
    return (jax.nn.logsumexp(logits_out, -1) - logits_out[:, -1]).mean()


def id_log_odds(logits: Float[Array, "B K"]) -> Float[Array, " B"]:
    """log p(ID) / p(outlier) of a classifier whose last class is that of outliers."""
    return jax.nn.logsumexp(logits[:, :-1], -1) - logits[:, -1]


def max_log_softmax(logits: Float[Array, "B C"]) -> Float[Array, " B"]:
    """Logarithm of ``max_softmax``, which rounds to 1 where a classifier is sure."""
    return jax.nn.log_softmax(logits, -1).max(-1)
