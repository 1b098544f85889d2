"""Chains and training processes by name, as a config gives them."""

from typing import Any

import numpy as np

from jaxpapers.ops import diffusion, fastdpm
from jaxpapers.ops.diffusion import Chain

BETAS = ("linear", "scaled_linear", "sigmoid", "cosine")
SAMPLERS = ("ddpm", "ddim", "fastdpm")


def betas(c: Any) -> np.ndarray:
    """Variances (T,) of the forward process that a net is trained on, float64.

    Args:
      c: has ``betas``, one of ``BETAS``, ``timesteps`` T, ``beta_start`` and
        ``beta_end`` (which the cosine does not use).

    Raises:
      ValueError: unknown name, T < 1, numbers outside (0, 1).
    """
    if c.betas not in BETAS:
        raise ValueError(f"method.betas must be one of {BETAS}, got {c.betas!r}")
    if c.timesteps < 1:
        raise ValueError(f"method.timesteps must be >= 1, got {c.timesteps}")
    if c.betas == "cosine":
        return diffusion.cosine_betas(c.timesteps)
    make = getattr(diffusion, f"{c.betas}_betas")
    return make(c.timesteps, c.beta_start, c.beta_end)


def chain(c: Any) -> Chain:
    """The reverse process of ``c.steps`` steps over a net trained on ``betas(c)``.

    Args:
      c: as for ``betas``; also ``sampler``, one of ``SAMPLERS``, ``steps`` S, and the
        sampler's own numbers: ``eta`` (ddim), ``kappa``, ``kind`` and
        ``allow_saturation`` (fastdpm).

    Raises:
      ValueError: unknown name; S that the sampler cannot have; FastDPM of betas that
        are not linear.
    """
    if c.sampler not in SAMPLERS:
        raise ValueError(f"method.sampler must be one of {SAMPLERS}, got {c.sampler!r}")
    if c.steps < 1:
        raise ValueError(f"method.steps must be >= 1, got {c.steps}")
    if c.sampler == "ddim":
        return diffusion.ddim_chain(diffusion.alpha_bars(betas(c)), c.steps, c.eta)
    if c.sampler == "ddpm":
        if c.steps != c.timesteps:
            raise ValueError(
                f"ddpm takes all steps of training, method.timesteps={c.timesteps}, got "
                f"method.steps={c.steps}; ddim and fastdpm take fewer"
            )
        return full_chain(c)
    if c.betas != "linear":
        raise ValueError(f"fastdpm needs method.betas='linear', got {c.betas!r}")
    return fastdpm.fastdpm_var_schedule(
        c.steps,
        timesteps=c.timesteps,
        beta_start=c.beta_start,
        beta_end=c.beta_end,
        kind=c.kind,
        kappa=c.kappa,
        allow_saturation=c.allow_saturation,
    )


def full_chain(c: Any) -> Chain:
    """Ancestral sampling over all steps of training."""
    return diffusion.ddpm_chain(betas(c))
