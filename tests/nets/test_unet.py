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
from tests.programs import KEY, params_like, together

SMALL = {"channels": 8, "groups": 4, "dropout": 0.5, "vocab": 3, "heads": 2}
X = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)
TIME = np.float32([3.0, 616.734])
TOKENS = np.int32([0, 2])
MATRIX = functools.partial(pytest.param, marks=pytest.mark.matrix)


@functools.cache
def shapes(net, size=X.shape, tokens=True):
    """Of the output and the parameters."""
    x = jax.ShapeDtypeStruct(size, jnp.float32)
    time = jax.ShapeDtypeStruct(size[:1], jnp.float32)
    return jax.eval_shape(
        net.init_with_output, KEY, x, time, TOKENS if tokens else None
    )


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def params():
    """All drawn: as initialised, the last layer is zero and hides what is below it."""
    return params_like(lambda: shapes(UNet(**SMALL))[1]["params"])


def changed(x, row, column, value):
    x = x.copy()
    x[row, column, column] = value
    return x


# Another image, time, tokens, and what else is varied.
CALLS = {
    "base": {},
    "again": {},
    "image": {"x": X + 0.1},
    "time": {"time": TIME + 0.25},
    "tokens": {"tokens": 2 - TOKENS},
    "pixel": {"x": changed(X, slice(None), 0, 3.0)},
    "other row": {
        "x": changed(X, 1, slice(None), 0.0), "time": np.float32([3, 9]),
        "tokens": np.int32([0, 1]),
    },
    "dropout": {"seed": np.uint32(5)},
}  # fmt: skip


@pytest.fixture(scope="module")
def outputs(params):
    """The net's outputs in training: of every call, and with a parameter changed."""
    net = UNet(**SMALL)
    leaves, tree = jax.tree.flatten(params)
    once = np.ones(len(leaves), np.float32)
    base = {
        "x": X, "time": TIME, "tokens": TOKENS, "seed": np.uint32(4), "factors": once,
    }  # fmt: skip
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)]
    changes = {
        name: {"factors": once + 0.5 * row}
        for name, row in zip(names, np.eye(len(names), dtype=np.float32))
    }
    zero = np.float32(["last" not in name for name in names])

    def program(leaves, calls):
        def call(c):
            params = tree.unflatten([v * f for v, f in zip(leaves, c["factors"])])
            return net.apply(
                {"params": params}, c["x"], c["time"], c["tokens"], train=True,
                rngs={"dropout": jax.random.key(c["seed"])},
            )  # fmt: skip

        return jax.lax.map(call, calls)

    calls = {**CALLS, **changes, "zero": {"factors": zero}}
    stacked = [{**base, **change} for change in calls.values()]
    y = together(program, leaves, jax.tree.map(lambda *v: np.stack(v), *stacked))
    return dict(zip(calls, y))


def test_group_norm_is_that_of_flax():
    """Values and gradients, of images whose mean is not 0."""
    x, weight = np.random.default_rng(0).normal(size=(2, 2, 4, 6, 8)).astype(np.float32)
    scale, bias = np.linspace([0.5, -1], [2, 1], 8, dtype=np.float32).T
    nets = unet.GroupNorm(4, jnp.float32), nn.GroupNorm(4, epsilon=1e-6)

    def value(params, x, net):
        return (weight * jnp.sin(net.apply({"params": params}, x))).sum()

    values, expected = together(
        lambda params, x: [
            jax.value_and_grad(value, (0, 1))(params, x, net) for net in nets
        ],
        {"scale": scale, "bias": bias}, 3 + 2 * x,
    )  # fmt: skip
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        values,
        expected,
    )


def test_it_depends_on_image_time_and_tokens(outputs):
    y = outputs
    assert y["base"].shape == X.shape and np.isfinite(y["base"]).all()
    for change in ("image", "time", "tokens"):
        assert (np.abs(y[change] - y["base"]).max((1, 2, 3)) > 1e-4).all(), change
    # The rows of a batch do not see each other.
    np.testing.assert_allclose(y["other row"][0], y["base"][0], rtol=1e-4, atol=1e-5)
    assert np.abs(y["other row"][1] - y["base"][1]).max() > 1e-4
    # Every pixel sees every other.
    assert (np.abs(y["pixel"] - y["base"]) > 0).all()
    np.testing.assert_array_equal(y["zero"], 0 * X)


def test_every_parameter_matters(outputs):
    parameters = set(outputs) - {*CALLS, "zero"}
    assert len(parameters) > 90
    for name in parameters:
        assert np.abs(outputs[name] - outputs["base"]).max() > 1e-5, name


@pytest.mark.matrix
def test_every_parameter_gets_a_gradient(params):
    net = UNet(**SMALL)

    def loss(params, x, *inputs):
        return jnp.square(net.apply({"params": params}, x, *inputs) - x).mean()

    grads = together(jax.grad(loss), params, X, TIME, TOKENS)
    for path, g in jax.tree.leaves_with_path(grads):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, path


def test_dropout_in_training(outputs):
    y = outputs
    np.testing.assert_array_equal(y["base"], y["again"])
    assert np.abs(y["base"] - y["dropout"]).max() > 1e-3


@pytest.mark.matrix
def test_dropout_in_training_only():
    """Else it is the program of a net without dropout, and needs no key."""

    def program(dropout, train):
        net = UNet(8, (1,), attention=(), dropout=dropout)
        apply = functools.partial(net.init_with_output, train=train)
        return str(jax.make_jaxpr(apply)(KEY, jnp.asarray(X), jnp.asarray(TIME)))

    assert program(0.5, False) == program(0.0, True)


@pytest.mark.matrix
def test_sequences_of_one_token_are_that_token(params):
    net = UNet(**SMALL)

    def program(params, *inputs):
        return [
            net.apply({"params": params}, *inputs, jnp.asarray(tokens))
            for tokens in (TOKENS, np.int32([[0, 0], [0, 2]]))
        ]

    single, sequence = together(program, params, X, TIME)
    np.testing.assert_allclose(sequence, single, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_parameters_and_output_in_float32():
    net = UNet(8, (1,), attention=(0,), vocab=3, dtype=jnp.bfloat16)
    made = shapes(net)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}


@pytest.mark.matrix
def test_bfloat16_is_close_to_float32(params):
    def program(params, *inputs):
        return [
            UNet(**SMALL, dtype=dtype).apply({"params": params}, *inputs)
            for dtype in (jnp.float32, jnp.bfloat16)
        ]

    full, half = together(program, params, X, TIME, TOKENS)
    assert 0 < np.linalg.norm(half - full) / np.linalg.norm(full) < 0.05


@pytest.mark.matrix
@pytest.mark.parametrize("train", [True, MATRIX(False)])
def test_an_odd_size_below_a_level(train):
    net = UNet(8, dropout=0.5, attention=())
    y = jax.eval_shape(
        lambda key, x, t: net.init_with_output(
            {"params": key, "dropout": key}, x, t, train=train
        )[0],
        KEY, np.zeros((2, 14, 10, 3), np.float32), TIME,
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
    assert count(shapes(UNet(**{**SMALL, "vocab": 0}), tokens=False)[1]) == total
    assert count(shapes(UNet(**SMALL))[1]) == total + 3 * e


@pytest.mark.matrix
def test_the_net_of_ddpm_for_cifar10():
    net = UNet(128, (1, 2, 2, 2), 2, dropout=0.1, groups=32)
    y, made = shapes(net, (2, 32, 32, 3), tokens=False)
    assert y.shape == (2, 32, 32, 3)
    # DDPM's released net has 35 746 307, six attentions of which have a key bias of 256.
    assert count(made) == 35_746_307 - 6 * 256
    attended = sorted(name for name in made["params"] if "attention" in name)
    assert attended == [
        "down_1_attention_0", "down_1_attention_1", "middle_attention",
        "up_1_attention_0", "up_1_attention_1", "up_1_attention_2",
    ]  # fmt: skip


@pytest.mark.parametrize("attention", [(1,), MATRIX(()), MATRIX((0, 1))])
def test_rules_fit_with_attention_and_without(attention):
    net = UNet(**{**SMALL, "vocab": 0, "attention": attention})
    params = shapes(net, tokens=False)[1]["params"]
    state = State(np.zeros(()), params, (), (), KEY)
    grid = meshes.make_mesh({"data": 4, "model": 2})
    specs = meshes.state_shardings(state, unet.RULES, grid).params
    assert specs["down_0_block_0"]["conv_0"]["kernel"].spec[3] == "model"
    assert specs["up_1_block_1"]["conv_1"]["kernel"].spec[2] == "model"
    whole = [name for name in ("stem", "last", "down_0_conv", "up_1_conv", "norm")]
    leaves = [s for name in whole for s in jax.tree.leaves(specs[name])]
    assert all(s.is_fully_replicated for s in leaves)
    split = sum(not s.is_fully_replicated for s in jax.tree.leaves(specs))
    attended = [name for name in params if "attention" in name]
    each = {(): 0, (1,): 1 + 2 + 1, (0, 1): 2 + 4 + 1}  # Down, up, the middle's.
    assert len(attended) == each[attention]
    blocks = len([name for name in params if "block" in name])
    # Kernels, then biases and a norm's two vectors.
    assert split == (3 + 4) * blocks + (4 + 2) * len(attended) + (2 + 1)


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
    tokens = jnp.asarray(TOKENS)  # Their values are checked.
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *inputs: net.init(*inputs, tokens), KEY, X, TIME)


def test_refuses_missing_tokens_and_odd_sides():
    with pytest.raises(ValueError, match="vocab=3 needs tokens"):
        jax.eval_shape(UNet(**SMALL).init, KEY, X, TIME)
    with pytest.raises(ValueError, match="7 x 8 cannot be halved 1 times"):
        jax.eval_shape(UNet(**SMALL).init, KEY, X[:, :7], TIME, TOKENS)
