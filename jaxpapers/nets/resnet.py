"""Residual networks as torchvision names and computes them, without their last layer.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385;
the stride of a bottleneck is that of its 3 x 3 convolution. ``from_torchvision`` takes a
state dict's arrays, so a checkpoint that was pretrained there gives the same features.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from jaxpapers.nets.convolution import (
    batch_norm,
    conv,
    conv_kernel,
    init_moments,
    init_norm,
)

COUNTS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, in [0, 1]."""


class Block(NamedTuple):
    """Convolutions of a block: (name, size, inputs, outputs, stride) each."""

    convs: tuple
    shortcut: tuple | None


def layout(depth: int, base: int = 64) -> dict[str, Block]:
    """Blocks by name ("layer1_0"), in order.

    Args:
      depth: 18, 34, 50 or 101.
      base: channels of the stem.

    Raises:
      ValueError: another depth.
    """
    if depth not in COUNTS:
        raise ValueError(f"depth must be one of {tuple(COUNTS)}, got {depth}")
    blocks, fan_in = {}, base
    for group, count in enumerate(COUNTS[depth]):
        width = base * 2**group
        out = width * (1 if depth < 50 else 4)
        for i in range(count):
            stride = 2 if group and not i else 1
            if depth < 50:
                convs = (("conv1", 3, fan_in, width, stride),
                         ("conv2", 3, width, width, 1))  # fmt: skip
            else:
                convs = (("conv1", 1, fan_in, width, 1),
                         ("conv2", 3, width, width, stride),
                         ("conv3", 1, width, out, 1))  # fmt: skip
            narrow = stride > 1 or fan_in != out
            shortcut = ("downsample", 1, fan_in, out, stride) if narrow else None
            blocks[f"layer{group + 1}_{i}"] = Block(convs, shortcut)
            fan_in = out
    return blocks


def features(depth: int, base: int = 64) -> int:
    """Number of features: 512 of depth 18, 2048 of depth 50."""
    return base * 8 * (1 if depth < 50 else 4)


def init(key: Key[Array, ""], depth: int, *, base: int = 64, inputs: int = 3) -> dict:
    """Parameters: ``conv1``, ``bn1``, and a dict for each block.

    Args:
      key: of the kernels.
      depth: see ``layout``.
      base: channels of the stem.
      inputs: channels of an image.
    """
    blocks = layout(depth, base)
    key, stem = jax.random.split(key)
    params: dict[str, Any] = {
        "conv1": conv_kernel(stem, 7, inputs, base),
        "bn1": init_norm(base),
    }
    for block_key, (name, block) in zip(
        jax.random.split(key, len(blocks)), blocks.items()
    ):
        every = [*block.convs, *([block.shortcut] if block.shortcut else [])]
        params[name] = {}
        for k, (conv_name, size, fan_in, out, _) in zip(
            jax.random.split(block_key, len(every)), every
        ):
            params[name][conv_name] = conv_kernel(k, size, fan_in, out)
            params[name][_norm_of(conv_name)] = init_norm(out)
    return params


def statistics(params: dict) -> dict:
    """Moving statistics at the start, a tree of ``Moments`` for every norm."""
    return {
        name: init_moments(value) if "scale" in value else statistics(value)
        for name, value in params.items()
        if isinstance(value, dict)
    }


def apply(
    params: dict,
    moments: dict,
    x: Float[Array, "B H W C"],
    depth: int,
    *,
    base: int = 64,
    train: bool = False,
) -> tuple[Float[Array, "B F"], dict]:
    """Features of images, and the new moving statistics.

    Args:
      params: see ``init``.
      moments: see ``statistics``; kept where ``train`` is False, which is what a frozen
        batch normalisation is, whose scales and biases are trained all the same.
      x: images.
      depth: see ``layout``.
      base: channels of the stem.
      train: whether norms take the batch's statistics.
    """
    moved: dict[str, Any] = {}
    x = conv(x, params["conv1"], 2)
    x, moved["bn1"] = batch_norm(params["bn1"], moments["bn1"], x, train=train)
    x = lax.reduce_window(
        jax.nn.relu(x), -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1),
        ((0, 0), (1, 1), (1, 1), (0, 0)),
    )  # fmt: skip
    for name, block in layout(depth, base).items():
        p, m, moved[name] = params[name], moments[name], {}

        def part(x, spec, p=p, m=m, new=moved[name]):
            conv_name, _, _, _, stride = spec
            norm = _norm_of(conv_name)
            y = conv(x, p[conv_name], stride)
            y, new[norm] = batch_norm(p[norm], m[norm], y, train=train)
            return y

        y = x
        for spec in block.convs[:-1]:
            y = jax.nn.relu(part(y, spec))
        y = part(y, block.convs[-1])
        x = jax.nn.relu(y + (part(x, block.shortcut) if block.shortcut else x))
    return x.mean((1, 2)), moved


def from_torchvision(arrays: Mapping[str, np.ndarray], depth: int) -> tuple[dict, dict]:
    """Parameters and moving statistics of a state dict; its last layer is left out.

    Args:
      arrays: name -> array, as torchvision's models name and shape them. A file of torch
        becomes safetensors by ``safetensors.torch.save_file(torch.load("x.pth",
        weights_only=True), "x.safetensors")``.
      depth: see ``layout``.

    Raises:
      ValueError: an array that is missing, left over, or of another shape.
    """
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), depth))
    extra = jax.eval_shape(statistics, shapes)
    names = {**_names(shapes), **_names(extra)}
    ignored = ("fc.", "num_batches_tracked")
    known = {n: x for n, x in arrays.items() if not any(i in n for i in ignored)}
    missing, unknown = sorted(set(names) - set(known)), sorted(set(known) - set(names))
    if missing or unknown:
        raise ValueError(
            f"not the state dict of torchvision's resnet{depth}: missing {missing[:4]}, "
            f"left over {unknown[:4]}"
        )
    leaves = {}
    for name, (path, shape) in names.items():
        x = np.asarray(known[name], np.float32)
        x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x
        if x.shape != shape:
            raise ValueError(
                f"{name}: expected {shape}, got {x.shape} after transposing"
            )
        leaves[path] = x

    def fill(tree):
        return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path], tree)

    return fill(shapes), fill(extra)


def _norm_of(conv_name: str) -> str:
    return conv_name.replace("conv", "bn") if "conv" in conv_name else "downsample_bn"


_LEAVES = {
    "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var",
}  # fmt: skip


def _names(tree: Any) -> dict[str, tuple]:
    """torchvision's name of every leaf -> its path and shape here."""
    names = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        parts = [str(getattr(p, "key", getattr(p, "name", ""))) for p in path]
        last = _LEAVES.get(parts[-1])
        parts = parts[:-1] if last else parts
        name = ".".join(p.replace("_", ".", 1) if "layer" in p else p for p in parts)
        name = name.replace("downsample_bn", "downsample.1")
        if name.endswith("downsample"):
            name += ".0"
        names[f"{name}.{last or 'weight'}"] = (path, leaf.shape)
    return names
