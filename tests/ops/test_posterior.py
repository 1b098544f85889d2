"""Bayesian linear regression: recorded posteriors, closed forms, both routes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from jaxpapers.ops import posterior as blr
from tests.programs import together

PRIOR, NOISE = 20.0, 0.5


def is_regression(entry):
    return {"z", "y", "sigma", "sigma_n", "cov_ref"} <= set(entry["arrays"])


def rows(n=40, d=5, outputs=(), seed=0):
    rng = np.random.default_rng(seed)
    z = np.maximum(rng.normal(1, 1, (n, d)), 0)
    return z, rng.normal(size=(n, *outputs))


def by_hand(z, y, prior=PRIOR, noise=NOISE):
    """Mean and covariance in float64."""
    precision = z.T @ z / noise + np.eye(z.shape[1]) / prior
    covariance = np.linalg.inv(precision)
    return covariance @ z.T @ y / noise, covariance


def fitted(z, y, prior=PRIOR, noise=NOISE, **kwargs):
    return blr.posterior(blr.statistics(z, y, **kwargs), prior, noise)


def updated(z, y, prior=PRIOR, noise=NOISE):
    start = blr.prior(z.shape[1], prior, y.shape[1:], z.dtype)
    return blr.update(start, z, y, noise)


@pytest.mark.parity("ood_dg", only=is_regression)
@pytest.mark.parametrize("route", [fitted, updated])
def test_recorded_regressions(case, route, float64):
    a = case.arrays
    tol = case.tolerance("float64", otherwise=1e-9)
    sigma, noise = float(a["sigma"]), float(a["sigma_n"])

    def body(z, y, eps):
        post = route(z, y, sigma, noise)
        draw = blr.sample(eps, post, scale=sigma, factor="covariance")
        return post, blr.covariance(post), draw

    z, y = (a[k].astype(np.float64) for k in ("z", "y"))
    post, covariance, w = together(body, z, y, a["eps"])
    np.testing.assert_allclose(post.mean, a["mu"], rtol=tol, atol=tol)
    np.testing.assert_allclose(sigma * covariance, a["cov_ref"], rtol=tol, atol=tol)
    np.testing.assert_allclose(w, a["w64"], rtol=tol, atol=tol)
    np.testing.assert_allclose(w, a["w"], rtol=1e-5, atol=1e-5)
    f = a["pool"].astype(np.float64) @ w
    scale = np.abs(a["f"]).max()
    np.testing.assert_allclose(f, a["f"], atol=1e-5 * scale)
    order = np.argsort(np.abs(f), kind="stable")[: len(a["topk_idx"])]
    np.testing.assert_array_equal(order, a["topk_idx"])
    np.testing.assert_allclose(np.abs(f)[order], a["abs_f_sorted"], atol=1e-5 * scale)
    assert 0 < a["n_id"] < len(z)


@pytest.mark.parity("ood_dg", only=is_regression)
@pytest.mark.parametrize("route", [fitted, updated])
def test_recorded_regressions_in_float32(case, route):
    a = case.arrays
    tol = case.tolerance("float32", otherwise=1e-3)
    sigma, noise = float(a["sigma"]), float(a["sigma_n"])
    z, y = (a[k].astype(np.float32) for k in ("z", "y"))
    post = together(lambda z, y: route(z, y, sigma, noise), z, y)
    assert np.abs(post.mean - a["mu"]).max() < tol * np.abs(a["mu"]).max()


def test_closed_forms(float64):
    z, y = rows(1)
    many, targets = rows(3, 6)

    def body(z, y, many, targets):
        none = blr.posterior(
            blr.statistics(z, y, weight=0 * y), prior=PRIOR, noise=NOISE
        )
        one = fitted(z, y)
        exact = updated(many, targets, noise=1e-14)
        return none, blr.covariance(none), one, blr.covariance(one), exact

    none, spread, one, covariance, exact = together(body, z, y, many, targets)
    np.testing.assert_allclose(none.mean, 0)
    np.testing.assert_allclose(spread, PRIOR * np.eye(5), rtol=1e-12, atol=1e-12)
    scale = NOISE + PRIOR * (z[0] @ z[0])
    np.testing.assert_allclose(one.mean, PRIOR * z[0] * y[0] / scale, rtol=1e-10)
    expected = PRIOR * np.eye(5) - PRIOR**2 * np.outer(z[0], z[0]) / scale
    np.testing.assert_allclose(covariance, expected, atol=1e-10)
    # Without noise and with fewer rows than features, the rows are interpolated; the
    # posterior is that of the dual form.
    np.testing.assert_allclose(many @ exact.mean, targets, atol=1e-6)
    kernel = PRIOR * many @ many.T + 1e-14 * np.eye(3)
    dual = PRIOR * many.T @ np.linalg.solve(kernel, targets)
    np.testing.assert_allclose(exact.mean, dual, atol=1e-6)


def test_routes_orders_and_chunks_agree(float64):
    z, y = rows(40, 5, (3,))
    order = np.random.default_rng(1).permutation(40)
    eps = np.random.default_rng(2).normal(size=(5, 3))

    def body(z, y, eps):
        pieces = [
            blr.statistics(z[a:b], y[a:b]) for a, b in ((0, 7), (7, 33), (33, 40))
        ]
        total = blr.add(blr.add(pieces[2], pieces[0]), pieces[1])
        step = updated(z[:7], y[:7])
        padded = (jnp.concatenate([x[7:], x[:2]]) for x in (z, y))
        kept = jnp.array([1.0] * 33 + [0.0] * 2)
        return {
            "added": blr.posterior(total, PRIOR, NOISE),
            "chunks": fitted(z, y, chunk=16),
            "permuted": fitted(z[order], y[order]),
            "rows": jax.lax.scan(
                lambda p, x: (blr.update(p, x[0][None], x[1][None], NOISE), None),
                blr.prior(5, PRIOR, (3,), z.dtype), (z, y),
            )[0],
            "in parts": blr.update(step, *padded, NOISE, kept),
            "each output": [fitted(z, y[:, i]) for i in range(3)],
            "twice": fitted(jnp.tile(z, (2, 1)), jnp.tile(y, (2, 1))),
            "weight 2": fitted(z, y, weight=jnp.full(40, 2.0)),
            "scaled": fitted(z, 3 * y, 9 * PRIOR, 9 * NOISE),
            "draws": [
                blr.sample(eps, fitted(z, y)),
                blr.sample(eps, fitted(z, 3 * y, 9 * PRIOR, 9 * NOISE)),
            ],
            "whole": fitted(z, y),
        }  # fmt: skip

    got = together(body, z, y, eps)
    mean, covariance = by_hand(z, y)
    whole = got.pop("whole")
    np.testing.assert_allclose(whole.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(
        np.linalg.inv(whole.root.T @ whole.root), covariance, rtol=1e-9
    )
    residual = np.square(y - z @ mean).sum(0) / NOISE + np.square(mean).sum(0) / PRIOR
    np.testing.assert_allclose(whole.residual, residual, rtol=1e-9)
    twice, doubled = got.pop("twice"), got.pop("weight 2")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), twice, doubled
    )
    for i, each in enumerate(got.pop("each output")):
        np.testing.assert_allclose(each.mean, mean[:, i], rtol=1e-9)
    # Targets in other units: mean and draws in those, the boundary where it was.
    plain, scaled = got.pop("draws")
    np.testing.assert_allclose(scaled, 3 * plain, rtol=1e-10)
    np.testing.assert_allclose(got.pop("scaled").mean, 3 * mean, rtol=1e-10)
    for name, post in got.items():
        for a, b in zip(post, whole):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9, err_msg=name)


def test_evidence_variance_and_draws(float64):
    z, y = rows(12, 4, (2,))

    def body(z, y, key):
        post = fitted(z, y)
        keys = jax.random.split(key, 20_000)

        def draw(factor):
            return jax.vmap(lambda k: blr.sample(k, post, factor=factor)[:, 0])(keys)

        draws = [draw("precision"), draw("covariance")]
        evidence = [blr.log_evidence(p, PRIOR, NOISE) for p in (post, updated(z, y))]
        return evidence, blr.variance(post, z), draws

    evidence, variance, draws = together(body, z, y, jax.random.key(0))
    mean, covariance = by_hand(z, y)
    kernel = NOISE * np.eye(12) + PRIOR * z @ z.T
    expected = scipy_stats.multivariate_normal(np.zeros(12), kernel).logpdf(y.T)
    for value in evidence:
        np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(variance, np.einsum("nd,de,ne->n", z, covariance, z))
    size = np.sqrt(np.diag(covariance))
    for w in draws:
        off = (w.mean(0) - mean[:, 0]) / size * np.sqrt(len(w))
        assert np.abs(off).max() < 5
        spread = np.cov(w.T) / np.outer(size, size) - covariance / np.outer(size, size)
        assert np.abs(spread).max() * np.sqrt(len(w) / 2) < 5


def test_qr_of_an_ill_conditioned_precision_in_float32():
    """cond(A) of about 1e7: predictions keep three digits, and more than by the Gram."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(400, 1))
    z = (shared + 0.02 * rng.normal(size=(400, 8))).astype(np.float32)
    y = rng.normal(size=400).astype(np.float32)
    prior, noise = 100.0, 1e-2
    precision = z.astype(float).T @ z / noise + np.eye(8) / prior
    assert 1e3 < np.linalg.cond(precision) < 1e8
    post = together(lambda z, y: updated(z, y, prior, noise), z, y)
    expected = z @ by_hand(z.astype(float), y, prior, noise)[0]
    assert np.abs(z @ post.mean - expected).max() < 1e-3 * np.abs(expected).max()


def test_refuses():
    z, y = (jnp.asarray(x, jnp.float32) for x in rows(6))
    stats = blr.Statistics(np.eye(5), np.zeros(5), np.zeros(()), np.ones(()))
    post = blr.Posterior(np.zeros(5), np.eye(5), np.zeros(()), np.zeros(()))
    for prior, noise in ((0.0, 1.0), (1.0, -1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="variance and must be > 0"):
            blr.posterior(stats, prior, noise)
    with pytest.raises(ValueError, match=r"\(N, 5\).*\(6, 4\)"):
        blr.update(post, z[:, :4], y, 1.0)
    with pytest.raises(ValueError, match="as many rows"):
        blr.statistics(z, y[:5])
    with pytest.raises(ValueError, match="precision or covariance"):
        blr.sample(y[:5], post, factor="root")
    with pytest.raises(ValueError, match=r"shape \(5,\), got \(6,\)"):
        blr.sample(y, post)
    with pytest.raises(ValueError, match="mean.*not finite"):
        blr.check_finite(post._replace(mean=np.full(5, np.nan)))


def test_half_precision_features_are_summed_in_float32():
    z, y = rows(20)
    half = z.astype("bfloat16")
    stats = together(blr.statistics, half, y.astype(np.float32))
    assert stats.gram.dtype == np.float32
    exact = half.astype(float)
    np.testing.assert_allclose(stats.gram, exact.T @ exact, rtol=1e-5)
