"""Standard errors: numbers of other packages and by hand."""

import numpy as np

from jaxpapers.ops import regression as fits
from jaxpapers.ops.regression import covariance


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
