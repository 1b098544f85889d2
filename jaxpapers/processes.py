"""What the processes of a job tell each other beside their compiled programs.

It goes through JAX's coordination service, not through devices: nothing is compiled, and
on CPUs a group of devices is given up when a process comes to its first collective 30 s
after the others.

Every process calls these functions, in the same order: what one of them finds on a disk
that others write to must not decide whether it does.
"""

import itertools
import json
import sys
from typing import Any

KEPT = 100  # Calls whose keys stay; twice within them all wait for each other.
POLL = 1.0  # seconds; signals are handled in between
_calls = itertools.count()


def client() -> Any:
    """Of JAX's coordination service; None for one process, or before it started."""
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    return distributed.global_state.client


def of_first(value: Any) -> Any:
    """A value of process 0, on all processes; plain data that JSON can hold."""
    return _exchange(value, [0])[0]


def of_all(value: Any) -> list:
    """The values of all processes, on all of them; plain data that JSON can hold."""
    import jax

    return _exchange(value, range(jax.process_count()))


def wait() -> None:
    """Until all processes are here, as long as they live."""
    import jax

    if jax.process_count() > 1:
        _wait(next(_calls))


def _wait(call: int) -> None:
    client().wait_at_barrier(f"jaxpapers/wait/{call}", 24 * 3600 * 1000)


def _exchange(value: Any, senders: Any) -> list:
    """The values of some processes, on all of them."""
    import jax

    if jax.process_count() == 1:
        return [value]
    service, call, me = client(), next(_calls), jax.process_index()
    if call % (KEPT // 2) == 0:
        _wait(call)
    if me in senders:
        service.key_value_set(_key(call, me), json.dumps(value))
    values = [value if i == me else json.loads(_get(_key(call, i))) for i in senders]
    if me in senders and call >= KEPT:
        service.key_value_delete(_key(call - KEPT, me))
    return values


def _key(call: int, process: int) -> str:
    return f"jaxpapers/call/{call}/{process}"


def _get(key: str) -> str:
    """Waits for a key as long as its process lives."""
    service = client()
    while True:
        try:
            return service.blocking_key_value_get(key, int(1000 * POLL))
        except Exception as e:  # A lost process ends this one with an error of its own.
            if "DEADLINE_EXCEEDED" not in str(e):
                raise


def agreed(seconds: int | float, step: int) -> float:
    """Seconds of process 0, every 20 steps, 0 in between.

    All processes then save at the same step.
    """
    import jax

    if jax.process_count() == 1:
        return seconds
    return float(of_first(seconds)) if step % 20 == 0 else 0.0
