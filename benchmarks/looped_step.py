"""A training step of the looped transformer, and its loops, beside the same in PyTorch.

    pip install 'jaxpapers[bench]' torch
    python benchmarks/looped_step.py     two minutes
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/looped_step.py --out=FILE

Parity with one block: forward and backward through T = n steps and AdamW, 64 problems,
at once and in parts (``train.accumulate``); and every step's logits (``forward_all``)
without gradients. One thread each, the same process, in turn. Compilation is timed apart.
Without huge pages a tenth of a step's time is the kernel's, which hands over and zeroes
the step's temporary memory page by page. Writes results/looped_step.json beside this.
"""

import argparse
import functools
import json
import os
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
from timing import header, measure  # noqa: E402
from torch.nn import functional  # noqa: E402

from jaxpapers.ops import algorithmic, micro_batches  # noqa: E402
from jaxpapers.papers import looped_transformer as looped  # noqa: E402

OUT = Path(__file__).parent / "results" / "looped_step.json"
BATCH, REPETITIONS, PARTS = 64, 9, 4
SIZES = {"width 128, n 10": (128, 4, 10), "width 256, n 20": (256, 8, 20)}


class Block(torch.nn.Module):
    """The looped block, its final norm, embedding and head."""

    def __init__(self, vocab: int, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.embed = torch.nn.Embedding(vocab, width)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(3))
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)
        self.head = torch.nn.Linear(width, vocab, bias=False)

    def step(self, h, e):
        """h_t of h_{t-1} and the embedded input."""
        z = h + e
        rows, length, width = z.shape
        shape = (rows, length, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norms[0](z)).view(shape).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = z + self.out(y.transpose(1, 2).reshape(z.shape))
        y = functional.gelu(self.up(self.norms[1](z)), approximate="tanh")
        return self.norms[2](z + self.down(y))

    def forward(self, tokens, steps: int, every: bool = False):
        """Logits of the last step, or of all."""
        e = self.embed(tokens)
        h, found = torch.zeros_like(e), []
        for _ in range(steps):
            h = self.step(h, e)
            found += [self.head(h)] if every else []
        return torch.stack(found) if every else self.head(h)


def train(step, held: list, batch) -> None:
    """One step of ours, from and to the parameters and the state that are held."""
    held[:] = step(*held, batch)
    jax.block_until_ready(held)


def functions(width: int, heads: int, n: int) -> tuple[dict, dict]:
    """Name -> a step or a pass of each, and compilation seconds of ours."""
    net = looped.Net(width=width, heads=heads)
    problem = algorithmic.draw("parity", jax.random.key(0), n, BATCH)
    batch = jax.device_get(algorithmic.lay_out(problem))
    tx = optax.adamw(1e-4, weight_decay=0.01)
    params = jax.jit(functools.partial(looped.init, net=net))(jax.random.key(0))
    buckets = ((n, n + 2),)

    def loss(params, extra, batch, key):
        value, metrics = looped.loss(params, batch, key, net=net, buckets=buckets)
        return value, (metrics, extra)

    def update(params, state, batch, parts):
        compute = micro_batches.value_and_grad(loss, parts)
        grads, _, _ = compute(params, (), batch, jax.random.key(0))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled, trained = {}, {}
    frozen = jax.tree.map(np.asarray, params)
    for name, parts in (("training step", 1), (f"{PARTS} parts", PARTS)):
        held = [jax.tree.map(jax.numpy.array, frozen), jax.jit(tx.init)(frozen)]
        step = jax.jit(functools.partial(update, parts=parts), donate_argnums=(0, 1))
        began = time.perf_counter()
        step = step.lower(*held, batch).compile()
        compiled[name] = time.perf_counter() - began
        trained[name] = functools.partial(train, step, held, batch)
    loops = jax.jit(lambda p, x: looped.forward_all(p, x, n, net=net))
    began = time.perf_counter()
    loops = loops.lower(frozen, batch["tokens"]).compile()
    compiled["forward_all"] = time.perf_counter() - began
    model = Block(net.vocab_size, width, heads)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.01)
    tokens, targets = (torch.tensor(batch[k]).long() for k in ("tokens", "targets"))
    counted = torch.tensor(batch["weights"]) > 0

    def torch_train():
        optimizer.zero_grad(set_to_none=True)
        logits = model(tokens, n)
        functional.cross_entropy(logits[counted], targets[counted]).backward()
        optimizer.step()

    def torch_loops():
        with torch.no_grad():
            model(tokens, n, every=True)

    return {
        **trained,
        "training step, PyTorch": torch_train,
        "forward_all": lambda: jax.block_until_ready(loops(frozen, batch["tokens"])),
        "forward_all, PyTorch": torch_loops,
    }, compiled


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    result = header("python benchmarks/looped_step.py", "jax", "jaxlib", "torch")
    result["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", "")
    for size, (width, heads, n) in SIZES.items():
        steps, compiled = functions(width, heads, n)
        for run in steps.values():
            run()
        times = measure(steps, REPETITIONS)
        peers = dict.fromkeys(compiled, "training step, PyTorch")
        peers["forward_all"] = "forward_all, PyTorch"
        ratio = {
            name: times[name]["cpu_ms"] / times[peer]["cpu_ms"]
            for name, peer in peers.items()
        }
        loops = {
            name: 1000 * n / times[name]["cpu_ms"] for name in times if "all" in name
        }
        result[size] = {
            "times": times,
            "compile_seconds": compiled,
            "cpu_ratio": ratio,
            "loops_per_cpu_second": loops,
        }
        for name, values in times.items():
            print(f"{size}: {name:24s} {values['cpu_ms']:8.1f} CPU ms")
        print(f"{size}: ratios {ratio}, loops per CPU second {loops}")
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
