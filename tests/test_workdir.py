"""Locks of folders, files that are whole or not there, paths of this machine."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxpapers import run, workdir
from jaxpapers.config import load_config

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from jaxpapers import workdir
with workdir.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, holder):
    with pytest.raises(ValueError, match=f"process {holder.pid} on .* is writing"):
        with workdir.lock(tmp_path):
            pytest.fail("got the lock")
    holder.kill()
    holder.wait()
    assert (tmp_path / workdir.LOCK).exists()  # Left there, and held by nobody.
    with workdir.lock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_command_is_refused_before_it_reads(tmp_path, holder, monkeypatch):
    monkeypatch.setattr("jaxpapers.tasks.read", lambda config: pytest.fail("read"))
    with pytest.raises(ValueError, match="choose another --workdir"):
        run.run("dion:smoke", workdir=str(tmp_path), quiet=True)


def test_one_thread_holds_it_as_often_as_it_likes(tmp_path):
    refused = []

    def other():
        try:
            with workdir.lock(tmp_path):
                pass
        except ValueError as e:
            refused.append(str(e))

    with workdir.lock(tmp_path), workdir.lock(f"{tmp_path}/x/.."):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "another thread" in refused[0]
    other()
    assert len(refused) == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    workdir.write(path, "old")
    with pytest.raises(RuntimeError), workdir.replaced(path) as part:
        assert part.suffix == ".json"
        part.write_text("ne")
        raise RuntimeError("killed")
    assert path.read_text() == "old"
    workdir.write(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "path", ["gs://bucket/run", "s3://b/x", "gs:/bucket", "file:///x"]
)
def test_urls_are_refused_before_anything_is_read(path, monkeypatch):
    monkeypatch.setattr("jaxpapers.tasks.read", lambda config: pytest.fail("read"))
    with pytest.raises(ValueError, match="--cache: 'gs:/b' is a URL"):
        run.data("ml-100k", "gs://b")
    with pytest.raises(ValueError, match="--config: .* is a URL"):
        load_config("din", (), "gs://bucket/config.py")
    with pytest.raises(ValueError, match="--workdir: .* has a zero byte"):
        workdir.local("a\0b", "--workdir")
    with pytest.raises(ValueError, match="--workdir: .* is a URL"):
        run.run("dion:smoke", workdir=path)
    for field in ("data.path", "train.init_from"):
        with pytest.raises(ValueError, match=f"{field}: .* is a URL"):
            run.run("dion:smoke", [f"--config.{field}={path}"])
    for action in (run.evaluate, run.sample, lambda p: run.export(p, "x")):
        with pytest.raises(ValueError, match="is a URL"):
            action(path)


def test_paths_of_this_machine():
    assert workdir.local("~/a", "x") == Path.home() / "a"
    for path in ("a:b/c", "C:/x", "./gs:/x"):
        assert workdir.local(path, "x") == Path(path)
