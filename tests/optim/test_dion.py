"""What a Dion step promises, and the reference's defects as regression tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import DimensionNumbers, power_iterate, scale_by_dion
from jaxpapers.optim.orthonormalize import METHODS
from tests.programs import together

STACKED = DimensionNumbers(1, 2)
# The default method and the one with a sketch; the others are in the matrix.
SOME = [
    pytest.param(x, marks=() if x == "scqr" else pytest.mark.matrix) for x in METHODS
]


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def one_step(tx, g, q=None):
    """Update and state after one gradient; ``q`` replaces the drawn one."""
    state = tx.init({"w": g})
    if q is not None:
        state = state._replace(q={"w": q})
    update, state = tx.update({"w": g}, state)
    return update["w"], state


def first(tx, *args):
    """``one_step`` as one program, on the host."""
    return together(functools.partial(one_step, tx), *args)


def steps(tx, grads):
    """Yields (update, state) for a list of gradient trees."""
    state, update = jax.jit(tx.init)(grads[0]), jax.jit(tx.update)
    for g in grads:
        out, state = update(g, state)
        yield out, state


@pytest.mark.matrix
def test_full_rank_momentum_is_heavy_ball():
    grads = [normal(12, 8, seed=i) for i in range(3)]
    # The span of a full-rank B Q is known to u * cond(Q): start from a good one.
    q = np.eye(8, dtype=np.float32)

    @jax.jit
    def update(mu, g, m):
        state = scale_by_dion().init({"w": g})
        state = state._replace(momentum={"w": m}, q={"w": jnp.asarray(q)})
        return scale_by_dion(mu=mu).update({"w": g}, state)[1].momentum["w"]

    for mu in (0.0, 0.5, 0.95, 1.0):
        m = np.zeros((12, 8), np.float32)
        for g in grads:
            b = m + g
            m = np.asarray(update(np.float32(mu), g, m))
            np.testing.assert_allclose(m, mu * b, rtol=0, atol=1e-6 * np.abs(b).max())
    np.testing.assert_allclose(m, sum(grads), atol=1e-6 * np.abs(m).max())  # mu = 1.


@pytest.mark.parametrize("right_factor", ["colnorm", "orth"])
def test_invariants(right_factor):
    r = 4
    tx = scale_by_dion(0.5, right_factor=right_factor, scale=None)
    m = np.zeros((12, 8))
    for t, (update, state) in enumerate(
        steps(tx, [{"w": normal(12, 8, seed=i)} for i in range(4)])
    ):
        u, q = (np.asarray(x["w"], np.float64) for x in (update, state.q))
        b = m + normal(12, 8, seed=t)
        m = np.asarray(state.momentum["w"], np.float64)
        p = u @ np.linalg.pinv(q.T)
        np.testing.assert_allclose(p.T @ p, np.eye(r), atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(q, axis=0), 1, atol=2e-6)
        np.testing.assert_allclose(np.linalg.norm(u), np.sqrt(r), rtol=2e-6)
        values = np.linalg.svd(u, compute_uv=False)
        np.testing.assert_allclose(
            values[:r], np.linalg.svd(q, compute_uv=False), atol=2e-6
        )
        assert values[r] < 2e-6
        if right_factor == "orth":
            np.testing.assert_allclose(values[:r], 1, atol=2e-6)
        # Descent on every rank-one term: Householder signs would make some ascend.
        assert (np.einsum("lr,ls,sr->r", p, b, q) > 0).all()


@pytest.mark.matrix
def test_rotation_equivariance():
    with jax.enable_x64(True):
        g, q = normal(2, 12, 8, dtype=np.float64), normal(8, 3, dtype=np.float64)
        left = np.linalg.qr(normal(12, 12, dtype=np.float64))[0]
        right = np.linalg.qr(normal(8, 8, seed=1, dtype=np.float64))[0]
        tx = scale_by_dion(3 / 8)

        @jax.jit
        def run(g, q):
            state = tx.init({"w": g[0]})._replace(q={"w": q})
            for x in g:
                update, state = tx.update({"w": x}, state)
            return update["w"], state.momentum["w"]

        for got, want in zip(run(left @ g @ right, right.T @ q), run(g, q)):
            np.testing.assert_allclose(got, left @ want @ right, atol=1e-12)


def test_scale_invariance():
    g, step = normal(12, 8), jax.jit(functools.partial(one_step, scale_by_dion(0.5)))
    want, state = step(g)
    for c in (1e-3, 1e5, 1e10):
        got, scaled = step(g * np.float32(c))
        np.testing.assert_allclose(got, want, atol=1e-5)
        m = np.asarray(state.momentum["w"]) * c
        np.testing.assert_allclose(scaled.momentum["w"], m, atol=2e-6 * np.abs(m).max())


@pytest.mark.matrix
def test_power_iteration_converges_at_the_ratio_squared():
    with jax.enable_x64(True):
        u = np.linalg.qr(normal(10, 6, dtype=np.float64))[0]
        v = np.linalg.qr(normal(6, 6, seed=1, dtype=np.float64))[0]
        b = u @ np.diag([4, 3, 1, 0.8, 0.5, 0.2]) @ v.T
        q, sines = normal(6, 2, seed=2, dtype=np.float64), []
        iterate = jax.jit(power_iterate)
        for _ in range(11):
            p, r = (np.asarray(x) for x in iterate(b, q))
            q = r / np.linalg.norm(r, axis=0, keepdims=True)
            outside = p - u[:, :2] @ (u[:, :2].T @ p)
            sines.append(np.linalg.norm(outside, 2))
        ratios = np.divide(sines[1:], sines[:-1])
        # (sigma_3 / sigma_2)^2, once the components beyond the third are gone.
        assert (ratios[1:] <= (1 / 3) ** 2 * 1.001).all()
        np.testing.assert_allclose(ratios[-1], 1 / 9, rtol=0.05)


@pytest.mark.matrix
@pytest.mark.parametrize("iters", [2, np.int32(2)])
def test_power_iters_repeat_with_unnormalised_r(iters):
    g, q = normal(12, 8), normal(8, 3, seed=1)
    update, state = first(scale_by_dion(3 / 8, power_iters=iters, scale=None), g, q)
    p, r = together(lambda g, q: power_iterate(g, power_iterate(g, q)[1]), g, q)
    np.testing.assert_allclose(state.q["w"], r / np.linalg.norm(r, axis=0), atol=2e-6)
    np.testing.assert_allclose(update, p @ np.asarray(state.q["w"]).T, atol=2e-6)
    np.testing.assert_allclose(state.momentum["w"], g - 0.05 * p @ r.T, atol=2e-6)


def test_chained_update_is_the_papers_step():
    x, g, lr, decay = normal(8, 12), normal(8, 12, seed=1), 0.1, 0.3
    direction, _ = first(scale_by_dion(0.5, scale=None), g)
    tx = optax.chain(
        scale_by_dion(0.5),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(lr),
    )

    def step(x, g):
        updates, _ = tx.update({"w": g}, tx.init({"w": x}), {"w": x})
        return optax.apply_updates({"w": x}, updates)["w"]

    # A Flax kernel is (in, out): fan_out = 12, fan_in = 8.
    want = (1 - lr * decay) * x - lr * np.sqrt(12 / 8) * direction
    np.testing.assert_allclose(together(step, x, g), want, atol=2e-6)


def degenerate(m, n):
    """(cases, m, n): gradients of the digest's table, as one stacked leaf."""
    g, rows, columns = normal(m, n), np.arange(m)[:, None], np.arange(n)
    entry = np.zeros((m, n), np.float32)
    entry[3, 5] = 1
    cases = [
        g * 1e-20,
        g * 1e20,
        normal(m, 2) @ normal(2, n),
        g * (rows < 2),
        g * (rows == 1),
        g * (columns % 2),
        g * (columns == 1),
        entry,
        np.zeros((m, n), np.float32),
    ]
    return np.stack(cases)


@pytest.mark.parametrize("method", SOME)
def test_degenerate_gradients_stay_bounded_and_recover(method):
    r, bad = 8, degenerate(24, 16)
    good = np.stack([normal(24, 16, seed=9)] * len(bad)) * np.float32(1e20)
    tx = scale_by_dion(0.5, orthogonalize=method, weight_dimension_numbers=STACKED)
    grads = [{"w": bad}, {"w": bad}, {"w": good}, {"w": good}]
    for update, state in steps(tx, grads):
        u = np.asarray(update["w"]) / np.sqrt(16 / 24)
        bound = np.sqrt(r) * (1 + 1e-5)
        assert (np.linalg.norm(u, axis=(1, 2)) <= bound).all()
        for leaf in jax.tree.leaves(state):
            assert np.isfinite(leaf).all()
    # After two ordinary gradients every matrix gets a full update along its momentum.
    np.testing.assert_allclose(np.linalg.norm(u, axis=(1, 2)), np.sqrt(r), rtol=1e-5)
    assert (np.einsum("nab,nab->n", u, good / 1e20) > r).all()


@pytest.mark.matrix
def test_rcqr_is_orthonormal_with_fewer_rows_than_columns():
    # Defect 2 of the reference: 2.1 times the bound here.
    g = normal(256, 128) * (np.arange(256) < 8)[:, None]
    update, _ = first(scale_by_dion(0.5, orthogonalize="rcqr", scale=None), g)
    assert np.linalg.norm(update) <= np.sqrt(64) * (1 + 1e-5)


@pytest.mark.matrix
def test_columns_of_rounding_error_carry_nothing():
    # Defect 3, the paper's too: one non-zero column gives a full-norm update.
    def step(**options):
        return jax.jit(functools.partial(one_step, scale_by_dion(0.5, **options)))

    g = (normal(24, 16) * (np.arange(16) == 3)).astype(np.float32)
    reference = step(scale=None, noise_guard=0.0)
    default = step(scale=None)
    (noisy, _), (update, state) = reference(g), default(g)
    # Signal has norm 1 of sqrt(8). Which columns round to exactly 0 is the compiler's.
    assert np.linalg.norm(noisy) >= 0.8 * np.sqrt(8)
    want = g[:, 3] / np.linalg.norm(g)  # One column: its unit vector.
    np.testing.assert_allclose(update[:, 3], want, atol=2e-6)
    assert np.abs(np.delete(update, 3, 1)).max() < 2e-6
    # Q keeps what it had where there is no signal, and has it where there is.
    start = together(scale_by_dion(0.5).init, {"w": g}).q["w"]
    np.testing.assert_allclose(state.q["w"][:, 1:], start[:, 1:], rtol=1e-6)
    np.testing.assert_allclose(
        np.abs(state.q["w"][:, 0]), np.arange(16) == 3, atol=1e-6
    )
    full = normal(24, 16, seed=1)
    np.testing.assert_array_equal(default(full)[0], reference(full)[0])


@pytest.mark.matrix
def test_a_guard_above_rounding_changes_the_update_only():
    g = normal(24, 16).astype(np.float32) * np.geomspace(1, 1e-3, 16, dtype=np.float32)
    tx, guarded_tx = (scale_by_dion(scale=None, noise_guard=x) for x in (None, 0.1))
    (update, state), (guarded, other) = together(
        lambda g: (one_step(tx, g), one_step(guarded_tx, g)), g
    )
    np.testing.assert_array_equal(state.q["w"], other.q["w"])
    ranks = [np.linalg.matrix_rank(x, tol=1e-3) for x in (update, guarded)]
    assert ranks[0] == 16 and 0 < ranks[1] < 16


@pytest.mark.parametrize("method", SOME)
@pytest.mark.parametrize("guard", [0.0, pytest.param(0.1, marks=pytest.mark.matrix)])
def test_nan_is_not_swallowed(method, guard):
    # Defect 4. Both leaves are factorised as one batch: only one may suffer.
    g = {"a": normal(12, 8), "b": normal(12, 8, seed=1)}
    g["a"][5, 2] = np.nan
    tx = scale_by_dion(0.5, orthogonalize=method, noise_guard=guard)
    ((update, state),) = steps(tx, [g])
    assert np.isnan(update["a"]).all()
    assert np.isnan(state.momentum["a"]).all()
    assert np.isfinite(update["b"]).all()


def test_infinite_gradient_is_not_swallowed():
    g = normal(12, 8)
    g[5, 2] = np.inf
    assert not np.isfinite(first(scale_by_dion(0.5), g)[0]).any()


def test_state_is_complete_after_init():
    # Defect 7: nothing is created by the first update.
    tx = scale_by_dion(0.5)
    params = {"w": np.ones((12, 8), np.float32), "v": np.ones((4, 4), np.float32)}
    state = together(tx.init, params)
    after = jax.eval_shape(tx.update, params, state)[1]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
    assert not state.momentum["w"].any()
    assert abs(float(state.q["w"].std()) - 1) < 0.5


@pytest.mark.programs(20)  # Outside jit, every operation is a program.
def test_q_is_drawn_per_path_whatever_the_tree_the_mesh_or_jit(make_mesh):
    init = scale_by_dion(0.5).init
    leaf = jnp.asarray(np.ones((16, 8), np.float32))
    q = jax.jit(init)({"a": leaf, "b": leaf}).q
    assert (np.asarray(q["a"]) != np.asarray(q["b"])).any()
    more = jax.jit(init)({"0": leaf, "b": leaf, "a": leaf}).q
    jitted = init({"b": leaf}).q
    where = NamedSharding(make_mesh((2, 4)), P("data", "model"))
    spread = init({"b": jax.device_put(leaf, where)}).q
    for other in (more, jitted, spread):
        np.testing.assert_array_equal(other["b"], q["b"])
    other = together(scale_by_dion(0.5, seed=1).init, {"b": leaf}).q["b"]
    assert (other != np.asarray(q["b"])).any()
