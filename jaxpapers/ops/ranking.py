r"""Ranking and calibration metrics, on the host in float64.

Ties are exact: a pair of equal scores counts one half. Everything is sorting and segment
sums, without loops over users or queries.

All metrics of rows take ``label`` (N,), 0 or 1; ``score`` or ``logit`` (N,); ``weight``
(N,), not negative, None for 1. They raise ValueError for arrays of different shapes.
"""

import numpy as np
from numpy.typing import ArrayLike


def auc(label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None) -> float:
    r"""Area under the ROC curve.

    $$ \mathrm{AUC} = \frac{\sum_{i: y_i=1} \sum_{j: y_j=0} w_i w_j
       ([s_i > s_j] + \tfrac12 [s_i = s_j])}{\sum_i w_i \sum_j w_j} $$

    Args:
      label: 0 or 1 per row.
      score: any increasing function of the probability.
      weight: per row, not negative; None: all 1.

    Raises:
      ValueError: rows of one class only.

    Example:
      >>> auc([1, 0, 1, 0], [0.9, 0.9, 0.4, 0.1])
      0.625
    """
    y, s, w = _rows(label, score, weight)
    value, _, defined = _grouped_auc(np.zeros(len(y), np.int64), y, s, w)
    if not defined.any():
        raise ValueError(
            f"AUC needs rows of both classes, got {y.mean() if len(y) else 0:.0%} "
            f"positives of {len(y)}; evaluate on more rows"
        )
    return float(value[0])


def gauc(
    user: ArrayLike, label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None
) -> float:
    r"""AUC within each user, averaged by impressions (Zhu et al. 2017, arXiv 1703.02091).

    $$ \mathrm{GAUC} = \sum_u n_u \mathrm{AUC}_u / \sum_u n_u $$

    Users with rows of one class only have no AUC and are skipped.

    Args:
      user: sortable id per row, in any order.
      label: 0 or 1 per row.
      score: per row.
      weight: of a row in its user's AUC and in n_u; None: all 1.

    Raises:
      ValueError: no user with both classes.

    Example:
      >>> gauc([7, 7, 3, 3, 5], [1, 0, 1, 0, 1], [2.0, 1.0, 0.0, 0.0, 9.0])
      0.75
    """
    y, s, w = _rows(label, score, weight)
    user = np.asarray(user)
    if user.shape != y.shape:
        raise ValueError(f"user must have the shape of label, {y.shape}: {user.shape}")
    value, size, defined = _grouped_auc(user, y, s, w)
    if not defined.any():
        raise ValueError("GAUC needs a user with rows of both classes; got none")
    return float((value[defined] * size[defined]).sum() / size[defined].sum())


def pr_auc(
    label: ArrayLike, score: ArrayLike, weight: ArrayLike | None = None
) -> float:
    """Area under the precision-recall curve by trapezoids, as delayed-feedback papers.

    One point per distinct score, and precision 1 at recall 0. Average precision is the
    step-wise sum instead.

    Args:
      label, score, weight: see the module.

    Raises:
      ValueError: no positive row.
    """
    y, s, w = _rows(label, score, weight)
    order = np.argsort(-s, kind="stable")
    y, s, w = y[order], s[order], w[order]
    last = np.append(s[1:] != s[:-1], True)
    hits, shown = np.cumsum(w * y)[last], np.cumsum(w)[last]
    if not len(hits) or hits[-1] == 0:
        raise ValueError(f"PR-AUC needs a positive row, got none of {len(y)}")
    keep = shown > 0
    precision = np.append(1.0, hits[keep] / shown[keep])
    recall = np.append(0.0, hits[keep] / hits[-1])
    return float((np.diff(recall) * (precision[1:] + precision[:-1])).sum() / 2)


def log_loss(
    label: ArrayLike, logit: ArrayLike, weight: ArrayLike | None = None
) -> float:
    r"""Mean of $-y \log p - (1-y) \log(1-p)$ for $p = 1/(1+e^{-z})$, in nats.

    Args:
      label: in [0, 1] per row.
      logit: z per row.
      weight: per row; None: all 1.

    Example:
      >>> round(log_loss([1, 0], [0.0, 0.0]), 6)
      0.693147
    """
    y, z, w = _rows(label, logit, weight)
    nats = np.logaddexp(0.0, -z) * y + np.logaddexp(0.0, z) * (1 - y)
    return float((w * nats).sum() / w.sum())


def normalized_entropy(
    label: ArrayLike, logit: ArrayLike, weight: ArrayLike | None = None
) -> float:
    """Log-loss over the entropy of the base rate (He et al. 2014); 1: no information.

    Args:
      label, logit, weight: see the module.

    Raises:
      ValueError: rows of one class only.
    """
    y, _, w = _rows(label, logit, weight)
    rate = (w * y).sum() / w.sum()
    if not 0 < rate < 1:
        raise ValueError(f"the entropy needs both classes, got a base rate of {rate}")
    entropy = -rate * np.log(rate) - (1 - rate) * np.log1p(-rate)
    return log_loss(label, logit, weight) / float(entropy)


def information_gain(
    label: ArrayLike, logit: ArrayLike, weight: ArrayLike | None = None
) -> float:
    """Relative information gain, 1 - ``normalized_entropy``."""
    return 1.0 - normalized_entropy(label, logit, weight)


def rela_impr(value: float, base: float, chance: float = 0.5) -> float:
    """Relative improvement over a base model, measured from chance (DIN, section 6.2).

    Args:
      value: AUC or GAUC of the model.
      base: AUC or GAUC of the base model.
      chance: of random scores.

    Raises:
      ValueError: a base at chance, where the ratio is undefined.

    Example:
      >>> f"{rela_impr(0.8871, 0.8624):.2%}"
      '6.82%'
    """
    if base == chance:
        raise ValueError(
            f"RelaImpr is not defined for a base of {base}, which is chance"
        )
    return (value - chance) / (base - chance) - 1


def recall_at_k(score: ArrayLike, relevant: ArrayLike, k: int) -> float:
    """Fraction of a query's relevant items in its top k, mean over queries.

    With ties, the expectation over all their orders.

    Args:
      score: (queries, items); -inf for items that are no candidates.
      relevant: (queries, items), nonzero where relevant. Queries without any are skipped.
      k: cutoff.

    Raises:
      ValueError: shapes that differ, k below 1, or no relevant item.

    Example:
      >>> recall_at_k([[3.0, 2.0, 1.0]], [[1, 0, 1]], 2)
      0.5
    """
    score, gain = _queries(score, np.asarray(relevant) != 0, k)
    place = _expected(score, k, np.ones(score.shape[1]))
    return float(((place * gain).sum(1) / gain.sum(1)).mean())


def ndcg_at_k(score: ArrayLike, gain: ArrayLike, k: int) -> float:
    r"""Normalised discounted cumulative gain of the top k, mean over queries.

    $$ \mathrm{DCG} = \sum_{r=1}^{k} g_{(r)} / \log_2(r+1) $$

    With ties, the expectation over all their orders.

    Args:
      score: (queries, items).
      gain: (queries, items), not negative. Queries without any are skipped.
      k: cutoff.

    Raises:
      ValueError: shapes that differ, k below 1, or no gain.

    Example:
      >>> round(ndcg_at_k([[1.0, 2.0]], [[1.0, 0.0]], 2), 6)
      0.63093
    """
    score, gain = _queries(score, gain, k)
    discount = 1 / np.log2(np.arange(score.shape[1]) + 2.0)
    dcg = (_expected(score, k, discount) * gain).sum(1)
    ideal = (-np.sort(-gain, axis=1) * discount)[:, :k].sum(1)
    return float((dcg / ideal).mean())


def _rows(label, score, weight):
    """Label, score and weight as checked float64 vectors."""
    y, s = np.asarray(label, np.float64), np.asarray(score, np.float64)
    w = np.ones(y.shape) if weight is None else np.asarray(weight, np.float64)
    if y.ndim != 1 or s.shape != y.shape or w.shape != y.shape:
        raise ValueError(
            "label, score and weight must be vectors of one length, got shapes "
            f"{y.shape}, {s.shape} and {w.shape}; flatten them"
        )
    if np.isnan(s).any() or np.isnan(y).any():
        raise ValueError("label and score must not be NaN: they have no order")
    if (w < 0).any() or not w.sum() > 0:
        raise ValueError("weights must not be negative, and not all be 0")
    return y, s, w


def _grouped_auc(group, y, s, w):
    """AUC, weight, and whether both classes occur, of each group in the order of ids."""
    if not np.isin(y, (0.0, 1.0)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(y)[:5]}")
    # Two stable sorts: by score, then by group.
    order = np.argsort(s, kind="stable")
    order = order[np.argsort(group[order], kind="stable")]
    group, y, s, w = group[order], y[order], s[order], w[order]
    new_group = np.append(True, group[1:] != group[:-1])
    new_score = new_group | np.append(True, s[1:] != s[:-1])
    starts, ties = np.flatnonzero(new_group), np.flatnonzero(new_score)
    # Per run of equal scores, then from runs to groups.
    positive = np.add.reduceat(w * y, ties)
    negative = np.add.reduceat(w * (1 - y), ties)
    first = np.searchsorted(ties, starts)
    below = np.cumsum(negative) - negative
    of_run = np.repeat(np.arange(len(starts)), np.diff(np.append(first, len(ties))))
    below = below - below[first][of_run]
    pairs = np.add.reduceat(positive * (below + negative / 2), first)
    all_positive = np.add.reduceat(positive, first)
    all_negative = np.add.reduceat(negative, first)
    defined = (all_positive > 0) & (all_negative > 0)
    value = pairs / np.where(defined, all_positive * all_negative, 1.0)
    return value, all_positive + all_negative, defined


def _queries(score, gain, k):
    """Checked float64 matrices of the queries with a relevant item."""
    score, gain = np.asarray(score, np.float64), np.asarray(gain, np.float64)
    if score.ndim != 2 or gain.shape != score.shape:
        raise ValueError(
            "scores and gains must be matrices (queries, items) of one shape, got "
            f"{score.shape} and {gain.shape}"
        )
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    if np.isnan(score).any() or (gain < 0).any():
        raise ValueError("scores must not be NaN, and gains not negative")
    some = gain.sum(1) > 0
    if not some.any():
        raise ValueError("no query has a relevant item")
    return score[some], gain[some]


def _expected(score, k, discount):
    """Expected discount of each item over all orders of ties, 0 beyond rank k.

    McSherry and Najork, "Computing information retrieval performance measures
    efficiently in the presence of tied scores", 2008.
    """
    rows, n = score.shape
    order = np.argsort(-score, axis=1, kind="stable")
    ranked = np.take_along_axis(score, order, 1)
    new = np.ones((rows, n), bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    place = np.arange(n)
    start = np.maximum.accumulate(np.where(new, place, 0), axis=1)
    last = np.ones((rows, n), bool)
    last[:, :-1] = new[:, 1:]
    end = np.where(last, place + 1, n)
    end = np.minimum.accumulate(end[:, ::-1], axis=1)[:, ::-1]
    total = np.append(0.0, np.cumsum(discount[:k]))
    k = min(k, n)
    mean = (total[np.minimum(end, k)] - total[np.minimum(start, k)]) / (end - start)
    result = np.empty((rows, n))
    np.put_along_axis(result, order, mean, 1)
    return result
