"""The bound: equality cases, Gaussian pairs, recorded numbers, what it refuses."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import distance, sde
from jaxpapers.papers import score_wasserstein as sw
from jaxpapers.papers.score_wasserstein.lipschitz import largest_eigenvalue
from tests.programs import together

VP = sde.vp_sde(0.1, 19.9 + 0.1, 1.0)
with jax.enable_x64():
    ONE, TIMES = jnp.ones(3), jnp.array([0.0, 1.0, 2.0])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64():
        yield


def scale_and_var(t):
    """Of x_t given x_0."""
    scale, var = VP.transition(jnp.zeros_like(t), t)
    return scale, var


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def gaussians(m0, v0, mh, vh, prior, points=100_001, steps=2000, dim=1):
    """W_2 in closed form and the bounds, for N(m0, v0) and the score of N(mh, vh).

    Of ``dim`` independent coordinates, all alike.
    """

    def model(t):
        a, var = scale_and_var(t)
        return 1 / (vh * a**2 + var), mh * a

    t = jnp.linspace(0.0, 1.0, points)
    a, var = scale_and_var(t)
    A, c = model(t)
    P, m = 1 / (v0 * a**2 + var), m0 * a
    # Of -P (x - m) + A (x - c) for x ~ N(m, 1 / P).
    b = dim * ((A - P) ** 2 / P + A**2 * (m - c) ** 2)
    g2 = VP.diffusion(t) ** 2
    factor = sw.integrating_factor(VP.L_f(t), -A, g2, t)
    start = jnp.where(prior, 0.0, m[-1]), jnp.where(prior, 1.0, 1 / P[-1])
    offset = jnp.hypot(m[-1] - start[0], jnp.sqrt(1 / P[-1]) - jnp.sqrt(start[1]))
    offset = dim**0.5 * offset
    one, eye = jnp.ones(dim), jnp.eye(dim)
    J = 0.5 * jnp.trapezoid(g2 * b, t)
    end_mean, end_cov = sde.gaussian_reverse_moments(
        VP, start[0] * one, start[1] * eye,
        lambda t: model(t)[0] * eye, lambda t: model(t)[1] * one, steps,
    )  # fmt: skip
    w2 = jnp.linalg.norm(
        jnp.append(end_mean - m0, jnp.sqrt(jnp.diag(end_cov)) - jnp.sqrt(v0))
    )
    return {
        "w2": w2,
        "theorem1": sw.w2_bound_theorem1(g2, factor.log, b, t, offset).total,
        "corollary1": sw.w2_bound_cor1(g2, factor.log, J, t, offset).total,
        "J": J,
        "I": factor.value[-1],
        # The drift's constant with the wrong sign.
        "wrong": sw.w2_bound_theorem1(
            g2, sw.integrating_factor(-VP.L_f(t), -A, g2, t).log, b, t, offset
        ).total,
    }


# m0, v0, mh, vh, from the prior; W_2, Theorem 1, Corollary 1, J, I(T).
TABLE = [
    (1, .25, 1.2, .25, False, 0.199997841, 0.199997841, 0.199997841, 0.079999136,
     1.64295e-3),
    (0, 1, .3, 1, False, 0.299987044, 0.299987044, 0.299987044, 0.044998057, 6.571586e-3),
    (1, .25, 1.2, .25, True, 0.199987044, 0.200008637, 0.200008637, 0.079999136,
     1.64295e-3),
    (1, .25, 1, .16, False, 0.1, 0.130321501, 0.136359580, 0.058106449, 1.051492e-3),
    (1, .25, 1, .36, False, 0.1, 0.135727001, 0.145846461, 0.029543779, 2.365837e-3),
    (.5, .25, .5, .25, True, 5.398e-6, 5.398e-6, 5.398e-6, 0, 1.64295e-3),
]  # fmt: skip
EQUAL = (0, 1, 5)


@pytest.mark.parametrize("row", range(len(TABLE)))
def test_table(row):
    *case, prior, w2, theorem1, corollary1, J, I = TABLE[row]
    values = gaussians(*(np.float64(v) for v in case), prior)
    expected = {
        "w2": w2, "theorem1": theorem1, "corollary1": corollary1, "J": J, "I": I,
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6, atol=1e-7)
    if row in EQUAL:
        for name in ("theorem1", "corollary1"):
            np.testing.assert_allclose(values[name], values["w2"], rtol=0, atol=1e-7)
    else:
        assert values["w2"] + 1e-5 < values["theorem1"] <= values["corollary1"] + 1e-7
    assert values["corollary1"] >= values["theorem1"] - 1e-12


@pytest.mark.matrix
@pytest.mark.parametrize("row", [0, 2, 3])
def test_distance_and_bounds_grow_with_the_root_of_the_dimension(row):
    *case, prior, _, _, _, _, _ = TABLE[row]
    case = [np.float64(v) for v in case]
    one, three = (gaussians(*case, prior, 20_001, 2000, dim) for dim in (1, 3))
    for name in ("w2", "theorem1", "corollary1"):
        np.testing.assert_allclose(three[name], 3**0.5 * one[name], rtol=1e-9)
    np.testing.assert_allclose(three["J"], 3 * one["J"], rtol=1e-12)
    np.testing.assert_array_equal(three["I"], one["I"])


@pytest.mark.parametrize("row", [0, 1])
def test_the_wrong_sign_of_the_drift_breaks_the_bound(row):
    values = gaussians(*(np.float64(v) for v in TABLE[row][:4]), False)
    assert values["wrong"] < 0.9 * values["w2"]


class Pair(NamedTuple):
    """Gaussians p_0 and q_T and an affine score; ellipses as axes and squared radii."""

    means: np.ndarray  # Of p_0, of the score at both ends, of q_T.
    axes: np.ndarray
    radii: np.ndarray


def random_pairs(count):
    """Draws of ``Pair``, stacked."""
    rng = np.random.default_rng(0)
    return Pair(
        rng.normal(size=(count, 4, 2)) * np.array([1, 1, 1, 0.1])[:, None],
        np.linalg.qr(rng.normal(size=(count, 5, 2, 2)))[0],
        0.05 + rng.exponential(size=(count, 5, 2)),
    )


def bounds_of_a_pair(pair):
    def matrix(i, values):
        return (pair.axes[i] * values[None]) @ pair.axes[i].T

    (m0, c0, c1, start), radii = pair.means, pair.radii
    near, first, last = (functools.partial(matrix, i) for i in (1, 2, 3))

    def law(t, power=1):
        a, var = scale_and_var(t)
        return a * m0, matrix(0, (a**2 * radii[0] + var) ** power)

    def A(t):
        """Positive definite."""
        a, var = scale_and_var(t)
        noised = near(1 / (a**2 * radii[1] + var))
        return noised + 0.3 * t * first(radii[2]) + 0.2 * (1 - t) * last(radii[3])

    def c(t):
        return c0 * (1 - t) + c1 * t * 0.1

    data, prior = (m0, matrix(0, radii[0])), (start, matrix(4, radii[4]))
    t = jnp.linspace(0.0, 1.0, 501)
    (m, v), At, ct = jax.vmap(law)(t), jax.vmap(A)(t), jax.vmap(c)(t)
    differ = At - jax.vmap(lambda t: law(t, -1)[1])(t)
    b = jnp.einsum("tij,tjk,tik->t", differ, v, differ) + jnp.square(
        jnp.einsum("tij,tj->ti", At, m - ct)
    ).sum(1)
    g2 = VP.diffusion(t) ** 2
    L_s = jax.vmap(largest_eigenvalue)(-At)
    log_I = sw.integrating_factor(VP.L_f(t), L_s, g2, t).log
    end = sde.gaussian_reverse_moments(VP, *prior, A, c, 200)
    offset = distance.gaussian_w2(m[-1], v[-1], *prior)
    lam = g2 * jnp.exp(log_I)
    J, J_lam = (0.5 * jnp.trapezoid(w * b, t) for w in (g2, lam))
    return (
        distance.gaussian_w2(*data, *end),
        sw.w2_bound_theorem1(g2, log_I, b, t, offset).total,
        sw.w2_bound_cor1(g2, log_I, J, t, offset).total,
        sw.w2_bound_general(g2, log_I, lam, J_lam, t, offset).total,
    )


def test_bounds_of_200_random_pairs():
    w2, theorem1, corollary1, general = together(
        jax.vmap(bounds_of_a_pair), random_pairs(200)
    )
    assert np.isfinite(w2).all() and (w2 > 0.01).all()
    assert (w2 <= theorem1 * (1 + 1e-4)).all()
    assert (theorem1 <= corollary1 * (1 + 1e-12)).all()
    assert (theorem1 <= general * (1 + 1e-12)).all()
    # Of some use: not all of it is slack.
    assert (w2 > 0.3 * theorem1).any()


def test_every_weight_has_its_own_theorem():
    g2, log_I = np.array([1.0, 2.0, 0.5]), np.array([0.0, -0.3, 0.2])
    b, lam = np.array([0.3, 0.1, 0.7]), np.array([0.5, 3.0, 1.0])

    def program(g2, log_I, b, lam):
        J_lam, J = (0.5 * jnp.trapezoid(w * b, TIMES) for w in (lam, g2))
        return (
            J_lam,
            sw.w2_bound_general(g2, log_I, lam, J_lam, TIMES, 0.5),
            sw.w2_bound_general(g2, log_I, g2, J, TIMES),
            sw.w2_bound_cor1(g2, log_I, J, TIMES),
        )

    J_lam, bound, *same = together(program, g2, log_I, b, lam)
    constant = 2 * np.trapezoid(g2**2 * np.exp(2 * log_I) / lam, np.arange(3.0))
    np.testing.assert_allclose(bound.first_term, np.sqrt(constant * J_lam), rtol=1e-12)
    np.testing.assert_allclose(bound.log_intercept, 0.5 * np.log(constant), rtol=1e-12)
    np.testing.assert_allclose(bound.offset_term, 0.5 * np.exp(0.2), rtol=1e-12)
    np.testing.assert_allclose(bound.total, bound.first_term + bound.offset_term)
    # lambda = g^2 is Corollary 1.
    np.testing.assert_allclose(same[0].total, same[1].total, rtol=1e-14)


def test_offset_of_the_prior():
    """Corollary 2 is at least I(T) W_2(p_T, q_T), and equal for a translate."""

    def program(t):
        g2, L_s = VP.diffusion(t) ** 2, -jnp.ones_like(t)
        factor = sw.integrating_factor(VP.L_f(t), L_s, g2, t)
        scale = scale_and_var(t[-1:])[0][0]
        return sw.w2_offset_vp(L_s, g2, t, 0.7), factor.value[-1] * scale * 0.7

    offset, expected = together(program, np.linspace(0.0, 1.0, 20_001))
    np.testing.assert_allclose(offset, expected, rtol=1e-6)


@pytest.mark.parity("diffusion", only=lambda entry: "log_intercept" in entry["arrays"])
def test_recorded_bound(case):
    z, rtol = case.arrays, case.tolerance("float32", otherwise=2e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=rtol)
    bars, steps = z["alphas_bar"], np.arange(len(z["score"]), dtype=np.float32)

    def program(score, grid, betas, L_s, eps, noise):
        seen = sw.one_sided_lipschitz(
            lambda x, t: score[t[0].astype(int)], grid, jnp.asarray(steps), "pairs"
        )
        factor = sw.integrating_factor(0.5 * betas, L_s, betas, None)
        terms = [
            sw.discrete_terms(eps, noise, betas, jnp.asarray(bars), coord_mean=mean)
            for mean in (True, False)
        ]
        bound = sw.w2_bound_cor1(betas, factor.log, 1.0, None)
        return seen, factor.value**2, bound.log_intercept, terms

    names = ("score", "grid", "betas", "L_s", "eps", "noise")
    with jax.enable_x64(False):
        seen, I2, intercept, terms = together(program, *(z[n] for n in names))
    close(seen.value, z["L_s"])
    assert seen.side == "lower"
    close(I2, z["I2"])
    close(intercept, z["log_intercept"])
    # 1 - alpha_bar has lost 4 digits at the first steps, here as there.
    close(terms[0], z["dsm_terms"])
    close(terms[1], z["noise"].shape[1] * terms[0])


def test_overflow_is_infinite_and_flagged():
    def program(b):
        steep = sw.integrating_factor(ONE, 100 * ONE, ONE, TIMES)
        theorem1 = functools.partial(sw.w2_bound_theorem1, ONE)
        return {
            "factor": steep,
            "bound": theorem1(steep.log, ONE, TIMES, 1.0),
            "no loss": theorem1(steep.log, 0 * ONE, TIMES),
            "grad": jax.grad(lambda b: theorem1(0 * ONE, b, TIMES).total)(b),
        }

    values = together(program, np.array([0.0, 1.0, 4.0]))
    steep, bound = values["factor"], values["bound"]
    np.testing.assert_allclose(steep.log, [0.0, 101.0, 202.0])
    assert steep.overflow and steep.value[-1] == np.inf and steep.value[0] == 1
    assert bound.overflow and bound.total == np.inf
    assert 201 < bound.log_total < 203 and np.isfinite(bound.log_intercept)
    # Without a loss the bound is 0: no error, no NaN, and a finite gradient.
    assert values["no loss"].total == 0 and not values["no loss"].overflow
    np.testing.assert_allclose(values["grad"], [0.0, 0.5, 0.125])


@pytest.mark.matrix
@pytest.mark.programs(60)  # It warns outside of jit only.
def test_large_logarithms_in_float32_warn():
    with jax.enable_x64(False):
        one = jnp.ones(3, jnp.float32)
        times = TIMES.astype(jnp.float32)
        with pytest.warns(RuntimeWarning, match="float64"):
            sw.integrating_factor(one, 20 * one, one, times)
        sw.integrating_factor(one, one, one, times)
    sw.integrating_factor(ONE, 20 * ONE, ONE, TIMES)


@pytest.mark.programs(30)  # Values are checked outside of jit only.
@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda: sw.integrating_factor(ONE, ONE, ONE, TIMES[::-1]), "increase"),
        (lambda: sw.integrating_factor(ONE, ONE, ONE, 0 * TIMES), "increase"),
        (lambda: sw.integrating_factor(ONE, jnp.nan * ONE, ONE, TIMES), "score NaN"),
        (lambda: sw.integrating_factor(ONE, ONE, -ONE, TIMES), "g2 must be >= 0"),
        (lambda: sw.integrating_factor(*[ONE[:1]] * 3, TIMES[:1]), "two times"),
        (lambda: sw.w2_bound_theorem1(ONE, ONE, -ONE, TIMES), "b must be >= 0"),
        (lambda: sw.w2_bound_cor1(ONE, ONE, -1.0, TIMES), "J must be >= 0"),
        (lambda: sw.w2_bound_cor1(ONE, ONE, 1.0, TIMES, -1.0), "offset must be >= 0"),
        (lambda: sw.w2_bound_general(ONE, ONE, -ONE, 1.0, TIMES), "lam must be >= 0"),
        (lambda: sw.w2_bound_general(ONE, ONE, 0 * ONE, 1.0, TIMES), "lam is zero"),
        (lambda: sw.w2_offset_vp(ONE, ONE, TIMES, -1.0), "distance"),
    ],
)  # fmt: skip
def test_refuses(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def test_compiled_bounds_of_nan_are_nan():
    """Outside of jit they are refused; no bound is 0 or only infinite."""

    def bounds(one, nan):
        return {
            "J": sw.w2_bound_cor1(one, one, nan[0], TIMES),
            "negative J": sw.w2_bound_cor1(one, one, -one[0], TIMES),
            "offset": sw.w2_bound_cor1(one, one, one[0], TIMES, nan[0]),
            "g2": sw.w2_bound_cor1(nan, one, one[0], TIMES),
            "lam": sw.w2_bound_general(one, one, nan, one[0], TIMES),
            "b": sw.w2_bound_theorem1(one, one, nan, TIMES),
        }

    one = np.ones(len(TIMES), np.float32)
    for name, bound in together(bounds, one, np.nan * one).items():
        assert np.isnan(bound.total), name


def test_refuses_lengths_that_differ():
    # Past the annotations, where they are checked.
    raw = getattr(sw.integrating_factor, "__wrapped__", sw.integrating_factor)
    with pytest.raises(ValueError, match="lengths must be equal"):
        raw(ONE, ONE[:2], ONE, TIMES)
