"""Optimizers and learning-rate schedules by config."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jaxpapers import optim
from jaxpapers.ops.rows import Rows
from jaxpapers.optim import DimensionNumbers, rows
from jaxpapers.optim.config import read, schedule

RNG = np.random.default_rng(0)
PARAMS = {
    "embedding": RNG.normal(size=(5, 4)).astype(np.float32),
    "kernel": RNG.normal(size=(4, 6)).astype(np.float32),
}
GRADS = [
    {k: RNG.normal(size=x.shape).astype(np.float32) for k, x in PARAMS.items()}
    for _ in range(3)
]
NUMBERS = DimensionNumbers()


def config(**fields):
    return ConfigDict({"name": "adam", "lr": 0.1, **fields})


def parameters(tx):
    """After a step on each of ``GRADS``."""

    @jax.jit
    def train(params, gradients):
        state = tx.init(params)
        for grads in gradients:
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return train(PARAMS, GRADS)


def rates(steps=20, **fields):
    """The schedule's learning rate at every step of the run."""
    rate = schedule(read(config(**fields)), steps)
    return np.asarray(jax.jit(jax.vmap(rate))(jnp.arange(steps)))


@pytest.mark.parametrize(
    "fields, tx",
    [
        ({"name": "adam", "clip": 0.5}, lambda: optax.chain(
            optax.clip_by_global_norm(0.5), optax.adam(0.1))),
        ({"name": "adamw", "weight_decay": 0.3, "b2": 0.9},
         lambda: optax.adamw(0.1, b2=0.9, weight_decay=0.3)),
        ({"name": "sgd", "momentum": 0.9, "weight_decay": 0.3, "clip": 1.0},
         lambda: optax.chain(
             optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.3),
             optax.sgd(0.1, momentum=0.9))),
        ({"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.3},
         lambda: optax.chain(
             optax.add_decayed_weights(0.3),
             optax.sgd(0.1, momentum=0.9, nesterov=True))),
        ({"name": "rmsprop", "schedule": "cosine"},
         lambda: optax.rmsprop(optax.cosine_decay_schedule(0.1, 3), decay=0.99)),
        ({"name": "adagrad"}, lambda: optax.adagrad(0.1)),
    ],
    ids=lambda x: x["name"] if isinstance(x, dict) else "",
)  # fmt: skip
def test_equals_optax(fields, tx):
    given = parameters(optim.from_config(config(**fields), steps=3))
    chex.assert_trees_all_equal(given, parameters(tx()))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "name, tx",
    [
        ("dion", lambda **kw: optim.dion(0.1, 0.5, 2, **kw)),
        ("dion2", lambda **kw: optim.dion2(0.1, 0.5, **kw)),
        ("muon", lambda **kw: optim.muon(0.1, **kw)),
        ("normuon", lambda **kw: optim.normuon(0.1, **kw)),
    ],
)
def test_equals_the_matrix_optimizer(name, tx):
    """Every field reaches it: rank, momentum, decay and the scalar optimizer's."""
    c = config(
        name=name, rank_fraction=0.5, rank_multiple_of=2, mu=0.7, weight_decay=0.3,
        scalar="lion", scalar_lr=0.2, b1=0.8, b2=0.9, momentum_dtype="bfloat16",
    )  # fmt: skip
    given = parameters(optim.from_config(c, 3, weight_dimension_numbers=NUMBERS))
    expected = parameters(
        tx(
            mu=0.7, weight_decay=0.3, scalar="lion", scalar_learning_rate=0.2,
            scalar_b1=0.8, scalar_b2=0.9, momentum_dtype=jnp.bfloat16,
            weight_dimension_numbers=NUMBERS,
        )
    )  # fmt: skip
    chex.assert_trees_all_equal(given, expected)


@pytest.mark.matrix
def test_baselines_do_not_decay_embeddings():
    """adamw and optax_muon, given which axes form matrices."""
    for name in ("adamw", "optax_muon"):
        plain, decayed = (
            parameters(
                optim.from_config(
                    config(name=name, weight_decay=decay),
                    3,
                    weight_dimension_numbers=NUMBERS,
                )
            )
            for decay in (0.0, 0.5)
        )
        np.testing.assert_array_equal(plain["embedding"], decayed["embedding"])
        assert np.abs(plain["kernel"] - decayed["kernel"]).max() > 1e-2


def test_schedules():
    trapezoid = rates(schedule="trapezoid", warmup=0.5, cooldown=0.25, lr=1.0)
    expected = [*np.linspace(0.1, 1, 10), *np.ones(5), *np.linspace(1, 0.2, 5)]
    np.testing.assert_allclose(trapezoid, expected, rtol=1e-6)
    np.testing.assert_array_equal(rates(schedule="trapezoid", lr=2.0), 2.0)
    steps = np.arange(20)
    drop = rates(schedule="drop", drop_at=(5, 15), drop_by=0.5, lr=1.0)
    np.testing.assert_array_equal(
        drop, np.select([steps < 5, steps < 15], [1, 0.5], 0.25)
    )
    shares = rates(schedule="drop", milestones=(0.25, 0.75), drop_by=0.5, lr=1.0)
    np.testing.assert_array_equal(shares, drop)
    every = rates(schedule="drop", drop_every=5, drop_by=0.5, lr=1.0)
    np.testing.assert_array_equal(every, 0.5 ** (steps // 5))
    cosine = rates(schedule="cosine", lr=1.0)
    np.testing.assert_allclose(cosine, (1 + np.cos(np.pi * steps / 20)) / 2, atol=1e-6)
    held = rates(schedule="cosine", hold=5, lr=1.0)
    np.testing.assert_array_equal(held[:5], 1)
    np.testing.assert_allclose(
        held[5:], (1 + np.cos(np.pi * steps[:15] / 15)) / 2, atol=1e-6
    )
    rising = rates(schedule="cosine", warmup=0.2, hold=1, lr=1.0)
    np.testing.assert_allclose(rising[:5], [0.25, 0.5, 0.75, 1, 1], atol=1e-6)
    np.testing.assert_allclose(
        rising[5:], (1 + np.cos(np.pi * steps[:15] / 15)) / 2, atol=1e-6
    )
    assert schedule(read(config()), 20) == 0.1


def test_schedules_that_do_not_fit_the_run():
    with pytest.raises(
        ValueError, match=r"leave a step for the cosine, got 20 \+ 0 of 20"
    ):
        rates(schedule="cosine", hold=20)
    with pytest.raises(ValueError, match="the rate drops once at a step"):
        rates(steps=2, schedule="drop", milestones=(0.5, 0.6))


@pytest.mark.parametrize("tables", ["lazy_adam", "row_adagrad", "row_sgd"])
def test_tables_follow_the_schedule(tables):
    """The rows' optimizer is the one named, with the rate of all other parameters."""
    c = config(name="sgd", tables=tables, schedule="drop", drop_at=(1,), clip=1.0)
    tx, table_tx = rows.from_config(c, 3)
    rate = optax.piecewise_constant_schedule(0.1, {1: 0.1})
    expected = parameters(optax.sgd(rate))  # Not clipped: the method does that.
    chex.assert_trees_all_equal(parameters(tx), expected)

    def updates(tx, params, gradients):
        state, outputs = tx.init(params["embedding"]), []
        for grads in gradients:
            update, state = tx.update(Rows(jnp.arange(5), grads["embedding"]), state)
            outputs.append(update.values)
        return outputs

    by_hand = getattr(rows, tables)(rate)
    given, expected = jax.jit(
        lambda *args: (updates(table_tx, *args), updates(by_hand, *args))
    )(PARAMS, GRADS)
    np.testing.assert_array_equal(given, expected)


def test_dense_tables_have_the_optimizer_of_all_others():
    assert rows.from_config(config(tables="dense"), 3)[1] is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "lion"}, "optim.name must be one of .*dion2"),
        ({"schedule": "step"}, "optim.schedule must be one of"),
        ({"lr": 0.0}, "optim.lr must be > 0, got 0.0"),
        ({"lr": float("nan")}, "optim.lr must be > 0"),
        ({"clip": -1.0}, "optim.clip must be >= 0"),
        ({"weight_decay": -1.0}, "optim.weight_decay must be >= 0"),
        ({"warmup": 0.6, "cooldown": 0.5}, "shares of the run and at most 1"),
        ({"schedule": "drop"}, "needs optim.drop_at, optim.milestones or"),
        ({"schedule": "drop", "drop_at": (3,), "drop_every": 2}, "one of them"),
        ({"schedule": "drop", "milestones": (50.0,)}, "shares of the run"),
        ({"hold": 3}, "optim.hold=3 needs optim.schedule=cosine"),
        ({"name": "sgd", "nesterov": True}, "optim.nesterov needs optim.momentum"),
        ({"name": "dion", "mu": -0.5}, "mu must be in"),
        ({"tables": "hash"}, "optim.tables must be one of lazy_adam"),
    ],
)
def test_refuses(fields, message):
    make = rows.from_config if "tables" in fields else optim.from_config
    with pytest.raises(ValueError, match=message):
        make(config(**fields), 3)
