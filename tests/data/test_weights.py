"""Language models from files: recorded logits, damaged and hostile files, round trips."""

import dataclasses
import functools
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpapers.data import decoders, tensors, weights
from jaxpapers.data.gguf import Gguf
from jaxpapers.nets.rope import Scaling, frequencies
from jaxpapers.nets.transformer import Transformer
from jaxpapers.ops import quantize
from tests.conftest import REFERENCE
from tests.programs import KEY, params_like, together

TINY = REFERENCE / "lm" / "tiny_decoders"
NET = {
    "vocab_size": 11, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2,
    "head_dim": 16, "hidden": 32, "rope_theta": 500.0, "rope_scaling": None,
    "qk_norm": False, "bias": "none", "tied": True, "epsilon": 1e-5,
}  # fmt: skip


@pytest.mark.parity("lm", only=lambda entry: entry.get("kind") == "decoder")
def test_recorded_logits(case):
    """Of Llama 3, Qwen2.5 and Qwen3 in sharded files; left padding; frequencies."""
    tolerance = case.tolerance("logits", otherwise=1e-4)
    with np.load(case.folder / case.read("logits")) as file:
        prefix = f"{case.name}/"
        z = {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}
    model = weights.load(case.folder / case.entry["file"])
    net, mask = Transformer(**model.net), z["mask"].astype(bool)
    ids = jnp.asarray(z["ids"])
    positions = jnp.asarray(np.maximum(mask.cumsum(1) - 1, 0), jnp.int32)
    keys = jnp.asarray(np.broadcast_to(mask[:, None], (*mask.shape, mask.shape[1])))
    half = model.net["head_dim"] // 2

    def compute(params):
        apply = functools.partial(net.apply, {"params": params}, ids)
        scale = frequencies(half, net.rope_theta, net.rope_scaling)
        return apply(), apply(positions=positions, mask=keys), scale

    full, padded, scale = together(compute, model.params)
    np.testing.assert_allclose(full[:, ::9], z["logits"], rtol=0, atol=tolerance)
    at = np.arange(13, 90, 11)
    expected = z["logits_leftpad_row1"]
    np.testing.assert_allclose(padded[1, at], expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(scale, z["inv_freq"], rtol=1e-6)


def same(tree, other):
    flat, others = (dict(weights._flat(x)) for x in (tree, other))
    assert set(flat) == set(others)
    for path, array in flat.items():
        np.testing.assert_array_equal(array, others[path], err_msg=path)


@pytest.mark.parametrize("name", ["llama3_scaled", "qwen25_tied", "qwen3_headdim"])
def test_written_and_read_again(name, tmp_path):
    model = weights.load(TINY / name)
    weights.save(tmp_path / "new", model.net, model.params, config={"eos_token_id": 2})
    again = weights.load(tmp_path / "new")
    assert again.net == model.net and again.config["eos_token_id"] == 2
    same(model.params, again.params)
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    # Both forms of a config say the same.
    for gone in ("rope_parameters", "rope_theta"):
        left = {k: v for k, v in again.config.items() if k != gone}
        assert decoders.fields(left) == model.net


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(TINY / "llama3_scaled", tmp_path / "model")


def change(path, **entries):
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_tensors_that_do_not_fit_are_named(folder):
    path = folder / "model-00003-of-00003.safetensors"
    stored = load_file(path)
    stored["model.norm.weight"] = np.ones(5, np.float32)
    stored["model.extra"] = np.ones(3, np.float32)
    save_file(stored, path)
    index = json.loads((folder / tensors.INDEX).read_text())["weight_map"]
    del index["lm_head.weight"]
    change(folder / tensors.INDEX, weight_map=index)
    # What a file holds besides its index counts too.
    assert "lm_head.weight" in tensors.Folder(folder).shapes()
    del stored["lm_head.weight"]
    save_file(stored, path)
    with pytest.raises(ValueError) as error:
        weights.load(folder)
    for part in (
        "1 missing: lm_head.weight",
        "1 unexpected: model.extra",
        "misshapen: model.norm.weight of shape (5,), expected (32,)",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "..", "a/b.safetensors", 3]
)
def test_an_index_stays_in_its_folder(folder, file):
    change(folder / tensors.INDEX, weight_map={"model.norm.weight": file})
    with pytest.raises(ValueError, match="expected the name of a file beside it"):
        weights.load(folder)


def test_damaged_folders(folder, tmp_path):
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: is not JSON"):
        weights.load(folder)
    (folder / "config.json").write_text(config)
    path = folder / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="00001.*: not a safetensors file"):
        weights.load(folder)
    (folder / tensors.INDEX).write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        weights.load(folder)
    (folder / tensors.INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        weights.load(folder)
    with pytest.raises(FileNotFoundError, match="no file"):
        weights.load(tmp_path / "none")


def test_a_tensor_that_the_index_promises(folder):
    index = json.loads((folder / tensors.INDEX).read_text())["weight_map"]
    first = "model-00001-of-00003.safetensors"
    change(folder / tensors.INDEX, weight_map={**index, "model.norm.weight": first})
    with pytest.raises(ValueError, match="not in the files that it names: model.norm"):
        weights.load(folder)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"model_type": "gpt2"}, "model_type must be one of .*got 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not written, expected 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not written"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not written"),
        ({"hidden_size": "32"}, "hidden_size must be an integer of 1 or more, got '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of 1 or more"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8 is not"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "got 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
         r"llama3, lacks numbers for \['low', 'high', 'trained'\]"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"linear, lacks .*\['factor'\]"),
    ],
)  # fmt: skip
def test_configs_that_are_refused_by_name(folder, entries, message):
    change(folder / "config.json", **entries)
    with pytest.raises(ValueError, match=f"{folder}: .*{message}"):
        weights.load(folder)


def test_older_configs():
    config = json.loads((TINY / "llama3_scaled" / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    expected = Scaling(kind="llama3", factor=8.0, low=1.0, high=4.0, trained=64)
    assert decoders.fields(config)["rope_scaling"] == expected
    config["rope_scaling"] = {"type": "linear", "factor": 2.0}
    assert decoders.fields(config)["rope_scaling"] == Scaling(kind="linear", factor=2.0)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"norm": "layer"}, "net.norm must be 'rms' in a Hugging Face folder"),
        ({"bias": "all"}, "got bias 'all' and qk_norm False"),
        ({"tied": False}, r"parameters missing: \['head/kernel'\]"),
        (
            {"hidden": 33},
            r"layers/mlp/gate/kernel has shape .*, expected \(2, 64, 33\)",
        ),
    ],
)
def test_nets_that_are_not_written(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        weights.save(tmp_path, {**NET, **fields}, drawn())


def drawn(**fields):
    net = Transformer(**{**NET, **fields})
    return params_like(net.init, KEY, jax.ShapeDtypeStruct((1, 4), jnp.int32))["params"]


def test_half_precision_is_kept_or_widened(tmp_path):
    weights.save(tmp_path, NET, drawn())
    tensors = load_file(tmp_path / "model.safetensors")
    half = {k: v.astype(jnp.bfloat16) for k, v in tensors.items()}
    save_file(half, tmp_path / "model.safetensors")
    wide = weights.load(tmp_path).params
    assert wide["norm"]["scale"].dtype == np.float32
    kept = weights.load(tmp_path, dtype=jnp.bfloat16).params
    same(wide, jax.tree.map(lambda x: x.astype(np.float32), kept))
    assert kept["norm"]["scale"].dtype == jnp.bfloat16
    seen = []
    weights.load(tmp_path, place=lambda path, x: seen.append((path, x.shape)))
    assert ("layers/mlp/up/kernel", (2, 64, 32)) in seen
    save_file({k: np.ones(v.shape, np.int8) for k, v in tensors.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="is of I8, expected one of"):
        weights.load(tmp_path)


# A GGUF file by hand.


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key, value):
    if isinstance(value, str):
        return text(key) + struct.pack("<I", 8) + text(value)
    kind, form = (6, "<f") if isinstance(value, float) else (4, "<I")
    return text(key) + struct.pack("<I", kind) + struct.pack(form, value)


def write_gguf(path, metadata, tensors, align=32):
    """Tensors are name -> (type, shape as rows of columns, bytes)."""
    head = b"".join(entry(k, v) for k, v in metadata.items())
    data, table = b"", b""
    for name, (kind, shape, stored) in tensors.items():
        data += b"\0" * (-len(data) % align)
        axes = struct.pack("<I", len(shape)) + struct.pack(
            f"<{len(shape)}Q", *shape[::-1]
        )
        table += text(name) + axes + struct.pack("<IQ", kind, len(data))
        data += stored
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)) + head + table
    path.write_bytes(head + b"\0" * (-len(head) % align) + data)
    return path


METADATA = {
    "general.architecture": "llama", "llama.block_count": 2,
    "llama.embedding_length": 64, "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 32,
    "llama.rope.dimension_count": 16, "llama.rope.freq_base": 500.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip


def interleaved(rows, heads):
    """Rows as converters to GGUF order them: pairs side by side."""
    pairs = rows.reshape(heads, 2, -1, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(params):
    tensors = {}
    for name, array in weights.tensors_of(decoders.leaves(NET), params, 2).items():
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            array = interleaved(array, heads) if part in name else array
        tensors[decoders.gguf_name(name)] = (0, array.shape, array.tobytes())
    return tensors


def test_gguf_is_the_same_model(tmp_path):
    params = drawn()
    path = write_gguf(tmp_path / "x.gguf", METADATA, gguf_tensors(params))
    for place in (path, tmp_path):  # The file, or the folder that holds it alone.
        model = weights.load(place)
        assert model.net == NET
        same(model.params, params)
    write_gguf(tmp_path / "y.gguf", METADATA, {})
    with pytest.raises(ValueError, match="holds .*x.gguf.*y.gguf.*name one"):
        weights.load(tmp_path)
    with pytest.raises(ValueError, match="vocab_size must be an integer"):
        weights.load(tmp_path / "y.gguf")


def test_frequencies_of_llama_3(tmp_path):
    """The file has what they are divided by, transformers' configs the rule."""
    scaling = Scaling(kind="llama3", factor=32.0)
    theta = 500_000.0
    factors = np.array(frequencies(8, theta) / frequencies(8, theta, scaling))
    assert 1 == factors[0] < factors[4] < factors[-1]
    tensors = {
        **gguf_tensors(drawn()),
        "rope_freqs.weight": (0, (8,), factors.tobytes()),
    }
    metadata = {**METADATA, "llama.rope.freq_base": theta}
    model = weights.load(write_gguf(tmp_path / "x.gguf", metadata, tensors))
    found = model.net["rope_scaling"]
    assert found == dataclasses.replace(scaling, factor=found.factor)
    assert found.factor == pytest.approx(32, rel=1e-6)


def test_gguf_of_another_form(tmp_path):
    tensors = gguf_tensors(drawn())
    path = tmp_path / "x.gguf"
    factors = (0, (8,), np.arange(1, 9, dtype="f4").tobytes())
    for metadata, tensors_, message in [
        ({"general.architecture": "mamba"}, tensors, "must be one of .*got 'mamba'"),
        ({"llama.block_count": 3}, tensors, "9 missing: model.layers.2.self_attn.q"),
        ({"llama.block_count": 10**9}, tensors, "missing"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, tensors,
         "got 'yarn'"),
        ({}, {**tensors, "rope_freqs.weight": tensors["output_norm.weight"]},
         "rope_freqs.weight: expected 8 factors of Llama 3's"),
        ({}, {**tensors, "rope_freqs.weight": factors},
         "rope_freqs.weight: expected 8 factors of Llama 3's"),
        ({}, {**tensors, "output.scale": tensors["output_norm.weight"]},
         "1 unexpected: output.scale"),
        ({}, {**tensors, "blk.0.attn_q.weight": (12, (64, 64), b"")}, "got Q4_K"),
        ({}, {**tensors, "blk.0.attn_q.weight": (0, (64, 32), b"")}, "misshapen"),
    ]:  # fmt: skip
        write_gguf(path, {**METADATA, **metadata}, tensors_)
        with pytest.raises(ValueError, match=message):
            weights.load(path)


def test_gguf_cut_off_at_every_place(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", METADATA, gguf_tensors(drawn()))
    whole = path.read_bytes()
    head = Gguf(path).tensors["token_embd.weight"].start
    for size in [*range(0, head, 211), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="x.gguf"):
            weights.load(path)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1; 2 and 3 are read"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors; at most"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "entries of metadata; at most"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "ends in the middle"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 13),
         "metadata of type 13"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k")
         + struct.pack("<IIQ", 9, 4, 1 << 61), "ends in the middle"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k")
         + struct.pack("<IIQ", 9, 9, 1), "metadata of type 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("t")
         + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0), "'t' of shape"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("t")
         + struct.pack("<IQIQ", 1, 4, 0, 1 << 50), "starts after the end"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("t")
         + struct.pack("<I", 9), "has 9 axes"),
    ],
)  # fmt: skip
def test_gguf_that_claims_what_cannot_be(tmp_path, data, message):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        Gguf(tmp_path / "x.gguf")


def by_hand(name, block):
    """Weights of a block, one after the other."""
    d, m = struct.unpack("<2e", block[:4])
    if name == "Q8_0":
        return [d * q for q in struct.unpack("<32b", block[2:])]
    packed = block[2:] if name == "Q4_0" else block[4:]
    q = [x & 15 for x in packed] + [x >> 4 for x in packed]
    return [d * (x - 8) for x in q] if name == "Q4_0" else [d * x + m for x in q]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks(name):
    rng = np.random.default_rng(0)
    size = quantize.FORMATS[name].bytes
    blocks = rng.integers(0, 256, (6, size)).astype(np.uint8)
    scales = (size - 16) // 2 if name != "Q8_0" else 1
    halves = rng.normal(size=(6, scales)).astype(np.float16)
    blocks[:, : 2 * scales] = halves.view(np.uint8)
    expected = [by_hand(name, x.tobytes()) for x in blocks]
    stored = blocks.reshape(-1)
    weights_ = quantize.dequantize(name, stored, (3, 64))
    assert weights_.dtype == np.float32
    np.testing.assert_array_equal(
        weights_, np.array(expected, np.float32).reshape(3, 64)
    )
    compiled = together(lambda x: quantize.dequantize(name, x, (3, 64)), stored)
    np.testing.assert_array_equal(compiled, weights_)


def test_plain_formats_and_refusals():
    x = np.float32([[1.5, -2.0], [0.25, 3.0]])
    for name, dtype in (("F32", "<f4"), ("F16", "<f2"), ("BF16", jnp.bfloat16)):
        stored = np.frombuffer(x.astype(dtype).tobytes(), np.uint8)
        np.testing.assert_array_equal(quantize.dequantize(name, stored, (2, 2)), x)
    with pytest.raises(ValueError, match="blocks of 32, got 33"):
        quantize.stored_bytes("Q8_0", (33,))
    with pytest.raises(ValueError, match="must be of F32.*got Q6_K"):
        quantize.stored_bytes("Q6_K", (32,))
    with pytest.raises(ValueError, match="needs 16 bytes .uint8., got uint8 of shape"):
        quantize.dequantize("F32", np.zeros(8, np.uint8), (2, 2))
