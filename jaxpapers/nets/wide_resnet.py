"""Wide residual networks with convolutions and normalisations in separate trees.

Zagoruyko and Komodakis, "Wide Residual Networks", arXiv 1605.07146: three groups of
pre-activation blocks, of k, 2 k and 4 k times the stem's channels. Two nets can share
``convs``, each with its own ``norms``, ``last`` and ``linear``, and with its own moving
statistics.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxpapers.nets.convolution import (
    batch_norm,
    conv,
    conv_kernel,
    init_moments,
    init_norm,
)


class Block(NamedTuple):
    """A residual block: input and output channels, stride of its first convolution."""

    fan_in: int
    fan_out: int
    stride: int


def blocks(base: int, width: int, counts: tuple[int, ...]) -> dict[str, Block]:
    """Blocks by name, in order, ``counts[g]`` of them in group g.

    Args:
      base: channels of the stem.
      width: k.
      counts: blocks of each group; WRN-d-k has (d - 4) / 6 in three groups.

    Raises:
      ValueError: sizes below 1.
    """
    if min(base, width, *counts) < 1:
        raise ValueError(
            f"base, width and counts must be >= 1, got {base}, {width} and {counts}"
        )
    made, fan_in = {}, base
    for group, count in enumerate(counts):
        fan_out = base * width * 2**group
        for i in range(count):
            stride = 2 if group and not i else 1
            made[f"group_{group}_block_{i}"] = Block(fan_in, fan_out, stride)
            fan_in = fan_out
    return made


def init_convs(key: Key[Array, ""], layout: Mapping[str, Block]) -> dict:
    """Kernels of the blocks: two of 3 x 3, and a 1 x 1 shortcut where channels change."""
    convs = {}
    for block_key, (name, b) in zip(jax.random.split(key, len(layout)), layout.items()):
        first, second, third = jax.random.split(block_key, 3)
        convs[name] = {
            "first": conv_kernel(first, 3, b.fan_in, b.fan_out),
            "second": conv_kernel(second, 3, b.fan_out, b.fan_out),
        }
        if b.fan_in != b.fan_out:
            convs[name]["shortcut"] = conv_kernel(third, 1, b.fan_in, b.fan_out)
    return convs


def init_top(
    key: Key[Array, ""] | None,
    key_linear: Key[Array, ""],
    layout: Mapping[str, Block],
    classes: int,
) -> dict:
    """``norms`` of the blocks, the ``last`` norm, and ``linear``, to the classes.

    Args:
      key: of the norms' scales, uniform in [0, 1), as in the code of Rocket Launching;
        None: they are 1.
      key_linear: of the linear map.
      layout: see ``blocks``.
      classes: number of logits.
    """
    width = list(layout.values())[-1].fan_out
    count = 2 * len(layout) + 1
    keys = [None] * count if key is None else jax.random.split(key, count)
    norms = {
        name: {
            "first": init_norm(b.fan_in, keys[2 * i]),
            "second": init_norm(b.fan_out, keys[2 * i + 1]),
        }
        for i, (name, b) in enumerate(layout.items())
    }
    kernel = jax.nn.initializers.he_normal()(key_linear, (width, classes))
    linear = {"kernel": kernel, "bias": jnp.zeros(classes)}
    return {"norms": norms, "last": init_norm(width, keys[-1]), "linear": linear}


def statistics(params: dict) -> dict:
    """Initial moving statistics of ``norms`` and ``last``: mean 0, variance 1."""
    norms = {
        name: {place: init_moments(norm) for place, norm in block.items()}
        for name, block in params["norms"].items()
    }
    return {"norms": norms, "last": init_moments(params["last"])}


def apply(
    params: dict,
    state: dict,
    x: Float[Array, "B H W C"],
    layout: Mapping[str, Block],
    *,
    train: bool,
    mask: Bool[Array, " B"] | None = None,
    key: Key[Array, ""] | None = None,
    dropout: Mapping[str, float] | None = None,
) -> tuple[Float[Array, "B classes"], Float[Array, "B F"], dict]:
    """Logits from the stem's output.

    Args:
      params: convs, norms, last, linear; ``convs`` may have more blocks than the layout.
      state: see ``statistics``.
      x: output of the stem.
      layout: see ``blocks``.
      train: whether to use the batch's statistics, and dropout.
      mask: see ``batch_norm``.
      key: of the dropout.
      dropout: block -> rate, between its convolutions.

    Returns:
      Logits, the pooled features below them, and the new statistics.

    Raises:
      ValueError: dropout without a key.
    """
    norms = {}

    def norm_relu(name, place, x):
        y, norms.setdefault(name, {})[place] = batch_norm(
            params["norms"][name][place], state["norms"][name][place], x,
            train=train, mask=mask,
        )  # fmt: skip
        return jax.nn.relu(y)

    for i, (name, block) in enumerate(layout.items()):
        convs, rate = params["convs"][name], (dropout or {}).get(name, 0.0)
        y = norm_relu(name, "first", x)
        short = conv(y, convs["shortcut"], block.stride) if "shortcut" in convs else x
        if "shortcut" not in convs and block.stride > 1:
            short = x[:, :: block.stride, :: block.stride]
        y = norm_relu(name, "second", conv(y, convs["first"], block.stride))
        if train and rate:
            if key is None:
                raise ValueError("dropout needs a key")
            keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - rate, y.shape)
            y = jnp.where(keep, y / (1 - rate), 0.0)
        x = short + conv(y, convs["second"])
    x, last = batch_norm(params["last"], state["last"], x, train=train, mask=mask)
    pooled = jax.nn.relu(x).mean((1, 2))
    logits = pooled @ params["linear"]["kernel"] + params["linear"]["bias"][None]
    return logits, pooled, {"norms": norms, "last": last}
