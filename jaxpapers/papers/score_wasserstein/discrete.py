"""A score model in discrete steps: its Lipschitz constants, its samples."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxpapers.nets.critic import spectral_normalize
from jaxpapers.nets.denoiser import StepMLP
from jaxpapers.ops import diffusion, trajectories
from jaxpapers.ops.schedules import NoiseSchedule
from jaxpapers.papers.score_wasserstein.bound import Factor, integrating_factor
from jaxpapers.papers.score_wasserstein.lipschitz import (
    MODES,
    Lipschitz,
    one_sided_lipschitz,
    one_sided_lipschitz_upper,
)
from jaxpapers.papers.score_wasserstein.options import STARTS, Net

NOISE = NoiseSchedule("sigmoid", timesteps=10, beta_start=1e-5, beta_end=1e-2)
NET = Net()


class Model(NamedTuple):
    """A net that predicts the noise of a discrete forward process, see ``model``.

    Attributes:
      net: (x (B, d), step (B,)) -> (B, d).
      betas: (K,), float64 NumPy.
      regularizer: see ``Net``; only "spectral" has an effect here.
      iterations: of the power iteration for spectral norms; 0: exact, by SVD, which
        costs more than the rest of a step.
    """

    net: StepMLP
    betas: Any
    regularizer: str = "none"
    iterations: int = 20

    @property
    def alpha_bar(self) -> np.ndarray:
        """Products of 1 - beta, (K,) float64."""
        return diffusion.alpha_bars(self.betas)

    def weights(self, params: dict) -> dict:
        """Parameters after regularization."""
        if self.regularizer != "spectral":
            return params
        return spectral_normalize(params, self.iterations)

    def eps(self, params: dict) -> Callable:
        """(x (B, d), step (B,)) -> predicted noise; steps may be floats."""
        weights = self.weights(params)
        return lambda x, step: self.net.apply({"params": weights}, x, step.astype(int))

    def score(self, params: dict) -> Callable:
        """(x (B, d), step (B,)) -> score of the marginal after that step."""
        eps, std = self.eps(params), np.sqrt(1 - self.alpha_bar)

        def apply(x, step):
            return -eps(x, step) / jnp.asarray(std, x.dtype)[step.astype(int)][:, None]

        return apply


def model(net: Net = NET, noise: NoiseSchedule = NOISE) -> Model:
    """The argument ``model`` of this module: net and forward process.

    Args:
      net: options of the net.
      noise: options of the forward process.
    """
    perceptron = StepMLP(
        net.widths, math.prod(net.shape), noise.timesteps, net.activation
    )
    return Model(perceptron, noise.variances(), net.regularizer)


def init_params(key: Key[Array, ""], model: Model) -> dict:
    """Parameters of the net."""
    x = jnp.zeros((1, model.net.outputs))
    variables: Any = model.net.init(key, x, jnp.zeros(1, jnp.int32))
    return variables["params"]


def sampler(
    params: dict,
    key: Key[Array, ""],
    start: Float[Array, "B d"] | tuple[int, ...] | int,
    *,
    model: Model,
    starts: str = "data",
) -> Float[Array, "B d"]:
    """Ancestral samples with variances beta, noise at the last step too.

    Args:
      params: of the net.
      key: of the noise.
      start: with starts="data" clean points, which are noised to T; with "prior" points
        whose number counts, or the shape or number of the samples.
      model: net and forward process.
      starts: "data": q_T = p_T, so that the bound has no offset; "prior": N(0, I).

    Raises:
      ValueError: unknown ``starts``; a number without points, or below 1.
    """
    _check_name("starts", starts, STARTS)
    if isinstance(start, int | tuple):
        count = start[0] if isinstance(start, tuple) else start
        if starts == "data" or count < 1:
            raise ValueError(
                "sampling that starts from noised data needs points (B, d), from the "
                f"prior a number >= 1; got {start} with starts={starts!r}"
            )
        start = jnp.zeros((count, model.net.outputs))
    key_start, key_noise = jax.random.split(key)
    x = jax.random.normal(key_start, start.shape, start.dtype)
    if starts == "data":
        bar = jnp.full(len(x), model.alpha_bar[-1], x.dtype)
        x = diffusion.q_sample(start, bar, x)
    schedule = diffusion.ddpm_schedule(model.betas, "beta")
    return trajectories.rollout(key_noise, model.eps(params), schedule, start=x).sample


def score_lipschitz(
    params: dict, points: Float[Array, "N d"], *, model: Model, mode: str = "jacobian"
) -> Lipschitz:
    """One-sided Lipschitz constants of the score at every step.

    Args:
      params: of the net.
      points: where the constants are estimated; unused with "upper".
      model: net and forward process.
      mode: of ``one_sided_lipschitz``; "upper": the product of the layers' norms, a
        certified bound.

    Raises:
      ValueError: unknown mode.
    """
    _check_name("mode", mode, (*MODES, "upper"))
    if mode != "upper":
        steps = jnp.arange(len(model.betas), dtype=points.dtype)
        return one_sided_lipschitz(model.score(params), points, steps, mode)
    layers = []
    for layer in model.weights(params).values():
        kernel, scale = layer["kernel"], layer.get("scale")
        layers.append(kernel if scale is None else kernel[None] * scale[:, None])
    std = jnp.asarray(np.sqrt(1 - model.alpha_bar), layers[0].dtype)
    return one_sided_lipschitz_upper(layers, std)


def factor(L_s: Float[Array, " K"], *, model: Model) -> Factor:
    """Integrating factor of the discrete process: L_f is beta / 2 and g^2 is beta."""
    betas = jnp.asarray(model.betas, L_s.dtype)
    return integrating_factor(0.5 * betas, L_s, betas, None)


def _check_name(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
