"""Searches against brute force, against each other, and on split sequences."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo
from jaxpapers.ops import search
from jaxpapers.ops.behaviour_tree import build_ubt, ubt_query
from tests.programs import together

B, T = 5, 40
matrix = pytest.mark.matrix


def drawn(seed=0, batch=B, length=T, levels=7):
    """Scores with many ties, all masks from empty to full."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(-levels, levels, (batch, length)).astype(np.float32)
    lengths = np.linspace(0, length, batch).astype(int)
    return scores, np.arange(length)[None] < lengths[:, None]


def brute(scores, mask, k):
    """Larger score, then smaller index; -1 where nothing is left."""
    result = np.full((len(scores), k), -1)
    for row, (s, m) in enumerate(zip(scores, mask)):
        order = sorted(np.flatnonzero(m), key=lambda i: (-s[i], i))[:k]
        result[row, : len(order)] = order
    return result


def newest(cats, mask, target, k):
    result = np.full((len(cats), k), -1)
    for row in range(len(cats)):
        match = np.flatnonzero(mask[row] & (cats[row] == target[row]))[::-1][:k]
        result[row, : len(match)] = match
    return result


@pytest.mark.parametrize(
    "options",
    [{"chunk": 7}, *(pytest.param(o, marks=matrix) for o in ({}, {"chunk": 8}))],
)
def test_topk_is_brute_force(options):
    """Also of negative scores, which must win over padding, and of other dtypes.

    The peer multiplies scores of padding to 0, which then outranks real items.
    """
    scores, mask = drawn()
    scores[:, 3] = -0.0  # Equal to 0.0.
    sizes = 1, 6, T, T + 3
    dtypes = jnp.int32, jnp.bfloat16
    negative = -1 - np.abs(scores)

    def check(scores, negative, mask):
        return (
            {k: search.topk_masked(scores, mask, k, **options) for k in sizes},
            search.topk_masked(negative, mask, 4, **options),
            [search.topk_masked(scores.astype(t), mask, 6, **options) for t in dtypes],
        )

    by_size, below_zero, by_dtype = together(check, scores, negative, mask)
    for k, found in by_size.items():
        expected = brute(scores, mask, k)
        np.testing.assert_array_equal(found.idx, expected)
        np.testing.assert_array_equal(found.valid, expected >= 0)
        best = np.take_along_axis(scores, np.maximum(expected, 0), 1)
        best = np.where(expected >= 0, best, -np.inf)
        np.testing.assert_array_equal(found.values, best)
    np.testing.assert_array_equal(below_zero.idx, brute(negative, mask, 4))
    for dtype, found in zip(dtypes, by_dtype):
        np.testing.assert_array_equal(found.idx, brute(scores, mask, 6))
        assert found.values.dtype == dtype


def test_approximate_topk_is_exact_on_cpu():
    _, mask = drawn()
    scores = np.random.default_rng(0).permutation(B * T).reshape(B, T)
    scores = scores.astype(np.float32)
    sizes = 3, T + 3

    def check(scores, mask):
        return [search.topk_masked(scores, mask, k, recall=0.9).idx for k in sizes]

    for k, idx in zip(sizes, together(check, scores, mask)):
        np.testing.assert_array_equal(idx, brute(scores, mask, k))
    text = jax.jit(check).lower(scores, mask).as_text()
    assert "ApproxTopK" in text or "approx" in text.lower()


@functools.cache
def sharded(shards, k, length):
    mesh = jax.make_mesh(
        (shards,), ("model",), axis_types=(AxisType.Auto,),
        devices=jax.devices()[:shards],
    )  # fmt: skip

    def local(scores, ids):
        found = search.topk_sharded(scores, ids, k, "model")
        return jax.tree.map(lambda x: x[None], found)

    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(None, "model"),) * 2, out_specs=P("model"),
    )  # fmt: skip
    return mesh, jax.jit(run)


@pytest.mark.parametrize(
    "shards, k",
    [(8, 12), *(pytest.param(s, k, marks=matrix) for s in (1, 2, 4, 8) for k in (3, 12)
                if (s, k) != (8, 12))],
)  # fmt: skip
def test_topk_of_split_sequences(shards, k):
    """Also where a shard holds fewer than k positions, and the same on all shards."""
    scores, mask = drawn(1)
    ids = np.where(mask, np.arange(T, dtype=np.int32), -1)
    _, run = sharded(shards, k, T)
    found = run(scores, ids)
    expected = brute(scores, mask, k)
    best = np.take_along_axis(scores, np.maximum(expected, 0), 1)
    best = np.where(expected >= 0, best, -np.inf)
    for got, want in zip(found, (expected, expected >= 0, best)):
        assert len(got) == shards
        for one in np.asarray(got):
            np.testing.assert_array_equal(one, want)


def test_split_sequences_send_k_entries_per_shard():
    length, k = 4096, 3
    mesh, run = sharded(8, k, length)
    shapes = [jax.ShapeDtypeStruct((B, length), t) for t in (jnp.float32, jnp.int32)]
    found = hlo.collectives(run.lower(*shapes).compile().as_text(), mesh)
    assert {c.kind for c in found} == {"all-gather"}
    assert max(c.elements for c in found) <= 2 * B * 8 * k


@pytest.mark.parametrize(
    "sizes",
    [(2, 4), *(pytest.param(s, marks=matrix) for s in ((4, 2), (1, 8)))],
    ids=str,
)
def test_sequences_are_split_under_a_mesh(sizes):
    """Pieces of a history on ``model``, of the batch on ``data``; odd ones are whole."""
    grid = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    k = 6
    scores, mask = drawn(2, batch=8)
    expected, fewer = brute(scores, mask, k), brute(scores[:6, :39], mask[:6, :39], k)
    scores, mask = (x.reshape(4, 2, T) for x in (scores, mask))
    with jax.set_mesh(grid):
        find = jax.jit(search.topk_on_mesh, static_argnums=2)
        found = find(scores, mask, k)
        odd = find(scores[:3, :, :39], mask[:3, :, :39], k)
        text = find.lower(scores, mask, k).compile().as_text()
    np.testing.assert_array_equal(found.idx, expected.reshape(4, 2, k))
    np.testing.assert_array_equal(odd.idx, fewer.reshape(3, 2, k))
    kinds = {(c.kind, c.axes) for c in hlo.collectives(text, grid)}
    assert ("all-gather", ("model",)) in kinds


def log(seed=0, users=5, rows=120, cats=4):
    """Events of users in time order, with many equal times; user 2 has none."""
    rng = np.random.default_rng(seed)
    user = rng.choice([0, 1, 3, 4], rows)
    user[user == 4] = 3
    user[rng.integers(rows)] = 4
    time = np.sort(rng.integers(1, rows // 3, rows))
    return user, np.arange(2, rows + 2), rng.integers(0, cats, rows), time


def histories(user, item, cat, time, users=5):
    length = max(np.bincount(user, minlength=users).max(), 1)
    arrays = np.zeros((3, users, length), np.int32)
    counts = np.zeros(users, int)
    for u in range(users):
        rows = np.flatnonzero(user == u)
        counts[u] = len(rows)
        arrays[:, u, : len(rows)] = item[rows], cat[rows], time[rows]
    return (*arrays, np.arange(length)[None] < counts[:, None])


@pytest.mark.parametrize(
    "k, seed",
    [(5, 0), *(pytest.param(*x, marks=matrix) for x in
               ((1, 0), (200, 0), (1, 1), (5, 1), (200, 1)))],
)  # fmt: skip
def test_hard_search_is_brute_force_is_the_tree(k, seed):
    """Empty categories, an empty user, one behaviour, more than k, fewer than k."""
    item, cat, time, mask = histories(*log(seed))
    tree = build_ubt(*log(seed), users=5)
    targets = np.broadcast_to(np.arange(6, dtype=np.int32)[:, None], (6, 5))

    def check(cat, mask, targets, tree):
        hard = jax.vmap(lambda t: search.hard_search(cat, mask, t, k))(targets)
        users = jnp.broadcast_to(jnp.arange(5), targets.shape)
        return hard, ubt_query(tree, users, targets, k)

    hard, asked = together(check, cat, mask, targets, tree)
    for target in range(6):
        expected = newest(cat, mask, targets[target], k)
        np.testing.assert_array_equal(hard.idx[target], expected)
        np.testing.assert_array_equal(hard.valid[target], expected >= 0)
        for x, got in ((item, asked.items), (time, asked.times)):
            x = np.take_along_axis(x, np.maximum(expected, 0), 1)
            np.testing.assert_array_equal(got[target], np.where(expected >= 0, x, 0))
        np.testing.assert_array_equal(asked.valid[target], expected >= 0)
    counts = hard.valid.sum(-1)
    assert counts.min() == 0 and (counts == 1).any()
    assert counts.max() == min(k, counts.max())


def test_many_candidates_of_each_user():
    _, cat, _, mask = histories(*log())
    targets = np.arange(15, dtype=np.int32).reshape(5, 3) % 6

    def check(cat, mask, targets, tree):
        shape = (5, 3, cat.shape[1])
        wide = (jnp.broadcast_to(x[:, None], shape) for x in (cat, mask))
        users = jnp.broadcast_to(jnp.arange(5)[:, None], (5, 3))
        return search.hard_search(*wide, targets, 4), ubt_query(tree, users, targets, 4)

    found, asked = together(check, cat, mask, targets, build_ubt(*log()))
    for n in range(3):
        one = newest(cat, mask, targets[:, n], 4)
        np.testing.assert_array_equal(found.idx[:, n], one)
    np.testing.assert_array_equal(asked.valid, found.valid)


def test_order_within_equal_times_is_the_only_freedom():
    user, item, cat, time = log()
    rng = np.random.default_rng(3)
    shuffled = np.lexsort((rng.random(len(time)), time))
    trees = [
        build_ubt(*(x[order] for x in (user, item, cat, time)))
        for order in (slice(None), shuffled, rng.permutation(len(time)))
    ]
    users, cats = (x.astype(np.int32) for x in np.indices((5, 4)))
    first, *others = together(
        lambda trees, u, c: [ubt_query(t, u, c, 3) for t in trees], trees, users, cats
    )
    for other in others:
        np.testing.assert_array_equal(first.times, other.times)
        sure = first.times > first.times[..., 2:]  # No tie at the border.
        for a, b, at in zip(*(x.reshape(20, 3) for x in
                              (first.items, other.items, sure))):  # fmt: skip
            assert set(a[at]) == set(b[at])
    assert any((first.items != o.items).any() for o in others)  # There were ties.


def test_the_trees_query_costs_the_same_for_long_histories():
    def cost(length):
        tree = build_ubt(
            np.zeros(length, int), np.arange(length), np.arange(length) % 30,
            np.arange(length),
        )  # fmt: skip
        ids = np.zeros(8, np.int32)
        query = jax.jit(ubt_query, static_argnums=3)
        compiled = query.lower(tree, ids, ids, 200).compile()
        analysis = compiled.cost_analysis()
        return (
            analysis["flops"],
            compiled.memory_analysis().temp_size_in_bytes,
            len(compiled.as_text().splitlines()),
        )

    assert cost(1000) == cost(54_000)


def test_an_empty_tree_and_unknown_users():
    tree = build_ubt([], [], [], [], users=3)
    other = build_ubt([0, 0], [5, 6], [1, 1], [1, 2])

    def check(tree, other):
        ids = jnp.array([0, 2, 3, -1])
        users, cats = jnp.array([0, 1, -1]), jnp.array([1, 1, 1])
        return ubt_query(tree, ids, ids, 2).valid, ubt_query(
            other, users, cats, 3
        ).items

    valid, items = together(check, tree, other)
    assert not valid.any()
    np.testing.assert_array_equal(items, [[6, 5, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "chunk", [7, *(pytest.param(c, marks=matrix) for c in (1, 16, 40, 1024))]
)
def test_soft_search_is_topk_of_the_products(chunk):
    rng = np.random.default_rng(0)
    items, cats = rng.integers(-3, 4, (30, 4)), rng.integers(-3, 4, (6, 4))
    ids, cat = rng.integers(0, 30, (B, T)), rng.integers(0, 6, (B, T))
    query = rng.integers(-2, 3, (B, 4))
    _, mask = drawn()
    lengths = mask.sum(1)
    mask = mask & (ids != 0)
    scores = np.einsum("bth,bh->bt", items[ids] + cats[cat], query)

    def check(items, cats, ids, cat, lengths, query):
        tables = items.astype(jnp.bfloat16), search.pack(cats)
        parts = tuple(zip(tables, (ids, cat)))
        return search.soft_search(parts, lengths, query, 6, chunk=chunk)

    found = together(
        check, *(x.astype(np.float32) for x in (items, cats)), ids, cat, lengths,
        query.astype(np.float32),
    )  # fmt: skip
    expected = brute(scores, mask, 6)
    np.testing.assert_array_equal(found.idx, expected)
    best = np.take_along_axis(scores, np.maximum(expected, 0), 1)
    np.testing.assert_array_equal(found.values, np.where(expected >= 0, best, -np.inf))


def test_soft_search_of_long_histories_keeps_no_vectors():
    """Memory at T = 54,000: ids, the projected table, and half the ids again."""
    batch, length, width, vocab = 8, 54_000, 32, 20_000
    shapes = (
        jax.ShapeDtypeStruct((vocab, width), jnp.uint16),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch, width), jnp.float32),
    )

    def find(table, ids, lengths, query):
        return search.soft_search(((table, ids),), lengths, query, 200)

    memory = jax.jit(find).lower(*shapes).compile().memory_analysis()
    ids, copy = 4 * batch * length, 2 * vocab * width
    used = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
    )
    assert used <= 1.5 * ids + copy, memory
    assert used >= ids + copy


def test_buckets_are_exact_at_every_power_of_two():
    edges = (1 << np.arange(1, 31)) - 1

    def check(gaps):
        days = search.time_bucket(jnp.array([86_399, 86_400, 3 * 86_400]), unit=86_400)
        largest = search.time_bucket(jnp.array([2**31 - 1]), buckets=40)
        return (
            search.time_bucket(gaps),
            days,
            largest,
            search.time_gap(*map(jnp.asarray, apart)),
        )

    extreme = [-(2**31), -2134949234, -1, 0, 1, 1511999999, 2**31 - 1]
    apart = np.meshgrid(*[np.array(extreme, np.int32)] * 2)
    gaps = (edges[:, None] + np.array([-1, 0, 1])).astype(np.int32)
    found, days, largest, gap = together(check, gaps)
    expected = np.minimum(np.floor(np.log2(1.0 + gaps)), 25)
    np.testing.assert_array_equal(found, expected)
    assert days.tolist() == [0, 1, 2] and largest.tolist() == [31]
    true = np.subtract(*(x.astype(np.int64) for x in apart))
    np.testing.assert_array_equal(gap, true.clip(-(2**31), 2**31 - 1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: search.topk_masked(jnp.ones((1, 3)), jnp.ones((1, 3), bool), 0), "k=0"),
        (
            lambda: search.topk_masked(
                jnp.ones((1, 3)), jnp.ones((1, 3), bool), 1, recall=0.0
            ),
            "0 < recall <= 1",
        ),
        (
            lambda: search.hard_search(
                jnp.ones((1, 3), int), jnp.ones((1, 3), bool), jnp.ones(1, int), -1
            ),
            "k=-1",
        ),
        (lambda: search.time_bucket(jnp.ones(1, int), buckets=0), "buckets >= 1"),
        (lambda: build_ubt([0], [1], [2], []), "one length"),
        (lambda: build_ubt([0], [1], [-2], [0]), "cat must be within"),
        (lambda: build_ubt([0], [1], [7], [0], cats=7), "cat must be .* 0 .. 6"),
        (lambda: build_ubt([3], [1], [7], [0], users=3), "user must be"),
        (lambda: build_ubt([0], [1], [2], [2**31]), "time must be"),
        (
            lambda: ubt_query(
                build_ubt([0], [1], [2], [3]), jnp.array(0), jnp.array(2), 0
            ),
            "k=0",
        ),
        (
            lambda: search.soft_search(
                ((jnp.ones((3, 2)), jnp.ones((1, 3), int)),),
                jnp.ones(1, int), jnp.ones((1, 2)), 1, chunk=0,
            ),
            "chunk >= 1",
        ),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_gaps_of_unsigned_seconds_and_of_no_integers():
    apart = np.array([0, 5, 2**32 - 1], np.uint32)
    gap = together(search.time_gap, apart, apart[::-1].copy())
    assert gap.tolist() == [0, 0, 2**32 - 1]
    with pytest.raises(TypeError, match="time_gap: past must be whole numbers"):
        inspect.unwrap(search.time_gap)(jnp.int32(5), jnp.float32(2))
