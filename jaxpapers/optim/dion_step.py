"""The Dion step on matrices: power iteration, error feedback, update direction.

Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv 2504.05295. For one
matrix with its P side first, B is (l, s), Q (s, r), P (l, r), R (s, r):

1. B = M + G
2. P = B Q, then 3. P <- orthonormal basis of its columns
4. R = B^T P            (2-4 repeat ``iters`` times with Q <- R)
5. M <- B - (1 - mu) P R^T
6. Q <- R diag(1 / (|R_j| + eps))
7. update direction P Q^T

Not in the paper: with ``nesterov`` N = mu B + G, the momentum one step ahead, is what is
factorised; with ``residual`` w the update also holds what the rank leaves out, and the
whole momentum decays (``residual``):

    update P Q^T + w sqrt(k) D / (|D|_F + sqrt(k) eps),    D = N - P R^T,    M <- mu B

with k = min(l, s) - r.

Where the rank of B is below r, the surplus columns of P are any directions and those of R
are rounding error, which differs from mesh to mesh. The paper and its code scale it to
unit columns: a gradient of rank one gives an update that is nearly all noise. Here such a
column (``NOISE``) is left out of the update and Q keeps what it had there.

Of sharded matrices only thin factors cross devices: P over the axes that split s; Gram
matrices and R over those that split l; column norms over those of s. Where many devices
split s, whole matrices are fewer bytes than P: they exchange N and the update instead, a
share of the matrices each (``exchange``).

P and R are linear in B, so their means over data-parallel replicas, each with its own
gradient and momentum, give the update of the mean gradient (step 2.3 of the paper).
"""

import functools
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpapers.ops.linalg import stack_product
from jaxpapers.optim.collectives import axis_size, psum
from jaxpapers.optim.exchange import crossings, exchange_pays, exchanged
from jaxpapers.optim.options import product_precision
from jaxpapers.optim.orthonormalize import _orthonormalize
from jaxpapers.optim.power_iteration import (
    ONE_DEVICE,
    MeshAxes,
    choose_split,
    largest_exponent,
    power_iterate_scaled,
    small_factor,
)
from jaxpapers.optim.residual import with_residual

RIGHT_FACTORS = ("colnorm", "orth")

# A column of R shorter than this many unit round-offs of the longest one is rounding
# error: P has more columns there than B has directions.
NOISE = 1024


class StepOptions(NamedTuple):
    """Hyper-parameters of one step, see ``scale_by_dion``.

    ``mu``, ``eps``, ``noise_guard`` (None: ``NOISE``) and ``residual`` may be traced.
    """

    mu: Any = 0.95
    eps: Any = 1e-8
    noise_guard: Any = None
    power_iters: Any = 1
    orthogonalize: str = "scqr"
    right_factor: str = "colnorm"
    split_p: str = "auto"
    communication_dtype: Any = None
    nesterov: bool = False
    residual: Any = None
    normalize_rows: bool = False
    precision: str | None = None


def dion_step(
    grads: list[jax.Array],
    momenta: list[jax.Array],
    qs: list[jax.Array],
    options: StepOptions,
    *,
    axes: MeshAxes = ONE_DEVICE,
    p_rows: jax.Array | None = None,
    q_rows: Sequence[jax.Array | None] | None = None,
    orders: Sequence[str] | None = None,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Steps 1-7 for matrices that share l, r and mesh axes.

    Args:
      grads: G, each (batch, l, s), or (batch, s, l) as ``orders`` says.
      momenta: M, each like its G.
      qs: Q, each (batch, s, r).
      options: hyper-parameters.
      axes: mesh axes that split l and s, and those to average over.
      p_rows: global index of each local row of P, when l is split.
      q_rows: the same for each Q, when s is split.
      orders: ``ls`` or ``sl`` for each matrix, see ``power_iterate``; default ``ls``.

    Returns:
      Directions P Q^T, new momenta and new Qs, in float64 if the momentum is, otherwise
      in float32. (The reference multiplies in the momentum's dtype and loses more.)
    """
    dtype = jnp.promote_types(momenta[0].dtype, jnp.float32)
    mu = jnp.asarray(options.mu, dtype)
    orders = list(orders or ["ls"] * len(grads))
    qs = [q.astype(dtype) for q in qs]
    small = [small_factor(axes, m, q) for m, q in zip(momenta, qs)]
    # Of a constant, XLA makes x (M + G), which overflows.
    hidden = [lax.optimization_barrier(jnp.asarray(x, dtype)) for x in small]
    b = [
        x * m.astype(dtype) + x * g.astype(dtype)
        for m, g, x in zip(momenta, grads, hidden)
    ]
    ns = b
    if options.nesterov:
        ns = [mu * b + x * g.astype(dtype) for b, g, x in zip(b, grads, hidden)]
    factorise = functools.partial(_factorise, options, p_rows, momenta[0].dtype)
    if _exchanges(options, ns, qs, orders, axes):
        alone = axes._replace(q=())
        directions, taken, new_qs = exchanged(
            functools.partial(factorise, alone, None), ns, qs, small, orders, axes.q
        )
    else:
        directions, taken, new_qs = factorise(axes, q_rows, ns, qs, small, orders)
    largest = float(jnp.finfo(dtype).max)
    # With a residual the whole momentum decays.
    kept = [b - (1 - mu) * x for b, x in zip(b, taken or b)]
    new_momenta = [
        jnp.clip(m, -x * largest, x * largest) / x for m, x in zip(kept, small)
    ]
    return directions, new_momenta, new_qs


def _exchanges(options, ns, qs, orders, axes):
    """Whether the devices that split s exchange whole matrices, see ``exchange``."""
    if options.split_p != "auto":
        return False
    item = ns[0].dtype.itemsize
    wire, iters = options.communication_dtype, options.power_iters
    counts: dict[int, int] = {}
    for q in qs:
        counts[q.shape[1]] = counts.get(q.shape[1], 0) + q.shape[0]
    rows, devices = ns[0].shape[1 + orders[0].index("l")], axis_size(axes.q)
    split = choose_split(
        sum(counts.values()), rows * axis_size(axes.p), rows, devices,
        options.orthogonalize, "thin",
    )  # fmt: skip
    return exchange_pays(
        [(n, s) for s, n in counts.items()],
        rows,
        qs[0].shape[-1],
        devices,
        shared=split != "whole",
        averaged=bool(axes.replica),
        arrays=crossings(options.residual),
        item=item,
        wire=jnp.dtype(wire).itemsize if wire else item,
        iters=int(iters) if isinstance(iters, Integral) else 1,
    )


def _factorise(options, p_rows, stored, axes, q_rows, ns, qs, small, orders):
    """Steps 2-4, 6 and 7: directions, P R^T (None with a residual), and new Qs.

    Args:
      options: hyper-parameters.
      p_rows: see ``dion_step``.
      stored: dtype of the momenta.
      axes: that split the matrices here.
      q_rows: see ``dion_step``.
      ns: N, times ``small``.
      qs: Q.
      small: see ``small_factor``.
      orders: see ``dion_step``.
    """
    eps = jnp.asarray(options.eps, qs[0].dtype)
    precision = product_precision(options.precision, stored)

    def back(o, p, r):
        return stack_product(f"lr,sr->{o}", p, r, precision)

    ps, rs, zeros = power_iterate_scaled(
        ns, qs, small, options.power_iters, options.orthogonalize, axes, p_rows,
        options.split_p, options.communication_dtype, orders, precision,
    )  # fmt: skip
    plain = options.residual is None
    taken = [back(*x) for x in zip(orders, ps, rs)] if plain else None
    directions, new_qs = [], []
    q_rows = q_rows or [None] * len(rs)
    for n, p, r, zero, old, rows, o, x in zip(
        ns, ps, rs, zeros, qs, q_rows, orders, small
    ):
        norm = _column_norms(r, axes.q)
        if options.right_factor == "orth":
            # Orth-Dion (arXiv 2605.16341). Cholesky QR's positive diagonal matters:
            # Householder signs would turn P Q^T into an ascent direction.
            q = _orthonormalize(r, "scqr", axes.q, rows)[0]
        else:
            length = norm + x * eps
            q = r / jnp.where(length == 0, 1, length)
        noise, left_out = _without_signal(norm, options.noise_guard)
        right = jnp.where(left_out, 0, q)
        if plain:
            directions.append(back(o, p, right))
        else:
            dot = functools.partial(back, o)
            update = with_residual(
                options.residual, dot, n, p, r, right, norm, zero, axes,
                eps=x * eps, precision=precision,
            )  # fmt: skip
            directions.append(update)
        new_qs.append(jnp.where(noise, old, q))
    return directions, taken, new_qs


def _without_signal(norm: jax.Array, guard: Any) -> tuple[jax.Array, jax.Array]:
    """Columns of R that are rounding error, and those that the update leaves out.

    Args:
      norm: |R_j|, (..., 1, r).
      guard: see ``scale_by_dion``'s ``noise_guard``; may be traced.
    """
    floor = jnp.asarray(NOISE * jnp.finfo(norm.dtype).eps, norm.dtype)
    if guard is None:
        guard = floor
    guard = jnp.asarray(guard, norm.dtype)
    largest = jnp.max(norm, axis=-1, keepdims=True)
    # NaN is below nothing: it must reach the update and Q.
    return norm < jnp.minimum(guard, floor) * largest, norm < guard * largest


def _column_norms(r, q_names):
    """|R_j|, through a power of two: squares of 1e20 overflow, and Q = 0 never ends."""
    exponent = largest_exponent(r, q_names)
    square = jnp.square(jnp.ldexp(r, -exponent))
    total = psum(jnp.sum(square, axis=-2, keepdims=True), q_names)
    return jnp.ldexp(jnp.sqrt(total), exponent)
