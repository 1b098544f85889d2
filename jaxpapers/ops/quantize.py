"""Weights stored in blocks of few bits, as GGUF files have them, back to numbers.

A row is cut into blocks of 32 weights that share a scale d, some also an offset m. Every
function takes the bytes of NumPy or of JAX, inside ``jax.jit`` too, and computes in
float32. Little-endian machines only, as all that JAX runs on.
"""

import math
from typing import Any, NamedTuple

import numpy as np


class Format(NamedTuple):
    """How weights lie in memory.

    Attributes:
      block: weights that are stored together.
      bytes: of a block.
    """

    block: int
    bytes: int


FORMATS = {
    "F32": Format(1, 4),
    "F16": Format(1, 2),
    "BF16": Format(1, 2),
    "Q4_0": Format(32, 18),
    "Q4_1": Format(32, 20),
    "Q8_0": Format(32, 34),
}


def stored_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor whose last axis is contiguous.

    Raises:
      ValueError: a format that is not known, or rows that are no whole blocks.

    Example:
      >>> stored_bytes("Q4_1", (3, 64))
      120
    """
    block, size = _format(name)
    if shape and shape[-1] % block:
        raise ValueError(
            f"rows of {name} are blocks of {block}, got {shape[-1]} weights in a row"
        )
    return math.prod(shape) // block * size


def dequantize(name: str, stored: Any, shape: tuple[int, ...]) -> Any:
    """The weights of a tensor, float32.

    ======  =======================================  =================
    format  block                                    weight
    ======  =======================================  =================
    Q4_0    d float16, 16 bytes of two q each        d (q - 8)
    Q4_1    d, m float16, 16 bytes of two q each     d q + m
    Q8_0    d float16, 32 signed bytes q             d q
    ======  =======================================  =================

    Low halves of the 16 bytes are weights 0 to 15 of the block, high halves 16 to 31.

    Args:
      name: of the format, one of ``FORMATS``.
      stored: uint8 (bytes,), of NumPy or JAX.
      shape: of the weights, the contiguous axis last.

    Raises:
      ValueError: see ``stored_bytes``; another number of bytes.

    Example:
      >>> block = np.float16([0.5, -1.0]).tobytes() + bytes(range(16))
      >>> weights = dequantize("Q4_1", np.frombuffer(block, np.uint8), (1, 32))
      >>> weights[0, :4].tolist(), weights[0, 16:].max().item()
      ([-1.0, -0.5, 0.0, 0.5], -1.0)
    """
    size = stored_bytes(name, shape)
    if stored.dtype != np.uint8 or stored.shape != (size,):
        raise ValueError(
            f"{name} of shape {shape} needs {size} bytes (uint8), got "
            f"{stored.dtype} of shape {stored.shape}"
        )
    if name == "F32":
        return stored.view("float32").reshape(shape)
    if name == "F16":
        return stored.view("float16").astype("float32").reshape(shape)
    if name == "BF16":  # The upper half of a float32.
        wide = stored.view("uint16").astype("uint32") << 16
        return wide.view("float32").reshape(shape)
    blocks = stored.reshape(-1, FORMATS[name].bytes)
    d = blocks[:, :2].view("float16").astype("float32")
    if name == "Q8_0":
        return (d * blocks[:, 2:].view("int8").astype("float32")).reshape(shape)
    if name == "Q4_0":
        return (d * (_halves(blocks[:, 2:]) - 8.0)).reshape(shape)
    m = blocks[:, 2:4].view("float16").astype("float32")
    return (d * _halves(blocks[:, 4:]) + m).reshape(shape)


def _halves(packed: Any) -> Any:
    """uint8 (blocks, 16) -> float32 (blocks, 32), low halves first."""
    concat = packed.__array_namespace__().concat
    return concat([packed & 15, packed >> 4], axis=1).astype("float32")


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"weights must be of {', '.join(FORMATS)}, got {name}")
    return FORMATS[name]
