r"""Rocket Launching: a light net and a booster net trained together, one is served.

Guorui Zhou, Ying Fan, Runpeng Cui, Weijie Bian, Xiaoqiang Zhu, Kun Gai. "Rocket
Launching: A Universal and Efficient Framework for Training Well-performing Light Net",
arXiv 1708.04106, 2017 (AAAI 2018).

The served net has milliseconds to answer, a larger one is more accurate. Both share their
lower layers and are trained on the same task at the same time, and a hint loss pulls the
light net's logits to the booster's throughout training, so that it follows the booster's
trajectory and not only its final function. Gradient block keeps the hint from changing
the booster. After training the booster is discarded.

With y the label, l = l(x; W_S, W_L) and z = z(x; W_S, W_B) the logits in R^C,
p = softmax(l), q = softmax(z), H the cross-entropy, sg stop-gradient:

$$ \mathcal L = H(y, p) + H(y, q) + \lambda\,\mathrm{hint}(l, \mathrm{sg}(z)) \quad (1) $$
$$ \mathrm{mimic} = \|l - z\|^2, \quad \mathrm{mse} = \|p - q\|^2, \quad
   \mathrm{kd} = -\textstyle\sum_i \mathrm{softmax}(z/T)_i \log \mathrm{softmax}(l/T)_i $$

``rocket`` combines any three pure functions. The ones here are Wide ResNets, which share
convolutions and keep their own batch normalisation (``WrnNet``), DIN, which shares tables
and attention under two MLPs (``DinNet``), and DIEN, which shares tables under recurrent
nets of two sizes (``DienNet``).

Departures. The paper's text blocks the gradient of W_B, its code that of the booster's
logits, which cuts the hint's path through z into W_S too; ``block="logits"`` is the
code's, ``block="booster_params"`` the literal text's. The paper prints H(p/T, q/T) for
kd: the target must be the booster. The hint is divided by the number of rows, not by the
nominal batch. One logit stands for the classes [l, 0]. The optimizer keeps its momentum
where the learning rate drops; the code builds a new optimizer.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from jaxpapers import optim
from jaxpapers.method import Method, gradient
from jaxpapers.method.tables import row_gradient
from jaxpapers.nets import behaviour, embedding
from jaxpapers.optim import rows
from jaxpapers.options import check_choices, from_config
from jaxpapers.papers.rocket.hints import distillation_loss, feature_hint, hint_loss
from jaxpapers.papers.rocket.objective import PAPER, Options, apply_shared, rocket_loss
from jaxpapers.papers.rocket.parts import (
    NETS,
    DienNet,
    DinNet,
    Mlp,
    Net,
    Part,
    Recurrent,
    WrnNet,
    dien_parts,
    din_parts,
    parts_of,
    wrn_parts,
)

__all__ = [
    "DienNet", "DinNet", "Mlp", "Options", "PAPER", "Part", "Predictions",
    "Recurrent", "Rocket", "WrnNet", "dien_parts", "din_parts", "distillation_loss",
    "export_light", "feature_hint", "hint_loss", "init", "loss", "make", "parts_of",
    "predict", "rocket", "rocket_loss", "statistics", "wrn_parts",
]  # fmt: skip


class Rocket(NamedTuple):
    """Three nets combined; params and state are dicts of shared, light and booster.

    Attributes:
      init: key -> params.
      statistics: params -> state.
      loss: (params, state, batch, key) -> (scalar, (metrics, state)).
      predict_light: (params, state, batch) -> logits; needs no booster.
      predict_booster: (params, state, batch) -> logits.
    """

    init: Callable
    statistics: Callable
    loss: Callable
    predict_light: Callable
    predict_booster: Callable


class Predictions(NamedTuple):
    """Logits of both nets; the light one is served."""

    light: Any
    booster: Any


def rocket(
    shared: Part, light: Part, booster: Part, *, options: Options = PAPER
) -> Rocket:
    """Combines three nets.

    Args:
      shared: the lower layers.
      light: the net that is served.
      booster: the net that is discarded after training.
      options: hyper-parameters of the objective.

    Example:
      >>> import jax.numpy as jnp
      >>> dense = lambda key: {"w": jax.random.normal(key, (2, 2))}
      >>> lower = Part(dense, lambda p, s, x, key, train: (x["x"] @ p["w"], s))
      >>> head = Part(dense, lambda p, w, s, h, x, key, train: (h @ p["w"], (), s))
      >>> nets = rocket(lower, head, head, options=Options(lam=0.1))
      >>> params = jax.jit(nets.init)(jax.random.key(0))
      >>> batch = {"x": jnp.ones((3, 2)), "label": jnp.array([0, 1, 1])}
      >>> state = nets.statistics(params)
      >>> value, (metrics, _) = jax.jit(nets.loss)(
      ...     params, state, batch, jax.random.key(1)
      ... )
      >>> nets.predict_light(export_light(params), state, batch).shape
      (3, 2)
    """
    share = options.share
    heads = {"light": light, "booster": booster}
    heads = {name: heads[name] for name in options.trained}

    def init(key):
        keys = dict(zip(("shared", "light", "booster"), jax.random.split(key, 3)))
        params = {name: head.init(keys[name]) for name, head in heads.items()}
        if share:
            return {"shared": shared.init(keys["shared"]), **params}
        lower = zip(heads, jax.random.split(keys["shared"]))
        return {"shared": {name: shared.init(k) for name, k in lower}, **params}

    def statistics(params):
        lower = params["shared"]
        state = {n: h.statistics(params[n]) for n, h in heads.items() if n in params}
        if share:
            return {"shared": shared.statistics(lower), **state}
        return {"shared": {n: shared.statistics(p) for n, p in lower.items()}, **state}

    def predict(name, params, state, batch):
        key = jax.random.key(0)  # Ignored: without train the nets are deterministic.
        features, _ = apply_shared(
            shared.apply, params["shared"], state["shared"], batch, key, share, (name,),
            train=False,
        )  # fmt: skip
        lower = params["shared"] if share else params["shared"][name]
        return heads[name].apply(
            params[name], lower, state[name], features[name], batch, key, False
        )[0]

    return Rocket(
        init,
        statistics,
        functools.partial(
            rocket_loss, shared.apply, light.apply, booster.apply, options=options
        ),
        functools.partial(predict, "light"),
        functools.partial(predict, "booster"),
    )


def init(key: Key[Array, ""], net: Net, *, options: Options = PAPER) -> dict:
    """Parameters ``shared``, ``light`` and ``booster``, those that are trained.

    Args:
      key: of the draws.
      net: sizes.
      options: hyper-parameters of the objective.
    """
    return rocket(*parts_of(net), options=options).init(key)


def statistics(params: dict, net: Net, *, options: Options = PAPER) -> dict:
    """Initial moving statistics of the nets: ``State.extra``; arguments as ``init``."""
    return rocket(*parts_of(net), options=options).statistics(params)


def loss(
    params: dict,
    extra: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    net: Net,
    options: Options = PAPER,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """``rocket_loss`` of a net of ``rocket.parts``.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      batch: see ``nets.behaviour`` for click models; image (B, H, W, C) for ``WrnNet``;
        and ``rocket_loss``.
      key: of dropout and augmentation.
      net: sizes.
      options: hyper-parameters of the objective.
    """
    return rocket(*parts_of(net), options=options).loss(params, extra, batch, key)


def predict(
    params: dict,
    extra: dict,
    batch: Mapping[str, Array],
    *,
    net: Net,
    options: Options = PAPER,
) -> Any:
    """Logits of both nets as ``Predictions``; of one net, where only one is trained.

    Args:
      params: see ``init``, or the result of ``export_light``.
      extra: see ``statistics``.
      batch: see ``loss``, without label; click models also take N candidates per user.
      net: sizes.
      options: hyper-parameters of the objective.
    """
    nets = rocket(*parts_of(net), options=options)
    if "booster" not in params:
        return nets.predict_light(params, extra, batch)
    booster = nets.predict_booster(params, extra, batch)
    if "light" not in params:
        return booster
    return Predictions(nets.predict_light(params, extra, batch), booster)


def export_light(tree: dict) -> dict:
    """Params, or state, without the booster: the served net."""
    return {name: x for name, x in tree.items() if name != "booster"}


def ablations(config: Any) -> dict[str, dict[str, Any]]:
    """Label -> fields: each net alone, and both without gradient block."""
    if config.method.nets != "both":
        return {}
    return {
        "light alone": {"method.nets": "light"},
        "booster alone": {"method.nets": "booster"},
        "without block": {"method.block": "none"},
    }


def make(config: Any) -> Method:
    """The method of a config (configs/rocket.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.

    Raises:
      ValueError: a field that is unknown or out of range.
    """
    check_choices(config.net, "net", model=tuple(NETS))
    fields = dict(config.net.items())
    net = from_config(NETS[fields.pop("model")], fields, "net")
    options = from_config(Options, config.method, "method")
    c = config.optim
    nets = rocket(*parts_of(net), options=options)

    def init_params(key, batch):
        del batch
        return nets.init(key)

    common: dict[str, Any] = {
        "predict": functools.partial(predict, net=net, options=options),
        "accumulate": config.train.accumulate,
        "init_extra": nets.statistics,
    }
    served = export_light if options.nets == "both" else None
    split = split_rules(net) if net.split_booster and options.nets != "light" else ()
    if isinstance(net, WrnNet):
        tx = optim.from_config(c, config.train.steps)
        method = gradient(init_params, nets.loss, tx, rules=split, **common)
        return method._replace(served=served)
    tx, table_tx = rows.from_config(c, config.train.steps)
    if table_tx and not options.share:
        raise ValueError(
            "method.share=False gives each net its own tables: set optim.tables=dense"
        )
    method = row_gradient(
        init_params,
        nets.loss,
        tx,
        table_tx=table_tx,
        ids=functools.partial(behaviour.ids, net=net),
        tables="shared/tables",
        clip=c.clip,
        rules=(*rows.STATE_RULES, *split, *embedding.RULES),
        **common,
    )
    return method._replace(served=served)


def split_rules(net: Net) -> tuple[tuple[str, P], ...]:
    """Sharding rules that split the booster's own kernels over the mesh axis ``model``.

    Kernels of an MLP are split by columns and rows in turn, so that two layers need one
    reduction; those of convolutions by their output channels.
    """
    if isinstance(net, WrnNet):
        return ((r"booster/convs/", P(None, None, None, "model")),)
    rules = []
    for i in range(len(net.booster.hidden) + 1):
        if i % 2:
            rules.append((rf"booster/mlp/layer_{i}/kernel", P("model", None)))
        elif i < len(net.booster.hidden):
            rules.append((rf"booster/mlp/layer_{i}/kernel", P(None, "model")))
    return tuple(rules)
