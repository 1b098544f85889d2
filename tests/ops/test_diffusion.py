"""Chains of diffusion steps: recorded numbers, closed forms, rollouts, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import diffusion, fastdpm, schedules, trajectories
from jaxpapers.ops.schedules import NoiseSchedule, Sampler

LINEAR = diffusion.linear_betas(40, 1e-3, 0.2)
CHAINS = {
    "ddpm": diffusion.ddpm_schedule(LINEAR),
    "posterior": diffusion.ddpm_schedule(LINEAR, "posterior"),
    "ddim": diffusion.ddim_schedule(diffusion.alpha_bars(LINEAR), 8),
    "fastdpm": fastdpm.fastdpm_schedule(6, timesteps=40, beta_start=1e-3, beta_end=0.2),
}


def files(*keys):
    """Cases of the index whose arrays include these."""
    return lambda entry: set(keys) <= set(entry["arrays"])


def load(case):
    folder, name, entry = case
    with np.load(folder / f"{name}.npz") as z:
        return {k: z[k] for k in z.files}, entry.get("params", {})


@pytest.mark.parity("diffusion", only=files("tau", "theta_mult"))
def test_recorded_fastdpm_schedule(case):
    z, params = load(case)
    steps = len(z["eta"])
    options = {
        "timesteps": len(z["alpha_bar"]),
        "beta_start": params.get("beta_start", 1e-4),
        "beta_end": params.get("beta_end", 0.02),
        "kind": params.get("schedule", "quadratic"),
    }
    betas = diffusion.linear_betas(
        options["timesteps"], options["beta_start"], options["beta_end"]
    )
    bars = diffusion.alpha_bars(betas)
    np.testing.assert_allclose(bars, z["alpha_bar"], rtol=2e-5)
    before = np.append(1, bars[:-1])
    tilde = np.sqrt(betas * (1 - before) / (1 - bars))
    np.testing.assert_allclose(tilde[1:], z["sigma_tilde"][1:], rtol=2e-4)
    np.testing.assert_allclose(
        fastdpm.fastdpm_noise(steps, **options), z["eta"], rtol=1e-10
    )
    kappa = float(z["kappa"])
    chain = fastdpm.fastdpm_schedule(steps, kappa=kappa, **options)
    np.testing.assert_allclose(chain.x_mult, z["x_mult"], rtol=2e-5)
    np.testing.assert_allclose(chain.eps_mult, z["theta_mult"], rtol=2e-5)
    np.testing.assert_allclose(chain.std, z["std"], rtol=2e-5)
    np.testing.assert_allclose(chain.time, z["tau"], rtol=1e-6, atol=1e-6)


@pytest.mark.parity("diffusion", only=files("w", "b", "grad_w"))
def test_recorded_log_prob_and_policy_gradient(case):
    z, params = load(case)
    chain = fastdpm.fastdpm_schedule(params.get("S", 10))
    x, x_next = (jnp.moveaxis(z[k], 1, -1) for k in ("x_prev", "x_next"))
    k = jnp.asarray(z["t"], jnp.int32)

    def objective(w, b):
        time = jnp.asarray(chain.time)[k]
        drift = b[None] * (1 + 0.001 * time[:, None])
        eps = jnp.einsum("bhwc,dc->bhwd", x, w) + drift[:, None, None, :]
        score = diffusion.step_log_prob(chain, k, x, x_next, eps, "mean")
        return (z["adv"] * score).mean(), score

    grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (loss, score), grads = grad(jnp.asarray(z["w"]), jnp.asarray(z["b"]))
    last = np.asarray(k) == len(chain.std) - 1
    np.testing.assert_allclose(score[~last], z["log_prob"][~last], rtol=2e-5)
    np.testing.assert_allclose(score[last], z["log_prob"][last], rtol=1e-4)
    # The last step's density is the narrowest: it sets the loss's accuracy.
    rtol = 1e-4 if last.any() else 2e-5
    np.testing.assert_allclose(loss, z["loss"], rtol=rtol)
    np.testing.assert_allclose(grads[0], z["grad_w"], rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(grads[1], z["grad_b"], rtol=rtol, atol=1e-6)


@pytest.mark.parity("diffusion", only=files("betas", "x_next", "eps"))
def test_recorded_toy_step(case):
    z, _ = load(case)
    betas = diffusion.sigmoid_betas(len(z["betas"]))
    np.testing.assert_allclose(betas, z["betas"], rtol=2e-5)
    np.testing.assert_allclose(diffusion.alpha_bars(betas), z["alphas_bar"], rtol=2e-5)
    chain = diffusion.ddpm_schedule(betas)
    k = jnp.asarray(len(betas) - 1 - z["t"], jnp.int32)
    np.testing.assert_array_equal(np.asarray(chain.time)[k], z["t"])
    found = diffusion.step_log_prob(
        chain, k, *(jnp.asarray(z[n]) for n in ("x", "x_next", "eps"))
    )
    np.testing.assert_allclose(found, z["log_prob"], rtol=2e-5, atol=1e-6)


@pytest.mark.parity("diffusion", only=files("eps_ref", "kl_step"))
def test_recorded_ddim_step(case):
    z, _ = load(case)
    bars = np.asarray(z["alphas_cumprod"], np.float64)
    expected = diffusion.alpha_bars(diffusion.scaled_linear_betas(len(bars)))
    np.testing.assert_allclose(bars, expected, rtol=2e-5)
    steps = len(z["timesteps"])
    np.testing.assert_array_equal(
        diffusion.ddim_times(len(bars), steps), z["timesteps"]
    )
    chain = diffusion.ddim_schedule(bars, steps)
    k = jnp.asarray(z["step_index"], jnp.int32)
    x, x_next, eps, ref = (
        jnp.moveaxis(z[n], 1, -1) for n in ("x", "x_next", "eps", "eps_ref")
    )
    mean = jnp.moveaxis(z["mean"], 1, -1)
    np.testing.assert_allclose(
        diffusion.step_mean(chain, k, x, eps), mean, rtol=2e-5, atol=1e-6
    )
    variance = np.square(chain.std)[np.asarray(k)]
    score = diffusion.step_log_prob(chain, k, x, x_next, eps, "mean")
    last = np.asarray(k) == steps - 1
    np.testing.assert_allclose(score[~last], z["log_prob"][~last], rtol=2e-5)
    kl = diffusion.step_kl(chain, k, eps, ref)
    for found, name in ((score, "log_prob"), (kl, "kl_step"), (variance, "variance")):
        np.testing.assert_allclose(found[last], z[name][last], rtol=1e-4)
    for found, name in ((kl, "kl_step"), (variance, "variance")):
        np.testing.assert_allclose(found[~last], z[name][~last], rtol=2e-5)


def test_ddpm_posterior_is_the_textbook_one():
    """The chain's mean is the posterior's at the x_0 that the noise stands for."""
    key_x, key_eps = jax.random.split(jax.random.key(0))
    x, eps = (jax.random.normal(k, (5, 3)) for k in (key_x, key_eps))
    t = jnp.array([39, 20, 7, 1, 0])
    chain = CHAINS["posterior"]
    k = 39 - t
    bars = jnp.asarray(diffusion.alpha_bars(LINEAR), jnp.float32)[t]
    x0 = diffusion.predict_x0(x, bars, eps)
    mean, var = diffusion.posterior(x0, x, LINEAR, t)
    found = diffusion.step_mean(chain, k, x, eps)
    np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.square(chain.std)[k], var, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(
        diffusion.q_sample(x0, bars, eps), x, rtol=1e-4, atol=1e-5
    )


def test_ddim_with_eta_one_is_the_posterior_of_its_grid():
    bars = diffusion.alpha_bars(LINEAR)
    times = diffusion.ddim_times(40, 8)
    assert times.tolist() == [36, 31, 26, 21, 16, 11, 6, 1]
    chain = diffusion.ddim_schedule(bars, 8)
    now, to = bars[times], np.append(bars[times[1:]], bars[0])
    beta = 1 - now / to
    np.testing.assert_allclose(
        chain.std, np.sqrt(beta * (1 - to) / (1 - now)), rtol=1e-6
    )
    # The posterior's mean at the x_0 that the noise stands for.
    c0 = np.sqrt(to) * beta / (1 - now)
    c1 = np.sqrt(1 - beta) * (1 - to) / (1 - now)
    np.testing.assert_allclose(chain.x_mult, c0 / np.sqrt(now) + c1, rtol=1e-5)
    np.testing.assert_allclose(
        chain.eps_mult, -c0 * np.sqrt(1 - now) / np.sqrt(now), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["ddpm", "ddim", "fastdpm"])
def test_perfect_noise_gives_back_the_point(name):
    """For data at one point the true noise is known; the chain ends near the point."""
    chain, point = CHAINS[name], jnp.array([0.7, -0.4])
    bars = np.append(chain.alpha_bar[:-1], 1)[:-1]
    table = jnp.asarray(bars, jnp.float32)

    def eps_fn(x, time):
        bar = table[jnp.argmin(jnp.abs(jnp.asarray(chain.time) - time[0]))]
        return (x - jnp.sqrt(bar) * point[None]) / jnp.sqrt(1 - bar)

    found = trajectories.rollout(jax.random.key(0), eps_fn, chain, (2000, 2)).sample
    left = np.sqrt(max(1 - chain.alpha_bar[-1], chain.std[-1] ** 2))
    np.testing.assert_allclose(found.mean(0), point, atol=0.02)
    assert float(found.std(0).max()) < 1.1 * left + 1e-3


def linear_eps(x, time):
    return 0.3 * x + 0.01 * time[:, None]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "fastdpm"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_rollout_scores_what_it_did(name, reduce):
    chain = CHAINS[name]
    found = trajectories.rollout(
        jax.random.key(1), linear_eps, chain, (7, 3), store="all", log_prob=True,
        reduce=reduce,
    )  # fmt: skip
    steps = len(chain.std)
    assert found.states.shape == (steps + 1, 7, 3)
    np.testing.assert_array_equal(found.states[-1], found.sample)
    for k in range(steps):
        again = diffusion.step_log_prob(
            chain, k, found.states[k], found.states[k + 1], found.eps[k], reduce
        )
        np.testing.assert_allclose(found.log_prob[k], again, rtol=1e-5, atol=1e-5)
        ratio = diffusion.step_log_ratio(
            chain, k, found.states[k], found.states[k + 1], found.eps[k], found.eps[k]
        )
        np.testing.assert_array_equal(ratio, 0)


def test_log_ratio_is_the_difference_of_densities():
    with jax.enable_x64():
        key_x, key_e, key_d = jax.random.split(jax.random.key(2), 3)
        chain = CHAINS["ddim"]
        k = jnp.array([0, 3, 7])
        x, old, noise = (
            jax.random.normal(key, (3, 4), jnp.float64) for key in (key_x, key_e, key_d)
        )
        new = old + 0.1 * jnp.sin(x)
        std = jnp.asarray(chain.std, jnp.float64)[k][:, None]
        x_next = diffusion.step_mean(chain, k, x, old) + std * noise

        def difference(new, reduce):
            score, before = (
                diffusion.step_log_prob(chain, k, x, x_next, e, reduce)
                for e in (new, old)
            )
            return score - before

        def ratio(new, reduce):
            return diffusion.step_log_ratio(chain, k, x, x_next, new, old, reduce)

        for reduce in diffusion.REDUCTIONS:
            np.testing.assert_allclose(
                ratio(new, reduce), difference(new, reduce), rtol=1e-9
            )
            found, expected = (
                jax.jacobian(f)(new, reduce) for f in (ratio, difference)
            )
            np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12)


def test_step_kl_is_that_of_the_gaussians():
    chain = CHAINS["ddim"]
    a, b = jnp.full((1, 2), 0.3), jnp.full((1, 2), -0.2)
    k = jnp.array([3])
    gap = chain.eps_mult[3] * 0.5
    expected = 2 * gap**2 / (2 * chain.std[3] ** 2)
    np.testing.assert_allclose(diffusion.step_kl(chain, k, a, b), expected, rtol=1e-5)
    np.testing.assert_allclose(
        diffusion.step_kl(chain, k, a, b, "mean"), expected / 2, rtol=1e-5
    )


def test_noise_drawn_at_once_is_that_of_the_steps(monkeypatch):
    """A large chain draws step by step, a small one before it; replay does the same."""
    chain = diffusion.ddpm_schedule(diffusion.linear_betas(6))

    def eps_fn(x, time):
        return 0.1 * x + 0.01 * time[:, None]

    def draw(at_once):
        program = jax.jit(
            lambda key: trajectories.rollout(key, eps_fn, chain, (8, 2), store="keys")
        )
        # All noise is there before the loop, or none of it.
        assert ("6x8x2xf32" in program.lower(jax.random.key(0)).as_text()) == at_once
        found = program(jax.random.key(0))
        states = jax.jit(
            lambda found: trajectories.replay(
                found,
                eps_fn,
                chain,
                lambda last, k, x, x_next, eps: x_next,
                found.start,
            )
        )(found)
        np.testing.assert_array_equal(states, found.sample)
        return found.sample

    assert len(chain.std) * 8 * 2 < trajectories.AT_ONCE
    before = draw(True)
    monkeypatch.setattr(trajectories, "AT_ONCE", 0)
    np.testing.assert_allclose(draw(False), before, rtol=1e-6, atol=1e-6)


def test_replay_is_bitwise_the_same(users_options):
    chain = CHAINS["ddpm"]
    # As users compile: the tests' own options round differently in two programs.
    draw = jax.jit(
        lambda store: trajectories.rollout(
            jax.random.key(3), linear_eps, chain, (5, 2), store=store
        ),
        static_argnums=0,
        compiler_options=users_options,
    )
    kept, whole = draw("keys"), draw("all")
    assert kept.states is None and kept.eps is None
    np.testing.assert_array_equal(kept.sample, whole.sample)

    def visit(carry, k, x, x_next, eps):
        states, predictions = carry
        return states.at[k].set(x), predictions.at[k].set(eps)

    empty = (jnp.zeros((40, 5, 2)), jnp.zeros((40, 5, 2)))
    replay = jax.jit(
        lambda kept: trajectories.replay(kept, linear_eps, chain, visit, empty),
        compiler_options=users_options,
    )
    states, predictions = replay(kept)
    np.testing.assert_array_equal(states, whole.states[:-1])
    np.testing.assert_array_equal(predictions, whole.eps)


def test_kept_bytes_do_not_grow_with_the_steps():
    def bytes_of(steps, store):
        chain = diffusion.ddpm_schedule(diffusion.linear_betas(steps, 1e-3, 0.2))
        shapes = jax.eval_shape(
            lambda: trajectories.rollout(
                jax.random.key(0), linear_eps, chain, (8, 4), store=store
            )
        )
        return sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(shapes) if x.ndim > 1)

    assert bytes_of(10, "keys") == bytes_of(80, "keys") == 2 * 8 * 4 * 4
    assert bytes_of(80, "all") == (1 + 81 + 80) * 8 * 4 * 4


def test_start_and_remat_change_nothing():
    chain, start = CHAINS["ddim"], jnp.ones((4, 2))
    key = jax.random.key(4)
    plain = trajectories.rollout(key, linear_eps, chain, start=start).sample
    other = trajectories.rollout(key, linear_eps, chain, start=start, remat=True).sample
    np.testing.assert_array_equal(plain, other)


def test_deterministic_chains_have_no_density():
    bars = diffusion.alpha_bars(LINEAR)
    for chain in (
        diffusion.ddim_schedule(bars, 8, eta=0.0),
        diffusion.ddim_schedule(bars, 8, final_alpha_bar=1.0),
        fastdpm.fastdpm_schedule(4, kappa=0.0),
        CHAINS["posterior"],
    ):
        with pytest.raises(ValueError, match="no density"):
            trajectories.rollout(
                jax.random.key(0), linear_eps, chain, (2, 2), log_prob=True
            )
    chain = diffusion.ddim_schedule(bars, 8, eta=0.0)
    start = jnp.ones((3, 2))
    one, two = (
        trajectories.rollout(jax.random.key(i), linear_eps, chain, start=start).sample
        for i in (0, 1)
    )
    np.testing.assert_array_equal(one, two)


def test_guidance():
    def eps_fn(x, time, word):
        return x * (1.0 + word[:, None])

    x, time, word = jnp.ones((2, 3)), jnp.zeros(2), jnp.array([1, 4])
    for weight, expected in ((1.0, [2, 5]), (0.0, [1, 1]), (2.0, [3, 9])):
        found = diffusion.guided(eps_fn, weight)(x, time, word)
        np.testing.assert_allclose(found[:, 0], expected)


def test_noise_loss_of_a_perfect_and_a_silent_net():
    x = jnp.zeros((4000, 2))
    bars = diffusion.alpha_bars(LINEAR)

    def perfect(noisy, time):
        bar = jnp.asarray(bars, jnp.float32)[time.astype(int)]
        return noisy / jnp.sqrt(1 - bar)[:, None]

    key = jax.random.key(0)
    np.testing.assert_allclose(
        diffusion.noise_loss(perfect, x, key, bars), 0, atol=1e-8
    )
    silent = diffusion.noise_loss(lambda x, t: 0 * x, x, key, bars)
    assert float(silent.mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    "attempt, message",
    [
        (lambda: diffusion.check_betas([0.1, 1.0]), r"\(0, 1\)"),
        (lambda: diffusion.check_betas([]), r"\(0, 1\)"),
        (lambda: diffusion.ddpm_schedule(LINEAR, "learned"), "posterior"),
        (lambda: diffusion.ddim_times(40, 0), "1 .. 39"),
        (lambda: diffusion.ddim_times(40, 40), "1 .. 39"),
        (lambda: diffusion.ddim_times(40, 7), "try 5"),
        (lambda: diffusion.ddim_schedule(np.linspace(0.9, 0.1, 8), 4, eta=2.0), "eta"),
        (lambda: fastdpm.fastdpm_noise(0), "1 .. 1000"),
        (lambda: fastdpm.fastdpm_noise(1001), "1 .. 1000"),
        (lambda: fastdpm.fastdpm_noise(10, kind="cubic"), "quadratic"),
        (lambda: fastdpm.fastdpm_noise(10, beta_start=0.1, beta_end=0.1), "below"),
        (
            lambda: diffusion.ddim_schedule(np.linspace(0.9, 0.1, 8), 4, 1.0, 0.3),
            "final_alpha_bar",
        ),
        (lambda: diffusion.ddim_schedule(np.linspace(0.1, 0.9, 8), 4), "must fall"),
        (lambda: fastdpm.fastdpm_noise(10, allow_saturation=False), "allow_saturation"),
        (lambda: fastdpm.fastdpm_schedule(10, kappa=1.5), "kappa"),
        (
            lambda: trajectories.rollout(
                jax.random.key(0), linear_eps, CHAINS["ddim"], (2, 2), store="some"
            ),
            "store",
        ),
        (
            lambda: trajectories.rollout(jax.random.key(0), linear_eps, CHAINS["ddim"]),
            "shape= or start=",
        ),
        (
            lambda: trajectories.replay(
                trajectories.Trajectory(None), linear_eps, CHAINS["ddim"], max, None
            ),
            "store='keys'",
        ),
    ],
)
def test_refusals(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


NOISE = {"timesteps": 40, "beta_start": 1e-3, "beta_end": 0.2}


@pytest.mark.parametrize("name, steps", [("ddim", 8), ("ddpm", 40), ("fastdpm", 6)])
def test_schedules_by_options(name, steps):
    noise = NoiseSchedule(**NOISE)
    schedule = schedules.reverse_schedule(noise, Sampler(name, steps))
    for a, b in zip(schedule, CHAINS[name], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(noise.alpha_bars(), diffusion.alpha_bars(LINEAR))


@pytest.mark.parametrize(
    "noise, sampler, message",
    [
        ({}, {"name": "euler"}, "sampler.name"),
        ({"betas": "cubic"}, {}, "noise.betas"),
        ({}, {"steps": 0}, "sampler.steps"),
        ({"timesteps": 0}, {}, "noise.timesteps"),
        ({"beta_end": 1.5}, {}, r"betas must be .* \(0, 1\)"),
        ({}, {"name": "ddpm"}, "fewer"),
        ({"betas": "cosine"}, {"name": "fastdpm"}, "linear"),
    ],
)
def test_refused_options(noise, sampler, message):
    with pytest.raises(ValueError, match=message):
        schedules.reverse_schedule(
            NoiseSchedule(**{**NOISE, **noise}),
            Sampler(**{"name": "ddim", "steps": 8, **sampler}),
        )


def test_betas_by_name():
    made = {name: NoiseSchedule(name, **NOISE).variances() for name in schedules.BETAS}
    np.testing.assert_array_equal(made["linear"], LINEAR)
    np.testing.assert_array_equal(made["cosine"], diffusion.cosine_betas(40))
    assert made["sigmoid"][0] > 1e-3 and made["sigmoid"][-1] < 0.2
    np.testing.assert_allclose(
        np.diff(np.sqrt(made["scaled_linear"]), 2), 0, atol=1e-15
    )
