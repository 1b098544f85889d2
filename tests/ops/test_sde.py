"""Diffusions: closed forms of marginals and samplers, the chain, what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import diffusion, distance, sde
from tests.programs import KEY, together

EVERY = {
    "vp": lambda: sde.vp_sde(0.1, 20.0, 1.0, sigma=1.3),
    "ve": lambda: sde.ve_sde(0.05, 3.0, 2.0),
    "subvp": lambda: sde.subvp_sde(0.1, 20.0, 1.0),
    "chain": lambda: sde.discrete_vp(diffusion.linear_betas(8, 0.01, 0.3)),
}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64():
        yield


@pytest.mark.parametrize("name", EVERY)
def test_moments_solve_their_equations(name):
    """The mean's slope is f, the variance's 2 f' v + g^2; transitions compose."""
    process, h = EVERY[name](), 1e-5

    def f(at, times, s, t):
        mean, std = process.marginal(jnp.ones((len(times), 1)), times)
        one, single = jnp.ones((3, 1)), t.astype(jnp.float32)
        slope, noise = process.drift(one, at)[:, 0], process.diffusion(at) ** 2
        scale, var = process.transition(
            jnp.append(s, t), jnp.append(t, (single + 1e-3).astype(jnp.float64))
        )
        near = process.transition(single, single + 1e-3)
        return mean[:, 0], std**2, slope, noise, scale[:3], var, near[1]

    at = np.array([0.3, 0.5, 0.9]) * process.T - 0.01  # Between a chain's steps.
    s, t = (np.full(3, share * process.T) for share in (0.4, 0.7))
    times = np.concatenate([at, at + h, at - h, s, t])
    *moments, slope, noise, scale, var, near = together(f, at, times, s, t)
    m, later, before, m_s, m_t = np.split(moments[0], 5)
    v, v_later, v_before, v_s, v_t = np.split(moments[1], 5)
    var, exact = np.split(var, 2)
    rate = [(later - before) / (2 * h), (v_later - v_before) / (2 * h)]
    np.testing.assert_allclose(rate[0], slope * m, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(rate[1], 2 * slope * v + noise, rtol=1e-6)
    np.testing.assert_allclose(scale * m_s, m_t, rtol=1e-12)
    np.testing.assert_allclose(scale**2 * v_s + var, v_t, rtol=1e-12)
    # Small variances do not drown in the differences of large numbers.
    np.testing.assert_allclose(near, exact, rtol=1e-3)


def test_known_constants(key):
    process = sde.vp_sde()

    def f(key):
        x, y, t = jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.array([0.5])
        outward = -((x - y) * (process.drift(x, t) - process.drift(y, t))).sum()
        moments = process.marginal(jnp.ones((1, 1)), jnp.ones(1))
        drawn = sde.vp_sde(sigma=3.0).prior_sample(key, (500,))
        return outward, process.L_f(t), sde.ve_sde().L_f(t), moments, drawn.std()

    outward, constant, none, (mean, std), wide = together(f, key)
    np.testing.assert_allclose(mean[0, 0], np.exp(-0.25 * 20.1), rtol=1e-12)
    np.testing.assert_allclose(std**2, 1 - np.exp(-0.5 * 20.1), rtol=1e-12)
    # A linear drift: the constant is attained.
    np.testing.assert_allclose(outward, constant[0] * 2.0)
    assert constant > 0 and none == 0
    assert 2.5 < wide < 3.5


def test_translates_contract_as_the_scale():
    """W_2 of forward marginals of translates, eq 23."""
    points = np.array([[0.0, 1.0], [3.0, 5.0]])
    (x, y), _ = together(sde.vp_sde().marginal, points, np.full(2, 0.4))
    expected = 5.0 * np.exp(-0.5 * (0.1 * 0.4 + 0.5 * 19.9 * 0.4**2))
    np.testing.assert_allclose(np.linalg.norm(x - y), expected, rtol=1e-12)


def test_the_law_tends_to_the_prior():
    def f(t):
        mean, std = sde.vp_sde().marginal(jnp.full((6, 1), 2.0), t)
        # Data N(2, 1/4): the moments of p_t, and their divergence in closed form.
        var = 0.25 * (mean[:, 0] / 2.0) ** 2 + std**2
        closed = 0.5 * (var + mean[:, 0] ** 2 - 1 - jnp.log(var))
        zero, eye = jnp.zeros(1), jnp.eye(1)
        each = jax.vmap(lambda m, v: distance.gaussian_kl(m, v * eye, zero, eye))
        return each(mean, var), closed

    kl, closed = together(f, np.linspace(0.0, 1.0, 6))
    np.testing.assert_allclose(kl, closed, atol=1e-12)
    assert (np.diff(kl) < 0).all() and kl[-1] < 1e-3


def test_chain_is_hit_at_whole_times():
    betas = diffusion.sigmoid_betas(10)
    process, bars = sde.discrete_vp(betas), diffusion.alpha_bars(betas)

    def f(k):
        return process.marginal(jnp.ones((10, 1)), k), process.transition(k - 1, k)

    (mean, std), (scale, var) = together(f, np.arange(1.0, 11.0))
    np.testing.assert_allclose(mean[:, 0], np.sqrt(bars), rtol=1e-12)
    np.testing.assert_allclose(std, np.sqrt(1 - bars), rtol=1e-10)
    np.testing.assert_allclose(var, betas, rtol=1e-9)
    np.testing.assert_allclose(scale, np.sqrt(1 - betas), rtol=1e-12)


def test_scores_and_noise():
    std, eps = np.array([0.5, 2.0]), np.array([[1.0, 2.0], [3.0, 4.0]])

    def f(eps, std):
        score = sde.score_from_eps(eps, std)
        return score, sde.eps_from_score(score, std)

    score, again = together(f, eps, std)
    np.testing.assert_allclose(score, [[-2.0, -4.0], [-1.5, -2.0]])
    np.testing.assert_allclose(again, eps)


def gaussian_score(process, mean=0.5, var=0.25):
    def score(x, t):
        m, std = process.marginal(jnp.full_like(x, mean), t)
        scale = m[:, 0] / mean
        return -(x - m) / (var * scale**2 + std**2)[:, None]

    return score


@pytest.mark.matrix
def test_ancestral_steps_are_the_chain(key):
    betas = diffusion.linear_betas(6, 0.01, 0.3)
    process, bars = sde.discrete_vp(betas), diffusion.alpha_bars(betas)
    x = np.random.default_rng(1).normal(size=(5, 2))

    def f(key, x):
        states = sde.reverse_sde_sample(
            key, gaussian_score(process), process, x, 6, "ancestral", noise_last=False,
            trajectory=True,
        )  # fmt: skip
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(6))
        return states, jax.vmap(lambda k: jax.random.normal(k, x.shape, x.dtype))(keys)

    states, noise = together(f, key, x)
    assert states.shape == (7, 5, 2)
    np.testing.assert_array_equal(states[0], x)
    for k in range(6):
        i = 5 - k
        # The score of data N(1/2, 1/4), as noise.
        eps = np.sqrt(1 - bars[i]) * (x - 0.5 * np.sqrt(bars[i])) / (1 - 0.75 * bars[i])
        x = (x - betas[i] / np.sqrt(1 - bars[i]) * eps) / np.sqrt(1 - betas[i])
        x = x + (np.sqrt(betas[i]) * noise[k] if i else 0.0)
        np.testing.assert_allclose(states[k + 1], x, rtol=1e-9)


@pytest.mark.parametrize(
    "method, worst",
    [("heun", 0.02), pytest.param("em", 0.08, marks=pytest.mark.matrix)],
)
def test_sampling_reaches_the_data(key, method, worst):
    """From p_T with the true score, as far as 100 steps and 4,000 draws let it."""
    process = sde.vp_sde(0.1, 10.0)

    def draw(key):
        mean, std = process.marginal(jnp.full((4000, 1), 0.5), jnp.ones(4000))
        spread = jnp.sqrt(mean**2 + std[:, None] ** 2)  # Of data N(1/2, 1/4).
        start = mean + spread * jax.random.normal(key, mean.shape)
        walk = functools.partial(
            sde.reverse_sde_sample, key, gaussian_score(process), process, start, 100,
            method,
        )  # fmt: skip
        last = walk(noise_last=False).std() if method == "em" else None
        noisy = walk()
        return noisy.mean(), noisy.std(), last

    mean, std, without = together(draw, key)
    assert abs(mean - 0.5) < 0.03 and abs(std - 0.5) < worst
    assert without is None or without < std


def test_flow_maps_gaussians_onto_each_other():
    process = sde.vp_sde(0.1, 10.0)

    def f(x):
        follow = functools.partial(
            sde.probability_flow, gaussian_score(process), process, t_min=0.0
        )
        there = follow(x, 60, reverse=False)
        marginal = process.marginal(jnp.ones_like(x), jnp.ones(2))
        return there, follow(there, 60), marginal

    x = np.array([[-0.5, 0.0], [0.5, 1.5]])
    there, back, (scale, std) = together(f, x)
    a = scale[0, 0]
    # The flow of Gaussians with isotropic covariance keeps the standardised place.
    expected = 0.5 * a + (x - 0.5) / 0.5 * np.sqrt(0.25 * a**2 + std[0] ** 2)
    np.testing.assert_allclose(there, expected, atol=1e-6)
    np.testing.assert_allclose(back, x, atol=1e-6)


def test_reverse_moments_of_the_true_score_are_the_data():
    process = sde.vp_sde(0.1, 10.0)
    cov = np.array([[0.5, 0.2], [0.2, 0.3]])
    mean = np.array([1.0, -2.0])

    def at(t):
        m, std = process.marginal(jnp.asarray(mean[None]), t[None])
        scale = m[0, 0] / mean[0]
        return m[0], scale**2 * cov + std[0] ** 2 * jnp.eye(2)

    def walk():
        end = at(jnp.asarray(1.0))
        return sde.gaussian_reverse_moments(
            process, *end, lambda t: jnp.linalg.inv(at(t)[1]), lambda t: at(t)[0], 200
        )

    for value, expected in zip(together(walk), (mean, cov)):
        np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda: sde.vp_sde(T=0.0), "positive"),
        (lambda: sde.vp_sde(-0.1), "beta_min"),
        (lambda: sde.vp_sde(3.0, 2.0), "beta_max"),
        (lambda: sde.ve_sde(2.0, 1.0), "sig_max"),
        (lambda: sde.subvp_sde(T=float("nan")), "T"),
        (lambda: sde.discrete_vp([0.1, 1.0]), r"\(0, 1\)"),
        (lambda: sde.discrete_vp([0.1], sigma=0.0), "sigma"),
    ],
)
def test_refuses_wrong_diffusions(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "midpoint"}, "method must be one of"),
        ({"n_steps": 0}, "n_steps"),
        ({"t_min": 1.0}, "t_min"),
    ],
)
def test_refuses_wrong_sampling(options, message):
    process = sde.vp_sde()
    options = {"n_steps": 2, **options}

    def sample(key, x):
        sde.reverse_sde_sample(key, gaussian_score(process), process, x, **options)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(sample, KEY, np.ones((1, 2)))
