"""Answers as tokens: all at once, or one after the other."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxpapers.nets.decoding import Options
from jaxpapers.nets.decoding import decode as decode_tokens
from jaxpapers.nets.transformer import empty_cache
from jaxpapers.ops.algorithmic import EOS, QUERY_END
from jaxpapers.papers.looped_transformer.network import (
    Net,
    embed,
    kind,
    normalised,
    readout,
    stack,
)


def decode(
    logits: Float[Array, "B L V"], tokens: Int[Array, "B L"], pauses: int = 0
) -> Int[Array, "B L"]:
    """The answers of full-output prediction: likeliest tokens up to the first ``EOS``.

    Args:
      logits: of a model.
      tokens: its input, which says where ``QUERY_END`` stands.
      pauses: tokens between ``QUERY_END`` and the answer.

    Returns:
      The answer of each row from its first position on, then ``EOS``.
    """
    best = logits.argmax(-1).astype(jnp.int32)
    start = (tokens == QUERY_END).argmax(1) + pauses
    place = start[:, None] + jnp.arange(tokens.shape[1])[None, :]
    answer = jnp.take_along_axis(best, jnp.minimum(place, tokens.shape[1] - 1), 1)
    answer = jnp.where(place < tokens.shape[1], answer, EOS)
    return jnp.where(jnp.cumsum(answer == EOS, 1) == 0, answer, EOS)


def generate_ntp(
    params: dict, prompt: Int[Array, "B M"], length: int, *, net: Net
) -> Int[Array, "B K"]:
    """Greedy continuation of a model of the next token, with a cache of keys and values.

    A looped model has a cache for each of its ``net.loops`` steps.

    Args:
      params: of ``init``.
      prompt: query, ``QUERY_END`` and pauses.
      length: tokens to generate, K.
      net: hyper-parameters with ``loops`` of 1 or more.

    Raises:
      ValueError: ``length`` below 1, or steps that the input would have to tell.
    """
    if length < 1 or net.loops < 1:
        raise ValueError(
            "generate_ntp needs length >= 1 and net.loops >= 1, got "
            f"{length} and {net.loops}"
        )
    if net.loop_rows or net.scale_residual or net.inject == "concat":
        raise ValueError(
            "generate_ntp is written for net.inject=add or none, without loop_rows and "
            "scale_residual"
        )
    layers = {"params": {"layers": params["layers"]}}
    rows, start = prompt.shape
    caches = [
        empty_cache(kind(net), net.layers, net.width, rows, start + length)
        for _ in range(net.loops)
    ]

    def logits(tokens, caches):
        e = embed(params, tokens, net)
        h, new = (e if net.inject == "none" else jnp.zeros_like(e)), []
        for cache in caches:
            z = h if net.inject == "none" else h + e
            h, cache = stack(net).apply(layers, z, cache)
            h = normalised(params, h, net) if net.norm_in_loop else h
            new.append(cache)
        return readout(params, h[:, -1:], net)[:, 0], new

    y, caches = logits(prompt, caches)
    return decode_tokens(
        lambda token, caches: logits(token[:, None], caches), y, caches,
        options=Options(length=length),
    ).tokens  # fmt: skip
