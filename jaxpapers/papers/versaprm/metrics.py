"""How well scores tell right steps from wrong ones."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpapers.ops import ranking


def step_metrics(labels: Any, scores: Any, threshold: float = 0.5) -> dict[str, float]:
    """Metrics of labelled steps; those whose denominator is zero are NaN.

    Args:
      labels: (n,) 1 right, 0 wrong.
      scores: (n,) probabilities of right.
      threshold: at and above which a step counts as right.

    Returns:
      accuracy, precision, recall, specificity, npv (negative predictive value), f1,
      f1_wrong (F1 of the wrong steps), auc.

    Raises:
      ValueError: other labels than 0 and 1, scores that are no probabilities, no steps.

    Example:
      >>> step_metrics([1, 1, 0], [0.9, 0.4, 0.2])["recall"]
      0.5
    """
    y, p = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    if y.ndim != 1 or y.shape != p.shape or not len(y):
        raise ValueError(
            f"labels and scores must be two lists of one length, got {y.shape} and "
            f"{p.shape}"
        )
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(y)[:6]}")
    bad = int((~((p >= 0) & (p <= 1))).sum())
    if bad:
        raise ValueError(f"scores must be probabilities, got {bad} that are none")
    told = p >= threshold
    tp, fp = float((told & (y == 1)).sum()), float((told & (y == 0)).sum())
    fn, tn = float((~told & (y == 1)).sum()), float((~told & (y == 0)).sum())
    both = 0 < y.sum() < len(y)
    return {
        "accuracy": (tp + tn) / len(y),
        "precision": _ratio(tp, tp + fp),
        "recall": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
        "npv": _ratio(tn, tn + fn),
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "f1_wrong": _ratio(2 * tn, 2 * tn + fp + fn),
        "auc": ranking.auc(y, p) if both else math.nan,
    }


def predicted_error(scores: Sequence[float], threshold: float = 0.5) -> int:
    """Index of the first step whose score is below the threshold; -1: none is.

    Raises:
      ValueError: no scores, or scores that are not finite.
    """
    if not len(scores) or not all(map(math.isfinite, scores)):
        raise ValueError(f"expected finite scores of steps, got {list(scores)[:8]}")
    return next((i for i, p in enumerate(scores) if p < threshold), -1)


def error_index_f1(
    first_errors: Sequence[int],
    scores: Sequence[Sequence[float]],
    threshold: float = 0.5,
) -> dict[str, float]:
    """ProcessBench: is the first wrong step found (Zheng et al., arXiv 2412.06559).

    Args:
      first_errors: index of each solution's first wrong step; -1: none.
      scores: of the steps of each solution.
      threshold: below which a step counts as wrong.

    Returns:
      ``wrong``, the share of wrong solutions whose first error is found to the index;
      ``right``, the share of right ones in which none is; ``f1``, their harmonic mean.
      NaN where there are no solutions of a kind, and for f1 then.

    Raises:
      ValueError: other numbers of both, an index beyond the steps.
    """
    if len(first_errors) != len(scores):
        raise ValueError(
            f"got {len(first_errors)} first errors and scores of {len(scores)} solutions"
        )
    for i, (e, s) in enumerate(zip(first_errors, scores)):
        if not -1 <= e < len(s):
            raise ValueError(
                f"solution {i} has {len(s)} steps and its first error at {e}"
            )
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for e, s in zip(first_errors, scores):
        hits[e >= 0].append(predicted_error(s, threshold) == e)
    wrong, right = (
        float(np.mean(hits[k])) if hits[k] else math.nan for k in (True, False)
    )
    total = wrong + right
    f1 = 0.0 if total == 0 else 2 * wrong * right / total
    return {"wrong": wrong, "right": right, "f1": f1}


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan
