"""The text encoder against NumPy in float64, and MiniLM against transformers."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpapers.data import encoders, fetch, tokenizer, weights
from jaxpapers.nets.encoder import Encoder, encode, sentence_vectors
from tests.programs import KEY, params_like, together

FIELDS = {
    "vocab_size": 20, "width": 12, "layers": 2, "heads": 3, "hidden": 16,
    "positions": 16, "types": 2, "epsilon": 1e-12,
}  # fmt: skip
NET = Encoder(**FIELDS)
ROWS = [[1, 5, 2], [1, 7, 8, 9, 3, 2], [1, 2], [1, 19, 4, 4, 2]]
erf = np.vectorize(math.erf)


def drawn():
    shape = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 4), jnp.bool_)
    return params_like(NET.init, KEY, shape, mask)["params"]


def by_numpy(params, row):
    """The vector of one text, float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * at["scale"] + at["bias"]

    n, heads, size = len(row), 3, 4
    x = p["word"]["embedding"][row] + p["position"]["embedding"][:n]
    x = norm(x + p["token_type"]["embedding"][0], p["norm"])
    for i in range(2):
        layer = jax.tree.map(lambda leaf: leaf[i], p["layers"])  # noqa: B023

        def dense(x, name):
            return x @ layer[name]["kernel"] + layer[name]["bias"]  # noqa: B023

        q, k, v = (
            dense(x, m).reshape(n, heads, size) for m in ("query", "key", "value")
        )
        scores = np.exp(np.einsum("tnh,snh->nts", q, k) / np.sqrt(size))
        scores /= scores.sum(-1, keepdims=True)
        y = np.einsum("nts,snh->tnh", scores, v).reshape(n, -1)
        x = norm(x + dense(y, "out"), layer["attention_norm"])
        h = dense(x, "up")
        h = h * (1 + erf(h / np.sqrt(2))) / 2
        x = norm(x + dense(h, "down"), layer["mlp_norm"])
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_vectors_against_numpy():
    """Whatever the order and the padding."""
    params = drawn()
    vectors = encode(NET, params, ROWS, batch=3, multiple=4)
    assert vectors.dtype == np.float32
    for row, vector in zip(ROWS, vectors):
        np.testing.assert_allclose(vector, by_numpy(params, row), rtol=0, atol=1e-5)
    nothing = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), bool)
    assert not together(lambda p: sentence_vectors(NET, p, *nothing), params).any()


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], {}, "no texts"),
        ([[1], []], {}, "text 1 has 0 tokens, expected 1 to 16"),
        ([[1] * 17], {}, "text 0 has 17 tokens"),
        ([[20]], {}, r"text 0 has an id outside \[0, 20\)"),
        ([[1]], {"batch": 0}, "batch and multiple must be >= 1"),
    ],
)
def test_texts_that_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        encode(NET, {}, rows, **options)


CONFIG = {
    "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12,
    **{theirs: FIELDS[ours] for theirs, ours in encoders._SIZES.items()},
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_read_from_a_folder(tmp_path, prefix):
    params = drawn()
    tensors = weights.tensors_of(encoders.leaves(FIELDS, prefix), params, 2)
    tensors[f"{prefix}pooler.dense.bias"] = np.zeros(12, np.float32)
    tensors[f"{prefix}embeddings.position_ids"] = np.zeros((1, 16), np.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model = weights.load_encoder(tmp_path)
    assert model.net == FIELDS and len(model.skipped) == 2
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    for entries, message in [
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', got 'relu'"),
        ({"model_type": "roberta"}, "model_type must be 'bert'"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute'"),
        ({"type_vocab_size": 3}, "1 misshapen: .*token_type_embeddings"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **entries}))
        with pytest.raises(ValueError, match=message):
            weights.load_encoder(tmp_path)


@pytest.mark.slow
def test_minilm_equals_transformers():
    """all-MiniLM-L6-v2 on real titles, beside PyTorch's BERT with the same pooling."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = fetch.get("minilm-l6")
    model, tok = weights.load_encoder(folder), tokenizer.load(folder)
    texts = [
        "Star Wars (1977). Genres: Action, Adventure, Sci-Fi.",
        "Return of the Jedi (1983). Genres: Action, Adventure, Sci-Fi.",
        "Toy Story (1995). Genres: Animation, Children's, Comedy.",
        "Antonia's Line (1995). Genres: Drama.",
    ]
    rows = [tok.encode(x, special=True, most=256) for x in texts]
    vectors = encode(Encoder(**model.net), model.params, rows)
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    for row, vector in zip(rows, vectors):
        with torch.no_grad():
            states = bert(torch.tensor([row])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states.mean(0), dim=0).numpy()
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-5)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > likeness[0, 2] > likeness[0, 3]
