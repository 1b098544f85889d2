"""DPOK: paths' KL in closed form, the optimal tilt, rounds, rewards, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import hlo, papers, run
from jaxpapers import mesh as meshes
from jaxpapers import train as trainer
from jaxpapers.method import only_if
from jaxpapers.nets import diffusion as nets
from jaxpapers.ops import diffusion, policy
from jaxpapers.ops.host import on_host
from jaxpapers.papers import dpok
from jaxpapers.papers.dpok import baseline, rounds
from tests.contract import Contract

CONTRACT = Contract(
    small={
        "data.batch": 40, "data.eval_each": 2, "net.width": 16, "net.blocks": 1,
        "net.value": (16,), "method.steps": 4, "method.timesteps": 40,
        "method.transitions": 2, "method.value_transitions": 2,
        "method.policy_steps": 2, "method.value_steps": 4, "method.lora_rank": 2,
        "method.beta_end": 0.3, "pretrain.optim.lr": 0.02,
    },
    refused={
        "method.clip": ("soft", "clip"),
        "method.steps": (7, "divide"),
        "net.model": ("cnn", "net.model"),
    },
    noisy=True,
    falling=("value_loss", 0.9),
    stages=("", "before"),
)  # fmt: skip

CHAIN = diffusion.ddpm_chain(np.array([0.2, 0.4, 0.6]))
PRE, THETA = jnp.array([0.3, 0.1]), jnp.array([0.6, -0.5])


def moments(theta, chain=CHAIN):
    """Means and variances of every state of a linear policy's chain."""
    mean, var, found = jnp.zeros(()), jnp.ones(()), []
    for a, c, std in zip(chain.x_mult, chain.eps_mult, chain.std):
        found.append((mean, var))
        slope = a + c * theta[0]
        mean, var = slope * mean + c * theta[1], slope**2 * var + std**2
    return [*found, (mean, var)]


def path_kl(theta, pre=PRE, chain=CHAIN):
    """Sum over steps of E KL, exactly."""
    total, gap = 0.0, theta - pre
    for (mean, var), c, std in zip(moments(theta, chain), chain.eps_mult, chain.std):
        square = (
            gap[0] ** 2 * (var + mean**2) + 2 * gap[0] * gap[1] * mean + gap[1] ** 2
        )
        total = total + c**2 * square / (2 * std**2)
    return total


def last_kl(theta, pre=PRE, chain=CHAIN):
    """KL of the two laws of the last state."""
    (m, v), (n, w) = moments(theta, chain)[-1], moments(pre, chain)[-1]
    return 0.5 * (v / w + (m - n) ** 2 / w - 1 + jnp.log(w / v))


def parts():
    """A denoiser that is linear in the state, and a value net that is one number."""

    def eps(params, x, time, word=None, **kwargs):
        return params["theta"][0] * x + params["theta"][1]

    def value(params, x, k, word=None):
        return jnp.broadcast_to(params["v"], k.shape)

    return nets.Parts(
        (1,), eps, None, value, lambda key: {"theta": PRE}, None,
        lambda key: {"v": jnp.zeros(())},
    )  # fmt: skip


@pytest.fixture(scope="module")
def config():
    fields = {
        "data.batch": 20, "net.width": 16, "net.blocks": 1, "net.value": "(16,)",
        "method.steps": 5, "method.transitions": 2, "method.value_transitions": 2,
        "method.policy_steps": 3, "method.value_steps": 2, "method.lora_rank": 2,
    }  # fmt: skip
    return run.load_config(
        "dpok:smoke", [f"--config.{k}={v}" for k, v in fields.items()]
    )


def changed(config, **fields):
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(fields)
    return config


def bound(config, chain=CHAIN, reward=lambda x, prompt: x[:, 0], **fields):
    c = changed(config, **{f"method.{k}": v for k, v in fields.items()}).method
    c.steps = len(chain.std)
    return dpok.Bound(parts(), chain, c, reward)


def params(theta=THETA, pre=PRE):
    return {
        "net": {"theta": theta}, "reference": {"theta": pre}, "value": {"v": 0.0},
    }  # fmt: skip


@pytest.mark.parity("diffusion", only=lambda entry: "dpok_total" in entry["arrays"])
def test_recorded_losses_of_the_whole_function(case):
    """``dpok_loss`` itself, through an old policy that had the recorded ratios."""
    folder, name, _ = case
    with jax.enable_x64(), np.load(folder / f"{name}.npz") as file:
        z = {n: np.asarray(v, np.float64) for n, v in file.items()}
        chain = diffusion.ddim_chain(z["alphas_cumprod"], len(z["timesteps"]))
        k = z["step_index"].astype(int)

        def rows(v):
            return np.asarray(v)[k].reshape(-1, *(1,) * (z["x"].ndim - 1))

        a, c, std = (rows(v) for v in (chain.x_mult, chain.eps_mult, chain.std))
        drawn = (z["x_next"] - a * z["x"] - c * z["eps"]) / std
        # The old noise, longer or shorter: the mean square says how probable it was.
        square = np.square(drawn).reshape(len(k), -1).mean(1)
        scale = np.sqrt(1 + 2 * np.log(z["ratio"]) / square)
        scale = scale.reshape(-1, *(1,) * (drawn.ndim - 1))
        old = (z["x_next"] - std * scale * drawn - a * z["x"]) / c
        batch = dpok.Transitions(
            jnp.asarray(k, jnp.int32), *map(jnp.asarray, (z["x"], z["x_next"], old)),
            jnp.zeros(len(k), jnp.int32),
        )  # fmt: skip
        advantage = jnp.asarray(z["reward"] - z["value"])

        def loss(eps, **options):
            return dpok.dpok_loss(
                lambda x, time, word: eps, jnp.asarray(z["eps_ref"]), chain, batch,
                advantage, clip_eps=float(z["clip"]), reduce="mean", **options,
            )  # fmt: skip

        grad = jax.value_and_grad(loss, has_aux=True)
        eps = jnp.asarray(z["eps"])
        released = {"clip": "hard", "kl": "eps_mse", "alpha": float(z["alpha"]),
                    "beta": float(z["beta"])}  # fmt: skip
        (total, metrics), slope = grad(eps, **released)
        np.testing.assert_allclose(total, z["dpok_total"], rtol=2e-5)
        np.testing.assert_allclose(metrics["ratio"], z["ratio"].mean(), rtol=1e-9)
        policy_part = float(z["alpha"]) * metrics["policy_loss"]
        np.testing.assert_allclose(policy_part, z["dpok_policy"], rtol=2e-5)
        np.testing.assert_allclose(metrics["step_kl"], z["kl_step"].mean(), rtol=2e-5)
        close(slope, z["dpok_grad_eps"])
        (total, _), slope = grad(eps, clip="ppo", beta=0.0)
        np.testing.assert_allclose(total, z["ppo_loss"], rtol=2e-5)
        close(slope, z["ppo_grad_eps"])


def close(found, expected):
    """To 2e-5, of the largest number where others are small."""
    most = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * most)


def test_the_paths_kl_bounds_that_of_the_pictures(config):
    exact = path_kl(THETA)
    assert float(last_kl(THETA)) < float(exact)
    found = dpok.path_kl(
        params(), jax.random.key(0), jnp.zeros(100_000, jnp.int32),
        bound=bound(config, guidance=1.0),
    )  # fmt: skip
    assert float(found) == pytest.approx(float(exact), rel=0.02)


def test_one_step_makes_the_bound_an_equality():
    """A step whose mean does not depend on the state is all of the law."""
    chain = diffusion.Chain(*(np.array([v]) for v in (0.0, 0.7, 0.5, 0.0)), np.ones(2))
    theta, pre = jnp.array([0.0, 0.8]), jnp.array([0.0, -0.2])
    np.testing.assert_allclose(
        path_kl(theta, pre, chain), last_kl(theta, pre, chain), rtol=1e-6
    )


def objective(theta, advantage, batch, pre, beta):
    def eps_fn(x, time, word):
        return theta[0] * x + theta[1]

    ref = pre[0] * batch.x + pre[1]
    return dpok.dpok_loss(eps_fn, ref, CHAIN, batch, advantage, beta=beta)[0]


@pytest.mark.parametrize("mode", ["grad", "reward"])
def test_gradient_of_the_objective_with_and_without_later_kl(config, mode):
    """'reward' has the whole gradient of (9), 'grad' lacks the states' part."""
    beta, count = 0.5, 200_000
    b = bound(config, guidance=1.0, kl_mode=mode)
    batch = {"word": jnp.zeros(count, jnp.int32), "prompt": jnp.zeros(count, jnp.int32)}
    found = dpok.take_round(jax.random.key(1), params(), batch, b)
    steps = len(CHAIN.std)
    chosen = dpok.transitions(found, jnp.tile(jnp.arange(steps)[None], (count, 1)))
    gain = jnp.repeat(found.reward, steps)
    if mode == "reward":
        gain = gain - beta * dpok.later_kl(found, params(), b).T.reshape(-1)

    def chain_gradient(rows, gain):
        grads = jax.grad(objective)(THETA, gain, rows, PRE, beta)
        return steps * grads

    by_chain = jax.tree.map(lambda v: v.reshape(count, steps, *v.shape[1:]), chosen)
    grads = jax.jit(jax.vmap(chain_gradient))(by_chain, gain.reshape(count, steps))

    def exact(theta):
        return -moments(theta)[-1][0] + beta * path_kl(theta)

    error = grads.std(0) / np.sqrt(count)
    off = jnp.abs(grads.mean(0) - jax.grad(exact)(THETA)) / error
    if mode == "reward":
        assert (off < 4).all(), off
    else:
        assert float(off.max()) > 20, off


def test_optimum_is_the_gaussian_tilt(config):
    """One step onto N(theta, 1), reward a x: the optimum of (9) is N(a / beta, 1)."""
    slope, beta = 0.6, 0.4
    chain = diffusion.Chain(*(np.array([v]) for v in (0.0, 1.0, 1.0, 0.0)), np.ones(2))
    c = changed(
        config, **{
            "method.steps": 1, "method.transitions": 1, "method.value_transitions": 1,
            "method.guidance": 1.0, "method.beta": beta, "method.lora_rank": 0,
            "method.policy_steps": 4,
        },
    ).method  # fmt: skip
    b = dpok.Bound(parts(), chain, c, lambda x, prompt: slope * x[:, 0])
    # Averages out the noise of the gradient.
    rate = optax.exponential_decay(0.2, 200, 0.5)
    txs = {"policy": optax.sgd(rate), "value": optax.sgd(0.1)}
    start = jnp.array([0.0, 0.0])
    own = {"net": {"theta": start}}
    state = dpok.State(
        jnp.zeros((), jnp.int32), params(start, start),
        {"policy": txs["policy"].init(own), "value": txs["value"].init({"v": 0.0})},
        {"beta": jnp.asarray(beta), "stats": dpok.policy.init_prompt_stats(10)},
        jax.random.key(0),
    )  # fmt: skip
    state = jax.tree.map(jnp.asarray, state)
    prompt = jnp.arange(2000) % 10
    batch = {"word": prompt, "prompt": prompt}

    def step(state, _):
        return dpok.update(state, batch, bound=b, txs=txs)[0], None

    last = jax.jit(lambda s: jax.lax.scan(step, s, None, length=200)[0])(state)
    # The state's coefficient is noise of the start, which the KL takes away.
    theta = last.params["net"]["theta"]
    assert float(theta[1]) == pytest.approx(slope / beta, rel=0.03)
    assert abs(float(theta[0])) < 0.05


def on_host_reward(score):
    def shape(x, prompt):
        return jax.ShapeDtypeStruct(prompt.shape, jnp.float32)

    return on_host(score, shape, finite=True)


def reward(x, prompt):
    return x.mean((1, 2, 3)) + 0.1 * prompt


def batch_of(config, seed=0):
    prompt = jnp.arange(config.data.batch, dtype=jnp.int32) % 10
    return {"word": prompt + 1, "prompt": prompt}


def one_round(config, reward_fn=reward, rounds_=1, compiler=None, **fields):
    config = changed(config, **fields)
    method = dpok.make(config, reward_fn=reward_fn)
    batch = batch_of(config)
    start = method.init(jax.random.key(0), batch)
    # The last layer starts at zero; a drawn net has something to adapt.
    net = jax.tree.map(
        lambda v: v + 0.02 * jax.random.normal(jax.random.key(9), v.shape),
        start.params["net"],
    )
    start = start._replace(params={**start.params, "net": net})
    if "reference" in start.params:
        start.params["reference"] = net
    state, update = start, jax.jit(method.update, compiler_options=compiler)
    for _ in range(rounds_):
        state, metrics = update(state, batch)
    return start, state, metrics


def light_round(config, reward_fn=None, rounds_=1, **fields):
    """Rounds of the linear policy, which compile in a second."""
    fields = {"method.lora_rank": 0, "method.steps": 3, **fields}
    c = changed(config, **fields).method
    b = dpok.Bound(parts(), CHAIN, c, reward_fn or (lambda x, prompt: x[:, 0]))
    txs = {"policy": optax.adam(1e-2), "value": optax.adam(1e-2)}
    batch = batch_of(config)
    start = dpok._init(jax.random.key(0), batch, parts=b.parts, options=c, txs=txs)
    state = start
    step = jax.jit(functools.partial(dpok.update, bound=b, txs=txs))
    for _ in range(rounds_):
        state, metrics = step(state, batch)
    return start, state, metrics


@pytest.mark.parametrize("dtype, most", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_the_first_policy_step_is_on_policy(config, dtype, most):
    # As users compile it: without optimisation, as other tests are compiled, rollout and
    # gradient differ in the last bit, which c / sigma enlarges.
    compiler = {"xla_backend_optimization_level": 2}
    _, _, metrics = one_round(config, compiler=compiler, **{"net.dtype": dtype})
    assert float(metrics["first_ratio_deviation"]) < most
    assert float(metrics["path_kl"]) == pytest.approx(0, abs=1e-6)


def test_adapters_move_and_the_frozen_net_does_not(config):
    start, state, metrics = one_round(config)
    for a, b in zip(*(jax.tree.leaves(s.params["net"]) for s in (start, state))):
        np.testing.assert_array_equal(a, b)
    for name in ("lora", "value"):
        assert float(jnp.abs(jax.tree.leaves(state.params[name])[0]).max()) > 0
        pairs = zip(*(jax.tree.leaves(s.params[name]) for s in (start, state)))
        assert any((a != b).any() for a, b in pairs)
    labels = dpok.labels(state.params)
    assert set(jax.tree.leaves(labels["net"])) == {"frozen"}
    assert {f"reward_prompt_{i}" for i in range(10)} <= set(metrics)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method.rounds": 2},
        {"method.advantage": "batch"},
        {"method.advantage": "prompt"},
        {"method.advantage": "group"},
        {"method.kl_mode": "reward"},
        {"method.kl": "eps_mse", "method.clip": "hard", "method.reduce": "mean"},
        {"method.kl_target": 1.0},
        {"method.name": "sft"},
        {"method.name": "kl_d"},
        {"method.name": "kl_o"},
    ],
)
def test_variants(config, fields):
    start, state, metrics = light_round(
        config, lambda x, prompt: jnp.exp(x[:, 0]), 2, **fields
    )
    assert all(np.isfinite(float(v)) for v in metrics.values())
    assert int(state.step) == 2
    assert (state.params["net"]["theta"] != start.params["net"]["theta"]).all()
    np.testing.assert_array_equal(state.params["reference"]["theta"], PRE)


def test_devices_share_the_chains_out(config):
    """Eight devices draw and train an eighth each, and send no pictures."""
    config = changed(config, **{"data.batch": 80})
    method = dpok.make(config, reward_fn=reward)
    shapes = jax.eval_shape(lambda: batch_of(config))
    compiled = {
        count: trainer.compile(
            method, meshes.make_mesh({"data": count}, jax.devices()[:count]), shapes
        ).executable
        for count in (1, 8)
    }
    flops = {n: x.cost_analysis()["flops"] for n, x in compiled.items()}
    assert flops[8] < 0.25 * flops[1]
    sent = hlo.collectives(compiled[8].as_text())
    pictures = [c for c in sent if c.kind != "all-reduce" and c.elements >= 10 * 64]
    assert sent and not pictures


@pytest.mark.slow
def test_a_unet_is_a_policy(config):
    """A round of pictures: on-policy at first, the same numbers on four devices."""
    config = changed(
        config,
        **{
            "net.model": "unet", "net.shape": (4, 4, 1), "net.channels": 8,
            "net.multipliers": (1,), "net.attention": (0,), "net.groups": 4,
            "method.steps": 2, "method.policy_steps": 1, "method.transitions": 1,
            "method.value_steps": 1, "method.value_transitions": 1,
            "method.lora_rank": 0, "optim.name": "sgd", "optim.lr": 0.1,
            "optim.weight_decay": 0.0,
        },
    )  # fmt: skip
    method = dpok.make(config, reward_fn=lambda x, prompt: x.mean((1, 2, 3)))
    batch, ends = batch_of(config), []
    for count in (1, 4):
        mesh = meshes.make_mesh({"data": count}, jax.devices()[:count])
        compiled = trainer.compile(method, mesh, batch)
        start = compiled.init(jax.random.key(0))
        # The last layer starts at zero, which keeps the others from having a gradient.
        before = jax.tree.map(
            lambda v: v + 0.02 * jax.random.normal(jax.random.key(9), v.shape),
            jax.device_get(start.params["net"]),
        )
        params = {**start.params, "net": before, "reference": before}
        start = start._replace(
            params=jax.tree.map(
                lambda v, old: jax.device_put(np.array(v), old.sharding),
                params,
                start.params,
            )
        )
        placed = meshes.put_batch(batch, mesh, config.data.batch)
        state, metrics = compiled.executable(start, placed)
        # Not 1e-6: see the first policy step above.
        assert float(metrics["first_ratio_deviation"]) < 1e-3
        ends.append(jax.device_get((state.params["net"], metrics["reward"])))
    for a, b in zip(*map(jax.tree.leaves, ends)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: (a != b).any(), before, ends[0][0])
    assert all(jax.tree.leaves(moved))


def test_the_pool_wraps_around(config):
    c = changed(config, **{"method.rounds": 2}).method

    def round_(v):
        return rounds.Round(*(jnp.full((2, 3), float(v)) for _ in range(5)))

    pool = jax.tree.map(lambda v: jnp.zeros((2, *v.shape)), round_(0))
    for step, (filled, newest) in enumerate([(1, 0), (2, 1), (2, 0), (2, 1)]):
        state = dpok.State(jnp.int32(step), {}, {}, {"pool": pool}, jax.random.key(0))
        pool, count, last = baseline.keep_round(state, round_(step + 1), c)
        assert (int(count), int(last)) == (filled, newest)
        assert float(pool.reward[newest, 0, 0]) == step + 1
    assert pool.reward[:, 0, 0].tolist() == [3, 4]


@pytest.mark.parametrize("mode", ["batch", "prompt", "group"])
def test_advantages_against_numpy(config, mode):
    b = bound(config, advantage=mode, prompts=2)
    pay, prompt = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0, 1, 0, 1])
    found = rounds.Round(None, None, None, jnp.asarray(prompt), jnp.asarray(pay))
    stats = policy.init_prompt_stats(2)
    state = dpok.State(jnp.int32(0), {}, {}, {"stats": stats}, jax.random.key(0))
    own, after, equal = baseline.advantages(state, found, b)
    expected = (pay - pay.mean()) / pay.std()
    if mode == "group":
        expected = np.array([-1.0, -1.0, 1.0, 1.0])
    np.testing.assert_allclose(own, expected, rtol=1e-4)
    assert after.count.tolist() == [2, 2] and float(equal) == 0


def test_advantages_of_steps():
    def v(params, x, k, word):
        return params["a"] * x[:, 0] + k

    b = dpok.Bound(parts()._replace(value=v), CHAIN, None, None)
    found = rounds.Round(None, None, None, None, jnp.array([10.0, 20.0]))
    k, x = jnp.array([2, 0, 1, 2]), jnp.array([[1.0], [2.0], [3.0], [4.0]])
    chosen = rounds.Transitions(k, x, None, None, None)
    own = baseline.value_advantage({"a": 0.5}, found, chosen, b)
    assert own.tolist() == [10 - 2.5, 10 - 1.0, 20 - 2.5, 20 - 4.0]
    later = jnp.array([[3.0, 2.0, 0.0], [6.0, 5.0, 0.0]])
    cost = baseline.later_cost(later, jnp.array([[2, 0], [1, 1]]), 0.5, 2.0)
    assert cost.tolist() == [0.0, 0.75, 1.25, 1.25]


@pytest.mark.parametrize("mode", ["value", "reward"])
def test_an_update_pays_what_its_step_is_worth(config, mode):
    """One chosen policy step, done again from the parts: sign and size of what moves."""
    fields = {
        "method.policy_steps": 1, "method.transitions": 3, "method.lora_rank": 0,
        "method.steps": 3, "method.value_steps": 1, "method.beta": 0.5,
        "method.kl_mode": "reward" if mode == "reward" else "grad",
    }  # fmt: skip
    c = changed(config, **fields).method
    b = dpok.Bound(parts(), CHAIN, c, lambda x, prompt: x[:, 0])
    txs = {"policy": optax.sgd(1.0), "value": optax.sgd(0.0)}
    batch = batch_of(config)
    state = dpok._init(jax.random.key(0), batch, parts=b.parts, options=c, txs=txs)
    state.params.update(params(), value={"v": jnp.asarray(0.3)})
    new, _ = dpok.update(state, batch, bound=b, txs=txs)
    key = jax.random.split(jax.random.fold_in(state.key, state.step), 3)[0]
    found = dpok.take_round(key, state.params, batch, b)
    count = len(found.reward)
    chosen = dpok.transitions(found, jnp.tile(jnp.arange(3)[None], (count, 1)))
    gain = jnp.repeat(found.reward, 3) - 0.3
    if mode == "reward":
        gain = gain - 0.5 * dpok.later_kl(found, state.params, b).T.reshape(-1)
    grads = jax.grad(objective)(THETA, gain, chosen, PRE, 0.5)
    moved = new.params["net"]["theta"] - THETA
    np.testing.assert_allclose(moved, -grads, rtol=1e-3, atol=1e-5)


def test_supervised_rounds_refuse_negative_weights(config):
    def pay(x, prompt):
        return x[:, 0] * 0 - 1.0

    fields = {"method.name": "sft"}
    start, state, metrics = light_round(config, pay, **fields)
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (start, state))):
        np.testing.assert_array_equal(a, b)
    assert np.isnan(float(metrics["least_weight"]))
    _, state, metrics = light_round(
        config, pay, **fields, **{"method.reward_shift": 2.0}
    )
    assert float(metrics["reward"]) == -1 and float(metrics["least_weight"]) == 1


def test_a_loss_with_a_host_reward_has_a_gradient(config):
    b = bound(config, reward=on_host_reward(lambda x, prompt: x[:, 0]), guidance=1.0)
    grads = jax.jit(jax.grad(functools.partial(dpok.loss, bound=b), has_aux=True))
    found = grads(params(), batch_of(config), jax.random.key(0))[0]
    assert np.isfinite(found["net"]["theta"]).all()
    assert float(jnp.abs(found["net"]["theta"]).min()) > 0


def test_the_reference_preset_is_the_released_code():
    """Its clip, band, reduction, KL, weights and optimizer (dpok.md 4), and a round."""
    c = run.load_config("dpok:reference")
    own = {name: c.method[name] for name in ("clip", "clip_eps", "reduce", "kl")}
    assert own == {"clip": "hard", "clip_eps": 1e-4, "reduce": "mean", "kl": "eps_mse"}
    assert (c.method.alpha, c.method.beta, c.method.policy_steps) == (10, 0.01, 5)
    assert (c.optim.lr, c.optim.weight_decay, c.optim.clip) == (1e-5, 0.0, 0.1)
    assert c.optim.value_lr == 1e-4 and c.method.rounds == 2  # 1,000 transitions: 2.
    small = {"net.width": 16, "net.blocks": 1, "net.value": (8,), "data.batch": 10,
             "method.steps": 5}  # fmt: skip
    c = changed(c, **small)
    method = dpok.make(c, reward_fn=reward)
    state = method.init(jax.random.key(0), batch_of(c))
    after, metrics = jax.jit(method.update)(state, batch_of(c))
    assert np.isfinite(float(metrics["loss"]))
    moved = jax.tree.map(
        lambda a, b: (a != b).any(), state.params["lora"], after.params["lora"]
    )
    assert any(jax.tree.leaves(moved))


def test_rivals_start_from_one_pretraining():
    plain = run.load_config("dpok")
    before = papers.pretraining("dpok", plain)
    others = papers.rivals("dpok", plain)
    assert len(others) == 5
    for other in others.values():
        assert papers.same_pretraining(papers.pretraining("dpok", other), before)
    wider = changed(plain, **{"net.width": 8})
    assert not papers.same_pretraining(papers.pretraining("dpok", wider), before)


def test_beta_follows_its_target(config):
    for target, factor in ((1e9, 0.5), (1e-4, 2.0)):
        start, state, _ = light_round(config, rounds_=2, **{"method.kl_target": target})
        # The first round's path is the pretrained one: its KL is 0, below any target.
        expected = float(start.extra["beta"]) * 0.5 * factor
        assert float(state.extra["beta"]) == pytest.approx(expected)


def test_kl_d_is_sft_with_a_shifted_reward():
    def eps_fn(x, time, word):
        return 0.3 * x

    x = jax.random.normal(jax.random.key(0), (6, 2))
    word, pay = jnp.ones(6, jnp.int32), jnp.linspace(0, 1, 6)
    loss = functools.partial(
        dpok.sft_loss, eps_fn, eps_fn, x, word, key=jax.random.key(1),
        alpha_bar=diffusion.alpha_bars(diffusion.linear_betas(50)),
    )  # fmt: skip
    assert float(loss(pay, mode="kl_d", gamma=0.7)) == float(loss(pay + 0.7))
    # At the pretrained model the distillation of KL-O is nothing.
    assert float(loss(pay, mode="kl_o", gamma=0.7)) == float(loss(pay))
    assert np.isnan(float(loss(pay - 0.5)))
    with pytest.raises(ValueError, match="kl_o"):
        loss(pay, mode="rwr")


def test_a_reward_from_the_host(config):
    seen = []

    def score(x, prompt):
        seen.append((x.shape, prompt.shape))
        return 2 * x[:, 0] + 0.1 * prompt

    _, ours, _ = light_round(config, lambda x, prompt: 2 * x[:, 0] + 0.1 * prompt)
    _, theirs, _ = light_round(config, on_host_reward(score))
    assert seen == [((20, 1), (20,))]
    for a, b in zip(*(jax.tree.leaves(s.params) for s in (ours, theirs))):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_host_reward_on_several_devices(config):
    """One call, with all pictures of a round; the numbers of one device."""
    config, ends, seen = changed(config, **{"data.batch": 80}), [], []

    def score(x, prompt):
        seen.append(len(x))
        return x.reshape(len(x), -1).mean(1) + 0.1 * prompt

    method = dpok.make(config, reward_fn=on_host_reward(score))
    batch = batch_of(config)
    for count in (1, 8):
        mesh = meshes.make_mesh({"data": count}, jax.devices()[:count])
        compiled = trainer.compile(method, mesh, batch)
        state = compiled.init(jax.random.key(0))
        placed = meshes.put_batch(batch, mesh, config.data.batch)
        state, metrics = compiled.executable(state, placed)
        ends.append(jax.device_get((state.params, metrics["reward"])))
    assert seen == [80, 80]
    for a, b in zip(*map(jax.tree.leaves, ends)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bad_host_rewards_name_the_rows(config):
    reward = on_host_reward(lambda x, p: np.where(p == 4, np.nan, 0.0))
    with pytest.raises(Exception, match=r"not finite in rows \[4, 14\] of 20"):
        jax.block_until_ready(light_round(config, reward)[1])


def test_a_bad_reward_leaves_the_policy_alone(config):
    def broken(x, prompt):
        return jnp.where(prompt == 3, jnp.nan, 0.0)

    start, state, metrics = light_round(config, broken)
    for a, b in zip(
        *(jax.tree.leaves((s.params, s.opt_state)) for s in (start, state))
    ):
        np.testing.assert_array_equal(a, b)
    assert not np.isfinite(float(metrics["reward"]))
    assert not np.isfinite(float(metrics["reward_prompt_3"]))
    assert np.isfinite(float(metrics["reward_prompt_2"]))
    with pytest.raises(ValueError, match="one number for each picture"):
        light_round(config, lambda x, prompt: x)


def test_only_if_keeps_all_but_the_step():
    old = dpok.State(jnp.int32(3), {"a": jnp.ones(2)}, (), {}, jax.random.key(0))
    new = old._replace(params={"a": jnp.zeros(2)})
    kept = only_if(jnp.array(False), new, old)
    assert int(kept.step) == 4 and kept.params["a"].tolist() == [1, 1]
    assert only_if(jnp.array(True), new, old).params["a"].tolist() == [0, 0]


def test_transitions_are_each_chains_own():
    states = jnp.arange(4 * 2).reshape(4, 2, 1).astype(jnp.float32)
    found = rounds.Round(states, -states[:-1], jnp.array([5, 6]), None, None)
    rows = dpok.transitions(found, jnp.array([[2, 0], [1, 2]]))
    assert rows.x[:, 0].tolist() == [4, 0, 3, 5]
    assert rows.x_next[:, 0].tolist() == [6, 2, 5, 7]
    assert rows.eps_old[:, 0].tolist() == [-4, 0, -3, -5]
    assert rows.word.tolist() == [5, 5, 6, 6]


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
        ({"method.steps": 7}, "divide"),
        ({"method.eta": 0.0}, "no density"),
        ({"method.transitions": 6}, "transitions"),
        ({"method.policy_steps": 0}, "policy_steps"),
        ({"method.lora_match": "nothing"}, "nothing"),
        ({"method.kl_mode": "reward", "method.rounds": 2}, "rounds > 1"),
        ({"method.advantage": "group", "method.rounds": 2}, "rounds > 1"),
        ({"method.kl_mode": "reward", "method.kl": "eps_mse"}, "nats"),
        ({"method.kl_target": 1.0, "method.beta": 0.0}, "kl_target"),
        ({"method.advantage": "group", "method.prompts": 11}, "one prompt"),
        ({"method.reward": "none such"}, "reward"),
        ({"method.guidance": float("nan")}, "guidance"),
        ({"pretrain.drop": 1.0}, "drop"),
        ({"optim.weight_decay": -1.0}, "weight_decay"),
        ({"train.accumulate": 2}, "accumulate"),
        ({"net.words": 0}, "words"),
        ({"optim.lr": 0.0}, "lr"),
        ({"optim.value_lr": 0.0}, "value_lr"),
    ],
)
def test_refusals(config, fields, message):
    config = changed(config, **fields)
    with pytest.raises(ValueError, match=message):
        method = dpok.make(config, reward_fn=reward)
        jax.eval_shape(method.init, jax.random.key(0), batch_of(config))


def test_a_method_without_a_reward_says_so(config):
    with pytest.raises(ValueError, match="reward_fn"):
        dpok.make(config)
    plain = dpok.inference(config)
    method = dpok.make(plain)
    assert method.sampler is not None
    with pytest.raises(ValueError, match="without a reward"):
        state = method.init(jax.random.key(0), batch_of(config))
        jax.eval_shape(method.update, state, batch_of(config))
