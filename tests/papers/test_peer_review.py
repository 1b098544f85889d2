"""Peer review: measures by hand, generated letters and models with known truth."""

import jax
import numpy as np
import pytest

from jaxpapers.ops import agreement, hypothesis
from jaxpapers.papers import peer_review as pr
from jaxpapers.papers.peer_review import measuring, models, rules
from jaxpapers.tasks.reviews import is_recovered
from tests.contract import grid

SMALL = pr.Options(papers=150, fields=3, years=2)


@pytest.fixture(scope="module")
def world():
    return pr.simulate(SMALL)


def opinion(**fields):
    given = dict(
        id="1", round=1, reviewer=1, quote="q", summary="s", opinion_type="methodology",
        target="core", polarity="criticism", strength=0.5, constructiveness=0.5,
        quality=0.5, revision_cost=0.5, response_type="agree_and_revise",
    )  # fmt: skip
    return pr.Opinion(**{**given, **fields})


def test_measures_by_hand():
    first = [
        opinion(strength=1.0, revision_cost=0.25),
        opinion(strength=0.5, target="peripheral", response_type="rebut"),
        opinion(strength=0.25, polarity="praise", response_type="no_response"),
        opinion(reviewer=2, strength=0.5, opinion_type="literature",
                response_type="agree_partial"),
        opinion(reviewer=2, round=2, strength=0.5, response_type="no_response"),
    ]  # fmt: skip
    alone = [opinion(reviewer=1, strength=0.75, resolved_round=2)]
    made = pr.measures(pr.opinions([first, alone, []]), 3, 2, 3)
    assert made["pressure"].tolist() == [2.5, 0.75, 0.0]
    np.testing.assert_allclose(made["share"][0], [0.8, 0.2])
    np.testing.assert_allclose(made["share"][:2].sum(1), 1)
    np.testing.assert_allclose(made["core_share"][:2], [2.0 / 2.5, 1])
    # Over reviewers of their means: (1.75 / 3 + 1 / 2) / 2.
    np.testing.assert_allclose(made["strength"][:2], [(1.75 / 3 + 0.5) / 2, 0.75])
    np.testing.assert_allclose(made["strength_pooled"][0], 2.75 / 5)
    np.testing.assert_allclose(made["burden"][:2], [2.25, 0.5])
    # Round 1: means 1.75 / 3 and 1 / 2; types {methodology} and {literature}.
    gap = 1.75 / 3 - 0.5
    np.testing.assert_allclose(made["disagreement"][0], gap)
    np.testing.assert_allclose(made["spread"][0], gap / 2**0.5)
    assert made["types_apart"][0] == 1
    # Answered and critical: agree, rebut, partial.
    np.testing.assert_allclose(made["agreement"][:2], [1.5 / 3, 1])
    np.testing.assert_allclose(made["rebuttal"][0], 1 / 3)
    assert made["resolved_2"].tolist()[:2] == [0, 1]
    for name in ("strength", "disagreement", "core_share"):
        assert np.isnan(made[name][2]), name
    assert np.isnan(made["disagreement"][1])


@pytest.mark.programs(4)  # With an editor, and without.
def test_the_editor_is_no_reviewer():
    """Counted in sums, and in no mean over reviewers."""
    two = [opinion(strength=0.25), opinion(reviewer=2, strength=0.75)]
    editor = opinion(reviewer=0, strength=1.0, opinion_type="literature", quality=1.0)
    made = pr.measures(
        pr.opinions([[*two, editor], two, [editor]]), 3, 1, 3, editor=True
    )
    for name in ("strength", "quality", "constructiveness", "disagreement", "spread",
                 "types_apart"):  # fmt: skip
        assert made[name][0] == made[name][1], name
        assert np.isnan(made[name][2]), name
    assert made["pressure"].tolist() == [2, 1, 1]
    assert made["strength_pooled"].tolist() == pytest.approx([2 / 3, 0.5, 1])


def test_refused_codes():
    for fields, words in (
        ({"strength": 1.5}, "strength must be in"),
        ({"polarity": "rude"}, "polarity must be one of"),
        ({"round": 0}, "round must be >= 1"),
        ({"quote": " "}, "quote is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            opinion(**fields)
    given = pr.opinions([[opinion(reviewer=7)]])
    with pytest.raises(ValueError, match="reviewer must be in"):
        pr.measures(given, 1, 1, 3)


def test_outcomes_within_cells():
    cites, cell = [1.0, 3.0, 3.0, 5.0, 2.0, 2.0], list("aaaabb")
    made = pr.outcomes(cites, cell)
    np.testing.assert_allclose(made["norm"], [1 / 3, 1, 1, 5 / 3, 1, 1])
    np.testing.assert_allclose(made["percentile"][:4], [0.25, 0.625, 0.625, 1])
    for rows, n in ((slice(0, 4), 4), (slice(4, 6), 2)):
        assert made["percentile"][rows].mean() == pytest.approx((n + 1) / (2 * n))
    with pytest.raises(ValueError, match="without any citation"):
        pr.outcomes([0.0, 0.0], ["a", "a"])


def test_the_same_options_give_the_same_bytes(world):
    again = pr.simulate(SMALL)
    for a, b in zip(jax.tree.leaves(world), jax.tree.leaves(again)):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    letters = [pr.render(w, 3, "pages").text for w in (world, again)]
    assert letters[0] == letters[1]


@pytest.mark.parametrize("layout", pr.LAYOUTS)
def test_letters_are_recovered(world, layout):
    """All of separate and interleaved layouts, 98 % or more of those on noisy pages."""
    pairs = []
    for paper in range(24):
        letter = pr.render(world, paper, layout)
        pairs.append((letter, pr.parse_review_file(letter.text)))
    share = np.mean([is_recovered(*pair) for pair in pairs])
    assert share >= (0.98 if layout == "pages" else 1)
    got, true, length = [], [], []
    for letter, file in pairs:
        assert "".join(file.text[s.start : s.end] for s in file.segments) == letter.text
        if is_recovered(letter, file):
            own = sorted(pr.rule_extract(file), key=lambda o: o.span)
            got += [rules.levels(o.quote)["strength"] for o in own]
            length += [len(o.quote.split()) for o in own]
            true += world.opinions.scores[letter.rows, 0].tolist()
    strength = hypothesis.spearman(got, true).statistic
    assert strength >= 0.5
    assert strength > hypothesis.spearman(length, true).statistic + 0.2


@pytest.mark.programs(20)  # The replications' program, and single fits.
def test_replications_cover_the_truth(world):
    """Every cell of three models and five regressors, with 48 cells as clusters.

    With six clusters (150 papers, as ``world``) the limits hold for both of least squares
    and not for Poisson: its normal p-values cover 86 % of the truth there.
    """
    options = pr.Options(papers=600)
    c = models.coverage(pr.simulate(options), options, 500)
    for model, covered in c.covered.items():
        assert np.abs(c.bias_in_errors(model)).max() < 3, model
        # A share of 500 has an error of .01.
        assert 0.92 <= covered.min() and covered.max() <= 0.98, model
        assert 0.03 <= c.rejected[model][-1] <= 0.07, model
    reliability, ratio, corrected = models.attenuation(world, SMALL, 0.6)
    assert ratio == pytest.approx(reliability, rel=0.1)
    assert corrected == pytest.approx(1, rel=0.1)


@pytest.fixture(scope="module")
def table(world):
    """Two regressors, citations of which a field has none, and rows of complete data."""
    x = {"strength": world.x[:, 0], "burden": world.x[:, 2]}
    cites = np.where(world.field == 1, 0.0, world.cites)
    return x, cites, np.delete(np.arange(150), [5, 9, 11])


@pytest.fixture(scope="module")
def fitted(world, table):
    x, cites, rows = table
    part = {k: v[rows] for k, v in x.items()}
    return models.fit(cites[rows], part, world.field[rows], world.year[rows])


@pytest.mark.programs(40)  # Six kinds of fits.
def test_models_of_a_table(fitted):
    rows = models.regression_rows(fitted, ["strength", "burden"])
    assert [r[0] for r in rows] == ["strength", "burden", "n", "R2, pseudo-R2, log L"]
    heads = models.columns(fitted)
    assert all(len(r) == len(heads) for r in rows)
    latex = models.latex_table(heads, rows, "note")
    assert r"logit, top 10 \%" in latex and latex.count(r"\\") == 5
    assert "BH p" in models.text_table(heads, rows, "note")
    single = fits_p = [r.p[0] for r in fitted.alone.values()]
    assert list(fitted.adjusted.values()) == pytest.approx(
        hypothesis.benjamini_hochberg(single).tolist()
    )
    assert len(fits_p) == 2


@pytest.mark.programs(40)  # Six kinds of fits, two of which have fewer rows.
def test_tables_with_missing_values_and_cells_without_citations(fitted, table, world):
    """What its models leave out, ``fit`` leaves out: missing rows once, for all."""
    x, cites, rows = dict(table[0]), table[1].copy(), table[2]
    counted = (world.field[rows] != 1).sum()
    counts = [r.n for r in fitted.joint.values()]
    assert counts == [147, 147, counted, counted, 147] and counted < 110
    field = [f"field {f}" for f in world.field]
    x["strength"] = np.where(np.arange(150) == 5, np.nan, x["strength"])
    field[9], cites[11] = None, np.nan
    with pytest.raises(ValueError, match=r"3 of 150 .*strength 1, field 1"):
        models.fit(cites, x, field, world.year)
    made = models.fit(cites, x, field, world.year, missing="drop")
    assert made.vif == fitted.vif
    for model in ("OLS, CRV1", "PPML, CRV1", "NB2"):
        for name in x:
            assert made.joint[model][name] == pytest.approx(fitted.joint[model][name])
    assert measuring.ranked([0.0], ["a"])["top"].tolist() == [0]  # A single paper.


MESHES = [pytest.param("8x1", marks=pytest.mark.matrix), "4x2"]


@pytest.mark.programs(20)  # On one device and on a mesh.
@pytest.mark.parametrize("mesh", MESHES)
def test_tenths_and_null_on_every_mesh(world, key, mesh):
    x, y = world.x[:, 0], pr.outcomes(world.cites, world.cell)["norm"]
    one = pr.deciles(key, {"x": x, "other": -x}, y, 64)["x"]
    order = np.argsort(x, kind="stable")
    np.testing.assert_allclose(one["mean"], y[order].reshape(10, -1).mean(1))
    assert (one["low"] < one["mean"]).all() and (one["mean"] < one["high"]).all()
    means, paper = np.arange(12.0) % 3, np.repeat(np.arange(6), 2)
    null = pr.disagreement_null(key, means, paper, np.zeros(12), 6, 16)
    other = pr.deciles(key, {"x": x, "other": -x}, y, 64, mesh=grid(mesh))["x"]
    for part in one:
        np.testing.assert_allclose(other[part], one[part], rtol=1e-12)
    again = pr.disagreement_null(key, means, paper, np.zeros(12), 6, 16, grid(mesh))
    np.testing.assert_allclose(again[2], null[2], rtol=1e-12)
    within = np.square(
        means.reshape(6, 2) - means.reshape(6, 2).mean(1)[:, None]
    ).mean()
    assert null[0] == pytest.approx(within)


def test_fields_are_compared(key):
    """Shares by hand; measures of the same rows are resampled together."""
    rng = np.random.default_rng(0)
    field = np.arange(40) % 2
    x = rng.normal(size=(2, 40)) + [field, 0 * field]
    holes = np.where(np.isin(np.arange(40), [0, 2, 4]), np.nan, x[0])
    values = {"a": x[0], "holes": holes, "b": x[1], "like a": 2 * x[0]}
    made = models.compare_fields(key, values, field, 40)
    assert list(made) == list(values)
    for name, v in values.items():
        kept = np.isfinite(v)
        v, f = v[kept], field[kept]
        means = np.array([v[f == k].mean() for k in (0, 1)])[f]
        assert made[name].eta2 == pytest.approx(means.var() / v.var())
    assert made["like a"] == pytest.approx(made["a"])
    assert made["a"].low < made["a"].eta2 < made["a"].high


def test_kappa_icc_and_overlap():
    a, b = [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0]
    # Observed 4 / 6, by chance (2 * 2 + 2 * 3 + 2 * 1) / 36.
    assert agreement.kappa(a, b) == pytest.approx((4 / 6 - 1 / 3) / (1 - 1 / 3))
    assert agreement.kappa(a, a, "quadratic") == 1
    # 1 - 5 / (mean squared distance by chance * 6).
    chance = np.mean([(i - j) ** 2 for i in a for j in b]) * 6
    assert agreement.kappa(a, b, "quadratic") == pytest.approx(1 - 5 / chance)
    with pytest.raises(ValueError, match="not defined"):
        agreement.kappa([1, 1], [1, 1])
    # Shrout and Fleiss, 1979, table 2.
    scores = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9],
              [6, 2, 4, 7]]  # fmt: skip
    expected = {"1,1": 0.17, "2,1": 0.29, "3,1": 0.71, "1,k": 0.44, "2,k": 0.62,
                "3,k": 0.91}  # fmt: skip
    for kind, value in expected.items():
        assert agreement.icc(scores, kind) == pytest.approx(value, abs=0.006)
    # Kinds that were not asked for have no say: these two divide by zero.
    with np.errstate(all="raise"):
        assert agreement.icc([[1, 2], [2, 1]], "1,1") == -1
        assert agreement.icc([[1, 2], [2, 1]], "2,1") == -np.inf
        assert np.isnan(agreement.icc([[1, 2], [1, 2]], "3,1"))
    assert agreement.iou((0, 10), (5, 15)) == pytest.approx(1 / 3)
    matched = agreement.match_spans([(0, 10), (20, 30)], [(1, 10), (50, 60)])
    assert matched.pairs == ((0, 0),) and matched.precision == matched.recall == 0.5
