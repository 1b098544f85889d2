"""Convolutions: the same numbers and gradients as XLA's, in and out of loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

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


def test_doubled_pictures_need_not_be_made():
    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (2, 3, 5, 4), jnp.float64)
        layers = [
            nn.Conv(6, (3, 3), param_dtype=jnp.float64, **extra)
            for extra in ({}, {"conv_general_dilated": convolution.conv_of_doubled})
        ]
        params = layers[1].init(keys[1], x)

        def plain(params, x):
            return layers[0].apply(params, jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))

        expected, usual = jax.vjp(plain, params, x)
        found, back = jax.vjp(layers[1].apply, params, x)
        assert found.shape == (2, 6, 10, 6)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        dy = jax.random.normal(keys[2], expected.shape, jnp.float64)
        for a, b in zip(jax.tree.leaves(back(dy)), jax.tree.leaves(usual(dy))):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"strides": 2}, {"kernel_dilation": 2}, {"padding": "VALID"}, {"size": (5, 5)},
     {"feature_group_count": 2}],
    ids=str,
)  # fmt: skip
def test_only_plain_convolutions_of_doubled_pictures(options):
    size = options.pop("size", (3, 3))
    layer = nn.Conv(
        4, size, conv_general_dilated=convolution.conv_of_doubled, **options
    )
    with pytest.raises(ValueError, match="conv_of_doubled is a 3 x 3"):
        layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))


@pytest.mark.parametrize("count", [5, 6])
def test_kernel_gradients_are_sums_over_pictures(count):
    """In a loop over pairs on one device; at once where rows lie on several."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (count, 6, 5, 3))
    kernel = jax.random.normal(keys[1], (3, 3, 3, 4))
    weight = jax.random.normal(keys[2], (count, 6, 5, 4))

    def grad(x):
        def value(kernel):
            y = convolution.convolve(x, kernel, 1, ((1, 1), (1, 1)))
            return (weight * y).sum()

        return jax.grad(value)(kernel)

    lowered = jax.jit(grad).lower(x)
    assert "stablehlo.while" in lowered.as_text()
    expected = jax.grad(
        lambda k: (weight * lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=convolution.LAYOUT)).sum()
    )(kernel)  # fmt: skip
    np.testing.assert_allclose(lowered.compile()(x), expected, rtol=1e-5, atol=1e-4)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (AxisType.Auto,))):
        several = jax.jit(grad).lower(x)
        assert "stablehlo.while" not in several.as_text()
        np.testing.assert_allclose(several.compile()(x), expected, rtol=1e-5, atol=1e-4)


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
