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
    steps: int = 30,
) -> Fit:
    """Fits the classifier.

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

    def loss(flat):
        logits = _logits(z, flat.reshape(shape))
        right = jnp.take_along_axis(logits, jnp.asarray(y)[:, None], axis=1)[:, 0]
        likelihood = (jax.nn.logsumexp(logits, axis=1) - right).sum()
        return likelihood + 0.5 * (strength * jnp.square(flat)).sum()

    gradient, hessian = jax.grad(loss), jax.hessian(loss)

    def newton(_, flat):
        step = jnp.linalg.solve(hessian(flat), gradient(flat))
        # A step is at most 2 long: far from the optimum the quadratic overshoots.
        length = jnp.linalg.norm(step)
        return flat - step * jnp.minimum(1.0, 2.0 / jnp.maximum(length, 1e-12))

    flat = lax.fori_loop(0, steps, newton, jnp.zeros(strength.shape, x.dtype))
    variance = jnp.diagonal(jnp.linalg.inv(hessian(flat)))
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
