r"""MPC-PSRL: posterior sampling over models, planned with by model-predictive control.

Ying Fan, Yifei Ming. "Model-based Reinforcement Learning for Continuous Control with
Posterior Sampling", arXiv 2012.09613, 2020 (ICML 2021).

At the start of every episode one model of the world is drawn from its posterior, and the
agent acts optimally for that model until the episode ends. The posterior is that of a
Bayesian linear regression on features that a network learns, exact and a D x D Gaussian;
acting optimally is the cross-entropy method over the next H actions, replanned in every
step. After the episode the features are trained further and the regression is done again.

With x = [s, a], features phi(x) in R^D, differences y = s' - s and the network's bias b:

$$ A = Z^\top Z / \sigma_n^2 + I / \sigma^2, \quad
   w_i \sim N(A^{-1} Z^\top (y_i - b_i) / \sigma_n^2,\ A^{-1}) $$
$$ s' = s + W \phi(x) + b + \sigma_n \epsilon, \quad
   a_{t:t+H} = \arg\max \sum_h r(s_h, a_h) $$

The Bayesian regret of the scheme is O~(H^{3/2} d sqrt T) for d = S + A. A step of
training is an episode: ``update`` draws, acts, trains and regresses, and the environment
lives in it. Every buffer has its final size from the start, so that one program serves a
whole run and ``method.population`` runs many seeds at once.

``network`` has the features, ``regression`` their posterior, ``models`` the model of an
episode with three baselines in its place (certainty equivalence, PETS, H-UCRL).

Departures. The paper's text past its abstract was not at hand: the algorithm and its
numbers are those of the authors' code. That code recomputes A^{-1} by a Cholesky
factorisation with growing jitter; here it is QR. A return that is not finite counts as
-inf, not 0. H-UCRL (Curi et al., 2020, arXiv 2006.08684) and PETS (Chua et al., 2018,
arXiv 1805.12114) are written from their papers on this model and planner.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpapers import optim
from jaxpapers.method import Method, State
from jaxpapers.ops import planning
from jaxpapers.ops import posterior as blr
from jaxpapers.options import from_config
from jaxpapers.papers.mpc_psrl import network, rewards
from jaxpapers.papers.mpc_psrl.episodes import Agent, Episode, run_episode
from jaxpapers.papers.mpc_psrl.models import (
    Known,
    Model,
    Regression,
    draw,
    evaluator,
    planner_space,
    predict,
    reward_of,
)
from jaxpapers.papers.mpc_psrl.network import Net
from jaxpapers.papers.mpc_psrl.options import Options, Problem
from jaxpapers.papers.mpc_psrl.regression import evident_noise, regress

__all__ = [
    "Agent", "Episode", "Known", "Model", "Net", "Options", "Problem", "Regression",
    "draw", "evaluator", "evident_noise", "longer", "make", "network", "planner_space",
    "predict", "regress", "reward_of", "rewards", "run_episode",
]  # fmt: skip


def _init_params(key, agent: Agent) -> dict[str, Any]:
    net, problem, options = agent.net, agent.problem, agent.options
    parts = {"dynamics": (net.hidden, problem.outputs)}
    if options.reward == "learned":
        parts["reward"] = (net.reward_hidden, 1)

    def one(key):
        keys = jax.random.split(key, 2)
        return {
            name: network.init(k, net.sizes(problem.inputs, hidden), outputs)
            for k, (name, (hidden, outputs)) in zip(keys, parts.items())
        }

    if options.agent == "ensemble":
        return jax.vmap(one)(jax.random.split(key, options.members))
    return one(key)


def _init_extra(agent: Agent) -> dict[str, Any]:
    problem, options = agent.problem, agent.options
    count = agent.episodes * problem.environment.horizon
    d = agent.net.sizes(problem.inputs, 1)[-1]

    def regression(outputs):
        if options.agent == "ensemble":
            return ()
        post = blr.prior(d, options.prior**2, (outputs,))
        return Regression(post, jnp.asarray(options.noise, jnp.float32))

    zero, one = jnp.zeros(problem.inputs), jnp.ones(problem.inputs)
    learned = options.reward == "learned"
    return {
        "x": jnp.zeros((count, problem.inputs)),
        "y": jnp.zeros((count, problem.outputs)),
        "r": jnp.zeros(count),
        "returns": jnp.zeros(agent.episodes),
        "known": Known(
            network.Scaler(zero, one),
            regression(problem.outputs),
            regression(1) if learned else (),
        ),
    }


def _remember(extra: dict, episode: Episode, slot: Any) -> dict[str, Any]:
    """The buffers with an episode in a slot."""
    seen, length = episode.observations, len(episode.rewards)
    rows = {
        "x": jnp.concatenate([seen[:-1], episode.actions], 1),
        "y": jnp.diff(seen, axis=0),
        "r": episode.rewards,
    }
    new = {
        k: lax.dynamic_update_slice_in_dim(extra[k], v, slot * length, 0)
        for k, v in rows.items()
    }
    returns = extra["returns"].at[slot].set(episode.rewards.sum())
    return {**extra, **new, "returns": returns}


def _fit(state: State, extra: dict, count: Any, key: Any, agent: Agent, tx: Any):
    """All networks trained on all data: (params, opt_state, scaler, metrics)."""
    options = agent.options
    scaler = network.fit_scaler(extra["x"], count)
    epochs = {"dynamics": options.epochs, "reward": options.reward_epochs}
    targets = {"dynamics": extra["y"], "reward": extra["r"][:, None]}
    params, opt_state, metrics = {}, {}, {}
    for name, key_part in zip(state.params, jax.random.split(key, 2)):

        def one(params, opt_state, key, name=name):
            return network.fit(
                params, opt_state, extra["x"], targets[name], count, key, scaler,
                tx=tx, decay=agent.net.decays, epochs=epochs[name],
                batch=options.batch,
            )  # fmt: skip

        keys = key_part
        if options.agent == "ensemble":
            one, keys = jax.vmap(one), jax.random.split(key_part, options.members)
        fit = one(state.params[name], state.opt_state[name], keys)
        params[name], opt_state[name] = fit.params, fit.opt_state
        prefix = "" if name == "dynamics" else f"{name}_"
        metrics[f"{prefix}loss"] = fit.loss.mean()
        metrics[f"{prefix}grad_norm"] = fit.grad_norm.mean()
    return params, opt_state, scaler, metrics


def _regress(params: Any, scaler: Any, extra: dict, count: Any, agent: Agent) -> Known:
    """Regressions on the features of all data."""
    options = agent.options
    if options.agent == "ensemble":
        return Known(scaler, (), ())
    weight = (jnp.arange(len(extra["x"])) < count).astype(jnp.float32)

    def one(name, targets):
        z = network.features(params[name], scaler, extra["x"])
        y = targets - network.mean_bias(params[name])[None]
        noise = jnp.asarray(options.noise, jnp.float32)
        if options.noise_from == "evidence":
            noise = evident_noise(z, y, options.prior, weight)
        post = regress(z, y, prior=options.prior, noise=noise, weight=weight)
        return Regression(post, noise)

    learned = options.reward == "learned"
    return Known(
        scaler,
        one("dynamics", extra["y"]),
        one("reward", extra["r"][:, None]) if learned else (),
    )


def _regress_more(params: Any, known: Known, x: Any, targets: dict) -> Known:
    """Regressions after further rows, on the same features."""

    def one(name, regression):
        if not regression:
            return ()
        z = network.features(params[name], known.scaler, x)
        y = targets[name] - network.mean_bias(params[name])[None]
        noise = jnp.square(regression.noise)
        post = blr.update(regression.posterior, z, y, noise)
        return Regression(post, regression.noise)

    return Known(
        known.scaler, one("dynamics", known.dynamics), one("reward", known.reward)
    )


def _error(params: Any, known: Known, episode: Episode, agent: Agent) -> Any:
    """Root mean square error of the mean prediction of an episode's next observations."""
    seen = episode.observations
    if agent.options.agent == "ensemble":
        x = jnp.concatenate([seen[:-1], episode.actions], 1)
        mean, _ = jax.vmap(
            lambda p: network.heads(p, network.features(p, known.scaler, x))
        )(params["dynamics"])
        after = seen[:-1] + mean.mean(0)
    else:
        model = Model(
            params, known.scaler, known.dynamics.posterior.mean, (), jnp.zeros(()), ()
        )
        after, _ = predict(model, seen[:-1], episode.actions)
    return jnp.sqrt(jnp.square(after - seen[1:]).mean())


def longer(state: State, target: State) -> State:
    """A state with buffers for more episodes, to go on with a run that was to end.

    Args:
      state: with shorter buffers.
      target: State of the new shapes.

    Raises:
      ValueError: buffers that would become shorter.
    """
    extra = dict(state.extra)
    for name in ("x", "y", "r", "returns"):
        old, new = extra[name], target.extra[name]
        more = new.shape[0] - old.shape[0]
        if more < 0 or old.shape[1:] != new.shape[1:]:
            raise ValueError(f"{name} has shape {old.shape}, expected {new.shape}")
        extra[name] = jnp.pad(old, [(0, more)] + [(0, 0)] * (old.ndim - 1))
    return state._replace(extra=extra)


def make(config: Any, problem: Problem) -> Method:
    """Binds a config, groups ``net``, ``method``, ``planner``, ``optim`` and ``train``.

    A step of the method is one episode; ``train.steps`` is their number. ``sampler`` is
    the policy: (params, key, observation (S,), *, extra) -> action (A,).

    Args:
      config: of a run.
      problem: environment and oracle.

    Raises:
      ValueError: values out of range; a learned or an oracle's reward that the problem
        does not have; ``train.accumulate`` above 1: the minibatches are the method's own.
    """
    agent = Agent(
        problem,
        from_config(Net, config.net, "net"),
        from_config(Options, config.method, "method"),
        from_config(planning.Options, config.planner, "planner"),
        config.method.capacity or max(config.train.steps, 1),
    )
    if config.train.accumulate != 1:
        raise ValueError(
            "train.accumulate divides a batch of examples, of which this method has "
            f"none: its minibatches are method.batch; got {config.train.accumulate}"
        )
    options = agent.options
    if options.reward == "oracle" and problem.oracle is None:
        raise ValueError(
            "method.reward=oracle needs a reward function of observations, which this "
            "problem does not have; use method.reward=learned"
        )
    tx = optim.from_config(config.optim, config.train.steps)
    length = problem.environment.horizon

    def init(key, batch):
        del batch
        key, key_params = jax.random.split(key)
        params = _init_params(key_params, agent)
        opt_init = jax.vmap(tx.init) if options.agent == "ensemble" else tx.init
        opt_state = {name: opt_init(part) for name, part in params.items()}
        return State(
            jnp.zeros((), jnp.int32), params, opt_state, _init_extra(agent), key
        )

    def update(state, batch):
        del batch
        k = state.step
        key_draw, key_run, key_fit = jax.random.split(
            jax.random.fold_in(state.key, k), 3
        )
        old = state.extra["known"]
        model = draw(key_draw, state.params, old, options)
        random = k < options.random_episodes
        episode = run_episode(model, key_run, random, agent)
        error = _error(state.params, old, episode, agent)
        slot = k % agent.episodes
        extra = _remember(state.extra, episode, slot)
        count = jnp.minimum(k + 1, agent.episodes) * length

        def refit():
            params, opt_state, scaler, metrics = _fit(
                state, extra, count, key_fit, agent, tx
            )
            return (
                params,
                opt_state,
                _regress(params, scaler, extra, count, agent),
                metrics,
            )

        def keep():
            rows = {k: lax.dynamic_slice_in_dim(extra[k], slot * length, length)
                    for k in ("x", "y", "r")}  # fmt: skip
            targets = {"dynamics": rows["y"], "reward": rows["r"][:, None]}
            known = _regress_more(state.params, old, rows["x"], targets)
            shapes = jax.eval_shape(refit)[3]
            metrics = {name: jnp.zeros(x.shape, x.dtype) for name, x in shapes.items()}
            return state.params, state.opt_state, known, metrics

        if options.refit_every == 1:
            params, opt_state, known, metrics = refit()
        else:
            params, opt_state, known, metrics = lax.cond(
                k % options.refit_every == 0, refit, keep
            )
        metrics |= {"return": episode.rewards.sum(), "model_error": error}
        after = State(k + 1, params, opt_state, {**extra, "known": known}, state.key)
        return after, metrics

    def loss(params, batch, key):
        """Likelihood of transitions x (B, S + A), y (B, S) and rewards r (B,)."""
        del key
        x, weight = batch["x"], jnp.ones(len(batch["x"]))
        scaler = network.fit_scaler(x, len(x))
        targets = {"dynamics": batch["y"], "reward": batch["r"][:, None]}

        def total(params):
            parts = {
                name: network.likelihood(
                    part, x, targets[name], weight, scaler, agent.net.decays
                )
                for name, part in params.items()
            }
            value = jnp.stack([v for v, _ in parts.values()]).sum()
            return value, parts["dynamics"][1]

        if options.agent != "ensemble":
            return total(params)
        values, metrics = jax.vmap(total)(params)
        return values.mean(), {k: v.mean() for k, v in metrics.items()}

    def sampler(params, key, observation, *, extra):
        key_draw, key_plan = jax.random.split(key)
        model = draw(key_draw, params, extra["known"], options)
        space = planner_space(problem, options)
        found = planning.plan(
            evaluator(model, problem, options), observation, key_plan,
            planning.start(agent.planner, space), agent.planner, space,
        )  # fmt: skip
        return found.action[: problem.actions]

    return Method(init, loss, update, sampler, resize=longer)
