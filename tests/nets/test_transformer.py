"""The Llama block against closed forms, its options against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers.nets.block import LayerNorm
from jaxpapers.nets.rope import Scaling, frequencies
from jaxpapers.nets.transformer import RMSNorm, Stack, Transformer, look_up, rope
from tests.programs import KEY, params_like, together

TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 12)), jnp.int32)
SMALL = {"vocab_size": 40, "width": 32, "layers": 2, "heads": 4}


def build(**options):
    net = Transformer(**{**SMALL, **options})
    # Drawn, not initialised: zeros would hide everything below them.
    return net, params_like(net.init, KEY, TOKENS)["params"]


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_rope_depends_on_distance_only():
    @jax.jit
    def score(qk, positions):
        a, b = (rope(x, p[None], 100.0) for x, p in zip(qk, positions))
        return (a * b).sum()

    qk = normal(2, 1, 1, 1, 8)
    at = {pair: float(score(qk, np.array(pair))) for pair in ((3, 1), (9, 7), (3, 2))}
    assert at[3, 1] == pytest.approx(at[9, 7], abs=1e-5)
    assert at[3, 1] != pytest.approx(at[3, 2], abs=1e-3)


def test_rope_turns_by_position_times_frequency():
    turned = jax.jit(lambda x: rope(x.reshape(1, 1, 1, 4), jnp.asarray([5]), 100.0))
    first, second = np.eye(4, dtype=np.float32)[:2]
    expected = [np.cos(5.0), 0, np.sin(5.0), 0]
    np.testing.assert_allclose(turned(first).ravel(), expected, atol=1e-6)
    expected = [0, np.cos(0.5), 0, np.sin(0.5)]
    np.testing.assert_allclose(turned(second).ravel(), expected, atol=1e-6)


def test_rms_norm_against_numpy():
    x, norm = normal(3, 8) * 5, RMSNorm(1e-6)
    params = {"params": {"scale": np.arange(1, 9, dtype=np.float32)}}
    y, half = together(
        lambda x: [norm.apply(params, x), norm.apply(params, x.astype(jnp.bfloat16))], x
    )
    expected = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, expected * np.arange(1.0, 9.0), rtol=1e-5)
    assert half.dtype == jnp.bfloat16


def test_layer_norm_against_numpy():
    x, norm = normal(3, 8) * 5 + 1, LayerNorm(1e-5)
    scale, bias = np.arange(1, 9, dtype=np.float32), np.ones(8, np.float32)
    params = {"params": {"scale": scale, "bias": bias}}
    y = together(lambda x: norm.apply(params, x), x)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_scaled_frequencies():
    """Llama 3: short wavelengths are kept, long ones divided, between them mixed."""
    scaling = Scaling(kind="llama3", factor=8.0, trained=64)
    linear = Scaling(kind="linear", factor=4.0)
    plain, scaled, slow = together(
        lambda: [frequencies(16, 500.0, s) for s in (None, scaling, linear)]
    )
    np.testing.assert_allclose(slow, plain / 4, rtol=1e-6)
    wave = 2 * np.pi / plain
    share = np.clip((64 / wave - 1) / 3, 0, 1)
    expected = np.select(
        [wave < 16, wave > 64],
        [plain, plain / 8],
        (1 - share) * plain / 8 + share * plain,
    )
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)
    assert set(np.sign(np.diff([wave[0], 16, 64, wave[-1]]))) == {1.0}
    assert ((wave > 16) & (wave < 64)).any()


KINDS = {
    "gpt2": {"norm": "layer", "mlp": "gelu", "bias": "all", "position": "none"},
    "qwen2": {"bias": "qkv", "kv_heads": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_changes_nothing(kind):
    """Rows have positions of their own and a mask of the keys; with a cache too."""
    net, params = build(**KINDS[kind])
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert "bias" in names
    mask = np.ones((2, 12), bool)
    mask[1, :4] = False
    positions = jnp.maximum(mask.cumsum(1) - 1, 0)
    keys = jnp.broadcast_to(mask[:, None], (2, 12, 12))

    def states(params):
        def apply(tokens, *args, **kwargs):
            return net.apply({"params": params}, tokens, *args, **kwargs, hidden=True)

        padded = apply(TOKENS, positions=positions, mask=keys)
        alone = apply(TOKENS[1:, 4:])
        cache = net.init_cache(2, 12)
        parts = []
        for part in (slice(0, 7), slice(7, 12)):
            y, cache = apply(
                TOKENS[:, part], cache, positions=positions[:, part], mask=keys[:, part]
            )
            parts.append(y)
        return padded, alone, jnp.concatenate(parts, 1)

    padded, alone, cached = together(states, params)
    assert padded.shape == (2, 12, 32)
    np.testing.assert_allclose(padded[1:, 4:], alone, atol=2e-5)
    np.testing.assert_allclose(cached[:, 4:], padded[:, 4:], atol=2e-5)


def test_stack_is_the_transformer_between_embedding_and_head():
    """A looped model calls it many times; not causal, every position sees every other."""
    net, params = build(causal=False)
    stack = Stack(net.kind, net.layers)
    own = {name: params[name] for name in ("layers", "norm")}
    other = TOKENS.at[:, 8].set((TOKENS[:, 8] + 1) % 40)

    def states(params, own):
        x = params["embed"]["embedding"][TOKENS]
        return (
            stack.apply({"params": own}, x) @ params["head"]["kernel"],
            net.apply({"params": params}, TOKENS),
            net.apply({"params": params}, other),
        )

    by_stack, logits, changed = together(states, params, own)
    np.testing.assert_allclose(by_stack, logits, atol=2e-5)
    assert np.abs(logits - changed).max(axis=(0, 2)).min() > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.matrix),
        {"kv_heads": 2, "qk_norm": True},
        pytest.param({"tied": True}, marks=pytest.mark.matrix),
    ],
)
def test_causal_and_cache_equals_full(options):
    net, params = build(**options)
    other = TOKENS.at[:, 8].set((TOKENS[:, 8] + 1) % 40)
    apply = functools.partial(
        jax.jit(lambda params, *args: net.apply({"params": params}, *args)), params
    )
    full, changed = (np.asarray(apply(x)) for x in (TOKENS, other))
    np.testing.assert_array_equal(full[:, :8], changed[:, :8])
    assert np.abs(full[:, 8:] - changed[:, 8:]).max() > 1e-3
    logits, cache = apply(TOKENS[:, :5], net.init_cache(2, 12))
    decoded = [logits]
    for i in range(5, 12):
        logits, cache = apply(TOKENS[:, i : i + 1], cache)
        decoded.append(logits)
    np.testing.assert_allclose(np.concatenate(decoded, axis=1), full, atol=2e-5)
    assert int(cache.length) == 12


@pytest.mark.matrix
def test_grouped_heads_equal_repeated_ones():
    """GQA is attention whose K and V kernels are repeated over the heads of a group."""
    net, params = build(kv_heads=2)
    repeated, other = build()
    attention = params["layers"]["attention"]
    for name in ("key", "value"):
        kernel = attention[name]["kernel"].reshape(2, 32, 2, 8)
        kernel = np.repeat(kernel, 2, axis=2).reshape(2, 32, 32)
        other["layers"]["attention"][name]["kernel"] = kernel
    for name in ("query", "out"):
        other["layers"]["attention"][name] = attention[name]
    for name in ("mlp", "attention_norm", "mlp_norm"):
        other["layers"][name] = params["layers"][name]
    for name in ("embed", "norm", "head"):
        other[name] = params[name]
    grouped, plain = together(
        lambda p, q: (net.apply({"params": p}, TOKENS),
                      repeated.apply({"params": q}, TOKENS)),
        params, other,
    )  # fmt: skip
    np.testing.assert_allclose(grouped, plain, atol=1e-5)


@pytest.mark.matrix
def test_remat_and_unroll_change_nothing():
    net, params = build()

    def gradient(params, **options):
        net = Transformer(**{**SMALL, **options})
        return jax.grad(lambda p: net.apply({"params": p}, TOKENS).var())(params)

    variants = ({}, {"remat": True}, {"unroll": 2})
    plain, *others = (
        together(functools.partial(gradient, **options), params) for options in variants
    )
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, other
        )


@pytest.mark.matrix
def test_bfloat16_computes_in_half_and_keeps_float32_parameters():
    net, params = build(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits, full = together(
        lambda p: [x.apply({"params": p}, TOKENS) for x in (net, Transformer(**SMALL))],
        params,
    )
    assert logits.dtype == jnp.float32
    error = np.abs(logits - full).max() / np.abs(full).max()
    assert 1e-5 < error < 0.05


@pytest.mark.matrix
def test_zero_init_starts_as_the_identity(key):
    net = Transformer(**SMALL, init_residual="zero")
    head = normal(32, 40)

    def logits(key):
        params = net.init(key, TOKENS)["params"]
        params["head"]["kernel"] = head
        gate = params["layers"]["mlp"]["gate"]
        scaled = {**gate, "kernel": 3 * gate["kernel"]}
        mlp = {**params["layers"]["mlp"], "gate": scaled}
        other = {**params, "layers": {**params["layers"], "mlp": mlp}}
        return [net.apply({"params": p}, TOKENS) for p in (params, other)]

    plain, other = together(logits, key)
    np.testing.assert_array_equal(plain, other)
    assert plain.std() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "multiple of net.heads"),
        ({"kv_heads": 3}, "multiple of net.kv_heads"),
        ({"head_dim": 5}, "even"),
        ({"norm": "batch"}, "net.norm must be rms or layer, got 'batch'"),
        ({"bias": "some"}, "net.bias must be none or qkv or all"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**{**SMALL, **options}).sizes()


def test_bad_scaling_of_rope():
    with pytest.raises(ValueError, match="linear or llama3, got 'yarn'"):
        Scaling(kind="yarn", factor=8.0)
    with pytest.raises(ValueError, match="0 < low < high"):
        Scaling(kind="llama3", factor=8.0, low=4.0)


@pytest.mark.parametrize(
    "axes, batch, width",
    [
        ({"data": 4, "model": 2}, 8, 16),
        ({"slice": 2, "data": 2, "model": 2}, 8, 16),
        # Neither the batch nor the width divides over `data`.
        ({"data": 4, "model": 2}, 6, 16),
        ({"data": 4, "model": 2}, 8, 6),
    ],
)
def test_looking_up_on_a_mesh(axes, batch, width):
    """Rows and gradient are those of one device; the gradient lies as the weight."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(10, width)).astype(np.float32)
    tokens = rng.integers(0, 10, (batch, 5), np.int32)
    weight = rng.normal(size=(batch, 5, width)).astype(np.float32)

    def value(table, tokens):
        rows = look_up(table, tokens)
        return (rows * weight).sum(), rows

    f = jax.jit(jax.value_and_grad(value, has_aux=True))
    with jax.set_mesh(meshes.make_mesh(axes)):
        (_, rows), grad = f(table, tokens)
    np.testing.assert_array_equal(rows, table[tokens])
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, weight)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-5)
    if batch == 8 and width == 16:
        assert grad.sharding.shard_shape(grad.shape) == (5, width // axes["data"])
