"""Cost of a round of POEM: the scan of a pool, and the posterior of a buffer.

    python benchmarks/outlier_mining.py             400,000 x 342, 5 minutes
    python benchmarks/outlier_mining.py --quick     a tenth of the rows, once

Features are given: networks cost the same everywhere. The peer is the procedure of the
released code in PyTorch: float64 products, an inverse, a whole eigendecomposition and a
Cholesky factor for the draw; scores, and an order of all of them, for the choice. Beside
it, PyTorch as one would write it: float32 products, a Cholesky factor, ``topk``. All in
turn, on one thread; medians of process CPU time. Writes results/outlier_mining.json (or
the name given by --out) beside this.
"""

import argparse
import functools
import json
import os
from pathlib import Path

# One thread each, before either library starts its own.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
FLAG = "--xla_cpu_multi_thread_eigen=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from timing import header, measure  # noqa: E402

from jaxpapers.ops import posterior as blr  # noqa: E402
from jaxpapers.ops import selection  # noqa: E402
from jaxpapers.papers import poem  # noqa: E402

PRIOR, NOISE = 20.0, 0.5
CHUNK = 8192
MODULE = Path(__file__).parent


def rows(count: int, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Features as after ReLU, with a large common mean, and targets of -3 and 3."""
    rng = np.random.default_rng(0)
    z = np.empty((count, features), np.float32)
    mean = rng.uniform(-0.5, 1, features).astype(np.float32)
    for start in range(0, count, CHUNK):
        part = z[start : start + CHUNK]
        part[:] = np.maximum(rng.standard_normal(part.shape, np.float32) + mean, 0)
    y = np.where(np.arange(count) % 2, 3.0, -3.0).astype(np.float32)
    return z, y


def ours(z, y, w, chosen) -> dict:
    """Name -> function that does the work and waits for it."""
    placed, count = jax.device_put((z, y, w)), len(z)
    options = poem.Options(prior=PRIOR, noise=NOISE)
    gram = jax.jit(functools.partial(blr.statistics, chunk=CHUNK))

    def posterior():
        stats = jax.device_get(gram(*placed[:2]))
        post = poem.solve(stats, options)
        return post, jax.block_until_ready(poem.draw(jax.random.key(0), post, options))

    size = 4 * CHUNK
    chunks = [jax.device_put(z[i : i + size]) for i in range(0, count, size)]

    @functools.partial(jax.jit, donate_argnums=0)
    def merge(top, z, w, start):
        index = start + jnp.arange(len(z))
        return selection.merge(top, poem.boundary_score(w, z), index)

    def scan():
        """Chunk by chunk, as a pool that fits no memory is read."""
        top = selection.empty(chosen)
        for i, part in enumerate(chunks):
            top = merge(top, part, placed[2], i * size)
        return jax.block_until_ready(top)

    @jax.jit
    def select(z, w):
        return selection.top_n(poem.boundary_score(w, z), chosen, ordered=False)

    return {
        "posterior, ours": posterior,
        "scan, ours, a stream": scan,
        "scan, ours, at once": lambda: jax.block_until_ready(select(*placed[::2])),
    }


def peers(z, y, w, chosen) -> dict:
    """The same in PyTorch."""
    z, y, w = (torch.from_numpy(x) for x in (z, y, w))
    eye = torch.eye(z.shape[1], dtype=torch.float64)

    def draw(mean, covariance):
        values, _ = torch.linalg.eigh(covariance)
        assert values.min() > 0
        lower = torch.linalg.cholesky(covariance)
        return mean, mean + lower @ torch.randn(len(mean), dtype=torch.float64)

    def reference():
        wide, target = z.double(), y.double()
        inverse = torch.inverse(wide.T @ wide / NOISE + eye / PRIOR)
        return draw(inverse @ wide.T @ target / NOISE, PRIOR * inverse)

    def plain():
        gram = (z.T @ z).double() / NOISE + eye / PRIOR
        lower = torch.linalg.cholesky(gram)
        moment = (z.T @ y).double()[:, None] / NOISE
        mean = torch.cholesky_solve(moment, lower)[:, 0]
        eps = torch.randn(len(mean), 1, dtype=torch.float64)
        step = torch.linalg.solve_triangular(lower.T, eps, upper=True)
        return mean, mean + step[:, 0]

    return {
        "posterior, reference's procedure": reference,
        "posterior, torch float32": plain,
        "scan, reference's procedure": lambda: torch.argsort((z @ w).abs())[:chosen],
        "scan, torch topk": lambda: torch.topk((z @ w).abs(), chosen, largest=False)[1],
    }


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth, once")
    parser.add_argument("--features", type=int, default=342)
    parser.add_argument("--out", default="outlier_mining.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = 40_000 if options.quick else 400_000
    chosen = count // 8
    z, y = rows(count, options.features)
    w = np.random.default_rng(1).normal(size=options.features).astype(np.float32)
    w -= w.mean()
    steps = {**ours(z, y, w, chosen), **peers(z, y, w, chosen)}
    found = {name: run() for name, run in steps.items()}  # Compiles, and warms up.
    exact = found["posterior, reference's procedure"][0].numpy()
    times = measure(steps, 1 if options.quick else 5)
    chosen_by = {
        name: set(np.asarray(x.index if "ours" in name else x).tolist())
        for name, x in found.items()
        if name.startswith("scan")
    }
    own = chosen_by["scan, ours, a stream"]
    result = {
        **header("python benchmarks/outlier_mining.py", "jax", "jaxlib", "torch"),
        "rows": count,
        "features": options.features,
        "chosen": chosen,
        "times": times,
        "relative error of the mean": {
            name: float(np.abs(np.asarray(x[0].mean if "ours" in name else x[0]) - exact)
                        .max() / np.abs(exact).max())
            for name, x in found.items()
            if name.startswith("posterior")
        },
        "chosen alike": {
            name: len(own & x) / chosen for name, x in chosen_by.items()
        },
    }  # fmt: skip
    for name, each in times.items():
        print(f"{name:36s} {each['cpu_ms']:9.1f} ms CPU  {each['wall_ms']:9.1f} ms")
    print(json.dumps({k: result[k] for k in result if "error" in k or "alike" in k}))
    folder = MODULE / "results"
    folder.mkdir(exist_ok=True)
    (folder / options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
