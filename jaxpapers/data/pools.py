"""Pools and test sets of outliers in their original formats, read piece by piece.

A pool has ``len`` and ``read(index)``, as ``outliers.Pool``; what it holds in memory is
one file of several. Images larger than asked for are cropped where their index decides,
so that an item is the same image whenever it is read.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from jaxpapers.data import files, image_files, images, outliers, pickles
from jaxpapers.data.images import Split

ORIGINAL = ("cifar-10", "cifar-100", "svhn")
"""ID images whose original files the user has."""

MAX_BYTES = 1 << 32
"""Of a file of a pool; ImageNet's at 64 x 64 pixels have 1.6 GB."""

_TYPES = ("uint8", "int32", "int64", "float32", "float64")
_RECORD = 3072  # bytes of an image of 32 x 32 pixels


class Files:
    """A pool in several files, of which the last one read is in memory.

    Args:
      paths: of the files, in order.
      load: path -> images uint8 (n, H, W, C).
      size: pixels of a side after cropping.
    """

    def __init__(
        self, paths: Sequence[Path], load: Callable[[Path], np.ndarray], size: int
    ):
        self.paths, self.load, self.size = list(paths), load, size
        self._last: tuple[int, np.ndarray | None] = (-1, None)
        self.ends = np.cumsum([len(self._file(i)) for i in range(len(self.paths))])

    def __len__(self) -> int:
        """Number of images."""
        return int(self.ends[-1])

    def read(self, index: np.ndarray) -> np.ndarray:
        """Images uint8 (len(index), size, size, C), each file opened once."""
        index = np.asarray(index)
        owner = np.searchsorted(self.ends, index, "right")
        starts = np.concatenate([[0], self.ends[:-1]])
        out: np.ndarray | None = None
        for i in np.unique(owner):
            mine = owner == i
            rows = self._file(int(i))[index[mine] - starts[i]]
            part = cropped(rows, index[mine], self.size)
            if out is None:
                out = np.empty((len(index), *part.shape[1:]), np.uint8)
            out[mine] = part
        assert out is not None
        return out

    def _file(self, i: int) -> np.ndarray:
        if self._last[0] != i:
            self._last = (-1, None)  # Frees one before the next is read.
            self._last = (i, self.load(self.paths[i]))
        content = self._last[1]
        assert content is not None
        return content


class TinyImages:
    """80 Million Tiny Images: ``tiny_images.bin``, mapped, without those of CIFAR.

    A record is an image of 32 x 32 pixels: three planes, each column by column. The data
    set was withdrawn by its authors.

    Args:
      folder: with ``tiny_images.bin`` and, if there, ``80mn_cifar_idxs.txt``, indices
        from 1 of images to leave out.

    Raises:
      FileNotFoundError: no file.
      ValueError: not a whole number of records, or an index outside the file.
    """

    def __init__(self, folder: str | Path):
        path, size = files.check(Path(folder) / "tiny_images.bin")
        if not size or size % _RECORD:
            raise ValueError(
                f"{path}: has {size:,} bytes, expected a multiple of {_RECORD}"
            )
        self.records = np.memmap(path, np.uint8, "r").reshape(-1, _RECORD)
        kept = np.ones(len(self.records), bool)
        listing = Path(folder) / "80mn_cifar_idxs.txt"
        if listing.exists():
            kept[_indices(listing, len(kept))] = False
        self.kept = np.flatnonzero(kept)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.kept)

    def read(self, index: np.ndarray) -> np.ndarray:
        """Images uint8 (len(index), 32, 32, 3)."""
        planes = np.asarray(self.records[self.kept[index]]).reshape(-1, 3, 32, 32)
        return planes.transpose(0, 3, 2, 1)


def imagenet(folder: str | Path, size: int = 32) -> Files:
    """Downsampled ImageNet: ``train_data_batch_1`` .. ``10``, pickles or .npz.

    Args:
      folder: with as many of the files as are there, at least one.
      size: pixels of a side; larger images are cropped, not resized.

    Raises:
      FileNotFoundError: no file.
      ValueError: a malformed file.
    """
    names = [f"train_data_batch_{i}" for i in range(1, 11)]
    paths = [Path(folder) / f"{name}{end}" for name in names for end in ("", ".npz")]
    paths = [path for path in paths if path.exists()]
    if not paths:
        raise FileNotFoundError(
            f"no file {names[0]}, nor with .npz, in {folder}: a pool of ImageNet is the "
            "downsampled images' original files"
        )
    return Files(paths, _imagenet_file, size)


def pool(folder: str | Path, size: int = 32) -> Files | TinyImages:
    """The pool of a folder: Tiny Images, or downsampled ImageNet.

    Raises:
      FileNotFoundError, ValueError: see ``TinyImages`` and ``imagenet``.
    """
    if (Path(folder) / "tiny_images.bin").exists():
        return TinyImages(folder)
    return imagenet(folder, size)


def cifar_binary(folder: str | Path, classes: int = 10) -> tuple[Split, Split]:
    """CIFAR-10 or CIFAR-100 from the "binary version", training and test, uint8.

    Args:
      folder: with data_batch_1.bin .. 5 and test_batch.bin, or train.bin and test.bin.
      classes: 10, or 100, whose records have a coarse label before the fine one.

    Raises:
      FileNotFoundError: a missing file.
      ValueError: not a whole number of records, or a label that is no class.
    """
    small = classes == 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if small else ["train.bin"]
    parts = [_records(Path(folder) / name, classes) for name in names]
    test = _records(Path(folder) / ("test_batch.bin" if small else "test.bin"), classes)
    return Split(*(np.concatenate(x) for x in zip(*parts))), test


def svhn_subset(path: str | Path, each: int = 1000) -> np.ndarray:
    """The first images of each digit of an SVHN file, in its order, uint8.

    Args:
      path: of ``test_32x32.mat``.
      each: images of a digit.

    Raises:
      FileNotFoundError, ValueError: a missing or malformed file.
    """
    split = images.svhn_file(Path(path))
    rank = np.zeros(len(split.label), int)
    for digit in range(10):
        own = split.label == digit
        rank[own] = np.arange(own.sum())
    return _bytes(split.image[rank < each])


def test_sets(folder: str | Path, size: int = 32) -> dict[str, np.ndarray]:
    """Test sets by name, uint8: each a folder of images, or of folders of images.

    A folder with ``test_32x32.mat`` is SVHN's, one with ``dtd`` or ``images`` in it that
    of the textures. Images are cropped to the central square and resized.

    Raises:
      FileNotFoundError: no folders, or one without images.
      ValueError: a broken image.
    """
    inside = [p for p in files.listing(Path(folder)) if p.is_dir()]
    if not inside:
        raise FileNotFoundError(f"{folder}: expected a folder for each test set")
    found = {}
    for path in inside:
        if (path / "test_32x32.mat").exists():
            found[path.name] = svhn_subset(path / "test_32x32.mat")
            continue
        below = next((path / n for n in ("dtd/images", "images") if (path / n).is_dir()),
                     path)  # fmt: skip
        found[path.name] = _bytes(image_files.every_image(below, size).image)
    return found


def original(
    source: str, path: str, pool_path: str, outliers_path: str, held_out: int = 1000
) -> outliers.Detection:
    """The paper's data: CIFAR or SVHN, a pool, test sets, from their original files.

    Args:
      source: cifar-10, cifar-100 or svhn.
      path: folder of ID images; CIFAR's python version, or its binary one.
      pool_path: folder of the pool, see ``pool``.
      outliers_path: folder of the test sets, see ``test_sets``.
      held_out: last ID images of the training split, which calibrate a threshold.

    Raises:
      FileNotFoundError, ValueError: missing or malformed files.
    """
    missing = {"data.path": path, "data.pool_path": pool_path,
               "data.outliers_path": outliers_path}  # fmt: skip
    missing = [name for name, given in missing.items() if not given]
    if missing:
        raise FileNotFoundError(
            f"config.{missing[0]}: not given; {source} needs folders of ID images, of a "
            "pool and of test sets, which their authors offer for download; "
            "--config.data.source=letters needs none"
        )
    classes = 100 if source == "cifar-100" else 10
    if (Path(path) / ("test.bin" if classes == 100 else "test_batch.bin")).exists():
        train, test = cifar_binary(path, classes)
    else:
        data = images.svhn(path) if source == "svhn" else images.cifar(path, classes)
        train, test = (Split(_bytes(x.image), x.label) for x in (data.train, data.test))
    if len(train.label) <= held_out:
        raise ValueError(
            f"{path}: {len(train.label)} images leave none to train on beside "
            f"{held_out} held-out ones"
        )
    mined = pool(pool_path)
    return outliers.Detection(
        f"{source}", Split(*(x[:-held_out] for x in train)),
        Split(*(x[-held_out:] for x in train)), test, classes, mined, {},
        test_sets(outliers_path),
    )  # fmt: skip


def cropped(image: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """Squares of images (n, H, W, C) at places that the indices decide.

    Raises:
      ValueError: images smaller than ``size``.
    """
    height, width = image.shape[1:3]
    if min(height, width) < size:
        raise ValueError(
            f"images of {height} x {width} have no square of {size} pixels"
        )
    if height == width == size:
        return image
    mixed = (np.asarray(index, np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    top = (mixed >> np.uint64(33)) % np.uint64(height - size + 1)
    left = (mixed >> np.uint64(12)) % np.uint64(width - size + 1)
    return np.stack(
        [x[i : i + size, j : j + size] for x, i, j in zip(image, top.astype(int),
                                                         left.astype(int))]
    )  # fmt: skip


def _imagenet_file(path: Path) -> np.ndarray:
    """Images (n, s, s, 3) of a file with ``data`` of n x 3 s s bytes, planes."""
    if path.suffix == ".npz":
        with files.parsing(path, "not a batch of ImageNet"):
            # NumPy leaves a file that it cannot read open.
            with open(files.check(path)[0], "rb") as file:
                data = np.load(file, allow_pickle=False)["data"]
    else:
        content = pickles.load(
            path, allowed=_TYPES, encoding="latin1", max_bytes=MAX_BYTES
        )
        data = content.get("data") if isinstance(content, dict) else None
    wide = data.shape[1] if isinstance(data, np.ndarray) and data.ndim == 2 else 0
    side = round((wide / 3) ** 0.5)
    if not isinstance(data, np.ndarray) or not wide or 3 * side**2 != wide:
        raise ValueError(
            f"{path}: expected a dict with data of n x 3 s s bytes, got "
            f"{getattr(data, 'dtype', type(data).__name__)} {getattr(data, 'shape', '')}"
        )
    if data.dtype != np.uint8:
        raise ValueError(f"{path}: data must be uint8, got {data.dtype}")
    return data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1)


def _records(path: Path, classes: int) -> Split:
    """Images and fine labels of a file of records."""
    before = 1 if classes == 10 else 2
    data = np.frombuffer(files.read(path, most=MAX_BYTES), np.uint8)
    if not len(data) or len(data) % (before + _RECORD):
        raise ValueError(
            f"{path}: has {len(data):,} bytes, expected a multiple of {before + _RECORD}"
        )
    data = data.reshape(-1, before + _RECORD)
    label = data[:, before - 1].astype(np.int32)
    images.check_labels(path, label, classes)
    image = data[:, before:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(image), label)


def _indices(path: Path, count: int) -> np.ndarray:
    """Indices from 0 of a list of indices from 1 (0: none of the file)."""
    with files.parsing(path, "not a list of indices"):
        index = np.array(files.read(path).split(), np.int64)
    if len(index) and not (index.min() >= 0 and index.max() <= count):
        raise ValueError(f"{path}: indices must be 0 .. {count}, got {index.max()}")
    return index[index > 0] - 1


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * image).astype(np.uint8)
