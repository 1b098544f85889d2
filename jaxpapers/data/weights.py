"""Weights of language models and text encoders: safetensors and GGUF, read and written.

``load`` gives what ``nets.transformer.Transformer`` needs, from a Hugging Face folder or
a GGUF file, one tensor at a time::

    model = weights.load(fetch.get("smollm2-135m"))
    net = Transformer(**model.net)
    logits = net.apply({"params": model.params}, tokens)

Nothing in a file is run, and no name in it leads out of its folder.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes  # noqa: F401 (gives NumPy the type bfloat16)
import numpy as np

from jaxpapers.data import decoders, encoders, files
from jaxpapers.data.decoders import Leaf
from jaxpapers.data.gguf import Gguf

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MOST_JSON = 1 << 26
_FLOATS = ("F64", "F32", "F16", "BF16")


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


@runtime_checkable
class Source(Protocol):
    """Named tensors that are read one by one."""

    path: Path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A tensor, of floats."""
        ...


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
    with _about(source.path):
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
    with _about(source.path):
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


class Folder:
    """Tensors of a Hugging Face folder; each of its files is opened once, lazily.

    Attributes:
      path: of the folder.

    Raises:
      FileNotFoundError: no such folder, or one without safetensors.
      ValueError: a damaged file, or an index that names files elsewhere.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not files.is_folder(self.path):
            raise ValueError(f"{self.path}: is a file, expected a folder")
        self._open: dict[str, Any] = {}
        if (self.path / INDEX).is_file():
            self._files = self._index()
        elif (self.path / SINGLE).is_file():
            self._files = {name: SINGLE for name in self._file(SINGLE).keys()}
        else:
            raise FileNotFoundError(f"{self.path}: has neither {SINGLE} nor {INDEX}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: tuple(self._slice(name).get_shape()) for name in self._files}

    def read(self, name: str) -> np.ndarray:
        """A tensor.

        Raises:
          ValueError: no floats; damaged.
        """
        kind = self._slice(name).get_dtype()
        if kind not in _FLOATS:
            raise ValueError(
                f"{self.path}: tensor {name!r} is of {kind}, expected one of {_FLOATS}"
            )
        path = self.path / self._files[name]
        with files.parsing(path, f"tensor {name!r} cannot be read"):
            return self._file(self._files[name]).get_tensor(name)

    def _index(self) -> dict[str, str]:
        """Tensor -> file, as the index says; the files agree with it."""
        where = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(where, dict) or not where:
            raise ValueError(f"{self.path / INDEX}: has no weight_map")
        for name, file in where.items():
            if not isinstance(file, str) or Path(file).name != file or file == "..":
                raise ValueError(
                    f"{self.path / INDEX}: {name!r} is in {file!r}, expected the name "
                    "of a file beside it"
                )
        listed = [
            (name, file) for file in set(where.values()) for name in self._names(file)
        ]
        lost = sorted(
            set(where) - {name for name, file in listed if where.get(name) == file}
        )
        if lost:
            raise ValueError(
                f"{self.path / INDEX}: {len(lost)} tensors are not in the files that it "
                f"names: {', '.join(lost[:4])}"
            )
        return {name: where.get(name, file) for name, file in listed}

    def _names(self, file: str) -> list[str]:
        return list(self._file(file).keys())

    def _slice(self, name: str) -> Any:
        return self._file(self._files[name]).get_slice(name)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            from safetensors import safe_open

            path, _ = files.check(self.path / name)
            with files.parsing(path, "not a safetensors file"):
                self._open[name] = safe_open(path, "numpy")
        return self._open[name]


class GgufModel:
    """Tensors of a GGUF file under the names, and in the order of rows, of transformers.

    Files of Llama's architecture have rows of queries and keys ordered for a rotation of
    neighbouring pairs; here the pairs are halves of a head apart.
    """

    def __init__(self, path: str | Path) -> None:
        self._gguf = Gguf(path)
        self.path = self._gguf.path
        shapes = self._gguf.shapes()
        with _about(self.path):
            self.config = decoders.gguf_config(self._gguf.metadata, shapes)
            net = decoders.fields(self.config)
        ours = {
            leaf.name.format(i=i)
            for leaf in decoders.leaves(net).values()
            # As many layers as the file can have, whatever it says.
            for i in range(min(net["layers"], len(shapes)))
        }
        self._names = {decoders.gguf_name(name): name for name in ours}
        self._heads = {"q_proj": net["heads"], "k_proj": net["kv_heads"]}
        if self.config["model_type"] not in ("llama", "mistral"):
            self._heads = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor; those that transformers lacks keep their names."""
        return {
            self._names.get(name, name): shape
            for name, shape in self._gguf.shapes().items()
        }

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32."""
        tensor = self._gguf.read(decoders.gguf_name(name))
        heads = self._heads.get(name.split(".")[-2], 0)
        return halves(tensor, heads) if heads else tensor


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows ordered for pairs (2 j, 2 j + 1), reordered for pairs (j, j + H / 2).

    Example:
      >>> halves(np.arange(8)[:, None], 2)[:, 0].tolist()
      [0, 2, 1, 3, 4, 6, 5, 7]
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no JSON object.
    """
    text = files.read(path, most=_MOST_JSON)
    with files.parsing(path, "is not JSON"):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path is or holds; None for a Hugging Face folder.

    Raises:
      FileNotFoundError: no such path.
      ValueError: a folder with several and no ``config.json``.
    """
    if not files.is_folder(path):
        return path
    if (path / "config.json").is_file():
        return None
    inside = [x for x in files.listing(path) if x.suffix == ".gguf"]
    if len(inside) > 1:
        raise ValueError(
            f"{path}: holds {[x.name for x in inside]}; name one of these files"
        )
    return inside[0] if inside else None


def _open(path: Path) -> tuple[Source, dict[str, Any]]:
    file = find_gguf(path)
    if file is None:
        return Folder(path), read_json(path / "config.json")
    model = GgufModel(file)
    return model, model.config


@contextlib.contextmanager
def _about(path: Path) -> Any:
    """Names the file in what a config is refused for."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Any:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
