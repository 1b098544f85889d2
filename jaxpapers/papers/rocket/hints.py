"""Hints on logits and on hidden layers, and distillation from a frozen teacher."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

HINTS = ("mimic", "mse", "kd")
FEATURE_HINTS = ("none", "cosine", "l2")


def hint_loss(
    kind: str,
    light: Float[Array, "*light"],
    booster: Float[Array, "*booster"],
    temperature: float = 1.0,
) -> Float[Array, " B"]:
    """Distance of each row's light logits to the booster's.

    Args:
      kind: "mimic" the squared distance of logits (the paper's choice), "mse" that of
        probabilities, "kd" the cross-entropy of softened ones, without the factor T^2.
      light: l, (B, C), or (B,) for one logit.
      booster: z, as ``light``.
      temperature: T of "kd".

    Raises:
      ValueError: unknown kind, T <= 0, or classes that differ.

    Example:
      >>> l, z = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]])
      >>> hint_loss("mimic", l, z).tolist()
      [4.0]
    """
    check_hint(kind, temperature)
    _check_classes(light, booster)
    if kind == "mimic":
        square = jnp.square(light - booster)
        return square if light.ndim == 1 else square.sum(-1)
    light, booster = _classes(light), _classes(booster)
    if kind == "mse":
        return jnp.square(jax.nn.softmax(light) - jax.nn.softmax(booster)).sum(-1)
    target = jax.nn.softmax(booster / temperature)
    return -(target * jax.nn.log_softmax(light / temperature)).sum(-1)


def feature_hint(
    kind: str,
    light: Sequence[Float[Array, "B _"]],
    booster: Sequence[Float[Array, "B _"]],
) -> Float[Array, " B"]:
    """Sum of the distances of hidden layers of equal width, paired in order.

    Args:
      kind: "cosine", one minus the cosine, or "l2", the squared distance.
      light: hidden layers of the light net.
      booster: hidden layers of the booster.

    Raises:
      ValueError: unknown kind, or no two layers of one width.
    """
    if kind not in FEATURE_HINTS[1:]:
        raise ValueError(
            f"feature hint must be one of {FEATURE_HINTS[1:]}, got {kind!r}"
        )
    left, pairs = list(booster), []
    for h in light:
        match = next((i for i, g in enumerate(left) if g.shape == h.shape), None)
        if match is not None:
            pairs.append((h, left[match]))
            left = left[match + 1 :]
    if not pairs:
        raise ValueError(
            "feature_hint needs hidden layers of equal width, got "
            f"{[h.shape[-1] for h in light]} and {[g.shape[-1] for g in booster]}"
        )
    if kind == "l2":
        return sum((jnp.square(h - g).sum(-1) for h, g in pairs), jnp.zeros(()))
    return sum((1.0 - _cosine(h, g) for h, g in pairs), jnp.zeros(()))


def distillation_loss(
    light: Float[Array, "*light"],
    teacher: Float[Array, "*teacher"],
    temperature: float = 4.0,
    alpha: float = 0.9,
    mean: str = "elements",
) -> Float[Array, " B"]:
    r"""The term that rocket + KD adds: $2 \alpha T^2 KL(softmax(t/T) \| softmax(l/T))$.

    Args:
      light: l.
      teacher: t, of a trained and frozen booster.
      temperature: T.
      alpha: weight.
      mean: "elements" divides by C too, as the released code did; "batch" does not.

    Raises:
      ValueError: T <= 0, alpha < 0, unknown ``mean``, or classes that differ.
    """
    check_hint("kd", temperature)
    _check_classes(light, teacher)
    if not alpha >= 0 or mean not in ("elements", "batch"):
        raise ValueError(
            "distillation needs alpha >= 0 and mean 'elements' or 'batch', got "
            f"{alpha} and {mean!r}"
        )
    light, teacher = _classes(light), lax.stop_gradient(_classes(teacher))
    target = jax.nn.log_softmax(teacher / temperature)
    kl = jnp.exp(target) * (target - jax.nn.log_softmax(light / temperature))
    kl = kl.mean(-1) if mean == "elements" else kl.sum(-1)
    return 2 * alpha * temperature**2 * kl


def _classes(logits):
    """One logit l as those of two classes, [l, 0]."""
    if logits.ndim > 1:
        return logits
    return jnp.stack([logits, jnp.zeros_like(logits)], -1)


def _cosine(x, y):
    """Cosine of rows, 0 for a row of zeros."""
    scale = jnp.square(x).sum(-1) * jnp.square(y).sum(-1)
    return (x * y).sum(-1) * lax.rsqrt(jnp.where(scale > 0, scale, 1))


def check_hint(kind: str, temperature: float) -> None:
    """Raises ValueError naming the field of an unknown hint or a temperature <= 0."""
    if kind not in HINTS:
        raise ValueError(f"method.hint must be one of {HINTS}, got {kind!r}")
    if not temperature > 0:
        raise ValueError(f"method.temperature must be > 0, got {temperature}")


def _check_classes(light, booster):
    if light.shape != booster.shape:
        raise ValueError(
            "light and booster must give logits of the same classes, got shapes "
            f"{light.shape} and {booster.shape}"
        )
