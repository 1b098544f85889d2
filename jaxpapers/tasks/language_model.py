"""Next-token prediction on a token stream, measured in bits per byte."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.data import text
from jaxpapers.papers import dion
from jaxpapers.study import Data, Finding, Row, Stage, Study, with_fields, with_seed
from jaxpapers.tasks.scores import all_finite

COMPRESSORS = ("order0", "gzip", "xz")  # Of ``text.baselines``.


def abstract(config: Any) -> Data:
    """Shapes of a global training batch."""
    c = config.data
    tokens = jax.ShapeDtypeStruct((c.batch, c.context + 1), jnp.int32)
    return Data(None, {"tokens": tokens})


def read(config: Any) -> Data:
    """Windows of the training text that ``config.data`` names.

    Raises:
      ValueError: a vocabulary too small for bytes and a separator.
    """
    c, corpus = config.data, _corpus(config)
    unit = "bytes" if corpus.byte_level else "tokens"
    sizes = [sum(len(s) for s in split) / 1e6 for split in corpus[1:3]]
    return abstract(config)._replace(
        examples=text.Windows(corpus.train, c.context, c.seed, config.net.vocab_size),
        work=c.context,
        unit=unit,
        summary=f"{corpus.name}: {sizes[0]:.2f} M {unit} to train on, "
        f"{sizes[1]:.2f} M to validate" + (f"; {corpus.notes}" if corpus.notes else ""),
    )


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The model beside general compressors of the same bytes.

    The number is the total code length of every validation token, document ends included,
    divided by the number of bytes (or of tokens, for token shards): the rate of an ideal
    compressor driven by the model. Each is scored once, after ``data.overlap`` of a
    window at least, which may begin in the document before.
    """
    del name  # Only dion has this task.
    meshes.batch_rows(mesh, config.data.eval_batch, name="data.eval_batch")
    if not 0 <= config.data.overlap < 1:
        raise ValueError(
            f"config.data.overlap must be in [0, 1), got {config.data.overlap}: it is "
            "the share of a window that stands before what is scored"
        )
    corpus, unit = _corpus(config), data.unit.rstrip("s")
    bits = functools.partial(_bits, config, corpus, mesh)

    def measure(method, state):
        return Finding({"bits": bits(method, state, corpus.validation)})

    def watch(method, state):
        return {
            "bits_quick": bits(method, state, _first(corpus, config.data.quick_tokens))
        }

    @functools.cache
    def compressors():
        return text.baselines(np.concatenate(corpus.validation))

    def compressor(name):
        return Row(name, None, lambda: Finding({"bits": compressors()[name]}))

    def rows(seed):
        model = Row(
            "this model", _stages(with_seed(config, seed)), measure, watch=watch
        )
        names = COMPRESSORS if corpus.byte_level else ()
        return [model, *map(compressor, names)]

    return Study(
        title=f"validation, bits per {unit}",
        metric="bits",
        rising=False,
        rows=rows,
        curve="bits",
        unit=f"bits per {unit}",
        sample=_sample if corpus.byte_level else None,
    )


def _stages(config: Any) -> Stage:
    """The run, in as many parts as it has ranks.

    A rank is a shape, so a schedule of ranks is a sequence of programs: each goes on from
    the checkpoint of the one before it, its Q resized (``optim.resize``).
    """
    stage = None
    for last, fraction in dion.rank_schedule(config):
        part = with_fields(config, {"optim.rank_fraction": fraction})
        stage = Stage("dion", part, stage, continues=stage is not None, until=last)
    assert stage is not None
    return stage


def _corpus(config: Any) -> text.Corpus:
    c, vocab_size = config.data, config.net.vocab_size
    corpus = _load(c.path, c.validation_fraction)
    if corpus.byte_level and vocab_size <= text.SEPARATOR:
        raise ValueError(
            f"config.net.vocab_size={vocab_size} is too small for bytes and a separator; "
            f"pass --config.net.vocab_size={text.VOCAB_SIZE}"
        )
    text.check_tokens(corpus, vocab_size)
    return corpus


@functools.lru_cache(maxsize=1)
def _load(path: str, validation_fraction: float) -> text.Corpus:
    return text.load(path or None, validation_fraction=validation_fraction)


def _first(corpus, tokens):
    """About the first ``tokens`` of the validation streams; 0: all."""
    streams = corpus.validation
    each = max(tokens // len(streams), 1)
    return [s[:each] for s in streams] if tokens else streams


def _bits(config, corpus, mesh, method, state, streams) -> float:
    """Code length of the streams in bits, per byte or token of them."""
    c = config.data
    size = c.eval_batch
    rows = meshes.batch_rows(mesh, size, name="data.eval_batch")
    nats = _code_length(method.loss)
    total, newest = [], None
    with jax.set_mesh(mesh):
        for batch in text.score_windows(streams, c.context, size, c.overlap):
            local = jax.tree.map(lambda x: x[rows], batch)
            placed = meshes.put_batch(local, mesh, size)
            last, newest = newest, nats(state.params, placed)
            # Two in flight keep the devices busy. Without a limit the programs of
            # several devices of one CPU wait for each other's threads, for ever.
            if last is not None:
                total.append(float(last))
    total += [] if newest is None else [float(newest)]
    all_finite(np.array(total), f"code lengths of batches of {size} windows")
    count = sum(
        int((s < text.SEPARATOR).sum()) if corpus.byte_level else len(s)
        for s in streams
    )
    return text.bits_per_byte(math.fsum(total), count)


@functools.lru_cache(maxsize=4)
def _code_length(loss: Callable) -> Callable:
    """(params, batch) -> nats of the batch's targets, compiled once per model."""

    @jax.jit
    def nats(params, batch):
        value, metrics = loss(params, batch, jax.random.key(0))
        return value * metrics["weight"]

    return nats


def _sample(method, state, key, prompt, length, temperature) -> str:
    """The model's continuation of a prompt."""
    tokens = jnp.asarray(text.encode(prompt.encode()), jnp.int32)
    prefix = jnp.full((1,), text.SEPARATOR, jnp.int32)
    draw = jax.jit(
        functools.partial(
            method.sampler, length=length, temperature=temperature, vocab_size=256
        )
    )
    tokens = draw(state.params, key, jnp.concatenate([prefix, tokens])[None])
    return text.decode(np.asarray(tokens[0])).decode("utf-8", "replace")
