"""Decoding against full forward passes, drawing against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers import mesh as meshes
from jaxpapers.method import param_spec, path_name
from jaxpapers.nets import decoding, transformer
from jaxpapers.nets.decoding import Options, generate
from jaxpapers.nets.transformer import Transformer
from tests.programs import KEY, params_like, together

SMALL = {"vocab_size": 24, "width": 16, "layers": 2, "heads": 4, "hidden": 24}
KINDS = {
    "llama": {"kv_heads": 2},
    "qwen2": {"kv_heads": 2, "bias": "qkv", "tied": True},
    "qwen3": {"kv_heads": 2, "head_dim": 8, "qk_norm": True},
}
PROMPT = np.random.default_rng(1).integers(0, 24, (4, 6)).astype(np.int32)
LENGTHS = (6, 4, 1, 3)


def build(**fields):
    net = Transformer(**{**SMALL, **fields})
    params = params_like(net.init, KEY, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    params = params["params"]
    # Larger matrices: the likeliest token is not the last one.
    return net, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


def padded(side):
    """Prompts of the lengths above, with other tokens as padding."""
    ids, mask = np.full((4, 7), 5, np.int32), np.zeros((4, 7), bool)
    for i, n in enumerate(LENGTHS):
        at = slice(7 - n, 7) if side == "left" else slice(0, n)
        ids[i, at], mask[i, at] = PROMPT[i, :n], True
    return jnp.asarray(ids), jnp.asarray(mask)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_the_full_forward(kind):
    """Rows of four lengths: every token is the likeliest of a forward without a cache."""
    net, params = build(**KINDS[kind])
    ids, mask = padded("left")
    run = functools.partial(generate, net, options=Options(length=4))
    result = together(lambda p: run(p, ids, mask=mask), params)
    assert result.lengths.tolist() == [4] * 4 and not result.stopped.any()
    assert len({tuple(x) for x in result.tokens}) > 1
    tokens = jnp.asarray(result.tokens)
    text = jnp.concatenate([ids, tokens], 1)
    real = jnp.pad(mask, ((0, 0), (0, 4)), constant_values=True)
    right, scan = padded("right"), Options(length=4, unstack=False)

    def compute(params):
        positions = jnp.maximum(jnp.cumsum(real, 1) - 1, 0).astype(jnp.int32)
        keys = jnp.broadcast_to(real[:, None], (4, 11, 11))
        full = net.apply({"params": params}, text, positions=positions, mask=keys)
        alone = net.apply({"params": params}, text[1:2, 3:])
        first, step, carry = decoding.prefill(net, params, ids, 4, mask)
        each = [first]
        for i in range(3):
            y, carry = step(tokens[:, i], carry)
            each.append(y)
        others = []
        if kind == "qwen3":  # Padded on the right, unstacked before, scanned.
            others = [
                run(params, right[0], mask=right[1]).tokens,
                run(decoding.unstacked(net, params), ids, mask=mask).tokens,
                generate(net, params, ids, mask=mask, options=scan).tokens,
            ]
        return full[:, 6:10], alone[0, 3:7], jnp.stack(each, 1), others

    full, alone, steps, others = together(compute, params)
    np.testing.assert_array_equal(full.argmax(-1), result.tokens)
    np.testing.assert_allclose(steps, full, rtol=0, atol=1e-4)
    np.testing.assert_allclose(alone, full[1], rtol=0, atol=1e-4)
    for other in others:
        np.testing.assert_array_equal(other, result.tokens)


def test_sharded_equals_single():
    """Rows over four devices, heads over two; logits of the steps and tokens."""
    net, params = build(kv_heads=2)
    ids, mask = padded("left")

    def answers(params, ids, mask):
        first, step, carry = decoding.prefill(
            net, decoding.unstacked(net, params), ids, 4, mask
        )
        second, _ = step(first.argmax(-1).astype(jnp.int32), carry)
        drawn = generate(net, params, ids, mask=mask, options=Options(length=4))
        return first, second, drawn.tokens

    single = together(answers, params, ids, mask)
    mesh = meshes.make_mesh({"data": 4, "model": 2})
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.NamedSharding(
            mesh, param_spec(transformer.RULES, path_name(path))
        ),
        params,
    )
    rows = jax.NamedSharding(mesh, jax.P("data"))
    with jax.set_mesh(mesh):
        program = jax.jit(answers, in_shardings=(shardings, rows, rows))
        compiled = program.lower(params, ids, mask).compile()
        assert "all-reduce" in compiled.as_text()
        sharded = jax.device_get(compiled(*jax.device_put(
            (params, ids, mask), (shardings, rows, rows)
        )))  # fmt: skip
    np.testing.assert_array_equal(single[2], sharded[2])
    for a, b in zip(single[:2], sharded[:2]):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_rows_end_by_a_token_or_a_string():
    """The tokens before the end are those of a run without it; the others are padding."""
    net, params = build()
    ids, mask = padded("left")
    plain = together(
        lambda p: generate(net, p, ids, mask=mask, options=Options(length=6)), params
    ).tokens
    stop = int(plain[0, 2])
    # An automaton that ends at this token of row 1 followed by the next.
    a, b = int(plain[1, 1]), int(plain[1, 2])
    table = np.zeros((3, 24), np.int32)
    table[:, a], table[1, b], table[2] = 1, 2, 2

    def answers(params):
        options = Options(length=6, stop=(stop,), pad=23)
        by_token = generate(net, params, ids, mask=mask, options=options)
        none = mask.at[3].set(False)
        by_string = generate(
            net, params, ids, mask=none, options=Options(length=6, pad=9),
            table=jnp.asarray(table),
        )  # fmt: skip
        return by_token, by_string

    by_token, by_string = together(answers, params)
    for row, (tokens, n, ended) in enumerate(zip(*by_token)):
        at = np.flatnonzero(plain[row] == stop)
        expected = at[0] + 1 if len(at) else 6
        assert n == expected and ended == bool(len(at))
        np.testing.assert_array_equal(tokens[:n], plain[row, :n])
        assert (tokens[n:] == 23).all()
    pairs = [list(zip(row, row[1:])) for row in plain.tolist()]
    for row in range(3):
        at = [i for i, pair in enumerate(pairs[row]) if pair == (a, b)]
        assert by_string.lengths[row] == (at[0] + 2 if at else 6)
        assert by_string.stopped[row] == bool(at)
    # A row without a token.
    assert by_string.lengths[3] == 0 and not by_string.stopped[3]
    assert (by_string.tokens[3] == 9).all()


def test_draws_from_the_kept_tokens_in_their_proportions():
    share = np.float32([0.4, 0.3, 0.15, 0.1, 0.05])
    logits = jnp.log(jnp.asarray(np.tile(share, (3000, 1))))
    cases = {
        "top_p": (Options(length=1, temperature=1.0, top_p=0.8), [0, 1, 2]),
        "one": (Options(length=1, temperature=1.0, top_p=0.01), [0]),
        "min_p": (Options(length=1, temperature=1.0, min_p=0.3), [0, 1, 2]),
        "both": (Options(length=1, temperature=1.0, top_p=0.8, min_p=0.5), [0, 1]),
        "cold": (Options(length=1, temperature=0.5, vocab_size=3), [0, 1, 2]),
        "greedy": (Options(length=1), [0]),
    }

    def drawn(key):
        return {k: decoding.draw(logits, key, o) for k, (o, _) in cases.items()}

    for name, tokens in together(drawn, jax.random.key(0)).items():
        options, kept = cases[name]
        power = 1 / options.temperature if options.temperature else 1
        expected = np.zeros(5)
        expected[kept] = share[kept] ** power / (share[kept] ** power).sum()
        counts = np.bincount(tokens, minlength=5) / len(tokens)
        np.testing.assert_allclose(counts, expected, atol=0.04, err_msg=name)
        assert set(np.flatnonzero(counts)) == set(kept), name


def test_token_log_probs():
    """Against the logits of all positions; padding counts for nothing."""
    net, params = build(kv_heads=2)
    ids, mask = padded("left")
    text = jnp.asarray(PROMPT)

    def values(params):
        run = functools.partial(decoding.token_log_probs, net, params)
        logits = net.apply({"params": params}, text)
        each = decoding.unstacked(net, params)
        return (
            jax.nn.log_softmax(logits[:, :-1]),
            run(text, chunk=7),
            decoding.token_log_probs(net, each, text),
            run(ids, mask),
            run(text[:, :1]),
        )

    full, chunked, whole, masked, none = together(values, params)
    assert none.shape == (len(PROMPT), 0)
    expected = np.take_along_axis(full, PROMPT[:, 1:, None], 2)[..., 0]
    np.testing.assert_allclose(chunked, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(whole, expected, rtol=0, atol=2e-5)
    for i, n in enumerate(LENGTHS):
        np.testing.assert_allclose(masked[i, 7 - n :], expected[i, : n - 1], atol=2e-5)
        assert not masked[i, : 7 - n].any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 0}, "length must be >= 1"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"temperature": float("nan")}, "temperature must be >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"vocab_size": 0}, "vocab_size must be >= 1"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**{"length": 2, **options})


def test_calls_that_are_refused():
    net, params = build()
    prompt, options = jnp.asarray(PROMPT), Options(length=2)

    def shapes(**arguments):
        call = {"prompt": prompt, "options": options, **arguments}
        return jax.eval_shape(lambda p: generate(net, p, **call), params)

    with pytest.raises(ValueError, match="a prompt of one token at least"):
        shapes(prompt=prompt[:, :0])
    with pytest.raises(ValueError, match="a temperature above 0 needs a key"):
        shapes(options=Options(length=2, temperature=1.0))
    with pytest.raises(ValueError, match="table is for 9 tokens, expected 24"):
        shapes(table=jnp.zeros((2, 9), jnp.int32))
    with pytest.raises(ValueError, match="vocab_size 25 exceeds the 24 logits"):
        shapes(options=Options(length=2, vocab_size=25))
