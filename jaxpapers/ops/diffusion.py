r"""Denoising diffusion in discrete steps: noise schedules, samplers, log-probabilities.

The forward process is $x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1-\bar\alpha_t} \epsilon$
for t = 0 .. T-1. A ``Schedule`` has the coefficients of a reverse process of S Gaussian
steps, counted from noise to data, k = 0 .. S-1, whose net predicts the noise:

$$ x_{k+1} \sim N(a_k x_k + c_k\,\epsilon(x_k, t_k),\ \sigma_k^2 I) $$

DDPM, DDIM and FastDPM differ in these coefficients only, which are computed on the host
in float64. Sampling, log-probabilities and KL divergences are the same for all of them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxpapers.ops.shapes import same_shape

REDUCTIONS = ("sum", "mean")
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


def q_sample(
    x: Float[Array, "B ..."],
    alpha_bar: Float[Array, " B"],
    noise: Float[Array, "B ..."],
) -> Float[Array, "B ..."]:
    """A draw of the forward process; ``alpha_bar`` is that of each row's t."""
    same_shape("q_sample", x=x, noise=noise)
    a = _rows(alpha_bar, x)
    return jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise


def predict_x0(
    x: Float[Array, "B ..."], alpha_bar: Float[Array, " B"], eps: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Clean samples for states and their predicted noise."""
    a = _rows(alpha_bar, x)
    return (x - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)


def posterior(
    x0: Float[Array, "B ..."], x: Float[Array, "B ..."], betas: Any, t: Int[Array, " B"]
) -> tuple[Float[Array, "B ..."], Float[Array, " B"]]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), DDPM eq 7; t = 0 has variance 0."""
    betas = check_betas(betas)
    bars = alpha_bars(betas)
    before = np.append(1.0, bars[:-1])
    c0 = jnp.asarray(np.sqrt(before) * betas / (1 - bars), x.dtype)[t]
    c1 = jnp.asarray(np.sqrt(1 - betas) * (1 - before) / (1 - bars), x.dtype)[t]
    var = jnp.asarray(betas * (1 - before) / (1 - bars), x.dtype)[t]
    return _rows(c0, x) * x0 + _rows(c1, x) * x, var


def noise_loss(
    eps_fn: Callable,
    x: Float[Array, "B ..."],
    key: Key[Array, ""],
    alpha_bar: Any,
) -> Float[Array, " B"]:
    r"""$|\epsilon - \epsilon_\theta(x_t, t)|^2$, mean over coordinates, at drawn t.

    Args:
      eps_fn: (x, time (B,)) -> predicted noise.
      x: clean samples.
      key: of times and noise.
      alpha_bar: (T,) of the forward process.
    """
    key_time, key_noise = jax.random.split(key)
    bars = jnp.asarray(alpha_bar, x.dtype)
    t = jax.random.randint(key_time, (len(x),), 0, len(bars))
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    eps = eps_fn(q_sample(x, bars[t], noise), t.astype(jnp.float32))
    return jnp.square(noise - eps).reshape(len(x), -1).mean(1)


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


def step_mean(
    schedule: Schedule, k: Any, x: Float[Array, "B ..."], eps: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Mean of x_{k+1} given x_k and the predicted noise; k (B,) or one number.

    NaN for a traced k outside 0 .. S - 1.

    Raises:
      ValueError: another k, if it is concrete.
    """
    a, c = (_rows(_at(v, k, x.dtype), x) for v in (schedule.x_mult, schedule.eps_mult))
    return a * x + c * eps


def step_log_prob(
    schedule: Schedule,
    k: Any,
    x: Float[Array, "B ..."],
    x_next: Float[Array, "B ..."],
    eps: Float[Array, "B ..."],
    reduce: str = "sum",
) -> Float[Array, " B"]:
    """Log-density of a step, nats.

    Args:
      schedule: with a density in every step, see ``check_density``.
      k: step of each row, (B,), or of all.
      x: states.
      x_next: next states.
      eps: predicted noise.
      reduce: "sum" over the coordinates, or "mean", as in released code.

    Raises:
      ValueError: see ``check_density`` and ``step_mean``.
    """
    check_density(schedule)
    same_shape("step_log_prob", x=x, x_next=x_next, eps=eps)
    std = _rows(_at(schedule.std, k, x.dtype), x)
    z = (x_next - step_mean(schedule, k, x, eps)) / std
    return _reduce(
        -0.5 * jnp.square(z) - jnp.log(std) - 0.5 * math.log(2 * math.pi), reduce
    )


def step_log_ratio(
    schedule: Schedule,
    k: Any,
    x: Float[Array, "B ..."],
    x_next: Float[Array, "B ..."],
    eps: Float[Array, "B ..."],
    eps_old: Float[Array, "B ..."],
    reduce: str = "sum",
) -> Float[Array, " B"]:
    r"""$\log p_\theta / p_{old}$ of a step, without the cancellation of two densities.

    $$ -\sum \left( \kappa \Delta z + \tfrac12 \kappa^2 \Delta^2 \right), \quad
       \kappa = c_k/\sigma_k,\ \Delta = \epsilon_{old} - \epsilon $$

    with z the old policy's noise. It is exactly 0 where the nets agree, and its error is
    that of the nets; the difference of two log-probabilities has an error of
    $10^{-7} |x| / \sigma_k$ a coordinate, which reaches 1e-4 at the last step.

    Args:
      schedule, k, x, x_next, reduce: see ``step_log_prob``.
      eps: noise predicted by the policy that is trained.
      eps_old: noise predicted by the policy that took the step.
    """
    check_density(schedule)
    same_shape("step_log_ratio", x=x, x_next=x_next, eps=eps, eps_old=eps_old)
    std = _rows(_at(schedule.std, k, x.dtype), x)
    kappa = _rows(_at(schedule.eps_mult, k, x.dtype), x) / std
    z = lax.stop_gradient((x_next - step_mean(schedule, k, x, eps_old)) / std)
    delta = kappa * (lax.stop_gradient(eps_old) - eps)
    return _reduce(-delta * (z + 0.5 * delta), reduce)


def step_kl(
    schedule: Schedule,
    k: Any,
    eps: Float[Array, "B ..."],
    eps_ref: Float[Array, "B ..."],
    reduce: str = "sum",
) -> Float[Array, " B"]:
    r"""KL of two policies' steps from one state, nats: $|\mu - \mu'|^2 / 2\sigma_k^2$.

    Means differ by $c_k (\epsilon - \epsilon')$; the variance is the same.
    """
    check_density(schedule)
    same_shape("step_kl", eps=eps, eps_ref=eps_ref)
    mult = _at(schedule.eps_mult / schedule.std, k, eps.dtype)
    return _reduce(0.5 * jnp.square(_rows(mult, eps) * (eps - eps_ref)), reduce)


def guided(
    eps_fn: Callable, weight: float | Float[Array, ""]
) -> Callable[[Array, Array, Array], Array]:
    r"""Classifier-free guidance, $\epsilon_0 + w (\epsilon_z - \epsilon_0)$.

    Both predictions come from one call on 2B rows (arXiv 2207.12598; released code's w:
    1 is the conditional prediction, 0 the unconditional one).

    Args:
      eps_fn: (x, time, tokens) -> predicted noise; token 0 is the null token.
      weight: w.

    Returns:
      A function of the same arguments.
    """

    def apply(x, time, tokens):
        # Both rows of a sample beside each other, so that they stay on its device.
        pairs = [jnp.repeat(v, 2, axis=0) for v in (x, time)]
        with_null = jnp.stack([tokens, jnp.zeros_like(tokens)], 1)
        both = eps_fn(*pairs, with_null.reshape(-1, *tokens.shape[1:]))
        both = both.reshape(len(x), 2, *x.shape[1:])
        conditional, unconditional = both[:, 0], both[:, 1]
        return unconditional + weight * (conditional - unconditional)

    return apply


def _at(values, k, dtype):
    """Coefficients of the steps k; an index beyond them would read the last one."""
    if not isinstance(k, jax.core.Tracer):
        steps = np.asarray(k)
        if steps.size and not (0 <= steps.min() and steps.max() < len(values)):
            raise ValueError(
                f"k must be in 0 .. {len(values) - 1}, the steps of the schedule, got "
                f"{steps.min()} .. {steps.max()}"
            )
    return jnp.asarray(values, dtype).at[k].get(mode="fill", fill_value=jnp.nan)


def _schedule(x_mult, eps_mult, std, time, alpha_bar, reverse=False):
    order = slice(None, None, -1 if reverse else 1)
    a, c, std, time = (
        np.array(v[order], np.float32) for v in (x_mult, eps_mult, std, time)
    )
    return Schedule(a, c, std, time, np.asarray(alpha_bar, np.float32))


def _divisor(total, steps):
    return max(d for d in range(1, steps + 1) if total % d == 0)


def _reduce(x, reduce):
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {REDUCTIONS}, got {reduce!r}")
    flat = x.reshape(len(x), -1)
    return flat.sum(1) if reduce == "sum" else flat.mean(1)


def _rows(v: Shaped[Array, "..."], x: Array) -> Array:
    """One number for each row of x, or for all of them, ready to multiply with it."""
    return jnp.reshape(v, (-1, *(1,) * (x.ndim - 1)))
