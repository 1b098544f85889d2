"""Configs: finding them, typed overrides, what a continued run may change."""

import contextlib
import difflib
import importlib.machinery
import importlib.util
import json
import math
import traceback
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxpapers import checkpoint as ckpt
from jaxpapers import papers, workdir

# What does not change the meaning of a checkpoint. steps moves the schedule's end.
MAY_CHANGE = {
    "data.path", "data.eval_batch", "data.eval_count", "data.eval_each",
    "data.baselines", "data.quick_tokens", "data.selection", "data.overlap",
    "net.remat", "net.unroll",
    "optim.rank_fraction", "optim.rank_multiple_of", "optim.rank_schedule",
    "train.steps", "train.accumulate", "train.replica_sync", "train.replica_axis",
    "train.eval_every", "train.save_every", "train.save_minutes", "train.keep",
    "train.init_from", "train.init_only",
    "train.sample", "train.prompt", "train.temperature", "train.alone",
    "train.log_images",
}  # fmt: skip

# Least values of fields by their name, in whatever group.
LEAST = {
    "batch": 1, "eval_batch": 1, "context": 1, "history": 1, "accumulate": 1, "keep": 1,
    "steps": 0, "seed": 0, "eval_every": 0, "save_every": 0, "save_minutes": 0,
    "sample": 0, "temperature": 0, "weight_decay": 0, "clip": 0, "max_id": 0,
    "item_buckets": 0, "item_vocab": 0, "cate_vocab": 0, "user_vocab": 0, "epochs": 0,
    "clicks": 0, "count": 1, "eval_count": 1, "eval_each": 1, "length": 0, "w1": 0,
    "w2": 0, "w3": 0, "holdout": 0, "spread": 0, "eta": 0, "quick_tokens": 0,
}  # fmt: skip
# Fields in [0, 1].
SHARES = {"dice_decay", "drop", "dropout", "ema", "kappa", "misaligned"}
MOST_SEED = 2**32 - 1

FOLDERS = [Path(__file__).parents[1] / "configs", Path(__file__).parent / "_configs"]
"""Of configs: the checkout's, its copy inside the installed package, those of ``own``."""


def load_config(
    target: str,
    overrides: Sequence[str] = (),
    file: str | None = None,
    inputs: Sequence[str] = (),
) -> Any:
    """The locked config of ``name[:preset]`` or of a file, with typed overrides.

    Args:
      target: paper and preset, ``dion:smoke``.
      overrides: ``--config.group.field=value``.
      file: ``my.py`` or ``my.py:preset`` instead of the package's config.
      inputs: files of the user's own: ``config.data.path``, a tuple where the config has
        one.

    Raises:
      ValueError: unknown paper, preset or field (with a suggestion), a value of another
        type or out of its range, a path that is a URL.
    """
    # Not on import: absl must not see this program's flags, nor its user's.
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    name, module, preset = _find(target, file)
    presets = getattr(module, "PRESETS", ())
    if presets and preset and preset not in presets:
        near = difflib.get_close_matches(preset, presets, 1)
        hint = f"; did you mean {name}:{near[0]}?" if near else ""
        raise ValueError(
            f"unknown preset {name}:{preset}; expected one of {presets}{hint}"
        )
    values = flags.FlagValues()
    with _user_code(module.__file__ if file else None):
        config = module.get_config(preset or None)
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"config file {module.__file__}: get_config must return a ConfigDict, got "
            f"{type(config).__name__}"
        )
    for override in overrides:
        _check_field(config, override)
    arguments = ["jaxpapers", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=values, sys_argv=arguments
        )
        rest = values(arguments)[1:]
    except (flags.Error, AttributeError, KeyError) as e:
        reason: Any = e
        while isinstance(reason, Exception) and reason.args:
            reason = reason.args[0]  # An error of an error of a text.
        reason = " ".join(str(reason).split())
        if "Non-boolean" in reason:
            reason = f"{reason.partition(': ')[0]}: expected True or False"
        raise ValueError(f"config: {reason}") from None
    if rest:
        raise ValueError(
            f"unknown argument {rest[0]!r}; config fields are set as "
            "--config.group.field=value, see --help"
        )
    config = _with_inputs(values.config, inputs) if inputs else values.config
    check_values(config)
    return config


def expected(target: str, file: str | None = None) -> float | None:
    """The metric that a preset's own row has, of ``EXPECTED`` in its config file.

    Args:
      target, file: see ``load_config``.

    Returns:
      None for a preset without one.
    """
    _, module, preset = _find(target, file)
    presets = getattr(module, "PRESETS", ("",))
    value = getattr(module, "EXPECTED", {}).get(preset or presets[0])
    return None if value is None else float(value)


def _find(target: str, file: str | None) -> tuple[str, ModuleType, str]:
    """A paper's name, its config's module, and the preset."""
    name, _, preset = target.partition(":")
    papers.check(name)
    if not file:
        return name, _load(config_file(name)), preset
    workdir.local(file, "--config")
    path, _, preset = file.partition(":")
    source = workdir.local(path, "--config")
    with _user_code(source):
        return name, _load(source), preset


def _load(source: Path) -> ModuleType:
    """The module of a config file."""
    if not source.is_file():
        raise ValueError(f"no config file {source}")
    spec = importlib.util.spec_from_file_location(f"config_{source.stem}", source)
    if spec is None or not isinstance(
        spec.loader, importlib.machinery.SourceFileLoader
    ):
        raise ValueError(f"config file {source} is not Python")
    module = importlib.util.module_from_spec(spec)
    try:
        # Its bytecode in a cache may be that of an edit within the same second.
        code = spec.loader.source_to_code(source.read_bytes(), str(source))
        exec(code, module.__dict__)
    except SyntaxError as e:
        raise ValueError(f"config file {e.filename}, line {e.lineno}: {e.msg}") from e
    if not hasattr(module, "get_config"):
        raise ValueError(f"config file {source} has no function get_config(preset)")
    return module


@contextlib.contextmanager
def _user_code(source: str | Path | None) -> Generator[None, None, None]:
    """Errors of a config file of the user's name it and its line; None: no such file."""
    try:
        yield
    except Exception as e:
        if source is None or isinstance(e, ValueError):
            raise
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(e.__traceback__)
            if frame.filename == str(source)
        ]
        where = f", line {lines[-1]}" if lines else ""
        raise ValueError(f"config file {source}{where}: {type(e).__name__}: {e}") from e


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a config and of its groups, by its dotted name."""
    for name, value in sorted(config.items()):
        if hasattr(value, "items"):
            yield from fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def near_fields(config: Any, name: str) -> list[str]:
    """Fields that ``name`` may have been meant for, the likeliest first."""
    known = [field for field, _ in fields(config)]
    last = name.rpartition(".")[2]
    ends = {field.rpartition(".")[2]: field for field in reversed(known)}
    near = difflib.get_close_matches(name, known, 1, 0.75)
    near += [field for field in known if field.rpartition(".")[2] == last]
    near += [ends[x] for x in difflib.get_close_matches(last, ends, 1, 0.75)]
    return near or difflib.get_close_matches(name, known, 1)


def _check_field(config: Any, override: str) -> None:
    """Refuses an override of a field that is not there; suggests one that is."""
    name = override.partition("=")[0].removeprefix("--config.")
    known = [field for field, _ in fields(config)]
    if name in known or not override.startswith("--config."):
        return
    # Index expressions and groups are left to the parser of overrides.
    if "[" in name or any(field.startswith(f"{name}.") for field in known):
        return
    near = near_fields(config, name)
    hint = (
        f"Did you mean --config.{near[0]}?"
        if near
        else f"It has {', '.join(known[:8])} ...; --help lists them"
    )
    raise ValueError(f"unknown field --config.{name}. {hint}")


def check_values(config: Any) -> None:
    """Refuses values that no run can have, by the names of their fields.

    Raises:
      ValueError: names field, value and bound.
    """
    for field, value in fields(config):
        name = field.rpartition(".")[2]
        least = 0 if name.endswith("_lr") else LEAST.get(name)
        if callable(value):
            raise ValueError(f"{field} must be a plain value, got {value!r:.60}")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{field} must be a number, got nan")
        if isinstance(value, float) and math.isinf(value):
            raise ValueError(f"{field} must be finite, got {value}")
        if least is not None and isinstance(value, (int, float)):
            if not value >= least:
                raise ValueError(f"{field} must be >= {least}, got {value}")
        if name in SHARES and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise ValueError(f"{field} must be in [0, 1], got {value}")
        if name == "seed" and isinstance(value, int) and value > MOST_SEED:
            raise ValueError(f"{field} must be <= {MOST_SEED}, got {value}")
        if name == "lr" and isinstance(value, (int, float)) and not value > 0:
            raise ValueError(f"{field} must be > 0, got {value}")
        if name in ("path", "init_from"):
            for path in value if isinstance(value, tuple) else (value,):
                if path:
                    workdir.local(path, field)


@contextlib.contextmanager
def named_by(
    file: str | Path, remedy: str, values: bool = True
) -> Generator[None, None, None]:
    """Errors about a stored config name its file and what to do.

    Args:
      file, remedy: of the message.
      values: ValueErrors too; False where data are read, which has others.

    Raises:
      ValueError: for a field that is missing or that a model refuses.
    """
    try:
        yield
    except (AttributeError, KeyError) as e:
        if not _from_config(e):
            raise
        name = str(e).strip("'\"").split("'")[0]
        raise ValueError(f"{file}: field {name!r} is missing; {remedy}") from e
    except ValueError as e:
        if not values:
            raise
        raise ValueError(f"{file}: {e}; {remedy}") from e


def _from_config(error: BaseException) -> bool:
    """Whether a ConfigDict raised an error."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return bool(trace) and "ml_collections" in trace.tb_frame.f_code.co_filename


def preset_configs(name: str) -> list[dict]:
    """The configs of all presets of a paper of the package, as plain dicts."""
    source = config_file(name)
    if not source.exists():
        return []
    module = _load(source)
    presets = getattr(module, "PRESETS", (None,))
    return [module.get_config(preset).to_dict() for preset in presets]


def _with_inputs(config: Any, inputs: Sequence[str]) -> Any:
    if "path" not in config.get("data", {}):
        raise ValueError(
            f"this config reads no files (no data.path), got {inputs[0]!r}"
        )
    if isinstance(config.data.path, tuple):
        config.data.path = tuple(inputs)
    elif len(inputs) == 1:
        config.data.path = inputs[0]
    else:
        raise ValueError(f"one file or folder expected, got {list(inputs)}")
    return config


def config_file(name: str) -> Path:
    """<name>.py of the first of ``FOLDERS`` that has it."""
    files = [folder / f"{name}.py" for folder in FOLDERS]
    return next((file for file in files if file.exists()), files[-1])


def check_continues(folder: Path, config: dict) -> None:
    """Refuses to continue a run whose data, model or optimizer the config changes."""
    with ckpt.open_manager(folder / "checkpoints", read_only=True) as manager:
        stored = ckpt.read_config(manager)
    for group, fields in config.items():
        for field, value in fields.items():
            # What was stored went through JSON, which has no tuples.
            value = json.loads(json.dumps(value))
            old = stored.get(group, {}).get(field, value)
            if old != value and f"{group}.{field}" not in MAY_CHANGE:
                raise ValueError(
                    f"{folder} holds a run with config.{group}.{field}={old!r}, got "
                    f"{value!r}; continue it unchanged, choose another --workdir, or "
                    f"start from its parameters with --config.train.init_from={folder}"
                )
