"""The U-Net: counts in closed form, sizes, conditioning, dropout, half precision."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers.method import State
from jaxpapers.nets import unet
from jaxpapers.nets.unet import UNet

SMALL = {"channels": 8, "groups": 4, "dropout": 0.5, "vocab": 3, "heads": 2}
X = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
TIME = jnp.array([3.0, 616.734])
TOKENS = jnp.array([0, 2])
KEY = jax.random.key(4)


def shapes(net, x, tokens=None):
    time = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    x = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.eval_shape(net.init_with_output, jax.random.key(0), x, time, tokens)


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def small():
    """A net's first parameters and its compiled pass.

    The last layer starts at zero, which hides everything below it: ``opened`` draws it.
    """
    net = UNet(**SMALL)
    params = dict(jax.jit(net.init)(jax.random.key(0), X, TIME, TOKENS)["params"])
    noise = jax.random.normal(jax.random.key(2), params["last"]["kernel"].shape)
    opened = {**params, "last": {**params["last"], "kernel": noise}}

    @functools.partial(jax.jit, static_argnames="train")
    def run(params, x, time, tokens, key=KEY, train=False):
        return net.apply(
            {"params": params}, x, time, tokens, train=train, rngs={"dropout": key}
        )

    np.testing.assert_array_equal(run(params, X, TIME, TOKENS), 0 * X)
    return opened, functools.partial(run, opened)


def test_group_norm_is_that_of_flax(key):
    """Values and gradients, of pictures whose mean is not 0."""
    x = 3 + 2 * jax.random.normal(key, (2, 4, 6, 8))
    params = {"scale": jnp.linspace(0.5, 2, 8), "bias": jnp.linspace(-1, 1, 8)}
    nets = unet.GroupNorm(4, jnp.float32), nn.GroupNorm(4, epsilon=1e-6)
    weight = jax.random.normal(jax.random.key(1), x.shape)

    def value(net, params, x):
        return (weight * jnp.sin(net.apply({"params": params}, x))).sum()

    found, expected = (
        jax.value_and_grad(value, (1, 2))(net, params, x) for net in nets
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        found,
        expected,
    )


def test_it_depends_on_image_time_and_tokens(small):
    _, apply = small
    y = apply(X, TIME, TOKENS)
    assert y.shape == X.shape and jnp.isfinite(y).all()
    for change in (
        (X + 0.1, TIME, TOKENS),
        (X, TIME + 0.25, TOKENS),
        (X, TIME, 2 - TOKENS),
    ):
        assert (jnp.abs(apply(*change) - y).max((1, 2, 3)) > 1e-4).all()
    # The rows of a batch do not see each other.
    other = apply(X.at[1].set(0.0), TIME.at[1].set(9.0), TOKENS.at[1].set(1))
    np.testing.assert_allclose(other[0], y[0], rtol=1e-4, atol=1e-5)


def test_every_pixel_sees_every_other(small):
    _, apply = small
    moved = apply(X.at[:, 0, 0].add(3.0), TIME, TOKENS) - apply(X, TIME, TOKENS)
    assert (jnp.abs(moved) > 0).all()


def test_dropout_in_training_only(small):
    _, apply = small
    y = apply(X, TIME, TOKENS)
    np.testing.assert_array_equal(apply(X, TIME, TOKENS, jax.random.key(5)), y)
    first, again, other = (
        apply(X, TIME, TOKENS, key, train=True) for key in (KEY, KEY, jax.random.key(5))
    )
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - y).max() > 1e-3 and jnp.abs(first - other).max() > 1e-3


def test_without_dropout_training_is_the_same_program_and_needs_no_key(small):
    net = UNet(**{**SMALL, "dropout": 0.0})

    def program(train):
        apply = functools.partial(net.apply, train=train)
        return str(jax.make_jaxpr(apply)({"params": small[0]}, X, TIME, TOKENS))

    assert program(True) == program(False)


def test_sequences_of_one_token_are_that_token(small):
    _, apply = small
    y = apply(X, TIME, jnp.array([[0, 0], [0, 2]]))
    np.testing.assert_allclose(y, apply(X, TIME, TOKENS), rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_parameters_and_output_in_float32(small):
    params, apply = small
    net = UNet(**SMALL, dtype=jnp.bfloat16)
    (y, made) = shapes(net, X, TOKENS)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((y, made))}
    assert kinds == {jnp.dtype("float32")}
    found = jax.jit(net.apply)({"params": params}, X, TIME, TOKENS)
    full = apply(X, TIME, TOKENS)
    error = jnp.linalg.norm(found - full) / jnp.linalg.norm(full)
    assert 0 < error < 0.05


def test_every_parameter_gets_a_gradient(small):
    params, _ = small
    net = UNet(**SMALL)

    @jax.jit
    @jax.grad
    def grad(params):
        return jnp.square(net.apply({"params": params}, X, TIME, TOKENS) - X).mean()

    for path, g in jax.tree_util.tree_flatten_with_path(grad(params))[0]:
        assert jnp.isfinite(g).all() and jnp.abs(g).max() > 0, path


@pytest.mark.parametrize("train", [False, True])
def test_an_odd_size_below_a_level(train):
    net = UNet(**{**SMALL, "vocab": 0})
    y = jax.eval_shape(
        lambda x, t: net.init_with_output(
            {"params": KEY, "dropout": KEY}, x, t, train=train
        )[0],
        jnp.zeros((2, 14, 10, 3)), TIME,
    )  # fmt: skip
    assert y.shape == (2, 14, 10, 3)


def block(fan_in, out, embedded):
    """Two norms and convolutions, the condition, and a shortcut where channels change."""
    convs = 9 * fan_in * out + out + 9 * out * out + out
    shortcut = fan_in * out + out if fan_in != out else 0
    return 2 * fan_in + 2 * out + convs + embedded * out + out + shortcut


def test_count_in_closed_form():
    c, e = 8, 32
    time = (c * e + e) + (e * e + e)
    attention = 2 * 16 + 4 * 16 * 16 + 3 * 16
    down = block(8, 8, e) + (9 * 8 * 8 + 8) + block(8, 16, e) + attention
    middle = 2 * block(16, 16, e) + attention
    # Skips of 16, 8 (halved), then 8, 8 (stem) channels.
    up = block(32, 16, e) + block(24, 16, e) + 2 * attention + (9 * 16 * 16 + 16)
    up += block(24, 8, e) + block(16, 8, e)
    ends = (9 * 1 * 8 + 8) + 2 * 8 + (9 * 8 * 1 + 1)
    total = time + down + middle + up + ends
    assert count(shapes(UNet(**{**SMALL, "vocab": 0}), X)[1]) == total
    assert count(shapes(UNet(**SMALL), X, TOKENS)[1]) == total + 3 * e


def test_the_net_of_ddpm_for_cifar10():
    net = UNet(128, (1, 2, 2, 2), 2, dropout=0.1, groups=32)
    y, made = shapes(net, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32))
    assert y.shape == (2, 32, 32, 3)
    # DDPM's released net has 35 746 307, six attentions of which have a key bias of 256.
    assert count(made) == 35_746_307 - 6 * 256
    attended = sorted(name for name in made["params"] if "attention" in name)
    assert attended == [
        "down_1_attention_0", "down_1_attention_1", "middle_attention",
        "up_1_attention_0", "up_1_attention_1", "up_1_attention_2",
    ]  # fmt: skip


@pytest.mark.parametrize("attention", [(), (0, 1)])
def test_rules_fit_with_attention_and_without(attention):
    net = UNet(**{**SMALL, "vocab": 0, "attention": attention})
    params = shapes(net, X)[1]["params"]
    state = State(jnp.zeros(()), params, (), (), jax.random.key(0))
    grid = meshes.make_mesh({"data": 4, "model": 2})
    specs = meshes.state_shardings(state, unet.RULES, grid).params
    assert specs["down_0_block_0"]["conv_0"]["kernel"].spec[3] == "model"
    assert specs["up_1_block_1"]["conv_1"]["kernel"].spec[2] == "model"
    whole = [name for name in ("stem", "last", "down_0_conv", "up_1_conv", "norm")]
    leaves = [s for name in whole for s in jax.tree.leaves(specs[name])]
    assert all(s.is_fully_replicated for s in leaves)
    split = sum(not s.is_fully_replicated for s in jax.tree.leaves(specs))
    attentions = len([name for name in params if "attention" in name])
    blocks = len([name for name in params if "block" in name])
    # Kernels, then biases and a norm's two vectors.
    assert split == (3 + 4) * blocks + (4 + 2) * attentions + (2 + 1)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"multipliers": (1, 2, 2, 2, 2)},
            r"8 x 8 cannot be halved 4 times .*5 levels",
        ),
        ({"multipliers": ()}, "multipliers, blocks"),
        ({"multipliers": (1, 0)}, "multipliers, blocks"),
        ({"blocks": 0}, "blocks, groups and heads >= 1"),
        ({"groups": 3}, "channels=8 must be a multiple of groups=3"),
        ({"attention": (2,)}, r"attention=\(2,\) names levels other than 0 \.\. 1"),
        ({"heads": 3}, "heads=3 must divide the channels"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"vocab": 0}, "vocab=0 takes no tokens"),
        ({"vocab": 2}, r"tokens must be in 0 \.\. 1, got 0 to 2"),
    ],
)
def test_refuses(options, message):
    net = UNet(**{**SMALL, "attention": (), **options})
    if "heads" in options:
        net = net.clone(attention=(1,))
    with pytest.raises(ValueError, match=message):
        net.init(jax.random.key(0), X, TIME, TOKENS)


def test_refuses_missing_tokens_and_odd_sides():
    with pytest.raises(ValueError, match="vocab=3 needs tokens"):
        UNet(**SMALL).init(jax.random.key(0), X, TIME)
    with pytest.raises(ValueError, match="7 x 8 cannot be halved 1 times"):
        UNet(**SMALL).init(jax.random.key(0), X[:, :7], TIME, TOKENS)
