"""Metrics of predictions along a stream, in float64 on the host."""

import math
from collections.abc import Sequence

import numpy as np

from jaxpapers.ops import ranking

METRICS = ("auc", "pr_auc", "nll", "mean_p")


def score(truth: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """AUC and PR-AUC (NaN with one class only), NLL in nats, mean prediction.

    Args:
      truth: final labels.
      p: probabilities; clipped to [1e-7, 1 - 1e-7] for NLL.

    Raises:
      ValueError: a p that is NaN or outside [0, 1], or see ``ops.ranking``.
    """
    truth, p = np.asarray(truth, np.float64), np.asarray(p, np.float64)
    bad = np.flatnonzero(~((p >= 0) & (p <= 1)))
    if len(bad):
        raise ValueError(
            f"predictions must be probabilities in [0, 1], got {p[bad[:5]].tolist()} at "
            f"rows {bad[:5].tolist()}, {len(bad)} in all"
        )
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
    """Mean over the buckets of ``score``, weighted by their numbers of clicks.

    AUC and PR-AUC are means over the buckets with both classes.

    Args:
      truths: final labels of each bucket's clicks.
      predictions: their probabilities.
    """
    pairs = [(y, p) for y, p in zip(truths, predictions) if len(y)]
    weight = np.array([len(y) for y, _ in pairs], np.float64)
    scores = [score(y, p) for y, p in pairs]
    means = {}
    for name in METRICS:
        values = np.array([s[name] for s in scores])
        defined = ~np.isnan(values)
        total = weight[defined].sum()
        means[name] = (
            float((values * weight)[defined].sum() / total) if total else math.nan
        )
    return means


def relative_improvement(
    value: float, pretrained: float, oracle: float, *, min_gap: float = 1e-6
) -> float:
    """Improvement over the pretrained model, in per cent of the oracle's.

    RI = 100 (M - M_pretrained) / (M_oracle - M_pretrained), NaN where the denominator is
    below ``min_gap`` or a number is not finite.

    Example:
      >>> round(relative_improvement(0.57, 0.58, 0.56), 6)
      50.0
    """
    gap = oracle - pretrained
    if not (abs(gap) >= min_gap and math.isfinite(gap) and math.isfinite(value)):
        return float("nan")
    return 100 * (value - pretrained) / gap
