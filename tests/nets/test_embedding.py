"""Lookups in whole and in split tables: values, gradients, and what crosses devices."""

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
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, V, (B, T)).astype(np.int32)
IDS[0], IDS[1, :2], IDS[2], IDS[3, 0] = 0, (-5, V), 7, rows.FILL
# As embedding.normal: the padding's row is zero.
TABLE = RNG.normal(size=(V, D)).astype(np.float32)
TABLE[0] = 0
OUT = RNG.normal(size=(B, T, D)).astype(np.float32)
# The rows that are read, and the sum of the cotangents of each.
REAL = np.where((IDS < 0) | (IDS >= V), embedding.OOV, IDS)
HOT = np.eye(V, dtype=np.float32)[REAL] * (REAL != 0)[..., None]
FOUND, GRAD = HOT @ TABLE, np.einsum("btv,btd->vd", HOT, OUT)
matrix = pytest.mark.matrix


def grid(sizes):
    shape = dict(zip(("data", "model"), sizes))
    return meshes.make_mesh(shape, jax.devices()[: sizes[0] * sizes[1]])


def value(table, ids):
    return (embedding.lookup(table, ids) * OUT[: ids.shape[0]]).sum()


def test_lookup_is_the_one_hot_product():
    def f(table, ids):
        five = table.at[0].set(5.0)
        zero = embedding.lookup(five, jnp.zeros((2, 2), int))
        drawn = embedding.normal(jax.random.key(0), V, D, 1.0)
        return (
            embedding.lookup(table, ids), jax.grad(value)(table, ids), zero, drawn
        )  # fmt: skip

    found, grad, zero, drawn = together(f, TABLE, IDS)
    np.testing.assert_allclose(found, FOUND, rtol=1e-6)
    np.testing.assert_allclose(grad, GRAD, rtol=1e-5, atol=1e-6)
    assert not grad[0].any() and grad[1].any()
    assert not zero.any()  # Padding reads zero even if its row is not.
    assert drawn.shape == (V, D) and abs(drawn[1:].std() - 1) < 0.2
    assert not drawn[0].any()


@pytest.mark.parametrize(
    "sizes",
    [(4, 2), *(pytest.param(m, marks=matrix)
               for m in ((2, 1), (1, 2), (8, 1), (2, 4), (1, 8)))],
    ids=str,
)  # fmt: skip
def test_split_tables_read_and_learn_the_same(sizes):
    mesh = grid(sizes)

    def f(table, ids):
        found, grad = embedding.lookup(table, ids), jax.grad(value)(table, ids)
        return found, grad, embedding.lookup(table, jnp.asarray(IDS[:3]))

    with jax.set_mesh(mesh):
        table = jax.device_put(TABLE, NamedSharding(mesh, P("model", None)))
        ids = jax.device_put(IDS, NamedSharding(mesh, P("data", None)))
        found, grad, odd = jax.jit(f)(table, ids)
    np.testing.assert_array_equal(found, FOUND)
    np.testing.assert_allclose(grad, GRAD, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(odd, FOUND[:3])
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 3)
    assert grad.sharding.is_equivalent_to(table.sharding, 2)


@pytest.mark.parametrize(
    "sizes",
    [(4, 2), *(pytest.param(m, marks=matrix) for m in ((8, 1), (2, 4), (1, 8)))],
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
    def f(table, ids):
        found = rows.unique(ids, V)
        some = rows.Rows(found, rows.take(table, found))

        def loss(values):
            return value(rows.Rows(found, values), ids)

        grad = rows.add(jnp.zeros_like(table), found, jax.grad(loss)(some.values))
        # Without the out-of-vocabulary row an unknown id is zero, not a neighbour.
        few = rows.unique(jnp.array([3, 9]), V)
        few = rows.Rows(few, rows.take(table, few))
        unknown = embedding.lookup(few, jnp.array([4, 63, 2, 0]))
        known = embedding.lookup(few, jnp.array([3, 9]))
        return embedding.lookup(some, ids), grad, unknown, known

    found, grad, unknown, known = together(f, TABLE, IDS)
    np.testing.assert_array_equal(found, FOUND)
    np.testing.assert_allclose(grad, GRAD, rtol=1e-5, atol=1e-6)
    assert not unknown.any()
    np.testing.assert_array_equal(known, TABLE[[3, 9]])


@pytest.mark.parametrize("vocab", [V, 10_000])
def test_unique_ids_are_static_in_number_and_exact(vocab):
    ids = np.concatenate([IDS.reshape(-1), [vocab - 1, 0]]).astype(np.int32)
    found = together(lambda ids: rows.unique(ids, vocab), ids)
    assert found.shape == (min(vocab, ids.size),)
    real = np.where((ids < 0) | (ids >= vocab), 1, ids)
    expected = np.unique(real[real > 0])
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert (found[len(expected) :] == rows.FILL).all()


def test_hash_is_stable_and_spreads():
    def f(ids):
        zeros = embedding.hash_ids(jnp.zeros(3, int), 100)
        return (
            embedding.hash_ids(ids, 100), embedding.hash_ids(ids, 100, seed=1), zeros
        )  # fmt: skip

    found, other, zeros = together(f, np.arange(1, 20_001))
    assert found.min() == 2 and found.max() == 101
    counts = np.bincount(found)[2:]
    assert abs(counts - 200).max() < 5 * np.sqrt(200)
    assert 0.005 < (found == other).mean() < 0.02
    assert zeros.tolist() == [0, 0, 0]


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
