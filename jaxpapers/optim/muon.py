r"""Muon and NorMuon on sharded matrices, by the same dimension numbers as Dion.

Muon (Jordan et al., 2024): M <- mu M + G, direction polar(M), or polar(G + mu M) with
Nesterov's momentum. NorMuon (Li et al., arXiv 2510.05491) divides each output row of the
direction O by the root of a running mean of its squares (see ``neurons``):

$$ v \leftarrow \beta_2 v + (1 - \beta_2)\,\mathrm{mean}_{in}(O^2) $$

Communication is described in ``newton_schulz``. The reference code is microsoft/dion,
whose arithmetic is bfloat16; here it is float32, so numbers agree to bfloat16's rounding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpapers.optim.composite import with_scalars
from jaxpapers.optim.layout import SCALES
from jaxpapers.optim.matrices import momentum_method
from jaxpapers.optim.neurons import divide_rows, row_mean_square
from jaxpapers.optim.newton_schulz import COEFFICIENTS, newton_schulz
from jaxpapers.optim.options import (
    PRECISIONS,
    check_choice,
    check_range,
    product_precision,
)
from jaxpapers.optim.saturation import saturated_sum
from jaxpapers.optim.sharded import row_spec


class MuonState(NamedTuple):
    """State of ``scale_by_muon``.

    Attributes:
      count: number of updates, int32 scalar.
      momentum: M, shaped as the parameters.
      row_square: v, one number per output row (reduction axes of size 1); () for Muon.
    """

    count: jax.Array
    momentum: Any
    row_square: Any = ()


class _Options(NamedTuple):
    mu: Any
    b2: Any
    eps: Any
    nesterov: bool
    coefficients: str
    precision: str | None


def scale_by_muon(
    mu: Any = 0.95,
    nesterov: bool = False,
    coefficients: str = "jordan",
    b2: Any = None,
    eps: Any = 1e-8,
    weight_dimension_numbers: Any = None,
    momentum_dtype: Any = None,
    sharding: Any = None,
    scale: str | None = "spectral",
    *,
    precision: str | None = None,
    split_sizes: Any = None,
    unknown_sharding: str = "warn",
) -> optax.GradientTransformation:
    """Replaces gradients of matrices by the polar factor of their momentum.

    Args:
      mu: decay of the momentum.
      nesterov: take the polar factor of G + mu M.
      coefficients: of ``newton_schulz``.
      b2: decay of NorMuon's row statistics; None: plain Muon.
      eps: added to the root of the row statistics.
      weight_dimension_numbers: as for ``scale_by_dion``.
      momentum_dtype: dtype of M; default the parameter's.
      sharding: as for ``scale_by_dion``.
      scale: ``spectral`` (sqrt(fan_out / fan_in)), ``rms`` or None.
      precision: of the product of a matrix with its polynomial, as for
        ``scale_by_dion``; Gram matrices and polynomials always have ``highest``.
      split_sizes: as for ``scale_by_dion``.
      unknown_sharding: as for ``scale_by_dion``.

    Raises:
      ValueError, TypeError: as ``scale_by_dion``.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_muon(scale=None)
      >>> params = {"kernel": jnp.eye(4, 8)}
      >>> updates, _ = jax.jit(tx.update)(params, tx.init(params))
      >>> updates["kernel"].shape
      (4, 8)
    """
    check_range("mu", mu, 0, 1, open_right=True)
    check_range("eps", eps, 0)
    check_choice("coefficients", coefficients, tuple(COEFFICIENTS))
    check_choice("scale", scale, SCALES)
    check_choice("precision", precision, PRECISIONS)
    if b2 is not None:
        check_range("b2", b2, 0, 1, open_right=True)
    statistics = [] if b2 is None else [(_zero_rows, row_spec)]
    return momentum_method(
        "Muon",
        _muon_blocks,
        _Options(mu, b2, eps, nesterov, coefficients, precision),
        MuonState,
        *statistics,
        weight_dimension_numbers=weight_dimension_numbers,
        momentum_dtype=momentum_dtype,
        split_sizes=split_sizes,
        sharding=sharding,
        scale=scale,
        unknown_sharding=unknown_sharding,
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    mu: Any = 0.95,
    nesterov: bool = False,
    coefficients: str = "jordan",
    b2: Any = None,
    eps: Any = 1e-8,
    weight_dimension_numbers: Any = None,
    momentum_dtype: Any = None,
    sharding: Any = None,
    scale: str | None = "spectral",
    *,
    precision: str | None = None,
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
    """Muon for hidden matrices, AdamW or Lion for all other parameters.

    Departs from ``optax.contrib.muon``: the momentum is a plain sum (no 1 - mu, no bias
    correction, which cancel in the polar factor unless Nesterov's is used), Nesterov's
    momentum is off by default, and the scale is sqrt(fan_out / fan_in) also below 1.

    Args:
      learning_rate: base learning rate or schedule.
      mu: see ``scale_by_muon``, as are all arguments up to ``unknown_sharding``.
      nesterov: see ``scale_by_muon``.
      coefficients: see ``scale_by_muon``.
      b2: see ``scale_by_muon``.
      eps: see ``scale_by_muon``.
      weight_dimension_numbers: see ``scale_by_muon``.
      momentum_dtype: see ``scale_by_muon``.
      sharding: see ``scale_by_muon``.
      scale: see ``scale_by_muon``.
      precision: see ``scale_by_muon``.
      split_sizes: see ``scale_by_muon``.
      unknown_sharding: see ``scale_by_muon``.
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
    matrices = scale_by_muon(
        mu,
        nesterov=nesterov,
        coefficients=coefficients,
        b2=b2,
        eps=eps,
        weight_dimension_numbers=weight_dimension_numbers,
        momentum_dtype=momentum_dtype,
        split_sizes=split_sizes,
        sharding=sharding,
        scale=scale,
        precision=precision,
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


normuon = functools.partial(muon, b2=0.95)
"""NorMuon for hidden matrices: ``muon`` with row statistics."""


def _muon_blocks(options, axes, layouts, specs, grads, momenta, *rows):
    """One step on a device's blocks of the leaves of a group."""
    dtype = jnp.promote_types(momenta[0].dtype, jnp.float32)
    grads_ = [g.astype(dtype) for g in grads]
    new = [
        saturated_sum(options.mu * m.astype(dtype), g) for m, g in zip(momenta, grads_)
    ]
    used = new
    if options.nesterov:
        used = [saturated_sum(g, options.mu * m) for m, g in zip(new, grads_)]
    parts = [x.to_matrices(b) for x, b in zip(layouts, used)]
    ends = [sum(p.shape[0] for p in parts[:i]) for i in range(1, len(parts))]
    polar = newton_schulz(
        jnp.concatenate(parts),
        options.coefficients,
        axes=axes,
        precision=product_precision(options.precision, momenta[0].dtype),
    )
    directions = [
        x.from_matrices(y, g.shape)
        for x, y, g in zip(layouts, jnp.split(polar, ends), grads)
    ]
    if not rows:
        return directions, new
    scaled = [
        _normalise_rows(options, *args)
        for args in zip(layouts, specs, directions, rows[0])
    ]
    return [o for o, _ in scaled], new, [v for _, v in scaled]


def _normalise_rows(options, layout, spec, o, v):
    """NorMuon's second moment: O and v."""
    square = row_mean_square(layout, spec, o)
    v = options.b2 * v + (1 - options.b2) * square
    return divide_rows(layout, spec, o, square, v, options.eps), v


def _zero_rows(layout, x):
    return jnp.zeros_like(x.sum(layout.reduction, keepdims=True), jnp.float32)
