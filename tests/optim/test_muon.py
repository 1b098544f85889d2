"""Muon, NorMuon and Dion2: closed forms, optax's Muon, and the same numbers on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo
from jaxpapers.optim import (
    DimensionNumbers,
    newton_schulz,
    scale_by_dion2,
    scale_by_muon,
)
from jaxpapers.optim.newton_schulz import choose_exchange
from jaxpapers.optim.power_iteration import MeshAxes
from tests.programs import together

D, M = "data", "model"
LEAVES = {
    "tall": ((16, 32), DimensionNumbers(), P(D, M)),
    "wide": ((32, 16), DimensionNumbers(), P(D, M)),
    "stack": ((8, 16, 24), DimensionNumbers(1, 2), P(None, D, M)),
    "odd": ((3, 16, 8), DimensionNumbers(1, 2), P(None, (D, M))),
    "heads": ((16, 4, 8), DimensionNumbers(0, (1, 2)), P(None, D, M)),
}
DIMENSIONS = {name: d for name, (_, d, _) in LEAVES.items()}
MAKERS = {
    "muon": functools.partial(scale_by_muon),
    "nesterov": functools.partial(scale_by_muon, nesterov=True),
    "normuon": functools.partial(scale_by_muon, b2=0.95, coefficients="polar_express"),
    "dion2": functools.partial(scale_by_dion2, 0.25),
}
QUICK = {"xla_backend_optimization_level": 0}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tree(seed):
    return {name: normal(*s, seed=seed) for name, (s, _, _) in LEAVES.items()}


@functools.cache
def unsharded(kind):
    tx = MAKERS[kind](weight_dimension_numbers=DIMENSIONS)
    state, out = jax.jit(tx.init)(tree(0)), []
    update = jax.jit(tx.update)
    for t in range(3):
        updates, state = update(tree(t), state)
        out.append(jax.tree.map(np.asarray, (updates, state)))
    return out


SOME = {("muon", 0), ("dion2", 2)}
MESHES = [((4, 2), "Explicit"), ((8,), "Auto"), ((4, 2), "Auto"), ((2, 4), "Auto")]


@pytest.mark.programs(20)  # Outside jit, init sees how the arrays are sharded.
@pytest.mark.parametrize(
    "kind, sizes, axes",
    [
        pytest.param(kind, *mesh, marks=() if (kind, j) in SOME else pytest.mark.matrix)
        for kind in MAKERS
        for j, mesh in enumerate(MESHES)
    ],
)
def test_same_numbers_on_every_mesh(kind, sizes, axes, make_mesh):
    mesh = make_mesh(sizes, axes)
    specs = {
        name: P(*(None if e == M and len(sizes) == 1 else
                  D if isinstance(e, tuple) and len(sizes) == 1 else e for e in spec))
        for name, (_, _, spec) in LEAVES.items()
    }  # fmt: skip
    where = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    if sizes == (8,):
        where["heads"] = NamedSharding(mesh, P(D))
    wanted = unsharded(kind)
    with jax.set_mesh(mesh):
        tx = MAKERS[kind](weight_dimension_numbers=DIMENSIONS, unknown_sharding="raise")
        state = tx.init(jax.device_put(tree(0), where))
        update = jax.jit(tx.update, compiler_options=QUICK)
        for t, want in enumerate(wanted):
            updates, state = update(jax.device_put(tree(t), where), state)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
                (updates, state),
                want,
            )
        for name in LEAVES:
            assert state.momentum[name].sharding.is_equivalent_to(
                where[name], state.momentum[name].ndim
            )


@pytest.mark.matrix
def test_no_whole_matrix_on_a_device(make_mesh):
    mesh = make_mesh((4, 2))
    where = NamedSharding(mesh, P(D, M))
    g = {"w": jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=where)}
    for kind, bound in (("muon", 64 * 256 // 2), ("dion2", 256 // 2 // 4 * 16)):
        tx = MAKERS[kind](sharding=where)
        state = jax.eval_shape(tx.init, g)
        m = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=where)
        state = state._replace(momentum={"w": m})
        text = jax.jit(tx.update).lower(g, state).compile().as_text()
        found = hlo.collectives(text, mesh)
        assert max(c.elements for c in found) == bound, kind
    stack = NamedSharding(mesh, P(None, D, M))
    g = {"w": jax.ShapeDtypeStruct((8, 64, 256), jnp.float32, sharding=stack)}
    tx = scale_by_muon(sharding=stack, weight_dimension_numbers=DimensionNumbers(1, 2))
    state = jax.eval_shape(tx.init, g)._replace(momentum=g)
    found = hlo.collectives(
        jax.jit(tx.update).lower(g, state).compile().as_text(), mesh
    )
    sent = hlo.wire_bytes(found)
    # Two exchanges of the local blocks; one sum of packed (64, 64) Grams of the share.
    assert sent["all-to-all", (D,)] == 2 * 3 / 4 * 8 * 64 * 256 // 8 * 4
    gram = 2 * (64 * 65 // 2) * 4
    assert sent["reduce-scatter", (M,)] == sent["all-gather", (M,)] == gram / 2
    assert ("all-gather", (D,)) not in sent


@pytest.mark.matrix
@pytest.mark.parametrize("n, l, s, choice, sent", [
    # Two exchanges of a block each, 7/8 of which leaves the device.
    (7, 16, 8, "matrices", 2 * 8 * 16),
    pytest.param(12, 16, 8, "matrices", 2 * 16 * 16, marks=pytest.mark.matrix),
    (2, 64, 8, "rows", 2 * 2 * 64),
    # One matrix, nearly square: a gather of it sends less than the sum of its Grams.
    (1, 8, 8, "all", 8 * 8),
])  # fmt: skip
def test_exchange_of_whole_rows(n, l, s, choice, sent):
    mesh = jax.make_mesh((8,), (D,), axis_types=(jax.sharding.AxisType.Auto,))
    assert choose_exchange(n, l, s, 8) == choice
    x = normal(n, l, s)
    run = jax.jit(
        jax.shard_map(
            functools.partial(newton_schulz, axes=MeshAxes((), (D,))),
            mesh=mesh,
            in_specs=P(None, None, D),
            out_specs=P(None, None, D),
        )
    )
    np.testing.assert_allclose(run(x), together(newton_schulz, x), atol=1e-5)
    found = hlo.collectives(run.lower(x).compile(QUICK).as_text(), mesh)
    moved = [c for c in found if c.kind in ("all-to-all", "all-gather")]
    assert sum(hlo.wire_bytes(moved).values()) == sent * 4 * 7 / 8


# Jordan et al.; the reference code; Amsel et al., arXiv 2505.16932.
PUBLISHED = {
    "jordan": [(3.4445, -4.7750, 2.0315)] * 5,
    "dion": [
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_polynomials(name):
    """On a diagonal matrix every singular value goes its own way."""
    sigma = np.array([1.0, 0.5, 0.1, 0.01])
    with jax.enable_x64(True):
        got = together(lambda x: newton_schulz(x, name, eps=0.0), np.diag(sigma)[None])
    y = sigma / np.linalg.norm(sigma) / (1.02 if name == "polar_express" else 1.0)
    for a, b, c in PUBLISHED[name]:
        y = a * y + b * y**3 + c * y**5
    np.testing.assert_allclose(got[0], np.diag(y), atol=1e-12)


@pytest.mark.parametrize("coefficients, low, high", [
    ("jordan", 0.65, 1.25), ("dion", 0.8, 1.2), ("polar_express", 0.85, 1.15),
])  # fmt: skip
def test_singular_values_end_near_one(coefficients, low, high):
    x = normal(3, 40, 24)
    y, zero = together(
        lambda *args: [newton_schulz(x, coefficients) for x in args],
        x, np.zeros((1, 4, 2), np.float32),
    )  # fmt: skip
    assert not zero.any()
    u, _, v = np.linalg.svd(x, full_matrices=False)
    inside = np.linalg.svd(y, compute_uv=False)
    assert low < inside.min() and inside.max() < high
    # Same singular vectors: U^T Y V is diagonal.
    core = np.einsum("nls,nlt,nvt->nsv", u, y, v)
    off = core - np.einsum("nss->ns", core)[..., None] * np.eye(24)
    assert np.abs(off).max() < 2e-5


def test_product_form_equals_the_plain_iteration():
    x = normal(1, 48, 32).astype(np.float64)
    with jax.enable_x64(True):
        got = together(lambda x: newton_schulz(x, "dion", eps=0.0), x)
    y = x[0] / np.linalg.norm(x)
    for a, b, c in PUBLISHED["dion"]:
        gram = y.T @ y
        y = y @ (a * np.eye(32) + b * gram + c * gram @ gram)
    np.testing.assert_allclose(got[0], y, atol=1e-12)


def test_same_direction_as_optax():
    ours = scale_by_muon(scale=None)
    numbers = {"w": optax.contrib.MuonDimensionNumbers(0, 1)}
    theirs = optax.contrib.scale_by_muon(
        nesterov=False, weight_dimension_numbers=numbers
    )

    def train(grads):
        a, b, pairs = ours.init(grads[0]), theirs.init(grads[0]), []
        for g in grads:
            (x, a), (y, b) = ours.update(g, a), theirs.update(g, b)
            pairs.append((x["w"], y["w"]))
        return pairs

    for x, y in together(train, [{"w": normal(32, 16, seed=t)} for t in range(3)]):
        np.testing.assert_allclose(x, y, atol=2e-4)


def test_normuon_has_equal_rows_and_the_old_norm():
    g = {"w": normal(32, 16) * np.logspace(0, -3, 16, dtype=np.float32)}
    plain = scale_by_muon(coefficients="polar_express", scale=None)
    normed = scale_by_muon(coefficients="polar_express", scale=None, b2=0.0)
    (x, _), (y, state) = together(
        lambda g: [tx.update(g, tx.init(g)) for tx in (plain, normed)], g
    )
    assert state.row_square["w"].shape == (1, 16)
    np.testing.assert_allclose(
        np.linalg.norm(x["w"]), np.linalg.norm(y["w"]), rtol=1e-5
    )
    rows = np.linalg.norm(y["w"], axis=0)  # (in, out): one per output.
    np.testing.assert_allclose(rows, rows.mean(), rtol=1e-4)


def test_normuon_is_its_formula():
    """Two steps from the polar factors that plain Muon gives."""
    b2, eps, options = 0.8, 1e-2, {"mu": 0.0, "scale": None}
    plain, normed = scale_by_muon(**options), scale_by_muon(b2=b2, eps=eps, **options)

    def train(grads):
        state, other, out = plain.init(grads[0]), normed.init(grads[0]), []
        for g in grads:
            (o, state), (u, other) = plain.update(g, state), normed.update(g, other)
            out.append((o["w"], u["w"], other.row_square["w"]))
        return out

    v = 0.0
    for o, u, row_square in together(
        train, [{"w": normal(12, 8, seed=t)} for t in (0, 1)]
    ):
        v = b2 * v + (1 - b2) * np.mean(o**2, axis=0, keepdims=True)  # (in, out).
        scaled = o / (np.sqrt(v) + eps)
        want = scaled * np.linalg.norm(o) / np.linalg.norm(scaled)
        np.testing.assert_allclose(row_square, v, rtol=1e-5)
        np.testing.assert_allclose(u, want, rtol=1e-4, atol=1e-6)


def test_dion2_uses_the_largest_rows_and_keeps_the_rest():
    g = normal(8, 24)
    g[[1, 6]] *= 10  # Two of the eight rows of the shorter side.
    txs = (
        scale_by_dion2(0.25, scale=None),
        scale_by_dion2(1.0, scale=None, coefficients="jordan"),
        scale_by_muon(scale=None),
    )
    (updates, state), (whole, _), (muon, _) = together(
        lambda g: [tx.update(g, tx.init(g)) for tx in txs], {"w": g}
    )
    u, m = updates["w"], state.momentum["w"]
    assert set(np.flatnonzero(u.any(1))) == {1, 6}
    np.testing.assert_allclose(u[[1, 6]] @ u[[1, 6]].T, np.eye(2), atol=0.1)
    np.testing.assert_allclose(m[[1, 6]], 0.95 * g[[1, 6]], rtol=1e-6)
    rest = [0, 2, 3, 4, 5, 7]
    np.testing.assert_array_equal(m[rest], g[rest])
    np.testing.assert_allclose(whole["w"], muon["w"], atol=1e-5)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: scale_by_muon(mu=1.0), "mu must be in"),
        (lambda: scale_by_muon(coefficients="x"), "coefficients must be one of"),
        (lambda: scale_by_muon(b2=1.5), "b2 must be in"),
        (lambda: scale_by_dion2(0.0), "fraction must be in"),
        (lambda: scale_by_dion2(scale="rms"), "scale must be one of"),
        (
            lambda: scale_by_muon(momentum_dtype=jnp.int32),
            "momentum_dtype must be a real",
        ),
        (
            lambda: scale_by_muon(mu=lambda t: 0.9),
            "mu must be a number, got a function",
        ),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("kind", MAKERS)
def test_tiny_and_huge_gradients(kind):
    g, tx = normal(8, 24), MAKERS[kind](scale=None)
    direction = jax.jit(lambda g: tx.update({"w": g}, tx.init({"w": g}))[0]["w"])
    want = direction(g)
    for scale in (1e-20, 1e20, 1e30):
        np.testing.assert_allclose(direction(g * np.float32(scale)), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["normuon", "dion2"])
def test_state_is_sharded_from_the_start(kind, make_mesh):
    mesh = make_mesh((4, 2))
    with jax.set_mesh(mesh):
        tx = MAKERS[kind](sharding=P(D, M))
        state = jax.jit(tx.init)({"w": np.ones((16, 32), np.float32)})
    where = NamedSharding(mesh, P(D, M))
    assert state.momentum["w"].sharding.is_equivalent_to(where, 2)
    if kind == "normuon":
        rows = NamedSharding(mesh, P(None, M))
        assert state.row_square["w"].sharding.is_equivalent_to(rows, 2)


def test_bad_leaves():
    for tx in (scale_by_muon(), scale_by_dion2()):
        with pytest.raises(TypeError, match="w: .* needs real floating-point"):
            tx.init({"w": np.ones((4, 4), np.complex64)})
        with pytest.raises(ValueError, match="pass weight_dimension_numbers"):
            tx.init({"w": np.ones((4, 4, 4))})
        state = jax.eval_shape(tx.init, {"w": np.ones((4, 8))})
        with pytest.raises(ValueError, match="w: gradient has shape"):
            jax.eval_shape(tx.update, {"w": np.ones((8, 4))}, state)
        with pytest.raises(ValueError, match="different structures"):
            jax.eval_shape(tx.update, {"v": np.ones((4, 8))}, state)
