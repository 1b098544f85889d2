"""Timing that the benchmarks share: interleaved repetitions, medians, versions."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import PackageNotFoundError, version


def measure(
    steps: Mapping[str, Callable], repetitions: int, once: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """Medians of milliseconds of process CPU time and wall time.

    Every repetition runs each function in turn, so that load on the machine falls on all.

    Args:
      steps: name -> function that does the work and waits for it.
      repetitions: of each.
      once: names that are run a single time.
    """
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repetitions):
        for name, run in steps.items():
            if i and name in once:
                continue
            began, began_cpu = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
    return {
        name: {
            "cpu_ms": 1000 * statistics.median(cpu[name]),
            "wall_ms": 1000 * statistics.median(wall[name]),
        }
        for name in steps
    }


def header(command: str, *packages: str) -> dict:
    """What a result has to say about where it comes from."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {
        "command": command,
        "versions": found,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
