"""What every optimizer of the package promises, after optax's contract for its own.

It trains two functions in two dtypes, under jit and in a scan; hyper-parameters can be
injected; it works inside optax's wrappers; state keeps its form; complex is refused.
"""

import functools
import inspect
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import optim
from tests.programs import together

OPTIMIZERS = {
    "dion": functools.partial(optim.dion, rank_fraction=0.5),
    "orth-dion": functools.partial(optim.dion, rank_fraction=0.5, right_factor="orth"),
    "dion lion": functools.partial(optim.dion, scalar="lion"),
    "muon": optim.muon,
    "normuon": optim.normuon,
    "dion2": functools.partial(optim.dion2, fraction=0.5),
}
TARGET = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
# Where updates have unit scale, the distance to go sets steps times learning rate.
STEPS = 400


def parabola(params):
    """Distance of a matrix and a bias to a target."""
    return (
        jnp.square(params["kernel"] - TARGET).sum()
        + jnp.square(params["bias"] - 1).sum()
    )


def rosenbrock(params):
    """One valley for each pair of entries of a matrix, and one of the bias."""
    a, b = jnp.split(params["kernel"], 2, axis=1)
    c, d = jnp.split(params["bias"], 2)
    return (jnp.square(1 - a) + 10 * jnp.square(b - jnp.square(a))).mean() + (
        jnp.square(1 - c) + 10 * jnp.square(d - jnp.square(c))
    ).mean()


def start(dtype=jnp.float32):
    """No zeros: from them the valleys' gradients are equal, a matrix of rank one."""
    kernel = np.random.default_rng(1).uniform(-0.5, 0.5, size=(6, 10))
    return {"kernel": kernel.astype(dtype), "bias": np.zeros(10, dtype)}


def train(tx, f, dtype=jnp.float32, steps=STEPS):
    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(f)(params)
        updates, state = tx.update(grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        return (optax.apply_updates(params, updates), state), value

    values = together(
        lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[1], start(dtype)
    )
    return np.asarray(values, np.float32)


PAIRS = list(itertools.product((parabola, rosenbrock), (jnp.float32, jnp.bfloat16)))
# In turn: each pair by one optimizer; the rest of the product is in the matrix.
IN_TURN = dict(zip(("dion", "muon", "normuon", "dion2"), range(len(PAIRS))))
TRAINS = [
    pytest.param(
        name, dtype, f, id=f"{name}-{f.__name__}-{jnp.dtype(dtype)}",
        marks=() if IN_TURN.get(name) == i else pytest.mark.matrix,
    )
    for name in OPTIMIZERS
    for i, (f, dtype) in enumerate(PAIRS)
]  # fmt: skip


def only(*names):
    """All optimizers, of which the default tests see these."""
    return [
        pytest.param(x, marks=() if x in names else pytest.mark.matrix)
        for x in OPTIMIZERS
    ]


@pytest.mark.parametrize("name, dtype, f", TRAINS)
def test_trains(name, dtype, f):
    rate = optax.linear_schedule(0.1, 0.0, STEPS)
    tx = OPTIMIZERS[name](rate, weight_decay=0.0, scalar_learning_rate=rate)
    values = train(tx, f, dtype)
    assert np.isfinite(values).all()
    # Rounding of bfloat16 parameters bounds what can be reached.
    assert values[-1] < values[0] * (2e-2 if dtype == jnp.float32 else 6e-2)


@pytest.mark.programs(40)  # Outside jit, every operation is a program.
@pytest.mark.parametrize("name", only("normuon"))
def test_jit_and_state(name):
    tx = OPTIMIZERS[name](0.1)
    params = jax.tree.map(jnp.asarray, start())
    state = tx.init(params)
    grads = jax.tree.map(jnp.asarray, together(jax.grad(parabola), params))
    updates, after = tx.update(grads, state, params)
    jitted, _ = jax.jit(tx.update)(grads, state, params)
    chex.assert_trees_all_close(updates, jitted, atol=1e-5)
    chex.assert_trees_all_equal_structs(state, after)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(tx.init, params), state
    )


@pytest.mark.parametrize("name", only("dion"))
def test_injected_hyperparams(name):
    maker = OPTIMIZERS[name]
    inner = getattr(maker, "func", maker)
    fixed = dict(getattr(maker, "keywords", {}))
    static = ("rank_fraction", "rank_multiple_of", "fraction")
    known = set(inspect.signature(inner).parameters)
    factory = optax.inject_hyperparams(
        inner, static_args=[k for k in static if k in known]
    )
    params = start()
    grads = together(jax.grad(parabola), params)
    tx = factory(learning_rate=0.1, mu=0.9, **fixed)
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    want = jax.device_get(update(grads, state, params)[0])
    state.hyperparams["learning_rate"] = np.float32(0.2)
    got, _ = update(grads, state, params)
    chex.assert_trees_all_close(got, jax.tree.map(lambda x: 2 * x, want), rtol=1e-5)
    plain = inner(0.1, mu=0.9, **fixed)
    direct = together(lambda g, p: plain.update(g, plain.init(p), p)[0], grads, params)
    chex.assert_trees_all_close(want, direct, atol=1e-6)


@pytest.mark.parametrize("name", only("dion2"))
def test_wrappers(name):
    rate = optax.linear_schedule(0.1, 0.0, STEPS)
    tx = optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[name](rate))
    tx = optax.MultiSteps(optax.apply_if_finite(tx, 3), 2)
    params = start()
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    first = together(jax.grad(parabola), params)
    updates, state = update(first, state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    bad = jax.tree.map(lambda g: g * np.float32(np.nan), first)
    updates, state = update(bad, state, params)  # Skipped, as it is not finite.
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    masked = optax.masked(OPTIMIZERS[name](0.1), {"kernel": True, "bias": False})
    updates, _ = together(
        lambda g, p: masked.update(g, masked.init(p), p), first, params
    )
    chex.assert_trees_all_equal(updates["bias"], first["bias"])
    assert np.abs(updates["kernel"] - first["kernel"]).max() > 0.01


@pytest.mark.parametrize("leaf", ["kernel", "bias"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_complex_is_refused(name, leaf):
    tx, params = OPTIMIZERS[name](0.1), start()
    params[leaf] = params[leaf].astype(np.complex64)
    with pytest.raises(TypeError, match=f"{leaf}: .*real floating-point.*complex64"):
        tx.init(params)
