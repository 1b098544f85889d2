"""The three nets of Rocket Launching: of DIN, of DIEN, of Wide ResNets."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxpapers.nets import (
    behaviour,
    convolution,
    evolution,
    interest,
    mlp,
    wide_resnet,
)
from jaxpapers.ops.images import augment
from jaxpapers.options import check_choices, check_least

SHARING = ("interval", "bottom")


class Part(NamedTuple):
    """One of the three nets.

    Attributes:
      init: key -> params.
      apply: of the shared net (params, state, batch, key, train) -> (features, state);
        of a head (params, shared params, state, features, batch, key, train) ->
        (logits (B, C) or (B,), hidden layers, state). Features are any pytree.
      statistics: params -> initial state, which gradients do not update.
    """

    init: Callable
    apply: Callable
    statistics: Callable = lambda params: {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mlp:
    """Sizes of one of DIN's two MLPs."""

    hidden: tuple[int, ...]
    """Widths of the hidden layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent(Mlp):
    """Sizes of one of DIEN's two recurrent nets with an MLP."""

    state: int
    """H: width of both recurrent layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DinNet(interest.Net):
    """DIN under two MLPs, which take the place of ``hidden``."""

    light: Mlp = Mlp(hidden=(16, 8))
    """The light net."""
    booster: Mlp = Mlp(hidden=(200, 80))
    """The booster."""
    split_booster: bool = False
    """Whether the booster's own kernels are split over the mesh axis ``model``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DienNet(evolution.Net):
    """DIEN in two sizes, which take the place of ``hidden`` and ``state``."""

    light: Recurrent = Recurrent(hidden=(16, 8), state=8)
    """The light net."""
    booster: Recurrent = Recurrent(hidden=(200, 80), state=36)
    """The booster."""
    split_booster: bool = False
    """Whether the booster's MLP is split over the mesh axis ``model``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrnNet:
    """Wide ResNets of two depths: WRN-16-1 and WRN-40-1, the paper's on CIFAR-10."""

    size: int = 32
    """Height and width of an image."""
    channels: int = 3
    """Of an image."""
    classes: int = 10
    """Number of logits."""
    base: int = 16
    """Channels of the stem."""
    width: int = 1
    """k of WRN-d-k."""
    sharing: str = "interval"
    """interval shares the first blocks of every group; bottom the first two groups, above
    which the light net ends."""
    light_blocks: int = 2
    """Blocks of a group of the light net."""
    booster_blocks: int = 6
    """Blocks of a group of the booster."""
    dropout: float = 0.0
    """Rate in the blocks that only the booster has."""
    augment: bool = True
    """Whether training images are mirrored and shifted by up to 4 pixels."""
    split_booster: bool = False
    """Whether the booster's own kernels are split over the mesh axis ``model``."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        check_choices(self, "net", sharing=SHARING)
        check_least(
            self, "net", size=1, channels=1, classes=2, base=1, width=1, light_blocks=1,
            dropout=0,
        )  # fmt: skip
        if self.light_blocks >= self.booster_blocks:
            raise ValueError(
                "net.light_blocks must be < net.booster_blocks, got "
                f"{self.light_blocks} and {self.booster_blocks}"
            )


def din_parts(net: DinNet) -> tuple[Part, Part, Part]:
    """DIN's tables and attention shared by two MLPs."""

    def shared(params, state, batch, key, train):
        del key
        features, unit = interest.apply(
            params, state["unit"], batch, net=net, train=train
        )
        return features, {"unit": unit}

    def statistics(params):
        return {"unit": mlp.statistics(params.get("unit", {}))}

    def head(sizes):
        resized = dataclasses.replace(net, hidden=sizes.hidden)
        width = interest.width(net)
        return _click_head(resized, lambda key: {}, lambda p, x: x, width)

    init = functools.partial(interest.init, net=net)
    return Part(init, shared, statistics), head(net.light), head(net.booster)


def dien_parts(net: DienNet) -> tuple[Part, Part, Part]:
    """DIEN's tables shared by recurrent nets of two sizes."""

    def shared(params, state, batch, key, train):
        del key, train
        return evolution.embed(params["tables"], batch, net=net), state

    def head(sizes):
        resized = dataclasses.replace(net, hidden=sizes.hidden, state=sizes.state)
        return _click_head(
            resized,
            functools.partial(evolution.init, net=resized),
            lambda p, embedded: evolution.apply(p, embedded, net=resized)[0],
            evolution.width(resized),
        )

    def init(key):
        return {"tables": behaviour.init(key, net)}

    return Part(init, shared), head(net.light), head(net.booster)


def wrn_parts(net: WrnNet) -> tuple[Part, Part, Part]:
    """Wide ResNets that share convolutions, each with its own batch normalisation."""
    booster = wide_resnet.blocks(net.base, net.width, (net.booster_blocks,) * 3)
    counts = (net.light_blocks,) * 3
    if net.sharing == "bottom":
        counts = (net.booster_blocks,) * 2
    light = wide_resnet.blocks(net.base, net.width, counts)
    deep = {name: block for name, block in booster.items() if name not in light}

    def init_shared(key):
        key_stem, key_convs = jax.random.split(key)
        stem = convolution.conv_kernel(key_stem, 3, net.channels, net.base)
        return {"stem": stem, "convs": wide_resnet.init_convs(key_convs, light)}

    def shared(params, state, batch, key, train):
        x = batch["image"]
        if train and net.augment:
            x = augment(key, x)
        return convolution.conv(x, params["stem"]), state

    def head(layout, extra, dropout):
        def init(key):
            key_convs, key_norms, key_linear = jax.random.split(key, 3)
            convs = wide_resnet.init_convs(key_convs, extra) if extra else {}
            top = wide_resnet.init_top(key_norms, key_linear, layout, net.classes)
            return {**({"convs": convs} if convs else {}), **top}

        def apply(params, lower, state, x, batch, key, train):
            convs = {**lower["convs"], **params.get("convs", {})}
            logits, hidden, norms = wide_resnet.apply(
                {**params, "convs": convs}, state, x, layout, train=train, key=key,
                mask=batch["weight"] > 0 if "weight" in batch else None,
                dropout=dict.fromkeys(extra, dropout),
            )  # fmt: skip
            return logits, [hidden], norms

        return Part(init, apply, wide_resnet.statistics)

    lower = Part(init_shared, shared)
    return lower, head(light, {}, 0.0), head(booster, deep, net.dropout)


Net = DinNet | DienNet | WrnNet
NETS: dict[str, type] = {"din": DinNet, "dien": DienNet, "wrn": WrnNet}
"""By ``net.model``."""


def parts_of(net: Net) -> tuple[Part, Part, Part]:
    """The shared, light and booster parts of a net."""
    if isinstance(net, DinNet):
        return din_parts(net)
    return dien_parts(net) if isinstance(net, DienNet) else wrn_parts(net)


def _click_head(net: Any, core: Callable, read: Callable, width: int) -> Part:
    """MLP head on the output of ``read``, which has the parameters of ``core``."""

    def init(key):
        key_core, key_mlp = jax.random.split(key)
        sizes = (width, *net.hidden, 1)
        return {**core(key_core), "mlp": mlp.init(key_mlp, sizes, net.activation)}

    def apply(params, lower, state, features, batch, key, train):
        del key
        x = read(params, features)
        logit, hidden, state = behaviour.head(
            params["mlp"], state, x, batch, lower["tables"], net=net, train=train
        )
        return logit, hidden, state

    return Part(init, apply, lambda params: mlp.statistics(params["mlp"]))
