"""One run of one config in its folder: training, evaluation, pictures of samples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpapers import checkpoint as ckpt
from jaxpapers import papers, plots, report, tasks
from jaxpapers import train as trainer
from jaxpapers.config import check_continues
from jaxpapers.folder import open_writers, write_config


def fit_run(
    name: str,
    config: Any,
    options: dict[str, Any],
    grid: jax.sharding.Mesh,
    folder: Path,
    quiet: bool,
    profile: tuple[int, int] | None,
    writers: Sequence[str],
    baselines: Callable[[], dict[str, float]],
) -> tuple[Any, dict[str, float]]:
    """Trains a config, or continues what its folder holds.

    Args:
      name: of the paper.
      config: complete, see ``tasks.prepare``.
      options: what ``make`` takes besides it.
      grid: mesh.
      folder: made if it is not there.
      quiet, profile, writers: see ``run.train``.
      baselines: numbers to write beside the final evaluation.

    Returns:
      The final state and its evaluation.
    """
    method = papers.load(name).make(config, **options)
    parts = papers.phases(name, config)
    task = tasks.load(config, method, grid)
    plain = config.to_dict()
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / "checkpoints").glob("[0-9]*")):
        check_continues(folder, plain)
    else:
        write_config(folder, name, plain)
    reporter = report.Report(
        tokens_per_step=config.data.batch * task.work,
        writers=open_writers(folder, plain, writers),
        quiet=quiet,
        unit=task.unit,
    )

    def fit_until(last, part):
        return trainer.fit(
            papers.load(name).make(part, **options),
            task.examples,
            steps=last,
            batch=config.data.batch,
            mesh=grid,
            seed=config.train.seed,
            workdir=folder,
            config=plain,
            evaluate=lambda state: task.evaluate(state, quick=True),
            eval_every=config.train.eval_every,
            save_every=config.train.save_every,
            save_minutes=config.train.save_minutes,
            keep=config.train.keep,
            init_from=config.train.init_from or None,
            report=reporter,
            profile=profile,
        )

    try:
        for last, part in parts[:-1]:
            if (ckpt.latest_step(folder / "checkpoints") or 0) < last:
                fit_until(last, part)
        state = fit_until(*parts[-1])
        # Only now is it known that the config fits the checkpoint that was there.
        write_config(folder, name, plain)
        final = task.evaluate(state)
        if task.picture:
            _draw(task.picture(state), folder, config.train.init_from)
        known = {f"baseline_{k}": v for k, v in baselines().items()}
        reporter.evaluation(int(state.step), {**final, **known})
    finally:
        reporter.close()
    return state, final


def _draw(arrays, folder, init_from):
    """Samples beside those of the run that this one started from."""
    if jax.process_index():
        return
    np.savez(folder / "samples.npz", **arrays)
    before = Path(init_from) / "samples.npz" if init_from else None
    try:
        plots.plot_samples(
            np.load(before) if before and before.exists() else None,
            arrays,
            folder / "samples.png",
        )
    except ModuleNotFoundError:
        pass  # The end of ``train`` says so.
