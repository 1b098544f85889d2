r"""Looped transformers: as many steps as the problem is long.

Ying Fan, Yilun Du, Kannan Ramchandran, Kangwook Lee. "Looped Transformers for Length
Generalization", arXiv 2409.15647, 2024 (ICLR 2025).

One decoder block M of a few layers is applied T times with the same weights, T depending
on the length n of the problem. With the embedded input e = Emb(x):

$$ h_0 = 0, \quad h_t = M(h_{t-1} + e), \quad f_T(x) = h_T W $$

Training sees input, whole answer and the number of steps, and no step in between:

$$ \mathcal L = E_{(x, y, T)}\, \mathrm{CE}(f_T(x), y) $$

on the positions of the answer, which are all predicted at once (full-output prediction).
Problems whose solution is one program repeated T(n) times (n-RASP-L: parity, copy,
addition, ..., see ``ops.algorithmic`` and ``ops.rasp``) are then solved at lengths that
training never saw. At inference T is told (oracle), or the step where the model is surest
of its own answer:

$$ T^* = \arg\min_t \mathrm{CE}(f_t(x), \arg\max f_t(x)) $$

The block is GPT-2's without positions (NoPE), its final norm inside the loop.

Departures. The authors' code was not at hand: that the final norm is in the loop, the
untied head, the exact places of the ``EOS`` tokens, weight decay and the alphabet of the
problem dict are reconstructed. The paper's stopping formula has argmax; its text, and
this package, argmin. T(n) of addition is n, as in the experiments, not n + 1 as in the
proposition. Added: gradients through the last steps only, embeddings of the step,
residuals scaled by 1/T, stopping at a fixed point, a curriculum by accuracy.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxpapers import optim, options
from jaxpapers.method import Method, gradient
from jaxpapers.ops.means import weighted_mean
from jaxpapers.papers.looped_transformer.generation import decode, generate_ntp
from jaxpapers.papers.looped_transformer.network import (
    RULES,
    Net,
    Trace,
    check_steps,
    embed,
    forward,
    forward_all,
    init,
    readout,
    rules,
    step,
)
from jaxpapers.papers.looped_transformer.stopping import (
    at_step,
    self_cross_entropy,
    stop_fixed_point,
    stop_max_confidence,
)

__all__ = [
    "RULES", "Net", "Trace", "at_step", "decode", "embed", "exact_match", "forward",
    "forward_all", "generate_ntp", "init", "loss", "make", "net_of", "predict",
    "readout", "self_cross_entropy", "step", "stop_fixed_point", "stop_max_confidence",
]  # fmt: skip

Buckets = Sequence[tuple[int, int]]


def loss(
    params: Any,
    batch: Mapping[str, Array],
    key: Key[Array, ""] | None = None,
    *,
    net: Net,
    buckets: Buckets = (),
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy of the answer after T(n) steps.

    Args:
      params: of ``init``.
      batch: ``tokens``, ``targets`` int32 (B, L), ``weights`` float32 (B, L), ``n_steps``
        int32 (B,); see ``algorithmic.lay_out``.
      key: unused, the model has no noise.
      net: hyper-parameters.
      buckets: (steps, length) that rise: the batch is cut to the first one that holds it,
        so that short problems cost little; each is a branch of the program. (): the
        batch as it is, whose ``n_steps`` must be known.

    Returns:
      Nats per position of the answer, and metrics: ``exact_match``, the share of rows
      with every position right; ``token_acc``; ``clamped``, the share of rows that ask
      for more steps than the last bucket has; ``weight``, the sum of the weights.

    Raises:
      ValueError: see ``forward``; buckets that do not rise to the batch's length.
    """
    del key
    _check_buckets(buckets, batch)
    n_steps, most = batch["n_steps"], buckets[-1][0] if buckets else 0
    n_steps, most = check_steps(n_steps, most, net)
    buckets = buckets or ((most, batch["tokens"].shape[1]),)
    value, metrics = _in_bucket(
        functools.partial(_loss, net=net), params, dict(batch), buckets, net
    )
    clamped = jnp.mean(n_steps > most, dtype=jnp.float32)
    return value, {**metrics, "clamped": clamped}


def _loss(params, batch, steps, *, net):
    logits = forward(
        params, batch["tokens"], batch["n_steps"], net=net, max_steps=steps
    )
    weights = batch["weights"]
    labels = jax.nn.one_hot(batch["targets"], logits.shape[-1], dtype=logits.dtype)
    nats = optax.softmax_cross_entropy(logits, labels)
    right = (logits.argmax(-1) == batch["targets"]).astype(jnp.float32)
    return weighted_mean(nats, weights), {
        "exact_match": exact_match(logits, batch["targets"], weights).mean(),
        "token_acc": weighted_mean(right, weights),
        "weight": weights.sum(),
    }


def exact_match(
    logits: Float[Array, "*T B L V"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
) -> Float[Array, "*T B"]:
    """1 for rows whose likeliest tokens are the targets wherever those count.

    For a model of the next token this is the exact match of greedy decoding too: up to
    the first mistake it is fed its targets.
    """
    best = logits.argmax(-1)
    targets, counted = (jnp.broadcast_to(x, best.shape) for x in (targets, weights > 0))
    wrong = (best != targets) & counted
    return 1.0 - wrong.any(-1).astype(jnp.float32)


def predict(
    params: Any,
    extra: Any,
    batch: Mapping[str, Array],
    *,
    net: Net,
    buckets: Buckets = (),
) -> Float[Array, "B L V"]:
    """Logits of a batch after its ``n_steps``."""
    del extra
    whole = batch["tokens"].shape[1]

    def compute(params, cut, steps):
        logits = forward(
            params, cut["tokens"], cut["n_steps"], net=net, max_steps=steps
        )
        return jnp.pad(logits, ((0, 0), (0, whole - logits.shape[1]), (0, 0)))

    if not buckets:
        return compute(params, batch, 0)
    _check_buckets(buckets, batch)
    branches, index = _branches(compute, dict(batch), buckets, net)
    return jax.lax.switch(index, branches, params)


def net_of(config: Any, vocab_size: int) -> Net:
    """``Net`` of a config's group ``net``, and of a problem's vocabulary."""
    fields = {**config.net, "vocab_size": vocab_size}
    return options.from_config(Net, fields, "net")


def make(
    config: Any,
    *,
    vocab_size: int,
    buckets: Buckets,
    start_length: int = 0,
) -> Method:
    """Binds a config (see configs/looped_transformer.py): groups ``net``, ``optim``.

    Args:
      config: the groups, and ``train``.
      vocab_size: of the problem, in place of ``net.vocab_size``.
      buckets: see ``loss``.
      start_length: first training length of a curriculum that goes by accuracy, whose
        length is part of the state, ``extra["length"]``; 0: none.

    Raises:
      ValueError: see ``Net`` and ``optim.from_config``.
    """
    net = net_of(config, vocab_size)
    own = functools.partial(loss, net=net, buckets=tuple(buckets))

    def with_length(params, extra, batch, key):
        value, metrics = own(params, batch, key)
        length = extra["length"].astype(jnp.float32)
        return value, ({**metrics, "length": length}, extra)

    return gradient(
        lambda key, batch: init(key, net),
        with_length if start_length else own,
        optim.from_config(config.optim, config.train.steps),
        predict=functools.partial(predict, net=net, buckets=tuple(buckets)),
        rules=rules(net),
        accumulate=config.train.accumulate,
        init_extra=(lambda params: {"length": jnp.int32(start_length)})
        if start_length
        else None,
    )


def _check_buckets(buckets, batch):
    """Refuses buckets that would cut off what counts.

    Raises:
      ValueError: steps or lengths that fall, or a last one shorter than the batch.
    """
    whole = batch["tokens"].shape[1]
    falling = any(a > b for p, q in zip(buckets, buckets[1:]) for a, b in zip(p, q))
    if buckets and (falling or buckets[-1][1] < whole):
        raise ValueError(
            f"buckets must rise in steps and in length, the last one to the {whole} "
            f"tokens of the batch, got {tuple(buckets)}"
        )


def _in_bucket(compute, params, batch, buckets: Buckets, net: Net):
    """(scalar, metrics) of the smallest bucket that holds the batch.

    Its gradient is taken inside the branch: a branch that is differentiated from outside
    hands over what all the others would have kept for it, filled with zeros.
    """
    branches, index = _branches(compute, batch, buckets, net)
    if len(branches) == 1:
        return branches[0](params)

    @jax.custom_vjp
    def switch(params):
        return jax.lax.switch(index, branches, params)

    def forward_pass(params):
        with_gradient = [jax.value_and_grad(f, has_aux=True) for f in branches]
        return jax.lax.switch(index, with_gradient, params)

    def backward_pass(grads, cotangent):
        scale = cotangent[0]
        return (jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads),)

    switch.defvjp(forward_pass, backward_pass)
    return switch(params)


def _branches(compute, batch, buckets: Buckets, net: Net):
    """(params -> result) of each bucket, and the index of the one that fits the batch."""
    whole = batch["tokens"].shape[1]
    sizes = [(steps, min(length, whole)) for steps, length in buckets]

    def branch(steps, length):
        cut = {k: v[:, :length] if v.ndim > 1 else v for k, v in batch.items()}
        cut["n_steps"] = jnp.minimum(cut["n_steps"], steps)
        return lambda params: compute(params, cut, steps)

    place = jnp.arange(1, whole + 1, dtype=jnp.int32)[None, :]
    longest = jnp.where(batch["weights"] > 0, place, 0).max()
    most = 0 if net.loops else jnp.max(batch["n_steps"])
    small = [(length < longest) | (steps < most) for steps, length in sizes[:-1]]
    index = sum((x.astype(jnp.int32) for x in small), jnp.int32(0))
    return [branch(*size) for size in sizes], index
