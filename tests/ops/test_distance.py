"""Distances: recorded numbers, closed forms, gradients, what they refuse."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import distance
from tests.programs import together


@pytest.mark.parity("diffusion", only=lambda entry: "sw2" in entry["arrays"])
def test_recorded_distances(case, float64):
    z = case.arrays
    moments = [z[k] for k in ("m1", "S1", "m2", "S2")]

    def f(a, b, axes, moments):
        return {
            "sw1": distance.sliced_wasserstein(a, b, axes, 1.0),
            "sw2": distance.sliced_wasserstein(a, b, axes, 2.0),
            "energy": distance.energy_distance(a, b),
            "bures_w2": distance.gaussian_w2(*moments),
            "kl": distance.gaussian_kl(*moments),
        }

    values = together(f, z["A"], z["B"], z["P"], moments)
    values["w1"] = distance.wasserstein_exact(z["A"], z["B"], 1.0)
    values["w2"] = distance.wasserstein_exact(z["A"], z["B"], 2.0)
    for name, value in values.items():
        rtol = case.tolerance(name, otherwise=1e-10)
        np.testing.assert_allclose(value, z[name], rtol=rtol)


def points(seed, count, dim=3, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(dtype)


def doubles(seed, count, dim=3):
    return points(seed, count, dim, np.float64)


def slopes(f, x, along):
    """The derivative of f along a direction, by the gradient and by a difference."""
    derivative = (jax.grad(f)(x) * along).sum()
    h = 1e-5
    return derivative, (f(x + h * along) - f(x - h * along)) / (2 * h)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("counts", [(12, 12), (12, 8), (5, 15)])
def test_the_line_is_the_assignment(p, counts):
    x, y = (points(i, n, 1) for i, n in enumerate(counts))
    found = together(lambda x, y: distance.wasserstein_1d(x[:, 0], y[:, 0], p), x, y)
    np.testing.assert_allclose(found, distance.wasserstein_exact(x, y, p), rtol=1e-5)


def test_translates(key):
    x = points(0, 20)
    y = x + np.float32([3.0, -4.0, 0.0])
    assert distance.wasserstein_exact(x, y) == pytest.approx(5.0, rel=1e-6)

    def f(key, x, y):
        axes, drawn = jnp.eye(3), distance.directions(key, 50, 3)
        sliced = distance.sliced_wasserstein(x, y, axes)
        largest = distance.max_sliced_wasserstein(x, y, axes)
        return sliced, largest, drawn, distance.sliced_wasserstein(x, y, drawn)

    sliced, largest, drawn, shorter = together(f, key, x, y)
    np.testing.assert_allclose(sliced, np.sqrt(25 / 3), rtol=1e-5)
    np.testing.assert_allclose(largest, 4.0, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=0), 1, rtol=1e-5)
    assert shorter < 5.0


def test_equal_sets_have_no_distance_and_finite_gradients(key):
    def f(key, x):
        axes = distance.directions(key, 4, 3)
        at_zero = [
            jax.value_and_grad(g)(x)
            for g in (
                lambda a: distance.sliced_wasserstein(a, x, axes),
                lambda a: distance.energy_distance(a, x),
                lambda a: distance.mmd_rbf(a, x, 1.0),
                lambda a: distance.wasserstein_assigned(a, x),
            )
        ]
        y = x.at[0].add(0.5)
        apart = distance.energy_distance(x, y), distance.mmd_rbf(x, y, 1.0)
        return at_zero, apart, distance.frechet_distance(x, x)

    at_zero, apart, frechet = together(f, key, points(0, 10))
    for value, grad in at_zero:
        assert abs(float(value)) < 1e-6 and np.isfinite(grad).all()
    assert at_zero[-1][0] == 0 and not at_zero[-1][1].any()
    assert min(apart) > 0 and frechet < 1e-5


def test_gaussians_with_singular_covariances():
    flat, zero = np.diag(np.float32([4, 0])), np.zeros(2, np.float32)
    # Of rank 1, with eigenvalues that rounding makes negative.
    thin = points(3, 6, 1) @ points(3, 6, 1).T

    def f(flat, zero, thin):
        eye, none = jnp.eye(2), jnp.zeros(6)
        return (
            distance.gaussian_w2(zero, flat, jnp.array([3.0, 0.0]), eye),
            distance.gaussian_w2(zero, flat, zero, flat),
            distance.gaussian_w2(none, thin, none, jnp.zeros((6, 6))),
            jnp.linalg.eigvalsh(thin).min(),
        )

    apart, same, thin_w2, least = together(f, flat, zero, thin)
    # Per axis: 3^2 + (2 - 1)^2 + (0 - 1)^2.
    np.testing.assert_allclose(apart, np.sqrt(11.0), rtol=1e-5)
    assert same < 1e-3 and least < 0
    np.testing.assert_allclose(thin_w2, np.sqrt(np.trace(thin)), rtol=1e-4)


def test_frechet_is_that_of_the_moments():
    x, y = points(0, 50), 2 * points(1, 60) + 1
    moments = [
        np.asarray(m, np.float32)
        for a in (x, y)
        for m in (np.mean(a, 0), np.cov(a, rowvar=False))
    ]

    def f(x, y, moments):
        return distance.frechet_distance(x, y), distance.gaussian_w2(*moments) ** 2

    np.testing.assert_allclose(*together(f, x, y, moments), rtol=1e-4)


def test_gradients(float64):
    def f(x, y, along, axes):
        losses = (
            lambda a: distance.wasserstein_1d(a[:, 0], y[:, 0]),
            lambda a: distance.sliced_wasserstein(a, y, axes),
            lambda a: distance.energy_distance(a, y),
            lambda a: distance.mmd_rbf(a, y, 0.7),
            lambda a: distance.sinkhorn_divergence(a, y, 0.5, 200),
        )
        return [slopes(loss, x, along) for loss in losses]

    axes = doubles(3, 3, 5)
    axes /= np.linalg.norm(axes, axis=0)
    found = together(f, doubles(0, 6), doubles(1, 4), doubles(2, 6), axes)
    for derivative, difference in found:
        np.testing.assert_allclose(derivative, difference, rtol=1e-5, atol=1e-7)


def test_assigned_is_exact_and_its_gradient_holds_the_plan(float64):
    x, y = doubles(0, 9), doubles(1, 9)

    def f(x, y, along):
        assigned = distance.wasserstein_assigned
        values = [assigned(x, y, p) for p in (1.0, 2.0)]
        line = jax.grad(lambda x: assigned(x, y[:, :1]) ** 2)(x[:, :1])
        either = [slopes(lambda a: assigned(a, y), x, along)]
        either += [slopes(lambda a: assigned(x, a), y, along)]
        return values, line, either

    values, line, either = together(f, x, y, doubles(2, 9))
    for value, p in zip(values, (1.0, 2.0)):
        expected = distance.wasserstein_exact(x, y, p)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
    for derivative, difference in either:
        np.testing.assert_allclose(derivative, difference, rtol=1e-5, atol=1e-7)
    # On the line the plan is the order: the gradient of W^2 is 2 (x - T(x)) / N.
    matched = np.sort(y[:, 0])[np.argsort(np.argsort(x[:, 0]))]
    np.testing.assert_allclose(line[:, 0], 2 * (x[:, 0] - matched) / 9, rtol=1e-9)


def test_sinkhorn_divergence(float64):
    x, y = doubles(0, 9), doubles(1, 9)
    shift = np.array([[3.0, -4.0, 0.0]])

    def f(x, y):
        def value(x, y, eps):
            return distance.sinkhorn_divergence(x, y, eps, 1000)

        same, moved = value(x, x[::-1], 1.0), value(x, x + shift, 1.0)
        return same, moved, {eps: value(x, y, eps) for eps in (1.0, 0.02, 1e5)}

    same, moved, values = together(f, x, y)
    # Debiased: 0 for equal sets at any eps, |shift| for translates, W_2 as eps falls.
    assert same < 1e-6
    np.testing.assert_allclose(moved, 5.0, rtol=1e-6)
    exact = distance.wasserstein_exact(x, y)
    errors = [abs(values[eps] / exact - 1) for eps in (1.0, 0.02)]
    assert errors[0] > errors[1] and errors[1] < 1e-3
    # As eps grows only the means count.
    means = np.linalg.norm(x.mean(0) - y.mean(0))
    np.testing.assert_allclose(values[1e5], means, rtol=1e-3)


def test_gradients_of_gaussians(float64):
    root, other = doubles(0, 3), doubles(1, 3)
    cov = other @ other.T + 0.3 * np.eye(3)

    def f(m, root, along):
        def of_mean(a):
            return distance.gaussian_w2(a, root @ root.T, m[1], jnp.asarray(cov))

        def of_root(a):
            return distance.gaussian_w2(m[0], a @ a.T, m[1], jnp.asarray(cov))

        return slopes(of_mean, m[0], along[0]), slopes(of_root, root, along)

    for derivative, difference in together(f, doubles(2, 2), root, doubles(3, 3)):
        np.testing.assert_allclose(derivative, difference, rtol=1e-5, atol=1e-7)


NAN, INF = np.float32([np.nan, np.inf])
DIVERGED = {
    "one NaN": lambda x: np.where(np.arange(len(x))[:, None] == 3, NAN, x),
    "all NaN": lambda x: NAN * x,
    "one inf": lambda x: np.where(np.arange(len(x))[:, None] == 3, INF, x),
    "-inf": lambda x: np.where(np.arange(len(x))[:, None] == 3, -INF, x),
}


@jax.jit
def every_distance(x, y, moments):
    axes = jnp.eye(3)
    return {
        "1d": distance.wasserstein_1d(x[:, 0], y[:, 0]),
        "sliced": distance.sliced_wasserstein(x, y, axes),
        "max sliced": distance.max_sliced_wasserstein(x, y, axes),
        "directions": distance.sliced_wasserstein(x, x + 1, axes * y[3, 0]),
        "assigned": distance.wasserstein_assigned(x, y),
        "sinkhorn": distance.sinkhorn_divergence(x, y, 0.5, 50),
        "energy": distance.energy_distance(x, y),
        "mmd": distance.mmd_rbf(x, y, 1.0),
        "frechet": distance.frechet_distance(x, y),
        "gaussian w2": distance.gaussian_w2(*moments),
        "gaussian kl": distance.gaussian_kl(*moments),
    }


MOMENTS = [np.zeros(3, np.float32), np.eye(3, dtype=np.float32)] * 2
GAUSSIAN = {"gaussian w2", "gaussian kl"}


@pytest.mark.parametrize("name", DIVERGED)
def test_diverged_samples_are_nowhere_near(name):
    """NaN, on the host an error, for samples that are not finite on either side."""
    x, y, broken = points(0, 16), points(1, 16), DIVERGED[name]
    assert np.isfinite([*every_distance(x, y, MOMENTS).values()]).all()
    for pair in ((broken(x), y), (x, broken(y))):
        values = every_distance(*pair, MOMENTS)
        finite = {k for k, v in values.items() if np.isfinite(v)}
        assert finite == GAUSSIAN
        assert all(np.isnan(v) for k, v in values.items() if k not in GAUSSIAN)
        rows = r"\[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\]" if "all" in name else r"\[3\]"
        with pytest.raises(ValueError, match=f"not finite: rows {rows}"):
            distance.wasserstein_exact(*pair)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("i", range(4))
def test_moments_that_are_not_finite(i, value):
    moments = [m + value if j == i else m for j, m in enumerate(MOMENTS)]
    values = every_distance(points(0, 16), points(1, 16), moments)
    assert all(np.isnan(values[k]) for k in GAUSSIAN)


@pytest.mark.parametrize("scale", [1e6, 1e10, 1e30])
def test_far_samples_are_not_near(scale):
    """Finite samples too far away for float32 or for the iterations."""
    x, y = points(0, 16), points(1, 16)
    near = every_distance(x, y, MOMENTS)
    far = every_distance(x, np.float32(scale) * y, MOMENTS)
    for name in near.keys() - GAUSSIAN - {"mmd"}:  # At most 2.
        assert not far[name] < 1e3 * near[name], name
    assert far["mmd"] > near["mmd"]


def test_what_is_no_covariance_has_no_distance():
    def f(minus, eye):
        zero = jnp.zeros(2)
        return distance.gaussian_w2(zero, minus, zero, eye)

    eye = np.eye(2, dtype=np.float32)
    # Clipped at 0, the trace of -I would make the distance of I and -I zero.
    assert np.isnan(together(f, -eye, eye))


def test_refuses():
    x = jnp.asarray(points(0, 4))
    with pytest.raises(ValueError, match="p >= 1"):
        distance.wasserstein_1d(x, x, 0.5)
    with pytest.raises(ValueError, match="least common multiple 5001"):
        distance.wasserstein_exact(points(0, 5001), points(0, 3))
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
    for eps, iterations in ((0.0, 10), (1.0, 0), (np.nan, 10), (np.inf, 10)):
        with pytest.raises(ValueError, match="finite eps > 0"):
            distance.sinkhorn_divergence(x, x, eps, iterations)
    raw = inspect.unwrap(distance.wasserstein_1d)
    with pytest.raises(ValueError, match="may differ in their first axis only"):
        raw(x, x[:, :1])
    raw = inspect.unwrap(distance.gaussian_w2)
    with pytest.raises(ValueError, match="mean_x and mean_y must have one shape"):
        raw(np.zeros(2), np.eye(2), np.zeros(1), np.eye(2))
    for bandwidth in (0.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="bandwidth"):
            distance.mmd_rbf(x, x, bandwidth)
    for p in (np.nan, np.inf):
        with pytest.raises(ValueError, match="a finite p >= 1"):
            distance.wasserstein_1d(x, x, p)
    with pytest.raises(ValueError, match="two rows"):
        distance.frechet_distance(x, x[:1])
