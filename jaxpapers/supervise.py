"""A process of a job, and one beside it that sees and says how it ends.

JAX ends the processes of a job whose peer is gone by ``abort``, with pages of C++, and
takes SIGTERM for itself. So ``jaxpapers run --distributed`` starts itself again and
waits: signals are passed on, what the transport says of a lost peer becomes one line, and
the exit code is that of the command line.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from jaxpapers.signals import PREEMPTED

CHILD = "JAXPAPERS_SUPERVISED"  # Descriptor that is closed when the supervisor ends.
STOP = signal.SIGUSR1  # SIGTERM for our own handler: JAX's service has the other one.
LOST = (
    "another process of the job is gone; started again, the same command goes on from "
    "the last checkpoint"
)
CODES = (0, 1, 2, PREEMPTED, 130)
# The first line of what the transport says before it ends the process.
_TRANSPORT = re.compile(
    r"^([EF]\d{4} .*(coordination|distributed|client\.|preemption)"
    r"|W\d{4} .*preemption.*UNAVAILABLE|terminate called|\*\*\*)"
)
_NOTICE = re.compile(r"^W\d{4} .*preemption_notifier.*SIGTERM caught")


def supervise(
    arguments: Sequence[str], program: Sequence[str] = ("-m", "jaxpapers")
) -> int:
    """Runs the command line in a process of its own.

    Args:
      arguments: of the command line.
      program: that Python runs with them.

    Returns:
      Its exit code; 1 where it ended by a signal, with a line that says so.
    """
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        [sys.executable, *program, *arguments],
        env={**os.environ, CHILD: str(ours)}, pass_fds=[ours], stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    os.close(ours)

    told = []

    def forward(signum, frame):
        told.append(signum)
        process.send_signal(signum)
        if signum == signal.SIGTERM:
            process.send_signal(STOP)

    before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        said, hidden = _pass_on(process)
        code = process.wait()
    finally:
        os.close(theirs)
        if process.stderr:
            process.stderr.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    if code in CODES:
        return code
    if said:
        return PREEMPTED if "the same command continues" in said else 1
    if told and -code in (signal.SIGTERM, STOP):  # Before its own handlers were there.
        print("jaxpapers: stopped; the same command continues", file=sys.stderr)
        return PREEMPTED
    if code == -signal.SIGABRT and hidden:
        print(f"jaxpapers: {LOST}", file=sys.stderr)
        return 1
    name = signal.Signals(-code).name if code < 0 else f"code {code}"
    print("".join(hidden) + f"jaxpapers: ended by {name}", file=sys.stderr)
    return 1


def _pass_on(process: subprocess.Popen) -> tuple[str, list[str]]:
    """Prints the process's errors; its last own line, and what the transport said."""
    said, hidden = "", []
    assert process.stderr is not None
    for line in process.stderr:
        ours = line.startswith("jaxpapers: ")
        said = line if ours and "is damaged" not in line else said
        if ours or os.environ.get("JAXPAPERS_TRACEBACK"):
            print(line, end="", file=sys.stderr, flush=True)
        elif hidden or _TRANSPORT.match(line):
            hidden.append(line)
        elif not _NOTICE.match(line):
            print(line, end="", file=sys.stderr, flush=True)
    return said, hidden


def is_supervised() -> bool:
    """Whether this process has a supervisor."""
    return CHILD in os.environ


def follow() -> None:
    """Ends this process when its supervisor does, however that ends.

    SIGTERM is left to JAX's service from here on; before it starts it does nothing.
    """
    ours = int(os.environ[CHILD])
    signal.signal(signal.SIGTERM, lambda number, frame: None)

    def wait():
        with contextlib.suppress(OSError):
            os.read(ours, 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def is_lost(error: Exception) -> bool:
    """Whether an error comes of a peer that is gone."""
    found = re.search(
        r"Gloo|[Cc]oordination|[Cc]onnection (reset|closed|refused)|heartbeat|UNAVAILABLE"
        r"|DEADLINE_EXCEEDED|[Bb]arrier|preempted, or crashed",
        f"{error} {error.__cause__ or ''}",
    )
    return bool(found)


def leave(code: int) -> NoReturn:
    """Ends a process of a job now: JAX would wait for peers that may be gone.

    Those that stop together say goodbye to each other first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (0, PREEMPTED):
        import jax

        goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        goodbye.start()
        goodbye.join(10)
    os._exit(code)
