"""Chosen columns of sharded matrices: the same ones back, and the bytes of the docs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo, plan
from jaxpapers.optim.columns import gather_columns
from jaxpapers.optim.newton_schulz import choose_exchange
from jaxpapers.optim.power_iteration import MeshAxes

D = "data"
DEVICES, COLUMNS = 8, 6
# Matrices, rows, chosen columns -> what a device has then, matrices it works on, rows;
# and in which order the matrices are stored.
CASES = {
    (12, 128, 12): ("matrices", 2, 128, "sl"),
    (2, 1024, 4): ("rows", 2, 128, "ls"),
}


def index(n, k):
    """On the first devices, on the last, then anywhere."""
    rng = np.random.default_rng(0)
    s = DEVICES * COLUMNS
    rows = [np.arange(k), s - k + np.arange(k)]
    rows += [rng.choice(s, k, replace=False) for _ in range(n)]
    return np.sort(rows[:n]).astype(np.int32)


def there_and_back(devices, choice, order):
    """(x, index) -> the share of every device, and twice the columns at their places."""

    def turn(x):
        return x if order == "sl" else jnp.swapaxes(x, 1, 2)

    def run(x, index):
        columns = gather_columns(turn(x), index, MeshAxes(q=(D,)), order)
        assert columns.summed == ((D,) if choice == "rows" else ())
        back = turn(columns.back(2 * columns.values))
        return columns.values, back, turn(columns.chosen)

    mesh = Mesh(np.asarray(devices)[:DEVICES], (D,))
    split = P(None, D)
    return mesh, jax.jit(
        jax.shard_map(
            run, mesh=mesh, in_specs=(split, P()), out_specs=(P(D), split, split)
        )
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_columns_there_and_back(case):
    n, l, k = case
    choice, matrices, width, order = CASES[case]
    assert choose_exchange(n, l, k, DEVICES, gather=False) == choice
    x = np.random.default_rng(1).normal(size=(n, DEVICES * COLUMNS, l))
    x = x.astype(np.float32)
    chosen = index(n, k)
    _, run = there_and_back(jax.devices(), choice, order)
    values, back, mask = jax.device_get(run(x, chosen))
    columns = np.take_along_axis(x, chosen[..., None], axis=1)
    shares = values.reshape(DEVICES, matrices, k, width)
    if choice == "matrices":  # The last are padding.
        assert not shares.reshape(-1, k, width)[n:].any()
        np.testing.assert_array_equal(shares.reshape(-1, k, width)[:n], columns)
    else:
        np.testing.assert_array_equal(np.concatenate(shares, axis=-1), columns)
    expected = np.zeros_like(x)
    np.put_along_axis(expected, chosen[..., None], 2 * columns, axis=1)
    np.testing.assert_array_equal(back, expected)
    np.testing.assert_array_equal(mask[..., 0], expected.any(-1))


@pytest.mark.parametrize(
    "case, tpu",
    [
        pytest.param(case, tpu, marks=pytest.mark.matrix if tpu else ())
        for case in CASES
        for tpu in (False, True)
    ],
    ids=str,
)
def test_bytes_are_the_closed_form(case, tpu, request):
    """A TPU sends no padding."""
    n, l, k = case
    choice, matrices, width, order = CASES[case]
    if tpu:
        request.getfixturevalue("libtpu")
    devices = plan.topology_devices("v5e:2x4") if tpu else jax.devices()
    mesh, run = there_and_back(devices, choice, order)
    where = functools.partial(NamedSharding, mesh)
    x = jax.ShapeDtypeStruct(
        (n, DEVICES * COLUMNS, l), jnp.float32, sharding=where(P(None, D))
    )
    chosen = jax.ShapeDtypeStruct((n, k), jnp.int32, sharding=where(P()))
    found = hlo.collectives(run.lower(x, chosen).compile().as_text(), mesh)
    share = matrices * width * k
    if not tpu:  # Slices of every device and matrix are padded, and have an offset.
        share = DEVICES * matrices * (min(k, COLUMNS) * width + 1)
    assert sum(hlo.wire_bytes(found).values()) == 2 * 7 / 8 * share * 4
    assert {c.kind for c in found} == {"ragged-all-to-all" if tpu else "all-to-all"}
