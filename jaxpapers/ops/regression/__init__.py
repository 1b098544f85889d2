"""Regressions with fixed effects and robust standard errors, in float64 on the device.

Tables come as dicts of columns; ``Result`` has estimates, errors and tests by name. The
degrees of freedom are those of fixest or of statsmodels (``df_rule``).
"""

from jaxpapers.ops.regression.demean import demean
from jaxpapers.ops.regression.design import Design, design
from jaxpapers.ops.regression.linear import ols, vif
from jaxpapers.ops.regression.negbin import negbin
from jaxpapers.ops.regression.poisson import dummies, logit, ppml
from jaxpapers.ops.regression.resampling import (
    bootstrap,
    bootstrap_ols,
    bootstrap_ppml,
    permutation_test,
)
from jaxpapers.ops.regression.result import Result, critical
from jaxpapers.ops.regression.wild import Wild, wild_bootstrap

__all__ = [
    "Design", "Result", "Wild", "bootstrap", "bootstrap_ols", "bootstrap_ppml",
    "critical", "demean", "design", "dummies", "logit", "negbin", "ols",
    "permutation_test", "ppml", "vif", "wild_bootstrap",
]  # fmt: skip
