"""k-means beside scikit-learn, and the time of a beam search over a catalogue.

    pip install scikit-learn
    python benchmarks/semantic_ids.py            minutes on two cores
    python benchmarks/semantic_ids.py --once     one repetition, clustered points only
    python benchmarks/semantic_ids.py --quick    a tenth of the points, nothing written
    python benchmarks/semantic_ids.py --correlate FILE    rank correlations with recall,
        over the tokenizers and seeds of a comparison.json, or of results/r3_vae.json

100,000 points of 384 features and 256 clusters, one thread each, the same process, in
turn: k-means++ and 25 iterations of Lloyd at most, no tolerance. ``clustered`` points lie
around 1,000 centres, ``spread`` ones have no clusters, where no distance can be spared.
Times include everything after the compilation, which is reported.

A beam of 20 over 10,000 items, for one user with a history of 20: median of 50 searches
by the transformer of the preset amazon, 3 x 256 codes and a fourth. Writes
results/semantic_ids.json beside this.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
for name in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{name}_NUM_THREADS", "1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402
from sklearn.cluster import KMeans  # noqa: E402
from timing import header, measure  # noqa: E402

from jaxpapers.ops import kmeans  # noqa: E402
from jaxpapers.ops import trie as tries  # noqa: E402
from jaxpapers.papers import r3_vae  # noqa: E402
from jaxpapers.papers.r3_vae import retrieval  # noqa: E402

OUT = Path(__file__).parent / "results" / "semantic_ids.json"
FEATURES, CLUSTERS, ITERATIONS, REPETITIONS = 384, 256, 25, 3
ITEMS, BEAM, SEARCHES = 10_000, 20, 50


def points(n: int, kind: str) -> np.ndarray:
    """Points around 1,000 centres, or without any."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, FEATURES))
    if kind == "clustered":
        centres = rng.normal(size=(1000, FEATURES))
        x = centres[rng.integers(1000, size=n)] + 0.7 * x
    return x.astype(np.float32)


def clustering(n: int, kind: str, repetitions: int) -> dict:
    """Times and objectives of ours and of scikit-learn's."""
    x = points(n, kind)
    on_device, key = jnp.asarray(x), jax.random.key(0)
    options = kmeans.Options(iterations=ITERATIONS)
    found = {}

    def ours():
        result = kmeans.kmeans(key, on_device, CLUSTERS, options)
        found["jaxpapers"] = float(jax.block_until_ready(result).inertia)

    def theirs():
        model = KMeans(CLUSTERS, n_init=1, max_iter=ITERATIONS, tol=0, random_state=0)
        found["scikit-learn"] = float(model.fit(x).inertia_)

    began = time.perf_counter()
    ours()
    first = time.perf_counter() - began
    times = measure({"jaxpapers": ours, "scikit-learn": theirs}, repetitions)
    ratio = times["scikit-learn"]["cpu_ms"] / times["jaxpapers"]["cpu_ms"]
    return {
        "points": n,
        "repetitions": repetitions,
        "times": times,
        "first_call_s": first,
        "objective": found,
        "ratio_of_cpu_time": ratio,
    }


def search() -> dict:
    """Milliseconds of a beam search for one user."""
    tokenizer = r3_vae.Tokenizer()
    sizes = r3_vae.Retrieval().sizes(tokenizer, ITEMS)
    rng = np.random.default_rng(0)
    sid = rng.integers(0, tokenizer.codes, (ITEMS, tokenizer.levels))
    table = r3_vae.resolve(sid, tokenizer.codes).table
    trie = tries.build(table)
    net = r3_vae.Net(history=20)
    params = jax.jit(lambda key: retrieval.init(key, net, sizes))(jax.random.key(0))

    @jax.jit
    def find(params, history):
        user = jnp.zeros(1, jnp.int32)
        return retrieval.recommend(
            params, table, history, user, trie, net=net, sizes=sizes, beam=BEAM
        )

    times = []
    for _ in range(SEARCHES + 1):
        history = rng.integers(0, ITEMS, (1, net.history)).astype(np.int32)
        began = time.perf_counter()
        jax.block_until_ready(find(params, history))
        times.append(1000 * (time.perf_counter() - began))
    return {
        "items": ITEMS,
        "beam": BEAM,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "p50_ms": statistics.median(times[1:]),
        "first_call_ms": times[0],
    }


def correlate(path: str) -> None:
    """Prints Spearman's correlation of the metrics of SIDs with recall@10."""
    rows = json.loads(Path(path).read_text())["rows"]
    points = [x for r in rows for x in r["numbers"] if "sc_x_1" in x]
    recall = [x["recall_10"] for x in points]
    told = {}
    for name in ("sc_x_1", "pd", "unique"):
        rho, p = stats.spearmanr([x[name] for x in points], recall)
        told[name] = {"spearman": round(float(rho), 3), "p": round(float(p), 4)}
    print(json.dumps({"points": len(points), **told}, indent=1))


def main() -> None:
    """Measures, prints and writes."""
    if "--correlate" in sys.argv:
        return correlate(sys.argv[sys.argv.index("--correlate") + 1])
    quick, once = ("--quick" in sys.argv), ("--once" in sys.argv)
    n = 10_000 if quick else 100_000
    command = " ".join(["python benchmarks/semantic_ids.py", *sys.argv[1:]])
    result = header(command, "jax", "jaxlib", "scikit-learn",
                    "numpy")  # fmt: skip
    result["threads"] = 1
    result["search"] = search()
    print(json.dumps(result["search"], indent=1), flush=True)
    for kind in ("clustered",) if once else ("clustered", "spread"):
        result[kind] = clustering(n, kind, 1 if once else REPETITIONS)
        print(kind, json.dumps(result[kind], indent=1), flush=True)
    if not quick:
        OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
