r"""FastDPM: few-step samplers with a noise schedule of their own (VAR, arXiv 2106.00132).

The user's variances $\eta_s$ need not be among those of training: each cumulative product
$\bar\gamma_s = \prod_{r \le s}(1 - \eta_r)$ is met by a continuous step $\tau_s$ of the
trained process, by way of the Gamma function. All of it is host arithmetic in float64:
in float32 the constant $c \approx 5 \cdot 10^4$ loses the last steps.
"""

import math
from collections.abc import Callable

import numpy as np

from jaxpapers.ops.diffusion import Schedule, alpha_bars, linear_betas

KINDS = ("quadratic", "linear")
_HALVINGS = 1000


def fastdpm_noise(
    steps: int,
    *,
    timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    kind: str = "quadratic",
    allow_saturation: bool = True,
) -> np.ndarray:
    r"""User variances $\eta_s$ (S,) whose product reaches that of training.

    Quadratic: $\eta_s = \beta_0 (1 + s u)^2$; linear: from $\beta_0$ to u. The number u
    is found by bisection.

    Args:
      steps: S.
      timesteps: T of training.
      beta_start, beta_end: of training's linear betas.
      kind: one of ``KINDS``.
      allow_saturation: where u runs into the interval's upper end, 0.95 / (S
        sqrt(beta_0)), take that, as released nets do: at S = 10 sampling then starts
        from $\bar\gamma = 0.0208$ instead of 4e-5.

    Raises:
      ValueError: S outside 1 .. T, unknown kind, no u that reaches the product.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must be in 1 .. {timesteps}, got {steps}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if not beta_start < beta_end:
        raise ValueError(
            f"beta_start must be below beta_end, got {beta_start} and {beta_end}"
        )
    target = alpha_bars(linear_betas(timesteps, beta_start, beta_end))[-1]
    s = np.arange(steps)

    def noise(u):
        if kind == "linear":
            return np.linspace(beta_start, u, steps)
        return beta_start * (1 + s * u) ** 2

    low, high = (
        (beta_start, 0.99)
        if kind == "linear"
        else (0.0, 0.95 / (math.sqrt(beta_start) * steps))
    )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        product = np.prod(1 - noise(middle))
        if abs(product - target) < 1e-4 * target:
            return noise(middle)
        low, high = (middle, high) if product > target else (low, middle)
    if not allow_saturation:
        raise ValueError(
            f"no {kind} schedule of {steps} steps reaches the product {target:.3g}: it "
            f"stops at {np.prod(1 - noise(high)):.3g}; more steps, or allow_saturation"
        )
    return noise(high)


def continuous_steps(
    alpha_bar: np.ndarray, timesteps: int, beta_start: float, beta_end: float
) -> np.ndarray:
    r"""Continuous steps $\tau$ of training's process with the given $\bar\alpha$.

    $$ \bar\alpha(t) = D^{t+1} \Gamma(c+1) / \Gamma(c-t), \quad
       D = \tfrac{\beta_T - \beta_0}{T - 1},\ c = (1 - \beta_0) / D $$

    with Stirling's series for the Gamma function. A value below the last step's gets the
    last step.

    Args:
      alpha_bar: (S,).
      timesteps, beta_start, beta_end: of training's linear betas.
    """
    bars = alpha_bars(linear_betas(timesteps, beta_start, beta_end))
    slope = (beta_end - beta_start) / (timesteps - 1)
    c = (1 - beta_start) / slope

    def log_bar(t):
        return (t + 1) * math.log(slope) + _log_gamma(c + 1) - _log_gamma(c - t)

    steps = []
    for value in alpha_bar:
        inside = np.flatnonzero((bars[:-1] >= value) & (value > bars[1:]))
        if len(inside):
            i = float(inside[0])
            steps.append(_bisect(log_bar, math.log(value), i - 0.01, i + 1.01))
        elif value > bars[0]:
            steps.append(_bisect(log_bar, math.log(value), -0.99, 0.01))
        else:
            steps.append(timesteps - 1.0)
    return np.array(steps)


def fastdpm_schedule(
    steps: int,
    *,
    timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    kind: str = "quadratic",
    kappa: float = 1.0,
    last_std: float = 1e-3,
    allow_saturation: bool = True,
) -> Schedule:
    r"""The sampler that SFT-PG fine-tunes: VAR with the DDPM-like reverse process.

    With $\bar\gamma'$ after and $\bar\gamma$ before a step,

    $$ \sigma = \kappa \sqrt{\tfrac{1-\bar\gamma'}{1-\bar\gamma}
       (1 - \bar\gamma/\bar\gamma')},\quad
       \mu = \rho x + (\sqrt{1-\bar\gamma'-\sigma^2} - \rho \sqrt{1-\bar\gamma}) \epsilon,
       \quad \rho = \sqrt{\bar\gamma' / \bar\gamma} $$

    Args:
      steps, timesteps, beta_start, beta_end, kind, allow_saturation: see
        ``fastdpm_noise``.
      kappa: 1 is DDPM-like, 0 deterministic.
      last_std: noise of the last step, whose sigma would be 0.

    Raises:
      ValueError: see ``fastdpm_noise``; kappa outside [0, 1]; a negative last_std.
    """
    if not 0 <= kappa <= 1 or last_std < 0:
        raise ValueError(
            f"kappa must be in [0, 1] and last_std >= 0, got {kappa} and {last_std}"
        )
    noise = fastdpm_noise(
        steps, timesteps=timesteps, beta_start=beta_start, beta_end=beta_end, kind=kind,
        allow_saturation=allow_saturation,
    )  # fmt: skip
    # Released nets were trained with products rounded like this: it moves sigma by 1e-4.
    kept = np.float32(1) - noise.astype(np.float32)
    bars = np.cumprod(kept).astype(np.float64)
    now, to = bars[::-1], np.append(bars[-2::-1], 1.0)
    std = kappa * np.sqrt((1 - to) / (1 - now) * (1 - now / to))
    ratio = np.sqrt(to / now)
    c = np.sqrt(1 - to - std**2) - np.sqrt(1 - now) * ratio
    std[-1] = last_std if kappa else 0.0
    tau = continuous_steps(now, timesteps, beta_start, beta_end)
    return Schedule(
        *(v.astype(np.float32) for v in (ratio, c, std, tau, np.append(now, 1)))
    )


def _log_gamma(x: float) -> float:
    y = x - 1
    return (
        0.5 * math.log(2 * math.pi * y) + y * (math.log(y) - 1) + math.log1p(1 / 12 / y)
    )


def _bisect(f: Callable[[float], float], target: float, low: float, high: float):
    """Where a falling function meets a value, to the last bit."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        low, high = (middle, high) if f(middle) > target else (low, middle)
