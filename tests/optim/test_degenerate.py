"""Gradients of low rank, and at both ends of float32's range."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers.optim import scale_by_dion, scale_by_dion2, scale_by_muon

SHAPE = (48, 32)
matrix = pytest.mark.matrix


def dion_(*args, **kwargs):
    return functools.partial(scale_by_dion, *args, scale=None, **kwargs)


def muon_(**kwargs):
    return functools.partial(scale_by_muon, scale=None, **kwargs)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LOW_RANK = [
    pytest.param(dion_(0.25), 1e-5, id="dion quarter"),
    pytest.param(muon_(), 1e-3, id="muon"),
    pytest.param(dion_(), 3e-5, id="dion", marks=matrix),
    pytest.param(dion_(right_factor="orth"), 3e-5, id="orth", marks=matrix),
    pytest.param(dion_(0.25, orthogonalize="qr"), 3e-5, id="dion qr", marks=matrix),
    pytest.param(muon_(b2=0.95), 1e-3, id="normuon", marks=matrix),
    pytest.param(
        functools.partial(scale_by_dion2, scale=None), 2e-3, id="dion2", marks=matrix
    ),
]


def low_rank_then_full():
    """Gradients of rank 1, 1, 3, and a full one that Q's idle columns have to meet."""
    m, n = SHAPE
    for seed, rank in enumerate((1, 1, 3)):
        yield normal(m, rank, seed=seed) @ normal(rank, n, seed=9 + seed)
    yield normal(m, n, seed=7)


@pytest.mark.parametrize("make, tolerance", LOW_RANK)
def test_low_rank_gradients_give_the_same_run_on_every_mesh(make, tolerance, make_mesh):
    def run(place, spec):
        tx = make(sharding=spec)
        update = jax.jit(tx.update)
        state = jax.jit(tx.init)({"w": place(np.zeros(SHAPE, np.float32))})
        for g in low_rank_then_full():
            updates, state = update({"w": place(g)}, state)
            yield np.asarray(updates["w"])

    where = NamedSharding(make_mesh((4, 2)), P("data", "model"))
    pairs = zip(
        run(jax.numpy.asarray, None), run(lambda x: jax.device_put(x, where), where)
    )
    for alone, split in pairs:
        assert np.linalg.norm(alone - split) <= tolerance * np.linalg.norm(alone)


@matrix
@pytest.mark.parametrize("guard", [None, 0.01])
def test_columns_near_the_floor_are_known_to_their_rounding(guard, make_mesh):
    """Singular values from 1 to 1e-8: a larger guard makes meshes agree better."""
    m, n = SHAPE
    u, v = (np.linalg.qr(normal(k, n, seed=k))[0] for k in SHAPE)
    grad = ((u * np.logspace(0, -8, n)) @ v.T).astype(np.float32)

    def run(place, spec):
        tx = scale_by_dion(scale=None, noise_guard=guard, sharding=spec)
        update = jax.jit(tx.update)
        state = jax.jit(tx.init)({"w": place(np.zeros(SHAPE, np.float32))})
        for _ in range(3):
            updates, state = update({"w": place(grad)}, state)
            yield np.asarray(updates["w"])

    where = NamedSharding(make_mesh((4, 2)), P("data", "model"))
    pairs = zip(
        run(jax.numpy.asarray, None), run(lambda x: jax.device_put(x, where), where)
    )
    round_off = np.finfo(np.float32).eps / 2
    for alone, split in pairs:
        difference = np.linalg.norm(alone - split) / np.linalg.norm(alone)
        assert difference <= 20 * round_off / (guard or 1024 * round_off)


SMALL = {
    "dion": dion_(0.5),
    "muon": muon_(b2=0.9),
    "dion2": functools.partial(scale_by_dion2, 0.5, scale=None),
}


def run(tx, grads):
    update = jax.jit(tx.update)
    state = jax.jit(tx.init)({"w": grads[0]})
    for g in grads:
        updates, state = update({"w": g}, state)
    return np.asarray(updates["w"]), state


@pytest.mark.parametrize("name", ["dion", pytest.param("muon", marks=matrix), "dion2"])
def test_huge_gradients_give_the_update_of_small_ones(name):
    g = normal(12, 8)
    # A power of two near 4e37; and the largest numbers, whose momentum saturates.
    huge = np.ldexp(g / np.abs(g).max(), 125)
    small, _ = run(SMALL[name](), [np.ldexp(huge, -125)])
    large, _ = run(SMALL[name](), [huge])
    np.testing.assert_allclose(large, small, atol=2e-6)
    update, state = run(SMALL[name](), [np.ldexp(g / np.abs(g).max(), 127)] * 12)
    assert np.isfinite(update).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert np.linalg.norm(update) > 1


@pytest.mark.matrix
def test_eps_is_absolute_and_zero_makes_the_step_scale_invariant():
    g = normal(12, 8)
    tiny = np.ldexp(g, -100)
    scaled = {eps: run(SMALL["dion"](eps=eps), [tiny])[0] for eps in (0.0, 1e-8)}
    np.testing.assert_allclose(
        scaled[0.0], run(SMALL["dion"](eps=0.0), [g])[0], atol=2e-6
    )
    assert np.abs(scaled[1e-8]).max() < 1e-20
    # Columns of zeros are no division by zero, with and without the floor.
    one = (g * (np.arange(8) == 3)).astype(np.float32)
    for guard in (None, 0.0):
        update, _ = run(
            SMALL["dion"](eps=0.0, noise_guard=guard), [one.astype(np.float32)]
        )
        assert np.isfinite(update).all()


@matrix
def test_half_precision_momentum_saturates():
    g = {"w": np.full((12, 8), 3e4, np.float16)}
    for tx in (scale_by_dion(0.5), scale_by_muon(), scale_by_dion2(0.5)):
        update, state = jax.jit(tx.update), jax.jit(tx.init)(g)
        for _ in range(4):
            updates, state = update(g, state)
        assert np.isfinite(updates["w"]).all()
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
