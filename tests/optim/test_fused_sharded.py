"""Fused leaves on meshes: the same numbers, the bytes of the closed form, placement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import checkpoint, hlo, optim
from jaxpapers import mesh as meshes
from jaxpapers.method import State
from jaxpapers.optim import (
    DimensionNumbers,
    dion_state_sharding,
    plan_fused,
    scale_by_muon,
)
from tests.fused import MAKERS, close, dion_direction, in_turn, normal, train
from tests.programs import KEY

R, D, M = "replica", "data", "model"
QUICK = {"xla_backend_optimization_level": 0}
# The split axis whole, on one mesh axis, on one beside that of the inputs, on two; of a
# stack, whose batch axis takes it; heads on "data" with their head_dim on "model".
SPECS = {
    "rows": ((32, 40), DimensionNumbers(), (24, 8, 8), P(D)),
    "across": ((32, 40), DimensionNumbers(), (24, 8, 8), P(None, M)),
    "mixed": ((16, 40), DimensionNumbers(), (24, 8, 8), P(D, M)),
    "tuple": ((32, 40), DimensionNumbers(), (24, 8, 8), P(None, (D, M))),
    "stack": ((4, 16, 24), DimensionNumbers(1, 2), (12, 12), P(None, D, M)),
    "heads": ((16, 8, 4), DimensionNumbers(0, (1, 2)), (4, 2, 2), P(D, None, M)),
}
# Axis that the mesh axes of the split axis go to.
MOVED = {
    "across": P(M),
    "mixed": P((D, M)),
    "tuple": P((D, M)),
    "stack": P(M, D),
}
WHERE = {name: spec for name, (_, _, _, spec) in SPECS.items()}


def options(leaves=None):
    specs = {n: SPECS[n] for n in leaves or SPECS}
    return {
        "weight_dimension_numbers": {n: x[1] for n, x in specs.items()},
        "split_sizes": {n: x[2] for n, x in specs.items()},
    }


def gradients(seed, leaves=None):
    return {n: normal(seed, *SPECS[n][0], dtype=np.float64) for n in leaves or SPECS}


@functools.cache
def unsharded(name, leaves):
    tx = MAKERS[name](**options(leaves))
    return train(tx, [gradients(t, leaves) for t in range(2)])


def assert_placed(x, where):
    assert x.sharding.is_equivalent_to(where, x.ndim), (x.sharding, where)


@pytest.mark.programs(20)  # Outside jit, init sees how the arrays are sharded.
@pytest.mark.parametrize(
    "name, kind, leaves",
    in_turn(("mixed", "heads"), ("dion", "Auto"), ("normuon", "Explicit")),
)
def test_same_numbers_on_a_mesh(name, kind, leaves, make_mesh, float64):
    mesh = make_mesh((4, 2), kind)
    where = {n: NamedSharding(mesh, WHERE[n]) for n in leaves or SPECS}
    want, last = unsharded(name, leaves)
    with jax.set_mesh(mesh):
        tx = MAKERS[name](unknown_sharding="raise", **options(leaves))
        state = tx.init(jax.device_put(gradients(0, leaves), where))
        update = jax.jit(tx.update, compiler_options=QUICK)
        for t in range(2):
            updates, state = update(jax.device_put(gradients(t, leaves), where), state)
            close(updates, want[t], 1e-11)
        for n, spec in where.items():
            assert_placed(updates[n], spec)
            assert_placed(state.momentum[n], spec)
    close(state, last, 1e-11)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("rows", "mixed") else pytest.mark.matrix)
        for n in SPECS
    ],
)
def test_bytes_are_those_of_the_closed_form(name, make_mesh):
    """Nothing moves where the split axis is whole."""
    mesh = make_mesh((4, 2))
    shape, numbers, sizes, spec = SPECS[name]
    where = NamedSharding(mesh, spec)
    given = {"weight_dimension_numbers": numbers, "split_sizes": sizes}
    # Ranks that keep q apart from k and v.
    tx = dion_direction(0.25, q_dtype=jnp.bfloat16, sharding=where, **given)
    g = {"w": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)}
    state = jax.eval_shape(tx.init, g)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        dion_state_sharding(state, g, {"w": where}, **given),
    )
    compiled = jax.jit(tx.update).lower(g, state).compile(QUICK)
    found = hlo.collectives(compiled.as_text(), mesh)
    plan = plan_fused(
        shape, spec, mesh, sizes, 0.25, dimensions=numbers, orthogonalize="cqr2",
        q_dtype=jnp.bfloat16,
    )  # fmt: skip
    assert hlo.wire_bytes(found) == pytest.approx(plan.bytes_per_step, abs=1e-6)
    local = int(np.prod(where.shard_shape(shape)))
    count = int(np.prod([mesh.shape[a] for a in MOVED_AXES[name]]))
    exchanged = plan.moved.get(("all-to-all", MOVED_AXES[name]), 0)
    assert exchanged == 2 * (count - 1) / count * local * (4 + 4)
    assert (exchanged == 0) == (name not in MOVED)
    # M and all Q on a device.
    held = jax.tree.map(
        lambda x: int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize,
        (state.momentum, state.q),
    )
    assert plan.state_bytes == sum(jax.tree.leaves(held))


MOVED_AXES = {n: () for n in SPECS} | {
    "across": (M,), "mixed": (M,), "tuple": (D, M), "stack": (M,),
}  # fmt: skip


@pytest.mark.programs(40)  # Init outside jit, as above.
def test_state_lies_where_its_step_has_it(make_mesh):
    """By init inside and outside jit, by ``dion_state_sharding``, by a run's rules."""
    mesh = make_mesh((4, 2))
    where = {n: NamedSharding(mesh, spec) for n, spec in WHERE.items()}
    params = {n: normal(0, *x[0]) for n, x in SPECS.items()}
    params = jax.device_put(params, where)
    tx = dion_direction(0.5, sharding=where, **options())
    with jax.set_mesh(mesh):
        inside, outside = jax.jit(tx.init)(params), tx.init(params)
    abstract = jax.eval_shape(tx.init, params)
    expected = dion_state_sharding(abstract, params, where, **options())
    for state in (inside, outside):
        jax.tree.map(assert_placed, state, expected)
    for n in SPECS:
        spec = MOVED.get(n, WHERE[n])
        for q, block in zip(expected.q[n], options()["split_sizes"][n]):
            # Q has the inputs' axis where a block is wider than long, and the batch's.
            entries = [*spec, None, None, None]
            if n == "stack":
                want = P(entries[0], None if block < 16 else entries[1], None)
            elif n == "heads":
                want = P(entries[0], None) if 4 * block >= 16 else P(None, M, None)
            else:
                want = P(entries[0] if block >= SPECS[n][0][0] else None, None)
            assert q == NamedSharding(mesh, want), (n, q)
    rules = [
        *optim.state_rules(
            options()["weight_dimension_numbers"], split_sizes=options()["split_sizes"]
        ),
        *((f"{n}$", spec) for n, spec in WHERE.items()),
    ]
    state = State(
        jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(lambda: params), abstract, (),
        KEY,
    )  # fmt: skip
    found = meshes.state_shardings(state, rules, mesh).opt_state
    for n in ("rows", "heads"):
        assert found.q[n] == expected.q[n]
        assert found.momentum[n] == expected.momentum[n]


def test_boxes_name_the_axes_of_every_block(make_mesh):
    """Also where the split axis is sharded: the state of linen is laid out, and steps."""
    mesh = make_mesh((4, 2))
    sizes = (16, 8, 8)
    where = P(D, M)
    tx = dion_direction(0.5, split_sizes=sizes, sharding=where)
    x = normal(0, 24, 32)

    def init():
        return tx.init({"qkv": nn.Partitioned(jnp.asarray(x), (D, M))})

    abstract = jax.eval_shape(init)
    boxes = abstract.q["qkv"]
    assert [b.names for b in boxes] == [(None, None)] + 2 * [(None, None)]
    assert [b.value.shape for b in boxes] == [(16, 8), (8, 4), (8, 4)]
    assert abstract.momentum["qkv"].names == (D, M)
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=nn.get_sharding(abstract, mesh))()
        got, after = jax.jit(tx.update)({"qkv": x}, nn.unbox(state))
    (want,), last = train(dion_direction(0.5, split_sizes=sizes), [{"qkv": x}])
    close(got, want)
    close(after, last)


def test_a_checkpoint_goes_on(tmp_path):
    """Stored on one mesh and restored on another, the run is the uninterrupted one."""
    tx = dion_direction(0.5, split_sizes=(16, 8, 8), sharding=P(D, M))
    rules = [*optim.state_rules(split_sizes=(16, 8, 8)), ("w$", P(D, M))]
    grads = [{"w": normal(t, 24, 32)} for t in range(2)]
    (_, *want), _ = train(dion_direction(0.5, split_sizes=(16, 8, 8)), grads)

    def start(key):
        params = {"w": jnp.asarray(grads[0]["w"])}
        return State(jnp.zeros((), jnp.int32), params, tx.init(params), (), key)

    def target(sizes):
        mesh = meshes.make_mesh(sizes)
        state = jax.eval_shape(start, KEY)
        return mesh, checkpoint.abstract(
            state, meshes.state_shardings(state, rules, mesh)
        )

    def step(mesh, state, g):
        with jax.set_mesh(mesh):
            updates, opt_state = jax.jit(tx.update)(g, state.opt_state)
        return updates, state._replace(opt_state=opt_state)

    mesh, like = target({D: 4, M: 2})
    where = jax.tree.map(lambda x: x.sharding, like)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: start(jax.random.key(0)), out_shardings=where)()
    _, state = step(mesh, state, grads[0])
    mesh, like = target({D: 2, M: 2, R: 2})
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        checkpoint.save(manager, state, 1, {})
    with checkpoint.open_manager(tmp_path / "checkpoints") as manager:
        state, _ = checkpoint.restore(manager, like)
    for g, u in zip(grads[1:], want):
        updates, state = step(mesh, state, g)
        close(updates, u)


@pytest.mark.parametrize(
    "sizes, spec",
    [
        ((24, 8, 8), P(D)),
        pytest.param((24, 8, 8), P(D, M), marks=pytest.mark.matrix),
        # The factors of a single column are no fewer numbers.
        pytest.param((31, 8, 1), P(D, M), marks=pytest.mark.matrix),
    ],
)
def test_replicas(sizes, spec):
    """Factors are exchanged where all blocks' are fewer numbers, else gradients."""
    mesh = jax.make_mesh((2, 2, 2), (R, D, M), axis_types=(AxisType.Auto,) * 3)
    where = NamedSharding(mesh, spec)
    g = [normal(t, 2, 32, 40) for t in range(2)]
    plain = dion_direction(0.5, split_sizes=sizes)
    want, last = train(plain, [{"w": x.mean(0)} for x in g])
    tx = dion_direction(0.5, split_sizes=sizes, sharding=where, replicate_axis=R)
    params = {"w": jax.device_put(g[0][0], where)}
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        specs = optim.replica_specs(state, params, R)
        update = jax.jit(
            jax.shard_map(
                lambda g, s: tx.update({"w": g["w"][0]}, s),
                in_specs=(P(R), specs),
                out_specs=(P(), specs),
                axis_names={R},
            )
        )
        put = functools.partial(jax.device_put, device=NamedSharding(mesh, P(R, *spec)))
        text = update.lower({"w": put(g[0])}, state).compile(QUICK).as_text()
        for x, u in zip(g, want):
            got, state = update({"w": put(x)}, state)
            close(got, u)
    plan = plan_fused(
        (32, 40), spec, mesh, sizes, 0.5, orthogonalize="cqr2", replicate_axis=R
    )
    compressed = 1 not in sizes
    assert state.momentum["w"].ndim == 2 + compressed
    assert all(x.compressed == compressed for x in plan.blocks)
    mean = state.momentum["w"].mean(0) if compressed else state.momentum["w"]
    close(mean, last.momentum["w"])
    sent = hlo.wire_bytes(hlo.collectives(text, mesh))
    over = {k: v for k, v in sent.items() if k[0] == "all-to-all" or k[1] == (R,)}
    expected = {
        k: v
        for k, v in plan.bytes_per_step.items()
        if k[0] == "all-to-all" or k[1] == (R,)
    }
    assert over == pytest.approx(expected, abs=1e-6)


def test_refuses_a_split_axis_that_cannot_move(make_mesh):
    mesh = make_mesh((4, 2))
    tx = scale_by_muon(split_sizes=(12, 4), sharding=P(None, D))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(tx.init, {"w": np.ones((6, 16), np.float32)})
        with pytest.raises(
            ValueError, match=r"w: axis 1 of shape \(6, 16\), which split_"
        ):
            jax.eval_shape(tx.update, {"w": np.ones((6, 16), np.float32)}, state)
    with pytest.raises(ValueError, match="shard another axis than 1"):
        plan_fused((6, 16), P(None, D), mesh, (12, 4))
    with pytest.raises(ValueError, match="pass the split_sizes"):
        dion = dion_direction(0.5, split_sizes=(12, 4))
        state = jax.eval_shape(dion.init, {"w": np.ones((8, 16), np.float32)})
        where = {"w": NamedSharding(mesh, P(D))}
        dion_state_sharding(state, {"w": np.ones((8, 16))}, where)
