"""The command line with the toy papers: ``python tests/toys/command.py run line ...``."""

import sys
from pathlib import Path

from jaxpapers import cli, papers, tasks

TOYS = Path(__file__).parent
CONFIG = str(TOYS / "config.py")
LINE = papers.Paper("Lines", "Doe, Jane", 2026, "2601.00001", "tests", "seconds")


def register(setattr=setattr, setitem=dict.__setitem__):
    """Two papers and two tasks more; with pytest's monkeypatch for a test."""
    for package, name in ((papers, "papers"), (tasks, "tasks")):
        setattr(package, "__path__", [*package.__path__, str(TOYS / name)])
    setitem(papers.NAMES, "line", LINE)
    none = LINE._replace(title="Nothing", arxiv="", venue="Tests", trained=False)
    setitem(papers.NAMES, "none", none)


def call(workdir, *fields, **kwargs):
    """The outcome of ``line`` in a folder, with other values of some fields."""
    from jaxpapers import run

    overrides = [f"--config.{field}" for field in fields]
    return run.run(
        "line",
        overrides,
        config_path=CONFIG,
        workdir=str(workdir),
        quiet=True,
        **kwargs,
    )


def once(function):
    """The function, which runs at its first call and gives that result ever after."""
    results = []

    def wrapped(*args, **kwargs):
        if not results:
            results.append(function(*args, **kwargs))
        return results[0]

    return wrapped


if __name__ == "__main__":
    register()
    sys.exit(cli.main())
