"""Energies, losses and scores: recorded numbers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import ood
from tests.programs import together


def is_energy(entry):
    return {"logits", "labels", "m_in", "m_out", "grad"} <= set(entry["arrays"])


@pytest.mark.parity("ood_dg", only=is_energy)
def test_recorded_energies(case, float64):
    a = case.arrays
    tol = case.tolerance("float64", otherwise=1e-12)
    count = len(a["labels"])
    margins = {k: float(a[k]) for k in ("m_in", "m_out", "beta")}

    def loss(logits):
        inside, outside = logits[:count], logits[count:]
        return ood.energy_loss(inside, jnp.asarray(a["labels"]), outside, **margins)

    def body(logits):
        (total, terms), grad = jax.value_and_grad(loss, has_aux=True)(logits)
        return {"total": total, "grad": grad, "energy": ood.energy(logits), **terms}

    for name, value in together(body, a["logits"]).items():
        np.testing.assert_allclose(value, a[name], rtol=tol, atol=tol, err_msg=name)


def test_gradient_shift_and_extremes(float64):
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
    labels = np.arange(6) % 3
    margins = {"m_in": -3.0, "m_out": -1.0, "beta": 0.1}

    def hinges(inside, outside):
        total, terms = ood.energy_loss(inside, jnp.asarray(labels), outside, **margins)
        return total - terms["ce"]

    def body(inside, outside):
        grads = jax.grad(hinges, (0, 1))(inside, outside)
        wide = jnp.array([[1e4, -1e4, 0.0]] * 2)
        extreme = jax.value_and_grad(
            lambda x: ood.energy_loss(x, jnp.arange(2), -x, **margins)[0]
        )(wide)
        energy = ood.energy(inside)
        return grads, extreme, energy, ood.energy(inside + 7), ood.energy(inside, 2.0)

    grads, extreme, energy, shifted, warm = together(body, inside, outside)
    soft = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (inside, outside)]
    expected = (
        -0.2 / 6 * np.maximum(energy + 3, 0)[:, None] * soft[0],
        0.2 / 4
        * np.maximum(-1 + np.log(np.exp(outside).sum(1)), 0)[:, None]
        * soft[1],
    )  # fmt: skip
    for a, b in zip(grads, expected):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(shifted, energy - 7, rtol=1e-12)
    np.testing.assert_allclose(warm, -2 * np.log(np.exp(inside / 2).sum(1)))
    assert all(np.isfinite(x).all() for x in extreme)


def test_scores_by_hand(float64):
    rng = np.random.default_rng(1)
    z, labels = rng.normal(size=(60, 3)), np.arange(60) % 4
    z[:, 2] = 0.0  # A feature that is always 0 has no variance.
    logits = rng.normal(size=(5, 4))
    w = rng.normal(size=(3, 4))
    queries = np.concatenate([z[:4], 5 + z[4:6, :]])

    def body(z, logits, queries):
        fitted = ood.fit_gaussians(z, jnp.asarray(labels), 4)
        return {
            "msp": ood.max_softmax(logits),
            "warm": ood.max_softmax(logits, 2.0),
            "max_logit": ood.max_logit(logits),
            "uniform": ood.uniform_loss(logits),
            "extra": ood.extra_class_loss(logits),
            "odds": ood.id_log_odds(logits),
            "log_msp": ood.max_log_softmax(logits),
            "mean": fitted.mean,
            "mahalanobis": ood.mahalanobis(fitted, queries),
            "nearest": ood.nearest(z, queries, k=3),
            "itself": ood.nearest(z, queries, k=1),
            "odin": ood.odin(lambda x: x @ w, queries, temperature=10.0, step=0.1),
            "plain": ood.max_softmax(queries @ w, 10.0),
            "unmoved": ood.odin(lambda x: x @ w, queries, temperature=10.0, step=0.0),
        }

    got = together(body, z, logits, queries)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(got["msp"], p.max(1))
    np.testing.assert_allclose(got["max_logit"], logits.max(1))
    np.testing.assert_allclose(got["uniform"], -np.log(p).mean())
    np.testing.assert_allclose(got["extra"], -np.log(p[:, 3]).mean())
    np.testing.assert_allclose(got["odds"], np.log((1 - p[:, 3]) / p[:, 3]))
    np.testing.assert_allclose(got["log_msp"], np.log(p.max(1)))
    means = np.stack([z[labels == c].mean(0) for c in range(4)])
    np.testing.assert_allclose(got["mean"], means, atol=1e-12)
    covariance = np.cov((z - means[labels]).T, bias=True)
    covariance += 1e-6 * np.trace(covariance) / 3 * np.eye(3)
    off = queries[:, None] - means
    square = np.einsum("qcd,de,qce->qc", off, np.linalg.inv(covariance), off)
    np.testing.assert_allclose(got["mahalanobis"], -square.min(1), rtol=1e-6)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    ask = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    far = np.sort(np.linalg.norm(ask[:, None] - unit, axis=2), 1)
    np.testing.assert_allclose(got["nearest"], -far[:, 2], atol=1e-7)
    np.testing.assert_allclose(got["itself"][:4], 0, atol=1e-7)
    np.testing.assert_allclose(got["unmoved"], got["plain"])
    # A step towards the likeliest class of a linear model makes it likelier.
    assert (got["odin"] > got["plain"]).all()


def test_bad_features_are_no_scores():
    rng = np.random.default_rng(2)
    z = rng.normal(size=(6, 3)).astype(np.float32)
    bad = z.copy()
    bad[2, 1] = np.inf
    labels = np.arange(6) % 2

    def body(z, bad):
        wide = ood.nearest(z * 1e30, z * 1e25, k=2)
        scores = [ood.nearest(bad, z, k=1), ood.nearest(z, bad, k=1)]
        fitted = [ood.fit_gaussians(z, jnp.asarray(y), 2).mean
                  for y in (labels + 1, -labels)]  # fmt: skip
        return wide, ood.nearest(z, z, k=2), *scores, *fitted

    wide, plain, banks, queries, above, below = together(body, z, bad)
    np.testing.assert_allclose(wide, plain, atol=1e-6)
    assert np.isnan(banks).all() and np.isnan(queries).tolist() == [
        i == 2 for i in range(6)
    ]
    assert np.isnan(above).any() and np.isnan(below).any()


def test_refuses():
    z = jnp.asarray(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"1 \.\. 3.*got 4"):
        ood.nearest(z, z, k=4)
