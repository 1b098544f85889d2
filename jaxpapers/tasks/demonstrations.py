"""What demonstrations are worth before anything is learned: expected variances."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers.ops import gaussian_process as gp
from jaxpapers.papers import gppstd
from jaxpapers.study import Finding, Row, Study, Table

EPISODES = (1, 3, 5)
HELD_OUT = 10
"""Expert episodes at whose states and actions variances are compared."""
REPEATS = 6
"""Draws of everything, of which means are shown."""
SOURCES = ("expert", "random policy", "uniform", "expert and random")


def comparison(config: Any, environment: Any) -> Study:
    """E_mu var(Q) where mu is what an expert visits, for as many points of each source.

    The variance depends on where points are, not on rewards (theorems T1 and T2 of the
    docs page). "uniform" draws state and action from their whole range; "expert and
    random" has twice as many points.
    """
    prior, _ = gppstd.read(config)

    def rows(seed):
        found = functools.cache(lambda: expected_variances(environment, prior, seed))

        def measure(source):
            points, variances = found()
            values = dict(zip(EPISODES, variances[source]))
            numbers = {"variance": values[3]}
            numbers |= {f"{k} episodes": v for k, v in values.items()}
            table = Table(
                "E var(Q) at states and actions of held-out expert episodes",
                ("episodes", "points", *SOURCES),
                [
                    (k, round(n), *(variances[s][i] for s in SOURCES))
                    for i, (k, n) in enumerate(zip(EPISODES, points))
                ],
            )
            return Finding(numbers, (table,))

        return [Row(s, None, functools.partial(measure, s)) for s in SOURCES]

    return Study(
        title=f"{config.data.environment}: expected variance after 3 episodes; GPPSTD "
        "reconstructed",
        metric="variance",
        rising=False,
        rows=rows,
        columns=tuple(f"{k} episodes" for k in EPISODES),
    )


def expected_variances(
    environment: Any, prior: gppstd.Prior, seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Points of each number of episodes, and the variances of each source.

    Returns:
      (3,) points, mean over ``REPEATS``; source -> (3,) variances.

    Raises:
      ValueError: an environment without an expert.
    """
    problem = gppstd.Problem(environment)
    problem.expert_known()
    most = max(EPISODES)
    size = most * problem.horizon
    model = problem.model(prior)

    @functools.partial(jax.jit, static_argnames=("kind", "count"))
    def episodes(key, kind, count):
        options = gppstd.Options(demonstrations=kind, demonstration_episodes=count)
        key_starts, key = jax.random.split(key)
        layout = problem.layout(jax.random.key(seed))
        starts = jax.vmap(lambda k: problem.reset(k, layout))(
            jax.random.split(key_starts, count)
        )
        rows = gppstd.demonstrate(key, starts, problem, options).rows
        return rows.x, rows.mask

    @jax.jit
    def variance(x, mask, q, kept):
        post = gp.fit(model, x, jnp.zeros(len(x)), mask)
        return gp.expected_variance(post, q, kept)

    def padded(x):
        rows = -(-len(x) // 256) * 256  # A few programs, not one for each number.
        full = np.zeros((rows, x.shape[1]), np.float32)
        full[: len(x)] = x
        return full, np.arange(rows) < len(x)

    points, found = [], {s: [] for s in SOURCES}
    for repeat in range(REPEATS):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), repeat), 3)
        x, mask = map(np.asarray, episodes(keys[0], "expert", most))
        random = np.concatenate(
            [v[m] for v, m in zip(*map(np.asarray, episodes(keys[1], "random", most)))]
        )
        held = np.concatenate(
            [
                v[m]
                for v, m in zip(*map(np.asarray, episodes(keys[2], "expert", HELD_OUT)))
            ]
        )
        q, kept = padded(held)
        rng = np.random.default_rng([seed, repeat])
        uniform = rng.uniform(size=(size, x.shape[2])).astype(np.float32)
        if problem.actions:
            uniform[:, -1] = rng.integers(0, problem.actions, size)
        counts = []
        for k in EPISODES:
            expert = np.concatenate([v[m] for v, m in zip(x[:k], mask[:k])])
            n = len(expert)
            counts.append(n)
            sources = {
                "expert": expert,
                "random policy": random[:n],
                "uniform": uniform[:n],
                "expert and random": np.concatenate([expert, random[:n]]),
            }
            for name, rows in sources.items():
                value = variance(*padded(rows), q, kept.astype(np.float32))
                found[name].append(float(value))
        points.append(counts)
    shape = (REPEATS, len(EPISODES))
    means = {s: np.reshape(v, shape).mean(0) for s, v in found.items()}
    return np.mean(points, 0), means
