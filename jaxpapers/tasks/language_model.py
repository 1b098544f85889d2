"""Next-token prediction on a token stream, measured in bits per byte."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.data import text
from jaxpapers.tasks import Task


def batch_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global training batch."""
    c = config.data
    return {"tokens": jax.ShapeDtypeStruct((c.batch, c.context + 1), jnp.int32)}


def load(config: Any, method: Any, mesh: Any) -> Task:
    """Reads ``config.data`` and binds the evaluation to a method and mesh.

    The validation number is the total code length of every validation token, document
    ends included, divided by the number of bytes (or of tokens, for token shards): what a
    compressor driven by the model would reach.
    """
    c = config.data
    corpus = text.load(c.path or None, validation_fraction=c.validation_fraction)
    vocab_size = config.net.vocab_size
    if corpus.byte_level and vocab_size <= text.SEPARATOR:
        raise ValueError(
            f"config.net.vocab_size={vocab_size} is too small for bytes and a separator; "
            f"pass --config.net.vocab_size={text.VOCAB_SIZE}"
        )
    examples = text.Windows(corpus.train, c.context, c.seed, vocab_size)
    size = c.eval_batch
    rows = meshes.batch_rows(mesh, size, name="data.eval_batch")
    unit = "bytes" if corpus.byte_level else "tokens"

    def baselines():
        if not corpus.byte_level:
            return {}
        return text.baselines(np.concatenate(corpus.validation))

    @jax.jit
    def nats(params, batch):
        value, metrics = method.loss(params, batch, jax.random.key(0))
        return value * metrics["weight"]

    def evaluate(state, quick=False):
        streams = corpus.validation
        if quick and c.quick_tokens:
            streams = [s[: max(c.quick_tokens // len(streams), 1)] for s in streams]
        count = sum(int((s < text.SEPARATOR).sum()) if corpus.byte_level else len(s)
                    for s in streams)  # fmt: skip
        total, newest = [], None
        with jax.set_mesh(mesh):
            for batch in text.score_windows(streams, c.context, size):
                local = jax.tree.map(lambda x: x[rows], batch)
                last, newest = (
                    newest,
                    nats(state.params, meshes.put_batch(local, mesh, size)),
                )
                # Two in flight keep the devices busy. Without a limit the programs of
                # several devices of one CPU wait for each other's threads, for ever.
                if last is not None:
                    total.append(float(last))
        total += [] if newest is None else [float(newest)]
        bits = text.bits_per_byte(math.fsum(total), count)
        name = "validation_bits_quick" if quick else "validation_bits"
        return {name: bits}

    def sample(params, key, prompt, length, temperature):
        tokens = jnp.asarray(text.encode(prompt.encode()), jnp.int32)
        prefix = jnp.full((1,), text.SEPARATOR, jnp.int32)
        draw = jax.jit(
            lambda params, key, tokens: method.sampler(
                params,
                key,
                tokens,
                length=length,
                temperature=temperature,
                vocab_size=256,
            )
        )
        drawn = draw(params, key, jnp.concatenate([prefix, tokens])[None])
        return text.decode(np.asarray(drawn[0])).decode("utf-8", "replace")

    sizes = [sum(len(s) for s in split) / 1e6 for split in corpus[1:3]]
    return Task(
        examples,
        c.context,
        unit,
        "bits",
        f"validation, bits per {unit.rstrip('s')}",
        evaluate,
        baselines,
        sample if corpus.byte_level else None,
        f"{corpus.name}: {sizes[0]:.2f} M {unit} to train on, "
        f"{sizes[1]:.2f} M to validate",
        curve="bits",
    )
