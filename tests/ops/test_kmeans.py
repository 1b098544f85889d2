"""k-means: the objective falls, empty clusters move, equal sizes, one mesh or many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import kmeans, lloyd
from tests.contract import grid
from tests.programs import together

RNG = np.random.default_rng(0)


def blobs(n=600, clusters=6, width=8, spread=0.05):
    centres = RNG.normal(size=(clusters, width))
    label = np.arange(n) % clusters
    x = centres[label] + spread * RNG.normal(size=(n, width))
    return x.astype(np.float32), label


def test_the_objective_never_rises_and_is_that_of_the_labels():
    x = RNG.normal(size=(500, 6)).astype(np.float32)
    options = kmeans.Options(iterations=12, chunk=128)
    found = jax.device_get(kmeans.kmeans(jax.random.key(0), x, 9, options))
    assert (np.diff(found.history) <= 1e-3).all() and found.history[-1] > 0
    distance = np.square(x[:, None] - found.centres[None]).sum(-1)
    np.testing.assert_array_equal(found.labels, distance.argmin(1))
    np.testing.assert_allclose(found.inertia, distance.min(1).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.history[-1], found.inertia, rtol=1e-4)
    for k in range(9):
        members = x[found.labels == k]
        assert len(members)
    # Lloyd has not ended yet: a longer run is better.
    assert found.history[0] > 1.05 * found.inertia


def test_converged_centres_are_the_means_and_the_clusters_are_found():
    x, label = blobs()
    found = jax.device_get(
        kmeans.kmeans(jax.random.key(1), x, 6, kmeans.Options(restarts=4))
    )
    for k in range(6):
        members = found.labels == k
        np.testing.assert_allclose(found.centres[k], x[members].mean(0), atol=1e-5)
        assert len(np.unique(label[members])) == 1
    assert found.inertia < 600 * 8 * 0.05**2 * 1.1


def test_an_empty_cluster_moves_to_the_farthest_point():
    x = np.float32([[0.0], [0.1], [5.0], [9.0]])
    near = np.float32([0.0, 0.01, 25.0, 81.0])
    counts, centres = np.float32([4.0, 0.0, 0.0]), np.full((3, 1), -1.0, np.float32)
    ones = np.ones(4, np.float32)

    def moved(x, near, counts, centres):
        points = lloyd.Points(x, ones, jnp.square(x[:, 0]), 4, 4, None)
        return lloyd.refill(points, near, counts, centres)

    found = together(moved, x, near, counts, centres)
    np.testing.assert_array_equal(found, [[-1.0], [9.0], [5.0]])


def test_bounds_change_no_assignment():
    """Centres that hardly move, and then jump: as if all distances were computed."""
    x = RNG.normal(size=(640, 5)).astype(np.float32)
    centres = RNG.normal(size=(12, 5)).astype(np.float32)
    options = kmeans.Options(iterations=20, chunk=64)

    def values(x, centres):
        points = lloyd.Points(x, jnp.ones(640), jnp.square(x).sum(1), 640, 64, None)
        found = lloyd.run(points, centres, options)
        labels, near, other = lloyd.assigned(points, found.centres, options)
        sums, counts = lloyd.members(points, found.labels, 12)
        return found, labels, near, other, sums, counts

    found, labels, near, other, sums, counts = together(values, x, centres)
    np.testing.assert_array_equal(found.labels, labels)
    assert (found.upper >= near - 1e-4).all() and (found.lower <= other + 1e-4).all()
    assert (found.upper > near + 1e-3).any(), "no point was passed over"
    np.testing.assert_allclose(found.sums, sums, atol=1e-4)
    np.testing.assert_array_equal(found.counts, counts)
    assert 5 < found.step <= 20


def test_k_means_plus_plus_takes_different_points():
    # Six places with a hundred copies each: every place must be drawn once.
    x = np.repeat(10 * np.eye(6, dtype=np.float32), 100, 0)
    options = kmeans.Options(iterations=0, sample=0)
    found = jax.device_get(kmeans.kmeans(jax.random.key(2), x, 6, options))
    assert found.inertia < 1e-3
    assert len(np.unique(found.centres.round(), axis=0)) == 6


def test_balanced_clusters_have_nearly_equal_sizes():
    x = np.concatenate([RNG.normal(size=(900, 4)), 4 + RNG.normal(size=(100, 4))])
    x = x.astype(np.float32)
    sizes = {}
    for balanced in (False, True):
        options = kmeans.Options(iterations=8, balanced=balanced)
        labels = kmeans.kmeans(jax.random.key(0), x, 8, options).labels
        sizes[balanced] = np.bincount(np.asarray(labels), minlength=8)
    assert sizes[True].max() <= 1.2 * 125 and sizes[True].min() >= 0.8 * 125
    assert sizes[False].max() > sizes[True].max()


@pytest.mark.programs(14)
def test_split_over_devices_as_on_one():
    x, _ = blobs(n=501)  # No multiple of the devices.
    for balanced in (False, True):
        options = kmeans.Options(iterations=5, balanced=balanced, sample=16)
        run = (jax.random.key(3), x, 6, options)
        one, many = (
            jax.device_get(kmeans.kmeans(*run, m)) for m in (None, grid("8x1"))
        )
        np.testing.assert_allclose(many.centres, one.centres, atol=1e-5)
        np.testing.assert_array_equal(many.labels, one.labels)
        np.testing.assert_allclose(many.inertia, one.inertia, rtol=1e-5)


@pytest.mark.programs(20)  # k-means of two widths, and residuals without a jit.
def test_residual_and_product_codes_are_sums_of_codes():
    x = RNG.normal(size=(200, 6)).astype(np.float32)
    options = kmeans.Options(iterations=5)
    books, codes = jax.device_get(
        kmeans.residual_kmeans(jax.random.key(0), x, 2, 8, options)
    )
    left = x - books[0][codes[:, 0]]
    nearest = np.square(left[:, None] - books[1][None]).sum(-1).argmin(1)
    np.testing.assert_array_equal(codes[:, 1], nearest)
    after = np.square(left - books[1][codes[:, 1]]).sum()
    assert after < np.square(left).sum() < np.square(x - x.mean(0)).sum()
    books, codes = jax.device_get(
        kmeans.product_kmeans(jax.random.key(0), x, 2, 8, options)
    )
    assert not books[0, :, 3:].any() and not books[1, :, :3].any()
    part = np.square(x[:, None, 3:] - books[1][None, :, 3:]).sum(-1)
    np.testing.assert_array_equal(codes[:, 1], part.argmin(1))


def test_what_is_refused():
    key, x = jax.random.key(0), np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="5 clusters and 4 points"):
        kmeans.kmeans(key, x, 5)
    with pytest.raises(ValueError, match=r"rows \[2\]"):
        kmeans.kmeans(key, np.where(np.arange(4)[:, None] == 2, np.nan, x), 2)
    with pytest.raises(ValueError, match="levels >= 1"):
        kmeans.residual_kmeans(key, x, 0, 2)
    with pytest.raises(ValueError, match="kmeans.restarts"):
        kmeans.Options(restarts=0)
