"""Weights of language models and text encoders: safetensors and GGUF, read and written.

``load`` gives what ``nets.transformer.Transformer`` needs, from a Hugging Face folder or
a GGUF file, one tensor at a time::

    model = weights.load(fetch.get("smollm2-135m"))
    net = Transformer(**model.net)
    logits = net.apply({"params": model.params}, tokens)

Nothing in a file is run, and no name in it leads out of its folder.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.data import decoders, encoders
from jaxpapers.data.decoders import Leaf
from jaxpapers.data.tensors import (
    SINGLE,
    Folder,
    GgufModel,
    Source,
    about,
    find_gguf,
    read_json,
)


class Weights(NamedTuple):
    """A model that was read.

    Attributes:
      net: fields of ``nets.transformer.Transformer`` or ``nets.encoder.Encoder``.
      params: nested dict of arrays, layers stacked; kernels are (in, out).
      config: of the folder, or what the GGUF file's metadata amounts to.
      skipped: names of tensors that hold nothing that the net has.
    """

    net: dict[str, Any]
    params: dict[str, Any]
    config: dict[str, Any]
    skipped: tuple[str, ...] = ()


def load(
    path: str | Path,
    *,
    dtype: Any = np.float32,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> Weights:
    """A language model of the forms that ``decoders`` lists.

    Args:
      path: a folder with ``config.json`` and safetensors, in one file or in several with
        an index; a GGUF file; or a folder that holds one.
      dtype: of the parameters.
      place: path and array of each finished parameter -> what to keep of it, such as the
        array on a device: the host then holds one parameter at a time.

    Raises:
      FileNotFoundError: no such folder or file.
      ValueError: another architecture or option (see ``decoders.fields``); tensors that
        are missing, unexpected or of another shape, by name; a damaged file.
    """
    path = Path(path).expanduser()
    source, config = _open(path)
    with about(source.path):
        net = decoders.fields(config)
        wanted = decoders.leaves(net)
    shapes = source.shapes()
    skipped = tuple(x for x in shapes if decoders.skipped(x, net))
    params = collect(source, wanted, net["layers"], skipped, dtype, place)
    return Weights(net, params, config, skipped)


def load_encoder(path: str | Path, *, dtype: Any = np.float32) -> Weights:
    """A text encoder of BERT's form, such as MiniLM, from a Hugging Face folder.

    Raises:
      FileNotFoundError, ValueError: see ``load`` and ``encoders.fields``.
    """
    source = Folder(path)
    config = read_json(source.path / "config.json")
    with about(source.path):
        net = encoders.fields(config)
    names = source.shapes()
    prefix = "bert." if any(x.startswith("bert.") for x in names) else ""
    skipped = tuple(x for x in names if encoders.skipped(x.removeprefix(prefix)))
    wanted = encoders.leaves(net, prefix)
    params = collect(source, wanted, net["layers"], skipped, dtype)
    return Weights(net, params, config, skipped)


def collect(
    source: Source,
    wanted: Mapping[str, Leaf],
    layers: int,
    skipped: tuple[str, ...] = (),
    dtype: Any = np.float32,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """Parameters as a nested dict, each stacked from the tensors of its layers.

    Args:
      source: of the tensors.
      wanted: path of a parameter -> its tensors.
      layers: how many a name with ``{i}`` stands for.
      skipped: names of tensors that nobody needs.
      dtype: of the parameters.
      place: see ``load``.

    Raises:
      ValueError: tensors that are missing, unexpected or of another shape, by name.
    """
    check(source.path, source.shapes(), wanted, layers, skipped)
    tree: dict[str, Any] = {}
    for path, leaf in wanted.items():
        names = [leaf.name]
        if "{i}" in leaf.name:
            names = [leaf.name.format(i=i) for i in range(layers)]
        shape = leaf.shape[::-1] if leaf.transposed else leaf.shape
        array = np.empty((len(names), *shape), dtype)
        for i, name in enumerate(names):
            tensor = source.read(name)
            array[i] = tensor.T if leaf.transposed else tensor
        array = array if "{i}" in leaf.name else array[0]
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array if place is None else place(path, array)
    return tree


def check(
    path: Path,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, Leaf],
    layers: int,
    skipped: tuple[str, ...] = (),
) -> None:
    """Compares names and shapes of tensors with those of a net, before any is read.

    Raises:
      ValueError: all that differ, the first few by name.
    """
    if layers > len(found):
        raise ValueError(
            f"{path}: the config has {layers:,} layers, the file {len(found):,} tensors: "
            "some are missing"
        )
    needed = {}
    for leaf in wanted.values():
        for i in range(layers if "{i}" in leaf.name else 1):
            needed[leaf.name.format(i=i)] = leaf.shape
    odd = [
        f"{name} of shape {tuple(found[name])}, expected {shape}"
        for name, shape in needed.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems = {
        "missing": [name for name in needed if name not in found],
        "unexpected": [x for x in found if x not in needed and x not in skipped],
        "misshapen": odd,
    }
    text = "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:4])}{' ...' if names[4:] else ''}"
        for kind, names in problems.items()
        if names
    )
    if text:
        raise ValueError(f"{path}: tensors do not fit its config: {text}")


def save(
    folder: str | Path,
    net: Mapping[str, Any],
    params: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Writes a Hugging Face folder: ``config.json``, ``model.safetensors``, float32.

    Args:
      folder: made if it is not there; files in it are replaced.
      net: fields of the ``Transformer``.
      params: of it; adapters merged before by ``nets.lora.lora_apply``.
      config: further entries of the config, such as the ids of special tokens.
      tokenizer: written as ``tokenizer.json``; see ``data.tokenizer``.

    Raises:
      ValueError: a net that transformers does not have; parameters that do not fit it.
    """
    from safetensors.numpy import save_file

    folder = Path(folder).expanduser()
    net = {"bias": "none", "qk_norm": False, "tied": False, **net}
    written = {**(config or {}), **decoders.config(net)}
    tensors = tensors_of(decoders.leaves(net), params, net["layers"])
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as temporary:
        work = Path(temporary)
        # Readers of transformers look for this note.
        save_file(tensors, work / SINGLE, {"format": "pt"})
        text = json.dumps(written, indent=1, sort_keys=True) + "\n"
        (work / "config.json").write_text(text)
        if tokenizer is not None:
            tokenizer.save(work / "tokenizer.json")
        for file in sorted(work.iterdir()):
            os.replace(file, folder / file.name)
    return folder


def tensors_of(
    wanted: Mapping[str, Leaf], params: Mapping[str, Any], layers: int
) -> dict[str, np.ndarray]:
    """Tensors by their names in a file, float32; undoes ``collect``.

    Raises:
      ValueError: parameters that are missing, unexpected or of another shape.
    """
    flat = dict(_flat(params))
    if set(flat) != set(wanted):
        raise ValueError(
            f"parameters missing: {sorted(set(wanted) - set(flat))}, unexpected: "
            f"{sorted(set(flat) - set(wanted))}"
        )
    tensors = {}
    for path, leaf in wanted.items():
        stacked, array = "{i}" in leaf.name, np.asarray(flat[path])
        shape = leaf.shape[::-1] if leaf.transposed else leaf.shape
        expected = (layers, *shape) if stacked else shape
        if array.shape != expected:
            raise ValueError(f"{path} has shape {array.shape}, expected {expected}")
        for i, part in enumerate(array if stacked else array[None]):
            part = part.T if leaf.transposed else part
            tensors[leaf.name.format(i=i)] = np.ascontiguousarray(part, np.float32)
    return tensors


def _open(path: Path) -> tuple[Source, dict[str, Any]]:
    file = find_gguf(path)
    if file is None:
        return Folder(path), read_json(path / "config.json")
    model = GgufModel(file)
    return model, model.config


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
