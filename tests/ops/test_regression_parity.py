"""Recorded fits of statsmodels, pyfixest and SciPy."""

import json

import numpy as np
import pytest

from jaxpapers.ops import hypothesis
from jaxpapers.ops import regression as fits

RIGHT = ("strength", "quality", "burden", "logteam", "rounds", "pages")
OLS, FE, COUNT = 1e-8, 1e-6, 1e-5


def rival(d, name):
    """The fit of a recorded name and its tolerance."""
    x = {k: d[k] for k in RIGHT}
    both = {k: d[k] for k in ("field", "year")}
    as_written = {"df_rule": "statsmodels"}
    kind = name.removeprefix("ols_")
    if kind in ("nonrobust", "HC0", "HC1", "HC2", "HC3"):
        kind = "iid" if kind == "nonrobust" else kind
        return fits.ols(d["logc"], x, vcov=kind, **as_written), OLS
    if name == "ols_cluster_field":
        rule = {"vcov": "CRV1", "cluster": d["field"], **as_written}
        return fits.ols(d["logc"], x, **rule), OLS
    if name == "ols_dummies_HC1":
        columns = fits.dummies("field", d["field"]) | fits.dummies("year", d["year"])
        return fits.ols(d["logc"], columns | x, vcov="HC1", **as_written), OLS
    if name in ("feols_iid", "feols_hetero"):
        kind = "iid" if name == "feols_iid" else "HC1"
        return fits.ols(d["logc"], x, vcov=kind, fe=both), FE
    if name == "feols_fy_CRV1_field":
        rule = {"vcov": "CRV1", "fe": {"fy": d["fy"]}, "cluster": d["fy"]}
        return fits.ols(d["logc"], x, **rule), FE
    if name == "feols_CRV3_field":
        return fits.ols(d["logc"], x, vcov="CRV3", fe=both, cluster=d["fy"]), FE
    if name == "fepois_CRV1":
        rule = {"vcov": "CRV1", "fe": both, "cluster": d["fy"]}
        return fits.ppml(d["cites"], x, tol=1e-8, last_step=True, **rule), COUNT
    if name == "poisson_HC0":
        return fits.ppml(d["cites"], x, vcov="HC0", **as_written), COUNT
    if name == "negbin2":
        return fits.negbin(d["cites"], x), COUNT
    assert name == "logit_top10", name
    return fits.logit(d["top10"], x), COUNT


@pytest.mark.parity("lm", only=lambda entry: entry["kind"] == "regression")
# Sixteen fits of other kinds, each a program of its own.
@pytest.mark.programs(60)
def test_recorded_fits(case):
    recorded = json.loads((case.folder / case.entry["file"]).read_text())
    d = {k: np.array(v) for k, v in recorded["data"].items()}
    results = recorded["results"]
    tests, factors = results.pop("tests"), results.pop("vif")
    for name, expected in results.items():
        fit, tolerance = rival(d, name)
        columns = dict(zip(fit.names, range(len(fit.names))))
        parts = {
            "params": fit.coef,
            "bse": fit.se,
            "pvalues": fit.p,
            "conf_int": fit.ci,
        }
        for key, values in expected.items():
            if key not in parts:
                assert fit.stats[key] == pytest.approx(values, rel=tolerance), key
                continue
            assert set(values) == set(columns), (name, key)
            got = np.stack([parts[key][columns[c]] for c in values])
            # A p-value moves with t^2 times the error of t.
            more = 1 if key != "pvalues" else 10 + np.square(fit.t).max()
            np.testing.assert_allclose(
                got, list(values.values()), rtol=tolerance * more, atol=tolerance * 1e-2,
                err_msg=f"{name} {key}",
            )  # fmt: skip
    for name, value in fits.vif({k: d[k] for k in factors}).items():
        assert value == pytest.approx(factors[name], rel=OLS)
    quarter = np.quantile(d["strength"], [0.25, 0.75])
    low, high = d["strength"] <= quarter[0], d["strength"] >= quarter[1]
    fields = [d["strength"][d["field"] == f] for f in np.unique(d["field"])]
    made = {
        "spearman": hypothesis.spearman(d["strength"], d["logc"]),
        "pearson": hypothesis.pearson(d["strength"], d["logc"]),
        "mannwhitney_top_bottom": hypothesis.mannwhitney(
            d["norm"][high], d["norm"][low]
        ),
        "kruskal_field": hypothesis.kruskal(fields),
        "bh_adjusted": hypothesis.benjamini_hochberg(
            [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205]
        ),
    }
    assert set(tests) == set(made)
    for name, values in tests.items():
        np.testing.assert_allclose(made[name], values, rtol=1e-8, err_msg=name)
