"""Where a run's numbers and pictures go while it trains: one interface, four of them.

A tracker is made from (folder of the run, its config) and has four methods. Another one
of your own goes to ``run.run(..., trackers=[MyTracker])``.
"""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxpapers import extras, workdir

PROJECT = "jaxpapers"


@runtime_checkable
class Tracker(Protocol):
    """What every tracker does; called by the first process only."""

    def start(self, step: int) -> None:
        """Training begins after a step: 0, or that of the checkpoint that was there.

        Steps after it that were recorded before come again, with the same numbers.
        """

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records numbers of a step; called several times for one step."""

    def picture(self, step: int, path: Path) -> None:
        """Records a picture of a step: a PNG file in the run's folder."""

    def close(self) -> None:
        """Flushes and ends; also after an error."""


Made = Callable[[Path, dict[str, Any]], Tracker]
"""(folder of a run, its config as plain values) -> tracker."""


class Jsonl:
    """``metrics.jsonl``: an object a line: step, time (s since the epoch), name -> value.

    A resumed run appends; readers keep the last record of a repeated step. Pictures are
    files of the run's folder already.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any] | None = None):
        del config
        self._file = (folder / "metrics.jsonl").open("a+b", buffering=0)
        if self._file.tell():
            self._file.seek(-1, 2)
            if self._file.read() != b"\n":  # A kill cut the last line off.
                self._file.write(b"\n")

    def start(self, step: int) -> None:
        """Nothing: what is repeated is appended."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a line."""
        record = {"step": step, "time": round(time.time(), 3), **values}
        try:
            # In one piece: a kill cuts no line, and an error is not written again later.
            self._file.write(json.dumps(record).encode() + b"\n")
        except OSError as e:
            raise OSError(e.errno, e.strerror, self._file.name) from e

    def picture(self, step: int, path: Path) -> None:
        """Nothing: the file is there."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """Events in the run's folder ``tensorboard``; needs the extra ``tb``.

    Of a resumed run, TensorBoard drops the events that it repeats.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]):
        del config
        with extras.named():
            from tensorboardX import SummaryWriter

        self._make, self._folder = SummaryWriter, folder / "tensorboard"
        self._writer: Any = None
        self._repeated: int | None = None

    def _open(self) -> Any:
        if self._writer is None:
            # Files are read in the order of their names, which have the second only.
            self._writer = self._make(
                str(self._folder),
                purge_step=self._repeated,
                filename_suffix=f".{time.time_ns()}",
            )
        return self._writer

    def start(self, step: int) -> None:
        """Drops the events of later steps."""
        if self._writer is None:
            self._repeated = step + 1

    def write(self, step: int, values: dict[str, float]) -> None:
        """Adds scalars."""
        for name, value in values.items():
            self._open().add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """Adds an image named as its file."""
        with extras.named():
            from matplotlib.image import imread

        pixels = imread(path)
        if pixels.ndim == 2:  # Grey.
            pixels = pixels[..., None].repeat(3, -1)
        self._open().add_image(path.stem, pixels[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()


class _Logged:
    """What W&B and Trackio have in common: Trackio's calls are W&B's."""

    def __init__(self, run: Any, image: Callable[[str], Any]):
        self._run, self._image = run, image

    def start(self, step: int) -> None:
        """Nothing: what is repeated is up to the server."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Logs a step."""
        self._run.log(values, step=step)

    def picture(self, step: int, path: Path) -> None:
        """Logs an image named as its file."""
        self._run.log({path.stem: self._image(str(path))}, step=step)

    def close(self) -> None:
        """Waits until everything is written, and ends the run."""
        self._run.finish()


class Wandb(_Logged):
    """Weights & Biases; needs the extra ``wandb``, and its key from its environment.

    ``WANDB_MODE=offline`` writes into the run's folder only; the project is
    ``WANDB_PROJECT``, else "jaxpapers". A run that goes on keeps its id; what it repeats
    is ignored.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        with extras.named():
            import wandb

        project = os.environ.get("WANDB_PROJECT", PROJECT)
        run = wandb.init(
            project=project, name=folder.name, id=_id(folder), resume="allow",
            dir=str(folder), config=config,
        )  # fmt: skip
        super().__init__(run, wandb.Image)


class Trackio(_Logged):
    """Trackio, a local dashboard; needs the extra ``trackio``.

    Numbers lie where its own environment says (``TRACKIO_DIR``; ``trackio show`` draws
    them), the project is ``TRACKIO_PROJECT``, else "jaxpapers". A run that goes on does
    so under the same name; what it repeats stands beside what was there.
    """

    def __init__(self, folder: Path, config: dict[str, Any]):
        with extras.named():
            import trackio

        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), folder.name
        run = trackio.init(
            project=project, name=f"{name}-{_id(folder)}", resume="allow", config=config
        )
        super().__init__(run, trackio.Image)


TRACKERS: Mapping[str, Made] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
"""Name, also of the option, -> tracker beside ``metrics.jsonl``."""
_IDENTITY = "tracker_id"
_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check(chosen: Sequence[Any]) -> None:
    """Looks whether trackers can be made, before anything is trained.

    Args:
      chosen: names of ``TRACKERS``, or functions (folder, config) -> tracker.

    Raises:
      ValueError: an unknown name, or what is neither.
      ModuleNotFoundError: what one needs is missing; names the extra.
    """
    if isinstance(chosen, str):
        raise ValueError(f"trackers must be a list, got {chosen!r}")
    for one in chosen:
        if isinstance(one, str) and one in TRACKERS:
            extras.need(_MODULES[one])
        elif isinstance(one, str) or not callable(one):
            raise ValueError(
                f"trackers must be of {[*TRACKERS]}, or functions (folder, config) -> "
                f"tracker, got {one!r}"
            )


def open_all(
    folder: Path,
    config: dict[str, Any],
    chosen: Sequence[Any],
    *,
    anew: bool = False,
) -> list[Tracker]:
    """``metrics.jsonl`` and the trackers that were chosen.

    Args:
      folder: of the run.
      config: as plain values.
      chosen: see ``check``.
      anew: the run begins; another one on a server than the one that was there.

    Returns:
      The trackers; the caller closes them.

    Raises:
      TypeError: a function that gives something else.
      What a tracker raises where it cannot be opened; those before it are closed.
    """
    if anew:
        (folder / _IDENTITY).unlink(missing_ok=True)
    with contextlib.ExitStack() as opened:
        made: list[Tracker] = []
        for one in [Jsonl, *chosen]:
            tracker = (TRACKERS[one] if isinstance(one, str) else one)(folder, config)
            if not isinstance(tracker, Tracker):
                raise TypeError(
                    f"{one!r} must give a tracker, with start, write, picture and close, "
                    f"got {tracker!r}"
                )
            opened.callback(tracker.close)
            made.append(tracker)
        opened.pop_all()
    return made


def _id(folder: Path) -> str:
    """Identity of a run on a server, kept in its folder."""
    path = folder / _IDENTITY
    known = path.read_text().strip() if path.exists() else ""
    if not known:
        known = secrets.token_hex(4)
        workdir.write(path, known + "\n")
    return known
