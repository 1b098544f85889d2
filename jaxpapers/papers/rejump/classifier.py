r"""Logistic regression on metrics: which strategy, or whether the answer is right.

$p(c \mid x) \propto e^{w_c^\top x + b_c}$ with $w_0 = b_0 = 0$, x standardised, fitted by
Newton's method with the penalty $\frac{\lambda}{2} |w|^2$; intervals are those of the
inverse Hessian. The released notebooks fit boosted trees; a line has intervals.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Fit(NamedTuple):
    """A fitted classifier.

    Attributes:
      weights: (C - 1, K + 1), of the standardised features and 1; class 0 has zeros.
      errors: their standard errors.
      mean, scale: (K,), of the features; a constant one has scale 1.
    """

    weights: Float[Array, "C K1"]
    errors: Float[Array, "C K1"]
    mean: Float[Array, " K"]
    scale: Float[Array, " K"]

    @property
    def interval(self) -> tuple[Any, Any]:
        """95 % intervals of the weights."""
        return self.weights - 1.96 * self.errors, self.weights + 1.96 * self.errors


def fit(
    x: Float[Any, "N K"],
    y: Int[Any, " N"],
    classes: int = 2,
    penalty: float = 1.0,
    steps: int = 60,
) -> Fit:
    """Fits the classifier.

    Classes that a plane nearly separates have large weights: use float64 for them.

    Args:
      x: features.
      y: classes 0 .. ``classes`` - 1.
      classes: C.
      penalty: lambda; above 0, so that separable classes have finite weights.
      steps: of Newton's method.

    Raises:
      ValueError: a penalty of 0 or below, fewer than two classes.
    """
    if penalty <= 0 or classes < 2:
        raise ValueError(
            f"expected penalty > 0 and classes >= 2, got {penalty} and {classes}"
        )
    x = jnp.asarray(x)
    mean, deviation = x.mean(0), x.std(0)
    scale = jnp.where(deviation > 1e-6, deviation, 1.0)
    z = _with_one((x - mean[None]) / scale[None])
    shape = (classes - 1, z.shape[1])
    # The intercept is not penalised but for rounding.
    strength = jnp.full(shape, penalty, x.dtype).at[:, -1].set(1e-6).ravel()
    wanted = jax.nn.one_hot(y, classes, dtype=x.dtype)[:, 1:]

    def derivatives(flat):
        p = jax.nn.softmax(_logits(z, flat.reshape(shape)), axis=1)[:, 1:]
        gradient = ((p - wanted).T @ z).ravel() + strength * flat
        # Covariance of the classes times z z'.
        curvature = p[:, :, None] * (jnp.eye(classes - 1)[None] - p[:, None])
        hessian = jnp.einsum("ncd,nk,nl->ckdl", curvature, z, z)
        return gradient, hessian.reshape(len(flat), -1) + jnp.diag(strength)

    def loss(flat):
        logs = jax.nn.log_softmax(_logits(z, flat.reshape(shape)), axis=1)
        likelihood = jnp.take_along_axis(logs, jnp.asarray(y)[:, None], axis=1).sum()
        return 0.5 * (strength * jnp.square(flat)).sum() - likelihood

    # Far from the optimum the quadratic overshoots: the best of shorter steps, or none.
    shares = jnp.concatenate(
        [0.5 ** jnp.arange(12, dtype=x.dtype), jnp.zeros(1, x.dtype)]
    )

    def newton(_, flat):
        gradient, hessian = derivatives(flat)
        step = jnp.linalg.solve(hessian, gradient)
        tried = flat[None] - shares[:, None] * step[None]
        return tried[jax.vmap(loss)(tried).argmin()]

    flat = lax.fori_loop(0, steps, newton, jnp.zeros(strength.shape, x.dtype))
    variance = jnp.diagonal(jnp.linalg.inv(derivatives(flat)[1]))
    errors = jnp.sqrt(variance).reshape(shape)
    return Fit(flat.reshape(shape), errors, mean, scale)


def log_probability(model: Fit, x: Float[Any, "N K"]) -> Float[Array, "N C"]:
    """Logarithms of the probabilities of the classes."""
    z = (jnp.asarray(x) - model.mean[None]) / model.scale[None]
    return jax.nn.log_softmax(_logits(_with_one(z), model.weights), axis=1)


def _with_one(z):
    return jnp.concatenate([z, jnp.ones_like(z[:, :1])], axis=1)


def _logits(z, weights):
    logits = z @ weights.T
    return jnp.concatenate([jnp.zeros_like(logits[:, :1]), logits], axis=1)
