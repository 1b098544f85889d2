"""Tokens per second of SmolLM2-135M: greedy decoding and scoring, beside transformers.

    pip install 'jaxpapers[language]' torch transformers
    taskset -c 0 python benchmarks/language_model.py     downloads the model once (93 MB)

Both have the same weights in float32: transformers reads the folder that ``weights.save``
writes. One thread each, the same process, in turn. PyTorch decodes by ``generate`` and by
a loop around the model with its cache, and the faster one is compared. llama.cpp, on the
4-bit file itself, is measured if ``llama-cpp-python`` is installed. Writes
results/language_model.json beside this.
"""

import functools
import json
import os
import tempfile
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
import torch  # noqa: E402
import transformers  # noqa: E402
from timing import header, measure  # noqa: E402

from jaxpapers.data import fetch, tokenizer, weights  # noqa: E402
from jaxpapers.nets import decoding  # noqa: E402
from jaxpapers.nets.transformer import Transformer  # noqa: E402

OUT = Path(__file__).parent / "results" / "language_model.json"
TEXT = "The capital of France is"
LENGTH, ROWS, POSITIONS, REPETITIONS = 24, 4, 128, 3


def ours(model: weights.Weights, prompt: np.ndarray, texts: np.ndarray):
    """Decoding and scoring as functions without arguments, and compile seconds."""
    net = Transformer(**model.net)
    each = jax.tree.map(jnp.asarray, decoding.unstacked(net, model.params))
    began = time.perf_counter()
    options = decoding.Options(length=LENGTH)
    generate = functools.partial(decoding.generate, net, options=options)
    decode = jax.jit(generate).lower(each, jnp.asarray(prompt)).compile()
    seconds = {"decoding": time.perf_counter() - began}
    began = time.perf_counter()
    score = jax.jit(functools.partial(decoding.token_log_probs, net))
    score = score.lower(each, jnp.asarray(texts)).compile()
    seconds["scoring"] = time.perf_counter() - began
    return (
        lambda: np.asarray(decode(each, jnp.asarray(prompt)).tokens),
        lambda: np.asarray(score(each, jnp.asarray(texts))),
        seconds,
    )


def in_torch(folder: str, prompt: np.ndarray, texts: np.ndarray):
    """The same of transformers: two ways of decoding, and scoring."""
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, rows = torch.tensor(prompt).long(), torch.tensor(texts).long()

    @torch.inference_mode()
    def by_generate():
        y = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=LENGTH, min_new_tokens=LENGTH,
                           pad_token_id=0)  # fmt: skip
        return y[:, ids.shape[1] :].numpy()

    @torch.inference_mode()
    def by_loop():
        y, tokens = model(ids, use_cache=True, logits_to_keep=1), []
        for i in range(LENGTH):
            tokens.append(y.logits[:, -1].argmax(-1, keepdim=True))
            if i < LENGTH - 1:
                y = model(tokens[-1], cache=y.past_key_values, use_cache=True)
        return torch.cat(tokens, 1).numpy()

    @torch.inference_mode()
    def score():
        logits = model(rows[:, :-1], use_cache=False).logits
        logits = torch.log_softmax(logits, -1)
        return logits.gather(-1, rows[:, 1:, None])[..., 0].numpy()

    return by_generate, by_loop, score


def in_llama_cpp(file: Path, prompt: np.ndarray):
    """Greedy decoding of the 4-bit file by llama.cpp, or None where it is missing."""
    try:
        from llama_cpp import Llama
    except ImportError as error:
        print(f"without llama.cpp: {error}")
        return None
    model = Llama(str(file), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)

    def decode():
        model.reset()
        stream = model.generate(prompt[0].tolist(), temp=0.0, repeat_penalty=1.0)
        return [token for _, token in zip(range(LENGTH), stream)]

    return decode


def main() -> None:
    """Measures, prints and writes."""
    command = "taskset -c 0 python benchmarks/language_model.py"
    result = header(
        command, "jax", "jaxlib", "numpy", "torch", "transformers", "llama-cpp-python"
    )
    source = fetch.get("smollm2-135m")
    model, tok = weights.load(source), tokenizer.load(source)
    prompt = np.int32([tok.encode(TEXT)])
    texts = np.random.default_rng(0).integers(0, 49152, (ROWS, POSITIONS + 1))
    decode, score, seconds = ours(model, prompt, texts.astype(np.int32))
    with tempfile.TemporaryDirectory() as folder:
        weights.save(folder, model.net, model.params)
        by_generate, by_loop, torch_score = in_torch(folder, prompt, texts)
    steps = {"jaxpapers": decode, "generate": by_generate, "loop": by_loop}
    llama = in_llama_cpp(next(source.glob("*.gguf")), prompt)
    if llama:
        steps["llama.cpp, 4 bits"] = llama
    tokens = {name: run() for name, run in steps.items()}
    same = float((tokens["jaxpapers"] == tokens["loop"]).mean())
    scores = {"jaxpapers": score, "transformers": torch_score}
    values = {name: run() for name, run in scores.items()}
    result["same_tokens"] = same
    result["largest_difference_of_log_probs"] = float(
        np.abs(values["jaxpapers"] - values["transformers"]).max()
    )
    result["compile_seconds"] = seconds
    result["sizes"] = {"prompt": prompt.shape[1], "tokens": LENGTH,
                       "scored": ROWS * POSITIONS}  # fmt: skip
    for name, runs, count in (("decoding", steps, LENGTH),
                              ("scoring", scores, ROWS * POSITIONS)):  # fmt: skip
        times = measure(runs, REPETITIONS)
        rates = {k: 1000 * count / t["cpu_ms"] for k, t in times.items()}
        peers = [
            v for k, v in rates.items() if k in ("generate", "loop", "transformers")
        ]
        result[name] = {
            "times": times,
            "tokens_per_cpu_second": rates,
            "times_transformers": rates["jaxpapers"] / max(peers),
        }
    result["load"] = os.getloadavg()[0]
    print(json.dumps(result, indent=1))
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
