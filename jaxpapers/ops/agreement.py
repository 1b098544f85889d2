"""How far two codings agree: kappa, ICC, overlap of quotes. On the host."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

WEIGHTS = ("none", "linear", "quadratic")
ICC = ("1,1", "2,1", "3,1", "1,k", "2,k", "3,k")


class Matching(NamedTuple):
    """Found spans against true ones.

    Attributes:
      precision, recall, f1: of matched spans; NaN where a side is empty.
      pairs: (found, true) indices.
    """

    precision: float
    recall: float
    f1: float
    pairs: tuple[tuple[int, int], ...]


def kappa(a: Any, b: Any, weights: str = "none", categories: Any = None) -> float:
    """Cohen's kappa of two codings of the same items.

    1 - (disagreement observed) / (disagreement expected by chance); disagreements count
    |i - j| ** 1 or 2 categories apart with weights linear or quadratic.

    Args:
      a, b: (n,) labels.
      weights: none, linear or quadratic.
      categories: all labels in order; None: those that occur, sorted.

    Raises:
      ValueError: other lengths, no items, an unknown label or weights, one category only
        (chance alone agrees).

    Example:
      >>> kappa([1, 2, 3, 3], [1, 2, 3, 2])
      0.6363636363636364
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(
            f"codings must have n >= 1 items each, got {a.shape}, {b.shape}"
        )
    known = np.unique(np.concatenate([a, b])) if categories is None else None
    names = list(known if known is not None else categories)
    place = {v: i for i, v in enumerate(names)}
    unknown = [v for v in (*a.tolist(), *b.tolist()) if v not in place]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not of the categories {names}")
    table = np.zeros((len(names), len(names)))
    np.add.at(
        table, ([place[v] for v in a.tolist()], [place[v] for v in b.tolist()]), 1
    )
    distance = np.abs(np.subtract.outer(np.arange(len(names)), np.arange(len(names))))
    cost = {"none": distance > 0, "linear": distance, "quadratic": distance**2}[weights]
    expected = np.outer(table.sum(1), table.sum(0)) / len(a)
    chance = float((cost * expected).sum())
    if chance == 0:
        raise ValueError(
            f"all items have the label {names[0]!r}: kappa is not defined; code more"
        )
    return float(1 - (cost * table).sum() / chance)


def icc(scores: Any, kind: str = "2,1") -> float:
    """Intraclass correlation of scores (items, raters); Shrout and Fleiss, 1979.

    -inf or NaN where its denominator is 0 (items that do not differ).

    Args:
      scores: (n, k) of n items by k raters, none missing.
      kind: model (1 one-way, 2 two-way random, 3 two-way mixed) and one or k ratings.

    Raises:
      ValueError: fewer than 2 items or raters, missing scores, no variance, kind.
    """
    if kind not in ICC:
        raise ValueError(f"kind must be one of {ICC}, got {kind!r}")
    x = np.asarray(scores, np.float64)
    if x.ndim != 2 or min(x.shape) < 2:
        raise ValueError(f"scores must be (items >= 2, raters >= 2), got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError("scores must be finite: leave out items that a rater skipped")
    if np.ptp(x) == 0:
        raise ValueError("all scores are equal: the ICC is not defined")
    n, k = x.shape
    rows, columns, grand = x.mean(1), x.mean(0), x.mean()
    between = k * np.square(rows - grand).sum() / (n - 1)
    raters = n * np.square(columns - grand).sum() / (k - 1)
    rest = np.square(x - rows[:, None] - columns + grand).sum() / ((n - 1) * (k - 1))
    within = np.square(x - rows[:, None]).sum() / (n * (k - 1))
    model, single = kind[0], kind[2] == "1"
    error = within if model == "1" else rest
    above, below = between - error, between + single * (k - 1) * error
    if model == "2":
        below += (k if single else 1) * (raters - rest) / n
    if below == 0:
        return -np.inf if above < 0 else np.nan
    return float(above / below)


def iou(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Shared by joint length of two spans [start, end)."""
    shared = max(0, min(a[1], b[1]) - max(a[0], b[0]))
    joint = (a[1] - a[0]) + (b[1] - b[0]) - shared
    return shared / joint if joint else 0.0


def match_spans(
    found: Sequence[tuple[int, int]],
    true: Sequence[tuple[int, int]],
    least: float = 0.5,
) -> Matching:
    """Pairs spans greedily by their overlap, the best first, each once.

    Args:
      found, true: spans.
      least: smallest IoU of a match.
    """
    pairs = sorted(
        ((iou(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(true)),
        key=lambda p: (-p[0], p[1], p[2]),
    )
    left, right, chosen = set(), set(), []
    for value, i, j in pairs:
        if value >= least and i not in left and j not in right:
            left.add(i)
            right.add(j)
            chosen.append((i, j))
    p = len(chosen) / len(found) if found else np.nan
    r = len(chosen) / len(true) if true else np.nan
    f1 = 2 * p * r / (p + r) if chosen else (np.nan if np.isnan(p + r) else 0.0)
    return Matching(float(p), float(r), float(f1), tuple(chosen))
