"""A run's folder: its config, its metrics, what its latest checkpoint holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpapers import checkpoint as ckpt
from jaxpapers import mesh as meshes
from jaxpapers import papers, report, tasks


def write_config(folder: Path, name: str, config: dict) -> None:
    """Writes config.json: the paper's name and the resolved config."""
    if jax.process_index() == 0:
        (folder / "config.json").write_text(
            json.dumps({"paper": name, "config": config}, indent=1) + "\n"
        )


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

    The state has the parameters and ``extra``; its optimizer state is ().

    Raises:
      FileNotFoundError: ``workdir`` holds no run.
    """
    from ml_collections import ConfigDict

    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{workdir} holds no run (no config.json); train first")
    stored = json.loads(path.read_text())
    name = stored["paper"]
    config = papers.inference(name, ConfigDict(stored["config"]))
    config.lock()
    grid = meshes.make_mesh(meshes.parse_mesh(mesh) if mesh else None)
    method = papers.load(name).make(config)
    batch = tasks.batch_shapes(config)
    with jax.set_mesh(grid):
        state = jax.eval_shape(method.init, jax.random.key(0), batch)
    shardings = meshes.state_shardings(state, method.rules, grid)
    target = ckpt.abstract(state, shardings)
    parts = ckpt.restore_parts(
        workdir, {"params": target.params, "extra": target.extra}
    )
    state = state._replace(**parts, opt_state=(), step=(), key=())
    return name, config, method, grid, state
