"""Tries of SIDs and beam search: round trips, the exhaustive ranking, metrics by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import trie as tries
from tests.programs import together

RNG = np.random.default_rng(0)


def random_sids(rng, n, codes, levels, unique=True):
    sid = rng.integers(0, codes, (4 * n, levels))
    sid = np.unique(sid, axis=0) if unique else sid
    return rng.permutation(sid)[:n].astype(np.int32)


def test_search_with_a_wide_beam_is_the_exhaustive_ranking():
    """Fifty random tries by one program, half of them with forbidden items."""
    codes, levels, batch, n = 5, 3, 2, 20
    tables = [RNG.normal(size=(10**d, codes)) for d in range(levels)]
    tables = [
        np.log(np.exp(t) / np.exp(t).sum(1, keepdims=True)).astype(np.float32)
        for t in tables
    ]

    def step(carry, parent, code, depth):
        # (B, W) prefixes as decimal numbers, rows of a table.
        prefix = jnp.take_along_axis(carry, parent, 1) * 10 + code
        return prefix, jnp.asarray(tables[depth])[prefix]

    @jax.jit
    def search(trie, allowed):
        start = jnp.tile(jnp.asarray(tables[0]), (batch, 1))
        carry = jnp.zeros((batch, 1), jnp.int32)
        return [
            tries.beam_search(
                start, step, carry, trie, width, allowed, [codes] * levels
            )
            for width in (n, 4)
        ]

    for case in range(50):
        rng = np.random.default_rng(case)
        sid = random_sids(rng, n, codes, levels)
        trie = tries.build(sid)
        score = np.zeros(n)
        for d in range(levels):
            prefix = (sid[:, :d] * 10 ** np.arange(d)[::-1]).sum(1)
            score += tables[d][prefix.astype(int), sid[:, d]]
        allowed = rng.random((batch, n)) < (0.6 if case % 2 else 1.1)
        wide, narrow = search(tries.padded(trie, n), allowed[:, trie.items])
        items, values = tries.items_of(wide, trie, n)
        for row in range(batch):
            order = np.argsort(np.where(allowed[row], -score, np.inf), kind="stable")
            order = order[: allowed[row].sum()]
            np.testing.assert_array_equal(items[row, : len(order)], order)
            np.testing.assert_allclose(
                values[row, : len(order)], score[order], rtol=1e-5
            )
            assert (items[row, len(order) :] == -1).all()
        few, best = tries.items_of(narrow, trie, 4)
        rows, places = np.nonzero(few >= 0)
        assert allowed[rows, few[rows, places]].all()
        np.testing.assert_allclose(
            best[rows, places], score[few[rows, places]], rtol=1e-5
        )


def test_forbidden_branches_take_no_place_in_the_beam():
    # The best branch has forbidden items only: a beam of one must find the other.
    trie = tries.build([[0, 0], [0, 1], [1, 0]])
    start = np.log(np.float32([[0.9, 0.1]]))

    def step(carry, parent, code, depth):
        return carry, jnp.log(jnp.full((1, code.shape[1], 2), 0.5))

    def values(start):
        allowed = jnp.asarray([[False, False, True]])
        free = tries.beam_search(start, step, (), trie, 1)
        return free, tries.beam_search(start, step, (), trie, 1, allowed)

    free, bound = together(values, start)
    assert free.leaf.tolist() == [[0]] and bound.leaf.tolist() == [[2]]
    assert bound.score[0, 0] == pytest.approx(np.log(0.05), rel=1e-5)


def test_round_trip_and_items_of_one_sid_by_popularity():
    sid = random_sids(RNG, 60, 3, 3, unique=False)
    popular = RNG.integers(0, 5, 60)
    trie = tries.build(sid, np.arange(60) + 100, popular)
    codes, items = tries.sids(trie)
    np.testing.assert_array_equal(codes, sid[items - 100])
    assert sorted(items) == list(range(100, 160))
    assert (np.diff(codes @ [9, 3, 1]) >= 0).all()
    groups: dict[tuple, list] = {}
    for i, row in enumerate(sid.tolist()):
        groups.setdefault(tuple(row), []).append(i)
    assert trie.leaves == len(groups) and tries.longest(trie) == max(
        map(len, groups.values())
    )
    leaf = np.arange(trie.leaves)[None]
    found = tries.Found(leaf, -leaf.astype(float))
    shown, _ = tries.items_of(found, trie, 60)
    expected = [
        i + 100
        for key in sorted(groups)
        for i in sorted(groups[key], key=lambda i: (-popular[i], i))
    ]
    np.testing.assert_array_equal(shown[0], expected)
    allowed = np.asarray(trie.items)[None] != expected[0]
    assert tries.items_of(found, trie, 5, allowed)[0][0].tolist() == expected[1:6]


def test_recall_and_ndcg_by_hand():
    recall, ndcg = tries.hits([[4, 2, 7], [1, 0, -1], [5, 6, 3]], [2, 9, 3], 3)
    np.testing.assert_array_equal(recall, [1, 0, 1])
    np.testing.assert_allclose(ndcg, [1 / np.log2(3), 0, 0.5])
    assert tries.hits([[4, 2, 7]], [2], 1)[0].tolist() == [0]


def test_what_is_refused():
    with pytest.raises(ValueError, match="not be negative"):
        tries.build([[0, -1]])
    with pytest.raises(ValueError, match="items, levels"):
        tries.build(np.zeros((3, 0), int))
    trie = tries.build([[0], [1]])
    with pytest.raises(ValueError, match="beam must be >= 1"):
        tries.beam_search(jnp.zeros((1, 2)), lambda *_: None, (), trie, 0)
    with pytest.raises(ValueError, match="widen the beam"):
        tries.items_of(tries.Found(np.zeros((1, 1)), np.zeros((1, 1))), trie, 2)
    with pytest.raises(ValueError, match="negative"):
        tries.hits([[1]], [-1], 1)
    with pytest.raises(ValueError, match=">= 2"):
        tries.hits([[1]], [1], 2)
