"""Metrics of detection, exact with ties, by convention; thresholds. On the host.

Scores are higher for in-distribution (ID) inputs; all is float64. Papers mean different
numbers by FPR95 and AUPR, and AUPR moves with the shares of both sets, so the convention
is named:

=========== ======== ================================ =====================
convention  positive threshold of the FPR             AUPR
=========== ======== ================================ =====================
``poem``    ID       recall nearest to the level      average precision
``oe``      OOD      recall nearest to the level      average precision
``openood`` OOD      first recall >= the level        trapezoids
=========== ======== ================================ =====================

``swept`` gives the further set that ODIN's code and its descendants print.
"""

from typing import Any, NamedTuple

import numpy as np

CONVENTIONS = ("poem", "oe", "openood")


class Measures(NamedTuple):
    """Metrics of a convention, in [0, 1].

    Attributes:
      fpr: share of negatives on the positive side of the threshold.
      auroc: area under the ROC curve, ties counted half; that of both conventions.
      aupr: area under the precision-recall curve of the convention's positive class.
    """

    fpr: float
    auroc: float
    aupr: float


class Swept(NamedTuple):
    """Metrics of ODIN's code: FPR above the ID score of rank 5 %, areas of curves."""

    fpr: float
    detection_error: float
    auroc: float
    aupr_in: float
    aupr_out: float


class Threshold(NamedTuple):
    """A calibrated detector: inputs with a score below ``value`` are outliers.

    Attributes:
      value: of the score.
      tpr: share of the calibration's ID inputs that reach it.
      score: name of the score.
    """

    value: float
    tpr: float
    score: str = "energy"

    def accepts(self, scores: Any) -> np.ndarray:
        """True where an input counts as ID."""
        return np.asarray(scores) >= self.value


def measures(
    id_scores: Any, ood_scores: Any, convention: str = "poem", tpr: float = 0.95
) -> Measures:
    """FPR at a recall, AUROC and AUPR of a convention.

    Args:
      id_scores, ood_scores: (n,) and (m,), higher for ID.
      convention: one of ``CONVENTIONS``.
      tpr: recall of the positive class at the threshold.

    Raises:
      ValueError: unknown convention, no or NaN scores, ``tpr`` outside (0, 1].

    Example:
      >>> [round(x, 3) for x in measures([3.0, 2.0, 1.0], [0.0, 1.5])]
      [0.5, 0.833, 0.917]
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {CONVENTIONS}, got {convention!r}")
    positive = "id" if convention == "poem" else "ood"
    first = convention == "openood"
    return Measures(
        fpr_at_tpr(
            id_scores, ood_scores, tpr, positive, "first" if first else "nearest"
        ),
        auroc(id_scores, ood_scores),
        aupr(id_scores, ood_scores, positive, "trapezoids" if first else "steps"),
    )


def fpr_at_tpr(
    id_scores: Any,
    ood_scores: Any,
    tpr: float = 0.95,
    positive: str = "id",
    rule: str = "nearest",
) -> float:
    """Share of negatives on the positive side of the threshold for a recall.

    Args:
      id_scores, ood_scores: higher for ID.
      tpr: the recall.
      positive: id or ood.
      rule: nearest: threshold whose recall is nearest to ``tpr``, of two the larger
        recall; first: the first corner of the ROC curve with at least ``tpr``.

    Raises:
      ValueError: see ``measures``; unknown rule or class.
    """
    check_recall(tpr)
    _check_word("rule", rule, ("nearest", "first"))
    hits, false = _counts(id_scores, ood_scores, positive)
    recall, fpr = hits / hits[-1], false / false[-1]
    if rule == "nearest":
        last = int(np.searchsorted(hits, hits[-1]))
        return float(fpr[last::-1][np.argmin(np.abs(recall[last::-1] - tpr))])
    corner = _corners(hits, false)
    return float(fpr[corner][np.argmax(recall[corner] >= tpr)])


def auroc(id_scores: Any, ood_scores: Any) -> float:
    """P(ID score > OOD score) + P(equal) / 2, the Mann-Whitney statistic.

    Raises:
      ValueError: no or NaN scores.
    """
    ids, oods = _checked(id_scores, ood_scores)
    oods = np.sort(oods)
    below, upto = (np.searchsorted(oods, ids, side) for side in ("left", "right"))
    return float((below.mean() + upto.mean()) / 2 / len(oods))


def aupr(
    id_scores: Any, ood_scores: Any, positive: str = "id", area: str = "steps"
) -> float:
    """Area under the precision-recall curve.

    Args:
      id_scores, ood_scores: higher for ID.
      positive: id or ood.
      area: steps: average precision; trapezoids: between the points, which flatters.

    Raises:
      ValueError: no or NaN scores; unknown area or class.
    """
    _check_word("area", area, ("steps", "trapezoids"))
    hits, false = _counts(id_scores, ood_scores, positive)
    precision, recall = hits / (hits + false), hits / hits[-1]
    steps = np.diff(recall, prepend=0.0)
    if area == "steps":
        return float(np.sum(steps * precision))
    before = np.concatenate([[1.0], precision[:-1]])
    return float(np.sum(steps * (precision + before) / 2))


def swept(id_scores: Any, ood_scores: Any) -> Swept:
    """The metrics of ODIN's code, which sweeps the threshold over all scores.

    The FPR is the share of OOD scores strictly above the ID score of rank
    round(n / 20); the areas are trapezoids of curves that start at precision 1/2.

    Raises:
      ValueError: no or NaN scores.
    """
    ids, oods = map(np.sort, _checked(id_scores, ood_scores))
    n, m = len(ids), len(oods)
    every = np.sort(np.concatenate([ids, oods]))
    # Inputs of each kind that are left above the k lowest scores, ties removed together.
    left = np.concatenate([[n], n - np.searchsorted(ids, every, "right")])
    false = np.concatenate([[m], m - np.searchsorted(oods, every, "right")])
    recall, fpr = left / n, false / m
    error = (n - left + false) / (n + m)
    ends = np.concatenate([[1.0], recall, [0.0]]), np.concatenate([[1.0], fpr, [0.0]])

    def area(y, x):
        return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))

    total, rest = left + false, (n - left) + (m - false)
    inside = np.concatenate([[0.5], left / np.where(total == 0, -1, total), [0.0]])
    outside = np.concatenate(
        [[0.0], (m - false) / np.where(rest == 0, -1, rest), [0.5]]
    )
    in_kept = np.concatenate([[True], total > 0, [True]])
    out_kept = np.concatenate([[True], rest > 0, [True]])
    threshold = ids[min(round(0.05 * n), n - 1)]
    return Swept(
        fpr=float(np.mean(oods > threshold)),
        detection_error=float(error.min()),
        auroc=-area(1 - ends[1], ends[0]),
        aupr_in=-area(inside[in_kept], ends[0][in_kept]),
        aupr_out=area(outside[out_kept], (1 - ends[1])[out_kept]),
    )


def fit_threshold(
    id_scores: Any, tpr: float = 0.95, score: str = "energy"
) -> Threshold:
    """The largest threshold that a share of the ID scores reaches.

    Args:
      id_scores: of held-out ID inputs.
      tpr: the share that shall be accepted, at least.
      score: name of the score, kept with it.

    Raises:
      ValueError: no or NaN scores, ``tpr`` outside (0, 1].

    Example:
      >>> fit_threshold([1.0, 2.0, 3.0, 4.0], 0.75)
      Threshold(value=2.0, tpr=0.75, score='energy')
    """
    check_recall(tpr)
    ids = np.sort(_scores("id_scores", id_scores))[::-1]
    value = ids[int(np.ceil(tpr * len(ids) - 1e-9)) - 1]
    return Threshold(float(value), float(np.mean(ids >= value)), score)


def check_recall(tpr: float) -> None:
    """Raises ValueError for a recall outside (0, 1]."""
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must be in (0, 1], got {tpr}")


def _check_word(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def _scores(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64).reshape(-1)
    if not len(values):
        raise ValueError(f"{name} are empty: a metric needs scores of both sets")
    if count := int(np.isnan(values).sum()):
        raise ValueError(f"{name}: {count} of {len(values)} are NaN")
    return values


def _checked(id_scores: Any, ood_scores: Any) -> tuple[np.ndarray, np.ndarray]:
    return _scores("id_scores", id_scores), _scores("ood_scores", ood_scores)


def _counts(id_scores: Any, ood_scores: Any, positive: str) -> tuple[Any, Any]:
    """Positives and negatives at or beyond each threshold, from the strictest."""
    _check_word("positive", positive, ("id", "ood"))
    ids, oods = _checked(id_scores, ood_scores)
    yes, no = (ids, oods) if positive == "id" else (-oods, -ids)
    thresholds = np.unique(np.concatenate([yes, no]))[::-1]
    yes, no = np.sort(yes), np.sort(no)
    hits = len(yes) - np.searchsorted(yes, thresholds, "left")
    false = len(no) - np.searchsorted(no, thresholds, "left")
    return hits, false


def _corners(hits: np.ndarray, false: np.ndarray) -> np.ndarray:
    """Indices of the ends, and of points where the ROC curve turns."""
    if len(hits) < 3:
        return np.arange(len(hits))
    turns = (np.diff(hits, 2) != 0) | (np.diff(false, 2) != 0)
    return np.flatnonzero(np.concatenate([[True], turns, [True]]))
