"""Diffusion in discrete steps: recorded numbers, closed forms, rollouts, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.ops import diffusion, fastdpm, schedules, trajectories
from jaxpapers.ops.schedules import NoiseSchedule, Sampler
from tests.programs import together

LINEAR = diffusion.linear_betas(40, 1e-3, 0.2)
SCHEDULES = {
    "ddpm": diffusion.ddpm_schedule(LINEAR),
    "posterior": diffusion.ddpm_schedule(LINEAR, "posterior"),
    "ddim": diffusion.ddim_schedule(diffusion.alpha_bars(LINEAR), 8),
    "fastdpm": fastdpm.fastdpm_schedule(6, timesteps=40, beta_start=1e-3, beta_end=0.2),
}


# Recorded numbers


def files(*keys):
    """Cases of the index whose arrays include these."""
    return lambda entry: set(keys) <= set(entry["arrays"])


def recorded_sampler(case):
    """Options of the recorded FastDPM schedule, every one of the entry's."""
    return {
        "steps": case.read("S"),
        "timesteps": case.read("T"),
        "beta_start": case.read("beta_start"),
        "beta_end": case.read("beta_end"),
        "kind": case.read("schedule"),
    }, case.read("kappa")


@pytest.mark.parity("diffusion", only=files("tau", "theta_mult"))
def test_recorded_fastdpm_schedule(case):
    z, (options, kappa) = case.arrays, recorded_sampler(case)
    assert (len(z["eta"]), len(z["alpha_bar"])) == (
        options["steps"], options["timesteps"],
    )  # fmt: skip
    noise = NoiseSchedule(
        "linear", *(options[k] for k in ("timesteps", "beta_start", "beta_end"))
    )
    betas, bars = noise.variances(), noise.alpha_bars()
    rtol = case.tolerance("float32", otherwise=2e-5)
    np.testing.assert_allclose(bars, z["alpha_bar"], rtol=rtol)
    before = np.append(1, bars[:-1])
    tilde = np.sqrt(betas * (1 - before) / (1 - bars))
    np.testing.assert_allclose(tilde[1:], z["sigma_tilde"][1:], rtol=2e-4)
    np.testing.assert_allclose(fastdpm.fastdpm_noise(**options), z["eta"], rtol=1e-10)
    schedule = fastdpm.fastdpm_schedule(kappa=kappa, **options)
    np.testing.assert_allclose(schedule.x_mult, z["x_mult"], rtol=rtol)
    np.testing.assert_allclose(schedule.eps_mult, z["theta_mult"], rtol=rtol)
    np.testing.assert_allclose(schedule.std, z["std"], rtol=rtol)
    rtol = case.read("tolerance_tau", 1e-6)
    np.testing.assert_allclose(schedule.time, z["tau"], rtol=rtol, atol=rtol)


@pytest.mark.parity("diffusion", only=files("w", "b", "grad_w"))
def test_recorded_log_prob_and_policy_gradient(case):
    z, (options, kappa) = case.arrays, recorded_sampler(case)
    schedule = fastdpm.fastdpm_schedule(kappa=kappa, **options)
    x, x_next = (np.moveaxis(z[k], 1, -1) for k in ("x_prev", "x_next"))
    k = z["t"].astype(np.int32)
    time = schedule.time[k]

    def program(w, b, x, x_next, adv):
        def objective(w, b):
            drift = b[None] * (1 + 0.001 * time[:, None])
            eps = jnp.einsum("bhwc,dc->bhwd", x, w) + drift[:, None, None, :]
            score = diffusion.step_log_prob(schedule, k, x, x_next, eps, "mean")
            return (adv * score).mean(), score

        return jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(w, b)

    (loss, score), grads = together(program, z["w"], z["b"], x, x_next, z["adv"])
    last = k == len(schedule.std) - 1
    tight, loose = case.tolerance("float32", otherwise=2e-5), 1e-4
    np.testing.assert_allclose(score[~last], z["log_prob"][~last], rtol=tight)
    np.testing.assert_allclose(score[last], z["log_prob"][last], rtol=loose)
    # The last step has the narrowest density, which limits the loss's accuracy.
    rtol = loose if last.any() else tight
    np.testing.assert_allclose(loss, z["loss"], rtol=rtol)
    np.testing.assert_allclose(grads[0], z["grad_w"], rtol=rtol, atol=1e-6)
    np.testing.assert_allclose(grads[1], z["grad_b"], rtol=rtol, atol=1e-6)


@pytest.mark.parity("diffusion", only=files("betas", "x_next", "eps"))
def test_recorded_toy_step(case):
    z, rtol = case.arrays, case.tolerance("float32", otherwise=2e-5)
    betas = diffusion.sigmoid_betas(len(z["betas"]))
    np.testing.assert_allclose(betas, z["betas"], rtol=rtol)
    np.testing.assert_allclose(diffusion.alpha_bars(betas), z["alphas_bar"], rtol=rtol)
    schedule = diffusion.ddpm_schedule(betas)
    k = np.int32(len(betas) - 1 - z["t"])
    np.testing.assert_array_equal(schedule.time[k], z["t"])
    score = together(
        lambda *arrays: diffusion.step_log_prob(schedule, k, *arrays),
        *(z[n] for n in ("x", "x_next", "eps")),
    )
    np.testing.assert_allclose(score, z["log_prob"], rtol=rtol, atol=1e-6)


@pytest.mark.parity("diffusion", only=files("eps_ref", "kl_step"))
def test_recorded_ddim_step(case):
    z, tight = case.arrays, case.tolerance("float32", otherwise=2e-5)
    bars = np.asarray(z["alphas_cumprod"], np.float64)
    expected = diffusion.alpha_bars(diffusion.scaled_linear_betas(len(bars)))
    np.testing.assert_allclose(bars, expected, rtol=tight)
    steps = len(z["timesteps"])
    np.testing.assert_array_equal(
        diffusion.ddim_times(len(bars), steps), z["timesteps"]
    )
    schedule, k = diffusion.ddim_schedule(bars, steps), np.int32(z["step_index"])

    def program(x, x_next, eps, eps_ref):
        return {
            "mean": diffusion.step_mean(schedule, k, x, eps),
            "log_prob": diffusion.step_log_prob(schedule, k, x, x_next, eps, "mean"),
            "kl_step": diffusion.step_kl(schedule, k, eps, eps_ref),
        }

    arrays = (np.moveaxis(z[n], 1, -1) for n in ("x", "x_next", "eps", "eps_ref"))
    values = together(program, *arrays)
    mean = np.moveaxis(z["mean"], 1, -1)
    np.testing.assert_allclose(values["mean"], mean, rtol=tight, atol=1e-6)
    values["variance"] = np.square(schedule.std)[k]
    last = k == steps - 1
    for name in ("log_prob", "kl_step", "variance"):
        np.testing.assert_allclose(values[name][last], z[name][last], rtol=1e-4)
        np.testing.assert_allclose(values[name][~last], z[name][~last], rtol=tight)


# Schedules


def test_ddpm_posterior_is_the_textbook_one():
    """The step's mean is the posterior's, at the x_0 of the predicted noise."""
    x, eps = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    t, schedule = np.array([39, 20, 7, 1, 0]), SCHEDULES["posterior"]
    bars = np.float32(diffusion.alpha_bars(LINEAR)[t])

    def program(x, eps, bars):
        x0 = diffusion.predict_x0(x, bars, eps)
        return (
            diffusion.posterior(x0, x, LINEAR, jnp.asarray(t)),
            diffusion.step_mean(schedule, 39 - t, x, eps),
            diffusion.q_sample(x0, bars, eps),
        )

    (mean, var), step, back = together(program, x, eps, bars)
    np.testing.assert_allclose(step, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        np.square(schedule.std)[39 - t], var, rtol=1e-5, atol=1e-9
    )
    np.testing.assert_allclose(back, x, rtol=1e-4, atol=1e-5)


def test_ddim_with_eta_one_is_the_posterior_of_its_grid():
    bars = diffusion.alpha_bars(LINEAR)
    times = diffusion.ddim_times(40, 8)
    assert times.tolist() == [36, 31, 26, 21, 16, 11, 6, 1]
    schedule = diffusion.ddim_schedule(bars, 8)
    now, to = bars[times], np.append(bars[times[1:]], bars[0])
    beta = 1 - now / to
    np.testing.assert_allclose(
        schedule.std, np.sqrt(beta * (1 - to) / (1 - now)), rtol=1e-6
    )
    # The posterior's mean at the x_0 that the noise stands for.
    c0 = np.sqrt(to) * beta / (1 - now)
    c1 = np.sqrt(1 - beta) * (1 - to) / (1 - now)
    np.testing.assert_allclose(schedule.x_mult, c0 / np.sqrt(now) + c1, rtol=1e-5)
    np.testing.assert_allclose(
        schedule.eps_mult, -c0 * np.sqrt(1 - now) / np.sqrt(now), rtol=1e-5
    )


# Rollouts and steps

MATRIX = functools.partial(pytest.param, marks=pytest.mark.matrix)


@pytest.mark.parametrize("name", ["ddim", MATRIX("ddpm"), MATRIX("fastdpm")])
def test_perfect_noise_gives_back_the_point(name):
    """For data at one point the true noise is known; samples are near the point."""
    schedule, point = SCHEDULES[name], np.float32([0.7, -0.4])
    bars = np.append(schedule.alpha_bar[:-1], 1)[:-1]

    def program(point):
        table = jnp.asarray(bars, jnp.float32)

        def eps_fn(x, time):
            bar = table[jnp.argmin(jnp.abs(jnp.asarray(schedule.time) - time[0]))]
            return (x - jnp.sqrt(bar) * point[None]) / jnp.sqrt(1 - bar)

        key = jax.random.key(0)
        return trajectories.rollout(key, eps_fn, schedule, (2000, 2)).sample

    samples = together(program, point)
    left = np.sqrt(max(1 - schedule.alpha_bar[-1], schedule.std[-1] ** 2))
    np.testing.assert_allclose(samples.mean(0), point, atol=0.02)
    assert float(samples.std(0).max()) < 1.1 * left + 1e-3


def linear_eps(x, time):
    return 0.3 * x + 0.01 * time[:, None]


@pytest.mark.parametrize("name", [MATRIX("ddim"), MATRIX("ddpm"), "fastdpm"])
def test_log_probabilities_of_a_rollout(name):
    schedule = SCHEDULES[name]
    steps = np.arange(len(schedule.std))

    def program(key):
        results = {}
        for reduce in diffusion.REDUCTIONS:
            rollout = trajectories.rollout(
                key, linear_eps, schedule, (7, 3), store="all", log_prob=True,
                reduce=reduce,
            )  # fmt: skip

            def of_step(k, x, x_next, eps, reduce=reduce):
                score = diffusion.step_log_prob(schedule, k, x, x_next, eps, reduce)
                ratio = diffusion.step_log_ratio(schedule, k, x, x_next, eps, eps)
                return score, ratio

            again = jax.vmap(of_step)(
                steps, rollout.states[:-1], rollout.states[1:], rollout.eps
            )
            results[reduce] = rollout, again
        return results

    for rollout, (score, ratio) in together(program, jax.random.key(1)).values():
        assert rollout.states.shape == (len(steps) + 1, 7, 3)
        np.testing.assert_array_equal(rollout.states[-1], rollout.sample)
        np.testing.assert_allclose(rollout.log_prob, score, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(ratio, 0)


def test_log_ratio_is_the_difference_of_densities():
    schedule, k = SCHEDULES["ddim"], np.array([0, 3, 7])
    x, old, noise = np.random.default_rng(2).normal(size=(3, 3, 4))
    new = old + 0.1 * np.sin(x)
    std = schedule.std.astype(np.float64)[k][:, None]

    def program(x, old, new, noise):
        x_next = diffusion.step_mean(schedule, k, x, old) + std * noise

        def difference(new, reduce):
            score, before = (
                diffusion.step_log_prob(schedule, k, x, x_next, e, reduce)
                for e in (new, old)
            )
            return score - before

        def ratio(new, reduce):
            return diffusion.step_log_ratio(schedule, k, x, x_next, new, old, reduce)

        return {
            reduce: [(f(new, reduce), jax.jacobian(f)(new, reduce))
                     for f in (ratio, difference)]
            for reduce in diffusion.REDUCTIONS
        }  # fmt: skip

    with jax.enable_x64():
        values = together(program, x, old, new, noise)
    for (ratio, slope), (difference, expected) in values.values():
        np.testing.assert_allclose(ratio, difference, rtol=1e-9)
        np.testing.assert_allclose(slope, expected, rtol=1e-8, atol=1e-12)


def test_step_kl_is_that_of_the_gaussians():
    schedule, k = SCHEDULES["ddim"], np.array([3])
    a, b = np.full((1, 2), 0.3, np.float32), np.full((1, 2), -0.2, np.float32)
    expected = 2 * (schedule.eps_mult[3] * 0.5) ** 2 / (2 * schedule.std[3] ** 2)
    total, mean = together(
        lambda a, b: [diffusion.step_kl(schedule, k, a, b, r) for r in ("sum", "mean")],
        a, b,
    )  # fmt: skip
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(mean, expected / 2, rtol=1e-5)


@pytest.mark.matrix
def test_noise_drawn_at_once_is_that_of_the_steps(monkeypatch):
    """A large rollout draws step by step, a small one before it; replay does the same."""
    schedule = diffusion.ddpm_schedule(diffusion.linear_betas(6))

    def eps_fn(x, time):
        return 0.1 * x + 0.01 * time[:, None]

    def draw(at_once):
        @jax.jit
        def program(key):
            rollout = trajectories.rollout(key, eps_fn, schedule, (8, 2), store="keys")
            replay = trajectories.replay(
                rollout, eps_fn, schedule, lambda last, k, x, x_next, eps: x_next,
                rollout.start,
            )  # fmt: skip
            return rollout.sample, replay

        lowered = program.lower(jax.random.key(0))
        # All noise is there before the loop, or none of it.
        assert ("6x8x2xf32" in lowered.as_text()) == at_once
        sample, replay = lowered.compile()(jax.random.key(0))
        np.testing.assert_array_equal(replay, sample)
        return sample

    assert len(schedule.std) * 8 * 2 < trajectories.AT_ONCE
    before = draw(True)
    monkeypatch.setattr(trajectories, "AT_ONCE", 0)
    np.testing.assert_allclose(draw(False), before, rtol=1e-6, atol=1e-6)


@pytest.mark.matrix
def test_replay_is_bitwise_the_same(users_options):
    schedule = SCHEDULES["ddim"]
    steps = len(schedule.std)

    # As users compile: the tests' own options round differently in two programs.
    @functools.partial(jax.jit, compiler_options=users_options)
    def draw(key):
        return [
            trajectories.rollout(key, linear_eps, schedule, (5, 2), store=store)
            for store in ("keys", "all")
        ]

    def visit(carry, k, x, x_next, eps):
        states, predictions = carry
        return states.at[k].set(x), predictions.at[k].set(eps)

    @functools.partial(jax.jit, compiler_options=users_options)
    def replay(kept):
        empty = (jnp.zeros((steps, 5, 2)), jnp.zeros((steps, 5, 2)))
        return trajectories.replay(kept, linear_eps, schedule, visit, empty)

    kept, whole = draw(jax.random.key(3))
    assert kept.states is None and kept.eps is None
    np.testing.assert_array_equal(kept.sample, whole.sample)
    states, predictions = replay(kept)
    np.testing.assert_array_equal(states, whole.states[:-1])
    np.testing.assert_array_equal(predictions, whole.eps)


def test_kept_bytes_do_not_grow_with_the_steps():
    def bytes_of(steps, store):
        schedule = diffusion.ddpm_schedule(diffusion.linear_betas(steps, 1e-3, 0.2))
        shapes = jax.eval_shape(
            lambda: trajectories.rollout(
                jax.random.key(0), linear_eps, schedule, (8, 4), store=store
            )
        )
        return sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(shapes) if x.ndim > 1)

    assert bytes_of(10, "keys") == bytes_of(80, "keys") == 2 * 8 * 4 * 4
    assert bytes_of(80, "all") == (1 + 81 + 80) * 8 * 4 * 4


def test_remat_changes_nothing():
    def program(start):
        return [
            trajectories.rollout(
                jax.random.key(4), linear_eps, SCHEDULES["ddim"], start=start,
                remat=remat,
            ).sample
            for remat in (False, True)
        ]  # fmt: skip

    plain, other = together(program, np.ones((4, 2), np.float32))
    np.testing.assert_array_equal(plain, other)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("x_mult", np.inf, r"x_mult is not finite at steps \[2\] of 8; zero terminal"),
        ("eps_mult", np.nan, r"eps_mult is not finite at steps \[2\]"),
        ("std", np.inf, r"std is not finite at steps \[2\]"),
        ("std", np.nan, r"no density.* at steps \[2\]"),
        ("std", 1e-12, r"rounding of the states at steps \[2\]"),
    ],
)
def test_steps_without_signal_or_noise_have_no_density(field, value, message):
    schedule = diffusion.ddim_schedule(diffusion.alpha_bars(LINEAR), 8)
    values = getattr(schedule, field).copy()
    values[2] = value
    with pytest.raises(ValueError, match=message):
        diffusion.check_density(schedule._replace(**{field: values}))


def test_zero_terminal_snr_is_refused_by_name():
    bars = diffusion.alpha_bars(LINEAR)
    root = np.sqrt(bars)
    zero = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    with pytest.raises(ValueError, match=r"got 0.9.* .. 0.0; zero terminal SNR"):
        diffusion.ddim_schedule(zero, 8)
    with pytest.raises(ValueError, match="got 1.0 at 3 of 4; zero terminal SNR"):
        diffusion.check_betas([0.1, 0.2, 0.3, 1.0])


def test_steps_beyond_the_schedule_have_no_coefficients():
    """An index beyond them would read the last step's."""
    schedule, x = SCHEDULES["ddim"], np.zeros((2, 3), np.float32)
    count = len(schedule.std)
    for k in (np.array([0, count]), -1, count):
        with pytest.raises(ValueError, match=f"k must be in 0 .. {count - 1}.*got"):
            jax.eval_shape(lambda x, k=k: diffusion.step_kl(schedule, k, x, x), x)

    def f(k, x):
        log_prob = diffusion.step_log_prob(schedule, k, x, x, x)
        ratio = diffusion.step_log_ratio(schedule, k, x, x, x, x + 1)
        return log_prob, ratio, diffusion.step_kl(schedule, k, x, x + 1)

    for value in together(f, np.array([count - 1, count]), x):
        np.testing.assert_array_equal(np.isnan(value), [False, True])


def test_deterministic_steps_have_no_density():
    bars = diffusion.alpha_bars(LINEAR)
    deterministic = diffusion.ddim_schedule(bars, 8, eta=0.0)
    for schedule in (
        deterministic,
        diffusion.ddim_schedule(bars, 8, final_alpha_bar=1.0),
        fastdpm.fastdpm_schedule(4, kappa=0.0),
        SCHEDULES["posterior"],
    ):
        with pytest.raises(ValueError, match="no density"):
            trajectories.rollout(
                jax.random.key(0), linear_eps, schedule, (2, 2), log_prob=True
            )

    def program(start):
        return [
            trajectories.rollout(
                jax.random.key(i), linear_eps, deterministic, start=start
            ).sample
            for i in (0, 1)
        ]

    one, two = together(program, np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(one, two)


def test_guidance():
    def eps_fn(x, time, tokens):
        return x * (1.0 + tokens[:, None])

    def program(x, time, tokens):
        return [
            diffusion.guided(eps_fn, weight)(x, time, tokens)[:, 0]
            for weight in (1.0, 0.0, 2.0)
        ]

    ones, zeros = np.ones((2, 3), np.float32), np.zeros(2, np.float32)
    values = together(program, ones, zeros, np.int32([1, 4]))
    np.testing.assert_allclose(values, [[2, 5], [1, 1], [3, 9]])


def test_noise_loss_of_a_perfect_and_a_zero_net():
    bars = diffusion.alpha_bars(LINEAR)

    def program(x):
        def perfect(noisy, time):
            bar = jnp.asarray(bars, jnp.float32)[time.astype(int)]
            return noisy / jnp.sqrt(1 - bar)[:, None]

        return [
            diffusion.noise_loss(f, x, jax.random.key(0), bars)
            for f in (perfect, lambda x, t: 0 * x)
        ]

    perfect, zero = together(program, np.zeros((4000, 2), np.float32))
    np.testing.assert_allclose(perfect, 0, atol=1e-8)
    assert float(zero.mean()) == pytest.approx(1, abs=0.05)


# Errors and options


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
                jax.random.key(0), linear_eps, SCHEDULES["ddim"], (2, 2), store="some"
            ),
            "store",
        ),
        (
            lambda: trajectories.rollout(
                jax.random.key(0), linear_eps, SCHEDULES["ddim"]
            ),
            "shape= or start=",
        ),
        (
            lambda: trajectories.replay(
                trajectories.Trajectory(None), linear_eps, SCHEDULES["ddim"], max, None
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
    for a, b in zip(schedule, SCHEDULES[name], strict=True):
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
