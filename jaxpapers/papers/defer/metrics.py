"""Metrics of a stream of predictions, in float64 on the host."""

import math
from collections.abc import Sequence

import numpy as np

from jaxpapers.ops import ranking

METRICS = ("auc", "pr_auc", "nll", "mean_p")


def score(truth: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """AUC, PR-AUC (NaN with one class only), NLL and mean of predictions.

    Args:
      truth: true labels.
      p: probabilities; NLL takes them within [1e-7, 1 - 1e-7].
    """
    p = np.asarray(p, np.float64)
    inside = np.clip(p, 1e-7, 1 - 1e-7)
    logit = np.log(inside) - np.log1p(-inside)
    both = 0 < truth.sum() < len(truth)
    return {
        "auc": ranking.auc(truth, p) if both else math.nan,
        "pr_auc": ranking.pr_auc(truth, p) if both else math.nan,
        "nll": ranking.log_loss(truth, logit),
        "mean_p": float(p.mean()),
    }


def streaming_score(
    truths: Sequence[np.ndarray], predictions: Sequence[np.ndarray]
) -> dict[str, float]:
    """Mean of each bucket's metrics, weighted by its clicks.

    Buckets without clicks count for nothing; those with one class only are left out of
    AUC and PR-AUC.
    """
    pairs = [(y, p) for y, p in zip(truths, predictions) if len(y)]
    weight = np.array([len(y) for y, _ in pairs], np.float64)
    scores = [score(y, p) for y, p in pairs]
    found = {}
    for name in METRICS:
        values = np.array([s[name] for s in scores])
        known = ~np.isnan(values)
        total = weight[known].sum()
        found[name] = (
            float((values * weight)[known].sum() / total) if total else math.nan
        )
    return found


def relative_improvement(
    value: float, pretrained: float, oracle: float, *, min_gap: float = 1e-6
) -> float:
    """Per cent of the way from the pretrained model to the oracle.

    RI = 100 (M - M_pretrained) / (M_oracle - M_pretrained); not a number where the two
    are less than ``min_gap`` apart, for then it says nothing.

    Example:
      >>> round(relative_improvement(0.57, 0.58, 0.56), 6)
      50.0
    """
    gap = oracle - pretrained
    if not abs(gap) >= min_gap:
        return float("nan")
    return 100 * (value - pretrained) / gap
