"""Text to tokens and back, by the package ``tokenizers``, from files alone.

``load`` reads ``tokenizer.json``, or what a GGUF file has of a byte-level tokenizer::

    tok = tokenizer.load(fetch.get("smollm2-135m"))
    tok.encode("The capital of France is")    # [504, 3575, 282, 4649, 314]
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers import extras
from jaxpapers.data import files, tensors
from jaxpapers.data.gguf import Gguf

_MOST_BYTES = 1 << 27
_CONTROL = 3  # The type of a special token in GGUF files.
# How text is cut before pairs of bytes are merged: GPT-2's, and those of its successors.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": _WORDS % r"\p{N}{1,3}",
    "qwen2": _WORDS % r"\p{N}",
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the ids of its special tokens.

    Attributes:
      inner: of the package ``tokenizers``.
      bos: id that starts a text; None: none is known.
      eos: id that ends one.
      chat_template: text of the template, in Jinja; nothing here runs it.
    """

    inner: Any
    bos: int | None = None
    eos: int | None = None
    chat_template: str = ""

    def encode(
        self, text: str, *, special: bool = False, most: int | None = None
    ) -> list[int]:
        """Ids of a text.

        Args:
          text: any.
          special: add the tokens that the tokenizer puts around a text, such as BERT's
            ``[CLS]`` and ``[SEP]``.
          most: ids to keep, special ones included; None: all.
        """
        ids = self.inner.encode(text, add_special_tokens=special).ids
        if most is None or len(ids) <= most:
            return ids
        ends = self.inner.num_special_tokens_to_add(False) if special else 0
        # The template's last tokens end the text that is cut, too.
        last = ends // 2
        return ids[: most - last] + (ids[len(ids) - last :] if last else [])

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
          ids: of tokens.
          special: write special tokens too.
        """
        ids = [int(x) for x in ids]
        return self.inner.decode(ids, skip_special_tokens=not special)

    def id(self, token: str) -> int:
        """The id of a token by its name, such as ``<|im_end|>``.

        Raises:
          ValueError: no such token.
        """
        found = self.inner.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {token!r}")
        return found

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.inner.get_vocab_size()

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; of a byte-level tokenizer.

        Raises:
          ValueError: a tokenizer of another kind.
        """
        if "ByteLevel" not in type(self.inner.decoder).__name__:
            raise ValueError(
                "the bytes of a token are those of a byte-level tokenizer, got "
                f"{type(self.inner.decoder).__name__}"
            )
        byte = {c: b for b, c in _byte_characters().items()}
        names = [self.inner.id_to_token(i) or "" for i in range(self.size)]
        added = self.inner.get_added_tokens_decoder()
        return [
            name.encode()
            if i in added
            else b"".join(bytes([byte[c]]) if c in byte else c.encode() for c in name)
            for i, name in enumerate(names)
        ]

    def save(self, path: str | Path) -> None:
        """Writes ``tokenizer.json``."""
        self.inner.save(str(path))


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a model.

    Args:
      path: ``tokenizer.json``, a folder with it, a GGUF file or a folder that holds one.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file of another kind; in GGUF a tokenizer that is not byte-level, or
        one that cuts text in an unknown way.
      ModuleNotFoundError: without the package ``tokenizers``.
    """
    extras.need("tokenizers")
    path = Path(path).expanduser()
    if files.is_folder(path):
        file = path / "tokenizer.json"
        gguf = None if file.is_file() else tensors.find_gguf(path)
        path = gguf or file
    if path.suffix == ".gguf":
        return from_gguf(Gguf(path))
    from tokenizers import Tokenizer as Inner

    text = files.read(path, most=_MOST_BYTES).decode("utf-8", "replace")
    with files.parsing(path, "is no tokenizer.json"):
        inner = Inner.from_str(text)
    # Fixed lengths are of one training run.
    inner.no_padding()
    inner.no_truncation()
    return Tokenizer(inner, **_special(path.parent, inner))


def from_gguf(gguf: Gguf) -> Tokenizer:
    """The byte-level tokenizer that a GGUF file's metadata describes.

    Raises:
      ValueError: another kind of tokenizer, or an unknown way of cutting text.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    metadata = gguf.metadata
    kind, cut = (metadata.get(f"tokenizer.ggml.{k}") for k in ("model", "pre"))
    if kind != "gpt2" or cut not in _CUTS:
        raise ValueError(
            f"{gguf.path}: tokenizers of GGUF files have to be gpt2 with one of "
            f"{tuple(_CUTS)}, got {kind} with {cut}; load tokenizer.json instead"
        )
    tokens, merges = (metadata.get(f"tokenizer.ggml.{k}") for k in ("tokens", "merges"))
    if not isinstance(tokens, list) or not isinstance(merges, list):
        raise ValueError(f"{gguf.path}: lists no tokens or no merges")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    with files.parsing(gguf.path, "its tokens and merges do not fit"):
        vocabulary = {token: i for i, token in enumerate(tokens)}
        inner = Inner(models.BPE(vocab=vocabulary, merges=pairs))
    byte_level = functools.partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    if cut in ("gpt-2", "smollm"):
        steps: list[Any] = [byte_level(use_regex=True)]
        if cut == "smollm":
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    else:
        split = pre_tokenizers.Split(Regex(_CUTS[cut]), "isolated")
        steps = [split, byte_level(use_regex=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", np.zeros(0, np.int32))
    special = [tokens[i] for i in np.flatnonzero(types == _CONTROL) if i < len(tokens)]
    inner.add_special_tokens(
        [AddedToken(x, special=True, normalized=False) for x in special]
    )
    bos, eos = (_id(metadata.get(f"tokenizer.ggml.{k}_token_id"), len(tokens))
                for k in ("bos", "eos"))  # fmt: skip
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(inner, bos, eos, template if isinstance(template, str) else "")


def stop_table(
    tokens: Sequence[bytes], stops: Sequence[str | bytes]
) -> np.ndarray | None:
    """An automaton over tokens that ends once their bytes contain a stop string.

    A string may begin and end in the middle of tokens. Its states are prefixes of the
    strings (Aho and Corasick, 1975); ``nets.decoding.generate`` runs it beside the model.

    Args:
      tokens: bytes of each id; see ``Tokenizer.token_bytes``.
      stops: strings; none: None is returned.

    Returns:
      int32 (states, V): the next state. State 0 is the first, the last one has seen a
      stop string and is never left.

    Raises:
      ValueError: an empty string.

    Example:
      >>> stop_table([b"a", b"b", b"ab"], ["ba"]).tolist()
      [[0, 1, 1], [2, 1, 2], [2, 2, 2]]
    """
    words = [x.encode() if isinstance(x, str) else bytes(x) for x in stops]
    if not words:
        return None
    if not all(words):
        raise ValueError("a stop string must not be empty")
    prefixes = [b"", *sorted({w[:i] for w in words for i in range(1, len(w))})]
    states, last = {p: i for i, p in enumerate(prefixes)}, len(prefixes)
    step = np.full((last + 1, 256), last, np.int32)
    for i, prefix in enumerate(prefixes):
        for byte in range(256):
            seen = prefix + bytes([byte])
            if any(seen.endswith(w) for w in words):
                continue
            # The longest end of what was seen that begins a string.
            step[i, byte] = next(
                states[seen[k:]] for k in range(len(seen) + 1) if seen[k:] in states
            )
    table = np.repeat(np.arange(last + 1, dtype=np.int32)[:, None], len(tokens), 1)
    lengths = np.array([len(t) for t in tokens])
    for place in range(max(lengths, default=0)):
        longer = np.flatnonzero(lengths > place)
        at = np.array([tokens[int(i)][place] for i in longer])
        table[:, longer] = step[table[:, longer], at[None]]
    return table


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first of the stop strings in it.

    Example:
      >>> cut("Paris. It is", [" It", "."])
      'Paris'
    """
    places = [text.find(stop) for stop in stops]
    return text[: min((x for x in places if x >= 0), default=len(text))]


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, *, multiple: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of several texts, padded on the left to one length.

    Args:
      rows: ids of each, one at least.
      pad: id of the padding, which the mask hides.
      multiple: of the length, so that few shapes occur.

    Returns:
      int32 (B, T) and the mask of real tokens, bool (B, T).

    Raises:
      ValueError: no rows, or an empty one.
    """
    if not len(rows) or not all(len(row) for row in rows):
        raise ValueError(
            "every row needs one token at least; got an empty one or no row"
        )
    length = -(-max(len(row) for row in rows) // multiple) * multiple
    ids, mask = (
        np.full((len(rows), length), pad, np.int32),
        np.zeros((len(rows), length), bool),
    )
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, True
    return ids, mask


def _special(folder: Path, inner: Any) -> dict[str, Any]:
    """Special tokens and chat template of ``tokenizer_config.json``, if there is one."""
    found: dict[str, Any] = {}
    config: Mapping[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        config = tensors.read_json(folder / "tokenizer_config.json")
    for name in ("bos", "eos"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found[name] = inner.token_to_id(token) if isinstance(token, str) else None
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = files.read(folder / "chat_template.jinja", most=1 << 20).decode()
    if isinstance(template, list):  # Several, by name.
        template = json.dumps(template)
    found["chat_template"] = template or ""
    return found


def _id(value: Any, size: int) -> int | None:
    return value if isinstance(value, int) and 0 <= value < size else None


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
