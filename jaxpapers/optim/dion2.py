r"""Dion2: Muon on the largest rows of the momentum, with error feedback for the rest.

Ahn et al., "Dion2", arXiv 2512.16928. For one matrix B = M + G with its shorter side
last, (l, s), and the k = ceil(alpha s) columns of largest L1 norm, S (s, k) selecting:

$$ U = \mathrm{polar}(B S), \quad M \leftarrow B - (1 - \mu) B S S^\top, \quad
   \mathrm{update}\ U S^\top $$

Only the selected columns of the momentum decay. Where devices split s, the selected
columns alone are sent, each to the device that computes the polar factor of its matrix,
or a part of its rows, and back (``columns``).

Departs from the reference code in the side that is selected from: always the shorter one,
by norms over the whole matrix, so that a run does not depend on its mesh (the reference
takes the sharded side, and may select on each shard alone).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxpapers.optim.collectives import axis_size, psum
from jaxpapers.optim.columns import gather_columns
from jaxpapers.optim.composite import with_scalars
from jaxpapers.optim.matrices import momentum_method
from jaxpapers.optim.newton_schulz import COEFFICIENTS, newton_schulz
from jaxpapers.optim.options import check_choice, check_range, is_traced
from jaxpapers.optim.power_iteration import MeshAxes
from jaxpapers.optim.saturation import saturated_sum


class Dion2State(NamedTuple):
    """State of ``scale_by_dion2``.

    Attributes:
      count: number of updates, int32 scalar.
      momentum: M, shaped as the parameters.
    """

    count: jax.Array
    momentum: Any


class _Options(NamedTuple):
    mu: Any
    fraction: float
    coefficients: str


def scale_by_dion2(
    fraction: float = 0.25,
    mu: Any = 0.95,
    coefficients: str = "polar_express",
    weight_dimension_numbers: Any = None,
    momentum_dtype: Any = None,
    sharding: Any = None,
    scale: str | None = "spectral",
    *,
    split_sizes: Any = None,
    unknown_sharding: str = "warn",
) -> optax.GradientTransformation:
    """Replaces gradients of matrices by Dion2's direction.

    Args:
      fraction: alpha, part of the shorter side that a step updates, in (0, 1].
      mu: decay of the part of the momentum that the update used.
      coefficients: of ``newton_schulz``.
      weight_dimension_numbers: as for ``scale_by_dion``.
      momentum_dtype: dtype of M; default the parameter's.
      sharding: as for ``scale_by_dion``.
      scale: ``spectral`` (sqrt(fan_out / fan_in)) or None.
      split_sizes: as for ``scale_by_dion``.
      unknown_sharding: as for ``scale_by_dion``.

    Raises:
      ValueError, TypeError: as ``scale_by_dion``.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_dion2(0.5, scale=None)
      >>> params = {"kernel": jnp.ones((4, 8))}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> int((updates["kernel"] != 0).any(1).sum())
      2
    """
    if is_traced(fraction):
        raise ValueError("fraction shapes the computation and cannot be traced")
    if not 0 < float(fraction) <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {float(fraction)}")
    check_range("mu", mu, 0, 1)
    check_choice("coefficients", coefficients, tuple(COEFFICIENTS))
    check_choice("scale", scale, ("spectral", None))
    return momentum_method(
        "Dion2",
        _dion2_blocks,
        _Options(mu, float(fraction), coefficients),
        Dion2State,
        weight_dimension_numbers=weight_dimension_numbers,
        momentum_dtype=momentum_dtype,
        split_sizes=split_sizes,
        sharding=sharding,
        scale=scale,
        unknown_sharding=unknown_sharding,
    )


def dion2(
    learning_rate: optax.ScalarOrSchedule,
    fraction: float = 0.25,
    mu: Any = 0.95,
    coefficients: str = "polar_express",
    weight_dimension_numbers: Any = None,
    momentum_dtype: Any = None,
    sharding: Any = None,
    scale: str | None = "spectral",
    *,
    split_sizes: Any = None,
    unknown_sharding: str = "warn",
    weight_decay: Any = 0.01,
    weight_decay_mask: Any = None,
    cautious_weight_decay: bool = False,
    scalar: str = "adamw",
    scalar_learning_rate: optax.ScalarOrSchedule | None = None,
    scalar_b1: Any = 0.9,
    scalar_b2: Any = 0.95,
    scalar_eps: Any = 1e-8,
    labels: Any = None,
) -> optax.GradientTransformation:
    """Dion2 for hidden matrices, AdamW or Lion for all other parameters.

    Args:
      learning_rate: base learning rate or schedule.
      fraction: see ``scale_by_dion2``, as are all arguments up to ``unknown_sharding``.
      mu: see ``scale_by_dion2``.
      coefficients: see ``scale_by_dion2``.
      weight_dimension_numbers: see ``scale_by_dion2``.
      momentum_dtype: see ``scale_by_dion2``.
      sharding: see ``scale_by_dion2``.
      scale: see ``scale_by_dion2``.
      split_sizes: see ``scale_by_dion2``.
      unknown_sharding: see ``scale_by_dion2``.
      weight_decay: see ``dion``, as are all that follow.
      weight_decay_mask: see ``dion``.
      cautious_weight_decay: see ``dion``.
      scalar: see ``dion``.
      scalar_learning_rate: see ``dion``.
      scalar_b1: see ``dion``.
      scalar_b2: see ``dion``.
      scalar_eps: see ``dion``.
      labels: see ``dion``.
    """
    matrices = scale_by_dion2(
        fraction,
        mu,
        coefficients=coefficients,
        weight_dimension_numbers=weight_dimension_numbers,
        momentum_dtype=momentum_dtype,
        split_sizes=split_sizes,
        sharding=sharding,
        scale=scale,
        unknown_sharding=unknown_sharding,
    )
    return with_scalars(
        matrices,
        learning_rate,
        weight_dimension_numbers=weight_dimension_numbers,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        cautious_weight_decay=cautious_weight_decay,
        scalar=scalar,
        scalar_learning_rate=scalar_learning_rate,
        scalar_b1=scalar_b1,
        scalar_b2=scalar_b2,
        scalar_eps=scalar_eps,
        momentum_dtype=momentum_dtype,
        labels=labels,
    )


def _dion2_blocks(options, axes, layouts, specs, grads, momenta):
    """One step on a device's blocks of the leaves of a group."""
    del specs
    dtype = jnp.promote_types(momenta[0].dtype, jnp.float32)
    order = layouts[0].order  # As most leaves lie: a transposed copy is no cheap one.
    b = jnp.concatenate(
        [
            layout.to_matrices(saturated_sum(m.astype(dtype), g.astype(dtype)), order)
            for layout, m, g in zip(layouts, momenta, grads)
        ]
    )
    columns = gather_columns(b, _largest(b, options.fraction, axes, order), axes, order)
    polar = newton_schulz(
        jnp.swapaxes(columns.values, 1, 2),
        options.coefficients,
        axes=MeshAxes(p=columns.summed),
    )
    direction = columns.back(jnp.swapaxes(polar, 1, 2))
    momentum = jnp.where(columns.chosen, options.mu * b, b)
    counts = [layout.to_matrices(g).shape[0] for layout, g in zip(layouts, grads)]
    ends = [sum(counts[:i]) for i in range(1, len(counts))]
    return tuple(
        [
            layout.from_matrices(y, g.shape, order)
            for layout, y, g in zip(layouts, jnp.split(x, ends), grads)
        ]
        for x in (direction, momentum)
    )


def _largest(b: jax.Array, fraction: float, axes: MeshAxes, order: str) -> jax.Array:
    """The k columns of b of largest L1 norm over all devices, (n, k) in order."""
    rows = 1 + order.index("l")
    # Sums of entries near float32's largest number must not all become infinite.
    count = b.shape[rows] * axis_size(axes.p)
    small = 2.0 ** -math.ceil(math.log2(count))
    norms = psum((small * jnp.abs(b)).sum(rows), axes.p)
    if axes.q:
        norms = lax.all_gather(norms, axes.q, axis=1, tiled=True)
    index = lax.top_k(norms, math.ceil(fraction * norms.shape[-1]))[1]
    return jnp.sort(index, axis=-1)
