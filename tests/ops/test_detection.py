"""Metrics of detection: recorded numbers of four codes, identities, bad scores."""

import numpy as np
import pytest
from scipy import stats

from jaxpapers.ops import detection


def is_metrics(entry):
    return {"id_score", "ood_score", "oe_fpr95", "openood", "cal"} <= set(
        entry["arrays"]
    )


@pytest.mark.parity("ood_dg", only=is_metrics)
def test_recorded_metrics(case):
    a = case.arrays
    tol = case.tolerance("float64", otherwise=1e-12)
    ids, oods = a["id_score"], a["ood_score"]
    poem = detection.measures(ids, oods, "poem")
    oe = detection.measures(ids, oods, "oe")
    openood = detection.measures(ids, oods, "openood")
    inside = detection.aupr(ids, oods, "id", "trapezoids")
    swept = detection.swept(ids, oods)
    got = {
        "fpr95": poem.fpr, "auroc": poem.auroc, "aupr": poem.aupr,
        "oe_fpr95": oe.fpr, "oe_auroc": oe.auroc, "oe_aupr": oe.aupr,
        "openood": (openood.auroc, inside, openood.aupr, openood.fpr),
        "cal": swept,
    }  # fmt: skip
    for name, value in got.items():
        np.testing.assert_allclose(value, a[name], atol=tol, err_msg=name)


@pytest.fixture(params=[False, True], ids=["distinct", "ties"])
def scores(request):
    rng = np.random.default_rng(0)
    ids, oods = rng.normal(1, 1, 80), rng.normal(0, 1, 50)
    return [np.round(x, 1) if request.param else x for x in (ids, oods)]


def test_identities(scores):
    ids, oods = scores
    value = detection.auroc(ids, oods)
    u = stats.mannwhitneyu(ids, oods).statistic
    assert value == pytest.approx(u / len(ids) / len(oods), abs=1e-12)
    assert detection.auroc(oods, ids) == pytest.approx(1 - value, abs=1e-12)
    for convention in detection.CONVENTIONS:
        plain = detection.measures(ids, oods, convention)
        moved = detection.measures(np.exp(ids), np.exp(oods), convention)
        np.testing.assert_allclose(plain, moved, atol=1e-12)
        perfect = detection.measures(ids + 100, oods, convention)
        np.testing.assert_allclose(perfect, (0, 1, 1), atol=1e-12)
        equal = detection.measures(np.zeros(7), np.zeros(3), convention)
        assert equal.fpr == 1 and equal.auroc == 0.5
    everything = detection.fpr_at_tpr(ids, oods, 1.0)
    assert everything == np.mean(oods >= ids.min())
    first = detection.fpr_at_tpr(ids, oods, 0.95, "id", "first")
    level = np.sort(ids)[::-1][int(np.ceil(0.95 * len(ids))) - 1]
    assert first >= np.mean(oods > level) - 1e-12


def test_threshold():
    ids = np.arange(100.0)
    fitted = detection.fit_threshold(ids, 0.95)
    assert fitted.value == 5 and fitted.tpr == 0.95
    assert fitted.accepts([4.9, 5.0, 6.0]).tolist() == [False, True, True]
    # Ties at the threshold: more are accepted, never fewer.
    tied = detection.fit_threshold([1.0, 1.0, 1.0, 2.0], 0.5)
    assert tied.value == 1 and tied.tpr == 1


@pytest.mark.parametrize(
    "ids, oods, tpr, words",
    [
        ([], [1.0], 0.95, "id_scores are empty"),
        ([1.0], [], 0.95, "ood_scores are empty"),
        ([1.0, np.nan, np.nan], [1.0], 0.95, "2 of 3 are NaN"),
        ([1.0], [0.0], 0.0, r"tpr must be in \(0, 1\], got 0"),
        ([1.0], [0.0], 1.1, "got 1.1"),
    ],
)
def test_refuses(ids, oods, tpr, words):
    with pytest.raises(ValueError, match=words):
        detection.measures(ids, oods, tpr=tpr)
    if "ood" not in words:
        with pytest.raises(ValueError, match=words):
            detection.fit_threshold(ids, tpr)


def test_refuses_words():
    for call in (
        lambda: detection.measures([1.0], [0.0], "paper"),
        lambda: detection.fpr_at_tpr([1.0], [0.0], positive="in"),
        lambda: detection.fpr_at_tpr([1.0], [0.0], rule="last"),
        lambda: detection.aupr([1.0], [0.0], area="sum"),
    ):
        with pytest.raises(ValueError, match="must be one of"):
            call()
