"""SmolLM2-135M, a real model: recorded logits, its text, its folder in transformers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.data import fetch, tokenizer, weights
from jaxpapers.nets import decoding
from jaxpapers.nets.transformer import Transformer
from tests.programs import together

# Names of tensors of transformers -> parameters and layers.
SLICES = {
    "model.embed_tokens.weight": ("embed/embedding", None),
    "model.layers.0.self_attn.q_proj.weight": ("layers/attention/query/kernel", 0),
    "model.layers.0.self_attn.k_proj.weight": ("layers/attention/key/kernel", 0),
    "model.layers.29.mlp.down_proj.weight": ("layers/mlp/down/kernel", 29),
}


@pytest.fixture(scope="module")
def model():
    folder = fetch.get("smollm2-135m")
    read = weights.load(folder)
    return read, tokenizer.load(folder), Transformer(**read.net)


@pytest.mark.slow
@pytest.mark.parity("lm", only=lambda entry: entry.get("kind") == "gguf")
def test_recorded_logits(case, model):
    read, tok, net = model
    z, tolerance = case.arrays, case.tolerance("logits", otherwise=2e-3)
    flat = dict(weights._flat(read.params))
    dequantised = {k.removeprefix("dequant/") for k in z if k.startswith("dequant/")}
    assert dequantised == set(SLICES)
    for name, (path, layer) in SLICES.items():
        array = flat[path] if layer is None else flat[path][layer].T
        np.testing.assert_array_equal(array[:3, :16], z[f"dequant/{name}"])
    texts = json.loads((case.folder / case.read("texts")).read_text())
    rows = [tok.encode(entry["text"]) for entry in texts]
    for i, row in enumerate(rows):
        assert row == z[f"ids{i}"].tolist()
    # Behind a text its padding is not seen.
    length = max(map(len, rows))
    ids = jnp.asarray([row + [0] * (length - len(row)) for row in rows])
    logits = together(lambda p: net.apply({"params": p}, ids), read.params)
    for i, row in enumerate(rows):
        own = np.asarray(logits[i, : len(row)], np.float64)
        expected = z[f"top_values{i}"]
        top = np.take_along_axis(own, z[f"top_ids{i}"].astype(int), 1)
        np.testing.assert_allclose(top, expected, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(own.argmax(-1), z[f"top_ids{i}"][:, 0])
        total = np.log(np.exp(own).sum(-1))
        np.testing.assert_allclose(total, z[f"logsumexp{i}"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(
            own[:, ::997], z[f"slice{i}"], rtol=0, atol=tolerance
        )
        assert tok.decode([own[-1].argmax()]) == texts[i]["greedy_next"]


@pytest.mark.slow
def test_writes_and_stops(model):
    """Prompts of different lengths; a row ends at its stop string, across tokens."""
    read, tok, net = model
    texts = ["The capital of France is", "Step 1: 12 + 30 = 42.\n\nStep 2:"]
    ids, mask = tokenizer.left_padded([tok.encode(x) for x in texts], tok.eos)
    stops = ["Paris."]
    table = tokenizer.stop_table(tok.token_bytes, stops)
    options = decoding.Options(length=8, pad=tok.eos)
    run = functools.partial(decoding.generate, net, options=options)
    result = together(
        lambda p: run(p, jnp.asarray(ids), mask=jnp.asarray(mask),
                      table=jnp.asarray(table)),
        read.params,
    )  # fmt: skip
    first, second = (
        tok.decode(row[:n]) for row, n in zip(result.tokens, result.lengths)
    )
    assert first == " Paris." and result.stopped.tolist() == [True, False]
    assert tokenizer.cut(first, stops) == " " and second.startswith(" ")


@pytest.mark.slow
def test_folder_gives_the_same_logits_in_transformers(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    read, tok, net = model
    ids = tok.encode("def add(a, b):\n    return")
    weights.save(tmp_path, read.net, read.params, tokenizer=tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    logits = together(
        lambda p: net.apply({"params": p}, jnp.asarray([ids])), read.params
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-3)
    again = weights.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, read.params)
    assert tokenizer.load(tmp_path).encode("def add(a, b):\n    return") == ids


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3_scaled", "qwen25_tied", "qwen3_headdim"])
def test_other_folders_in_transformers(name, tmp_path):
    """What is written of each architecture is what transformers computes."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from tests.data.test_weights import TINY

    read = weights.load(TINY / name)
    weights.save(tmp_path, read.net, read.params)
    ids = np.random.default_rng(0).integers(0, 97, (2, 80))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    net = Transformer(**read.net)
    logits = together(
        lambda p: net.apply({"params": p}, jnp.asarray(ids, jnp.int32)), read.params
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
