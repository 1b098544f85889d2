"""Ratings and gradients past a choice: identities, limits, references in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import vector_quantization as vq
from tests.programs import together

RNG = np.random.default_rng(0)
X, C, R = (RNG.normal(size=s).astype(np.float32) for s in ((7, 5), (6, 5), (5,)))


def test_the_projection():
    def values(r, x):
        alpha, e = vq.project(r, x)
        scaled = vq.project(3 * r, x)[1]
        # What is left does not depend on the length of r: its gradient is orthogonal.
        slope = jax.grad(lambda r: jnp.sin(vq.project(r, x)[1]).sum())(r)
        return alpha, e, scaled, slope

    alpha, e, scaled, slope = together(values, R, X)
    np.testing.assert_allclose(e @ R, 0, atol=1e-5)
    np.testing.assert_allclose(alpha[:, None] * R + e, X, atol=1e-5)
    np.testing.assert_allclose(scaled, e, atol=1e-5)
    assert abs(slope @ R) < 1e-4 * np.linalg.norm(slope) * np.linalg.norm(R)
    assert np.linalg.norm(slope) > 0.1


def reference(e, codes, mode, tau):
    """The rating of a level in NumPy, float64."""
    e, codes = e.astype(float), codes.astype(float)
    u = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    s = (e / np.linalg.norm(e, axis=1, keepdims=True)) @ u.T
    k = s.argmax(1)
    if mode == "soft":
        w = np.exp(s / tau)
        return (w / w.sum(1, keepdims=True)) @ codes, k
    best = u[k]
    if mode == "top1":
        return s.max(1)[:, None] * best, k
    return (e * best).sum(1)[:, None] * best, k


@pytest.mark.parametrize("mode", ["soft", "top1", "mp"])
def test_ratings_as_in_numpy(mode):
    choice = together(lambda e, c: vq.rated(e, c, mode, 0.3), X, C)
    value, code = reference(X, C, mode, 0.3)
    np.testing.assert_allclose(choice.value, value, atol=1e-5)
    np.testing.assert_array_equal(choice.code, code)
    np.testing.assert_allclose(choice.weights.sum(1), 1, atol=1e-6)
    if mode == "mp":
        s = together(lambda e, c: vq.rate(e, c)[0].max(1), X, C)
        after = np.square(X - choice.value).sum(1)
        np.testing.assert_allclose(after, np.square(X).sum(1) * (1 - s**2), rtol=1e-4)


def test_limits_and_the_bound_of_weights():
    def values(e, c):
        aligned = jnp.concatenate([e[:1], jnp.tile(-e[:1], (63, 1))])
        return (
            vq.rated(e, c, "soft", 1e-4).value,
            vq.rated(e, c, "soft", 1e5).value,
            vq.rate(e[:1], aligned)[1].max(),
        )

    cold, hot, largest = together(values, X, C)
    np.testing.assert_allclose(cold, C[reference(X, C, "top1", 1)[1]], atol=1e-4)
    np.testing.assert_allclose(hot, np.tile(C.mean(0), (7, 1)), atol=1e-4)
    assert largest == pytest.approx(vq.top_weight_bound(64), rel=1e-5)
    assert vq.top_weight_bound(8192) == pytest.approx(0.0009, abs=5e-5)


def test_gradients_past_a_choice():
    e, q = X[0], C[0]

    def values(e, q):
        through = jax.jacobian(lambda e: vq.straight_through(e, q))(e)
        turned = jax.jacobian(lambda e: vq.rotate(e[None], q[None])[0])(e)
        return vq.rotate(e[None], q[None])[0], through, turned

    value, through, turned = together(values, e, q)
    np.testing.assert_allclose(value, q, atol=1e-6)
    np.testing.assert_allclose(through, np.eye(5), atol=1e-6)
    scale = np.linalg.norm(q) / np.linalg.norm(e)
    rotation = turned / scale
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)
    np.testing.assert_allclose(turned @ e, q, atol=1e-5)


def test_codes_that_are_never_chosen_stay():
    def values(e, c):
        def update(ema, _):
            return vq.ema_update(ema, e, jnp.zeros(len(e), jnp.int32), 0.5), ()

        return vq.ema_codes(jax.lax.scan(update, vq.ema_start(c), None, 400)[0])

    codes = together(values, X, C)
    np.testing.assert_allclose(codes[0], X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(codes[1:], C[1:], rtol=1e-5)


def test_the_zero_vector_has_no_direction_and_no_gradient():
    def values(x):
        return vq.unit(x), jax.jacobian(lambda y: vq.unit(y)[0])(x)

    value, gradient = together(values, jnp.zeros((1, 3)))
    assert not np.any(value) and not np.any(gradient)
    value, gradient = together(values, jnp.array([[3.0, 0.0, 4.0]]))
    np.testing.assert_allclose(value, [[0.6, 0, 0.8]], rtol=1e-6)
    u = np.array([0.6, 0, 0.8])
    np.testing.assert_allclose(
        gradient[:, 0], (np.eye(3) - np.outer(u, u)) / 5, atol=1e-7
    )


def test_moving_means_of_codes():
    def values(e, c):
        code, _ = vq.nearest(e, c)
        ema = vq.ema_start(c)
        once = vq.ema_update(ema, e, code, 0.5)
        for _ in range(60):
            ema = vq.ema_update(ema, e, code, 0.5)
        return code, once, vq.ema_codes(ema)

    code, once, codes = together(values, X, C)
    np.testing.assert_array_equal(
        code, np.square(X[:, None] - C[None]).sum(-1).argmin(1)
    )
    n = np.bincount(code, minlength=6)
    np.testing.assert_allclose(once.counts, 0.5 + 0.5 * n, rtol=1e-6)
    for k in np.flatnonzero(n):
        np.testing.assert_allclose(codes[k], X[code == k].mean(0), atol=1e-5)


def test_finite_scalars():
    z = np.float32([[-9, -9], [9, -9], [9, 9], [0.0, 0.0]])

    def values(z):
        value, index = vq.fsq(z, (3, 5))
        slope = jax.grad(lambda z: vq.fsq(z, (3, 5))[0].sum())(z)
        return value, index, slope

    value, index, slope = together(values, z)
    np.testing.assert_array_equal(index, [0, 2, 14, 1 + 3 * 2])
    np.testing.assert_allclose(value, [[-1, -1], [1, -1], [1, 1], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(slope[3], 1, atol=1e-5)
    with pytest.raises(ValueError, match="each of 2 features"):
        vq.fsq(jnp.asarray(z), (3,))


def test_noise_of_gumbel_draws_in_proportion():
    logits = np.log(np.float32([[0.7, 0.2, 0.1]]))

    def values(logits):
        many = jnp.broadcast_to(logits, (4000, 3))
        weights = vq.gumbel(jax.random.key(0), many, 0.5)
        return jnp.bincount(weights.argmax(1), length=3), vq.gumbel(None, logits, 1.0)

    counts, plain = together(values, logits)
    np.testing.assert_allclose(counts / 4000, [0.7, 0.2, 0.1], atol=0.03)
    np.testing.assert_allclose(plain, [[0.7, 0.2, 0.1]], rtol=1e-5)


def test_what_is_refused():
    rows = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    with pytest.raises(ValueError, match="tau > 0"):
        jax.eval_shape(lambda x: vq.rate(x, x, 0.0), rows)
    with pytest.raises(ValueError, match="mode must be"):
        jax.eval_shape(lambda x: vq.rated(x, x, "hard"), rows)
