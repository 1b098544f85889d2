"""Text encoders of BERT's form as their files describe them."""

from collections.abc import Mapping
from typing import Any

from jaxpapers.data.decoders import Leaf, positive

_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
    "max_position_embeddings": "positions",
    "type_vocab_size": "types",
}


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``nets.encoder.Encoder`` for a ``config.json``.

    Raises:
      ValueError: another architecture, activation or kind of positions; missing sizes.
    """
    expected = {
        "model_type": ("bert",),
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute", None),
    }
    for name, known in expected.items():
        if config.get(name) not in known:
            raise ValueError(f"{name} must be {known[0]!r}, got {config.get(name)!r}")
    sizes = {ours: positive(config, theirs) for theirs, ours in _SIZES.items()}
    return {**sizes, "epsilon": float(config.get("layer_norm_eps", 1e-12))}


def leaves(net: Mapping[str, Any], prefix: str = "") -> dict[str, Leaf]:
    """Parameters of an ``Encoder`` of these fields, by path, and their tensors.

    Args:
      net: fields.
      prefix: of all names of tensors.
    """
    width, hidden = net["width"], net["hidden"]
    tree = {}
    tables = {"word": "vocab_size", "position": "positions", "token_type": "types"}
    for name, size in tables.items():
        tensor = f"{prefix}embeddings.{name}_embeddings.weight"
        tree[f"{name}/embedding"] = Leaf(tensor, (net[size], width))
    layer = prefix + "encoder.layer.{i}."
    dense = {
        "query": ("attention.self.query", (width, width)),
        "key": ("attention.self.key", (width, width)),
        "value": ("attention.self.value", (width, width)),
        "out": ("attention.output.dense", (width, width)),
        "up": ("intermediate.dense", (hidden, width)),
        "down": ("output.dense", (width, hidden)),
    }
    for path, (name, shape) in dense.items():
        tree[f"layers/{path}/kernel"] = Leaf(f"{layer}{name}.weight", shape, True)
        tree[f"layers/{path}/bias"] = Leaf(f"{layer}{name}.bias", shape[:1])
    norms = {
        "norm": f"{prefix}embeddings.LayerNorm",
        "layers/attention_norm": f"{layer}attention.output.LayerNorm",
        "layers/mlp_norm": f"{layer}output.LayerNorm",
    }
    for path, name in norms.items():
        tree[f"{path}/scale"] = Leaf(f"{name}.weight", (width,))
        tree[f"{path}/bias"] = Leaf(f"{name}.bias", (width,))
    return tree


def skipped(name: str) -> bool:
    """Whether a tensor is none of the encoder's: stored positions, BERT's own heads."""
    return name.startswith(("pooler.", "cls.")) or name == "embeddings.position_ids"
