"""Exploration: agents that have to find the reward, with demonstrations or without."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import frames, value_figures
from jaxpapers.ops import environments as envs
from jaxpapers.papers import gppstd
from jaxpapers.study import Data, Finding, Row, Stage, Study, with_fields, with_seed
from jaxpapers.tasks import demonstrations

LAST = 10
"""Episodes of which means are compared."""
SOLVED = (0.5, 8)
"""Deep Sea: an agent has solved it after 8 of 10 episodes with a return above 0.5."""
INPUTS = {
    "deep_sea": ("step", "column"),
    "mountain_car": ("position", "velocity"),
    "mountain_car_continuous": ("position", "velocity"),
    "chain": ("position",),
    "pendulum": ("cos theta", "sin theta", "velocity"),
}
"""Environment -> names of its inputs."""
NAMES = tuple(INPUTS)


def environment(config: Any) -> Any:
    """The environment that ``config.data`` names.

    Raises:
      ValueError: unknown name, or a size or length below what it can have.
    """
    name, length = config.data.environment, config.data.length
    if name not in NAMES:
        raise ValueError(f"data.environment must be one of {NAMES}, got {name!r}")
    if name == "deep_sea":
        if length:
            raise ValueError("data.length: episodes of deep_sea have data.size steps")
        return envs.DeepSea(size=config.data.size)
    found = {
        "mountain_car": envs.MountainCar(),
        "mountain_car_continuous": envs.MountainCarContinuous(),
        "chain": envs.Chain(),
        "pendulum": envs.PENDULUM_V1,
    }[name]
    if length < 0:
        raise ValueError(f"data.length must be >= 0, got {length}")
    return dataclasses.replace(found, horizon=length) if length else found


def abstract(config: Any) -> Data:
    """The environment; there are no examples."""
    world = environment(config)
    work = config.train.members * world.horizon
    return Data(None, {}, {"environment": world}, work=work, unit="environment steps")


def read(config: Any) -> Data:
    """The environment, with a line about it."""
    world, method = environment(config), config.method
    count = method.demonstration_episodes
    shown = f", {count} {method.demonstrations} episodes shown" if count else ""
    return abstract(config)._replace(
        summary=f"{config.data.environment}: episodes of {world.horizon} steps{shown}"
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """Posterior sampling beside other ways to explore, and kinds of demonstrations."""
    del data, mesh
    if config.data.table:
        return demonstrations.comparison(config, environment(config))
    sea = config.data.environment == "deep_sea"
    variants = _sea(config) if sea else _demonstrated(config)

    def rows(seed):
        own = with_seed(config, seed)
        others = {label: with_fields(own, fields) for label, fields in variants.items()}
        return [
            Row(
                _label(config), Stage(name, own), functools.partial(measure, own, True)
            ),
            *(
                Row(label, Stage(name, c), functools.partial(measure, c, False))
                for label, c in others.items()
                if c.to_dict() != own.to_dict()
            ),
        ]

    world, members = environment(config), config.train.members
    what = "share of agents that solve it" if sea else f"return, last {LAST} episodes"
    return Study(
        title=f"{config.data.environment}: {what}; {members} agents, "
        f"{config.train.steps} episodes of {world.horizon} steps; GPPSTD reconstructed",
        metric="solved" if sea else "return",
        rising=True,
        rows=rows,
        columns=("episodes", "return") if sea else ("reached", "first", "steps"),
        pictures={
            "values.png": value_figures.values,
            "frames.png": functools.partial(
                frames.episodes, kind=config.data.environment
            ),
        },
        states=("values.png", "frames.png"),
        curve="return",
        unit="return",
    )


def _label(config: Any) -> str:
    shown = config.method.demonstration_episodes
    return "GPPSTD" + f", {config.method.demonstrations} shown" * bool(shown)


def _sea(config: Any) -> dict[str, Mapping[str, Any]]:
    """Other rows of Deep Sea."""
    stationary = {"method.form": "stationary", "method.gamma": 0.99}
    rows = config.method.buffer * config.data.size
    whole = stationary | {"method.buffer": min(rows, 256)}
    temporal = whole | {"method.likelihood": "temporal", "method.relinearise": 3}
    return {
        "GPPSTD, one process": whole,
        "GPPSTD, temporal": temporal,
        "GPPSTD, temporal (2005)": temporal | {"method.noise": "monte_carlo"},
        "RLSVI, same features": {"method.explore": "rlsvi"},
        "posterior mean": {"method.explore": "mean"},
        "epsilon-greedy": {"method.explore": "epsilon"},
    }


def _demonstrated(config: Any) -> dict[str, Mapping[str, Any]]:
    """Other rows with demonstrations: kinds of them, and ways to explore."""
    count = max(config.method.demonstration_episodes, 3)

    def shown(kind, **fields):
        number = 0 if kind == "none" else count
        return {
            "method.demonstrations": kind,
            "method.demonstration_episodes": number,
            **{f"method.{k}": v for k, v in fields.items()},
        }

    rows: dict[str, Mapping[str, Any]] = {
        "GPPSTD": shown("none"),
        **{
            f"GPPSTD, {kind} shown": shown(kind)
            for kind in ("expert", "noisy", "partial", "random")
        },
        "RLSVI": shown("none", explore="rlsvi"),
        "posterior mean": shown("none", explore="mean"),
        "posterior mean, expert shown": shown("expert", explore="mean"),
        "epsilon-greedy": shown("none", explore="epsilon"),
        "epsilon-greedy, expert shown": shown("expert", explore="epsilon"),
    }
    if config.method.form == "stationary":
        rows["GPPSTD, temporal, expert shown"] = shown(
            "expert", likelihood="temporal", relinearise=3
        )
    if config.data.environment == "pendulum":  # Nobody shows that.
        rows = {label: x for label, x in rows.items() if "shown" not in label}
    return rows


def measure(config: Any, pictured: bool, method: Any, state: Any) -> Finding:
    """Numbers and curves of the episodes so far, over the agents.

    ``solved``: share of agents with ``SOLVED``; ``episodes``: first episode after which
    that held, on average, the number of all where it never did; ``return``: mean of the
    last ones; ``reached``: share of agents of which an episode has ended before its
    horizon, ``first``: which one, on average, or the number of all; ``steps``: mean of
    the last ones. Before the first episode all are 0.
    """
    extra = jax.device_get(state.extra)
    done = int(extra["done"][0])
    returns, steps = (extra[k][:, :done] for k in ("returns", "steps"))
    reached = extra["reached"][:, :done]
    numbers = {"episodes done": float(done)}
    bar, times = SOLVED
    if config.data.environment == "deep_sea":
        good = _window(returns > bar, LAST) * LAST >= times - 1e-6
        numbers |= {
            "solved": float((good[:, -1:] > 0).any(1).mean()) if done else 0.0,
            "episodes": _first(good, LAST),
        }
    else:
        numbers |= {
            "reached": float(reached.any(1).mean()) if done else 0.0,
            "first": _first(reached, 1),
            "steps": float(steps[:, -LAST:].mean()) if done else 0.0,
        }
    numbers["return"] = float(returns[:, -LAST:].mean()) if done else 0.0
    mean = _window(returns, LAST)
    x = list(range(done - mean.shape[1] + 1, done + 1))
    curves = (
        {f"return (mean of {LAST}) against episode": (x, mean.tolist())} if x else {}
    )
    files: dict[str, Any] = {
        "history.npz": {"returns": returns, "steps": steps, "reached": reached}
    }
    if done:
        problem = gppstd.Problem(environment(config))
        low, high = problem.bounds
        files["episode.npz"] = {
            "observations": low + (high - low) * extra["path"][0][: steps[0, -1] + 1],
            "rewards": extra["rewards"][0][: steps[0, -1]],
        }
        if pictured:
            first = jax.tree.map(lambda x: x[0], (state.params, state.extra))
            files["values.npz"] = value_map(config, *first)
    return Finding(numbers, curves=curves, files=files)


def _window(values: np.ndarray, length: int) -> np.ndarray:
    """Means of ``length`` values in a row, (members, episodes - length + 1)."""
    total = np.cumsum(np.pad(np.asarray(values, float), ((0, 0), (1, 0))), 1)
    count = values.shape[1]
    if count < length:
        return np.zeros((len(values), 0))
    return (total[:, length:] - total[:, :-length]) / length


def _first(good: np.ndarray, length: int) -> float:
    """Mean over agents of the episodes until one is good, of all where none is."""
    if not good.shape[1]:
        return 0.0
    every = good.shape[1] + length - 1
    return float(np.where(good.any(1), good.argmax(1) + length, every).mean())


def value_map(config: Any, params: Any, extra: Any) -> dict[str, np.ndarray]:
    """One drawn function on a grid, and the transitions it was drawn from.

    Args:
      config: of the run.
      params, extra: of one agent's state.

    Returns:
      ``values`` and ``actions`` (of Deep Sea: whether it moves right) on a grid of the
      first two inputs, or (1, columns) of one input; ``visited`` (n, 2) or (n, 1);
      ``path``, of the last episode, which had ``steps``;
      ``names``, ``low`` and ``high`` of the inputs; ``sea``, whether rows are the
      steps of Deep Sea; ``title``, whose values they are.
    """
    problem = gppstd.Problem(environment(config))
    prior, options = gppstd.read(config)
    sea = config.data.environment == "deep_sea"
    width = min(problem.width, 2)
    count = config.data.size if sea else 40
    axes = np.meshgrid(*[np.linspace(0, 1, count)] * width, indexing="ij")
    states = np.full((axes[0].size, problem.width), 0.5, np.float32)
    states[:, :width] = np.stack([a.ravel() for a in axes], 1)

    def drawn(params, extra, key, states):
        model = problem.model(prior, params)
        key_values, key_tried = jax.random.split(key)
        buffer = extra["buffer"]
        values = gppstd.draw_values(key_values, model, buffer, problem, options)
        tried = gppstd.candidates(key_tried, problem, options)

        def stage(values):
            q = gppstd.q_values(values, gppstd.with_actions(states, tried), options)
            q = q.reshape(len(states), len(tried))
            return q.max(1), tried[q.argmax(1), 0]

        return jax.lax.map(stage, values)

    key = jax.random.key(config.train.seed)
    high, best = jax.jit(drawn)(params, extra, key, jnp.asarray(states))
    first = len(high) > 1 and not sea
    if len(high) > 1 and sea:  # Row h of the grid belongs to step h.
        index = np.repeat(np.arange(count), count), np.arange(count**2)
        high, best = np.asarray(high)[index], np.asarray(best)[index]
        # Which of the actions moves right differs from cell to cell.
        best = best == np.asarray(extra["layout"]).ravel()
    else:
        high, best = np.asarray(high)[0], np.asarray(best)[0]
    shape = (count, count) if width == 2 else (1, count)
    extra = jax.device_get(extra)
    rows = extra["buffer"]
    low, top = problem.bounds
    return {
        "values": high.reshape(shape),
        "actions": best.reshape(shape),
        "visited": rows.x[rows.mask][:, :width] * (top - low)[:width] + low[:width],
        "path": (low + (top - low) * extra["path"])[:, :width],
        "steps": extra["steps"][extra["done"] - 1],
        "names": np.asarray(INPUTS[config.data.environment][:width]),
        "low": low[:width],
        "high": top[:width],
        "sea": np.asarray(sea),
        "title": np.asarray("drawn value" + " of the first step" * first),
    }
