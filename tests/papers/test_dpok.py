"""DPOK: path KL in closed form, the optimal tilt, updates, rewards, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import hlo
from jaxpapers import mesh as meshes
from jaxpapers import train as trainer
from jaxpapers.config import load_config
from jaxpapers.method import State, only_if
from jaxpapers.nets import diffusion as nets
from jaxpapers.ops import diffusion, policy
from jaxpapers.ops.host import on_host
from jaxpapers.options import from_config
from jaxpapers.papers import dpok
from jaxpapers.papers.dpok import rollouts
from jaxpapers.papers.dpok import value as values
from jaxpapers.papers.dpok.objective import adapt_beta
from tests.contract import Contract
from tests.programs import params_like, together

CONTRACT = Contract(
    small={
        "data.batch": 40, "data.eval_each": 2, "net.width": 16, "net.blocks": 1,
        "net.value": (16,), "sampler.steps": 4, "noise.timesteps": 40,
        "method.transitions": 2, "method.value_transitions": 2,
        "method.policy_steps": 2, "method.value_steps": 4, "method.lora_rank": 2,
        "noise.beta_end": 0.3, "pretrain.optim.lr": 0.02, "optim.weight_decay": 0.0,
    },
    refused={
        "method.clip": ("soft", "clip"),
        "sampler.steps": (7, "divide"),
        "net.model": ("cnn", "net.model"),
    },
    noisy=True,
    falling=("value_loss", 0.9),
    stages=("", "before"),
)  # fmt: skip

BETAS = np.array([0.2, 0.4, 0.6])
SCHEDULE = diffusion.ddpm_schedule(BETAS)
PRE, THETA = np.float32([0.3, 0.1]), np.float32([0.6, -0.5])
PROMPT = np.arange(20, dtype=np.int32) % 10
BATCH = {"tokens": PROMPT + 1, "prompt": PROMPT}
# Cheap to compile and to run.
FEW = {
    "lora_rank": 0, "transitions": 2, "value_transitions": 2, "policy_steps": 3,
    "value_steps": 2,
}  # fmt: skip


# A policy whose noise is linear in the state


def linear_parts():
    """A denoiser that is linear in the state, and a value net that is a constant."""

    def eps(params, x, time, tokens=None, **kwargs):
        return params["theta"][0] * x + params["theta"][1]

    def value(params, x, k, tokens=None):
        return jnp.broadcast_to(params["v"], k.shape)

    return nets.Parts(
        (1,), eps, None, value, lambda key: {"theta": jnp.asarray(PRE)}, None,
        lambda key: {"v": jnp.zeros(())},
    )  # fmt: skip


def linear(reward=lambda x, prompt: x[:, 0], schedule=SCHEDULE, **options):
    options = dpok.Options(**{**FEW, **options})
    bars = diffusion.alpha_bars(BETAS)
    return dpok.Model(linear_parts(), schedule, bars, options, reward)


def params(theta=THETA, pre=PRE, v=0.0):
    return {
        "net": {"theta": theta}, "reference": {"theta": pre},
        "value": {"v": np.float32(v)},
    }  # fmt: skip


def start(model, txs, theta=PRE, v=0.0):
    """A state of the linear policy."""
    first = params(theta, PRE, v)
    opt = {"policy": txs["policy"].init({"net": first["net"]}),
           "value": txs["value"].init(first["value"])}  # fmt: skip
    extra = {"beta": jnp.float32(model.options.beta),
             "stats": policy.init_prompt_stats(10)}  # fmt: skip
    return State(jnp.int32(0), first, opt, extra, jax.random.key(0))


ADAM = {"policy": optax.adam(1e-2), "value": optax.adam(1e-2)}


def updates(model, count=1, txs=ADAM, batches=(BATCH,)):
    """For each batch the initial state, the last one, and metrics of every update."""

    @jax.jit
    def program(batch):
        def step(state, _):
            return dpok.update(state, batch, model=model, txs=txs)

        first = dpok._init(jax.random.key(0), batch, model=model, txs=txs)
        last, metrics = jax.lax.scan(step, first, None, length=count)
        return tuple(s._replace(key=jnp.zeros(())) for s in (first, last)), metrics

    runs = jax.device_get([program(batch) for batch in batches])
    return [(*states, metrics) for states, metrics in runs]


def only(prompt):
    """`BATCH` with a single prompt."""
    row = np.full(20, prompt, np.int32)
    return {"tokens": row + 1, "prompt": row}


def moments(theta, schedule=SCHEDULE, np=np):
    """Means and variances of every state."""
    mean, var, states = 0.0, 1.0, []
    for a, c, std in zip(schedule.x_mult, schedule.eps_mult, schedule.std):
        states.append((mean, var))
        slope = a + c * theta[0]
        mean, var = slope * mean + c * theta[1], slope**2 * var + std**2
    return [*states, (mean, var)]


def path_kl(theta, pre=PRE, schedule=SCHEDULE):
    """Sum over steps of E KL, exactly."""
    total, gap = 0.0, theta - pre
    steps = zip(moments(theta, schedule), schedule.eps_mult, schedule.std)
    for (mean, var), c, std in steps:
        square = (
            gap[0] ** 2 * (var + mean**2) + 2 * gap[0] * gap[1] * mean + gap[1] ** 2
        )
        total = total + c**2 * square / (2 * std**2)
    return total


def last_kl(theta, pre=PRE, schedule=SCHEDULE):
    """KL of the two distributions of the last state."""
    (m, v), (n, w) = moments(theta, schedule)[-1], moments(pre, schedule)[-1]
    return 0.5 * (v / w + (m - n) ** 2 / w - 1 + np.log(w / v))


# Recorded losses


@pytest.mark.parity("diffusion", only=lambda entry: "dpok_total" in entry["arrays"])
def test_recorded_losses(case):
    """``dpok_loss`` itself, through an old policy that has the recorded ratios."""
    z = {n: np.asarray(v, np.float64) for n, v in case.arrays.items()}
    rtol = case.tolerance("float32", otherwise=2e-5)
    schedule = diffusion.ddim_schedule(z["alphas_cumprod"], len(z["timesteps"]))
    k = z["step_index"].astype(np.int32)

    def rows(v):
        return np.asarray(v)[k].reshape(-1, *(1,) * (z["x"].ndim - 1))

    a, c, std = (rows(v) for v in (schedule.x_mult, schedule.eps_mult, schedule.std))
    drawn = (z["x_next"] - a * z["x"] - c * z["eps"]) / std
    # The old noise, scaled: its mean square determines the log-probability.
    square = np.square(drawn).reshape(len(k), -1).mean(1)
    scale = np.sqrt(1 + 2 * np.log(z["ratio"]) / square)
    scale = scale.reshape(-1, *(1,) * (drawn.ndim - 1))
    old = (z["x_next"] - std * scale * drawn - a * z["x"]) / c
    batch = dpok.Transitions(k, z["x"], z["x_next"], old, np.zeros(len(k), np.int32))
    alpha, beta, clip = (float(z[name]) for name in ("alpha", "beta", "clip"))

    def program(eps, batch):
        eps_ref, advantage = (
            jnp.asarray(v) for v in (z["eps_ref"], z["reward"] - z["value"])
        )

        def loss(eps, **options):
            return dpok.dpok_loss(
                lambda x, time, tokens: eps, eps_ref, schedule, batch, advantage,
                clip_eps=clip, reduce="mean", **options,
            )  # fmt: skip

        grad = jax.value_and_grad(loss, has_aux=True)
        released = grad(eps, clip="hard", kl="eps_mse", alpha=alpha, beta=beta)
        return released, grad(eps, clip="ppo", beta=0.0)

    with jax.enable_x64():
        released, ppo = together(program, z["eps"], batch)
    (total, metrics), slope = released
    np.testing.assert_allclose(total, z["dpok_total"], rtol=rtol)
    np.testing.assert_allclose(metrics["ratio"], z["ratio"].mean(), rtol=1e-9)
    np.testing.assert_allclose(
        alpha * metrics["policy_loss"], z["dpok_policy"], rtol=rtol
    )
    np.testing.assert_allclose(metrics["step_kl"], z["kl_step"].mean(), rtol=rtol)
    close(slope, z["dpok_grad_eps"], rtol)
    (total, _), slope = ppo
    np.testing.assert_allclose(total, z["ppo_loss"], rtol=rtol)
    close(slope, z["ppo_grad_eps"], rtol)


def close(value, expected, rtol):
    """Relative, or relative to the largest entry."""
    most = np.abs(expected).max()
    np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol * most)


# The KL divergence and the objective


def test_the_path_kl_bounds_that_of_the_images():
    exact = path_kl(THETA)
    assert last_kl(THETA) < exact
    estimate = together(
        lambda params: dpok.path_kl(
            params, jax.random.key(0), jnp.zeros(100_000, jnp.int32),
            model=linear(guidance=1.0),
        ),
        params(),
    )  # fmt: skip
    assert float(estimate) == pytest.approx(float(exact), rel=0.02)


def one_step(mean, std):
    return diffusion.Schedule(
        *(np.array([v]) for v in (0.0, mean, std, 0.0)), np.ones(2)
    )


def test_one_step_makes_the_bound_an_equality():
    """A step whose mean does not depend on the state determines the distribution."""
    theta, pre, schedule = (
        np.array([0.0, 0.8]),
        np.array([0.0, -0.2]),
        one_step(0.7, 0.5),
    )
    np.testing.assert_allclose(
        path_kl(theta, pre, schedule), last_kl(theta, pre, schedule), rtol=1e-6
    )


def objective(theta, advantage, batch, pre, beta):
    def eps_fn(x, time, tokens):
        return theta[0] * x + theta[1]

    ref = pre[0] * batch.x + pre[1]
    return dpok.dpok_loss(eps_fn, ref, SCHEDULE, batch, advantage, beta=beta)[0]


def test_gradient_of_the_objective_with_and_without_later_kl():
    """'reward' has the whole gradient of (9), 'grad' lacks the states' part."""
    beta, count, steps = 0.5, 200_000, len(SCHEDULE.std)
    model = linear(guidance=1.0)
    batch = {name: np.zeros(count, np.int32) for name in ("tokens", "prompt")}

    def program(params, batch):
        rollout = dpok.draw_rollout(jax.random.key(1), params, batch, model)
        chosen = rollouts.all_transitions(rollout)
        gain = jnp.repeat(rollout.reward, steps)
        later = dpok.later_kl(rollout, params, model).T.reshape(-1)

        def of_trajectory(rows, gain):
            return steps * jax.grad(objective)(
                jnp.asarray(THETA), gain, rows, PRE, beta
            )

        by_trajectory = jax.tree.map(
            lambda v: v.reshape(count, steps, *v.shape[1:]), chosen
        )
        gains = jnp.stack([gain, gain - beta * later]).reshape(2, count, steps)
        of_mode = jax.vmap(of_trajectory, (None, 0))
        grads = jax.vmap(of_mode, (0, 1))(by_trajectory, gains)
        return grads.mean(0), grads.std(0)

    def exact(theta):
        return -moments(theta)[-1][0] + beta * path_kl(theta)

    theta, h = THETA.astype(np.float64), 1e-6 * np.eye(2)
    slope = np.array([exact(theta + d) - exact(theta - d) for d in h]) / 2e-6
    means, stds = together(program, params(), batch)
    errors = np.abs(means - slope) / (stds / np.sqrt(count))
    off = dict(zip(("grad", "reward"), errors))
    assert (off["reward"] < 4).all() and off["grad"].max() > 20, off


def test_optimum_is_the_gaussian_tilt():
    """One step onto N(theta, 1), reward a x: the optimum of (9) is N(a / beta, 1)."""
    slope, beta = 0.6, 0.4
    model = linear(
        lambda x, prompt: slope * x[:, 0], one_step(1.0, 1.0), transitions=1,
        value_transitions=1, guidance=1.0, beta=beta, policy_steps=4, value_steps=5,
    )  # fmt: skip
    # The decay averages out the noise of the gradient.
    rate = optax.exponential_decay(0.2, 200, 0.5)
    txs = {"policy": optax.sgd(rate), "value": optax.sgd(0.1)}
    prompt = np.arange(1000, dtype=np.int32) % 10
    batch = {"tokens": prompt, "prompt": prompt}

    def program(batch):
        zero = jnp.zeros(2)
        state = start(model, txs, zero)
        state = state._replace(params={**state.params, "reference": {"theta": zero}})

        def step(state, _):
            return dpok.update(state, batch, model=model, txs=txs)[0], None

        return jax.lax.scan(step, state, None, length=200)[0].params["net"]["theta"]

    theta = together(program, batch)
    # The state's coefficient is only noise, which the KL removes.
    assert float(theta[1]) == pytest.approx(slope / beta, rel=0.03)
    assert abs(float(theta[0])) < 0.05


# Updates


@pytest.fixture(scope="module")
def config():
    fields = {
        "data.batch": 20, "net.width": 16, "net.blocks": 1, "net.value": "(16,)",
        "sampler.steps": 5, "method.transitions": 2, "method.value_transitions": 2,
        "method.policy_steps": 3, "method.value_steps": 2, "method.lora_rank": 2,
    }  # fmt: skip
    return load_config("dpok:smoke", [f"--config.{k}={v}" for k, v in fields.items()])


def changed(config, **fields):
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(fields)
    return config


def reward(x, prompt):
    return x.mean((1, 2, 3)) + 0.1 * prompt


def tuned(config, compiler=None, **fields):
    """State before and after an update of a denoiser with drawn parameters."""
    method = dpok.make(changed(config, **fields), reward_fn=reward)
    drawn = params_like(lambda: method.init(jax.random.key(0), BATCH).params["net"])

    def program(net, batch):
        first = method.init(jax.random.key(0), batch)
        first = first._replace(params={**first.params, "net": net})
        last, metrics = method.update(first, batch)
        return first.params, last.params, metrics

    return jax.device_get(jax.jit(program, compiler_options=compiler)(drawn, BATCH))


def differs(a, b):
    return any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


MATRIX = functools.partial(pytest.param, marks=pytest.mark.matrix)


# As users compile: at the tests' optimization level rollout and gradient differ in the
# last bit, which c / sigma amplifies.
@pytest.mark.matrix
@pytest.mark.parametrize(
    "dtype, level, most",
    [("float32", 2, 1e-6), ("bfloat16", 2, 1e-2)],
)
def test_an_update_of_adapters(config, dtype, level, most):
    """The first step is on-policy, adapters and value net move, the net does not."""
    compiler = {"xla_backend_optimization_level": level}
    first, last, metrics = tuned(config, compiler, **{"net.dtype": dtype})
    assert float(metrics["first_ratio_deviation"]) < most
    assert float(metrics["path_kl"]) == pytest.approx(0, abs=1e-6)
    assert not differs(first["net"], last["net"])
    assert differs(first["lora"], last["lora"])
    assert differs(first["value"], last["value"])
    assert {f"reward_prompt_{i}" for i in range(10)} <= set(metrics)


@pytest.mark.parametrize("rank", [2, 0])
def test_what_is_trained(config, rank):
    """Adapters or the whole net by the policy's optimizer, the value net by its own."""
    method = dpok.make(changed(config, **{"method.lora_rank": rank}), reward_fn=reward)
    state = jax.eval_shape(method.init, jax.random.key(0), BATCH)
    labels = {
        name: set(jax.tree.leaves(part))
        for name, part in dpok.labels(state.params).items()
    }
    trained, frozen = ("lora", "net") if rank else ("net", "reference")
    assert labels == {trained: {"policy"}, frozen: {"frozen"}, "value": {"adam"}}
    size = sum(v.size for v in jax.tree.leaves(state.params[trained]))
    moments = [v.size for v in jax.tree.leaves(state.opt_state["policy"])]
    assert 2 * size <= sum(moments) <= 2 * size + 4


@pytest.mark.matrix
@pytest.mark.parametrize(
    "options",
    [
        {"rollouts": 2, "kl": "eps_mse", "clip": "hard", "reduce": "mean"},
        MATRIX({"advantage": "prompt"}),
        MATRIX({}),
        MATRIX({"kl_mode": "reward"}),
        MATRIX({"advantage": "batch"}),
        MATRIX({"advantage": "group"}),
        MATRIX({"name": "sft"}),
        MATRIX({"name": "kl_d"}),
    ],
    ids=str,
)
def test_variants(options):
    [(first, last, metrics)] = updates(
        linear(lambda x, prompt: jnp.exp(x[:, 0]), **options), 2
    )
    assert_trained(first, last, metrics)


def assert_trained(first, last, metrics):
    assert all(np.isfinite(v).all() for v in metrics.values())
    assert int(last.step) == 2
    assert (last.params["net"]["theta"] != first.params["net"]["theta"]).all()
    np.testing.assert_array_equal(last.params["reference"]["theta"], PRE)


@pytest.mark.matrix
def test_supervised_updates_refuse_negative_weights():
    def pay(x, prompt):
        return jnp.where(prompt == 3, -5.0, jnp.exp(x[:, 0]))

    model = linear(pay, name="kl_o", reward_shift=2.0)
    trained, refused = updates(model, 2, batches=(only(4), only(3)))
    assert_trained(*trained)
    metrics = trained[2]
    assert (metrics["least_weight"] > 2).all() and (metrics["reward"] > 0).all()
    first, last, metrics = refused
    assert not differs(first.params, last.params)
    assert np.isnan(metrics["least_weight"]).all() and (metrics["reward"] == -5).all()


def host_reward(score):
    def shape(x, prompt):
        return jax.ShapeDtypeStruct(prompt.shape, jnp.float32)

    return on_host(score, shape, finite=True)


@pytest.mark.matrix
@pytest.mark.parametrize("mode", ["reward", MATRIX("grad")])
def test_an_update_follows_the_gradient(mode):
    """One policy step, computed again from the parts: sign and size of the change.

    The reward is on the host: one call per rollout with whole arrays.
    """
    calls, means = [], []

    def score(x, prompt):
        calls.append((x.shape, prompt.shape))
        means.append(x.mean())
        return x[:, 0]

    model = linear(
        host_reward(score), policy_steps=1, transitions=3, value_steps=1, beta=0.5,
        kl_mode=mode,
    )  # fmt: skip
    txs = {"policy": optax.sgd(1.0), "value": optax.sgd(0.0)}

    def program(batch):
        state = start(model, txs, jnp.asarray(THETA), 0.3)
        new, metrics = dpok.update(state, batch, model=model, txs=txs)
        key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)[0]
        rollout = dpok.draw_rollout(key, state.params, batch, model)
        gain = jnp.repeat(rollout.reward, 3) - 0.3
        if mode == "reward":
            later = dpok.later_kl(rollout, state.params, model)
            gain = gain - 0.5 * later.T.reshape(-1)
        rows = rollouts.all_transitions(rollout)
        grads = jax.grad(objective)(jnp.asarray(THETA), gain, rows, PRE, 0.5)
        return new.params["net"]["theta"] - THETA, grads, metrics["reward"]

    moved, grads, mean = together(program, BATCH)
    np.testing.assert_allclose(moved, -grads, rtol=1e-3, atol=1e-5)
    assert calls == 2 * [((20, 1), (20,))]
    np.testing.assert_allclose(means, mean, atol=1e-6)


@pytest.mark.matrix
def test_the_gradient_of_a_host_reward():
    model = linear(host_reward(lambda x, prompt: 2 * x[:, 0] + 0.1 * prompt))

    def program(params, batch):
        loss = functools.partial(dpok.loss, model=model)
        return jax.grad(loss, has_aux=True)(params, batch, jax.random.key(0))[0]

    theta = together(program, params(), BATCH)["net"]["theta"]
    assert np.isfinite(theta).all() and np.abs(theta).min() > 0


@pytest.mark.matrix
def test_beta_follows_its_target_unless_a_reward_is_bad():
    """The first rollout's path KL is 0, below any target; the second's is not."""
    betas = together(
        lambda kl: [
            adapt_beta(jnp.float32(0.01), kl, t) for t in (1e9, 0.1, 1e-4, 0.0)
        ],
        np.float32(0.1),
    )
    np.testing.assert_allclose(betas, [0.005, 0.01, 0.02, 0.01])

    def broken(x, prompt):
        return jnp.where(prompt == 3, jnp.nan, x[:, 0])

    model = linear(broken, kl_target=1e-4, advantage="prompt")
    batches = (only(4), BATCH)
    (first, last, metrics), (before, after, bad) = updates(model, 2, batches=batches)
    assert metrics["path_kl"][0] < 1e-9 < 1e-3 < metrics["path_kl"][1]
    assert metrics["beta"][1] == pytest.approx(0.5 * float(first.extra["beta"]))
    assert float(last.extra["beta"]) == pytest.approx(float(first.extra["beta"]))
    # A reward that is not finite leaves the state alone.
    assert not differs(
        (before.params, before.opt_state), (after.params, after.opt_state)
    )
    assert not np.isfinite(bad["reward"]).any()
    assert not np.isfinite(bad["reward_prompt_3"]).any()
    assert np.isfinite(bad["reward_prompt_2"]).all()


def test_kept_rollouts_replace_the_oldest():
    options = dpok.Options(rollouts=2)

    def rollout(v):
        return rollouts.Rollout(*(jnp.full((2, 3), v, jnp.float32) for _ in range(5)))

    def program():
        pool = jax.tree.map(lambda v: jnp.zeros((2, *v.shape)), rollout(0))
        kept = []
        for step in range(4):
            state = State(jnp.int32(step), {}, {}, {"pool": pool}, None)
            pool, count, last = values.keep_rollout(state, rollout(step + 1), options)
            kept.append((count, last, pool.reward[:, 0, 0]))
        return kept

    kept = together(program)
    assert [(int(count), int(last)) for count, last, _ in kept] == [
        (1, 0), (2, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert [r.tolist() for _, _, r in kept] == [[1, 0], [1, 2], [3, 2], [3, 4]]


def test_advantages_against_numpy():
    pay, prompt = np.float32([1, 2, 4, 8]), np.int32([0, 1, 0, 1])

    def program(pay, prompt):
        rollout = rollouts.Rollout(None, None, None, prompt, pay)
        stats = policy.init_prompt_stats(2)
        state = State(jnp.int32(0), {}, {}, {"stats": stats}, None)
        return {
            mode: values.advantages(
                state, rollout, dpok.Options(advantage=mode, prompts=2)
            )
            for mode in ("batch", "prompt", "group")
        }

    for mode, (advantage, stats, equal) in together(program, pay, prompt).items():
        expected = (pay - pay.mean()) / pay.std()
        if mode == "group":
            expected = np.array([-1.0, -1.0, 1.0, 1.0])
        np.testing.assert_allclose(advantage, expected, rtol=1e-4)
        assert stats.count.tolist() == [2, 2] and float(equal) == 0


def test_advantages_of_transitions():
    def v(params, x, k, tokens):
        return params["a"] * x[:, 0] + k

    model = linear()._replace(parts=linear_parts()._replace(value=v))
    rollout = rollouts.Rollout(None, None, None, None, np.float32([10, 20]))
    k, x = np.int32([2, 0, 1, 2]), np.float32([[1], [2], [3], [4]])
    later = np.float32([[3, 2, 0], [6, 5, 0]])

    def program(k, x, later):
        batch = rollouts.Transitions(k, x, None, None, None)
        return (
            values.value_advantage({"a": 0.5}, rollout, batch, model),
            values.later_cost(later, jnp.array([[2, 0], [1, 1]]), 0.5, 2.0),
        )

    advantage, cost = together(program, k, x, later)
    assert advantage.tolist() == [10 - 2.5, 10 - 1.0, 20 - 2.5, 20 - 4.0]
    assert cost.tolist() == [0.0, 0.75, 1.25, 1.25]


def test_transitions_are_of_their_trajectory():
    states = np.arange(4 * 2, dtype=np.float32).reshape(4, 2, 1)
    rollout = rollouts.Rollout(states, -states[:-1], np.int32([5, 6]), None, None)
    rows = together(dpok.transitions, rollout, np.int32([[2, 0], [1, 2]]))
    assert rows.x[:, 0].tolist() == [4, 0, 3, 5]
    assert rows.x_next[:, 0].tolist() == [6, 2, 5, 7]
    assert rows.eps_old[:, 0].tolist() == [-4, 0, -3, -5]
    assert rows.tokens.tolist() == [5, 5, 6, 6]


def test_only_if_keeps_all_but_the_step():
    def program(good):
        old = State(jnp.int32(3), {"a": jnp.ones(2)}, (), {}, None)
        new = old._replace(params={"a": jnp.zeros(2)})
        return only_if(good, new, old)

    kept, taken = (together(program, np.bool_(good)) for good in (False, True))
    assert int(kept.step) == 4 and kept.params["a"].tolist() == [1, 1]
    assert taken.params["a"].tolist() == [0, 0]


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda x, i: x, r"the shape \(20, 1\), expected \(20,\): one number for each"),
        (lambda x, i: (x[:, 0], {}), "returned a tuple of 2.*return the reward alone"),
        (lambda x, i: {"reward": x[:, 0]}, "returned a dict of 1"),
        (lambda x, i: None, "returned a NoneType"),
        (lambda x, i: [x[:, 0], {}], "a list that is no array of numbers"),
        (lambda x, i: 1j * x[:, 0], "complex64, expected real"),
        (lambda x, i: np.asarray(x)[:, 0], r"wrap it: ops.host.on_host\(reward_fn"),
        (lambda x, i: [float(row[0]) for row in x], "wrap it: ops.host.on_host"),
        (lambda x, i: x[:, 0] if x.sum() > 0 else -x[:, 0], "wrap it"),
        (lambda x, i: [(1.0, 2.0)[k] for k in i], "wrap it"),
    ],
)
def test_rewards_refuse_what_is_no_number_for_each_image(reward, message):
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(
            lambda x, prompt: rollouts.rewards(reward, x, prompt),
            np.zeros((20, 1), np.float32), PROMPT,
        )  # fmt: skip


@pytest.mark.parametrize(
    "reward",
    [
        lambda x, i: x[:, 0] > 0,
        lambda x, i: list(x[:, 0] > 0),
        lambda x, i: (x[:, 0] > 0).astype(jnp.int32),
        lambda x, i: np.zeros(len(x)),
    ],
)
def test_rewards_may_be_any_real_numbers(reward):
    value = jax.eval_shape(
        functools.partial(rollouts.rewards, reward),
        jax.ShapeDtypeStruct((20, 1), jnp.float32), PROMPT,
    )  # fmt: skip
    assert (value.shape, value.dtype) == ((20,), jnp.float32)


def test_kl_d_is_sft_with_a_shifted_reward():
    def eps_fn(x, time, tokens):
        return 0.3 * x

    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    pay, tokens = np.linspace(0, 1, 6, dtype=np.float32), np.ones(6, np.int32)
    bars = diffusion.alpha_bars(diffusion.linear_betas(50))

    def program(x, pay, tokens):
        loss = functools.partial(
            dpok.sft_loss, eps_fn, eps_fn, x, tokens, key=jax.random.key(1),
            alpha_bar=bars,
        )  # fmt: skip
        return {
            "kl_d": loss(pay, mode="kl_d", gamma=0.7), "shifted": loss(pay + 0.7),
            "kl_o": loss(pay, mode="kl_o", gamma=0.7), "sft": loss(pay),
            "negative": loss(pay - 0.5),
        }  # fmt: skip

    losses = together(program, x, pay, tokens)
    assert losses["kl_d"] == losses["shifted"]
    # At the pretrained model the distillation loss of KL-O is zero.
    assert losses["kl_o"] == losses["sft"] and np.isnan(losses["negative"])
    with pytest.raises(ValueError, match="kl_o"):
        jax.eval_shape(
            lambda x, tokens, pay: dpok.sft_loss(
                eps_fn, eps_fn, x, tokens, pay, jax.random.key(1), alpha_bar=bars,
                mode="rwr",
            ), x, tokens, pay,
        )  # fmt: skip


# Devices


@pytest.mark.matrix
def test_devices_share_the_trajectories(config):
    """Eight devices draw and train an eighth each, and exchange no images."""
    config = changed(config, **{"data.batch": 80})
    method = dpok.make(config, reward_fn=reward)
    rows = jax.ShapeDtypeStruct((80,), jnp.int32)
    shapes = {"tokens": rows, "prompt": rows}
    compiled = {
        count: trainer.compile(
            method, meshes.make_mesh({"data": count}, jax.devices()[:count]), shapes
        ).executable
        for count in (1, 8)
    }
    flops = {n: x.cost_analysis()["flops"] for n, x in compiled.items()}
    assert flops[8] < 0.25 * flops[1]
    sent = hlo.collectives(compiled[8].as_text())
    images = [c for c in sent if c.kind != "all-reduce" and c.elements >= 10 * 64]
    assert sent and not images


@pytest.mark.matrix
@pytest.mark.programs(30)  # An update on one and on eight devices, with its arrays.
def test_a_host_reward_on_several_devices(config):
    """One call, with all images of a rollout; the numbers of one device."""
    config, ends, calls = changed(config, **{"data.batch": 80}), [], []

    def score(x, prompt):
        calls.append(len(x))
        return x.reshape(len(x), -1).mean(1) + 0.1 * prompt

    method = dpok.make(config, reward_fn=host_reward(score))
    prompt = np.arange(80, dtype=np.int32) % 10
    batch = {"tokens": prompt + 1, "prompt": prompt}
    for count in (1, 8):
        mesh = meshes.make_mesh({"data": count}, jax.devices()[:count])
        compiled = trainer.compile(method, mesh, batch)
        state = compiled.init(jax.random.key(0))
        placed = meshes.put_batch(batch, mesh, config.data.batch)
        state, metrics = compiled.executable(state, placed)
        ends.append(jax.device_get((state.params, metrics["reward"])))
    assert calls == [80, 80]
    for a, b in zip(*map(jax.tree.leaves, ends)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.programs(60)  # Two U-Nets and their arrays on one and four devices.
def test_a_unet_is_a_policy(config):
    """An update of images: on-policy at first, the same numbers on four devices."""
    config = changed(
        config,
        **{
            "net.model": "unet", "net.shape": (4, 4, 1), "net.channels": 8,
            "net.multipliers": (1,), "net.attention": (0,), "net.groups": 4,
            "sampler.steps": 2, "method.policy_steps": 1, "method.transitions": 1,
            "method.value_steps": 1, "method.value_transitions": 1,
            "method.lora_rank": 0, "optim.name": "sgd", "optim.lr": 0.1,
            "optim.weight_decay": 0.0,
        },
    )  # fmt: skip
    method = dpok.make(config, reward_fn=lambda x, prompt: x.mean((1, 2, 3)))
    # The last layer is initialised to zero, which leaves the others without a gradient.
    before = params_like(lambda: method.init(jax.random.key(0), BATCH).params["net"])
    ends = []
    for count in (1, 4):
        mesh = meshes.make_mesh({"data": count}, jax.devices()[:count])
        compiled = trainer.compile(method, mesh, BATCH)
        first = compiled.init(jax.random.key(0))
        drawn = {**first.params, "net": before, "reference": before}
        first = first._replace(
            params=jax.tree.map(
                lambda v, old: jax.device_put(np.array(v), old.sharding),
                drawn,
                first.params,
            )
        )
        placed = meshes.put_batch(BATCH, mesh, config.data.batch)
        state, metrics = compiled.executable(first, placed)
        # Not 1e-6: see the first policy step above.
        assert float(metrics["first_ratio_deviation"]) < 1e-3
        ends.append(jax.device_get((state.params["net"], metrics["reward"])))
    for a, b in zip(*map(jax.tree.leaves, ends)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: (a != b).any(), before, ends[0][0])
    assert all(jax.tree.leaves(moved))


# Configs


def test_the_reference_preset_is_the_released_code():
    """Its clip, band, reduction, KL, weights and optimizer."""
    c = load_config("dpok:reference")
    options = {name: c.method[name] for name in ("clip", "clip_eps", "reduce", "kl")}
    assert options == {
        "clip": "hard", "clip_eps": 1e-4, "reduce": "mean", "kl": "eps_mse",
    }  # fmt: skip
    assert (c.method.alpha, c.method.beta, c.method.policy_steps) == (10, 0.01, 5)
    assert (c.optim.lr, c.optim.weight_decay, c.optim.clip) == (1e-5, 0.0, 0.1)
    # 1,000 transitions of 20 steps and 100 prompts are two rollouts, or half of one.
    assert c.optim.value_lr == 1e-4 and c.method.rollouts == 2


def test_defaults_are_those_of_the_config():
    """In a notebook ``dpok.model()`` is what ``jaxpapers train dpok`` trains."""
    c = load_config("dpok")
    fields = {f.name for f in dataclasses.fields(dpok.Options)}
    options = {k: v for k, v in c.method.items() if k in fields}
    assert from_config(dpok.Options, options, "method") == dpok.Options()
    assert from_config(dpok.NoiseSchedule, c.noise, "noise") == dpok.NOISE
    assert from_config(dpok.Sampler, c.sampler, "sampler") == dpok.SAMPLER
    used = {"model", "shape", "vocab", "width", "blocks", "dtype", "value"}
    net = dataclasses.asdict(dpok.NET)
    assert {k: net[k] for k in used} == {k: c.net[k] for k in used}


def test_pretraining_reads_its_own_fields():
    config = load_config("dpok")
    before = dpok.pretraining(config)
    assert dpok.pretraining(before) is None
    assert set(before) == {
        "data", "net", "noise", "sampler", "optim", "method", "train",
    }  # fmt: skip
    assert before.method.to_dict() == {
        "stage": "pretrain", "ema": 0.998, "drop": 0.1, "guidance": 2.0,
    }  # fmt: skip
    assert (before.data.batch, before.train.steps) == (128, 4000)
    assert before.optim == config.pretrain.optim and "value" not in before.net
    tuned = changed(
        config, **{"method.beta": 0.0, "method.name": "sft", "optim.lr": 1.0}
    )
    assert dpok.pretraining(tuned) == before
    assert dpok.pretraining(changed(config, **{"net.width": 8})) != before
    assert dpok.pretraining(changed(config, **{"train.init_from": "runs/a"})) is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method.stage": "train"}, "stage"),
        ({"method.name": "ddpo"}, "method.name"),
        ({"method.alpha": -1.0}, "alpha"),
        ({"method.beta": -1.0}, "beta"),
        ({"method.clip_eps": 0.0}, "clip_eps"),
        ({"method.clip": "soft"}, "clip"),
        ({"method.kl": "js"}, "method.kl"),
        ({"method.advantage": "gae"}, "advantage"),
        ({"sampler.steps": 7}, "divide"),
        ({"sampler.eta": 0.0}, "no density"),
        ({"method.transitions": 6}, "transitions"),
        ({"method.policy_steps": 0}, "policy_steps"),
        ({"method.lora_match": "nothing"}, "nothing"),
        ({"method.kl_mode": "reward", "method.rollouts": 2}, "rollouts > 1"),
        ({"method.advantage": "group", "method.rollouts": 2}, "rollouts > 1"),
        ({"method.kl_mode": "reward", "method.kl": "eps_mse"}, "nats"),
        ({"method.kl_mode": "reward", "method.alpha": 0.0}, "alpha > 0"),
        ({"method.kl_target": 1.0, "method.beta": 0.0}, "kl_target"),
        ({"method.advantage": "group", "method.prompts": 11}, "one prompt"),
        ({"method.reward": "none such"}, "reward"),
        ({"method.guidance": float("nan")}, "guidance"),
        ({"method.stage": "pretrain", "pretrain.drop": 1.0}, "drop"),
        ({"optim.weight_decay": -1.0}, "weight_decay"),
        ({"train.accumulate": 2}, "accumulate"),
        ({"net.vocab": 0}, "vocab"),
        ({"optim.lr": 0.0}, "lr"),
        ({"optim.value_lr": 0.0}, "value_lr"),
    ],
    ids=str,
)
def test_refusals(config, fields, message):
    config = changed(config, **fields)
    with pytest.raises(ValueError, match=message):
        method = dpok.make(config, reward_fn=reward)
        jax.eval_shape(method.init, jax.random.key(0), BATCH)


def test_a_method_without_a_reward_says_so(config):
    with pytest.raises(ValueError, match="reward_fn"):
        dpok.make(config)
    method = dpok.make(changed(config, **{"method.reward": "none"}))
    assert method.sampler is not None
    with pytest.raises(ValueError, match="without a reward"):
        state = jax.eval_shape(method.init, jax.random.key(0), BATCH)
        jax.eval_shape(method.update, state, BATCH)
