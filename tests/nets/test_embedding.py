"""Lookups in whole and in split tables: values, gradients, and what crosses devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo
from jaxpapers import mesh as meshes
from jaxpapers.nets import embedding
from jaxpapers.ops import rows
from tests.programs import together

V, D, B, T = 64, 4, 8, 3
rng = np.random.default_rng(0)
TABLE = rng.normal(size=(V, D)).astype(np.float32)
TABLE[0] = 0
OUT = rng.normal(size=(B, T, D)).astype(np.float32)
IDS = rng.integers(0, V, (B, T)).astype(np.int32)
# Padding, below and above the range, repeated, and the fill of ``Rows``.
IDS[0], IDS[1, :2], IDS[2], IDS[3, 0] = 0, (-5, V), 7, rows.FILL
matrix = pytest.mark.matrix


def grid(sizes):
    shape = dict(zip(("data", "model"), sizes))
    return meshes.make_mesh(shape, jax.devices()[: sizes[0] * sizes[1]])


def value(table, ids):
    return (embedding.lookup(table, ids) * OUT[: ids.shape[0]]).sum()


def one_hot():
    """Looked-up vectors and the table's gradient, by a one-hot product in NumPy."""
    ids = np.where((IDS < 0) | (IDS >= V), embedding.OOV, IDS)
    hot = np.eye(V, dtype=np.float32)[ids] * (ids != 0)[..., None]
    return hot @ TABLE, np.einsum("btv,btd->vd", hot, OUT)


def test_lookup_is_the_one_hot_product():
    spoiled = TABLE.copy()
    spoiled[0] = 5

    def check(table, ids, spoiled):
        return (
            embedding.lookup(table, ids),
            jax.grad(value)(table, ids),
            embedding.lookup(spoiled, jnp.zeros((2, 2), int)),
        )

    found, grad, padding = together(check, TABLE, IDS, spoiled)
    expected = one_hot()
    np.testing.assert_allclose(found, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-5, atol=1e-6)
    assert not grad[0].any() and grad[1].any()
    # Padding reads zeros even if its row has others.
    assert not padding.any()


@pytest.mark.parametrize(
    "sizes",
    [(4, 2), *(pytest.param(s, marks=matrix) for s in
               ((2, 1), (1, 2), (8, 1), (2, 4), (1, 8)))],
    ids=str,
)  # fmt: skip
def test_split_tables_read_and_learn_the_same(sizes):
    mesh = grid(sizes)

    def check(table, ids):
        odd = embedding.lookup(table, ids[:3])
        return embedding.lookup(table, ids), jax.grad(value)(table, ids), odd

    with jax.set_mesh(mesh):
        table = jax.device_put(TABLE, NamedSharding(mesh, P("model", None)))
        ids = jax.device_put(IDS, NamedSharding(mesh, P("data", None)))
        found, grad, odd = jax.jit(check)(table, ids)
    expected = one_hot()
    np.testing.assert_array_equal(found, expected[0])
    np.testing.assert_allclose(grad, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(odd, expected[0][:3])
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 3)
    assert grad.sharding.is_equivalent_to(table.sharding, 2)


@pytest.mark.parametrize(
    "sizes",
    [(4, 2), *(pytest.param(s, marks=matrix) for s in ((8, 1), (2, 4), (1, 8)))],
    ids=str,
)
def test_no_collective_is_as_large_as_the_table(sizes):
    """Forward and backward move the batch's ids, rows and cotangents, nothing else."""
    mesh = grid(sizes)
    count = 1 << 16
    with jax.set_mesh(mesh):
        table = jax.ShapeDtypeStruct(
            (count, D), jnp.float32, sharding=NamedSharding(mesh, P("model", None))
        )
        ids = jax.ShapeDtypeStruct(
            IDS.shape, jnp.int32, sharding=NamedSharding(mesh, P("data", None))
        )
        step = jax.jit(jax.value_and_grad(value))
        text = step.lower(table, ids).compile().as_text()
    found = hlo.collectives(text, mesh)
    assert found
    assert max(c.elements for c in found) <= B * T * D
    kinds = {(c.kind, c.axes) for c in found}
    if sizes[1] > 1:
        assert ("all-reduce", ("model",)) in kinds
    if sizes[0] > 1:
        assert ("all-gather", ("data",)) in kinds


def test_rows_of_a_batch_read_as_the_whole_table():
    def check(table, ids):
        distinct = rows.unique(ids, V)
        values = rows.take(table, distinct)
        batch = rows.Rows(distinct, values)
        grad = jax.grad(lambda v: value(rows.Rows(distinct, v), ids))(values)
        # Without the out-of-vocabulary row an unknown id is zero, not a neighbour.
        few = rows.unique(jnp.array([3, 9]), V)
        few = rows.Rows(few, rows.take(table, few))
        return (
            embedding.lookup(batch, ids),
            rows.add(jnp.zeros_like(table), distinct, grad),
            embedding.lookup(few, jnp.array([4, 63, 2, 0])),
            embedding.lookup(few, jnp.array([3, 9])),
        )

    found, grad, unknown, known = together(check, TABLE, IDS)
    expected = one_hot()
    np.testing.assert_allclose(found, expected[0], rtol=1e-6)
    np.testing.assert_allclose(grad, expected[1], rtol=1e-5, atol=1e-6)
    assert not unknown.any()
    np.testing.assert_array_equal(known, TABLE[np.array([3, 9])])


@pytest.mark.parametrize("vocab", [V, 10_000])
def test_unique_ids_are_static_in_number_and_exact(vocab):
    ids = np.append(IDS, [vocab - 1, 0]).astype(np.int32)
    found = together(functools.partial(rows.unique, vocab=vocab), ids)
    assert found.shape == (min(vocab, ids.size),)
    real = np.where((ids < 0) | (ids >= vocab), 1, ids)
    expected = np.unique(real[real > 0])
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert (found[len(expected) :] == rows.FILL).all()


def test_hash_is_stable_and_spreads():
    found, other, padding = together(
        lambda ids: (
            embedding.hash_ids(ids, 100),
            embedding.hash_ids(ids, 100, seed=1),
            embedding.hash_ids(0 * ids[:3], 100),
        ),
        np.arange(1, 20_001, dtype=np.int32),
    )
    assert found.min() == 2 and found.max() == 101
    counts = np.bincount(found)[2:]
    assert abs(counts - 200).max() < 5 * np.sqrt(200)
    assert 0.005 < (found == other).mean() < 0.02
    assert padding.tolist() == [0, 0, 0]


@pytest.mark.parametrize("draw", [embedding.normal, embedding.glorot])
def test_first_values_leave_padding_at_zero(draw, key):
    table = together(lambda key: draw(key, 500, 20), key)
    scale = np.sqrt(6 / 520) / np.sqrt(3) if draw is embedding.glorot else 0.01
    assert table[1:].std() == pytest.approx(scale, rel=0.05)
    assert not table[0].any() and table[1].any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: embedding.padded_rows(1), "vocab >= 2"),
        (lambda: embedding.padded_rows(5, 0), "multiple >= 1"),
        (lambda: embedding.hash_ids(jnp.asarray(IDS), 0), "buckets"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_that_do_not_divide_are_refused():
    with jax.set_mesh(grid((4, 2))), pytest.raises(ValueError, match="padded_rows"):
        jax.jit(embedding.lookup).lower(TABLE[:-1], IDS)
