"""Dion on eight devices: equal numbers, equal shardings, and only thin collectives."""

import functools
import itertools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import (
    DimensionNumbers,
    dion,
    dion_state_sharding,
    plan_dion,
    scale_by_dion,
)
from tests.programs import together

# name -> shape, dimension numbers. P takes the longer side: the output of "tall", the
# input of "wide".
LEAVES = {
    "tall": ((16, 32), DimensionNumbers()),
    "wide": ((32, 16), DimensionNumbers()),
    "stacked": ((4, 16, 24), DimensionNumbers(1, 2)),
    "attention": ((16, 4, 8), DimensionNumbers(0, (1, 2))),
}
SHAPES = {name: shape for name, (shape, _) in LEAVES.items()}
DIMENSIONS = {name: numbers for name, (_, numbers) in LEAVES.items()}
D, M, E = "data", "model", "expert"
# Mesh -> specs of LEAVES. Over the meshes: each side on each axis, a tuple of axes on
# one side, heads and head_dim on different axes, a sharded batch axis.
SPECS = {
    (8,): (P(None, D), P(None, D), P(None, D), P(D)),
    (4, 2): (P(D, M), P(D, M), P(D, M), P(None, D, M)),
    (2, 4): (P(M, D), P((D, M)), P(M, None, D), P(D, M)),
    (2, 2, 2): (P((D, M), E), P(E, D), P(D, E, M), P(D, M, E)),
}
# LLVM's optimisations are most of a compile, and not what these tests are about.
QUICK = {"xla_backend_optimization_level": 0}
KINDS = ["Auto", "Explicit"]


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def shardings(mesh):
    specs = SPECS[tuple(mesh.shape.values())]
    return {name: NamedSharding(mesh, spec) for name, spec in zip(LEAVES, specs)}


def transformation(**options):
    return scale_by_dion(0.25, weight_dimension_numbers=DIMENSIONS, **options)


@functools.cache
def unsharded(steps=3):
    """Updates and states of the run without a mesh."""
    tx, out = transformation(), []
    state = jax.jit(tx.init)(tree())
    update = jax.jit(tx.update)
    for t in range(steps):
        updates, state = update(tree(t), state)
        out.append(jax.tree.map(np.asarray, (updates, state)))
    return out


def first(tx, grads):
    """Updates and state after one gradient."""
    return tx.update(grads, tx.init(grads))


def assert_same_shardings(got, want):
    def check(path, x, y):
        assert x.sharding.is_equivalent_to(y, x.ndim), (path, x.sharding, y)

    jax.tree_util.tree_map_with_path(check, got, want)


def close(got, want):
    tol = 2e-6 * max(1, np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tol)


IN_TURN = {((4, 2), "Explicit")}


@pytest.mark.programs(20)  # Outside jit, init sees how the arrays are sharded.
@pytest.mark.parametrize(
    "sizes, kind",
    [
        pytest.param(*x, marks=() if x in IN_TURN else pytest.mark.matrix)
        for x in itertools.product(SPECS, KINDS)
    ],
)
def test_equals_unsharded(sizes, kind, make_mesh):
    mesh = make_mesh(sizes, kind)
    where = shardings(mesh)
    wanted = unsharded()
    with jax.set_mesh(mesh):
        tx = transformation(unknown_sharding="raise")
        params = jax.device_put(tree(), where)
        state = tx.init(params)
        expected = dion_state_sharding(
            state, params, where, weight_dimension_numbers=DIMENSIONS
        )
        assert_same_shardings(state, expected)
        update = jax.jit(tx.update, donate_argnums=1, compiler_options=QUICK)
        for t, want in enumerate(wanted):
            updates, state = update(jax.device_put(tree(t), where), state)
            jax.tree.map(close, (updates, state), want)
            assert_same_shardings(state, expected)
        assert_same_shardings(updates, where)


THIN = {((4, 2), 16, "scqr")}


@pytest.mark.parametrize(
    "sizes, rank, method",
    [
        pytest.param(*x, marks=() if x in THIN else pytest.mark.matrix)
        for sizes, rank in (((4, 2), 4), ((4, 2), 16), ((2, 4), 8))
        for x in ((sizes, rank, method) for method in ("scqr", "rcqr", "qr"))
    ],
)
def test_collectives_are_thin(sizes, rank, method, make_mesh):
    m, n = 64, 256  # P on the side of 256.
    mesh = make_mesh(sizes)
    f, t = sizes
    where = NamedSharding(mesh, P(D, M))
    tx = scale_by_dion(rank / m, orthogonalize=method, sharding=where)
    grads = {"w": jax.ShapeDtypeStruct((m, n), jnp.float32, sharding=where)}
    state = jax.eval_shape(tx.init, grads)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        dion_state_sharding(state, grads, {"w": where}),
    )
    text = jax.jit(tx.update).lower(grads, state).compile().as_text()
    sizes = collective_sizes(text)
    k = 128 * math.ceil(1.25 * rank / 128)
    small = {
        "scqr": rank**2,
        "rcqr": max(k * rank, rank**2),
        "qr": t * min(n // t, rank) * rank,
    }
    assert max(sizes) <= max(n // t * rank, m // f * rank, small[method])
    # P and R are reduced for certain: the parser sees what it looks for.
    assert {n // t * rank, m // f * rank} <= set(sizes)


def collective_sizes(text):
    """Elements of every result (of each part of a tuple) of every collective."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = []
    for results in re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text):
        for dims in re.findall(r"\w+\[([\d,]*)\]", results):
            found.append(math.prod(int(d) for d in dims.split(",") if d))
    return found


@pytest.mark.matrix
@pytest.mark.parametrize(
    "split_p, shape, split",
    [
        pytest.param("whole", (4, 16, 64), "whole", marks=pytest.mark.matrix),
        ("thin", (4, 16, 64), "matrices"),
        pytest.param("thin", (3, 16, 2048), "rows", marks=pytest.mark.matrix),
    ],
)
def test_bfloat16_communication(split_p, shape, split, make_mesh):
    """P arrives rounded, but momentum loses exactly what the update took."""
    mesh, mu = make_mesh((4, 2)), 0.9
    where = NamedSharding(mesh, P(None, D, M))
    numbers = DimensionNumbers(1, 2)
    plan = plan_dion(shape, where.spec, mesh, 0.5, dimensions=numbers, split_p=split_p)
    assert plan.split == split
    g = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = []
    for dtype in (None, jnp.bfloat16):
        tx = scale_by_dion(
            0.5, mu=mu, scale=None, weight_dimension_numbers=numbers, sharding=where,
            split_p=split_p, communication_dtype=dtype,
        )  # fmt: skip
        found.append(together(functools.partial(first, tx), jax.device_put(g, where)))
    (exact, _), (rounded, state) = found
    distance = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
    assert 1e-4 < distance < 1e-2
    for b, u, q, m in zip(*map(np.asarray, (g, rounded, state.q, state.momentum))):
        p = (
            np.linalg.pinv(q.astype(np.float64)) @ u
        )  # U = Q P^T: P has the longer side.
        left = b - (1 - mu) * (b @ p.T) @ p
        np.testing.assert_allclose(m, left, atol=2e-5)


def test_parser_sees_a_gathered_matrix(make_mesh):
    mesh = make_mesh((4, 2))
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=NamedSharding(mesh, P(D)))
    gather = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, P()))
    assert 64 * 256 in collective_sizes(gather.lower(x).compile().as_text())


def test_zero_test_looks_at_all_shards(make_mesh):
    # Each device of the first axis but one has only zero rows.
    mesh = make_mesh((8,))
    g = np.zeros((32, 16), np.float32)
    g[:4] = np.random.default_rng(0).normal(size=(4, 16))
    want, _ = together(
        functools.partial(first, scale_by_dion(0.25, scale=None)), {"w": g}
    )
    where = NamedSharding(mesh, P(D))
    x = {"w": jax.device_put(g, where)}
    tx = scale_by_dion(0.25, scale=None, sharding=where)
    state, update = jax.jit(tx.init)(x), jax.jit(tx.update)
    got, after = update(x, state)
    np.testing.assert_allclose(got["w"], want["w"], atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(after.q["w"], axis=0), 1, atol=2e-6)
    zeros, state = update({"w": jax.device_put(np.zeros_like(g), where)}, state)
    assert not np.asarray(zeros["w"]).any()
    np.testing.assert_allclose(np.linalg.norm(state.q["w"], axis=0), 1, atol=2e-6)


@pytest.mark.matrix
def test_devices_take_passes_of_their_own(make_mesh):
    """Shares of a stack that need more Gram passes than others do not wait for them."""
    mesh = make_mesh((4, 2))
    rng = np.random.default_rng(0)
    g = rng.normal(size=(8, 16, 24)).astype(np.float32)
    # Two matrices to each device along "data"; every second device's are singular.
    g[[2, 3, 6]] = rng.normal(size=(3, 16, 1)) @ rng.normal(size=(3, 1, 24))
    g[7] = 0
    numbers = DimensionNumbers(1, 2)
    tx = scale_by_dion(0.5, scale=None, weight_dimension_numbers=numbers)
    want, _ = together(functools.partial(first, tx), {"w": g})
    where = NamedSharding(mesh, P(None, D, M))
    x = {"w": jax.device_put(g, where)}
    tx = scale_by_dion(
        0.5, scale=None, weight_dimension_numbers=numbers, sharding=where
    )
    got, _ = together(functools.partial(first, tx), x)
    got, want = np.asarray(got["w"]), np.asarray(want["w"])
    np.testing.assert_allclose(got[[0, 1, 4, 5]], want[[0, 1, 4, 5]], atol=2e-6)
    assert np.isfinite(got).all() and not got[7].any()
    norms = np.linalg.norm(got[[2, 3, 6]], axis=(1, 2))
    assert (norms <= np.sqrt(8) * (1 + 1e-5)).all() and (norms > 0.9).all()


@pytest.mark.matrix
@pytest.mark.parametrize("axes", [(D, M), ((D, M), None), (None, (D, M))])
def test_vmap_over_a_sharded_update(make_mesh, axes):
    """Several optimizers' states at once: choices become selections.

    Four matrices fill one of two axes that split their rows.
    """
    mesh = make_mesh((4, 2))
    g = np.random.default_rng(0).normal(size=(3, 4, 16, 32)).astype(np.float32)
    where = NamedSharding(mesh, P(None, *axes))
    options = {"scale": None, "weight_dimension_numbers": DimensionNumbers(1, 2)}
    tx = scale_by_dion(0.25, sharding=where, **options)
    x = jax.device_put(g, NamedSharding(mesh, P(None, None, *axes)))
    with jax.set_mesh(mesh):
        one = jax.jit(tx.init)({"w": np.zeros((4, 16, 32), np.float32)})
        states = jax.tree.map(lambda s: np.stack([s] * 3), jax.device_get(one))
        got, _ = jax.jit(jax.vmap(tx.update))({"w": x}, states)
    alone = jax.jit(lambda g: first(scale_by_dion(0.25, **options), {"w": g})[0]["w"])
    for i in range(3):
        np.testing.assert_allclose(got["w"][i], alone(g[i]), atol=2e-6)


def one_leaf(mesh):
    g = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    return {"w": jax.device_put(g, NamedSharding(mesh, P(D, M)))}


def sizes_in_jit(tx, params, mesh):
    """Largest collective of a jitted update whose init saw abstract arrays only."""
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        compiled = jax.jit(tx.update).lower(params, state).compile()
    return max(collective_sizes(compiled.as_text()))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "form",
    ["function"]
    + [pytest.param(x, marks=pytest.mark.matrix) for x in ("tree", "spec")],
)
def test_auto_axes_take_the_declared_sharding(form, make_mesh):
    mesh = make_mesh((4, 2))
    params = one_leaf(mesh)
    given = {
        "tree": {"w": NamedSharding(mesh, P(D, M))},
        "function": lambda path, leaf: {"w": P(D, M)}[path],
        "spec": P(D, M),
    }[form]
    tx = scale_by_dion(0.25, sharding=given, unknown_sharding="raise")
    assert sizes_in_jit(tx, params, mesh) <= 32 // 2 * 4


def test_auto_axes_warn_once_or_raise_when_nothing_tells(make_mesh):
    mesh = make_mesh((4, 2))
    params = one_leaf(mesh)
    with jax.set_mesh(mesh):
        tx = scale_by_dion(0.25)
        state = jax.eval_shape(tx.init, params)
        with pytest.warns(UserWarning, match="cannot see how 1 parameter.*'w' first"):
            jax.eval_shape(tx.update, params, state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.eval_shape(lambda g, s: tx.update(g, s), params, state)
        tx = scale_by_dion(0.25, unknown_sharding="raise")
        for _ in range(2):
            with pytest.raises(ValueError, match="pass sharding="):
                jax.eval_shape(lambda g, s: tx.update(g, s), params, state)


def test_explicit_axes_tell_inside_jit(make_mesh):
    mesh = make_mesh((4, 2), "Explicit")
    tx = scale_by_dion(0.25, unknown_sharding="raise")
    assert sizes_in_jit(tx, one_leaf(mesh), mesh) <= 32 // 2 * 4


@pytest.mark.matrix
def test_init_on_another_mesh_replaces_what_was_seen(make_mesh):
    tx = scale_by_dion(0.25)
    mesh = make_mesh((4, 2))
    tx.init(one_leaf(mesh))
    alone = {"w": jnp.asarray(np.asarray(one_leaf(mesh)["w"]))}
    state = tx.init(alone)
    updates, _ = jax.jit(tx.update)(alone, state)
    assert len(updates["w"].sharding.device_set) == 1


@pytest.mark.matrix
@pytest.mark.parametrize(
    "kind", [pytest.param("Auto", marks=pytest.mark.matrix), "Explicit"]
)
def test_gradient_sharded_unlike_its_parameter(kind, make_mesh):
    mesh = make_mesh((4, 2), kind)
    with jax.set_mesh(mesh):
        params = one_leaf(mesh)
        tx = scale_by_dion(0.25)
        state, update = tx.init(params), jax.jit(tx.update)
        want, _ = update(params, state)
        for spec in (P(M, D), P()):
            grads = {"w": jax.device_put(params["w"], NamedSharding(mesh, spec))}
            got, after = update(grads, state)
            np.testing.assert_allclose(got["w"], want["w"], atol=2e-6)
            assert_same_shardings(after.momentum, {"w": params["w"].sharding})
            got, _ = tx.update(grads, state)  # Outside jit as well.
            np.testing.assert_allclose(got["w"], want["w"], atol=2e-6)


@pytest.mark.programs(16)  # Outside jit, init sees how the arrays are sharded.
def test_state_sharding_of_the_composite(make_mesh):
    mesh = make_mesh((4, 2))
    specs = {
        "embedding": P(D),
        "q": {"kernel": P(D, M), "bias": P()},
        "kernel": P(M, D),
        "lm_head": {"kernel": P(None, M)},
    }
    shapes = {
        "embedding": (16, 8),
        "q": {"kernel": (16, 32), "bias": (32,)},
        "kernel": (32, 16),
        "lm_head": {"kernel": (8, 16)},
    }
    where = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    params = jax.tree.map(
        lambda shape, s: jax.device_put(np.ones(shape, np.float32), s),
        shapes,
        where,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    with jax.set_mesh(mesh):
        tx = dion(0.1, 0.25)
        state = tx.init(params)
        expected = dion_state_sharding(jax.eval_shape(tx.init, params), params, where)
        arrays = [x for x in jax.tree.leaves(state) if x.ndim]
        assert len(arrays) == 10  # 2 M, 2 Q; 2 each of Adam for three leaves.
        for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(expected)):
            assert not x.ndim or x.sharding.is_equivalent_to(s, x.ndim), (x.shape, s)


BAD = {
    "uneven": (P(D), (18, 32), r"w: axis 0 of shape \(18, 32\).*'data'.*size 4"),
    "unknown": (P("pod"), (16, 32), r"w: .*names the mesh axis 'pod'.*has \{'data': 4"),
    "twice": (P(D, D), (16, 32), "w: .*uses a mesh axis twice"),
    "long": (P(None, None, D), (16, 32), "more entries than shape"),
    "open": (P(P.UNCONSTRAINED), (16, 32), "leaves axis 0 unconstrained"),
}


@pytest.mark.parametrize("case", BAD)
def test_shardings_that_do_not_fit(case, make_mesh):
    spec, shape, match = BAD[case]
    with jax.set_mesh(make_mesh((4, 2))):
        tx = scale_by_dion(0.25, sharding=spec)
        with pytest.raises(ValueError, match=match):
            tx.init({"w": jax.device_put(np.ones(shape, np.float32))})
