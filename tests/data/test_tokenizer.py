"""Tokenizers from both kinds of files, stop strings, padding."""

import json

import numpy as np
import pytest

from jaxpapers.data import tokenizer
from jaxpapers.data.gguf import Gguf
from tests.data.test_weights import text, write_gguf

pytest.importorskip("tokenizers")


class Fake(Gguf):
    """Metadata without a file."""

    def __init__(self, **metadata):
        self.path = "x.gguf"
        self.metadata = {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}


LETTERS = ["<|end|>", *"abcdeĠ12.\n", "ab", "Ġa", "Ġab", "Ċ"]
METADATA = {
    "model": "gpt2", "pre": "smollm", "tokens": LETTERS,
    "merges": ["a b", "Ġ a", "Ġ ab"], "token_type": np.array([3] + [1] * 13),
    "bos_token_id": 0, "eos_token_id": 99,
}  # fmt: skip


def test_gguf_tokenizer_merges_bytes_and_splits_digits(tmp_path):
    tok = tokenizer.from_gguf(Fake(**METADATA))
    ids = tok.encode("ab ab 12.<|end|>")
    names = [LETTERS[i] for i in ids]
    assert names == ["ab", "Ġab", "Ġ", "1", "2", ".", "<|end|>"]
    assert tok.decode(ids) == "ab ab 12."
    assert tok.decode(ids, special=True) == "ab ab 12.<|end|>"
    assert (tok.bos, tok.eos, tok.size, tok.id("<|end|>")) == (0, None, len(LETTERS), 0)
    assert tok.token_bytes[ids[1]] == b" ab" and tok.token_bytes[0] == b"<|end|>"
    assert tok.token_bytes[LETTERS.index("Ċ")] == b"\n"
    with pytest.raises(ValueError, match="has no token '<pad>'"):
        tok.id("<pad>")
    tok.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<|end|>"}, "chat_template": "x"})
    )
    again = tokenizer.load(tmp_path)
    assert again.encode("ab ab 12.<|end|>") == ids
    assert (again.bos, again.eos, again.chat_template) == (None, 0, "x")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model": "llama"}, "have to be gpt2 with one of .*got llama with smollm"),
        ({"pre": "deepseek"}, "got gpt2 with deepseek"),
        ({"merges": None}, "lists no tokens or no merges"),
        ({"merges": ["a b c"]}, "its tokens and merges do not fit"),
        ({"merges": ["x y"]}, "its tokens and merges do not fit"),
    ],
)
def test_gguf_tokenizers_that_are_refused(changed, message):
    with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
        tokenizer.from_gguf(Fake(**{**METADATA, **changed}))


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_other_ways_of_cutting(pre):
    tok = tokenizer.from_gguf(Fake(**{**METADATA, "pre": pre}))
    assert [LETTERS[i] for i in tok.encode("ab ab")] == ["ab", "Ġab"]


def test_files_of_another_kind(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file .*none"):
        tokenizer.load(tmp_path / "none")
    (tmp_path / "tokenizer.json").unlink()
    write_gguf(tmp_path / "x.gguf", {"tokenizer.ggml.model": "gpt2"}, {})
    with pytest.raises(ValueError, match="got gpt2 with None"):
        tokenizer.load(tmp_path)
    assert text("ab")  # The writer is the other test's.


def word_pieces():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[CLS]", "[SEP]", "a", "b", "c", "[UNK]"]
    inner = Tokenizer(
        models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    inner.enable_padding(length=16)
    inner.enable_truncation(3)
    return inner


def test_special_tokens_survive_a_cut_and_fixed_lengths_go(tmp_path):
    word_pieces().save(str(tmp_path / "tokenizer.json"))
    tok = tokenizer.load(tmp_path / "tokenizer.json")
    assert tok.encode("a b c", special=True) == [1, 3, 4, 5, 2]
    assert tok.encode("a b c", special=True, most=4) == [1, 3, 4, 2]
    assert tok.encode("a b c") == [3, 4, 5]
    assert tok.encode("a b c", most=2) == [3, 4]
    with pytest.raises(ValueError, match="of a byte-level tokenizer, got NoneType"):
        _ = tok.token_bytes


def test_stop_table_is_a_search_of_the_text():
    """Against str.find, over random token sequences and strings that overlap."""
    rng = np.random.default_rng(0)
    tokens = [b"a", b"b", b"ab", b"ba", b"aab", b"", b"bbb"]
    stops = ["abab", "bbb", "aa"]
    table = tokenizer.stop_table(tokens, stops)
    last = len(table) - 1
    assert table[last].tolist() == [last] * len(tokens)
    ended = 0
    for _ in range(300):
        ids = rng.integers(0, len(tokens), 2)
        state = 0
        for i in ids:
            state = table[state, i]
        seen = b"".join(tokens[i] for i in ids).decode()
        assert (state == last) == any(s in seen for s in stops), seen
        ended += state == last
    assert 50 < ended < 250
    assert tokenizer.stop_table(tokens, []) is None
    with pytest.raises(ValueError, match="must not be empty"):
        tokenizer.stop_table(tokens, ["a", ""])


def test_left_padding():
    ids, mask = tokenizer.left_padded([[1, 2, 3], [4]], 9, multiple=4)
    assert ids.tolist() == [[9, 1, 2, 3], [9, 9, 9, 4]]
    assert mask.tolist() == [[False, True, True, True], [False, False, False, True]]
    assert tokenizer.cut("one. two", ["two", "."]) == "one"
    assert tokenizer.cut("one", ["."]) == "one"
    with pytest.raises(ValueError, match="every row needs one token at least"):
        tokenizer.left_padded([[1], []], 0)
