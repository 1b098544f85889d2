"""Configs: finding them, typed overrides, what a continued run may change."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpapers import checkpoint as ckpt
from jaxpapers import papers

# What does not change the meaning of a checkpoint. steps moves the schedule's end.
MAY_CHANGE = {
    "data.path", "data.eval_batch", "data.eval_count", "data.eval_each",
    "data.baselines", "data.quick_tokens", "net.remat", "net.unroll",
    "optim.rank_fraction", "optim.rank_multiple_of", "optim.rank_schedule",
    "train.steps", "train.accumulate", "train.replica_sync", "train.eval_every",
    "train.save_every", "train.save_minutes", "train.keep", "train.init_from",
    "train.sample", "train.prompt", "train.temperature",
}  # fmt: skip


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
      ValueError: unknown paper, preset, field (with a suggestion) or type.
    """
    # Not on import: absl must not see this program's flags, nor its user's.
    from absl import flags
    from ml_collections import config_flags

    name, _, preset = target.partition(":")
    papers.check(name)
    if file:
        path, _, preset = file.partition(":")
        source = Path(path)
    else:
        source = config_file(name)
    if not source.exists():
        raise ValueError(f"no config file {source}")
    spec = importlib.util.spec_from_file_location(f"config_{source.stem}", source)
    if spec is None or spec.loader is None:
        raise ValueError(f"config file {source} is not Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"config file {source} has no function get_config(preset)")
    values = flags.FlagValues()
    config = module.get_config(preset or None)
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
        raise ValueError("config: " + " ".join(str(reason).split())) from None
    if rest:
        raise ValueError(
            f"unknown argument {rest[0]!r}; config fields are set as "
            "--config.group.field=value, see --help"
        )
    return _with_inputs(values.config, inputs) if inputs else values.config


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
    """configs/<name>.py of the checkout, or its copy inside the installed package."""
    here = Path(__file__).parent
    checkout = here.parent / "configs" / f"{name}.py"
    return checkout if checkout.exists() else here / "_configs" / f"{name}.py"


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
