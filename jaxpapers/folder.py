"""A run's folder: its config, its metrics, what its latest checkpoint holds."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import jax

from jaxpapers import __version__, papers, plots, tasks, workdir
from jaxpapers import checkpoint as ckpt
from jaxpapers import mesh as meshes
from jaxpapers.config import check_values, named_by, preset_configs


def write_config(folder: Path, name: str, config: dict, label: str = "") -> None:
    """Writes config.json: paper, resolved config, the row's label, our version."""
    if jax.process_index() == 0:
        stored = {
            "version": __version__, "paper": name, "label": label, "config": config,
        }  # fmt: skip
        workdir.write(folder / "config.json", json.dumps(stored, indent=1) + "\n")


def read_stored(folder: str | Path) -> dict[str, Any]:
    """What ``write_config`` wrote.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: another version wrote it, or it is damaged; names file and field.
    """
    path = workdir.local(folder, "WORKDIR") / "config.json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder} holds no run (no config.json); train first"
        ) from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is damaged: {e}; {_REMEDY}") from e
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}; {_REMEDY}") from e
    if not isinstance(stored, dict) or not {"paper", "config"} & set(stored):
        raise ValueError(
            f"{path} is no config of a run: expected an object with 'version', 'paper' "
            f"and 'config', got {text.strip()[:60]!r}; {_REMEDY}"
        )
    version = stored.get("version", "0.1")
    if isinstance(version, str) and (0, 0) < _release(version) < _OLDEST:
        raise ValueError(
            f"{path} was written by jaxpapers {version}, whose runs {__version__} does "
            "not read: use that version, or another --workdir"
        )
    for field, kind in (("version", str), ("paper", str), ("config", dict)):
        if not isinstance(stored.get(field), kind):
            raise ValueError(
                f"{path}: field {field!r} must be of type {kind.__name__}, got "
                f"{stored.get(field)!r}; {_REMEDY}"
            )
    if not _release(version):
        raise ValueError(
            f"{path}: field 'version' must be one like {__version__}, got {version!r}; "
            f"{_REMEDY}"
        )
    if _release(version) > _release(__version__):
        raise ValueError(
            f"{path} was written by jaxpapers {version}, newer than this "
            f"{__version__}: update jaxpapers, or choose another --workdir"
        )
    papers.check(stored["paper"], f"{path}: field 'paper'")
    check_groups(path, stored["paper"], stored["config"])
    with named_by(path, _REMEDY):
        check_values(stored["config"])
    return stored


_OLDEST = (0, 2)  # Its config.json has the fields of today.


_REMEDY = (
    "put back a copy of it, or remove it: the same `run` command writes it anew from its "
    "checkpoints"
)


def _release(version: str) -> tuple[int, ...]:
    """(major, minor) numbers of a version; () of what is none."""
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", version)
    return tuple(map(int, numbers.groups())) if numbers else ()


def check_groups(
    path: str | Path, name: str, config: dict, remedy: str = _REMEDY
) -> None:
    """Groups are objects, and fields have the type that one of the presets gives them.

    Args:
      path: of the config, for the message.
      name: of the paper.
      config: its groups.
      remedy: what to do, for the message.

    Raises:
      ValueError: names file and field.
    """
    known = preset_configs(name)
    for group, fields in config.items():
        if not isinstance(fields, dict):
            raise ValueError(
                f"{path}: field 'config.{group}' must be an object of fields, got "
                f"{fields!r}; {remedy}"
            )
        for field, value in fields.items():
            defaults = [c[group][field] for c in known if field in c.get(group, {})]
            if defaults and not any(_alike(value, x) for x in defaults):
                raise ValueError(
                    f"{path}: field 'config.{group}.{field}' must be of type "
                    f"{type(defaults[0]).__name__}, got {value!r}; {remedy}"
                )


def _alike(value: Any, default: Any) -> bool:
    """Whether a value of JSON is of a field's type: numbers mix, tuples are lists."""
    if value is None or default is None:
        return True
    for kinds in (bool, (int, float), str, (list, tuple), dict):
        if isinstance(default, kinds):
            return isinstance(value, kinds) and (
                kinds is bool or not isinstance(value, bool)
            )
    return True


def evaluated(folder: Path, step: int) -> bool:
    """Whether the evaluation of a step is in the metrics of a run's folder."""
    if not (folder / "metrics.jsonl").exists():
        return False
    return any(
        record["step"] == step and any(k.startswith("validation_") for k in record)
        for record in plots.read_metrics(folder)
    )


def named_fields(folder: str | Path) -> contextlib.AbstractContextManager:
    """A field that config.json lacks is named with the file; see ``named_by``."""
    return named_by(Path(folder) / "config.json", _REMEDY, values=False)


def user_config(
    name: str, config: Any, path: str | None
) -> contextlib.AbstractContextManager:
    """Checks a config file of the user's own; missing fields are named with it.

    Args:
      name: of the paper.
      config: that the file gave.
      path: of the file; None: the config is the package's.

    Raises:
      ValueError: fields of other types than in the paper's presets.
    """
    if not path:
        return contextlib.nullcontext()
    remedy = f"jaxpapers run {name} --print-config shows them all"
    check_groups(path, name, config.to_dict(), remedy)
    return named_by(path, remedy, values=False)


def load_run(folder: str, mesh: str | None = None) -> tuple:
    """(name, config, method, mesh, state) of a run's latest checkpoint.

    The state has the parameters and ``extra``; its optimizer state is (). The method is
    built without reading data, see ``tasks.abstract``.

    Raises:
      FileNotFoundError: ``folder`` holds no run.
      ValueError: see ``read_stored``; the paper trains nothing; fields that the model
        needs are missing; damaged checkpoints.
    """
    from ml_collections import ConfigDict

    stored = read_stored(folder)
    name, config = stored["paper"], ConfigDict(stored["config"]).lock()
    if not papers.check(name).trained:
        raise ValueError(f"{folder}: {name} trains nothing, there is no model to load")
    with named_by(f"{folder}/config.json", _REMEDY):
        data = tasks.abstract(config)
        method = papers.load(name).make(config, **data.facts)
    shape = meshes.parse_mesh(mesh) if mesh else None
    # Methods with replicas build their state on a mesh that has the axis.
    grid = meshes.make_mesh(shape, every=True)
    with jax.set_mesh(grid):
        state = jax.eval_shape(method.init, jax.random.key(0), data.shapes)
    shardings = meshes.state_shardings(state, method.rules, grid)
    target = ckpt.abstract(state, shardings)
    parts = ckpt.restore_parts(folder, {"params": target.params, "extra": target.extra})
    state = state._replace(**parts, opt_state=(), step=(), key=())
    return name, config, method, grid, state
