r"""Implicit Q-learning (Kostrikov et al., arXiv 2110.06169), as CODA's code orders it.

With twin critics Q, their slow copies Q', V and a policy of mean m(o) and deviations
that do not depend on o:

$$ L_V = E\,|\tau - 1[u < 0]|\,u^2, \quad u = \min Q'(o, a) - V(o) $$
$$ L_Q = E (y - Q(o, a))^2, \quad y = clip(r + \gamma (1 - d) V(o'), low, 0) $$
$$ L_\pi = -E \min(e^{\beta (\min Q'(o, a) - V(o))}, cap) \log N(a; m(o), \sigma^2) $$
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.papers.coda.options import Net, Options, encode_observation

LOG_STD = (-5.0, 2.0)


def expectile_loss(u: Float[Array, "..."], tau: Any) -> Float[Array, ""]:
    """Mean of |tau - 1[u < 0]| u^2, whose minimiser is the tau-expectile.

    Example:
      >>> float(expectile_loss(jnp.array([1.0, -1.0]), 0.9))
      0.5
    """
    return (jnp.abs(tau - (u < 0)) * jnp.square(u)).mean()


def init(key: Key[Array, ""], net: Net) -> dict[str, Any]:
    """Parameters: v, q with q1 and q2, pi with net and log_std.

    A net is ``layer_i`` of kernel (in, out) and bias.
    """
    keys = jax.random.split(key, 4)
    observation = net.observation
    pair = observation + net.action + 1
    return {
        "v": perceptron(keys[0], (observation, *net.hidden, 1), net.init),
        "q": {
            "q1": perceptron(keys[1], (pair, *net.hidden, 1), net.init),
            "q2": perceptron(keys[2], (pair, *net.hidden, 1), net.init),
        },
        "pi": {
            "net": perceptron(
                keys[3], (observation, *net.hidden, net.outputs), net.init
            ),
            "log_std": jnp.zeros(net.outputs),
        },
    }


def perceptron(key: Key[Array, ""], sizes: tuple[int, ...], kind: str) -> dict:
    """Layers of the given sizes, see ``Net.init``."""
    params = {}
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:])):
        key_kernel, key_bias = jax.random.split(jax.random.fold_in(key, i))
        bound = 1 / math.sqrt(fan_in)
        if kind == "orthogonal":
            draw = jax.nn.initializers.orthogonal(math.sqrt(2))
            kernel, bias = draw(key_kernel, (fan_in, fan_out)), jnp.zeros(fan_out)
        else:
            shape = (fan_in, fan_out)
            kernel = jax.random.uniform(key_kernel, shape, minval=-bound, maxval=bound)
            bias = jax.random.uniform(key_bias, (fan_out,), minval=-bound, maxval=bound)
        params[f"layer_{i}"] = {"kernel": kernel, "bias": bias}
    return params


def forward(params: Mapping, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
    """A ReLU perceptron."""
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        bias = layer["bias"].reshape((1,) * (x.ndim - 1) + (-1,))
        x = x @ layer["kernel"] + bias
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def value(params: Mapping, o: Float[Array, "*batch O"]) -> Float[Array, "*batch"]:
    """V(o)."""
    return forward(params, o)[..., 0]


def critics(
    params: Mapping, o: Float[Array, "*batch O"], a: Float[Array, "*batch A"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Q_1(o, a) and Q_2(o, a)."""
    pair = jnp.concatenate([o, a], -1)
    return forward(params["q1"], pair)[..., 0], forward(params["q2"], pair)[..., 0]


def smaller(params: Mapping, o: Any, a: Any) -> Float[Array, "*batch"]:
    """The smaller of both critics."""
    return jnp.minimum(*critics(params, o, a))


def mean_action(
    params: Mapping, o: Float[Array, "*batch O"], net: Net
) -> Float[Array, "*batch A"]:
    """The policy's mean."""
    mean = forward(params["net"], o)
    return jnp.tanh(mean) if net.squash else mean


def log_probability(
    params: Mapping, o: Float[Array, "*batch O"], a: Float[Array, "*batch A"], net: Net
) -> Float[Array, "*batch"]:
    """Log density of actions, without tanh's change of volume: the mean is squashed."""
    mean = mean_action(params, o, net)
    log_std = jnp.clip(params["log_std"], *LOG_STD)
    log_std = log_std.reshape((1,) * (mean.ndim - 1) + (-1,))
    z = (a - mean) * jnp.exp(-log_std)
    return (-0.5 * jnp.square(z) - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def v_loss(params: Mapping, batch: Mapping, q: Any, tau: float) -> tuple[Any, dict]:
    """L_V against given smaller critics."""
    v = value(params, batch["observation"])
    return expectile_loss(q - v, tau), {"v": v.mean()}


def q_loss(
    params: Mapping, batch: Mapping, next_value: Any, options: Options
) -> tuple[Any, dict]:
    """L_Q: mean of both critics' errors, their sum with ``order="iql"``."""
    y = batch["reward"] + options.discount * (1 - batch["done"]) * next_value
    y = lax.stop_gradient(jnp.clip(y, options.low, 0.0))
    errors = [
        jnp.square(y - q).mean()
        for q in critics(params, batch["observation"], batch["action"])
    ]
    share = 1.0 if options.order == "iql" else 0.5
    return share * (errors[0] + errors[1]), {"target": y.mean()}


def policy_loss(
    params: Mapping, batch: Mapping, advantage: Any, options: Options, net: Net
) -> tuple[Any, dict]:
    """L_pi against given advantages."""
    weight = jnp.minimum(jnp.exp(options.temperature * advantage), options.cap)
    log_p = log_probability(params, batch["observation"], batch["action"], net)
    return -(weight * log_p).mean(), {"weight_mean": weight.mean()}


def target_of(params: Mapping) -> Any:
    """Copies of the critics."""
    return jax.tree.map(jnp.copy, params["q"])


def iql_update(
    params: Mapping,
    opt_state: Mapping,
    target: Any,
    batch: Mapping,
    policy_batch: Mapping,
    *,
    txs: Mapping[str, optax.GradientTransformation],
    options: Options,
    net: Net,
) -> tuple[dict, dict, Any, dict]:
    """One update of V, the critics, their slow copies and the policy.

    Args:
      params: of ``init``.
      opt_state: of v, q and pi.
      target: slow copies of the critics.
      batch: value batch of ``encode_batch``.
      policy_batch: its policy batch.
      txs: optimizers of v, q and pi.
      options: order and constants.
      net: of the policy.

    Returns:
      The new parameters, optimizer states and copies, and metrics: the losses, V, the
      critics' targets, weights of the actions, ``loss``, the losses' sum, and
      ``grad_norm``.
    """
    params, opt_state = dict(params), dict(opt_state)
    metrics: dict[str, Any] = {}
    squares = []

    def step(name, f, *args):
        (loss, aux), grads = jax.value_and_grad(f, has_aux=True)(params[name], *args)
        squares.append(jnp.square(optax.tree.norm(grads)))
        updates, opt_state[name] = txs[name].update(
            grads, opt_state[name], params[name]
        )
        params[name] = optax.apply_updates(params[name], updates)
        metrics.update(aux, **{f"{name}_loss": loss})

    def step_policy(slow):
        o, a = policy_batch["observation"], policy_batch["action"]
        # The policy's action has no flag where the encoding is compact.
        advantage = smaller(slow, o, a) - value(params["v"], o)
        step("pi", policy_loss, _fitted(policy_batch, net), advantage, options, net)

    o, a = batch["observation"], batch["action"]
    q = smaller(target, o, a)
    next_value = value(params["v"], batch["next"])
    step("v", v_loss, batch, q, options.expectile)
    if options.order == "iql":
        step_policy(target)
        next_value = value(params["v"], batch["next"])
    step("q", q_loss, batch, next_value, options)
    target = optax.incremental_update(params["q"], target, options.rate)
    if options.order == "coda":
        step_policy(target)
    metrics["loss"] = metrics["v_loss"] + metrics["q_loss"] + metrics["pi_loss"]
    metrics["grad_norm"] = jnp.sqrt(sum(squares))
    return params, opt_state, target, metrics


def bc_update(
    params: Mapping,
    opt_state: Mapping,
    batch: Mapping,
    *,
    txs: Mapping[str, optax.GradientTransformation],
    options: Options,
    net: Net,
) -> tuple[dict, dict, dict]:
    """One update of the policy alone, every action with weight 1: behaviour cloning."""
    fit = jax.value_and_grad(policy_loss, has_aux=True)
    zero = jnp.zeros(batch["observation"].shape[:-1])
    (loss, aux), grads = fit(params["pi"], _fitted(batch, net), zero, options, net)
    updates, state = txs["pi"].update(grads, opt_state["pi"], params["pi"])
    metrics = {**aux, "pi_loss": loss, "loss": loss}
    metrics["grad_norm"] = optax.tree.norm(grads)
    return {"pi": optax.apply_updates(params["pi"], updates)}, {"pi": state}, metrics


def loss(
    params: Mapping,
    batch: Mapping,
    policy_batch: Mapping,
    *,
    options: Options,
    net: Net,
) -> tuple[Any, dict]:
    """The sum of the three losses, the critics being their own slow copies."""
    fixed = lax.stop_gradient(params)
    if "q" not in params:
        zero = jnp.zeros(policy_batch["observation"].shape[:-1])
        return policy_loss(params["pi"], _fitted(policy_batch, net), zero, options, net)
    q = smaller(fixed["q"], batch["observation"], batch["action"])
    lv, aux_v = v_loss(params["v"], batch, q, options.expectile)
    lq, aux_q = q_loss(params["q"], batch, value(fixed["v"], batch["next"]), options)
    o, a = policy_batch["observation"], policy_batch["action"]
    advantage = smaller(fixed["q"], o, a) - value(fixed["v"], o)
    fitted = _fitted(policy_batch, net)
    lp, aux_p = policy_loss(params["pi"], fitted, advantage, options, net)
    metrics = {"v_loss": lv, "q_loss": lq, "pi_loss": lp, **aux_v, **aux_q, **aux_p}
    return lv + lq + lp, metrics


def act(
    params: Mapping,
    state: Float[Array, "*batch n"],
    context: Float[Array, "*batch k"],
    *,
    net: Net,
) -> Float[Array, "*batch A"]:
    """The policy's mean action in a state under a context, without a fictitious column.

    Args:
      params: of ``init``, or its part ``pi``.
      state, context: rows.
      net: of the policy.
    """
    mean = mean_action(
        params.get("pi", params), encode_observation(state, context, net), net
    )
    return mean[..., : net.action]


def _fitted(batch: Mapping, net: Net) -> dict:
    """The batch with the components of an action that the policy's mean has."""
    return {**batch, "action": batch["action"][..., : net.outputs]}
