"""``python -m jaxpapers``, and the command ``jaxpapers``."""

import os
import signal
import sys


def main() -> int:
    """``cli.main``; SIGTERM ends a run with 75 also before that listens.

    Afterwards the signal is ignored: the work is done, and an interpreter that shuts down
    for seconds would end by it as if it were not.
    """
    runs = sys.argv[1:2] in (["run"], ["train"])
    if runs:
        signal.signal(signal.SIGTERM, _stopped)
    from jaxpapers.cli import main

    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # The reader had enough: | head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if runs:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return code


def _stopped(number, frame):
    from jaxpapers.signals import PREEMPTED, end

    end("stopped; the same command continues", PREEMPTED)


if __name__ == "__main__":
    sys.exit(main())
