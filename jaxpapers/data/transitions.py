"""Offline transitions of D4RL, Minari and OGBench files as one struct.

transitions.read("antmaze-large-play.hdf5")          D4RL
transitions.read("D4RL/pointmaze/medium-v2")         Minari, the folder or its HDF5
transitions.read("pointmaze-medium-navigate-v0.npz") OGBench
"""

import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers import extras
from jaxpapers.data import files

MOST_BYTES = 8 << 30
"""Largest sum of the arrays that are read."""
MOST_RATIO = 200
"""Of them to the file; compressed floats of observations take half their size."""
FREE_BYTES = 1 << 26
HDF5 = (".hdf5", ".h5")
BROKEN = (OSError, RuntimeError, KeyError, ValueError, TypeError, EOFError,
          MemoryError, zipfile.BadZipFile, zlib.error, NotImplementedError)  # fmt: skip


class Transitions(NamedTuple):
    """N transitions, those of a trajectory one after another.

    Attributes:
      states: float32 (N, n).
      actions: float32 (N, A).
      next_states: float32 (N, n).
      rewards: float32 (N,).
      terminals: whether the environment ended there, bool (N,).
      ends: index of the last transition of each one's trajectory, int (N,).
      skipped: rows of the file that begin no transition: the last states of
        trajectories, and empty episodes.
    """

    states: np.ndarray
    actions: np.ndarray
    next_states: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    ends: np.ndarray
    skipped: int

    @property
    def last(self) -> np.ndarray:
        """Whether a transition is the last of its trajectory, (N,)."""
        return self.ends == np.arange(len(self.ends))


def read(
    path: str | Path, *, horizon: int | None = None, observation: str = "observation"
) -> Transitions:
    """Reads a file of any of the three formats, which its content tells.

    Args:
      path: HDF5 file of D4RL or Minari, a Minari data set's folder, or OGBench's npz.
      horizon: steps of a trajectory in D4RL files without ``timeouts``: 700 or 1000 of
        old AntMaze files, 0 for a walk without resets.
      observation: part of Minari's observations to read where they are dicts.

    Raises:
      FileNotFoundError: no such file.
      ModuleNotFoundError: h5py is not installed; names the extra.
      ValueError: a file that cannot be read, an array that is missing, has another
        shape, kind or number of rows, is not finite or too large.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "data" / "main_data.hdf5"
    path, size = files.check(path)
    limit = min(MOST_BYTES, FREE_BYTES + MOST_RATIO * size)
    try:
        if path.suffix == ".npz":
            return _ogbench(path, limit)
        if path.suffix not in HDF5:
            raise ValueError(
                f"{path}: expected .hdf5 (D4RL, Minari), .npz (OGBench) or a folder of "
                "Minari"
            )
        with extras.named():
            import h5py

        with h5py.File(path, "r") as file:
            if any(name.startswith("episode_") for name in file):
                return _minari(path, file, observation, limit)
            return _d4rl(path, file, horizon, limit)
    except ModuleNotFoundError:
        raise
    except BROKEN as e:
        if isinstance(e, ValueError) and str(path) in str(e):
            raise
        raise ValueError(f"{path}: cannot be read: {e}") from e


def _d4rl(path: Path, file: Any, horizon: int | None, limit: int) -> Transitions:
    """Flat arrays: a transition ends where the next one begins."""
    names = ["observations", "actions", "rewards", "terminals"]
    _check_bytes(path, [_dataset(path, file, name) for name in names], limit)
    observations = _matrix(
        path, "observations", _dataset(path, file, "observations")[()]
    )
    count = len(observations)
    actions = _matrix(path, "actions", _dataset(path, file, "actions")[()], count)
    rewards = _vector(path, "rewards", _dataset(path, file, "rewards")[()], count)
    terminals = _flags(path, "terminals", _dataset(path, file, "terminals")[()], count)
    if "timeouts" in file:
        timeouts = _flags(path, "timeouts", _dataset(path, file, "timeouts")[()], count)
    elif horizon is None:
        raise ValueError(
            f"{path}: no array 'timeouts', as in old files; give horizon=, the steps of "
            "a trajectory, or 0 if it is one"
        )
    else:
        timeouts = np.zeros(count, bool)
        if horizon:
            timeouts[horizon - 1 :: horizon] = True
    kept = ~timeouts
    kept[-1:] = False
    if not kept.any():
        raise ValueError(f"{path}: no transitions in {count} rows")
    index = np.flatnonzero(kept)
    # A trajectory goes on where the next row is kept and the environment did not end.
    last = terminals[index] | (np.diff(index, append=count + 1) != 1)
    return Transitions(
        observations[index], actions[index], observations[index + 1], rewards[index],
        terminals[index], _ends(last), count - len(index),
    )  # fmt: skip


def _minari(path: Path, file: Any, observation: str, limit: int) -> Transitions:
    """A group an episode, with one observation more than actions."""
    pattern = re.compile(r"episode_(\d+)$")
    numbers = sorted(int(m[1]) for name in file if (m := pattern.match(name)))
    parts, skipped, everything = [], 0, []
    for number in numbers:
        where = f"episode_{number}"
        group = file[where]
        names = ["actions", "rewards", "terminations"]
        states = _observations(path, group, observation, where)
        arrays = [states, *(_dataset(path, group, name, where) for name in names)]
        everything += arrays
        _check_bytes(path, everything, limit)
        observations = _matrix(path, f"{where}/observations", arrays[0][()])
        count = len(observations) - 1
        if count < 1:
            skipped += len(observations)
            continue
        actions = _matrix(path, f"{where}/actions", arrays[1][()], count)
        rewards = _vector(path, f"{where}/rewards", arrays[2][()], count)
        terminals = _flags(path, f"{where}/terminations", arrays[3][()], count)
        last = np.arange(count) == count - 1
        parts.append(
            (observations[:-1], actions, observations[1:], rewards, terminals, last)
        )
        skipped += 1
    if not parts:
        raise ValueError(f"{path}: no transitions in {len(numbers)} episodes")
    for name, column in zip(("observations", "actions"), zip(*parts)):
        if len({x.shape[1] for x in column}) > 1:
            raise ValueError(f"{path}: {name} of different sizes in different episodes")
    states, actions, following, rewards, terminals, last = (
        np.concatenate(x) for x in zip(*parts)
    )
    return Transitions(
        states, actions, following, rewards, terminals, _ends(last), skipped
    )


def _observations(path: Path, group: Any, observation: str, where: str) -> Any:
    """An episode's observations, or one of their parts."""
    if "observations" in group and hasattr(group["observations"], "keys"):
        states = group["observations"]
        if observation not in states:
            raise ValueError(
                f"{path}: {where}/observations has no {observation!r}, has {[*states]}; "
                "name one by observation="
            )
        return _dataset(path, states, observation, f"{where}/observations")
    return _dataset(path, group, "observations", where)


def _ogbench(path: Path, limit: int) -> Transitions:
    """Flat arrays: 1 - terminals selects states and actions, as OGBench reads it."""
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > limit:
        raise ValueError(_too_large(path, size, limit))
    with np.load(path, allow_pickle=False) as file:
        names = ("observations", "actions", "terminals")
        missing = [name for name in names if name not in file]
        if missing:
            raise ValueError(f"{path}: no array {missing[0]!r}, has {[*file]}")
        arrays = {name: file[name] for name in names}
    observations = _matrix(path, "observations", arrays["observations"])
    count = len(observations)
    actions = _matrix(path, "actions", arrays["actions"], count)
    ends = _flags(path, "terminals", arrays["terminals"], count)
    # The last state of a trajectory has an action that means nothing.
    kept = ~ends
    kept[-1:] = False
    if not kept.any():
        raise ValueError(f"{path}: no transitions in {count} rows")
    index = np.flatnonzero(kept)
    last = np.append(ends, True)[index + 1]
    last[-1] = True
    zeros = np.zeros(len(index))
    return Transitions(
        observations[index], actions[index], observations[index + 1],
        zeros.astype(np.float32), zeros.astype(bool), _ends(last), count - len(index),
    )  # fmt: skip


def _ends(last: np.ndarray) -> np.ndarray:
    """Index of the last row of each row's trajectory."""
    at = np.flatnonzero(last)
    return at[np.searchsorted(at, np.arange(len(last)))]


def _dataset(path: Path, group: Any, name: str, where: str = "") -> Any:
    """A dataset of an HDF5 group."""
    full = f"{where}/{name}" if where else name
    if name not in group:
        raise ValueError(f"{path}: no array {full!r}, has {sorted(group)}")
    if hasattr(group.get(name, getlink=True), "filename"):
        raise ValueError(f"{path}: {full} is a link to another file; not followed")
    found = group[name]
    if not hasattr(found, "shape") or not hasattr(found, "dtype"):
        raise ValueError(f"{path}: {full} is a group, expected an array")
    if found.external or found.is_virtual:
        raise ValueError(f"{path}: {full} is stored in other files; not read")
    return found


def _check_bytes(path: Path, arrays: list, limit: int) -> None:
    size = sum(8 * int(np.prod(x.shape, dtype=float)) for x in arrays)
    if size > limit:
        raise ValueError(_too_large(path, size, limit))


def _too_large(path: Path, size: int, limit: int) -> str:
    return (
        f"{path}: {size / 2**20:,.0f} MiB of arrays, at most {limit / 2**20:,.0f} are "
        "read of a file of this size; cut it into parts"
    )


def _numbers(path: Path, name: str, array: Any) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind != "f":
        raise ValueError(
            f"{path}: {name} must be floating point, got {array.dtype}; discrete actions "
            "are not read"
        )
    if array.dtype != np.float32:
        if array.size and np.abs(array[np.isfinite(array)]).max(initial=0) > 3e38:
            raise ValueError(f"{path}: {name} has numbers beyond float32")
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {name} must be finite, got NaN or infinity")
    return array


def _matrix(path: Path, name: str, array: Any, rows: int | None = None) -> np.ndarray:
    array = np.asarray(array)
    expected = "(rows, size)" if rows is None else f"({rows}, size)"
    wrong = array.ndim != 2 or not array.shape[1] or rows not in (None, len(array))
    if wrong or not len(array):
        raise ValueError(f"{path}: {name} must be {expected}, got {array.shape}")
    return _numbers(path, name, array)


def _vector(path: Path, name: str, array: Any, rows: int) -> np.ndarray:
    array = np.asarray(array)
    if array.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{path}: {name} must be ({rows},), got {array.shape}")
    return _numbers(path, name, array.reshape(rows))


def _flags(path: Path, name: str, array: Any, rows: int) -> np.ndarray:
    array = np.asarray(array)
    if array.shape not in ((rows,), (rows, 1)):
        raise ValueError(f"{path}: {name} must be ({rows},), got {array.shape}")
    if array.dtype.kind not in "bfiu" or not np.isin(array, (0, 1)).all():
        raise ValueError(f"{path}: {name} must be 0 or 1, got {array.dtype}")
    return array.reshape(rows).astype(bool)
