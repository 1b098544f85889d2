r"""Models of the baselines: which states are goals of a context, and what goals it has.

Reward prediction fits sigmoid(r(s, c)) to the examples (c, s), label 1; UDS (Yu et al.,
arXiv 2202.01741) adds unlabelled transitions with random contexts, label 0; PDS (Hu et
al., arXiv 2302.03770) is pessimistic over an ensemble. Goal prediction fits
p(goal | c), a mixture of Gaussians with diagonal covariances, for a goal-conditioned
policy. All are reconstructions: the authors released CODA alone.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from jaxpapers.method import Method, State
from jaxpapers.method.descent import start
from jaxpapers.papers.coda.iql import forward, perceptron
from jaxpapers.papers.coda.options import Net, Options, embed, one_hot

GOAL = 2
"""Components of a state that are a goal: its position."""


def init_reward(key: Key[Array, ""], net: Net, options: Options) -> dict[str, Any]:
    """Members ``reward_i``, perceptrons of state and embedded context."""
    sizes = (net.state + _embedded(net), *options.model_hidden, 1)
    keys = jax.random.split(key, options.members)
    return {
        f"reward_{i}": perceptron(keys[i], sizes, "torch")
        for i in range(options.members)
    }


def logits(
    params: Mapping,
    state: Float[Array, "*b n"],
    context: Float[Array, "*b k"],
    net: Net,
) -> Array:
    """Log-odds of every member that states are goals of contexts, (members, *b)."""
    x = jnp.concatenate([state, embed(context, net)], -1)
    return jnp.stack([forward(p, x)[..., 0] for p in params.values()])


def goal_probability(
    params: Mapping, batch: Mapping, net: Net, options: Options
) -> Float[Array, " *b"]:
    """The ensemble's probability that the states of a batch are goals.

    Their mean, or their least minus ``options.width`` standard deviations, in [0, 1].
    """
    p = jax.nn.sigmoid(logits(params, batch["state"], batch["context"], net))
    if options.pessimism == "mean":
        return p.mean(0)
    return jnp.clip(p.min(0) - options.width * p.std(0), 0.0, 1.0)


def reward_loss(
    params: Mapping, batch: Mapping, net: Net, options: Options
) -> tuple[Any, dict]:
    """Cross-entropy of the members, of examples and, with negatives, other pairs."""
    z = logits(params, batch["state"], batch["context"], net)
    label = batch["goal"][None]
    errors = optax.sigmoid_binary_cross_entropy(z, jnp.broadcast_to(label, z.shape))
    kept = jnp.ones_like(label) if options.negatives else label
    loss = (errors * kept).sum() / (jnp.maximum(kept.sum(), 1) * len(z))
    right = ((z > 0) == (label > 0.5)).mean()
    return loss, {"accuracy": right}


def init_goals(key: Key[Array, ""], net: Net, options: Options) -> dict[str, Any]:
    """A perceptron from an embedded context to weights, means and log deviations."""
    sizes = (
        len(net.examples) or net.example,
        *options.model_hidden,
        options.goals * (1 + 2 * GOAL),
    )
    return {"mixture": perceptron(key, sizes, "torch")}


def mixture(
    params: Mapping, context: Float[Array, "*b k"], net: Net, options: Options
) -> tuple[Any, Any, Any]:
    """Log weights (*b, goals), means and deviations (*b, goals, 2)."""
    out = forward(params["mixture"], _embed_example(context, net))
    weight, rest = out[..., : options.goals], out[..., options.goals :]
    mean, log_std = jnp.split(rest, 2, -1)
    shape = (*context.shape[:-1], options.goals, GOAL)
    std = jnp.exp(jnp.clip(log_std.reshape(shape), -5.0, 2.0))
    return jax.nn.log_softmax(weight), mean.reshape(shape), std


def goals_loss(
    params: Mapping, batch: Mapping, net: Net, options: Options
) -> tuple[Any, dict]:
    """Negative log-likelihood of the examples' positions, given their contexts."""
    weight, mean, std = mixture(params, batch["example_context"], net, options)
    z = (batch["example_goal"][..., None, :] - mean) / std
    log_p = (-0.5 * jnp.square(z) - jnp.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)
    return -jax.nn.logsumexp(weight + log_p, -1).mean(), {}


def sample_goals(
    params: Mapping,
    key: Key[Array, ""],
    context: Float[Array, "*b k"],
    net: Net,
    options: Options,
) -> Float[Array, "*b 2"]:
    """A goal for every context."""
    weight, mean, std = mixture(params, context, net, options)
    key_choice, key_noise = jax.random.split(key)
    choice = jax.random.categorical(key_choice, weight)[..., None, None]
    mean, std = (jnp.take_along_axis(x, choice, -2)[..., 0, :] for x in (mean, std))
    return mean + std * jax.random.normal(key_noise, mean.shape)


def method(net: Net, options: Options, tx: optax.GradientTransformation) -> Method:
    """The training run of a reward or a goal model: its params are {name: model}."""
    name = options.learn
    begin = {"reward": init_reward, "goals": init_goals}[name]
    objective = {"reward": reward_loss, "goals": goals_loss}[name]

    def loss(params, batch, key):
        del key
        return objective(params[name], batch, net, options)

    def init(key, batch):
        return start(
            lambda key, _: {name: begin(key, net, options)}, tx.init, None, key, batch
        )

    def update(state: State, batch):
        def one(carry, batch):
            params, opt_state = carry
            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
                params, batch, state.key
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            norm = optax.tree.norm(grads)
            metrics = {**metrics, "loss": value, "grad_norm": norm}
            return (optax.apply_updates(params, updates), opt_state), metrics

        batch = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), batch)
        carry = (state.params, state.opt_state)
        (params, opt_state), metrics = jax.lax.scan(one, carry, batch)
        metrics = {k: x.mean() for k, x in metrics.items()}
        return State(state.step + 1, params, opt_state, (), state.key), metrics

    def predict(params, extra, batch):
        del extra
        if name == "goals":
            return mixture(params[name], batch["example_context"], net, options)[1]
        return goal_probability(params[name], batch, net, options)

    return Method(init, loss, update, predict=predict)


def _embedded(net: Net) -> int:
    return len(net.known) or net.context


def _embed_example(context: Any, net: Net) -> Any:
    """Contexts of the examples; a goal-conditioned policy's own contexts are goals."""
    return one_hot(context, net.examples) if net.examples else context
