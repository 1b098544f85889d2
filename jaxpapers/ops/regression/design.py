"""The table of a regression: checked columns, clusters and fixed effects. On the host.

What would give NaN or a meaningless number is refused by name, or left out and counted.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Design(NamedTuple):
    """A checked regression problem; float64 and int32.

    Attributes:
      y: (n,) outcome.
      x: (n, k) regressors, the intercept (where there is one) first.
      names: of the columns of x.
      fe: (D, n) codes 0 .. levels - 1 of each fixed effect.
      levels: of each fixed effect.
      fe_names: of the fixed effects.
      cluster: (n,) codes, or None.
      clusters: their number; 0 without.
      rows: indices of the given rows that are left.
      dropped: why -> rows or columns left out.
    """

    y: np.ndarray
    x: np.ndarray
    names: tuple[str, ...]
    fe: np.ndarray
    levels: tuple[int, ...]
    fe_names: tuple[str, ...]
    cluster: np.ndarray | None
    clusters: int
    rows: np.ndarray
    dropped: dict[str, Any]

    @property
    def fixed(self) -> int:
        """Fixed effects that are free: levels, less one for each further effect."""
        return sum(self.levels) - max(len(self.levels) - 1, 0)

    def nested(self) -> list[bool]:
        """Whether the rows of every level of a fixed effect share one cluster."""
        if self.cluster is None:
            return [False] * len(self.levels)
        pairs = [np.unique(np.stack([f, self.cluster]), axis=1) for f in self.fe]
        return [p.shape[1] == n for p, n in zip(pairs, self.levels)]


def design(
    y: Any,
    x: Mapping[str, Any],
    *,
    fe: Mapping[str, Any] | None = None,
    cluster: Any = None,
    intercept: bool = True,
    missing: str = "raise",
    collinear: str = "raise",
    singletons: str = "keep",
    zeros: str = "keep",
) -> Design:
    """Checks and encodes the columns of a regression.

    Args:
      y: (n,) outcome.
      x: name -> (n,) regressor.
      fe: name -> (n,) labels of a fixed effect; they absorb the intercept.
      cluster: (n,) labels.
      intercept: adds a column ``Intercept`` where there are no fixed effects.
      missing: raise, or drop: rows with a value that is not finite or a missing label.
      collinear: raise, or drop: columns that others (or the fixed effects) span.
      singletons: keep, or drop: rows alone in a level of a fixed effect, repeatedly.
      zeros: keep, or drop: rows of levels whose outcome is 0 throughout, repeatedly.

    Raises:
      ValueError: other lengths, no rows, values that are no numbers, a constant outcome,
        a single cluster, collinear columns (named), too few rows.
    """
    _check_words(
        missing=missing, collinear=collinear, singletons=singletons, zeros=zeros
    )
    fe = dict(fe or {})
    y = numbers("the outcome", y)
    columns = {name: numbers(name, v) for name, v in x.items()}
    if not columns and not intercept:
        raise ValueError("a regression needs at least one regressor, got none")
    groups = {**fe, **({} if cluster is None else {"the cluster": cluster})}
    given = {name: labels(v) for name, v in groups.items()}
    keep, dropped = complete_rows({"the outcome": y, **columns}, given, missing)
    if not keep.any():
        raise ValueError("no rows are left: every row has a missing value")
    codes = {name: encode(v, keep) for name, v in given.items()}
    keep = _estimable(keep, y, [codes[f] for f in fe], singletons, zeros, dropped)
    rows = np.flatnonzero(keep)
    if not len(rows):
        raise ValueError("no rows are left: each is alone in a level of a fixed effect")
    y = y[rows]
    if np.ptp(y) == 0:
        raise ValueError(
            f"the outcome is constant ({y[0]:g} in all {len(y)} rows): there is nothing "
            "to explain; check the column"
        )
    coded = {
        name: np.unique(v[rows], return_inverse=True)[1] for name, v in codes.items()
    }
    cluster_codes = coded.pop("the cluster", None)
    clusters = 0 if cluster_codes is None else int(cluster_codes.max()) + 1
    if clusters == 1:
        raise ValueError(
            "there is one cluster: standard errors need at least 2, expected many; use "
            "vcov='HC1' or another cluster"
        )
    names = list(columns)
    matrix = (
        np.stack([columns[c][rows] for c in names], 1)
        if names
        else np.ones((len(rows), 0))
    )
    if intercept and not fe:
        names = ["Intercept", *names]
        matrix = np.concatenate([np.ones((len(rows), 1)), matrix], 1)
    fe_codes = (
        np.stack(list(coded.values())).astype(np.int32)
        if fe
        else np.zeros((0, len(rows)), np.int32)
    )
    levels = tuple(int(f.max()) + 1 for f in fe_codes)
    spanned = _collinear(matrix, fe_codes, levels)
    if spanned:
        listed = ", ".join(names[i] for i in spanned)
        if collinear == "raise":
            raise ValueError(
                f"collinear: {listed} is spanned by the other regressors"
                f"{' and the fixed effects' if fe else ''}; leave it out, or pass "
                "collinear='drop'"
            )
        dropped["collinear"] = [names[i] for i in spanned]
        left = [i for i in range(len(names)) if i not in spanned]
        matrix, names = matrix[:, left], [names[i] for i in left]
    made = Design(
        y, matrix, tuple(names), fe_codes, levels, tuple(fe), cluster_codes, clusters,
        rows, dropped,
    )  # fmt: skip
    if len(rows) <= matrix.shape[1] + made.fixed:
        raise ValueError(
            f"{len(rows)} rows cannot determine {matrix.shape[1]} coefficients and "
            f"{made.fixed} fixed effects; expected more rows"
        )
    return made


def labels(values: Any) -> np.ndarray:
    """Labels as an array in which missing ones (None, NaN) stay what they are."""
    if isinstance(values, np.ndarray):
        return values
    made = np.asarray(values)
    if made.dtype.kind in "US":
        # NumPy makes the text "nan" of a missing value in a list of texts.
        each = np.asarray(values, object)
        return each if missing_labels(each).any() else made
    return made


def missing_labels(values: np.ndarray) -> np.ndarray:
    """Mask of labels that are None, NaN or not finite."""
    if values.dtype.kind == "f":
        return ~np.isfinite(values)
    if values.dtype.kind in "mM":
        return np.isnat(values)
    if values.dtype != object:
        return np.zeros(len(values), bool)
    return np.array([_is_missing(v) for v in values], bool)


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):  # The missing value of pandas cannot be compared.
        return True


def encode(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Codes 0, 1, ... of the labels of the rows that are kept; -1 elsewhere."""
    codes = np.full(len(values), -1)
    kept = values[keep]
    try:
        codes[keep] = np.unique(kept, return_inverse=True)[1]
    except TypeError:  # Numbers and texts have no common order.
        known: dict[Any, int] = {}
        codes[keep] = [known.setdefault(v, len(known)) for v in kept]
    return codes


def numbers(name: str, values: Any) -> np.ndarray:
    """Values as float64, missing ones as NaN.

    Raises:
      ValueError: no numbers, or not one per row.
    """
    try:
        result = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must hold numbers, got {np.asarray(values).dtype}"
        ) from None
    if result.ndim != 1:
        raise ValueError(
            f"{name} must have one value per row, got shape {result.shape}"
        )
    return result


def group_codes(name: str, values: Any) -> np.ndarray:
    """Codes 0, 1, ... of labels none of which is missing.

    Raises:
      ValueError: missing labels, or not one per row.
    """
    given = labels(values)
    if given.ndim != 1:
        raise ValueError(f"{name} must have one label per row, got shape {given.shape}")
    bad = int(missing_labels(given).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} missing labels of {len(given)}; leave out these rows"
        )
    return encode(given, np.ones(len(given), bool))


def _check_words(**words: str) -> None:
    for name, value in words.items():
        known = (
            ("keep", "drop") if name in ("singletons", "zeros") else ("raise", "drop")
        )
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")


def complete_rows(
    columns: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray], missing: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Mask of rows without a missing value, and how many are left out by column.

    Args:
      columns: name -> (n,) numbers.
      groups: name -> (n,) ``labels``.
      missing: raise or drop.

    Raises:
      ValueError: columns of other lengths; missing values unless they are dropped.
    """
    shape = next(iter(columns.values())).shape
    for name, v in {**columns, **groups}.items():
        if v.shape != shape:
            raise ValueError(
                f"{name} must have one value per row, {shape}, got shape {v.shape}"
            )
    bad = {name: ~np.isfinite(v) for name, v in columns.items()}
    bad |= {name: missing_labels(v) for name, v in groups.items()}
    every = np.any(list(bad.values()), 0)
    if not every.any():
        return ~every, {}
    counts = {name: int(b.sum()) for name, b in bad.items() if b.any()}
    if missing == "raise":
        listed = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise ValueError(
            f"{int(every.sum())} of {len(every)} rows have a value that is missing or "
            f"not finite ({listed}); fill them, or pass missing='drop'"
        )
    return ~every, {"missing": int(every.sum()), "missing_by_column": counts}


def _estimable(keep, y, effects, singletons, zeros, dropped) -> np.ndarray:
    """Leaves out zero levels and singletons until there is neither; counts them."""
    counts = {"separated": 0} if zeros == "drop" else {}
    counts |= {"singletons": 0} if effects and singletons == "drop" else {}
    before = -1
    while effects and before != keep.sum():
        before = last = int(keep.sum())
        if "separated" in counts:
            keep = positive_levels(y, effects, keep)
            if not keep.any():
                raise ValueError("every level of a fixed effect has outcome 0 only")
            counts["separated"] += last - int(keep.sum())
            last = int(keep.sum())
        if "singletons" in counts:
            keep = _without_singletons(keep, effects)
            counts["singletons"] += last - int(keep.sum())
    dropped.update(counts)
    return keep


def positive_levels(
    y: np.ndarray, effects: Sequence[np.ndarray], keep: np.ndarray
) -> np.ndarray:
    """Rows of ``keep`` whose levels (codes of each effect) all have a positive outcome.

    Rows that leave may take the last positive outcome of another level with them: until
    nothing changes.
    """
    while True:
        before = keep
        for codes in effects:
            total = np.bincount(codes[keep], y[keep], codes.max(initial=0) + 1)
            keep = keep & (total[codes] > 0)
        if keep.sum() == before.sum():
            return keep


def _without_singletons(keep: np.ndarray, effects: Sequence[np.ndarray]) -> np.ndarray:
    """Drops rows that are alone in a level until none is."""
    while True:
        before = keep
        for codes in effects:
            count = np.bincount(codes[keep], minlength=codes.max(initial=0) + 1)
            keep = keep & (count[codes] > 1)
        if keep.sum() == before.sum():
            return keep


def _collinear(x: np.ndarray, fe: np.ndarray, levels: Sequence[int]) -> list[int]:
    """Columns that earlier ones and the fixed effects span, by Gram-Schmidt."""
    residual = host_demean(x, fe, levels) if len(levels) else x.copy()
    scale = np.linalg.norm(x, axis=0)
    basis: list[np.ndarray] = []
    spanned = []
    for i in range(x.shape[1]):
        v = residual[:, i].copy()
        for _ in range(2):  # Twice is enough.
            for b in basis:
                v -= b * (b @ v)
        size = np.linalg.norm(v)
        if not size > 1e-9 * max(scale[i], 1e-300):
            spanned.append(i)
        else:
            basis.append(v / size)
    return spanned


def host_demean(
    x: np.ndarray, fe: np.ndarray, levels: Sequence[int], rounds: int = 300
) -> np.ndarray:
    """Residuals (n, k) of the columns on the fixed effects, in NumPy; see ``demean``."""
    x = x.copy()
    counts = [np.bincount(f, minlength=n)[:, None] for f, n in zip(fe, levels)]
    scale = np.maximum(np.abs(x).max(0), 1e-300)
    for _ in range(1 if len(levels) == 1 else rounds):
        moved = np.zeros(x.shape[1])
        for f, n, count in zip(fe, levels, counts):
            sums = np.stack([np.bincount(f, c, n) for c in x.T], 1) if x.size else 0
            mean = sums / np.maximum(count, 1)
            x -= mean[f]
            moved = np.maximum(moved, np.abs(mean).max(0, initial=0) / scale)
        if np.all(moved < 1e-12):
            break
    return x
