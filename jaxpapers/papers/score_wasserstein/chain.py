"""The net on the paper's chain of discrete steps, its constants and its samples."""

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
from jaxpapers.papers.score_wasserstein.bound import Factor, integrating_factor
from jaxpapers.papers.score_wasserstein.lipschitz import (
    MODES,
    Lipschitz,
    one_sided_lipschitz,
    one_sided_lipschitz_upper,
)

REGULARIZERS = ("none", "spectral", "clip")
SCHEDULES = {
    "sigmoid": diffusion.sigmoid_betas,
    "linear": diffusion.linear_betas,
    "cosine": lambda steps, low, high: diffusion.cosine_betas(steps),
}
STARTS = ("data", "prior")


class Model(NamedTuple):
    """A net that predicts noise on a chain.

    Attributes:
      net: (x (B, d), step (B,)) -> (B, d).
      betas: (K,), float64 on the host.
      regularizer: "spectral" divides the kernels by their norms, where these exceed 1,
        before every use; "clip" is the optimizer's, "none" is none.
      iterations: of the power method that finds these norms, from below; 0: exact, which
        costs more than the rest of a step.
    """

    net: StepMLP
    betas: Any
    regularizer: str = "none"
    iterations: int = 20

    @property
    def alpha_bar(self) -> np.ndarray:
        """Of the chain, float64."""
        return diffusion.alpha_bars(self.betas)

    def weights(self, params: dict) -> dict:
        """The parameters that the net is used with."""
        if self.regularizer != "spectral":
            return params
        return spectral_normalize(params, self.iterations)

    def eps(self, params: dict) -> Callable:
        """(x (B, d), step (B,)) -> the noise in x; steps may be given as floats."""
        used = self.weights(params)
        return lambda x, step: self.net.apply({"params": used}, x, step.astype(int))

    def score(self, params: dict) -> Callable:
        """(x (B, d), step (B,)) -> score of the chain's marginal after that step."""
        eps, std = self.eps(params), np.sqrt(1 - self.alpha_bar)

        def apply(x, step):
            return -eps(x, step) / jnp.asarray(std, x.dtype)[step.astype(int)][:, None]

        return apply


def chain_model(config: Any) -> Model:
    """The net and chain of ``config``.

    Raises:
      ValueError: unknown names, sizes or variances out of range.
    """
    net, own = config.net, config.method
    choose("net.regularizer", net.regularizer, REGULARIZERS)
    choose("method.schedule", own.schedule, tuple(SCHEDULES))
    if own.steps < 1:
        raise ValueError(f"config.method.steps must be >= 1, got {own.steps}")
    betas = SCHEDULES[own.schedule](own.steps, own.low, own.high)
    outputs = math.prod(net.shape)
    perceptron = StepMLP(tuple(net.widths), outputs, own.steps, net.activation)
    return Model(perceptron, betas, net.regularizer)


def sampler(
    params: dict,
    key: Key[Array, ""],
    start: Float[Array, "B d"] | tuple[int, ...] | int,
    extra: Any = (),
    *,
    model: Model,
    starts: str = "data",
) -> Float[Array, "B d"]:
    """Ancestral samples with variances beta, noise at the last step too.

    Args:
      params: of the net.
      key: of the noise.
      start: clean points, which the chain noises and starts from (with "prior" only their
        number counts), or the shape or number of the samples.
      extra: unused.
      model: net and chain.
      starts: "data": q_T = p_T, so that the bound has no offset; "prior": N(0, I).

    Raises:
      ValueError: a number where points are needed, or one below 1.
    """
    del extra
    choose("starts", starts, STARTS)
    if isinstance(start, int | tuple):
        count = start[0] if isinstance(start, tuple) else start
        if starts == "data" or count < 1:
            raise ValueError(
                "sampling that starts from noised data needs points (B, d), from the "
                f"prior a number >= 1; got {start} with starts={starts!r}"
            )
        start = jnp.zeros((count, model.net.outputs))
    key_start, key_chain = jax.random.split(key)
    x = jax.random.normal(key_start, start.shape, start.dtype)
    if starts == "data":
        bar = jnp.full(len(x), model.alpha_bar[-1], x.dtype)
        x = diffusion.q_sample(start, bar, x)
    chain = diffusion.ddpm_chain(model.betas, "beta")
    return trajectories.rollout(key_chain, model.eps(params), chain, start=x).sample


def score_lipschitz(
    params: dict, points: Float[Array, "N d"], *, model: Model, mode: str = "jacobian"
) -> Lipschitz:
    """One-sided Lipschitz constants of the score at every step.

    Args:
      params: of the net.
      points: where to look, see ``one_sided_lipschitz``; unused with "upper".
      model: net and chain.
      mode: of ``one_sided_lipschitz``; "upper": the product of the layers' norms, which
        is certified.

    Raises:
      ValueError: unknown mode.
    """
    choose("mode", mode, (*MODES, "upper"))
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
    """Integrating factor of the chain: L_f is beta / 2 and g^2 is beta."""
    betas = jnp.asarray(model.betas, L_s.dtype)
    return integrating_factor(0.5 * betas, L_s, betas, None)


def choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError for a name that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
