"""SIGTERM and clocks of a run, agreed on by all its processes."""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(seconds: int | float, step: int) -> float:
    """Seconds of process 0, broadcast every 20 steps, 0 in between.

    All processes then save at the same step.
    """
    if jax.process_count() == 1:
        return seconds
    if step % 20:
        return 0.0
    return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


def preempted(stop, manager, step: int) -> bool:
    """Whether this process got SIGTERM.

    With several processes: whether any of them got a preemption notice.
    """
    if jax.process_count() > 1:
        return bool(manager and manager.reached_preemption(step))
    return stop.raised


class Flag:
    """Context in which SIGTERM sets ``raised`` instead of ending the process.

    With several processes JAX's preemption service handles SIGTERM instead.
    """

    def __init__(self):
        self.raised = False

    def __enter__(self):
        self._old = None
        if jax.process_count() > 1:
            return self
        try:
            self._old = signal.signal(signal.SIGTERM, self._set)
        except ValueError:  # Not in the main thread (a notebook's worker): no handler.
            pass
        return self

    def __exit__(self, *exc):
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _set(self, signum, frame):
        self.raised = True
