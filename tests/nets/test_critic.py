"""Critics against NumPy; what normalised and clipped kernels can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpapers.nets.critic import (
    Classifier,
    ConvCritic,
    MLPCritic,
    clip_weights,
    spectral_normalize,
)
from tests.programs import KEY, params_like, together


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_mlp_critic_against_numpy():
    net, x = MLPCritic((6, 5)), draw(4, 2, 3)
    params = params_like(net.init, KEY, x)["params"]
    assert count(params) == 7 * 6 + 7 * 5 + 6
    h = x.reshape(4, 6)
    for i in range(3):
        layer = params[f"layer_{i}"]
        h = h @ layer["kernel"] + layer["bias"]
        h = np.maximum(h, 0) if i < 2 else h
    found = together(net.apply, {"params": params}, x)
    np.testing.assert_allclose(found, h[:, 0], rtol=1e-5, atol=1e-6)


def test_kernels_start_kaiming_normal(key):
    params = together(MLPCritic((300,)).init, key, np.ones((1, 200), np.float32))
    kernel = params["params"]["layer_0"]["kernel"]
    rel = 4 / (2 * 60_000) ** 0.5
    assert float(kernel.std()) == pytest.approx(0.1, rel=rel)
    # Not truncated at two standard deviations.
    assert float(np.abs(kernel).max()) > 0.35


def slow_conv(x, kernel, bias, stride, pad):
    """Windows one by one, in NumPy."""
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    places = [
        range(0, side - kernel.shape[axis] + 1, stride)
        for axis, side in enumerate(x.shape[1:3])
    ]
    rows = [
        [
            np.einsum("bhwi,hwio->bo", x[:, i : i + size, j : j + size], kernel) + bias
            for j in places[1]
        ]
        for i in places[0]
    ]
    return np.array(rows).transpose(2, 0, 1, 3)


@pytest.mark.parametrize("side, seen", [(8, 1), (14, 1), (28, 3), (32, 4), (40, 4)])
def test_conv_critic_sizes(side, seen):
    net = ConvCritic((4, 4, 8))
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    scores, params = jax.eval_shape(net.init_with_output, KEY, x)
    assert scores.shape == (2,)
    assert params["params"]["layer_3"]["kernel"].shape == (seen, seen, 8, 1)
    assert count(params) == 16 * (3 * 4 + 4 * 4 + 4 * 8) + seen**2 * 8 + 4 + 4 + 8 + 1


def test_conv_critic_against_windows():
    net, x = ConvCritic((3, 4)), draw(2, 20, 18, 2)
    params = params_like(net.init, KEY, x)["params"]
    h = np.asarray(x, np.float64)
    for i in range(2):
        layer = params[f"layer_{i}"]
        h = slow_conv(h, layer["kernel"], layer["bias"], 2, 1)
        h = np.where(h > 0, h, 0.2 * h)
    last = params["layer_2"]
    h = slow_conv(h, last["kernel"], last["bias"], 1, 0)
    assert h.shape == (2, 2, 1, 1)
    found = together(net.apply, {"params": params}, x)
    np.testing.assert_allclose(found, h.mean((1, 2, 3)), rtol=2e-5)


def test_conv_critic_refuses_small_pictures(key):
    x = jax.ShapeDtypeStruct((1, 7, 9, 1), jnp.float32)
    with pytest.raises(ValueError, match=r"8 x 8 at least, got \(7, 9\)"):
        jax.eval_shape(ConvCritic().init, key, x)


def test_classifier_returns_logits_of_its_features():
    net, x = Classifier((8, 6), classes=3), draw(5, 4, 4, 1)
    params = params_like(net.init, KEY, x)["params"]
    logits, features = together(net.apply, {"params": params}, x)
    assert count(params) == 17 * 8 + 9 * 6 + 7 * 3
    assert features.shape == (5, 6) and (features >= 0).all()
    last = params["layer_2"]
    expected = features @ last["kernel"] + last["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_spectral_normalize_only_shrinks():
    big, small = draw(2, 5, 4)
    params = {
        "a": {"kernel": 3 * big, "bias": 7 * np.ones(4, np.float32)},
        "b": {"kernel": small / 50, "scale": 9 * np.ones((3, 4), np.float32)},
    }
    found = together(spectral_normalize, params)
    expected = params["a"]["kernel"] / np.linalg.norm(params["a"]["kernel"], 2)
    np.testing.assert_allclose(found["a"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_array_equal(found["b"]["kernel"], params["b"]["kernel"])
    np.testing.assert_array_equal(found["a"]["bias"], params["a"]["bias"])
    np.testing.assert_array_equal(found["b"]["scale"], params["b"]["scale"])
    assert jax.tree.structure(found) == jax.tree.structure(params)


def test_the_power_method_comes_from_below():
    def normalized(kernel):
        return {
            n: spectral_normalize({"kernel": kernel}, n)["kernel"]
            for n in (0, 1, 3, 200)
        }

    kernels = together(normalized, 3 * draw(2, 2, 3, 6, seed=1))
    norm = {n: np.linalg.norm(x.reshape(12, 6), 2) for n, x in kernels.items()}
    assert norm[0] == pytest.approx(1, rel=1e-5)
    # Dividing by less than the norm leaves more than 1.
    assert norm[1] > norm[3] > 1.0001
    assert norm[200] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("iterations", [0, 300])
def test_the_gradient_sees_the_division(iterations, float64):
    rng = np.random.default_rng(0)
    kernel, weight, along = rng.normal(size=(3, 4, 3))

    def f(kernel):
        normalized = spectral_normalize({"kernel": kernel}, iterations)["kernel"]
        return (weight * normalized).sum()

    def slopes(kernel, step):
        return jax.grad(f)(kernel), f(kernel + step) - f(kernel - step)

    grad, difference = together(slopes, 2 * kernel, 1e-6 * along)
    np.testing.assert_allclose((grad * along).sum(), difference / 2e-6, rtol=1e-6)
    # Growing a kernel that is divided by its norm changes nothing.
    assert abs((grad * kernel).sum()) < 1e-9


def test_a_normalized_critic_is_lipschitz():
    net, x = MLPCritic((16, 16)), draw(64, 5)

    def slopes(params, x):
        grad = jax.grad(lambda x: net.apply({"params": params}, x).sum())(x)
        return jnp.linalg.norm(grad, axis=1)

    def both(params, x):
        return slopes(params, x), slopes(spectral_normalize(params), x)

    params = params_like(net.init, KEY, x)["params"]
    # As wide as they start: variance 2 / fan-in.
    params = jax.tree.map(lambda p: np.float32(2**0.5) * p, params)
    free, normalized = together(both, params, x)
    assert free.max() > 1
    assert normalized.max() <= 1 + 1e-5


def test_a_normalized_convolution_is_lipschitz_with_2():
    def f(kernel):
        eye = jnp.eye(6 * 6 * 2).reshape(-1, 6, 6, 2)
        return lax.conv_general_dilated(
            eye,
            spectral_normalize({"kernel": kernel})["kernel"],
            (2, 2),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    norm = np.linalg.norm(together(f, draw(4, 4, 2, 3)).reshape(72, -1), 2)
    assert 1 < norm <= 2 + 1e-5


@pytest.mark.parametrize("iterations", [0, 5])
def test_a_kernel_of_zeros_stays(iterations):
    def total(kernel):
        return spectral_normalize({"kernel": kernel}, iterations)["kernel"].sum()

    grad = together(jax.grad(total), np.zeros((3, 2), np.float32))
    np.testing.assert_array_equal(grad, np.ones((3, 2)))


def test_clip_weights():
    params = {"a": {"kernel": np.float32([[-3.0, 0.05]]), "bias": np.float32([0.2])}}
    found = together(lambda p: clip_weights(p, 0.1), params)
    np.testing.assert_allclose(found["a"]["kernel"], [[-0.1, 0.05]])
    np.testing.assert_allclose(found["a"]["bias"], [0.1])
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="bound must be > 0"):
            clip_weights(params, bound)


def test_spectral_normalize_refuses():
    params = {"a": {"kernel": np.ones((2, 2), np.float32)}}
    with pytest.raises(ValueError, match="iterations must be >= 0, got -1"):
        spectral_normalize(params, -1)
    with pytest.raises(ValueError, match=r"'weight' matches no parameter; .*a/kernel"):
        spectral_normalize(params, match="weight")
