r"""DPOK: reinforcement learning for fine-tuning text-to-image diffusion models.

Ying Fan, Olivia Watkins, Yuqing Du, Hao Liu, Moonkyung Ryu, Craig Boutilier, Pieter
Abbeel, Mohammad Ghavamzadeh, Kangwook Lee, Kimin Lee. "DPOK: Reinforcement Learning for
Fine-tuning Text-to-Image Diffusion Models", NeurIPS 2023, arXiv 2305.16381.

The S steps of a guided sampler are actions, the prompt z and the present state x_k the
state of the MDP, and a black-box score r(y, z) of the image y = x_S its only reward. The
policy starts from the pretrained model and is regularised towards it: the sum of the
steps' KL divergences bounds that of the distributions of images. A value net is the
baseline, and importance weights allow several steps on the same trajectories.

With $p_\theta(x_{k+1} | x_k, z) = N(\mu_\theta, \sigma_k^2 I)$, c_k the sampler's
coefficient of the noise, and B trajectories of images (H, W, C):

$$ \min_\theta \alpha E [-r(y, z)] + \beta \textstyle\sum_k E\,KL_k \quad (9), \quad
   KL_k = c_k^2 |\epsilon_\theta - \epsilon_{pre}|^2 / 2 \sigma_k^2 $$
$$ A = r(y, z) - V_w(x_k, k, z), \quad
   L_\theta = -\alpha \min(\rho A, \mathrm{clip}(\rho) A) + \beta KL_k \quad (26) $$

Departures. The released code clips the ratio of mean log-probabilities to 1 +- 1e-4,
with no gradient outside whatever the advantage's sign, and its "KL" is the mean square of
the noise difference; both are options (``clip="hard"``, ``kl="eps_mse"``), the defaults
are PPO's minimum on the sum of log-probabilities and the exact KL. The gradient of the
states' distribution through later KL terms is dropped, as in the paper
(``kl_mode="grad"``); ``"reward"`` has it. A policy step takes some transitions of every
trajectory, all different, instead of transitions at random, so that trajectories stay on
their device; old rollouts are kept whole (``rollouts``) instead of as transitions.

    model = dpok.model(reward_fn=lambda images, prompt: images.mean((1, 2, 3)))
    params = dpok.init_params(key, model)
    value, metrics = dpok.loss(params, {"tokens": tokens, "prompt": prompt}, key,
                               model=model)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxpapers import optim
from jaxpapers.method import (
    Method,
    State,
    from_average,
    only_if,
    stages,
)
from jaxpapers.nets import diffusion as nets
from jaxpapers.nets.diffusion import Denoiser, Net
from jaxpapers.nets.lora import lora_init
from jaxpapers.ops import diffusion, policy
from jaxpapers.ops.diffusion import Schedule
from jaxpapers.ops.schedules import NoiseSchedule, Sampler, reverse_schedule
from jaxpapers.options import from_config
from jaxpapers.papers.dpok.objective import (
    adapt_beta,
    dpok_loss,
    policy_loss,
    policy_steps,
)
from jaxpapers.papers.dpok.options import (
    STAGES,
    Options,
    Pretraining,
    check_steps,
    check_training,
    check_vocab,
)
from jaxpapers.papers.dpok.pretraining import (
    make_pretraining,
    pretraining,
    sample_guided,
)
from jaxpapers.papers.dpok.rollouts import (
    Model,
    Rollout,
    Transitions,
    all_transitions,
    draw_rollout,
    later_kl,
    path_kl,
    policy_params,
    transitions,
)
from jaxpapers.papers.dpok.supervised import sft_loss, supervised_update
from jaxpapers.papers.dpok.value import (
    advantages,
    fit_value,
    keep_rollout,
    reward_metrics,
    value_loss,
)

__all__ = [
    "Model", "Net", "NoiseSchedule", "Options", "Pretraining", "Rollout", "Sampler",
    "Transitions", "dpok_loss", "draw_rollout", "init_params", "later_kl", "loss", "make",
    "model", "path_kl", "pretraining", "sampler", "sft_loss", "transitions", "update",
    "value_loss",
]  # fmt: skip


# Kept rollouts are sharded by trajectories.
POOL_RULES = (
    (r"extra/pool/(states|eps)$", P(None, None, "data")),
    (r"extra/pool/(tokens|prompt|reward)$", P(None, "data")),
)
NET = Net(
    vocab=11,
    value=(256, 256, 256),
    channels=64,
    multipliers=(1, 2, 2),
    attention=(2,),
    groups=8,
)
NOISE = NoiseSchedule()
SAMPLER = Sampler("ddim", steps=20)
OPTIONS = Options()


def model(
    net: Net = NET,
    noise: NoiseSchedule = NOISE,
    sampler: Sampler = SAMPLER,
    options: Options = OPTIONS,
    reward_fn: Callable | None = None,
) -> Model:
    """The argument ``model`` of this module: nets, sampler, options and reward.

    Args:
      net: denoiser and value net.
      noise: noise schedule that the denoiser was trained on.
      sampler: steps of the policy.
      options: hyper-parameters.
      reward_fn: (images (B, H, W, C), about [-1, 1] but not clipped, prompt ids (B,))
        -> (B,), of JAX operations, or any function by ``ops.host.on_host``.

    Raises:
      ValueError: options that do not fit each other; a deterministic sampler.
    """
    check_vocab(net.vocab)
    check_steps(options, sampler)
    schedule = reverse_schedule(noise, sampler)
    diffusion.check_density(schedule)
    parts = nets.parts(net, sampler.steps, noise.timesteps)
    return Model(parts, schedule, noise.alpha_bars(), options, reward_fn or _no_reward)


def init_params(key: Key[Array, ""], model: Model) -> dict:
    """Parameters: ``net``, ``value``, and ``lora`` or the frozen copy ``reference``."""
    _, key_net, key_lora, key_value = jax.random.split(key, 4)
    options = model.options
    net = model.parts.init_net(key_net)
    params = {"net": net, "value": model.parts.init_value(key_value)}
    if options.lora_rank:
        lora = lora_init(key_lora, net, options.lora_rank, options.lora_match)
        return params | {"lora": lora}
    return params | {"reference": jax.tree.map(jnp.copy, net)}


def loss(
    params: dict, batch: dict, key: Key[Array, ""], *, model: Model
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Policy and value losses on all transitions of one rollout.

    A metric: always the clipped surrogate with the value net's advantage and
    ``options.beta``, whatever ``update`` does with name, advantage, kl_mode, rollouts
    and an adapted beta.

    Args:
      params: see ``init_params``.
      batch: tokens (B,) or (B, L), prompt (B,).
      key: of the trajectories.
      model: see ``model``.
    """
    rollout = draw_rollout(key, params, batch, model)
    rows = all_transitions(rollout)
    reward = jnp.repeat(rollout.reward, len(rollout.eps))
    v = functools.partial(model.parts.value, params["value"])
    advantage = reward - lax.stop_gradient(v(rows.x, rows.k, rows.tokens))
    surrogate, metrics = policy_loss(
        params, params, rows, advantage, model.options.beta, model
    )
    value = value_loss(v, rows, reward)
    metrics |= {"value_loss": value, "reward": rollout.reward.mean()}
    return surrogate + value, metrics


def update(
    state: State,
    batch: dict,
    *,
    model: Model,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[State, dict[str, Array]]:
    """Draws a rollout, then takes value steps, then policy steps.

    If a reward is NaN or infinite, the state keeps all but its step, and the metric
    ``reward`` is not finite, which stops the trainer before it saves.

    Args:
      state: see ``make``.
      batch: tokens, prompt.
      model: see ``model``.
      txs: optimizers "policy" and "value".

    Returns:
      The state, and metrics: reward (mean and of each prompt), advantage_std,
      equal_groups (share of prompts whose rewards are all equal), value_loss,
      explained_variance, path_kl (an estimate before the policy steps, nats), beta,
      first_ratio_deviation (0: the trained policy is the one that acted) and means of
      the metrics of ``dpok_loss`` over the policy steps.
    """
    options = model.options
    key = jax.random.fold_in(state.key, state.step)
    key_rollout, key_value, key_policy = jax.random.split(key, 3)
    if options.name != "dpok":
        return supervised_update(state, batch, key, model, txs)
    rollout = draw_rollout(key_rollout, state.params, batch, model)
    value, value_opt, metrics = fit_value(state, rollout, key_value, model, txs)
    kept = keep_rollout(state, rollout, options)
    advantage, stats, equal = advantages(state, rollout, options)
    trained, policy_opt, of_steps = policy_steps(
        state, rollout, value, kept, advantage, key_policy, model, txs
    )
    beta = state.extra["beta"]
    kl = len(model.schedule.std) * of_steps["step_kl"][0]
    metrics |= jax.tree.map(lambda m: m.mean(), of_steps)
    metrics |= {
        "first_ratio_deviation": of_steps["ratio_deviation"][0],
        "path_kl": kl,
        "beta": beta,
        "equal_groups": equal,
        **reward_metrics(rollout, options),
    }
    metrics["loss"] = metrics["value_loss"] + metrics["objective"]
    beta = adapt_beta(beta, kl, options.kl_target)
    extra = {**state.extra, "beta": beta, "stats": stats}
    if options.rollouts > 1:
        extra["pool"] = kept[0]
    new = state._replace(
        params={**state.params, **trained, "value": value},
        opt_state={"policy": policy_opt, "value": value_opt},
        extra=extra,
    )
    return only_if(jnp.isfinite(rollout.reward).all(), new, state), metrics


def sampler(
    params: dict,
    key: Key[Array, ""],
    tokens: Int[Array, "B ..."],
    *,
    model: Model,
    guidance: float | Float[Array, ""] | None = None,
    schedule: Schedule | None = None,
) -> Float[Array, "B ..."]:
    """An image for each row of conditioning tokens.

    Args:
      params: dict with net, and with lora if it is adapted.
      key: of the trajectories.
      tokens: of the prompts.
      model: see ``model``.
      guidance: instead of ``options.guidance``.
      schedule: instead of the policy's.
    """
    weight = model.options.guidance if guidance is None else guidance
    eps = functools.partial(model.parts.eps, policy_params(params))
    schedule = schedule or model.schedule
    return sample_guided(eps, key, tokens, model.parts.shape, weight, schedule)


def make(config: Any, *, reward_fn: Callable | None = None) -> Method:
    """Binds ``config`` (see configs/dpok.py) at its ``method.stage``.

    The state's params are ``net`` in pretraining, else those of ``init_params``.

    Args:
      config: groups ``data``, ``net``, ``noise``, ``sampler``, ``pretrain``, ``optim``,
        ``method``, ``train``; or those of ``pretraining(config)``.
      reward_fn: see ``model``. The task gives the one that ``method.reward`` names;
        pretraining does not use it.

    Raises:
      ValueError: unknown fields or names, values out of range, no reward.
    """
    stage = config.method.stage
    if stage not in STAGES:
        raise ValueError(f"method.stage must be one of {STAGES}, got {stage!r}")
    if stage == "pretrain":
        return make_pretraining(stages.pretraining(config, Denoiser, Pretraining))
    fields = config.method.to_dict()
    fields = {k: v for k, v in fields.items() if k not in ("stage", "reward")}
    options = from_config(Options, fields, "method")
    bound = model(
        from_config(Net, config.net, "net"),
        from_config(NoiseSchedule, config.noise, "noise"),
        from_config(Sampler, config.sampler, "sampler"),
        options,
        reward_fn,
    )
    check_training(config, options, reward_fn is not None)
    steps = config.train.steps * options.policy_steps
    txs = {
        "policy": optim.from_config(config.optim, steps),
        "value": optax.adam(config.optim.value_lr),
    }

    def sample(params, key, tokens, extra=None, **kwargs):
        return sampler(params, key, tokens, model=bound, **kwargs)

    return Method(
        functools.partial(_init, model=bound, txs=txs),
        functools.partial(loss, model=bound),
        functools.partial(update, model=bound, txs=txs),
        sample,
        (*(POOL_RULES if options.rollouts > 1 else ()), *nets.RULES[config.net.model]),
        labels,
        warm_start=from_average("net", () if options.lora_rank else ("reference",)),
        diagnose=lambda params, extra, batch, key: {
            "path_kl": path_kl(params, key, batch["tokens"], model=bound)
        },
    )


def labels(params: dict) -> dict:
    """Optimizer of each parameter; "frozen" ones have none."""
    names = {"value": "adam", "lora": "policy", "reference": "frozen"}
    names["net"] = "frozen" if "lora" in params else "policy"
    return {
        name: jax.tree.map(lambda _, name=name: names[name], part)
        for name, part in params.items()
    }


def _init(key: Key[Array, ""], batch: dict, *, model: Model, txs: Mapping) -> State:
    options = model.options
    params = init_params(key, model)
    name = "lora" if options.lora_rank else "net"
    extra: dict[str, Any] = {
        "beta": jnp.asarray(options.beta, jnp.float32),
        "stats": policy.init_prompt_stats(options.prompts),
    }
    if options.rollouts > 1:
        extra["pool"] = _empty_pool(batch, model)
    opt_state = {
        "policy": txs["policy"].init({name: params[name]}),
        "value": txs["value"].init(params["value"]),
    }
    step = jnp.zeros((), jnp.int32)
    return State(step, params, opt_state, extra, jax.random.split(key, 4)[0])


def _empty_pool(batch: dict, model: Model) -> Rollout:
    kept, rows = model.options.rollouts, len(batch["prompt"])
    steps, shape = len(model.schedule.std), (rows, *model.parts.shape)
    return Rollout(
        jnp.zeros((kept, steps + 1, *shape)),
        jnp.zeros((kept, steps, *shape)),
        jnp.zeros((kept, *batch["tokens"].shape), jnp.int32),
        jnp.zeros((kept, rows), jnp.int32),
        jnp.zeros((kept, rows)),
    )


def _no_reward(x, prompt):
    raise ValueError(
        "this method was built without a reward: pass make(config, reward_fn=...), or "
        "train it by its task, which builds the one that config.method.reward names"
    )
