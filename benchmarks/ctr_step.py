"""Click models: a training step beside DeepCTR-Torch's, serving, search, evaluation.

    pip install 'jaxpapers[bench]'
    python benchmarks/ctr_step.py                one thread (ten minutes)
    python benchmarks/ctr_step.py --threads 2
    python benchmarks/ctr_step.py --quick        one repetition
    python benchmarks/ctr_step.py --fuxictr PATH SIM's step beside that of a checkout of
                                                 reczoo/FuxiCTR, with what it imports

Ours and the peer's run in turn in one process that is bound to so many cores: medians
of process CPU time and wall time. Training steps run five at a time, as in training:
a single one finds the caches full of the other models' tables. Sizes: 1,024 rows,
histories of 50, tables of 192,403 users, 63,002 items and 802 categories with 18 numbers
each, attention 80-40, MLP 200-80 with ReLU (Dice in an MLP fails an assertion of the
peer's), Adam; the peer's L2 on the tables is off. Writes results/ctr_step.json beside
this.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_parser = argparse.ArgumentParser()
_parser.add_argument("--threads", type=int, default=1)
_parser.add_argument("--quick", action="store_true")
_parser.add_argument("--only", default="", help="a part's name")
_parser.add_argument("--fuxictr", metavar="PATH", help="checkout with model_zoo/")
OPTIONS = _parser.parse_args()
# Before XLA and torch count the cores.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: OPTIONS.threads])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from timing import header, measure  # noqa: E402

from jaxpapers import papers  # noqa: E402
from jaxpapers.config import load_config  # noqa: E402
from jaxpapers.ops import behaviour_tree, ranking, search  # noqa: E402

OUT = Path(__file__).parent / "results" / "ctr_step.json"
USERS, ITEMS, CATES, DIM, BATCH, SLOTS = 192_403, 63_002, 802, 18, 1024, 50
UNIT, HIDDEN = (80, 40), (200, 80)
REPETITIONS = 1 if OPTIONS.quick else 9


def config(name: str, **fields):
    """A paper's config at the sizes above; ``net__x`` is a field of a group."""
    c = load_config(name).copy_and_resolve_references().unlock()
    c.net.update(item_vocab=ITEMS + 1, cate_vocab=CATES + 1, user_vocab=USERS + 1)
    c.net.update(item_dim=DIM, cate_dim=DIM, user_dim=DIM, item_bias=False, std=1e-4)
    c.net.update(unit=UNIT, unit_chunk=32, hidden=HIDDEN, activation="relu")
    c.optim.update(name="adam", tables="lazy_adam", lr=1e-3, clip=0.0)
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return c.lock()


def batch(slots: int = SLOTS, size: int = BATCH, items: int = ITEMS, seed: int = 0):
    """Whole histories of random items."""
    rng = np.random.default_rng(seed)

    def ids(count, *shape):
        return rng.integers(2, count, shape).astype(np.int32)

    return {
        "user": ids(USERS, size), "item": ids(items, size), "cate": ids(CATES, size),
        "hist_item": ids(items, size, slots), "hist_cate": ids(CATES, size, slots),
        "neg_hist_item": ids(items, size, slots),
        "neg_hist_cate": ids(CATES, size, slots),
        "length": np.full(size, slots, np.int32),
        "label": rng.integers(0, 2, size).astype(np.float32),
    }  # fmt: skip


def ours(name: str, data: dict, aux: bool = False, **fields):
    """A compiled training step of ours, and the seconds that compiling took."""
    data = {k: v for k, v in data.items() if aux or not k.startswith("neg_")}
    method = papers.load(name).make(config(name, **fields))
    state = jax.jit(method.init)(jax.random.key(0), data)
    began = time.perf_counter()
    step = jax.jit(method.update, donate_argnums=0).lower(state, data).compile()
    seconds = time.perf_counter() - began
    box = [state]
    placed = jax.tree.map(jnp.asarray, data)

    def run():
        box[0], metrics = step(box[0], placed)
        jax.block_until_ready((box[0].params, metrics))

    run()
    return run, seconds


def peer(name: str, data: dict, aux: bool = False, slots: int = SLOTS):
    """A training step of DeepCTR-Torch's model, and its forward pass."""
    import torch
    from deepctr_torch.inputs import SparseFeat, VarLenSparseFeat
    from deepctr_torch.models import DIEN, DIN

    torch.set_num_threads(OPTIONS.threads)
    sizes = {"user": USERS, "item": ITEMS + 1, "cate": CATES + 1}
    columns = [SparseFeat(n, v, embedding_dim=DIM) for n, v in sizes.items()]
    lists = ["hist_item", "hist_cate"]
    lists += ["neg_hist_item", "neg_hist_cate"] if aux else []
    for n in lists:
        table = n.rsplit("_", 1)[1]
        feature = SparseFeat(n, sizes[table], embedding_dim=DIM, embedding_name=table)
        columns.append(
            VarLenSparseFeat(feature, maxlen=slots, length_name="seq_length")
        )
    common = {
        "dnn_hidden_units": HIDDEN, "dnn_activation": "relu", "l2_reg_embedding": 0.0,
    }  # fmt: skip
    if name == "din":
        model = DIN(columns, ["item", "cate"], att_hidden_size=UNIT,
                    att_activation="sigmoid", **common)  # fmt: skip
    else:
        model = DIEN(
            columns, ["item", "cate"], gru_type="AUGRU", use_negsampling=aux,
            att_hidden_units=UNIT, att_activation="sigmoid", **common,
        )  # fmt: skip
    fields = {**data, "seq_length": data["length"]}
    flat = [fields[n].reshape(len(fields[n]), -1) for n in model.feature_index]
    x = torch.from_numpy(np.concatenate(flat, 1).astype(np.float32))
    y = torch.from_numpy(data["label"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train():
        model.train()
        optimizer.zero_grad()
        p = model(x).squeeze()
        value = torch.nn.functional.binary_cross_entropy(p, y) + model.aux_loss.sum()
        value.backward()
        optimizer.step()

    def forward():
        model.eval()
        with torch.no_grad():
            model(x)

    train()
    forward()
    return train, forward


def measure_five(steps: dict) -> dict:
    """``measure`` of five runs at a time, per run."""

    def five(run):
        def repeated():
            for _ in range(5):
                run()

        return repeated

    times = measure({name: five(run) for name, run in steps.items()}, REPETITIONS)
    return {n: {k: v / 5 for k, v in t.items()} for n, t in times.items()}


def training() -> dict:
    """Steps of DIN and DIEN."""
    data = batch()
    steps, compiled = {}, {}

    def add(label, name, aux=False, **fields):
        steps[label], compiled[label] = ours(name, data, aux, **fields)

    add("din", "din")
    add("din, dense adam", "din", optim__tables="dense")
    dien = {"net__attention": "din", "net__state": 2 * DIM, "net__pooled": "none"}
    add("dien", "dien", method__aux_weight=0.0, **dien)
    add(
        "dien, dense adam",
        "dien",
        method__aux_weight=0.0,
        optim__tables="dense",
        **dien,
    )
    add("dien, auxiliary loss", "dien", True, method__aux_weight=1.0, **dien)
    steps["peer din"] = peer("din", data)[0]
    steps["peer dien"] = peer("dien", data)[0]
    steps["peer dien, auxiliary loss"] = peer("dien", data, True)[0]
    times = measure_five(steps)

    def speedup(label):
        other = "peer " + label.replace(", dense adam", "")
        return times[other]["cpu_ms"] / times[label]["cpu_ms"]

    return {
        "times": times,
        "compile_seconds": compiled,
        "speedup_over_peer_cpu": {x: speedup(x) for x in compiled},
    }


def fuxictr(slots: int):
    """A training step of FuxiCTR's SIM, its own class."""
    import importlib.util
    from collections import OrderedDict

    import torch

    torch.set_num_threads(OPTIONS.threads)
    sys.path.insert(0, OPTIONS.fuxictr)
    from fuxictr.features import FeatureMap  # type: ignore[import-not-found]

    path = Path(OPTIONS.fuxictr) / "model_zoo" / "LongCTR" / "SIM" / "SIM.py"
    spec = importlib.util.spec_from_file_location("fuxictr_sim", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    features = FeatureMap("bench", "")
    features.labels, features.default_emb_dim, features.num_fields = ["label"], DIM, 3
    features.features = OrderedDict(
        (name, {"type": "categorical", "source": source, "vocab_size": size + 1})
        for name, source, size in (
            ("user", "user", USERS), ("item", "item", ITEMS), ("cate", "item", CATES)
        )
    )  # fmt: skip
    model = module.SIM(
        features, dnn_hidden_units=list(HIDDEN), attention_dim=64, num_heads=2,
        short_seq_len=50, topk=50, embedding_dim=DIM, learning_rate=1e-3,
        optimizer="adam", loss="binary_crossentropy", metrics=["AUC"], model_root="",
        verbose=0,
    )  # fmt: skip
    model._batch_index, model._max_gradient_norm = 0, 10.0
    draw = np.random.default_rng(0)

    def ids(count, size):
        return torch.from_numpy(draw.integers(1, count, size))

    label = torch.from_numpy(draw.integers(0, 2, BATCH).astype(np.float32))
    batch = (
        {"user": ids(USERS, BATCH), "label": label},
        # The candidate is the last of its row.
        {
            "item": ids(ITEMS, BATCH * (slots + 1)),
            "cate": ids(CATES, BATCH * (slots + 1)),
        },
        torch.ones(BATCH, slots),
    )
    return lambda: model.train_step(batch)


def lifelong() -> dict:
    """SIM with soft search in 500 behaviours, 50 of them found, beside FuxiCTR's.

    Attention of 2 x 32, both losses, the last 50 behaviours apart: FuxiCTR attends to
    them as to those that were found, ours has DIN's unit (80-40) there.
    """
    slots = 500
    step, seconds = ours(
        "sim", batch(slots), data__history=slots, net__search="soft", net__k=50,
        net__skip=0, net__chunk=0, net__gsu_dim=64, net__gsu_hidden=HIDDEN,
        net__gsu_pool="sum", net__heads=2, net__head_dim=32, net__time_dim=0,
        net__short=50, method__alpha=1.0, method__beta=1.0,
    )  # fmt: skip
    times = measure_five({"sim": step, "peer sim": fuxictr(slots)})
    return {
        "times": times,
        "compile_seconds": seconds,
        "speedup_over_peer_cpu": times["peer sim"]["cpu_ms"] / times["sim"]["cpu_ms"],
    }


def vocabulary() -> dict:
    """A step against the number of items in the table."""
    steps = {}
    for items in (10_000, 1_000_000):
        data = batch(items=10_000)
        steps[f"{items} items"] = ours("din", data, net__item_vocab=items)[0]
    times = measure(steps, REPETITIONS)
    small, large = (t["cpu_ms"] for t in times.values())
    return {"times": times, "ratio_cpu": large / small}


def length() -> dict:
    """A step of DIEN against the history's length."""
    steps = {
        f"{slots} slots": ours(
            "dien", batch(slots), method__aux_weight=0.0, net__state=2 * DIM
        )[0]
        for slots in (50, 200)
    }
    times = measure(steps, max(REPETITIONS // 3, 1))
    short, long = (t["cpu_ms"] for t in times.values())
    return {"times": times, "ratio_cpu": long / short}


def serving() -> dict:
    """Scores of 1,000 candidates for one user: one request."""
    count = 1000
    rng = np.random.default_rng(1)
    one = {k: v[:1] for k, v in batch(size=1).items() if not k.startswith("neg_")}
    item = rng.integers(2, ITEMS, (1, count)).astype(np.int32)
    cate = rng.integers(2, CATES, (1, count)).astype(np.int32)
    request = jax.tree.map(jnp.asarray, {**one, "item": item, "cate": cate})
    steps = {}
    for name, fields in (
        ("din", {}),
        (
            "dien",
            {"net__attention": "din", "net__state": 2 * DIM, "net__pooled": "none"},
        ),
    ):
        method = papers.load(name).make(config(name, **fields))
        state = jax.jit(method.init)(jax.random.key(0), one)
        score = jax.jit(method.predict)
        jax.block_until_ready(score(state.params, state.extra, request))

        def run(score=score, state=state):
            jax.block_until_ready(score(state.params, state.extra, request))

        steps[name] = run
        # The peer takes a row per candidate.
        rows = {k: np.repeat(v, count, 0) for k, v in one.items()}
        rows |= {"item": item[0], "cate": cate[0]}
        steps[f"peer {name}"] = peer(name, rows)[1]
    times = measure(steps, 5 * REPETITIONS)
    return {
        "times": times,
        "speedup_over_peer_wall": {
            n: times[f"peer {n}"]["wall_ms"] / times[n]["wall_ms"]
            for n in ("din", "dien")
        },
    }


def searching() -> dict:
    """Soft search in 54,000 behaviours, and the user behaviour tree."""
    size, slots, width, vocab, k = 8, 54_000, 32, 20_000, 200
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(2, vocab, (size, slots)), jnp.int32)
    table = search.pack(jax.random.normal(jax.random.key(0), (vocab, width)))
    query = jax.random.normal(jax.random.key(1), (size, width))
    lengths = jnp.full(size, slots, jnp.int32)
    find = jax.jit(lambda t, i, n, q: search.soft_search(((t, i),), n, q, k))
    memory = find.lower(table, ids, lengths, query).compile().memory_analysis()
    scores = jax.random.normal(jax.random.key(2), (size, slots))
    plain = jax.jit(lambda s: jax.lax.top_k(s, k))
    read = jax.jit(lambda s: s.sum())

    def query_tree(length):
        count = 8 * length
        tree = behaviour_tree.build_ubt(
            np.repeat(np.arange(8), length), rng.integers(2, vocab, count),
            rng.integers(2, 50, count), np.arange(count), users=8, cats=50,
        )  # fmt: skip
        tree = jax.tree.map(jnp.asarray, tree)
        users, cats = jnp.arange(8, dtype=jnp.int32), jnp.full(8, 7, jnp.int32)
        run = jax.jit(lambda t, u, c: behaviour_tree.ubt_query(t, u, c, k))
        return lambda: jax.block_until_ready(run(tree, users, cats))

    steps = {
        "soft search": lambda: jax.block_until_ready(find(table, ids, lengths, query)),
        "one top-k of ready scores": lambda: jax.block_until_ready(plain(scores)),
        "reading the scores once": lambda: jax.block_until_ready(read(scores)),
        "tree, histories of 1,000": query_tree(1000),
        "tree, histories of 54,000": query_tree(54_000),
    }
    for run in steps.values():
        run()
    times = measure(steps, 3 * REPETITIONS)
    tree = [times[n]["wall_ms"] for n in steps if n.startswith("tree")]
    inputs = ids.nbytes + table.nbytes
    return {
        "times": times,
        "bytes": {
            "ids": ids.nbytes, "projected table": table.nbytes,
            "temporaries": memory.temp_size_in_bytes,
        },
        "memory_to_bound": (inputs + memory.temp_size_in_bytes)
        / (1.5 * ids.nbytes + table.nbytes),
        "ratio_tree_long_to_short_wall": tree[1] / tree[0],
    }  # fmt: skip


def evaluation() -> dict:
    """GAUC of a million rows of 100,000 users against a pandas group-by."""
    import pandas as pd

    rng = np.random.default_rng(0)
    count, users = 1_000_000, 100_000
    user = rng.integers(0, users, count)
    label = (rng.random(count) < 0.3).astype(np.int64)
    score = np.round(rng.random(count), 3)  # With ties.
    frame = pd.DataFrame({"user": user, "label": label, "score": score})
    found = {}

    def own(group):
        positive = group.label.sum()
        negative = len(group) - positive
        if not positive or not negative:
            return np.nan
        ranks = group.score.rank()[group.label == 1].sum()
        return (ranks - positive * (positive + 1) / 2) / (positive * negative)

    def grouped():
        by = frame.groupby("user")
        auc, size = by.apply(own, include_groups=False), by.size()
        keep = auc.notna()
        found["pandas"] = float((auc * size)[keep].sum() / size[keep].sum())

    def vectorised():
        found["ours"] = float(ranking.gauc(user, label, score))

    times = measure(
        {"ours": vectorised, "pandas group-by": grouped}, 3, ("pandas group-by",)
    )
    return {
        "times": times,
        "values": found,
        "speedup_wall": times["pandas group-by"]["wall_ms"] / times["ours"]["wall_ms"],
    }


PARTS = {
    "training": training, "lifelong": lifelong, "vocabulary": vocabulary,
    "length": length,
    "serving": serving, "searching": searching, "evaluation": evaluation,
}  # fmt: skip


def main() -> None:
    """Measures every part and writes it."""
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "deepctr-torch", "pandas")
    command = f"python benchmarks/ctr_step.py --threads {OPTIONS.threads}"
    result = json.loads(OUT.read_text()) if OUT.exists() else {}
    result |= {**header(command, *packages), "threads": OPTIONS.threads}
    for name, part in PARTS.items():
        if OPTIONS.only not in name or (name == "lifelong" and not OPTIONS.fuxictr):
            continue
        result[name] = part()
        print(name)
        for label, t in result[name]["times"].items():
            print(
                f"  {label:<28} cpu {t['cpu_ms']:9.2f} ms  wall {t['wall_ms']:9.2f} ms"
            )
        for key, value in result[name].items():
            if key != "times":
                print(f"  {key}: {value}")
        sys.stdout.flush()
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
