"""Name scopes that tell who reads a compiled program what it does not say itself."""

import re

# Name scope of a choice that at most one iteration of its loop takes.
ONCE = "at_most_once"
_USUAL = re.compile(r"(?:^|/)usually_(\d+)_times(?:/while)?$")


def usual_trips(count: int) -> str:
    """Name scope of a while loop that is counted so often, if it does not say itself.

    Example:
      >>> trips_of(f"jit(f)/{usual_trips(2)}/while")
      2
    """
    return f"usually_{count}_times"


def trips_of(op_name: str) -> int:
    """What ``usual_trips`` says of a loop with this name; 1 if nothing."""
    usual = _USUAL.search(op_name)
    return int(usual.group(1)) if usual else 1
