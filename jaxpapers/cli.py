"""The command line: parses, sets up devices, calls one function of ``run``."""

import argparse
import contextlib
import dis
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Generator, Sequence

from jaxpapers import extras, papers, signals, supervise
from jaxpapers.arguments import ids, parser_of, steps, suggestion

# Read when the first device is used.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Returns:
      Exit code: 0 done, 1 refused or failed, 75 stopped by a signal with its state saved.
    """
    # On CPUs jaxlib factorises with SciPy's OpenBLAS, whose threads spin against XLA's:
    # four times slower steps on two cores. Read when SciPy is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if any(x.endswith(":smoke") for x in arguments):
        # Seconds of work behind a minute of the compiler's optimisations.
        os.environ.setdefault("XLA_FLAGS", QUICK)
    parser = _parser()
    # Argparse takes what has a space in it for a file.
    overrides = [x for x in arguments if x.startswith("--config.")]
    options, unknown = parser.parse_known_args(
        [x for x in arguments if x not in overrides]
    )
    if options.command is None:
        parser.print_help()
        return 0
    if hasattr(options, "files"):  # argparse takes only those right after the name.
        options.files += [x for x in unknown if not x.startswith("-")]
        unknown = [x for x in unknown if x.startswith("-")]
    if unknown:
        hint = suggestion(parser, unknown[0], options)
        hint = hint or f"; see {options.command} --help"
        parser.error(f"unknown argument {unknown[0]!r}{hint}")
    if overrides and options.command not in ("run", "train", "plan"):
        parser.error(f"{options.command} takes no config fields, got {overrides[0]!r}")
    if not getattr(options, "distributed", False):
        return _call(options, overrides, signal.SIGTERM)
    if not supervise.is_supervised():
        # A script that has added papers (``own``) adds them in the process, too.
        own = len(papers.__path__) > 1
        program = sys.argv[:1] if own else ["-m", "jaxpapers"]
        return supervise.supervise(arguments, program)
    supervise.follow()
    return supervise.leave(_call(options, overrides, supervise.STOP))


def _call(options: argparse.Namespace, overrides: list[str], stop: int) -> int:
    """Runs the command; its exit code. ``stop``: the signal that stops it."""
    trains = options.command in ("run", "train")
    stopped: signals.Stop | None = None
    with contextlib.ExitStack() as stack:
        try:
            if trains:  # From here on the signal ends with 75.
                stack.enter_context(_one_line_each())
                stopped = stack.enter_context(signals.stopping(hard=True, number=stop))
            _set_up_devices(options)
            return options.action(options, overrides)
        except signals.Preempted as e:
            print(f"jaxpapers: {e}; the same command continues", file=sys.stderr)
            return signals.PREEMPTED
        except KeyboardInterrupt:
            print("jaxpapers: interrupted", file=sys.stderr)
            return 130
        except Exception as e:
            if stopped is not None and stopped.interrupted:
                print("jaxpapers: stopped; the same command continues", file=sys.stderr)
                return signals.PREEMPTED
            return _failed(e)


def _failed(error: Exception) -> int:
    """Says what went wrong, in one line where it is no bug of ours; the exit code."""
    if isinstance(error, BrokenPipeError):
        return 1
    if _is_out_of_memory(error) and not os.environ.get("JAXPAPERS_TRACEBACK"):
        reason = " ".join(str(error).split())[:200]
        print(
            f"jaxpapers: out of memory: {reason}; lower config.data.batch or the model's "
            "sizes, see --dry-run",
            file=sys.stderr,
        )
        return 1
    refused = isinstance(error, ValueError) and _is_refusal(error)
    if supervise.is_supervised() and not refused and supervise.is_lost(error):
        print(f"jaxpapers: {supervise.LOST}", file=sys.stderr)
        return 1
    expected = isinstance(error, (ValueError, OSError, ModuleNotFoundError))
    if not (expected and _is_refusal(error)) or os.environ.get("JAXPAPERS_TRACEBACK"):
        if not supervise.is_supervised():
            raise error
        traceback.print_exception(error)
        return 1
    print(f"jaxpapers: {_text(error)}", file=sys.stderr)
    return 1


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the host or a device has too little memory for what was asked."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    )


def _is_refusal(error: Exception) -> bool:
    """Whether an error is about the input, as a ``raise`` of this package says.

    What a library raises out of our code is a bug of ours, and keeps its traceback:
    whatever reads or checks input raises errors of its own. Files, disks and missing
    extras are the user's.
    """
    if not isinstance(error, ValueError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return True
    code, module = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "")
    own = module.partition(".")[0] == "jaxpapers" or module.startswith("config_")
    return own and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def _text(error: Exception) -> str:
    """One line about what the user can change."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        known = error.name.partition(".")[0] in extras.EXTRAS
        return str(error) if "pip install" in str(error) or not known else (
            extras.text(error.name)
        )  # fmt: skip
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextlib.contextmanager
def _one_line_each() -> Generator[None, None, None]:
    """Warnings of this package without the line of its source, and no echoes."""
    shown = warnings.formatwarning

    def one_line(message, category, filename, lineno, line=None):
        if issubclass(category, UserWarning) and "jaxpapers" in filename:
            return f"jaxpapers: {message}\n"
        return shown(message, category, filename, lineno, line)

    said = sys.unraisablehook

    def ignored(unraisable):
        # Of tensorstore, where a save failed and its caller has got the reason.
        if "Event loop is closed" not in str(unraisable.exc_value):
            said(unraisable)

    warnings.formatwarning, sys.unraisablehook = one_line, ignored
    try:
        yield
    finally:
        warnings.formatwarning, sys.unraisablehook = shown, said


def _list(options, overrides) -> int:
    from rich.console import Console

    from jaxpapers import run

    # Not report's: it asks the devices who is first.
    console = Console(highlight=False, markup=False, emoji=False)
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
    from jaxpapers import run, trackers

    if options.print_config:
        print(run.load_config(options.target, overrides, options.config, options.files))
        return 0
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
        profile=steps(options.profile),
        trackers=[x for x in trackers.TRACKERS if getattr(options, x)],
    )
    return 0


def _plan(options, overrides) -> int:
    import json

    from jaxpapers import plan, run

    result = run.plan(
        options.target,
        overrides,
        topology=options.topology,
        slices=options.slices,
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


def _compare(options, overrides) -> int:
    from jaxpapers import run

    print(run.compare(options.runs, options.out), end="")
    if options.out:
        print(f"wrote {options.out}")
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


def _parser() -> argparse.ArgumentParser:
    return parser_of(
        {
            "list": _list, "show": _show, "run": _run, "plan": _plan, "eval": _eval,
            "sample": _sample, "export": _export, "data": _data, "plot": _plot,
            "compare": _compare,
        }
    )  # fmt: skip


def _set_up_devices(options: argparse.Namespace) -> None:
    """Before anything touches a device: their number, then the other processes."""
    if not hasattr(options, "mesh"):
        return
    if (options.fake_devices or 0) < 0:
        raise ValueError(f"--fake-devices must be >= 1, got {options.fake_devices}")
    import jax

    if getattr(options, "topology", None) or _has_only_cpus():
        jax.config.update("jax_platforms", "cpu")
    if options.fake_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.fake_devices)
    if getattr(options, "distributed", False):
        from jaxpapers import mesh

        mesh.start_distributed(ids(options.local_device_ids), options.heartbeat)
        signals.share()


def _has_only_cpus() -> bool:
    """Whether there is neither a TPU's device file nor a plugin of another platform.

    JAX then skips libtpu, which ``plan`` needs and which logs errors without a TPU.
    """
    import glob
    from importlib.metadata import entry_points

    if "JAX_PLATFORMS" in os.environ or entry_points(group="jax_plugins"):
        return False
    return not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
