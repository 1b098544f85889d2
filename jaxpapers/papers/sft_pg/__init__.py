r"""SFT-PG: optimizing DDPM sampling with shortcut fine-tuning.

Ying Fan, Kangwook Lee. "Optimizing DDPM Sampling with Shortcut Fine-Tuning", ICML 2023,
arXiv 2301.13362.

A few-step sampler need not imitate the backward diffusion. A pretrained denoiser is
sampled in S steps and tuned so that the distribution of the last state minimises an
integral probability metric to the data. The sampler is the policy, a learned critic of
the last state its terminal cost, and the gradient is REINFORCE's with a learned baseline:
no gradient flows through the sampler.

With policy $p_\theta(x_{k+1} | x_k) = N(a_k x_k + c_k \epsilon_\theta(x_k, t_k),
\sigma_k^2 I)$, k = 0 .. S-1 from noise to the sample $y = x_S$ (B, ...), critic f, high
on samples, and value net $V_w(x_k, k)$:

$$ \Phi = \sup_f E_{p_\theta} f(y) - E_{data} f(x) $$
$$ \nabla \Phi = E [f(y) \textstyle\sum_k \nabla_\theta \log p_\theta(x_{k+1}|x_k)] $$
$$ L_f = E f(x) - E f(y) + \lambda_{GP} E (|\nabla f(\hat x)| - 1)^2, \quad
   L_w = E \textstyle\sum_k (V_w(x_k, k) - f(y))^2 $$
$$ L_\theta = E [\mathrm{sg}(f(y) - V_w(x_k, k)) \log p_\theta(x_{k+1} | x_k)] $$

One update: ``n_critic`` rollouts of the present policy with a step of f and w on each;
then ``n_generator`` steps of the policy on these rollouts.

Departures. ``leak=True`` is the released code's variant (B): $L_w$ has a gradient to f
too, which keeps f predictable instead of Lipschitz. The released code draws the policy's
transitions from one permutation of all; here each step takes one transition of every
trajectory of a rollout, none twice, so that trajectories stay on their device. The toy's
released code takes one policy step whatever ``n_generator`` is. The paper's gradient
penalty is not in the released code.

    import jax
    from jaxpapers.papers import sft_pg

    key = jax.random.key(0)
    x = jax.random.normal(key, (640, 2))  # data
    model = sft_pg.model()
    params = sft_pg.init_params(key, model)
    value, metrics = sft_pg.loss(params, {"x": x}, key, model=model)
    samples = sft_pg.sampler(params, key, (1000, 2), model=model)
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers import optim
from jaxpapers.method import (
    Method,
    State,
    averaged,
    from_average,
    gradient,
    only_if,
    stages,
)
from jaxpapers.nets import diffusion as nets
from jaxpapers.nets.critic import clip_weights
from jaxpapers.nets.diffusion import Denoiser, Net, Parts
from jaxpapers.ops import trajectories
from jaxpapers.ops.diffusion import Schedule
from jaxpapers.ops.schedules import NoiseSchedule, Sampler, reverse_schedule
from jaxpapers.ops.trajectories import over_data
from jaxpapers.options import from_config
from jaxpapers.papers.sft_pg.objectives import (
    advantage,
    critic_loss,
    gradient_penalty,
    pathwise_loss,
    policy_loss,
    transitions,
    value_loss,
)
from jaxpapers.papers.sft_pg.options import (
    STAGES,
    Options,
    Pretraining,
    check_batch,
    check_schedule,
    check_training,
)
from jaxpapers.papers.sft_pg.steps import bound_critics, critic_steps, policy_steps

__all__ = [
    "Model", "Net", "NoiseSchedule", "Options", "Pretraining", "Sampler", "advantage",
    "critic_loss", "gradient_penalty", "init_params", "loss", "make", "model",
    "pathwise_loss", "policy_loss", "pretraining", "sampler", "transitions", "update",
    "value_loss",
]  # fmt: skip

NET = Net(model="steps", shape=(2,), blocks=2, value_scale_output=True)
NOISE = NoiseSchedule("sigmoid", timesteps=10, beta_start=1e-5, beta_end=1e-2)
SAMPLER = Sampler("ddpm", steps=10)
OPTIONS = Options()


class Model(NamedTuple):
    """Nets, sampler and hyper-parameters, see ``sft_pg.model``.

    Attributes:
      parts: functions of the nets' parameters.
      schedule: coefficients of the sampler's steps.
      options: hyper-parameters.
    """

    parts: Parts
    schedule: Schedule
    options: Options


def model(
    net: Net = NET,
    noise: NoiseSchedule = NOISE,
    sampler: Sampler = SAMPLER,
    options: Options = OPTIONS,
) -> Model:
    """The argument ``model`` of this module: nets, sampler and options.

    Args:
      net: denoiser, critic and value net.
      noise: noise schedule that the denoiser was trained on.
      sampler: steps of the policy.
      options: hyper-parameters.

    Raises:
      ValueError: options that do not fit each other; a deterministic sampler.
    """
    schedule = reverse_schedule(noise, sampler)
    check_schedule(options, net.model, schedule)
    return Model(nets.parts(net, sampler.steps, noise.timesteps), schedule, options)


def init_params(key: Key[Array, ""], model: Model) -> dict:
    """Parameters ``net``, ``critic`` and ``value``."""
    _, *keys = jax.random.split(key, 4)
    parts, options = model.parts, model.options
    critic = parts.init_critic(keys[1])
    if options.regularizer == "clip":
        critic = clip_weights(critic, options.weight_bound)
    net, value = parts.init_net(keys[0]), parts.init_value(keys[2])
    return {"net": net, "critic": critic, "value": value}


def loss(
    params: dict, batch: dict, key: Key[Array, ""], *, model: Model
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Losses of critic, value net and policy on one rollout; each trains one net.

    Args:
      params: see ``init_params``.
      batch: x (B, *X).
      key: of the trajectories.
      model: see ``model``.
    """
    options, schedule = model.options, model.schedule
    key_rollout, key_mix = jax.random.split(key)
    eps_fn = functools.partial(model.parts.eps, params["net"])
    f, v = bound_critics(params, model)
    rollout = trajectories.rollout(
        key_rollout, eps_fn, schedule, batch["x"].shape, store="all"
    )
    rollout = lax.stop_gradient(rollout)
    total, metrics = critic_loss(
        f, v, batch["x"], rollout, key_mix, leak=options.leak,
        value_weight=options.value_weight, penalty=options.penalty,
    )  # fmt: skip
    count, rows = rollout.eps.shape[:2]
    k = jnp.tile(jnp.arange(count), rows)
    x, x_next = (
        s.swapaxes(0, 1).reshape(-1, *s.shape[2:])
        for s in (rollout.states[:-1], rollout.states[1:])
    )
    cost = advantage(f, v, x, k, jnp.repeat(rollout.sample, count, axis=0))
    of_policy = policy_loss(eps_fn, schedule, k, x, x_next, cost, reduce=options.reduce)
    return total + of_policy, {**metrics, "policy_loss": of_policy}


def update(
    state: State,
    batch: dict,
    *,
    model: Model,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[State, dict[str, Array]]:
    """Rollouts with critic steps, then policy steps on the rollouts.

    If a loss or gradient is not finite, the state keeps all but its step, and the metric
    ``loss`` is not finite, which stops the trainer.

    Args:
      state: params and opt_state are dicts of net, critic and value.
      batch: x (n_critic B, *X), the data of all rollouts.
      model: see ``model``.
      txs: an optimizer for each net.

    Returns:
      The state, and means of ``critic_loss``'s metrics over the rollouts and of
      policy_loss, advantage_std, ratio_deviation (0 at the first step: the trained policy
      is the one that acted) and grad_norm (of the policy) over the steps.
    """
    options = model.options
    key = jax.random.fold_in(state.key, state.step)
    key_rollouts, key_order = jax.random.split(key)
    check_batch(batch["x"], model.parts.shape, options.n_critic)
    # Rows of a device stay there: each rollout takes every n_critic-th of them.
    x = over_data(batch["x"])
    x = x.reshape(-1, options.n_critic, *x.shape[1:]).swapaxes(0, 1)
    critics, critic_opt, rollouts, metrics = critic_steps(
        state, x, jax.random.split(key_rollouts, options.n_critic), model, txs
    )
    net, net_opt, of_policy = policy_steps(
        state, critics, rollouts, key_order, model, txs
    )
    metrics = jax.tree.map(lambda m: m.mean(0), {**metrics, **of_policy})
    metrics["first_ratio_deviation"] = of_policy["ratio_deviation"][0]
    # The sum of the objectives, as in ``loss``.
    metrics["loss"] = (
        metrics["policy_loss"]
        - metrics["wasserstein"]
        + options.value_weight * metrics["value_loss"]
        + options.penalty * metrics.get("gradient_penalty", 0.0)
    )
    new = state._replace(params={**net, **critics}, opt_state={**net_opt, **critic_opt})
    finite = jnp.isfinite(metrics["loss"] + metrics["grad_norm"])
    return only_if(finite, new, state), metrics


def sampler(
    params: dict,
    key: Key[Array, ""],
    shape: tuple[int, ...],
    *,
    model: Model,
    schedule: Schedule | None = None,
) -> Float[Array, "B ..."]:
    """Samples of shape (B, *X), from N(0, I).

    Args:
      params: dict with net.
      key: of the trajectories.
      shape: of the result.
      model: see ``model``.
      schedule: instead of the policy's, e.g. all steps of training.
    """
    eps_fn = functools.partial(model.parts.eps, params["net"])
    schedule = schedule or model.schedule
    return trajectories.rollout(key, eps_fn, schedule, shape).sample


def pretraining(config: Any) -> Any:
    """Config of the run whose checkpoint the tuning starts from.

    None for that run itself, and where ``train.init_from`` names a checkpoint. Configs
    that differ in tuning only have equal ones, see ``method.stages.pretraining``.
    """
    if config.method.stage == "pretrain" or config.train.init_from:
        return None
    return stages.pretraining(config, Denoiser, Pretraining)


def make(config: Any) -> Method:
    """Binds ``config`` (see configs/sft_pg.py) at its ``method.stage``.

    Args:
      config: groups ``data``, ``net``, ``noise``, ``sampler``, ``pretrain``, ``optim``,
        ``method``, ``train``; or those of ``pretraining(config)``.

    Raises:
      ValueError: unknown fields or names, values out of range.
    """
    stage = config.method.stage
    if stage not in STAGES:
        raise ValueError(f"method.stage must be one of {STAGES}, got {stage!r}")
    if stage == "pretrain":
        return _make_pretraining(stages.pretraining(config, Denoiser, Pretraining))
    fields = {k: v for k, v in config.method.items() if k != "stage"}
    options = from_config(Options, fields, "method")
    bound = model(
        from_config(Net, config.net, "net"),
        from_config(NoiseSchedule, config.noise, "noise"),
        from_config(Sampler, config.sampler, "sampler"),
        options,
    )
    check_training(config, options)
    txs = {
        "net": optim.from_config(config.optim, config.train.steps),
        "critic": optax.adam(config.optim.critic_lr),
        "value": optax.adam(config.optim.value_lr),
    }

    def init(key, batch):
        params = init_params(key, bound)
        opt_state = {name: tx.init(params[name]) for name, tx in txs.items()}
        first = jax.random.split(key, 4)[0]
        return State(jnp.zeros((), jnp.int32), params, opt_state, (), first)

    return Method(
        init,
        functools.partial(loss, model=bound),
        functools.partial(update, model=bound, txs=txs),
        lambda params, key, shape, extra=None, **kwargs: sampler(
            params, key, shape, model=bound, **kwargs
        ),
        nets.RULES[config.net.model],
        warm_start=from_average("net"),
    )


def _make_pretraining(config) -> Method:
    net = from_config(Denoiser, config.net, "net")
    noise = from_config(NoiseSchedule, config.noise, "noise")
    steps = from_config(Sampler, config.sampler, "sampler")
    options = from_config(Pretraining, config.method, "method")
    default = reverse_schedule(noise, steps)
    eps, init_net = nets.denoiser(net, noise.timesteps)

    def sample(params, key, shape, schedule=default):
        eps_fn = functools.partial(eps, params["net"])
        return trajectories.rollout(key, eps_fn, schedule, shape).sample

    method = gradient(
        lambda key, batch: {"net": init_net(key)},
        functools.partial(nets.denoising_loss, eps=eps, alpha_bar=noise.alpha_bars()),
        optim.from_config(config.optim, config.train.steps),
        sampler=sample,
        rules=nets.RULES[net.model],
        accumulate=config.train.accumulate,
    )
    return averaged(method, options.ema)
