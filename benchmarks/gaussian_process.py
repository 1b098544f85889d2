"""A refit and 50 sweeps of fitted Q-iteration on 1,024 transitions, beside scikit-learn.

    pip install 'jaxpapers[bench]'
    python benchmarks/gaussian_process.py      about a minute

Transitions of mountain car, two inputs and three actions. Each row computes the posterior
mean of Q in float64 after 50 sweeps of y = r + gamma max_a Q(s', a):

- jaxpapers: ``papers.gppstd.draw_values``, one compiled call; one factorisation.
- scikit-learn, refits: ``GaussianProcessRegressor.fit`` (kernel fixed) and ``predict``
  for every sweep and action, as its interface has it.
- scikit-learn, one factor: its factors once, one for each action, then SciPy's
  ``cho_solve`` and products with kernel matrices that are computed once.

Writes results/gaussian_process.json beside this and prints a table.
"""

import functools
import json
import os
from pathlib import Path

# As many threads for each; before NumPy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
)

import jax  # noqa: E402
import numpy as np  # noqa: E402
from scipy.linalg import cho_solve  # noqa: E402
from sklearn.gaussian_process import GaussianProcessRegressor  # noqa: E402
from sklearn.gaussian_process.kernels import RBF  # noqa: E402
from timing import header, measure  # noqa: E402

from jaxpapers.ops import environments as envs  # noqa: E402
from jaxpapers.papers import gppstd  # noqa: E402

OUT = Path(__file__).parent / "results" / "gaussian_process.json"
ROWS, SWEEPS, GAMMA, NOISE, LENGTH, REPETITIONS = 1024, 50, 0.99, 0.01, 0.1, 5
LOW, HIGH = -10.0, 0.0


def transitions() -> gppstd.Transitions:
    """1,024 random transitions of mountain car, rewards scaled by 0.1."""
    problem = gppstd.Problem(envs.MountainCar())
    rng = np.random.default_rng(0)
    low, high = problem.bounds
    states = rng.uniform(low, high, (ROWS, 2))
    actions = rng.integers(0, 3, ROWS)
    steps = jax.jit(jax.vmap(problem.environment.step))(states, actions)
    states, after = (
        (x - low) / (high - low) for x in (states, np.asarray(steps.state))
    )
    return gppstd.Transitions(
        np.concatenate([states, actions[:, None]], 1),
        -0.1 * np.ones(ROWS), after, np.zeros((ROWS, 1)), np.asarray(steps.terminated),
        np.arange(ROWS, dtype=np.int32), np.ones(ROWS, bool),
    )  # fmt: skip


def main() -> None:
    """Measures, compares the results, writes."""
    with jax.enable_x64(True):
        rows = transitions()
        # Values around their lower end, as in the presets: x -> x + 10 has mean 0.
        prior = gppstd.Prior(lengths=(LENGTH,), noise=NOISE, mean=LOW)
        options = gppstd.Options(
            form="stationary", explore="mean", gamma=GAMMA, sweeps=SWEEPS + 1,
            tolerance=0.0, clip=(LOW, HIGH), features=1, buffer=ROWS,
        )  # fmt: skip
        problem = gppstd.Problem(envs.MountainCar())
        model = jax.tree.map(np.float64, problem.model(prior))
        model.log_lengths[:] = np.log(LENGTH)
        buffer = jax.device_put(jax.tree.map(lambda x: x[None], rows))
        key = jax.random.key(0)
        draw = jax.jit(
            functools.partial(
                gppstd.draw_values, model=model, problem=problem, options=options
            )
        )

        def ours():
            return np.asarray(draw(key, buffer=buffer).target[0])

        x, act, after = rows.x[:, :2], rows.x[:, 2].astype(int), rows.successor
        first = np.where(rows.done, 0.0, LOW)  # Of the prior mean.

        def backed_up(q):
            return np.clip(rows.reward + GAMMA * np.where(rows.done, 0, q), LOW, HIGH)

        def refits():
            y = backed_up(first)
            for _ in range(SWEEPS):
                q = []
                for a in range(3):
                    process = GaussianProcessRegressor(
                        RBF(LENGTH), alpha=NOISE, optimizer=None
                    )
                    process.fit(x[act == a], y[act == a] - LOW)
                    q.append(LOW + process.predict(after))
                y = backed_up(np.max(q, 0))
            return y

        def one_factor():
            y, parts = backed_up(first), []
            for a in range(3):
                process = GaussianProcessRegressor(
                    RBF(LENGTH), alpha=NOISE, optimizer=None
                )
                process.fit(x[act == a], y[act == a])
                parts.append((process.L_, process.kernel_(after, x[act == a])))
            for _ in range(SWEEPS):
                q = [
                    LOW + k @ cho_solve((root, True), y[act == a] - LOW)
                    for a, (root, k) in enumerate(parts)
                ]
                y = backed_up(np.max(q, 0))
            return y

        steps = {
            "jaxpapers, one compiled call": ours,
            "scikit-learn, refits": refits,
            "scikit-learn, one factor": one_factor,
        }
        results = {name: run() for name, run in steps.items()}  # Also compiles.
        times = measure(steps, REPETITIONS)
    own = results["jaxpapers, one compiled call"]
    error = {k: float(np.abs(v - own).max()) for k, v in results.items()}
    assert max(error.values()) < 1e-6, error
    ratio = {
        name: {k: v / times["jaxpapers, one compiled call"][k] for k, v in t.items()}
        for name, t in times.items()
    }
    result = {
        **header(
            "python benchmarks/gaussian_process.py",
            "jax", "jaxlib", "numpy", "scipy", "scikit-learn",
        ),
        "rows": ROWS, "sweeps": SWEEPS, "dtype": "float64", "threads": 1,
        "times": times, "times_over_jaxpapers": ratio,
        "largest_difference_of_a_target": error,
    }  # fmt: skip
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print("| | CPU ms | wall ms | / jaxpapers, CPU |\n|---|---|---|---|")
    for name, t in times.items():
        over = ratio[name]["cpu_ms"]
        print(f"| {name} | {t['cpu_ms']:,.0f} | {t['wall_ms']:,.0f} | {over:.1f} |")


if __name__ == "__main__":
    main()
