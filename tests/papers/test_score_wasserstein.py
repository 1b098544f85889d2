"""Score models on points: constants, losses, certificate, training, what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.config import config_file
from jaxpapers.options import from_config
from jaxpapers.papers import score_wasserstein as sw
from tests.contract import Contract

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

STEPS, B = 3, 16


def config(**fields):
    namespace: dict = {}
    exec(config_file("score_wasserstein").read_text(), namespace)
    found = namespace["get_config"]("smoke").copy_and_resolve_references().unlock()
    small = {"net.widths": (8,), "noise.timesteps": STEPS, "noise.beta_end": 0.3}
    fields = {k.replace("__", "."): v for k, v in fields.items()}
    found.update_from_flattened_dict({**small, **fields})
    return found.lock()


def model_of(c):
    return sw.model(from_config(sw.Net, c.net, "net"), sw.NoiseSchedule(**c.noise))


def data(seed=0, count=B):
    return jax.random.normal(jax.random.key(seed), (count, 2)) * 0.5


@functools.cache
def started(**fields):
    c = config(**fields)
    method = sw.make(c)
    return c, method, jax.jit(method.init)(jax.random.key(0), {"x": data()})


def certify(c, params, x, key, **options):
    """The certificate under jit."""
    own = functools.partial(sw.certificate, model=model_of(c), **options)
    return jax.jit(own)(params, x, key)


# Certificate and samples


def test_lower_is_below_upper():
    c, method, state = started(net__activation="softplus")
    model = model_of(c)
    lower = sw.score_lipschitz(state.params, data(count=40), model=model)
    upper = sw.score_lipschitz(state.params, data(), model=model, mode="upper")
    assert (lower.side, upper.side) == ("lower", "upper")
    assert (lower.value < upper.value).all() and lower.value.shape == (STEPS,)
    # Of one matrix alone the upper value is its norm.
    found = sw.one_sided_lipschitz_upper([jnp.diag(jnp.array([3.0, 1.0]))], jnp.ones(2))
    np.testing.assert_allclose(found.value, [3.0, 3.0])
    # Equal points are no pair.
    twice = jnp.concatenate([data(), data()])
    seen = sw.score_lipschitz(state.params, twice, model=model, mode="pairs")
    assert np.isfinite(seen.value).all()


def test_loss_is_the_mean_of_the_chains_terms():
    """The mean training loss is J up to its scale, for weight g^2."""
    c, method, state = started()
    keys = jax.random.split(jax.random.key(1), 400)
    x = jnp.broadcast_to(data()[0], (64, 2))
    run = jax.jit(jax.vmap(lambda key: method.loss(state.params, {"x": x}, key)))
    value, metrics = run(keys)
    _, parts = certify(c, state.params, x[:1], keys[0], draws=20_000)
    np.testing.assert_allclose(metrics["J"].mean(), parts.J, rtol=0.03)
    # Mean over coordinates and steps, without the half: J = K d / 2 losses.
    np.testing.assert_allclose(metrics["J"], STEPS * value, rtol=1e-5)
    assert (metrics["eps_error"] > 0).all()


def test_certificate_of_a_translated_score():
    """Net with constant output: everything of the bound is known."""
    c, method, state = started()
    model = model_of(c)
    params = jax.tree.map(jnp.zeros_like, state.params)
    shift = jnp.array([3.0, 4.0])
    params["layer_1"]["bias"] = shift
    x = data(count=4)
    bound, parts = certify(c, params, x, jax.random.key(0), draws=5000)
    betas, bars = model.betas, model.alpha_bar
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
    _, prior = certify(c, params, x, jax.random.key(0), starts="prior", draws=2)
    apart = bars[-1] * (x**2).sum(1).mean() + (1 - np.sqrt(1 - bars[-1])) ** 2 * 2
    np.testing.assert_allclose(prior.start_distance, np.sqrt(apart), rtol=1e-5)
    offset = np.exp(log_I[-1]) * np.sqrt(apart)
    np.testing.assert_allclose(prior.theorem1.offset_term, offset, rtol=1e-5)


def test_certificate_refuses_what_is_not_finite():
    c, method, state = started()
    params = jax.tree.map(lambda x: x * jnp.nan, state.params)
    model = model_of(c)
    with pytest.raises(ValueError, match="score NaN"):
        sw.certificate(params, data(), jax.random.key(0), model=model)
    with pytest.raises(ValueError, match="data and draws"):
        sw.certificate(state.params, data()[:0], jax.random.key(0), model=model)
    with pytest.raises(ValueError, match="mode must be one of"):
        sw.certificate(state.params, data(), jax.random.key(0), model=model, mode="all")


def test_diagnosis_is_the_certificate():
    c, method, state = started()
    run = jax.jit(functools.partial(sw.diagnose, model=model_of(c)))
    found = run(state.params, data(), jax.random.key(0))
    chex.assert_tree_all_finite(found)
    assert all(x.shape == () for x in found.values())
    line = 0.5 * found["log_J"] + found["log_intercept"]
    np.testing.assert_allclose(found["bound_line"], jnp.exp(line), rtol=1e-5)
    np.testing.assert_allclose(found["bound"], jnp.exp(found["log_bound"]), rtol=1e-5)
    assert found["bound"] <= found["bound_line"] and found["offset"] == 0


def test_samples():
    c, method, state = started()
    x, key = data(), jax.random.key(4)
    draw = jax.jit(method.sampler)
    found = draw(state.params, key, x, ())
    assert found.shape == x.shape and np.isfinite(found).all()
    np.testing.assert_array_equal(found, draw(state.params, key, x, ()))
    # A net that is silent: the chain scales back and adds all its noise.
    quiet = jax.tree.map(jnp.zeros_like, state.params)
    many = jnp.broadcast_to(jnp.array([[1.0, -2.0]]), (4000, 2))
    bars = model_of(c).alpha_bar
    end = draw(quiet, key, many, ())
    np.testing.assert_allclose(end.mean(0), [1.0, -2.0], atol=0.1)
    betas = model_of(c).betas
    before = np.append(1.0, bars[:-1])
    spread = (1 - bars[-1]) / bars[-1] + (betas / before).sum()
    np.testing.assert_allclose(end.var(0), spread, rtol=0.1)
    _, prior, _ = started(method__start="prior")
    assert prior.sampler(state.params, key, 5).shape == (5, 2)
    same = prior.sampler(state.params, key, x), prior.sampler(state.params, key, 2 * x)
    np.testing.assert_array_equal(*same)
    for start in (5, 0):
        with pytest.raises(ValueError, match="noised data needs points"):
            method.sampler(state.params, key, start)


# Training


def test_the_first_steps_maximise():
    c, method, state = started(
        method__ascend_steps=1, optim__name="sgd", optim__weight_decay=0.0
    )
    batch = {"x": data()}
    update = jax.jit(method.update)

    @jax.jit
    def moved(state, sign):
        key = jax.random.fold_in(state.key, state.step)
        grad, _ = jax.grad(method.loss, has_aux=True)(state.params, batch, key)
        norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grad)))
        rate = sign * c.optim.lr / jnp.maximum(norm, c.optim.clip)
        return jax.tree.map(lambda p, g: p + rate * g, state.params, grad)

    for sign in (1.0, -1.0, -1.0):
        expected = moved(state, sign)
        assert max(
            jnp.abs(a - b).max()
            for a, b in zip(*map(jax.tree.leaves, (expected, state.params)))
        ) > 1e-5  # fmt: skip
        state, _ = update(state, batch)
        chex.assert_trees_all_close(state.params, expected, atol=1e-6)


def test_both_regularizers_lower_the_constant():
    fields = {"net__widths": (16, 16), "method__ascend_steps": 0}
    c, plain, state = started(**fields)
    # Wide weights, as after a phase that maximised.
    wide = jax.tree.map(lambda x: 4 * x, state.params)
    model = model_of(c)
    found = {}
    for name in ("none", "spectral"):
        own = model._replace(regularizer=name)
        found[name] = sw.score_lipschitz(wide, data(), model=own, mode="upper").value
    assert (found["spectral"] < 0.5 * found["none"]).all()
    clipped = sw.make(config(**fields, net__regularizer="clip", net__clip=0.1))
    state = clipped.init(jax.random.key(0), {"x": data()})._replace(params=wide)
    params = jax.jit(clipped.update)(state, {"x": data()})[0].params
    for name, layer in params.items():
        assert jnp.abs(layer["kernel"]).max() <= 0.1 + 1e-6, name
        assert jnp.abs(layer["bias"]).max() <= 0.1 + 1e-6, name
    assert params["layer_0"]["scale"].max() > 0.1


@pytest.mark.parametrize("weight", ["g2I", "I2", "simple"])
def test_other_weights_train(weight):
    _, method, state = started(method__weight=weight, method__ascend_steps=0)
    state, metrics = jax.jit(method.update)(state, {"x": data()})
    chex.assert_tree_all_finite((state.params, metrics))
    assert metrics["grad_norm"] > 0


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
)
def test_make_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        method = sw.make(config(**{k.replace(".", "__"): v for k, v in fields.items()}))
        jax.eval_shape(method.init, jax.random.key(0), {"x": data()})


def test_presets():
    namespace: dict = {}
    exec(config_file("score_wasserstein").read_text(), namespace)
    for preset in namespace["PRESETS"]:
        sw.make(namespace["get_config"](preset))
    with pytest.raises(ValueError, match="unknown preset"):
        namespace["get_config"]("paperr")
