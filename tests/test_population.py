"""``population``: independent members in one program, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxpapers import checkpoint as ckpt
from jaxpapers import mesh as meshes
from jaxpapers import train as trainer
from jaxpapers.method import Method, averaged, from_average, gradient, population
from jaxpapers.method.population import AXIS, member

N = 8
F32 = jnp.float32


def init_params(key, batch):
    # A QR: batched by vmap it is what hangs on CPUs.
    return {"w": jnp.linalg.qr(jax.random.normal(key, (4, 4)))[0], "b": jnp.zeros(4)}


def loss(params, batch, key):
    noise = jax.random.normal(key, (4,))

    def body(total, row):
        return total + jnp.square(row @ params["w"] + params["b"] - noise).sum(), None

    # The scan starts from a constant: its carry varies over members, its start does not.
    total, _ = jax.lax.scan(body, jnp.zeros(()), batch["x"])
    return total / len(batch["x"]), {"first": params["b"][0]}


RULES = ((r"(^|/)w$", P(None, "model")),)


def single():
    return gradient(
        init_params, loss, optax.adam(0.1),
        sampler=lambda params, key, scale: params["b"] + scale * jax.random.normal(key),
        predict=lambda params, extra, batch: batch["x"] @ params["w"],
        rules=RULES,
    )  # fmt: skip


def rows(shape=(3, 4), seed=0):
    return {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}


def two_steps(method, key, batches):
    state = method.init(key, batches[0])
    state, _ = method.update(state, batches[0])
    return method.update(state, batches[1])


@functools.cache
def alone(shared=True):
    """State and metrics of every member, run by itself in one program each."""
    batches = [rows(), rows(seed=1)]
    if not shared:
        batches = [rows((N, 3, 4)), rows((N, 3, 4), 1)]
    run = jax.jit(functools.partial(two_steps, single()))
    members = []
    for i, key in enumerate(jax.random.split(jax.random.key(0), N)):
        own = batches if shared else jax.tree.map(lambda x, i=i: x[i], batches)
        members.append(jax.device_get(_plain(run(key, own))))
    return batches, members


def _plain(outcome):
    state, metrics = outcome
    return state._replace(key=jax.random.key_data(state.key)), metrics


def compare(outcome, members, rtol=1e-5):
    state, metrics = jax.device_get(_plain(outcome))
    assert state.step == 2
    for i, (expected, _) in enumerate(members):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6),
            member(state, i), expected,
        )  # fmt: skip
    for name in ("loss", "grad_norm", "first"):
        values = [m[name] for _, m in members]
        np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-4)
        np.testing.assert_allclose(metrics[f"{name}_std"], np.std(values), rtol=1e-4)
    assert np.std([m["loss"] for _, m in members]) > 0.01


@pytest.mark.parametrize(
    "shared, vectorize, axes",
    [(True, None, {"data": 1}), (True, None, {"data": 4, "model": 2}),
     (False, True, {"data": 8})],
)  # fmt: skip
def test_members_are_runs_of_their_own(shared, vectorize, axes):
    mesh = meshes.make_mesh(axes, jax.devices()[: np.prod(list(axes.values()))])
    batches, members = alone(shared)
    method = population(single(), N, shared_batch=shared, vectorize=vectorize)
    with jax.set_mesh(mesh):
        outcome = jax.jit(functools.partial(two_steps, method))(
            jax.random.key(0), batches
        )
    compare(outcome, members)


def test_trained_on_a_mesh_and_resumed(tmp_path):
    """Bitwise: four steps are two, a checkpoint, and two more; rules divide members."""

    class Examples:
        def batch(self, start, size, rows=slice(None)):
            x = np.random.default_rng(start).standard_normal((size, 4))
            return {"x": x.astype(np.float32)[rows]}

    mesh = meshes.make_mesh({"data": 4, "model": 2})
    fit = functools.partial(
        trainer.fit, population(single(), N), Examples(), batch=8, mesh=mesh
    )
    whole = fit(steps=4)
    assert whole.params["w"].sharding.spec == P(AXIS, None, "model")
    assert whole.opt_state[0].mu["w"].sharding.spec == P(AXIS, None, "model")
    assert whole.params["b"].sharding.spec == P(AXIS)
    assert whole.opt_state[0].count.sharding.spec == P(AXIS)
    fit(steps=2, workdir=tmp_path)
    resumed = fit(steps=4, workdir=tmp_path)
    assert int(resumed.step) == 4
    for a, b in zip(jax.tree.leaves(whole[:3]), jax.tree.leaves(resumed[:3])):
        np.testing.assert_array_equal(a, b)
    assert ckpt.latest_step(tmp_path / "checkpoints") == 4


def test_scores_and_samples_have_a_member_axis(key):
    method = population(single(), 2)

    @jax.jit
    def outputs(key):
        state = method.init(key, rows())
        scores = method.predict(state.params, state.extra, rows())
        value, metrics = method.loss(state.params, rows(), key)
        return state.params, scores, method.sampler(state.params, key, 2.0), value

    params, scores, samples, value = jax.device_get(outputs(key))
    np.testing.assert_allclose(scores, rows()["x"] @ params["w"], rtol=1e-5, atol=1e-6)
    assert samples.shape == (2, 4) and abs(samples[0] - samples[1]).min() > 1e-3
    assert value.shape == ()


def test_averages_start_members():
    """A stage after another: each member continues its own average."""
    first = population(averaged(single(), 0.5), 2)
    second = population(
        averaged(single(), 0.5)._replace(warm_start=from_average("w")), 2
    )

    @jax.jit
    def chain(key):
        state, _ = first.update(first.init(key, rows()), rows())
        start = second.warm_start.apply(
            second.init(key, rows()), {"extra": {"ema": {"w": state.extra["ema"]["w"]}}}
        )
        return state.extra["ema"]["w"], start

    average, start = chain(jax.random.key(1))
    np.testing.assert_array_equal(start.params["w"], average)
    shapes = jax.eval_shape(first.init, jax.random.key(0), rows())
    parts = second.warm_start.parts(shapes)
    assert parts["extra"]["ema"]["w"].shape == (2, 4, 4)


def test_refuses():
    with pytest.raises(ValueError, match="at least 1 member, got 0"):
        population(single(), 0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, F32), rows((8, 4)))
    with pytest.raises(
        ValueError, match="6 does not divide .* of size 8; nearest .* 8"
    ):
        trainer.compile(population(single(), 6), meshes.make_mesh(), shapes)
    with pytest.raises(ValueError, match=r"batch\['x'\] must have a leading axis of 2"):
        population(single(), 2, shared_batch=False).init(jax.random.key(0), rows())
    with pytest.raises(
        ValueError, match="'data'.* which the method's rule .* uses too"
    ):
        population(single()._replace(rules=[("w", P(None, "data"))]), 2)
    assert population(Method(init_params, loss, loss), 2).predict is None
