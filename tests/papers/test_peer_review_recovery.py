"""Peer review on 2,000 generated papers: what estimates, parser and rules recover."""

import numpy as np
import pytest

from jaxpapers.ops import hypothesis
from jaxpapers.papers import peer_review as pr
from jaxpapers.papers.peer_review import models, rules
from jaxpapers.tasks.reviews import is_recovered

LETTERS = 400  # Of each layout.


@pytest.fixture(scope="module")
def world():
    return pr.simulate(pr.Options())


@pytest.mark.slow
def test_estimates_are_unbiased_and_intervals_cover(world):
    """Every coefficient of 200 replications; shares, too, of ten times as many.

    Of 200 replications a share of .95 has an error of .015, so that one cell in twenty
    is outside the limits by chance: there the mean over the five regressors is judged.
    """
    few = models.coverage(world, pr.Options(), 200)
    many = models.coverage(world, pr.Options(), 2000)
    assert list(few.covered) == ["OLS, CRV1", "OLS, HC1", "PPML, CRV1"]
    for model in few.covered:
        assert np.abs(few.bias_in_errors(model)).max() < 2, model
        assert 0.92 <= few.covered[model].mean() <= 0.98, model
        covered = many.covered[model]
        assert 0.92 <= covered.min() and covered.max() <= 0.98, model
        assert 0.03 <= many.rejected[model][-1] <= 0.07, model


@pytest.mark.slow
def test_attenuation_is_the_reliability(world):
    for noise in (0.3, 0.6, 1.0):
        made = models.attenuation(world, pr.Options(), noise)
        reliability, ratio, corrected = made
        assert reliability == pytest.approx(1 / (1 + noise**2), rel=0.1)
        assert ratio == pytest.approx(reliability, rel=0.1)
        assert corrected == pytest.approx(1, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", pr.LAYOUTS)
def test_letters_and_strengths_are_recovered(world, layout):
    """Rounds, reviewers, points and answers; the rules beat the length of a point."""
    exact, got, length, true = 0, [], [], []
    for paper in range(LETTERS):
        letter = pr.render(world, paper, layout)
        file = pr.parse_review_file(letter.text)
        if not is_recovered(letter, file):
            continue
        exact += 1
        points = sorted(pr.rule_extract(file), key=lambda o: o.span)
        got += [rules.levels(o.quote)["strength"] for o in points]
        length += [len(o.quote.split()) for o in points]
        true += world.opinions.scores[letter.rows, 0].tolist()
    assert exact >= (0.98 if layout == "pages" else 1) * LETTERS
    strength = hypothesis.spearman(got, true).statistic
    assert strength >= 0.5
    assert strength > hypothesis.spearman(length, true).statistic
