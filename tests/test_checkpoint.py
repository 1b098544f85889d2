"""Checkpoints: what comes back, what is refused, what a kill cannot lose."""

import random
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxpapers import checkpoint, optim
from jaxpapers import mesh as meshes
from jaxpapers.method import State
from tests.programs import KEY

RULES = [
    *optim.state_rules(),
    ("w/kernel", P("data", "model")),
    ("b$", P("model")),
]
TX = optax.chain(optax.clip(1.0), optim.dion(0.1, 0.5))


def init(key, width=8, extra=()):
    k1, k2, key = jax.random.split(key, 3)
    params = {
        "w": {"kernel": jax.random.normal(k1, (16, width))},
        "b": jax.random.normal(k2, (8,)),
    }
    return State(jnp.asarray(3, jnp.int32), params, TX.init(params), extra, key)


def on(shape, **options):
    """The target of a restore on a mesh."""
    mesh = meshes.make_mesh(shape)
    state = jax.eval_shape(lambda key: init(key, **options), KEY)
    shardings = meshes.state_shardings(state, RULES, mesh)
    return checkpoint.abstract(state, shardings)


def make(target):
    shardings = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(lambda: init(jax.random.key(1)), out_shardings=shardings)()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(checkpoint folder, the state in it)."""
    folder = tmp_path_factory.mktemp("run")
    state = make(on({"data": 4, "model": 2}))
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        checkpoint.save(manager, state, 24, {"optim": {"lr": 0.5}, "steps": (1, 2)})
    return folder / "checkpoints", state


def assert_same(a, b):
    plain = [jax.device_get(x._replace(key=jax.random.key_data(x.key))) for x in (a, b)]
    chex.assert_trees_all_equal(*plain)


@pytest.mark.parametrize("shape", [{"data": 4, "model": 2}, {"data": 2, "model": 4}])
def test_round_trip_on_any_mesh(stored, shape):
    folder, state = stored
    target = on(shape)
    with checkpoint.open_manager(folder) as manager:
        restored, position = checkpoint.restore(manager, target)
        assert checkpoint.read_config(manager)["optim"] == {"lr": 0.5}
    assert position == 24
    assert_same(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert isinstance(restored, State) and restored.key.dtype == state.key.dtype
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, target)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
        lambda x: x.sharding, target
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"width": 4}, r"'params/w/kernel' has shape \(16, 8\).*expects \(16, 4\)"),
        (
            {"extra": {"ema": jax.ShapeDtypeStruct((2,), jnp.float32)}},
            "has no leaf 'extra/ema'",
        ),
    ],
)
def test_another_state_is_refused_before_orbax_sees_it(stored, options, message, capfd):
    target = on({"data": 4, "model": 2}, **options)
    with checkpoint.open_manager(stored[0]) as manager:
        with pytest.raises(
            ValueError, match=message + ".*use the config that wrote it"
        ):
            checkpoint.restore(manager, target)
    assert "Traceback" not in capfd.readouterr().err


def test_a_leaf_too_many(stored):
    target = on({"data": 8})
    params = {"w": target.params["w"]}
    with checkpoint.open_manager(stored[0]) as manager:
        with pytest.raises(ValueError, match="has a leaf 'params/b' that this config"):
            checkpoint.restore(manager, target._replace(params=params))


def test_parameters_alone(stored, tmp_path):
    folder, state = stored
    target = on({"data": 8})
    for place in (folder, folder.parent):
        params = checkpoint.restore_params(place, target.params)
        chex.assert_trees_all_equal(params, state.params)
        assert params["w"]["kernel"].sharding == target.params["w"]["kernel"].sharding
    narrow = on({"data": 8}, width=4)
    with pytest.raises(ValueError, match="leaf 'w/kernel' has shape"):
        checkpoint.restore_params(folder, narrow.params)


def test_no_checkpoint(stored, tmp_path):
    target = on({"data": 8})
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.restore_params(tmp_path / "nothing", target.params)
    assert not (tmp_path / "nothing").exists()
    with checkpoint.open_manager(tmp_path / "empty") as manager:
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            checkpoint.restore(manager, target)
    with checkpoint.open_manager(stored[0]) as manager:
        with pytest.raises(FileNotFoundError, match=r"checkpoint 7 in .* steps \[3\]"):
            checkpoint.restore(manager, target, 7)


def test_keeps_the_newest_and_never_the_same_step_twice(stored, tmp_path):
    _, state = stored
    target = on({"data": 4, "model": 2})
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for step in (1, 2, 2, 5):
            at = jax.device_put(np.int32(step), target.step.sharding)
            checkpoint.save(manager, state._replace(step=at), 8 * step, {})
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [2, 5]
        assert checkpoint.restore(manager, target)[1] == 40
        assert checkpoint.restore(manager, target, 2)[1] == 16


WRITER = """
import sys
import jax, jax.numpy as jnp
from jaxpapers import checkpoint
from jaxpapers.method import State
manager = checkpoint.open_manager(sys.argv[1])
step = (manager.latest_step() or 0) + 1
while True:
    values = {str(i): jnp.full((256, 1024), step, jnp.float32) for i in range(24)}
    state = State(jnp.asarray(step, jnp.int32), values, (), (), jax.random.key(0))
    checkpoint.save(manager, state, 10 * step, {})
    print(step, flush=True)
    step += 1
"""


@pytest.mark.parametrize(
    "kills", [1, pytest.param(3, marks=pytest.mark.matrix)], ids=["once", "thrice"]
)
def test_a_kill_while_writing_loses_nothing_saved_before(tmp_path, kills):
    replicated = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    values = {str(i): leaf for i in range(24)}
    state = State(jax.ShapeDtypeStruct((), jnp.int32), values, (), (), KEY)
    target = checkpoint.abstract(state, jax.tree.map(lambda _: replicated, state))
    rng, last = random.Random(kills), 0
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True,
            env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        )  # fmt: skip
        begun = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        begun += [int(x) for x in process.communicate()[0].split()]
        with checkpoint.open_manager(tmp_path) as manager:
            restored, position = checkpoint.restore(manager, target)
        step = int(restored.step)
        # Beginning to save a step means that the one before is complete.
        assert last < begun[-1] - 1 <= step <= begun[-1] + 1
        assert position == 10 * step
        for leaf in restored.params.values():
            np.testing.assert_array_equal(leaf, np.full((256, 1024), step))
        last = step
