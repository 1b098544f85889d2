r"""Metrics of traces, a batch at once.

The ancestors of a node, itself among them, are the bits of a word: with $A(u)$ that set,
the distance of two nodes is $d(u, v) = |A(u) \triangle A(v)|$, the depth $|A(u)| - 1$.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from jaxpapers.papers.rejump.arrays import TraceBatch

NAMES = (
    "num_solutions", "jump_distance", "success_rate", "verification_rate",
    "overthinking_rate", "forgetting",
)  # fmt: skip
ORDERS = ("walk", "reference_math")
BITS = 32


class Tree(NamedTuple):
    """Facts of the trees.

    Attributes:
      ancestors: uint32 (B, N, W), bit v of node u: v is an ancestor of u, or u.
      depth: int32 (B, N); -1 for what cannot be reached from the root, and no nodes.
      is_leaf: bool (B, N), reachable and without children.
      leaves: uint32 (B, W), the same as bits.
    """

    ancestors: UInt32[Array, "B N W"]
    depth: Int[Array, "B N"]
    is_leaf: Bool[Array, "B N"]
    leaves: UInt32[Array, "B W"]


class Metrics(NamedTuple):
    """Of each trace (B,). A value that is not ``defined`` there is 0.

    Attributes:
      num_solutions: leaves of the tree that can be reached.
      jump_distance: mean distance between leaves that are visited one after the other.
      success_rate: share of correct leaves among those visits.
      verification_rate: share of verification among the walk's jumps.
      overthinking_rate: share of those visits after the first correct one.
      forgetting: 1 where there are as many calculations as nodes, or more: something was
        derived again.
      no_calculation_edge: 1 where an edge of the tree is never walked as a calculation.
      defined: whether the jump distance is (a walk, and a leaf).
      judged: whether success and overthinking are (correctness of leaves is known).
    """

    num_solutions: Int[Array, " B"]
    jump_distance: Float[Array, " B"]
    success_rate: Float[Array, " B"]
    verification_rate: Float[Array, " B"]
    overthinking_rate: Float[Array, " B"]
    forgetting: Int[Array, " B"]
    no_calculation_edge: Int[Array, " B"]
    defined: Bool[Array, " B"]
    judged: Bool[Array, " B"]


def tree_info(parent: Int[Any, "B N"]) -> Tree:
    """Ancestors, depths and leaves, by pointer doubling; see ``TraceBatch.parent``."""
    parent = jnp.asarray(parent)
    n = parent.shape[1]
    index = jnp.arange(n, dtype=jnp.int32)[None]
    exists = parent > -2
    own = jnp.where(exists[..., None], _bit(index, n), jnp.uint32(0))
    ends = _bits_of(parent < 0)

    def moving(pointer):
        return ~jnp.all(_has(ends, pointer, n))

    def double(carry):
        i, ancestors, pointer, _ = carry
        ancestors |= _at(ancestors, pointer[..., None])
        pointer = _at(pointer, pointer)
        return i + 1, ancestors, pointer, moving(pointer)

    rounds = max(1, math.ceil(math.log2(n)) + 1)
    # Ancestors reach as far as the pointer, and have what it points at.
    pointer = jnp.where(parent >= 0, parent, index)
    own_and_next = own | _bit(parent, n) & _bits_of(exists)[:, None]
    start = (0, own_and_next, pointer, moving(pointer))
    # Pointers of a cycle never rest.
    ancestors = lax.while_loop(lambda c: c[3] & (c[0] < rounds), double, start)[1]
    root = _bits_of(parent == -1)
    reached = jnp.any((ancestors & root[:, None]) != 0, axis=-1)
    size = lax.population_count(ancestors).sum(-1).astype(jnp.int32)
    inner = _any(_bit(parent, n))
    is_leaf = reached & ~jnp.any((own & inner[:, None]) != 0, axis=-1)
    return Tree(ancestors, jnp.where(reached, size - 1, -1), is_leaf, _bits_of(is_leaf))


def pairwise_distance(parent: Int[Any, "B N"]) -> Int[Array, "B N N"]:
    """Edges between any two nodes; -1 (infinite) where one cannot be reached."""
    tree = tree_info(parent)
    a = tree.ancestors
    apart = lax.population_count(a[:, :, None] ^ a[:, None]).sum(-1).astype(jnp.int32)
    known = tree.depth >= 0
    return jnp.where(known[:, :, None] & known[:, None], apart, -1)


def visits(batch: TraceBatch) -> Int[Array, "B V"]:
    """Visited nodes: where the walk starts, then every target; V = S + 1, -2 after it.

    Sources of later steps do not count, even where the walk is broken.
    """
    first = jnp.asarray(batch.source)[:, :1]
    return jnp.concatenate([first, jnp.asarray(batch.target)], axis=1)


def filtered_leaf_mask(batch: TraceBatch) -> Bool[Array, "B V"]:
    """Which visits count as visits of a leaf.

    The same leaf again counts only if a jump since was no verification: checking a
    leaf is not visiting it.
    """
    return _follow(batch, tree_info(batch.parent))[1].T


class _Walk(NamedTuple):
    leaf: Any  # Last one that counts; -1: none.
    path: Any  # Its ancestors.
    moved: Any  # Whether a jump since was no verification.
    count: Any
    distance: Any
    correct: Any
    first: Any  # Index of the first correct one.


def _follow(batch: TraceBatch, tree: Tree) -> tuple[_Walk, Bool[Array, "V B"]]:
    """The walk's leaf visits, counted; and which visits they are."""
    n = tree.depth.shape[1]
    seen = visits(batch).T
    n_steps = jnp.asarray(batch.n_steps)
    right = _bits_of(jnp.asarray(batch.correct) & tree.is_leaf)
    free = jnp.asarray(batch.category).T != 1
    free = jnp.concatenate([jnp.zeros_like(free[:1]), free])
    place = jnp.arange(len(seen), dtype=jnp.int32)

    def visit(walk: _Walk, row):
        node, free, place = row
        known = (node >= 0) & (place <= n_steps) & (n_steps > 0)
        leaf = jnp.where(known, node, 0)
        path = _at(tree.ancestors, leaf[:, None, None])[:, 0]
        is_leaf = known & _has(tree.leaves, leaf[:, None], n)[:, 0]
        moved = walk.moved | free
        kept = is_leaf & ((leaf != walk.leaf) | moved)
        apart = lax.population_count(path ^ walk.path).sum(-1).astype(jnp.int32)
        jumped = kept & (walk.leaf >= 0)
        hit = kept & _has(right, leaf[:, None], n)[:, 0]
        after = _Walk(
            jnp.where(kept, leaf, walk.leaf),
            jnp.where(kept[:, None], path, walk.path),
            moved & ~kept,
            walk.count + kept,
            walk.distance + jnp.where(jumped, apart, 0),
            walk.correct + hit,
            jnp.where(hit & (walk.correct == 0), walk.count, walk.first),
        )
        return after, kept

    zero = 0 * n_steps  # Lies where the traces do.
    start = _Walk(
        zero - 1, jnp.zeros_like(tree.leaves), zero > 0, zero, zero, zero, zero
    )
    return lax.scan(visit, start, (seen, free, place))


def metrics(batch: TraceBatch, order: str = "walk") -> Metrics:
    """The metrics of every trace.

    Args:
      batch: of ``to_arrays``.
      order: of the leaves that success and overthinking are about. "walk": visits that
        count; "reference_math": all leaves, sorted by name as texts ("node10" before
        "node2"), and the trace's own correctness where there is one leaf, as the
        reference does for MATH.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    real = jnp.result_type(float)
    tree = tree_info(batch.parent)
    walk, _ = _follow(batch, tree)
    category, n_steps = jnp.asarray(batch.category), jnp.asarray(batch.n_steps)
    calculations, checks, returns = ((category == k).sum(1) for k in range(3))
    arrows = calculations + checks + returns
    solutions = tree.is_leaf.sum(1)
    if order == "walk":
        total, right, first = walk.count, walk.correct, walk.first
        judged = jnp.asarray(batch.judged)
    else:
        total, right, first, judged = _by_name(batch, tree, solutions)
    jumps = jnp.maximum(walk.count - 1, 1)
    over = jnp.where(right > 0, total - 1 - first, 0)
    total = jnp.maximum(total, 1).astype(real)
    defined = (solutions > 0) & (n_steps > 0)
    zero = jnp.zeros((), real)
    return Metrics(
        solutions.astype(jnp.int32),
        jnp.where(defined, walk.distance.astype(real) / jumps.astype(real), zero),
        jnp.where(judged, right.astype(real) / total, zero),
        checks.astype(real) / jnp.maximum(arrows, 1).astype(real),
        jnp.where(judged, over.astype(real) / total, zero),
        (calculations >= jnp.asarray(batch.n_nodes)).astype(jnp.int32),
        _uncalculated(batch),
        defined,
        judged,
    )


def _by_name(batch: TraceBatch, tree: Tree, solutions: Any):
    """Leaves, correct ones, those before the first correct one; of all, by name."""
    correct = jnp.asarray(batch.correct)
    alone = solutions == 1
    correct = jnp.where(alone[:, None], jnp.asarray(batch.corr)[:, None], correct)
    correct &= tree.is_leaf
    rank, n = jnp.asarray(batch.name_rank), tree.depth.shape[1]
    first = jnp.where(correct, rank, n).min(1)
    before = (tree.is_leaf & (rank < first[:, None])).sum(1)
    judged = jnp.where(alone, jnp.asarray(batch.corr_known), jnp.asarray(batch.judged))
    return solutions, correct.sum(1), before, judged


def _uncalculated(batch: TraceBatch) -> Int[Array, " B"]:
    """Whether some edge of the tree is never walked as a calculation."""
    parent, target = jnp.asarray(batch.parent), jnp.asarray(batch.target)
    n = parent.shape[1]
    above = _at(parent, jnp.maximum(target, 0))
    walked = (jnp.asarray(batch.category) == 0) & (target >= 0) & (above >= 0)
    walked &= above == jnp.asarray(batch.source)
    reached = _any(_bit(jnp.where(walked, target, -1), n))
    needed = _bits_of(parent >= 0)
    return jnp.any((needed & ~reached) != 0, axis=-1).astype(jnp.int32)


def _at(x: Shaped[Array, "B N *W"], index: Int[Array, "B K *I"]) -> Any:
    """Rows of x; indices are in its range, and checks cost more than the reading."""
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def _bit(index: Any, n: int) -> UInt32[Array, "*S W"]:
    """The bit of a node in words of 32 nodes; none for negative ones."""
    index = jnp.asarray(index)[..., None]
    shape = (*index.shape[:-1], -(-n // BITS))
    word = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    bit = jnp.left_shift(jnp.uint32(1), (index & (BITS - 1)).astype(jnp.uint32))
    return jnp.where(index >> 5 == word, bit, jnp.uint32(0))


def _bits_of(mask: Any) -> UInt32[Array, "B W"]:
    """A mask over nodes (B, N) as bits."""
    n = mask.shape[1]
    return _any(jnp.where(mask[..., None], _bit(jnp.arange(n)[None], n), jnp.uint32(0)))


def _any(bits: UInt32[Array, "B K W"]) -> UInt32[Array, "B W"]:
    return lax.reduce(bits, jnp.uint32(0), lax.bitwise_or, (1,))


def _has(words: UInt32[Array, "B W"], node: Any, n: int) -> Bool[Array, "B K"]:
    """Whether the bit of each node (B, K) is set."""
    return jnp.any((words[:, None] & _bit(node, n)) != 0, axis=-1)
