"""The Llama block against closed forms, its options against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.nets.transformer import RMSNorm, Transformer, rope

TOKENS = jax.random.randint(jax.random.key(1), (2, 12), 0, 40)
SMALL = {"vocab_size": 40, "width": 32, "layers": 2, "heads": 4}


def build(**options):
    net = Transformer(**{**SMALL, **options})
    params = net.init(jax.random.key(0), TOKENS)["params"]
    if "head" in params:  # It starts at zero, which would hide everything below it.
        noise = jax.random.normal(jax.random.key(2), params["head"]["kernel"].shape)
        params["head"]["kernel"] = noise * 0.2
    return net, params


def test_rope_depends_on_distance_only(key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 8))

    def score(i, j):
        a, b = (rope(x, jnp.array([p]), 100.0) for x, p in ((q, i), (k, j)))
        return float((a * b).sum())

    assert score(3, 1) == pytest.approx(score(9, 7), abs=1e-5)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-3)


def test_rope_turns_by_position_times_frequency():
    x = jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    y = rope(x, jnp.array([5]), 100.0).ravel()
    np.testing.assert_allclose(y, [np.cos(5.0), 0, np.sin(5.0), 0], atol=1e-6)
    x = jnp.array([0.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    y = rope(x, jnp.array([5]), 100.0).ravel()
    np.testing.assert_allclose(y, [0, np.cos(0.5), 0, np.sin(0.5)], atol=1e-6)


def test_rms_norm_against_numpy(key):
    x = jax.random.normal(key, (3, 8)) * 5
    norm = RMSNorm(1e-6)
    params = {"params": {"scale": jnp.arange(1.0, 9.0)}}
    expected = x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)
    expected = expected * np.arange(1.0, 9.0)[None]
    np.testing.assert_allclose(norm.apply(params, x), expected, rtol=1e-5)
    half = norm.apply(params, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 2, "qk_norm": True}, {"tied": True}]
)
def test_causal_and_cache_equals_full(options):
    net, params = build(**options)
    full = net.apply({"params": params}, TOKENS)
    changed = net.apply({"params": params}, TOKENS.at[:, 8].set(0))
    np.testing.assert_array_equal(full[:, :8], changed[:, :8])
    assert np.abs(full[:, 8:] - changed[:, 8:]).max() > 1e-3
    cache = net.init_cache(2, 12)
    first, cache = net.apply({"params": params}, TOKENS[:, :5], cache)
    rest = []
    for i in range(5, 12):
        logits, cache = net.apply({"params": params}, TOKENS[:, i : i + 1], cache)
        rest.append(logits)
    decoded = jnp.concatenate([first, *rest], axis=1)
    np.testing.assert_allclose(decoded, full, atol=2e-5)
    assert int(cache.length) == 12


def test_grouped_heads_equal_repeated_ones():
    """GQA is attention whose K and V kernels are repeated over the heads of a group."""
    net, params = build(kv_heads=2)
    repeated, other = build()
    attention = params["layers"]["attention"]
    for name in ("key", "value"):
        kernel = attention[name]["kernel"].reshape(2, 32, 2, 8)
        kernel = jnp.repeat(kernel, 2, axis=2).reshape(2, 32, 32)
        other["layers"]["attention"][name]["kernel"] = kernel
    for name in ("query", "out"):
        other["layers"]["attention"][name] = attention[name]
    for name in ("mlp", "attention_norm", "mlp_norm"):
        other["layers"][name] = params["layers"][name]
    for name in ("embed", "norm", "head"):
        other[name] = params[name]
    np.testing.assert_allclose(
        net.apply({"params": params}, TOKENS),
        repeated.apply({"params": other}, TOKENS),
        atol=1e-5,
    )


def test_remat_and_unroll_change_nothing():
    net, params = build()

    def gradient(**options):
        net = Transformer(**{**SMALL, **options})
        return jax.grad(lambda p: net.apply({"params": p}, TOKENS).var())(params)

    plain = gradient()
    for options in ({"remat": True}, {"unroll": 2}):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            plain,
            gradient(**options),
        )


def test_bfloat16_computes_in_half_and_keeps_float32_parameters():
    net, params = build(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = net.apply({"params": params}, TOKENS)
    assert logits.dtype == jnp.float32
    full = Transformer(**SMALL).apply({"params": params}, TOKENS)
    error = np.abs(logits - full).max() / np.abs(full).max()
    assert 1e-5 < error < 0.05


def test_zero_init_starts_as_the_identity():
    net, params = build(init_residual="zero")
    other = jax.tree.map(lambda x: x, params)
    other["layers"]["mlp"]["gate"]["kernel"] *= 3.0
    np.testing.assert_array_equal(
        net.apply({"params": params}, TOKENS), net.apply({"params": other}, TOKENS)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30}, "multiple of heads"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"head_dim": 5}, "even"),
    ],
)
def test_bad_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**{**SMALL, **options}).sizes()
