"""The measure of DNW on 100,000 nodes for 21 values of b, beside SciPy and networkx.

    pip install 'jaxpapers[bench]'
    python benchmarks/dnw.py             some minutes, of which networkx takes most

A random network of 250,000 links on 8 levels. Every row computes the same, W of all nodes
for b = 0, .05, .., 1, in float32 but for networkx. Writes results/dnw.json beside this
and prints a table.
"""

import functools
import json
from pathlib import Path

import jax
import networkx as nx
import numpy as np
import scipy.sparse
from timing import header, measure

from jaxpapers.papers import dnw

OUT = Path(__file__).parent / "results" / "dnw.json"
NODES, LINKS, LEVELS, REPETITIONS = 100_000, 250_000, 8, 7
B = np.linspace(0, 1, 21)


def random_network(seed: int = 0) -> dnw.CharNet:
    """A network whose links lead from any lower level to a higher one."""
    rng = np.random.default_rng(seed)
    level = np.sort(rng.integers(0, LEVELS, NODES))
    first = np.searchsorted(level, level)  # Of the node's level.
    whole = rng.integers(first[first > 0][0], NODES, LINKS * 11 // 10)
    links = np.unique(np.stack([whole, rng.integers(0, first[whole])]), axis=1)
    parts: dict[str, list[str]] = {str(i): [] for i in range(NODES)}
    for i in rng.permutation(links.shape[1])[:LINKS]:
        parts[str(links[0, i])].append(str(links[1, i]))
    freq = dict(zip(parts, rng.pareto(1.0, NODES).tolist()))
    return dnw.build_network(parts, freq)


def programs(net: dnw.CharNet) -> dict:
    """Name -> function that gives W of all values of b, (21, n)."""
    b, freq = B.astype(np.float32), net.freq.astype(np.float32)
    weight = dnw.weights(net).astype(np.float32)

    @jax.jit
    def fixpoint(freq, comp, whole, weight, b):
        one = functools.partial(dnw.dnw, n_levels=net.n_levels)
        return jax.vmap(lambda x: one(freq, comp, whole, weight, x))(b)

    matrix = scipy.sparse.csr_matrix((weight, (net.comp, net.whole)), (NODES, NODES))

    def power():
        w = np.repeat(freq[:, None], len(b), 1)
        for _ in range(net.n_levels - 1):
            w = freq[:, None] + b * (matrix @ w)
        return w.T

    graph = nx.DiGraph()
    graph.add_nodes_from(range(NODES))
    graph.add_edges_from(zip(net.whole.tolist(), net.comp.tolist()))
    beta = dict(enumerate(net.freq.tolist()))

    def katz():
        calls = (nx.katz_centrality(graph, x, beta, normalized=False) for x in B)
        return np.array([list(w.values()) for w in calls])

    links = jax.device_put((net.comp, net.whole, weight))
    return {
        "jaxpapers, sweep": lambda: jax.block_until_ready(dnw.sweep(net, B)),
        "jaxpapers, fixpoint": lambda: jax.block_until_ready(fixpoint(freq, *links, b)),
        "SciPy, CSR power": power,
        "networkx, 21 calls": katz,
    }


def main() -> None:
    """Measures, compares the results, writes."""
    net = random_network()
    assert (len(net.comp), net.n_levels) == (LINKS, LEVELS)
    steps = programs(net)
    exact = np.asarray(steps["SciPy, CSR power"]())
    error = {}
    for name, run in steps.items():  # Also compiles.
        if name != "networkx, 21 calls":
            error[name] = float(np.abs(np.asarray(run()) / exact - 1).max())
    once = ["networkx, 21 calls"]
    times = measure(steps, REPETITIONS, once=once)
    (reference,) = once
    ours = times["jaxpapers, sweep"]
    packages = ("jax", "jaxlib", "numpy", "scipy", "networkx")
    result = {
        **header("python benchmarks/dnw.py", *packages),
        "nodes": NODES, "links": LINKS, "levels": LEVELS, "values_of_b": len(B),
        "times": times,
        "networkx_over_sweep": {k: times[reference][k] / ours[k] for k in ours},
        "largest_relative_difference_to_scipy": error,
    }  # fmt: skip
    OUT.write_text(json.dumps(result, indent=1) + "\n")
    print("| | CPU ms | wall ms |\n|---|---|---|")
    for name, x in times.items():
        print(f"| {name} | {x['cpu_ms']:,.0f} | {x['wall_ms']:,.0f} |")
    print(f"networkx / sweep, CPU: {result['networkx_over_sweep']['cpu_ms']:,.0f}")


if __name__ == "__main__":
    main()
