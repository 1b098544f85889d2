"""Low-dimensional toy distributions of the diffusion papers.

Each generator takes a count and a seed and returns float32 (count, d) of about the range
[-1, 1], drawn with ``numpy.random.default_rng(seed)``.
"""

import math
import operator
from pathlib import Path

import numpy as np

from jaxpapers.data import images


def swiss_roll(count: int, seed: int, noise: float = 0.05) -> np.ndarray:
    r"""Spiral $(t\cos t, t\sin t)/20$ with $t = 1.5\pi(1 + 2u)$, $u \sim U(0, 1)$.

    The distribution of columns 0 and 2 of scikit-learn's ``make_swiss_roll``, over 20.

    Args:
      count: number of points.
      seed: of the draws.
      noise: standard deviation of the normal noise before the division by 20.

    Reference:
      Fan and Lee, Optimizing DDPM Sampling with Shortcut Fine-Tuning, 2023,
      arXiv 2301.13362.
    """
    rng = _rng(count, seed, noise=noise)
    t = 1.5 * np.pi * (1 + 2 * rng.random(count))
    clean = np.stack([t * np.cos(t), t * np.sin(t)], 1)
    return _float32((clean + noise * rng.standard_normal(clean.shape)) / 20)


def moons(count: int, seed: int, noise: float = 0.1) -> np.ndarray:
    r"""Two half circles, $(\cos t, \sin t)/2$ and $(1 - \cos t, 1/2 - \sin t)/2$.

    The distribution of scikit-learn's ``make_moons``, over 2: angles t are equally spaced
    on [0, pi], half of the points on each arc (the odd one on the second), shuffled.

    Args:
      count: number of points.
      seed: of the draws.
      noise: standard deviation of the normal noise before the division by 2; 0.1 in the
        paper on Wasserstein distances, 0.05 in that on shortcut fine-tuning.

    Reference:
      Kwon, Fan and Lee, Score-based Generative Modeling Secretly Minimizes the
      Wasserstein Distance, 2022, arXiv 2212.06359, section 4.
    """
    rng = _rng(count, seed, noise=noise)
    outer, inner = (
        np.linspace(0, np.pi, count // 2),
        np.linspace(0, np.pi, -(-count // 2)),
    )
    x = np.concatenate([np.cos(outer), 1 - np.cos(inner)])
    y = np.concatenate([np.sin(outer), 0.5 - np.sin(inner)])
    clean = rng.permutation(np.stack([x, y], 1))
    return _float32((clean + noise * rng.standard_normal(clean.shape)) / 2)


def clusters(
    count: int, seed: int, std: float = 0.1, balanced: bool = True, dim: int = 2
) -> np.ndarray:
    r"""Gaussian mixture with means $\{\pm 1/2\}^d$ and covariance std^2 I.

    Args:
      count: number of points.
      seed: of the draws.
      std: standard deviation of a component. The paper has 0.1 (variance 0.01), its
        notebook 0.0125.
      balanced: equally many points of each component, shuffled; otherwise components are
        drawn uniformly. (In the notebook ``balanced=False`` loses a component.)
      dim: d.

    Raises:
      ValueError: a balanced count that is no multiple of 2^d.

    Reference:
      Kwon, Fan and Lee, 2022, arXiv 2212.06359, section 4.
    """
    rng = _rng(count, seed, std=std)
    if operator.index(dim) < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    corners = 2**dim
    if balanced and count % corners:
        raise ValueError(
            f"{corners} balanced clusters need a multiple of {corners} points, got "
            f"{count}; try {count + -count % corners}, or balanced=False"
        )
    cluster = rng.permutation(np.arange(count) % corners)
    if not balanced:
        cluster = rng.integers(0, corners, count)
    centre = (cluster[:, None] >> np.arange(dim)) % 2 - 0.5
    return _float32(centre + std * rng.standard_normal(centre.shape))


def gaussian(count: int, seed: int, var: float = 0.1, dim: int = 2) -> np.ndarray:
    """N(0, var I), clipped to [-1, 1].

    Args:
      count: number of points.
      seed: of the draws.
      var: variance of a coordinate before clipping.
      dim: d.

    Reference:
      Kwon, Fan and Lee, 2022, arXiv 2212.06359, section 4; the clipping is that of the
      paper's notebook.
    """
    rng = _rng(count, seed, var=var)
    if operator.index(dim) < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    drawn = math.sqrt(var) * rng.standard_normal((count, dim))
    return _float32(drawn.clip(-1, 1))


def digit_components(
    folder: str | Path, components: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Scanned digits projected on the first principal components of their training half.

    Real data of low dimension. Both halves are centred by the mean of the training half
    and scaled by its largest absolute coordinate, so that the training half fills
    [-1, 1] and the held-out half may exceed it slightly. The largest weight of each
    component is positive.

    Args:
      folder: with ``digits.csv.gz``, see ``images.digits``.
      components: 1 .. 64.

    Returns:
      The training half, 899 points, and the held-out half, 898: the first and the last
      of ``default_rng(0).permutation``, as in ``images.digit_halves``.

    Raises:
      ValueError: components out of range, a malformed file, or fewer scans than
        components.
    """
    if not 1 <= operator.index(components) <= 64:
        raise ValueError(f"components must be 1 .. 64, got {components}")
    halves = [half.image for half in images.digit_halves(folder)]
    count = len(halves[0])
    both = np.concatenate(halves).astype(np.float64)
    both = both.reshape(len(both), -1)
    if min(count - 1, len(both) - count) < components:
        raise ValueError(f"{components} components need more than {len(both)} scans")
    both -= both[:count].mean(0)
    axes = np.linalg.svd(both[:count], full_matrices=False)[2][:components]
    largest = np.abs(axes).argmax(1)
    axes *= np.sign(axes[np.arange(components), largest])[:, None]
    points = both @ axes.T
    points = _float32(points / np.abs(points[:count]).max())
    return points[:count], points[count:]


def _rng(count, seed, **spread):
    if operator.index(count) < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    for name, value in spread.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return np.random.default_rng(seed)


def _float32(points):
    return points.astype(np.float32)
