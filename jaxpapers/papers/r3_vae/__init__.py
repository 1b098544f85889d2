r"""R3-VAE: semantic IDs by reference-vector-guided rating residual quantisation.

Qiang Wan, Ze Yang, Dawei Yang, Ying Fan, Xin Yan, Siyang Liu. "R3-VAE: Reference
Vector-Guided Rating Residual Quantization VAE for Generative Recommendation", arXiv
2604.11440, 2026.

**This is a reconstruction.** The paper's text and its authors' code were not at hand; the
equations are those on which two public transcriptions agree. Results say nothing about
the authors' implementation.

A content vector x of each item becomes a short tuple of codes, its semantic ID (SID), and
a sequence model generates the SID of the next item. Instead of the hard nearest code and
the straight-through gradient of RQ-VAE, codes are rated by their cosine and their mean by
these ratings is taken off, level by level, after the component along one learned
reference vector r has been taken out:

$$ \alpha = x^\top r / \|r\|^2, \quad e^0 = x - \alpha r, \quad
   s_k = \cos(e^{l-1}, c_k), \quad w = \mathrm{softmax}(s / \tau) $$
$$ \hat e^l = \sum_k w_k c_k, \quad e^l = e^{l-1} - \hat e^l, \quad
   \mathrm{SID}_l = \arg\max_k w_k $$
$$ L = \|x - (\alpha r + \sum_l \hat e^l)\|^2 + \lambda (PD - SC) $$

SC (semantic cohesion) and PD (preference discrimination) are in ``ops.semantic_ids``.

Departures and choices. Cosines lie in [-1, 1], so that with tau = 1 no weight exceeds
e^2 / (e^2 + K - 1): the SID is a label of a nearly uniform mean. tau is therefore a
field; ``quantizer="soft"`` with tau = 1 are the transcribed equations, ``top1`` and
``mp`` choose one code (``ops.vector_quantization.rated``). Codes start from k-means of
the residuals at every level and r from the mean item (the transcriptions name level 1
only). The recommender is a decoder-only transformer trained on every item of a window,
in place of TIGER's encoder-decoder. SASRec is the same transformer with one code for
each item.

Neighbours behind the same functions: RQ-VAE (straight-through, rotation, Gumbel, EMA,
SimVQ), FSQ, residual and product k-means, random codes; see ``Tokenizer`` and
``Retrieval``.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import optim
from jaxpapers.method import Method, WarmStart, gradient
from jaxpapers.options import from_config
from jaxpapers.papers.r3_vae import retrieval, sids, starts, tokenizer
from jaxpapers.papers.r3_vae.options import Net, Retrieval, Tokenizer
from jaxpapers.papers.r3_vae.sids import SIDs, diagnose, resolve
from jaxpapers.papers.r3_vae.tokenizer import Quantized, quantize

__all__ = [
    "Net", "Quantized", "Retrieval", "SIDs", "TOKENIZER_GROUPS", "Tokenizer", "diagnose",
    "make", "quantize", "read", "resolve", "retrieval", "sids", "starts", "tokenizer",
    "tokenizer_config",
]  # fmt: skip

TOKENIZER_GROUPS = ("data", "tokenizer", "method", "optim", "train")
TRAINED = ("trained",)


def read(config: Any) -> tuple[Tokenizer, Retrieval | None, Net | None]:
    """Options of a config; the last two are None for the tokenizer's own stage.

    Raises:
      ValueError: a field that is unknown or out of range.
    """
    options = from_config(Tokenizer, config.tokenizer, "tokenizer")
    if config.method.get("stage", "retrieve") == "tokenize":
        return options, None, None
    stage = config.method.get("stage", "retrieve")
    if stage != "retrieve":
        raise ValueError(f"method.stage must be retrieve or tokenize, got {stage!r}")
    fields = {k: v for k, v in config.method.items() if k != "stage"}
    method = from_config(Retrieval, fields, "method")
    return options, method, from_config(Net, config.net, "net")


def tokenizer_config(config: Any) -> Any:
    """Config of the tokenizer's training run, which one of retrieval starts from."""
    stage = config.copy_and_resolve_references().unlock()
    own = stage.pretrain
    stage.data.batch = own.batch
    stage.train.update(steps=own.steps, eval_every=own.eval_every, init_from="")
    del stage.optim, stage.method
    stage.optim, stage.method = own.optim, {"stage": "tokenize"}
    for group in [name for name in stage if name not in TOKENIZER_GROUPS]:
        del stage[group]
    # What only retrieval reads: equal tokenizers are one run.
    for field in ("eval_batch", "split"):
        if field in stage.data:
            del stage.data[field]
    stage.data.rows = ()
    return stage.lock()


def make(config: Any, *, items: int, features: int) -> Method:
    """The method of a config (configs/r3_vae.py): a tokenizer, or retrieval.

    Args:
      config: groups ``tokenizer``, ``optim``, ``train``, ``method``, and ``net`` for
        retrieval.
      items: N of the catalogue.
      features: d of its vectors.

    Raises:
      ValueError: a field that is unknown or out of range, fewer SIDs than items, or
        ``tokenizer.features`` that is not d.
    """
    options, method, net = read(config)
    if options.features != features:
        raise ValueError(
            f"tokenizer.features={options.features}, the item vectors have {features}; "
            "set it to that"
        )
    tx = optim.from_config(config.optim, config.train.steps)
    if method is None or net is None:
        return gradient(
            lambda key, batch: tokenizer.init(key, options),
            functools.partial(tokenizer.loss, options=options),
            tx,
            predict=functools.partial(tokenizer.predict, options=options),
            accumulate=config.train.accumulate,
            init_extra=lambda params: tokenizer.init_extra(params, options),
        )
    sizes = method.sizes(options, items)
    table = retrieval.enumerated(items, sizes)

    def init_extra(params):
        del params
        empty = _empty(options) if method.source in TRAINED else {}
        return {"sid": jnp.asarray(table), "tokenizer": empty}

    bound = {"net": net, "sizes": sizes}
    return gradient(
        lambda key, batch: retrieval.init(key, net, sizes),
        functools.partial(retrieval.loss, **bound),
        tx,
        predict=functools.partial(retrieval.predict, **bound),
        rules=retrieval.rules(net),
        accumulate=config.train.accumulate,
        init_extra=init_extra,
    )._replace(
        warm_start=_from_tokenizer() if method.source in TRAINED else None,
        served=served,
    )


def served(tree: dict) -> dict:
    """Params, or ``State.extra`` without the tokenizer."""
    return {"sid": tree["sid"]} if "sid" in tree else tree


def _empty(options: Tokenizer) -> dict:
    """Zeros of the shapes of a trained tokenizer."""

    def whole(key):
        params = tokenizer.init(key, options)
        return {"params": params, "extra": tokenizer.init_extra(params, options)}

    shapes = jax.eval_shape(whole, jax.eval_shape(lambda: jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _from_tokenizer() -> WarmStart:
    """A run of retrieval keeps the parameters of the tokenizer beside its own."""

    def parts(state):
        own = state.extra["tokenizer"]
        return {name: own[name] for name in own if jax.tree.leaves(own[name])}

    def apply(state, restored):
        copied = jax.tree.map(jnp.copy, dict(restored))
        own = {**state.extra["tokenizer"], **copied}
        return state._replace(extra={**state.extra, "tokenizer": own})

    return WarmStart(parts, apply)


def placed(state: Any, key: Any, x: np.ndarray, config: Any) -> Any:
    """A state of retrieval whose SIDs are those of its tokenizer: ``Data.refresh``.

    Args:
      state: of ``make``.
      key: of k-means and random codes.
      x: item vectors.
      config: of the run.
    """
    options, method, _ = read(config)
    assert method is not None
    trained = jax.device_get(state.extra["tokenizer"]) or None
    sid, _, preference = starts.assign(key, x, options, method, trained)
    if method.source == "item":
        table = sid
    else:
        table = resolve(
            sid, options.codes, method.collisions, limit=method.collision_codes,
            preference=preference,
        ).table  # fmt: skip
    return state._replace(extra={**state.extra, "sid": jnp.asarray(table, jnp.int32)})
