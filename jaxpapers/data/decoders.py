"""Language models as their files describe them: fields of ours, names of their tensors.

Llama 3, SmolLM2, Mistral without a window, Qwen2, Qwen2.5 and Qwen3 are one architecture,
``nets.transformer.Transformer``, with these fields set. What else a config asks for is
refused by name, so that no model is computed wrongly.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.ops.rope_scaling import Scaling

MODELS = ("llama", "mistral", "qwen2", "qwen3")

# What a config may say of things that the architecture does not have.
_NEUTRAL = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
}


class Leaf(NamedTuple):
    """A parameter of ours and the tensors it is made of.

    Attributes:
      name: of the tensor; with ``{i}``, of each layer, which ours stacks.
      shape: of the tensor in the file, which has matrices as (out, in).
      transposed: ours is (in, out).
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``nets.transformer.Transformer`` for a ``config.json``.

    Args:
      config: of Hugging Face transformers, of any version: frequencies are read from
        ``rope_parameters`` or from ``rope_theta`` and ``rope_scaling``.

    Raises:
      ValueError: another architecture, an option that ours lacks, a missing size.

    Example:
      >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
      >>> heads = {"num_attention_heads": 2, "intermediate_size": 16}
      >>> fields({"model_type": "qwen2", **sizes, **heads})["bias"]
      'qkv'
    """
    model = config.get("model_type")
    if model not in MODELS:
        raise ValueError(f"model_type must be one of {MODELS}, got {model!r}")
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in neutral:
            raise ValueError(
                f"{name}={config[name]!r} is not written, expected {neutral[0]!r}"
            )
    _refuse_windows(config, model)
    sizes = {ours: positive(config, theirs) for theirs, ours in _SIZES.items()}
    theta, scaling = _rope(config)
    heads = sizes["heads"]
    if not config.get("head_dim") and sizes["width"] % heads:
        raise ValueError(
            f"hidden_size {sizes['width']} is no multiple of {heads} heads, and the "
            "config has no head_dim"
        )
    kv_heads = config.get("num_key_value_heads") or heads
    return {
        **sizes,
        "kv_heads": positive({"num_key_value_heads": kv_heads}, "num_key_value_heads"),
        "head_dim": config.get("head_dim") or sizes["width"] // heads,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qk_norm": model == "qwen3",
        "bias": "qkv" if model == "qwen2" else "none",
        "tied": bool(config.get("tie_word_embeddings", False)),
        "epsilon": float(config.get("rms_norm_eps", 1e-6)),
    }


def config(net: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of transformers for fields of ours; undoes ``fields``.

    Raises:
      ValueError: a net that none of its architectures is.
    """
    plain = {"norm": "rms", "mlp": "swiglu", "position": "rope", "causal": True}
    for name, expected in {**plain, "window": 0}.items():
        if net.get(name, expected) != expected:
            raise ValueError(
                f"net.{name} must be {expected!r} in a Hugging Face folder, got "
                f"{net[name]!r}"
            )
    bias, normed = net.get("bias", "none"), bool(net.get("qk_norm"))
    known = {("none", False): "Llama", ("qkv", False): "Qwen2", ("none", True): "Qwen3"}
    if (bias, normed) not in known:
        raise ValueError(
            "a Hugging Face folder is of Llama (no bias), Qwen2 (net.bias='qkv') or "
            f"Qwen3 (net.qk_norm); got bias {bias!r} and qk_norm {normed}"
        )
    model, scaling = known[bias, normed], net.get("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        rope |= {
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.trained,
        }
    theta = net.get("rope_theta", 10_000.0)
    heads = net["heads"]
    return {
        "architectures": [f"{model}ForCausalLM"],
        "model_type": model.lower(),
        "dtype": "float32",
        **{theirs: net[ours] for theirs, ours in _SIZES.items()},
        "num_key_value_heads": net.get("kv_heads") or heads,
        "head_dim": net.get("head_dim") or net["width"] // heads,
        "hidden_act": "silu",
        "rms_norm_eps": net.get("epsilon", 1e-6),
        "tie_word_embeddings": bool(net.get("tied")),
        # The newer form, and the one before it.
        "rope_parameters": {**rope, "rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else rope,
    }


def leaves(net: Mapping[str, Any]) -> dict[str, Leaf]:
    """Parameters of a ``Transformer`` of these fields, by path, and their tensors."""
    width, hidden, rows = net["width"], net["hidden"], net["heads"] * net["head_dim"]
    columns = net["kv_heads"] * net["head_dim"]
    layer, own = "model.layers.{i}.", "layers/"
    matrices = {
        "attention/query": ("self_attn.q_proj", (rows, width)),
        "attention/key": ("self_attn.k_proj", (columns, width)),
        "attention/value": ("self_attn.v_proj", (columns, width)),
        "attention/out": ("self_attn.o_proj", (width, rows)),
        "mlp/gate": ("mlp.gate_proj", (hidden, width)),
        "mlp/up": ("mlp.up_proj", (hidden, width)),
        "mlp/down": ("mlp.down_proj", (width, hidden)),
    }
    tree = {
        f"{own}{path}/kernel": Leaf(f"{layer}{name}.weight", shape, True)
        for path, (name, shape) in matrices.items()
    }
    if net["bias"] == "qkv":
        for path in ("attention/query", "attention/key", "attention/value"):
            name, (out, _) = matrices[path]
            tree[f"{own}{path}/bias"] = Leaf(f"{layer}{name}.bias", (out,))
    norms = {
        "attention_norm": ("input_layernorm", width),
        "mlp_norm": ("post_attention_layernorm", width),
    }
    if net["qk_norm"]:
        norms["attention/query_norm"] = ("self_attn.q_norm", net["head_dim"])
        norms["attention/key_norm"] = ("self_attn.k_norm", net["head_dim"])
    for path, (name, size) in norms.items():
        tree[f"{own}{path}/scale"] = Leaf(f"{layer}{name}.weight", (size,))
    table = (net["vocab_size"], width)
    tree["embed/embedding"] = Leaf("model.embed_tokens.weight", table)
    tree["norm/scale"] = Leaf("model.norm.weight", (width,))
    if not net["tied"]:
        tree["head/kernel"] = Leaf("lm_head.weight", table, True)
    return tree


def skipped(name: str, net: Mapping[str, Any]) -> bool:
    """Whether a tensor holds nothing of its own: a tied head, stored frequencies."""
    tied = name == "lm_head.weight" and net["tied"]
    return tied or name.endswith(".rotary_emb.inv_freq")


def gguf_config(metadata: Mapping[str, Any], shapes: Mapping[str, Any]) -> dict:
    """The ``config.json`` that a GGUF file's metadata amounts to.

    Raises:
      ValueError: another architecture, missing or wrong entries, scaled frequencies of
        another kind than linear.
    """
    model = metadata.get("general.architecture")
    if model not in MODELS:
        raise ValueError(f"general.architecture must be one of {MODELS}, got {model!r}")

    def entry(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{model}.{name}", default)
        if isinstance(value, list | np.ndarray):
            raise ValueError(f"{model}.{name} differs by layer, which is not written")
        return value

    scaling, kind = None, entry("rope.scaling.type", "none")
    if kind != "none":
        scaling = {"rope_type": kind, "factor": entry("rope.scaling.factor")}
    heads = entry("attention.head_count")
    head_dim = entry("attention.key_length", entry("rope.dimension_count"))
    return {
        "model_type": model,
        "vocab_size": shapes.get("token_embd.weight", (None,))[0],
        "hidden_size": entry("embedding_length"),
        "num_hidden_layers": entry("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": entry("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": entry("feed_forward_length"),
        # Stored as float32: 9.99999974e-06 is 1e-05.
        "rms_norm_eps": _short(entry("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": entry("rope.freq_base", 10_000.0),
        "rope_scaling": scaling,
        "max_position_embeddings": entry("context_length"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }


ROPE_FACTORS = "rope_freqs.weight"
"""What GGUF files of Llama 3.1 and later divide the rotary frequencies by."""
_LLAMA3 = Scaling(kind="llama3", factor=1.0)


def gguf_scaling(factors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``rope_scaling`` of a config that these factors amount to.

    The file has the factors alone. They are Llama 3's if its interpolation, between the
    wavelengths that all of its models have, gives them.

    Args:
      factors: (head_dim / 2,).
      config: with ``head_dim`` and ``rope_theta``.

    Raises:
      ValueError: another number of factors, or those of another scaling.
    """
    half = (config.get("head_dim") or 0) // 2
    own, factor = _LLAMA3, float(np.max(factors, initial=0.0))
    frequency = config["rope_theta"] ** (-np.arange(half) / max(half, 1))
    waves = own.trained * frequency / (2 * np.pi)
    kept = np.clip((waves - own.low) / (own.high - own.low), 0, 1)
    if (
        factors.shape != (half,)
        or factor <= 0
        or not np.allclose(factors, 1 / (kept + (1 - kept) / factor), rtol=1e-3)
    ):
        raise ValueError(
            f"{ROPE_FACTORS}: expected {half} factors of Llama 3's scaling, a context "
            f"of {own.trained}; got {factors.shape} from {factors[:3]} to {factors[-3:]}"
        )
    return {
        "rope_type": own.kind,
        "factor": factor,
        "low_freq_factor": own.low,
        "high_freq_factor": own.high,
        "original_max_position_embeddings": own.trained,
    }


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a tensor of transformers.

    Example:
      >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
      'blk.3.attn_q.weight'
    """
    for theirs, gguf in _GGUF.items():
        name = name.replace(theirs, gguf)
    return name


def positive(config: Mapping[str, Any], name: str) -> int:
    """The size that a config gives.

    Raises:
      ValueError: none, or no integer of 1 or more.
    """
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of 1 or more, got {value!r}")
    return value


# In this order: what replaces one must not hold a later one.
_GGUF = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output", "model.layers": "blk", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _short(value: Any) -> float:
    return float(np.format_float_positional(np.float32(value), unique=True))


def _refuse_windows(config: Mapping[str, Any], model: str) -> None:
    """Attention to a part of the context only."""
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(f"layers of {sorted(kinds)} are not written")
    used = config.get("use_sliding_window", model == "mistral")
    if used and config.get("sliding_window"):
        raise ValueError(
            f"sliding_window={config['sliding_window']} is not written, expected null"
        )


def _rope(config: Mapping[str, Any]) -> tuple[float, Scaling | None]:
    """Base and scaling of the rotary frequencies, from either form of a config."""
    new = config.get("rope_parameters") or {}
    theta = new.get("rope_theta", config.get("rope_theta", 10_000.0))
    scaling = new or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    names = {
        "factor": "factor",
        "low_freq_factor": "low",
        "high_freq_factor": "high",
        "original_max_position_embeddings": "trained",
    }
    needed = names if kind == "llama3" else {"factor": "factor"}
    numbers: dict[str, Any] = {
        ours: scaling.get(theirs) for theirs, ours in needed.items()
    }
    wrong = [k for k, v in numbers.items() if not isinstance(v, int | float)]
    if kind in ("llama3", "linear") and wrong:
        raise ValueError(f"the scaling of RoPE, {kind}, lacks numbers for {wrong}")
    if numbers["factor"] is None:  # Of a kind that is refused by its name.
        numbers["factor"] = 1.0
    return float(theta), Scaling(kind=kind, **numbers)
