"""Domains to test generalisation on: generated, digits turned or coloured, folders."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxpapers.data import domains, files, image_files
from jaxpapers.data.domains import Domain
from jaxpapers.data.images import Split

ANGLES = (0, 15, 30, 45, 60, 75)
ENVIRONMENTS = (0.1, 0.2, 0.9)
DUPLICATES = "domain_net_duplicates.txt"
# Of decoded images that are kept: all of PACS at 224 pixels.
MAX_KEPT = 1 << 31


def latent(
    agreements: Sequence[float] = (0.75, 0.85, 0.95, 0.1),
    counts: Sequence[int] = (200, 200, 200, 2000),
    *,
    invariant: int = 2,
    environmental: int = 12,
    rotated: bool = True,
    seed: int = 0,
) -> list[Domain]:
    """Vectors of signs: some equal to the class, others that agree with it by domain.

    The invariant coordinates are y; of the environmental ones each is y with the domain's
    probability, else -y. In the domain of the test they mislead.

    Args:
      agreements: probability of each domain.
      counts: examples of each domain.
      invariant: r.
      environmental: m.
      rotated: mix the coordinates by a fixed orthogonal matrix.
      seed: of the draws.

    Raises:
      ValueError: no coordinates, or as many agreements as counts not.
    """
    if len(agreements) != len(counts) or invariant < 1 or environmental < 0:
        raise ValueError(
            f"expected a count for each of {len(agreements)} domains and at least one "
            f"invariant coordinate, got {len(counts)}, {invariant} and {environmental}"
        )
    size = invariant + environmental
    mixing = np.eye(size)
    if rotated:
        mixing = np.linalg.qr(np.random.RandomState(77).normal(size=(size, size)))[0]
    rng = np.random.default_rng(seed)
    made = []
    for p, n in zip(agreements, counts):
        label = rng.integers(0, 2, n).astype(np.int32)
        y = 2.0 * label[:, None] - 1
        agree = np.where(rng.random((n, environmental)) < p, 1.0, -1.0)
        z = np.concatenate([np.repeat(y, invariant, 1), y * agree], 1)
        made.append(Domain(f"p = {p:g}", (z @ mixing.T).astype(np.float32), label))
    return made


def rotated(
    digits: Split,
    *,
    angles: Sequence[float] = ANGLES,
    size: int = 28,
    resample: str = "bilinear",
    seed: int = 0,
) -> list[Domain]:
    """RotatedMNIST: every angle a domain of digits of its own.

    Args:
      digits: uint8 (n, 28, 28).
      angles: in degrees, counter-clockwise.
      size: 28, or 14 by averaging 2 x 2 pixels.
      resample: see ``domains.rotate``; DomainBed's is bilinear, SWAD's bicubic.
      seed: of the order that digits are dealt in.
    """
    dealt = domains.deal(len(digits.label), len(angles), seed)
    return [
        Domain(
            f"{angle:g} deg",
            _shrunk(
                domains.rotate(digits.image[index], angle, resample)[..., None] / 255,
                size,
            ),
            digits.label[index],
        )
        for angle, index in zip(angles, dealt)
    ]


def coloured(
    digits: Split,
    *,
    environments: Sequence[float] = ENVIRONMENTS,
    size: int = 28,
    seed: int = 0,
) -> list[Domain]:
    """ColoredMNIST: two classes of digits in two colours, see ``domains.colour``.

    Args:
      digits: uint8 (n, 28, 28).
      environments: probability of a wrong colour, by domain.
      size: see ``rotated``.
      seed: of the order and of what is wrong.
    """
    dealt = domains.deal(len(digits.label), len(environments), seed)
    rng = np.random.default_rng(seed)
    made = []
    for e, index in zip(environments, dealt):
        flips, shades = rng.random((2, len(index)))
        x, label = domains.colour(
            digits.image[index], digits.label[index], flips, shades, e
        )
        x = _shrunk(x.transpose(0, 2, 3, 1), size)
        made.append(Domain(f"e = {e:g}", x, label))
    return made


def _shrunk(x: np.ndarray, size: int) -> np.ndarray:
    """Images of 28 x 28 as float32, or averaged to 14 x 14."""
    n, height, width, channels = x.shape
    if size == height // 2:
        x = x.reshape(n, size, 2, width // 2, 2, channels).mean((2, 4))
    elif size != height:
        raise ValueError(f"net.size must be {height} or {height // 2}, got {size}")
    return x.astype(np.float32)


class Pictures:
    """Images of files, decoded when asked for: uint8 (n, size, size, 3), stretched.

    Args:
      paths: of the files.
      size: pixels of a side.
      keep: bytes of decoded images to keep.
    """

    def __init__(self, paths: Sequence[Path], size: int, keep: int = MAX_KEPT):
        self.paths, self.size = list(paths), size
        self._kept: dict[int, np.ndarray] = {}
        self._room = keep // (3 * size * size)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """The images of some indices."""
        return np.stack([self._image(int(i)) for i in np.atleast_1d(index)])

    def _image(self, i):
        image = self._kept.get(i)
        if image is None:
            image = image_files.stretched(self.paths[i], self.size)
            if len(self._kept) < self._room:
                self._kept[i] = image
        return image


def count(root: str | Path) -> int:
    """Number of domains of a tree, see ``folders``."""
    return sum(p.is_dir() for p in files.listing(root))


def folders(
    root: str | Path, size: int, names: Sequence[str] = ()
) -> tuple[list[Domain], list[str]]:
    """Domains of a tree root / domain / class / image, and the names of the classes.

    Domains and classes are in the order of their names, as in DomainBed; hidden files are
    skipped. Files that a list ``domain_net_duplicates.txt`` in the root names, a path and
    a number in each line, are left out.

    Args:
      root: of the tree: ``PACS``, ``VLCS``, ``office_home``, ``terra_incognita``,
        ``domain_net``, or one's own.
      size: pixels of a side.
      names: of the domains; (): all folders.

    Raises:
      FileNotFoundError: no such tree, or a class without images.
      ValueError: fewer than two domains, or a class that a domain lacks.
    """
    root = Path(root).expanduser()
    inside = [p for p in files.listing(root) if p.is_dir()]
    chosen = [root / name for name in sorted(names)] if names else inside
    if len(chosen) < 2:
        raise ValueError(
            f"{root}: expected folders of at least 2 domains, each with a folder for "
            f"every class, got {[p.name for p in chosen]}"
        )
    trees = {d.name: [p for p in files.listing(d) if p.is_dir()] for d in chosen}
    every = sorted({p.name for tree in trees.values() for p in tree})
    for name, tree in trees.items():
        missing = sorted({*every} - {p.name for p in tree})
        if missing:
            raise ValueError(
                f"{root / name}: has no class {missing[0]!r}, which other domains have"
            )
    if not every:
        raise ValueError(f"{root}: its domains have no folders of classes")
    left_out = _duplicates(root)
    return [
        _domain(root, name, tree, size, left_out) for name, tree in trees.items()
    ], every


def _domain(root, name, tree, size, left_out):
    paths, labels, skipped = [], [], []
    for label, folder in enumerate(tree):
        found = files.listing(folder)
        images = [p for p in found if p.suffix.lower() in image_files.SUFFIXES]
        skipped += [p for p in found if p.suffix.lower() not in image_files.SUFFIXES]
        images = [p for p in images if p.relative_to(root).as_posix() not in left_out]
        if not images:
            raise FileNotFoundError(f"{folder}: no images")
        paths += images
        labels += [label] * len(images)
    if skipped:
        warnings.warn(
            f"{root / name}: {len(skipped)} files are no images, e.g. {skipped[0].name}",
            stacklevel=4,
        )
    return Domain(name, Pictures(paths, size), np.array(labels, np.int32))


def _duplicates(root: Path) -> set[str]:
    path = root / DUPLICATES
    if not path.exists():
        return set()
    return {line.split()[0] for line in files.read(path).decode().splitlines() if line}
