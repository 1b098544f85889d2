"""SFT-PG: recorded losses, the policy gradient in closed form, cycles, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from jaxpapers import hlo, run
from jaxpapers import mesh as meshes
from jaxpapers import train as trainer
from jaxpapers.nets.critic import MLPCritic, clip_weights, spectral_normalize
from jaxpapers.nets.denoiser import StepMLP
from jaxpapers.ops import diffusion, trajectories
from jaxpapers.ops.distance import wasserstein_exact
from jaxpapers.papers import sft_pg
from tests.contract import Contract

CONTRACT = Contract(
    small={
        "data.batch": 32, "data.count": 200, "data.eval_count": 64, "net.model": "mlp",
        "net.width": 16, "net.blocks": 1, "net.critic": (16,), "net.value": (8,),
        "method.n_critic": 2, "method.n_generator": 2, "optim.lr": 1e-3,
        "method.beta_end": 0.9, "pretrain.optim.lr": 0.01,
    },
    refused={
        "method.beta_end": (1.5, "beta"),
        "method.steps": (0, "steps"),
        "net.model": ("cnn", "net.model"),
    },
    noisy=True,
    falling=("value_loss", 0.9),
    stages=("", "before"),
)  # fmt: skip


def files(*keys):
    return lambda entry: set(keys) <= set(entry["arrays"])


def load(case):
    folder, name, _ = case
    with np.load(folder / f"{name}.npz") as z:
        return {k: jnp.asarray(z[k]) for k in z.files}


def critic(z):
    """The recorded ReLU net as parameters of ``MLPCritic``, and what applies them."""
    layers = {
        f"layer_{i}": {"kernel": z[f"f{2 * i}"].T, "bias": z[f"f{2 * i + 1}"]}
        for i in range(3)
    }
    widths = tuple(layers[f"layer_{i}"]["bias"].shape[0] for i in range(2))
    net = MLPCritic(widths)
    return layers, lambda params: lambda x: net.apply({"params": params}, x)


def assert_layers(found, z, name, rtol=2e-5):
    for i in range(3):
        for j, part in enumerate(("kernel", "bias")):
            expected = z[f"{name}{2 * i + j}"]
            expected = expected.T if part == "kernel" else expected
            np.testing.assert_allclose(
                found[f"layer_{i}"][part], expected, rtol=rtol, atol=1e-6
            )


@pytest.mark.parity("diffusion", only=files("gf_leak0", "v1_W"))
def test_recorded_critic_and_value_losses(case):
    z = load(case)
    params, apply = critic(z)
    steps, widths = z["v1_E"].shape[0], (z["v1_b"].shape[0], z["v2_b"].shape[0])
    value = StepMLP(widths, 1, steps, activation="relu", scale_output=True)
    own = {
        f"layer_{i}": {
            "kernel": z[f"v{i + 1}_W"].T, "bias": z[f"v{i + 1}_b"],
            "scale": z[f"v{i + 1}_E"],
        }
        for i in range(3)
    }  # fmt: skip

    def v(x, k):
        return value.apply({"params": own}, x, k)[:, 0]

    chains = trajectories.Trajectory(z["seq"][-1], z["seq"])
    loss = functools.partial(
        sft_pg.critic_loss, v=v, x=z["real"], trajectory=chains, key=jax.random.key(0)
    )
    _, metrics = loss(apply(params))
    np.testing.assert_allclose(-metrics["wasserstein"], z["d_loss"], rtol=2e-5)
    np.testing.assert_allclose(metrics["value_loss"], z["v_loss"], rtol=2e-5)
    for leak, name in ((True, "gf_leak"), (False, "gf_stop")):
        found = jax.grad(lambda p, leak=leak: loss(apply(p), leak=leak)[0])(params)
        assert_layers(found, z, name)


@pytest.mark.parity("diffusion", only=files("grad_norms", "gp"))
def test_recorded_gradient_penalty(case):
    z = load(case)
    params, apply = critic(z)

    def penalty(params):
        return sft_pg.gradient_penalty(apply(params), z["real"], z["fake"], z["a"])

    value, grads = jax.value_and_grad(penalty)(params)
    np.testing.assert_allclose(value, z["gp"], rtol=2e-5)
    assert_layers(grads, z, "g")


# A chain on the line: the noise is linear in the state, and so are its moments.
CHAIN = diffusion.ddpm_chain(np.array([0.1, 0.3, 0.5]))
THETA = jnp.array([0.4, -0.3])


def linear(theta):
    return lambda x, time: theta[0] * x + theta[1]


def moments(theta, chain=CHAIN):
    """Mean and variance of the last state, exactly."""
    mean, var = 0.0, 1.0
    for a, c, std in zip(chain.x_mult, chain.eps_mult, chain.std):
        slope = a + c * theta[0]
        mean, var = slope * mean + c * theta[1], slope**2 * var + std**2
    return mean, var


COSTS = {
    "linear": (lambda y: 2 * y, lambda m, v: 2 * m),
    "square": (lambda y: y**2, lambda m, v: m**2 + v),
}


def per_chain_gradients(cost, baseline, count=200_000, key=0):
    """The score-function gradient of every chain, (count, 2)."""
    found = trajectories.rollout(
        jax.random.key(key), linear(THETA), CHAIN, (count, 1), store="all"
    )
    states = jnp.moveaxis(found.states, 0, 1)

    def one(theta, states):
        x, x_next = states[:-1], states[1:]
        k = jnp.arange(len(x))
        gain = cost(states[-1, 0]) - baseline(x[:, 0], k)
        # The mean over transitions is 1 / S of the sum that the theorem has.
        return len(x) * sft_pg.policy_loss(
            linear(theta), CHAIN, k, x, x_next, jax.lax.stop_gradient(gain)
        )

    return jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0)))(THETA, states)


def best_baseline(x, k):
    """E[2 y | x_k], exactly."""
    gain, shift = jnp.ones(4), jnp.zeros(4)
    for i in (2, 1, 0):
        slope = CHAIN.x_mult[i] + CHAIN.eps_mult[i] * THETA[0]
        gain = gain.at[i].set(gain[i + 1] * slope)
        shift = shift.at[i].set(
            shift[i + 1] + gain[i + 1] * CHAIN.eps_mult[i] * THETA[1]
        )
    return 2 * (gain[k] * x + shift[k])


@pytest.mark.parametrize("name", list(COSTS))
def test_policy_gradient_is_that_of_the_expected_cost(name):
    cost, expected = COSTS[name]
    exact = jax.grad(lambda t: expected(*moments(t)))(THETA)
    for baseline in (lambda x, k: 0 * x, lambda x, k: jnp.sin(x) + k):
        found = per_chain_gradients(cost, baseline)
        error = found.std(0) / np.sqrt(len(found))
        assert (jnp.abs(found.mean(0) - exact) < 4 * error).all()


def test_the_best_baseline_halves_the_variance():
    cost, expected = COSTS["linear"]
    exact = jax.grad(lambda t: expected(*moments(t)))(THETA)
    plain = per_chain_gradients(cost, lambda x, k: 0 * x, 50_000)
    best = per_chain_gradients(cost, best_baseline, 50_000)
    error = best.std(0) / np.sqrt(len(best))
    assert (jnp.abs(best.mean(0) - exact) < 4 * error).all()
    assert (2 * best.var(0) < plain.var(0)).all()


def test_pathwise_gradient_agrees():
    cost, expected = COSTS["square"]

    def one(theta, key):
        return sft_pg.pathwise_loss(
            key, lambda y: cost(y[:, 0]), linear(theta), CHAIN, (1, 1)
        )

    keys = jax.random.split(jax.random.key(1), 50_000)
    found = jax.jit(jax.vmap(jax.grad(one), in_axes=(None, 0)))(THETA, keys)
    exact = jax.grad(lambda t: expected(*moments(t)))(THETA)
    error = found.std(0) / np.sqrt(len(found))
    assert (jnp.abs(found.mean(0) - exact) < 4 * error).all()


@pytest.fixture(scope="module")
def config():
    fields = {
        "data.batch": 32, "net.widths": "(16,)", "net.critic": "(16,)",
        "net.value": "(16,)", "method.n_critic": 2, "method.n_generator": 4,
    }  # fmt: skip
    return run.load_config(
        "sft_pg:smoke", [f"--config.{k}={v}" for k, v in fields.items()]
    )


def cycle(config, **fields):
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(fields)
    method = sft_pg.make(config)
    x = jax.random.normal(jax.random.key(5), (config.data.batch, *config.net.shape))
    state = method.init(jax.random.key(0), {"x": x})
    return state, *jax.jit(method.update)(state, {"x": x})


def test_the_first_policy_step_is_on_policy(config):
    _, _, metrics = cycle(config, **{"optim.lr": 1e-2})
    assert float(metrics["first_ratio_deviation"]) < 1e-6
    assert float(metrics["ratio_deviation"]) > 1e-4


def test_a_cycle_refuses_other_data(config):
    method = sft_pg.make(config)
    state = method.init(jax.random.key(0), {"x": jnp.zeros((32, 2))})
    for shape in ((32, 3), (31, 2)):
        with pytest.raises(ValueError, match="a cycle needs x of shape"):
            jax.eval_shape(method.update, state, {"x": jnp.zeros(shape)})


def test_a_cycle_refuses_rounds_that_devices_cannot_share(config):
    """Every device would draw all chains, which nobody would see."""
    method = sft_pg.make(config)  # Rounds of 16.
    x = jnp.zeros((32, 2))
    state = method.init(jax.random.key(0), {"x": x})
    for count in (2, 8):
        with jax.set_mesh(jax.make_mesh((count,), ("data",), (AxisType.Auto,))):
            jax.eval_shape(method.update, state, {"x": x})
    x = jnp.zeros((24, 2))
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (AxisType.Auto,))):
        with pytest.raises(ValueError, match="rounds of 12 chains.*n_critic=2.*the 8"):
            jax.eval_shape(method.update, state, {"x": x})


def test_a_critic_that_gives_nan_leaves_the_nets_alone(config):
    method = sft_pg.make(config)
    x = jax.random.normal(jax.random.key(5), (32, 2))
    state = method.init(jax.random.key(0), {"x": x})
    broken = jax.tree.map(lambda v: v.at[0].set(jnp.nan), state.params["critic"])
    state = state._replace(params={**state.params, "critic": broken})
    after, metrics = jax.jit(method.update)(state, {"x": x})
    for a, b in zip(
        *(jax.tree.leaves((s.params, s.opt_state)) for s in (state, after))
    ):
        np.testing.assert_array_equal(a, b)
    assert int(after.step) == 1 and not np.isfinite(float(metrics["loss"]))


@pytest.mark.slow
def test_a_unet_is_tuned(config):
    """A cycle on pictures: the convolutional critic, value net and policy move."""
    before, after, metrics = cycle(
        config,
        **{
            "data.batch": 8, "net.model": "unet", "net.shape": (4, 4, 1),
            "net.channels": 8, "net.multipliers": (1,), "net.attention": (0,),
            "net.groups": 4, "net.blocks": 1, "net.critic": (8, 8), "net.value": (8,),
            "method.steps": 2, "method.timesteps": 2, "method.n_generator": 2,
            "method.penalty": 1.0, "optim.lr": 1e-2,
        },
    )  # fmt: skip
    assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0
    for name in ("critic", "value"):
        moved = jax.tree.map(
            lambda a, b: (a != b).any(), before.params[name], after.params[name]
        )
        assert any(jax.tree.leaves(moved)), name
    last = after.params["net"]["last"]["kernel"]
    assert (last != before.params["net"]["last"]["kernel"]).any()


def test_devices_share_the_chains_out(config):
    """Eight devices draw and train an eighth each, and send no trajectories."""
    config = config.copy_and_resolve_references().unlock()
    config.data.batch, config.method.n_critic = 512, 2
    method = sft_pg.make(config)
    shapes = {"x": jax.ShapeDtypeStruct((512, 2), jnp.float32)}
    compiled = {
        count: trainer.compile(
            method, meshes.make_mesh({"data": count}, jax.devices()[:count]), shapes
        ).executable
        for count in (1, 8)
    }
    flops = {n: x.cost_analysis()["flops"] for n, x in compiled.items()}
    assert flops[8] < 0.25 * flops[1]
    # Gradients and scalars are summed; nothing with the size of the states is sent.
    states = 256 * config.method.steps * 2 * 4
    sent = hlo.collectives(compiled[8].as_text())
    assert sent and max(c.result_bytes for c in sent) < states
    assert {c.kind for c in sent} == {"all-reduce"}


def test_a_bfloat16_net_is_on_policy_too(config):
    _, _, metrics = cycle(
        config, **{"net.model": "mlp", "net.width": 16, "net.blocks": 1,
                   "net.dtype": "bfloat16"},
    )  # fmt: skip
    assert float(metrics["first_ratio_deviation"]) < 1e-2


@pytest.mark.parametrize(
    "fields",
    [
        {"method.penalty": 10.0, "method.leak": False},
        {"method.regularizer": "spectral"},
        {"method.regularizer": "clip"},
        {"method.ratio_clip": 0.2, "method.normalize": True, "method.cost_clip": 2.0},
    ],
)
def test_variants_move_every_net(config, fields):
    before, after, metrics = cycle(config, **fields)
    assert all(np.isfinite(float(v)) for v in metrics.values())
    for name in ("net", "critic", "value"):
        same = jax.tree.map(
            lambda a, b: bool((a == b).all()), before.params[name], after.params[name]
        )
        assert not all(jax.tree.leaves(same)), (name, same)
    if fields.get("method.regularizer") == "clip":
        largest = max(jnp.abs(v).max() for v in jax.tree.leaves(after.params["critic"]))
        assert float(largest) <= 0.01


def train_critic(shift, steps=400, penalty=10.0, bound=None):
    """The critic's estimate of the distance of two Gaussians that are translates."""
    net = MLPCritic((32, 32))
    tx = optax.adam(5e-3, b1=0.5, b2=0.9)
    shift = jnp.asarray(shift)

    def f(params):
        return lambda x: net.apply({"params": bound(params) if bound else params}, x)

    def loss(params, key):
        key_x, key_y, key_mix = jax.random.split(key, 3)
        x = jax.random.normal(key_x, (256, 2))
        y = jax.random.normal(key_y, (256, 2)) + shift[None]
        total, metrics = sft_pg.critic_loss(
            f(params), lambda x, k: 0 * x[:, 0], x,
            trajectories.Trajectory(y, jnp.stack([y, y])), key_mix, leak=False,
            value_weight=0.0, penalty=penalty,
        )  # fmt: skip
        return total, (metrics["wasserstein"], x, y)

    def step(carry, key):
        params, opt = carry
        (_, seen), grads = jax.value_and_grad(loss, has_aux=True)(params, key)
        updates, opt = tx.update(grads, opt)
        return (optax.apply_updates(params, updates), opt), seen

    params = net.init(jax.random.key(0), jnp.zeros((1, 2)))["params"]
    keys = jax.random.split(jax.random.key(1), steps)
    return jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, tx.init(params)))[1]


def test_the_penalised_critic_finds_a_shift():
    # The optimum overshoots by the shift over twice the weight, here 1 %.
    found, _, _ = train_critic([0.6, -0.8], penalty=50.0)
    assert float(found[-50:].mean()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    "bound", [spectral_normalize, functools.partial(clip_weights, bound=0.05)]
)
def test_bounded_critics_never_exceed_it(bound):
    found, x, y = train_critic([3.0, -4.0], 100, 0.0, bound)
    for i in (0, 33, 66, 99):  # Of the very points that the critic saw.
        assert float(found[i]) <= wasserstein_exact(x[i], y[i], 1.0) * (1 + 1e-5)
    assert float(found[-1]) > 0


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method.stage": "train"}, "stage"),
        ({"method.n_critic": 0}, "n_critic"),
        ({"method.n_critic": 5}, "multiple of method.n_critic"),
        ({"method.n_generator": 21}, "n_generator"),
        ({"method.regularizer": "l2"}, "regularizer"),
        ({"method.penalty": -1.0}, "penalty"),
        ({"optim.lr": 0.0}, "optim.lr"),
        ({"optim.clip": -1.0}, "optim.clip"),
        ({"method.steps": 0}, "steps"),
        ({"method.steps": 11}, "timesteps"),
        ({"method.beta_end": 1.5}, "betas"),
        ({"train.accumulate": 2}, "accumulate"),
        ({"method.betas": "linear", "method.sampler": "fastdpm"}, "whole step"),
        ({"method.reduce": "max"}, "reduce"),
        ({"method.regularizer": "clip", "method.weight_bound": 0.0}, "weight_bound"),
        ({"net.model": "cnn"}, "net.model"),
        ({"net.words": 3}, "words"),
        (
            {
                "method.betas": "linear",
                "method.sampler": "fastdpm",
                "method.kappa": 0.0,
                "net.model": "mlp",
            },
            "no density",
        ),
        (
            {
                "method.betas": "linear",
                "method.sampler": "fastdpm",
                "method.kappa": 2.0,
            },
            "kappa",
        ),
    ],
)
def test_refusals(config, fields, message):
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=message):
        sft_pg.make(config)


def test_the_advantage_is_cost_less_baseline():
    def f(y):
        return 2 * y[:, 0]

    def v(x, k):
        return x[:, 0] + k

    x, y, k = jnp.array([[1.0], [4.0]]), jnp.array([[5.0], [1.0]]), jnp.array([2, 0])
    plain = sft_pg.advantage(f, v, x, k, y)
    assert plain.tolist() == [7.0, -2.0]
    assert sft_pg.advantage(f, v, x, k, y, clip=3.0).tolist() == [3.0, -2.0]
    normal = sft_pg.advantage(f, v, x, k, y, normalize=True)
    np.testing.assert_allclose(normal, [1, -1], rtol=1e-5)


def test_transitions_are_the_chains_own_steps():
    states = jnp.arange(4 * 3).reshape(4, 3, 1).astype(jnp.float32)
    found = trajectories.Trajectory(states[-1], states, -states[:-1])
    x, x_next, eps = sft_pg.transitions(found, jnp.array([2, 0, 1]))
    assert x[:, 0].tolist() == [6, 1, 5]
    assert x_next[:, 0].tolist() == [9, 4, 8]
    assert eps[:, 0].tolist() == [-6, -1, -5]
