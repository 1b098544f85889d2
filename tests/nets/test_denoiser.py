"""Perceptron denoisers against NumPy, closed-form counts, and their conditioning."""

import functools

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

SMALL = {"width": 16, "blocks": 2, "time_width": 8, "token_width": 4}
X = jax.random.normal(jax.random.key(1), (3, 2, 5))
TIME = jnp.array([0.0, 28.293, 999.0])
TOKENS = jnp.array([0, 2, 1])


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def opened(params):
    """The last layer starts at zero, which would hide everything below it."""
    kernel = params["outputs"]["kernel"]
    noise = jax.random.normal(jax.random.key(2), kernel.shape)
    return {**params, "outputs": {**params["outputs"], "kernel": noise}}


def build(**options):
    net = MLPDenoiser(**{**SMALL, **options})
    tokens = TOKENS if net.vocab else None
    return net, jax.jit(net.init)(jax.random.key(0), X, TIME, tokens)["params"]


@pytest.mark.parametrize("dtype, tol", [("float32", 3e-7), ("float64", 1e-15)])
def test_softplus_to_the_last_digits(dtype, tol):
    x = np.concatenate([np.linspace(-80, 80, 4001), np.linspace(-1, 1, 2001)])
    x = x.astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        found, slope = jax.vmap(jax.value_and_grad(softplus))(jnp.asarray(x))
        curve = jax.vmap(jax.grad(jax.grad(softplus)))(jnp.asarray(x))
    assert found.dtype == slope.dtype == dtype
    wide = x.astype(np.float64)
    sigmoid = np.exp(-np.logaddexp(0, -wide))
    np.testing.assert_allclose(found, np.logaddexp(0, wide), rtol=tol)
    np.testing.assert_allclose(slope, sigmoid, rtol=20 * tol)
    np.testing.assert_allclose(curve, sigmoid * (1 - sigmoid), rtol=1e-4, atol=3e-7)


def test_softplus_beyond_numbers():
    x = jnp.array([-jnp.inf, jnp.inf, jnp.nan])
    found = np.asarray(softplus(x))
    assert found[0] == 0 and found[1] == np.inf and np.isnan(found[2])


def test_time_embedding_against_numpy():
    found = time_embedding(TIME, 8, longest=1000.0)
    frequencies = 1000.0 ** (-np.arange(4) / 3)
    angles = np.asarray(TIME, np.float64)[:, None] * frequencies[None]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.dtype == jnp.float32
    whole = time_embedding(jnp.array([0, 28, 999]), 8, longest=1000.0)
    np.testing.assert_array_equal(whole[2], found[2])
    assert np.abs(whole[1] - found[1]).max() > 0.01


def test_time_embedding_ends_at_the_longest_period():
    angle = np.arcsin(time_embedding(jnp.array([1.0]), 6, longest=50.0)[0, :3])
    np.testing.assert_allclose(angle[[0, 2]], [1.0, 1 / 50], rtol=1e-5)


@pytest.mark.parametrize("width, longest", [(7, 1e4), (2, 1e4), (8, 1.0), (8, -3.0)])
def test_time_embedding_refuses(width, longest):
    with pytest.raises(ValueError, match="even width >= 4 and longest > 1"):
        time_embedding(TIME, width, longest)


def test_sequences_are_means_of_their_tokens():
    table = jax.random.normal(jax.random.key(0), (5, 3))
    captions = jnp.array([[4, 0, 0], [1, 3, 0], [0, 0, 0], [2, 2, 3]])
    expected = [
        table[4],
        (table[1] + table[3]) / 2,
        table[0],
        (2 * table[2] + table[3]) / 3,
    ]
    found = token_embedding(table, captions)
    np.testing.assert_allclose(found, jnp.stack(expected), rtol=1e-5, atol=1e-6)
    # Padding gets no gradient but from a caption of padding alone.
    grad = jax.grad(lambda t: token_embedding(t, captions[:2]).sum())(table)
    np.testing.assert_allclose(grad[:, 0], [0, 0.5, 0, 0.5, 1.0])


def test_tokens_out_of_range():
    table = jnp.arange(4.0)[:, None]
    for tokens in (jnp.array([4]), jnp.array([[-1, 2]])):
        with pytest.raises(ValueError, match=r"tokens must be in 0 \.\. 3, got"):
            token_embedding(table, tokens)
    traced = jax.jit(token_embedding)(table, jnp.array([9, -1]))
    np.testing.assert_array_equal(traced[:, 0], [3, 0])


def test_mlp_denoiser_count_and_first_output():
    w, t, d = 16, 8, 10
    block = 2 * (w * w + w) + 2 * (w * w + w)
    ends = (d * w + w) + (w * d + d)
    net, params = build()
    assert count(params) == (t * w + w) + 2 * block + ends
    np.testing.assert_array_equal(net.apply({"params": params}, X, TIME), 0 * X)
    _, params = build(vocab=3)
    assert count(params) == ((t + 4) * w + w) + 2 * block + ends + 3 * 4


def test_mlp_denoiser_sees_all_it_is_given():
    net, params = build(vocab=3)
    apply = jax.jit(functools.partial(net.apply, {"params": opened(params)}))
    y = apply(X, TIME, TOKENS)
    assert y.shape == X.shape and jnp.isfinite(y).all()
    others = [
        apply(X + 0.1, TIME, TOKENS),
        apply(X, TIME + 0.25, TOKENS),
        apply(X, TIME, jnp.array([1, 1, 2])),
    ]
    for other in others:
        assert (jnp.abs(other - y).max((1, 2)) > 1e-3)[jnp.array([0, 1])].all()
    # Rows do not see each other.
    alone = apply(X[:1], TIME[:1], TOKENS[:1])
    np.testing.assert_allclose(alone, y[:1], rtol=1e-5, atol=1e-6)
    captions = jnp.stack([TOKENS, TOKENS], 1)
    both = apply(X, TIME, captions)
    np.testing.assert_allclose(both, y, rtol=1e-5, atol=1e-5)


def test_mlp_denoiser_in_bfloat16():
    net, params = build()
    half, _ = build(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    full = net.apply({"params": opened(params)}, X, TIME)
    found = half.apply({"params": opened(params)}, X, TIME)
    assert found.dtype == jnp.float32
    error = jnp.linalg.norm(found - full) / jnp.linalg.norm(full)
    assert 0 < error < 0.05


def test_every_parameter_gets_a_gradient_once_the_last_layer_has_moved():
    net, params = build(vocab=3)

    @jax.jit
    @jax.grad
    def grad(params):
        return jnp.square(net.apply({"params": params}, X, TIME, TOKENS) - X).mean()

    first = grad(params)
    assert jnp.abs(first["outputs"]["kernel"]).max() > 0
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, first)
    for path, g in jax.tree_util.tree_flatten_with_path(grad(params))[0]:
        assert jnp.abs(g).max() > 0, path


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
        net.init(jax.random.key(0), X, TIME, tokens)


def test_rules_split_both_maps_of_a_block():
    net = MLPDenoiser(**SMALL)
    params = jax.eval_shape(net.init, jax.random.key(0), X, TIME)["params"]
    state = State(jnp.zeros(()), params, (), (), jax.random.key(0))
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


@pytest.mark.parametrize("scale_output", [False, True])
@pytest.mark.parametrize("activation", ["softplus", "relu"])
def test_step_mlp_against_numpy(activation, scale_output):
    options = {"activation": activation, "scale_output": scale_output}
    step, context = np.array([0, 3, 3]), jnp.ones((3, 2))
    net = StepMLP((6, 7), outputs=1, steps=4, **options)
    params = net.init(jax.random.key(0), X, jnp.asarray(step), context)["params"]
    sizes = [12, 6, 7, 1]
    scales = 4 * (6 + 7 + scale_output)
    assert count(params) == sum((i + 1) * o for i, o in zip(sizes, sizes[1:])) + scales
    h = np.concatenate([np.asarray(X).reshape(3, 10), context], 1).astype(np.float64)
    for i in range(3):
        layer = {k: np.asarray(v, np.float64) for k, v in params[f"layer_{i}"].items()}
        h = h @ layer["kernel"] + layer["bias"]
        if "scale" in layer:
            h = layer["scale"][step] * h
        if i < 2:
            h = np.maximum(h, 0) if activation == "relu" else np.log1p(np.exp(h))
    assert ("scale" in params["layer_2"]) == scale_output
    found = net.apply({"params": params}, X, jnp.asarray(step), context)
    np.testing.assert_allclose(found, h, rtol=2e-5, atol=1e-6)


def test_step_mlp_starts_as_the_reference_does():
    net = StepMLP((400,), outputs=1, steps=50)
    params = net.init(jax.random.key(0), jnp.ones((1, 100)), jnp.zeros(1, int))
    kernel, bias, scale = (
        params["params"]["layer_0"][k] for k in ("kernel", "bias", "scale")
    )
    # Standard errors of a standard deviation: 1 / sqrt(2 n); four of them.
    assert float(kernel.std()) == pytest.approx((2 / 500) ** 0.5, rel=4 / 80_000**0.5)
    assert float(jnp.abs(kernel).max()) > 3.5 * (2 / 500) ** 0.5
    assert 0.09 < float(jnp.abs(bias).max()) <= 0.1
    assert 0 <= float(scale.min()) < 0.001 and 0.999 < float(scale.max()) < 1


def test_step_mlp_residual_is_a_skip():
    step = jnp.array([1, 0, 2])
    plain = StepMLP((4,), outputs=10, steps=3)
    params = plain.init(jax.random.key(0), X, step)
    skipped = StepMLP((4,), outputs=10, steps=3, residual=True).apply(params, X, step)
    expected = plain.apply(params, X, step) + X.reshape(3, 10)
    np.testing.assert_array_equal(skipped, expected)


def test_step_mlp_learns_its_own_steps_only():
    net, step = StepMLP((4,), outputs=1, steps=5), jnp.array([1, 3, 3])
    params = net.init(jax.random.key(0), X, step)
    grad = jax.jit(jax.grad(lambda p: jnp.square(net.apply(p, X, step)).sum()))(params)
    rows = jnp.abs(grad["params"]["layer_0"]["scale"]).sum(1)
    assert ((rows > 0) == jnp.array([False, True, False, True, False])).all()


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
        net.init(jax.random.key(0), X, jnp.full(3, step))
