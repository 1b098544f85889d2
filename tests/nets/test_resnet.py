"""Residual networks: sizes, torchvision's names, a frozen and a moving normalisation."""

import functools

import jax
import numpy as np
import pytest

from jaxpapers.nets import mnist_cnn, resnet
from tests.programs import KEY, params_like, together


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "depth, count, names", [(18, 11176512, 100), (50, 23508032, 265)]
)
def test_sizes_are_torchvisions(depth, count, names):
    params = jax.eval_shape(lambda key: resnet.init(key, depth), KEY)
    extra = jax.eval_shape(resnet.statistics, params)
    assert size(params) == count
    assert len({**resnet._names(params), **resnet._names(extra)}) == names
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32)
    run = functools.partial(resnet.apply, depth=depth)
    y, kept = jax.eval_shape(run, params, extra, x)
    assert y.shape == (2, resnet.features(depth))
    assert jax.tree.structure(kept) == jax.tree.structure(extra)


def state_dict(depth):
    """Arrays by torchvision's names, in its order of axes."""
    params = params_like(lambda key: resnet.init(key, depth), KEY)
    extra = params_like(lambda: resnet.statistics(params), seed=1)
    arrays = {}
    for tree in (params, extra):
        leaves = dict(jax.tree_util.tree_leaves_with_path(tree))
        for name, (path, _) in resnet._names(tree).items():
            x = leaves[path]
            arrays[name] = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x
    return params, extra, arrays


def test_state_dicts_of_torchvision():
    params, extra, arrays = state_dict(18)
    for name, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer2.0.downsample.1.running_mean": (128,),
        "layer4.1.bn2.bias": (512,),
    }.items():
        assert arrays[name].shape == shape
    more = {"fc.weight": np.zeros((10, 512)), "bn1.num_batches_tracked": np.array(3)}
    read = resnet.from_torchvision({**arrays, **more}, 18)
    jax.tree.map(np.testing.assert_array_equal, read, (params, extra))
    with pytest.raises(ValueError, match=r"resnet50: missing \['layer1.0.bn3.bias"):
        resnet.from_torchvision(arrays, 50)
    with pytest.raises(ValueError, match=r"left over \['head'\]"):
        resnet.from_torchvision({**arrays, "head": np.zeros(2)}, 18)
    with pytest.raises(
        ValueError, match=r"conv1.weight: expected \(7, 7, 3, 64\), got"
    ):
        resnet.from_torchvision({**arrays, "conv1.weight": np.zeros((8, 3, 7, 7))}, 18)
    with pytest.raises(ValueError, match="depth must be one of .* got 20"):
        resnet.layout(20)


def test_a_narrow_net_by_hand():
    """ResNet-18 with 1 channel and centred kernels is arithmetic of single pixels."""
    params = params_like(lambda key: resnet.init(key, 18, base=1, inputs=1), KEY)

    def centred(x):
        if x.ndim == 4 and x.shape[0] > 1:
            c = x.shape[0] // 2
            x, full = np.zeros_like(x), x
            x[c, c] = full[c, c]
        return x

    params = jax.tree.map(centred, params)
    extra = params_like(lambda: resnet.statistics(params), seed=1)
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype(np.float32)

    def run(params, extra, x):
        frozen = resnet.apply(params, extra, x, 18, base=1)
        return frozen, resnet.apply(params, extra, x, 18, base=1, train=True)

    (y, kept), (_, moved) = together(run, params, extra, x)
    jax.tree.map(np.testing.assert_array_equal, kept, extra)
    assert np.abs(moved["bn1"].mean - extra["bn1"].mean).max() > 0

    def norm(p, m, x):
        return (x - m.mean) / np.sqrt(m.var + 1e-5) * p["scale"] + p["bias"]

    z = x[:, ::2, ::2] @ params["conv1"][3, 3]
    z = np.maximum(norm(params["bn1"], extra["bn1"], z), 0)
    wide = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
    z = np.max([wide[:, i : i + 16 : 2, j : j + 16 : 2] for i in range(3)
                for j in range(3)], 0)  # fmt: skip
    for name, block in resnet.layout(18, 1).items():
        p, m = params[name], extra[name]
        s = block.convs[0][4]
        y1 = norm(p["bn1"], m["bn1"], z[:, ::s, ::s] @ p["conv1"][1, 1])
        y2 = norm(p["bn2"], m["bn2"], np.maximum(y1, 0) @ p["conv2"][1, 1])
        if block.shortcut:
            z = z[:, ::s, ::s] @ p["downsample"][0, 0]
            z = norm(p["downsample_bn"], m["downsample_bn"], z)
        z = np.maximum(z + y2, 0)
    np.testing.assert_allclose(y, z.mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_the_digits_net_by_hand():
    params = params_like(lambda key: mnist_cnn.init(key, 1, (8, 16, 8, 8)), KEY)
    x = np.random.default_rng(1).random((2, 6, 6, 1)).astype(np.float32)
    y = together(lambda p, x: mnist_cnn.apply(p, x, groups=4), params, x)
    z = x
    for i, layer in enumerate(params.values()):
        wide = np.pad(z, ((0, 0), (1, 1), (1, 1), (0, 0)))
        _, h, w, _ = z.shape
        z = sum(
            wide[:, a : a + h, b : b + w] @ layer["kernel"][a, b]
            for a in range(3) for b in range(3)
        )  # fmt: skip
        z = np.maximum((z[:, ::2, ::2] if i == 1 else z) + layer["bias"], 0)
        g = z.reshape(2, -1, 4, z.shape[-1] // 4)
        g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(
            g.var((1, 3), keepdims=True) + 1e-5
        )
        z = g.reshape(z.shape) * layer["norm"]["scale"] + layer["norm"]["bias"]
    np.testing.assert_allclose(y, z.mean((1, 2)), rtol=1e-3, atol=1e-4)
