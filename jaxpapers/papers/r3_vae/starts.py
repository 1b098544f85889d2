"""On the host: SIDs of a catalogue by any tokenizer, k-means starts, dead codes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers.method import State
from jaxpapers.ops import kmeans
from jaxpapers.ops import vector_quantization as ops
from jaxpapers.papers.r3_vae import tokenizer as tok
from jaxpapers.papers.r3_vae.options import Retrieval, Tokenizer
from jaxpapers.papers.r3_vae.tokenizer import Quantized, check_vectors


@functools.partial(jax.jit, static_argnames="options")
def _quantize(params, extra, x, options):
    return tok.quantize(params, extra, x, options)


def quantized(
    params: dict, extra: Any, x: Any, options: Tokenizer, rows: int = 4096
) -> Quantized:
    """All items through ``tokenizer.quantize``, some rows at a time; NumPy arrays.

    ``penalty`` is the mean over the parts, ``hard`` of ``top1`` and ``mp`` the one of
    each part's mean ratings.
    """
    x = check_vectors(x)
    parts = []
    for start in range(0, len(x), rows):
        part = _quantize(params, extra, x[start : start + rows], options)
        parts.append(jax.device_get(part))
    penalty = np.mean([p.penalty for p in parts])
    joined = jax.tree.map(
        lambda *leaves: np.concatenate(leaves) if np.ndim(leaves[0]) else 0.0, *parts
    )
    return joined._replace(penalty=penalty)


def decoded(
    params: dict, found: Quantized, options: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Item vectors from quantised items: with all that is known, and by codes alone."""
    decode = jax.jit(tok.decode, static_argnames="options")
    soft, hard = (
        decode(params, found.alpha, q, options) for q in (found.q, found.hard)
    )
    return np.asarray(soft), np.asarray(hard)


def start(state: State, x: Any, options: Tokenizer, key: Any) -> State:
    """A state whose codes are k-means of the residuals, and r the mean item.

    Args:
      state: of the tokenizer's method, before its first step.
      x: item vectors.
      options: of the quantiser; with ``start="random"`` the state stays.
      key: of k-means.
    """
    if options.start == "random" or options.quantizer == "fsq":
        return state
    x = jnp.asarray(check_vectors(x))
    params = dict(jax.device_get(state.params))
    if options.reference:
        params["r"] = x.mean(0)
    how = kmeans.Options(restarts=options.restarts, balanced=options.balanced)
    _, e = jax.jit(tok.encode, static_argnames="options")(params, x, options)
    books = []
    for level in range(options.levels):
        own = jax.random.fold_in(key, level)
        books.append(kmeans.kmeans(own, e, options.codes, how).centres)
        e = _after(e, books[-1], options)
    codes = jnp.stack(books)
    extra = state.extra
    if options.quantizer == "ema":
        extra = ops.ema_start(codes)
    elif options.quantizer == "simvq":
        extra = codes
    else:
        params["codebook"] = codes
    return state._replace(params=params, extra=extra)


@functools.partial(jax.jit, static_argnames="options")
def _after(e, codes, options):
    return e - tok.choose(e, codes, options)[0].value


def revive(state: State, x: Any, options: Tokenizer, key: Any) -> tuple[State, int]:
    """Codes that no item has become residuals of random items.

    Args:
      state: of the tokenizer's method.
      x: item vectors.
      options: of the quantiser.
      key: of the choice.

    Returns:
      The state, and the number of codes that were replaced.
    """
    if options.quantizer == "fsq":
        return state, 0
    found = quantized(state.params, state.extra, x, options)
    books = tok.codebooks(state.params, state.extra, options)
    codes = np.array(jax.device_get(books))
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (2,))).tolist())
    dead = np.zeros(codes.shape[:2], bool)
    for level in range(options.levels):
        counts = np.bincount(found.sid[:, level], minlength=options.codes)
        dead[level] = counts == 0
        # Two codes of one place would tie, and the second stay dead.
        count, n = int(dead[level].sum()), len(found.sid)
        rows = rng.choice(n, count, replace=count > n)
        codes[level, dead[level]] = found.residuals[rows, level]
    params, extra = dict(state.params), state.extra
    if options.quantizer == "ema":
        counts = np.where(dead, 1.0, extra.counts).astype(np.float32)
        extra = ops.EMA(jnp.asarray(counts), jnp.asarray(counts[..., None] * codes))
    elif options.quantizer == "simvq":
        mix = np.linalg.pinv(np.asarray(params["mix"], np.float64))
        fixed = np.einsum("lkd,lde->lke", codes, mix).astype(np.float32)
        extra = jnp.where(dead[..., None], fixed, extra)
    else:
        params["codebook"] = jnp.asarray(codes)
    return state._replace(params=params, extra=extra), int(dead.sum())


def assign(
    key: Any,
    x: Any,
    tokenizer: Tokenizer,
    options: Retrieval,
    trained: dict | None = None,
) -> tuple[Any, Any, Any]:
    """SIDs of a catalogue before collisions, by the tokenizer that ``source`` names.

    Args:
      key: of k-means and random codes.
      x: item vectors (N, d).
      tokenizer: levels and codes, of all sources.
      options: the source.
      trained: {"params", "extra"} of a trained tokenizer, for ``source="trained"``.

    Returns:
      SIDs (N, L), quantised vectors (N, D), and preferences (N, K) among the codes of the
      last level, None where any is as good.
    """
    x = check_vectors(x)
    if options.source == "item":
        return np.arange(len(x), dtype=np.int32)[:, None], x, None
    levels, codes = tokenizer.levels, tokenizer.codes
    if options.source == "random":
        sid = jax.random.randint(key, (len(x), levels), 0, codes, jnp.int32)
        return np.asarray(sid), x, None
    if options.source == "trained":
        if trained is None:
            raise ValueError(
                "method.source=trained needs a trained tokenizer, got none"
            )
        found = quantized(trained["params"], trained["extra"], x, tokenizer)
        return found.sid, found.q, found.preference
    balanced = options.source == "rq_kmeans_balanced"
    how = kmeans.Options(restarts=options.restarts, balanced=balanced)
    product = options.source == "pq_kmeans"
    split = kmeans.product_kmeans if product else kmeans.residual_kmeans
    books, sid = jax.device_get(split(key, x, levels, codes, how))
    q = sum(books[i][sid[:, i]] for i in range(levels))
    last = x - (q - books[-1][sid[:, -1]])
    distance = np.square(books[-1]).sum(1)[None] - 2 * last @ books[-1].T
    return sid, q, -distance
