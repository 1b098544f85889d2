"""Traces as arrays, padded to one shape."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.papers.rejump.trace import CATEGORIES, Trace


class TraceBatch(NamedTuple):
    """Traces of one padded shape: B traces, N nodes, S steps.

    Attributes:
      parent: int32 (B, N), position of the parent; -1 the root, -2 no node.
      source, target: int32 (B, S), positions of a step's nodes; -1 unknown, -2 no step.
      category: int32 (B, S): 0 calculation, 1 verification, 2 backtracking, -1 unknown
        or no step.
      n_nodes, n_steps: int32 (B,).
      correct: bool (B, N): leaves with the right answer.
      judged: bool (B,): whether that is known of all leaves.
      name_rank: int32 (B, N), place of a node's name among the sorted names.
      corr: bool (B,): whether the trace's answer is right.
      corr_known: bool (B,): whether that is known.
    """

    parent: Any
    source: Any
    target: Any
    category: Any
    n_nodes: Any
    n_steps: Any
    correct: Any
    judged: Any
    name_rank: Any
    corr: Any
    corr_known: Any


def to_arrays(
    traces: Sequence[Trace], max_nodes: int = 0, max_steps: int = 0
) -> TraceBatch:
    """Traces as arrays on the host.

    Args:
      traces: validated, see ``trace.parse_trace``.
      max_nodes, max_steps: N and S; 0: the largest of the traces, as multiples of 8.

    Raises:
      ValueError: no traces, or one that is larger than N or S.
    """
    if not traces:
        raise ValueError("no traces: expected at least one")
    nodes = max(len(t.nodes) for t in traces)
    steps = max(len(t.walk) for t in traces)
    n, s = max_nodes or _rounded(nodes), max_steps or _rounded(steps)
    if nodes > n or steps > s:
        raise ValueError(
            f"traces have up to {nodes} nodes and {steps} steps, expected at most {n} "
            f"and {s}"
        )
    count = len(traces)
    batch = TraceBatch(
        parent=np.full((count, n), -2, np.int32),
        source=np.full((count, s), -2, np.int32),
        target=np.full((count, s), -2, np.int32),
        category=np.full((count, s), -1, np.int32),
        n_nodes=np.array([len(t.nodes) for t in traces], np.int32),
        n_steps=np.array([len(t.walk) for t in traces], np.int32),
        correct=np.zeros((count, n), bool),
        judged=np.zeros(count, bool),
        name_rank=np.zeros((count, n), np.int32),
        corr=np.array([bool(t.correct) for t in traces]),
        corr_known=np.array([t.correct is not None for t in traces]),
    )
    kinds = {name: i for i, name in enumerate(CATEGORIES)}
    for b, trace in enumerate(traces):
        place = {node.name: i for i, node in enumerate(trace.nodes)}
        parents = [-1 if x.parent is None else place[x.parent] for x in trace.nodes]
        batch.parent[b, : len(place)] = parents
        walk = trace.walk
        if walk:
            rows = [(place.get(x, -1), place.get(y, -1), kinds.get(k, -1))
                    for x, y, k in walk]  # fmt: skip
            columns = np.array(rows, np.int32).T
            for array, column in zip(
                (batch.source, batch.target, batch.category), columns
            ):
                array[b, : len(walk)] = column
        batch.correct[b, : len(place)] = [bool(x.correct) for x in trace.nodes]
        inner = set(parents)
        batch.judged[b] = all(
            x.correct is not None for i, x in enumerate(trace.nodes) if i not in inner
        )
        names = sorted(place)
        batch.name_rank[b, [place[name] for name in names]] = range(len(names))
    return batch


def _rounded(size: int) -> int:
    return max(8, -(-size // 8) * 8)
