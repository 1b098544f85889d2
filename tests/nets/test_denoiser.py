"""Perceptron denoisers against NumPy, closed-form counts, and their conditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers.method import State
from jaxpapers.nets import denoiser
from jaxpapers.nets.denoiser import (
    MLPDenoiser,
    StepMLP,
    softplus,
    time_embedding,
    token_embedding,
)
from tests.programs import KEY, params_like, together

SMALL = {"width": 16, "blocks": 2, "time_width": 8, "token_width": 4}
X = np.random.default_rng(1).normal(size=(3, 2, 5)).astype(np.float32)
TIME = np.float32([0.0, 28.293, 999.0])
TOKENS = np.int32([0, 2, 1])


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def drawn(net, *inputs):
    """All parameters are drawn: as initialised, the last layer may be zero."""
    return params_like(lambda *v: net.init(*v)["params"], KEY, *inputs)


@pytest.mark.parametrize("dtype, tol", [("float32", 3e-7), ("float64", 1e-15)])
def test_softplus_to_the_last_digits(dtype, tol):
    x = np.concatenate([np.linspace(-80, 80, 4001), np.linspace(-1, 1, 2001)])
    x = x.astype(dtype)

    def program(x):
        slope = jax.grad(softplus)
        return [jax.vmap(f)(x) for f in (softplus, slope, jax.grad(slope))]

    with jax.enable_x64(dtype == "float64"):
        value, slope, curve = together(program, x)
    assert value.dtype == slope.dtype == dtype
    wide = x.astype(np.float64)
    sigmoid = np.exp(-np.logaddexp(0, -wide))
    np.testing.assert_allclose(value, np.logaddexp(0, wide), rtol=tol)
    np.testing.assert_allclose(slope, sigmoid, rtol=20 * tol)
    np.testing.assert_allclose(curve, sigmoid * (1 - sigmoid), rtol=1e-4, atol=3e-7)


def test_softplus_beyond_numbers():
    value = together(softplus, np.float32([-np.inf, np.inf, np.nan]))
    assert value[0] == 0 and value[1] == np.inf and np.isnan(value[2])


def test_time_embedding_against_numpy():
    embedding, whole, ends = together(
        lambda time, steps, one: (
            time_embedding(time, 8, longest=1000.0),
            time_embedding(steps, 8, longest=1000.0),
            time_embedding(one, 6, longest=50.0),
        ),
        TIME, np.int32([0, 28, 999]), np.ones(1, np.float32),
    )  # fmt: skip
    frequencies = 1000.0 ** (-np.arange(4) / 3)
    angles = np.asarray(TIME, np.float64)[:, None] * frequencies[None]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    np.testing.assert_allclose(embedding, expected, atol=1e-4)
    assert embedding.dtype == np.float32
    np.testing.assert_array_equal(whole[2], embedding[2])
    assert np.abs(whole[1] - embedding[1]).max() > 0.01
    # From one radian per step to the longest period.
    np.testing.assert_allclose(np.arcsin(ends[0, [0, 2]]), [1.0, 1 / 50], rtol=1e-5)


@pytest.mark.parametrize("width, longest", [(7, 1e4), (2, 1e4), (8, 1.0), (8, -3.0)])
def test_time_embedding_refuses(width, longest):
    with pytest.raises(ValueError, match="even width >= 4 and longest > 1"):
        jax.eval_shape(lambda time: time_embedding(time, width, longest), TIME)


def test_sequences_are_means_of_their_tokens():
    table = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    captions = np.int32([[4, 0, 0], [1, 3, 0], [0, 0, 0], [2, 2, 3]])

    def program(table, captions):
        grad = jax.grad(lambda t: token_embedding(t, captions[:2]).sum())
        return token_embedding(table, captions), grad(table)

    means, grad = together(program, table, captions)
    expected = [
        table[4],
        (table[1] + table[3]) / 2,
        table[0],
        (2 * table[2] + table[3]) / 3,
    ]
    np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)
    # Padding gets no gradient but from a caption of padding alone.
    np.testing.assert_allclose(grad[:, 0], [0, 0.5, 0, 0.5, 1.0])


def test_tokens_out_of_range():
    table = np.arange(4, dtype=np.float32)[:, None]
    for tokens in ([4], [[-1, 2]]):
        with pytest.raises(ValueError, match=r"tokens must be in 0 \.\. 3, got"):
            token_embedding(jnp.asarray(table), jnp.asarray(np.int32(tokens)))
    traced = together(token_embedding, table, np.int32([9, -1]))
    np.testing.assert_array_equal(traced[:, 0], [3, 0])


@pytest.fixture(scope="module")
def outputs():
    """The net's outputs of several inputs, and in half precision."""
    net = MLPDenoiser(**{**SMALL, "blocks": 1}, vocab=3)
    half = net.clone(dtype=jnp.bfloat16)

    def program(params, x, time, tokens):
        calls = {
            "base": (x, time, tokens),
            "image": (x + 0.1, time, tokens),
            "time": (x, time + 0.25, tokens),
            "tokens": (x, time, jnp.array([1, 1, 2])),
        }
        rows = [jnp.concatenate(v) for v in zip(*calls.values())]
        y = net.apply({"params": params}, *rows)
        captions = jnp.stack([tokens, tokens], 1)
        return {
            **dict(zip(calls, jnp.split(y, len(calls)))),
            "captions": net.apply({"params": params}, x, time, captions),
            "half": half.apply({"params": params}, x, time, tokens),
        }

    return together(program, drawn(net, X, TIME, TOKENS), X, TIME, TOKENS)


def test_mlp_denoiser_count():
    w, t, d = 16, 8, 10
    block = 2 * (w * w + w) + 2 * (w * w + w)
    ends = (d * w + w) + (w * d + d)
    plain = jax.eval_shape(MLPDenoiser(**SMALL).init, KEY, X, TIME)
    assert count(plain) == (t * w + w) + 2 * block + ends
    conditioned = jax.eval_shape(
        MLPDenoiser(**SMALL, vocab=3).init, KEY, X, TIME, TOKENS
    )
    assert count(conditioned) == ((t + 4) * w + w) + 2 * block + ends + 3 * 4


def test_mlp_denoiser_sees_all_it_is_given(outputs):
    y = outputs
    assert y["base"].shape == X.shape and np.isfinite(y["base"]).all()
    for change in ("image", "time", "tokens"):
        assert (np.abs(y[change] - y["base"]).max((1, 2)) > 1e-3)[:2].all(), change
    # Sequences of one token are that token; rows of a batch do not see each other.
    np.testing.assert_allclose(y["captions"], y["base"], rtol=1e-5, atol=1e-5)


def test_mlp_denoiser_in_bfloat16(outputs):
    net = MLPDenoiser(**SMALL, dtype=jnp.bfloat16)
    params = jax.eval_shape(net.init, KEY, X, TIME)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    half, full = outputs["half"], outputs["base"]
    assert half.dtype == np.float32
    assert 0 < np.linalg.norm(half - full) / np.linalg.norm(full) < 0.05


@pytest.mark.matrix
def test_every_parameter_gets_a_gradient_once_the_last_layer_has_moved():
    net = MLPDenoiser(**{**SMALL, "blocks": 1}, vocab=3)

    def program(x, time, tokens):
        def loss(params):
            y = net.apply({"params": params}, x, time, tokens)
            return jnp.square(y - x).mean(), y

        def descend(params, _):
            grads, y = jax.grad(loss, has_aux=True)(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), (grads, y)

        params = net.init(jax.random.key(0), x, time, tokens)["params"]
        return jax.lax.scan(descend, params, length=2)[1]

    grads, y = together(program, X, TIME, TOKENS)
    np.testing.assert_array_equal(y[0], 0 * X)
    assert np.abs(grads["outputs"]["kernel"][0]).max() > 0
    for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]:
        assert np.abs(g[1]).max() > 0, path


@pytest.mark.parametrize(
    "options, tokens, message",
    [
        ({"vocab": 3}, None, "vocab=3 needs tokens"),
        ({}, TOKENS, "vocab=0 takes no tokens"),
        ({"blocks": 0}, None, "blocks >= 1"),
        ({"time_width": 3}, None, "even width"),
        ({"vocab": 2}, TOKENS, r"tokens must be in 0 \.\. 1"),
    ],
)
def test_mlp_denoiser_refuses(options, tokens, message):
    net = MLPDenoiser(**{**SMALL, **options})
    with pytest.raises(ValueError, match=message):
        tokens = None if tokens is None else jnp.asarray(tokens)  # Values are checked.
        jax.eval_shape(lambda *inputs: net.init(*inputs, tokens), KEY, X, TIME)


def test_rules_split_both_maps_of_a_block():
    net = MLPDenoiser(**SMALL)
    params = jax.eval_shape(net.init, KEY, X, TIME)["params"]
    state = State(np.zeros(()), params, (), (), KEY)
    grid = meshes.make_mesh({"data": 4, "model": 2})
    specs = meshes.state_shardings(state, denoiser.RULES, grid).params
    split = {
        "/".join(k.key for k in path)
        for path, s in jax.tree_util.tree_flatten_with_path(specs)[0]
        if "model" in s.spec
    }
    leaves = [f"{k}/{leaf}" for k in ("first", "scale", "shift")
              for leaf in ("kernel", "bias")]  # fmt: skip
    leaves.append("second/kernel")
    assert split == {f"block_{i}/{leaf}" for i in (0, 1) for leaf in leaves}


@pytest.mark.parametrize(
    "activation, scale_output",
    [("relu", True),
     *(pytest.param(a, s, marks=pytest.mark.matrix)
       for a, s in (("softplus", False), ("softplus", True), ("relu", False)))],
)  # fmt: skip
def test_step_mlp_against_numpy(activation, scale_output):
    """Also with a skip, and its gradient, which is of its own steps only."""
    step, context = np.int32([0, 3, 3]), np.ones((3, 2), np.float32)
    options = {"activation": activation, "scale_output": scale_output}
    net = StepMLP((6, 7), outputs=1, steps=4, **options)
    skip = StepMLP((6, 7), outputs=10, steps=4, residual=True, **options)
    inputs = X, step, context
    params, wide = drawn(net, *inputs), drawn(skip, *inputs)

    def program(params, wide, *inputs):
        def loss(params):
            return jnp.square(net.apply({"params": params}, *inputs)).sum()

        plain = skip.clone(residual=False)
        return (
            net.apply({"params": params}, *inputs), jax.grad(loss)(params),
            [n.apply({"params": wide}, *inputs) for n in (skip, plain)],
        )  # fmt: skip

    outputs, grads, (skipped, plain) = together(program, params, wide, *inputs)
    sizes = [12, 6, 7, 1]
    scales = 4 * (6 + 7 + scale_output)
    assert count(params) == sum((i + 1) * o for i, o in zip(sizes, sizes[1:])) + scales
    h = np.concatenate([X.reshape(3, 10), context], 1).astype(np.float64)
    for i in range(3):
        layer = {k: np.asarray(v, np.float64) for k, v in params[f"layer_{i}"].items()}
        h = h @ layer["kernel"] + layer["bias"]
        if "scale" in layer:
            h = layer["scale"][step] * h
        if i < 2:
            h = np.maximum(h, 0) if activation == "relu" else np.log1p(np.exp(h))
    assert ("scale" in params["layer_2"]) == scale_output
    np.testing.assert_allclose(outputs, h, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(skipped, plain + X.reshape(3, 10), rtol=1e-6, atol=1e-6)
    rows = np.abs(grads["layer_0"]["scale"]).sum(1)
    assert ((rows > 0) == [True, False, False, True]).all()


def test_step_mlp_starts_as_the_reference_does():
    net = StepMLP((400,), outputs=1, steps=50)
    params = together(
        lambda x, step: net.init(jax.random.key(0), x, step)["params"],
        np.ones((1, 100), np.float32), np.zeros(1, np.int32),
    )  # fmt: skip
    kernel, bias, scale = (params["layer_0"][k] for k in ("kernel", "bias", "scale"))
    # Standard errors of a standard deviation: 1 / sqrt(2 n); four of them.
    assert float(kernel.std()) == pytest.approx((2 / 500) ** 0.5, rel=4 / 80_000**0.5)
    assert float(np.abs(kernel).max()) > 3.5 * (2 / 500) ** 0.5
    assert 0.09 < float(np.abs(bias).max()) <= 0.1
    assert 0 <= float(scale.min()) < 0.001 and 0.999 < float(scale.max()) < 1


@pytest.mark.parametrize(
    "options, step, message",
    [
        ({"activation": "gelu"}, 0, "activation must be one of"),
        ({"widths": (4, 0)}, 0, "outputs and steps >= 1"),
        ({"steps": 0}, 0, "outputs and steps >= 1"),
        ({"residual": True}, 0, "outputs=2 and x of width 10"),
        ({"steps": 4}, 4, r"step must be in 0 \.\. 3, got 4"),
        ({"steps": 4}, -1, r"step must be in 0 \.\. 3, got -1"),
    ],
)
def test_step_mlp_refuses(options, step, message):
    net = StepMLP(**{"widths": (4,), **options})
    with pytest.raises(ValueError, match=message):
        step = jnp.asarray(np.full(3, step, np.int32))  # Its values are checked.
        jax.eval_shape(lambda *inputs: net.init(*inputs, step), KEY, X)
