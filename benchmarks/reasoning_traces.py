"""Metrics and similarities of traces beside plain Python, edit distances beside zss.

    pip install 'jaxpapers[bench]' zss==1.2.0 apted==1.0.3
    python benchmarks/reasoning_traces.py     some minutes

Random traces of 20 nodes and 40 jumps on average. Plain Python computes what the released
code computes, by its definitions and one trace at a time: metrics of a tree of
dictionaries, similarity of two walks with SciPy's Jensen-Shannon distance. Arrays are
made on the host before; their making is timed by itself. Edit distances are of pairs of
trees with 40 nodes, from traces to numbers. One thread each, the same process, in turn;
results are compared. Writes results/reasoning_traces.json beside this.
"""

import json
import os
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{name}_NUM_THREADS", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from scipy.spatial.distance import jensenshannon  # noqa: E402
from timing import header, measure  # noqa: E402

from jaxpapers.papers import rejump  # noqa: E402

OUT = Path(__file__).parent / "results" / "reasoning_traces.json"
TRACES, PLAIN, PAIRS, SLOW_PAIRS, REPETITIONS = 1024, 512, 256, 8, 7
KINDS = rejump.CATEGORIES


def drawn(rng, nodes: int, steps: int) -> rejump.Trace:
    """A tree whose nodes hang on one of the six before them, and a random walk."""
    parents = [None, *(int(rng.integers(max(0, i - 6), i)) for i in range(1, nodes))]
    inner = set(parents)
    tree = tuple(
        rejump.Node(
            f"node{i + 1}", f"step {i}", None if p is None else f"node{p + 1}", None,
            None if i in inner else bool(rng.random() < 0.3),
        )
        for i, p in enumerate(parents)
    )  # fmt: skip
    places = [0, *rng.integers(0, nodes, steps)]
    kinds = rng.integers(0, 3, steps)
    walk = tuple(
        rejump.Step(f"node{a + 1}", f"node{b + 1}", KINDS[k])
        for a, b, k in zip(places, places[1:], kinds)
    )
    return rejump.Trace(tree, walk)


def plain_metrics(trace: dict) -> tuple:
    """The six metrics of a trace of dictionaries, and whether an edge is not derived."""
    tree, walk = trace["tree"], trace["walk"]
    parent = {name: node["parent"] for name, node in tree.items()}
    below: dict[str, list[str]] = {name: [] for name in tree}
    root = next(name for name, above in parent.items() if above == "none")
    for name, above in parent.items():
        if above != "none":
            below[above].append(name)
    depth, level = {root: 0}, [root]
    while level:
        level = [child for name in level for child in below[name]]
        for name in level:
            depth[name] = depth[parent[name]] + 1
    leaves = {name for name in depth if not below[name]}

    def path(name):
        above = [name]
        while parent[name] != "none":
            name = parent[name]
            above.append(name)
        return above

    def distance(a, b):
        first = path(a)
        known = set(first)
        meeting = next(name for name in path(b) if name in known)
        return depth[a] + depth[b] - 2 * depth[meeting]

    seen = [walk[0]["from"], *(step["to"] for step in walk)]
    kept, last = [], -1
    for i, name in enumerate(seen):
        if name not in leaves:
            continue
        between = (step["category"] != KINDS[1] for step in walk[last:i])
        if not kept or name != kept[-1] or any(between):
            kept.append(name)
            last = i
    jumps = [distance(a, b) for a, b in zip(kept, kept[1:])]
    count = {kind: sum(step["category"] == kind for step in walk) for kind in KINDS}
    right = [bool(tree[name].get("match_corr")) for name in kept]
    derived = {(s["from"], s["to"]) for s in walk if s["category"] == KINDS[0]}
    missing = any((above, name) not in derived for name, above in parent.items()
                  if above != "none")  # fmt: skip
    m = len(kept)
    return (
        len(leaves),
        sum(jumps) / (m - 1) if m > 1 else 0.0,
        sum(right) / m if m else 0.0,
        count[KINDS[1]] / sum(count.values()),
        (m - 1 - right.index(True)) / m if True in right else 0.0,
        int(count[KINDS[0]] >= len(tree)),
        int(missing),
    )


def plain_matrix(walk: list) -> np.ndarray:
    """Shares of the categories that follow each category."""
    counts = np.zeros((3, 3))
    for a, b in zip(walk, walk[1:]):
        counts[KINDS.index(a["category"]), KINDS.index(b["category"])] += 1
    counts += 1e-9
    return counts / counts.sum(1, keepdims=True)


def plain_similarity(a: list, b: list) -> float:
    """Similarity of two walks, with SciPy; NaN of equal rows is no divergence."""
    p, q = plain_matrix(a), plain_matrix(b)
    with np.errstate(invalid="ignore"):
        rows = [np.nan_to_num(jensenshannon(x, y, base=2)) ** 2 for x, y in zip(p, q)]
    return 1 - float(np.mean(rows))


def seconds_to_compile(function, *args):
    """A compiled function and the seconds that it took."""
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, time.perf_counter() - began


def metrics_and_walks(rng) -> dict:
    """Traces and pairs per second of CPU time."""
    own = [
        drawn(rng, int(rng.integers(12, 29)), int(rng.integers(24, 57)))
        for _ in range(PLAIN)
    ]
    dicts = [rejump.to_dict(t) for t in own]
    began = time.process_time()
    small = rejump.to_arrays(own)
    arrays = PLAIN / (time.process_time() - began)
    batch = rejump.TraceBatch(*(np.tile(x, (TRACES // PLAIN, *[1] * (x.ndim - 1)))
                                for x in small))  # fmt: skip
    other = np.roll(batch.category, 1, 0)

    def similar(a, b):
        p, q = rejump.transition_matrix(a), rejump.transition_matrix(b)
        return rejump.walk_similarity(p, q)

    metrics, compile_metrics = seconds_to_compile(rejump.metrics, batch)
    walks, compile_walks = seconds_to_compile(similar, batch.category, other)
    names = (*rejump.NAMES, "no_calculation_edge")
    found, near = metrics(batch), np.asarray(walks(batch.category, other))
    ours = np.stack([np.asarray(getattr(found, n)) for n in names], 1)[:PLAIN]
    pairs = [(dicts[i]["walk"], dicts[i - 1]["walk"]) for i in range(PLAIN)]
    theirs = np.array([plain_metrics(d) for d in dicts])
    errors = {
        "metrics": float(np.abs(ours - theirs).max()),
        "walks": float(
            np.abs(near[:PLAIN] - [plain_similarity(*p) for p in pairs]).max()
        ),
    }
    assert max(errors.values()) < 1e-5, errors
    args = jax.device_put((batch, batch.category, other))
    times = measure(
        {
            "metrics": lambda: jax.block_until_ready(metrics(args[0])),
            "metrics, plain": lambda: [plain_metrics(d) for d in dicts],
            "walks": lambda: jax.block_until_ready(walks(*args[1:])),
            "walks, plain": lambda: [plain_similarity(*p) for p in pairs],
        },
        REPETITIONS,
    )
    rates = {
        k: 1000 * (PLAIN if "plain" in k else TRACES) / t["cpu_ms"]
        for k, t in times.items()
    }
    return {
        "per_cpu_second": rates,
        "times_faster": {
            k: rates[k] / rates[f"{k}, plain"] for k in ("metrics", "walks")
        },
        "arrays_per_cpu_second": arrays,
        "compile_seconds": {"metrics": compile_metrics, "walks": compile_walks},
        "largest_difference": errors,
        "nodes": float(small.n_nodes.mean()),
        "jumps": float(small.n_steps.mean()),
    }


def edit_distances(rng) -> dict:
    """Pairs of trees per second of CPU time."""
    import apted
    import zss

    traces = [drawn(rng, 40, 1) for _ in range(2 * PAIRS)]
    a, b = traces[:PAIRS], traces[PAIRS:]

    def nested(trace):
        below: dict = {}
        for node in trace.nodes:
            below.setdefault(node.parent, []).append(node)

        def tree(node):
            return (node.problem, [tree(x) for x in below.get(node.name, [])])

        return tree(below[None][0])

    def relabel(x, y):
        return 0 if x and y else 1

    def node(t):
        return zss.Node(t[0], [node(x) for x in t[1]])

    class Costs(apted.Config):
        def rename(self, node1, node2):
            return relabel(node1[0], node2[0])

        def children(self, node):
            return node[1]

    trees = [(nested(x), nested(y)) for x, y in zip(a, b)][:SLOW_PAIRS]

    def ours():
        return rejump.tree_edit_distances(a, b)

    def by_zss():
        return [
            zss.simple_distance(node(x), node(y), label_dist=relabel) for x, y in trees
        ]

    def by_apted():
        return [apted.APTED(x, y, Costs()).compute_edit_distance() for x, y in trees]

    began = time.perf_counter()
    expected = ours()[:SLOW_PAIRS].tolist()
    compiled = time.perf_counter() - began
    assert by_zss() == expected and by_apted() == expected
    times = measure({"jaxpapers": ours, "zss": by_zss, "apted": by_apted}, 3)
    rates = {
        k: 1000 * (PAIRS if k == "jaxpapers" else SLOW_PAIRS) / t["cpu_ms"]
        for k, t in times.items()
    }
    return {
        "pairs_per_cpu_second": rates,
        "times_faster": {k: rates["jaxpapers"] / rates[k] for k in ("zss", "apted")},
        "first_call_seconds": compiled,
        "nodes": 40,
    }


def main() -> None:
    """Measures, prints and writes."""
    result = header("python benchmarks/reasoning_traces.py", "jax", "jaxlib", "numpy",
                    "scipy", "zss", "apted")  # fmt: skip
    result["traces"] = metrics_and_walks(np.random.default_rng(0))
    result["trees"] = edit_distances(np.random.default_rng(1))
    result["load"] = os.getloadavg()[0]
    print(json.dumps(result, indent=1))
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
