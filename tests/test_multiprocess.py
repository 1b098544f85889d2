"""Two processes of two devices train as one process of four."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxpapers import checkpoint, mesh, papers, run, tasks, train

ROOT = Path(__file__).parent.parent
SMALL = {"data.context": 16, "data.batch": 8, "data.eval_batch": 8,
         "net.width": 32, "net.heads": 2}  # fmt: skip

START = """
import sys
import jax
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    f"localhost:{port}", 2, rank, heartbeat_timeout_seconds=10
)
assert jax.device_count() == 4 and jax.process_count() == 2
import numpy as np
from jax.experimental import multihost_utils
from jaxpapers import mesh, train
grid = mesh.make_mesh({"data": 4})
assert mesh.batch_rows(grid, 8) == slice(4 * rank, 4 * rank + 4)
"""

TALK = """
import time
from jaxpapers import processes
assert processes.of_all([rank, "text", None]) == [[0, "text", None], [1, "text", None]]
print(sum(processes.of_first(i if rank == 0 else "other") for i in range(300)))
print(sum(processes.of_all(i)[1 - rank] for i in range(300)))
kept = processes.client().key_value_dir_get("jaxpapers/call/")
assert len(kept) <= 2 * (processes.KEPT + 1), len(kept)
began = time.monotonic()
time.sleep(2.5 * processes.POLL * (1 - rank))
processes.wait()
assert time.monotonic() - began > 2
time.sleep(2.5 * processes.POLL * (1 - rank))
print(processes.agreed(1.5 + rank, 20))
assert processes.agreed(1.5, 21) == 0
"""

LATE = """
import pathlib
from jaxpapers import run
if rank:
    folder += "-made by the others by now"
    pathlib.Path(folder).mkdir()
run.run("dnw:smoke", workdir=folder, quiet=True)
"""

MODEL = """
from jaxpapers import papers, run, tasks
grid = mesh.make_mesh(mesh.parse_mesh(sys.argv[4]))
config = run.load_config("dion:smoke", sys.argv[5:])
data = tasks.read(config)
method = papers.load("dion").make(config)
state = train.fit(method, data.examples, steps=2, batch=8, mesh=grid, workdir=folder)
params = multihost_utils.process_allgather(state.params, tiled=True)
row = tasks.study("dion", config, data, grid).rows(0)[0]
bits = row.measure(method, state).numbers["bits"]
named = jax.tree_util.tree_flatten_with_path(params)[0]
flat = {jax.tree_util.keystr(k): v for k, v in named}
np.savez(f"{folder}/{rank}.npz", bits=bits, **flat)
"""

# Executed here too: one process of four devices takes the same steps.
SPLIT = """
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxpapers import optim
from jaxpapers.method import gradient

class Examples:
    def batch(self, start, size, rows):
        x = np.random.default_rng(start).normal(size=(size, 8)).astype(np.float32)
        return {"x": x[rows], "y": np.sin(x[rows, :4])}

def loss(params, batch, key):
    error = batch["x"] @ params["w"] - batch["y"]
    return jnp.square(error).mean(), {"drawn": jax.random.normal(key)}

def init(key, batch):
    return {"w": jax.random.normal(key, (8, 4))}

def fit(grid, **options):
    rules = [*optim.state_rules(), ("w$", P("data"))]
    tx = optim.dion(0.1, 0.5, sharding={"w": P("data")})
    method = gradient(init, loss, tx, rules=rules)
    return train.fit(method, Examples(), steps=2, batch=8, mesh=grid, **options)
"""

# Nothing but the compiled steps may wait for devices of others.
SAVE = """
def refuse(*args, **kwargs):
    raise AssertionError("a collective of the host")
multihost_utils.sync_global_devices = multihost_utils.broadcast_one_to_all = refuse
fit(grid, workdir=folder)
state = fit(grid, workdir=folder)  # Read from disk.
w = multihost_utils.process_allgather(state.params["w"], tiled=True)
np.savez(f"{folder}/{rank}.npz", w=w, shard=state.params["w"].addressable_data(0))
"""

LINE = """
import jax.numpy as jnp, optax
from jaxpapers.method import gradient
class Examples:
    def batch(self, start, size, rows):
        if start == 24:
            print("three", flush=True)
        return {"x": np.arange(start, start + size, dtype=np.float32)[rows] % 5}
def loss(params, batch, key):
    return jnp.square(params["w"] * batch["x"] - 1).mean(), {}
method = gradient(lambda key, batch: {"w": jnp.ones(())}, loss, optax.sgd(1e-3))
try:
    train.fit(method, Examples(), steps=10**6, batch=8, mesh=grid, workdir=folder)
except train.Preempted as e:
    print(e, flush=True)
    sys.exit(train.PREEMPTED)
"""


def pair(script, folder, *arguments):
    """Both processes of a script, started."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", START + script, str(rank), str(port), str(folder),
             *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


def finish(processes):
    """Exit codes, standard outputs and errors."""
    try:
        texts = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.communicate()
    return [p.returncode for p in processes], *zip(*texts)


def test_two_processes_agree_with_one(tmp_path):
    """Dion on parameters that lie in parts on both, saved by both and read by one."""
    codes, _, errors = finish(pair(SPLIT + SAVE, tmp_path))
    assert codes == [0, 0], errors
    names = {"jax": jax, "np": np, "train": train}
    exec(SPLIT, names)
    grid = mesh.make_mesh({"data": 4}, jax.devices()[:4])
    # What two processes saved, one reads: it finds step 2 and has nothing to do.
    for options in ({}, {"workdir": tmp_path}):
        state = names["fit"](grid, **options)
        assert int(state.step) == 2
        for rank in range(2):
            saved = np.load(tmp_path / f"{rank}.npz")
            assert saved["shard"].shape == (2, 4)
            np.testing.assert_allclose(saved["w"], state.params["w"], 1e-4, 1e-5)


def test_values_of_all_processes(tmp_path):
    """More of them than are kept, at different speeds, and one that is late."""
    processes = pair(TALK, tmp_path)
    codes, out, errors = finish(processes)
    assert codes == [0, 0], errors
    assert out[0] == out[1] == "44850\n44850\n1.5\n"


def test_a_process_that_comes_late_finds_the_folder_of_the_others(tmp_path):
    """What is on disk by then must not decide what it does together with them."""
    processes = pair(LATE, tmp_path / "run")
    codes, _, errors = finish(processes)
    assert codes == [0, 0], errors
    assert (tmp_path / "run" / "comparison.json").exists()


@pytest.mark.matrix
@pytest.mark.parametrize(
    "axes, fields",
    [
        ("data:4", {}),
        # Each process is a slice, and only factors cross between them.
        ("slice:2,data:2", {
            "train.replica_sync": "lowrank", "train.replica_axis": "slice",
            "optim.clip": 0.0, "optim.residual": 0.0,
        }),
    ],
)  # fmt: skip
def test_two_processes_train_the_language_model_as_one(tmp_path, axes, fields):
    corpus = tmp_path / "text.py"
    corpus.write_text("def f(x):\n    return x + 1\n\n\n" * 100)
    fields = {**SMALL, **fields, "data.path": corpus, "train.steps": 2}
    overrides = [f"--config.{k}={v}" for k, v in fields.items()]
    codes, _, errors = finish(pair(MODEL, tmp_path, axes, *overrides))
    assert codes == [0, 0], errors

    config = run.load_config("dion:smoke", overrides)
    data = tasks.read(config)
    method = papers.load("dion").make(config)
    grid = mesh.make_mesh(mesh.parse_mesh(axes), jax.devices()[:4])
    row = tasks.study("dion", config, data, grid).rows(0)[0]

    def fit(**kwargs):
        return train.fit(method, data.examples, steps=2, batch=8, mesh=grid, **kwargs)

    # What two processes saved, one reads: it finds step 2 and has nothing to do.
    for state in (fit(), fit(workdir=tmp_path)):
        assert int(state.step) == 2
        bits = row.measure(method, state).numbers["bits"]
        for rank in range(2):
            found = np.load(tmp_path / f"{rank}.npz")
            assert float(found["bits"]) == pytest.approx(bits, rel=1e-5)
            for path, leaf in jax.tree_util.tree_flatten_with_path(state.params)[0]:
                np.testing.assert_allclose(
                    found[jax.tree_util.keystr(path)], leaf, rtol=1e-4, atol=1e-5
                )


@pytest.mark.matrix
def test_a_signal_to_one_process_stops_both(tmp_path):
    processes = pair(LINE, tmp_path)
    try:
        for line in processes[1].stdout:
            if line.strip() == "three":
                break
        time.sleep(0.2)
        os.kill(processes[1].pid, signal.SIGTERM)
    finally:
        codes, out, errors = finish(processes)
    assert codes == [75, 75], errors
    assert out[0].splitlines()[-1] == out[1].splitlines()[-1]
    steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert f"stopped at step {max(steps)} of" in out[0]


def slurm(count, workdir, *arguments):
    """``jaxpapers train --distributed`` as SLURM starts it: one process per rank."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "jaxpapers", "train", "dion:smoke", "--quiet",
               "--distributed", f"--workdir={workdir}", *arguments]  # fmt: skip
    return [
        subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(4 // count),
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count), "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
            },
        )
        for rank in range(count)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(
    "how, victim",
    [(signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 0)],
    ids=["stopped", "killed", "first-killed"],
)
def test_the_command_line_stops(count, how, victim, tmp_path):
    """One of the processes gets a signal; what is on disk by then goes on."""
    corpus = tmp_path / "text.py"
    corpus.write_text("def f(x):\n    return x + 1\n\n\n" * 100)
    fields = {**SMALL, "data.path": corpus, "train.sample": 0, "train.steps": 10**6,
              "train.save_every": 2, "optim.cooldown": 0.0}  # fmt: skip
    overrides = [f"--config.{k}={v}" for k, v in fields.items()]
    workdir = tmp_path / "run"
    processes = slurm(count, workdir, *overrides, "--mesh=data:4", "--heartbeat=10")
    try:
        saved = workdir / "checkpoints" / "4"
        began = time.monotonic()
        while not saved.exists() and time.monotonic() - began < 300:
            assert all(p.poll() is None for p in processes)
            time.sleep(0.2)
        assert saved.exists(), "no step 4 within five minutes"
        os.kill(processes[victim].pid, how)
        began = time.monotonic()
    finally:
        codes, _, errors = finish(processes)
    ended = [(c, e.splitlines()) for i, (c, e) in enumerate(zip(codes, errors))
             if how == signal.SIGTERM or i != victim]  # fmt: skip
    # The heartbeat and ten seconds, and what a loaded machine needs.
    assert time.monotonic() - began < 10 + 10 + 30
    for code, lines in ended:
        assert code == (train.PREEMPTED if how == signal.SIGTERM else 1), errors
        assert len(lines) == 1 and lines[0].startswith("jaxpapers: "), lines
        assert "the same command" in lines[0]
    last = max(checkpoint.steps(workdir / "checkpoints"))
    code, _, errors = finish(
        slurm(
            1, workdir, *overrides, f"--config.train.steps={last + 2}", "--mesh=data:4"
        )
    )
    assert code == [0], errors
    assert last + 2 in losses(workdir)


@pytest.mark.slow
def test_a_stop_while_they_compile(tmp_path):
    """Where no state is at stake all of them end within seconds."""
    corpus = tmp_path / "text.py"
    corpus.write_text("def f(x):\n    return x + 1\n\n\n" * 100)
    overrides = [f"--config.{k}={v}" for k, v in {**SMALL, "data.path": corpus}.items()]
    processes = slurm(2, tmp_path / "run", *overrides, "--mesh=data:4")
    while not (tmp_path / "run" / "config.json").exists():
        time.sleep(0.1)
    processes[1].terminate()
    codes, _, errors = finish(processes)
    assert codes == [train.PREEMPTED] * 2, errors


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.slow
def test_four_processes_resumed_by_two_and_by_one(tmp_path):
    corpus = tmp_path / "text.py"
    corpus.write_text("def f(x):\n    return x + 1\n\n\n" * 100)
    fields = {**SMALL, "data.path": corpus, "train.sample": 0}
    overrides = [f"--config.{k}={v}" for k, v in fields.items()]
    workdir = tmp_path / "run"
    for count, steps in ((4, 2), (2, 4), (1, 6)):
        stop = f"--config.train.steps={steps}"
        mesh_of = "--mesh=data:2,model:2"
        codes, out, errors = finish(slurm(count, workdir, *overrides, stop, mesh_of))
        assert codes == [0] * count, errors
        # The first process alone speaks (but for the transport's own lines).
        assert ["this model" in x for x in out] == [True] + [False] * (count - 1)
    alone = tmp_path / "alone"
    # The schedule's end moves with the steps: the same three stages on one process.
    for steps in (2, 4, 6):
        run.run(
            "dion:smoke",
            [*overrides, f"--config.train.steps={steps}"],
            workdir=str(alone),
            mesh="data:8",
            quiet=True,
        )
    got, want = losses(workdir), losses(alone)
    assert sorted(got) == sorted(want) == [2, 4, 6]
    np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-4)


@pytest.mark.matrix
def test_a_killed_process_ends_the_others(tmp_path):
    processes = pair(LINE, tmp_path)
    for line in processes[1].stdout:
        if line.strip() == "three":
            break
    processes[1].kill()
    began = time.monotonic()
    codes, _, errors = finish(processes)
    assert codes[0] not in (0, 75), errors
    assert time.monotonic() - began < 60  # JAX's default is 100 s, here it is 10.
