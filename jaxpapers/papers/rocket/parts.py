"""The three nets of Rocket Launching: out of DIN, of DIEN, of Wide ResNets."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxpapers.nets import behaviour, evolution, interest, mlp, wide_resnet
from jaxpapers.ops.images import augment


class Part(NamedTuple):
    """One of the three nets.

    Attributes:
      init: key -> params.
      apply: of the shared net (params, state, batch, key, train) -> (features, state);
        of a head (params, shared params, state, features, batch, key, train) ->
        (logits (B, C) or (B,), hidden layers, state). Features are any pytree.
      statistics: params -> first state, what gradients do not touch.
    """

    init: Callable
    apply: Callable
    statistics: Callable = lambda params: {}


def din_parts(net: Any) -> tuple[Part, Part, Part]:
    """DIN's tables and attention, under two MLPs: ``net.light`` and ``net.booster``."""

    def shared(params, state, batch, key, train):
        del key
        features, unit = interest.apply(
            params, state["unit"], batch, net=net, train=train
        )
        return features, {"unit": unit}

    def statistics(params):
        return {"unit": mlp.statistics(params.get("unit", {}))}

    def head(name):
        width = interest.width(net)
        return _click_head(_own(net, name), lambda key: {}, lambda p, x: x, width)

    interest.check(net)
    init = functools.partial(interest.init, net=net)
    return Part(init, shared, statistics), head("light"), head("booster")


def dien_parts(net: Any) -> tuple[Part, Part, Part]:
    """DIEN's tables, under recurrent nets and MLPs of two sizes (``net.light.state``)."""

    def shared(params, state, batch, key, train):
        del key, train
        return evolution.read(params["tables"], batch, net=net), state

    def head(name):
        own = _own(net, name)
        core = functools.partial(evolution.init, net=own)
        width = evolution.width(own)
        return _click_head(
            own, core, lambda p, reads: evolution.apply(p, reads, net=own)[0], width
        )

    def init(key):
        return {"tables": behaviour.init(key, net)}

    return Part(init, shared), head("light"), head("booster")


def wrn_parts(net: Any) -> tuple[Part, Part, Part]:
    """Wide ResNets that share convolutions, each with its own batch normalisation.

    ``net.sharing="interval"`` shares the first blocks of every group, "bottom" the first
    two groups, above which the light net ends.

    Raises:
      ValueError: unknown sharing, or sizes that do not fit.
    """
    booster = wide_resnet.blocks(net.base, net.width, (net.booster_blocks,) * 3)
    if net.sharing == "interval":
        light = wide_resnet.blocks(net.base, net.width, (net.light_blocks,) * 3)
    elif net.sharing == "bottom":
        light = wide_resnet.blocks(net.base, net.width, (net.booster_blocks,) * 2)
    else:
        raise ValueError(
            f"config.net.sharing must be 'interval' or 'bottom', got {net.sharing!r}"
        )
    if not 1 <= net.light_blocks < net.booster_blocks:
        raise ValueError(
            "config.net needs 1 <= light_blocks < booster_blocks, got "
            f"{net.light_blocks} and {net.booster_blocks}"
        )
    own = {name: block for name, block in booster.items() if name not in light}

    def init_shared(key):
        key_stem, key_convs = jax.random.split(key)
        stem = wide_resnet.conv_kernel(key_stem, 3, net.channels, net.base)
        return {"stem": stem, "convs": wide_resnet.init_convs(key_convs, light)}

    def shared(params, state, batch, key, train):
        x = batch["image"]
        if train and net.augment:
            x = augment(key, x)
        return wide_resnet.conv(x, params["stem"]), state

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
    return lower, head(light, {}, 0.0), head(booster, own, net.dropout)


PARTS = {"din": din_parts, "dien": dien_parts, "wrn": wrn_parts}


def _click_head(own, core: Callable, read: Callable, width: int) -> Part:
    """``core`` parameters beside an MLP on what ``read`` makes of the features."""

    def init(key):
        key_core, key_mlp = jax.random.split(key)
        sizes = (width, *own.hidden, 1)
        return {**core(key_core), "mlp": mlp.init(key_mlp, sizes, own.activation)}

    def apply(params, lower, state, features, batch, key, train):
        del key
        x = read(params, features)
        logit, hidden, state = behaviour.head(
            params["mlp"], state, x, batch, lower["tables"], net=own, train=train
        )
        return logit, hidden, state

    return Part(init, apply, lambda params: mlp.statistics(params["mlp"]))


def _own(net, name):
    """``net`` with the sizes of one of the two nets."""
    own = net.copy_and_resolve_references()
    own.update(net[name])
    return own
