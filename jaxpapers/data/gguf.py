"""GGUF files: metadata at once, tensors when they are asked for.

The file is not trusted: every length is compared with what the file has before anything
is read or allocated, and nothing in it names another file.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from jaxpapers.data import files
from jaxpapers.ops import quantize

MOST_ENTRIES = 1 << 17
"""Of tensors, and of metadata."""

_MOST_STRINGS = 1 << 21
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    30: "BF16",
}  # fmt: skip
_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class Tensor(NamedTuple):
    """Where a tensor lies: its shape (contiguous axis last), format and first byte."""

    shape: tuple[int, ...]
    format: str
    start: int


class Gguf:
    """An open GGUF file of version 2 or 3.

    Attributes:
      path: of the file.
      metadata: by key; arrays of numbers are NumPy's, those of text are lists.
      tensors: by name.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, one that is cut off, or sizes that cannot be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, size = files.check(path)
        # An empty file cannot be mapped.
        self._bytes: Any = np.zeros(0, np.uint8)
        if size:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        self._view = memoryview(cast(Any, self._bytes))
        self._at = 0
        if self._take(4) != b"GGUF":
            raise ValueError(f"{self.path}: is no GGUF file")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"{self.path}: GGUF version {version}; 2 and 3 are read")
        tensors, entries = self._count("tensors"), self._count("entries of metadata")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._number("<I"))
        self.tensors = self._read_tensors(tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, the contiguous axis last: matrices are (out, in)."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32.

        Raises:
          ValueError: a format that is not read.
        """
        tensor = self.tensors[name]
        try:
            size = quantize.stored_bytes(tensor.format, tensor.shape)
        except ValueError as e:
            raise ValueError(f"{self.path}: tensor {name!r}: {e}") from None
        stored = np.asarray(self._bytes[tensor.start : tensor.start + size])
        if len(stored) < size:
            raise ValueError(
                f"{self.path}: tensor {name!r} ends after the file; copy it again"
            )
        return quantize.dequantize(tensor.format, stored, tensor.shape)

    def _read_tensors(self, count: int) -> dict[str, Tensor]:
        found = []
        for _ in range(count):
            name, axes = self._string(), self._number("<I")
            if not 1 <= axes <= 4:
                raise ValueError(f"{self.path}: tensor {name!r} has {axes} axes")
            shape = tuple(self._number("<Q") for _ in range(axes))[::-1]
            if min(shape) < 1 or math.prod(shape) > 16 * len(self._bytes):
                raise ValueError(f"{self.path}: tensor {name!r} of shape {shape}")
            kind, offset = self._number("<I"), self._number("<Q")
            found.append((name, shape, _TYPES.get(kind, f"type {kind}"), offset))
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise ValueError(f"{self.path}: alignment {align!r} is no power of two")
        first = -(-self._at // align) * align
        tensors = {}
        for name, shape, form, offset in found:
            if name in tensors:
                raise ValueError(f"{self.path}: two tensors are named {name!r}")
            if first + offset > len(self._bytes):
                raise ValueError(
                    f"{self.path}: tensor {name!r} starts after the end of the file; "
                    "copy it again"
                )
            tensors[name] = Tensor(shape, form, first + offset)
        return tensors

    def _take(self, size: int) -> bytes:
        """The next bytes."""
        if size > len(self._bytes) - self._at:
            raise ValueError(
                f"{self.path}: ends in the middle of its header, at byte {self._at:,}"
            )
        self._at += size
        return bytes(self._view[self._at - size : self._at])

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _count(self, what: str) -> int:
        count = self._number("<Q")
        if count > MOST_ENTRIES:
            raise ValueError(
                f"{self.path}: {count:,} {what}; at most {MOST_ENTRIES:,} are read"
            )
        return count

    def _string(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number("<I"), self._number("<Q"))
        return self._numbers(kind, 1)[0].item()

    def _array(self, kind: int, count: int) -> Any:
        if kind != _STRING:
            return self._numbers(kind, count)
        if count > _MOST_STRINGS:
            raise ValueError(
                f"{self.path}: a list of {count:,} texts; at most {_MOST_STRINGS:,}"
            )
        return [self._string() for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise ValueError(f"{self.path}: metadata of type {kind}, which GGUF lacks")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)
