r"""DPOK: reinforcement learning for fine-tuning text-to-image diffusion models.

Ying Fan, Olivia Watkins, Yuqing Du, Hao Liu, Moonkyung Ryu, Craig Boutilier, Pieter
Abbeel, Mohammad Ghavamzadeh, Kangwook Lee, Kimin Lee. "DPOK: Reinforcement Learning for
Fine-tuning Text-to-Image Diffusion Models", NeurIPS 2023, arXiv 2305.16381.

The S steps of a guided reverse chain are actions, the prompt z and the picture so far the
state, and a black-box score r(y, z) of the last picture y the only reward. The policy
starts at the pretrained model and is paid for staying near it: the sum of the steps' KL
divergences bounds that of the pictures' laws. A value net is the baseline, importance
weights allow a few steps on the same chains.

With $p_\theta(x_{k+1} | x_k, z) = N(\mu_\theta, \sigma_k^2 I)$ and c_k the chain's factor
of the noise, B chains of pictures (H, W, C):

$$ \min_\theta \alpha E [-r(y, z)] + \beta \textstyle\sum_k E\,KL_k \quad (9), \quad
   KL_k = c_k^2 |\epsilon_\theta - \epsilon_{pre}|^2 / 2 \sigma_k^2 $$
$$ A = r(y, z) - V_w(x_k, k, z), \quad
   L_\theta = -\alpha \min(\rho A, \mathrm{clip}(\rho) A) + \beta KL_k \quad (26) $$

Departures. The released code clips the ratio of mean log-probabilities to 1 +- 1e-4 and
lets no gradient through outside, whatever the advantage's sign, and its "KL" is the mean
square of the noise's difference; both are here (``clip="hard"``, ``kl="eps_mse"``), the
default is PPO's minimum on the sum of log-probabilities and the exact KL. The gradient of
the states' law through later KL terms is dropped, as in the paper (``kl_mode="grad"``);
``"reward"`` has it. Each policy step takes some steps of every chain, all different,
instead of transitions at random, so that chains stay on their device; old rounds are kept
whole (``rounds``) instead of as single transitions.
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
    averaged,
    from_average,
    gradient,
    only_if,
)
from jaxpapers.nets import diffusion as nets
from jaxpapers.nets.lora import lora_init
from jaxpapers.ops import chains, diffusion, policy, trajectories
from jaxpapers.ops.diffusion import Chain
from jaxpapers.papers.dpok.baseline import (
    advantages,
    fit_value,
    keep_round,
    later_cost,
    reward_metrics,
    value_advantage,
    value_loss,
)
from jaxpapers.papers.dpok.options import KLS, check_options
from jaxpapers.papers.dpok.rounds import (
    Bound,
    Round,
    Transitions,
    guided_eps,
    later_kl,
    path_kl,
    policy_params,
    reference_params,
    take_round,
    transitions,
)
from jaxpapers.papers.dpok.supervised import sft_loss, supervised_round

__all__ = [
    "Bound", "Round", "Transitions", "dpok_loss", "later_kl", "make",
    "path_kl", "sampler", "sft_loss", "take_round", "transitions", "value_loss",
]  # fmt: skip


# Kept rounds are spread by chains.
POOL_RULES = (
    (r"extra/pool/(states|eps)$", P(None, None, "data")),
    (r"extra/pool/(word|prompt|reward)$", P(None, "data")),
)


def dpok_loss(
    eps_fn: Callable,
    eps_ref: Float[Array, "B ..."],
    chain: Chain,
    batch: Transitions,
    advantage: Float[Array, " B"],
    *,
    alpha: float = 1.0,
    beta: float | Array = 0.01,
    clip: str = "ppo",
    clip_eps: float = 0.2,
    kl: str = "exact",
    reduce: str = "sum",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Eq 26: clipped policy gradient and KL, means over the transitions.

    Args:
      eps_fn: the policy, (x, time, word) -> guided noise.
      eps_ref: the frozen model's guided noise at the same states.
      chain: see ``ops.diffusion``.
      batch: transitions.
      advantage: of their chains; high is good.
      alpha: weight of the reward.
      beta: weight of the KL.
      clip: see ``ops.policy.clipped_surrogate``.
      clip_eps: half width of its band.
      kl: "exact", nats a step; "eps_mse", the released code's mean square of the noise's
        difference, whose beta is another one.
      reduce: of the log-probability over coordinates, "sum" or the code's "mean".

    Returns:
      The loss; metrics objective (the loss), policy_loss, step_kl (exact, nats), and
      those of ``ops.policy.ratio_metrics``.

    Raises:
      ValueError: unknown names, clip_eps <= 0.
    """
    if kl not in KLS:
        raise ValueError(f"kl must be one of {KLS}, got {kl!r}")
    time = jnp.asarray(chain.time, jnp.float32)[batch.k]
    eps = eps_fn(batch.x, time, batch.word)
    log_ratio = diffusion.step_log_ratio(
        chain, batch.k, batch.x, batch.x_next, eps, batch.eps_old, reduce
    )
    own = policy.clipped_surrogate(log_ratio, advantage, clip_eps, clip).mean()
    exact = diffusion.step_kl(chain, batch.k, eps, eps_ref).mean()
    near = exact if kl == "exact" else jnp.square(eps - eps_ref).mean()
    total = alpha * own + beta * near
    metrics = policy.ratio_metrics(log_ratio, clip_eps)
    metrics |= {"policy_loss": own, "step_kl": exact, "objective": total}
    return total, metrics


def loss(
    params: dict, batch: dict, key: Key[Array, ""], *, bound: Bound
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Policy and value losses on one round, all of its transitions.

    Always the clipped surrogate with the value's advantage and ``method.beta``: a number
    to watch. What ``update`` does with ``method.name``, ``advantage``, ``kl_mode``,
    ``rounds`` and an adapted beta is not in it.

    Args:
      params: dict of net, value, and lora or reference.
      batch: word (B,) or (B, L), prompt (B,).
      key: of the chains.
      bound: see ``Bound``.
    """
    c = bound.options
    found = take_round(key, params, batch, bound)
    steps, rows = found.eps.shape[:2]
    chosen = transitions(found, jnp.tile(jnp.arange(steps)[None], (rows, 1)))
    reward = jnp.repeat(found.reward, steps)
    v = functools.partial(bound.parts.value, params["value"])
    advantage = reward - lax.stop_gradient(v(chosen.x, chosen.k, chosen.word))
    own, metrics = _policy_loss(params, params, chosen, advantage, c.beta, bound)
    value = value_loss(v, chosen, reward)
    return own + value, {**metrics, "value_loss": value, "reward": found.reward.mean()}


def update(
    state: State,
    batch: dict,
    *,
    bound: Bound,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[State, dict[str, Array]]:
    """One round: chains and rewards, then value steps, then policy steps.

    A reward that is NaN or infinite leaves the state as it was but for its step; the
    metric ``reward`` is then not finite, which stops the trainer before it saves.

    Args:
      state: see ``make``.
      batch: word, prompt.
      bound: see ``Bound``.
      txs: optimizers of the policy's parameters and of the value net.

    Returns:
      The state, and metrics: reward (mean and of each prompt), advantage_std,
      equal_groups (share of prompts whose rewards are all equal), value_loss,
      explained_variance, path_kl (an estimate, nats a chain, before this round's
      steps), beta, first_ratio_deviation (0: the policy trained is the one that acted)
      and means of ``dpok_loss``'s over the policy steps.
    """
    c = bound.options
    key = jax.random.fold_in(state.key, state.step)
    key_roll, key_value, key_policy = jax.random.split(key, 3)
    if c.name != "dpok":
        return supervised_round(state, batch, key, bound, txs)
    found = take_round(key_roll, state.params, batch, bound)
    value, value_opt, metrics = fit_value(state, found, key_value, bound, txs)
    pool, filled, newest = keep_round(state, found, c)
    adv, stats, equal = advantages(state, found, bound)
    own, policy_opt, seen = _policy_steps(
        state, found, value, (pool, filled, newest), adv, key_policy, bound, txs
    )
    steps, beta = len(bound.chain.std), state.extra["beta"]
    metrics |= jax.tree.map(lambda m: m.mean(), seen)
    kl = steps * seen["step_kl"][0]
    metrics |= {
        "first_ratio_deviation": seen["ratio_deviation"][0],
        "path_kl": kl,
        "beta": beta,
        "equal_groups": equal,
        **reward_metrics(found, c),
    }
    metrics["loss"] = metrics["value_loss"] + metrics["objective"]
    extra = {**state.extra, "beta": _adapt(beta, kl, c), "stats": stats}
    if c.rounds > 1:
        extra["pool"] = pool
    new = state._replace(
        params={**state.params, **own, "value": value},
        opt_state={"policy": policy_opt, "value": value_opt},
        extra=extra,
    )
    return only_if(jnp.isfinite(found.reward).all(), new, state), metrics


def sampler(
    params: dict,
    key: Key[Array, ""],
    word: Int[Array, "B ..."],
    *,
    bound: Bound,
    guidance: float | None = None,
    chain: Chain | None = None,
) -> Float[Array, "B ..."]:
    """A picture for each prompt.

    Args:
      params: dict of net, with or without lora.
      key: of the chains.
      word: prompts.
      bound: see ``Bound``.
      guidance: another weight than the policy's.
      chain: another chain over the same net.
    """
    weight = bound.options.guidance if guidance is None else guidance
    net = functools.partial(bound.parts.eps, policy_params(params))
    eps = diffusion.guided(net, weight)
    return trajectories.rollout(
        key,
        lambda x, time: eps(x, time, word),
        chain or bound.chain,
        (len(word), *bound.parts.shape),
    ).sample


def pretraining(config: Any) -> Any:
    """Config of the run whose checkpoint the tuning starts from.

    None for that run itself, and where ``train.init_from`` names a checkpoint.
    """
    if config.method.stage == "pretrain" or config.train.init_from:
        return None
    before = config.copy_and_resolve_references().unlock()
    before.method.stage = "pretrain"
    before.data.batch = config.pretrain.batch
    before.train.update(
        steps=config.pretrain.steps, eval_every=config.pretrain.eval_every
    )
    return before.lock()


def make(config: Any, *, reward_fn: Callable | None = None) -> Method:
    """Binds ``config`` (see configs/dpok.py) at its ``method.stage``.

    The state's params are ``net`` in pretraining; when tuning ``net`` with ``lora`` on
    it, or ``net`` and its frozen copy ``reference`` where ``lora_rank`` is 0; and
    ``value``.

    Args:
      config: groups ``data``, ``net``, ``pretrain``, ``optim``, ``method``, ``train``.
      reward_fn: (pictures (B, H, W, C), about [-1, 1] but not clipped, prompt ids (B,))
        -> (B,) float, of JAX operations, or any function by ``ops.host.on_host``. The
        task gives the one that ``config.method.reward`` names.

    Raises:
      ValueError: unknown names, values out of range, no reward.
    """
    c = config.method
    check_options(config, reward_fn)
    chain = chains.chain(c)
    parts = nets.parts(config.net, c.steps, c.timesteps)
    bound = Bound(parts, chain, c, reward_fn or _no_reward)
    sample = functools.partial(sampler, bound=bound)
    rules = (
        (*POOL_RULES, *nets.RULES[config.net.model])
        if c.rounds > 1
        else (nets.RULES[config.net.model])
    )
    if c.stage == "pretrain":
        method = gradient(
            lambda key, batch: {"net": parts.init_net(key)},
            functools.partial(
                nets.denoising_loss, parts=parts, drop=config.pretrain.drop,
                alpha_bar=diffusion.alpha_bars(chains.betas(c)),
            ),
            optim.from_config(config.pretrain.optim, config.train.steps),
            sampler=sample, rules=rules, accumulate=config.train.accumulate,
        )  # fmt: skip
        return averaged(method, config.pretrain.ema)
    diffusion.check_density(chain)
    txs = {
        "policy": optim.from_config(config.optim, config.train.steps * c.policy_steps),
        "value": optax.adam(config.optim.value_lr),
    }

    return Method(
        functools.partial(_init, parts=parts, options=c, txs=txs),
        functools.partial(loss, bound=bound),
        functools.partial(update, bound=bound, txs=txs),
        lambda params, key, word, extra=None, **kw: sample(params, key, word, **kw),
        rules,
        labels,
        warm_start=from_average("net", () if c.lora_rank else ("reference",)),
        diagnose=lambda params, extra, batch, key: {
            "path_kl": path_kl(params, key, batch["word"], bound=bound)
        },
    )


def labels(params: dict) -> dict:
    """Which optimizer each parameter goes to; "frozen" ones have none."""
    names = {"value": "adam", "lora": "policy", "reference": "frozen"}
    names["net"] = "frozen" if "lora" in params else "policy"
    return {
        name: jax.tree.map(lambda _, name=name: names[name], part)
        for name, part in params.items()
    }


def _init(key, batch, *, parts, options, txs):
    key, key_net, key_lora, key_value = jax.random.split(key, 4)
    net = parts.init_net(key_net)
    params = {"net": net, "value": parts.init_value(key_value)}
    if options.lora_rank:
        params["lora"] = lora_init(key_lora, net, options.lora_rank, options.lora_match)
        own = {"lora": params["lora"]}
    else:
        params["reference"] = jax.tree.map(jnp.copy, net)
        own = {"net": net}
    extra: dict[str, Any] = {"beta": jnp.asarray(options.beta, jnp.float32)}
    extra["stats"] = policy.init_prompt_stats(options.prompts)
    rows, steps = len(batch["prompt"]), options.steps
    if options.rounds > 1:
        shape = (options.rounds, steps, rows, *parts.shape)
        word = batch["word"]
        extra["pool"] = Round(
            jnp.zeros((shape[0], steps + 1, *shape[2:])),
            jnp.zeros(shape),
            jnp.zeros((shape[0], *word.shape), jnp.int32),
            jnp.zeros((shape[0], rows), jnp.int32),
            jnp.zeros((shape[0], rows)),
        )
    opt_state = {
        "policy": txs["policy"].init(own), "value": txs["value"].init(params["value"]),
    }  # fmt: skip
    return State(jnp.zeros((), jnp.int32), params, opt_state, extra, key)


def _policy_steps(state, found, value, kept, adv, key_policy, bound, txs):
    """The policy's moving part, its optimizer state, and metrics of every step.

    ``kept`` is what ``keep_round`` gave, ``adv`` the advantages of whole chains.
    """
    c = bound.options
    pool, filled, newest = kept
    order = jax.random.uniform(key_policy, found.eps.shape[1::-1]).argsort(-1)
    steps = len(bound.chain.std)
    beta = state.extra["beta"]
    later = later_kl(found, state.params, bound).T if c.kl_mode == "reward" else None

    def policy_step(carry, j):
        own, opt = carry
        use = jax.tree.map(lambda v: v[(newest - j % filled) % c.rounds], pool)
        k = order[:, (j * c.transitions + jnp.arange(c.transitions)) % steps]
        chosen = transitions(use, k)
        if c.advantage == "value":
            advantage = value_advantage(value, use, chosen, bound)
        else:
            advantage = jnp.repeat(adv, c.transitions)
        if later is not None:
            advantage = advantage - later_cost(later, k, beta, c.alpha)

        def objective(own, rows, advantage):
            params = {**state.params, **own}
            return _policy_loss(params, state.params, rows, advantage, beta, bound)

        def accumulate(total, group):
            grads, metrics = jax.grad(objective, has_aux=True)(own, *group)
            return jax.tree.map(
                lambda t, g: t + g / c.transitions, total, grads
            ), metrics

        # One step of every chain at a time: nets see as many rows as in the rollout, so
        # that the first ratios are exactly 1 (rounding depends on the shape, and a
        # chain's factor c / sigma enlarges it up to fifty times), and memory is theirs.
        groups = jax.tree.map(
            lambda v: v.reshape(-1, c.transitions, *v.shape[1:]).swapaxes(0, 1),
            (chosen, advantage),
        )
        zero = jax.tree.map(jnp.zeros_like, own)
        grads, seen = lax.scan(accumulate, zero, groups)
        metrics = {name: v.mean() for name, v in seen.items()}
        metrics["ratio_deviation"] = seen["ratio_deviation"].max()
        updates, opt = txs["policy"].update(grads, opt, own)
        metrics |= {
            "grad_norm": optax.tree.norm(grads), "advantage_std": advantage.std(),
        }  # fmt: skip
        return (optax.apply_updates(own, updates), opt), metrics

    name = "lora" if "lora" in state.params else "net"
    own = {name: state.params[name]}
    (own, policy_opt), seen = lax.scan(
        policy_step, (own, state.opt_state["policy"]), jnp.arange(c.policy_steps)
    )
    return own, policy_opt, seen


def _policy_loss(params, frozen, batch, advantage, beta, bound):
    c = bound.options
    time = jnp.asarray(bound.chain.time, jnp.float32)[batch.k]
    ref = guided_eps(bound, reference_params(frozen))(batch.x, time, batch.word)
    return dpok_loss(
        guided_eps(bound, policy_params(params)), ref, bound.chain, batch, advantage,
        alpha=c.alpha, beta=beta, clip=c.clip, clip_eps=c.clip_eps, kl=c.kl,
        reduce=c.reduce,
    )  # fmt: skip


def _adapt(beta, kl, c):
    """Doubles or halves beta where the path's KL leaves a band around its target."""
    if not c.kl_target:
        return beta
    high, low = kl > 1.5 * c.kl_target, kl < c.kl_target / 1.5
    return jnp.where(high, 2 * beta, jnp.where(low, beta / 2, beta))


def _no_reward(x, prompt):
    raise ValueError(
        "this method was built without a reward: pass make(config, reward_fn=...), or "
        "train it by its task, which builds the one that config.method.reward names"
    )
