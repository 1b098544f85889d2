"""Plain optimizers by name, for nets that a config trains in the ordinary way."""

from typing import Any

import optax

NAMES = ("adam", "adamw", "rmsprop", "sgd")
SCHEDULES = ("constant", "cosine")


def by_name(c: Any, steps: int) -> optax.GradientTransformation:
    """Gradient clipping and an optimizer.

    Args:
      c: has ``optimizer``, one of ``NAMES`` (RMSprop's average is torch's, .99), ``lr``,
        ``schedule``, one of ``SCHEDULES``, and ``clip``, bound of the global norm, 0 for
        none.
      steps: length of the cosine.

    Raises:
      ValueError: unknown name, lr <= 0, clip < 0.
    """
    if c.optimizer not in NAMES or c.schedule not in SCHEDULES:
        raise ValueError(
            f"optimizer must be one of {NAMES} and schedule one of {SCHEDULES}, got "
            f"{c.optimizer!r} and {c.schedule!r}"
        )
    if c.lr <= 0 or c.clip < 0:
        raise ValueError(f"lr must be > 0 and clip >= 0, got {c.lr} and {c.clip}")
    rate: Any = c.lr
    if c.schedule == "cosine":
        rate = optax.cosine_decay_schedule(c.lr, steps)
    if c.optimizer == "rmsprop":
        tx = optax.rmsprop(rate, decay=0.99)
    else:
        tx = getattr(optax, c.optimizer)(rate)
    return optax.chain(optax.clip_by_global_norm(c.clip), tx) if c.clip else tx
