"""Convolutions: the same numbers and gradients as XLA's, in and out of loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

from jaxpapers.ops import convolution
from tests.programs import KEY, params_like, together

CASES = [
    (3, 1, "SAME", 7), (3, 2, "SAME", 8), (3, 2, "SAME", 7), (4, 2, ((1, 1), (1, 1)), 8),
    (4, 2, ((1, 1), (1, 1)), 7), (4, 1, "VALID", 5), (1, 1, "SAME", 4),
    (3, 2, "VALID", 8), (3, 1, ((2, 0), (0, 1)), 5),
]  # fmt: skip


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def pulled_back(f, dy, *args):
    """f and its vector-Jacobian product with dy."""
    y, back = jax.vjp(f, *args)
    return y, back(dy)


@pytest.mark.parametrize("size, stride, padding, side", CASES)
def test_gradients_are_those_of_xla(size, stride, padding, side, float64):
    def of(convolve):
        return lambda x, kernel: convolve(
            x, kernel, (stride, stride), padding, dimension_numbers=convolution.LAYOUT
        )

    ours, theirs = of(convolution.conv_general_dilated), of(lax.conv_general_dilated)
    x = draw(2, side, side + 1, 3, dtype=np.float64)
    kernel = draw(size, size, 3, 4, seed=1, dtype=np.float64)
    shape = jax.eval_shape(theirs, x, kernel).shape
    dy = draw(*shape, seed=2, dtype=np.float64)
    found, expected = together(
        lambda *args: [pulled_back(f, *args) for f in (ours, theirs)], dy, x, kernel
    )
    np.testing.assert_array_equal(found[0], expected[0])
    for a, b in zip(found[1], expected[1]):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_a_flax_layer_takes_it():
    x = draw(2, 6, 6, 3)
    layers = [
        nn.Conv(4, (3, 3), strides=2, **extra)
        for extra in (
            {},
            {"conv_general_dilated": convolution.conv_general_dilated},
        )
    ]

    def loss(params, layer, x):
        return jnp.square(layer.apply(params, x)).sum()

    plain, ours = together(
        lambda params, x: [jax.grad(loss)(params, layer, x) for layer in layers],
        params_like(layers[0].init, KEY, x),
        x,
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(ours)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_doubled_images_need_not_be_made(float64):
    x = draw(2, 3, 5, 4, dtype=np.float64)
    plain, ours = (
        nn.Conv(6, (3, 3), param_dtype=jnp.float64, **extra)
        for extra in ({}, {"conv_general_dilated": convolution.conv_of_doubled})
    )

    def doubled(params, x):
        return plain.apply(params, jnp.repeat(jnp.repeat(x, 2, 1), 2, 2))

    dy = draw(2, 6, 10, 6, seed=1, dtype=np.float64)
    found, expected = together(
        lambda *args: [pulled_back(f, *args) for f in (ours.apply, doubled)],
        dy, params_like(ours.init, KEY, x), x,
    )  # fmt: skip
    assert found[0].shape == dy.shape
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"strides": 2}, {"kernel_dilation": 2}, {"padding": "VALID"}, {"size": (5, 5)},
     {"feature_group_count": 2}],
    ids=str,
)  # fmt: skip
def test_only_plain_convolutions_of_doubled_images(options):
    size = options.pop("size", (3, 3))
    layer = nn.Conv(
        4, size, conv_general_dilated=convolution.conv_of_doubled, **options
    )
    with pytest.raises(ValueError, match="conv_of_doubled is a 3 x 3"):
        jax.eval_shape(layer.init, KEY, np.ones((1, 4, 4, 2), np.float32))


@pytest.mark.parametrize("count", [5, 6])
def test_kernel_gradients_are_sums_over_images(count):
    """In a loop over pairs on one device; at once where rows lie on several."""
    x, kernel = draw(count, 6, 5, 3), draw(3, 3, 3, 4, seed=1)
    weight = draw(count, 6, 5, 4, seed=2)

    def ours(x, kernel):
        return convolution.convolve(x, kernel, 1, ((1, 1), (1, 1)))

    def theirs(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=convolution.LAYOUT
        )

    def grad(convolve):
        def value(kernel, x):
            return (weight * convolve(x, kernel)).sum()

        return jax.jit(jax.grad(value))

    lowered = grad(ours).lower(kernel, x)
    assert "stablehlo.while" in lowered.as_text()
    expected = grad(theirs)(kernel, x)
    found = lowered.compile()(kernel, x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), (AxisType.Auto,))):
        several = grad(ours).lower(kernel, x)
        assert "stablehlo.while" not in several.as_text()
        found = several.compile()(kernel, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_half_precision_sums_in_single():
    x = np.ones((8, 16, 16, 1), jnp.bfloat16)
    kernel = np.ones((1, 1, 1, 1), jnp.bfloat16)
    pads = ((0, 0), (0, 0))

    def total(kernel, x):
        return convolution.convolve(x, kernel, 1, pads).sum()

    grad = together(jax.grad(total), kernel, x)
    # bfloat16 alone stops counting at 256.
    assert grad.dtype == jnp.bfloat16 and float(grad[0, 0, 0, 0]) == 2048


def test_other_convolutions_are_left_to_xla():
    def f(x, kernel):
        return convolution.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=convolution.LAYOUT,
            feature_group_count=2,
        )  # fmt: skip

    ones = np.ones((1, 5, 5, 4), np.float32), np.ones((3, 3, 2, 4), np.float32)
    found = together(f, *ones)
    assert found.shape == (1, 5, 5, 4) and float(found[0, 2, 2, 0]) == 18
