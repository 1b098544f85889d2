"""Searches against brute force, against each other, and on split sequences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo
from jaxpapers.ops import search
from jaxpapers.ops.behaviour_tree import build_ubt, ubt_query

B, T = 5, 40


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


@pytest.mark.parametrize("k", [1, 6, T, T + 3])
@pytest.mark.parametrize("options", [{}, {"chunk": 8}, {"chunk": 7}])
def test_topk_is_brute_force(k, options):
    scores, mask = drawn()
    scores[:, 3] = -0.0  # Equal to 0.0.
    found = search.topk_masked(jnp.array(scores), jnp.array(mask), k, **options)
    expected = brute(scores, mask, k)
    np.testing.assert_array_equal(found.idx, expected)
    np.testing.assert_array_equal(found.valid, expected >= 0)
    best = np.take_along_axis(scores, np.maximum(expected, 0), 1)
    np.testing.assert_array_equal(found.values, np.where(expected >= 0, best, -np.inf))


def test_approximate_topk_is_exact_on_cpu():
    _, mask = drawn()
    scores = (
        np.random.default_rng(0).permutation(B * T).reshape(B, T).astype(np.float32)
    )
    for k in (3, T + 3):
        args = jnp.array(scores), jnp.array(mask), k
        np.testing.assert_array_equal(
            search.topk_masked(*args, recall=0.9).idx, brute(scores, mask, k)
        )
    text = jax.jit(lambda s, m: search.topk_masked(s, m, 3, recall=0.9)).lower(
        *args[:2]
    )
    assert "ApproxTopK" in text.as_text() or "approx" in text.as_text().lower()


def test_negative_scores_win_over_padding():
    """The peer multiplies scores of padding to 0, which then outranks real items."""
    scores, mask = drawn()
    found = search.topk_masked(jnp.array(-1 - np.abs(scores)), jnp.array(mask), 4)
    np.testing.assert_array_equal(found.valid.sum(1), np.minimum(mask.sum(1), 4))
    assert (np.asarray(found.idx) < mask.sum(1)[:, None]).all()


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
def test_topk_of_other_dtypes(dtype):
    scores, mask = drawn()
    found = search.topk_masked(jnp.array(scores, dtype), jnp.array(mask), 6, chunk=8)
    np.testing.assert_array_equal(found.idx, brute(scores, mask, 6))
    assert found.values.dtype == dtype


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


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [3, 12])
def test_topk_of_split_sequences(shards, k):
    """Also where a shard holds fewer than k positions, and the same on all shards."""
    scores, mask = drawn(1)
    ids = np.where(mask, np.arange(T, dtype=np.int32), -1)
    _, run = sharded(shards, k, T)
    found = run(scores, ids)
    expected = search.topk_masked(jnp.array(scores), jnp.array(mask), k)
    for got, want in zip(found, expected):
        assert len(got) == shards
        for one in got:
            np.testing.assert_array_equal(one, want)


def test_split_sequences_send_k_entries_per_shard():
    length, k = 4096, 3
    mesh, run = sharded(8, k, length)
    shapes = [jax.ShapeDtypeStruct((B, length), t) for t in (jnp.float32, jnp.int32)]
    found = hlo.collectives(run.lower(*shapes).compile().as_text(), mesh)
    assert {c.kind for c in found} == {"all-gather"}
    assert max(c.elements for c in found) <= 2 * B * 8 * k


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (1, 8)], ids=str)
def test_sequences_are_split_under_a_mesh(sizes):
    """Pieces of a history on ``model``, of the batch on ``data``; odd ones are whole."""
    mesh = jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    k = 6
    scores, mask = (jnp.array(x.reshape(4, 2, T)) for x in drawn(2, batch=8))
    expected = search.topk_masked(scores, mask, k)
    want = search.topk_masked(scores[:3, :, :39], mask[:3, :, :39], k)
    with jax.set_mesh(mesh):
        find = jax.jit(search.topk_on_mesh, static_argnums=2)
        found = find(scores, mask, k)
        odd = find(scores[:3, :, :39], mask[:3, :, :39], k)
        text = find.lower(scores, mask, k).compile().as_text()
    for got, one in zip(found, expected):
        np.testing.assert_array_equal(got, one)
    np.testing.assert_array_equal(odd.idx, want.idx)
    kinds = {(c.kind, c.axes) for c in hlo.collectives(text, mesh)}
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


@pytest.mark.parametrize("k", [1, 5, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_hard_search_is_brute_force_is_the_tree(k, seed):
    """Empty categories, an empty user, one behaviour, more than k, fewer than k."""
    item, cat, time, mask = histories(*log(seed))
    tree = build_ubt(*log(seed), users=5)
    hard = jax.jit(search.hard_search, static_argnums=3)
    query = jax.jit(ubt_query, static_argnums=3)
    counts = []
    for target in range(6):
        targets = np.full(5, target)
        expected = newest(cat, mask, targets, k)
        found = hard(jnp.array(cat), jnp.array(mask), jnp.array(targets), k)
        np.testing.assert_array_equal(found.idx, expected)
        np.testing.assert_array_equal(found.valid, expected >= 0)
        asked = query(tree, jnp.arange(5), jnp.array(targets), k)
        for x, got in ((item, asked.items), (time, asked.times)):
            x = np.take_along_axis(x, np.maximum(expected, 0), 1)
            np.testing.assert_array_equal(got, np.where(expected >= 0, x, 0))
            np.testing.assert_array_equal(
                search.take(jnp.array(x), found)[:, :0], got[:, :0]
            )
        np.testing.assert_array_equal(asked.valid, expected >= 0)
        counts += found.valid.sum(1).tolist()
    assert 0 in counts and 1 in counts and max(counts) == min(k, max(counts))


def test_many_candidates_of_each_user():
    _, cat, _, mask = histories(*log())
    targets = jnp.arange(15).reshape(5, 3) % 6
    wide = jnp.broadcast_to(cat[:, None], (5, 3, cat.shape[1]))
    found = search.hard_search(
        wide, jnp.broadcast_to(mask[:, None], wide.shape), targets, 4
    )
    tree = build_ubt(*log())
    asked = ubt_query(
        tree, jnp.broadcast_to(jnp.arange(5)[:, None], (5, 3)), targets, 4
    )
    for n in range(3):
        one = newest(cat, mask, np.asarray(targets[:, n]), 4)
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
    query = jax.jit(ubt_query, static_argnums=3)
    differ = []
    for u in range(5):
        for c in range(4):
            asked = [
                jax.tree.map(np.asarray, query(t, jnp.array(u), jnp.array(c), 3))
                for t in trees
            ]
            for other in asked[1:]:
                np.testing.assert_array_equal(asked[0].times, other.times)
                sure = asked[0].times > asked[0].times[2]  # No tie at the border.
                assert set(asked[0].items[sure]) == set(other.items[sure])
                differ.append((asked[0].items != other.items).any())
    assert any(differ)  # There were ties.


def test_the_trees_query_costs_the_same_for_long_histories():
    def cost(length):
        tree = build_ubt(
            np.zeros(length, int), np.arange(length), np.arange(length) % 30,
            np.arange(length),
        )  # fmt: skip
        ids = jnp.zeros(8, jnp.int32)
        tree = jax.tree.map(jnp.asarray, tree)
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
    ids = jnp.array([0, 2, 3, -1])
    assert not np.asarray(ubt_query(tree, ids, ids, 2).valid).any()
    tree = build_ubt([0, 0], [5, 6], [1, 1], [1, 2])
    asked = ubt_query(tree, jnp.array([0, 1, -1]), jnp.array([1, 1, 1]), 3)
    np.testing.assert_array_equal(asked.items, [[6, 5, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 1024])
def test_soft_search_is_topk_of_the_products(chunk):
    rng = np.random.default_rng(0)
    items, cats = rng.integers(-3, 4, (30, 4)), rng.integers(-3, 4, (6, 4))
    ids, cat = rng.integers(0, 30, (B, T)), rng.integers(0, 6, (B, T))
    query = rng.integers(-2, 3, (B, 4))
    _, mask = drawn()
    lengths = mask.sum(1)
    mask = mask & (ids != 0)
    scores = np.einsum("bth,bh->bt", items[ids] + cats[cat], query)
    find = jax.jit(functools.partial(search.soft_search, k=6, chunk=chunk))
    tables = jnp.array(items, jnp.bfloat16), search.pack(jnp.array(cats, jnp.float32))
    found = find(
        tuple(zip(tables, (jnp.array(ids), jnp.array(cat)))),
        jnp.array(lengths), jnp.array(query, jnp.float32),
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
    for power in range(1, 31):
        edge = (1 << power) - 1
        got = search.time_bucket(jnp.array([edge - 1, edge, edge + 1]))
        low, high = min(power - 1, 25), min(power, 25)
        first = low if power > 1 else 0
        assert got.tolist() == [first, high, 1 if power == 1 else high], power
    days = search.time_bucket(jnp.array([86_399, 86_400, 3 * 86_400]), unit=86_400)
    assert days.tolist() == [0, 1, 2]
    assert search.time_bucket(jnp.array([2**31 - 1]), buckets=40).tolist() == [31]


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
