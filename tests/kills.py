"""Runs that are killed at random points: what is lost, what the same command restores.

    python -m tests.kills [NAME ...] [--points 13] [--seed 0]

A run of each paper is killed again and again, by SIGKILL or SIGTERM, while it starts,
compiles, steps, writes a checkpoint, evaluates, or goes from one stage to the next, and
then left alone. It must end with the parameters of a run that nobody killed, bit by bit,
and with every line of its metrics; no kill may leave a folder that the command refuses.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxpapers import checkpoint, plots

ROOT = Path(__file__).parent.parent
PAPERS = {
    "dion:smoke": {
        "data.context": 16, "data.batch": 8, "data.eval_batch": 8, "net.width": 32,
        "net.heads": 2, "net.layers": 1, "train.steps": 60, "train.eval_every": 15,
        "train.save_every": 10, "train.sample": 4,
    },
    "sft_pg:smoke": {
        "data.count": 500, "data.eval_count": 200, "pretrain.steps": 60,
        "pretrain.eval_every": 30, "train.steps": 6, "train.eval_every": 2,
        "train.save_every": 3,
    },
    "defer:smoke": {
        "data.clicks": 4000, "data.batch": 64, "train.steps": 60, "train.eval_every": 20,
        "train.save_every": 10, "data.baselines": "('pretrained',)",
    },
    "score_wasserstein:smoke": {
        "data.count": 500, "data.eval_count": 200, "train.steps": 60,
        "train.eval_every": 20, "train.save_every": 10,
    },
}  # fmt: skip
POINTS = ("start", "compile", "step", "checkpoint", "evaluation", "stage", "any")
LIMIT = 300.0  # seconds that a run may take


def command(name: str, workdir: Path, corpus: Path) -> list[str]:
    """The command line of a small run."""
    files = [str(corpus)] if name.startswith("dion") else []
    fields = [f"--config.{k}={v}" for k, v in PAPERS[name].items()]
    return [sys.executable, "-m", "jaxpapers", "run", name, *files, *fields,
            f"--workdir={workdir}", "--alone"]  # fmt: skip


def start(arguments: list[str], cache: Path) -> subprocess.Popen:
    """The run as a process of one CPU device."""
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    return subprocess.Popen(
        arguments, env=environment, cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and errors."""
    try:
        _, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"the run did not end in {LIMIT} s") from None
    return process.returncode, errors


def reached(point: str, workdir: Path, before: dict) -> bool:
    """Whether a run has come to a point; ``before``: see ``look``."""
    now = look(workdir)
    if point == "compile":
        return (workdir / "config.json").exists() or now["stages"] != {}
    if point == "step":
        return now["lines"] > before["lines"]
    if point == "checkpoint":
        return any(list(p.glob("*orbax-checkpoint-tmp*")) for p in places(workdir))
    if point == "evaluation":
        return now["evaluations"] > before["evaluations"]
    if point == "stage":
        return now["stages"] != before["stages"] and any(now["stages"].values())
    return True


def look(workdir: Path) -> dict:
    """What a run has written so far."""
    files = [p.with_name("metrics.jsonl") for p in places(workdir)]
    texts = [p.read_text() for p in files if p.exists()]
    return {
        "lines": sum(text.count("\n") for text in texts),
        "evaluations": sum(text.count("validation_") for text in texts),
        "stages": {str(p): checkpoint.steps(p)[-1:] for p in places(workdir)},
    }


def places(workdir: Path) -> list[Path]:
    """The folders of checkpoints of a workdir's runs, those that are there."""
    return [workdir / "checkpoints", *sorted(workdir.glob("stages/*/checkpoints"))]


def handles_sigterm(process: subprocess.Popen) -> bool:
    """Whether Python is up and has a handler; before that it is nobody's signal."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    mask = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
    return bool(mask >> (signal.SIGTERM - 1) & 1)


def kill(
    process: subprocess.Popen, point: str, how: int, workdir: Path, rng: random.Random
) -> None:
    """Sends the signal at the point, or lets the run end where it comes to none."""
    before, began = look(workdir), time.monotonic()

    def wait(condition: Callable[[], bool]) -> None:
        while process.poll() is None and not condition():
            assert time.monotonic() - began < LIMIT, f"never came to {point}"
            time.sleep(0.005)

    wait(lambda: handles_sigterm(process))
    wait(lambda: reached(point, workdir, before))
    pause = {"start": 3.0, "compile": 3.0, "checkpoint": 0.1, "any": 15.0}.get(
        point, 0.5
    )
    until = time.monotonic() + rng.uniform(0, pause)
    wait(lambda: time.monotonic() > until)
    if process.poll() is None:
        process.send_signal(how)


def state(workdir: Path) -> dict[str, bytes]:
    """The arrays of the last checkpoint of every run in a workdir."""
    found = {}
    for place in sorted(workdir.glob("**/checkpoints")):
        step = checkpoint.latest_step(place)
        with warnings.catch_warnings():  # Of a restore without a target.
            warnings.simplefilter("ignore", UserWarning)
            tree = ocp.PyTreeCheckpointHandler().restore(place / str(step) / "state")
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = f"{place.relative_to(workdir)} {jax.tree_util.keystr(path)}"
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            found[name] = np.asarray(leaf).tobytes()
    return found


def lines(workdir: Path) -> list[tuple[str, str]]:
    """(run, line) of the metrics, without what a clock gave."""
    return [
        (
            str(file.relative_to(workdir)),
            json.dumps(
                {k: v for k, v in record.items()
                 if k not in ("time", "steps_per_second")}, sort_keys=True,
            ),
        )
        for file in sorted(workdir.glob("**/metrics.jsonl"))
        for record in plots.read_metrics(file)
    ]  # fmt: skip


def check(name: str, folder: Path, points: int, seed: int = 0, say=lambda text: None):
    """Kills a paper's run at random points and compares it with one that was left alone.

    Args:
      name: of ``PAPERS``.
      folder: for the runs.
      points: how many kills.
      seed: of the points.
      say: called with a line for each kill.

    Raises:
      AssertionError: something is lost.
    """
    rng = random.Random(f"{name} {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    corpus, cache = folder / "text.py", folder / "cache"
    corpus.write_text(
        "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(800))
    )
    whole, cut = folder / "whole", folder / "cut"
    code, errors = finish(start(command(name, whole, corpus), cache))
    assert code == 0, errors
    arguments = command(name, cut, corpus)
    done = 0
    for i in range(points):
        point = POINTS[i % len(POINTS)]
        how = rng.choice((signal.SIGKILL, signal.SIGTERM))
        process = start(arguments, cache)
        try:
            kill(process, point, how, cut, rng)
            code, errors = finish(process)
        finally:
            process.kill()
        label = f"{name}: {signal.Signals(how).name} at {point}: {code}"
        say(f"{label}  {look(cut)}")
        allowed = (0, 75) if how == signal.SIGTERM else (0, -signal.SIGKILL)
        assert code in allowed, f"{label}\n{errors}"
        assert "Traceback" not in errors, errors
        if code == 0:  # It ended before the signal: another one from the start.
            done += 1
            same(whole, cut)
            cut = folder / f"cut{done}"
            arguments = command(name, cut, corpus)
    code, errors = finish(start(arguments, cache))
    assert code == 0, errors
    same(whole, cut)


def same(whole: Path, cut: Path) -> None:
    """Raises AssertionError where the killed run lacks anything of the other."""
    expected, actual = state(whole), state(cut)
    assert list(expected) == list(actual)
    differ = [name for name in expected if expected[name] != actual[name]]
    assert not differ, f"{len(differ)} of {len(expected)} arrays differ: {differ[:5]}"
    written = lines(cut)
    missing = [line for line in lines(whole) if line not in written]
    assert not missing, f"{len(missing)} lines are missing: {missing[:3]}"
    rows = [
        json.loads((w / "comparison.json").read_text())["rows"] for w in (whole, cut)
    ]
    assert rows[0] == rows[1], "other rows"
    left = [p for p in cut.rglob("*") if "orbax-checkpoint-tmp" in p.name
            or p.name.startswith(".part.") or p.name == ".lock"]  # fmt: skip
    assert not left, f"left behind: {left}"


def main() -> None:
    """The command line, see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*PAPERS, []], default=[])
    parser.add_argument("--points", type=int, default=13)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or PAPERS:
            place = Path(folder) / name.partition(":")[0]
            check(name, place, options.points, options.seed, print)


if __name__ == "__main__":
    main()
