"""Rocket Launching's objective (eq 1) over any three nets."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxpapers.ops.means import weighted_mean
from jaxpapers.options import check_choices, check_least
from jaxpapers.papers.rocket.hints import (
    FEATURE_HINTS,
    check_hint,
    distillation_loss,
    feature_hint,
    hint_loss,
)

BLOCKS = ("logits", "booster_params", "none")
NETS = ("both", "light", "booster")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Hyper-parameters of the objective, the paper's as defaults."""

    lam: float = 0.03
    """lambda: weight of the hint."""
    hint: str = "mimic"
    """One of ``hints.HINTS``."""
    block: str = "logits"
    """Where the hint's gradient stops: "logits" at the booster's logits, hence before the
    booster and the shared layers below it; "booster_params" at the parameters that only
    the booster has; "none" nowhere."""
    temperature: float = 4.0
    """T of the hint kd and of the teacher."""
    features: str = "none"
    """Hint on hidden layers, one of ``hints.FEATURE_HINTS``."""
    features_weight: float = 1.0
    """Weight of that hint."""
    alpha: float = 0.0
    """Weight of distillation from a frozen teacher, whose logits are in the batch."""
    nets: str = "both"
    """light or booster trains one net alone."""
    share: bool = True
    """Whether the nets share their lower layers."""
    remat: bool = False
    """Whether the backward pass recomputes the booster's hidden layers."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        check_hint(self.hint, self.temperature)
        check_choices(self, "method", block=BLOCKS, features=FEATURE_HINTS, nets=NETS)
        check_least(self, "method", lam=0, alpha=0, features_weight=0)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the nets that are trained."""
        return ("light", "booster") if self.nets == "both" else (self.nets,)


PAPER = Options()


def rocket_loss(
    shared: Callable,
    light: Callable,
    booster: Callable,
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    *,
    options: Options = PAPER,
) -> tuple[Float[Array, ""], tuple[dict[str, Array], dict]]:
    """Cross-entropies of both nets and the hint (eq 1), means over the rows.

    Args:
      shared: ``apply`` of a shared ``Part``.
      light, booster: ``apply`` of a head.
      params: dict of shared, light and booster; without ``options.share`` the shared
        ones of each net are in ``params["shared"][net]``.
      state: as ``params``.
      batch: with label (B,): class, or 0 and 1 for one logit; weight (B,) is optional;
        teacher (B, C), logits of a frozen booster, with ``options.alpha``.
      key: of the nets.
      options: hyper-parameters.

    Returns:
      Nats; metrics ce_light, ce_booster, acc_light, acc_booster, hint, feature_hint and
      distillation, those in use, and ``weight``; the new state.

    Raises:
      ValueError: a net without parameters, no teacher, or classes that differ.
    """
    heads = {"light": light, "booster": booster}
    for name in options.trained:
        if not params.get(name):
            raise ValueError(
                f"params have no {name!r} net, got {sorted(params)}; an exported light "
                "net cannot be trained on: method.nets='light' trains one alone"
            )
    keys = dict(zip(("shared", "light", "booster"), jax.random.split(key, 3)))
    inputs, shared_state = apply_shared(
        shared, params["shared"], state["shared"], batch, keys["shared"],
        options.share, options.trained,
    )  # fmt: skip

    def apply_head(name, own_params):
        lower = params["shared"] if options.share else params["shared"][name]

        def head(*args):
            return heads[name](*args, True)

        if options.remat and name == "booster":
            head = jax.checkpoint(head)
        return head(own_params, lower, state[name], inputs[name], batch, keys[name])

    logits, hidden, new_state = {}, {}, {**state, "shared": shared_state}
    metrics, total = {}, jnp.zeros(())
    weight, label = batch.get("weight"), batch["label"]
    for name in options.trained:
        logits[name], hidden[name], new_state[name] = apply_head(name, params[name])
        cross_entropy = weighted_mean(_cross_entropy(logits[name], label), weight)
        metrics[f"ce_{name}"] = cross_entropy
        metrics[f"acc_{name}"] = weighted_mean(_correct(logits[name], label), weight)
        total = total + cross_entropy
    if options.nets == "both":
        target, deep = logits["booster"], hidden["booster"]
        if options.block == "logits":
            target, deep = lax.stop_gradient((target, deep))
        elif options.block == "booster_params":
            # The same forward pass as above, which XLA merges.
            blocked = lax.stop_gradient(params["booster"])
            target, deep, _ = apply_head("booster", blocked)
        hint = hint_loss(options.hint, logits["light"], target, options.temperature)
        metrics["hint"] = weighted_mean(hint, weight)
        total = total + options.lam * metrics["hint"]
        if options.features != "none":
            hint = feature_hint(options.features, hidden["light"], deep)
            metrics["feature_hint"] = weighted_mean(hint, weight)
            total = total + options.features_weight * metrics["feature_hint"]
    if options.alpha and "light" in logits:
        if "teacher" not in batch:
            raise ValueError(
                f"method.alpha={options.alpha} distils from batch['teacher'], logits of "
                f"a frozen booster; got {sorted(batch)}"
            )
        divergence = distillation_loss(
            logits["light"], batch["teacher"], options.temperature, options.alpha
        )
        metrics["distillation"] = weighted_mean(divergence, weight)
        total = total + metrics["distillation"]
    if weight is not None:
        metrics["weight"] = weight.sum()
    return total, (metrics, new_state)


def apply_shared(
    shared: Callable,
    params: dict,
    state: dict,
    batch: Mapping[str, Array],
    key: Key[Array, ""],
    share: bool,
    names: tuple[str, ...],
    *,
    train: bool = True,
) -> tuple[dict, dict]:
    """The shared net's features for each of the named nets, and its new state.

    Args:
      shared: ``apply`` of a shared ``Part``.
      params: its parameters, or without ``share`` a dict of them per net.
      state: as ``params``.
      batch: see ``rocket_loss``.
      key: of the net.
      share: whether the nets share the lower layers, which then run once.
      names: of the nets.
      train: whether the nets are trained.
    """
    if share:
        features, state = shared(params, state, batch, key, train)
        return dict.fromkeys(names, features), state
    features, new_state = {}, dict(state)
    for name in names:
        features[name], new_state[name] = shared(
            params[name], state[name], batch, key, train
        )
    return features, new_state


def _cross_entropy(logits, label):
    if logits.ndim == 1:
        return optax.sigmoid_binary_cross_entropy(logits, label.astype(logits.dtype))
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _correct(logits: Array, label: Int[Array, " B"] | Float[Array, " B"]):
    guess = logits > 0 if logits.ndim == 1 else logits.argmax(-1)
    return (guess == label).astype(jnp.float32)
