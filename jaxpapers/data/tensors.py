"""Named tensors of files: safetensors in Hugging Face folders, and GGUF.

Nothing in a file is run, and no name in it leads out of its folder.
"""

import contextlib
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes  # noqa: F401 (gives NumPy the type bfloat16)
import numpy as np

from jaxpapers.data import decoders, files
from jaxpapers.data.gguf import Gguf

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MOST_JSON = 1 << 26
_FLOATS = ("F64", "F32", "F16", "BF16")


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
        with about(self.path):
            self.config = decoders.gguf_config(self._gguf.metadata, shapes)
            if decoders.ROPE_FACTORS in shapes:
                factors = self._gguf.read(decoders.ROPE_FACTORS).ravel()
                scaling = decoders.gguf_scaling(factors, self.config)
                self.config["rope_scaling"] = scaling
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
        """Shape of each tensor; those that transformers lacks keep their names.

        The factors of frequencies are none: they are in ``config``.
        """
        return {
            self._names.get(name, name): shape
            for name, shape in self._gguf.shapes().items()
            if name != decoders.ROPE_FACTORS
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


@contextlib.contextmanager
def about(path: Path) -> Generator[None, None, None]:
    """Names the file in what a config is refused for."""
    try:
        yield
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
