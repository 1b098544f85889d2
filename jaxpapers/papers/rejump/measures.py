"""Traces in, numbers out: batches of one shape, split over a mesh."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpapers.papers.rejump.arrays import TraceBatch, to_arrays
from jaxpapers.papers.rejump.edit_distance import (
    size,
    tree_edit_distances,
    tree_similarity,
)
from jaxpapers.papers.rejump.similarity import transition_matrix, walk_similarity
from jaxpapers.papers.rejump.trace import Trace
from jaxpapers.papers.rejump.tree_walk import NAMES, Metrics, metrics


class Measures(NamedTuple):
    """Metrics of traces, on the host.

    Attributes:
      values: (T, 6), in the order of ``tree_walk.NAMES``.
      known: (T, 6), where they are defined; values are 0 elsewhere.
      no_calculation_edge: (T,).
      transitions: (T, 3, 3), see ``transition_matrix``.
    """

    values: np.ndarray
    known: np.ndarray
    no_calculation_edge: np.ndarray
    transitions: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """(T,): traces of which every metric is defined; means are over these."""
        return np.asarray(self.known.all(1))

    def means(self) -> dict[str, float]:
        """Mean of every metric over whole traces; {} if there is none."""
        if not self.whole.any():
            return {}
        return dict(zip(NAMES, self.values[self.whole].mean(0).tolist()))

    def of(self, i: int) -> dict[str, float | None]:
        """Metrics of one trace; None where they are not defined."""
        pairs = zip(self.values[i].tolist(), self.known[i])
        return {name: x if ok else None for name, (x, ok) in zip(NAMES, pairs)}


def measure(traces: Sequence[Trace], mesh: Any = None, order: str = "walk") -> Measures:
    """Metrics of traces, in one program.

    Args:
      traces: validated.
      mesh: traces are split over its axis ``data``.
      order: see ``metrics``.

    Raises:
      ValueError: no traces.
    """
    batch, count = to_arrays(traces), len(traces)
    parts = mesh.shape.get("data", 1) if mesh is not None else 1
    extra = -count % parts
    batch = TraceBatch(*(np.concatenate([x, x[:1].repeat(extra, 0)]) for x in batch))
    found, transitions = jax.device_get(_program(mesh, order)(batch))
    m = Metrics(*(x[:count] for x in found))
    values = np.stack([np.asarray(getattr(m, name), float) for name in NAMES], 1)
    known = np.ones(values.shape, bool)
    known[:, NAMES.index("jump_distance")] = m.defined
    for name in ("success_rate", "overthinking_rate"):
        known[:, NAMES.index(name)] = m.judged
    edges = np.asarray(m.no_calculation_edge)
    return Measures(values, known, edges, np.asarray(transitions[:count]))


@functools.cache
def _program(mesh: Any, order: str) -> Any:
    def both(batch):
        return metrics(batch, order), transition_matrix(batch.category)

    if mesh is None:
        return jax.jit(both)
    rows = jax.P("data")
    return jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(rows,), out_specs=rows))


def similarities(
    a: Sequence[Trace], b: Sequence[Trace], mesh: Any = None, *, strict: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(tree similarity, walk similarity) of pairs of traces, (P,) each.

    Args:
      a, b: the traces of each pair.
      mesh: see ``measure``.
      strict: refuse trees that are too large; otherwise their similarity is NaN.

    Raises:
      ValueError: another number of traces, or trees that are too large.
    """
    edits = tree_edit_distances(a, b, mesh, strict=strict)
    trees = tree_similarity(edits, [size(x) for x in a], [size(x) for x in b])
    trees = np.where(edits < 0, np.nan, trees)
    matrices = measure([*a, *b], mesh).transitions
    return trees, similar_walks(matrices[: len(a)], matrices[len(a) :])


_similar = jax.jit(walk_similarity)


def similar_walks(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """``walk_similarity`` of matrices on the host, (P,), in one program."""
    return np.asarray(_similar(p, q))
