"""Nesterov's momentum, the residual of a low rank, and equal rows, in closed form."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import (
    DimensionNumbers,
    dion,
    plan_dion,
    scale_by_dion,
)

# P lies on the output side of "tall", on the input side of "wide".
SHAPES = {"tall": (16, 32), "wide": (32, 16), "stack": (2, 24, 16), "heads": (16, 4, 8)}
NUMBERS = {
    "tall": DimensionNumbers(),
    "wide": DimensionNumbers(),
    "stack": DimensionNumbers(1, 2),
    "heads": DimensionNumbers(0, (1, 2)),
}
MU, WEIGHT = 0.9, 0.7
ALL = {
    "nesterov": True,
    "residual": WEIGHT,
    "normalize_rows": True,
}
VARIANTS = [
    pytest.param(ALL, id="all"),
    pytest.param({"nesterov": True}, id="nesterov"),
    pytest.param({"residual": WEIGHT}, id="residual"),
    pytest.param({"normalize_rows": True}, id="rows"),
]


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def by_hand(g, m, q, *, nesterov=False, residual=None, normalize_rows=False):
    """One step of one (in, out) matrix, in float64 and with explicit residuals."""
    flip = g.shape[0] > g.shape[1]  # P on the longer side, by columns of the output.
    g, m = (x if flip else x.T for x in (g, m))
    b = m + g
    n = MU * b + g if nesterov else b
    p = np.linalg.qr(n @ q)[0]
    r = n.T @ p
    q = r / np.linalg.norm(r, axis=0)
    update, m = p @ q.T, b - (1 - MU) * p @ r.T
    if residual is not None:
        rest = n - p @ r.T
        left = min(g.shape) - q.shape[1]
        update = update + residual * np.sqrt(left) * rest / np.linalg.norm(rest)
        m = MU * b
    update, m = (x if flip else x.T for x in (update, m))
    if normalize_rows:  # Columns of (in, out) are the outputs.
        size = np.linalg.norm(update)
        update = update / np.linalg.norm(update, axis=0)
        update = update * size / np.linalg.norm(update)
    return update, m, q


def matrices(name, x):
    """A leaf as a list of (in, out) matrices."""
    return (
        list(x) if name == "stack" else [x.reshape(16, 32)] if name == "heads" else [x]
    )


def transformation(**options):
    return scale_by_dion(
        0.25, mu=MU, eps=0.0, scale=None, weight_dimension_numbers=NUMBERS, **options
    )


def gradients(t, dtype=np.float32):
    return {n: normal(*s, seed=10 * t + i, dtype=dtype)
            for i, (n, s) in enumerate(SHAPES.items())}  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS)
def test_equals_the_equations(options):
    with jax.enable_x64(True):
        tx = transformation(**options)
        state = jax.jit(tx.init)(gradients(0, np.float64))
        update = jax.jit(tx.update)
        for t in range(3):
            before, g = jax.device_get(state), gradients(t, np.float64)
            got, state = jax.device_get(update(g, state))
            for name in SHAPES:
                leaves = [g, before.momentum, got, state.momentum]
                each = [matrices(name, np.asarray(x[name])) for x in leaves]
                qs = [np.asarray(x.q[name]) for x in (before, state)]
                if name == "heads":
                    qs = [q.reshape(-1, q.shape[-1]) for q in qs]
                qs = [list(q) if name == "stack" else [q] for q in qs]
                for g_, m_, u, m, q_, q in zip(*each, *qs):
                    want = by_hand(g_, m_, q_, **options)
                    # NorMuon's epsilon, 1e-8, beside roots of 0.04; and in float64 the
                    # floor is 2e-13 of a row's square.
                    tol = 1e-6 if "normalize_rows" in options else 1e-10
                    np.testing.assert_allclose(u, want[0], atol=tol)
                    np.testing.assert_allclose(m, want[1], atol=1e-10)
                    # Columns of Q are unique up to the sign of P's.
                    sign = np.sign((q * want[2]).sum(0))
                    np.testing.assert_allclose(q, want[2] * sign, atol=1e-10)


@pytest.mark.parametrize(
    "sizes", [(4, 2), pytest.param((2, 4), marks=pytest.mark.matrix)]
)
def test_the_same_on_a_mesh(sizes, make_mesh):
    mesh = make_mesh(sizes)
    specs = (
        P("data", "model"),
        P("model", "data"),
        P(None, "data", "model"),
        P("data"),
    )
    where = {n: NamedSharding(mesh, s) for n, s in zip(SHAPES, specs)}
    runs = []
    for place, tx in (
        (lambda x: x, transformation(**ALL)),
        (lambda x: jax.device_put(x, where), transformation(**ALL, sharding=where)),
    ):
        state, update = jax.jit(tx.init)(place(gradients(0))), jax.jit(tx.update)
        for t in range(3):
            got, state = update(place(gradients(t)), state)
        runs.append(jax.device_get((got, state)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=4e-6), *runs)


def test_root_mean_square_is_that_of_an_orthonormal_matrix():
    grads = gradients(0)
    sizes = {n: 2 * 16 if n == "stack" else 16 for n in SHAPES}

    @jax.jit
    def squares(grads, weight):
        tx = transformation(nesterov=True, residual=weight)
        rms = scale_by_dion(
            0.25, scale="rms", residual=weight, weight_dimension_numbers=NUMBERS
        )
        return [
            jax.tree.map(lambda u: (u**2).sum(), t.update(grads, t.init(grads))[0])
            for t in (tx, rms)
        ]

    found, rms = squares(grads, 1.0)
    for name, size in sizes.items():
        np.testing.assert_allclose(found[name], size, rtol=1e-5)
        np.testing.assert_allclose(rms[name], 0.04 * grads[name].size, rtol=1e-5)
    found, rms = squares(
        grads, 2.0
    )  # A quarter of the directions, the rest four times.
    for name, size in sizes.items():
        np.testing.assert_allclose(found[name], (1 / 4 + 4 * 3 / 4) * size, rtol=1e-5)
        np.testing.assert_allclose(rms[name], 0.04 * grads[name].size, rtol=1e-5)


def test_full_rank_has_no_residual_and_heavy_ball_momentum():
    g, q = normal(24, 8), np.eye(8, dtype=np.float32)

    @jax.jit
    def run(g):
        out = []
        for options in ({"residual": 1.0}, {}):
            tx = scale_by_dion(1.0, mu=MU, **options)
            state = tx.init({"w": g})._replace(q={"w": jax.numpy.asarray(q)})
            out.append(tx.update({"w": g}, state))
        return out

    (with_, state), (without, _) = jax.device_get(run(g))
    np.testing.assert_allclose(with_["w"], without["w"], atol=2e-6)
    np.testing.assert_allclose(state.momentum["w"], MU * g, rtol=1e-6)


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_what_is_rounding_error_stays_small(rank):
    """N of a rank that P holds whole: the residual is no direction of its own."""
    g = normal(16, 32, rank, seed=1) @ normal(16, rank, 16, seed=2)

    @jax.jit
    def run(g):
        out = []
        for residual in (1.0, None):
            tx = scale_by_dion(
                0.25,
                residual=residual,
                scale=None,
                weight_dimension_numbers=DimensionNumbers(1, 2),
            )
            out.append(tx.update({"w": g}, tx.init({"w": g}))[0]["w"])
        return out

    with_, without = jax.device_get(run(g.astype(np.float32)))
    assert np.isfinite(with_).all()
    # Of sqrt(12) at most 32 u / sqrt(1024 u).
    u = np.finfo(np.float32).eps
    assert np.abs(with_ - without).max() <= np.sqrt(12 * u)
    np.testing.assert_allclose((without**2).sum((1, 2)), min(rank, 4), atol=1e-3)


SMALLEST = [
    # One entry, one row, all entries: N's norm is that of one number or of many.
    lambda: np.eye(1, 512, 40, dtype=np.float32).reshape(32, 16),
    lambda: np.eye(32, dtype=np.float32)[:, 3:4] * normal(1, 16),
    lambda: normal(32, 16),
]


@pytest.mark.parametrize("rank", [0.25, 1.0])
def test_gradients_at_the_end_of_the_range(rank):
    """Down to zero nothing becomes infinite, and no update is longer than a whole one."""
    tx = scale_by_dion(rank, eps=0.0, scale=None, **ALL | {"residual": 1.0})

    @jax.jit
    def sizes(g):
        def one(exponent):
            update, _ = tx.update(
                {"w": jax.numpy.ldexp(g, exponent)}, tx.init({"w": g})
            )
            return jax.numpy.linalg.norm(update["w"])

        return jax.lax.map(one, jax.numpy.arange(-149, -60))

    found = np.stack([sizes(make()) for make in SMALLEST])
    assert np.isfinite(found).all() and found.max() <= 4.0 * (1 + 1e-5)
    assert found[2, -1] > 3.9


def test_a_layer_that_gets_no_gradients_any_more():
    """The momentum decays through all of float32's range; eps lets the update fade."""

    def norms(residual):
        tx = scale_by_dion(0.25, mu=0.5, nesterov=True, residual=residual)
        g = {"w": jax.numpy.asarray(1e-2 * normal(32, 16))}

        def step(state, scale):
            update, state = tx.update(jax.tree.map(lambda x: scale * x, g), state)
            return state, jax.numpy.linalg.norm(update["w"])

        scales = jax.numpy.zeros(160).at[0].set(1.0)
        return jax.lax.scan(step, tx.init(g), scales)[1]

    with_, without = jax.jit(lambda: (norms(1.0), norms(None)))()
    assert np.isfinite(with_).all() and with_[-1] == 0
    # Of 4 and 2 at first, both parts by the same factor once all is below eps.
    ratio = np.asarray(with_[:60] / without[:60])
    assert ratio.max() < 4 and with_[60] < 1e-5


def test_no_residual_where_q_sees_nothing():
    g = {"w": np.eye(1, 512, 40, dtype=np.float32).reshape(32, 16)}  # Row 2, column 8.
    tx = scale_by_dion(0.25, residual=1.0)

    @jax.jit
    def run(g):
        state = tx.init(g)
        q = {"w": state.q["w"].at[8].set(0)}
        return tx.update(g, state._replace(q=q))

    update, state = run(g)
    assert (np.asarray(update["w"]) == 0).all()
    np.testing.assert_allclose(state.momentum["w"], 0.95 * g["w"], rtol=1e-6)


@pytest.mark.parametrize("exponent", [-90, 0, 120])
def test_scale_of_the_gradient_does_not_matter(exponent):
    def run(g):
        tx = scale_by_dion(0.25, eps=0.0, **ALL)
        return tx.update({"w": g}, tx.init({"w": g}))[0]["w"]

    step = jax.jit(run)
    g = normal(32, 16)
    got = np.asarray(step(np.ldexp(g, exponent)))
    np.testing.assert_allclose(got, step(g), rtol=0, atol=1e-6)


def test_dead_outputs_and_nan():
    tx = scale_by_dion(0.25, **ALL)

    @jax.jit
    def run(g):
        return tx.update({"w": g}, tx.init({"w": g}))[0]["w"]

    g = normal(32, 16)
    g[:, 3] = 0  # An output that no gradient reaches, and an input.
    g[5] = 0
    update = np.asarray(run(g))
    assert np.isfinite(update).all() and (update[:, 3] == 0).all()
    norms = np.linalg.norm(update, axis=0)
    np.testing.assert_allclose(np.delete(norms, 3), norms[0], rtol=1e-5)
    g[2, 2] = np.nan
    assert np.isnan(run(g)).all()


def test_weights_that_are_hyper_parameters():
    grads = {"w": normal(32, 16)}
    names = ("rank_fraction", "rank_multiple_of")
    tx = optax.inject_hyperparams(scale_by_dion, static_args=names)(0.25, residual=1.0)

    @jax.jit
    def run(grads, weight):
        state = tx.init(grads)
        state.hyperparams["residual"] = weight
        plain = scale_by_dion(0.25, residual=weight)
        return tx.update(grads, state)[0], plain.update(grads, plain.init(grads))[0]

    got, want = jax.device_get(run(grads, np.float32(0.3)))
    np.testing.assert_allclose(got["w"], want["w"], atol=1e-6)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"residual": -1.0}, ValueError, r"residual must be in \[0, inf\), got -1"),
        ({"residual": np.nan}, ValueError, "residual must be in"),
        ({"nesterov": 1}, TypeError, "nesterov"),
        ({"normalize_rows": "x"}, TypeError, "normalize_rows"),
        (
            {"residual": 1.0, "replicate_axis": "replica"}, ValueError,
            "replicas exchange P and R alone.*residual=None",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_refuses(options, error, match):
    with pytest.raises(error, match=match):
        scale_by_dion(0.25, **options)
    with pytest.raises(error, match=match):
        dion(0.01, 0.25, **options)
    mesh = {"replica": 2, "data": 2}
    with pytest.raises(error, match=match):
        plan_dion((64, 64), P("data"), mesh, 0.25, **options)
