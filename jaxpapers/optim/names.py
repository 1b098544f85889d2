"""What the name of a parameter says: head, embedding, norm gain or bias.

A path is read from its end: the leaf, or its module if the leaf is called ``kernel`` or
``weight``. Words are compared whole ("abnormality" is no norm), and a word that names
what the module is stands last: ``token_embed`` is an embedding, ``embed_mlp`` an MLP.
The names are those of flax, haiku, equinox and PyTorch modules and of MaxText, T5X,
EasyDeL, Levanter, Gemma, nanodo and TransformerLens.
"""

import re
from typing import NamedTuple

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# Leaves that say nothing: their module does.
_KERNEL = {"kernel", "weight", "weights", "w", "matrix", "param", "value", "array"}
_GAIN = {
    "bias", "biases", "scale", "scales", "gain", "gains", "gamma", "beta", "alpha", "g",
    "offset", "shift", "temperature",
}  # fmt: skip
_NORM = {
    "norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm", "ln",
    "rms", "bn", "gn", "layerscale", "normalization", "normalisation",
    "layernormalization", "batchnormalization",
}  # fmt: skip
# What may follow "norm": which of them it is.
_WHICH = {
    "f", "final", "pre", "post", "in", "input", "out", "output", "q", "k", "v", "attn",
    "attention", "self", "cross", "mlp", "ff", "ffn", "layer", "context", "a", "b", "x",
    "emb", "embed", "embedding", "embeddings",
}  # fmt: skip
_EMBEDDING = re.compile(
    r"((pos|position|tok|token|word|char|item|input|time|type)?"
    r"emb(s|ed|eds|edding|eddings)?|embedders?|wte|wpe|tables?|codebooks?|codevectors?)$"
)
_EMBEDDED = {
    "tokens", "token", "tok", "positions", "position", "pos", "in", "input", "inputs",
    "ids", "id", "layer", "words", "word", "items", "item", "types", "type",
}  # fmt: skip
_TOKENS = {"tokens", "token", "positions", "position", "vocab", "vocabulary"}
# Parameters without a module of their own, beside those that name tokens.
_LEARNED = {"latents", "probe", "queries", "prompts", "cls", "registers"}
_PLACES = {"pos", "position", "positions", "positional"}
_CODES = {"enc", "encs", "encoding", "encodings", "code", "codes"}
_POSITIONS = _PLACES | {
    "position", "positions", "pos", "posemb", "posembed", "wpe", "time", "type", "types",
    "segment", "patch", "patches", "relative", "rel",
}  # fmt: skip
_LOGITS = {
    "logits", "logit", "logitdense", "unembed", "unembedding", "unembeddings",
    "classifier", "readout", "lmhead", "softmax",
}  # fmt: skip
# Names of output layers that are heads only outside blocks.
_OUTPUT = {
    ("output",), ("outputs",), ("output", "layer"), ("out", "layer"), ("score",),
    ("scores",), ("output", "projection"), ("output", "proj"), ("output", "dense"),
    ("output", "linear"), ("decoder", "output"), ("final", "dense"), ("final", "linear"),
    ("predictions",), ("prediction",), ("dense", "prediction"), ("qa", "outputs"),
    ("final", "layer"), ("seq", "relationship"),
}  # fmt: skip
# Names that are heads only next to the root: blocks have an output projection too.
_TOP_OUTPUT = {
    ("out",), ("out", "proj"), ("proj", "out"), ("fc", "out"), ("linear", "out"),
    ("dense", "out"), ("out", "linear"), ("out", "dense"),
}  # fmt: skip
_BLOCK = {
    "attn", "attention", "selfattention", "mha", "mlp", "ff", "ffn", "feedforward", "moe",
    "expert", "experts", "block", "blocks", "layer", "layers", "h", "cell", "lstm", "gru",
    "rnn", "ssm", "mixer", "multi", "multihead", "router", "gate",
}  # fmt: skip
# Layers that only carry out what their parent is called.
_PLAIN = {"linear", "dense", "proj", "projection", "out", "output", "fc", "decoder"}
_TOP = {"params", "model", "net", "network", "decoder", "transformer", "module"}


class Name(NamedTuple):
    """What a path says.

    Attributes:
      group: ``head``, ``embedding``, ``scalar``, or "" where it says nothing.
      word: the part of the path that says it.
      tokens: an embedding of tokens, rather than positions: its rows are a vocabulary.
    """

    group: str
    word: str = ""
    tokens: bool = False


def read_name(path: str) -> Name:
    """The group that a path's words say.

    Example:
      >>> [read_name(p).group for p in ("lm_head/kernel", "blocks/0/ln_1/weight")]
      ['head', 'scalar']
      >>> read_name("abnormality_detector/kernel").group
      ''
    """
    parts = _parts(path)
    leaf, module = parts[-1], parts[-2] if len(parts) > 1 else ""
    own = _without_kernel(words(leaf))
    if _is_gain(leaf, module):
        return Name("scalar", leaf)
    for part in (leaf, module):
        name = _without_kernel(words(part))
        if name and _is_norm(name, strict=words(leaf)[-1:] in (["kernel"], ["w"])):
            return Name("scalar", part)
    if head := _head(parts, bool(own)):
        return Name("head", head)
    for part in (leaf, module):
        if _is_embedding(part):
            tokens = not _POSITIONS & {w for p in parts for w in words(p)}
            return Name("embedding", part, tokens and part.lower() != "w_pos")
    if _is_learned(leaf) or _is_encoding(_without_kernel(words(module))):
        return Name("embedding", leaf if own else module)
    patches = words(parts[-3]) if len(parts) > 2 else []
    if module in ("proj", "projection") and "patch" in patches:
        return Name("embedding", parts[-3])
    return Name("")


def is_of_norm(path: str) -> bool:
    """Whether a leaf is the gain or the bias of a norm.

    Example:
      >>> is_of_norm("layers/mlp_norm/scale"), is_of_norm("layers/mlp/up/bias")
      (True, False)
    """
    parts = [_without_kernel(words(part)) for part in _parts(path)[-2:]]
    return any(name and _is_norm(name, strict=False) for name in parts)


def in_block(path: str) -> bool:
    """Whether a leaf is part of a repeated block, an attention or an MLP.

    Example:
      >>> in_block("decoder/layers/0/wi/kernel"), in_block("decoder/dense_9/kernel")
      (True, False)
    """
    return _in_block(path.split("/")[:-2] + _parts(path)[:-1])


def words(part: str) -> list[str]:
    """Lower-case words of a name in snake_case or CamelCase, without numbers.

    Example:
      >>> words("RMSNorm_0"), words("pre_mlp_norm2")
      (['rms', 'norm'], ['pre', 'mlp', 'norm'])
    """
    return [w.lower() for w in _WORD.findall(part) if not w.isdigit()]


def _parts(path: str) -> list[str]:
    """Names from the outermost to the leaf, without list indices and boxes."""
    parts = [p for p in re.split(r"[/.]", path) if p and p != "~" and not p.isdigit()]
    # A box that became a dict: "kernel/value". A layer may be called "value" as well.
    while len(parts) > 1 and parts[-1] in ("value", "array"):
        if not (_is_gain(parts[-2]) or not _without_kernel(words(parts[-2]))):
            if parts[-2] != "embedding":
                break
        parts.pop()
    return parts or [path]


def _without_kernel(name: list[str]) -> list[str]:
    while name and name[-1] in _KERNEL:
        name = name[:-1]
    return name


def _is_gain(leaf: str, module: str = "") -> bool:
    """A bias, gain or rate; "b" is one, and LoRA's "B", "lora_b", "lora/b" are not."""
    name = words(leaf)
    if re.fullmatch(r"b\d*|b_(?!proj)\w+", leaf):
        return "lora" not in words(module)
    # Mamba's A_log has a rate for each channel and state.
    return bool(name) and (
        name[-1] in _GAIN or name[0] == "bias" or sorted(name) == ["a", "log"]
    )


def _is_norm(name: list[str], strict: bool) -> bool:
    if name[-1] in _NORM or name[-2:] == ["layer", "scale"]:
        return True
    if name[-1] in ("f", "q", "k") and len(name) > 1 and name[-2] in _NORM:
        return True
    return not strict and name[0] in _NORM and set(name[1:]) <= _WHICH


def _is_embedding(part: str) -> bool:
    name = _without_kernel(words(part))
    if not name:
        return False
    if _EMBEDDING.match(name[-1]) or part.lower() in _TOKENS | {"w_pos", "w_e"}:
        return True
    return bool(_EMBEDDING.match(name[0])) and set(name[1:]) <= _EMBEDDED


def _is_learned(leaf: str) -> bool:
    """Rows that are learned as they are: cls_token, register_tokens, learned_pos."""
    name = words(leaf)
    if len(name) == 1 and name[0] in _LEARNED:
        return True
    named = bool(name) and name[-1] in _PLACES | {"token", "tokens"}
    return named or _is_encoding(name)


def _is_encoding(name: list[str]) -> bool:
    return bool(name) and name[-1] in _CODES and bool(_PLACES & set(name))


def _head(parts: list[str], named_leaf: bool) -> str:
    """The part of the path that names an output head, or ""."""
    last = len(parts) - 1 if named_leaf or len(parts) == 1 else len(parts) - 2
    name = _without_kernel(words(parts[last]))
    for i, part in enumerate(parts):
        if _is_head(part, parts[:i], whole=i < last):
            return part
    above = parts[last - 1] if last and set(name) <= _PLAIN else ""
    carried = words(above) in (["predictions"], ["final", "layer"])
    if _is_head(above, parts[: last - 1]) or carried:
        return above
    if tuple(name) in _OUTPUT and not _in_block(parts[:last]):
        return parts[last]
    top = {w for part in parts[:last] for w in words(part)} <= _TOP
    return parts[last] if tuple(name) in _TOP_OUTPUT and top else ""


def _is_head(part: str, parents: list[str], whole: bool = False) -> bool:
    """Whether a part says "head"; ``whole``: as its only word, for a part above."""
    name = _without_kernel(words(part))
    if not name or {"pre", "router", "gate", "attn", "attention", "multi"} & set(name):
        return False
    if name in (["head"], ["lm", "head"], ["lmhead"]) or name[-1] in _LOGITS:
        return not _in_block(parents)
    if whole:
        return False
    if name[-1] in ("head", "heads"):
        return not _in_block(parents)
    if part == "W_U":
        return not _in_block(parents)
    plain = set(name[1:]) <= _LOGITS | _PLAIN | {"layer"}
    if plain and name[0] in _LOGITS:
        return True
    if plain and len(name) > 1 and name[0] in ("head", "lm"):
        return not _in_block(parents)
    embeds = any(_EMBEDDING.match(w) for w in name)
    if embeds and {"out", "output"} & set(name):
        return True
    # DistilBERT's vocab_transform is a hidden layer before the head.
    vocabulary = bool({"vocab", "vocabulary"} & set(name)) and name[-1] != "transform"
    return vocabulary and len(name) > 1 and not embeds


def _in_block(parents: list[str]) -> bool:
    return any(
        w in _BLOCK or w.endswith(("block", "blocks", "layer", "layers", "attention"))
        for part in parents
        for w in words(part)
    )
