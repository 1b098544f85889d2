"""DenseNet-BC: a network of one layer a block by hand, order of layers, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from jaxpapers.nets import densenet
from tests.programs import KEY, params_like, together


def by_hand(params, state, x, layers):
    """One image (H, W, C) in float64, with the moving statistics."""

    def norm_relu(p, m, x):
        y = (x - m.mean) / np.sqrt(m.var + 1e-5) * p["scale"] + p["bias"]
        return np.maximum(y, 0)

    def conv(x, kernel):
        planes = [
            sum(
                correlate2d(x[..., i], kernel[..., i, o], "same")
                for i in range(x.shape[2])
            )
            for o in range(kernel.shape[3])
        ]
        return np.stack(planes, -1)

    x = conv(x, params["stem"])
    for i in range(3):
        for j in range(layers):
            p = params["blocks"][f"block_{i}"][f"layer_{j}"]
            m = state["blocks"][f"block_{i}"][f"layer_{j}"]
            y = conv(norm_relu(p["norm_1"], m["norm_1"], x), p["conv_1"])
            y = conv(norm_relu(p["norm_2"], m["norm_2"], y), p["conv_2"])
            x = np.concatenate([x, y], -1)
        if i < 2:
            p = params["blocks"][f"transition_{i}"]
            m = state["blocks"][f"transition_{i}"]
            y = conv(norm_relu(p["norm"], m["norm"], x), p["conv"])
            h, w, c = y.shape
            x = y.reshape(h // 2, 2, w // 2, 2, c).mean((1, 3))
    z = norm_relu(params["last"], state["last"], x).mean((0, 1))
    return z @ params["linear"]["kernel"] + params["linear"]["bias"], z


def test_as_by_hand():
    layout = densenet.Layout(depth=16, growth=2)
    params = params_like(lambda key: densenet.init(key, layout, 2, 3), KEY)
    shapes = jax.eval_shape(densenet.statistics, params)
    state = params_like(lambda: shapes, seed=1)
    state = jax.tree_util.tree_map_with_path(
        lambda path, x: np.abs(x) + (0.5 if "var" in str(path[-1]) else 0.0), state
    )
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 2)).astype(np.float32)

    def body(params, state, x):
        kept = densenet.apply(params, state, x, train=False)
        return kept, densenet.apply(params, state, x, train=True)[2]

    (logits, z, same), moved = together(body, params, state, x)
    for i in range(2):
        expected, pooled = by_hand(params, state, x[i].astype(float), 2)
        np.testing.assert_allclose(z[i], pooled, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(logits[i], expected, rtol=2e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), moved, state)
    assert all(jax.tree.leaves(changed))


def test_more_than_ten_layers_keep_their_order():
    """A jitted function gets the names of a dict sorted: layer_10 before layer_2."""
    layout = densenet.Layout(depth=76, growth=1)
    assert layout.layers == 12
    shapes = jax.eval_shape(lambda key: densenet.init(key, layout, 1, 2), KEY)
    state = jax.eval_shape(densenet.statistics, shapes)
    x = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    logits, z, _ = jax.eval_shape(
        lambda *a: densenet.apply(*a, train=False), shapes, state, x
    )
    assert logits.shape == (1, 2) and z.shape == (1, layout.features)


def test_refuses():
    for fields, words in (
        ({"depth": 12}, "depth 6 L"),
        ({"growth": 0}, "growth >= 1"),
        ({"reduction": 0.0}, "reduction"),
    ):
        with pytest.raises(ValueError, match=words):
            densenet.check(densenet.Layout(**fields))
