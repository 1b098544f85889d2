"""``gradient``: accumulation, keys, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxpapers.method import gradient, param_spec


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
    keys = jax.random.split(jax.random.key(3), 3)
    values = {
        "x": jax.random.normal(keys[0], (size, 5)),
        "y": jax.random.normal(keys[1], (size,)),
    }
    if weighted:
        values["weight"] = jnp.arange(
            size, dtype=jnp.float32
        )  # Cut in 8, one part weighs 0.
    return values


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_is_the_whole_batch(key, weighted, accumulate):
    values = batch(weighted)
    state = method().init(key, values)
    whole, expected = jax.jit(method().update)(state, values)
    parts, metrics = jax.jit(method(accumulate).update)(state, values)
    np.testing.assert_allclose(parts.params["w"], whole.params["w"], 1e-6, 1e-7)
    assert metrics.keys() == expected.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
    assert not np.allclose(whole.params["w"], state.params["w"])
    if weighted:  # A plain mean over micro-batches would be another number.
        plain = [loss(state.params, jax.tree.map(lambda x, i=i: x[i::2], values), key)
                 for i in range(2)]  # fmt: skip
        assert abs(np.mean([v for v, _ in plain]) - expected["loss"]) > 1e-3


def test_errors(key):
    with pytest.raises(ValueError, match="accumulate must be >= 1, got 0"):
        method(0)
    values = batch(False)
    state = method().init(key, values)
    with pytest.raises(ValueError, match="=3 does not divide the batch of 8.*: 9"):
        method(3).update(state, values)
    with pytest.raises(ValueError, match="=32 does not divide the batch of 8.*: 32"):
        method(32).update(state, values)


def test_the_key_of_a_step(key):
    def noise(params, batch, key):
        return params["w"].sum() + jax.random.normal(key), {}

    values = batch(False)
    state = method(loss=noise).init(key, values)
    for step in range(3):
        total = state.params["w"].sum()
        draw = jax.random.normal(jax.random.fold_in(state.key, step))
        new, metrics = method(loss=noise).update(state, values)
        np.testing.assert_allclose(metrics["loss"], total + draw, rtol=1e-6)
        assert jnp.array_equal(
            jax.random.key_data(new.key), jax.random.key_data(state.key)
        )
        assert int(new.step) == step + 1
        state = new
    # Micro-batches draw differently from each other.
    seen = []
    draws = method(2, lambda p, b, k: (p["w"].sum(), {"u": jax.random.uniform(k)}))
    _, metrics = draws.update(state, values)
    step_key = jax.random.fold_in(state.key, 3)
    seen = [jax.random.uniform(jax.random.fold_in(step_key, i)) for i in range(2)]
    np.testing.assert_allclose(metrics["u"], np.mean(seen), rtol=1e-6)


def test_parameters_and_steps_have_keys_of_their_own(key):
    state = method().init(key, batch(False))
    again = method().init(key, batch(False))
    np.testing.assert_array_equal(state.params["w"], again.params["w"])
    assert (jax.random.key_data(state.key) != jax.random.key_data(key)).any()


def test_param_spec():
    rules = [("q/", lambda *a: P("bad")), ("kernel", P("data")), ("k", P("model"))]
    assert param_spec(rules, "a/q/kernel") == P("data")
    assert param_spec(rules, "a/k") == P("model")
    assert param_spec(rules, "a/bias") == P()
