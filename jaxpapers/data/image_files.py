"""Labelled images in other formats: IDX, CSV, CelebA, folders of PNG or JPEG.

Readers return ``images.Dataset``: float32 (n, height, width, channels) in [0, 1]. Mean
and standard deviation of each channel are those of the training split; a constant channel
has standard deviation 1, so that it is 0 when normalised.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers.data import documents, files
from jaxpapers.data.images import Dataset, Split, check_labels
from jaxpapers.data.lines import numbered

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Folder of Debian's package dataset-fashion-mnist."""

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")

MAX_PIXELS = 1 << 27
"""Of an image: decoded it has 4 bytes each, several times over."""

_LONGEST = 1 << 14  # bytes of a line of an image
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")

# Magic number -> dimensions: 1 of labels, 3 of images.
_IDX = {0x801: 1, 0x803: 3}
# Crop of aligned CelebA: upper left and lower right corner, (column, row).
_FACE = (25, 57, 153, 185)


def idx(path: str | Path) -> np.ndarray:
    """Array of an IDX file, plain or gzipped: uint8 (n,) or (n, rows, columns).

    Raises:
      FileNotFoundError: no such file.
      ValueError: a magic number other than 0x801 and 0x803, or a length other than the
        header's.
    """
    data = files.read(path)
    magic = int.from_bytes(data[:4], "big")
    if len(data) < 4 or magic not in _IDX:
        raise ValueError(
            f"{path}: starts with 0x{data[:4].hex()}; expected an IDX file of bytes, "
            "0x00000801 (labels) or 0x00000803 (images)"
        )
    dims = _IDX[magic]
    start = 4 + 4 * dims
    if len(data) < start:
        raise ValueError(f"{path}: has {len(data)} bytes, its header {start}")
    shape = struct.unpack(f">{dims}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path}: the header says {shape}, which is {math.prod(shape):,} bytes, but "
            f"{len(data) - start:,} follow"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def fashion(
    folder: str | Path = FASHION_FOLDER,
    pooled: bool = False,
    name: str = "Fashion-MNIST",
) -> Dataset:
    """Fashion-MNIST, 60,000 and 10,000 images, or MNIST, whose files have the same names.

    Args:
      folder: with {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz.
      pooled: average 2 x 2 pixels: 14 x 14 instead of 28 x 28.
      name: of the data set.

    Raises:
      FileNotFoundError: a missing file.
      ValueError: a malformed file.
    """
    train, test = (_idx_split(Path(folder), part) for part in ("train", "t10k"))
    if pooled:
        train, test = (Split(_pool(s.image), s.label) for s in (train, test))
    return _dataset(train, test, 10, name)


def mnist_csv(path: str | Path) -> Dataset:
    """5,000 images of MNIST from ``mnist_5k.csv.gz``: 4,000 for training, 1,000 for test.

    A line has 784 pixels 0 .. 255, then the class. Training takes the first four fifths
    in the order of ``numpy.random.default_rng(0).permutation``.

    Args:
      path: of the file or of its folder.

    Raises:
      ValueError: a malformed line (its number is in the message).
    """
    path = Path(path)
    path = path / "mnist_5k.csv.gz" if files.is_folder(path) else path
    rows = [_csv_row(path, *line) for line in numbered(path, longest=_LONGEST)]
    table = np.array(rows)
    if len(table) < 2:
        raise ValueError(f"{path}: expected at least 2 images, got {len(table)}")
    table = table[np.random.default_rng(0).permutation(len(table))]
    image, label = _scaled(table[:, :-1].reshape(-1, 28, 28, 1)), table[:, -1]
    label = label.astype(np.int32)
    count = len(table) * 4 // 5
    train, test = (
        Split(image[:count], label[:count]),
        Split(image[count:], label[count:]),
    )
    return _dataset(train, test, 10, "MNIST, 5,000 images")


def celeba(folder: str | Path, size: int = 64, most: int | None = None) -> Dataset:
    """Faces: rows 57 .. 185 and columns 25 .. 153 of aligned CelebA, as one class.

    Partition 0 is the training split, partition 2 the test split.

    Args:
      folder: with ``img_align_celeba/*.jpg`` and ``list_eval_partition.txt``.
      size: pixels of a side after resizing (bilinear with anti-aliasing).
      most: number of images per split, the first of each; None: all, 9 GB at 64 pixels.

    Raises:
      FileNotFoundError: a missing file.
      ModuleNotFoundError: Pillow is not installed.
      ValueError: a malformed list, an empty split, or an image of a size other than
        178 x 218.

    Reference:
      Fan and Lee, 2023, arXiv 2301.13362, for the crop; Liu, Luo, Wang and Tang, Deep
      Learning Face Attributes in the Wild, ICCV 2015, for the data.
    """
    if most is not None and most < 1:
        raise ValueError(f"most must be None or at least 1, got {most}")
    folder = Path(folder)
    names = _partitions(folder / "list_eval_partition.txt")
    inside = folder / "img_align_celeba"
    train, test = (
        _faces([inside / name for name in names[part][:most]], size) for part in "02"
    )
    return _dataset(train, test, 1, "CelebA")


def image_folder(folder: str | Path, size: int, held_out: float = 0.1) -> Dataset:
    """Images of a folder, cropped to the central square and resized, on white.

    Sub-folders are classes, in the order of their names; without any there is one class.
    Images are turned as their EXIF orientation says. Hidden files are no images;
    ``Dataset.notes`` counts others that are skipped.

    Args:
      folder: of image files (``SUFFIXES``), or of folders of image files.
      size: pixels of a side after resizing (bilinear with anti-aliasing).
      held_out: share of the test split, the end of
        ``numpy.random.default_rng(0).permutation``.

    Raises:
      FileNotFoundError: no such folder, or one without images.
      ModuleNotFoundError: Pillow is not installed.
      ValueError: images beside folders, a broken image, a share that leaves a split
        empty.
    """
    paths, labels, classes, notes = _classes(Path(folder).expanduser())
    count = round(held_out * len(paths)) if 0 < held_out < 1 else 0
    if not 0 < count < len(paths):
        raise ValueError(
            f"held_out must leave some of {len(paths)} images in both splits, got "
            f"{held_out}"
        )
    whole = _split(paths, labels, size)
    train, test = np.split(
        np.random.default_rng(0).permutation(len(paths)), [len(paths) - count]
    )
    dataset = _dataset(
        Split(whole.image[train], whole.label[train]),
        Split(whole.image[test], whole.label[test]),
        classes,
        Path(folder).name,
    )
    return dataset._replace(notes=notes)


def stretched(path: str | Path, size: int) -> np.ndarray:
    """A file's whole image, uint8 (size, size, 3), on white; its aspect may change.

    Raises:
      FileNotFoundError, ModuleNotFoundError, ValueError: see ``image_folder``.
    """
    image, path = pillow(), files.check(path)[0]
    with files.parsing(path, "broken image"):
        return _on_white(_decoded(path, image), size, image)


def every_image(folder: str | Path, size: int) -> Split:
    """All images of a folder, see ``image_folder``, in the order of their names."""
    paths, labels, _, _ = _classes(Path(folder).expanduser())
    return _split(paths, labels, size)


def pillow() -> Any:
    """Pillow's module Image.

    Raises:
      ModuleNotFoundError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            "reading PNG and JPEG needs Pillow: pip install 'jaxpapers[emoji]'"
        ) from e
    return Image


def _dataset(train: Split, test: Split, classes: int, name: str) -> Dataset:
    # In float64 and one channel at a time, for precision and small copies.
    channels = [train.image[..., c] for c in range(train.image.shape[-1])]
    mean = np.array([c.mean(dtype=np.float64) for c in channels])
    std = np.array([c.std(dtype=np.float64) for c in channels])
    return Dataset(train, test, classes, mean, np.where(std > 0, std, 1.0), name)


def _scaled(image: np.ndarray) -> np.ndarray:
    return np.divide(image, 255, dtype=np.float32)


def _pool(image: np.ndarray) -> np.ndarray:
    n, height, width, channels = image.shape
    if height % 2 or width % 2:
        raise ValueError(f"pooling needs even sides, got {height} x {width}")
    return image.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def _idx_split(folder: Path, part: str) -> Split:
    arrays = []
    for kind, dims in (("images-idx3", 3), ("labels-idx1", 1)):
        path = folder / f"{part}-{kind}-ubyte"
        path = path if path.exists() else path.with_name(path.name + ".gz")
        if not path.exists():
            raise FileNotFoundError(
                f"no file {path}, nor without .gz; Debian's package "
                f"dataset-fashion-mnist puts Fashion-MNIST into {FASHION_FOLDER}"
            )
        arrays.append(idx(path))
        if arrays[-1].ndim != dims:
            raise ValueError(
                f"{path}: has {arrays[-1].ndim} dimensions, expected {dims}"
            )
    image, label = arrays[0], arrays[1].astype(np.int32)
    if len(image) != len(label):
        raise ValueError(f"{folder}: {len(image)} {part} images, {len(label)} labels")
    check_labels(path, label, 10)
    return Split(_scaled(image)[..., None], label)


def _csv_row(path: Path, number: int, line: str) -> np.ndarray:
    try:
        row = np.array(line.split(","), np.float64)
    except ValueError:
        row = np.zeros(0)
    good = len(row) == 785 and ((row >= 0) & (row <= 255) & (row == np.rint(row))).all()
    if not good or row[-1] > 9:
        raise ValueError(
            f"{path}, line {number}: expected 784 pixels 0 .. 255 and a class 0 .. 9, "
            f"got {line[:60]!r}"
        )
    return row.astype(np.uint8)


def _partitions(listing: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {"0": [], "1": [], "2": []}
    for number, line in numbered(listing, longest=_LONGEST):
        words = line.split()
        # A name with a folder could lead outside ``img_align_celeba``.
        if len(words) != 2 or words[1] not in names or Path(words[0]).name != words[0]:
            raise ValueError(
                f"{listing}, line {number}: expected a file's name and 0, 1 or 2, got "
                f"{line[:60]!r}"
            )
        names[words[1]].append(words[0])
    if not names["0"] or not names["2"]:
        raise ValueError(f"{listing}: expected images of the partitions 0 and 2")
    return names


def _classes(folder: Path) -> tuple[list[Path], list[int], int, str]:
    """Paths and labels of the images, the number of classes, what was skipped."""
    try:
        inside = files.listing(folder)
    except FileNotFoundError:
        raise FileNotFoundError(f"no folder {folder}") from None
    folders = [p for p in inside if p.is_dir()] or [folder]
    if folders != [folder] and any(p.suffix.lower() in SUFFIXES for p in inside):
        raise ValueError(f"{folder}: has images beside folders of images")
    paths, labels = [], []
    skipped = [] if folders == [folder] else [p for p in inside if not p.is_dir()]
    for label, each in enumerate(folders):
        every = files.listing(each)
        images = [p for p in every if p.suffix.lower() in SUFFIXES]
        if not images:
            raise FileNotFoundError(f"{each}: no images with a suffix of {SUFFIXES}")
        skipped += [p for p in every if p.suffix.lower() not in SUFFIXES]
        paths += images
        labels += [label] * len(images)
    names = [f"{p.relative_to(folder)} (no image's suffix)" for p in skipped]
    notes = documents.notes(names, len(paths) + len(skipped))
    return paths, labels, len(folders), notes


def _faces(paths: list[Path], size: int) -> Split:
    return _split(paths, [0] * len(paths), size, (178, 218))


def _split(
    paths: list[Path],
    labels: list[int],
    size: int,
    expected: tuple[int, int] | None = None,
) -> Split:
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    image = np.empty((len(paths), size, size, 3), np.float32)
    for target, path in zip(image, paths):
        target[:] = _scaled(_image(path, size, expected))
    return Split(image, np.array(labels, np.int32))


def _image(path: Path, size: int, expected: tuple[int, int] | None) -> np.ndarray:
    image, path = pillow(), files.check(path)[0]
    with files.parsing(path, "broken image"):
        rgba = _decoded(path, image)
    if expected and rgba.size != expected:
        raise ValueError(f"{path}: is {rgba.size}, expected {expected} (columns, rows)")
    side = min(rgba.size)
    left, top = ((length - side) // 2 for length in rgba.size)
    # Cropped first: what is outside takes no memory then.
    rgba = rgba.crop(_FACE if expected else (left, top, left + side, top + side))
    return _on_white(rgba, size, image)


def _on_white(rgba: Any, size: int, image: Any) -> np.ndarray:
    white = image.new("RGBA", rgba.size, "white")
    white.alpha_composite(rgba)
    resized = white.convert("RGB").resize((size, size), image.Resampling.BILINEAR)
    return np.asarray(resized)


def _decoded(path: Path, image: Any) -> Any:
    """The image in RGBA, turned as a viewer shows it."""
    from PIL import ImageOps

    with image.open(path) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(
                f"{path}: has {file.width} x {file.height} pixels, more than the "
                f"{MAX_PIXELS:,} allowed; make it smaller"
            )
        # Modes of more than 8 bits would be truncated.
        if file.mode not in _MODES:
            raise ValueError(f"{path}: pixel mode {file.mode} is not supported")
        return ImageOps.exif_transpose(file).convert("RGBA")
