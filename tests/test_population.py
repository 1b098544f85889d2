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
from tests.programs import KEY, together

N = 8
F32 = jnp.float32


def init_params(key, batch):
    return {"w": jax.random.normal(key, (4, 4)), "b": jnp.zeros(4)}


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
    """State without its key's type, and metrics, after two batches."""
    start = method.init(key, jax.tree.map(lambda x: x[0], batches))
    state, metrics = jax.lax.scan(method.update, start, batches)
    last = jax.tree.map(lambda x: x[-1], metrics)
    return state._replace(key=jax.random.key_data(state.key)), last


@functools.cache
def alone(shared):
    """Batches, and each member as a run by itself, all in one program."""
    batches = rows((2, 3, 4) if shared else (2, N, 3, 4))
    axis = None if shared else 1

    def runs(key, batches):
        run = jax.vmap(functools.partial(two_steps, single()), (0, axis))
        return run(jax.random.split(key, N), batches)

    stacked = together(runs, jax.random.wrap_key_data(np.zeros(2, np.uint32)), batches)
    return batches, [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(N)]


def compare(outcome, members, rtol=1e-5):
    state, metrics = outcome
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


@pytest.mark.matrix
@pytest.mark.parametrize(
    "shared, vectorize, axes",
    [
        (False, None, {"data": 2}),
        *(
            pytest.param(*case, marks=pytest.mark.matrix)
            for case in [
                (True, None, {"data": 4, "model": 2}),
                (True, None, {"data": 1}),
                (True, True, {"data": 8}),
                (False, True, {"data": 1}),
            ]
        ),
    ],
)
def test_members_are_runs_of_their_own(shared, vectorize, axes, key):
    mesh = meshes.make_mesh(axes, jax.devices()[: np.prod(list(axes.values()))])
    batches, members = alone(shared)
    method = population(single(), N, shared_batch=shared, vectorize=vectorize)
    with jax.set_mesh(mesh):
        outcome = together(functools.partial(two_steps, method), key, batches)
    compare(outcome, members)


@pytest.mark.matrix
@pytest.mark.programs(30)  # Most are orbax's, of copies and keys.
def test_trained_on_a_mesh_and_resumed(tmp_path, key):
    """Rules divide the members; four steps are two, a checkpoint, and two, bitwise."""
    mesh = meshes.make_mesh({"data": 4, "model": 2})
    batches = [rows((8, 4), seed) for seed in range(4)]
    compiled = trainer.compile(population(single(), N), mesh, batches[0])

    def run(state, batches):
        for batch in batches:
            state, _ = compiled.step(state, meshes.put_batch(batch, mesh, 8))
        return state

    state = run(compiled.init(key), batches[:2])
    with ckpt.open_manager(tmp_path) as manager:
        ckpt.save(manager, state, 16, {})
        state = run(state, batches[2:])
        manager.wait_until_finished()
        restored, position = ckpt.restore(manager, compiled.shapes)
    resumed = run(restored, batches[2:])
    assert position == 16 and int(resumed.step) == 4
    jax.tree.map(
        np.testing.assert_array_equal, *jax.device_get((state[:3], resumed[:3]))
    )
    for leaf in (state.params["w"], state.opt_state[0].mu["w"]):
        assert leaf.sharding.spec == P(AXIS, None, "model")
    for leaf in (state.params["b"], state.opt_state[0].count, state.key):
        assert leaf.sharding.spec == P(AXIS)


def test_scores_and_samples_have_a_member_axis(key):
    method = population(single(), 2)

    def outputs(key):
        state = method.init(key, rows())
        scores = method.predict(state.params, state.extra, rows())
        value, metrics = method.loss(state.params, rows(), key)
        return state.params, scores, method.sampler(state.params, key, 2.0), value

    params, scores, samples, value = together(outputs, key)
    np.testing.assert_allclose(scores, rows()["x"] @ params["w"], rtol=1e-5, atol=1e-6)
    assert samples.shape == (2, 4) and abs(samples[0] - samples[1]).min() > 1e-3
    assert value.shape == ()


@pytest.mark.matrix
def test_averages_start_members(key):
    """A stage after another: each member continues its own average."""
    first = population(averaged(single(), 0.5), 2)
    second = population(
        averaged(single(), 0.5)._replace(warm_start=from_average("w")), 2
    )

    def chain(key):
        state, _ = first.update(first.init(key, rows()), rows())
        start = second.warm_start.apply(
            second.init(key, rows()), {"extra": {"ema": {"w": state.extra["ema"]["w"]}}}
        )
        return state.extra["ema"]["w"], start.params["w"]

    average, start = together(chain, key)
    np.testing.assert_array_equal(start, average)
    shapes = jax.eval_shape(first.init, KEY, rows())
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
        population(single(), 2, shared_batch=False).init(KEY, rows())
    with pytest.raises(
        ValueError, match="'data'.* which the method's rule .* uses too"
    ):
        population(single()._replace(rules=[("w", P(None, "data"))]), 2)
    assert population(Method(init_params, loss, loss), 2).predict is None
