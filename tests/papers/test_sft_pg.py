"""SFT-PG: recorded losses, the policy gradient in closed form, updates, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from ml_collections import FrozenConfigDict

from jaxpapers import hlo
from jaxpapers import mesh as meshes
from jaxpapers import train as trainer
from jaxpapers.config import load_config
from jaxpapers.nets import diffusion as nets
from jaxpapers.nets.critic import MLPCritic, clip_weights, spectral_normalize
from jaxpapers.nets.denoiser import StepMLP
from jaxpapers.ops import diffusion, trajectories
from jaxpapers.ops.distance import wasserstein_exact
from jaxpapers.options import from_config
from jaxpapers.papers import sft_pg
from tests.contract import Contract
from tests.programs import params_like, together

CONTRACT = Contract(
    small={
        "data.batch": 32, "data.count": 200, "data.eval_count": 64, "net.model": "mlp",
        "net.width": 16, "net.blocks": 1, "net.critic": (16,), "net.value": (8,),
        "method.n_critic": 2, "method.n_generator": 2, "optim.lr": 1e-3,
        "noise.beta_end": 0.9, "pretrain.optim.lr": 0.01,
    },
    refused={
        "noise.beta_end": (1.5, "beta"),
        "sampler.steps": (0, "steps"),
        "net.model": ("cnn", "net.model"),
    },
    noisy=True,
    falling=("value_loss", 0.9),
    stages=("", "before"),
)  # fmt: skip

MATRIX = functools.partial(pytest.param, marks=pytest.mark.matrix)

# Recorded losses


def files(*keys):
    return lambda entry: set(keys) <= set(entry["arrays"])


def critic(z):
    """The recorded ReLU net as parameters of ``MLPCritic``, and its function."""
    layers = {
        f"layer_{i}": {"kernel": z[f"f{2 * i}"].T, "bias": z[f"f{2 * i + 1}"]}
        for i in range(3)
    }
    widths = tuple(layers[f"layer_{i}"]["bias"].shape[0] for i in range(2))
    net = MLPCritic(widths)
    return layers, lambda params: lambda x: net.apply({"params": params}, x)


def assert_layers(layers, z, name, rtol):
    for i in range(3):
        for j, part in enumerate(("kernel", "bias")):
            expected = z[f"{name}{2 * i + j}"]
            expected = expected.T if part == "kernel" else expected
            np.testing.assert_allclose(
                layers[f"layer_{i}"][part], expected, rtol=rtol, atol=1e-6
            )


@pytest.mark.parity("diffusion", only=files("gf_leak0", "v1_W"))
def test_recorded_critic_and_value_losses(case):
    z, rtol = case.arrays, case.tolerance("float32", otherwise=2e-5)
    params, apply = critic(z)
    steps, widths = z["v1_E"].shape[0], (z["v1_b"].shape[0], z["v2_b"].shape[0])
    value = StepMLP(widths, 1, steps, activation="relu", scale_output=True)
    of_value = {
        f"layer_{i}": {
            "kernel": z[f"v{i + 1}_W"].T, "bias": z[f"v{i + 1}_b"],
            "scale": z[f"v{i + 1}_E"],
        }
        for i in range(3)
    }  # fmt: skip

    def program(params, of_value, x, states):
        def v(x, k):
            return value.apply({"params": of_value}, x, k)[:, 0]

        def loss(params, leak):
            trajectory = trajectories.Trajectory(states[-1], states)
            return sft_pg.critic_loss(
                apply(params), v, x, trajectory, jax.random.key(0), leak=leak
            )

        grad = jax.grad(loss, has_aux=True)
        return {leak: grad(params, leak) for leak in (True, False)}

    results = together(program, params, of_value, z["real"], z["seq"])
    for leak, name in ((True, "gf_leak"), (False, "gf_stop")):
        grads, metrics = results[leak]
        np.testing.assert_allclose(-metrics["wasserstein"], z["d_loss"], rtol=rtol)
        np.testing.assert_allclose(metrics["value_loss"], z["v_loss"], rtol=rtol)
        assert_layers(grads, z, name, rtol)


def test_the_penalty_of_nan_is_nan():
    """A gradient of NaN is not one of zero; where the net is flat, its slope is 0."""

    def penalty(x, slope):
        return sft_pg.gradient_penalty(lambda z: slope * z.sum(1), x, x, jnp.zeros(4))

    def f(x):
        flat = jax.value_and_grad(penalty, argnums=1)(x, jnp.zeros(()))
        return penalty(x, jnp.nan), flat

    broken, (value, slope) = together(f, np.ones((4, 2), np.float32))
    assert np.isnan(broken) and value == 1 and slope == 0


@pytest.mark.parity("diffusion", only=files("grad_norms", "gp"))
def test_recorded_gradient_penalty(case):
    z, rtol = case.arrays, case.tolerance("float32", otherwise=2e-5)
    params, apply = critic(z)

    def program(params, real, fake, a):
        def penalty(params):
            return sft_pg.gradient_penalty(apply(params), real, fake, a)

        norms = jnp.linalg.norm(
            jax.grad(lambda x: apply(params)(x).sum())(a * real + (1 - a) * fake),
            axis=1,
        )
        return jax.value_and_grad(penalty)(params), norms

    (value, grads), norms = together(
        program, params, *(z[name] for name in ("real", "fake", "a"))
    )
    np.testing.assert_allclose(value, z["gp"], rtol=rtol)
    np.testing.assert_allclose(norms, z["grad_norms"], rtol=rtol)
    assert_layers(grads, z, "g", rtol)


# A sampler on the line: the noise is linear in the state, and so are its moments.
SCHEDULE = diffusion.ddpm_schedule(np.array([0.1, 0.3, 0.5]))
THETA = np.float32([0.4, -0.3])


def linear(theta):
    return lambda x, time: theta[0] * x + theta[1]


def moments(theta):
    """Mean and variance of the last state, exactly."""
    mean, var = 0.0, 1.0
    for a, c, std in zip(SCHEDULE.x_mult, SCHEDULE.eps_mult, SCHEDULE.std):
        slope = a + c * theta[0]
        mean, var = slope * mean + c * theta[1], slope**2 * var + std**2
    return mean, var


COSTS = {
    "linear": (lambda y: 2 * y, lambda m, v: 2 * m),
    "square": (lambda y: y**2, lambda m, v: m**2 + v),
}


def best_baseline(x, k):
    """E[2 y | x_k], exactly."""
    gain, shift = [1.0], [0.0]
    for i in (2, 1, 0):
        slope = SCHEDULE.x_mult[i] + SCHEDULE.eps_mult[i] * THETA[0]
        shift.append(shift[-1] + gain[-1] * SCHEDULE.eps_mult[i] * THETA[1])
        gain.append(gain[-1] * slope)
    return 2 * (jnp.asarray(gain[::-1])[k] * x + jnp.asarray(shift[::-1])[k])


BASELINES = {
    "none": lambda x, k: 0 * x,
    "any": lambda x, k: jnp.sin(x) + k,
    "best": best_baseline,
}


@pytest.fixture(scope="module")
def gradients():
    """Score-function gradients of a linear and a square cost, with three baselines.

    Means, variances over trajectories, and the exact gradients.
    """
    count = 200_000

    def program(theta):
        rollout = trajectories.rollout(
            jax.random.key(0), linear(theta), SCHEDULE, (count, 1), store="all"
        )

        def of_trajectory(theta, states, cost, baseline):
            x, x_next = states[:-1], states[1:]
            k = jnp.arange(len(x))
            gain = cost(states[-1, 0]) - baseline(x[:, 0], k)
            # The mean over transitions is 1 / S of the theorem's sum.
            return len(x) * sft_pg.policy_loss(
                linear(theta), SCHEDULE, k, x, x_next, jax.lax.stop_gradient(gain)
            )

        def moments_of(cost, baseline):
            f = functools.partial(of_trajectory, cost=cost, baseline=baseline)
            states = jnp.moveaxis(rollout.states, 0, 1)
            grads = jax.vmap(jax.grad(f), in_axes=(None, 0))(theta, states)
            return grads.mean(0), grads.var(0)

        exact = {
            name: jax.grad(lambda t, f=f: f(*moments(t)))(theta)
            for name, (_, f) in COSTS.items()
        }
        return [moments_of(COSTS[n][0], BASELINES[kind]) for n, kind in pairs], exact

    pairs = [(name, kind) for name in COSTS for kind in BASELINES]
    estimates, exact = together(program, THETA)
    return dict(zip(pairs, estimates)), exact, count


@pytest.mark.parametrize("name", list(COSTS))
def test_policy_gradient_is_that_of_the_expected_cost(gradients, name):
    estimates, exact, count = gradients
    for kind in ("none", "any"):
        mean, var = estimates[name, kind]
        assert (np.abs(mean - exact[name]) < 4 * np.sqrt(var / count)).all(), kind


def test_the_best_baseline_halves_the_variance(gradients):
    estimates, exact, count = gradients
    mean, var = estimates["linear", "best"]
    assert (np.abs(mean - exact["linear"]) < 4 * np.sqrt(var / count)).all()
    assert (2 * var < estimates["linear", "none"][1]).all()


@pytest.mark.matrix
def test_pathwise_gradient_agrees():
    cost, expected = COSTS["square"]

    def program(theta):
        def loss(theta, key):
            return sft_pg.pathwise_loss(
                key, lambda y: cost(y[:, 0]), linear(theta), SCHEDULE, (1, 1)
            )

        keys = jax.random.split(jax.random.key(1), 50_000)
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(theta, keys)
        exact = jax.grad(lambda t: expected(*moments(t)))(theta)
        return grads.mean(0), grads.std(0) / np.sqrt(len(grads)), exact

    mean, error, exact = together(program, THETA)
    assert (np.abs(mean - exact) < 4 * error).all()


# Updates


@pytest.fixture(scope="module")
def config():
    fields = {
        "data.batch": 32, "net.widths": "(16,)", "net.critic": "(16,)",
        "net.value": "(16,)", "method.n_critic": 2, "method.n_generator": 4,
    }  # fmt: skip
    return load_config("sft_pg:smoke", [f"--config.{k}={v}" for k, v in fields.items()])


def changed(config, **fields):
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(fields)
    return config


@functools.cache
def program_of(config):
    """An update of given parameters, jitted, and the method."""
    method = sft_pg.make(config)

    def program(params, x):
        state = method.init(jax.random.key(0), {"x": x})._replace(params=params)
        after, metrics = method.update(state, {"x": x})
        return *(s._replace(key=jnp.zeros(())) for s in (state, after)), metrics

    return method, jax.jit(program)


def update(config, broken=False, **fields):
    """State before and after an update, with drawn parameters, and its metrics."""
    config = FrozenConfigDict(changed(config, **fields))
    method, program = program_of(config)
    shape = (config.data.batch, *config.net.shape)
    x = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    drawn = params_like(lambda: method.init(jax.random.key(0), {"x": x}).params)
    if config.method.regularizer == "clip":
        drawn["critic"] = jax.tree.map(
            lambda v: np.clip(v, -0.01, 0.01), drawn["critic"]
        )
    if broken:
        drawn["critic"]["layer_0"]["kernel"][0] = np.nan
    return jax.device_get(program(drawn, x))


def differs(a, b):
    return any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


OTHERS = {
    "optim.lr": 1e-2, "method.penalty": 10.0, "method.leak": False,
    "method.regularizer": "clip", "method.ratio_clip": 0.2, "method.normalize": True,
    "method.cost_clip": 2.0,
}  # fmt: skip


# The contract has the defaults.
@pytest.mark.matrix
@pytest.mark.parametrize(
    "fields",
    [
        OTHERS,
        MATRIX({"optim.lr": 1e-2}),
        MATRIX({"method.regularizer": "spectral"}),
        MATRIX({"net.model": "mlp", "net.width": 16, "net.blocks": 1,
                "net.dtype": "bfloat16"}),
    ],
    ids=str,
)  # fmt: skip
def test_an_update(config, fields):
    """Every net moves; the first policy step is on-policy, later ones are not."""
    before, after, metrics = update(config, **fields)
    assert all(np.isfinite(v) for v in metrics.values())
    for name in ("net", "critic", "value"):
        assert differs(before.params[name], after.params[name]), name
    half = fields.get("net.dtype") == "bfloat16"
    assert float(metrics["first_ratio_deviation"]) < (1e-2 if half else 1e-6)
    if "optim.lr" in fields:
        assert float(metrics["ratio_deviation"]) > 1e-4
    if fields.get("method.regularizer") == "clip":
        largest = max(np.abs(v).max() for v in jax.tree.leaves(after.params["critic"]))
        assert float(largest) <= 0.01


@pytest.mark.matrix
def test_a_critic_that_gives_nan_leaves_the_nets_alone(config):
    before, after, metrics = update(config, broken=True, **OTHERS)
    for a, b in zip(
        *(jax.tree.leaves((s.params, s.opt_state)) for s in (before, after))
    ):
        np.testing.assert_array_equal(a, b)
    assert int(after.step) == 1 and not np.isfinite(float(metrics["loss"]))


def test_an_update_refuses_other_data(config):
    method = sft_pg.make(config)
    x = jax.ShapeDtypeStruct((32, 2), jnp.float32)
    state = jax.eval_shape(method.init, jax.random.key(0), {"x": x})
    for shape in ((32, 3), (31, 2)):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        with pytest.raises(ValueError, match="an update needs x of shape"):
            jax.eval_shape(method.update, state, {"x": x})


def test_an_update_refuses_rollouts_that_devices_cannot_share(config):
    """Every device would draw all trajectories, silently."""
    method = sft_pg.make(config)  # Rollouts of 16.
    x = jax.ShapeDtypeStruct((32, 2), jnp.float32)
    state = jax.eval_shape(method.init, jax.random.key(0), {"x": x})
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (AxisType.Auto,))):
        jax.eval_shape(method.update, state, {"x": x})
    x = jax.ShapeDtypeStruct((24, 2), jnp.float32)
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (AxisType.Auto,))):
        with pytest.raises(
            ValueError, match="rollouts of 12 trajectories.*n_critic=2.*the 8"
        ):
            jax.eval_shape(method.update, state, {"x": x})


@pytest.mark.slow
def test_a_unet_is_tuned(config):
    """An update on images: the convolutional critic, value net and policy move."""
    before, after, metrics = update(
        config,
        **{
            "data.batch": 8, "net.model": "unet", "net.shape": (4, 4, 1),
            "net.channels": 8, "net.multipliers": (1,), "net.attention": (0,),
            "net.groups": 4, "net.blocks": 1, "net.critic": (8, 8), "net.value": (8,),
            "sampler.steps": 2, "noise.timesteps": 2, "method.n_generator": 2,
            "method.penalty": 1.0, "optim.lr": 1e-2,
        },
    )  # fmt: skip
    assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0
    for name in ("critic", "value"):
        assert differs(before.params[name], after.params[name]), name
    last = after.params["net"]["last"]["kernel"]
    assert (last != before.params["net"]["last"]["kernel"]).any()


@pytest.mark.matrix
def test_devices_share_the_trajectories(config):
    """Eight devices draw and train an eighth each, and exchange no trajectories."""
    config = changed(config, **{"data.batch": 512})
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
    states = 256 * config.sampler.steps * 2 * 4
    sent = hlo.collectives(compiled[8].as_text())
    assert sent and max(c.result_bytes for c in sent) < states
    assert {c.kind for c in sent} == {"all-reduce"}


# Critics


def train_critic(shift, steps=400, penalty=10.0, bound=None):
    """The critic's estimates of the distance of two Gaussians that are translates."""
    net = MLPCritic((32, 32))
    tx = optax.adam(5e-3, b1=0.5, b2=0.9)

    def f(params):
        return lambda x: net.apply({"params": bound(params) if bound else params}, x)

    def loss(params, key, shift):
        key_x, key_y, key_mix = jax.random.split(key, 3)
        x = jax.random.normal(key_x, (256, 2))
        y = jax.random.normal(key_y, (256, 2)) + shift[None]
        total, metrics = sft_pg.critic_loss(
            f(params), lambda x, k: 0 * x[:, 0], x,
            trajectories.Trajectory(y, jnp.stack([y, y])), key_mix, leak=False,
            value_weight=0.0, penalty=penalty,
        )  # fmt: skip
        return total, (metrics["wasserstein"], x, y)

    def program(shift):
        def step(carry, key):
            params, opt = carry
            (_, seen), grads = jax.value_and_grad(loss, has_aux=True)(
                params, key, shift
            )
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(params, updates), opt), seen

        params = net.init(jax.random.key(0), jnp.zeros((1, 2)))["params"]
        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

    return together(program, np.float32(shift))


def test_the_penalised_critic_estimates_a_shift():
    # The optimum overshoots by the shift over twice the weight, here 1 %.
    estimates, _, _ = train_critic([0.6, -0.8], penalty=50.0)
    assert float(estimates[-50:].mean()) == pytest.approx(1.0, rel=0.05)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "bound", [spectral_normalize, functools.partial(clip_weights, bound=0.05)]
)
def test_bounded_critics_never_exceed_the_distance(bound):
    estimates, x, y = train_critic([3.0, -4.0], 100, 0.0, bound)
    for i in (0, 33, 66, 99):  # Of the points that the critic was trained on.
        exact = wasserstein_exact(x[i], y[i], 1.0)
        assert float(estimates[i]) <= exact * (1 + 1e-5)
    assert float(estimates[-1]) > 0


def test_the_advantage_is_cost_less_baseline():
    def f(y):
        return 2 * y[:, 0]

    def v(x, k):
        return x[:, 0] + k

    def program(x, k, y):
        advantage = functools.partial(sft_pg.advantage, f, v, x, k, y)
        return advantage(), advantage(clip=3.0), advantage(normalize=True)

    plain, clipped, normal = together(
        program, np.float32([[1], [4]]), np.int32([2, 0]), np.float32([[5], [1]])
    )
    assert plain.tolist() == [7.0, -2.0] and clipped.tolist() == [3.0, -2.0]
    np.testing.assert_allclose(normal, [1, -1], rtol=1e-5)


def test_transitions_are_of_their_trajectory():
    states = np.arange(4 * 3, dtype=np.float32).reshape(4, 3, 1)
    trajectory = trajectories.Trajectory(states[-1], states, -states[:-1])
    x, x_next, eps = together(sft_pg.transitions, trajectory, np.int32([2, 0, 1]))
    assert x[:, 0].tolist() == [6, 1, 5]
    assert x_next[:, 0].tolist() == [9, 4, 8]
    assert eps[:, 0].tolist() == [-6, -1, -5]


# Configs


def test_defaults_are_those_of_the_config():
    """In a notebook ``sft_pg.model()`` is what ``jaxpapers train sft_pg`` trains."""
    c = load_config("sft_pg")
    options = {k: v for k, v in c.method.items() if k != "stage"}
    assert from_config(sft_pg.Options, options, "method") == sft_pg.OPTIONS
    assert from_config(sft_pg.NoiseSchedule, c.noise, "noise") == sft_pg.NOISE
    assert from_config(sft_pg.Sampler, c.sampler, "sampler") == sft_pg.SAMPLER
    used = {
        "model",
        "shape",
        "vocab",
        "widths",
        "critic",
        "value",
        "value_scale_output",
    }
    net = dataclasses.asdict(sft_pg.NET)
    assert {k: net[k] for k in used} == {k: c.net[k] for k in used}


def test_pretraining_reads_its_own_fields():
    config = load_config("sft_pg")
    before = sft_pg.pretraining(config)
    assert sft_pg.pretraining(before) is None
    assert before.method.to_dict() == {"stage": "pretrain", "ema": 0.0}
    assert (before.data.batch, before.train.steps) == (128, 23_700)
    assert before.optim == config.pretrain.optim
    denoiser = {f.name for f in dataclasses.fields(nets.Denoiser)}
    assert set(before.net) == denoiser & set(config.net)
    tuned = changed(config, **{"method.leak": False, "optim.lr": 1.0})
    assert sft_pg.pretraining(tuned) == before
    other = changed(config, **{"noise.beta_end": 0.02})
    assert sft_pg.pretraining(other) != before


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method.stage": "train"}, "stage"),
        ({"method.n_critic": 0}, "n_critic"),
        ({"method.n_critic": 5}, "multiple of method.n_critic"),
        ({"method.n_generator": 21}, "n_generator"),
        ({"method.regularizer": "l2"}, "regularizer"),
        ({"method.penalty": -1.0}, "penalty"),
        ({"method.penalti": 1.0}, "did you mean method.penalty"),
        ({"optim.lr": 0.0}, "optim.lr"),
        ({"optim.critic_lr": 0.0}, "optim.critic_lr"),
        ({"optim.clip": -1.0}, "optim.clip"),
        ({"sampler.steps": 0}, "steps"),
        ({"sampler.steps": 11}, "timesteps"),
        ({"noise.beta_end": 1.5}, "betas"),
        ({"train.accumulate": 2}, "accumulate"),
        ({"noise.betas": "linear", "sampler.name": "fastdpm"}, "whole step"),
        ({"method.reduce": "max"}, "reduce"),
        ({"method.regularizer": "clip", "method.weight_bound": 0.0}, "weight_bound"),
        ({"net.model": "cnn"}, "net.model"),
        ({"net.vocab": 3}, "vocab"),
        (
            {"noise.betas": "linear", "sampler.name": "fastdpm", "sampler.kappa": 0.0,
             "net.model": "mlp"},
            "no density",
        ),
        (
            {"noise.betas": "linear", "sampler.name": "fastdpm", "sampler.kappa": 2.0},
            "kappa",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_refusals(config, fields, message):
    with pytest.raises(ValueError, match=message):
        sft_pg.make(changed(config, **fields))
