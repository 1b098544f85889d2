r"""What the regret bound rests on: how far apart two models' futures can be.

For transitions with Gaussian noise, means $m_1, m_2$ and standard deviation $\sigma$,

$$ TV = 2 \Phi(|m_1 - m_2| / 2 \sigma) - 1 \le |m_1 - m_2| / (\sigma \sqrt{2 \pi}) $$

so future values differ by at most the horizon times the range of the reward times TV: the
value is Lipschitz in the model with a constant linear in the horizon, and the Bayesian
regret is O~(H^{3/2} d sqrt T). The inequality is elementary; that the paper's constant is
exactly this one is from memory.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpapers.papers.mpc_psrl.regression import check_deviations


def total_variation(
    one: Float[Array, "... S"], other: Float[Array, "... S"], noise: Any
) -> Float[Array, "..."]:
    """Total variation between N(one, noise^2 I) and N(other, noise^2 I).

    Args:
      one, other: means.
      noise: standard deviation.

    Raises:
      ValueError: a deviation that is not above 0.
    """
    check_deviations(noise=noise)
    distance = jnp.linalg.norm(one - other, axis=-1)
    return 2 * jax.scipy.stats.norm.cdf(distance / (2 * noise)) - 1


def value_gap(
    one: Float[Array, "... S"],
    other: Float[Array, "... S"],
    noise: Any,
    *,
    horizon: int,
    reward: float = 1.0,
) -> Float[Array, "..."]:
    """Bound of the difference of expected values after one step of either model.

    Args:
      one, other: means of the next state.
      noise: standard deviation.
      horizon: steps left.
      reward: largest minus smallest reward of a step.

    Raises:
      ValueError: a deviation that is not above 0.
    """
    check_deviations(noise=noise)
    distance = jnp.linalg.norm(one - other, axis=-1)
    return horizon * reward * distance / (noise * math.sqrt(2 * math.pi))
