"""DPOK's policy objective (eq 26) and the policy steps of an update."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.method import State
from jaxpapers.ops import diffusion, policy
from jaxpapers.ops.diffusion import Schedule
from jaxpapers.papers.dpok.options import KLS
from jaxpapers.papers.dpok.rollouts import (
    Model,
    Rollout,
    Transitions,
    guided_eps,
    later_kl,
    policy_params,
    reference_params,
    transitions,
)
from jaxpapers.papers.dpok.value import later_cost, value_advantage


def dpok_loss(
    eps_fn: Callable,
    eps_ref: Float[Array, "B ..."],
    schedule: Schedule,
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
    """Eq 26: clipped policy gradient and KL, means over transitions.

    Args:
      eps_fn: the policy, (x, time, tokens) -> guided noise.
      eps_ref: guided noise of the frozen model at the same states.
      schedule: coefficients of the sampler's steps.
      batch: transitions.
      advantage: of the transitions; positive is better than the baseline.
      alpha, beta, clip, clip_eps, kl, reduce: see ``Options``.

    Returns:
      The loss; metrics objective (the loss), policy_loss, step_kl (exact, nats), and
      those of ``ops.policy.ratio_metrics``.

    Raises:
      ValueError: unknown names, clip_eps <= 0.
    """
    if kl not in KLS:
        raise ValueError(f"kl must be one of {KLS}, got {kl!r}")
    time = jnp.asarray(schedule.time, jnp.float32)[batch.k]
    eps = eps_fn(batch.x, time, batch.tokens)
    log_ratio = diffusion.step_log_ratio(
        schedule, batch.k, batch.x, batch.x_next, eps, batch.eps_old, reduce
    )
    surrogate = policy.clipped_surrogate(log_ratio, advantage, clip_eps, clip).mean()
    exact = diffusion.step_kl(schedule, batch.k, eps, eps_ref).mean()
    divergence = exact if kl == "exact" else jnp.square(eps - eps_ref).mean()
    total = alpha * surrogate + beta * divergence
    metrics = policy.ratio_metrics(log_ratio, clip_eps)
    metrics |= {"policy_loss": surrogate, "step_kl": exact, "objective": total}
    return total, metrics


def policy_loss(
    params: dict,
    frozen: dict,
    batch: Transitions,
    advantage: Float[Array, " B"],
    beta: float | Array,
    model: Model,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """``dpok_loss`` of a model.

    Args:
      params: of the policy.
      frozen: parameters whose pretrained net is the reference.
      batch, advantage, beta: see ``dpok_loss``.
      model: see ``dpok.model``.
    """
    options = model.options
    time = jnp.asarray(model.schedule.time, jnp.float32)[batch.k]
    eps_ref = guided_eps(model, reference_params(frozen))(batch.x, time, batch.tokens)
    return dpok_loss(
        guided_eps(model, policy_params(params)), eps_ref, model.schedule, batch,
        advantage, alpha=options.alpha, beta=beta, clip=options.clip,
        clip_eps=options.clip_eps, kl=options.kl, reduce=options.reduce,
    )  # fmt: skip


def policy_steps(
    state: State,
    rollout: Rollout,
    value: dict,
    kept: tuple[Rollout, Any, Any],
    advantage: Float[Array, " B"],
    key: Key[Array, ""],
    model: Model,
    txs: Mapping[str, optax.GradientTransformation],
) -> tuple[dict, Any, dict[str, Array]]:
    """``options.policy_steps`` optimizer steps on kept rollouts.

    Args:
      state: before the update.
      rollout: of the present policy.
      value: parameters of the value net.
      kept: see ``value.keep_rollout``.
      advantage: of whole trajectories, for all but ``advantage="value"``.
      key: of the transitions' order.
      model: see ``dpok.model``.
      txs: optimizers; "policy" is used.

    Returns:
      The trained entry of ``params`` as a dict, optimizer state, metrics of each step.
    """
    options = model.options
    pool, filled, newest = kept
    order = jax.random.uniform(key, rollout.eps.shape[1::-1]).argsort(-1)
    steps = len(model.schedule.std)
    beta = state.extra["beta"]
    later = None
    if options.kl_mode == "reward":
        later = later_kl(rollout, state.params, model).T

    def advantage_of(batch, source, k):
        if options.advantage == "value":
            gain = value_advantage(value, source, batch, model)
        else:
            gain = jnp.repeat(advantage, options.transitions)
        if later is None:
            return gain
        return gain - later_cost(later, k, beta, options.alpha)

    def policy_step(carry, j):
        trained, opt = carry
        source = jax.tree.map(
            lambda v: v[(newest - j % filled) % options.rollouts], pool
        )
        chosen = (j * options.transitions + jnp.arange(options.transitions)) % steps
        k = order[:, chosen]
        batch = transitions(source, k)
        gain = advantage_of(batch, source, k)

        def objective(trained, rows, gain):
            params = {**state.params, **trained}
            return policy_loss(params, state.params, rows, gain, beta, model)

        grads, metrics = _by_transition(objective, trained, (batch, gain), options)
        updates, opt = txs["policy"].update(grads, opt, trained)
        metrics |= {"grad_norm": optax.tree.norm(grads), "advantage_std": gain.std()}
        return (optax.apply_updates(trained, updates), opt), metrics

    name = "lora" if "lora" in state.params else "net"
    trained = {name: state.params[name]}
    (trained, opt), metrics = lax.scan(
        policy_step,
        (trained, state.opt_state["policy"]),
        jnp.arange(options.policy_steps),
    )
    return trained, opt, metrics


def adapt_beta(beta: Array, kl: Array, target: float) -> Array:
    """Doubles or halves beta if the path KL leaves a band around its target; 0: none."""
    if not target:
        return beta
    high, low = kl > 1.5 * target, kl < target / 1.5
    return jnp.where(high, 2 * beta, jnp.where(low, beta / 2, beta))


def _by_transition(objective, trained, rows, options):
    """Gradient and metrics, accumulated over one transition of each trajectory at a time.

    The nets then have as many rows as in the rollout, so that the first ratios are
    exactly 1 (rounding depends on the shape, and c / sigma amplifies it up to fifty
    times), and need as much memory.
    """

    def accumulate(total, group):
        grads, metrics = jax.grad(objective, has_aux=True)(trained, *group)
        total = jax.tree.map(lambda t, g: t + g / options.transitions, total, grads)
        return total, metrics

    groups = jax.tree.map(
        lambda v: v.reshape(-1, options.transitions, *v.shape[1:]).swapaxes(0, 1), rows
    )
    zero = jax.tree.map(jnp.zeros_like, trained)
    grads, metrics = lax.scan(accumulate, zero, groups)
    means = {name: v.mean() for name, v in metrics.items()}
    means["ratio_deviation"] = metrics["ratio_deviation"].max()
    return grads, means
