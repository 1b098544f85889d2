"""Lipschitz constants and score-matching losses: closed forms, what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import diffusion, sde
from jaxpapers.papers import score_wasserstein as sw
from tests.programs import together


def points(count, dim=2):
    return np.random.default_rng(0).normal(size=(count, dim)).astype(np.float32) * 0.5


# Lipschitz constants


@pytest.mark.matrix
@pytest.mark.parametrize(
    "dim", [2, pytest.param(1, marks=pytest.mark.matrix),
            pytest.param(5, marks=pytest.mark.matrix)],
)  # fmt: skip
def test_constants_of_a_linear_score(dim):
    """-(A + t I) x has the constant -lambda_min of A's symmetric part, less t."""
    rng = np.random.default_rng(dim)
    A, x = rng.normal(size=(dim, dim)), rng.normal(size=(7, dim))
    t = np.array([0.0, 0.5])
    values, vectors = np.linalg.eigh((A + A.T) / 2)
    exact = -values[0] - t

    def program(A, x, more, t):
        def score(x, t):
            return -(x @ A.T + t[:, None] * x)

        constant = functools.partial(sw.one_sided_lipschitz, score)
        return {
            "jacobian": constant(x, t, "jacobian", chunk=3).value,
            "power": constant(x, t, "power", chunk=3, iterations=400).value,
            "pairs": constant(more, t, "pairs", chunk=3).value,
        }

    more = np.concatenate([x, x[:1] + vectors[:, :1].T])
    with jax.enable_x64():
        constants = together(program, A, x, more, t)
    np.testing.assert_allclose(constants["jacobian"], exact, atol=1e-12)
    np.testing.assert_allclose(constants["power"], exact, atol=1e-5)
    # Pairs are at most that; one of these lies along the extreme direction.
    np.testing.assert_allclose(constants["pairs"], exact, atol=1e-9)


# Losses


def gaussian_case(var=0.25):
    """A diffusion, and the true score of N(0, var I) under it."""
    process = sde.vp_sde(0.1, 10.0)

    def score(x, t, v=var):
        scale, noise = process.transition(jnp.zeros_like(t), t)
        return -x / (v * scale**2 + noise)[:, None]

    return process, score


@pytest.mark.matrix
def test_denoising_loss_exceeds_the_true_one_by_a_constant():
    """J_DSM - J_SM = 1/2 int g^2 (E |grad log p_0t|^2 - E |grad log p_t|^2) dt."""
    var, low, d = 0.25, 0.05, 2
    process, score = gaussian_case(var)

    def wrong(x, t):
        return score(x, t, 0.6)

    def program(t):
        scale, noise = process.transition(jnp.zeros_like(t), t)
        g2, total = process.diffusion(t) ** 2, var * scale**2 + noise
        constant = 0.5 * jnp.trapezoid(g2 * (d / noise - d / total), t)
        other = 0.6 * scale**2 + noise
        error = d * total * (1 / total - 1 / other) ** 2
        exact = 0.5 * jnp.trapezoid(g2 * error, t)
        key_x, key_t, key = jax.random.split(jax.random.key(0), 3)
        x = jnp.sqrt(total)[:, None, None] * jax.random.normal(key_x, (400, 100, d))
        x0 = jnp.sqrt(var) * jax.random.normal(key_t, (20_000, d))
        # Drawing from the importance density costs a thousand numbers a sample.
        dsm = [
            sw.dsm_loss({}, lambda p, x, t: wrong(x, t), process, x0[:count], key,
                        "g2", name, t_min=low)[0]
            for name, count in (
                ("uniform", 20_000), ("antithetic", 20_000), ("importance", 4000)
            )
        ]  # fmt: skip
        return exact, constant, sw.sm_loss(wrong, score, process, x, t), dsm

    t = np.linspace(low, 1.0, 400, dtype=np.float32)
    exact, constant, sm, dsm = together(program, t)
    np.testing.assert_allclose(sm, exact, rtol=0.02)
    np.testing.assert_allclose(dsm, exact + constant, rtol=0.03)


def test_weights_of_the_denoising_loss():
    process, score = gaussian_case()

    def program(x0):
        def loss(**options):
            return sw.dsm_loss(
                {}, lambda p, x, t: score(x, t), process, x0, jax.random.key(0),
                **options,
            )  # fmt: skip

        return {
            "g2": loss(),
            "I = 2": loss(
                weight="I2", log_factor=lambda t: jnp.full_like(t, np.log(2.0))
            ),
            "function": loss(weight=lambda t: process.diffusion(t) ** 2),
            "antithetic": loss(t_sampler="antithetic", t_min=0.1),
        }

    losses = together(program, points(64))
    value, aux = losses["g2"]
    assert aux["t"].shape == aux["per_t"].shape == (64,)
    np.testing.assert_allclose(losses["I = 2"][0], 4 * value, rtol=1e-5)
    np.testing.assert_allclose(losses["function"][0], value, rtol=1e-5)
    t = losses["antithetic"][1]["t"]
    np.testing.assert_allclose(t[:31] + t[33:], 1.1, rtol=1e-5)


def test_antithetic_steps():
    steps = together(
        lambda: [sw.antithetic_steps(jax.random.key(0), n, 10) for n in (7, 8)]
    )
    for count, step in zip((7, 8), steps):
        half = count // 2 + 1
        assert step.shape == (count,) and 0 <= step.min() <= step.max() < 10
        np.testing.assert_array_equal(step[half:], 9 - step[: count - half])


def test_discrete_weights():
    betas = diffusion.linear_betas(3, 0.1, 0.3)
    bars, log_I = diffusion.alpha_bars(betas), np.float32([0.0, 1.0, 200.0])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    weights = together(
        lambda log_I: {
            (name, scale): sw.discrete_weights(name, betas, bars, log_I / scale)
            for name in ("g2", "simple", "g2I", "I2")
            for scale in (1, 200)
        },
        log_I,
    )
    close(weights["g2", 1], betas)
    unweighted = weights["simple", 1]
    close(unweighted / unweighted[0], (1 - bars) / (1 - bars[0]))
    for name, power in (("g2I", 1), ("I2", 2)):
        large, mild = weights[name, 1], weights[name, 200]
        assert np.isfinite(large).all()
        close(large.sum(), betas.sum())
        close(large, [0.0, 0.0, betas.sum()], atol=1e-20)
        close(mild[2] / mild[0], betas[2] / betas[0] * np.exp(power))


def test_a_constant_of_nan_is_nan():
    """A pair with a point that is not finite counts."""

    def constant(x):
        lipschitz = sw.one_sided_lipschitz(lambda x, t: -x, x, jnp.ones(1), "pairs")
        return lipschitz.value

    x = points(16)
    x[3, 0] = np.nan
    assert np.isnan(together(constant, x))


def test_functions_refuse():
    process, score = gaussian_case()
    x, one = jnp.asarray(points(16)), jnp.ones(1)

    def apply(params, x, t):
        return score(x, t)

    for options, message in (
        ({"t_sampler": "sobol"}, "t_sampler"),
        ({"t_min": 0.0}, "t_min"),
        ({"weight": "I2"}, "log_factor"),
    ):
        with pytest.raises(ValueError, match=message):
            sw.dsm_loss({}, apply, process, x, jax.random.key(0), **options)
    with pytest.raises(ValueError, match="two times"):
        sw.sm_loss(score, score, process, x[None], one)
    with pytest.raises(ValueError, match="needs 2 points"):
        sw.one_sided_lipschitz(score, x[:1], one, "pairs")
    with pytest.raises(ValueError, match="mode must be one of"):
        sw.one_sided_lipschitz(score, x, one, "hessian")
    with pytest.raises(ValueError, match="log_I"):
        sw.discrete_weights("I2", [0.1], [0.9])
    with pytest.raises(ValueError, match="layers"):
        sw.one_sided_lipschitz_upper([], one)
