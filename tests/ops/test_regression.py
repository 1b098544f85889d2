"""Regressions: identities, closed forms, refusals, resampling."""

import warnings

import jax
import numpy as np
import pytest

from jaxpapers.ops import hypothesis
from jaxpapers.ops import regression as fits
from jaxpapers.ops.regression import linear, systems
from tests.contract import grid
from tests.regression_table import N, drawn


@pytest.fixture(scope="module")
def table():
    return drawn()


@pytest.mark.programs(20)  # Six fits of five kinds.
def test_identities_of_least_squares(table):
    y, x, effects = table["y"], table["x"], {"f": table["f"], "g": table["g"]}
    within = fits.ols(y, x, fe=effects)
    columns = fits.dummies("f", table["f"]) | fits.dummies("g", table["g"])
    written = fits.ols(y, columns | x)
    for name in x:
        np.testing.assert_allclose(
            within[name]["coef"], written[name]["coef"], rtol=1e-9
        )
        np.testing.assert_allclose(within[name]["se"], written[name]["se"], rtol=1e-9)
    zero = fits.ols(y, x, vcov="HC0")
    one = fits.ols(y, x, vcov="HC1")
    np.testing.assert_allclose(one.vcov, zero.vcov * N / (N - 3), rtol=1e-12)
    alone = fits.ols(y, x, vcov="CRV1", cluster=np.arange(N))
    np.testing.assert_allclose(alone.vcov, one.vcov, rtol=1e-10)
    # Residuals are orthogonal, and an effect's means are 0.
    assert abs(within.residuals @ x["a"]) < 1e-7
    assert np.abs(np.bincount(table["f"], within.residuals)).max() < 1e-7
    assert within.stats["r2"] > within.stats["r2_within"] > 0


def test_arguments_that_no_fit_takes_are_refused(table):
    y, x, f = table["y"], table["x"], table["f"]
    for call in (
        lambda: fits.ols(y, x, weights=np.ones(N)),
        lambda: fits.ppml(y, x, weights=np.ones(N)),
        lambda: fits.logit((y > 0) * 1.0, x, fe={"f": f}),
        lambda: fits.negbin(table["count"], x, fe={"f": f}),
        lambda: fits.negbin(table["count"], x, cluster=f),
        lambda: fits.wild_bootstrap(None, y, x, "a", cluster=f, level=0.9),
        lambda: fits.design(y, x, weights=np.ones(N)),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call()


@pytest.mark.programs(30)  # Poisson, logit, NB2 and their likelihoods.
def test_scores_are_zero_at_the_estimates(table):
    x, y = table["x"], table["count"]
    effects = {"f": table["f"], "g": table["g"]}
    fit = fits.ppml(y, x, fe=effects)
    for column in (*x.values(), *(table["f"] == k for k in range(5))):
        assert abs(column @ fit.residuals) < 1e-6
    binary = (y > 1) * 1.0
    score = fits.logit(binary, x).residuals
    assert max(abs(score.sum()), abs(score @ x["a"])) < 1e-8
    over = np.random.default_rng(0).negative_binomial(2, 2 / (2 + np.exp(0.5 * x["a"])))
    nb = fits.negbin(over, x)
    mu = over - nb.residuals
    score = nb.residuals / (1 + nb["alpha"]["coef"] * mu)
    assert max(abs(score.sum()), abs(score @ x["b"])) < 1e-5


def test_counts_that_are_not_overdispersed_fall_back_to_poisson(table):
    x = {"a": table["x"]["a"]}
    mean = np.round(np.exp(1 + 0.2 * x["a"]))
    with pytest.warns(UserWarning, match="not overdispersed"):
        fit = fits.negbin(mean, x)
    assert fit["alpha"]["coef"] == 0
    np.testing.assert_allclose(fit.coef[:2], fits.ppml(mean, x).coef, rtol=1e-6)
    with pytest.warns(UserWarning, match="not overdispersed"):
        narrow = fits.negbin(mean, x, level=0.5)
    assert np.ptp(narrow.ci[0]) < 0.4 * np.ptp(fit.ci[0])


def test_levels_without_a_positive_outcome_leave(table):
    y = np.where(table["f"] == 2, 0.0, table["count"])
    fit = fits.ppml(y, table["x"], fe={"f": table["f"]})
    kept = table["f"] != 2
    assert fit.dropped["separated"] == (~kept).sum() and fit.n == kept.sum()


@pytest.mark.programs(20)  # Poisson with other columns, with effects, and logit.
def test_regressors_that_separate_zeros_are_named(table):
    count, x = table["count"], table["x"]
    zero = np.flatnonzero(count == 0)
    d = np.isin(np.arange(N), zero[:4]) * 1.0
    for call in (
        lambda d: fits.ppml(count, {**x, "d": d}),
        lambda d: fits.ppml(count, {**x, "d": 1 - d}),
        lambda d: fits.ppml(count, {**x, "d": d}, tol=1e-8, last_step=True),
        lambda d: fits.ppml(count, {**x, "d": d}, fe={"g": table["g"]}),
        lambda d: fits.negbin(count, {**x, "d": d}),
    ):
        with pytest.raises(ValueError, match="^d: separates 4 rows of outcome 0"):
            call(d)
    # Of both signs nothing is separated; nor is a mean that is merely small.
    both = d - np.isin(np.arange(N), zero[4:8])
    assert abs(fits.ppml(count, {**x, "d": both})["d"]["coef"]) < 3
    far = {"a": np.where(d > 0, -60, x["a"]), "b": x["b"]}
    assert fits.ppml(count, far)["a"]["coef"] > 0.3


def test_levels_are_judged_by_the_rows_that_are_left(table):
    """A level whose positive outcomes are all in rows with a missing regressor."""
    f, count = table["f"], table["count"]
    gone = (f == 2) & (count > 0)
    x = {**table["x"], "b": np.where(gone, np.nan, table["x"]["b"])}
    fit = fits.ppml(count, x, fe={"f": f}, missing="drop")
    kept = f != 2
    assert fit.dropped["missing"] == gone.sum() and fit.n == kept.sum()
    assert fit.dropped["separated"] == ((f == 2) & ~gone).sum()
    part = {k: v[kept] for k, v in table["x"].items()}
    same = fits.ppml(count[kept], part, fe={"f": f[kept]})
    np.testing.assert_allclose(fit.coef, same.coef, rtol=1e-8)


@pytest.mark.programs(20)  # Least squares and Poisson with two numbers of rows.
@pytest.mark.parametrize("none", [None, float("nan")])
@pytest.mark.parametrize("kind", [list, lambda v: np.array(v, object)])
def test_labels_that_are_missing(table, none, kind):
    x, f = table["x"], [f"level {k}" for k in table["f"]]
    f[3] = f[70] = none
    f = kind(f)
    for fit, y in ((fits.ols, table["y"]), (fits.ppml, table["count"])):
        with pytest.raises(ValueError, match=r"2 of 120 rows .*\(f 2\)"):
            fit(y, x, fe={"f": f})
        made = fit(y, x, fe={"f": f}, missing="drop")
        rows = np.delete(np.arange(N), [3, 70])
        part = {k: v[rows] for k, v in x.items()}
        same = fit(y[rows], part, fe={"f": table["f"][rows]})
        np.testing.assert_array_equal(made.coef, same.coef)
        assert made.n == N - 2 and made.dropped["missing_by_column"] == {"f": 2}
    made = fits.ols(table["y"], x, vcov="CRV1", cluster=f, missing="drop")
    assert made.dropped["missing_by_column"] == {"the cluster": 2}
    columns = fits.dummies("f", f)
    assert len(columns) == 4
    assert all(
        np.flatnonzero(np.isnan(v)).tolist() == [3, 70] for v in columns.values()
    )
    z, key = np.stack([*x.values()], 1), jax.random.key(0)
    for call in (
        lambda: fits.bootstrap_ppml(key, table["count"], z, (f,), 4),
        lambda: fits.permutation_test(key, max, z[:, 0], (), 4, within=f),
    ):
        with pytest.raises(ValueError, match="2 missing labels of 120"):
            call()
    mixed = np.array([k if k else "none" for k in table["f"]], object)
    assert fits.design(table["y"], x, fe={"f": mixed}).levels == (5,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y": np.ones(N)}, "constant"),
        ({"cluster": np.zeros(N), "vcov": "CRV1"}, "one cluster"),
        ({"vcov": "CRV1"}, "needs cluster"),
        ({"vcov": "HC9"}, "HC9"),
        ({"df_rule": "r"}, "df_rule"),
        ({"x": {"a": np.full(N, np.nan)}}, "a 120"),
        ({"x": {"a": ["?"] * N}}, "a must hold numbers"),
        ({"x": {"a": np.zeros(3)}}, "one value per row"),
        ({"missing": "skip"}, "missing"),
        ({"fe": {"f": np.arange(N)}}, "cannot determine|spanned"),
        ({"level": 2.0}, "level"),
    ],
)
def test_refusals(table, change, words):
    arguments = {"y": table["y"], "x": table["x"], **change}
    with pytest.raises(ValueError, match=words):
        fits.ols(**arguments)


@pytest.mark.programs(20)
def test_what_is_left_out_is_named_and_counted(table):
    x = {**table["x"], "twice": 2 * table["x"]["a"] + 1}
    with pytest.raises(ValueError, match="twice is spanned"):
        fits.ols(table["y"], x)
    fit = fits.ols(table["y"], x, collinear="drop")
    assert fit.names == ("Intercept", "a", "b") and fit.dropped["collinear"] == [
        "twice"
    ]
    y = table["y"].copy()
    y[:3] = np.nan
    fit = fits.ols(y, table["x"], missing="drop")
    assert fit.n == N - 3 and fit.dropped["missing_by_column"] == {"the outcome": 3}
    alone = np.append(table["f"][:-1], 99)
    fit = fits.ols(table["y"], table["x"], fe={"f": alone}, singletons="drop")
    assert fit.n == N - 1 and fit.dropped["singletons"] == 1
    for call, words in (
        (lambda: fits.ppml(-table["count"], table["x"]), "counts must be >= 0"),
        (lambda: fits.logit(table["count"], table["x"]), "outcomes 0 and 1"),
        (lambda: fits.logit((x["a"] > 0) * 1.0, {"a": x["a"]}), "separate"),
    ):
        with pytest.raises(ValueError, match=words), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()


MESHES = ["8x1", pytest.param("4x2", marks=pytest.mark.matrix)]


@pytest.mark.programs(40)  # Bootstraps on three meshes, and refits.
@pytest.mark.parametrize("mesh", MESHES)
def test_bootstrap_is_a_loop_of_refits_on_every_mesh(table, key, mesh):
    y, x, count = table["y"], np.stack([*table["x"].values()], 1), table["count"]
    z = np.concatenate([np.ones((N, 1)), x], 1)
    effects = (table["f"], table["g"])
    draws = fits.bootstrap_ols(key, y, z, 16)
    poisson = fits.bootstrap_ppml(key, count, x, effects, 16)
    rows = [
        jax.random.randint(jax.random.fold_in(key, i), (N,), 0, N) for i in range(2)
    ]
    for i, r in enumerate(map(np.asarray, rows)):
        expected = np.linalg.lstsq(z[r], y[r], rcond=None)[0]
        np.testing.assert_allclose(draws[i], expected, rtol=1e-8)
        fe = {"f": table["f"][r], "g": table["g"][r]}
        fit = fits.ppml(count[r], {"a": x[r, 0], "b": x[r, 1]}, fe=fe)
        np.testing.assert_allclose(poisson[i], fit.coef, rtol=1e-6)
    again = fits.bootstrap_ols(key, y, z, 16, mesh=grid(mesh))
    np.testing.assert_allclose(again, draws, rtol=1e-12)
    # The other mesh: least squares and Poisson see each in turn.
    other = grid({"8x1": "4x2", "4x2": "8x1"}[mesh])
    again = fits.bootstrap_ppml(key, count, x, effects, 16, mesh=other)
    np.testing.assert_allclose(again, poisson, rtol=1e-9)


def test_bootstrap_and_permutations_of_a_statistic(table, key):
    y, f = table["y"], table["f"]
    draws = fits.bootstrap(key, lambda v: v.mean(), y, 400)
    assert draws.std() == pytest.approx(y.std() / N**0.5, rel=0.15)
    statistic = hypothesis.correlation
    r, p, null = fits.permutation_test(key, statistic, table["x"]["a"], y, 199)
    assert r == pytest.approx(np.corrcoef(table["x"]["a"], y)[0, 1], rel=1e-9)
    assert p == 1 / 200 and abs(null.mean()) < 0.05
    # Within levels of a column, the column does not move.
    _, p, null = fits.permutation_test(key, statistic, f * 1.0, y, 19, within=f)
    assert p == 1 and np.ptp(null) < 1e-12


def test_small_systems(key):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(6, 5, 5))
    a = a @ a.transpose(0, 2, 1)
    a[3, :, 0] = a[3, 0] = 0
    b = rng.normal(size=(6, 5))
    with jax.enable_x64(True):
        x = np.asarray(jax.jit(systems.solve)(a, b))
    assert np.isnan(x[3]).all()
    good = [0, 1, 2, 4, 5]
    expected = np.linalg.solve(a[good], b[good][..., None])[..., 0]
    np.testing.assert_allclose(x[good], expected, rtol=1e-8)


def test_vif_by_hand(table):
    x = table["x"]
    r = np.corrcoef(x["a"], x["b"])[0, 1]
    assert linear.vif(x)["a"] == pytest.approx(1 / (1 - r**2), rel=1e-10)
    more = {k: np.append(v, np.nan) for k, v in x.items()}
    with pytest.raises(ValueError, match="missing='drop'"):
        linear.vif(more)
    assert linear.vif(more, missing="drop") == linear.vif(x)
