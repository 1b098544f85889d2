"""Pickles of plain data, read without running any code that they name.

A pickle is a program: it can call anything importable and ask for any amount of memory.
``load`` runs the parts that build numbers, texts and containers, and NumPy arrays where
a format needs them; every other name is refused before it is imported.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

MAX_BYTES = 1 << 30


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> np.ndarray:
    """An empty array, which the pickle's state fills: NumPy's own takes any shape."""
    del kind, shape, typecode
    return np.empty((0,), np.uint8)


def _encode(text: str, encoding: str) -> bytes:
    """Bytes that protocol 2 stores as text; other codecs can multiply sizes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the codec {encoding!r} is not allowed")
    return text.encode(encoding)


def _dtype(name: Any, align: Any = False, copy: Any = False) -> np.dtype:
    """A dtype of plain numbers; arrays of objects or records can claim any size."""
    dtype = np.dtype(name)
    if dtype.kind not in "biuf":
        raise pickle.UnpicklingError(f"arrays of {dtype} are not allowed")
    return dtype


def _ndarray(*arguments: Any) -> Any:
    raise pickle.UnpicklingError("numpy.ndarray is not allowed to be called")


ARRAYS: Mapping[tuple[str, str], Callable] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
"""What pickled NumPy arrays name, and what is called instead."""


def load(
    path: str | Path,
    *,
    allowed: Mapping[tuple[str, str], Callable] | None = None,
    encoding: str = "ASCII",
    max_bytes: int = MAX_BYTES,
) -> Any:
    """The object in a pickle file.

    Args:
      path: of the file.
      allowed: (module, name) -> callable that stands for it, e.g. ``ARRAYS``; None:
        builtin containers, texts and numbers only.
      encoding: of Python 2's strings; "bytes" leaves them as bytes.
      max_bytes: size of the largest file that is read.

    Raises:
      ValueError: a larger file; a pickle that names anything else, is cut off, or asks
        for more memory than its size justifies.
    """
    path = Path(path).expanduser()
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path}: {size:,} bytes, more than the {max_bytes:,} allowed")
    data = path.read_bytes()
    try:
        _check_sizes(data)
        return _Unpickler(io.BytesIO(data), allowed or {}, encoding).load()
    except _ERRORS as e:
        raise ValueError(f"{path}: not a pickle of plain data: {e}") from e


# What malformed pickles make Python's unpickler raise.
_ERRORS = (
    pickle.UnpicklingError, ValueError, EOFError, LookupError, TypeError, OverflowError,
    AttributeError, MemoryError,
)  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, allowed: Mapping, encoding: str):
        super().__init__(file, encoding=encoding)
        self._allowed = allowed

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return self._allowed[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, which is not allowed"
            ) from None


def _check_sizes(data: bytes) -> None:
    """Refuses lengths beyond the file, and memo slots that no such file can fill.

    The unpickler allocates both before it reads what they are for.
    """
    for code, argument, _ in pickletools.genops(data):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(
            data
        ):
            raise pickle.UnpicklingError(f"memo slot {argument} of {len(data)} bytes")
