"""Ranking metrics against sklearn's recorded numbers and against double loops."""

import inspect
import itertools
import sys

import numpy as np
import pytest

from jaxpapers.ops import ranking


@pytest.mark.parity(
    "ctr", only=lambda entry: "gauc_impression_weighted" in entry["arrays"]
)
def test_recorded_numbers(case):
    data, tolerance = case.arrays, case.tolerance("float64")
    y, s = data["y"], data["score"]
    metrics = {
        "auc": ranking.auc(y, s),
        "gauc_impression_weighted": ranking.gauc(data["user"], y, s),
        "pr_auc_trapezoid": ranking.pr_auc(y, s),
        "nll": ranking.log_loss(y, s),
        "rela_impr": ranking.rela_impr(0.8871, 0.8624),
    }
    for name, value in metrics.items():
        assert abs(value - data[name]) < tolerance, name
    # Ties are what the case is about.
    assert len(np.unique(s)) < len(s)


def double_loop(y, s, w):
    """AUC by all pairs; None where one class is missing."""
    pairs = [
        (w[i] * w[j], (s[i] > s[j]) + 0.5 * (s[i] == s[j]))
        for i in range(len(y))
        for j in range(len(y))
        if y[i] == 1 and y[j] == 0
    ]
    total = sum(p for p, _ in pairs)
    return sum(p * v for p, v in pairs) / total if total else None


def drawn(seed, n=80):
    rng = np.random.default_rng(seed)
    user = rng.choice([-3, 5, 11, 40, 41, 1000], n)
    y = (rng.random(n) < 0.5).astype(int)
    y[user == 40] = 1
    y[user == 41] = 0
    return user, y, rng.integers(0, 6, n) / 3, rng.integers(0, 4, n) / 2


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_auc_and_gauc_are_the_double_loops(seed, weighted):
    user, y, s, w = drawn(seed)
    w = w if weighted else np.ones(len(y))
    given = w if weighted else None
    assert ranking.auc(y, s, given) == pytest.approx(double_loop(y, s, w), abs=1e-12)
    total = size = 0.0
    for u in np.unique(user):
        rows = user == u
        value = double_loop(y[rows], s[rows], w[rows])
        if value is not None:
            total += value * w[rows].sum()
            size += w[rows].sum()
    assert ranking.gauc(user, y, s, given) == pytest.approx(total / size, abs=1e-12)


def test_a_weight_is_a_number_of_copies():
    user, y, s, _ = drawn(7, 40)
    copies = np.random.default_rng(0).integers(0, 4, 40)
    repeated = [np.repeat(x, copies) for x in (user, y, s)]
    for metric in (ranking.auc, ranking.pr_auc, ranking.log_loss):
        value = metric(y, s, copies)
        assert value == pytest.approx(metric(*repeated[1:]), abs=1e-12)
    value = ranking.gauc(user, y, s, copies)
    assert value == pytest.approx(ranking.gauc(*repeated), abs=1e-12)


def test_only_the_order_within_a_user_matters():
    user, y, s, _ = drawn(3)
    shift = np.random.default_rng(1).integers(0, 9, 2000)[user]
    value = ranking.gauc(user, y, s)
    assert ranking.gauc(user, y, np.exp(s) + 50 * shift) == pytest.approx(value)
    assert ranking.gauc(user, y, -s) == pytest.approx(1 - value)
    assert ranking.gauc(user, y, 0 * s) == pytest.approx(0.5)


def test_normalised_forms():
    rng = np.random.default_rng(0)
    y = (rng.random(200) < 0.2).astype(int)
    base = np.full(200, np.log(y.mean() / (1 - y.mean())))
    assert ranking.normalized_entropy(y, base) == pytest.approx(1.0, abs=1e-12)
    assert ranking.information_gain(y, base) == pytest.approx(0.0, abs=1e-12)
    sure = np.where(y == 1, 30.0, -30.0)
    assert ranking.information_gain(y, sure) == pytest.approx(1.0, abs=1e-9)


def orders(score):
    """All orders of a row's items that sort its scores downwards."""
    for order in itertools.permutations(range(len(score))):
        if all(score[a] >= score[b] for a, b in zip(order, order[1:])):
            yield order


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_recall_and_ndcg_are_means_over_the_orders_of_ties(k):
    rng = np.random.default_rng(k)
    score = rng.integers(0, 3, (5, 5)).astype(float)
    gain = rng.integers(0, 3, (5, 5)).astype(float)
    gain[2] = 0
    recalls, ndcgs = [], []
    for s, g in zip(score, gain):
        if not g.any():
            continue
        dcg = [sum(x / np.log2(r + 2) for r, x in enumerate(v[:k])) for v in
               ([*(g[i] for i in order)] for order in orders(s))]  # fmt: skip
        ideal = sum(x / np.log2(r + 2) for r, x in enumerate(sorted(g)[::-1][:k]))
        hits = [sum(g[i] > 0 for i in order[:k]) for order in orders(s)]
        recalls.append(np.mean(hits) / (g > 0).sum())
        ndcgs.append(np.mean(dcg) / ideal)
    assert ranking.recall_at_k(score, gain, k) == pytest.approx(np.mean(recalls))
    assert ranking.ndcg_at_k(score, gain, k) == pytest.approx(np.mean(ndcgs))


def test_gauc_has_no_loop_over_users():
    """The interpreter does the same for 20,000 users as for 200; the loop agrees."""
    rng = np.random.default_rng(0)
    user, y = rng.integers(0, 20_000, 200_000), rng.integers(0, 2, 200_000)
    s = rng.normal(size=len(y)).round(2)
    few = user < 200

    def events(*args):
        count = [0]
        sys.setprofile(lambda *_: count.__setitem__(0, count[0] + 1))
        try:
            ranking.gauc(*args)
        finally:
            sys.setprofile(None)
        return count[0]

    ranking.gauc(user[few], y[few], s[few])  # Imports and caches.
    assert events(user, y, s) == events(user[few], y[few], s[few]) < 4000

    user, y, s = user[few], y[few], s[few]
    order = np.argsort(user, kind="stable")
    total = size = 0.0
    for rows in np.split(order, np.flatnonzero(np.diff(user[order])) + 1):
        if 0 < y[rows].sum() < len(rows):
            total += ranking.auc(y[rows], s[rows]) * len(rows)
            size += len(rows)
    assert ranking.gauc(user, y, s) == pytest.approx(total / size)


def test_certain_predictions():
    inf = np.inf
    assert ranking.log_loss([1, 0, 1], [inf, -inf, 40.0]) == pytest.approx(0, abs=1e-17)
    assert ranking.log_loss([1, 0], [-inf, 0.0]) == inf
    # Of no weight, it costs nothing.
    value = ranking.log_loss([1, 0], [-inf, 0.0], [0, 3])
    assert value == pytest.approx(np.log(2))
    assert ranking.auc([1, 0, 0], [inf, 1.0, -inf]) == 1


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_scale_of_weights_and_gains(scale):
    user, y, s, w = drawn(1)
    for metric in (ranking.auc, ranking.pr_auc, ranking.log_loss):
        assert metric(y, s, scale * w) == pytest.approx(metric(y, s, w), rel=1e-12)
    gain = scale * np.array([[1.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    score = np.array([[1.0, 2.0, 3.0]] * 2)
    expected = (3 + 1 / np.log2(4)) / (3 + 1 / np.log2(3))
    assert ranking.ndcg_at_k(score, gain, 3) == pytest.approx(expected, rel=1e-12)
    assert ranking.recall_at_k(score, gain, 1) == 0.5


def test_items_that_are_no_candidates_are_not_found():
    score, relevant = [[1.0, -np.inf, -np.inf]], [[1, 1, 0]]
    assert ranking.recall_at_k(score, relevant, 3) == 0.5
    best = 1 + 1 / np.log2(3)
    assert ranking.ndcg_at_k(score, relevant, 3) == pytest.approx(1 / best)


ROWS = {
    "auc": ranking.auc,
    "gauc": lambda *rows: ranking.gauc([1, 1, 2, 2], *rows),
    "pr_auc": ranking.pr_auc,
    "log_loss": ranking.log_loss,
    "normalized_entropy": ranking.normalized_entropy,
    "information_gain": ranking.information_gain,
}


@pytest.mark.parametrize("name", ROWS)
def test_every_metric_of_rows_checks_labels_scores_and_weights(name):
    y, s, nan = [1, 0, 1, 0], [0.3, 0.2, 0.1, 0.4], np.nan
    assert np.isfinite(ROWS[name](y, s))
    for label, score, weight, message in [
        ([5, 0, 1, 0], s, None, r"labels must be .*got \[5.0\] at \[0\]"),
        ([-1, 1, 1, -1], s, None, "labels must be .* 2 in all"),
        ([1, 0, nan, 0], s, None, "labels must be"),
        ([1, 0, None, 0], s, None, "labels must be"),
        ([1, 0, np.inf, 0], s, None, "labels must be"),
        (["a", "b", "a", "b"], s, None, "label must hold numbers"),
        (y, [0.3, 0.2, nan, 0.4], None, r"not NaN, got \[nan\] at \[2\]"),
        (y, [1j, 0, 0, 0], None, "score must hold numbers"),
        (y, s, [1, 1, -1, 1], "weights must be finite and not negative"),
        (y, s, [1, 1, nan, 1], "weights must be finite"),
        (y, s, [1, 1, np.inf, 1], "weights must be finite"),
        (y, s, [0, 0, 0, 0], "all weights are 0"),
        (y, s, [1, 1, 1], "one length"),
        (y, s[:3], None, "one length"),
    ]:
        with pytest.raises(ValueError, match=message):
            ROWS[name](label, score, weight)
    if name != "gauc":
        with pytest.raises(ValueError, match="no rows"):
            ROWS[name]([], [])


@pytest.mark.parametrize("metric", [ranking.recall_at_k, ranking.ndcg_at_k])
def test_every_metric_of_queries_checks_scores_gains_and_k(metric):
    s, g, nan = [[1.0, 2.0], [0.5, 0.1]], [[1.0, 0.0], [0.0, 1.0]], np.nan
    for score, gain, k, message in [
        ([[1.0, nan], [0, 0]], g, 1, r"not NaN, got \[nan\] at \[\(0, 1\)\]"),
        (s, [[nan, 0], [0, 1]], 1, "finite and not negative"),
        (s, [[np.inf, 0], [0, 1]], 1, "finite and not negative"),
        (s, [[1, -1], [0, 1]], 1, "finite and not negative"),
        (s, [["a", "b"], ["a", "b"]], 1, "must hold numbers"),
        (s, [[1.0, 0.0]], 1, "one shape"),
        (s, [[0, 0], [0, 0]], 1, "no query has"),
        (s, g, 0, "k must be >= 1"),
        (s, g, 1.5, "whole number"),
        (s, g, nan, "whole number"),
    ]:
        with pytest.raises(ValueError, match=message):
            # Without the tests' own check of the annotations.
            inspect.unwrap(metric)(score, gain, k)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ranking.auc([1, 1], [0.1, 0.2]), "both classes"),
        (lambda: ranking.auc([1, 2], [0.1, 0.2]), "0 or 1"),
        (lambda: ranking.auc([1, 0], [0.1]), "one length"),
        (lambda: ranking.auc([1, 0], [0.1, np.nan]), "NaN"),
        (lambda: ranking.auc([1, 0], [0.1, 0.2], [-1, 1]), "negative"),
        (lambda: ranking.gauc([0, 1], [1, 0], [0.1, 0.2]), "both classes"),
        (lambda: ranking.gauc([0], [1, 0], [0.1, 0.2]), "shape of label"),
        (lambda: ranking.pr_auc([0, 0], [0.1, 0.2]), "positive"),
        (lambda: ranking.normalized_entropy([1, 1], [0.1, 0.2]), "both classes"),
        (lambda: ranking.gauc([0, None], [1, 0], [0.1, 0.2]), "sortable"),
        (lambda: ranking.gauc([0, np.nan], [1, 0], [0.1, 0.2]), "users must be ids"),
        (
            lambda: ranking.gauc(np.array(["NaT", 1], "M8[s]"), [1, 0], [0.1, 0.2]),
            "users must be ids",
        ),
        (
            lambda: ranking.auc(np.ma.array([1, 0], mask=[1, 0]), [0.1, 0.2]),
            "label has masked values",
        ),
        (
            lambda: ranking.auc([[1], [1, 0]], [0.1, 0.2]),
            "label must hold numbers, got ",
        ),
        (lambda: ranking.rela_impr(0.7, 0.5), "not above chance"),
        (lambda: ranking.rela_impr(0.7, 0.4), "not above chance"),
        (lambda: ranking.rela_impr(88.71, 86.24), "per cent"),
        (lambda: ranking.rela_impr(np.nan, 0.6), r"value must be in \[0, 1\]"),
        (lambda: ranking.recall_at_k([[1.0]], [[0]], 1), "relevant"),
        (lambda: ranking.recall_at_k([[1.0]], [[1]], 0), "k must be"),
        (lambda: ranking.ndcg_at_k([1.0], [1], 1), "matrices"),
        (lambda: ranking.ndcg_at_k([[1.0]], [[-1]], 1), "negative"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
