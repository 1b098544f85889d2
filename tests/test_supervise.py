"""What a supervisor says of a process of a job, and the codes that it gives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpapers import arguments, cli, mesh, supervise

ROOT = Path(__file__).parent.parent
OURS = "jaxpapers: ended by "
GLOG = "E1128 20:44:15.7 15242 coordination_service.cc:1549] tasks are unhealthy:\n1\n"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Supervises a script in place of the command line; (code, standard error)."""

    def run(script):
        folder = tmp_path / "jaxpapers"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / "__main__.py").write_text(f"import os, sys, signal, time\n{script}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        return supervise.supervise([]), capfd.readouterr().err

    return run


def say(text):
    return f"print({text!r}, end='', file=sys.stderr, flush=True)"


@pytest.mark.parametrize("code", supervise.CODES)
def test_its_own_codes_and_lines_are_passed_on(run, code):
    assert run(f"{say('a warning')}; sys.exit({code})") == (code, "a warning")


@pytest.mark.parametrize(
    "script, code, said",
    [
        (f"{say(GLOG)}; os.abort()", 1, f"jaxpapers: {supervise.LOST}\n"),
        (f"{say('jaxpapers: no' + chr(10) + GLOG)}; os.abort()", 1, "jaxpapers: no\n"),
        (say(GLOG) + "; os.kill(os.getpid(), 9)", 1, f"{GLOG}{OURS}SIGKILL\n"),
        ("os.abort()", 1, f"{OURS}SIGABRT\n"),
        ("sys.exit(9)", 1, f"{OURS}code 9\n"),
    ],
    ids=["lost", "lost after its own line", "killed", "aborted", "odd code"],
)  # fmt: skip
def test_an_end_by_a_signal_is_one_line(run, script, code, said):
    assert run(script) == (code, said)


def test_sigterm_reaches_both_handlers(run):
    script = f"""
got = []
for s in (signal.SIGTERM, signal.Signals({int(supervise.STOP)})):
    signal.signal(s, lambda n, f: got.append(n))
os.kill(os.getppid(), signal.SIGTERM)
while len(got) < 2: time.sleep(0.01)
sys.exit({supervise.PREEMPTED})
"""
    before = signal.getsignal(signal.SIGTERM)
    assert run(script) == (supervise.PREEMPTED, "")
    assert signal.getsignal(signal.SIGTERM) is before


def test_before_it_has_handlers_a_stop_is_a_stop(run):
    code, said = run("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    assert code == 75 and said == "jaxpapers: stopped; the same command continues\n"


def test_it_ends_with_its_supervisor():
    """The descriptor that it watches is closed when the supervisor is killed."""
    ours, theirs = os.pipe()
    script = (
        "import time; from jaxpapers import supervise; supervise.follow();"
        "print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], pass_fds=[ours], stdout=subprocess.PIPE,
        env={**os.environ, supervise.CHILD: str(ours)}, cwd=ROOT, text=True,
    ) as child:  # fmt: skip
        os.close(ours)
        assert child.stdout.readline() == "up\n" and child.poll() is None
        os.close(theirs)
        assert child.wait(30) == 1


@pytest.mark.parametrize(
    "text, lost",
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection reset by peer", True),
        ("UNAVAILABLE: The following tasks are unhealthy", True),
        ("Timed out while waiting for async_write_complete barrier.", True),
        ("data.batch must be >= 1, got 0", False),
    ],
)
def test_errors_of_a_lost_peer(text, lost):
    assert supervise.is_lost(RuntimeError(text)) == lost


def test_refusals_of_ours_are_no_lost_peer(monkeypatch, capsys):
    monkeypatch.setattr(supervise, "is_supervised", lambda: True)

    def without_a_job(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", without_a_job)
    for options, said in (
        ({"heartbeat": 0}, "--heartbeat must be at least 1 second, got 0"),
        ({}, "--distributed: JAX finds no usable job around this process: coord"),
    ):
        with pytest.raises(ValueError) as caught:
            mesh.start_distributed(**options)
        assert cli._failed(caught.value) == 1
        line = capsys.readouterr().err
        assert line.startswith(f"jaxpapers: {said}") and line.count("\n") == 1


def test_ids_of_devices():
    assert arguments.ids(None) is None and arguments.ids("0,12") == [0, 12]
    for text in ("a,b", "-1", "0,", "0 1"):
        with pytest.raises(ValueError, match="--local-device-ids: expected numbers"):
            arguments.ids(text)
