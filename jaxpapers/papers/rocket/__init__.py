r"""Rocket Launching: a light net and a booster net trained together, one is served.

Guorui Zhou, Ying Fan, Runpeng Cui, Weijie Bian, Xiaoqiang Zhu, Kun Gai. "Rocket
Launching: A Universal and Efficient Framework for Training Well-performing Light Net",
arXiv 1708.04106, 2017 (AAAI 2018).

A small net has to answer in milliseconds; a big one learns better. Both share their lower
layers and train on the same task at the same time, and a hint loss pulls the small one's
logits to the big one's during the whole of training, so that it follows the path and not
only the end. Gradient block keeps the hint from changing the booster. Afterwards the
booster is thrown away.

With y the label, l = l(x; W_S, W_L) and z = z(x; W_S, W_B) the logits in R^C,
p = softmax(l), q = softmax(z), H the cross-entropy, sg stop-gradient:

$$ \mathcal L = H(y, p) + H(y, q) + \lambda\,\mathrm{hint}(l, \mathrm{sg}(z)) \quad (1) $$
$$ \mathrm{mimic} = \|l - z\|^2, \quad \mathrm{mse} = \|p - q\|^2, \quad
   \mathrm{kd} = -\textstyle\sum_i \mathrm{softmax}(z/T)_i \log \mathrm{softmax}(l/T)_i $$

Any three pure functions can be the nets: ``rocket`` combines them. Here they are Wide
ResNets that share convolutions and keep their own batch normalisation, DIN, which shares
tables and attention under two MLPs, and DIEN, which shares tables under recurrent nets of
two sizes.

Departures. The paper's text blocks the gradient of W_B, its code that of the booster's
logits, which cuts the hint's path through z into W_S too; ``block="logits"`` is the
code's, ``block="booster_params"`` the literal text's. The paper prints H(p/T, q/T) for
kd: the target must be the booster. The hint is divided by the rows that are there, not by
the nominal batch. One logit stands for the classes [l, 0]. The optimizer keeps its
momentum where the learning rate drops; the code builds a new one.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxpapers import optim
from jaxpapers.method import Method, gradient
from jaxpapers.method.tables import row_gradient
from jaxpapers.nets import behaviour, embedding
from jaxpapers.optim import rows
from jaxpapers.papers.rocket.hints import (
    FEATURE_HINTS,
    check_hint,
    distillation_loss,
    feature_hint,
    hint_loss,
)
from jaxpapers.papers.rocket.parts import PARTS, Part, dien_parts, din_parts, wrn_parts

__all__ = [
    "Part", "Predictions", "Rocket", "dien_parts", "din_parts", "distillation_loss",
    "export_light", "feature_hint", "hint_loss", "loss", "make", "rocket", "rocket_loss",
    "sampler", "wrn_parts",
]  # fmt: skip

BLOCKS = ("logits", "booster_params", "none")
NETS = ("both", "light", "booster")


class Rocket(NamedTuple):
    """The three nets combined; params and state are dicts of shared, light, booster.

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
    """Logits of both nets; the light one is what is served."""

    light: Any
    booster: Any


def rocket_loss(
    shared: Callable,
    light: Callable,
    booster: Callable,
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    lam: float = 0.03,
    hint: str = "mimic",
    block: str = "logits",
    temperature: float = 1.0,
    features: str = "none",
    features_weight: float = 1.0,
    alpha: float = 0.0,
    nets: str = "both",
    share: bool = True,
    remat: bool = False,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """Cross-entropies of both nets and the hint (eq 1), means over the rows.

    Args:
      shared: ``apply`` of a ``Part``.
      light: of a head.
      booster: of a head.
      params: dict of shared, light and booster.
      state: as ``params``.
      batch: with label (B,): class, or 0 and 1 for one logit; weight (B,) is optional;
        teacher (B, C), logits of a frozen booster, with ``alpha``.
      key: of the nets.
      lam: weight of the hint.
      hint: see ``hint_loss``.
      block: whom the hint leaves alone: "logits" the booster and what feeds it,
        "booster_params" the booster's own parameters, "none" nobody.
      temperature: of "kd" and of the teacher's.
      features: see ``feature_hint``; "none" is without.
      features_weight: of the feature hint.
      alpha: see ``distillation_loss``; 0: no teacher.
      nets: "light" and "booster" train one net alone.
      share: False: each net has its own lower layers, in ``params["shared"][net]``.
      remat: keep none of the booster's hidden layers for the backward pass, but compute
        them again there.

    Returns:
      Nats; metrics ce_light, ce_booster, hint, acc_light, acc_booster, as far as the nets
      are there, and ``weight``; the state to use next.

    Raises:
      ValueError: unknown names, lam < 0, T <= 0, a net without parameters, classes that
        differ.
    """
    _check_options(lam, hint, block, temperature, features, nets)
    heads = {"light": light, "booster": booster}
    heads = heads if nets == "both" else {nets: heads[nets]}
    for name in heads:
        if not params.get(name):
            raise ValueError(
                f"params have no {name!r} net, got {sorted(params)}; an exported light "
                "net cannot be trained on: method.nets='light' trains one alone"
            )
    keys = dict(zip(("shared", "light", "booster"), jax.random.split(key, 3)))
    inputs, shared_state = _lower(
        shared, params["shared"], state["shared"], batch, keys["shared"], share, heads
    )
    state = {**state, "shared": shared_state}

    def run(name, own):
        lower = params["shared"] if share else params["shared"][name]
        args = own, lower, state[name], inputs[name], batch, keys[name]

        def head(*args):
            return heads[name](*args, True)

        return (jax.checkpoint(head) if remat and name == "booster" else head)(*args)

    found, hidden, new = {}, {}, dict(state)
    mean = _mean(batch)
    metrics, total = {}, jnp.zeros(())
    for name in heads:
        logits, hidden[name], new[name] = run(name, params[name])
        found[name] = logits
        metrics[f"ce_{name}"] = mean(_cross_entropy(logits, batch["label"]))
        metrics[f"acc_{name}"] = mean(_correct(logits, batch["label"]))
        total = total + metrics[f"ce_{name}"]
    if nets == "both":
        target, deep = found["booster"], hidden["booster"]
        if block == "logits":
            target, deep = lax.stop_gradient((target, deep))
        elif block == "booster_params":
            # The forward pass is the one above: XLA merges them.
            target, deep, _ = run("booster", lax.stop_gradient(params["booster"]))
        metrics["hint"] = mean(hint_loss(hint, found["light"], target, temperature))
        total = total + lam * metrics["hint"]
        if features != "none":
            value = mean(feature_hint(features, hidden["light"], deep))
            metrics["feature_hint"] = value
            total = total + features_weight * value
    if alpha and "light" in found:
        if "teacher" not in batch:
            raise ValueError(
                f"method.alpha={alpha} distils from batch['teacher'], logits of a frozen "
                f"booster; got {sorted(batch)}"
            )
        value = distillation_loss(found["light"], batch["teacher"], temperature, alpha)
        metrics["distillation"] = mean(value)
        total = total + metrics["distillation"]
    if "weight" in batch:
        metrics["weight"] = batch["weight"].sum()
    return total, (metrics, new)


def rocket(shared: Part, light: Part, booster: Part, **options: Any) -> Rocket:
    """Combines three nets.

    Args:
      shared: the lower layers.
      light: the net that is served.
      booster: the net that is thrown away.
      options: those of ``rocket_loss``.

    Raises:
      ValueError: see ``rocket_loss``.

    Example:
      >>> dense = lambda key: {"w": jax.random.normal(key, (2, 2))}
      >>> lower = Part(dense, lambda p, s, x, key, train: (x["x"] @ p["w"], s))
      >>> head = Part(dense, lambda p, w, s, h, x, key, train: (h @ p["w"], (), s))
      >>> nets = rocket(lower, head, head, lam=0.1)
      >>> params = nets.init(jax.random.key(0))
      >>> batch = {"x": jnp.ones((3, 2)), "label": jnp.array([0, 1, 1])}
      >>> state = nets.statistics(params)
      >>> value, (metrics, _) = nets.loss(params, state, batch, jax.random.key(1))
      >>> nets.predict_light(export_light(params), state, batch).shape
      (3, 2)
    """
    nets, share = options.get("nets", "both"), options.get("share", True)
    _check_options(
        options.get("lam", 0.03), options.get("hint", "mimic"),
        options.get("block", "logits"), options.get("temperature", 1.0),
        options.get("features", "none"), nets,
    )  # fmt: skip
    parts = {"light": light, "booster": booster}
    parts = parts if nets == "both" else {nets: parts[nets]}

    def init(key):
        keys = dict(zip(("shared", "light", "booster"), jax.random.split(key, 3)))
        params = {name: part.init(keys[name]) for name, part in parts.items()}
        if share:
            return {"shared": shared.init(keys["shared"]), **params}
        keys = jax.random.split(keys["shared"])
        own = {name: shared.init(k) for name, k in zip(parts, keys)}
        return {"shared": own, **params}

    def statistics(params):
        own = params["shared"]
        own = (
            shared.statistics(own)
            if share
            else {name: shared.statistics(p) for name, p in own.items()}
        )
        there = {n: part for n, part in parts.items() if n in params}
        return {"shared": own, **{n: x.statistics(params[n]) for n, x in there.items()}}

    def predict(name, params, state, batch):
        key = jax.random.key(0)  # Nothing is drawn.
        inputs, _ = _lower(
            shared.apply, params["shared"], state["shared"], batch, key, share, [name],
            train=False,
        )  # fmt: skip
        lower = params["shared"] if share else params["shared"][name]
        head = parts[name].apply
        own, given = params[name], state[name]
        return head(own, lower, given, inputs[name], batch, key, False)[0]

    return Rocket(
        init,
        statistics,
        functools.partial(
            rocket_loss, shared.apply, light.apply, booster.apply, **options
        ),
        functools.partial(predict, "light"),
        functools.partial(predict, "booster"),
    )


def loss(
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    nets: Rocket,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """``rocket_loss`` of nets that are combined already, as ``Method.loss``.

    Args:
      params: of ``nets.init``.
      state: of ``nets.statistics``.
      batch: see ``rocket_loss``.
      key: of the nets.
      nets: see ``rocket``.
    """
    return nets.loss(params, state, batch, key)


def export_light(tree: dict) -> dict:
    """Params, or state, without the booster: what is served."""
    return {name: x for name, x in tree.items() if name != "booster"}


def sampler(
    params: dict,
    key: Key[Array, ""],
    batch: Mapping[str, Array],
    extra: dict,
    *,
    nets: Rocket,
) -> Any:
    """Logits of a batch: ``Predictions``, or one array where one net is there.

    Args:
      params: of ``rocket``, or what ``export_light`` left.
      key: unused, nothing is drawn.
      batch: as the loss takes it, without label; click models also take N candidates for
        each user, see ``nets.behaviour``.
      extra: ``State.extra``.
      nets: see ``rocket``.
    """
    del key
    if "booster" not in params:
        return nets.predict_light(params, extra, batch)
    booster = nets.predict_booster(params, extra, batch)
    if "light" not in params:
        return booster
    return Predictions(nets.predict_light(params, extra, batch), booster)


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
    """Binds ``config`` (see configs/rocket.py).

    Args:
      config: groups ``net``, ``optim``, ``train``, ``method``.

    Raises:
      ValueError: unknown names, or values out of range.
    """
    net, c, own = config.net, config.optim, config.method
    behaviour.check_choices(net, model=tuple(PARTS))
    if own.alpha < 0 or own.features_weight < 0:
        raise ValueError(
            "config.method.alpha and method.features_weight must be >= 0, got "
            f"{own.alpha} and {own.features_weight}"
        )
    nets = rocket(*PARTS[net.model](net), **own.to_dict())
    value = functools.partial(loss, nets=nets)

    def init_params(key, batch):
        del batch
        return nets.init(key)

    options: dict[str, Any] = {
        "sampler": functools.partial(sampler, nets=nets),
        "accumulate": config.train.accumulate,
        "init_extra": nets.statistics,
    }
    split = split_rules(net) if net.split_booster and own.nets != "light" else ()
    if net.model == "wrn":
        tx = optim.from_config(c, config.train.steps)
        return gradient(init_params, value, tx, rules=split, **options)
    tx, table_tx = rows.from_config(c, config.train.steps)
    if table_tx and not own.share:
        raise ValueError(
            "config.method.share=False gives each net its own tables: set "
            "optim.tables=dense"
        )
    return row_gradient(
        init_params,
        value,
        tx,
        table_tx=table_tx,
        ids=functools.partial(behaviour.ids, net=net),
        tables="shared/tables",
        clip=c.clip,
        rules=(*rows.STATE_RULES, *split, *embedding.RULES),
        **options,
    )


def split_rules(net: Any) -> tuple[tuple[str, P], ...]:
    """Rules that lay the booster's own layers over the mesh axis ``model``.

    Kernels of an MLP are cut by columns and rows in turn, so that a pair of layers needs
    one reduction; those of convolutions by their output channels.
    """
    if net.model == "wrn":
        return ((r"booster/convs/", P(None, None, None, "model")),)
    rules = []
    for i in range(len(net.booster.hidden) + 1):
        if i % 2:
            rules.append((rf"booster/mlp/layer_{i}/kernel", P("model", None)))
        elif i < len(net.booster.hidden):
            rules.append((rf"booster/mlp/layer_{i}/kernel", P(None, "model")))
    return tuple(rules)


def _lower(shared, params, state, batch, key, share, names, *, train=True):
    """The shared net's features for each net, and its state."""
    if share:
        features, state = shared(params, state, batch, key, train)
        return dict.fromkeys(names, features), state
    inputs, new = {}, dict(state)
    for name in names:
        inputs[name], new[name] = shared(params[name], state[name], batch, key, train)
    return inputs, new


def _mean(batch) -> Callable:
    """Mean over the rows, by their weights if they have some."""
    if "weight" not in batch:
        return jnp.mean
    total = batch["weight"].sum()
    share = batch["weight"] / jnp.where(total == 0, 1, total)
    return lambda x: (x * share).sum()


def _cross_entropy(logits, label):
    if logits.ndim == 1:
        return optax.sigmoid_binary_cross_entropy(logits, label.astype(logits.dtype))
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _correct(logits: Array, label: Int[Array, " B"] | Float[Array, " B"]):
    guess = logits > 0 if logits.ndim == 1 else logits.argmax(-1)
    return (guess == label).astype(jnp.float32)


def _check_options(lam, hint, block, temperature, features, nets):
    check_hint(hint, temperature)
    if lam < 0:
        raise ValueError(f"config.method.lam must be >= 0, got {lam}")
    for field, value, known in (
        ("block", block, BLOCKS),
        ("features", features, FEATURE_HINTS),
        ("nets", nets, NETS),
    ):
        if value not in known:
            raise ValueError(
                f"config.method.{field} must be one of {known}, got {value!r}"
            )
