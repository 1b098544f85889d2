"""Noise schedules of forward processes and the steps of samplers, by their options."""

import dataclasses

import numpy as np

from jaxpapers.ops import diffusion, fastdpm
from jaxpapers.ops.diffusion import Schedule

BETAS = ("linear", "scaled_linear", "sigmoid", "cosine")
SAMPLERS = ("ddpm", "ddim", "fastdpm")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Variances of a forward process of T steps; the config group ``noise``.

    Attributes:
      betas: one of ``BETAS``, as in ``ops.diffusion.linear_betas``.
      timesteps: T.
      beta_start: first variance; of the sigmoid its lower asymptote.
      beta_end: last variance; of the sigmoid its upper asymptote. The cosine has neither.

    Raises:
      ValueError: unknown ``betas``, T < 1, variances outside (0, 1).

    Example:
      >>> NoiseSchedule(timesteps=2, beta_start=0.1, beta_end=0.3).alpha_bars().round(2)
      array([0.9 , 0.63])
    """

    betas: str = "linear"
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if self.betas not in BETAS:
            raise ValueError(f"noise.betas must be one of {BETAS}, got {self.betas!r}")
        if self.timesteps < 1:
            raise ValueError(f"noise.timesteps must be >= 1, got {self.timesteps}")
        self.variances()

    def variances(self) -> np.ndarray:
        """beta_t, (T,) float64."""
        if self.betas == "cosine":
            return diffusion.cosine_betas(self.timesteps)
        betas = getattr(diffusion, f"{self.betas}_betas")
        return betas(self.timesteps, self.beta_start, self.beta_end)

    def alpha_bars(self) -> np.ndarray:
        """Products of 1 - beta_t, (T,) float64."""
        return diffusion.alpha_bars(self.variances())


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Which steps a sampler takes; the config group ``sampler``.

    Attributes:
      name: one of ``SAMPLERS``.
      steps: S; ddpm takes all T.
      eta: noise of ddim, from 0 (deterministic) to 1 (the posterior).
      kappa: noise of fastdpm, likewise.
      kind: user variances of fastdpm, see ``ops.fastdpm.fastdpm_noise``.
      allow_saturation: of fastdpm, see there.

    Raises:
      ValueError: unknown name, S < 1. The sampler's other numbers are checked by
        ``reverse_schedule``.
    """

    name: str = "ddpm"
    steps: int = 1000
    eta: float = 1.0
    kappa: float = 1.0
    kind: str = "quadratic"
    allow_saturation: bool = True

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise ValueError(
                f"sampler.name must be one of {SAMPLERS}, got {self.name!r}"
            )
        if self.steps < 1:
            raise ValueError(f"sampler.steps must be >= 1, got {self.steps}")


def reverse_schedule(noise: NoiseSchedule, sampler: Sampler) -> Schedule:
    """Coefficients of a sampler's steps, for a net trained on ``noise``.

    Raises:
      ValueError: S that the sampler cannot have, eta or kappa outside [0, 1], FastDPM
        with betas that are not linear.
    """
    if sampler.name == "ddim":
        return diffusion.ddim_schedule(noise.alpha_bars(), sampler.steps, sampler.eta)
    if sampler.name == "ddpm":
        if sampler.steps != noise.timesteps:
            raise ValueError(
                f"ddpm takes all steps of training, noise.timesteps={noise.timesteps}, "
                f"got sampler.steps={sampler.steps}; ddim and fastdpm take fewer"
            )
        return diffusion.ddpm_schedule(noise.variances())
    if noise.betas != "linear":
        raise ValueError(f"fastdpm needs noise.betas='linear', got {noise.betas!r}")
    return fastdpm.fastdpm_schedule(
        sampler.steps,
        timesteps=noise.timesteps,
        beta_start=noise.beta_start,
        beta_end=noise.beta_end,
        kind=sampler.kind,
        kappa=sampler.kappa,
        allow_saturation=sampler.allow_saturation,
    )
