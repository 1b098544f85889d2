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

V, D, B, T = 64, 4, 8, 3
IDS = jax.random.randint(jax.random.key(1), (B, T), 0, V).at[0].set(0).at[1, 0].set(-5)
IDS = IDS.at[1, 1].set(V).at[2].set(7).at[3, 0].set(rows.FILL)
TABLE = embedding.normal(jax.random.key(0), V, D, 1.0)
OUT = jax.random.normal(jax.random.key(2), (B, T, D))
MESHES = [(2, 1), (1, 2), (8, 1), (4, 2), (2, 4), (1, 8)]


def grid(sizes):
    shape = dict(zip(("data", "model"), sizes))
    return meshes.make_mesh(shape, jax.devices()[: sizes[0] * sizes[1]])


def value(table, ids):
    return (embedding.lookup(table, ids) * OUT[: ids.shape[0]]).sum()


def test_lookup_is_the_one_hot_product():
    ids = jnp.where((IDS < 0) | (IDS >= V), embedding.OOV, IDS)
    hot = jax.nn.one_hot(ids, V) * (ids != 0)[..., None]
    found = embedding.lookup(TABLE, IDS)
    np.testing.assert_allclose(found, hot @ TABLE, rtol=1e-6)
    grad = jax.grad(value)(TABLE, IDS)
    expected = jnp.einsum("btv,btd->vd", hot, OUT)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)
    assert not np.asarray(grad[0]).any() and np.asarray(grad[1]).any()


def test_padding_reads_zero_even_if_its_row_is_not():
    table = TABLE.at[0].set(5.0)
    assert not np.asarray(embedding.lookup(table, jnp.zeros((2, 2), int))).any()


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_split_tables_read_and_learn_the_same(sizes):
    mesh = grid(sizes)
    expected = embedding.lookup(TABLE, IDS), jax.grad(value)(TABLE, IDS)
    with jax.set_mesh(mesh):
        table = jax.device_put(TABLE, NamedSharding(mesh, P("model", None)))
        ids = jax.device_put(IDS, NamedSharding(mesh, P("data", None)))
        found = jax.jit(embedding.lookup)(table, ids)
        grad = jax.jit(jax.grad(value))(table, ids)
        odd = jax.jit(embedding.lookup)(table, IDS[:3])
    np.testing.assert_array_equal(found, expected[0])
    np.testing.assert_allclose(grad, expected[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(odd, expected[0][:3])
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 3)
    assert grad.sharding.is_equivalent_to(table.sharding, 2)


@pytest.mark.parametrize("sizes", [(8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
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
    found = rows.unique(IDS, V)
    some = rows.Rows(found, rows.take(TABLE, found))
    np.testing.assert_array_equal(
        embedding.lookup(some, IDS), embedding.lookup(TABLE, IDS)
    )

    def loss(values):
        return value(rows.Rows(found, values), IDS)

    grad = rows.add(jnp.zeros_like(TABLE), found, jax.grad(loss)(some.values))
    np.testing.assert_allclose(grad, jax.grad(value)(TABLE, IDS), rtol=1e-5, atol=1e-6)
    # Without the out-of-vocabulary row an unknown id is zero, not a neighbour.
    few = rows.unique(jnp.array([3, 9]), V)
    some = rows.Rows(few, rows.take(TABLE, few))
    assert not np.asarray(embedding.lookup(some, jnp.array([4, 63, 2, 0]))).any()
    np.testing.assert_array_equal(
        embedding.lookup(some, jnp.array([3, 9])), TABLE[jnp.array([3, 9])]
    )


@pytest.mark.parametrize("vocab", [V, 10_000])
def test_unique_ids_are_static_in_number_and_exact(vocab):
    ids = jnp.concatenate([IDS.reshape(-1), jnp.array([vocab - 1, 0])])
    found = np.asarray(rows.unique(ids, vocab))
    assert found.shape == (min(vocab, ids.size),)
    real = np.where((ids < 0) | (ids >= vocab), 1, ids)
    expected = np.unique(real[real > 0])
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert (found[len(expected) :] == rows.FILL).all()


def test_hash_is_stable_and_spreads():
    ids = jnp.arange(1, 20_001)
    found = np.asarray(embedding.hash_ids(ids, 100))
    assert found.min() == 2 and found.max() == 101
    counts = np.bincount(found)[2:]
    assert abs(counts - 200).max() < 5 * np.sqrt(200)
    other = np.asarray(embedding.hash_ids(ids, 100, seed=1))
    assert 0.005 < (found == other).mean() < 0.02
    assert np.asarray(embedding.hash_ids(jnp.zeros(3, int), 100)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: embedding.padded_rows(1), "vocab >= 2"),
        (lambda: embedding.padded_rows(5, 0), "multiple >= 1"),
        (lambda: embedding.hash_ids(IDS, 0), "buckets"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_that_do_not_divide_are_refused():
    with jax.set_mesh(grid((4, 2))), pytest.raises(ValueError, match="padded_rows"):
        jax.jit(embedding.lookup).lower(TABLE[:-1], IDS)
