"""Convolutions: the same numbers and gradients as XLA's, in and out of loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpapers.ops import convolution

CASES = [
    (3, 1, "SAME", 7), (3, 2, "SAME", 8), (3, 2, "SAME", 7), (4, 2, ((1, 1), (1, 1)), 8),
    (4, 2, ((1, 1), (1, 1)), 7), (4, 1, "VALID", 5), (1, 1, "SAME", 4),
    (3, 2, "VALID", 8), (3, 1, ((2, 0), (0, 1)), 5),
]  # fmt: skip


@pytest.mark.parametrize("size, stride, padding, side", CASES)
def test_gradients_are_those_of_xla(size, stride, padding, side):
    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (2, side, side + 1, 3), jnp.float64)
        kernel = jax.random.normal(keys[1], (size, size, 3, 4), jnp.float64)

        def ours(x, kernel):
            return convolution.conv_general_dilated(
                x, kernel, (stride, stride), padding,
                dimension_numbers=convolution.LAYOUT,
            )  # fmt: skip

        def theirs(x, kernel):
            return lax.conv_general_dilated(
                x, kernel, (stride, stride), padding,
                dimension_numbers=convolution.LAYOUT,
            )  # fmt: skip

        found, back = jax.vjp(ours, x, kernel)
        expected, usual = jax.vjp(theirs, x, kernel)
        np.testing.assert_array_equal(found, expected)
        dy = jax.random.normal(keys[2], expected.shape, jnp.float64)
        for a, b in zip(back(dy), usual(dy)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_flax_layer_takes_it():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    layers = [
        nn.Conv(4, (3, 3), strides=2, **extra)
        for extra in (
            {},
            {"conv_general_dilated": convolution.conv_general_dilated},
        )
    ]
    params = layers[0].init(jax.random.key(1), x)

    def loss(params, layer):
        return jnp.square(layer.apply(params, x)).sum()

    plain, ours = (jax.grad(loss)(params, layer) for layer in layers)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(ours)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_half_precision_sums_in_single():
    x = jnp.ones((8, 16, 16, 1), jnp.bfloat16)
    kernel = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    pads = ((0, 0), (0, 0))
    grad = jax.grad(lambda k: convolution.convolve(x, k, 1, pads).sum())(kernel)
    # bfloat16 alone stops counting at 256.
    assert grad.dtype == jnp.bfloat16 and float(grad[0, 0, 0, 0]) == 2048


def test_other_convolutions_are_left_to_xla():
    x, kernel = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, 2, 4))
    found = convolution.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=convolution.LAYOUT,
        feature_group_count=2,
    )  # fmt: skip
    assert found.shape == (1, 5, 5, 4) and float(found[0, 2, 2, 0]) == 18
