"""A training step and a scoring pass of a process reward model, beside transformers.

    pip install 'jaxpapers[bench]' torch transformers
    python benchmarks/process_rewards.py       three minutes

The same decoder (Llama's form) with the same weights in both, one row a sequence: forward
and backward to the loss on two columns of the head and AdamW, and the scores of all
steps without gradients. transformers computes hidden states by ``LlamaModel``, so that
neither side forms the logits of the whole vocabulary; "all logits" is the way of the
authors' code, by ``LlamaForCausalLM``. One thread each, the same process, in turn.
Compilation is timed apart. Writes results/process_rewards.json beside this.
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
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
from timing import header, measure  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from jaxpapers.papers import versaprm  # noqa: E402

OUT = Path(__file__).parent / "results" / "process_rewards.json"
LR, DECAY = 1e-4, 0.01
# Name -> width, layers, heads, hidden, vocabulary, rows, length, repetitions.
SIZES = {
    "width 64, 200 words": (64, 3, 4, 192, 200, 32, 80, 9),
    "width 256, 32k words": (256, 4, 8, 704, 32_000, 4, 128, 5),
}


def batch_of(vocab: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Random sequences with a separator and a label at every tenth token."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, vocab, (rows, length)).astype(np.int32)
    labels = np.full((rows, length), -100, np.float32)
    ids[:, 9::10] = 2
    labels[:, 9::10] = rng.integers(0, 2, labels[:, 9::10].shape)
    return {"ids": ids, "labels": labels, "segments": np.ones_like(ids)}


def in_torch(params: dict, net: versaprm.Net) -> LlamaForCausalLM:
    """The same model in transformers, with the same weights."""
    module = net.module
    config = LlamaConfig(
        vocab_size=net.vocab_size, hidden_size=net.width,
        num_hidden_layers=net.layers, num_attention_heads=net.heads,
        num_key_value_heads=module.sizes()[0], intermediate_size=module.sizes()[2],
        rms_norm_eps=net.epsilon, rope_theta=net.rope_theta, tie_word_embeddings=False,
        attention_bias=False, mlp_bias=False, hidden_act="silu",
        max_position_embeddings=512,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tree = jax.device_get(params["decoder"])
    layers, state = tree["layers"], {}
    names = {
        "self_attn.q_proj": ("attention", "query"),
        "self_attn.k_proj": ("attention", "key"),
        "self_attn.v_proj": ("attention", "value"),
        "self_attn.o_proj": ("attention", "out"),
        "mlp.gate_proj": ("mlp", "gate"),
        "mlp.up_proj": ("mlp", "up"),
        "mlp.down_proj": ("mlp", "down"),
    }
    for i in range(net.layers):
        at = f"model.layers.{i}."
        for name, (part, ours) in names.items():
            state[f"{at}{name}.weight"] = layers[part][ours]["kernel"][i].T
        for name, ours in (("input_layernorm", "attention_norm"),
                           ("post_attention_layernorm", "mlp_norm")):  # fmt: skip
            state[f"{at}{name}.weight"] = layers[ours]["scale"][i]
    state["model.embed_tokens.weight"] = tree["embed"]["embedding"]
    state["model.norm.weight"] = tree["norm"]["scale"]
    state["lm_head.weight"] = tree["head"]["kernel"].T
    tensors = {k: torch.tensor(np.array(v)) for k, v in state.items()}
    model.load_state_dict(tensors)
    return model


def functions(size: tuple) -> tuple[dict, dict, dict]:
    """Name -> a step or pass of each, seconds of compilation, and both losses."""
    width, layers, heads, hidden, vocab, rows, length, _ = size
    net = versaprm.Net(
        vocab_size=vocab, width=width, layers=layers, heads=heads, hidden=hidden,
        init_std=0.05, unroll=layers,
    )  # fmt: skip
    batch = batch_of(vocab, rows, length)
    params = jax.jit(functools.partial(versaprm.init, net=net))(jax.random.key(0))
    frozen = jax.tree.map(np.asarray, params)
    tx = optax.adamw(LR, weight_decay=DECAY)

    def update(params, state, batch):
        grad = jax.grad(versaprm.loss, has_aux=True)
        grads, _ = grad(params, batch, net=net)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    held = [jax.tree.map(jnp.array, frozen), jax.jit(tx.init)(frozen)]
    compiled = {}

    def build(name, f, *args):
        began = time.perf_counter()
        program = f.lower(*args).compile()
        compiled[name] = time.perf_counter() - began
        return program

    step = build("training step", jax.jit(update, donate_argnums=(0, 1)), *held, batch)
    steps = length // 10
    score = functools.partial(versaprm.step_scores, net=net, steps=steps)
    score = build("scoring", jax.jit(score), frozen, batch["ids"], batch["segments"])
    loss = jax.jit(functools.partial(versaprm.loss, net=net))(frozen, batch)[0]

    model = in_torch(frozen, net)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY)
    ids, labels = torch.tensor(batch["ids"]).long(), torch.tensor(batch["labels"])
    at = labels >= 0
    both = torch.tensor([net.minus, net.plus])

    def two_columns():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[at] @ model.lm_head.weight[both].T

    def all_logits():
        return model(input_ids=ids, use_cache=False).logits[at][:, both]

    def torch_loss(logits):
        return torch.nn.functional.cross_entropy(logits, labels[at].long())

    def ours():
        held[:] = step(*held, batch)
        jax.block_until_ready(held)

    def theirs(logits):
        optimizer.zero_grad(set_to_none=True)
        torch_loss(logits()).backward()
        optimizer.step()

    def torch_scores():
        with torch.no_grad():
            torch.softmax(two_columns(), -1)

    with torch.no_grad():
        losses = {"ours": float(loss), "transformers": float(torch_loss(all_logits()))}
    if abs(losses["ours"] - losses["transformers"]) > 1e-4 * losses["ours"]:
        raise RuntimeError(f"the two models differ: {losses}")
    return (
        {
            "training step": ours,
            "training step, transformers": lambda: theirs(two_columns),
            "training step, transformers, all logits": lambda: theirs(all_logits),
            "scoring": lambda: jax.block_until_ready(
                score(frozen, batch["ids"], batch["segments"])
            ),
            "scoring, transformers": torch_scores,
        },
        compiled,
        losses,
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    result = header(
        "taskset -c 1 python benchmarks/process_rewards.py",
        "jax",
        "jaxlib",
        "torch",
        "transformers",
    )
    for name, size in SIZES.items():
        steps, compiled, losses = functions(size)
        for run in steps.values():
            run()
        times = measure(steps, size[-1])
        tokens = size[5] * size[6]
        result[name] = {
            "tokens": tokens,
            "times": times,
            "tokens_per_cpu_second": {
                k: 1000 * tokens / v["cpu_ms"] for k, v in times.items()
            },
            "compile_seconds": compiled,
            "losses": losses,
            "speedup": {
                k: times[f"{k}, transformers"]["cpu_ms"] / times[k]["cpu_ms"]
                for k in compiled
            },
        }
        for k, values in times.items():
            print(f"{name}: {k:40s} {values['cpu_ms']:8.1f} CPU ms")
        print(f"{name}: ours is {result[name]['speedup']} times as fast; {losses}")
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
