"""Lipschitz constants and score-matching losses: closed forms, what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import diffusion, sde
from jaxpapers.papers import score_wasserstein as sw


def points(count, dim=2):
    return jax.random.normal(jax.random.key(0), (count, dim)) * 0.5


# Lipschitz constants


def linear_score(matrix):
    """-(A + t I) x, whose constant is -lambda_min of the symmetric part, less t."""
    return lambda x, t: -(x @ matrix.T + t[:, None] * x)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_constants_of_a_linear_score(dim):
    with jax.enable_x64():
        A = jax.random.normal(jax.random.key(dim), (dim, dim), jnp.float64)
        t = jnp.array([0.0, 0.5])
        values, vectors = jnp.linalg.eigh((A + A.T) / 2)
        exact = -values[0] - t
        points = jax.random.normal(jax.random.key(0), (7, dim), jnp.float64)
        score = linear_score(A)
        for mode, tol in (("jacobian", 1e-12), ("power", 1e-5)):
            found = sw.one_sided_lipschitz(
                score, points, t, mode, chunk=3, iterations=800
            )
            np.testing.assert_allclose(found.value, exact, atol=tol)
        # Pairs are at most that, and equal once they show the extreme direction.
        seen = sw.one_sided_lipschitz(score, points, t, "pairs", chunk=3).value
        assert (seen <= exact + 1e-9).all()
        more = jnp.concatenate([points, points[:1] + vectors[:, :1].T])
        seen = sw.one_sided_lipschitz(score, more, t, "pairs").value
        np.testing.assert_allclose(seen, exact, atol=1e-9)


# Losses


def gaussian_case(var=0.25):
    """The true score of N(0, var I) under a diffusion, and a wrong one."""
    found = sde.vp_sde(0.1, 10.0)

    def score(x, t, v=var):
        scale, noise = found.transition(jnp.zeros_like(t), t)
        return -x / (v * scale**2 + noise)[:, None]

    return found, score


def test_denoising_loss_exceeds_the_true_one_by_a_constant():
    """J_DSM - J_SM = 1/2 int g^2 (E |grad log p_0t|^2 - E |grad log p_t|^2) dt."""
    var, low, d = 0.25, 0.05, 2
    found, score = gaussian_case(var)
    t = jnp.linspace(low, 1.0, 400)
    scale, noise = found.transition(jnp.zeros_like(t), t)
    g2, total = found.diffusion(t) ** 2, var * scale**2 + noise
    constant = 0.5 * jnp.trapezoid(g2 * (d / noise - d / total), t)

    def wrong(x, t):
        return score(x, t, 0.6)

    other = 0.6 * scale**2 + noise
    exact_sm = 0.5 * jnp.trapezoid(g2 * d * total * (1 / total - 1 / other) ** 2, t)

    @jax.jit
    def estimates(key):
        key_x, key_t, key = jax.random.split(key, 3)
        x = jnp.sqrt(total)[:, None, None] * jax.random.normal(key_x, (400, 200, d))
        x0 = jnp.sqrt(var) * jax.random.normal(key_t, (40_000, d))
        dsm = [
            sw.dsm_loss({}, lambda p, x, t: wrong(x, t), found, x0, key, "g2", name,
                        t_min=low)[0]
            for name in ("uniform", "antithetic", "importance")
        ]  # fmt: skip
        return sw.sm_loss(wrong, score, found, x, t), dsm

    sm, dsm = estimates(jax.random.key(0))
    np.testing.assert_allclose(sm, exact_sm, rtol=0.02)
    np.testing.assert_allclose(dsm, exact_sm + constant, rtol=0.03)


def test_weights_of_the_denoising_loss():
    found, score = gaussian_case()
    x0, key = points(64), jax.random.key(0)

    def loss(**options):
        return sw.dsm_loss({}, lambda p, x, t: score(x, t), found, x0, key, **options)

    plain, aux = loss()
    assert aux["t"].shape == aux["per_t"].shape == (64,)
    # I = 2 everywhere: four times the loss. A function is taken as it is.
    double, _ = loss(weight="I2", log_factor=lambda t: jnp.full_like(t, jnp.log(2.0)))
    np.testing.assert_allclose(double, 4 * plain, rtol=1e-5)
    same, _ = loss(weight=lambda t: found.diffusion(t) ** 2)
    np.testing.assert_allclose(same, plain, rtol=1e-5)
    _, aux = loss(t_sampler="antithetic", t_min=0.1)
    np.testing.assert_allclose(aux["t"][:31] + aux["t"][33:], 1.1, rtol=1e-5)


def test_antithetic_steps():
    for count in (7, 8):
        step = sw.antithetic_steps(jax.random.key(0), count, 10)
        half = count // 2 + 1
        assert step.shape == (count,) and 0 <= step.min() <= step.max() < 10
        np.testing.assert_array_equal(step[half:], 9 - step[: count - half])


def test_chain_weights():
    betas = diffusion.linear_betas(3, 0.1, 0.3)
    bars, log_I = diffusion.alpha_bars(betas), jnp.array([0.0, 1.0, 200.0])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(sw.discrete_weights("g2", betas, bars), betas)
    plain = sw.discrete_weights("simple", betas, bars)
    close(plain / plain[0], (1 - bars) / (1 - bars[0]))
    for name, power in (("g2I", 1), ("I2", 2)):
        found = sw.discrete_weights(name, betas, bars, log_I)
        assert np.isfinite(found).all()
        close(found.sum(), betas.sum())
        close(found, [0.0, 0.0, betas.sum()], atol=1e-20)
        mild = sw.discrete_weights(name, betas, bars, log_I / 200)
        close(mild[2] / mild[0], betas[2] / betas[0] * np.exp(power))


def test_functions_refuse():
    found, score = gaussian_case()
    x = points(16)

    def apply(params, x, t):
        return score(x, t)

    for options, message in (
        ({"t_sampler": "sobol"}, "t_sampler"),
        ({"t_min": 0.0}, "t_min"),
        ({"weight": "I2"}, "log_factor"),
    ):
        with pytest.raises(ValueError, match=message):
            sw.dsm_loss({}, apply, found, x, jax.random.key(0), **options)
    with pytest.raises(ValueError, match="two times"):
        sw.sm_loss(score, score, found, x[None], jnp.ones(1))
    with pytest.raises(ValueError, match="needs 2 points"):
        sw.one_sided_lipschitz(score, x[:1], jnp.ones(1), "pairs")
    with pytest.raises(ValueError, match="mode must be one of"):
        sw.one_sided_lipschitz(score, x, jnp.ones(1), "hessian")
    with pytest.raises(ValueError, match="log_I"):
        sw.discrete_weights("I2", [0.1], [0.9])
    with pytest.raises(ValueError, match="layers"):
        sw.one_sided_lipschitz_upper([], jnp.ones(1))
