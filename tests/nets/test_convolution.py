"""Convolutions' normalisations against NumPy, starts and refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.nets import convolution
from tests.programs import together


def test_batch_norm_is_masked_and_moves():
    x = np.random.default_rng(0).normal(size=(4, 3, 3, 2)).astype(np.float32) * 2 + 1
    params = {"scale": np.array([1.0, 2.0], "f"), "bias": np.array([0.0, 1.0], "f")}
    start = convolution.Moments(np.zeros(2, "f"), np.ones(2, "f"))
    mask = np.array([True, True, True, False])
    spoiled = x.copy()
    spoiled[3] = 1e6

    def run(x, spoiled, params, start, mask):
        y, moved = convolution.batch_norm(params, start, spoiled, train=True, mask=mask)
        return y, moved, convolution.batch_norm(params, moved, x, train=False)

    y, moved, (evaluated, kept) = together(run, x, spoiled, params, start, mask)
    part = x[:3].astype(np.float64)
    mean, var = part.mean((0, 1, 2)), part.var((0, 1, 2))
    expected = (part - mean) / np.sqrt(var + 1e-5) * [1, 2] + [0, 1]
    np.testing.assert_allclose(y[:3], expected, atol=1e-5)
    np.testing.assert_allclose(moved.mean, 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(moved.var, 0.9 + 0.1 * var * 27 / 26, rtol=1e-5)
    chex.assert_trees_all_equal(kept, moved)
    expected = (x - moved.mean) / np.sqrt(moved.var + 1e-5) * [1, 2] + [0, 1]
    np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=1e-5)


def test_group_norm_is_per_image_and_group():
    x = np.random.default_rng(0).normal(size=(3, 4, 2, 6)).astype(np.float32) * 3 - 1
    params = {"scale": np.arange(1, 7, dtype="f"), "bias": np.full(6, 0.5, "f")}
    y = together(lambda p, x: convolution.group_norm(p, x, 3), params, x)
    groups = x.astype(np.float64).reshape(3, 8, 3, 2)
    mean, var = (f(groups, (1, 3), keepdims=True) for f in (np.mean, np.var))
    expected = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    np.testing.assert_allclose(y, expected * params["scale"] + 0.5, atol=1e-5)
    with pytest.raises(ValueError, match="4 groups do not divide 6 channels"):
        convolution.group_norm(params, jnp.asarray(x), 4)


def test_scales_start_at_ones_or_are_drawn():
    def start(key):
        fixed, drawn = convolution.init_norm(3), convolution.init_norm(3, key)
        return fixed, drawn, convolution.init_moments(drawn)

    fixed, drawn, moments = together(start, jax.random.key(0))
    np.testing.assert_array_equal(fixed["scale"], 1)
    assert (drawn["scale"] < 1).all() and len(set(drawn["scale"])) == 3
    assert not fixed["bias"].any() and not drawn["bias"].any()
    assert (moments.mean == 0).all() and (moments.var == 1).all()
