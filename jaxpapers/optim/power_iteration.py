"""Power iteration on matrices and their blocks: P = orth(B Q), R = B^T P.

The functions run on whole matrices, or inside ``jax.shard_map`` on blocks of them: then
``MeshAxes`` names the mesh axes that split l and s. Only thin factors cross devices: P
over the axes of s; Gram matrices and R over those of l.

P and R are linear in B, so their means over data-parallel replicas, each with its own
gradient and momentum, are those of the mean: ``MeshAxes.replica``.
"""

import math
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpapers.ops.linalg import stack_product
from jaxpapers.optim.collectives import axis_size, mean, pmax, replica_dtype
from jaxpapers.optim.options import product_precision
from jaxpapers.optim.orthonormalize import _orthonormalize

SPLITS = ("auto", "thin", "whole")

# Orthonormalising f-th parts of P's rows on f devices instead of all rows on each sends
# some 8 r^2 bytes more and saves some 8 l r^2 FLOPs: from this l on, an accelerator
# computes longer than it would send.
ROWS_WORTH_SPLITTING = 1024


class MeshAxes(NamedTuple):
    """Mesh axes that split a matrix, inside ``jax.shard_map``.

    Attributes:
      p: those that split l, the rows of P.
      q: those that split s, the rows of Q and R.
      replica: those whose devices hold gradients and momenta to be averaged.
    """

    p: tuple[str, ...] = ()
    q: tuple[str, ...] = ()
    replica: tuple[str, ...] = ()


ONE_DEVICE = MeshAxes()


def power_iterate(
    b: Any,
    q: Any,
    iters: Any = 1,
    orthogonalize: str = "scqr",
    *,
    axes: MeshAxes = ONE_DEVICE,
    rows: jax.Array | None = None,
    split_p: str = "auto",
    communication_dtype: Any = None,
    order: Any = "ls",
    precision: str | None = None,
) -> tuple[Any, Any]:
    """Power iteration P, R with P orthonormal and R = B^T P (steps 2-4).

    Args:
      b: matrix (..., l, s), or a list of (batch, l, s) that share l; their P are then
        summed over devices and factorised as one batch.
      q: warm start (..., s, r), or a list of them.
      iters: repetitions; between them Q <- R, scaled by a power of two. May be traced.
      orthogonalize: see ``orthonormalize``.
      axes: mesh axes that split l and s, and those to average over.
      rows: global index of each local row of P, when l is split.
      split_p: ``auto`` and ``thin`` share the orthonormalisation among the devices that
        split s, by matrices or by rows (``choose_split``); ``whole`` does all on each.
      communication_dtype: of P on its way between the devices that split s, and between
        replicas of R too, unless it is float16; default that of the computation. The P
        and R that are used are the rounded ones, so nothing is lost from the momentum.
      order: ``ls``, or ``sl`` where ``b`` is stored as (..., s, l): products read it as
        it lies, for a transposed copy costs as much as a product does at a low rank. A
        list if ``b`` is one.
      precision: of B Q and B^T P, see ``scale_by_dion``; default by the dtype of ``b``.

    Returns:
      P (..., l, r) and R (..., s, r), shaped like ``b`` and ``q`` otherwise. Where B Q
      is all zero (over all devices, not one shard), P = 0 and R = Q.

    Example:
      >>> import jax, numpy as np
      >>> b, q = np.diag(np.float32([3, 2, 1])), np.eye(3, 1, dtype=np.float32)
      >>> p, r = jax.jit(power_iterate)(b, q)
      >>> abs(float(np.asarray(p)[0, 0])), abs(float(np.asarray(r)[0, 0]))
      (1.0, 3.0)
    """

    small = jax.tree.map(lambda b, q: small_factor(axes, b, q), b, q)
    p, r, _ = power_iterate_scaled(
        jax.tree.map(jnp.multiply, small, b),
        q, small, iters, orthogonalize, axes, rows, split_p, communication_dtype, order,
        product_precision(precision, jax.tree.leaves(b)[0].dtype),
    )  # fmt: skip
    return p, jax.tree.map(jnp.divide, r, small)


def power_iterate_scaled(
    b, q, small, iters, orthogonalize, axes, rows, split_p, communication_dtype, order,
    precision,
):  # fmt: skip
    """``power_iterate`` of B times ``small`` (see ``small_factor``), and R times it.

    Also whether B Q is all zero, (..., 1, 1).
    """
    order = jax.tree.map(lambda _: order, b) if isinstance(order, str) else order
    # P as it is sent must not leave the range of float16 at its lower end.
    wide = replica_dtype(communication_dtype)
    narrow = communication_dtype and not wide

    def product(b, q, small, o):
        q = q / small if narrow else q
        return stack_product(f"{o},sr->lr", b, q, precision)

    def right_factor(b, p, q, zero, small, o):
        r = stack_product(f"{o},lr->sr", b, p, precision)
        r = mean(r, axes.p, axes.replica, axes.replica and wide, flat=True)
        return jnp.where(zero, small * q, r)

    def once(q):
        parts, treedef = jax.tree.flatten(jax.tree.map(product, b, q, small, order))
        bases = _basis(parts, orthogonalize, axes, rows, split_p, communication_dtype)
        p, zero = (treedef.unflatten(x) for x in bases)
        return p, jax.tree.map(right_factor, b, p, q, zero, small, order), zero

    def again(q):
        # Each repeat multiplies by B twice: without scaling, 1e20 or 1e-20 are lost.
        return jax.tree.map(
            lambda r: jnp.ldexp(r, -largest_exponent(r, axes.q)), once(q)[1]
        )

    if isinstance(iters, Integral):
        for _ in range(int(iters) - 1):
            q = again(q)
    else:
        q = lax.fori_loop(0, iters - 1, lambda _, q: again(q), q)
    return once(q)


def choose_split(
    matrices: int, l: int, l_local: int, devices: int, method: str, split_p: str
) -> str:
    """How the devices that split s share the orthonormalisation of P.

    Args:
      matrices: P's in the batch.
      l: rows of a P over all devices.
      l_local: rows of a P on one device.
      devices: that split s; each starts with a summand of P.
      method: of ``orthonormalize``.
      split_p: the user's choice.

    Returns:
      ``matrices``: each device receives a share of the batch; ``rows``: a share of the
      rows of each; ``whole``: the sum of all.
    """
    if devices == 1 or split_p == "whole":
        return "whole"
    if matrices % devices == 0:
        return "matrices"
    if l >= ROWS_WORTH_SPLITTING and l_local % devices == 0 and method != "qr":
        return "rows"
    return "whole"


def small_factor(axes: MeshAxes, b: jax.Array, q: jax.Array) -> float:
    """A power of two that keeps B Q, R and the sum of M and G finite.

    The products of B are those of B times it, which rounds nothing: with entries near
    float32's largest number they would overflow. (Entries below 1e-33 are lost.)

    Args:
      axes: that split l and s.
      b: (..., l, s), or (..., s, l).
      q: (..., s, r).
    """
    s_local = q.shape[-2]
    l_local = b.shape[-1] * b.shape[-2] // s_local
    longest = max(l_local * axis_size(axes.p), s_local * axis_size(axes.q))
    return 2.0 ** -(math.ceil(math.log2(longest * axis_size(axes.replica))) + 2)


def _basis(parts, method, axes: MeshAxes, rows, split_p, communication_dtype):
    """Steps 2-3: the orthonormalised mean over replicas of the sum over ``axes.q``.

    Args:
      parts: list of (batch, l, r), or one (..., l, r): summands of B Q.
      method: of ``orthonormalize``.
      axes: see ``power_iterate``, as for the rest.
      rows: see there.
      split_p: see there.
      communication_dtype: see there.

    Returns:
      Lists like ``parts``: P, and whether it is all zero (..., 1, 1).
    """
    p = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    dtype, wire = p.dtype, communication_dtype or p.dtype
    devices, l_local = axis_size(axes.q), p.shape[-2]
    how = "whole"
    if p.ndim == 3:
        l = l_local * axis_size(axes.p)
        how = choose_split(p.shape[0], l, l_local, devices, method, split_p)
    p = p.astype(wire) if axes.q or axes.replica else p
    if how == "whole":
        p = mean(p, axes.q, axes.replica, flat=True).astype(dtype)
        basis, zero = _orthonormalize(p, method, axes.p, rows)
    else:
        axis = 0 if how == "matrices" else 1
        p = lax.psum_scatter(p, axes.q, scatter_dimension=axis, tiled=True)
        p = mean(p, (), axes.replica, flat=True).astype(dtype)
        names = axes.p
        if how == "rows":
            names = axes.p + axes.q
            rows = jnp.arange(l_local) if rows is None else rows
            mine = lax.axis_index(axes.q) * p.shape[1]
            rows = lax.dynamic_slice_in_dim(rows, mine, p.shape[1])
        basis, zero = _orthonormalize(p, method, names, rows)
        basis = lax.all_gather(basis.astype(wire), axes.q, axis=axis, tiled=True)
        basis = basis.astype(dtype)
        if how == "matrices":
            zero = lax.all_gather(zero, axes.q, tiled=True)
    if len(parts) == 1:
        return [basis], [zero]
    ends = [sum(x.shape[0] for x in parts[:i]) for i in range(1, len(parts))]
    return jnp.split(basis, ends), jnp.split(zero, ends)


def largest_exponent(r, q_names):
    """Of the power of two just above the largest entry over all devices."""
    largest = pmax(jnp.max(jnp.abs(r), axis=(-2, -1), keepdims=True), q_names)
    return jnp.maximum(jnp.frexp(largest)[1], -120)
