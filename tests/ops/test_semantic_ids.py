"""Measures of SIDs: pair loops, bounds, closed forms."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import semantic_ids as ids
from jaxpapers.papers.r3_vae import sids as host
from tests.programs import together

RNG = np.random.default_rng(0)


def pairs_of(q, group):
    """SC by its definition."""
    u = q / np.linalg.norm(q, axis=1, keepdims=True)
    each = []
    for g in np.unique(group):
        rows = np.flatnonzero(group == g)
        if len(rows) > 1:
            each.append(
                np.mean([u[i] @ u[j] for i, j in itertools.combinations(rows, 2)])
            )
    return np.mean(each)


def test_cohesion_as_the_loop_over_pairs():
    q = RNG.normal(size=(30, 4)).astype(np.float32)
    group = RNG.integers(0, 7, 30).astype(np.int32)
    alone = np.arange(30, dtype=np.int32)

    def values(q, group, alone):
        return (
            ids.cohesion(q, group, 8), ids.cohesion(q, group, 600),
            ids.cohesion(q, alone, 30), ids.cohesion_or(q, alone, 30, -1.0),
            jax.grad(lambda q: ids.cohesion_or(q, alone, 30))(q),
        )  # fmt: skip

    fast, by_segments, none, default, slope = together(values, q, group, alone)
    expected = pairs_of(q.astype(float), group)
    assert fast == pytest.approx(expected, abs=1e-5)
    assert by_segments == pytest.approx(expected, abs=1e-5)
    assert math.isnan(none) and default == -1 and not slope.any()
    groups = ids.groups_of(group[:, None])
    assert host.cohesion(q, groups) == pytest.approx(expected, abs=1e-9)


def test_discrimination_has_its_closed_forms():
    m = 5
    simplex = (np.eye(m) - 1 / m).astype(np.float32)
    equal = np.ones((m, 3), np.float32)
    some = RNG.normal(size=(700, 4)).astype(np.float32)

    def values(simplex, equal, some):
        present = jnp.arange(len(some)) < 300
        return (
            ids.discrimination(equal), ids.discrimination(jnp.eye(m)),
            ids.discrimination(simplex, 3.0),
            ids.discrimination(some), ids.discrimination(some, chunk=800),
            ids.discrimination(some, present=present),
            ids.discrimination(some[:300]), ids.discrimination(some[:1]),
        )  # fmt: skip

    zero, orthogonal, least, parts, whole, kept, first, one = together(
        values, simplex, equal, some
    )
    assert zero == pytest.approx(0, abs=1e-5)
    assert orthogonal == pytest.approx(-2, abs=1e-5)
    assert least == pytest.approx(-3 * m / (m - 1), abs=1e-5)
    assert parts == pytest.approx(whole, abs=1e-5)
    assert kept == pytest.approx(first, abs=1e-5) and math.isnan(one)
    groups = ids.groups_of(np.arange(700)[:, None])
    assert host.discrimination(some, groups) == pytest.approx(whole, abs=1e-5)


def test_pairs_are_drawn_where_there_are_many_groups():
    some = RNG.normal(size=(ids.MAX_GROUPS + 4, 3)).astype(np.float32)
    drawn = together(
        lambda x: ids.discrimination(x, key=jax.random.key(0), pairs=2**16), some
    )
    exact = np.log(np.mean(np.exp(-2 * (1 - RNG.uniform(-1, 1, 10**6)))))
    assert drawn == pytest.approx(exact, abs=0.03)
    groups = ids.groups_of(np.arange(len(some))[:, None])
    assert host.discrimination(some, groups) == pytest.approx(exact, abs=0.03)


def test_statistics_by_hand():
    sid = [[0, 0], [0, 0], [0, 1], [3, 1]]
    numbers = ids.code_statistics(sid, 4)
    assert numbers["usage_1"] == 0.5 and numbers["unique"] == 0.75
    assert numbers["collision"] == 0.25 and numbers["colliding"] == 0.5
    assert numbers["items_per_sid"] == pytest.approx(4 / 3)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert numbers["perplexity_1"] == pytest.approx(math.exp(entropy))
    assert numbers["perplexity_2"] == pytest.approx(2)
    # Counts 3, 1, 0, 0: mean difference 1.75 by twice the mean 1.
    assert numbers["gini_1"] == pytest.approx(0.625)
    full = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert numbers["entropy"] == pytest.approx(full / math.log(4))
    assert numbers["capacity"] == 0.25 and numbers["largest_group"] == 2
    assert ids.code_statistics([[0], [1]], 2)["gini_1"] == 0


def test_soft_centres_and_neighbours():
    q, w = RNG.normal(size=(5, 2)), RNG.uniform(size=(5, 3))
    centres = together(ids.soft_centres, q.astype(np.float32), w.astype(np.float32))
    np.testing.assert_allclose(centres, (w.T @ q) / w.sum(0)[:, None], rtol=1e-5)
    x = RNG.normal(size=(40, 3))
    assert ids.neighbour_overlap(x, 5 * x, 10) == 1
    assert ids.neighbour_overlap(x, RNG.normal(size=(40, 3)), 10) < 0.6


def test_what_is_refused():
    with pytest.raises(ValueError, match="codes must be in"):
        ids.code_statistics([[0, 4]], 4)
    with pytest.raises(ValueError, match="prefix must be between 1 and 2"):
        ids.groups_of([[0, 1]], 3)
    with pytest.raises(ValueError, match="items, levels"):
        ids.groups_of(np.zeros((0, 2)))
