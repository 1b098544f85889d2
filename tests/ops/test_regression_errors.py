"""Standard errors and the wild bootstrap: dummies, refits and loops by hand."""

import jax
import numpy as np
import pytest

from jaxpapers.ops import regression as fits
from jaxpapers.ops.regression import covariance, wild
from tests.regression_table import N, drawn


@pytest.fixture(scope="module")
def table():
    return drawn()


@pytest.mark.programs(20)  # Two kinds, within an effect and with dummies.
@pytest.mark.parametrize("kind", ["HC2", "HC3"])
def test_leverage_has_the_part_of_the_effect(table, kind):
    y, x, f, g = (table[k] for k in ("y", "x", "f", "g"))
    within = fits.ols(y, x, fe={"f": f}, vcov=kind)
    written = fits.ols(y, fits.dummies("f", f) | x, vcov=kind)
    assert within.df == written.df
    for name in x:
        np.testing.assert_allclose(within[name]["se"], written[name]["se"], rtol=1e-9)
    with pytest.raises(ValueError, match=r"one fixed effect, got 2 \(f, g\).*dummies"):
        fits.ols(y, x, fe={"f": f, "g": g}, vcov=kind)
    alone = {**x, "row": (np.arange(N) == 7) * 1.0}
    with pytest.raises(ValueError, match="row 7 has leverage 1"):
        fits.ols(y, alone, vcov=kind)
    level = np.append(f[:-1], 99)
    with pytest.raises(ValueError, match="row 119 has leverage 1.*singletons"):
        fits.ols(y, x, fe={"f": level}, vcov=kind)
    assert fits.ols(y, x, fe={"f": level}, vcov=kind, singletons="drop").n == N - 1


def test_degrees_of_effects_nested_in_the_clusters():
    """K - k of pyfixest 0.60.0, and its standard errors on the same numbers."""
    i = np.arange(60)
    cluster = i % 6
    effects = {"a": cluster * 2 + i // 6 % 2, "b": cluster * 3 + i // 12 % 3,
               "c": i // 7 % 4}  # fmt: skip
    x = {"x": np.sin(i * 1.7), "z": np.cos(i * i * 0.3)}
    y = x["x"] - 0.5 * x["z"] + 0.1 * effects["a"] + np.sin(i * i * 1.1)
    # One nested effect counts 1, so do two; c has 4 levels, one of which is theirs.
    for names, k in (("a", 1), ("b", 1), ("ab", 1), ("ac", 4), ("abc", 4), ("c", 4)):
        fe = {name: effects[name] for name in names}
        d = fits.design(y, x, fe=fe, cluster=cluster)
        assert d.nested() == [name != "c" for name in names]
        for kind in ("CRV1", "CRV3"):
            assert covariance.absorbed(d, kind) == k, (names, kind)
    for names, kind, se in (
        ("ab", "CRV1", [0.19363599864814368, 0.14355396235909043]),
        ("ab", "CRV3", [0.2412473970538286, 0.17903036804560118]),
    ):
        fe = {name: effects[name] for name in names}
        fit = fits.ols(y, x, fe=fe, vcov=kind, cluster=cluster)
        np.testing.assert_allclose(fit.se, se, rtol=1e-8)


@pytest.mark.programs(20)  # Three fits of other shapes.
def test_jackknife_is_refitting_without_each_cluster(table):
    y, x, f = table["y"], table["x"], table["f"]
    design = np.stack([np.ones(N), *x.values()], 1)
    beta = np.linalg.lstsq(design, y, rcond=None)[0]
    apart = [
        np.linalg.lstsq(design[f != g], y[f != g], rcond=None)[0] - beta
        for g in range(5)
    ]
    total = np.transpose(apart) @ apart
    fit = fits.ols(y, x, vcov="jackknife", cluster=f)
    np.testing.assert_allclose(fit.vcov, total * 4 / 5, rtol=1e-9)
    fit = fits.ols(y, x, vcov="CRV3", cluster=f, df_rule="statsmodels")
    np.testing.assert_allclose(fit.vcov, total * 5 / 4, rtol=1e-9)


def wild_by_hand(table, effect, impose, patterns):
    """t of b and its draws: y* = fit + weights of the clusters times its residuals."""
    y, x, g = table["y"], table["x"], table["f"]
    effects = [(effect == k) * 1.0 for k in np.unique(effect)]
    z = np.stack([x["b"], x["a"], *effects], 1)
    rest = z[:, 1:] if impose else z
    fitted = rest @ np.linalg.lstsq(rest, y, rcond=None)[0]
    bread = np.linalg.inv(z.T @ z)
    centre = 0 if impose else (bread @ z.T @ y)[0]

    def t_of(v, value):
        beta = bread @ z.T @ v
        s = np.stack([z[g == k].T @ (v - z @ beta)[g == k] for k in range(5)])
        scale = np.sqrt(5 / 4 * (N - 1) / (N - z.shape[1]))
        return (beta[0] - value) / np.sqrt((bread @ s.T @ s @ bread)[0, 0]) / scale

    draws = [t_of(fitted + (y - fitted) * w[g], centre) for w in patterns]
    return t_of(y, 0), np.array(draws)


SIGNS = np.array([[1 - 2 * (i >> (4 - k) & 1) for k in range(5)] for i in range(32)])


@pytest.mark.parametrize("impose", [True, False])
@pytest.mark.parametrize("effect", [None, "g"])
def test_wild_bootstrap_enumerates_signs(table, key, impose, effect):
    y, x, f = table["y"], table["x"], table["f"]
    made = fits.wild_bootstrap(
        key, y, x, "b", cluster=f, replicates=32, impose_null=impose,
        fe={effect: table[effect]} if effect else None,
    )  # fmt: skip
    label = table[effect] if effect else np.zeros(N)
    t, draws = wild_by_hand(table, label, impose, SIGNS)
    assert made.replicates == 32
    np.testing.assert_allclose(made.draws, draws, rtol=1e-8, atol=1e-12)
    assert made.t == pytest.approx(t, rel=1e-8)
    assert made.p == (np.abs(draws) >= abs(t) * (1 - 1e-9)).mean()


@pytest.mark.parametrize("kind", ["webb", "mammen"])
def test_weights_of_the_wild_bootstrap(table, key, kind):
    """Their support and moments; the draws are those of the weights by hand."""
    with jax.enable_x64(True):
        w = np.asarray(wild._weights(key, 20_000, 5, kind=kind))
    root = 5**0.5
    values = {
        "webb": [sign * v**0.5 for sign in (-1, 1) for v in (0.5, 1.0, 1.5)],
        "mammen": [(1 - root) / 2, (1 + root) / 2],
    }[kind]
    np.testing.assert_allclose(np.unique(w.round(12)), np.sort(values), rtol=1e-9)
    # Four standard errors of 100,000 draws; Mammen's third moment is 1.
    for power, moment in ((1, 0), (2, 1), (3, kind == "mammen")):
        error = (w**power).std() / w.size**0.5
        assert abs((w**power).mean() - moment) < 4 * error + 1e-12
    made = fits.wild_bootstrap(
        key, table["y"], table["x"], "b", cluster=table["f"], replicates=200,
        weights=kind,
    )  # fmt: skip
    with jax.enable_x64(True):
        w = np.asarray(wild._weights(key, 200, 5, kind=kind))
    _, draws = wild_by_hand(table, np.zeros(N), True, w[:20])
    np.testing.assert_allclose(made.draws[:20], draws, rtol=1e-8)


def test_clustered_logit_by_hand(table):
    y, x, g = (table["y"] > 0) * 1.0, table["x"], table["f"]
    fit = fits.logit(y, x, vcov="CRV1", cluster=g)
    z = np.stack([np.ones(N), *x.values()], 1)
    p = 1 / (1 + np.exp(-z @ fit.coef))
    bread = np.linalg.inv(z.T @ (z * (p * (1 - p))[:, None]))
    s = np.stack([z[g == k].T @ (y - p)[g == k] for k in range(5)])
    v = bread @ s.T @ s @ bread * 5 / 4 * (N - 1) / (N - 3)
    np.testing.assert_allclose(fit.vcov, v, rtol=1e-8)
    assert fit.kind == "CRV1" and np.isinf(fit.df)
