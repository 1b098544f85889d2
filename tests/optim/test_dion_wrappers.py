"""Dion inside optax's wrappers, and the composite optimizer with its routing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers.optim import DimensionNumbers, dion, route, scale_by_dion
from jaxpapers.optim.routing import table
from tests.programs import together

LR = 0.1


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# A tree that a language model might have.
SHAPES = {
    "embedding": {"embedding": (20, 8)},
    "block": {
        "up": {"kernel": (8, 16), "bias": (16,)},
        "down": {"kernel": (16, 8)},
        "norm": {"scale": (8,)},
    },
    "lm_head": {"kernel": (8, 20)},
}
LABELS = {
    "block/down/kernel": "dion",
    "block/norm/scale": "scalar",
    "block/up/bias": "scalar",
    "block/up/kernel": "dion",
    "embedding/embedding": "embedding",
    "lm_head/kernel": "head",
}


def model(seed=0):
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return treedef.unflatten([normal(*s, seed=seed + i) for i, s in enumerate(leaves)])


def matrices(seed=0):
    return {"up": normal(8, 16, seed=seed), "down": normal(16, 8, seed=seed + 1)}


def run(tx, grads, params):
    """Parameters after the steps, each jitted with donated state."""

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for g in grads:
        params, state = step(params, state, g)
    return params, state


def assert_close(got, want, atol=2e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), got, want
    )


@functools.cache
def plain():
    """Matrices after two steps of the hand-made chain, the yardstick of the wrappers."""
    tx = optax.chain(
        scale_by_dion(0.5),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(LR),
    )
    return run(tx, GRADS, matrices(7))[0]


GRADS = [matrices(20), matrices(40)]


def inject(factory, **options):
    static = ("rank_fraction", "rank_multiple_of")
    return optax.inject_hyperparams(factory, static_args=static)(**options)


WRAPPED = {
    "dion": lambda: dion(LR, 0.5),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1e9), dion(LR, 0.5)),
    "masked": lambda: optax.masked(dion(LR, 0.5), {"up": True, "down": True}),
    "partition": lambda: optax.partition(
        {"x": dion(LR, 0.5), "y": dion(LR, 0.5)}, {"up": "x", "down": "y"}
    ),
    "schedule": lambda: dion(optax.constant_schedule(LR), 0.5),
    "inject": lambda: inject(dion, learning_rate=LR, rank_fraction=0.5),
    "inject schedule": lambda: inject(
        dion, learning_rate=lambda count: LR, rank_fraction=0.5
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(dion(LR, 0.5), 3),
    "multi steps": lambda: optax.MultiSteps(dion(LR, 0.5), 1),
}


# The other wrappers have tests of their own below, or chain as these do.
COMMON = ("partition", "inject schedule")


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in COMMON else pytest.mark.matrix) for x in WRAPPED],
)
def test_same_steps_in_every_wrapper(name):
    # Q is drawn from the path, which wrappers must not change.
    assert_close(run(WRAPPED[name](), GRADS, matrices(7))[0], plain())


@pytest.mark.matrix
def test_multi_steps_average_gradients():
    tx = optax.MultiSteps(dion(LR, 0.5), 2)
    parts = [matrices(20 + 3 * i) for i in range(4)]
    means = [
        jax.tree.map(lambda x, y: (x + y) / 2, *pair) for pair in (parts[:2], parts[2:])
    ]
    got, _ = run(tx, parts, matrices(7))
    assert_close(got, run(dion(LR, 0.5), means, matrices(7))[0])


@pytest.mark.matrix
def test_apply_if_finite_skips_nan_gradients():
    tx = optax.apply_if_finite(dion(LR, 0.5), 3)
    nan = jax.tree.map(lambda x: x * np.float32(np.nan), GRADS[0])
    got, state = run(tx, [GRADS[0], nan, GRADS[1]], matrices(7))
    assert_close(got, plain())
    assert int(state.total_notfinite) == 1


@pytest.mark.matrix
def test_scan():
    tx = dion(LR, 0.5)

    def train(params, grads):
        def body(carry, g):
            updates, state = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), grads)[0][0]

    stacked = jax.tree.map(lambda *x: np.stack(x), *GRADS)
    assert_close(together(train, matrices(7), stacked), plain())


@pytest.mark.parametrize(
    "wrap", [lambda tx: tx, lambda tx: optax.apply_if_finite(tx, 3)]
)
@pytest.mark.parametrize("scalar", ["adamw", "lion"])
@pytest.mark.parametrize("params, grads, momentum", [
    (jnp.bfloat16, jnp.float32, None),
    (jnp.float16, jnp.float32, None),
    (jnp.bfloat16, jnp.bfloat16, jnp.float32),
])  # fmt: skip
def test_state_and_updates_keep_their_dtypes(wrap, scalar, params, grads, momentum):
    tx = wrap(dion(LR, momentum_dtype=momentum, scalar=scalar))
    forms = {"embed": (5, 6), "dense": {"kernel": (8, 6), "bias": (6,)}}

    def arrays(dtype):
        shaped = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
        return jax.tree.map(shaped, forms, is_leaf=lambda x: isinstance(x, tuple))

    state = jax.eval_shape(tx.init, arrays(params))
    updates, new = jax.eval_shape(tx.update, arrays(grads), state, arrays(params))
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(
        lambda x: x.dtype, state
    )
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(grads)}


def test_injected_values_are_used_without_a_new_trace():
    names = ("rank_fraction", "rank_multiple_of")
    tx = optax.inject_hyperparams(scale_by_dion, static_args=names)(
        0.5, mu=optax.linear_schedule(1.0, 0.0, 2), noise_guard=0.0
    )
    traces = []

    @jax.jit
    def update(g, state):
        traces.append(1)
        return tx.update(g, state)

    g = {"w": normal(12, 8)}
    state = jax.jit(tx.init)(g)
    assert {"mu", "eps", "noise_guard", "power_iters"} <= set(state.hyperparams)
    for t, mu in enumerate((1.0, 0.5)):
        before = np.asarray(state.inner_state.momentum["w"]) + g["w"]
        _, state = update(g, state)
        assert float(state.hyperparams["mu"]) == mu
        if t == 0:  # mu = 1: nothing decays.
            assert_close(state.inner_state.momentum["w"], before)
    assert not np.allclose(state.inner_state.momentum["w"], before, atol=1e-2)
    state.hyperparams["eps"] = np.float32(1e6)  # Shrinks Q: it is in use.
    _, after = update(g, state)
    assert np.abs(after.inner_state.q["w"]).max() < 1e-4
    assert len(traces) == 1


@pytest.mark.matrix
def test_injected_rank_needs_static_args_only_under_jit():
    tx = optax.inject_hyperparams(scale_by_dion)(0.5)
    g = {"w": jnp.asarray(normal(12, 8))}
    with pytest.raises(ValueError, match="rank_fraction shapes the state.*static_args"):
        jax.jit(tx.init)(g)
    state = tx.init(g)
    plain_tx = scale_by_dion(0.5)

    def both(g, state):
        return tx.update(g, state)[0], plain_tx.update(g, plain_tx.init(g))[0]

    assert_close(*together(both, g, state))


@pytest.mark.matrix
def test_injected_decay_may_start_at_zero():
    tx = inject(
        dion, learning_rate=LR, rank_fraction=0.5, weight_decay=0.0,
        weight_decay_mask={"up": True, "down": False},
    )  # fmt: skip
    params = matrices(7)
    state = jax.jit(tx.init)(params)
    state.hyperparams["weight_decay"] = np.float32(0.5)
    update = jax.jit(tx.update)
    some, after = update(GRADS[0], state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    state.hyperparams["weight_decay"] = np.float32(0.0)
    none, _ = update(GRADS[0], state, params)
    assert_close(some["up"], np.asarray(none["up"]) - LR * 0.5 * params["up"])
    assert_close(some["down"], none["down"])


def test_init_under_eval_shape_and_no_params():
    for tx in (scale_by_dion(0.5), dion(LR, 0.5, weight_decay=0.0)):
        abstract = jax.eval_shape(tx.init, GRADS[0])
        state = together(tx.init, GRADS[0])
        assert jax.tree.map(np.shape, abstract) == jax.tree.map(np.shape, state)
        jax.eval_shape(tx.update, GRADS[0], abstract)


def test_routing():
    rows = table(model(), route(model()))
    assert {path: label for path, _, label in rows} == LABELS
    assert dict((path, shape) for path, shape, _ in rows)["lm_head/kernel"] == (8, 20)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "scalar", [pytest.param("adamw", marks=pytest.mark.matrix), "lion"]
)
def test_composite_one_step(scalar):
    decay = 0.3
    params, g = model(), model(50)
    tx = dion(LR, 0.5, weight_decay=decay, scalar=scalar, scalar_learning_rate=0.01)
    inner = {
        "adamw": optax.scale_by_adam(0.9, 0.95),
        "lion": optax.scale_by_lion(0.9, 0.95),
    }[scalar]
    hidden = scale_by_dion(0.5)
    kernels = {
        "block": {k: {"kernel": g["block"][k]["kernel"]} for k in ("up", "down")}
    }
    updates, direction, matrix = together(
        lambda params, g, kernels: (
            tx.update(g, tx.init(params), params)[0],
            inner.update(g, inner.init(params))[0],
            hidden.update(kernels, hidden.init(kernels))[0],
        ),
        params, g, kernels,
    )  # fmt: skip
    head = 8**-0.5 if scalar == "lion" else 1.0
    for (path, u), d, x in zip(
        jax.tree_util.tree_flatten_with_path(updates)[0],
        jax.tree.leaves(direction),
        jax.tree.leaves(params),
    ):
        names = [k.key for k in path]
        label = LABELS["/".join(names)]
        if label == "dion":
            want = -LR * (matrix["block"][names[1]]["kernel"] + decay * x)
        else:
            rate = 0.01 * (head if label == "head" else 1)
            want = -rate * d - (0.01 * decay * x if label == "scalar" else 0)
        assert_close(u, want, 1e-6)


@pytest.mark.matrix
def test_both_orientations_of_the_scale():
    # sqrt(fan_out / fan_in), below 1 as well (optax's Muon cuts it off at 1).
    g = GRADS[0]
    tx = dion(1.0, 0.5, weight_decay=0)
    updates, _ = together(lambda g: tx.update(g, tx.init(g)), g)
    for name, factor in (("up", np.sqrt(2)), ("down", np.sqrt(0.5))):
        norm = np.linalg.norm(updates[name])
        np.testing.assert_allclose(norm, factor * np.sqrt(4), rtol=1e-5)


@pytest.mark.matrix
def test_labels_replace_the_routing():
    labels = {"up": "scalar", "down": "dion"}
    for given in (labels, lambda params: labels):
        tx = dion(LR, 0.5, weight_decay=0.0, labels=given)
        updates, _ = together(lambda g, tx=tx: tx.update(g, tx.init(g)), GRADS[0])
        # Adam's first step is +-lr.
        np.testing.assert_allclose(np.abs(updates["up"]), LR, rtol=1e-4)
        assert np.abs(updates["down"]).std() > 1e-3


@pytest.mark.matrix
def test_weight_decay_mask():
    tx = dion(LR, 0.5, weight_decay=0.5, weight_decay_mask={"up": True, "down": False})
    zeros, params = jax.tree.map(np.zeros_like, GRADS[0]), matrices(7)
    updates, _ = together(lambda g, p: tx.update(g, tx.init(p), p), zeros, params)
    assert_close(updates, {"up": -LR * 0.5 * params["up"], "down": zeros["down"]})


def test_three_axes_warn_without_dimension_numbers():
    shapes = {"kernel": (3, 8, 16), "bias": (3, 1, 16)}
    params = {"layers": {k: np.ones(s, np.float32) for k, s in shapes.items()}}
    with pytest.warns(
        UserWarning, match="1 parameter.*'layers/kernel' first.*weight_d"
    ):
        assert route(params)["layers"]["kernel"] == "scalar"
    numbers = {"layers": {"kernel": DimensionNumbers(1, 2), "bias": None}}
    assert route(params, numbers)["layers"] == {"kernel": "dion", "bias": "scalar"}
    tx = dion(LR, 0.5, weight_dimension_numbers=numbers, weight_decay=0.0)
    updates, _ = jax.eval_shape(lambda g: tx.update(g, tx.init(g)), params)
    assert jax.tree.map(np.shape, updates) == jax.tree.map(np.shape, params)
