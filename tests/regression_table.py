"""A small table with two effects, for tests of regressions."""

import numpy as np

N = 120


def drawn():
    """Regressors a and b, effects f and g, a linear outcome and counts."""
    rng = np.random.default_rng(3)
    f, g = rng.integers(0, 5, N), rng.integers(0, 4, N)
    x = {"a": rng.normal(size=N) + 0.3 * f, "b": rng.normal(size=N)}
    eta = 0.5 * x["a"] - 0.3 * x["b"] + 0.2 * f - 0.3 * g
    return {
        "x": x, "f": f, "g": g, "y": eta + rng.normal(size=N),
        "count": rng.poisson(np.exp(eta)).astype(float), "cell": f * 4 + g,
    }  # fmt: skip
