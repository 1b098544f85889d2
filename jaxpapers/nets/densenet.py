"""Densely connected networks with bottlenecks and compression, DenseNet-BC.

Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks",
arXiv 1608.06993: three blocks of layers that each see the outputs of all before them,
and between blocks a 1 x 1 convolution to fewer channels and a 2 x 2 mean.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers.nets.convolution import (
    batch_norm,
    conv,
    conv_kernel,
    init_moments,
    init_norm,
)


class Layout(NamedTuple):
    """Sizes of a DenseNet-BC.

    Attributes:
      depth: layers; 6 L + 4 of blocks of L bottleneck layers.
      growth: channels that a layer adds.
      reduction: share of the channels that a transition keeps.
    """

    depth: int = 100
    growth: int = 12
    reduction: float = 0.5

    @property
    def layers(self) -> int:
        """Layers of each of the three blocks."""
        return (self.depth - 4) // 6

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Channels before and after each block."""
        before, widths = 2 * self.growth, []
        for block in range(3):
            after = before + self.layers * self.growth
            widths.append((before, after))
            before = int(after * self.reduction) if block < 2 else after
        return tuple(widths)

    @property
    def features(self) -> int:
        """Channels of the last block: 342 for depth 100 and growth 12."""
        return self.widths[-1][1]


def check(layout: Layout) -> None:
    """Raises ValueError for sizes that make no network."""
    if layout.depth < 10 or (layout.depth - 4) % 6 or layout.growth < 1:
        raise ValueError(
            "a DenseNet-BC has depth 6 L + 4, at least 10, and growth >= 1, got "
            f"{layout.depth} and {layout.growth}"
        )
    if not 0 < layout.reduction <= 1:
        raise ValueError(f"reduction must be in (0, 1], got {layout.reduction}")


def init(
    key: Key[Array, ""],
    layout: Layout,
    channels: int,
    classes: int,
    std: float | None = None,
) -> dict:
    """Parameters: ``stem``, ``blocks``, ``last`` norm, ``linear``.

    Args:
      key: of the draws.
      layout: sizes.
      channels: of an image.
      classes: number of logits.
      std: of every kernel; None: He-normal. POEM's code has sqrt(2 / layers of a block).

    Raises:
      ValueError: see ``check``.
    """
    check(layout)
    growth, count = layout.growth, 2 * 3 * layout.layers + 4
    keys = iter(jax.random.split(key, count))

    def kernel(size, fan_in, fan_out):
        if std is None:
            return conv_kernel(next(keys), size, fan_in, fan_out)
        return std * jax.random.normal(next(keys), (size, size, fan_in, fan_out))

    def layer(width):
        return {
            "norm_1": init_norm(width),
            "conv_1": kernel(1, width, 4 * growth),
            "norm_2": init_norm(4 * growth),
            "conv_2": kernel(3, 4 * growth, growth),
        }

    params: dict = {"stem": kernel(3, channels, 2 * growth)}
    blocks: dict = {}
    for i, (before, after) in enumerate(layout.widths):
        widths = range(before, after, growth)
        blocks[f"block_{i}"] = {f"layer_{j}": layer(w) for j, w in enumerate(widths)}
        if i < 2:
            blocks[f"transition_{i}"] = {
                "norm": init_norm(after),
                "conv": kernel(1, after, layout.widths[i + 1][0]),
            }
    top = jax.nn.initializers.he_normal()(next(keys), (layout.features, classes))
    linear = {"kernel": top, "bias": jnp.zeros(classes)}
    return {
        **params,
        "blocks": blocks,
        "last": init_norm(layout.features),
        "linear": linear,
    }


def statistics(params: dict) -> dict:
    """Initial moving statistics of all norms: mean 0, variance 1."""

    def of(tree):
        if "scale" in tree:
            return init_moments(tree)
        return {k: of(v) for k, v in tree.items() if isinstance(v, dict)}

    return {"blocks": of(params["blocks"]), "last": of(params["last"])}


def apply(
    params: dict, state: dict, x: Float[Array, "B H W C"], *, train: bool
) -> tuple[Float[Array, "B classes"], Float[Array, "B F"], dict]:
    """Logits of images.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      x: images.
      train: whether to use the batch's statistics.

    Returns:
      Logits, the pooled features below them, and the new statistics.
    """
    new: dict = {}

    def norm_relu(norm, moments, x):
        y, moved = batch_norm(norm, moments, x, train=train)
        return jax.nn.relu(y), moved

    x = conv(x, params["stem"])

    def layer(own, old, x):
        y, first = norm_relu(own["norm_1"], old["norm_1"], x)
        y = conv(y, own["conv_1"])
        y, second = norm_relu(own["norm_2"], old["norm_2"], y)
        x = jnp.concatenate([x, conv(y, own["conv_2"])], -1)
        return x, {"norm_1": first, "norm_2": second}

    # By number: jit sorts the names of a dict, layer_10 before layer_2.
    blocks, old = params["blocks"], state["blocks"]
    for i in range(3):
        block = f"block_{i}"
        new[block] = {}
        for j in range(len(blocks[block])):
            name = f"layer_{j}"
            x, new[block][name] = layer(blocks[block][name], old[block][name], x)
        if i < 2:
            name = f"transition_{i}"
            y, moved = norm_relu(blocks[name]["norm"], old[name]["norm"], x)
            new[name] = {"norm": moved}
            # The mean before the convolution, which is linear, takes a quarter of it.
            x = conv(_halved(y), blocks[name]["conv"])
    x, last = norm_relu(params["last"], state["last"], x)
    pooled = x.mean((1, 2))
    logits = pooled @ params["linear"]["kernel"] + params["linear"]["bias"][None]
    return logits, pooled, {"blocks": new, "last": last}


def _halved(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Means of 2 x 2 pixels; a last odd row or column is left out."""
    batch, height, width, count = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, count).mean((2, 4))
