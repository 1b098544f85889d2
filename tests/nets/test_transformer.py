"""The Llama block against closed forms, its options against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.nets.transformer import RMSNorm, Transformer, rope
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
    other = np.array(TOKENS)
    other[:, 8] = (other[:, 8] + 1) % 40
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
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**{**SMALL, **options}).sizes()
