r"""SFT-PG: optimizing DDPM sampling with shortcut fine-tuning.

Ying Fan, Kangwook Lee. "Optimizing DDPM Sampling with Shortcut Fine-Tuning", ICML 2023,
arXiv 2301.13362.

A sampler of a few steps need not imitate the backward diffusion. A pretrained denoiser
keeps S of its steps and is tuned so that the law of the last state alone minimises an
integral probability metric to the data. The reverse chain is the policy, a learned
critic's value of the last state its terminal cost, and the gradient is REINFORCE's with a
learned baseline: nothing is differentiated through the chain.

With policy $p_\theta(x_{k+1} | x_k) = N(a_k x_k + c_k \epsilon_\theta(x_k, t_k),
\sigma_k^2 I)$, k = 0 .. S-1 from noise to the sample $y = x_S$ (B, ...), critic f, which
is high on fakes, and baseline $V_w(x_k, k)$:

$$ \Phi = \sup_f E_{p_\theta} f(y) - E_{data} f(x) $$
$$ \nabla \Phi = E [f(y) \textstyle\sum_k \nabla_\theta \log p_\theta(x_{k+1}|x_k)] $$
$$ L_f = E f(x) - E f(y) + \lambda_{GP} E (|\nabla f(\hat x)| - 1)^2, \quad
   L_w = E \textstyle\sum_k (V_w(x_k, k) - f(y))^2 $$
$$ L_\theta = E [\mathrm{sg}(f(y) - V_w(x_k, k)) \log p_\theta(x_{k+1} | x_k)] $$

One update: ``n_critic`` times, draw chains with the present policy and take a step of f
and w on them; then ``n_generator`` steps of the policy on those chains.

Departures. ``leak=True`` is the released code's variant (B): $L_w$ is differentiated with
respect to f too, which keeps f predictable instead of Lipschitz. The released code draws
the policy's transitions from one permutation of all; here each step takes one transition
of every chain of a round, no two alike, so that chains stay on their device. The toy's
released code takes one policy step whatever ``n_generator`` says. The paper's gradient
penalty is not in the released code; its weight here is WGAN-GP's 10.
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
from jaxpapers.method import (
    Method,
    State,
    averaged,
    from_average,
    gradient,
    only_if,
)
from jaxpapers.nets import diffusion as nets
from jaxpapers.nets.critic import clip_weights, spectral_normalize
from jaxpapers.ops import chains, diffusion, policy, trajectories
from jaxpapers.ops.diffusion import Chain
from jaxpapers.ops.trajectories import over_data
from jaxpapers.papers.sft_pg.objectives import (
    advantage,
    critic_loss,
    gradient_penalty,
    pathwise_loss,
    policy_loss,
    transitions,
    value_loss,
)
from jaxpapers.papers.sft_pg.options import STAGES, check_batch, check_options

__all__ = [
    "advantage", "critic_loss", "gradient_penalty", "loss", "make", "pathwise_loss",
    "policy_loss", "sampler", "transitions", "update", "value_loss",
]  # fmt: skip


def loss(
    params: dict,
    batch: dict,
    key: Key[Array, ""],
    *,
    parts: nets.Parts,
    chain: Chain,
    options: Any,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """All three objectives on one round of chains; each moves its own net only.

    Args:
      params: dict of net, critic and value.
      batch: x (B, *X).
      key: of the chains.
      parts: functions of the nets.
      chain: see ``ops.chains.chain``.
      options: ``config.method``.
    """
    key_roll, key_mix = jax.random.split(key)
    eps_fn = functools.partial(parts.eps, params["net"])
    f, v = _critics(params, parts, options)
    found = trajectories.rollout(key_roll, eps_fn, chain, batch["x"].shape, store="all")
    found = lax.stop_gradient(found)
    total, metrics = critic_loss(
        f, v, batch["x"], found, key_mix, leak=options.leak,
        value_weight=options.value_weight, penalty=options.penalty,
    )  # fmt: skip
    count, rows = found.eps.shape[:2]
    k = jnp.tile(jnp.arange(count), rows)
    x, x_next = (
        s.swapaxes(0, 1).reshape(-1, *s.shape[2:])
        for s in (found.states[:-1], found.states[1:])
    )
    cost = advantage(f, v, x, k, jnp.repeat(found.sample, count, axis=0))
    own = policy_loss(eps_fn, chain, k, x, x_next, cost, reduce=options.reduce)
    return total + own, {**metrics, "policy_loss": own}


def update(
    state: State,
    batch: dict,
    *,
    parts: nets.Parts,
    chain: Chain,
    options: Any,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[State, dict[str, Array]]:
    """One cycle: rounds of chains with critic steps, then policy steps on the chains.

    Args:
      state: params and opt_state are dicts of net, critic and value.
      batch: x (n_critic B, *X), the data of all rounds.
      parts, chain, options: see ``loss``.
      txs: an optimizer for each net.

    A cycle whose numbers are not finite (a critic that gives NaN) leaves the state as it
    was but for its step; the metric ``loss`` is then not finite, which stops the trainer.

    Returns:
      The state, and means of ``critic_loss``'s metrics over the rounds and of
      policy_loss, advantage_std, ratio_deviation (0 at the first step: the policy that is
      trained is the one that acted) and grad_norm (of the policy) over the steps.
    """
    key = jax.random.fold_in(state.key, state.step)
    key_rounds, key_order = jax.random.split(key)
    rounds = options.n_critic
    check_batch(batch["x"], parts.shape, rounds)
    # Rows of a device stay there: each round takes every rounds-th of them.
    x = over_data(batch["x"])
    x = x.reshape(-1, rounds, *x.shape[1:]).swapaxes(0, 1)
    critics = {name: state.params[name] for name in ("critic", "value")}
    critic_opt = {name: state.opt_state[name] for name in critics}
    acting = functools.partial(parts.eps, state.params["net"])

    def critic_step(carry, inputs):
        params, opt = carry
        x, key = inputs
        key_roll, key_mix = jax.random.split(key)
        found = trajectories.rollout(key_roll, acting, chain, x.shape, store="all")

        def objective(params):
            return critic_loss(
                *_critics(params, parts, options), x, found, key_mix,
                leak=options.leak, value_weight=options.value_weight,
                penalty=options.penalty,
            )  # fmt: skip

        grads, metrics = jax.grad(objective, has_aux=True)(params)
        params, opt = _apply(txs, params, opt, grads)
        if options.regularizer == "clip":
            params["critic"] = clip_weights(params["critic"], options.weight_bound)
        return (params, opt), (found, metrics)

    keys = jax.random.split(key_rounds, rounds)
    (critics, critic_opt), (found, metrics) = lax.scan(
        critic_step, (critics, critic_opt), (x, keys)
    )
    f, v = _critics(critics, parts, options)
    order = jax.random.uniform(key_order, (*x.shape[:2], len(chain.std))).argsort(-1)

    def policy_step(carry, j):
        params, opt = carry
        round_ = j % rounds
        own = jax.tree.map(lambda s: s[round_], found)
        k = order[round_, :, j // rounds]
        x, x_next, eps_old = transitions(own, k)
        cost = advantage(
            f, v, x, k, own.sample, normalize=options.normalize, clip=options.cost_clip
        )

        def objective(params):
            eps_fn = functools.partial(parts.eps, params["net"])
            return _policy_objective(
                eps_fn, chain, k, x, x_next, eps_old, cost, options
            )

        (value, log_ratio), grads = jax.value_and_grad(objective, has_aux=True)(params)
        params, opt = _apply(txs, params, opt, grads)
        return (params, opt), {
            "policy_loss": value,
            "advantage_std": cost.std(),
            "ratio_deviation": jnp.abs(jnp.exp(log_ratio) - 1).max(),
            "grad_norm": optax.tree.norm(grads),
        }

    net = {"net": state.params["net"]}
    net_opt = {"net": state.opt_state["net"]}
    steps = jnp.arange(options.n_generator)
    (net, net_opt), policy_metrics = lax.scan(policy_step, (net, net_opt), steps)
    metrics = jax.tree.map(lambda m: m.mean(0), {**metrics, **policy_metrics})
    metrics["first_ratio_deviation"] = policy_metrics["ratio_deviation"][0]
    # The objectives' sum, as in ``loss``: none of them falls by itself.
    metrics["loss"] = (
        metrics["policy_loss"]
        - metrics["wasserstein"]
        + options.value_weight * metrics["value_loss"]
        + options.penalty * metrics.get("gradient_penalty", 0.0)
    )
    new = state._replace(params={**net, **critics}, opt_state={**net_opt, **critic_opt})
    good = jnp.isfinite(metrics["loss"] + metrics["grad_norm"])
    return only_if(good, new, state), metrics


def sampler(
    params: dict,
    key: Key[Array, ""],
    shape: tuple[int, ...],
    *,
    parts: nets.Parts,
    chain: Chain,
) -> Float[Array, "B ..."]:
    """Samples of shape (B, *X) by the chain, from N(0, I).

    Args:
      params: dict with net.
      key: of the chains.
      shape: of the result.
      parts: functions of the nets.
      chain: any chain over the same net, e.g. all of training's steps.
    """
    eps_fn = functools.partial(parts.eps, params["net"])
    return trajectories.rollout(key, eps_fn, chain, shape).sample


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


def make(config: Any) -> Method:
    """Binds ``config`` (see configs/sft_pg.py) at its ``method.stage``.

    Args:
      config: groups ``data``, ``net``, ``pretrain``, ``optim``, ``method``, ``train``.

    Raises:
      ValueError: unknown names, or values out of range.
    """
    options = config.method
    if options.stage not in STAGES:
        raise ValueError(
            f"config.method.stage must be one of {STAGES}, got {options.stage!r}"
        )
    chain = chains.chain(options)
    parts = nets.parts(config.net, options.steps, options.timesteps)
    sample = functools.partial(sampler, parts=parts, chain=chain)
    if options.stage == "pretrain":
        return _pretrain(config, parts, sample)
    check_options(config, chain)
    txs = {
        "net": optim.from_config(config.optim, config.train.steps),
        "critic": optax.adam(config.optim.critic_lr),
        "value": optax.adam(config.optim.value_lr),
    }
    bound = {"parts": parts, "chain": chain, "options": options}

    def init(key, batch):
        del batch
        key, *keys = jax.random.split(key, 4)
        params = {
            "net": parts.init_net(keys[0]),
            "critic": parts.init_critic(keys[1]),
            "value": parts.init_value(keys[2]),
        }
        if options.regularizer == "clip":
            params["critic"] = clip_weights(params["critic"], options.weight_bound)
        opt_state = {name: tx.init(params[name]) for name, tx in txs.items()}
        return State(jnp.zeros((), jnp.int32), params, opt_state, (), key)

    return Method(
        init,
        functools.partial(loss, **bound),
        functools.partial(update, txs=txs, **bound),
        lambda params, key, shape, extra=None, **kw: sample(params, key, shape, **kw),
        nets.RULES[config.net.model],
        warm_start=from_average("net"),
    )


def _pretrain(config, parts, sample):
    alpha_bar = diffusion.alpha_bars(chains.betas(config.method))
    method = gradient(
        lambda key, batch: {"net": parts.init_net(key)},
        functools.partial(nets.denoising_loss, parts=parts, alpha_bar=alpha_bar),
        optim.from_config(config.pretrain.optim, config.train.steps),
        sampler=sample,
        rules=nets.RULES[config.net.model],
        accumulate=config.train.accumulate,
    )
    return averaged(method, config.pretrain.ema)


def _critics(params, parts, options):
    critic = params["critic"]
    if options.regularizer == "spectral":
        # The power method: an exact decomposition of every kernel would be the step.
        critic = spectral_normalize(critic, iterations=20)
    return (
        functools.partial(parts.critic, critic),
        functools.partial(parts.value, params["value"]),
    )


def _policy_objective(eps_fn, chain, k, x, x_next, eps_old, cost, options):
    """The policy's loss and the log-ratios to the policy that acted."""
    time = jnp.asarray(chain.time, jnp.float32)[k]
    eps = eps_fn(x, time)
    log_ratio = diffusion.step_log_ratio(
        chain, k, x, x_next, eps, eps_old, options.reduce
    )
    if options.ratio_clip:
        own = policy.clipped_surrogate(log_ratio, -cost, options.ratio_clip)
        return own.mean(), log_ratio
    own = policy_loss(lambda *_: eps, chain, k, x, x_next, cost, reduce=options.reduce)
    return own, log_ratio


def _apply(txs, params, opt, grads):
    changed, states = {}, {}
    for name in params:
        updates, states[name] = txs[name].update(grads[name], opt[name], params[name])
        changed[name] = optax.apply_updates(params[name], updates)
    return changed, states
