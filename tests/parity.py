"""Recorded cases of reference implementations: arrays and what an index says of them.

A folder per family (``dion``, ``ctr``, ...) has an ``index.json`` whose entries give
the hyper-parameters and tolerances of one recorded run each.
"""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

# How an entry was made, for people: no test needs to read these.
PROVENANCE = {
    *("file", "bytes", "arrays", "kind", "what", "desc", "source", "conventions"),
    *("commit", "seed", "gradients", "steps", "shape", "linear_algebra"),
    "hyper_parameters_note",
}
GROUPS = ("hyper", "params")
ORACLE = "max_rel_diff_to_float64_oracle"
REQUIRED: Any = object()


class Case:
    """One recorded run: its arrays and its hyper-parameters.

    Every hyper-parameter and tolerance of the entry has to be read by the test; those
    in the groups ``hyper`` and ``params`` count as the entry's own.
    """

    def __init__(self, folder: Path, name: str, entry: dict[str, Any]) -> None:
        self.folder, self.name, self.entry = folder, name, entry
        self._values = {k: v for k, v in entry.items() if k not in GROUPS}
        for group in GROUPS:
            self._values |= entry.get(group, {})
        self._read: set[str] = set()

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The recorded arrays."""
        with np.load(self.folder / self.entry.get("file", f"{self.name}.npz")) as file:
            return dict(file)

    def has(self, *arrays: str) -> bool:
        """Whether the entry lists all these arrays."""
        return set(arrays) <= set(self.entry["arrays"])

    def read(self, key: str, default: Any = REQUIRED) -> Any:
        """The entry's value for ``key``; ``default`` where it has none."""
        self._read.add(key)
        if key in self._values:
            return self._values[key]
        if default is REQUIRED:
            raise KeyError(f"{self.name}: no {key!r} among {sorted(self._values)}")
        return default

    def tolerance(self, *names: str, otherwise: float | None = None) -> float:
        """Largest relative error allowed for an array.

        Args:
            *names: of the array, of the dtype ("float64"), from special to general:
                the first ``tolerance_<name>`` of the entry counts. If none is stated,
                four times the distance of the first of them that
                ``max_rel_diff_to_float64_oracle`` has.
            otherwise: for entries with neither.
        """
        stated = [f"tolerance_{name}" for name in names] + ["tolerance"]
        oracle = self._values.get(ORACLE, {})
        self._read |= {key for key in stated if key in self._values}
        for key in stated:
            if key in self._values:
                return self._values[key]
        for name in names:
            if name in oracle:
                self._read.add(ORACLE)
                return 4 * oracle[name]
        if otherwise is None:
            raise KeyError(f"{self.name}: no tolerance for {' or '.join(names)}")
        return otherwise

    def unread(self) -> list[str]:
        """Keys of the entry that the test has not read.

        The tolerance of one dtype is enough: a test computes in one.
        """
        left = set(self._values) - self._read - PROVENANCE
        dtypes = {"tolerance_float64", "tolerance_float32"}
        return sorted(left - dtypes if dtypes & self._read else left)


def cases(
    folder: Path, only: Callable[[dict[str, Any]], bool] = lambda entry: True
) -> list[tuple[Path, str, dict[str, Any]]]:
    """Folder, name and entry of the cases in ``index.json``; none without a folder.

    The entries are a list ``files``, a dict ``cases``, or the whole index by name.
    """
    path = folder / "index.json"
    if not path.exists():
        return []
    index = json.loads(path.read_text())
    if "files" in index:
        entries = {Path(entry["file"]).stem: entry for entry in index["files"]}
    else:
        entries = index.get("cases", index)
        entries = {name: x for name, x in entries.items() if not name.startswith("_")}
    return [(folder, name, entry) for name, entry in entries.items() if only(entry)]
