"""Contextual goals in mazes, from offline data without rewards: success by context.

Rows are the configured learner, the same with other labels of the data, and behaviour
cloning. Episodes run in PointMaze, which MuJoCo simulates, or in a point mass without it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import maze_figures
from jaxpapers.papers import coda
from jaxpapers.study import (
    Data,
    Finding,
    Row,
    Stage,
    Study,
    Table,
    with_fields,
    with_seed,
)
from jaxpapers.tasks import goal_evaluation as evaluation
from jaxpapers.tasks.goal_data import PROBLEMS, Batches, Problem, load

CONTEXT = {"rooms": 1, "cells": 2, "goals": 2}
SHOWN = 3
"""Paths of each context that a picture has."""


def abstract(config: Any) -> Data:
    """Shapes of a global training batch, and the sizes of states and contexts.

    Raises:
      ValueError: a problem that is not known.
    """
    c, m = config.data, config.method
    if c.problem not in PROBLEMS:
        raise ValueError(f"data.problem must be one of {PROBLEMS}, got {c.problem!r}")
    hindsight = c.rows == "hindsight"
    size = 2 if hindsight else CONTEXT[c.problem]
    rooms = (2.0, 3.0, 4.0) if c.problem == "rooms" else ()
    facts = {
        "state": 4, "action": 2, "context": size, "known": () if hindsight else rooms,
        "example": CONTEXT[c.problem], "examples": rooms,
    }  # fmt: skip

    def rows(*shape):
        whole = (c.batch, m.updates, *shape)
        return jax.ShapeDtypeStruct(whole, jnp.float32)

    if m.learn == "goals":
        shapes = {"example_context": rows(facts["example"]), "example_goal": rows(2)}
    else:
        shapes = {
            "state": rows(4), "action": rows(2), "next": rows(4), "context": rows(size),
            "fictitious": rows(), "goal": rows(), "policy_state": rows(4),
            "policy_action": rows(2), "policy_context": rows(size),
        }  # fmt: skip
    return Data(None, shapes, facts, work=m.updates, unit="samples")


def read(config: Any) -> Data:
    """Transitions and examples of a training run.

    Raises:
      ValueError: see ``goal_data``.
    """
    c, m = config.data, config.method
    problem = load(config)
    batches = Batches(
        problem, rows=c.rows, ratio=c.ratio, sampling=c.sampling, updates=m.updates,
        discount=m.discount, goals=m.learn == "goals", seed=c.seed,
    )  # fmt: skip
    if c.rows == "coda":
        batches.fictitious(c.batch)
    counts = np.diff(problem.groups)
    return abstract(config)._replace(
        examples=batches,
        summary=f"{len(problem.states):,} transitions; {len(counts)} contexts with "
        f"{counts.min():,} to {counts.max():,} examples",
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The learner and its baselines: success of the authors' episodes and OGBench's."""
    del data  # Each stage reads the data of its config.
    problem, c = load(config), config.data
    for field in ("episodes", "horizon"):
        if c[field] < 1:
            raise ValueError(f"data.{field} must be >= 1, got {c[field]}")

    def rows(seed):
        own = with_seed(config, seed).unlock()
        del own["baselines"]
        own = own.lock()
        made = []
        for label, fields, model, told in _variants(config):
            stage = with_fields(own, fields)
            after = (
                Stage(name, _model_config(config, own, fields, model))
                if model
                else None
            )
            about = functools.partial(_measure, stage, problem, mesh, told)
            watch = functools.partial(_watch, stage, problem, mesh, told)
            made.append(Row(label, Stage(name, stage, after), about, watch=watch))
        return made

    contexts = [*dict.fromkeys(_episodes(config.data, problem).labels)]
    return Study(
        title=f"success in {c.problem} of the {c.maze} maze, {c.episodes} episodes of "
        f"each context, {c.horizon} decisions",
        metric="success",
        rising=True,
        rows=rows,
        columns=(*contexts, "decisions", "ogbench"),
        pictures={
            "learning.png": functools.partial(
                maze_figures.learning, metric="success", per_step=config.method.updates
            ),
            "paths.png": maze_figures.paths,
        },
        states=("paths.png",),
        curve="v_loss",
    )


def _variants(config: Any) -> list[tuple[str, dict, str, str]]:
    """Label, fields, the model of the stage before, and what episodes are told.

    Raises:
      ValueError: a row that is not known.
    """
    real = {"data.rows": "real", "method.label": "model"}
    hindsight = {"data.rows": "hindsight", "method.goals": config.baselines.goals}
    every: dict[str, tuple[dict, str, str]] = {
        "empirical contexts": ({"data.sampling": "empirical"}, "", "context"),
        "IQL's order": ({"method.order": "iql"}, "", "context"),
        "reference encoding": ({"net.encoding": "reference"}, "", "context"),
        "oracle reward": ({"data.rows": "oracle"}, "", "context"),
        "reward prediction": ({**real, "method.negatives": False}, "reward", "context"),
        "UDS": (real, "reward", "context"),
        "PDS": ({**real, "method.pessimism": "min"}, "reward", "context"),
        "goal prediction": (hindsight, "goals", "model"),
        "hindsight GCRL": (hindsight, "goals", "example"),
        "behaviour cloning": (
            {"data.rows": "real", "method.learn": "bc"},
            "",
            "context",
        ),
    }
    unknown = [x for x in config.baselines.rows if x not in every]
    if unknown:
        raise ValueError(
            f"baselines.rows must be among {tuple(every)}, got {tuple(unknown)}"
        )
    return [
        ("CODA", {}, "", "context"),
        *((label, *every[label]) for label in config.baselines.rows),
    ]


def _model_config(config: Any, own: Any, fields: dict, model: str) -> Any:
    """The training run of a reward or a goal model."""
    b = config.baselines
    given = {
        "method.learn": model, "train.steps": b.model_steps, "optim.lr": b.model_lr,
        "optim.hold": 0,
        "train.eval_every": 0,
    }  # fmt: skip
    if model == "goals":
        kept = {**fields, "data.rows": "hindsight"}
    else:
        kept = {
            "data.rows": "coda",
            "method.negatives": fields.get("method.negatives", True),
        }
    return with_fields(own, {**kept, **given})


def _episodes(c: Any, problem: Problem) -> evaluation.Episodes:
    return evaluation.authors_protocol(problem, c.episodes, hard=c.hard, seed=c.seed)


@functools.lru_cache(maxsize=32)
def actor(net: coda.Net) -> Callable:
    """(params, states, contexts) -> mean actions; one function for each net."""
    return lambda params, state, context: coda.act(params, state, context, net=net)


def _told(problem, episodes, told, net, options, state, seed) -> np.ndarray | None:
    """Goals in place of contexts: of the goal model, or examples of the contexts."""
    if told == "context":
        return None
    rng = np.random.default_rng([seed, 5])
    if told == "model":
        contexts = jnp.asarray(episodes.contexts)
        drawn = _goal_sampler(net, options)(
            state.extra["goals"], jax.random.key(seed), contexts
        )
        return np.asarray(drawn)
    # Contexts of a test may have no examples: the nearest one's are taken.
    distance = np.linalg.norm(
        problem.values[None] - episodes.contexts[:, None], axis=-1
    )
    group = distance.argmin(1)
    first, last = problem.groups[group], problem.groups[group + 1]
    return problem.examples[
        first + (rng.random(len(group)) * (last - first)).astype(int)
    ][:, :2]


@functools.lru_cache(maxsize=32)
def _goal_sampler(net: coda.Net, options: coda.Options) -> Callable:
    return jax.jit(
        functools.partial(coda.labels.sample_goals, net=net, options=options)
    )


@functools.lru_cache(maxsize=8)
def _gatherer(mesh: Any) -> Callable:
    return jax.jit(
        lambda tree: tree, out_shardings=jax.sharding.NamedSharding(mesh, jax.P())
    )


def _whole(tree: Any, mesh: Any) -> Any:
    """Arrays of any layout as NumPy's, on every process."""
    whole = _gatherer(mesh)(tree)
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), whole)


def _roll(config, problem, mesh, told, state, episodes) -> evaluation.Paths:
    """Paths of the policy; every process runs all episodes."""
    c = config.data
    net, options = coda.read(config, **abstract(config).facts)
    # The policy and a goal model: a few hundred kilobytes.
    kept = {k: v for k, v in state.extra.items() if k == "goals"}
    params, extra = _whole((state.params["pi"], kept), mesh)
    state = state._replace(params={"pi": params}, extra=extra)
    contexts = _told(problem, episodes, told, net, options, state, c.seed)
    source = "point" if c.source == "point" else "pointmaze"
    return evaluation.roll_out(
        actor(net), state.params["pi"], episodes,
        evaluation.arena(source, c.maze), horizon=c.horizon, hold=c.hold,
        contexts=contexts,
    )  # fmt: skip


def _watch(config, problem, mesh, told, method, state) -> dict[str, float]:
    """Success of each context and their mean; a model's own stage has none."""
    del method
    if "pi" not in state.params:
        return {}
    episodes = _episodes(config.data, problem)
    paths = _roll(config, problem, mesh, told, state, episodes)
    return _numbers(episodes, paths)


def _numbers(episodes, paths) -> dict[str, float]:
    rates = evaluation.success(episodes, paths)
    reached = paths.decisions[paths.reached]
    numbers = {"success": float(np.mean([rate for rate, _ in rates.values()]))}
    numbers |= {label: rate for label, (rate, _) in rates.items()}
    if len(reached):
        numbers["decisions"] = float(reached.mean())
    return numbers


def _measure(config, problem, mesh, told, method, state) -> Finding:
    """Both protocols, the success by context, and paths for the picture."""
    del method
    c = config.data
    episodes = _episodes(c, problem)
    paths = _roll(config, problem, mesh, told, state, episodes)
    numbers = _numbers(episodes, paths)
    tables = [_table(f"{c.episodes} episodes of each context", episodes, paths)]
    if c.ogbench:
        other = evaluation.ogbench_protocol(problem, c.ogbench, seed=c.seed)
        found = _roll(config, problem, mesh, told, state, other)
        rates = evaluation.success(other, found)
        numbers["ogbench"] = float(np.mean([rate for rate, _ in rates.values()]))
        tables.append(_table(f"OGBench's tasks, {c.ogbench} episodes", other, found))
    return Finding(
        numbers, tables, files={"paths.npz": _drawn(problem, episodes, paths)}
    )


def _table(title, episodes, paths) -> Table:
    """Success with its 95 % interval, and decisions, by context."""
    lines = []
    names = np.array(episodes.labels)
    for label, (rate, decisions) in evaluation.success(episodes, paths).items():
        low, high = wilson(rate, int((names == label).sum()))
        after = "never" if rate == 0 else decisions
        lines.append((label, rate, f"{low:.2f} to {high:.2f}", after))
    return Table(title, ("context", "success", "95 % interval", "decisions"), lines)


def wilson(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of ``count`` trials.

    Example:
      >>> [round(x, 2) for x in wilson(1.0, 20)]
      [0.84, 1.0]
    """
    z = 1.959964
    middle = (rate + z**2 / (2 * count)) / (1 + z**2 / count)
    width = (
        z
        / (1 + z**2 / count)
        * np.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    )
    return float(max(middle - width, 0)), float(min(middle + width, 1))


def _drawn(problem, episodes, paths) -> dict[str, np.ndarray]:
    """A few paths of each context, the walls, and the goal sets."""
    names = np.array(episodes.labels)
    labels = [*dict.fromkeys(episodes.labels)]
    chosen = np.concatenate([np.flatnonzero(names == x)[:SHOWN] for x in labels])
    r = episodes.regions
    return {
        "walls": problem.maze.walls,
        "xy": paths.xy[:, chosen].astype(np.float32),
        "reached": paths.reached[chosen],
        "label": np.array([labels.index(x) for x in names[chosen]]),
        "labels": np.array(labels),
        "box": np.concatenate([r.low, r.high], 1)[chosen],
        "circle": np.concatenate([r.centre, r.radius[:, None]], 1)[chosen],
    }
