"""A run's folder: its config, its metrics, what its latest checkpoint holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpapers import __version__, papers, report, tasks
from jaxpapers import checkpoint as ckpt
from jaxpapers import mesh as meshes


def write_config(folder: Path, name: str, config: dict, label: str = "") -> None:
    """Writes config.json: paper, resolved config, the row's label, our version."""
    if jax.process_index() == 0:
        stored = {
            "version": __version__, "paper": name, "label": label, "config": config,
        }  # fmt: skip
        # A kill while writing leaves the file that was there.
        part = folder / "config.json.part"
        part.write_text(json.dumps(stored, indent=1) + "\n")
        part.replace(folder / "config.json")


def read_stored(workdir: str | Path) -> dict[str, Any]:
    """What ``write_config`` wrote.

    Raises:
      FileNotFoundError: ``workdir`` holds no run.
      ValueError: version 0.1 wrote it, or it is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run (no config.json); train first")
    try:
        stored = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    if "version" not in stored:
        raise ValueError(
            f"{workdir} was written by jaxpapers 0.1, whose runs {__version__} does not "
            "read: use that version, or another --workdir"
        )
    return stored


def open_writers(folder: Path, config: dict, names: Sequence[str]) -> list:
    """Writers of metrics into a workdir: JSON lines, and those that are named."""
    if jax.process_index():
        return []
    writers: list[Any] = [report.JsonlWriter(folder / "metrics.jsonl")]
    if "tensorboard" in names:
        writers.append(report.TensorBoardWriter(folder / "tensorboard"))
    if "wandb" in names:
        writers.append(report.WandbWriter(folder, config))
    return writers


def load_run(workdir: str, mesh: str | None = None) -> tuple:
    """(name, config, method, mesh, state) of a run's latest checkpoint.

    The state has the parameters and ``extra``; its optimizer state is (). The method is
    built without reading data, see ``tasks.abstract``.

    Raises:
      FileNotFoundError: ``workdir`` holds no run.
      ValueError: version 0.1 wrote it, or the paper trains nothing.
    """
    from ml_collections import ConfigDict

    stored = read_stored(workdir)
    name, config = stored["paper"], ConfigDict(stored["config"]).lock()
    if not papers.check(name).trained:
        raise ValueError(f"{workdir}: {name} trains nothing, there is no model to load")
    data = tasks.abstract(config)
    method = papers.load(name).make(config, **data.facts)
    shape = meshes.parse_mesh(mesh) if mesh else {"data": jax.device_count()}
    # Methods with replicas build their state on a mesh that has the axis.
    grid = meshes.make_mesh({"replica": 1, **shape})
    with jax.set_mesh(grid):
        state = jax.eval_shape(method.init, jax.random.key(0), data.shapes)
    shardings = meshes.state_shardings(state, method.rules, grid)
    target = ckpt.abstract(state, shardings)
    parts = ckpt.restore_parts(
        workdir, {"params": target.params, "extra": target.extra}
    )
    state = state._replace(**parts, opt_state=(), step=(), key=())
    return name, config, method, grid, state
