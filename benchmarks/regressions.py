"""10,000 pairs-bootstrap replicates beside loops over statsmodels and pyfixest.

    pip install statsmodels pyfixest==0.60.0
    python benchmarks/regressions.py       about ten minutes

Least squares (n 8,000, k 12) and Poisson pseudo-likelihood with two fixed effects (12
regressors, 26 fields, 8 years) on generated counts. Ours computes all replicates in one
call; the loops refit LOOP replicates on the very rows that ours drew, and their time is
scaled to all (``scaled`` in the result; ``cpu`` is seconds of process time, which load
on the machine moves less). Same process, same cores, nothing pinned.
Estimates of the same replicate are compared. Writes results/regressions.json beside this.
"""

import json
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pyfixest
import statsmodels.api as sm
from timing import header

from jaxpapers.ops import regression as fits

OUT = Path(__file__).parent / "results" / "regressions.json"
ROWS, COLUMNS, FIELDS, YEARS = 8000, 12, 26, 8
REPLICATES, LOOP = 10_000, {"statsmodels OLS": 60, "pyfixest OLS": 30,
                            "pyfixest PPML": 24, "statsmodels Poisson": 12}  # fmt: skip


def table(rng: np.random.Generator) -> dict:
    """Counts with effects of field and year, and 12 regressors."""
    field, year = rng.integers(0, FIELDS, ROWS), rng.integers(0, YEARS, ROWS)
    x = rng.normal(size=(ROWS, COLUMNS)) + 0.02 * field[:, None]
    effect = rng.normal(0, 0.4, FIELDS)[field] + 0.1 * year
    eta = x @ np.linspace(-0.15, 0.15, COLUMNS) + effect + 0.5
    mu = np.exp(eta) * rng.gamma(2, 0.5, ROWS)
    return {"x": x, "field": field, "year": year, "count": rng.poisson(mu) * 1.0,
            "y": eta + rng.normal(size=ROWS)}  # fmt: skip


def rows_of(key, i: int) -> np.ndarray:
    """Rows of a replicate, as ours draws them."""
    drawn = jax.random.randint(
        jax.random.fold_in(key, i), (ROWS,), 0, ROWS, jax.numpy.int32
    )
    return np.asarray(drawn)


def loop(name: str, fit, key) -> tuple[np.ndarray, np.ndarray]:
    """Wall and CPU seconds of a replicate of a loop, without drawing; its estimates."""
    count = LOOP[name]
    chosen = [rows_of(key, i) for i in range(count)]
    fit(chosen[0])  # Imports, compilation.
    began, began_cpu = time.perf_counter(), time.process_time()
    found = [fit(rows) for rows in chosen]
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    return np.array([wall, cpu]) / count, np.array(found)


def timed(run) -> tuple[np.ndarray, np.ndarray]:
    """Wall and CPU seconds of a call, its compilation included, and the result."""
    began, began_cpu = time.perf_counter(), time.process_time()
    result = run()
    wall, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    return np.array([wall, cpu]), result


def loops(d: dict, key) -> dict:
    """name -> (seconds a replicate, estimates of the regressors)."""
    z = np.concatenate([np.ones((ROWS, 1)), d["x"]], 1)
    names = [f"x{i}" for i in range(COLUMNS)]
    frame = pd.DataFrame(d["x"], columns=names).assign(
        y=d["y"], count=d["count"], field=d["field"], year=d["year"]
    )
    right = " + ".join(names)
    hot = np.concatenate(
        [d["x"], np.eye(FIELDS)[d["field"]], np.eye(YEARS)[d["year"]][:, 1:]], 1
    )

    def feols(rows):
        return pyfixest.feols(f"y ~ {right}", frame.iloc[rows], vcov="iid").coef()

    def fepois(rows):
        fit = pyfixest.fepois(
            f"count ~ {right} | field + year", frame.iloc[rows], vcov="iid"
        )
        return fit.coef()

    def poisson(rows):
        model = sm.Poisson(d["count"][rows], hot[rows])
        return model.fit(disp=0, method="newton", maxiter=50).params[:COLUMNS]

    return {
        "statsmodels OLS": loop(
            "statsmodels OLS", lambda r: sm.OLS(d["y"][r], z[r]).fit().params, key
        ),
        "pyfixest OLS": loop("pyfixest OLS", feols, key),
        "pyfixest PPML": loop("pyfixest PPML", fepois, key),
        "statsmodels Poisson": loop("statsmodels Poisson", poisson, key),
    }


def main() -> None:
    """Runs ours and the loops and writes the result."""
    warnings.simplefilter("ignore")
    d, key = table(np.random.default_rng(0)), jax.random.key(0)
    z = np.concatenate([np.ones((ROWS, 1)), d["x"]], 1)
    ours = {
        "OLS": timed(lambda: fits.bootstrap_ols(key, d["y"], z, REPLICATES)),
        "PPML": timed(
            lambda: fits.bootstrap_ppml(
                key, d["count"], d["x"], (d["field"], d["year"]), REPLICATES
            )
        ),
    }
    result = header(
        "python benchmarks/regressions.py", "jax", "jaxlib", "numpy", "statsmodels",
        "pyfixest",
    )  # fmt: skip
    result |= {"rows": ROWS, "columns": COLUMNS, "fields": FIELDS, "years": YEARS,
               "replicates": REPLICATES, "ours": {}, "loops": {}}  # fmt: skip
    for name, (seconds, _) in ours.items():
        result["ours"][name] = {
            "seconds_with_compilation": seconds[0], "cpu": seconds[1],
        }  # fmt: skip
    for name, (each, found) in loops(d, key).items():
        model = "OLS" if "OLS" in name else "PPML"
        seconds, draws = ours[model]
        difference = np.abs(draws[: len(found)] - found).max()
        result["loops"][name] = {
            "replicates": len(found), "seconds_each": each[0],
            "scaled": each[0] * REPLICATES, "cpu": each[1] * REPLICATES,
            "ratio": each[0] * REPLICATES / seconds[0],
            "cpu_ratio": each[1] * REPLICATES / seconds[1],
            "largest_difference": float(difference),
            "largest_coefficient": float(np.abs(found).max()),
        }  # fmt: skip
        print(name, result["loops"][name])
    result["unconverged"] = int(np.isnan(ours["PPML"][1]).any(1).sum())
    print(result["ours"], result["unconverged"])
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
