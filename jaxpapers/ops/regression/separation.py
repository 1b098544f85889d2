"""Zeros that regressors set apart: a Poisson fit that has no finite estimate. Host.

Where a combination z of the columns and effects is 0 in all rows with a positive outcome
and <= 0 in the others, the likelihood grows along it for ever: the rows with z < 0 are
separated. Whether there is one is a linear program.

Reference: Correia, Guimaraes, Zylkin, "Verifying the existence of maximum likelihood
estimates for generalized linear models", 2019.
"""

from typing import Any

import numpy as np
from scipy import optimize, sparse

from jaxpapers.ops.regression.design import Design

LARGEST = 1e4  # Coefficient, of columns scaled to a largest value of 1.


def separated(d: Design) -> tuple[list[str], np.ndarray]:
    """Regressors that separate zeros, and the rows (of ``d``) that are set apart.

    Separation by fixed effects alone names none: it leaves the coefficients finite.
    """
    columns: list[Any] = [d.x / np.maximum(np.abs(d.x).max(0, initial=0), 1e-300)]
    ones, at = np.ones(len(d.y)), np.arange(len(d.y))
    columns += [
        sparse.csr_array((ones, (at, f)), (len(f), n)) for f, n in zip(d.fe, d.levels)
    ]
    z: Any = sparse.csr_array(sparse.hstack([sparse.csr_array(c) for c in columns]))
    zero, rest = z[d.y == 0], z[d.y > 0]
    some = zero.shape[0]
    # The most rows with z < 0, each of which counts 1 at most.
    found = optimize.linprog(
        zero.sum(0), sparse.vstack([zero, -zero]), np.repeat([0.0, 1.0], some), rest,
        np.zeros(rest.shape[0]), (-LARGEST, LARGEST),
    )  # fmt: skip
    if found.x is None:
        return [], at[:0]
    apart = np.flatnonzero(d.y == 0)[zero @ found.x < -1e-3]
    moved = np.abs(found.x[: len(d.names)]) > 1e-6
    names = [name for name, m in zip(d.names, moved) if m and name != "Intercept"]
    return (names if len(apart) else []), apart


def refuse(d: Design) -> None:
    """Refuses a problem whose regressors separate zeros.

    Raises:
      ValueError: with the columns and the rows.
    """
    names, apart = separated(d)
    if names:
        rows = ", ".join(map(str, d.rows[apart[:3]]))
        more = " ..." if len(apart) > 3 else ""
        raise ValueError(
            f"{', '.join(names)}: separates {len(apart)} rows of outcome 0 (rows {rows}"
            f"{more}) from all others, so that no finite coefficient fits best; leave "
            "out the column, or these rows"
        )
