"""Diffusions: closed forms of marginals and samplers, the chain, what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import diffusion, distance, sde

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
    """The mean's slope is f, the variance's 2 f' v + g^2."""
    found = EVERY[name]()
    at = jnp.array([0.3, 0.5, 0.9]) * found.T - 0.01  # Between a chain's steps.
    one, h = jnp.ones((3, 1)), 1e-5

    def moments(t):
        mean, std = found.marginal(one, t)
        return mean[:, 0], std**2

    (m, v), later, before = moments(at), moments(at + h), moments(at - h)
    slope = found.drift(one, at)[:, 0]
    rate = [(a - b) / (2 * h) for a, b in zip(later, before)]
    np.testing.assert_allclose(rate[0], slope * m, rtol=1e-6, atol=1e-12)
    noise = found.diffusion(at) ** 2
    np.testing.assert_allclose(rate[1], 2 * slope * v + noise, rtol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_transitions_compose(name):
    found = EVERY[name]()
    s, t = jnp.array([0.4]) * found.T, jnp.array([0.7]) * found.T
    mean_s, std_s = found.marginal(jnp.ones((1, 1)), s)
    mean_t, std_t = found.marginal(jnp.ones((1, 1)), t)
    scale, var = found.transition(s, t)
    np.testing.assert_allclose(scale * mean_s[0], mean_t[0], rtol=1e-12)
    np.testing.assert_allclose(scale**2 * std_s**2 + var, std_t**2, rtol=1e-12)
    # Small variances do not drown in the differences of large numbers.
    near = found.transition(t.astype(jnp.float32), t.astype(jnp.float32) + 1e-3)
    exact = found.transition(t, jnp.float64(t.astype(jnp.float32) + 1e-3))
    np.testing.assert_allclose(near[1], exact[1], rtol=1e-3)


def test_known_constants():
    found = sde.vp_sde()
    mean, std = found.marginal(jnp.ones((1, 1)), jnp.ones(1))
    np.testing.assert_allclose(mean[0, 0], np.exp(-0.25 * 20.1), rtol=1e-12)
    np.testing.assert_allclose(std**2, 1 - np.exp(-0.5 * 20.1), rtol=1e-12)
    x, y, t = jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.array([0.5])
    outward = -((x - y) * (found.drift(x, t) - found.drift(y, t))).sum()
    # A linear drift: the constant is attained.
    np.testing.assert_allclose(outward, found.L_f(t)[0] * 2.0)
    assert found.L_f(t) > 0
    assert sde.ve_sde().L_f(t) == 0
    wide = sde.vp_sde(sigma=3.0)
    assert 2.5 < wide.prior_sample(jax.random.key(0), (500,)).std() < 3.5


def test_translates_contract_as_the_scale():
    """W_2 of forward marginals of translates, eq 23."""
    found, t = sde.vp_sde(), jnp.full(2, 0.4)
    (x, y), _ = found.marginal(jnp.array([[0.0, 1.0], [3.0, 5.0]]), t)
    expected = 5.0 * np.exp(-0.5 * (0.1 * 0.4 + 0.5 * 19.9 * 0.4**2))
    np.testing.assert_allclose(jnp.linalg.norm(x - y), expected, rtol=1e-12)


def test_the_law_tends_to_the_prior():
    found = sde.vp_sde()
    t = jnp.linspace(0.0, 1.0, 6)
    mean, std = found.marginal(jnp.full((6, 1), 2.0), t)
    # Data N(2, 1/4): the moments of p_t, and their divergence in closed form.
    var = 0.25 * (mean[:, 0] / 2.0) ** 2 + std**2
    closed = 0.5 * (var + mean[:, 0] ** 2 - 1 - jnp.log(var))
    zero, eye = jnp.zeros(1), jnp.eye(1)
    each = jax.jit(jax.vmap(lambda m, v: distance.gaussian_kl(m, v * eye, zero, eye)))
    kl = each(mean, var)
    np.testing.assert_allclose(kl, closed, atol=1e-12)
    assert (jnp.diff(kl) < 0).all() and kl[-1] < 1e-3


def test_chain_is_hit_at_whole_times():
    betas = diffusion.sigmoid_betas(10)
    found, bars = sde.discrete_vp(betas), diffusion.alpha_bars(betas)
    k = jnp.arange(1.0, 11.0)
    mean, std = found.marginal(jnp.ones((10, 1)), k)
    np.testing.assert_allclose(mean[:, 0], np.sqrt(bars), rtol=1e-12)
    np.testing.assert_allclose(std, np.sqrt(1 - bars), rtol=1e-10)
    scale, var = found.transition(k - 1, k)
    np.testing.assert_allclose(var, betas, rtol=1e-9)
    np.testing.assert_allclose(scale, np.sqrt(1 - betas), rtol=1e-12)


def test_scores_and_noise():
    std = jnp.array([0.5, 2.0])
    eps = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    score = sde.score_from_eps(eps, std)
    np.testing.assert_allclose(score, [[-2.0, -4.0], [-1.5, -2.0]])
    np.testing.assert_allclose(sde.eps_from_score(score, std), eps)


def gaussian_score(found, mean=0.5, var=0.25):
    def score(x, t):
        m, std = found.marginal(jnp.full_like(x, mean), t)
        scale = m[:, 0] / mean
        return -(x - m) / (var * scale**2 + std**2)[:, None]

    return score


def test_ancestral_steps_are_the_chain():
    betas = diffusion.linear_betas(6, 0.01, 0.3)
    found, bars = sde.discrete_vp(betas), diffusion.alpha_bars(betas)
    score, key = gaussian_score(found), jax.random.key(3)
    x = jax.random.normal(jax.random.key(1), (5, 2), jnp.float64)
    walk = functools.partial(sde.reverse_sde_sample, noise_last=False, trajectory=True)
    states = jax.jit(walk, static_argnums=(1, 2, 4, 5))(
        key, score, found, x, 6, "ancestral"
    )
    assert states.shape == (7, 5, 2)
    np.testing.assert_array_equal(states[0], x)
    for k in range(6):
        i = 5 - k
        noise = jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype)
        eps = -np.sqrt(1 - bars[i]) * score(x, jnp.full(5, i + 1.0))
        x = (x - betas[i] / np.sqrt(1 - bars[i]) * eps) / np.sqrt(1 - betas[i])
        x = x + (np.sqrt(betas[i]) * noise if i else 0.0)
        np.testing.assert_allclose(states[k + 1], x, rtol=1e-9)


@pytest.mark.parametrize("method, worst", [("em", 0.08), ("heun", 0.02)])
def test_sampling_reaches_the_data(method, worst):
    """From p_T with the true score, as far as 100 steps and 4,000 draws let it."""
    found = sde.vp_sde(0.1, 10.0)

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, noise_last):
        mean, std = found.marginal(jnp.full((4000, 1), 0.5), jnp.ones(4000))
        spread = jnp.sqrt(mean**2 + std[:, None] ** 2)  # Of data N(1/2, 1/4).
        start = mean + spread * jax.random.normal(key, mean.shape)
        final = sde.reverse_sde_sample(
            key, gaussian_score(found), found, start, 100, method, noise_last=noise_last
        )
        return final.mean(), final.std()

    mean, std = draw(jax.random.key(0), True)
    assert abs(mean - 0.5) < 0.03 and abs(std - 0.5) < worst
    assert draw(jax.random.key(0), False)[1] < std


def test_flow_maps_gaussians_onto_each_other():
    found = sde.vp_sde(0.1, 10.0)
    score = gaussian_score(found)
    x = jnp.array([[-0.5, 0.0], [0.5, 1.5]])
    scale, std = found.marginal(jnp.ones_like(x), jnp.ones(2))
    a = scale[0, 0]
    # The flow of Gaussians with isotropic covariance keeps the standardised place.
    expected = 0.5 * a + (x - 0.5) / 0.5 * jnp.sqrt(0.25 * a**2 + std[0] ** 2)
    follow = functools.partial(sde.probability_flow, score, found, t_min=0.0)
    there = jax.jit(lambda x: follow(x, 60, reverse=False))(x)
    np.testing.assert_allclose(there, expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda x: follow(x, 60))(there), x, atol=1e-6)


def test_reverse_moments_of_the_true_score_are_the_data():
    found = sde.vp_sde(0.1, 10.0)
    cov = jnp.array([[0.5, 0.2], [0.2, 0.3]])
    mean = jnp.array([1.0, -2.0])

    def at(t):
        m, std = found.marginal(mean[None], t[None])
        scale = m[0, 0] / mean[0]
        return m[0], scale**2 * cov + std[0] ** 2 * jnp.eye(2)

    @jax.jit
    def walk():
        end = at(jnp.asarray(1.0))
        return sde.gaussian_reverse_moments(
            found, *end, lambda t: jnp.linalg.inv(at(t)[1]), lambda t: at(t)[0], 200
        )

    found_mean, found_cov = walk()
    np.testing.assert_allclose(found_mean, mean, atol=1e-6)
    np.testing.assert_allclose(found_cov, cov, atol=1e-6)


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
    found = sde.vp_sde()
    options = {"n_steps": 2, **options}
    with pytest.raises(ValueError, match=message):
        sde.reverse_sde_sample(
            jax.random.key(0), gaussian_score(found), found, jnp.ones((1, 2)), **options
        )
