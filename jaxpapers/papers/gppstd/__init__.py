r"""GPPSTD (reconstructed): exploration by posterior samples of a Gaussian-process value.

Ying Fan, Letian Chen, Yizhou Wang. "Efficient Model-Free Reinforcement Learning Using
Gaussian Process", arXiv 1812.04359, 2018.

A reconstruction: of the paper only the abstract could be read, and there is no published
code. The abstract says: posterior sampling in model-free reinforcement learning under a
Gaussian-process hypothesis for continuous states; demonstrations lower the expected
uncertainty and help to explore; both in one process. All else here is put together from
its ancestors: PSRL (Osband, Russo and Van Roy, 2013), RLSVI (Osband, Van Roy and Wen,
2016), GPTD (Engel, Mannor and Meir, 2003, 2005), GPQ (Grande, Walsh and How, 2014). No
number of the paper is known, and none is claimed.

Values of (state, action) z are a process of which rewards tell in one of two ways:

$$ Q \sim GP(m_0, k), \qquad k(z, z') = v\, k_S(s, s')\, k_A(a, a') $$
$$ \text{regression: } y_i = r_i + \gamma (1 - d_i) \max_{a'} Q_s(s'_i, a')
   = Q(z_i) + \varepsilon_i $$
$$ \text{temporal: } r_i = Q(z_i) - \gamma (1 - d_i) Q(z'_i) + n_i $$

Q_s is the function drawn for the next step of the episode, or in the sweep before, so
that uncertainty travels through time. Every episode one function is drawn (Matheron's
rule) and followed greedily; its transitions join those that the next draw is conditioned
on. Demonstrations, of any quality, are transitions that are there at the start. With one
process per step (``form="staged"``) each has a factorisation of its own; the stationary
form factorises once per episode, and sweeps.

One training step is one episode. The environment, the transitions and the returns are in
``State.extra``; ``params`` are the logs of the prior's hyper-parameters, which move only
if ``method.evidence_every`` asks for it. ``train.members`` agents are one program.

Departures from exact Bayes: the draws of two stages are those of independent priors,
while values of stages are tied by the same dynamics; the noise stands for what a max over
a finite sample leaves out as well.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers import optim
from jaxpapers.method import Method, State, population
from jaxpapers.ops import gaussian_process as gp
from jaxpapers.options import from_config
from jaxpapers.papers.gppstd.buffer import (
    Transitions,
    add,
    check_fits,
    empty,
    stages,
)
from jaxpapers.papers.gppstd.episodes import (
    Episode,
    act,
    demonstrate,
    demonstrator,
    greedy,
    run,
)
from jaxpapers.papers.gppstd.options import DEMONSTRATIONS, Options, Prior
from jaxpapers.papers.gppstd.problem import Problem
from jaxpapers.papers.gppstd.values import (
    Values,
    candidates,
    draw_values,
    log_evidence,
    q_values,
    td_targets,
    uncertainty,
    with_actions,
)

__all__ = [
    "DEMONSTRATIONS", "Episode", "Options", "Prior", "Problem", "Transitions", "Values",
    "act", "add", "candidates", "check_fits", "demonstrate", "demonstrator",
    "draw_values", "empty", "greedy", "init", "log_evidence", "loss", "make",
    "q_values", "read", "run", "sampler", "single", "stages", "td_targets", "uncertainty",
    "update", "with_actions",
]  # fmt: skip

LOSS_EPISODES = 4
"""Episodes whose returns ``loss`` explains."""


def init(
    key: Key[Array, ""],
    problem: Problem,
    prior: Prior,
    options: Options,
    episodes: int,
) -> tuple[dict, dict]:
    """Parameters and ``State.extra`` before the first episode.

    Args:
      key: of the layout and the demonstrations.
      problem, prior, options: of the agent.
      episodes: of its life.

    Returns:
      Logs of the hyper-parameters; and ``buffer``, ``layout``, ``done`` (episodes so
      far), ``returns``, ``steps`` and ``reached`` (episodes,); of the last episode
      ``path`` (horizon + 1, D), its states, and ``rewards`` (horizon,).
    """
    key_layout, key_starts, key_demonstrations = jax.random.split(key, 3)
    params = jax.tree.map(jnp.asarray, problem.params(prior))
    layout = problem.layout(key_layout)
    buffer = empty(problem, options)
    count = options.demonstration_episodes
    if count:
        starts = lax.map(
            lambda k: problem.reset(k, layout), jax.random.split(key_starts, count)
        )
        shown = demonstrate(key_demonstrations, starts, problem, options)
        model = problem.model(prior, params)
        buffer, _ = lax.scan(
            lambda kept, rows: (add(kept, rows, model, options), None),
            buffer, shown.rows,
        )  # fmt: skip
    history = jnp.zeros(episodes)
    return params, {
        "buffer": buffer,
        "layout": layout,
        "done": jnp.zeros((), jnp.int32),
        "returns": history,
        "steps": history.astype(jnp.int32),
        "reached": history.astype(bool),
        "path": jnp.zeros((problem.horizon + 1, problem.width)),
        "rewards": jnp.zeros(problem.horizon),
    }


def update(
    state: State, batch: Any, *, problem: Problem, prior: Prior, options: Options,
    optimizer: Any,
) -> tuple[State, dict[str, Array]]:  # fmt: skip
    """One episode: a draw, its greedy policy, its transitions, perhaps the evidence.

    Args:
      state: of one agent.
      batch: not read: the environment is in the state.
      problem, prior, options: of the agent.
      optimizer: of the ascent of the evidence.

    Returns:
      The state after it; metrics: ``loss`` (-log evidence of a target), ``return``,
      ``steps``, ``reached``, ``uncertainty`` (mean posterior standard deviation of Q
      along the episode), ``sweeps``, ``change``, ``jitter``, ``rows`` (transitions
      kept).
    """
    del batch
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    key_values, key_reset, key_episode = keys
    extra, params = state.extra, state.params
    buffer, model = extra["buffer"], problem.model(prior, state.params)
    values = draw_values(key_values, model, buffer, problem, options)
    start = problem.reset(key_reset, extra["layout"])
    policy = greedy(values, problem, options)
    first = state.step * (problem.horizon + 1)
    episode = run(key_episode, start, policy, first, problem, options)
    kept = add(buffer, episode.rows, model, options)
    evidence = jax.vmap(gp.log_evidence)(values.post).sum()
    count = buffer.mask.sum()
    if options.evidence_every:
        due = (state.step + 1) % options.evidence_every == 0
        low, high = problem.box(prior)

        def ascend():
            best = gp.maximise(
                lambda m: log_evidence(m, values, buffer, options), model, low, high,
                optimizer, options.evidence_steps,
            )  # fmt: skip
            return {name: getattr(best.model, name) for name in params}

        params = lax.cond(due & (count > 0), ascend, lambda: params)
    x = episode.rows.x[:, None] if options.form == "staged" else episode.rows.x[None]
    spread = uncertainty(values, x).reshape(-1)
    total, alive = episode.reward.sum(), episode.rows.mask
    new = {
        **extra,
        "buffer": kept,
        "done": extra["done"] + 1,
        "returns": extra["returns"].at[state.step].set(total),
        "steps": extra["steps"].at[state.step].set(episode.steps),
        "reached": extra["reached"].at[state.step].set(episode.terminated),
        "path": episode.inputs,
        "rewards": episode.reward,
    }
    metrics = {
        "loss": -evidence / jnp.maximum(count, 1),
        "return": total,
        "steps": episode.steps,
        "reached": episode.terminated,
        "uncertainty": (spread * alive).sum() / alive.sum(),
        "sweeps": values.sweeps.mean(),
        "change": values.change.max(),
        "jitter": values.post.jitter.max(),
        "rows": kept.mask.sum(),
    }
    after = state._replace(step=state.step + 1, params=params, extra=new)
    return after, {k: v.astype(jnp.float32) for k, v in metrics.items()}


def loss(
    params: dict, batch: Any, key: Key[Array, ""], *, problem: Problem, prior: Prior,
    options: Options,
) -> tuple[Float[Array, ""], dict[str, Array]]:  # fmt: skip
    """-log evidence, per transition, of the returns of a few episodes of random actions.

    What the hyper-parameters are worth before any episode; ``update`` does not use it.

    Args:
      params: logs of the hyper-parameters.
      batch: not read.
      key: of the episodes.
      problem, prior, options: of the agent.
    """
    del batch
    random = dataclasses.replace(
        options, demonstrations="random", demonstration_episodes=LOSS_EPISODES
    )
    key_layout, key_starts, key_run = jax.random.split(key, 3)
    layout = problem.layout(key_layout)
    starts = lax.map(
        lambda k: problem.reset(k, layout), jax.random.split(key_starts, LOSS_EPISODES)
    )
    rows = demonstrate(key_run, starts, problem, random).rows

    def back(after, xs):
        reward, done = xs
        value = reward + options.gamma * jnp.where(done, 0, after)
        return value, value

    returns = jax.vmap(
        lambda r: lax.scan(back, jnp.zeros(()), (r.reward, r.done), reverse=True)[1]
    )(rows)
    # Every few steps: neighbours say the same.
    every = max(1, problem.horizon // 16)
    x, y, mask = (
        v[:, ::every].reshape(-1, *v.shape[2:]) for v in (rows.x, returns, rows.mask)
    )
    model = problem.model(prior, params)
    y = jnp.where(mask, y, 0)
    value = -gp.evidence(model, gp.observations(model, x, y, mask)) / mask.sum()
    return value, {"transitions": mask.sum().astype(jnp.float32)}


def sampler(
    params: dict,
    key: Key[Array, ""],
    states: Float[Array, "M D"],
    *,
    extra: dict,
    problem: Problem,
    prior: Prior,
    options: Options,
) -> tuple[Float[Array, "M A"], Float[Array, " M"]]:
    """Actions of a function drawn for the first step of an episode, with their values.

    Args:
      params: logs of the hyper-parameters.
      key: of the draw.
      states: in [0, 1]^D, see ``Problem.inputs``.
      extra: ``State.extra``.
      problem, prior, options: of the agent.

    Returns:
      Columns of the action at each state, and Q there.
    """
    key_values, key_act = jax.random.split(key)
    model = problem.model(prior, params)
    values = draw_values(key_values, model, extra["buffer"], problem, options)
    stage = jax.tree.map(lambda v: v[0], values)

    def one(pair):
        key, state = pair
        action = act(key, stage, state, problem, options)
        return action, q_values(stage, jnp.concatenate([state, action])[None], options)[
            0
        ]

    return lax.map(one, (jax.random.split(key_act, len(states)), states))


def single(
    problem: Problem,
    prior: Prior,
    options: Options,
    optimizer: Any,
    episodes: int,
) -> Method:
    """The method of one agent; see ``make``."""
    bound = {"problem": problem, "prior": prior, "options": options}

    def init_state(key, batch):
        del batch
        key, key_init = jax.random.split(key)
        params, extra = init(key_init, problem, prior, options, episodes)
        return State(jnp.zeros((), jnp.int32), params, (), extra, key)

    return Method(
        init_state,
        functools.partial(loss, **bound),
        functools.partial(update, **bound, optimizer=optimizer),
        functools.partial(sampler, **bound),
        resize=longer,
    )


def longer(state: State, target: State) -> State:
    """A state whose histories have the length of another number of episodes.

    Raises:
      ValueError: another part has another shape.
    """
    extra = dict(state.extra)
    for name in ("returns", "steps", "reached"):
        value, wanted = jnp.asarray(extra[name]), target.extra[name].shape
        room = wanted[-1] - value.shape[-1]
        value = value[..., : wanted[-1]]
        width = [(0, 0)] * (value.ndim - 1) + [(0, max(room, 0))]
        extra[name] = jnp.pad(value, width)
    state = state._replace(extra=extra)
    stored = jax.tree_util.tree_leaves_with_path(state)
    for (path, there), leaf in zip(stored, jax.tree.leaves(target)):
        if there.shape != leaf.shape:
            raise ValueError(
                f"the run's {jax.tree_util.keystr(path)} has shape {there.shape}, "
                f"expected {leaf.shape}: method and data must not change"
            )
    return state


def read(config: Any) -> tuple[Prior, Options]:
    """Prior and options of a config.

    Raises:
      ValueError: a field that is unknown or out of range.
    """
    return (
        from_config(Prior, config.prior, "prior"),
        from_config(Options, config.method, "method"),
    )


def make(config: Any, *, environment: Any) -> Method:
    """``train.members`` agents of a config (configs/gppstd.py), each with its own keys.

    Args:
      config: groups ``prior``, ``method``, ``optim`` (of the evidence), ``train``.
      environment: of ``ops.environments``.

    Raises:
      ValueError: a field that is unknown or out of range, ``train.accumulate`` above 1,
        transitions that do not fit the buffer where none may be evicted.
    """
    prior, options = read(config)
    train, problem = config.train, Problem(environment)
    if train.accumulate != 1:
        raise ValueError(
            "train.accumulate must be 1: a step of gppstd is an episode, which has no "
            f"micro-batches; got {train.accumulate}"
        )
    problem.model(prior)
    check_fits(problem, options, train.steps)
    if options.demonstrations not in ("none", "random"):
        problem.expert_known()
    optimizer = optim.from_config(config.optim, max(options.evidence_steps, 1))
    agent = single(problem, prior, options, optimizer, train.steps)
    return population(agent, train.members)._replace(resize=longer)
