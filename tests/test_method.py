"""``gradient``: accumulation, keys, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxpapers.method import gradient, param_spec
from tests.programs import together


def loss(params, batch, key):
    del key
    error = jnp.square(batch["x"] @ params["w"] - batch["y"])
    if "weight" not in batch:
        return error.mean(), {"worst": error.mean()}
    weight = batch["weight"].sum()
    value = (error * batch["weight"]).sum() / weight
    return value, {"weight": weight, "worst": 2 * value}


def init_params(key, batch):
    return {"w": jax.random.normal(key, batch["x"].shape[1:])}


def method(accumulate=1, loss=loss):
    return gradient(init_params, loss, optax.sgd(0.1), accumulate=accumulate)


def batch(weighted, size=8):
    rng = np.random.default_rng(3)
    values = {
        "x": rng.normal(size=(size, 5)).astype(np.float32),
        "y": rng.normal(size=size).astype(np.float32),
    }
    if weighted:  # Cut in 8, the first part weighs 0.
        values["weight"] = np.arange(size, dtype=np.float32)
    return values


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_is_the_whole_batch(key, weighted):
    values = batch(weighted)

    def steps(key, values):
        state = method().init(key, values)
        updates = [method(n).update(state, values) for n in (1, 2, 4, 8)]
        return state.params, [(new.params, metrics) for new, metrics in updates]

    start, ((whole, expected), *others) = together(steps, key, values)
    assert not np.allclose(whole["w"], start["w"])
    for params, metrics in others:
        np.testing.assert_allclose(params["w"], whole["w"], 1e-6, 1e-7)
        assert metrics.keys() == expected.keys()
        for name in metrics:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
    if weighted:  # A plain mean over micro-batches would be another number.
        error = np.square(values["x"] @ start["w"] - values["y"])
        halves = [
            np.average(error[i::2], weights=values["weight"][i::2]) for i in (0, 1)
        ]
        assert abs(np.mean(halves) - expected["loss"]) > 1e-3


def test_errors(key):
    with pytest.raises(ValueError, match="accumulate must be >= 1, got 0"):
        method(0)
    values = batch(False)
    state = jax.eval_shape(method().init, key, values)
    with pytest.raises(ValueError, match="=3 does not divide the batch of 8.*: 9"):
        jax.eval_shape(method(3).update, state, values)
    with pytest.raises(ValueError, match="=32 does not divide the batch of 8.*: 32"):
        jax.eval_shape(method(32).update, state, values)


def test_every_step_and_micro_batch_has_a_key_of_its_own(key):
    def noise(params, batch, key):
        return params["w"].sum() + jax.random.normal(key), {}

    def run(key, values):
        steps = []
        first = state = method(loss=noise).init(key, values)
        for _ in range(3):
            old = state
            state, metrics = method(loss=noise).update(old, values)
            total = old.params["w"].sum()
            draw = jax.random.normal(jax.random.fold_in(first.key, old.step))
            steps.append((metrics["loss"], total + draw, state.step))
        draws = method(2, lambda p, b, k: (p["w"].sum(), {"u": jax.random.uniform(k)}))
        _, metrics = draws.update(state, values)
        step_key = jax.random.fold_in(first.key, 3)
        seen = [jax.random.uniform(jax.random.fold_in(step_key, i)) for i in range(2)]
        keys = [jax.random.key_data(k) for k in (key, first.key, state.key)]
        again = method(loss=noise).init(key, values).params
        return steps, (metrics["u"], seen), keys, (first.params, again)

    steps, (u, seen), keys, (params, again) = together(run, key, batch(False))
    for i, (loss, expected, step) in enumerate(steps):
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        assert step == i + 1
    np.testing.assert_allclose(u, np.mean(seen), rtol=1e-6)
    assert seen[0] != seen[1]
    # The state keeps its key, which is not the one that drew the parameters.
    np.testing.assert_array_equal(keys[1], keys[2])
    assert (keys[0] != keys[1]).any()
    np.testing.assert_array_equal(params["w"], again["w"])


def test_param_spec():
    rules = [("q/", lambda *a: P("bad")), ("kernel", P("data")), ("k", P("model"))]
    assert param_spec(rules, "a/q/kernel") == P("data")
    assert param_spec(rules, "a/k") == P("model")
    assert param_spec(rules, "a/bias") == P()
