"""Score models on points: constants, losses, certificate, training, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.config import load_config
from jaxpapers.options import from_config
from jaxpapers.papers import score_wasserstein as sw
from tests.contract import Contract
from tests.programs import params_like, together

CONTRACT = Contract(
    small={
        "data.batch": 64, "data.count": 200, "data.eval_count": 64,
        "net.widths": (8, 8), "method.ascend_steps": 0, "noise.beta_end": 0.9,
        "optim.lr": 0.02, "optim.name": "sgd",
    },
    refused={
        "noise.timesteps": (0, "steps"),
        "method.weight": ("flat", "weight"),
        "net.regularizer": ("l2", "regularizer"),
    },
    noisy=True,
    falling=("loss", 0.97),
)  # fmt: skip

STEPS = 3
NOISE = sw.NoiseSchedule("sigmoid", STEPS, beta_end=0.3, beta_start=1e-5)
MODEL = sw.model(sw.Net(widths=(8,)), NOISE)
X = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32) * 0.5
PARAMS = params_like(lambda: sw.init_params(jax.random.key(0), MODEL))
ZEROS = jax.tree.map(np.zeros_like, PARAMS)


def config(**fields):
    c = load_config("score_wasserstein:smoke").copy_and_resolve_references().unlock()
    small = {
        "net.widths": (8,), "noise.timesteps": STEPS, "noise.beta_end": 0.3,
        "method.ascend_steps": 0,
    }  # fmt: skip
    c.update_from_flattened_dict({**small, **fields})
    return c.lock()


# Certificate and samples


def test_loss_is_the_mean_of_the_discrete_terms():
    """The mean training loss is J up to its scale, for weight g^2."""

    def program(params, x):
        keys = jax.random.split(jax.random.key(1), 400)
        constant = functools.partial(sw.score_lipschitz, params, model=MODEL)
        losses = jax.vmap(
            lambda key: sw.loss(params, {"x": jnp.tile(x, (4, 1))}, key, model=MODEL)
        )
        return {
            "losses": losses(keys),
            "parts": sw.certificate(params, x, keys[0], model=MODEL, draws=1250)[1],
            "upper": constant(x, mode="upper"),
            "twice": constant(jnp.concatenate([x, x]), mode="pairs"),
            "matrix": sw.one_sided_lipschitz_upper(
                [jnp.diag(jnp.array([3.0, 1.0]))], jnp.ones(2)
            ),
        }

    values = together(program, PARAMS, X)
    value, metrics = values["losses"]
    np.testing.assert_allclose(metrics["J"].mean(), values["parts"].J, rtol=0.03)
    # Mean over coordinates and steps, without the half: J = K d / 2 losses.
    np.testing.assert_allclose(metrics["J"], STEPS * value, rtol=1e-5)
    assert (metrics["eps_error"] > 0).all()
    # Estimated constants are below the certified ones.
    lower, upper = values["parts"].lipschitz, values["upper"]
    assert (lower.side, upper.side) == ("lower", "upper")
    assert (lower.value < upper.value).all() and lower.value.shape == (STEPS,)
    # The upper value of one matrix is its norm.
    np.testing.assert_allclose(values["matrix"].value, [3.0, 3.0])
    # Pairs of equal points are left out.
    assert np.isfinite(values["twice"].value).all()


def test_certificate_of_a_translated_score():
    """Net with constant output: every part of the bound is known."""
    params = {**ZEROS, "layer_1": {**ZEROS["layer_1"], "bias": np.float32([3, 4])}}
    x = X[:4]

    def program(params, x):
        key = jax.random.key(0)
        return (
            *sw.certificate(params, x, key, model=MODEL, draws=5000),
            sw.diagnose(params, x, key, model=MODEL, starts="prior"),
        )

    bound, parts, prior = together(program, params, x)
    betas, bars = MODEL.betas, MODEL.alpha_bar
    # E |eps - c|^2 = d + |c|^2, and the score does not depend on x.
    np.testing.assert_allclose(parts.b, (2 + 25) / (1 - bars), rtol=0.05)
    np.testing.assert_allclose(parts.lipschitz.value, 0, atol=1e-6)
    log_I = np.cumsum(betas) / 2
    np.testing.assert_allclose(parts.factor.log, log_I, rtol=1e-5)
    expected = (betas * np.exp(log_I) * np.sqrt(parts.b)).sum()
    np.testing.assert_allclose(bound, expected, rtol=1e-5)
    assert parts.start_distance == 0 and parts.theorem1.offset_term == 0
    assert bound <= parts.corollary1.total * (1 + 1e-6)
    J = 0.5 * (betas * parts.b).sum()
    np.testing.assert_allclose(parts.J, J, rtol=1e-5)
    line = 0.5 * np.log(J) + parts.corollary1.log_intercept
    np.testing.assert_allclose(parts.corollary1.log_total, line, rtol=1e-5)
    # From the prior: sqrt(a) x_0 beside (1 - sqrt(1 - a)) z.
    apart = bars[-1] * (x**2).sum(1).mean() + (1 - np.sqrt(1 - bars[-1])) ** 2 * 2
    offset = np.exp(log_I[-1]) * np.sqrt(apart)
    np.testing.assert_allclose(prior["offset"], offset, rtol=1e-5)
    # The numbers along a run are those of a certificate.
    assert all(v.shape == () and np.isfinite(v) for v in prior.values())
    np.testing.assert_allclose(prior["lipschitz"], 0, atol=1e-6)
    np.testing.assert_allclose(prior["log_factor"], log_I[-1], rtol=1e-5)
    line = np.exp(0.5 * prior["log_J"] + prior["log_intercept"]) + offset
    np.testing.assert_allclose(prior["bound_line"], line, rtol=1e-5)
    np.testing.assert_allclose(prior["bound"], np.exp(prior["log_bound"]), rtol=1e-5)
    assert offset < prior["bound"] <= prior["bound_line"]


@pytest.mark.matrix
@pytest.mark.programs(40)  # Values are checked outside of jit only.
def test_certificate_refuses_what_is_not_finite():
    params = jax.tree.map(lambda v: jnp.asarray(v * np.nan), PARAMS)
    with pytest.raises(ValueError, match="score NaN"):
        sw.certificate(params, jnp.asarray(X), jax.random.key(0), model=MODEL)


def test_certificate_refuses():
    certificate = functools.partial(sw.certificate, key=jax.random.key(0), model=MODEL)
    with pytest.raises(ValueError, match="data and draws"):
        jax.eval_shape(certificate, PARAMS, X[:0])
    with pytest.raises(ValueError, match="mode must be one of"):
        jax.eval_shape(functools.partial(certificate, mode="all"), PARAMS, X)


@pytest.mark.matrix
def test_samples():
    x = np.broadcast_to(np.float32([[1.0, -2.0]]), (4000, 2))
    draw = functools.partial(sw.sampler, key=jax.random.key(4), model=MODEL)

    def program(nets, x):
        params = jax.tree.map(lambda v: v[0], nets)
        return {
            "data": jax.lax.map(lambda params: draw(params, start=x), nets),
            "prior": jax.lax.map(
                lambda x: draw(params, start=x, starts="prior"), jnp.stack([x, 2 * x])
            ),
        }

    nets = jax.tree.map(lambda *v: np.stack(v), PARAMS, ZEROS)
    samples = together(program, nets, x)
    assert samples["data"].shape == (2, *x.shape)
    assert np.isfinite(samples["data"]).all()
    # A net that predicts no noise: the sampler rescales and adds all its noise.
    end, bars, betas = samples["data"][1], MODEL.alpha_bar, MODEL.betas
    np.testing.assert_allclose(end.mean(0), [1.0, -2.0], atol=0.1)
    before = np.append(1.0, bars[:-1])
    spread = (1 - bars[-1]) / bars[-1] + (betas / before).sum()
    np.testing.assert_allclose(end.var(0), spread, rtol=0.1)
    # Those from the prior do not depend on the data.
    np.testing.assert_array_equal(*samples["prior"])
    number = jax.eval_shape(lambda p: draw(p, start=5, starts="prior"), PARAMS)
    assert number.shape == (5, 2)
    for start in (5, 0):
        with pytest.raises(ValueError, match="noised data needs points"):
            sw.sampler(PARAMS, jax.random.key(0), start, model=MODEL)


# Training


@pytest.mark.matrix
def test_the_first_steps_maximise():
    c = config(
        **{"method.ascend_steps": 1, "optim.name": "sgd", "optim.weight_decay": 0.0}
    )
    method = sw.make(c)

    def program(params, x):
        def step(state, sign):
            key = jax.random.fold_in(state.key, state.step)
            grad, _ = jax.grad(method.loss, has_aux=True)(state.params, {"x": x}, key)
            norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grad)))
            rate = sign * c.optim.lr / jnp.maximum(norm, c.optim.clip)
            new, _ = method.update(state, {"x": x})
            expected = jax.tree.map(lambda p, g: p + rate * g, state.params, grad)
            return new, (state.params, expected, new.params)

        state = method.init(jax.random.key(0), {"x": x})._replace(params=params)
        return jax.lax.scan(step, state, jnp.array([1.0, -1.0, -1.0]))[1]

    old, expected, new = together(program, PARAMS, X)
    for k in range(3):
        moved = 0.0
        for a, b, c in zip(*map(jax.tree.leaves, (old, expected, new))):
            moved = max(moved, np.abs(a[k] - b[k]).max())
            np.testing.assert_allclose(c[k], b[k], atol=1e-6)
        assert moved > 1e-5


@pytest.mark.matrix
def test_both_regularizers_lower_the_constant():
    # Wide weights, as after a phase that maximised: both kernels of norm 4.
    wide = {
        name: {
            **layer,
            "kernel": layer["kernel"] * 4 / np.linalg.norm(layer["kernel"], 2),
        }
        for name, layer in PARAMS.items()
    }
    fields = {"net.regularizer": "clip", "net.clip": 0.1, "method.weight": "I2"}
    method = sw.make(config(**fields))

    def program(params, x):
        upper = {
            name: sw.score_lipschitz(
                params, x, model=MODEL._replace(regularizer=name), mode="upper"
            ).value
            for name in ("none", "spectral")
        }
        state = method.init(jax.random.key(0), {"x": x})._replace(params=params)
        state, metrics = method.update(state, {"x": x})
        return upper, state.params, metrics

    upper, params, metrics = together(program, wide, X)
    np.testing.assert_allclose(upper["spectral"], upper["none"] / 4**2, rtol=0.01)
    for name, layer in params.items():
        assert np.abs(layer["kernel"]).max() <= 0.1 + 1e-6, name
        assert np.abs(layer["bias"]).max() <= 0.1 + 1e-6, name
    assert params["layer_0"]["scale"].max() > 0.1
    assert all(np.isfinite(v) for v in metrics.values()) and metrics["grad_norm"] > 0


@pytest.mark.matrix
@pytest.mark.parametrize("weight", ["I2", "g2I", "simple"])
def test_other_weights_train(weight):
    def program(params, x):
        loss = functools.partial(sw.loss, model=MODEL, weight=weight)
        return jax.value_and_grad(loss, has_aux=True)(
            params, {"x": x}, jax.random.key(0)
        )

    (value, metrics), grads = together(program, PARAMS, X)
    leaves = jax.tree.leaves((value, metrics, grads))
    assert all(np.isfinite(v).all() for v in leaves)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"net.regularizer": "l2"}, "net.regularizer"),
        ({"net.regularizer": "clip", "net.clip": 0.0}, "net.clip"),
        ({"net.shape": (3,)}, r"net.shape=\(3,\)"),
        ({"optim.name": "lion"}, "optim.name"),
        ({"optim.lr": 0.0}, "optim.lr"),
        ({"noise.betas": "cubic"}, "noise.betas"),
        ({"method.weight": "I3"}, "method.weight"),
        ({"method.start": "noise"}, "method.start"),
        ({"noise.timesteps": 0}, "noise.timesteps"),
        ({"noise.beta_end": 1.5}, r"\(0, 1\)"),
        ({"method.ascend_steps": -1}, "ascend_steps"),
        ({"train.accumulate": 0}, "accumulate"),
    ],
    ids=str,
)
def test_make_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        method = sw.make(config(**fields))
        jax.eval_shape(method.init, jax.random.key(0), {"x": X})


def test_presets():
    for preset in ("", ":moons", ":gaussian", ":line", ":digits", ":smoke"):
        sw.make(load_config(f"score_wasserstein{preset}"))
    with pytest.raises(ValueError, match="unknown preset"):
        load_config("score_wasserstein:paperr")


def test_defaults_are_those_of_the_config():
    """In a notebook ``sw.model()`` is what ``jaxpapers run score_wasserstein`` trains."""
    c = load_config("score_wasserstein")
    assert from_config(sw.Net, c.net, "net") == sw.Net()
    assert from_config(sw.Options, c.method, "method") == sw.Options()
    betas = from_config(sw.NoiseSchedule, c.noise, "noise").variances()
    np.testing.assert_array_equal(betas, sw.model().betas)
