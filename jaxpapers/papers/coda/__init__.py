r"""CODA: contextual goal-oriented problems from offline data.

Ying Fan, Jingling Li, Adith Swaminathan, Aditya Modi, Ching-An Cheng. "How to Solve
Contextual Goal-Oriented Problems with Offline Datasets?", arXiv 2408.07753, 2024
(NeurIPS 2024).

An agent is told a context c, an instruction, and has to reach any state of a goal set
G_c. Two data sets are at hand: transitions without rewards (s, a, s'), and examples
(c, s) of states s in G_c. CODA adds one fictitious action a+ that leads to a terminal
state s+:

$$ r((s, c), a^+) = 1[s \in G_c], \qquad r((s, c), a) = 0 \text{ for } a \in A $$

In the augmented problem every example is a transition ((s, c), a+, 1, s+) and every
transition, with any context, is ((s, c), a, 0, (s', c)): all rewards are known, without a
learned reward and without negative examples. Its optimal values are those of the original
problem, and a policy restricted to A loses nothing (``tabular``). Any offline method can
be run on it; the paper's is IQL (``iql``). As in the released code rewards are shifted by
-1, so that values are minus the discounted number of steps to the goal set.

``labels`` has the baselines' reward models (reward prediction, UDS, PDS) and goal model.

Departures. The paper's text past its introduction was not at hand: equations are those
of the authors' code, the baselines are reconstructions. ``Net.encoding="reference"`` has
that code's vectors with their zero halves, and its fictitious action of size 10 in a
column of its own, whose constant zero the policy fits too; ``compact``, the default, has
a state, an embedded context and a flag. Predicted rewards are probabilities p of the goal
set: reward p - 1 and termination with probability p, CODA's own labels where p is 0 or 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpapers import optim
from jaxpapers.method import Method, State, WarmStart
from jaxpapers.method.descent import start
from jaxpapers.options import from_config
from jaxpapers.papers.coda import iql, labels
from jaxpapers.papers.coda.iql import (
    act,
    bc_update,
    expectile_loss,
    init,
    iql_update,
    loss,
    policy_loss,
    q_loss,
    target_of,
    v_loss,
)
from jaxpapers.papers.coda.options import (
    ENCODINGS,
    LEARN,
    Net,
    Options,
    encode_action,
    encode_batch,
    encode_next,
    encode_observation,
)
from jaxpapers.papers.coda.tabular import augmented_mdp, value_iteration

__all__ = [
    "ENCODINGS", "LEARN", "RULES", "Net", "Options", "act", "augmented_mdp",
    "bc_update", "encode_action", "encode_batch", "encode_next", "encode_observation",
    "expectile_loss", "init", "iql", "iql_update", "labels", "loss", "make",
    "policy_loss", "q_loss", "read", "target_of", "v_loss", "value_iteration",
]  # fmt: skip

# Hidden layers alternate between column and row parallel; widths may be anything at the
# ends, which stay whole.
RULES = (
    (r"layer_0/kernel$", jax.P(None, "model")),
    (r"layer_0/bias$", jax.P("model")),
    (r"layer_1/kernel$", jax.P("model", None)),
)


def make(config: Any, **sizes: Any) -> Method:
    """The method of a config (see configs/coda.py).

    Its batches are those of ``encode_batch`` with an axis of ``method.updates`` after the
    rows: a step is that many updates in one scan.

    Args:
      config: groups ``net`` (``Net``), ``method`` (``Options``), ``optim``, ``train``.
      sizes: ``state, action, context, known, example, examples`` of ``Net``.

    Raises:
      ValueError: an option out of its range, ``train.accumulate``, ``optim.clip``.
    """
    net, options = read(config, **sizes)
    if config.train.accumulate != 1:
        raise ValueError(
            "train.accumulate must be 1: the value and the policy nets are updated in "
            f"turn from batches of their own, got {config.train.accumulate}"
        )
    if config.optim.get("clip", 0.0):
        raise ValueError(
            "optim.clip must be 0: the policy's gradient alone is clipped, by "
            f"method.clip; got {config.optim.clip}"
        )
    tx = optim.from_config(config.optim, config.train.steps * options.updates)
    if options.learn in ("reward", "goals"):
        return labels.method(net, options, tx)
    return _policy(net, options, tx)


def read(config: Any, **sizes: Any) -> tuple[Net, Options]:
    """The options of a config; ``sizes`` are those of ``make``."""
    net = from_config(Net, {**config.net, **sizes}, "net")
    return net, from_config(Options, config.method, "method")


def _policy(net: Net, options: Options, tx: optax.GradientTransformation) -> Method:
    clipped = tx
    if options.clip:
        clipped = optax.chain(optax.clip_by_global_norm(options.clip), tx)
    txs = {"v": tx, "q": tx, "pi": clipped}
    names = ("pi",) if options.learn == "bc" else ("v", "q", "pi")

    def init_params(key, batch):
        del batch
        params = init(key, net)
        return {name: params[name] for name in names}

    def init_opt(params):
        return {name: txs[name].init(params[name]) for name in names}

    def init_state(key, batch):
        state = start(init_params, init_opt, None, key, batch)
        extra = {} if options.learn == "bc" else {"target": target_of(state.params)}
        key = jax.random.fold_in(state.key, 0xC0)
        if options.label == "model":
            extra["reward"] = labels.init_reward(key, net, options)
        if options.goals:
            extra["goals"] = labels.init_goals(key, net, options)
        return state._replace(extra=extra)

    def update(state: State, batch):
        def one(carry, batch):
            params, opt_state, target = carry
            value, policy = encode_batch(batch, net)
            if options.label == "model":
                p = labels.goal_probability(state.extra["reward"], batch, net, options)
                value = {**value, "reward": p - 1, "done": p}
            if options.learn == "bc":
                params, opt_state, metrics = bc_update(
                    params, opt_state, policy, txs=txs, options=options, net=net
                )
            else:
                params, opt_state, target, metrics = iql_update(
                    params, opt_state, target, value, policy, txs=txs,
                    options=options, net=net,
                )  # fmt: skip
            return (params, opt_state, target), metrics

        target = state.extra.get("target", ())
        carry = (state.params, state.opt_state, target)
        (params, opt_state, target), metrics = jax.lax.scan(
            one, carry, by_update(batch)
        )
        extra = {**state.extra, "target": target} if target else state.extra
        metrics = {name: x.mean() for name, x in metrics.items()}
        metrics["param_norm"] = optax.tree.norm(params)
        return State(state.step + 1, params, opt_state, extra, state.key), metrics

    def whole_loss(params, batch, key):
        del key
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        return loss(params, *encode_batch(flat, net), options=options, net=net)

    def predict(params, extra, batch):
        del extra
        return act(params, batch["policy_state"], batch["policy_context"], net=net)

    return Method(
        init_state,
        whole_loss,
        update,
        rules=RULES if len(net.hidden) > 1 else (),
        predict=predict,
        warm_start=_from_models(options),
        # Of ``extra`` nothing.
        served=lambda tree: tree.get("pi", {}),
    )


def _from_models(options: Options) -> WarmStart | None:
    """Starts with the reward or the goal model that another stage has trained."""
    name = "reward" if options.label == "model" else "goals" if options.goals else ""
    if not name:
        return None

    def parts(shapes):
        return {"params": {name: shapes.extra[name]}}

    def apply(state, restored):
        copied = jax.tree.map(jnp.copy, restored["params"][name])
        return state._replace(extra={**state.extra, name: copied})

    return WarmStart(parts, apply)


def by_update(batch: Any) -> Any:
    """Arrays (rows, updates, ...) as (updates, rows, ...)."""
    return jax.tree.map(functools.partial(jnp.swapaxes, axis1=0, axis2=1), batch)
