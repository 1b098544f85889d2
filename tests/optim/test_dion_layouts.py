"""Parameters of any rank equal a loop over their matrices; per-leaf options."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers.optim import DimensionNumbers, scale_by_dion
from tests.programs import together


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# name -> shape, dimension numbers, leaf -> list of its (in, out) matrices.
LAYOUTS = {
    "stacked layers": ((3, 8, 12), DimensionNumbers(1, 2), list),
    "experts in layers": (
        (2, 3, 12, 8),
        DimensionNumbers(-2, -1),
        lambda x: list(x.reshape(6, 12, 8)),
    ),
    "attention": (
        (8, 4, 3),
        DimensionNumbers(0, (1, 2)),
        lambda x: [x.reshape(8, 12)],
    ),
    "attention per head": (
        (8, 3, 12),
        DimensionNumbers(0, 2),
        lambda x: [x[:, h] for h in range(3)],
    ),
    "attention output": (
        (4, 3, 8),
        DimensionNumbers((0, 1), 2),
        lambda x: [x.reshape(12, 8)],
    ),
    "convolution": (
        (2, 2, 3, 8),
        DimensionNumbers((0, 1, 2), 3),
        lambda x: [x.reshape(12, 8)],
    ),
    "torch linear": ((8, 12), DimensionNumbers(1, 0), lambda x: [x.T]),
}


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x == "torch linear" else pytest.mark.matrix)
        for x in LAYOUTS
    ],
)
def test_equals_the_loop_over_matrices(name):
    shape, numbers, split = LAYOUTS[name]
    tx = scale_by_dion(0.5, weight_dimension_numbers=numbers)
    flat = scale_by_dion(0.5)

    def train(grads):
        state, flat_state = tx.init({"w": grads[0]}), flat.init(split(grads[0]))
        # The same Q: batch axes first, then one row per element of the shorter side.
        q = state.q["w"].reshape(-1, 8, 4)
        flat_state = flat_state._replace(q=list(q))
        pairs = []
        for g in grads:
            update, state = tx.update({"w": g}, state)
            want, flat_state = flat.update(split(g), flat_state)
            pairs += [(update, want), (state.momentum, flat_state.momentum)]
        return [(split(got["w"]), other) for got, other in pairs]

    for got, other in together(train, [normal(*shape, seed=t) for t in range(2)]):
        for x, y in zip(got, other, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=4e-6)


@pytest.mark.matrix
def test_batching_changes_nothing():
    # a, b and c share the side of P and the rank, not the other side; d does not.
    shapes = {"a": (24, 16), "b": (24, 16), "c": (24, 8), "d": (20, 16)}
    rank = {"a": 0.25, "b": 0.25, "c": 0.5, "d": 0.25}
    grads = {k: normal(*s, seed=ord(k)) for k, s in shapes.items()}

    def train(grads, batch):
        tx = scale_by_dion(rank, batch=batch)
        state = tx.init(grads)
        for _ in range(2):
            updates, state = tx.update(grads, state)
        return updates, state

    batches = ("same_shape", "none")
    out = together(lambda g: {batch: train(g, batch) for batch in batches}, grads)
    state = jax.eval_shape(scale_by_dion(rank).init, grads)
    factorisations = {
        batch: str(
            jax.make_jaxpr(scale_by_dion(rank, batch=batch).update)(grads, state)
        ).count("name=_blockwise")
        for batch in out
    }
    assert factorisations == {"same_shape": 2, "none": 4}
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-6),
        *out.values(),
    )


def q_shapes(tx, **shapes):
    state = jax.eval_shape(
        tx.init, {k: np.zeros(s, np.float32) for k, s in shapes.items()}
    )
    return {k: q.shape for k, q in state.q.items()}


def test_rank():
    # Rounded up, as the reference does; then to the multiple; then cut to the matrix.
    assert q_shapes(scale_by_dion(0.25), a=(30, 50), b=(9, 4)) == {
        "a": (30, 8),
        "b": (4, 1),
    }
    many = scale_by_dion(0.25, rank_multiple_of=16)
    assert q_shapes(many, a=(50, 30), b=(9, 4)) == {"a": (30, 16), "b": (4, 4)}


def test_rank_fraction_per_leaf():
    want = {"a": (16, 4), "b": (16, 8)}
    by_tree = scale_by_dion({"a": 0.25, "b": 0.5})
    by_path = scale_by_dion(lambda path, leaf: 0.25 if path == "a" else 0.5)
    by_shape = scale_by_dion(lambda path, leaf: 4 / leaf.shape[1])
    assert q_shapes(by_tree, a=(32, 16), b=(32, 16)) == want
    assert q_shapes(by_path, a=(32, 16), b=(32, 16)) == want
    assert q_shapes(by_shape, a=(32, 16)) == {"a": (16, 4)}
    with pytest.raises(ValueError, match="rank_fraction has no entry for .* 'c'"):
        q_shapes(by_tree, c=(4, 4))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "side, rows",
    [
        ("longer", 8),
        *(
            pytest.param(*x, marks=pytest.mark.matrix)
            for x in (("output", 12), ("input", 8))
        ),
    ],
)
def test_p_side(side, rows):
    # (in, out) = (12, 8): the input side is the longer one; Q takes the other.
    tx = scale_by_dion(0.5, p_side=side, scale=None)
    assert q_shapes(tx, a=(12, 8)) == {"a": (rows, 4)}
    update, state = together(lambda g: tx.update(g, tx.init(g)), {"a": normal(12, 8)})
    p = (update["a"] if rows == 8 else update["a"].T) @ np.linalg.pinv(state.q["a"].T)
    np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("shape", [(8, 18), (18, 8)])
def test_scales(shape):
    txs = [scale_by_dion(0.5, scale=s) for s in (None, "spectral", "rms")]
    plain, spectral, rms = together(
        lambda g: [tx.update(g, tx.init(g))[0]["w"] for tx in txs],
        {"w": normal(*shape)},
    )
    fan_in, fan_out = shape
    np.testing.assert_allclose(spectral, plain * np.sqrt(fan_out / fan_in), rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.mean(rms**2)), 0.2, rtol=1e-5)
    np.testing.assert_allclose(rms, plain * (rms[0, 0] / plain[0, 0]), rtol=1e-5)


def test_dtypes():
    params = {
        name: jax.ShapeDtypeStruct((12, 8), dtype)
        for name, dtype in (("w", jnp.bfloat16), ("v", jnp.float32))
    }

    def dtypes(tx):
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state)
        assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, state)
        assert {k: v.dtype for k, v in updates.items()} == {
            k: v.dtype for k, v in params.items()
        }
        return state.momentum["w"].dtype, state.q["w"].dtype

    assert dtypes(scale_by_dion(0.5)) == (jnp.bfloat16, jnp.bfloat16)
    assert dtypes(scale_by_dion(0.5, momentum_dtype="float32")) == ("float32",) * 2
    mixed = scale_by_dion(0.5, momentum_dtype=jnp.float32, q_dtype="bfloat16")
    assert dtypes(mixed) == (jnp.float32, jnp.bfloat16)


@pytest.mark.matrix
def test_bfloat16_state_follows_float32():
    def train(g, dtype):
        tx = scale_by_dion(0.25, momentum_dtype=dtype)
        state = tx.init(g)._replace(q={"w": jnp.eye(16, 4, dtype=dtype)})
        for _ in range(3):
            updates, state = tx.update(g, state)
        return updates["w"]

    dtypes = (jnp.float32, jnp.bfloat16)
    runs = together(lambda g: [train(g, x) for x in dtypes], {"w": normal(24, 16)})
    error = np.linalg.norm(runs[0] - runs[1]) / np.linalg.norm(runs[0])
    assert error < 3e-2


def test_q_of_a_bare_array_and_of_other_containers():
    tx = scale_by_dion(0.5)
    x = np.ones((8, 4), np.float32)
    for params in (x, [x], (x,)):
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.leaves(tx.init({})) == [0]
    assert optax.tree.norm(tx.update({}, tx.init({}))[0]) == 0
