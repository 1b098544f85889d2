"""Choosing a program for new puzzles, as a prompt is chosen: by metrics of a few traces.

Means with bootstrap intervals, for all tables of the study.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers.papers import rejump
from jaxpapers.study import Table

# Label, metric, direction.
RULES = (
    ("longest jumps", "jump_distance", 1),
    ("most solutions", "num_solutions", 1),
    ("least verification", "verification_rate", -1),
)
# One puzzle of so many is one that the program is chosen on.
EVERY = 10


def programs_table(
    programs: Mapping[str, Any], samples: Any, seed: int, replicates: int
) -> Table:
    """What ``select_prompt`` chooses, and what its choice solves of the other puzzles.

    A program stands for an instruction: its traces of every tenth puzzle give the mean
    metrics. The target is the mean of the samples of these puzzles that are right.

    Args:
      programs: label -> traces of one program (values, solved), one for each puzzle.
      samples: traces of the weak searcher, several for each puzzle.
      seed: of the bootstrap.
      replicates: of it.
    """
    labels = list(programs)
    values = np.stack([own.values[:, 0] for own in programs.values()])
    solved = np.stack([own.solved[:, 0] for own in programs.values()])
    few = np.arange(solved.shape[1]) % EVERY == 0
    means = values[:, few].mean(1)
    chosen = {
        label: rejump.select_prompt(
            means, metric=rejump.NAMES.index(metric), direction=direction
        )
        for label, metric, direction in RULES
    }
    right = samples.values[few][samples.solved[few] > 0]
    if len(right):
        chosen["closest to right samples"] = rejump.select_prompt(
            means, target=right.mean(0)
        )
    rest = solved[:, ~few]
    chosen["any of them (bound)"] = int(rest.mean(1).argmax())
    chance = rest.mean(0)
    own = np.stack([rest[k] for k in chosen.values()])
    found = np.stack(interval(np.concatenate([own, own - chance]), seed, replicates), 1)
    rows = [
        (label, labels[k], text(a), text(b))
        for (label, k), a, b in zip(chosen.items(), found, found[len(chosen) :])
    ]
    title = f"a program chosen on {few.sum()} puzzles, used on the other {(~few).sum()}"
    columns = ("by", "program", "puzzles solved", "more than one at random, paired")
    return Table(title, columns, rows)


def interval(values: Any, seed: int, replicates: int) -> Any:
    """(mean, low, high) over puzzles of each row; see ``rejump.bootstrap``."""
    values = jnp.asarray(values, jnp.float32)
    return jax.device_get(_bootstrap(values, jax.random.key(seed), replicates))


@functools.partial(jax.jit, static_argnums=2)
def _bootstrap(values, key, replicates):
    return rejump.bootstrap(values, key, replicates)


def text(found: Any) -> str:
    """A mean and its interval as a table shows them."""
    mean, low, high = found
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
