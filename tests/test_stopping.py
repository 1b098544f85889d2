"""A study of the toy papers that is stopped anywhere ends with 75, and goes on."""

import functools
import importlib
import json
import os
import shutil
import signal

import chex
import jax
import pytest

from jaxpapers import checkpoint, cli, folder, outputs, plots, tasks
from jaxpapers import train as trainer
from tests.toys.command import CONFIG, once, register

matrix = functools.partial(pytest.param, marks=pytest.mark.matrix)
compile_once = once(trainer.compile)
FIELDS = ("train.steps=6", "train.eval_every=2", "train.save_every=3")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The toy papers; one compiled step for the runs of this file."""
    register(monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(trainer, "compile", compile_once)


def call(workdir, *arguments):
    fields = [f"--config.{x}" for x in FIELDS]
    return cli.main(
        [
            "run",
            "line",
            f"--config={CONFIG}",
            f"--workdir={workdir}",
            *fields,
            *arguments,
        ]
    )


def lines(workdir):
    """The metrics of a run, without what a clock gave."""
    return [
        {k: v for k, v in record.items() if k not in ("time", "steps_per_second")}
        for record in plots.read_metrics(workdir)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    with pytest.MonkeyPatch.context() as patch:
        register(patch.setattr, patch.setitem)
        patch.setattr(trainer, "compile", compile_once)
        workdir = tmp_path_factory.mktemp("runs") / "whole"
        assert call(workdir) == 0
        return workdir


def terminates(function, after=False, number=1):
    """The function, with SIGTERM at its ``number``th call, before or after it."""
    calls = []

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == number and not after:
            os.kill(os.getpid(), signal.SIGTERM)
        result = function(*args, **kwargs)
        if len(calls) == number and after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    return wrapped


@pytest.mark.parametrize(
    "module, name, options, step",
    [
        matrix(tasks, "read", {}, None),  # start
        (trainer, "compile", {"after": True}, None),
        matrix(checkpoint, "restore", {}, 3),
        (outputs, "write", {}, 6),  # after the final evaluation
        matrix(outputs, "draw", {}, 6),
        matrix(plots, "draw", {"after": True}, 6),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_stopped_outside_of_training(
    tmp_path, whole, monkeypatch, capsys, module, name, options, step
):
    if step == 3:  # There is a checkpoint to restore.
        assert call(tmp_path, "--config.train.steps=3") == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, name, terminates(getattr(module, name), **options))
        assert call(tmp_path) == 75
    assert "stopped; the same command continues" in capsys.readouterr().err
    assert checkpoint.latest_step(tmp_path / "checkpoints") == step
    assert call(tmp_path) == 0
    same(tmp_path, whole)


def test_what_an_interruption_becomes_is_a_stop(tmp_path, monkeypatch, capsys):
    """A module of C that is being imported makes another error of it."""

    def importing(config):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except trainer.Preempted as e:
            raise ImportError("initializing the extension") from e

    monkeypatch.setattr(tasks, "read", importing)
    assert call(tmp_path) == 75
    assert "stopped; the same command continues" in capsys.readouterr().err


def same(workdir, whole):
    states = [folder.load_run(str(w))[-1].params for w in (workdir, whole)]
    chex.assert_trees_all_equal(*map(jax.device_get, states))
    missing = [line for line in lines(whole) if line not in lines(workdir)]
    assert not missing
    comparisons = [
        json.loads((w / "comparison.json").read_text())["rows"]
        for w in (workdir, whole)
    ]
    assert comparisons[0] == comparisons[1]


@pytest.mark.parametrize("step", [matrix(1), 2, matrix(3), matrix(4), matrix(6)])
def test_stopped_at_a_step_it_keeps_every_evaluation(
    tmp_path, whole, monkeypatch, step
):
    """Steps 2, 4 and 6 are evaluated, steps 3 and 6 saved anyway."""
    sums = importlib.import_module("jaxpapers.tasks.lines").Sums
    with monkeypatch.context() as patch:
        patch.setattr(sums, "batch", terminates(sums.batch, number=step + 1))
        assert call(tmp_path) == 75
    assert checkpoint.latest_step(tmp_path / "checkpoints") == step
    assert call(tmp_path) == 0
    same(tmp_path, whole)


@pytest.mark.parametrize("number, step", [matrix(1, 2), (2, 4), matrix(3, 6)])
def test_stopped_in_an_evaluation_it_is_made_again(
    tmp_path, whole, monkeypatch, number, step
):
    """The third one is the final measurement."""
    lines = importlib.import_module("jaxpapers.tasks.lines")
    with monkeypatch.context() as patch:
        patch.setattr(lines, "Finding", terminates(lines.Finding, number=number))
        assert call(tmp_path) == 75
    assert checkpoint.latest_step(tmp_path / "checkpoints") == step
    assert call(tmp_path) == 0
    same(tmp_path, whole)


def test_a_killed_first_save_is_started_anew(tmp_path, whole):
    """What kill -9 leaves: the config, metrics, a folder with orbax's temporary name."""
    assert call(tmp_path, "--config.train.steps=3") == 0
    saved = tmp_path / "checkpoints"
    (saved / "3").rename(saved / "3.orbax-checkpoint-tmp")
    (tmp_path / ".lock").write_text("process 1 on nowhere")
    (tmp_path / ".part.config.json").write_text("{")
    assert checkpoint.steps(saved) == []
    assert call(tmp_path, "--fresh") == 0
    assert checkpoint.steps(saved) == [3, 6]
    same(tmp_path, whole)


def test_fewer_steps_than_there_are(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    assert call(tmp_path / "run", "--config.train.steps=5") == 1
    assert "train.steps=5, but" in (err := capsys.readouterr().err) and "step 6" in err
    assert lines(tmp_path / "run") == lines(whole)


def test_another_papers_workdir_is_named(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "paper": "din"}))
    assert call(tmp_path / "run") == 1
    assert "holds a run of din, got line" in capsys.readouterr().err
