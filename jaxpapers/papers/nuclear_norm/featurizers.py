"""Nets of the nuclear norm's experiments: features, and a linear head on them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxpapers.nets import mnist_cnn, resnet
from jaxpapers.ops.images import augment
from jaxpapers.options import check_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearNet:
    """A linear map of vectors; diagonal, of their coordinates."""

    inputs: int = 14
    """Coordinates of x."""
    features: int = 16
    """Columns of the map; ``inputs`` where it is diagonal."""
    classes: int = 2
    """Number of logits."""
    diagonal: bool = False
    """A weight for each coordinate alone."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        check_least(self, "net", inputs=1, features=1, classes=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CnnNet:
    """The small convolutional net of digits."""

    size: int = 28
    """Height and width of an image."""
    channels: int = 1
    """Of an image."""
    classes: int = 10
    """Number of logits."""
    widths: tuple[int, ...] = mnist_cnn.WIDTHS
    """Channels of the four convolutions; the last one's are the features."""
    groups: int = 8
    """Of the group normalisation."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        check_least(self, "net", size=1, channels=1, classes=2, widths=1, groups=1)
        if len(self.widths) != 4 or any(w % self.groups for w in self.widths):
            raise ValueError(
                f"net.widths must be 4 multiples of net.groups={self.groups}, got "
                f"{self.widths}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet:
    """A residual network of photographs, whose batch normalisation may be frozen."""

    depth: int = 50
    """18, 34, 50 or 101."""
    base: int = 64
    """Channels of the stem."""
    size: int = 224
    """Height and width of an image."""
    classes: int = 7
    """Number of logits."""
    frozen: bool = True
    """Keep the moving statistics; scales and biases are trained."""
    dropout: float = 0.0
    """Rate at the features."""
    augment: bool = True
    """Random crops of at least 0.7 of the image, mirrors, colours."""

    channels = 3

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        resnet.layout(self.depth)
        check_least(self, "net", base=1, size=32, classes=2, dropout=0)
        if not self.dropout < 1:
            raise ValueError(f"net.dropout must be < 1, got {self.dropout}")


Net = LinearNet | CnnNet | ResNet
NETS: dict[str, type] = {"linear": LinearNet, "cnn": CnnNet, "resnet": ResNet}
"""By ``net.model``."""


def width(net: Net) -> int:
    """Number of features."""
    if isinstance(net, LinearNet):
        return net.inputs if net.diagonal else net.features
    return (
        net.widths[-1]
        if isinstance(net, CnnNet)
        else resnet.features(net.depth, net.base)
    )


def init(key: Key[Array, ""], net: Net) -> dict:
    """Parameters: ``featurizer`` and ``head``."""
    key, key_head = jax.random.split(key)
    if isinstance(net, CnnNet):
        body = mnist_cnn.init(key, net.channels, net.widths)
    elif isinstance(net, ResNet):
        body = resnet.init(key, net.depth, base=net.base)
    else:
        shape = (net.inputs,) if net.diagonal else (net.inputs, net.features)
        body = {"weight": _uniform(key, shape, net.inputs)}
        if not net.diagonal:
            key_bias = jax.random.fold_in(key, 1)
            body["bias"] = _uniform(key_bias, (net.features,), net.inputs)
    features = width(net)
    head = {
        "kernel": _uniform(key_head, (features, net.classes), features),
        "bias": jnp.zeros(net.classes),
    }
    return {"featurizer": body, "head": head}


def statistics(params: dict, net: Net) -> dict:
    """Moving statistics of batch normalisation at the start; {} without any."""
    return resnet.statistics(params["featurizer"]) if isinstance(net, ResNet) else {}


def featurize(
    params: dict,
    moments: dict,
    x: Any,
    net: Net,
    *,
    train: bool = False,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "B D"], dict]:
    """Features, after any dropout, and the new moving statistics.

    Args:
      params: see ``init``.
      moments: see ``statistics``.
      x: (B, inputs) of a linear net, images (B, H, W, C) in [0, 1] or bytes of the
        others.
      net: hyper-parameters.
      train: augmentation, dropout, and the batch's statistics unless frozen.
      key: of augmentation and dropout.
    """
    body = params["featurizer"]
    if isinstance(net, LinearNet):
        w = body["weight"]
        return (x * w[None] if net.diagonal else x @ w + body["bias"][None]), moments
    x = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x
    if isinstance(net, CnnNet):
        return mnist_cnn.apply(body, x, net.groups), moments
    if train and net.augment:
        assert key is not None
        x = augment(key, x, pad=0, least_area=0.7, jitter=0.3, grey=0.1)
    mean, std = (jnp.array(v).reshape(1, 1, 1, 3) for v in (resnet.MEAN, resnet.STD))
    z, moments = resnet.apply(
        body, moments, (x - mean) / std, net.depth, base=net.base,
        train=train and not net.frozen,
    )  # fmt: skip
    if train and net.dropout:
        assert key is not None
        keep = jax.random.bernoulli(
            jax.random.fold_in(key, 1), 1 - net.dropout, z.shape
        )
        z = jnp.where(keep, z / (1 - net.dropout), 0)
    return z, moments


def classify(params: dict, features: Float[Array, "B D"]) -> Float[Array, "B C"]:
    """Logits of the head."""
    return features @ params["head"]["kernel"] + params["head"]["bias"][None]


def _uniform(key, shape, fan_in):
    """PyTorch's start of a linear layer."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
