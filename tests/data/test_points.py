"""Toy points: moments and supports in closed form, seeds, halves of the digits."""

import gzip
import inspect

import numpy as np
import pytest

from jaxpapers.data import points

GENERATORS = [
    points.swiss_roll,
    points.moons,
    points.clusters,
    points.gaussian,
]


@pytest.mark.parametrize("draw", GENERATORS, ids=lambda f: f.__name__)
def test_shape_seed_and_size(draw):
    x = draw(400, 3)
    assert x.shape == (400, 2) and x.dtype == np.float32 and np.abs(x).max() < 1.2
    np.testing.assert_array_equal(x, draw(400, 3))
    assert (x != draw(400, 4)).any(1).mean() > 0.9


@pytest.mark.parametrize("draw", GENERATORS, ids=lambda f: f.__name__)
def test_what_is_refused(draw):
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        draw(0, 0)
    spread = list(inspect.signature(draw).parameters)[2]
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{spread} must be a finite number"):
            draw(4, 0, **{spread: bad})


def test_swiss_roll_is_a_spiral_of_even_angles():
    x = points.swiss_roll(20000, 0, noise=0.0).astype(float) * 20
    radius = np.hypot(*x.T)
    np.testing.assert_allclose(x[:, 0], radius * np.cos(radius), atol=1e-4)
    np.testing.assert_allclose(x[:, 1], radius * np.sin(radius), atol=1e-4)
    u = np.sort((radius / (1.5 * np.pi) - 1) / 2)
    # Kolmogorov's distance to the even law; 1.95 / sqrt(n) has probability 0.001.
    assert np.abs(u - np.arange(20000) / 20000).max() < 1.95 / np.sqrt(20000)
    # The same seed draws the same angles, so the difference is the noise alone.
    noise = points.swiss_roll(20000, 0, noise=0.5).astype(float) * 20 - x
    np.testing.assert_allclose(noise.std(), 0.5, rtol=4 / np.sqrt(2 * 40000))


def test_moons_lie_on_two_half_circles():
    x = points.moons(101, 0, noise=0.0).astype(float) * 2
    outer = np.abs(np.hypot(*x.T) - 1) < 1e-6
    inner = np.abs(np.hypot(x[:, 0] - 1, x[:, 1] - 0.5) - 1) < 1e-6
    assert outer.sum() == 50 and inner.sum() == 51 and (outer ^ inner).all()
    assert (x[outer, 1] > -1e-6).all() and (x[inner, 1] < 0.5 + 1e-6).all()
    angle = np.sort(np.arctan2(x[outer, 1].clip(0), x[outer, 0]))
    np.testing.assert_allclose(angle, np.linspace(0, np.pi, 50), atol=1e-3)
    # Not one arc after the other.
    assert 10 < outer[:50].sum() < 40
    noise = points.moons(20000, 1) - points.moons(20000, 1, noise=0.0)
    np.testing.assert_allclose(noise.std(), 0.05, rtol=4 / np.sqrt(2 * 40000))
    assert points.moons(1, 0).shape == (1, 2)


@pytest.mark.parametrize("std", [0.1, 0.0125])
def test_four_clusters(std):
    x = points.clusters(8000, 0, std).astype(float)
    cluster = (x[:, 0] > 0) + 2 * (x[:, 1] > 0)
    assert np.bincount(cluster).tolist() == [2000] * 4
    for c in range(4):
        mine, centre = x[cluster == c], np.array([c % 2, c // 2]) - 0.5
        np.testing.assert_allclose(mine.mean(0), centre, atol=4 * std / 2000**0.5)
        np.testing.assert_allclose(mine.std(0), std, rtol=4 / np.sqrt(2 * 2000))
    assert len(set(cluster[:20])) == 4


def test_clusters_on_a_line_and_in_space():
    for dim in (1, 3):
        x = points.clusters(800 * 2**dim, 0, dim=dim).astype(float)
        assert x.shape == (800 * 2**dim, dim)
        corner = ((x > 0) << np.arange(dim)).sum(1)
        assert np.abs(np.bincount(corner) - 800).max() == 0
        np.testing.assert_allclose(np.abs(x).mean(0), 0.5, atol=0.01)
    with pytest.raises(ValueError, match="dim must be at least 1"):
        points.clusters(8, 0, dim=0)


def test_four_clusters_of_random_size():
    with pytest.raises(ValueError, match="multiple of 4 points, got 10; try 12"):
        points.clusters(10, 0)
    x = points.clusters(4002, 0, balanced=False)
    counts = np.bincount((x[:, 0] > 0) + 2 * (x[:, 1] > 0), minlength=4)
    # Chi squared with three degrees of freedom: 16.3 has probability 0.001.
    assert 0 < np.square(counts - 4002 / 4).sum() / (4002 / 4) < 16.3


def test_gaussian_is_clipped():
    x = points.gaussian(20000, 0, var=0.1, dim=3).astype(float)
    assert x.shape == (20000, 3) and np.abs(x).max() == 1
    # P(|N(0, 0.1)| > 1) = 0.0015654; four deviations of a share of 60,000.
    assert abs((np.abs(x) == 1).mean() - 0.0015654) < 4 * np.sqrt(0.00157 / 60000)
    # The clipping takes 0.0003 of the variance.
    np.testing.assert_allclose(x.var(), 0.1, rtol=4 * np.sqrt(2 / 60000) + 0.004)
    assert points.gaussian(3, 0, var=0.0).tolist() == [[0, 0]] * 3
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        points.gaussian(3, 0, dim=0)


def write_digits(folder, count):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 17, (count, 64))
    with gzip.open(folder / "digits.csv.gz", "wt") as f:
        f.writelines(",".join(map(str, [*row, 1])) + "\n" for row in grey)
    return grey / 16


def test_digit_components(tmp_path):
    x = write_digits(tmp_path, 41)[np.random.default_rng(0).permutation(41)]
    train, held = points.digit_components(tmp_path, 3)
    assert train.shape == (21, 3) and held.shape == (20, 3)
    assert train.dtype == held.dtype == np.float32
    assert np.abs(train).max() == 1
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-6)
    # Eigenvalues of the training half's covariance, up to one scale; no correlation.
    values = np.sort(np.linalg.eigvalsh(np.cov(x[:21].T)))[::-1][:3]
    covariance = np.cov(train.astype(float).T)
    np.testing.assert_allclose(
        covariance / covariance[0, 0], np.diag(values) / values[0], atol=1e-5
    )
    # The same map serves both halves: all 20 components keep the distances between them.
    train, held = points.digit_components(tmp_path, 20)
    a = np.linalg.norm(train[:, None].astype(float) - train[None], axis=-1)
    b = np.linalg.norm(x[:21, None] - x[None, :21], axis=-1)
    scale = a[0, 1] / b[0, 1]
    np.testing.assert_allclose(a, b * scale, atol=1e-5)
    axes = np.linalg.lstsq(x[:21] - x[:21].mean(0), train.astype(float), rcond=None)[0]
    np.testing.assert_allclose(held, (x[21:] - x[:21].mean(0)) @ axes, atol=1e-5)
    assert (axes[np.abs(axes).argmax(0), np.arange(20)] > 0).all()


def test_digit_components_refuse(tmp_path):
    write_digits(tmp_path, 8)
    with pytest.raises(ValueError, match="components must be 1 .. 64, got 65"):
        points.digit_components(tmp_path, 65)
    with pytest.raises(ValueError, match="4 components need more than 8 scans"):
        points.digit_components(tmp_path, 4)
