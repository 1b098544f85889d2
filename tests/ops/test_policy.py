"""Policy gradients: recorded losses, surrogates, advantages, statistics by prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpapers.ops import diffusion, policy
from tests.programs import together


@pytest.mark.parity("diffusion", only=lambda entry: "dpok_total" in entry["arrays"])
def test_recorded_clipped_losses_and_gradients(case):
    z, rtol = case.arrays, case.tolerance("float32", otherwise=2e-5)
    bars, steps = np.asarray(z["alphas_cumprod"], np.float64), len(z["timesteps"])
    schedule, k = diffusion.ddim_schedule(bars, steps), np.int32(z["step_index"])
    alpha, beta, clip = (float(z[n]) for n in ("alpha", "beta", "clip"))
    names = ("x", "x_next", "eps", "eps_ref", "log_prob", "old_log_prob")

    def program(advantage, x, x_next, eps, eps_ref, log_prob, old_log_prob):
        def log_ratio(eps):
            score = diffusion.step_log_prob(schedule, k, x, x_next, eps, "mean")
            # The recorded value, since rounding matters in a narrow band; our gradient.
            return score + lax.stop_gradient(log_prob - score) - old_log_prob

        def surrogate(eps, mode):
            return policy.clipped_surrogate(log_ratio(eps), advantage, clip, mode)

        def dpok(eps):
            loss = alpha * surrogate(eps, "hard").mean()
            return loss + beta * jnp.square(eps - eps_ref).mean(), loss

        return {
            "ratio": jnp.exp(log_ratio(eps)),
            "dpok": jax.value_and_grad(dpok, has_aux=True)(eps),
            "policy": jax.grad(lambda e: dpok(e)[1])(eps),
            "ppo": jax.value_and_grad(lambda e: surrogate(e, "ppo").mean())(eps),
        }

    values = together(program, z["reward"] - z["value"], *(z[n] for n in names))
    np.testing.assert_allclose(values["ratio"], z["ratio"], rtol=rtol)
    (total, loss), grad = values["dpok"]
    np.testing.assert_allclose(loss, z["dpok_policy"], rtol=rtol)
    np.testing.assert_allclose(total, z["dpok_total"], rtol=rtol)
    close(grad, z["dpok_grad_eps"], rtol)
    outside = np.abs(z["ratio"] - 1) > clip
    assert outside.any() and not values["policy"][outside].any()
    value, grad = values["ppo"]
    np.testing.assert_allclose(value, z["ppo_loss"], rtol=rtol)
    close(grad, z["ppo_grad_eps"], rtol)


def close(value, expected, rtol):
    """Relative, or relative to the largest entry."""
    most = np.abs(expected).max()
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol * most)


def test_where_each_clip_has_a_gradient():
    log_ratio = np.log(np.float32([0.5, 0.5, 1.0, 1.5, 1.5]))
    advantage = np.float32([1, -1, 1, 1, -1])

    def program(log_ratio, advantage):
        def total(r, mode):
            return policy.clipped_surrogate(r, advantage, 0.2, mode).sum()

        return {mode: jax.grad(total)(log_ratio, mode) != 0 for mode in policy.CLIPS}

    moves = together(program, log_ratio, advantage)
    # PPO stops beyond the band in the direction of the advantage, and pulls back.
    assert moves["ppo"].tolist() == [True, False, True, False, True]
    assert moves["hard"].tolist() == [False, False, True, False, False]
    assert moves["none"].all()


def test_surrogate_at_the_old_policy_is_reinforce():
    score, advantage = np.float32([-1.0, -2.0, 0.5]), np.float32([2.0, -1.0, 0.3])

    def program(score, advantage):
        def surrogate(s, mode):
            log_ratio = s - lax.stop_gradient(s)
            return policy.clipped_surrogate(log_ratio, advantage, 0.1, mode).sum()

        reinforce = jax.grad(lambda s: policy.reinforce(s, advantage).sum())(score)
        return [reinforce, *(jax.grad(surrogate)(score, m) for m in policy.CLIPS)]

    for grad in together(program, score, advantage):
        np.testing.assert_allclose(grad, -advantage, rtol=1e-6)


def test_ratio_metrics():
    values = together(
        lambda r: policy.ratio_metrics(jnp.log(r), 0.1),
        np.float32([1.0, 0.5, 2.0, 1.05]),
    )
    assert float(values["ratio"]) == pytest.approx(4.55 / 4)
    assert float(values["ratio_deviation"]) == pytest.approx(1.0)
    assert float(values["clip_fraction"]) == pytest.approx(0.5)
    squares = (1 + 0.25 + 4 + 1.05**2) / 4
    assert float(values["ratio_ess"]) == pytest.approx((4.55 / 4) ** 2 / squares)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_metrics_of_what_is_not_finite_are_nan(value):
    """No clipping, no constant targets, no equal groups are read out of NaN."""
    good, bad = np.float32([0.1, 0.2, 0.3, 0.4]), np.float32([0.1, 0.2, value, 0.4])

    def f(good, bad):
        return {
            "ratios": policy.ratio_metrics(bad, 0.1),
            "target": policy.explained_variance(good, bad),
            "value": policy.explained_variance(bad, good),
            "both": policy.explained_variance(bad, 0 * good),
            "groups": policy.group_advantage(bad, jnp.arange(4) % 2, 2)[1],
        }

    for name, leaf in together(f, good, bad).items():
        assert all(map(np.isnan, jax.tree.leaves(leaf))), name


def test_to_go_leaves_a_step_itself_out():
    cost = np.float32([[1.0], [2.0], [4.0]])
    np.testing.assert_allclose(together(policy.to_go, cost)[:, 0], [6, 4, 0])


def test_path_kl_of_two_constant_policies():
    """A difference c of predictions costs |eps_mult c / std|^2 / 2 a step and number."""
    bars = diffusion.alpha_bars(diffusion.linear_betas(50))
    schedule = diffusion.ddim_schedule(bars, 5, eta=1.0)
    kl = together(
        lambda key: policy.path_kl(
            key, lambda x, time: jnp.zeros_like(x),
            lambda x, time: jnp.full_like(x, 0.5), schedule, (3, 2),
        ), jax.random.key(0),
    )  # fmt: skip
    expected = 2 * (0.5 * np.square(0.5 * schedule.eps_mult / schedule.std)).sum()
    np.testing.assert_allclose(kl, np.full(3, expected), rtol=1e-5)


def test_group_advantage_against_numpy():
    reward, prompt = np.float32([1, 3, 2, 2, 5]), np.int32([0, 0, 2, 2, 3])
    advantage, equal = together(
        lambda r, p: policy.group_advantage(r, p, 4), reward, prompt
    )
    np.testing.assert_allclose(advantage, [-1, 1, 0, 0, 0], atol=1e-4)
    assert float(equal) == pytest.approx(2 / 3)


def test_prompts_out_of_range_are_no_others():
    """Neither those from the end nor the last one."""
    reward, prompt = np.float32([1, 2, 3, 4]), np.int32([0, 7, -1, 1])

    def f(reward, prompt):
        empty = policy.init_prompt_stats(2, 4)
        stats = policy.push_prompt_stats(empty, reward, prompt)
        return (
            stats,
            policy.group_advantage(reward, prompt, 2)[0],
            policy.prompt_advantage(stats, reward, prompt, least=1),
        )

    stats, group, by_prompt = together(f, reward, prompt)
    np.testing.assert_array_equal(stats.count, [1, 1])
    np.testing.assert_array_equal(stats.reward[:, :2], [[1, 0], [4, 0]])
    for advantage in (group, by_prompt):
        assert np.isnan(advantage[1:3]).all()
    assert np.isfinite(by_prompt[[0, 3]]).all()


@pytest.mark.parametrize("clip", [0.0, -1.0, np.nan])
def test_the_width_of_the_band_is_positive(clip):
    with pytest.raises(ValueError, match="clip must be > 0"):
        policy.clipped_surrogate(jnp.zeros(1), jnp.zeros(1), clip=clip)


def test_buffers_keep_the_last_rewards_of_each_prompt():
    history: dict[int, list] = {0: [], 1: [], 2: []}
    rng, stats = np.random.default_rng(0), (np.zeros((3, 4), "f"), np.zeros(3, "i"))

    @jax.jit
    def program(stats, reward, prompt):
        stats = policy.push_prompt_stats(policy.PromptStats(*stats), reward, prompt)
        ones, prompts = jnp.ones(2), jnp.array([0, 1])
        return stats, policy.prompt_advantage(stats, ones, prompts, least=4)

    for _ in range(6):
        prompt = rng.integers(0, 2, 6).astype(np.int32)
        reward = rng.normal(size=6).astype(np.float32)
        for p, r in zip(prompt, reward):
            history[p].append(r)
        stats, advantage = jax.device_get(program(tuple(stats), reward, prompt))
        for p, rewards in history.items():
            kept = stats.reward[p][: len(rewards)]
            np.testing.assert_allclose(sorted(kept), sorted(rewards[-4:]))
            assert int(stats.count[p]) == len(rewards)
    for p in (0, 1):
        last = np.array(history[p][-4:])
        np.testing.assert_allclose(
            advantage[p], (1 - last.mean()) / (last.std() + 1e-6), rtol=1e-4
        )


def test_a_prompt_with_few_rewards_is_standardised_by_the_batch():
    def program(reward, prompt):
        stats = policy.push_prompt_stats(policy.init_prompt_stats(2), reward, prompt)
        advantage = policy.prompt_advantage(stats, reward, prompt, least=16)
        return advantage, policy.standardize(reward)

    advantage, expected = together(program, np.float32([1, 2, 6]), np.int32([0, 0, 1]))
    np.testing.assert_allclose(advantage, expected, rtol=1e-6)


def test_explained_variance():
    target, zero = np.float32([1, 2, 3]), np.zeros(3, np.float32)
    values = together(
        lambda *pairs: [policy.explained_variance(*pair) for pair in pairs],
        (target, target), (zero, target), (zero, zero + 1),
    )  # fmt: skip
    assert [float(v) for v in values] == [1, 0, 0]


@pytest.mark.parametrize("change", [{"mode": "soft"}, {"clip": 0.0}, {"clip": -1.0}])
def test_refusals(change):
    with pytest.raises(ValueError, match="clip"):
        policy.clipped_surrogate(jnp.zeros(2), jnp.zeros(2), **change)


def test_a_ratio_beyond_float32_is_no_nan():
    log_ratio = np.float32([-200.0, 100.0, 200.0, 200.0])
    advantage = np.float32([1.0, -1.0, 0.0, 1.0])

    def program(log_ratio, advantage):
        def total(r, mode):
            return policy.clipped_surrogate(r, advantage, 0.2, mode).sum()

        losses = [jax.value_and_grad(total)(log_ratio, m) for m in policy.CLIPS]
        return losses, policy.ratio_metrics(log_ratio, 0.2)

    values = jax.tree.leaves(together(program, log_ratio, advantage))
    assert all(np.isfinite(v).all() for v in values)
