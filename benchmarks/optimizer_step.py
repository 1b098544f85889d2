"""Cost of one optimizer step: ours, optax's Muon and AdamW, torch's Muon.

    python benchmarks/optimizer_step.py                       everything
    python benchmarks/optimizer_step.py --quick               one repetition
    python benchmarks/optimizer_step.py --microsoft-dion PATH a checkout of microsoft/dion

Every repetition runs one step of each optimizer in turn on the same matrix, so that load
on the machine falls on all of them. Reported are medians of process CPU time and wall
time. The matrix product of the same shapes, at the same precision, gives the rate to
compare with. torch is used if it is installed; its Muon multiplies in bfloat16, which on
CPUs without such units takes minutes, so there it runs once, and not on the largest
matrix. On a GPU only wall time means anything.
Writes results/optimizer_step.json (or the name given by --out) beside this.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# As the command line does, and before SciPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from timing import header, measure  # noqa: E402

from jaxpapers import optim  # noqa: E402

SHAPES = ((1024, 1024), (1024, 4096), (4096, 1024), (2048, 8192))
# A transformer of 12 layers, width 384, with layers stacked as nn.scan stacks them.
STACKED = {
    "query": (12, 384, 384), "key": (12, 384, 384), "value": (12, 384, 384),
    "out": (12, 384, 384), "gate": (12, 384, 1024), "up": (12, 384, 1024),
    "down": (12, 1024, 384),
}  # fmt: skip
TORCH_MUON_MOST = 1 << 22  # Numbers of a matrix that torch's Muon is measured on.
RANKS = {"full": 1.0, "1/4": 0.25, "1/16": 1 / 16}
MODULE = Path(__file__).parent
ONCE = "torch muon, one step"


def ours() -> dict:
    """Name -> optax transformation of our optimizers."""
    made = {}
    for label, fraction in RANKS.items():
        for method in ("scqr", "cqr2", "rcqr", "qr"):
            if label == "1/4" or method == "scqr":
                made[f"dion {label} {method}"] = optim.scale_by_dion(
                    fraction, orthogonalize=method
                )
    made["our muon"] = optim.scale_by_muon()
    made["our dion2 1/4"] = optim.scale_by_dion2(0.25)
    return made


def jax_steps(shape) -> dict:
    """Name -> function that runs one step and waits for it."""
    g = {"w": jax.random.normal(jax.random.key(0), shape)}
    numbers = {"w": optax.contrib.MuonDimensionNumbers(0, 1)}
    made = {
        **ours(),
        "optax muon": optax.contrib.scale_by_muon(weight_dimension_numbers=numbers),
        "optax adamw": optax.scale_by_adam(),
    }
    return {name: jax_step(tx, g) for name, tx in made.items()}


def jax_step(tx, grads):
    """One jitted step with a donated state."""
    update = jax.jit(tx.update, donate_argnums=1)
    box = [tx.init(grads)]
    for _ in range(3):  # Compiles, and leaves a momentum that is no single gradient.
        _, box[0] = update(grads, box[0])

    def run():
        updates, box[0] = update(grads, box[0])
        jax.block_until_ready((updates, box[0]))

    return run


def torch_steps(shape, microsoft: str | None) -> dict:
    """The same of torch; empty without it."""
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    made = {}

    def add(name, make, warm=True):
        weight = torch.nn.Parameter(torch.randn(shape))
        weight.grad = torch.randn(shape)
        optimizer = make([weight])
        if warm:
            optimizer.step()
        made[name] = optimizer.step

    if shape[0] * shape[1] <= TORCH_MUON_MOST:
        add(ONCE, lambda w: torch.optim.Muon(w, lr=0.01), warm=False)
    add("torch adamw", lambda w: torch.optim.AdamW(w, lr=0.01))
    if microsoft:
        sys.path.insert(0, microsoft)
        from dion import Dion  # ty: ignore

        add("microsoft dion 1/4 rcqr", lambda w: Dion(w, lr=0.01, rank_fraction=0.25))
    return made


def pieces(shape) -> dict:
    """What a rank-1/4 step is made of: its products and its orthonormalisation.

    Of the latter also the parts: the default takes at least one Gram matrix, one Cholesky
    factorisation and one triangular solve, and more for an ill-conditioned factor.
    """
    l, s = max(shape), min(shape)
    r = s // 4
    b, q, p = (jax.random.normal(jax.random.key(i), x)
               for i, x in enumerate([(l, s), (s, r), (l, r)]))  # fmt: skip

    def dot(spec, x, y):
        return jnp.einsum(spec, x, y, precision="highest")

    @jax.jit
    def products(b, q, p):
        right = dot("ls,lr->sr", b, p)
        return (
            dot("ls,sr->lr", b, q),
            dot("lr,sr->ls", p, right),
            dot("lr,sr->ls", p, q),
        )

    one = jax.jit(lambda b, q: dot("ls,sr->lr", b, q))
    basis = jax.jit(optim.orthonormalize)
    gram = jax.jit(lambda p: dot("lr,lq->rq", p, p))
    factor = jax.jit(jnp.linalg.cholesky)
    solve = jax.jit(
        lambda c, p: jax.scipy.linalg.solve_triangular(c, p.T, lower=True).T
    )
    whole = gram(p)
    lower = factor(whole)
    made = {
        "matrix product l x s x s/4": lambda: one(b, q),
        "the four products of a step": lambda: products(b, q, p),
        "orthonormalize l x s/4, scqr": lambda: basis(p),
        "Gram matrix of l x s/4": lambda: gram(p),
        "Cholesky of s/4 x s/4": lambda: factor(whole),
        "triangular solve of l x s/4": lambda: solve(lower, p),
    }
    for run in made.values():
        jax.block_until_ready(run())
    return {
        name: lambda run=run: jax.block_until_ready(run()) for name, run in made.items()
    }


def dion_flops(shape, fraction: float) -> float:
    """FLOPs of a step in closed form."""
    from jax.sharding import PartitionSpec as P

    return optim.plan_dion(shape, P(), {}, fraction).flops


def matrix(shape, repetitions: int, microsoft: str | None) -> dict:
    """Measures one shape."""
    steps = {**jax_steps(shape), **torch_steps(shape, microsoft)}
    steps.update(pieces(shape))
    times = measure(steps, repetitions, once=(ONCE,))
    l, s = max(shape), min(shape)
    plain = 2 * l * s * (s // 4) / times["matrix product l x s x s/4"]["wall_ms"] / 1e6
    flops = dion_flops(shape, 0.25)
    step = times["dion 1/4 scqr"]
    parts = ("the four products of a step", "orthonormalize l x s/4, scqr")
    return {
        "times": times,
        "ratio_to_optax_muon_cpu": {
            name: t["cpu_ms"] / times["optax muon"]["cpu_ms"]
            for name, t in times.items()
        },
        "dion_1/4": {
            "gflop": flops / 1e9,
            "gflop_per_s": flops / times["dion 1/4 scqr"]["wall_ms"] / 1e6,
            "plain_product_gflop_per_s": plain,
            "share_of_cpu_time": {
                **{name: times[name]["cpu_ms"] / step["cpu_ms"] for name in parts},
                **{
                    f"  one {name}": times[name]["cpu_ms"] / step["cpu_ms"]
                    for name in (
                        "Gram matrix of l x s/4",
                        "Cholesky of s/4 x s/4",
                        "triangular solve of l x s/4",
                    )
                },
                "sums and copies": 1
                - sum(times[name]["cpu_ms"] for name in parts) / step["cpu_ms"],
            },
        },
    }


def stacked(repetitions: int) -> dict:
    """A whole tree of stacked layers against the sum of its matrices one by one."""
    numbers = optim.DimensionNumbers(1, 2)
    keys = jax.random.split(jax.random.key(0), len(STACKED))
    tree = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, STACKED.items())
    }
    alone = {f"{n}{i}": x[i] for n, x in tree.items() for i in range(x.shape[0])}
    single = {
        shape: jax_step(optim.scale_by_dion(0.25), {"w": alone[name]})
        for name, shape in {
            next(n for n in alone if alone[n].shape == s): s
            for s in {x.shape for x in alone.values()}
        }.items()
    }
    steps = {
        "dion 1/4 whole tree": jax_step(
            optim.scale_by_dion(0.25, weight_dimension_numbers=numbers), tree
        ),
        **{f"dion 1/4 {'x'.join(map(str, s))}": f for s, f in single.items()},
    }
    times = measure(steps, repetitions)
    total = {
        unit: sum(
            times[f"dion 1/4 {'x'.join(map(str, x.shape))}"][unit]
            for x in alone.values()
        )
        for unit in ("cpu_ms", "wall_ms")
    }
    whole = times["dion 1/4 whole tree"]
    return {
        "times": times,
        "sum_of_matrices": total,
        "ratio_whole_to_sum": {u: whole[u] / total[u] for u in total},
    }


def main() -> None:
    """Measures everything and writes it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--microsoft-dion", metavar="PATH")
    parser.add_argument(
        "--out", type=Path, default=MODULE / "results/optimizer_step.json"
    )
    options = parser.parse_args()
    repetitions = 1 if options.quick else options.repetitions
    packages = ("jax", "jaxlib", "optax", "torch", "numpy")
    result = {
        **header("python benchmarks/optimizer_step.py", *packages),
        "device": str(jax.devices()[0].device_kind),
        "repetitions": repetitions,
        "matrices": {},
    }
    np.random.seed(0)
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        found = matrix(shape, repetitions, options.microsoft_dion)
        result["matrices"][name] = found
        print(name)
        for optimizer, t in found["times"].items():
            ratio = found["ratio_to_optax_muon_cpu"][optimizer]
            cpu, wall = t["cpu_ms"], t["wall_ms"]
            print(f"  {optimizer:<28} cpu {cpu:8.1f} ms  wall {wall:8.1f} ms", end="")
            print(f"  {ratio:.3f} of optax muon")
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    result["stacked"] = stacked(repetitions)
    print("stacked tree / sum of matrices", result["stacked"]["ratio_whole_to_sum"])
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
