"""Meshes, and which axis of which leaf lies on which mesh axis."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import mesh as meshes
from jaxpapers import optim
from jaxpapers.method import State

F32 = jnp.float32


@pytest.mark.parametrize(
    "text, shape",
    [
        ("data:8", {"data": 8}),
        ("data:4, model:2", {"data": 4, "model": 2}),
        ("replica:2,data:2,model:2", {"replica": 2, "data": 2, "model": 2}),
        ("slice:4,data:64,model:8", {"slice": 4, "data": 64, "model": 8}),
    ],
)
def test_parse(text, shape):
    assert meshes.parse_mesh(text) == shape


@pytest.mark.parametrize(
    "text", ["", "data", "data:0", "data:-1", "rows:2", "data:2,data:2", "data:2,", "8"]
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="--mesh: cannot read .*expected e.g."):
        meshes.parse_mesh(text)


def test_make_mesh():
    assert dict(meshes.make_mesh().shape) == {"data": 8, "model": 1}
    mesh = meshes.make_mesh({"model": 2, "replica": 2, "data": 2})
    assert mesh.axis_names == ("replica", "data", "model")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert meshes.make_mesh({"model": 8}).shape["data"] == 1
    slices = meshes.make_mesh({"data": 2, "replica": 2, "slice": 2})
    assert slices.axis_names == ("slice", "replica", "data", "model")
    assert [d.id for d in slices.devices[1].flat] == [4, 5, 6, 7]
    every = {"slice": 1, "replica": 1, "data": 8, "model": 1}
    assert dict(meshes.make_mesh(every=True).shape) == every
    every = {"slice": 1, "replica": 2, "data": 1, "model": 4}
    assert dict(meshes.make_mesh({"replica": 2, "model": 4}, every=True).shape) == every
    two = meshes.make_mesh({"data": 2}, jax.devices()[2:4])
    assert list(two.devices.flat) == jax.devices()[2:4]
    with pytest.raises(ValueError, match="needs 6 devices, got 8; change --mesh"):
        meshes.make_mesh({"data": 3, "model": 2})
    with pytest.raises(ValueError, match="needs 8 devices, got 1"):
        meshes.make_mesh({"data": 8}, jax.devices()[:1])


def test_a_state_larger_than_the_memory_is_refused(monkeypatch):
    mesh = meshes.make_mesh({"data": 4, "model": 2})
    half = NamedSharding(mesh, P("model"))
    table = jax.ShapeDtypeStruct((2**20, 2**10), F32, sharding=half)
    small = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    shapes = State(small, {"table": table}, (), (), small)
    monkeypatch.setattr(meshes, "_memory", lambda devices: 2.0**31 + 8)
    meshes.check_memory(shapes, mesh)
    monkeypatch.setattr(meshes, "_memory", lambda devices: 2.0**31 + 7)
    with pytest.raises(ValueError, match="2.1 GB on each of 8 .* params/table, 2.1 GB"):
        meshes.check_memory(shapes, mesh)
    monkeypatch.undo()
    assert 1e8 < meshes._memory(jax.local_devices()) < 1e15
    assert meshes._memory([]) is None


def state_of(params, tx):
    def init(key):
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)
        return State(jnp.zeros((), jnp.int32), zeros, tx.init(zeros), (), key)

    return jax.eval_shape(init, jax.random.key(0))


PARAMS = {
    "a": {"kernel": jax.ShapeDtypeStruct((16, 8), F32)},
    "b": {"kernel": jax.ShapeDtypeStruct((8, 4), F32)},
    "bias": jax.ShapeDtypeStruct((8,), F32),
}
MESH = {"data": 4, "model": 2}


def specs(rules, tx=None, params=None):
    state = state_of(params or PARAMS, tx or optax.adam(1e-3))
    shardings = meshes.state_shardings(state, rules, meshes.make_mesh(MESH))
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    return jax.tree.map(lambda s: s.spec, shardings)


def test_first_match_wins_and_the_rest_is_whole():
    found = specs([("a/kernel", P("data", "model")), ("kernel", P("model"))])
    assert found.params == {
        "a": {"kernel": P("data", "model")},
        "b": {"kernel": P("model")},
        "bias": P(),
    }
    assert found.step == found.key == P()


def test_optimizer_state_follows_its_parameter():
    found = specs(
        [("kernel", P("data"))], optax.chain(optax.clip(1.0), optax.adam(0.1))
    )
    adam = found.opt_state[1][0]
    assert adam.mu == adam.nu == found.params
    assert adam.count == P()
    # Factored moments of another shape are whole, not cut by the parameter's rule.
    factored = specs(
        [("kernel", P("data", "model"))],
        optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    ).opt_state
    assert factored.v_row["a"]["kernel"] == factored.v_col["a"]["kernel"] == P()


def test_an_axis_reduced_to_one_is_whole():
    """Adafactor-like statistics that keep their parameter's rank follow its rule."""

    def init(params):
        rows = jax.tree.map(lambda x: jnp.zeros((*x.shape[:-1], 1)), params)
        return {"rows": rows, "other": jax.tree.map(lambda x: x[..., :3], params)}

    tx = optax.GradientTransformation(init, lambda g, s, p=None: (g, s))
    params = {"a": jax.ShapeDtypeStruct((16, 8), F32)}
    found = specs([("^params/a|a$", P("data", "model"))], tx, params).opt_state
    assert found["rows"]["a"] == P("data", None)
    assert found["other"]["a"] == P()


def test_dions_q_has_a_spec_of_its_own():
    rules = [
        *optim.state_rules(),
        ("a/kernel", P("data", "model")),
        ("b/kernel", P("model")),
    ]
    tx = optax.chain(optax.clip(1.0), optim.dion(0.1, 0.5))
    state, mesh = state_of(PARAMS, tx), meshes.make_mesh(MESH)
    found = meshes.state_shardings(state, rules, mesh)
    expected = optim.dion_state_sharding(state.opt_state, state.params, found.params)
    same = jax.tree.map(
        lambda x, a, b: a.is_equivalent_to(b, x.ndim),
        state.opt_state, found.opt_state, expected,
    )  # fmt: skip
    assert all(jax.tree.leaves(same))
    named = {
        jax.tree_util.keystr(k, simple=True, separator="/"): v.spec
        for k, v in jax.tree_util.tree_flatten_with_path(found.opt_state)[0]
    }
    (q,) = [v for k, v in named.items() if k.endswith("q/a/kernel")]
    assert q[0] == "model" and P("data", "model") in named.values()


def test_a_function_rule_does_not_match_in_a_parameters_path():
    params = {"q": {"kernel": jax.ShapeDtypeStruct((16, 8), F32)}}
    rules = [*optim.state_rules(), ("kernel", P("data"))]
    found = specs(rules, optax.adam(0.1), params)
    assert found.params["q"]["kernel"] == P("data")
    assert found.opt_state[0].mu["q"]["kernel"] == P("data")


def test_a_rule_without_a_leaf():
    with pytest.raises(ValueError, match=r"rule 'heads/\(kernel\)' matches no leaf"):
        specs([("kernel", P("data")), ("heads/(kernel)", P("data"))])


@pytest.mark.parametrize(
    "spec, message",
    [
        (P(None, "data"), r"b/kernel: axis 1 of shape \(6, 5\).*'data' of size 4"),
        (P(("data", "model")), r"axis 0 of shape \(6, 5\).*of size 8"),
        (P(None, None, "data"), r"more entries than shape \(6, 5\)"),
    ],
)
def test_a_dimension_that_does_not_divide(spec, message):
    params = {"b": {"kernel": jax.ShapeDtypeStruct((6, 5), F32)}}
    with pytest.raises(ValueError, match=message):
        specs([("kernel", spec)], params=params)


def test_batch_rows():
    mesh = meshes.make_mesh(MESH)
    assert meshes.batch_rows(mesh, 8) == slice(0, 8)
    with pytest.raises(ValueError, match="batch=10 does not.*4 data shards.*works: 8"):
        meshes.batch_rows(mesh, 10)
    with pytest.raises(ValueError, match="batch=1 does not.*works: 8$"):
        meshes.batch_rows(meshes.make_mesh({"replica": 2, "data": 4}), 1)
    with pytest.raises(ValueError, match="batch=4 does not.*works: 8$"):
        meshes.batch_rows(meshes.make_mesh({"slice": 4, "data": 2}), 4)


class Batch(NamedTuple):
    x: np.ndarray
    y: np.ndarray


def test_put_batch():
    mesh = meshes.make_mesh(MESH)
    batch = Batch(np.arange(24).reshape(8, 3), np.arange(8.0, dtype=np.float32))
    placed = meshes.put_batch(batch, mesh, 8)
    np.testing.assert_array_equal(placed.x, batch.x)
    expected = NamedSharding(mesh, P("data"))
    assert placed.x.sharding.is_equivalent_to(expected, 2)
    assert placed.y.sharding.shard_shape((8,)) == (2,)
    for axes in ({"replica": 2, "data": 4}, {"slice": 2, "replica": 2, "data": 2}):
        placed = meshes.put_batch(batch, meshes.make_mesh(axes), 8)
        assert placed.y.sharding.shard_shape((8,)) == (1,)
