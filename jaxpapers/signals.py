"""Signals that end a run between two steps, and what its processes agree on."""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils


def agreed(seconds: int | float, step: int) -> float:
    """The first process's clock, now and then: all have to save at the same step."""
    if jax.process_count() == 1:
        return seconds
    if step % 20:
        return 0.0
    return float(multihost_utils.broadcast_one_to_all(np.float32(seconds)))


def preempted(stop, manager, step: int) -> bool:
    """A signal here, or on several hosts a notice that reached any of them."""
    if jax.process_count() > 1:
        return bool(manager and manager.reached_preemption(step))
    return stop.raised


class Flag:
    """SIGTERM sets a flag instead of killing the process between two steps.

    Of several processes JAX's preemption service has the handler: it tells the others.
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
