"""Wide residual networks: blocks by hand, shapes of the groups, refusals."""

import chex
import jax
import numpy as np
import pytest

from jaxpapers.nets import wide_resnet
from tests.programs import KEY, params_like, together


def test_a_block_is_two_convolutions_and_a_shortcut():
    """Against NumPy, with kernels whose centre alone is not zero: per-pixel products."""
    layout = wide_resnet.blocks(2, 1, (1, 1))
    assert layout["group_1_block_0"] == (2, 4, 2)

    def init(key):
        convs = wide_resnet.init_convs(key, layout)
        return {"convs": convs, **wide_resnet.init_top(key, key, layout, 3)}

    params = params_like(init, KEY)

    def centred(kernel):
        if kernel.shape[0] == 3:
            kernel = kernel * np.eye(3)[1][:, None, None, None]
            kernel = kernel * np.eye(3)[1][None, :, None, None]
        return kernel.astype(np.float32)

    params["convs"] = jax.tree.map(centred, params["convs"])
    state = params_like(lambda: wide_resnet.statistics(params))
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 2)).astype(np.float32)

    def run(params, state, x):
        return wide_resnet.apply(params, state, x, layout, train=False)

    logits, pooled, kept = together(run, params, state, x)
    chex.assert_trees_all_equal(kept, state)

    def norm_relu(p, s, x):
        x = (x - s.mean) / np.sqrt(s.var + 1e-5) * p["scale"] + p["bias"]
        return np.maximum(x, 0)

    for name, block in layout.items():
        p, s, c = (t[name] for t in (params["norms"], state["norms"], params["convs"]))
        y = norm_relu(p["first"], s["first"], x)
        step = slice(None, None, block.stride)
        short = x
        if "shortcut" in c:
            short = y[:, step, step] @ c["shortcut"][0, 0]
        y = y[:, step, step] @ c["first"][1, 1]
        x = short + norm_relu(p["second"], s["second"], y) @ c["second"][1, 1]
    expected = norm_relu(params["last"], state["last"], x).mean((1, 2))
    np.testing.assert_allclose(pooled, expected, rtol=1e-4, atol=1e-5)
    linear = params["linear"]
    expected = expected @ linear["kernel"] + linear["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="base, width and counts must be >= 1"):
        wide_resnet.blocks(4, 1, (1, 0))
