r"""Edit distance of ordered trees, many pairs at once.

Zhang and Shasha, "Simple fast algorithms for the editing distance between trees and
related problems", SIAM J. Comput. 18(6), 1989. Deleting and inserting a node costs 1;
matching two costs 1 where a text is empty, 0 otherwise: only the shape counts.

The forests of that dynamic program are laid out as rows: for every keyroot (the root, and
nodes with a left sibling) the nodes of its subtree in postorder. A row's number less the
size of its node's subtree is the row of the forest before it. So pairs of trees of any
shape are one loop over rows and columns, whose body is the same for all pairs.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from jaxpapers.papers.rejump.trace import Trace, children, depths

# Most pairs of one call and device, and most numbers of its table.
LANES, MAX_TABLE = 128, 1 << 27


class Forest(NamedTuple):
    """Rows of a tree, or of P trees side by side: (R,) or (R, P) int32 each.

    Attributes:
      start: row of the first node of this row's keyroot.
      size: nodes of the subtree of this row's node.
      own: row of the same node as part of its own keyroot's left path.
      blank: 1 where the node's text is empty.
      rows: (P,), number of rows; none of a forest of one tree.
    """

    start: Int[Any, " *RP"]
    size: Int[Any, " *RP"]
    own: Int[Any, " *RP"]
    blank: Int[Any, " *RP"]


def forest(trace: Trace, *, mirrored: bool = False) -> Forest:
    """Rows of a trace's tree, of the nodes that can be reached.

    Args:
      trace: a trace.
      mirrored: children from right to left. The distance of two mirrored trees is that
        of the trees, but its cost is another one.
    """
    below, order = children(trace), []
    root = next(node.name for node in trace.nodes if node.parent is None)
    stack = [(root, False)]
    while stack:
        name, done = stack.pop()
        if done:
            order.append(name)
            continue
        stack.append((name, True))
        stack += [(c, False) for c in (below[name] if mirrored else below[name][::-1])]
    texts = {node.name: node.problem for node in trace.nodes}
    size: dict[str, int] = {}
    for name in order:
        size[name] = 1 + sum(size[c] for c in below[name])
    sizes = [size[name] for name in order]
    firsts = [i - s + 1 for i, s in enumerate(sizes)]
    keyroots = sorted({first: i for i, first in enumerate(firsts)}.values())
    nodes = [i for k in keyroots for i in range(firsts[k], k + 1)]
    starts, own = [], np.zeros(len(order), np.int32)
    for k in keyroots:
        starts += [len(starts)] * sizes[k]
    for row, i in enumerate(nodes):
        if firsts[i] == nodes[starts[row]]:
            own[i] = row
    blank = [not texts[name] for name in order]
    return Forest(
        np.array(starts, np.int32),
        np.array(sizes, np.int32)[nodes],
        own[nodes],
        np.array(blank, np.int32)[nodes],
    )


def distances(
    a: Forest, b: Forest, rows: Int[Any, "2 P"], limit: Int[Any, "2"]
) -> Int[Array, " P"]:
    """Edit distances of P pairs of trees.

    Args:
      a, b: rows of the trees of each pair, (R, P) and (C, P), padded.
      rows: rows of each tree.
      limit: the most of them, where the loops end.
    """
    height, count = a.start.shape
    width = b.start.shape[0]
    lane = jnp.arange(count)

    def cell(r, c, table):
        start, size, own, blank = (lax.dynamic_index_in_dim(x, r, 0, False) for x in a)
        left, wide, mine, empty = (lax.dynamic_index_in_dim(x, c, 0, False) for x in b)
        above = table[jnp.maximum(r - 1, 0) * width + c].astype(jnp.int32)
        before = table[r * width + jnp.maximum(c - 1, 0)].astype(jnp.int32)
        delete = 1 + jnp.where(r > start, above, c - left + 1)
        insert = 1 + jnp.where(c > left, before, r - start + 1)
        # Both are on the left path of their keyroots: the forests are trees.
        trees = (r - size < start) & (c - wide < left)
        i = jnp.where(trees, r - 1, r - size)
        j = jnp.where(trees, c - 1, c - wide)
        inside = (i >= start) & (j >= left)
        # Nodes of the other forest, where one has none.
        nodes = jnp.maximum(i - start + 1, 0) + jnp.maximum(j - left + 1, 0)
        places = jnp.stack(
            [
                jnp.where(inside, i * width + j, 0),
                jnp.where(trees, 0, own * width + mine),
            ]
        )
        # Both are in the table by construction; checks cost more than the reading.
        rest, within = (
            table.at[places, lane[None]]
            .get(mode="promise_in_bounds", wrap_negative_indices=False)
            .astype(jnp.int32)
        )
        match = jnp.where(inside, rest, nodes)
        match += jnp.where(trees, blank | empty, within)
        value = jnp.minimum(jnp.minimum(delete, insert), match).astype(table.dtype)
        return lax.dynamic_update_index_in_dim(table, value, r * width + c, 0)

    def row(r, table):
        return lax.fori_loop(0, limit[1], lambda c, x: cell(r, c, x), table)

    # The zeros are computed of the pairs, so that they lie where the pairs do.
    table = jnp.zeros((height * width, count), jnp.int16) + (0 * rows[:1]).astype(
        jnp.int16
    )
    table = lax.fori_loop(0, limit[0], row, table)
    last = (rows[0] - 1) * width + rows[1] - 1
    return table[last, lane].astype(jnp.int32)


def tree_edit_distances(
    a: Sequence[Trace], b: Sequence[Trace], mesh: Any = None, *, strict: bool = True
) -> np.ndarray:
    """Edit distances (P,) of the trees of pairs of traces.

    Args:
      a, b: the traces of each pair.
      mesh: pairs are split over its axis ``data``.
      strict: refuse pairs of trees that are too large; otherwise they have -1.

    Raises:
      ValueError: another number of traces, or a pair of trees that is too large.
    """
    if len(a) != len(b):
        raise ValueError(f"expected as many traces a as b, got {len(a)} and {len(b)}")
    cache: dict[int, tuple[Forest, Forest]] = {}

    def both(trace: Trace) -> tuple[Forest, Forest]:
        if id(trace) not in cache:
            cache[id(trace)] = forest(trace), forest(trace, mirrored=True)
        return cache[id(trace)]

    pairs = []
    for x, y in zip(a, b):
        plain, mirrored = zip(both(x), both(y))
        pairs.append(min(plain, mirrored, key=_cost))
    result = np.full(len(pairs), -1, np.int32)
    parts = mesh.shape.get("data", 1) if mesh is not None else 1
    order = sorted(range(len(pairs)), key=lambda i: _cost(pairs[i]))
    # Powers of two, so that few programs are compiled.
    step = parts * min(LANES, 1 << (-(-len(pairs) // parts) - 1).bit_length())
    while order:
        chosen, lanes = order[:step], -(-step // parts)
        shape = _shape([pairs[i] for i in chosen])
        if shape[0] * shape[1] * lanes <= MAX_TABLE:
            made = _chunk([pairs[i] for i in chosen], lanes * parts, shape, mesh)
            result[chosen] = made[: len(chosen)]
            order = order[len(chosen) :]
        elif step > 1:
            step //= 2
        elif strict:
            raise ValueError(
                f"two trees have {shape[0]:,} and {shape[1]:,} subforests, a table of "
                f"{shape[0] * shape[1]:,} numbers; expected at most {MAX_TABLE:,}: "
                "compare smaller trees"
            )
        else:
            order = order[1:]
    return result


def _cost(pair: Sequence[Forest]) -> int:
    return len(pair[0].start) * len(pair[1].start)


def _shape(pairs: Sequence[Sequence[Forest]]) -> tuple[int, int]:
    """Rows and columns of the table of some pairs, as multiples of 64."""
    most = [max(len(pair[side].start) for pair in pairs) for side in (0, 1)]
    return -(-most[0] // 64) * 64, -(-most[1] // 64) * 64


def _chunk(
    pairs: Sequence[Sequence[Forest]], lanes: int, shape: tuple[int, int], mesh: Any
) -> np.ndarray:
    """Distances of at most ``lanes`` pairs, padded with their last one."""
    padded = [*pairs, *[pairs[-1]] * (lanes - len(pairs))]
    sides = [[pair[side] for pair in padded] for side in (0, 1)]
    rows = np.array([[len(f.start) for f in side] for side in sides], np.int32)
    a, b = (_stacked(side, height) for side, height in zip(sides, shape))
    return np.asarray(_program(mesh)(a, b, rows, rows.max(1)))


def _stacked(forests: Sequence[Forest], height: int) -> Forest:
    def column(x: np.ndarray) -> np.ndarray:
        return np.pad(x, (0, height - len(x)))

    return Forest(*(np.stack([column(x) for x in xs], 1) for xs in zip(*forests)))


@functools.cache
def _program(mesh: Any) -> Any:
    if mesh is None:
        return jax.jit(distances)
    pair, out = jax.P(None, "data"), jax.P("data")
    specs = (pair, pair, pair, jax.P())
    return jax.jit(jax.shard_map(distances, mesh=mesh, in_specs=specs, out_specs=out))


def tree_similarity(distance: Any, sizes_a: Any, sizes_b: Any) -> np.ndarray:
    """1 - distance / max(|a|, |b|), of trees' numbers of reachable nodes."""
    return 1 - np.asarray(distance) / np.maximum(sizes_a, sizes_b)


def size(trace: Trace) -> int:
    """Nodes that can be reached from the root."""
    return len(depths(trace))
