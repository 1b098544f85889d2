"""Training loops of flax users on 8 devices: boxed parameters and states."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import (
    DimensionNumbers,
    dion,
    dion_state_sharding,
    normuon,
    scale_by_dion,
)
from jaxpapers.optim.paths import named_leaves
from tests.programs import COMPILED

RULES = (("layers", None), ("embed", "data"), ("mlp", "model"))
STACKED = DimensionNumbers(-2, -1)
explicit = pytest.param("Explicit", marks=pytest.mark.matrix)
# Householder and Cholesky loops cost a compiler seconds, and are not what is tested.
quick = functools.partial(scale_by_dion, 0.5, orthogonalize="cqr2")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@struct.dataclass
class TrainState:
    """As flax's: fields are attributes in the path of a leaf."""

    step: Any
    params: Any
    opt_state: Any


def boxed(kind):
    """{"layers": {"wi"}} with axes that are named by mesh axes or logical ones."""
    x = jnp.asarray(normal(0, 2, 8, 12))
    if kind == "logical":
        box = nn.LogicallyPartitioned(x, ("layers", "embed", "mlp"))
    else:
        box = nn.Partitioned(x, (None, "data", "model"))
    return {"layers": {"wi": {"kernel": box}}, "gain": jnp.ones(8)}


def init(kind, tx):
    params = boxed(kind)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def train(state, tx):
    """Two steps in one program, of parameters without boxes."""
    for i in range(2):
        grads = jax.tree.map(lambda p, i=i: (i + 1) * p - jnp.sin(p), state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(state.step + 1, params, opt_state)
    return state


@pytest.mark.parametrize("kind", ["partitioned", "logical"])
def test_a_state_is_laid_out_by_its_boxes(kind, make_mesh):
    # nanodo's and MaxText's way: eval_shape, specs of the boxes, jit(out_shardings=).
    mesh = make_mesh((4, 2))
    where = P(None, "data", "model")
    matrices = quick(weight_dimension_numbers=STACKED, sharding=where)
    tx = optax.partition(
        {"dion": matrices, "sgd": optax.sgd(0.1, momentum=0.9)},
        {"layers": "dion", "gain": "sgd"},
    )
    abstract = jax.eval_shape(functools.partial(init, kind, tx))
    if kind == "logical":
        specs = nn.get_partition_spec(abstract)
        where = nn.logical_to_mesh_sharding(specs, mesh, RULES)
    else:
        where = nn.get_sharding(abstract, mesh)
    with jax.set_mesh(mesh):
        make = jax.jit(functools.partial(init, kind, tx), out_shardings=where)
        state = nn.unbox(make())
        q = state.opt_state.inner_states["dion"].inner_state.q["layers"]["wi"]["kernel"]
        # (layers, embed, rank): Q is split along the axis that it shares with W.
        assert q.shape == (2, 8, 4)
        assert q.sharding.shard_shape(q.shape) == (2, 2, 4)
        got = jax.jit(functools.partial(train, tx=tx))(state)
    alone = jax.jit(lambda: train(nn.unbox(init(kind, tx)), tx))()
    for (path, x), (_, y) in zip(named_leaves(got)[0], named_leaves(alone)[0]):
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-6, err_msg=path)


def test_shardings_of_a_boxed_state(make_mesh):
    mesh = make_mesh((4, 2))
    params = boxed("partitioned")
    where = {
        "layers": {"wi": {"kernel": NamedSharding(mesh, P(None, "data", "model"))}},
        "gain": NamedSharding(mesh, P()),
    }
    tx = dion(0.1, 0.5, weight_dimension_numbers=STACKED)
    for tree in (params, nn.unbox(params)):
        state = jax.eval_shape(tx.init, tree)
        got = dion_state_sharding(
            state, params, where, weight_dimension_numbers=STACKED
        )
        assert jax.tree.structure(got) == jax.tree.structure(state)
        specs = {path: x.spec for path, x in named_leaves(got)[0]}
        end = "layers/wi/kernel"
        assert [s for p, s in specs.items() if p.endswith(f"momentum/{end}")] == [
            P(None, "data", "model")
        ]
        # The longer side is that of "model": Q has the other one.
        assert [s for p, s in specs.items() if p.endswith(f"q/{end}")] == [
            P(None, "data", None)
        ]


def test_every_state_that_is_no_parameter_has_its_own_axes():
    params = boxed("partitioned")["layers"]
    tx = normuon(0.1, weight_dimension_numbers=STACKED, labels={"wi": "dion"})
    state = jax.eval_shape(tx.init, params).inner_states["dion"].inner_state[0]
    box = state.row_square["wi"]["kernel"]
    assert box.names == (None, None, "model") and box.value.shape == (2, 1, 12)
    assert state.momentum["wi"]["kernel"].names == (None, "data", "model")


@contextlib.contextmanager
def no_programs():
    """Nothing may be compiled inside."""
    events = []

    def listener(event, *_, **__):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield
    jax.monitoring.unregister_event_duration_listener(listener)
    assert COMPILED not in events


class Net(nnx.Module):
    """Stacked attention with biases of two axes, and a matrix."""

    def __init__(self, rngs):
        def layer(rngs):
            return nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

        stacked = nnx.split_rngs(splits=2)(nnx.vmap(layer, in_axes=0))
        self.layers = stacked(rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)


def numbers(path, leaf):
    if path == "layers/query/kernel":
        return DimensionNumbers(1, (2, 3))
    return DimensionNumbers() if path == "up/kernel" else None


def specs(path, leaf):
    if path == "up/kernel":
        return P("data", "model")
    return P(None, "data") if path == "layers/query/kernel" else P()


# Init outside jit: a program for the zeros of every shape.
@pytest.mark.programs(40)
@pytest.mark.filterwarnings("ignore:dion. 3 parameter:UserWarning")
@pytest.mark.parametrize("kind", ["Auto", explicit])
def test_nnx_optimizer_on_a_mesh_compiles_once(kind, make_mesh):
    tx = dion(0.02, 0.5, weight_dimension_numbers=numbers, orthogonalize="cqr2")
    graph, start = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    named, treedef = named_leaves(start)
    draws = [normal(i, *x.shape) for i, (_, x) in enumerate(named)]

    def run(place):
        leaves = [place(path, x) for (path, _), x in zip(named, draws)]
        net = nnx.merge(graph, treedef.unflatten(leaves))
        optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)

        @nnx.jit
        def step(net, optimizer):
            def loss(net):
                leaves = jax.tree.leaves(nnx.state(net, nnx.Param))
                return sum(jnp.sum(jnp.square(x) + jnp.sin(x)) for x in leaves)

            value, grads = nnx.value_and_grad(loss)(net)
            optimizer.update(net, grads)
            return value

        values = [step(net, optimizer)]
        with no_programs():
            values.append(step(net, optimizer))
        return np.asarray(values), jax.device_get(jax.tree.leaves(nnx.state(net)))

    alone = run(lambda path, x: jnp.asarray(x))
    mesh = make_mesh((4, 2), kind)
    with jax.set_mesh(mesh):
        split = run(
            lambda path, x: jax.device_put(x, NamedSharding(mesh, specs(path, x)))
        )
    np.testing.assert_allclose(alone[0], split[0], rtol=1e-6)
    for x, y in zip(alone[1], split[1]):
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-6)
