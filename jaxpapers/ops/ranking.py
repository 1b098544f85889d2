r"""Ranking and calibration metrics, on the host in float64.

Ties are exact: a pair of equal scores counts one half. Everything is sorting and segment
sums, without loops over users or queries.

All metrics of rows take ``label`` (N,), 0 or 1; ``score`` or ``logit`` (N,), infinities
included; ``weight`` (N,), finite and not negative, None for 1. They raise ValueError for
arrays of different shapes, no rows, values that are no numbers, NaN, and labels and
weights out of their range, with the rows.
"""

import operator

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
      user: sortable id per row, in any order; no NaN.
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
    user = _users(user, y.shape)
    value, size, defined = _grouped_auc(user, y, s, w)
    if not defined.any():
        raise ValueError("GAUC needs a user with rows of both classes; got none")
    return float((value[defined] * size[defined]).sum() / size[defined].sum())


def gauc_is_defined(user: ArrayLike, label: ArrayLike) -> bool:
    """Whether a user has rows of both classes, without which ``gauc`` is refused."""
    y, s, w = _rows(label, np.zeros(np.shape(label)), None)
    return bool(_grouped_auc(_users(user, y.shape), y, s, w)[2].any())


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

    Returns:
      The mean, infinite if an infinite logit is wrong.

    Raises:
      ValueError: see the module.

    Example:
      >>> round(log_loss([1, 0], [0.0, 0.0]), 6)
      0.693147
    """
    y, z, w = _rows(label, logit, weight, soft=True)
    # 0 of an infinite logit's loss is 0: the prediction is certain and right.
    positive = np.where(y == 0, 0.0, np.logaddexp(0.0, -z))
    negative = np.where(y == 1, 0.0, np.logaddexp(0.0, z))
    nats = np.where(w == 0, 0.0, positive * y + negative * (1 - y))
    return float((w * nats).sum() / w.sum())


def normalized_entropy(
    label: ArrayLike, logit: ArrayLike, weight: ArrayLike | None = None
) -> float:
    """Log-loss over the entropy of the base rate (He et al. 2014); 1: no information.

    Args:
      label, logit, weight: see ``log_loss``.

    Raises:
      ValueError: rows of one class only.
    """
    y, _, w = _rows(label, logit, weight, soft=True)
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
      value: AUC or GAUC of the model, in [0, 1].
      base: AUC or GAUC of the base model, above chance.
      chance: of random scores.

    Raises:
      ValueError: numbers outside [0, 1]; a base at chance, where the ratio is undefined,
        or below, where an improvement would be negative.

    Example:
      >>> f"{rela_impr(0.8871, 0.8624):.2%}"
      '6.82%'
    """
    for name, number in (("value", value), ("base", base), ("chance", chance)):
        if not 0 <= number <= 1:
            raise ValueError(
                f"RelaImpr: {name} must be in [0, 1], got {number}; divide per cent by "
                "100"
            )
    if not base > chance:
        raise ValueError(
            f"RelaImpr is not defined for a base of {base}, which is not above chance, "
            f"{chance}"
        )
    return (value - chance) / (base - chance) - 1


def recall_at_k(score: ArrayLike, relevant: ArrayLike, k: int) -> float:
    """Fraction of a query's relevant items in its top k, mean over queries.

    With ties, the expectation over all their orders.

    Args:
      score: (queries, items); -inf for items that are no candidates, which no k reaches.
      relevant: (queries, items), positive where relevant. Queries without any are
        skipped.
      k: cutoff.

    Raises:
      ValueError: shapes that differ, k below 1, NaN, a relevance that is negative or
        infinite, or no relevant item.

    Example:
      >>> recall_at_k([[3.0, 2.0, 1.0]], [[1, 0, 1]], 2)
      0.5
    """
    score, gain, k = _queries(score, relevant, k, "relevant")
    gain = gain > 0
    place = _expected(score, k, np.ones(score.shape[1]))
    return float(((place * gain).sum(1) / gain.sum(1)).mean())


def ndcg_at_k(score: ArrayLike, gain: ArrayLike, k: int) -> float:
    r"""Normalised discounted cumulative gain of the top k, mean over queries.

    $$ \mathrm{DCG} = \sum_{r=1}^{k} g_{(r)} / \log_2(r+1) $$

    With ties, the expectation over all their orders.

    Args:
      score: (queries, items); -inf for items that are no candidates, which no k reaches.
      gain: (queries, items), finite and not negative. Queries without any are skipped.
      k: cutoff.

    Raises:
      ValueError: shapes that differ, k below 1, NaN, a gain that is negative or infinite,
        or no gain.

    Example:
      >>> round(ndcg_at_k([[1.0, 2.0]], [[1.0, 0.0]], 2), 6)
      0.63093
    """
    score, gain, k = _queries(score, gain, k, "gain")
    discount = 1 / np.log2(np.arange(score.shape[1]) + 2.0)
    dcg = (_expected(score, k, discount) * gain).sum(1)
    ideal = (-np.sort(-gain, axis=1) * discount)[:, :k].sum(1)
    return float((dcg / ideal).mean())


def _rows(label, score, weight, *, soft=False):
    """Label, score and weight as checked float64 vectors; soft: labels in [0, 1]."""
    y, s = _numbers("label", label), _numbers("score", score)
    w = np.ones(y.shape) if weight is None else _numbers("weight", weight)
    if y.ndim != 1 or s.shape != y.shape or w.shape != y.shape:
        raise ValueError(
            "label, score and weight must be vectors of one length, got shapes "
            f"{y.shape}, {s.shape} and {w.shape}; flatten them"
        )
    if not len(y):
        raise ValueError("label and score have no rows")
    if soft:
        _check("labels", "in [0, 1]", y, (y >= 0) & (y <= 1))
    else:
        _check("labels", "0 or 1", y, (y == 0) | (y == 1))
    _check("scores", "numbers that have an order, not NaN", s, ~np.isnan(s))
    _check("weights", "finite and not negative", w, (w >= 0) & np.isfinite(w))
    if not w.any():
        raise ValueError("all weights are 0; at least one must be positive")
    return y, s, _scaled(w)


def _numbers(name, values):
    """Numbers as float64; text and complex numbers are none."""
    if np.ma.is_masked(values):
        raise ValueError(f"{name} has masked values; leave these rows out")
    try:
        values = np.asarray(values)
    except ValueError:
        raise ValueError(
            f"{name} must hold numbers, got rows of different lengths"
        ) from None
    if values.dtype.kind not in "cSUMm":
        try:
            return values.astype(np.float64)
        except (TypeError, ValueError):
            pass
    raise ValueError(f"{name} must hold numbers, got an array of {values.dtype}")


def _check(name, expected, values, valid):
    """Raises ValueError that names what is not valid and where."""
    if valid.all():
        return
    bad = np.argwhere(~valid)
    places = [int(at[0]) if len(at) == 1 else tuple(map(int, at)) for at in bad[:5]]
    raise ValueError(
        f"{name} must be {expected}, got {values[tuple(bad[:5].T)].tolist()} at "
        f"{places}, {len(bad)} in all"
    )


def _users(user, shape):
    """Ids of the shape of the labels, which have an order."""
    user = np.asarray(user)
    if user.shape != shape:
        raise ValueError(f"user must have the shape of label, {shape}: {user.shape}")
    if user.dtype.kind in "fcmM":
        _check("users", "ids, not NaN", user, user == user)
    try:
        if user.dtype == object:
            np.sort(user)
    except TypeError:
        raise ValueError(
            "users must be ids of one sortable kind, got kinds "
            f"{sorted({type(x).__name__ for x in user.tolist()})}"
        ) from None
    return user


def _grouped_auc(group, y, s, w):
    """AUC, weight, and whether both classes occur, of each group in the order of ids."""
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


def _queries(score, gain, k, name):
    """Checked float64 matrices of the queries with a relevant item, and k."""
    score, gain = _numbers("score", score), _numbers(name, gain)
    if score.ndim != 2 or gain.shape != score.shape:
        raise ValueError(
            f"score and {name} must be matrices (queries, items) of one shape, got "
            f"{score.shape} and {gain.shape}"
        )
    try:
        k = operator.index(k)
    except TypeError:
        raise ValueError(f"k must be a whole number, got {k!r}") from None
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    _check("scores", "numbers that have an order, not NaN", score, ~np.isnan(score))
    _check(name, "finite and not negative", gain, (gain >= 0) & np.isfinite(gain))
    some = (gain > 0).any(1)
    if not some.any():
        raise ValueError("no query has a relevant item")
    return score[some], _scaled(gain[some]), k


def _scaled(values):
    """Rows over a power of two near their maxima: sums and products stay finite.

    Ratios of sums keep their bits.
    """
    return np.ldexp(values, -np.frexp(values.max(-1, keepdims=True))[1])


def _expected(score, k, discount):
    """Expected discount of each item over all orders of ties, 0 beyond rank k.

    Also 0 of scores of -inf, which are no candidates.

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
    return np.where(np.isneginf(score), 0.0, result)
