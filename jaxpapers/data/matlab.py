"""MATLAB 5 files, checked before SciPy reads them: it allocates what a file claims."""

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxpapers.data import files

_HEADER = 128
_COMPRESSED, _MATRIX = 15, 14
_CHUNK = 1 << 20
_FREE_BYTES, _MAX_RATIO = 1 << 26, 20
_CLASSES = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_CLASSES |= {"single", "double"}


def load(path: str | Path, dimensions: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Arrays of numbers from a file of MATLAB 5 to 7.

    Args:
      path: of the file.
      dimensions: name of each array wanted -> number of its dimensions.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another format, a missing array, one of anything but numbers, or a file
        that grows to more than 20 times its size.
    """
    from scipy.io import loadmat, whosmat

    path, size = files.check(path)
    with open(path, "rb") as file:
        _check_elements(path, file, size)
    with files.parsing(path, "not a whole file of MATLAB 5 to 7"):
        found = {name: (shape, kind) for name, shape, kind in whosmat(str(path))}
    for name, count in dimensions.items():
        shape, kind = found.get(name, ((), "missing"))
        if kind not in _CLASSES or len(shape) != count:
            raise ValueError(
                f"{path}: {name} is {kind} of shape {shape}; expected numbers of {count} "
                "dimensions"
            )
    with files.parsing(path, "not a whole file of MATLAB 5 to 7"):
        content = loadmat(str(path), variable_names=list(dimensions))
    return {name: content[name] for name in dimensions}


def _check_elements(path, file, size):
    """Refuses elements beyond the file, of other kinds, or that grow too much."""
    header = file.read(_HEADER)
    if not header.startswith(b"MATLAB 5.0") or header[126:128] not in (b"IM", b"MI"):
        raise ValueError(
            f"{path}: starts with {header[:20]!r}, expected a MATLAB 5.0 MAT-file; save "
            "others (7.3 is HDF5) with -v7"
        )
    order = "<" if header[126:128] == b"IM" else ">"
    grown, most = 0, max(_FREE_BYTES, _MAX_RATIO * size)
    while tag := file.read(8):
        kind, count = struct.unpack(f"{order}II", tag.ljust(8, b"\0"))
        if kind not in (_MATRIX, _COMPRESSED) or file.tell() + count > size:
            raise ValueError(
                f"{path}: element of kind {kind} and {count:,} bytes at byte "
                f"{file.tell() - 8:,} of {size:,}: cut off or malformed"
            )
        if kind == _MATRIX:
            file.seek(count, 1)
            continue
        try:
            grown += _size(file, count, most - grown)
        except zlib.error as e:
            raise ValueError(f"{path}: a broken compressed element: {e}") from e
        if grown > most:
            raise ValueError(f"{path}: {size:,} bytes grow to more than {most:,}")


def _size(file, count, most):
    """Decompressed bytes of the next ``count``, counted up to ``most``."""
    stream, size = zlib.decompressobj(), 0
    while count and size <= most:
        chunk = file.read(min(count, _CHUNK))
        count -= len(chunk)
        while chunk and size <= most:
            size += len(stream.decompress(chunk, _CHUNK))
            chunk = stream.unconsumed_tail
    return size
