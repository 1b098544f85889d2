"""Host functions as JAX operations: calls, copies, devices, derivatives, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxpapers.ops.host import on_host

ROWS = jax.ShapeDtypeStruct((8,), jnp.float32)


def rows_of(x, *_):
    return jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)


@pytest.mark.parametrize("devices", [1, 8])
def test_one_call_with_whole_writable_arrays(devices):
    calls = []

    def score(x, index):
        calls.append((type(x), x.shape, x.flags.writeable))
        x *= 2  # In place: the argument belongs to the function.
        return x.sum(1) + index

    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = np.arange(16, dtype=np.float32).reshape(8, 2)
    index = np.arange(8, dtype=np.int32)
    placed = jax.device_put((x, index), (rows, rows))
    scores, unchanged = jax.jit(lambda *a: (on_host(score, rows_of)(*a), a[0]))(*placed)
    np.testing.assert_array_equal(scores, 2 * x.sum(1) + index)
    np.testing.assert_array_equal(unchanged, x)
    assert calls == [(np.ndarray, (8, 2), True)]


def test_pytrees_and_lists():
    shapes = {"mean": jax.ShapeDtypeStruct((), jnp.float32), "rows": ROWS}

    def f(x):
        return {"mean": x.mean(), "rows": list(map(float, x))}

    result = jax.jit(on_host(f, shapes))(np.arange(8.0))
    assert float(result["mean"]) == 3.5 and result["rows"].dtype == jnp.float32
    np.testing.assert_array_equal(result["rows"], np.arange(8.0))


def test_numbers_of_other_libraries():
    """Scalars that only know their float, as zero-dimensional tensors of others."""

    class Scalar:
        def __float__(self):
            return 0.5

    result = jax.jit(on_host(lambda x: [Scalar()] * 8, ROWS))(np.ones(8, np.float32))
    np.testing.assert_array_equal(result, np.full(8, 0.5))


def test_the_derivative_is_zero():
    f = on_host(lambda x: x.sum(), jax.ShapeDtypeStruct((), jnp.float32))
    grads = jax.jit(jax.grad(lambda x: f(x) + 3 * x.sum()))(np.ones(4, np.float32))
    np.testing.assert_array_equal(grads, np.full(4, 3.0))


@pytest.mark.parametrize(
    "f, message",
    [
        (lambda x: np.zeros(3), r"shape \(3,\), expected \(8,\)"),
        (lambda x: (x, {}), "a tuple of 2, expected one array.*metadata, return the"),
        (lambda x: [x, {}], "a list of 2 that is no array of numbers"),
        (lambda x: {"reward": x}, "a dict of 1 that is no array"),
        (lambda x: None, "returned None that is no array"),
        (lambda x: [None] * 8, "a list of 8 that is no array"),
        (lambda x: ["0.5"] * 8, "returned <U3, expected float32"),
        (lambda x: 1.0, r"shape \(\), expected \(8,\)"),
        (lambda x: x * 1j, "complex128|complex64"),
        (lambda x: np.where(np.arange(8) > 5, np.nan, x), r"rows \[6, 7\] of 8"),
    ],
)
def test_results_that_are_refused(f, message):
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(
            jax.jit(on_host(f, ROWS, finite=True))(np.ones(8, np.float32))
        )


def test_structures_that_are_refused():
    with pytest.raises(Exception, match="a tuple of 1, expected the structure"):
        jax.block_until_ready(
            jax.jit(on_host(lambda x: (x,), (ROWS, ROWS)))(np.ones(8))
        )
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        on_host(lambda x: x, {"a": 8.0})(np.ones(8))
