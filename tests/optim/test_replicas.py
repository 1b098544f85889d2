"""Data-parallel replicas that average P and R: the numbers of the averaged gradient."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo
from jaxpapers.optim import (
    DimensionNumbers,
    dion,
    dion_state_sharding,
    replica_specs,
    rescale_rank,
    resize,
    scale_by_dion,
    sync_for_checkpoint,
)
from jaxpapers.optim.layout import make_layout
from tests.programs import together

R, D, M = "replica", "data", "model"
DIMENSIONS = {
    "tall": DimensionNumbers(),
    "wide": DimensionNumbers(),
    "stacked": DimensionNumbers(1, 2),
    "full": DimensionNumbers(),
}
SHAPES = {"tall": (16, 32), "wide": (32, 16), "stacked": (4, 16, 24), "full": (8, 8)}
SPECS = {"tall": P(D, M), "wide": P(M, D), "stacked": P(None, D, M), "full": P()}
# Full rank: more numbers in its factors than in its gradient, which is averaged.
FRACTIONS = {"tall": 0.25, "wide": 0.25, "stacked": 0.25, "full": 1.0}
QUICK = {"xla_backend_optimization_level": 0}


def gradients(replicas, step=0):
    rng = np.random.default_rng(step)
    return {
        name: rng.normal(size=(replicas, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def zeros():
    return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}


def mesh_of(sizes, kind):
    count = int(np.prod(sizes))
    return jax.make_mesh(
        sizes,
        (R, D, M),
        axis_types=(AxisType[kind],) * 3,
        devices=jax.devices()[:count],
    )


def transformation(mesh=None, **options):
    where = None
    if mesh is not None:
        where = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    return scale_by_dion(
        FRACTIONS, weight_dimension_numbers=DIMENSIONS, sharding=where, **options
    )


def placed(mesh, replicas):
    """A transformation, parameters, state, and an update of per-replica gradients."""
    tx = transformation(mesh, replicate_axis=R)
    where = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    params = jax.device_put(zeros(), where)
    state = jax.jit(tx.init)(params)
    specs = replica_specs(state, params, R)

    @functools.partial(jax.jit, compiler_options=QUICK)
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(R), specs),
        out_specs=(P(), specs),
        axis_names={R},
    )
    def update(grads, state):
        return tx.update(jax.tree.map(lambda g: g[0], grads), state)

    def put(grads):
        return {
            n: jax.device_put(g, NamedSharding(mesh, P(R, *SPECS[n])))
            for n, g in grads.items()
        }

    return params, state, where, lambda g, s: update(put(g), s)


@pytest.mark.parametrize("rank, compresses", [(7, True), (8, False), (16, False)])
def test_compresses_exactly_where_factors_are_fewer_numbers(rank, compresses):
    """(16 + 16) r < 16 * 16."""
    layout = make_layout(
        "w", (16, 16), DimensionNumbers(), rank_fraction=rank / 16, rank_multiple_of=1
    )
    assert layout.rank == rank and layout.compresses == compresses


def close(got, want):
    tol = 2e-6 * max(1, np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tol)


@functools.cache
def plain(replicas, steps=3, silent=False):
    tx, out = transformation(), []
    state = jax.jit(tx.init)(zeros())
    update = jax.jit(tx.update)
    for t in range(steps):
        mean = jax.tree.map(lambda g: g.mean(0), some_gradients(replicas, t, silent))
        updates, state = update(mean, state)
        out.append(jax.tree.map(np.asarray, (updates, state)))
    return out


def some_gradients(replicas, step, silent):
    """Silent: the last replica has no gradient at all for the first steps."""
    grads = gradients(replicas, step)
    if silent and step < 2:
        for g in grads.values():
            g[-1] = 0
    return grads


ALL = [
    (sizes, kind, silent)
    for sizes, kind in (
        ((2, 1, 1), "Auto"), ((4, 1, 1), "Explicit"), ((2, 2, 2), "Auto"),
        ((2, 2, 2), "Explicit"), ((4, 2, 1), "Auto"),
    )
    for silent in (False, True)
]  # fmt: skip
IN_TURN = [((2, 2, 2), "Auto", True)]


@pytest.mark.matrix
@pytest.mark.parametrize(
    "sizes, kind, silent",
    IN_TURN
    + [pytest.param(*x, marks=pytest.mark.matrix) for x in ALL if x not in IN_TURN],
)
def test_equals_averaged_gradients(sizes, kind, silent):
    mesh, replicas = mesh_of(sizes, kind), sizes[0]
    wanted = plain(replicas, silent=silent)
    with jax.set_mesh(mesh):
        params, state, where, update = placed(mesh, replicas)
        expected = dion_state_sharding(
            state, params, where, weight_dimension_numbers=DIMENSIONS, replicate_axis=R
        )
        for t, (updates, after) in enumerate(wanted):
            got, state = update(some_gradients(replicas, t, silent), state)
            jax.tree.map(close, got, updates)
            jax.tree.map(close, state.q, after.q)
            assert state.momentum["full"].shape == SHAPES["full"]
            for name in ("tall", "wide", "stacked"):
                m = state.momentum[name]
                assert m.shape == (replicas, *SHAPES[name])
                close(np.mean(m, 0), after.momentum[name])
                assert (np.ptp(m, 0) > 0.1).any()  # Each replica has its own.
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
            assert x.sharding.is_equivalent_to(s, x.ndim), (x.shape, x.sharding, s)


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), pytest.param((4, 2, 1), marks=pytest.mark.matrix)]
)
def test_replicas_are_bitwise_equal_over_many_steps(sizes):
    mesh, replicas = mesh_of(sizes, "Auto"), sizes[0]
    with jax.set_mesh(mesh):
        params, state, _, update = placed(mesh, replicas)
        apply = jax.jit(lambda x, u: jax.tree.map(lambda x, u: x - 0.01 * u, x, u))
        for t in range(20):
            grads = gradients(replicas, t)
            if t < 5:
                grads["stacked"][1, 2] = 0  # An expert without tokens on a replica.
            updates, state = update(grads, state)
            params = apply(params, updates)
            for tree in (params, state.q):
                for x in jax.tree.leaves(tree):
                    assert np.isfinite(x).all()
                    by_index = {}
                    for shard in x.addressable_shards:
                        data = np.asarray(shard.data)
                        first = by_index.setdefault(str(shard.index), data)
                        np.testing.assert_array_equal(first, data)


@pytest.mark.matrix
def test_synchronised_state_goes_on_as_the_old_one():
    mesh = mesh_of((2, 2, 2), "Auto")
    with jax.set_mesh(mesh):
        params, state, _, update = placed(mesh, 2)
        _, state = update(gradients(2, 0), state)
        synced = jax.jit(sync_for_checkpoint)(state, params)
        m = np.asarray(synced.momentum["tall"])
        np.testing.assert_array_equal(m[0], m[1])
        for t in (1, 2):
            want, state = update(gradients(2, t), state)
            got, synced = update(gradients(2, t), synced)
            jax.tree.map(close, got, jax.tree.map(np.asarray, want))


@pytest.mark.matrix
def test_resize_to_other_replicas_and_ranks():
    one = together(transformation().init, zeros())
    one = one._replace(momentum=jax.tree.map(lambda m: m + 1, one.momentum))

    def with_replicas(n):
        return one._replace(
            momentum={
                k: m if k == "full" else np.stack([m * (i + 1) for i in range(n)])
                for k, m in one.momentum.items()
            }
        )

    two, four = with_replicas(2), with_replicas(4)
    for before, after, value in ((two, four, 1.5), (two, one, 1.5), (one, four, 1.0)):
        got = together(functools.partial(resize, target=after), before)
        assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, after)
        assert (got.momentum["tall"] == value).all()
        assert (got.momentum["full"] == 1).all()
    rows = one._replace(momentum={**one.momentum, "tall": np.ones((32, 32))})
    with pytest.raises(ValueError, match="tall: cannot resize"):
        jax.eval_shape(resize, one, rows)
    chain = (optax.EmptyState(), one)
    assert jax.eval_shape(resize, chain, chain)[1] is not None
    wrong = one._replace(momentum={**one.momentum, "tall": np.ones((2, 5, 32))})
    with pytest.raises(ValueError, match="tall: cannot resize.*only the rank"):
        jax.eval_shape(resize, two, wrong)


@pytest.mark.matrix
def test_rescaled_rank_keeps_columns_and_trains_on():
    rng = np.random.default_rng(0)
    grads = {"w": rng.normal(size=(16, 32)).astype(np.float32)}
    tx = scale_by_dion(0.25, scale=None)

    def train(grads):
        state = tx.init(grads)
        for _ in range(2):
            _, state = tx.update(grads, state)
        more = rescale_rank(state, grads, 0.5)
        updates, _ = scale_by_dion(0.5, scale=None).update(grads, more)
        return state, more, updates, rescale_rank(more, grads, 2 / 16)

    state, more, updates, less = together(train, grads)
    assert more.q["w"].shape == (16, 8)
    np.testing.assert_array_equal(more.q["w"][:, :4], state.q["w"])
    np.testing.assert_array_equal(more.momentum["w"], state.momentum["w"])
    np.testing.assert_allclose(np.linalg.norm(updates["w"]), np.sqrt(8), rtol=1e-4)
    np.testing.assert_array_equal(less.q["w"], state.q["w"][:, :2])
    with pytest.raises(ValueError, match="rescale_rank"):
        jax.eval_shape(tx.update, grads, less)


def test_a_larger_rank_brings_new_directions():
    params, fractions = {"w": np.zeros((32, 64), np.float32)}, (0.5, 1.0)

    def grow(params):
        states = [scale_by_dion(0.25).init(params)]
        for fraction in fractions:
            states.append(rescale_rank(states[-1], params, fraction))
        return [state.q["w"] for state in states[1:]]

    for fraction, q in zip(fractions, together(grow, params)):
        assert np.linalg.matrix_rank(q, tol=1e-2) == q.shape[1] == 32 * fraction


@pytest.mark.matrix
def test_a_rank_at_which_the_other_way_of_averaging_pays():
    mesh = mesh_of((2, 2, 2), "Auto")
    with jax.set_mesh(mesh):
        params, state, _, update = placed(mesh, 2)
        _, state = update(gradients(2, 0), state)
        mean = np.mean(state.momentum["tall"], 0)
        options = {"weight_dimension_numbers": DIMENSIONS}
        with pytest.raises(ValueError, match="pass replicas=2"):
            rescale_rank(state, params, 1.0, **options)
        rescale = functools.partial(rescale_rank, replicas=2, **options)
        full = jax.jit(lambda *args: rescale(*args, 1.0))(state, params)
        assert jax.tree.map(np.shape, full.momentum) == SHAPES
        np.testing.assert_allclose(full.momentum["tall"], mean, atol=1e-6)
        back = jax.eval_shape(lambda *a: rescale(*a, FRACTIONS["tall"]), full, params)
        assert back.momentum["tall"].shape == (2, 16, 32)
        # Without it the update says what is wrong.
        wrong = state._replace(q={**full.q})
        tx = scale_by_dion(1.0, replicate_axis=R, **options)
        specs = replica_specs(wrong, params, R)
        f = jax.shard_map(
            tx.update, in_specs=(P(), specs), out_specs=(P(), specs), axis_names={R}
        )
        with pytest.raises(ValueError, match="gradient is averaged; change the rank"):
            jax.eval_shape(f, params, wrong)


def test_sharded_over_an_axis_that_is_manual():
    mesh = mesh_of((2, 2, 1), "Auto")
    g = {"w": np.ones((16, 32), np.float32)}
    with jax.set_mesh(mesh):
        tx = scale_by_dion(0.25, replicate_axis=R, sharding=P(None, D))
        state = jax.eval_shape(tx.init, g)
        specs = replica_specs(state, g, R)._replace(momentum={"w": P(R, None, D)})
        f = jax.shard_map(
            tx.update,
            in_specs=(P(None, D), specs),
            out_specs=P(),
            check_vma=False,
        )
        with pytest.raises(
            ValueError, match="w: .* over 'data', which is a manual axis"
        ):
            jax.eval_shape(f, g, state)


@pytest.mark.matrix
def test_composite_averages_the_other_leaves():
    mesh = mesh_of((2, 1, 1), "Auto")
    shapes = {"kernel": (16, 32), "bias": (32,), "embed": (8, 4)}
    rng = np.random.default_rng(0)
    params = {k: np.ones(s, np.float32) for k, s in shapes.items()}
    grads = {k: rng.normal(size=(2, *s)).astype(np.float32) for k, s in shapes.items()}
    with jax.set_mesh(mesh):
        tx = dion(0.1, 0.25, replicate_axis=R)
        state = jax.jit(tx.init)(params)
        specs = replica_specs(state, params, R)
        update = jax.shard_map(
            lambda g, s, p: tx.update(jax.tree.map(lambda x: x[0], g), s, p),
            in_specs=(P(R), specs, P()),
            out_specs=(P(), specs),
        )
        got, _ = jax.jit(update)(grads, state, params)
    tx = dion(0.1, 0.25)
    mean = jax.tree.map(lambda g: g.mean(0), grads)
    want = together(lambda g, p: tx.update(g, tx.init(p), p)[0], mean, params)
    jax.tree.map(close, got, want)


def sent(mesh, shapes):
    """What a step over replicas of ``dion`` sends: kind, axes and numbers, sorted."""
    tx = dion(0.1, 0.25, replicate_axis=R)
    tree = functools.partial(jax.tree.map, is_leaf=lambda x: isinstance(x, tuple))
    params = tree(lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes)
    grads = tree(lambda s: jax.ShapeDtypeStruct((len(mesh.devices), *s), np.float32),
                 shapes)  # fmt: skip

    def step(grads, params):
        mine = jax.tree.map(lambda g: g[0], grads)
        return tx.update(mine, tx.init(params), params)[0]

    with jax.set_mesh(mesh):
        update = jax.jit(
            jax.shard_map(
                step, in_specs=(P(R), P()), out_specs=P(), axis_names={R},
                check_vma=False,
            ),
            out_shardings=P(),
        )  # fmt: skip
        text = update.lower(grads, params).compile().as_text()
    found = hlo.collectives(text, mesh)
    return sorted((c.kind, c.axes, c.elements) for c in found for _ in range(c.count))


def test_gains_of_norms_cross_in_parts():
    """Each of the four devices of a replica sends a fourth; it is gathered once."""
    mesh = mesh_of((2, 2, 2), "Auto")
    found = sent(mesh, {"norm": {"scale": (512,)}})
    assert [c for c in found if c[1] == (R,)] == [("all-reduce", (R,), 128)]
    inside = [c for c in found if c[1] != (R,)]
    assert {c[0] for c in inside} == {"all-gather"}
    assert sum(c[2] for c in inside) <= 2 * 512  # Over one axis, then the other.
    # Other vectors and matrices are left as they are; so is what does not divide.
    whole = [("all-reduce", (R,), 512)]
    assert sent(mesh, {"up": {"bias": (512,)}}) == whole
    assert sent(mesh, {"embed": (64, 8)}) == whole
    assert sent(mesh, {"norm": {"scale": (510,)}}) == [("all-reduce", (R,), 510)]


def test_one_replica_sends_nothing():
    assert sent(mesh_of((1, 2, 2), "Auto"), {"norm": {"scale": (512,)}}) == []


def test_what_is_rounded_on_its_way_stays_in_the_momentum():
    """P and R in bfloat16: at rank 1 the momentum loses the very direction taken."""
    mesh, shape = mesh_of((2, 1, 1), "Auto"), (16, 48)
    grads = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)

    def step(**options):
        tx = scale_by_dion(1 / 16, scale=None, replicate_axis=R, **options)
        state = tx.init({"w": np.zeros(shape, np.float32)})
        specs = replica_specs(state, {"w": grads[0]}, R)
        local = jax.shard_map(
            lambda g, s: tx.update({"w": g[0]}, s),
            in_specs=(P(R), specs), out_specs=(P(), specs), axis_names={R},
        )  # fmt: skip
        taken, new = local(grads, state)
        return taken["w"], new.momentum["w"]

    def both():
        return step(), step(communication_dtype="bfloat16")

    with jax.set_mesh(mesh):
        exact, rounded = together(both)

    def turned(x, y):
        """Length of the difference of two directions."""
        return np.linalg.norm(x / np.linalg.norm(x) - y / np.linalg.norm(y))

    for taken, momenta in (exact, rounded):
        assert turned(grads.mean(0) - momenta.mean(0), taken) < 1e-5
    assert 1e-4 < turned(exact[0], rounded[0]) < 1e-2


def test_errors():
    mesh = mesh_of((2, 1, 1), "Auto")
    params = {"w": np.ones((16, 32), np.float32)}
    tx = scale_by_dion(0.25, replicate_axis="pod")
    with pytest.raises(ValueError, match="'pod': no mesh with this axis is in scope"):
        jax.eval_shape(tx.init, params)
    with jax.set_mesh(mesh):
        tx = scale_by_dion(0.25, replicate_axis=R)
        state = jax.eval_shape(tx.init, params)
        with pytest.raises(ValueError, match="no manual mesh axis here"):
            jax.eval_shape(tx.update, params, state)
        whole = jax.shard_map(
            tx.update, in_specs=(P(), P()), out_specs=P(), axis_names={R}
        )
        with pytest.raises(ValueError, match="w: momentum has shape.*replica_specs"):
            jax.eval_shape(whole, params, state)
