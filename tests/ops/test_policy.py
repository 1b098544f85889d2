"""Policy gradients: recorded losses, surrogates, advantages, statistics by prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxpapers.ops import diffusion, policy


@pytest.mark.parity("diffusion", only=lambda entry: "dpok_total" in entry["arrays"])
def test_recorded_clipped_losses_and_gradients(case):
    folder, name, _ = case
    z = np.load(folder / f"{name}.npz")
    bars, steps = np.asarray(z["alphas_cumprod"], np.float64), len(z["timesteps"])
    chain = diffusion.ddim_schedule(bars, steps)
    k = jnp.asarray(z["step_index"], jnp.int32)
    x, x_next, eps, ref = (jnp.asarray(z[n]) for n in ("x", "x_next", "eps", "eps_ref"))
    clip, advantage = float(z["clip"]), jnp.asarray(z["reward"] - z["value"])

    def log_ratio(eps):
        score = diffusion.step_log_prob(chain, k, x, x_next, eps, "mean")
        # Recorded log-probabilities, whose rounding the narrow band sees; our gradient.
        return score + lax.stop_gradient(z["log_prob"] - score) - z["old_log_prob"]

    np.testing.assert_allclose(jnp.exp(log_ratio(eps)), z["ratio"], rtol=2e-5)

    def dpok(eps):
        surrogate = policy.clipped_surrogate(log_ratio(eps), advantage, clip, "hard")
        own = float(z["alpha"]) * surrogate.mean()
        kl = float(z["beta"]) * jnp.square(eps - ref).mean()
        return own + kl, (own, kl)

    (total, parts), grad = jax.value_and_grad(dpok, has_aux=True)(eps)
    np.testing.assert_allclose(parts[0], z["dpok_policy"], rtol=2e-5)
    np.testing.assert_allclose(total, z["dpok_total"], rtol=2e-5)
    most = np.abs(z["dpok_grad_eps"]).max()
    np.testing.assert_allclose(grad, z["dpok_grad_eps"], rtol=2e-5, atol=2e-5 * most)
    outside = np.abs(z["ratio"] - 1) > clip
    only = jax.grad(lambda e: dpok(e)[1][0])(eps)
    assert outside.any() and not np.asarray(only)[outside].any()

    def ppo(eps):
        return policy.clipped_surrogate(log_ratio(eps), advantage, clip).mean()

    value, grad = jax.value_and_grad(ppo)(eps)
    np.testing.assert_allclose(value, z["ppo_loss"], rtol=2e-5)
    most = np.abs(z["ppo_grad_eps"]).max()
    np.testing.assert_allclose(grad, z["ppo_grad_eps"], rtol=2e-5, atol=2e-5 * most)


def test_where_each_clip_lets_a_gradient_through():
    log_ratio = jnp.log(jnp.array([0.5, 0.5, 1.0, 1.5, 1.5]))
    advantage = jnp.array([1.0, -1.0, 1.0, 1.0, -1.0])

    def flows(mode):
        def total(r):
            return policy.clipped_surrogate(r, advantage, 0.2, mode).sum()

        return np.asarray(jax.grad(total)(log_ratio)) != 0

    # PPO stops what went far enough the right way, and pulls back the rest.
    assert flows("ppo").tolist() == [True, False, True, False, True]
    assert flows("hard").tolist() == [False, False, True, False, False]
    assert flows("none").all()


def test_surrogate_at_the_old_policy_is_reinforce():
    score = jnp.array([-1.0, -2.0, 0.5])
    advantage = jnp.array([2.0, -1.0, 0.3])
    grads = [
        jax.grad(lambda s: policy.reinforce(s, advantage).sum())(score),
        *(
            jax.grad(
                lambda s, m=mode: policy.clipped_surrogate(
                    s - lax.stop_gradient(s), advantage, 0.1, m
                ).sum()
            )(score)
            for mode in policy.CLIPS
        ),
    ]
    for grad in grads:
        np.testing.assert_allclose(grad, -advantage, rtol=1e-6)


def test_ratio_metrics():
    found = policy.ratio_metrics(jnp.log(jnp.array([1.0, 0.5, 2.0, 1.05])), 0.1)
    assert float(found["ratio"]) == pytest.approx(4.55 / 4)
    assert float(found["ratio_deviation"]) == pytest.approx(1.0)
    assert float(found["clip_fraction"]) == pytest.approx(0.5)
    squares = (1 + 0.25 + 4 + 1.05**2) / 4
    assert float(found["ratio_ess"]) == pytest.approx((4.55 / 4) ** 2 / squares)


def test_to_go_leaves_a_step_itself_out():
    cost = jnp.array([[1.0], [2.0], [4.0]])
    np.testing.assert_allclose(policy.to_go(cost)[:, 0], [6, 4, 0])


def test_path_kl_of_two_constant_policies():
    """A difference c of predictions costs |eps_mult c / std|^2 / 2 a step and number."""
    bars = diffusion.alpha_bars(diffusion.linear_betas(50))
    chain = diffusion.ddim_schedule(bars, 5, eta=1.0)
    found = policy.path_kl(
        jax.random.key(0),
        lambda x, time: jnp.zeros_like(x),
        lambda x, time: jnp.full_like(x, 0.5),
        chain,
        (3, 2),
    )
    expected = 2 * (0.5 * np.square(0.5 * chain.eps_mult / chain.std)).sum()
    np.testing.assert_allclose(found, np.full(3, expected), rtol=1e-5)


def test_group_advantage_against_numpy():
    reward = jnp.array([1.0, 3.0, 2.0, 2.0, 5.0])
    prompt = jnp.array([0, 0, 2, 2, 3])
    found, equal = policy.group_advantage(reward, prompt, 4)
    np.testing.assert_allclose(found, [-1, 1, 0, 0, 0], atol=1e-4)
    assert float(equal) == pytest.approx(2 / 3)


def test_rings_keep_the_last_rewards_of_each_prompt():
    stats, seen = policy.init_prompt_stats(3, 4), {0: [], 1: [], 2: []}
    push = jax.jit(policy.push_prompt_stats)
    rng = np.random.default_rng(0)
    for _ in range(6):
        prompt = rng.integers(0, 2, 6)
        reward = rng.normal(size=6).astype(np.float32)
        for p, r in zip(prompt, reward):
            seen[p].append(r)
        stats = push(stats, jnp.asarray(reward), jnp.asarray(prompt, jnp.int32))
        for p, rewards in seen.items():
            kept = np.asarray(stats.reward[p])[: len(rewards)]
            np.testing.assert_allclose(sorted(kept), sorted(rewards[-4:]))
            assert int(stats.count[p]) == len(rewards)
    found = policy.prompt_advantage(
        stats, jnp.array([1.0, 1.0]), jnp.array([0, 1]), least=4
    )
    for p in (0, 1):
        last = np.array(seen[p][-4:])
        np.testing.assert_allclose(
            found[p], (1 - last.mean()) / (last.std() + 1e-6), rtol=1e-4
        )


def test_a_prompt_with_few_rewards_is_standardised_by_the_batch():
    stats = policy.init_prompt_stats(2)
    reward, prompt = jnp.array([1.0, 2.0, 6.0]), jnp.array([0, 0, 1])
    stats = policy.push_prompt_stats(stats, reward, prompt)
    found = policy.prompt_advantage(stats, reward, prompt, least=16)
    np.testing.assert_allclose(found, policy.standardize(reward), rtol=1e-6)


def test_explained_variance():
    target = jnp.array([1.0, 2.0, 3.0])
    assert float(policy.explained_variance(target, target)) == 1
    assert float(policy.explained_variance(jnp.zeros(3), target)) == 0
    assert float(policy.explained_variance(jnp.zeros(3), jnp.ones(3))) == 0


@pytest.mark.parametrize("change", [{"mode": "soft"}, {"clip": 0.0}, {"clip": -1.0}])
def test_refusals(change):
    with pytest.raises(ValueError, match="clip"):
        policy.clipped_surrogate(jnp.zeros(2), jnp.zeros(2), **change)


def test_a_ratio_beyond_float32_is_no_nan():
    log_ratio = jnp.array([-200.0, 100.0, 200.0, 200.0])
    advantage = jnp.array([1.0, -1.0, 0.0, 1.0])
    for mode in policy.CLIPS:
        value, grad = jax.value_and_grad(
            lambda r, m=mode: policy.clipped_surrogate(r, advantage, 0.2, m).sum()
        )(log_ratio)
        assert np.isfinite(float(value)) and np.isfinite(grad).all()
    found = policy.ratio_metrics(log_ratio, 0.2)
    assert all(np.isfinite(float(v)) for v in found.values())
