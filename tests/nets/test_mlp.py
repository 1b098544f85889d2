"""MLPs and Dice: recorded numbers, closed forms, padding, and what they refuse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.nets import mlp
from jaxpapers.nets.mlp import DiceState, dice
from tests.clicks import device
from tests.programs import KEY, params_like, together


@pytest.mark.parity("ctr", only=lambda entry: "running_mean" in entry["arrays"])
@pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.matrix)]
)
def test_recorded_dice(case, dtype):
    # Decay and correction of the entry's conventions.
    options = {"decay": 0.9, "eps": 1e-8, "correction": 1}
    with jax.enable_x64(dtype == "float64"):
        x, alpha = (case.arrays[n].astype(dtype) for n in ("x", "alpha"))
        weight = ((np.arange(x.size) + 1) / x.size).reshape(x.shape).astype(dtype)
        start = DiceState(jnp.zeros_like(alpha), jnp.ones_like(alpha))

        def run(x, alpha):
            def value(x, alpha):
                y, state = dice(x, alpha, start, train=True, **options)
                return (y * weight).sum(), (y, state)

            grads, (y, state) = jax.grad(value, (0, 1), has_aux=True)(x, alpha)
            evaluated, same = dice(x, alpha, state, train=False, **options)
            return {
                "y_train": y, "grad_x": grads[0], "grad_alpha": grads[1],
                "running_mean": state.mean, "running_var_unbiased": state.var,
                "y_eval": evaluated,
            }, (state, same)  # fmt: skip

        found, (state, same) = together(run, x, alpha)
    for name, value in found.items():
        np.testing.assert_allclose(
            value, case.arrays[name], rtol=0, atol=case.tolerance(dtype), err_msg=name
        )
    chex.assert_trees_all_equal(same, state)


def test_closed_forms_of_dice():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    moments = (
        DiceState(np.zeros(3, "f"), np.full(3, 4, "f")),
        DiceState(np.zeros(3, "f"), np.zeros(3, "f")),
    )

    def run(x):
        state, sharp = device(moments)
        return (
            dice(x, jnp.ones(3), state, train=True)[0],
            dice(x, jnp.zeros(3), state, train=False)[0],
            dice(x, jnp.full(3, 0.1), sharp, train=False, eps=1e-12)[0],
        )

    identity, gate, leaky = together(run, x)
    np.testing.assert_allclose(identity, x, rtol=1e-6)
    np.testing.assert_allclose(gate, x / (1 + np.exp(-x / 2)), rtol=1e-5)
    np.testing.assert_allclose(leaky, np.where(x > 0, x, 0.1 * x), rtol=1e-5)


def test_padding_is_in_no_statistic():
    x = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    mask = np.arange(6)[None] < np.array([2, 6, 0, 3])[:, None]
    start = DiceState(np.zeros(3, "f"), np.ones(3, "f"))

    def run(x, few, start, mask):
        alpha = jnp.zeros(3)
        padded = jnp.where(mask[..., None], x, 1e3)
        return (
            dice(padded, alpha, start, train=True, mask=mask),
            dice(few, alpha, start, train=True),
            dice(x, alpha, start, train=True, mask=mask & False)[1],
        )

    (y, moved), (few, expected), kept = together(run, x, x[mask], start, mask)
    np.testing.assert_allclose(y[mask], few, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(moved, expected, rtol=1e-4)
    chex.assert_trees_all_equal(kept, start)


def test_statistics_over_a_named_axis_are_those_of_the_whole_batch():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    start = DiceState(np.zeros(3, "f"), np.ones(3, "f"))

    def run(x, start):
        alpha = jnp.zeros(3)

        def part(x):
            return dice(x, alpha, start, train=True, axis_name="i")

        parts = jax.vmap(part, axis_name="i")(x.reshape(4, 2, 3))
        return dice(x, alpha, start, train=True), parts

    (expected, after), (y, moved) = together(run, x, start)
    np.testing.assert_allclose(y.reshape(8, 3), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[2], moved), after, rtol=1e-5)


def test_layers_are_their_product_sums():
    """Against NumPy; from the second layer on with ``start``."""
    params = params_like(lambda key: mlp.init(key, (4, 5, 3), "leaky_relu"), KEY)
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)

    def run(params, x):
        options = {"activation": "leaky_relu", "train": True}
        (hidden, whole), _ = mlp.layers(params, {}, x, **options)
        return hidden, whole, mlp.apply(params, {}, hidden, start=1, **options)[0]

    hidden, whole, rest = together(run, params, x)
    first, last = params["layer_0"], params["layer_1"]
    expected = x @ first["kernel"] + first["bias"]
    expected = np.where(expected > 0, expected, 0.01 * expected)
    np.testing.assert_allclose(hidden, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rest, whole)
    expected = expected @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)


def test_errors(key):
    with pytest.raises(ValueError, match="activation must be one of .*'dice'"):
        mlp.init(key, (2, 1), "tanh")
    with pytest.raises(ValueError, match="input and output size"):
        mlp.init(key, (2,))
