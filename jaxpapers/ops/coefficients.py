r"""Coefficients of denoising diffusion, on the host in float64; see ``ops.diffusion``."""

import math
from typing import Any, NamedTuple

import numpy as np

_NO_SIGNAL = (
    "zero terminal SNR leaves no image in the noise to predict; end slightly above "
    "(cosine_betas caps beta at 0.999)"
)


class Schedule(NamedTuple):
    r"""Coefficients of a reverse process; NumPy arrays of shape (S,), float32.

    Attributes:
      x_mult: $a_k$, of the state.
      eps_mult: $c_k$, of the predicted noise.
      std: $\sigma_k$; 0 for a deterministic step, which has no density.
      time: $t_k$, the net's time input; FastDPM's are not whole numbers.
      alpha_bar: (S + 1,) of the states, from noise to data.
    """

    x_mult: Any
    eps_mult: Any
    std: Any
    time: Any
    alpha_bar: Any


def linear_betas(steps: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Variances beta_t that rise linearly (DDPM, arXiv 2006.11239), float64."""
    return check_betas(np.linspace(start, end, steps))


def scaled_linear_betas(
    steps: int, start: float = 0.00085, end: float = 0.012
) -> np.ndarray:
    """Variances whose roots rise linearly (latent diffusion), float64."""
    return check_betas(np.linspace(math.sqrt(start), math.sqrt(end), steps) ** 2)


def sigmoid_betas(steps: int, low: float = 1e-5, high: float = 1e-2) -> np.ndarray:
    """Variances along a sigmoid over [-6, 6], as in the two toy experiments, float64."""
    curve = 1 / (1 + np.exp(-np.linspace(-6, 6, steps)))
    return check_betas(curve * (high - low) + low)


def cosine_betas(steps: int, offset: float = 0.008, most: float = 0.999) -> np.ndarray:
    r"""Variances with $\bar\alpha_t = \cos^2$ (arXiv 2102.09672), at most ``most``."""
    u = (np.arange(steps + 1) / steps + offset) / (1 + offset)
    signal = np.cos(u * math.pi / 2) ** 2
    return check_betas(np.minimum(1 - signal[1:] / signal[:-1], most))


def check_betas(betas: Any) -> np.ndarray:
    """Variances as float64.

    Raises:
      ValueError: none, or one outside (0, 1).
    """
    betas = np.asarray(betas, np.float64)
    bad = np.flatnonzero(~((betas > 0) & (betas < 1)))
    if betas.ndim != 1 or not len(betas) or len(bad):
        got = f"the shape {betas.shape}"
        if betas.ndim == 1 and len(bad):
            got = f"{betas[bad[0]]} at {bad[0]} of {len(betas)}"
            got += f"; {_NO_SIGNAL}" if betas[bad[0]] == 1 else ""
        raise ValueError(f"betas must be a row of numbers in (0, 1), got {got}")
    return betas


def alpha_bars(betas: Any) -> np.ndarray:
    r"""$\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)$, float64."""
    return np.cumprod(1 - check_betas(betas))


def ddpm_schedule(betas: Any, variance: str = "beta") -> Schedule:
    r"""Ancestral sampling over all T steps, DDPM eq 11.

    Args:
      betas: (T,).
      variance: "beta", $\sigma_t^2 = \beta_t$, noise at the last step too; "posterior",
        $\tilde\beta_t$, whose last step is deterministic.

    Raises:
      ValueError: betas outside (0, 1), unknown variance.
    """
    betas = check_betas(betas)
    bars = alpha_bars(betas)
    before = np.append(1.0, bars[:-1])
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance must be 'beta' or 'posterior', got {variance!r}")
    var = betas if variance == "beta" else betas * (1 - before) / (1 - bars)
    root = np.sqrt(1 - betas)
    return _schedule(
        1 / root,
        -betas / (np.sqrt(1 - bars) * root),
        np.sqrt(var),
        np.arange(len(betas)),
        np.append(bars[::-1], 1.0),
        reverse=True,
    )


def ddim_times(total: int, steps: int) -> np.ndarray:
    """Timesteps of a sub-sampled process, leading spacing: k T / S + 1, falling.

    Raises:
      ValueError: S outside 1 .. T - 1, or that does not divide T. With S = T the first
        step would lie past the last one of training: ``ddpm_schedule`` takes all.
    """
    if not 1 <= steps < total:
        raise ValueError(f"steps must be in 1 .. {total - 1}, got {steps}")
    if total % steps:
        raise ValueError(
            f"leading spacing needs steps that divide the {total} of training, got "
            f"{steps}; try {_divisor(total, steps)}"
        )
    return np.arange(steps)[::-1] * (total // steps) + 1


def ddim_schedule(
    alpha_bar: Any, steps: int, eta: float = 1.0, final_alpha_bar: float | None = None
) -> Schedule:
    r"""A sub-sampled process, DDIM (arXiv 2010.02502) eq 12 and 16.

    $$ \sigma^2 = \eta^2 \tfrac{1-\bar\alpha'}{1-\bar\alpha}
       (1 - \bar\alpha/\bar\alpha'), \quad
       \mu = \sqrt{\bar\alpha'}\,\hat x_0 + \sqrt{1-\bar\alpha'-\sigma^2}\,\epsilon $$

    Args:
      alpha_bar: (T,) of the forward process.
      steps: S, which divides T.
      eta: 1 is the DDPM posterior on the sub-sampled grid, 0 is deterministic.
      final_alpha_bar: of the sample; None: that of t = 0, which keeps some noise in the
        last step. With 1 the last step is deterministic.

    Raises:
      ValueError: steps, eta outside [0, 1], an alpha_bar that does not fall, a final one
        below the last step's.
    """
    bars = np.asarray(alpha_bar, np.float64)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    if not ((np.diff(bars) < 0).all() and 0 < bars[-1] and bars[0] < 1):
        raise ValueError(
            "alpha_bar must fall, strictly and between 1 and 0, got "
            f"{bars[0]} .. {bars[-1]}" + (f"; {_NO_SIGNAL}" if bars[-1] == 0 else "")
        )
    times = ddim_times(len(bars), steps)
    now = bars[times]
    final = bars[0] if final_alpha_bar is None else final_alpha_bar
    if not now[-1] < final <= 1:
        raise ValueError(
            f"final_alpha_bar must be above the last step's, {now[-1]}, and at most 1, "
            f"got {final}"
        )
    to = np.append(now[1:], final)
    var = eta**2 * (1 - to) / (1 - now) * (1 - now / to)
    ratio = np.sqrt(to / now)
    c = np.sqrt(np.maximum(1 - to - var, 0)) - np.sqrt(1 - now) * ratio
    return _schedule(ratio, c, np.sqrt(var), times, np.append(now, final))


def check_density(schedule: Schedule) -> None:
    """Checks that every step has a density that float32 can tell.

    Raises:
      ValueError: a standard deviation of zero, or below the rounding of states of order
        one; a coefficient that is not finite, as of a state without signal.
    """
    zero = np.flatnonzero(~(np.asarray(schedule.std) > np.finfo(np.float32).eps))
    if len(zero):
        raise ValueError(
            "a deterministic step has no density: the schedule's std is 0 or below the "
            f"rounding of the states at steps {zero[:10].tolist()} of "
            f"{len(schedule.std)}; log-probabilities need eta > 0, kappa > 0, "
            "variance='beta', or final_alpha_bar=None"
        )
    for name in ("x_mult", "eps_mult", "std"):
        bad = np.flatnonzero(~np.isfinite(getattr(schedule, name)))
        if len(bad):
            raise ValueError(
                f"a step has no density: the schedule's {name} is not finite at steps "
                f"{bad[:10].tolist()} of {len(schedule.std)}; {_NO_SIGNAL}"
            )


def _schedule(x_mult, eps_mult, std, time, alpha_bar, reverse=False):
    order = slice(None, None, -1 if reverse else 1)
    a, c, std, time = (
        np.array(v[order], np.float32) for v in (x_mult, eps_mult, std, time)
    )
    return Schedule(a, c, std, time, np.asarray(alpha_bar, np.float32))


def _divisor(total, steps):
    return max(d for d in range(1, steps + 1) if total % d == 0)
