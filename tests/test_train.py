"""The training loop on a linear model: resuming, stopping, what is read when."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpapers import checkpoint, cli, loop
from jaxpapers import mesh as meshes
from jaxpapers import train as trainer
from jaxpapers.method import gradient

BATCH = 8


def loss(params, batch, key):
    noise = 0.01 * jax.random.normal(key, batch["y"].shape)
    error = batch["x"] @ params["w"] - batch["y"] + noise
    return jnp.square(error).mean(), {"worst": jnp.abs(error).max()}


def init_params(key, batch):
    return {"w": jax.random.normal(key, batch["x"].shape[1:])}


METHOD = gradient(init_params, loss, optax.adam(0.1), rules=[("w$", jax.P("data"))])


class Examples:
    """y = sum of x, example by example; from ``poison`` on they are NaN."""

    def __init__(self, poison=10**9):
        self.poison, self.events = poison, []

    def batch(self, start, size, rows):
        self.events.append(("batch", start))
        index = range(start, start + size)[rows]
        x = np.stack([np.random.default_rng(i).normal(size=8) for i in index])
        x[[i >= self.poison for i in index]] = np.nan
        x = x.astype(np.float32)
        return {"x": x, "y": x.sum(1)}


class Record:
    """A report that keeps everything, in the examples' list of events."""

    def __init__(self, examples):
        self.events = examples.events

    def start(self, compiled, method, first, steps):
        self.events.append(("start", first))

    def step(self, step, metrics):
        self.events.append(("step", step, metrics))

    def evaluation(self, step, values):
        self.events.append(("evaluation", step, values))


@functools.cache
def compiled():
    """The method's step, which the tests share."""
    batch = Examples().batch(0, BATCH, slice(None))
    return trainer.compile(METHOD, meshes.make_mesh(), batch)


def fit(steps, workdir=None, examples=None, **kwargs):
    examples = examples or Examples()
    report = Record(examples)
    state = trainer.fit(
        METHOD, examples, compiled=compiled, steps=steps, batch=BATCH,
        workdir=workdir, report=report, **kwargs,
    )  # fmt: skip
    return state, examples.events


def saved(workdir):
    with checkpoint.open_manager(workdir / "checkpoints", read_only=True) as manager:
        return sorted(manager.all_steps())


def plain(state):
    return jax.device_get(state._replace(key=jax.random.key_data(state.key)))


def test_resume_continues_state_data_and_keys(tmp_path):
    expected, whole = fit(7)
    fit(3, tmp_path)
    state, events = fit(7, tmp_path)
    chex.assert_trees_all_equal(plain(expected), plain(state))
    assert [e[1] for e in events if e[0] == "batch"] == [24, 32, 40, 48]
    assert ("start", 3) in events
    assert [e for e in events if e[0] == "step"] == [
        e for e in whole if e[0] == "step" and e[1] > 3
    ]


def test_init_is_one_program_wherever_its_key_lies():
    traces = []

    def init(key, batch):
        traces.append(key)
        return METHOD.init(key, batch)

    mesh, batch = meshes.make_mesh(), Examples().batch(0, BATCH, slice(None))
    built = trainer.compile(METHOD._replace(init=init), mesh, batch)
    before = len(traces)
    built.init(jax.random.key(0))
    with jax.set_mesh(mesh):
        built.init(jax.random.key(0))
    assert len(traces) == before + 1


def test_a_finished_run_is_left_alone(tmp_path):
    expected, _ = fit(3, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    state, events = fit(3, tmp_path)
    chex.assert_trees_all_equal(plain(expected), plain(state))
    assert [e[0] for e in events] == ["start"]
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert before == after


def test_metrics_are_read_one_step_late_and_all_of_them():
    _, events = fit(4)
    order = [e[:2] for e in events[1:]]
    assert order == [
        ("batch", 0),
        ("batch", 8), ("step", 1),
        ("batch", 16), ("step", 2),
        ("batch", 24), ("step", 3), ("step", 4),
    ]  # fmt: skip
    assert set(events[-1][2]) == {"loss", "worst", "grad_norm", "param_norm"}
    assert all(type(x) is float for x in events[-1][2].values())


@pytest.mark.parametrize("save_every", [1, 2])
def test_non_finite_names_the_step_and_keeps_the_last_good_one(tmp_path, save_every):
    last = 3 // save_every * save_every
    with pytest.raises(
        trainer.NonFiniteError, match=f"at step 4: .*'loss': nan.*: step {last};"
    ):
        fit(9, tmp_path, Examples(poison=3 * BATCH), save_every=save_every)
    assert saved(tmp_path)[-1] == last
    state, _ = fit(last, tmp_path)
    chex.assert_tree_all_finite(state.params)


def test_non_finite_without_checkpoint():
    with pytest.raises(trainer.NonFiniteError, match="at step 2.*no checkpoint yet"):
        fit(5, examples=Examples(poison=BATCH))


@pytest.mark.parametrize("where", ["updates", "state"])
def test_what_the_loss_cannot_see_is_not_saved(tmp_path, where):
    """The fourth update is NaN, or only the optimizer's memory of it is."""

    def update(updates, count, params=None):
        bad = jnp.where(count[0] == 3, jnp.nan, 0.0)
        memory = count + jnp.stack([1.0, bad if where == "state" else 0.0])
        add = bad if where == "updates" else 0.0
        return jax.tree.map(lambda g: add - 0.1 * g, updates), memory

    tx = optax.GradientTransformation(lambda params: jnp.zeros(2), update)
    method = gradient(init_params, loss, tx)
    with pytest.raises(trainer.NonFiniteError, match="step 4.*good checkpoint: step 2"):
        trainer.fit(
            method, Examples(), steps=4, batch=BATCH, workdir=tmp_path, save_every=2
        )
    assert saved(tmp_path) == [2]


@pytest.mark.parametrize("every, steps", [(0, [5]), (2, [2, 4, 5]), (5, [5])])
def test_evaluation_steps(every, steps):
    shapes = []

    def evaluate(state):
        shapes.append(state.params["w"].shape)
        return {"size": 1.0}

    _, events = fit(5, evaluate=evaluate, eval_every=every)
    assert [e[1:] for e in events if e[0] == "evaluation"] == [
        (s, {"size": 1.0}) for s in steps
    ]
    assert shapes == [(8,)] * len(steps)


def test_save_by_step_keeps_the_newest(tmp_path):
    fit(7, tmp_path, save_every=2, keep=3)
    assert saved(tmp_path) == [4, 6, 7]


def test_save_by_minutes(tmp_path, monkeypatch):
    examples = Examples()
    clock = types.SimpleNamespace(monotonic=lambda: 25.0 * len(examples.events))
    monkeypatch.setattr(loop, "time", clock)
    # Each step is a batch and, a step later, its metrics: 50 s; a minute is two steps.
    fit(7, tmp_path, examples, save_minutes=1.0, keep=99)
    assert saved(tmp_path) == [2, 4, 6, 7]


def test_no_transfer_in_a_step():
    mesh, batch = meshes.make_mesh(), Examples().batch(0, BATCH, slice(None))
    state = compiled().init(jax.random.key(0))
    placed = meshes.put_batch(batch, mesh, BATCH)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        state, metrics = compiled().step(state, placed)
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            jax.jit(jnp.sum)(batch["x"])
    assert np.isfinite(float(metrics["loss"]))


def test_init_from_takes_parameters_only(tmp_path):
    source, _ = fit(4, tmp_path / "source")
    state, events = fit(0, init_from=str(tmp_path / "source"))
    chex.assert_trees_all_equal(source.params, state.params)
    assert int(state.step) == 0 and ("start", 0) in events
    assert not np.any(state.opt_state[0].mu["w"])
    # A run's own checkpoint comes first.
    fit(2, tmp_path / "own")
    state, events = fit(3, tmp_path / "own", init_from=str(tmp_path / "source"))
    assert ("start", 2) in events
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        fit(1, init_from=str(tmp_path / "nothing"))


def two(names):
    """A method of some vectors, each at its own start, and its examples' shapes."""

    def loss(params, batch, key):
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(params)), {}

    def init(key, batch):
        return {"layers": {n: jnp.full(3, float(i + 1)) for i, n in enumerate(names)}}

    return gradient(init, loss, optax.sgd(0.1))


def test_init_only_takes_the_parameters_whose_path_matches(tmp_path):
    def run(names, steps, **kwargs):
        return trainer.fit(two(names), Examples(), steps=steps, batch=BATCH, **kwargs)

    old = run("abc", 1, workdir=tmp_path / "old").params["layers"]
    source = {"init_from": str(tmp_path / "old")}
    new = run("bcd", 0, init_only="layers/[bc]$", **source).params["layers"]
    np.testing.assert_array_equal(new["b"], old["b"])
    np.testing.assert_array_equal(new["c"], old["c"])
    np.testing.assert_array_equal(new["d"], np.full(3, 3.0))
    # All that are missing and all that are too many, of those that match.
    with pytest.raises(
        ValueError, match="no leaf 'layers/d' .* a leaf 'layers/a' that"
    ):
        run("bcd", 0, **source)
    with pytest.raises(ValueError, match="has no leaf 'layers/d' of this config; use"):
        run("bcd", 0, init_only="[bd]$", **source)
    with pytest.raises(ValueError, match=r"no parameter has a path with 'x', it has"):
        run("bcd", 0, init_only="x", **source)
    with pytest.raises(ValueError, match=r"train.init_only='\(' is no regex"):
        run("bcd", 0, init_only="(", **source)


def test_the_first_batch_gives_the_shapes_of_what_is_not_compiled_yet():
    examples = Examples()
    state = trainer.fit(METHOD, examples, steps=1, batch=BATCH)
    assert [e[1] for e in examples.events] == [0, 0]
    expected, _ = fit(1)
    chex.assert_trees_all_equal(plain(expected), plain(state))


def test_batch_must_fit_the_mesh():
    with pytest.raises(ValueError, match="nearest batch that works: 8"):
        trainer.fit(METHOD, Examples(), steps=1, batch=10)


def test_a_signal_saves_and_stops(tmp_path):
    class Stopping(Examples):
        def batch(self, start, size, rows):
            if start == 2 * BATCH:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(start, size, rows)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(trainer.Preempted, match="stopped at step 3 of 9"):
        fit(9, tmp_path, Stopping(), evaluate=lambda params: pytest.fail("evaluated"))
    assert signal.getsignal(signal.SIGTERM) is before
    assert saved(tmp_path) == [3]
    expected, _ = fit(9)
    state, _ = fit(9, tmp_path)
    chex.assert_trees_all_equal(plain(expected), plain(state))


@pytest.mark.parametrize("last", [2, pytest.param(99, marks=pytest.mark.matrix)])
def test_profile_writes_a_trace(tmp_path, last):
    fit(4, tmp_path, profile=(1, last))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_stopped_command_exits_with_75(monkeypatch, capsys):
    def stopped(*args, **kwargs):
        raise trainer.Preempted("stopped at step 3 of 9")

    monkeypatch.setattr("jaxpapers.run.run", stopped)
    assert cli.main(["run", "dion:smoke"]) == trainer.PREEMPTED == 75
    assert "step 3 of 9; the same command continues" in capsys.readouterr().err


@pytest.mark.matrix
def test_terminated_command_line_run_continues(tmp_path):
    corpus = tmp_path / "text.py"
    corpus.write_text("def f(x):\n    return x + 1\n\n\n" * 200)
    workdir = tmp_path / "run"
    command = [
        sys.executable, "-m", "jaxpapers", "run", "dion:smoke",
        f"--workdir={workdir}", f"--config.data.path={corpus}",
        "--config.data.context=16", "--config.data.eval_batch=8",
        "--config.net.width=32", "--config.net.heads=2", "--config.train.sample=0",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    options = {"env": environment, "cwd": Path(__file__).parent.parent, "text": True}
    command.append("--config.train.steps=100000")
    metrics = workdir / "metrics.jsonl"
    size, last = 0, 0
    for _ in range(2):
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size > size):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.terminate()
        out, errors = process.communicate(timeout=60)
        assert process.returncode == trainer.PREEMPTED == 75
        assert "the same command continues" in errors
        assert (f"continuing from step {last}" in out) == bool(last)
        step = int(re.search(r"stopped at step (\d+) of 100000", errors)[1])
        assert saved(workdir)[-1] == step > last
        size, last = metrics.stat().st_size, step
