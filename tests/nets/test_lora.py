"""Adapters: nothing at the start, a low-rank change after, errors that name the leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.nets.critic import ConvCritic
from jaxpapers.nets.denoiser import StepMLP
from jaxpapers.nets.lora import lora_apply, lora_count, lora_dropout, lora_init
from jaxpapers.nets.transformer import Transformer
from tests.programs import KEY, params_like, together

X = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
STEP = np.array([0, 1, 1])
NET = StepMLP((6, 7), outputs=4, steps=2)
PARAMS = params_like(NET.init, KEY, X, STEP)["params"]


def moved(params, *args, **options):
    """Adapters of which ``up`` is not zero."""
    return params_like(
        lambda key: lora_init(key, params, *args, **options), KEY, seed=3
    )


def paths(tree):
    return {
        "/".join(k.key for k in path)
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), a, b))


def test_they_mirror_the_matched_leaves(key):
    def init(*args):
        return jax.eval_shape(lambda key: lora_init(key, PARAMS, *args), key)

    adapters = init(2, r"layer_[02]/kernel")
    assert paths(adapters) == {
        f"layer_{i}/kernel/{name}" for i in (0, 2) for name in ("down", "up")
    }
    assert adapters["layer_0"]["kernel"]["down"].shape == (5, 2)
    assert adapters["layer_2"]["kernel"]["up"].shape == (2, 4)
    assert lora_count(adapters) == 2 * (5 + 6) + 2 * (7 + 4)
    # A regular expression that meets vectors too leaves them out.
    assert paths(init(2, "layer_0/(kernel|bias)")) == {
        "layer_0/kernel/down", "layer_0/kernel/up",
    }  # fmt: skip


def test_bit_identical_at_the_start(key):
    def f(key, params):
        applied = lora_apply(params, lora_init(key, params, 2), 17.0)
        x, step = jnp.asarray(X), jnp.asarray(STEP)
        outputs = [NET.apply({"params": p}, x, step) for p in (applied, params)]
        return applied, outputs

    applied, outputs = together(f, key, PARAMS)
    assert jax.tree.structure(applied) == jax.tree.structure(PARAMS)
    assert equal(applied, PARAMS)
    np.testing.assert_array_equal(*outputs)


def test_down_is_normal_with_deviation_one_over_rank(key):
    kernel = np.ones((500, 400), np.float32)
    params = {"a": {"kernel": kernel}, "b": {"kernel": kernel}}

    def f(key):
        return lora_init(key, params, 40), lora_init(
            key, dict(reversed(params.items())), 40
        )

    adapters, again = together(f, key)
    first, second = (adapters[n]["kernel"]["down"] for n in "ab")
    assert float(first.std()) == pytest.approx(1 / 40, rel=4 / (2 * 20_000) ** 0.5)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / 20_000**0.5
    assert not adapters["a"]["kernel"]["up"].any()
    assert equal(adapters, again)


def test_applied_equals_a_side_branch():
    """y = x W + s (x down) up, the form in which adapters run beside a frozen net."""
    adapters = moved(PARAMS, 2, "layer_0/kernel")
    pair, layer = adapters["layer_0"]["kernel"], PARAMS["layer_0"]
    applied = together(lambda p, a: lora_apply(p, a, 0.5), PARAMS, adapters)
    merged = X @ applied["layer_0"]["kernel"]
    beside = X @ layer["kernel"] + 0.5 * (X @ pair["down"]) @ pair["up"]
    np.testing.assert_allclose(merged, beside, rtol=1e-5, atol=1e-6)
    change = applied["layer_0"]["kernel"] - layer["kernel"]
    assert np.linalg.matrix_rank(change, tol=1e-5) == 2
    for name in ("bias", "scale"):
        np.testing.assert_array_equal(applied["layer_0"][name], layer[name])
    assert equal(applied["layer_1"], PARAMS["layer_1"])


def test_convolutions_are_matrices_of_patches():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    params = params_like(ConvCritic((4,)).init, KEY, x)["params"]
    adapters = moved(params, 2, "layer_0/kernel")
    pair = adapters["layer_0"]["kernel"]
    assert pair["down"].shape == (4 * 4 * 3, 2) and pair["up"].shape == (2, 4)
    applied = together(lora_apply, params, adapters)["layer_0"]["kernel"]
    change = np.einsum("hwir,ro->hwio", pair["down"].reshape(4, 4, 3, 2), pair["up"])
    expected = params["layer_0"]["kernel"] + change
    np.testing.assert_allclose(applied, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_reaches_up_first_and_down_after(key):
    def grad(params, adapters):
        def loss(adapters):
            x, step = jnp.asarray(X), jnp.asarray(STEP)
            y = NET.apply({"params": lora_apply(params, adapters)}, x, step)
            return jnp.square(y - 1).mean()

        return jax.grad(loss)(adapters)

    def steps(key, params):
        adapters = lora_init(key, params, 2)
        first = grad(params, adapters)
        stepped = jax.tree.map(lambda a, g: a - 0.1 * g, adapters, first)
        return first, grad(params, stepped)

    first, second = together(steps, key, PARAMS)
    for layer in first.values():
        assert not layer["kernel"]["down"].any()
        assert layer["kernel"]["up"].any()
    assert all(layer["kernel"]["down"].any() for layer in second.values())


def test_stacked_layers_have_adapters_of_their_own():
    net = Transformer(vocab_size=11, width=8, layers=3, heads=2, hidden=12)
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = params_like(net.init, KEY, tokens)["params"]
    query = r"attention/query/kernel"
    adapters = moved(params, 2, query, stacked="^layers/")
    pair = adapters["layers"]["attention"]["query"]["kernel"]
    assert pair["down"].shape == (3, 8, 2) and pair["up"].shape == (3, 2, 8)
    applied = together(lambda p, a: lora_apply(p, a, 2.0), params, adapters)
    applied, kernel = (
        x["layers"]["attention"]["query"]["kernel"] for x in (applied, params)
    )
    for layer in range(3):
        expected = kernel[layer] + 2 * pair["down"][layer] @ pair["up"][layer]
        np.testing.assert_allclose(applied[layer], expected, rtol=1e-5, atol=1e-6)
    # Not stacked, the layers are rows of one matrix.
    flat = moved(params, 2, query)["layers"]["attention"]["query"]["kernel"]
    assert flat["down"].shape == (24, 2)


def test_dropout_is_of_the_adapters_inputs(key):
    """x (W + m D U) is x W + (m x) D U, with masks of their own for every layer."""
    rng = np.random.default_rng(0)
    params = {"layers": {"kernel": np.zeros((3, 40, 6), np.float32)}}
    down, up = (rng.normal(size=s).astype(np.float32) for s in ((3, 40, 2), (3, 2, 6)))
    adapters = {"layers": {"kernel": {"down": down, "up": up}}}
    x = rng.normal(size=(5, 40)).astype(np.float32)

    def compute(key):
        dropped = lora_dropout(key, adapters, 0.25)
        merged = lora_apply(params, dropped)["layers"]["kernel"]
        return dropped, x @ merged, lora_dropout(key, adapters, 0.0)

    dropped, y, same = together(compute, key)
    pair = dropped["layers"]["kernel"]
    np.testing.assert_array_equal(pair["up"], up)
    mask = pair["down"][..., 0] / down[..., 0]
    np.testing.assert_allclose(np.unique(mask.round(4)), [0, 1.3333], atol=1e-3)
    assert 0.1 < (mask == 0).mean() < 0.4
    assert (mask[0] != mask[1]).any() and (mask[1] != mask[2]).any()
    expected = (x * mask[:, None]) @ down @ up
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, same, adapters)
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
            lora_dropout(key, adapters, rate)


def test_half_precision_rounds_once():
    kernel = np.random.default_rng(0).normal(size=(6, 4)).astype(jnp.bfloat16)
    adapters = moved({"kernel": kernel}, 2)
    pair = jax.tree.map(lambda a: np.asarray(a, np.float32), adapters["kernel"])
    exact = np.asarray(kernel, np.float32) + pair["down"] @ pair["up"]
    applied = together(lora_apply, {"kernel": kernel}, adapters)["kernel"]
    assert applied.dtype == jnp.bfloat16
    np.testing.assert_array_equal(applied, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "rank, options, message",
    [
        (0, {}, "rank must be >= 1, got 0"),
        (2, {"match": "conv"}, "'conv' matches no parameter; they are .*layer_0/bias"),
        (2, {"match": "bias"}, "matches vectors only"),
        (5, {}, r"rank 5 exceeds a side of \{'layer_2/kernel': \(7, 4\)\}"),
        (2, {"stacked": "layers"}, "stacked='layers' matches none of"),
        (2, {"stacked": "kernel"}, "matches vectors only"),
    ],
)
def test_init_refuses(key, rank, options, message):
    with pytest.raises(ValueError, match=message):
        lora_init(key, PARAMS, rank, **options)


@pytest.mark.parametrize(
    "adapters, message",
    [
        ({"layer_9": {"kernel": (5, 6)}}, "at 'layer_9/kernel' fit no leaf"),
        ({"layer_0": {"kernel": (5, 7)}}, r"kernel' do not fit its shape \(5, 6\)"),
        ({"layer_0": {"bias": (5, 6)}}, "'layer_0/bias' do not fit"),
    ],
)  # fmt: skip
def test_apply_refuses(adapters, message):
    ((layer, leaves),) = adapters.items()
    ((name, (fan_in, fan_out)),) = leaves.items()
    pair = {"down": np.ones((fan_in, 2)), "up": np.ones((2, fan_out))}
    with pytest.raises(ValueError, match=message):
        lora_apply(PARAMS, {layer: {name: pair}})


def test_apply_refuses_parts_that_do_not_meet():
    down, up = np.ones((5, 2)), np.ones((3, 6))
    with pytest.raises(ValueError, match="do not fit its shape"):
        lora_apply(PARAMS, {"layer_0": {"kernel": {"down": down, "up": up}}})
    with pytest.raises(ValueError, match=r"adapters \['down'\] at 'layer_0/kernel'"):
        lora_apply(PARAMS, {"layer_0": {"kernel": {"down": down}}})
