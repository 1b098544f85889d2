"""Distances: recorded numbers, closed forms, gradients, what they refuse."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpapers.ops import distance


@pytest.mark.parity("diffusion", only=lambda entry: "sw2" in entry["arrays"])
def test_recorded_distances(case):
    folder, name, _ = case
    with jax.enable_x64(), np.load(folder / f"{name}.npz") as z:
        a, b, axes = (jnp.asarray(z[k]) for k in "ABP")
        close = {"rtol": 1e-10}
        np.testing.assert_allclose(
            distance.wasserstein_exact(a, b, 1.0), z["w1"], **close
        )
        np.testing.assert_allclose(
            distance.wasserstein_exact(a, b, 2.0), z["w2"], **close
        )
        for p, expected in ((1.0, z["sw1"]), (2.0, z["sw2"])):
            found = distance.sliced_wasserstein(a, b, axes, p)
            np.testing.assert_allclose(found, expected, **close)
        np.testing.assert_allclose(distance.energy_distance(a, b), z["energy"], **close)
        moments = [jnp.asarray(z[k]) for k in ("m1", "S1", "m2", "S2")]
        np.testing.assert_allclose(
            distance.gaussian_w2(*moments), z["bures_w2"], rtol=1e-10
        )
        np.testing.assert_allclose(distance.gaussian_kl(*moments), z["kl"], rtol=1e-10)


def points(seed, count, dim=3):
    return jax.random.normal(jax.random.key(seed), (count, dim))


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("counts", [(12, 12), (12, 8), (5, 15)])
def test_the_line_is_the_assignment(p, counts):
    x, y = (points(i, n, 1) for i, n in enumerate(counts))
    found = distance.wasserstein_1d(x[:, 0], y[:, 0], p)
    np.testing.assert_allclose(found, distance.wasserstein_exact(x, y, p), rtol=1e-5)


def test_translates():
    x = points(0, 20)
    shift = jnp.array([3.0, -4.0, 0.0])
    y = x + shift[None]
    assert distance.wasserstein_exact(x, y) == pytest.approx(5.0, rel=1e-6)
    axes = jnp.eye(3)
    sliced = distance.sliced_wasserstein(x, y, axes)
    np.testing.assert_allclose(sliced, np.sqrt(25 / 3), rtol=1e-5)
    np.testing.assert_allclose(
        distance.max_sliced_wasserstein(x, y, axes), 4.0, rtol=1e-5
    )
    drawn = distance.directions(jax.random.key(1), 50, 3)
    np.testing.assert_allclose(jnp.linalg.norm(drawn, axis=0), 1, rtol=1e-5)
    assert distance.sliced_wasserstein(x, y, drawn) < 5.0


def test_equal_sets_have_no_distance_and_finite_gradients():
    x = points(0, 10)
    axes = distance.directions(jax.random.key(1), 4, 3)
    for f in (
        lambda a: distance.sliced_wasserstein(a, x, axes),
        lambda a: distance.energy_distance(a, x),
        lambda a: distance.mmd_rbf(a, x, 1.0),
    ):
        value, grad = jax.value_and_grad(f)(x)
        assert abs(float(value)) < 1e-6 and np.isfinite(grad).all()
    y = x.at[0].add(0.5)
    assert distance.energy_distance(x, y) > 0 and distance.mmd_rbf(x, y, 1.0) > 0
    assert distance.frechet_distance(x, x) < 1e-5


def test_gaussians_with_singular_covariances():
    flat = jnp.diag(jnp.array([4.0, 0.0]))
    zero = jnp.zeros(2)
    found = distance.gaussian_w2(zero, flat, jnp.array([3.0, 0.0]), jnp.eye(2))
    # Per axis: 3^2 + (2 - 1)^2 + (0 - 1)^2.
    np.testing.assert_allclose(found, np.sqrt(11.0), rtol=1e-5)
    assert distance.gaussian_w2(zero, flat, zero, flat) < 1e-3
    # Of rank 1, with eigenvalues that rounding makes negative.
    thin = points(3, 6, 1)
    thin = thin @ thin.T
    assert float(jnp.linalg.eigvalsh(thin).min()) < 0
    found = distance.gaussian_w2(jnp.zeros(6), thin, jnp.zeros(6), jnp.zeros((6, 6)))
    np.testing.assert_allclose(found, jnp.sqrt(jnp.trace(thin)), rtol=1e-4)


def test_frechet_is_that_of_the_moments():
    x, y = points(0, 50), 2 * points(1, 60) + 1
    moments = [(np.mean(a, 0), np.cov(a, rowvar=False)) for a in (x, y)]
    (m, s), (n, t) = ((jnp.asarray(a), jnp.asarray(b)) for a, b in moments)
    expected = distance.gaussian_w2(m, s, n, t) ** 2
    np.testing.assert_allclose(distance.frechet_distance(x, y), expected, rtol=1e-4)


def test_gradients():
    with jax.enable_x64():
        x, y = (points(i, n).astype(jnp.float64) for i, n in ((0, 6), (1, 4)))
        axes = distance.directions(jax.random.key(2), 5, 3).astype(jnp.float64)
        options = {"order": 1, "modes": ["rev"], "rtol": 1e-5, "atol": 1e-7}
        for f in (
            lambda a: distance.wasserstein_1d(a[:, 0], y[:, 0]),
            lambda a: distance.sliced_wasserstein(a, y, axes),
            lambda a: distance.energy_distance(a, y),
            lambda a: distance.mmd_rbf(a, y, 0.7),
        ):
            check_grads(jax.jit(f), (x,), **options)


def test_assigned_is_exact_and_its_gradient_holds_the_plan():
    with jax.enable_x64():
        x, y = (points(i, 9).astype(jnp.float64) for i in (0, 1))
        value = jax.jit(distance.wasserstein_assigned, static_argnums=2)
        for p in (1.0, 2.0):
            expected = distance.wasserstein_exact(x, y, p)
            np.testing.assert_allclose(value(x, y, p), expected, rtol=1e-12)
        check_grads(
            lambda *a: distance.wasserstein_assigned(*map(jnp.asarray, a)),
            (x, y), 1, ["rev"], rtol=1e-5, atol=1e-7,
        )  # fmt: skip
        # On the line the plan is the order: the gradient of W^2 is 2 (x - T(x)) / N.
        x, y = x[:, :1], y[:, :1]
        found = jax.grad(lambda x: distance.wasserstein_assigned(x, y) ** 2)(x)
        rank = jnp.argsort(jnp.argsort(x[:, 0]))
        matched = jnp.sort(y[:, 0])[rank]
        np.testing.assert_allclose(found[:, 0], 2 * (x[:, 0] - matched) / 9, rtol=1e-9)
    same = points(0, 5)
    value, grad = jax.value_and_grad(distance.wasserstein_assigned)(same, same)
    assert value == 0 and (grad == 0).all()


def test_sinkhorn_divergence():
    with jax.enable_x64():
        x, y = (points(i, n).astype(jnp.float64) for i, n in ((0, 9), (1, 9)))
        value = jax.jit(distance.sinkhorn_divergence, static_argnums=(2, 3))
        # Debiased: 0 for equal sets at any eps, |shift| for translates, W_2 as eps falls.
        assert value(x, x[::-1], 1.0, 1000) < 1e-6
        shift = jnp.array([[3.0, -4.0, 0.0]])
        np.testing.assert_allclose(value(x, x + shift, 1.0, 1000), 5.0, rtol=1e-6)
        exact = distance.wasserstein_exact(x, y)
        errors = [abs(value(x, y, eps, 1000) / exact - 1) for eps in (1.0, 0.02)]
        assert errors[0] > errors[1] and errors[1] < 1e-3
        # As eps grows only the means count.
        means = jnp.linalg.norm(x.mean(0) - y.mean(0))
        np.testing.assert_allclose(value(x, y, 1e5, 1000), means, rtol=1e-3)
        check_grads(
            jax.jit(lambda x: distance.sinkhorn_divergence(x, y[:6], 0.5, 200)),
            (x,), 1, ["rev"], rtol=1e-5, atol=1e-7,
        )  # fmt: skip


def test_gradients_of_gaussians():
    with jax.enable_x64():
        roots = [points(i, 3).astype(jnp.float64) for i in (0, 1)]
        cov = roots[1] @ roots[1].T + 0.3 * jnp.eye(3)
        m = points(2, 2).astype(jnp.float64)
        check_grads(
            jax.jit(lambda m, a: distance.gaussian_w2(m, a @ a.T, m[::-1], cov)),
            (m[0], roots[0]), 1, ["rev"], rtol=1e-5, atol=1e-7,
        )  # fmt: skip


def test_refuses():
    x = points(0, 4)
    with pytest.raises(ValueError, match="p >= 1"):
        distance.wasserstein_1d(x, x, 0.5)
    with pytest.raises(ValueError, match="least common multiple 5001"):
        distance.wasserstein_exact(points(0, 5001), x[:3])
    with pytest.raises(ValueError, match="points"):
        distance.wasserstein_exact(x, x[:, :2])
    with pytest.raises(ValueError, match="as many points of each, got 4 and 2"):
        inspect.unwrap(distance.wasserstein_assigned)(x, x[:2])
    for name, more in {
        "energy_distance": (),
        "mmd_rbf": (1.0,),
        "sinkhorn_divergence": (0.1,),
        "frechet_distance": (),
        "wasserstein_assigned": (),
    }.items():
        for y in (x[:0], x[:, :1], x[0]):
            with pytest.raises(ValueError, match=f"{name} needs points"):
                # Without the tests' own check of the annotations.
                inspect.unwrap(getattr(distance, name))(x, y, *more)
    for eps, iterations in ((0.0, 10), (1.0, 0)):
        with pytest.raises(ValueError, match="eps > 0"):
            distance.sinkhorn_divergence(x, x, eps, iterations)
    with pytest.raises(ValueError, match="bandwidth"):
        distance.mmd_rbf(x, x, 0.0)
    with pytest.raises(ValueError, match="two rows"):
        distance.frechet_distance(x, x[:1])
