r"""Bayesian regression of the state's differences on a network's features.

With features Z (N, D) of all inputs, differences y (N, S) and the network's bias b:

$$ y_i - b_i = Z w_i + \epsilon,\ \epsilon \sim N(0, \sigma_n^2), \quad
   w_i \sim N(0, \sigma^2 I) $$

exactly, with one precision for all S outputs, by ``ops.posterior``'s QR route: noise of
1e-4 leaves float32 no digits of Z^T Z.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxpapers.ops import posterior as blr

NOISES = tuple(float(x) for x in np.geomspace(1e-4, 1.0, 17))
"""Deviations of the noise that ``evident_noise`` chooses from."""


def regress(
    z: Float[Array, "N D"],
    y: Float[Array, "_ S"],
    *,
    prior: Any,
    noise: Any,
    weight: Float[Array, " _"] | None = None,
) -> blr.Posterior:
    """Posterior of the weights.

    Args:
      z: features.
      y: targets without the bias.
      prior: sigma, standard deviation of the weights.
      noise: sigma_n, standard deviation of the targets.
      weight: of each row, 0 for padding.

    Raises:
      ValueError: a deviation that is not above 0; z or y that are known and not finite;
        another number of targets than features.
    """
    check_deviations(prior=prior, noise=noise)
    for name, value in {"z": z, "y": y}.items():
        if not isinstance(value, jax.core.Tracer) and not np.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinity in rows that would count")
    if len(z) != len(y):
        raise ValueError(f"z and y must have as many rows, got {z.shape} and {y.shape}")
    start = blr.prior(z.shape[1], jnp.square(prior), y.shape[1:], z.dtype)
    if not len(z):
        return start
    return blr.update(start, z, y, jnp.square(noise), weight)


def evident_noise(
    z: Float[Array, "N D"],
    y: Float[Array, "N S"],
    prior: Any,
    weight: Float[Array, " N"] | None = None,
) -> Float[Array, ""]:
    """The deviation among ``NOISES`` with the largest evidence of all outputs."""

    def evidence(noise):
        post = regress(z, y, prior=prior, noise=noise, weight=weight)
        return blr.log_evidence(post, jnp.square(prior), jnp.square(noise)).sum()

    noises = jnp.asarray(NOISES, z.dtype)
    return noises[lax.map(evidence, noises).argmax()]


def check_deviations(**deviations: Any) -> None:
    """Raises ValueError for a standard deviation that is known and not above 0."""
    for name, value in deviations.items():
        known = not isinstance(value, jax.core.Tracer)
        if known and not (np.asarray(value) > 0).all():
            raise ValueError(
                f"{name} is a standard deviation and must be > 0, got {value}"
            )
