"""SIGTERM: raised where nothing is lost, kept for later where a state is to be saved."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpapers import processes, signals

ROOT = Path(__file__).parent.parent


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_where_nothing_is_lost_it_raises():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(signals.Preempted), signals.stopping() as stop:
        terminate()
        pytest.fail("went on")
    assert stop.raised
    assert signal.getsignal(signal.SIGTERM) is before


def test_later_keeps_it_for_its_caller_and_for_the_end():
    with pytest.raises(signals.Preempted), signals.stopping() as stop:
        with stop.later():
            terminate()
            assert stop.raised
            with pytest.raises(signals.Preempted), stop.at_once():
                pytest.fail("entered")
            terminate()  # The second one changes nothing.
        pytest.fail("went on after the last look")


def test_inside_later_what_can_be_done_anew_stops():
    with pytest.raises(signals.Preempted), signals.stopping() as stop:
        with stop.later():
            with pytest.raises(signals.Preempted), stop.at_once():
                terminate()
                pytest.fail("went on")
            saved = stop.raised
    assert saved


def test_the_outermost_handles_it():
    with signals.stopping() as outer, signals.stopping() as inner:
        assert inner is outer
        handler = signal.getsignal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) != handler
    with signals.stopping() as other:
        assert other is not outer


def test_one_of_several_processes_leaves_it_to_jax(monkeypatch):
    monkeypatch.setattr(processes, "client", object)
    before = signal.getsignal(signal.SIGTERM)
    with signals.stopping():
        assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "command, body, after, code",
    [
        ("run", "terminate()", "", 75),
        ("train", "0", "terminate()", 0),
        ("plot", "terminate()", "", -signal.SIGTERM),
    ],
)
def test_a_command_that_trains_ends_with_75_or_with_its_own_code(
    command, body, after, code
):
    """Before the command line listens, and after it is done."""
    script = (
        "import os, signal, sys\n"
        "terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv = ['jaxpapers', {command!r}]\n"
        "from jaxpapers import __main__, cli\n"
        f"cli.main = lambda: {body}\n"
        f"code = __main__.main()\n{after}\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert done.returncode == code


BUSY = """
import hashlib, sys
from jaxpapers import signals
signals.GRACE = 0.2
with signals.stopping(hard=True) as stop:
    while True:
        try:
            print("busy", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # No Python runs here.
        except signals.Preempted:
            pass
"""


IMPORTING = """
import os, signal, sys
from jaxpapers import signals
with signals.stopping(hard=True):
    import interrupted
"""


def test_an_import_is_not_unwound(tmp_path):
    """Modules of C turn what is raised inside them into errors that they print."""
    (tmp_path / "interrupted.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n    import time\n"
        "    time.sleep(30)\n"
        "except BaseException as e:\n    raise ImportError('initializing') from e\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=30,
    )  # fmt: skip
    assert done.returncode == 75, done.stderr
    assert done.stderr == "jaxpapers: stopped; the same command continues\n"


def test_a_compiler_does_not_hold_it_up():
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "busy\n"
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == signals.PREEMPTED == 75
    assert errors == "jaxpapers: stopped; the same command continues\n"
