"""Labelled images: CIFAR and SVHN from their original files, scanned digits.

Images are float32 (n, height, width, channels) in [0, 1]; diffusion models take them in
[-1, 1], see ``to_signed``. ``image_files`` reads more formats.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxpapers.data import arrays, matlab, pickles
from jaxpapers.data.lines import numbered, whole

DIGITS_TRAIN = 1348

_LONGEST = 1 << 12  # bytes of a line of a scan
# Of the pixels; labels are lists, in files that others wrote anew also arrays.
_CIFAR_TYPES = ("uint8", "int32", "int64")


class Split(NamedTuple):
    """Images and their classes, int32."""

    image: np.ndarray
    label: np.ndarray


class Dataset(NamedTuple):
    """Labelled images.

    Attributes:
      train, test: splits.
      classes: number of classes.
      mean: of each channel, for ``normalize``.
      std: standard deviation of each channel, for ``normalize``.
      name: of the data set, for titles.
      notes: which files were skipped; "" for none.
    """

    train: Split
    test: Split
    classes: int
    mean: np.ndarray
    std: np.ndarray
    name: str
    notes: str = ""


class DigitParts(NamedTuple):
    """Scans for pretraining, for a reward classifier, for a held-out classifier."""

    pretraining: Split
    reward: Split
    held_out: Split


def examples(dataset: Dataset, seed: int = 0) -> arrays.Examples:
    """Batches of the training split: normalised ``image``, ``label``."""

    def transform(batch):
        return {**batch, "image": normalize(dataset, batch["image"])}

    return arrays.Examples(dataset.train._asdict(), seed, transform)


def normalize(dataset: Dataset, image: np.ndarray) -> np.ndarray:
    """(image - mean) / std, with the data set's statistics per channel."""
    return ((image - dataset.mean) / dataset.std).astype(np.float32)


def to_signed(image: np.ndarray) -> np.ndarray:
    """2 x - 1: images in [0, 1] to the [-1, 1] of diffusion models.

    Raises:
      ValueError: values outside [0, 1], e.g. of images in [-1, 1].
    """
    # Also refuses NaN.
    if image.size and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"images must lie in [0, 1], got {image.min()} .. {image.max()}"
        )
    return (2 * image - 1).astype(np.float32)


def from_signed(image: np.ndarray) -> np.ndarray:
    """(x + 1) / 2, clipped to [0, 1]: samples of a diffusion model as images.

    Raises:
      ValueError: NaN or infinity.
    """
    if not np.isfinite(image).all():
        raise ValueError("samples must be finite, got NaN or infinity")
    return ((image + 1) / 2).clip(0, 1).astype(np.float32)


def digits(folder: str | Path) -> Dataset:
    """Scanned digits from ``digits.csv.gz``: 1,348 for training and 449 for test.

    The order is ``numpy.random.default_rng(0).permutation``.

    Raises:
      ValueError: a malformed line (its number is in the message).
    """
    image, label = _shuffled_digits(folder)
    count = min(DIGITS_TRAIN, len(label) - 1)
    train = Split(image[:count], label[:count])
    mean, std = train.image.mean((0, 1, 2)), train.image.std((0, 1, 2))
    test = Split(image[count:], label[count:])
    return Dataset(train, test, 10, mean, std, "scanned digits")


def digit_parts(folder: str | Path) -> DigitParts:
    """The scanned digits in three disjoint parts: 899, 449 and 449.

    The order is ``numpy.random.default_rng(0).permutation``; each classifier gets a
    quarter of the scans, rounded down.

    Raises:
      ValueError: a malformed line (its number is in the message), or fewer than 4 scans.
    """
    image, label = _shuffled_digits(folder)
    quarter = len(label) // 4
    if not quarter:
        raise ValueError(f"three parts need at least 4 scans, got {len(label)}")
    ends = (len(label) - 2 * quarter, len(label) - quarter)
    return DigitParts(*map(Split, np.split(image, ends), np.split(label, ends)))


# Segments of a digit: a to f clockwise from the top, g in the middle.
_SEGMENTS = "abcdef bc abged abgcd fgbc afgcd afgedc abc abcdefg abcdfg".split()


def segment_digits(count: int = 1200, seed: int = 0) -> DigitParts:
    """Digits of seven segments on 8 x 8 pixels, for trials without any file.

    Args:
      count: images, of which a half and two quarters are the parts.
      seed: of labels, places, ink and noise.

    Returns:
      As ``digit_parts``.
    """
    image, label = segment_glyphs(None, count, seed)
    ends = (count // 2, count // 2 + count // 4)
    return DigitParts(*map(Split, np.split(image, ends), np.split(label, ends)))


def segment_glyphs(patterns: Sequence[str] | None, count: int, seed: int = 0) -> Split:
    """Glyphs of seven segments on 8 x 8 pixels.

    Args:
      patterns: segments of each class, such as "abc", a to f clockwise from the top, g
        in the middle; None: the ten digits.
      count: images.
      seed: of labels, places, ink and noise.
    """
    patterns = _SEGMENTS if patterns is None else patterns
    places = {
        "a": np.s_[0, :4], "b": np.s_[:4, 3], "c": np.s_[3:, 3], "d": np.s_[6, :4],
        "e": np.s_[3:, 0], "f": np.s_[:4, 0], "g": np.s_[3, :4],
    }  # fmt: skip
    glyphs = np.zeros((len(patterns), 7, 4), np.float32)
    for glyph, segments in zip(glyphs, patterns):
        for segment in segments:
            glyph[places[segment]] = 1
    rng = np.random.default_rng(seed)
    label = rng.integers(len(patterns), size=count).astype(np.int32)
    ink = rng.uniform(0.6, 1, (count, 1, 1))
    image = np.abs(rng.normal(0, 0.05, (count, 8, 8)))
    for x, glyph, top, left in zip(
        image,
        ink * glyphs[label],
        rng.integers(2, size=count),
        rng.integers(5, size=count),
    ):
        x[top : top + 7, left : left + 4] += glyph
    return Split(np.clip(image, 0, 1).astype(np.float32)[..., None], label)


def digit_halves(folder: str | Path) -> tuple[Split, Split]:
    """The scanned digits in two disjoint halves, 899 and 898.

    The order is ``numpy.random.default_rng(0).permutation``. The first half is for a
    generative model, the second for the held-out classifier that evaluates it.

    Raises:
      ValueError: a malformed line (its number is in the message), or fewer than 2 scans.
    """
    image, label = _shuffled_digits(folder)
    if len(label) < 2:
        raise ValueError(f"two halves need at least 2 scans, got {len(label)}")
    count = -(-len(label) // 2)
    return Split(image[:count], label[:count]), Split(image[count:], label[count:])


def cifar(folder: str | Path, classes: int = 10) -> Dataset:
    """CIFAR-10 or CIFAR-100 from the authors' "python version" files.

    Args:
      folder: with data_batch_1 .. 5 and test_batch, or with train and test; or the folder
        that has cifar-10-batches-py or cifar-100-python in it.
      classes: 10 or 100.

    Raises:
      FileNotFoundError: a missing file.
      ValueError: another number of classes, or a malformed file.
    """
    if classes not in (10, 100):
        raise ValueError(f"classes must be 10 or 100, got {classes}")
    small = classes == 10
    inside = Path(folder) / ("cifar-10-batches-py" if small else "cifar-100-python")
    folder = inside if inside.is_dir() else Path(folder)
    names = [f"data_batch_{i}" for i in range(1, 6)] if small else ["train"]
    key = b"labels" if small else b"fine_labels"
    parts = [_cifar_file(folder / name, key, classes) for name in names]
    train = Split(*(np.concatenate(x) for x in zip(*parts)))
    test = _cifar_file(folder / ("test_batch" if small else "test"), key, classes)
    # As in the released code of Rocket Launching, for both sets.
    mean, std = np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7])
    return Dataset(train, test, classes, mean / 255, std / 255, f"CIFAR-{classes}")


def svhn(folder: str | Path) -> Dataset:
    """SVHN's cropped digits from train_32x32.mat and test_32x32.mat.

    Args:
      folder: with these files; extra_32x32.mat, if present, adds to the training split.

    Raises:
      FileNotFoundError: a missing file.
      ValueError: a malformed file.
    """
    folder = Path(folder)
    names = ["train_32x32.mat"]
    names += ["extra_32x32.mat"] if (folder / "extra_32x32.mat").exists() else []
    parts = [svhn_file(folder / name) for name in names]
    train = Split(*(np.concatenate(x) for x in zip(*parts)))
    mean, std = train.image.mean((0, 1, 2)), train.image.std((0, 1, 2))
    return Dataset(train, svhn_file(folder / "test_32x32.mat"), 10, mean, std, "SVHN")


def _shuffled_digits(folder):
    path = Path(folder) / "digits.csv.gz"
    rows = [_digit(path, *line) for line in numbered(path, longest=_LONGEST)]
    if not rows:
        raise ValueError(f"{path}: no scans")
    table = np.array(rows, np.int32)
    order = np.random.default_rng(0).permutation(len(table))
    image = (table[order, :-1] / 16.0).astype(np.float32).reshape(-1, 8, 8, 1)
    return image, table[order, -1]


def _digit(path, number, line):
    try:
        values = [whole(x.strip()) for x in line.split(",")]
    except ValueError:
        values = []
    good = len(values) == 65 and 0 <= min(values) <= max(values) <= 16
    if not good or values[-1] > 9:
        raise ValueError(
            f"{path}, line {number}: expected 64 grey levels 0 .. 16 and a class 0 .. 9, "
            f"got {line[:60]!r}"
        )
    return values


def _cifar_file(path: Path, key: bytes, classes: int) -> Split:
    try:
        batch = pickles.load(path, allowed=_CIFAR_TYPES, encoding="bytes")
    except ValueError as e:
        raise ValueError(f"{path}: not a batch of CIFAR-{classes}: {e}") from e
    if not isinstance(batch, dict) or b"data" not in batch or key not in batch:
        raise ValueError(
            f"{path}: not a batch of CIFAR-{classes}; expected a pickled dict with "
            f"{key.decode()} and data of n x 3072 bytes"
        )
    image, label = batch[b"data"], batch[key]
    if isinstance(label, list) and all(type(x) is int for x in label):
        label = np.array([min(max(x, -1), classes) for x in label], np.int64)
    if not isinstance(label, np.ndarray) or label.dtype.kind not in "iu":
        raise ValueError(f"{path}: {key.decode()} must be integers")
    kind = getattr(image, "dtype", type(image).__name__), getattr(image, "shape", "")
    if kind != (np.uint8, (*label.shape, 3072)) or label.ndim != 1:
        raise ValueError(
            f"{path}: data must be uint8 of shape ({len(label)}, 3072), got {kind[0]} "
            f"{kind[1]}"
        )
    check_labels(path, label, classes)
    # Stored as (channel, row, column).
    image = image.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split((image / 255.0).astype(np.float32), label.astype(np.int32))


def svhn_file(path: Path) -> Split:
    """Images and labels of one of SVHN's files.

    Raises:
      FileNotFoundError, ValueError: a missing or malformed file.
    """
    content = matlab.load(path, {"X": 4, "y": 2})
    image, label = content["X"], content["y"].reshape(-1)
    if image.shape != (32, 32, 3, len(label)) or image.dtype != np.uint8:
        raise ValueError(
            f"{path}: X must be uint8 of shape (32, 32, 3, {len(label)}), got "
            f"{image.dtype} {image.shape}"
        )
    if not np.isin(label, np.arange(11)).all():
        raise ValueError(f"{path}: y must be 1 .. 10 (or 0), got {label[:5]}")
    label = label.astype(np.int32) % 10  # 10 stands for the digit 0.
    check_labels(path, label, 10)
    return Split((image.transpose(3, 0, 1, 2) / 255.0).astype(np.float32), label)


def check_labels(path: Path, label: np.ndarray, classes: int) -> None:
    """Raises ValueError, with the file's name, for labels outside 0 .. classes - 1."""
    if len(label) == 0 or label.min() < 0 or label.max() >= classes:
        raise ValueError(f"{path}: labels must be 0 .. {classes - 1}, got {label[:5]}")
