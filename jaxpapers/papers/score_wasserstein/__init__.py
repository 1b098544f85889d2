r"""A score model's loss bounds the Wasserstein distance of its samples to the data.

Dohyun Kwon, Ying Fan, Kangwook Lee. "Score-based Generative Modeling Secretly Minimizes
the Wasserstein Distance", arXiv 2212.06359, 2022 (NeurIPS 2022).

Score matching was known to bound a KL divergence. Here W_2 between the data p_0 and the
samples q_0 is at most a constant times the root of the loss, plus an offset for
starting the reverse process from another distribution than the forward one's end. The
constant depends on the drift's Lipschitz constant and the score's one-sided one, which
can be estimated, and reduced by spectral normalisation, by clipping weights, by a
longer horizon.

With b(t) = E_{p_t} |grad log p_t - s|^2 and J = 1/2 int g^2 b dt:

$$ I(t) = \exp \int_0^t (L_f + L_s g^2)\,dr, \quad
   W_2(p_0,q_0) \le \int_0^T g^2 I \sqrt b\,dt + I(T)\,W_2(p_T,q_T) \quad (14) $$
$$ W_2(p_0,q_0) \le \Big(2 \int_0^T g^2 I^2\,dt\; J\Big)^{1/2}
   + I(T)\,W_2(p_T,q_T) \quad (16) $$

``bound`` has the theorem and its corollaries, ``lipschitz`` the constants, ``matching``
the losses, ``ops.sde`` the diffusions, ``discrete`` the score model in discrete steps,
``certify`` its bound; this file trains it.

Departures. J sums over coordinates, as |.|^2 in the theorem; the released code takes
their mean, a J smaller by d (``discrete_terms(coord_mean=True)``; the training loss
keeps the mean, since the gradient is clipped at that scale). L_s is the Jacobian's, on
data, noised data and samples; the released code uses pairs of 100 points of one
quadrant. Both are lower values, so that the bound is an estimate;
``certificate(mode="upper")`` is certified up to the sums that replace integrals and to
the mean over draws, and loose. b is the denoising error, which is at least the true one
(Theorem 2). The offset in discrete steps uses the coupling of x_T with its noise, at
least W_2(p_T, q_T).

    model = sw.model()
    params = sw.init_params(key, model)
    value, metrics = sw.loss(params, {"x": x}, key, model=model)
    bound, parts = sw.certificate(params, x, key, model=model)
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers import optim
from jaxpapers.method import Method, gradient
from jaxpapers.nets.critic import clip_weights
from jaxpapers.ops import diffusion
from jaxpapers.ops.schedules import NoiseSchedule
from jaxpapers.options import from_config
from jaxpapers.papers.score_wasserstein.bound import (
    Bound,
    Factor,
    integrating_factor,
    w2_bound_cor1,
    w2_bound_general,
    w2_bound_theorem1,
    w2_offset_vp,
)
from jaxpapers.papers.score_wasserstein.certify import (
    Certificate,
    certificate,
    diagnose,
)
from jaxpapers.papers.score_wasserstein.discrete import (
    NOISE,
    Model,
    factor,
    init_params,
    model,
    sampler,
    score_lipschitz,
)
from jaxpapers.papers.score_wasserstein.lipschitz import (
    Lipschitz,
    one_sided_lipschitz,
    one_sided_lipschitz_upper,
)
from jaxpapers.papers.score_wasserstein.matching import (
    antithetic_steps,
    discrete_terms,
    discrete_weights,
    dsm_loss,
    sm_loss,
)
from jaxpapers.papers.score_wasserstein.options import Net, Options

__all__ = [
    "NOISE", "Bound", "Certificate", "Factor", "Lipschitz", "Model", "Net",
    "NoiseSchedule", "Options", "antithetic_steps", "certificate", "diagnose",
    "discrete_terms", "discrete_weights", "dsm_loss", "init_params",
    "integrating_factor", "loss", "make", "model", "one_sided_lipschitz",
    "one_sided_lipschitz_upper", "sampler", "score_lipschitz", "sm_loss",
    "w2_bound_cor1", "w2_bound_general", "w2_bound_theorem1", "w2_offset_vp",
]  # fmt: skip


def loss(
    params: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    model: Model,
    weight: str = "g2",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""Weighted denoising loss at antithetic steps, mean over rows and coordinates.

    $$ E_k \tfrac{\lambda_k}{1-\bar\alpha_k}\,
       \tfrac1d |\epsilon - \epsilon_\theta|^2 $$

    Args:
      params: of the net.
      batch: x (B, d).
      key: of steps and noise.
      model: net and forward process.
      weight: see ``discrete_weights``. The two with I compute it from L_s over pairs of
        the batch's points, without a gradient.

    Returns:
      The loss; metrics ``J``, the batch's estimate of the theorem's loss with weight g^2,
      and ``eps_error``, the unweighted error per coordinate.

    Raises:
      ValueError: unknown weight.
    """
    x, betas = batch["x"], model.betas
    bars = model.alpha_bar
    key_step, key_noise = jax.random.split(key)
    step = antithetic_steps(key_step, len(x), len(betas))
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    x_t = diffusion.q_sample(x, jnp.asarray(bars, x.dtype)[step], noise)
    error = jnp.square(noise - model.eps(params)(x_t, step)).mean(1)
    log_I = None
    if "I" in weight:
        fixed = lax.stop_gradient(params)
        constant = score_lipschitz(fixed, x, model=model, mode="pairs")
        log_I = lax.stop_gradient(factor(constant.value, model=model).log)
    lam = discrete_weights(weight, betas, bars, log_I) / jnp.asarray(1 - bars, x.dtype)
    g2 = jnp.asarray(betas / (1 - bars), x.dtype)
    J = 0.5 * len(betas) * x.shape[1] * (g2[step] * error).mean()
    return (lam[step] * error).mean(), {"J": J, "eps_error": error.mean()}


def make(config: Any) -> Method:
    """Binds ``config`` (see configs/score_wasserstein.py).

    Args:
      config: groups ``net``, ``noise``, ``optim``, ``method``, ``train``.

    Raises:
      ValueError: unknown fields or names, values out of range.
    """
    net = from_config(Net, config.net, "net")
    noise = from_config(NoiseSchedule, config.noise, "noise")
    options = from_config(Options, config.method, "method")
    bound = model(net, noise)

    def init(key, batch):
        if batch["x"].shape[1:] != net.shape:
            raise ValueError(
                f"net.shape={net.shape} must be the shape of the data, got x of shape "
                f"{batch['x'].shape}"
            )
        return init_params(key, bound)

    def sample(params, key, start, extra=()):
        return sampler(params, key, start, model=bound, starts=options.start)

    method = gradient(
        init,
        functools.partial(loss, model=bound, weight=options.weight),
        _optimizer(config, net, options),
        sampler=sample,
        accumulate=config.train.accumulate,
    )
    return method._replace(
        diagnose=lambda params, extra, batch, key: diagnose(
            params, batch["x"], key, model=bound, starts=options.start
        )
    )


def ascend_first(steps: int) -> optax.GradientTransformation:
    """Negates the gradient in the first steps, which then maximise the loss."""

    def sign(count: Any) -> Array:
        return jnp.where(count < steps, -1.0, 1.0)

    return optax.scale_by_schedule(sign)


def clipped_weights(bound: float) -> optax.GradientTransformation:
    """Keeps kernels and biases within [-bound, bound] after every update.

    The scales of the steps are not clipped: with small ones the net is nearly zero.

    Args:
      bound: the paper's is 0.1.

    Raises:
      ValueError: a bound that is not positive.
    """
    if not bound > 0:
        raise ValueError(f"net.clip must be > 0, got {bound}")

    def update(updates, state, params: Any = None):
        new = optax.apply_updates(params, updates)
        bounded = jax.tree_util.tree_map_with_path(
            lambda path, clipped, free: free if path[-1].key == "scale" else clipped,
            clip_weights(new, bound), new,
        )  # fmt: skip
        return jax.tree.map(lambda new, old: new - old, bounded, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _optimizer(config, net, options) -> optax.GradientTransformation:
    parts = [ascend_first(options.ascend_steps)] if options.ascend_steps else []
    parts.append(optim.from_config(config.optim, config.train.steps))
    if net.regularizer == "clip":
        parts.append(clipped_weights(net.clip))
    return optax.chain(*parts)
