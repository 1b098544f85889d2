"""Plain optimizers by name, for nets that a config trains in the ordinary way."""

from typing import Any

import optax

NAMES = ("adam", "adamw", "rmsprop", "sgd")
SCHEDULES = ("constant", "cosine")


def by_name(c: Any, steps: int) -> optax.GradientTransformation:
    """Gradient clipping and an optimizer.

    Args:
      c: has ``optimizer``, one of ``NAMES`` (RMSprop's average is torch's, .99), ``lr``,
        ``weight_decay`` (adamw's), ``schedule``, one of ``SCHEDULES``, and ``clip``,
        bound of the global norm, 0 for none.
      steps: length of the cosine.

    Raises:
      ValueError: unknown name, lr <= 0, clip < 0, a decay that is negative or that the
        optimizer has not.
    """
    if c.optimizer not in NAMES or c.schedule not in SCHEDULES:
        raise ValueError(
            f"optimizer must be one of {NAMES} and schedule one of {SCHEDULES}, got "
            f"{c.optimizer!r} and {c.schedule!r}"
        )
    if c.lr <= 0 or c.clip < 0:
        raise ValueError(f"lr must be > 0 and clip >= 0, got {c.lr} and {c.clip}")
    if c.weight_decay < 0 or (c.weight_decay and c.optimizer != "adamw"):
        raise ValueError(
            f"weight_decay must be >= 0, and 0 with {c.optimizer}, got {c.weight_decay}"
        )
    rate: Any = c.lr
    if c.schedule == "cosine":
        rate = optax.cosine_decay_schedule(c.lr, steps)
    if c.optimizer == "rmsprop":
        tx = optax.rmsprop(rate, decay=0.99)
    elif c.optimizer == "adamw":
        tx = optax.adamw(rate, weight_decay=c.weight_decay)
    else:
        tx = getattr(optax, c.optimizer)(rate)
    return optax.chain(optax.clip_by_global_norm(c.clip), tx) if c.clip else tx
