"""The prior of a Gaussian process: kernels with a length scale per input."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

KINDS = ("rbf", "matern52")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("log_variance", "log_lengths", "log_noise"),
    meta_fields=("kind", "actions", "mean"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Hyper-parameters of a process and of its observations; a pytree of the three logs.

    ``model`` builds one from the values themselves, and checks them.

    Attributes:
      log_variance: (), log of v, the process's variance.
      log_lengths: (D,), log of the length scales, in units of the inputs.
      log_noise: (), log of s2, the variance of an observation.
      kind: "rbf" or "matern52".
      actions: number of discrete actions; the last column of an input is then the index
        of one, and values of different actions are independent. 0: no such column.
      mean: m0, the prior mean, a constant.
    """

    log_variance: Any
    log_lengths: Any
    log_noise: Any
    kind: str = "rbf"
    actions: int = 0
    mean: float = 0.0

    @property
    def variance(self) -> Any:
        """Of the process, v."""
        return jnp.exp(self.log_variance)

    @property
    def noise(self) -> Any:
        """Of an observation, s2."""
        return jnp.exp(self.log_noise)

    @property
    def columns(self) -> int:
        """Columns of an input, that of the action among them."""
        return self.log_lengths.shape[-1] + bool(self.actions)


def model(
    variance: Any,
    lengths: Any,
    noise: Any,
    *,
    kind: str = "rbf",
    actions: int = 0,
    mean: float = 0.0,
    dtype: Any = None,
) -> Model:
    """A ``Model`` of checked values.

    Args:
      variance: v.
      lengths: (D,).
      noise: s2.
      kind, actions, mean: see ``Model``.
      dtype: of the logs; None: float32.

    Raises:
      ValueError: a value that is not above 0, an unknown kind, lengths that are no
        vector, a negative number of actions.

    Example:
      >>> process = model(1.0, [0.5, 2.0], 0.01)
      >>> process.columns, process.kind
      (2, 'rbf')
    """
    lengths = np.asarray(lengths, float)
    if lengths.ndim != 1 or not len(lengths):
        raise ValueError(
            f"lengths must be a vector, one for each input, got shape {lengths.shape}"
        )
    for name, value in {
        "variance": variance,
        "lengths": lengths,
        "noise": noise,
    }.items():
        if not np.all((np.asarray(value) > 0) & np.isfinite(value)):
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if actions < 0:
        raise ValueError(f"actions must be >= 0, got {actions}")
    dtype = dtype or np.float32
    logs = (np.log(np.asarray(x)).astype(dtype) for x in (variance, lengths, noise))
    names = ("log_variance", "log_lengths", "log_noise")
    return Model(**dict(zip(names, logs)), kind=kind, actions=actions, mean=mean)


def split(model: Model, x: Float[Array, "N _"]) -> tuple[Array, Any]:
    """Inputs without the column of the action, and that column or None.

    Raises:
      ValueError: another number of columns than the model has.
    """
    if x.ndim != 2 or x.shape[1] != model.columns:
        what = f"{len(model.log_lengths)} inputs" + ", an action" * bool(model.actions)
        raise ValueError(f"inputs must be (N, {model.columns}): {what}; got {x.shape}")
    return (x[:, :-1], x[:, -1]) if model.actions else (x, None)


def stationary(
    model: Model, x1: Float[Array, "N D"], x2: Float[Array, "M D"]
) -> Float[Array, "N M"]:
    """The kernel of inputs without their actions.

    $$ v e^{-r^2/2}, \\quad v (1 + \\sqrt5 r + 5 r^2/3) e^{-\\sqrt5 r}, \\qquad
       r^2 = \\sum_d (x_d - x'_d)^2 / l_d^2 $$

    Distances are differences, not a^2 + b^2 - 2ab, which loses four digits in float32.
    """
    lengths = jnp.exp(model.log_lengths).astype(x1.dtype)
    r2 = jnp.square((x1[:, None] - x2[None]) / lengths[None, None]).sum(-1)
    if model.kind == "rbf":
        return model.variance * jnp.exp(-r2 / 2)
    # The root has no derivative at 0, the kernel has: 0.
    r = math.sqrt(5) * jnp.where(r2 > 0, jnp.sqrt(jnp.where(r2 > 0, r2, 1)), 0)
    return model.variance * (1 + r + r * r / 3) * jnp.exp(-r)


def kernel_matrix(
    model: Model, x1: Float[Array, "N _"], x2: Float[Array, "M _"]
) -> Float[Array, "N M"]:
    """k(x1, x2) of all pairs; times 1[a = a'] with discrete actions.

    Raises:
      ValueError: inputs of another width than the model's.
    """
    (s1, a1), (s2, a2) = split(model, x1), split(model, x2)
    k = stationary(model, s1, s2)
    return k if a1 is None else jnp.where(a1[:, None] == a2[None], k, 0)
