"""Several domains of labelled images: DomainBed's splits, rotations, colours, batches.

Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021, arXiv
2007.01434. A domain is tested on that no training batch shows; a fifth of every domain is
held out, for choosing a step or hyper-parameters.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.data.arrays import Examples

RESAMPLE = ("bilinear", "bicubic")
HELD_OUT = 0.2


class Domain(NamedTuple):
    """A domain's examples and classes.

    Attributes:
      name: of the domain.
      x: (n, ...) examples, or what gives them for an array of indices.
      label: (n,) int32.
    """

    name: str
    x: Any
    label: np.ndarray


class Splits(NamedTuple):
    """Indices of a domain's examples: for training, and held out."""

    inside: np.ndarray
    out: np.ndarray


def seed_hash(*parts: object) -> int:
    """DomainBed's seed of a tuple: MD5 of its text, modulo 2^31."""
    digest = hashlib.md5(str(parts).encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % 2**31


def split(
    count: int, trial_seed: int, domain: int, fraction: float = HELD_OUT
) -> Splits:
    """DomainBed's split of a domain, to the index.

    Args:
      count: examples of the domain.
      trial_seed: of the run.
      domain: number of the domain.
      fraction: held out, the first ones of the shuffled order, rounded down.

    Raises:
      ValueError: a fraction outside (0, 1), or one that leaves a part empty.

    Example:
      >>> split(10, 0, 0).out
      array([2, 3])
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction held out must be in (0, 1), got {fraction}")
    keys = np.arange(count)
    np.random.RandomState(seed_hash(trial_seed, domain)).shuffle(keys)
    held = int(count * fraction)
    if not 0 < held < count:
        raise ValueError(
            f"domain {domain} has {count} examples; holding out {fraction} of them "
            "leaves a part empty"
        )
    return Splits(keys[held:], keys[:held])


def deal(count: int, domains: int, seed: int = 0) -> list[np.ndarray]:
    """Indices of disjoint domains: a permutation, dealt out like cards.

    Args:
      count: examples in all.
      domains: number of domains.
      seed: of ``numpy.random.RandomState``, whose permutation is the order.
    """
    order = np.random.RandomState(seed).permutation(count)
    return [order[i::domains] for i in range(domains)]


def rotate(
    images: np.ndarray, angle: int | float, method: str = "bilinear"
) -> np.ndarray:
    """Images turned counter-clockwise about their centre, zeros where nothing was.

    Equal to Pillow's ``Image.rotate`` in every pixel.

    Args:
      images: uint8 (n, H, W).
      angle: in degrees.
      method: bilinear, or bicubic (a = -1, as Pillow's transforms take it).

    Raises:
      ValueError: another method, or images that are no bytes.
    """
    if method not in RESAMPLE:
        raise ValueError(
            f"the resampling method must be one of {RESAMPLE}, got {method!r}"
        )
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"expected images uint8 (n, H, W), got {images.dtype} {images.shape}"
        )
    if not math.isfinite(angle):
        raise ValueError(f"the angle must be finite, got {angle}")
    if angle % 360 == 0:
        return images.copy()
    _, height, width = images.shape
    x, y, inside = _sources(height, width, angle)
    taps = 2 if method == "bilinear" else 4
    # The window's first pixel; coordinates are those of pixel centres.
    left, top = (np.floor(v - 0.5).astype(int) for v in (x, y))
    dx, dy = x - 0.5 - left, y - 0.5 - top
    first = 1 - taps // 2
    columns = [np.clip(left + first + i, 0, width - 1) for i in range(taps)]
    mix: Callable = _linear if method == "bilinear" else _cubic
    lines: list[np.ndarray] = []
    for i in range(taps):
        row = top + first + i
        line = [
            images[:, np.clip(row, 0, height - 1), c].astype(float) for c in columns
        ]
        value = mix(*line, dx)
        # A row below the image repeats the one before it.
        if lines:
            value = np.where((row >= 0) & (row < height), value, lines[-1])
        lines.append(value)
    turned = np.where(inside, np.clip(mix(*lines, dy), 0, 255), 0)
    return turned.astype(np.uint8)


def _sources(height: int, width: int, angle: int | float):
    """Coordinates in the image of every pixel of the turned one, and whether inside."""
    radians = -math.radians(angle % 360)
    cos, sin = round(math.cos(radians), 15), round(math.sin(radians), 15)
    cx, cy = width / 2, height / 2
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    turned_x = cos * x + sin * y + (-cos * cx - sin * cy + cx)
    turned_y = -sin * x + cos * y + (sin * cx - cos * cy + cy)
    inside = (
        (turned_x >= 0) & (turned_x < width) & (turned_y >= 0) & (turned_y < height)
    )
    return turned_x, turned_y, inside


def _linear(a, b, t):
    return a + (b - a) * t


def _cubic(a, b, c, d, t):
    p2 = c - a
    p3 = 2 * (a - b) + c - d
    p4 = b - a - c + d
    return b + t * (p2 + t * (p3 + t * p4))


def colour(
    images: np.ndarray,
    digits: np.ndarray,
    flips: np.ndarray,
    colours: np.ndarray,
    environment: float,
    noise: float = 0.25,
) -> tuple[np.ndarray, np.ndarray]:
    """Digits in two colours, of which one says the class more often than the shape.

    The class is whether the digit is below 5, wrong with probability ``noise``; the
    colour is the class, wrong with probability ``environment``.

    Args:
      images: uint8 (n, H, W).
      digits: (n,).
      flips: uniform in [0, 1), of the classes.
      colours: uniform in [0, 1), of the colours.
      environment: e.
      noise: share of wrong classes.

    Returns:
      (n, 2, H, W) float32 in [0, 1], the channel of the other colour zero; classes int32.

    Raises:
      ValueError: arrays of several lengths, or probabilities outside [0, 1].
    """
    sizes = {len(v) for v in (images, digits, flips, colours)}
    if len(sizes) > 1 or not (0 <= environment <= 1 and 0 <= noise <= 1):
        raise ValueError(
            "expected as many images, digits, flips and colours, and probabilities in "
            f"[0, 1], got lengths {sorted(sizes)}, {environment} and {noise}"
        )
    label = (digits < 5) != (flips < noise)
    shade = label != (colours < environment)
    x = np.stack([images, images], 1).astype(np.float32) / 255
    x[np.arange(len(x)), 1 - shade.astype(int)] = 0
    return x, label.astype(np.int32)


class Batches:
    """Batches with as many examples of every training domain.

    Each domain is an endless stream of its own, reshuffled every epoch; a batch has the
    domains one after the other.

    Args:
      domains: of training.
      inside: indices of each domain's training examples.
      seed: of the orders.

    Raises:
      ValueError: no domains.
    """

    def __init__(
        self, domains: Sequence[Domain], inside: Sequence[np.ndarray], seed: int = 0
    ):
        if not domains:
            raise ValueError("there is no domain to train on")
        self.domains = domains
        self._streams = [
            Examples({"index": index}, seed_hash(seed, e))
            for e, index in enumerate(inside)
        ]
        self._warned = False

    def batch(self, start: int, size: int, rows: slice | None = None) -> dict:
        """x, label and domain (the number among those of training) of a batch.

        Raises:
          ValueError: a size that is no multiple of the number of domains.
        """
        count = len(self.domains)
        each, rest = divmod(size, count)
        if rest or not each:
            raise ValueError(
                f"data.batch={size} must be a multiple of the {count} training domains, "
                f"e.g. {count * max(round(size / count), 1)}"
            )
        self._warn(each)
        numbers = np.arange(size)[rows or slice(None)]
        xs, labels = [], []
        for e, domain in enumerate(self.domains):
            own = numbers[numbers // each == e] % each
            if not len(own):
                continue
            stream = self._streams[e].batch(start // size * each, each)["index"][own]
            xs.append(domain.x[stream])
            labels.append(domain.label[stream])
        return {
            "x": np.concatenate(xs),
            "label": np.concatenate(labels),
            "domain": (numbers // each).astype(np.int32),
        }

    def _warn(self, each: int) -> None:
        small = [
            f"{d.name} ({len(s)})"
            for d, s in zip(self.domains, self._streams)
            if len(s) < each
        ]
        if small and not self._warned:
            self._warned = True
            warnings.warn(
                f"a batch has {each} examples of every domain, more than {small} have: "
                "some come twice",
                stacklevel=3,
            )
