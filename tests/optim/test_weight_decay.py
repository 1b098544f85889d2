"""Cautious weight decay: the paper's formula, in every optimizer, wherever leaves lie."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpapers import hlo, optim
from jaxpapers.optim.paths import named_leaves
from tests.programs import together

LR, DECAY = 0.1, 0.3
OPTIMIZERS = {
    "dion": functools.partial(optim.dion, LR, 0.5),
    "lion": functools.partial(optim.dion, LR, 0.5, scalar="lion"),
    "muon": functools.partial(optim.muon, LR),
    "normuon": functools.partial(optim.normuon, LR),
    "dion2": functools.partial(optim.dion2, LR, 0.5),
}
SHAPES = {"up": {"kernel": (8, 16), "bias": (16,)}, "embed": (20, 8)}


def tree(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: rng.normal(size=s).astype(dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def two_steps(tx):
    """Parameters before and updates of two steps."""

    def train(params, gradients):
        state, out = tx.init(params), []
        for g in gradients:
            updates, state = tx.update(g, state, params)
            out.append((params, updates))
            params = optax.apply_updates(params, updates)
        return out

    return together(train, tree(0), [tree(1), tree(2)])


def close(got, want, atol=1e-12):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=atol), got, want
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x in ("dion", "dion2") else pytest.mark.matrix)
        for x in OPTIMIZERS
    ],
)
def test_is_the_papers_formula(name, float64):
    """From the updates without decay; the second step's parameters have decayed once."""
    make = OPTIMIZERS[name]
    cautious = make(weight_decay=DECAY, cautious_weight_decay=True)
    without = make(weight_decay=0.0)
    (x0, first), (x1, second) = two_steps(cautious)

    def again(params, gradients):
        state, out = without.init(params), []
        for g in gradients:
            updates, state = without.update(g, state, params)
            out.append(updates)
        return out

    directions = together(again, tree(0), [tree(1), tree(2)])
    for x, got, update in zip((x0, x1), (first, second), directions):
        # U = -update / LR.
        agree = jax.tree.map(lambda u, x: -u * x >= 0, update, x)
        agree["embed"][:] = False  # Never decays.
        shares = {path: a.mean() for path, a in named_leaves(agree)[0]}
        assert 0.2 < shares["up/kernel"] < 0.8 and 0 < shares["up/bias"] < 1
        want = jax.tree.map(
            lambda u, a, x: u - LR * DECAY * np.where(a, x, 0), update, agree, x
        )
        close(got, want)


def test_signs_of_small_numbers_are_compared():
    """Their product underflows to zero, which would decay."""
    tx = optim.add_cautious_weight_decay(0.5)
    u = np.array([1e-30, -1e-30, 0.0, 1.0, -1.0, np.nan], np.float32)
    x = np.array([1e-30, 1e-30, 2.0, 0.0, -2.0, 2.0], np.float32)
    got = together(lambda u, x: tx.update(u, tx.init(x), x)[0], u, x)
    want = u + np.float32(0.5) * x * [1, 0, 1, 1, 1, np.nan]
    np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize(
    "kind", ["Auto", pytest.param("Explicit", marks=pytest.mark.matrix)]
)
def test_sends_nothing(kind, make_mesh):
    mesh = make_mesh((4, 2), kind)
    where = NamedSharding(mesh, P("data", "model"))
    rng = np.random.default_rng(0)
    u, x = (rng.normal(size=(8, 16)).astype(np.float32) for _ in range(2))
    tx = optim.add_cautious_weight_decay(DECAY)

    def update(u, x):
        return tx.update({"w": u}, tx.init(x), {"w": x})[0]["w"]

    with jax.set_mesh(mesh):
        compiled = jax.jit(update).lower(*jax.device_put((u, x), where)).compile()
        got = compiled(*jax.device_put((u, x), where))
    assert hlo.collectives(compiled.as_text(), mesh) == []
    assert got.sharding.is_equivalent_to(where, 2)
    np.testing.assert_allclose(got, u + DECAY * x * (u * x > 0), rtol=1e-6)


def test_masks_boxes_and_injected_decay():
    """The state is that of plain decay, so that one may be changed for the other."""
    factory = optax.inject_hyperparams(
        optim.dion, static_args=("rank_fraction", "rank_multiple_of")
    )
    options = {
        "learning_rate": LR,
        "rank_fraction": 0.5,
        "weight_decay": 0.0,
        "weight_decay_mask": {"up": {"kernel": True, "bias": False}, "embed": True},
    }
    tx = factory(**options, cautious_weight_decay=True)
    plain = factory(**options)

    def boxed(tree):
        names = (None, "model")
        return jax.tree.map(
            lambda x: nn.Partitioned(x, names) if np.ndim(x) == 2 else x, tree
        )

    def update(params, g, decay):
        state, other = tx.init(params), plain.init(params)
        assert jax.tree.structure(state.inner_state) == jax.tree.structure(
            other.inner_state
        )
        state.hyperparams["weight_decay"] = decay
        return tx.update(g, state, params)[0]

    params, g = boxed(tree(0, np.float32)), boxed(tree(1, np.float32))
    some, none = together(
        lambda *args: [update(*args, decay) for decay in (DECAY, 0.0)], params, g
    )
    x, got, u = (t["up"]["kernel"].value for t in (params, some, none))
    np.testing.assert_allclose(got, u - LR * DECAY * x * (u * x <= 0), atol=1e-6)
    close(some["up"]["bias"], none["up"]["bias"], 0)
    close(some["embed"].value, none["embed"].value, 0)


CONFIGS = [
    pytest.param(n, marks=() if n == "adamw" else pytest.mark.matrix)
    for n in ("adamw", "dion", "dion2", "muon", "normuon")
]


@pytest.mark.parametrize("name", CONFIGS)
def test_from_config(name):
    config = {"name": name, "lr": LR, "weight_decay": DECAY}
    make = functools.partial(
        optim.from_config, steps=2, weight_dimension_numbers=optim.DimensionNumbers()
    )
    plain, cautious, zero = (
        make(config | more)
        for more in ({}, {"cautious_weight_decay": True}, {"weight_decay": 0.0})
    )

    def first(params, g):
        states = [tx.init(params) for tx in (plain, cautious, zero)]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
        txs = (plain, cautious, zero)
        return [tx.update(g, s, params)[0] for tx, s in zip(txs, states)]

    params = tree(0, np.float32)
    decayed, got, u = together(first, params, tree(1, np.float32))
    for name, leaf in params["up"].items():
        agree = u["up"][name] * leaf <= 0
        want = np.where(agree, decayed["up"][name], u["up"][name])
        np.testing.assert_allclose(got["up"][name], want, atol=1e-6)
    close(got["embed"], u["embed"], 0)


def test_refuses():
    with pytest.raises(TypeError, match="cautious_weight_decay"):
        optim.dion(LR, cautious_weight_decay=0.5)
    with pytest.raises(ValueError, match="weight_decay must be in"):
        optim.add_cautious_weight_decay(-1.0)
    tx = optim.add_cautious_weight_decay(0.1)
    with pytest.raises(ValueError, match="compares updates with parameters"):
        tx.update({"w": np.ones(2)}, tx.init({"w": np.ones(2)}))
    with pytest.raises(ValueError, match="cautious_weight_decay needs an optim.name"):
        optim.from_config({"name": "sgd", "lr": 0.1, "cautious_weight_decay": True}, 3)
