"""SIGTERM of a run, agreed on by all its processes.

A run is stopped where nothing is lost: while it trains after the step, with its state
saved; everywhere else (start, compilation, measurements, figures) at once.
"""

import _thread
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from jaxpapers import processes

PREEMPTED = 75  # EX_TEMPFAIL: the same command again continues
GRACE = 5.0  # seconds to unwind in, where the main thread may be inside a compiler


class Preempted(Exception):
    """The run was asked to stop; its state is saved if it has a workdir."""


class Stop:
    """A context in which SIGTERM raises ``Preempted`` instead of ending the process.

    Inside ``later()`` it only sets ``raised``. Contexts are nested: the outermost one
    handles the signal, see ``stopping``.

    Attributes:
      raised: whether the signal came.
      interrupted: whether it raised at once; what is raised after that comes of it (a
        module that is being imported makes it an ImportError).
    """

    def __init__(self, hard: bool = False, number: int = signal.SIGTERM):
        """Args: hard: end the process where it does not unwind within ``GRACE``; number:
        of another signal. SIGTERM itself is left to JAX's service where that runs."""
        self.raised, self.interrupted, self.number = False, False, number
        self._hard, self._deferred = hard, False
        self._over, self._nothing_lost = threading.Event(), threading.Event()
        self._nothing_lost.set()
        self._old: Any = None
        self._pipe: tuple[int, int] | None = None
        self._announce: Callable[[], None] | None = None

    def __enter__(self) -> "Stop":
        if self.number == signal.SIGTERM and processes.client() is not None:
            return self  # JAX's service has it, and tells all processes, see preempted.
        try:
            self._old = signal.signal(self.number, self._handle)
        except ValueError:  # Not in the main thread (a notebook's worker): no handler.
            return self
        if self._hard:
            # A handler in Python waits for the compiler to return; a thread does not.
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._old_pipe = signal.set_wakeup_fd(
                self._pipe[1], warn_on_full_buffer=False
            )
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._over.set()
        if self._pipe:
            signal.set_wakeup_fd(self._old_pipe)
            os.close(self._pipe[1])
        if self._old is not None:
            signal.signal(self.number, self._old)

    @contextmanager
    def later(self) -> Generator[None, None, None]:
        """Lets SIGTERM set ``raised`` only: its caller looks, saves and stops."""
        self._deferred = True
        self._nothing_lost.clear()
        try:
            yield
        finally:
            self._deferred = False
            self._nothing_lost.set()
        self._check()  # It came after the caller's last look.

    @contextmanager
    def at_once(self) -> Generator[None, None, None]:
        """Inside ``later``: SIGTERM raises ``Preempted`` for the caller to save."""
        deferred, self._deferred = self._deferred, False
        try:
            self._check()
            yield
        finally:
            self._deferred = deferred

    def _check(self) -> None:
        if self.raised:
            raise Preempted("stopped")

    def _handle(self, signum, frame):
        if self.raised:
            return
        self.raised = True
        if not self._deferred:
            if self._hard and _imports(frame):
                end("stopped; the same command continues", PREEMPTED)
            self.interrupted = True
            raise Preempted("stopped")

    def _watch(self):
        assert self._pipe is not None
        with open(self._pipe[0], "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] == self.number:
                    if self._announce:
                        self._announce()
                    self.end_process()

    def share(self) -> None:
        """All processes of the job stop when one of them is told to."""
        client, key = processes.client(), "jaxpapers/stop"

        def announce():
            with contextlib.suppress(Exception):  # It is set, or nobody is left.
                client.key_value_set(key, "1")

        def listen():
            while not self._over.wait(1.0):
                try:
                    client.key_value_try_get(key)
                except Exception:  # Not set yet.
                    continue
                if not self.raised:
                    _thread.interrupt_main(signal.Signals(self.number))
                return self.end_process()

        self._announce = announce
        threading.Thread(target=listen, daemon=True).start()

    def end_process(self) -> None:
        """Ends the process with 75, in ``GRACE`` seconds where it may be stopped."""
        while not self._over.is_set():
            self._nothing_lost.wait()
            if not self._over.wait(GRACE) and self._nothing_lost.is_set():
                end("stopped; the same command continues", PREEMPTED)


def _imports(frame: Any) -> bool:
    """Whether a module is being imported: one of C prints its own error."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_outermost: Stop | None = None


@contextmanager
def stopping(
    hard: bool = False, number: int = signal.SIGTERM
) -> Generator[Stop, None, None]:
    """The ``Stop`` around this code, or a new one."""
    global _outermost
    if _outermost is not None:
        yield _outermost
        return
    with Stop(hard, number) as _outermost:
        try:
            yield _outermost
        finally:
            _outermost = None


def share() -> None:
    """See ``Stop.share``; of the outermost one, if there is one."""
    if _outermost is not None:
        _outermost.share()


def end(text: str, code: int) -> None:
    """Ends the process now, with one line; nothing is unwound."""
    print(f"jaxpapers: {text}", file=sys.stderr, flush=True)
    os._exit(code)


def preempted(stop: Stop, step: int) -> bool:
    """Whether this process got SIGTERM.

    With several processes: whether JAX's service says that all stop after this step,
    since one of them got it.
    """
    import jax

    if jax.process_count() == 1:
        return stop.raised
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(step))
