"""Which checkpoints of a folder are whole; damaged ones are named and passed over."""

import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from jaxpapers import checksums, leaves, processes

T = TypeVar("T")


def steps(directory: str | Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, damaged ones too."""
    try:
        names = [p.name for p in Path(directory).iterdir() if p.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def place(manager: ocp.CheckpointManager) -> Path:
    """The folder of a manager."""
    return Path(os.fspath(manager.directory))


def one_line(error: Exception) -> str:
    """Kind and text of an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def newest_whole(
    manager: ocp.CheckpointManager,
    step: int | None,
    read: Callable[[int], T],
    item: str = "",
    *,
    writable: bool = False,
) -> T:
    """``read`` of a step; by default of the newest one whose files are whole.

    Args:
      manager: of the checkpoints.
      step: None: the newest whole one.
      read: raises ``leaves.Mismatch`` for a whole checkpoint of another config.
      item: the only folder of a checkpoint that is read; "": all.
      writable: rename the folders of damaged ones, whose steps come again.

    Raises:
      FileNotFoundError, ValueError: see ``checkpoint.restore``.
    """
    known = steps(place(manager))
    if not known or (step is not None and step not in known):
        raise FileNotFoundError(
            f"no checkpoint{'' if step is None else f' {step}'} in {manager.directory}, "
            f"found steps {known}"
        )
    damaged: dict[int, str] = {}
    for candidate in reversed(known) if step is None else [step]:
        folder = place(manager) / str(candidate)
        problem = checksums.problem(folder, item)
        if not problem:
            try:
                found = read(candidate)
            except leaves.Mismatch:
                raise
            except (ValueError, KeyError, OSError) as e:
                # What has no checksums shows its damage when it is read. With several
                # processes the others may have read theirs.
                if checksums.exist(folder) or jax.process_count() > 1:
                    raise
                problem = one_line(e)
            else:
                _put_aside(manager, damaged, candidate, writable)
                return found
        damaged[candidate] = problem
    raise ValueError(
        f"every checkpoint in {manager.directory} is damaged: "
        + "; ".join(f"{k}: {text}" for k, text in damaged.items())
        + "; put back a copy of one, or remove the folder to start anew"
    )


def _put_aside(
    manager: ocp.CheckpointManager, damaged: dict[int, str], whole: int, writable: bool
) -> None:
    """Warns of damaged checkpoints, and renames them where their steps come again."""
    for step, problem in damaged.items():
        if jax.process_index():
            continue
        folder, now = place(manager) / str(step), ""
        if writable:
            aside = folder.with_name(f"{step}.damaged")
            now = f" (now {aside.name})"
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        warnings.warn(
            f"checkpoint {folder}{now} is damaged: {problem}; going on from step "
            f"{whole}, the newest whole one",
            stacklevel=2,
        )
    if damaged:
        processes.of_first(0)  # The first process has renamed them.
        manager.reload()
