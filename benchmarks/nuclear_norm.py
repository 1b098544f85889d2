"""The nuclear norm with its gradient beside jnp's SVD and torch's, and a step with it.

    python benchmarks/nuclear_norm.py             one minute
    python benchmarks/nuclear_norm.py --quick     one repetition

Every repetition runs each program in turn, on one thread, so that load on the machine
falls on all. Reported are medians of process CPU time and wall time, and relative errors
against a singular value decomposition in float64: of the value, and of the gradient by
its Frobenius norm. The step is that of the digits' net at 28 x 28 and 5 x 32 rows, with
the norm after its warm-up and without it. torch is used if it is installed.
Writes results/nuclear_norm.json beside this and prints tables.
"""

import argparse
import json
import os
from pathlib import Path

# One thread each: libraries of several programs would wait for each other's.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from timing import header, measure  # noqa: E402

from jaxpapers.config import load_config  # noqa: E402
from jaxpapers.papers import nuclear_norm as nu  # noqa: E402

OUT = Path(__file__).parent / "results" / "nuclear_norm.json"
SHAPES = ((128, 512), (512, 2048), (96, 2048))
PEER = "jnp svd, autodiff"
OURS = "gram"


def features(kind: str, shape: tuple[int, int]) -> np.ndarray:
    """gaussian; relu: of the same; low_rank: relu of rank 10 with 2 % noise."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    if kind == "low_rank":
        x = rng.normal(size=(shape[0], 10)) @ rng.normal(size=(10, shape[1])) + 0.02 * x
    return (x if kind == "gaussian" else np.maximum(x, 0)).astype(np.float32)


def programs(x: np.ndarray) -> dict:
    """Name -> function that gives value and gradient, as arrays of NumPy."""

    def compiled(f):
        run = jax.jit(jax.value_and_grad(f))
        array = jnp.asarray(x)
        return lambda: jax.block_until_ready(run(array))

    made = {PEER: compiled(lambda a: jnp.linalg.svd(a, compute_uv=False).sum())}
    for method in ("svd", "gram", "newton_schulz"):
        norm = nu.Norm(method=method)
        made[method] = compiled(lambda a, norm=norm: nu.nuclear_norm(a, norm)[0])
    try:
        import torch
    except ModuleNotFoundError:
        return made
    torch.set_num_threads(1)

    def torch_run():
        a = torch.tensor(x, requires_grad=True)
        value = torch.linalg.matrix_norm(a, "nuc")
        value.backward()
        assert a.grad is not None
        return value.detach().numpy(), a.grad.numpy()

    return {**made, "torch matrix_norm": torch_run}


def errors(x: np.ndarray, runs: dict) -> dict[str, list[float]]:
    """Name -> relative errors of the value and of the gradient."""
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    polar = u @ vt
    result = {}
    for name, run in runs.items():
        value, gradient = map(np.asarray, run())
        result[name] = [
            abs(float(value) / s.sum() - 1),
            float(np.linalg.norm(gradient - polar) / np.linalg.norm(polar)),
        ]
    return result


def steps() -> dict:
    """Name -> one training step, with the nuclear norm and without."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.random((160, 28, 28, 1)).astype(np.float32),
        "label": rng.integers(0, 10, 160).astype(np.int32),
        "domain": np.repeat(np.arange(5, dtype=np.int32), 32),
    }
    made = {}
    for name, theta in (("ERM", 0.0), ("ERM-NU", 0.01)):
        config = load_config(
            "nuclear_norm:rotated",
            [
                f"--config.method.theta={theta}", "--config.method.warmup=0",
                "--config.net.size=28", "--config.net.widths=(64,128,128,128)",
            ],
        )  # fmt: skip
        method = nu.make(config, domains=6)
        state = jax.jit(method.init)(jax.random.key(0), batch)
        update = jax.jit(method.update)
        made[name] = lambda u=update, s=state: jax.block_until_ready(u(s, batch))
    return made


def main() -> None:
    """Measures, writes, prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    count = 1 if parser.parse_args().quick else 7
    result = header(
        "python benchmarks/nuclear_norm.py", "jax", "jaxlib", "numpy", "torch"
    )
    result["shapes"] = {}
    for shape in SHAPES:
        entry: dict = {"errors": {}}
        for kind in ("gaussian", "relu", "low_rank"):
            x = features(kind, shape)
            runs = programs(x)
            entry["errors"][kind] = errors(x, runs)  # Also compiles.
            if kind == "relu":
                entry["times"] = measure(runs, count)
        times = entry["times"]
        entry["times_as_fast_as_svd"] = times[PEER]["cpu_ms"] / times[OURS]["cpu_ms"]
        name = "x".join(map(str, shape))
        result["shapes"][name] = entry
        print(f"\n{name}: {OURS} is {entry['times_as_fast_as_svd']:.1f} times as fast")
        print("| | CPU ms | gradient error: gaussian | relu | low rank |")
        print("|---|---|---|---|---|")
        for label, time in times.items():
            cells = [f"{e[label][1]:.1g}" for e in entry["errors"].values()]
            print(f"| {label} | {time['cpu_ms']:.1f} | {' | '.join(cells)} |")
    runs = steps()
    for run in runs.values():
        run()
    times = measure(runs, 3 * count)
    result["step"] = times
    ratio = times["ERM-NU"]["cpu_ms"] / times["ERM"]["cpu_ms"]
    result["step_ratio"] = ratio
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nstep: ERM {times['ERM']['cpu_ms']:.0f} ms CPU, ERM-NU {ratio:.3f} times")


if __name__ == "__main__":
    main()
