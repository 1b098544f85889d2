"""The Dion step on matrices: power iteration, error feedback, update direction.

Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv 2504.05295. For one
matrix with its P side first, B is (l, s), Q (s, r), P (l, r), R (s, r):

1. B = M + G
2. P = B Q, then 3. P <- orthonormal basis of its columns
4. R = B^T P            (2-4 repeat ``iters`` times with Q <- R)
5. M <- B - (1 - mu) P R^T
6. Q <- R diag(1 / (|R_j| + eps))
7. update direction P Q^T

The functions run on whole matrices, or inside ``jax.shard_map`` on blocks of them: then
``p_names`` and ``q_names`` are the mesh axes that split l and s. Only thin factors
cross devices: P over ``q_names``; Gram matrices, R over ``p_names``; column norms over
``q_names``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpapers.optim.orthonormalize import HIGHEST, _orthonormalize, _pmax, _psum

RIGHT_FACTORS = ("colnorm", "orth")


class StepOptions(NamedTuple):
    """Hyper-parameters of one step.

    ``mu``, ``eps`` and ``noise_guard`` may be traced; the rest is static.
    """

    mu: Any = 0.95
    eps: Any = 1e-8
    noise_guard: Any = 0.0
    power_iters: Any = 1
    orthogonalize: str = "scqr"
    right_factor: str = "colnorm"


def power_iterate(
    b: Any,
    q: Any,
    iters: Any = 1,
    orthogonalize: str = "scqr",
    *,
    p_names: Sequence[str] = (),
    q_names: Sequence[str] = (),
    rows: jax.Array | None = None,
) -> tuple[Any, Any]:
    """Power iteration P, R with P orthonormal and R = B^T P (steps 2-4).

    Args:
      b: matrix (..., l, s), or a list of (batch, l, s) whose small factorisations are
        then done as one batch.
      q: warm start (..., s, r), or a list of them.
      iters: repetitions; between them Q <- R, not normalised. May be traced.
      orthogonalize: see ``orthonormalize``.
      p_names: mesh axes that split l.
      q_names: mesh axes that split s.
      rows: global index of each local row of P, when l is split.

    Returns:
      P (..., l, r) and R (..., s, r), shaped like ``b`` and ``q`` otherwise. Where B Q
      is all zero (over all devices, not one shard), P = 0 and R = Q.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> b = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
      >>> p, r = power_iterate(b, jnp.eye(3)[:, :1])
      >>> float(jnp.abs(p[0, 0])), float(jnp.abs(r[0, 0]))
      (1.0, 3.0)
    """

    def once(q):
        p = jax.tree.map(lambda b, q: _psum(_dot("ls,sr->lr", b, q), q_names), b, q)
        p, zero = _batched(p, orthogonalize, p_names, rows)
        r = jax.tree.map(lambda b, p: _psum(_dot("ls,lr->sr", b, p), p_names), b, p)
        return p, jax.tree.map(jnp.where, zero, q, r)

    if isinstance(iters, int):
        for _ in range(iters - 1):
            q = once(q)[1]
    else:
        q = lax.fori_loop(0, iters - 1, lambda _, q: once(q)[1], q)
    return once(q)


def dion_step(
    grads: list[jax.Array],
    momenta: list[jax.Array],
    qs: list[jax.Array],
    options: StepOptions,
    *,
    p_names: Sequence[str] = (),
    q_names: Sequence[str] = (),
    p_rows: jax.Array | None = None,
    q_rows: Sequence[jax.Array | None] | None = None,
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """Steps 1-7 for matrices that share l, r and the mesh axes of l and s.

    Args:
      grads: G, each (batch, l, s).
      momenta: M, each (batch, l, s).
      qs: Q, each (batch, s, r).
      options: hyper-parameters.
      p_names: mesh axes that split l.
      q_names: mesh axes that split s.
      p_rows: global index of each local row of P, when l is split.
      q_rows: the same for each Q, when s is split.

    Returns:
      Directions P Q^T, new momenta and new Qs in the compute dtype: float64 if the
      momentum is, otherwise float32. (The reference multiplies in the momentum's dtype;
      with bfloat16 state this one loses less.)
    """
    dtype = jnp.promote_types(momenta[0].dtype, jnp.float32)
    mu, eps, guard = (
        jnp.asarray(x, dtype) for x in (options.mu, options.eps, options.noise_guard)
    )
    b = [m.astype(dtype) + g.astype(dtype) for m, g in zip(momenta, grads)]
    ps, rs = power_iterate(
        b,
        [q.astype(dtype) for q in qs],
        options.power_iters,
        options.orthogonalize,
        p_names=p_names,
        q_names=q_names,
        rows=p_rows,
    )
    new_momenta = [b - (1 - mu) * _dot("lr,sr->ls", p, r) for b, p, r in zip(b, ps, rs)]
    directions, new_qs = [], []
    for p, r, rows in zip(ps, rs, q_rows or [None] * len(rs)):
        norm = _column_norms(r, q_names)
        if options.right_factor == "orth":
            # Orth-Dion (arXiv 2605.16341). Cholesky QR's positive diagonal matters:
            # Householder signs would turn P Q^T into an ascent direction.
            q = _orthonormalize(r, "scqr", q_names, rows)[0]
        else:
            q = r / (norm + eps)
        # Columns of R that are rounding noise beside the largest one carry no signal,
        # yet normalisation makes them unit: the guard drops them from the update only.
        keep = norm >= guard * jnp.max(norm, axis=-1, keepdims=True)
        directions.append(_dot("lr,sr->ls", p, jnp.where(keep, q, 0)))
        new_qs.append(q)
    return directions, new_momenta, new_qs


def _column_norms(r, q_names):
    """|R_j|, through a power of two: squares of 1e20 overflow, and Q = 0 never ends."""
    largest = _pmax(jnp.max(jnp.abs(r), axis=(-2, -1), keepdims=True), q_names)
    exponent = jnp.frexp(largest)[1]
    square = jnp.square(jnp.ldexp(r, -exponent))
    total = _psum(jnp.sum(square, axis=-2, keepdims=True), q_names)
    return jnp.ldexp(jnp.sqrt(total), exponent)


def _batched(ps, method, axis_name, rows):
    """Orthonormalises a list of (batch, l, r) as one batch; keeps the list's form."""
    flat, treedef = jax.tree.flatten(ps)
    if len(flat) == 1:
        basis, zero = _orthonormalize(flat[0], method, axis_name, rows)
        return treedef.unflatten([basis]), treedef.unflatten([zero])
    ends = [sum(p.shape[0] for p in flat[:i]) for i in range(1, len(flat))]
    basis, zero = _orthonormalize(jnp.concatenate(flat), method, axis_name, rows)
    return (
        treedef.unflatten(jnp.split(basis, ends)),
        treedef.unflatten(jnp.split(zero, ends)),
    )


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    left, right = spec.split("->")
    first, second = left.split(",")
    return jnp.einsum(f"...{first},...{second}->...{right}", x, y, precision=HIGHEST)
