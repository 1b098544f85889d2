"""A disk that is full, gone, read-only or a file: one line, and the run goes on later."""

import resource
import shutil
import time

import chex
import jax
import pytest

from jaxpapers import checkpoint, cli, folder, trackers
from jaxpapers import train as trainer
from tests.toys.command import CONFIG, once, register

# Tensorstore's futures find their event loop closed after a save that failed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
compile_once = once(trainer.compile)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The toy papers; one compiled step for the runs of this file."""
    register(monkeypatch.setattr, monkeypatch.setitem)
    monkeypatch.setattr(trainer, "compile", compile_once)


@pytest.fixture
def call(capsys):
    """The toy run; (exit code, lines of the standard error)."""

    def call(workdir, steps, *arguments):
        code = cli.main(
            ["run", "line", f"--config={CONFIG}", f"--workdir={workdir}", "--quiet",
             f"--config.train.steps={steps}", "--config.train.save_every=2", *arguments]
        )  # fmt: skip
        return code, capsys.readouterr().err.splitlines()

    return call


def params(workdir):
    return jax.device_get(folder.load_run(str(workdir))[-1].params)


def at_batch(monkeypatch, start, action):
    """Calls ``action`` when the batch of an example is read."""
    from jaxpapers import tasks
    from jaxpapers.run import load_config

    sums = tasks.load(load_config("line", (), CONFIG)).Sums
    batch = sums.batch

    def wrapped(self, first, *args):
        if first == start:
            action()
        return batch(self, first, *args)

    monkeypatch.setattr(sums, "batch", wrapped)


@pytest.fixture
def full():
    """Makes every write of more than 600 bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(call, tmp_path, monkeypatch, full):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call(whole, 6)[0] == 0

    def fill():
        while not (cut / "checkpoints" / "2").exists():
            time.sleep(0.01)
        full()

    with monkeypatch.context() as patch:
        at_batch(patch, 3 * 8, fill)
        code, lines = call(cut, 6)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and len(lines) == 1, lines
    assert "cannot write a checkpoint into" in lines[0] and "[2] are whole" in lines[0]
    assert checkpoint.steps(cut / "checkpoints") == [2]
    assert call(cut, 6) == (0, [])
    chex.assert_trees_all_equal(params(cut), params(whole))


def test_a_workdir_that_vanishes(call, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_batch(patch, 3 * 8, lambda: shutil.rmtree(workdir))
        code, lines = call(workdir, 6)
    assert code == 1 and len(lines) == 1 and str(workdir) in lines[0], lines
    assert call(workdir, 6) == (0, [])


@pytest.mark.parametrize(
    "place, message",
    [
        ("file", "is a file, expected a folder"),
        ("file/run", "Not a directory"),
        ("/proc/run", "No such file or directory"),
    ],
)
def test_a_workdir_that_cannot_be(call, tmp_path, monkeypatch, place, message):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(trainer, "fit", lambda *a, **k: pytest.fail("trained"))
    code, lines = call(tmp_path / place, 6)
    assert code == 1 and len(lines) == 1 and message in lines[0]
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("command", ["eval", "sample", "export", "plot"])
@pytest.mark.parametrize("what", ["nothing", "file"])
def test_commands_of_what_is_no_run(tmp_path, capsys, command, what):
    place = tmp_path / what
    if what == "file":
        place.write_text("x")
    out = [str(tmp_path / "out")] if command == "export" else []
    assert cli.main([command, str(place), *out]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jaxpapers: ") and str(place) in err and err.count("\n") == 1


@pytest.mark.parametrize("out", ["no/x.safetensors", "."])
def test_an_export_to_where_no_file_can_be(tmp_path, capsys, out):
    (tmp_path / "x").touch()  # A folder that holds something is not written into.
    assert cli.main(["export", str(tmp_path), str(tmp_path / out)]) == 1
    assert "folder" in capsys.readouterr().err


def test_metrics_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = trackers.Jsonl(tmp_path)
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        writer.write(1, {"loss": 1.0})
    writer.close()
