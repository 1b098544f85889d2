"""The classifiers that POEM trains: features below a linear map to the logits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers.nets import densenet, wide_resnet
from jaxpapers.nets.convolution import (
    batch_norm,
    conv,
    conv_kernel,
    group_norm,
    init_moments,
    init_norm,
)
from jaxpapers.options import check_choices, check_least

MODELS = ("densenet", "wrn", "conv")
NORMS = ("batch", "group")
INITS = ("he", "poem")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """The classifier; DenseNet-BC of depth 100 and growth 12 is the paper's."""

    model: str = "densenet"
    """densenet; wrn: a wide residual network; conv: three convolutions of 3 x 3 with
    strides 2, 2 and 1, for small images."""
    size: int = 32
    """Height and width of an image."""
    channels: int = 3
    """Of an image."""
    classes: int = 10
    """Number of classes of ID images."""
    outlier_class: bool = False
    """Whether outliers have a logit of their own, the last; else they have no class."""
    mean: tuple[float, ...] = (125.3 / 255, 123.0 / 255, 113.9 / 255)
    """Of the channels, subtracted inside the model."""
    std: tuple[float, ...] = (63.0 / 255, 62.1 / 255, 66.7 / 255)
    """Of the channels, which are divided by it."""
    depth: int = 100
    """densenet: 6 L + 4; wrn: 6 L + 4 of blocks of two convolutions."""
    growth: int = 12
    """densenet: channels that a layer adds."""
    reduction: float = 0.5
    """densenet: share of the channels that a transition keeps."""
    init: str = "he"
    """densenet: he, or poem: as the released code, one standard deviation for all."""
    width: int = 2
    """wrn: k of WRN-d-k."""
    hidden: tuple[int, ...] = (16, 32, 64)
    """conv: channels of the three convolutions."""
    norm: str = "batch"
    """conv: batch, or group: each image by itself, eight channels to a group."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        check_choices(self, "net", model=MODELS, norm=NORMS, init=INITS)
        check_least(self, "net", size=4, channels=1, classes=2, width=1, hidden=1)
        if not all(x > 0 for x in self.std):
            raise ValueError(f"net.std must be > 0, got {self.std}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"net.mean and net.std need a number for each of {self.channels} "
                f"channels, got {self.mean} and {self.std}"
            )
        if self.model == "densenet":
            densenet.check(layout(self))
        if self.model == "wrn" and (self.depth < 10 or (self.depth - 4) % 6):
            raise ValueError(
                f"net.depth of a wrn is 6 L + 4, at least 10, got {self.depth}"
            )
        if self.model == "conv" and len(self.hidden) != 3:
            raise ValueError(f"net.hidden needs 3 widths, got {self.hidden}")


def outputs(net: Net) -> int:
    """Number of logits."""
    return net.classes + net.outlier_class


def layout(net: Net) -> densenet.Layout:
    """Sizes of the DenseNet."""
    return densenet.Layout(net.depth, net.growth, net.reduction)


def features(net: Net) -> int:
    """D: number of features below the logits."""
    if net.model == "densenet":
        return layout(net).features
    return 64 * net.width if net.model == "wrn" else net.hidden[-1]


def init(key: Key[Array, ""], net: Net) -> dict:
    """Parameters of the classifier."""
    if net.model == "densenet":
        std = math.sqrt(2 / layout(net).layers) if net.init == "poem" else None
        return densenet.init(key, layout(net), net.channels, outputs(net), std)
    if net.model == "wrn":
        key_stem, key_convs, key_linear = jax.random.split(key, 3)
        top = wide_resnet.init_top(None, key_linear, _blocks(net), outputs(net))
        return {
            "stem": conv_kernel(key_stem, 3, net.channels, 16),
            "convs": wide_resnet.init_convs(key_convs, _blocks(net)),
            **top,
        }
    *key_convs, key_linear = jax.random.split(key, 4)
    widths = (net.channels, *net.hidden)
    # As PyTorch's layers start, uniform of variance 1 / (3 fan-in): under a normalisation
    # smaller kernels learn faster, which a run of a few epochs needs.
    kernel = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    layers = {
        f"layer_{i}": {
            "conv": kernel(k, (3, 3, widths[i], widths[i + 1])),
            "norm": init_norm(widths[i + 1]),
        }
        for i, k in enumerate(key_convs)
    }
    linear = {
        "kernel": kernel(key_linear, (widths[-1], outputs(net))),
        "bias": jnp.zeros(outputs(net)),
    }
    return {**layers, "linear": linear}


def statistics(params: dict, net: Net) -> dict:
    """Initial moving statistics of the batch normalisations."""
    if net.model == "densenet":
        return densenet.statistics(params)
    if net.model == "wrn":
        return wide_resnet.statistics(params)
    if net.norm == "group":
        return {}
    return {k: init_moments(x["norm"]) for k, x in params.items() if k != "linear"}


def apply(
    params: dict, state: Any, x: Float[Array, "B H W C"], *, net: Net, train: bool
) -> tuple[Float[Array, "B K"], Float[Array, "B D"], Any]:
    """Logits of images in [0, 1], K = ``outputs(net)`` of each.

    Args:
      params: see ``init``.
      state: see ``statistics``.
      x: images.
      net: sizes.
      train: whether to use the batch's statistics.

    Returns:
      Logits, the features phi >= 0 below them, and the new statistics.
    """
    mean, std = (jnp.asarray(v, x.dtype)[None, None, None] for v in (net.mean, net.std))
    x = (x - mean) / std
    if net.model == "densenet":
        return densenet.apply(params, state, x, train=train)
    if net.model == "wrn":
        x = conv(x, params["stem"])
        return wide_resnet.apply(params, state, x, _blocks(net), train=train)
    new = {}
    for i, stride in enumerate((2, 2, 1)):
        name = f"layer_{i}"
        x = conv(x, params[name]["conv"], stride)
        norm = params[name]["norm"]
        if net.norm == "group":
            x = group_norm(norm, x, max(x.shape[-1] // 8, 1))
        else:
            x, new[name] = batch_norm(norm, state[name], x, train=train)
        x = jax.nn.relu(x)
    pooled = x.mean((1, 2))
    logits = pooled @ params["linear"]["kernel"] + params["linear"]["bias"][None]
    return logits, pooled, new


def _blocks(net: Net) -> dict[str, wide_resnet.Block]:
    return wide_resnet.blocks(16, net.width, ((net.depth - 4) // 6,) * 3)
