"""The two halves of an update: steps of the critics, then of the policy, each a scan."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxpapers.nets.critic import clip_weights, spectral_normalize
from jaxpapers.ops import diffusion, policy, trajectories
from jaxpapers.papers.sft_pg.objectives import (
    advantage,
    critic_loss,
    policy_loss,
    transitions,
)


def critic_steps(state, x, keys, model, txs):
    """Critics, their optimizer states, stacked rollouts and metrics of each."""
    options = model.options
    critics = {name: state.params[name] for name in ("critic", "value")}
    opt = {name: state.opt_state[name] for name in critics}
    acting = functools.partial(model.parts.eps, state.params["net"])

    def step(carry, inputs):
        params, opt = carry
        x, key = inputs
        key_rollout, key_mix = jax.random.split(key)
        rollout = trajectories.rollout(
            key_rollout, acting, model.schedule, x.shape, store="all"
        )

        def objective(params):
            return critic_loss(
                *bound_critics(params, model), x, rollout, key_mix, leak=options.leak,
                value_weight=options.value_weight, penalty=options.penalty,
            )  # fmt: skip

        grads, metrics = jax.grad(objective, has_aux=True)(params)
        params, opt = _apply(txs, params, opt, grads)
        if options.regularizer == "clip":
            params["critic"] = clip_weights(params["critic"], options.weight_bound)
        return (params, opt), (rollout, metrics)

    (critics, opt), (rollouts, metrics) = lax.scan(step, (critics, opt), (x, keys))
    return critics, opt, rollouts, metrics


def policy_steps(state, critics, rollouts, key, model, txs):
    """The net, its optimizer state, and metrics of each step."""
    options, schedule = model.options, model.schedule
    f, v = bound_critics(critics, model)
    count, steps, rows = rollouts.eps.shape[:3]
    order = jax.random.uniform(key, (count, rows, steps)).argsort(-1)

    def step(carry, j):
        params, opt = carry
        i = j % count
        rollout = jax.tree.map(lambda s: s[i], rollouts)
        k = order[i, :, j // count]
        x, x_next, eps_old = transitions(rollout, k)
        cost = advantage(
            f, v, x, k, rollout.sample, normalize=options.normalize,
            clip=options.cost_clip,
        )  # fmt: skip

        def objective(params):
            eps_fn = functools.partial(model.parts.eps, params["net"])
            return _policy_objective(
                eps_fn, schedule, k, x, x_next, eps_old, cost, options
            )

        (value, log_ratio), grads = jax.value_and_grad(objective, has_aux=True)(params)
        params, opt = _apply(txs, params, opt, grads)
        return (params, opt), {
            "policy_loss": value,
            "advantage_std": cost.std(),
            "ratio_deviation": jnp.abs(jnp.exp(log_ratio) - 1).max(),
            "grad_norm": optax.tree.norm(grads),
        }

    carry = ({"net": state.params["net"]}, {"net": state.opt_state["net"]})
    (net, opt), metrics = lax.scan(step, carry, jnp.arange(options.n_generator))
    return net, opt, metrics


def bound_critics(params, model):
    """Critic and value of their parameters; with spectral norms, the kernels divided."""
    critic = params["critic"]
    if model.options.regularizer == "spectral":
        # Power iteration: an exact SVD of every kernel would dominate the step.
        critic = spectral_normalize(critic, iterations=20)
    return (
        functools.partial(model.parts.critic, critic),
        functools.partial(model.parts.value, params["value"]),
    )


def _policy_objective(eps_fn, schedule, k, x, x_next, eps_old, cost, options):
    """The policy's loss and the log-ratios to the policy that acted."""
    time = jnp.asarray(schedule.time, jnp.float32)[k]
    eps = eps_fn(x, time)
    log_ratio = diffusion.step_log_ratio(
        schedule, k, x, x_next, eps, eps_old, options.reduce
    )
    if options.ratio_clip:
        surrogate = policy.clipped_surrogate(log_ratio, -cost, options.ratio_clip)
        return surrogate.mean(), log_ratio
    value = policy_loss(
        lambda *_: eps, schedule, k, x, x_next, cost, reduce=options.reduce
    )
    return value, log_ratio


def _apply(txs, params, opt, grads):
    changed, states = {}, {}
    for name in params:
        updates, states[name] = txs[name].update(grads[name], opt[name], params[name])
        changed[name] = optax.apply_updates(params[name], updates)
    return changed, states
