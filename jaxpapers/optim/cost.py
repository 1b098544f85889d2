r"""Cost of a Dion step in closed form: bytes by collective and axes, FLOPs, state.

For N matrices with P on the side l, split over t devices, and Q on the side s, split
over f, at rank r and e bytes per number, a device holds (l/t, s/f) and sends

=========================== ================== =======================================
what                        over               bytes in a ring
=========================== ================== =======================================
P, whole                    axes of s          2 (f-1)/f N (l/t) r e
P, scattered and gathered   axes of s          (f-1)/f N (l/t) r e, twice
2 Gram matrices (scqr)      axes of l [#]_     2 (t-1)/t N r (r+1)/2 e, twice
R                           axes of l          2 (t-1)/t N (s/f) r e
norms of R's columns        axes of s          2 (f-1)/f N (r + 1) e
max |p|, and sum p^2 [#]_   axes of l [#]_     2 (t-1)/t N e each
rcqr's sketch, k rows       axes of l [#]_     2 (t-1)/t N k r e
qr's factors                axes of l          (t-1)/t N t min(l/t, r) r e
residual's |N|^2            axes of l and s    2 (g-1)/g N e on g devices
normalize_rows, m outputs   axes of inputs     2 (g-1)/g N (m / devices) e
normalize_rows, two norms   axes of outputs    2 (g-1)/g N 2 e
whole matrices, there and   axes of s          (f-1)/f F (l/t) (s/f) e [#]_
back, in place of P
and their Q                 axes of s          2 (f-1)/f F (s/f) r e
=========================== ================== =======================================

.. [#] If P's rows are scattered, over those of l and s; if its matrices are, N / f.
.. [#] Only cqr2 and rcqr; scqr where it is ill-conditioned.
.. [#] F = f ceil(N / f); three times, with a residual twice. All other rows are then
   those of ceil(N / f) whole matrices (``exchange``).

A Gram matrix that devices share is scattered and its inverse factor gathered, by scqr
with a number of each matrix. Every further pass of scqr sends ``bytes_per_pass`` more, of
which an ill-conditioned batch takes one at least, and ``bytes_of_rescue`` once.
With scattered P's a byte for each says which are zero. P and R of replicas are reduced
together with the sums above, or after the scatter. The tests compare these numbers with
the compiled program, to the byte.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.collectives import replica_dtype, share_axes
from jaxpapers.optim.dion_leaves import check_beyond_paper
from jaxpapers.optim.dion_step import RIGHT_FACTORS
from jaxpapers.optim.exchange import crossings, exchange_pays
from jaxpapers.optim.layout import DimensionNumbers, axis_names, make_layout
from jaxpapers.optim.options import (
    check_choice,
    check_range,
    static_fraction,
    static_multiple,
)
from jaxpapers.optim.orthonormalize import GRAM_PASSES, METHODS, sketch_rows
from jaxpapers.optim.placement import check_spec
from jaxpapers.optim.power_iteration import SPLITS, choose_split

Axes = tuple[str, ...]


class DionPlan(NamedTuple):
    """Cost of one leaf's (or several equal leaves') Dion step on one device.

    Attributes:
      rank: r.
      transposed: P lies on the input side (the paper's transposed case).
      p_axis: mesh axes that split P's rows.
      q_axis: mesh axes that split Q's rows.
      compressed: replicas exchange P and R; otherwise their gradients.
      split: how the devices that split s share the work: ``exchange``, or of P's
        orthonormalisation ``matrices``, ``rows`` or ``whole`` (``choose_split``).
      bytes_per_step: bytes sent in rings, by (collective, mesh axes); with scqr those of
        well-conditioned P's.
      bytes_per_pass: bytes of one more Gram pass of every orthonormalisation of the step,
        where scqr needs more than two.
      bytes_of_rescue: bytes of jitter and refinement in ill-conditioned batches, beside
        further passes.
      largest: elements of the largest result of a collective.
      flops: multiplications and additions, of well-conditioned P's.
      state_bytes: M and Q.
    """

    rank: int
    transposed: bool
    p_axis: Axes
    q_axis: Axes
    compressed: bool
    split: str
    bytes_per_step: dict[tuple[str, Axes], float]
    bytes_per_pass: dict[tuple[str, Axes], float]
    bytes_of_rescue: dict[tuple[str, Axes], float]
    largest: int
    flops: float
    state_bytes: int

    @property
    def total_bytes(self) -> float:
        """Sum of ``bytes_per_step``."""
        return sum(self.bytes_per_step.values())


def plan_dion(
    shape: Sequence[int],
    spec: P,
    mesh: Any,
    rank_fraction: int | float = 1.0,
    rank_multiple_of: int = 1,
    *,
    dimensions: DimensionNumbers | None = None,
    power_iters: int = 1,
    orthogonalize: str = "scqr",
    right_factor: str = "colnorm",
    replicate_axis: str | None = None,
    p_side: str = "longer",
    split_p: str = "auto",
    communication_dtype: Any = None,
    nesterov: bool = False,
    residual: Any = None,
    normalize_rows: bool = False,
    dtype: Any = jnp.float32,
    momentum_dtype: Any = None,
    q_dtype: Any = None,
    count: int = 1,
    slices: str | None = None,
) -> DionPlan:
    """Cost of a leaf's step under ``scale_by_dion`` with the same arguments.

    Args:
      shape: of the leaf.
      spec: its PartitionSpec.
      mesh: Mesh, AbstractMesh, or sizes by axis name.
      rank_fraction: one number, as are the other options of ``scale_by_dion``.
      rank_multiple_of: see ``scale_by_dion``.
      dimensions: see ``scale_by_dion``.
      power_iters: see ``scale_by_dion``; traced ones decide as 1.
      orthogonalize: see ``scale_by_dion``.
      right_factor: see ``scale_by_dion``.
      replicate_axis: see ``scale_by_dion``.
      p_side: see ``scale_by_dion``.
      split_p: see ``power_iterate``.
      communication_dtype: see ``power_iterate``.
      nesterov: see ``scale_by_dion``; costs nothing.
      residual: see ``scale_by_dion``.
      normalize_rows: see ``scale_by_dion``.
      dtype: of the gradient.
      momentum_dtype: default ``dtype``.
      q_dtype: default that of M.
      count: leaves of this shape and sharding, which share their collectives. So do all
        matrices of the same l, s, rank and mesh axes, whichever side comes first: give
        their number, for what each of them sends depends on it.
      slices: mesh axis between TPU slices; its bytes then have a key of their own, as
        sums over it and other axes are scattered inside a slice before they cross.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = {"data": 4, "model": 2}
      >>> plan = plan_dion((1024, 4096), P("data", "model"), mesh, 0.25)
      >>> plan.rank, plan.p_axis, round(plan.total_bytes / 2**20, 2)
      (256, ('model',), 3.69)
    """
    sizes = dict(mesh) if isinstance(mesh, dict) else dict(mesh.shape)
    check_choice("orthogonalize", orthogonalize, METHODS)
    check_choice("right_factor", right_factor, RIGHT_FACTORS)
    check_choice("split_p", split_p, SPLITS)
    check_range("power_iters", power_iters, 1)
    check_range("count", count, 1)
    check_beyond_paper(nesterov, residual, normalize_rows, replicate_axis)
    if replicate_axis and replicate_axis not in sizes:
        raise ValueError(
            f"replicate_axis={replicate_axis!r} is no axis of the mesh {sizes}"
        )
    layout = make_layout(
        "leaf",
        shape,
        dimensions,
        rank_fraction=static_fraction("leaf", rank_fraction, None),
        rank_multiple_of=static_multiple(rank_multiple_of, None),
        p_side=p_side,
    )
    abstract = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_spec(layout, spec, abstract)

    def devices(axes: Axes) -> int:
        return math.prod(sizes[a] for a in axes)

    p_axis, q_axis = (axis_names(x, spec) for x in (layout.p_axes, layout.q_axes))
    replicas = (replicate_axis,) if replicate_axis else ()
    compressed = bool(replicas) and layout.compresses
    averaged = replicas if compressed else ()
    t, f = devices(p_axis), devices(q_axis)
    l, s, r = (math.prod(shape[a] for a in layout.p_axes),
               math.prod(shape[a] for a in layout.q_axes), layout.rank)  # fmt: skip
    n = count * math.prod(shape[a] for a in layout.batch)
    n //= devices(axis_names(layout.batch, spec))
    dtype, m_dtype = jnp.dtype(dtype), jnp.dtype(momentum_dtype or dtype)
    compute = jnp.promote_types(m_dtype, jnp.float32)
    e = compute.itemsize
    wide = jnp.dtype(replica_dtype(communication_dtype) or compute).itemsize
    sent, further, rescue = (_Sent(list(sizes), sizes, slices) for _ in range(3))
    if replicas and not compressed:
        item = jnp.dtype(replica_dtype(communication_dtype) or dtype).itemsize
        sent.add("all-reduce", replicas, n * (l // t) * (s // f), item)

    wire = jnp.dtype(communication_dtype or compute).itemsize
    arrays, device = crossings(residual), (n, l // t, s // f)
    split = choose_split(n, l, l // t, f, orthogonalize, split_p)
    exchanges = split_p == "auto" and exchange_pays(
        [(n, s // f)], l // t, r, f, shared=split != "whole", arrays=arrays, item=e,
        wire=wire, iters=power_iters, averaged=bool(averaged),
    )  # fmt: skip
    # Matrices, mesh axes and devices that split s, as the steps 2 to 7 see them.
    k, names, g = (math.ceil(n / f), (), 1) if exchanges else (n, q_axis, f)
    if exchanges:
        padded = k * f
        for _ in range(arrays):
            sent.add("all-to-all", q_axis, padded * math.prod(device[1:]), e)
        for _ in range(2):
            sent.add("all-to-all", q_axis, padded * device[2] * r, e)
        split = "exchange"
    once = _Sent(list(sizes), sizes, slices)
    p_size = k * (l // t) * r
    basis_axes, n_basis, l_basis = p_axis, k, l // t
    if split in ("exchange", "whole"):
        once.add("all-reduce", names + averaged, p_size, wire)
    else:
        once.add("reduce-scatter", names, p_size, wire)
        once.add("all-reduce", averaged, p_size // g, wire)
        once.add("all-gather", names, p_size, wire)
        if split == "matrices":
            n_basis //= g
            once.add("all-gather", names, k, 1)  # Which matrices are all zero.
        else:
            basis_axes, l_basis = p_axis + names, l_basis // g
    flops = _orthonormalize(once, orthogonalize, basis_axes, n_basis, l_basis, r, e)
    if orthogonalize == "scqr":
        _gram_pass(further, basis_axes, n_basis, r, e, numbers=1, times=power_iters)
        _rescue(rescue, basis_axes, n_basis, r, e, times=power_iters)
    once.add("all-reduce", p_axis + averaged, k * (s // g) * r, wide if averaged else e)
    sent.add_all(once, power_iters)
    # Between repeats R is scaled by its maximum.
    sent.add("all-reduce", names, (power_iters - 1) * k, e)
    flops = power_iters * (flops + 4 * k * (l // t) * (s // g) * r)
    # P R^T and P Q^T; with a residual both are one product.
    flops += (4 if residual is None else 2) * k * (l // t) * (s // g) * r

    sent.add("all-reduce", names, k * r, e)
    if right_factor == "colnorm":
        sent.add("all-reduce", names, k, e)  # max |R|, before squaring.
    else:  # It needs the same maximum.
        flops += _orthonormalize(sent, "scqr", names, k, s // g, r, e)
        _gram_pass(further, names, k, r, e, numbers=1)
        _rescue(rescue, names, k, r, e)
    if residual is not None and r < min(l, s):
        sent.add("all-reduce", p_axis + names, k, e)
    transposed = layout.p_axes == layout.reduction
    inputs, outputs = (p_axis, q_axis) if transposed else (q_axis, p_axis)
    n_out = device[2] if transposed else device[1]
    if normalize_rows:
        sent.add("all-reduce", inputs, n * n_out, e)
        sent.add("all-reduce", outputs, 2 * n, e)
    q_item = jnp.dtype(q_dtype or m_dtype).itemsize
    state = math.prod(device) * m_dtype.itemsize + n * device[2] * r * q_item
    return DionPlan(
        r, transposed, p_axis, q_axis, compressed, split, sent.bytes, further.bytes,
        rescue.bytes, sent.largest, flops, state,
    )  # fmt: skip


class _Sent:
    """Adds up the bytes of collectives."""

    def __init__(self, order: list[str], sizes: dict[str, int], slices: str | None):
        self._order, self.sizes, self._slices = order, sizes, slices
        self.bytes: dict[tuple[str, Axes], float] = {}
        self.largest = 0

    def add(self, kind: str, axes: Axes, elements: int, itemsize: int) -> None:
        """A collective whose larger side (result, scatter's operand) has ``elements``."""
        axes = tuple(a for a in self._order if a in axes and self.sizes[a] > 1)
        inside = tuple(a for a in axes if a != self._slices)
        if kind == "all-reduce" and inside != axes and inside:
            # Scattered and gathered there: as much as their sum.
            self.add(kind, inside, elements, itemsize)
            elements = -(-elements // math.prod(self.sizes[a] for a in inside))
            axes = tuple(a for a in axes if a == self._slices)
        group = math.prod(self.sizes[a] for a in axes)
        if group == 1:
            return
        passes = 2 if kind == "all-reduce" else 1
        size = passes * (group - 1) / group * elements * itemsize
        self.bytes[kind, axes] = self.bytes.get((kind, axes), 0.0) + size
        result = elements // group if kind == "reduce-scatter" else elements
        self.largest = max(self.largest, result)

    def add_all(self, other: "_Sent", times: int) -> None:
        for key, size in other.bytes.items():
            self.bytes[key] = self.bytes.get(key, 0.0) + times * size
        self.largest = max(self.largest, other.largest)


def _orthonormalize(
    sent: _Sent, method: str, axes: Axes, n: int, rows: int, r: int, e: int
) -> float:
    """Adds the collectives of ``orthonormalize`` and returns its FLOPs."""
    group = math.prod(sent.sizes[a] for a in axes)
    sent.add("all-reduce", axes, n, e)  # max |p|
    if method == "qr":
        k = min(rows, r)
        sent.add("all-gather", axes, n * group * k * r, e)
        flops = 4.0 * n * rows * r * k
        return flops + n * (2 * rows * r * k + 4 * group * k * r * r) * (group > 1)
    flops = 0.0
    if method != "scqr":
        sent.add("all-reduce", axes, n, e)  # sum p^2, for the jitter
    if method == "rcqr":
        k = sketch_rows(r)
        sent.add("all-reduce", axes, n * k * r, e)
        flops += n * (2 * k * rows * r + 4 * k * r * r + rows * r * r)
    for _ in range(GRAM_PASSES[method]):
        share = _gram_pass(sent, axes, n, r, e, numbers=int(method == "scqr"))
        # LAPACK's factor and inverse; those for TPUs have three times that.
        flops += n * 4 * rows * r * r + share * 4 * r**3 / 3
    return flops


def _gram_pass(
    sent: _Sent,
    axes: Axes,
    n: int,
    r: int,
    e: int,
    *,
    numbers: int = 0,
    times: int = 1,
) -> int:
    """Adds the collectives of a Gram matrix and its factor; a device's share of them.

    Args:
      sent: sums that are updated.
      axes: mesh axes that split the rows.
      n: matrices.
      r: columns.
      e: bytes per number.
      numbers: gathered of each.
      times: passes.
    """
    shared, padded = share_axes(n, {a: sent.sizes[a] for a in axes})
    devices = math.prod(sent.sizes[a] for a in shared)
    triangle = padded * r * (r + 1) // 2
    for _ in range(times):
        if not shared:
            sent.add("all-reduce", axes, triangle, e)
            continue
        rest = tuple(a for a in axes if a not in shared)
        sent.add("reduce-scatter", shared, triangle, e)
        sent.add("all-reduce", rest, triangle // devices, e)
        sent.add("all-gather", shared, triangle, e)
        if numbers:
            sent.add("all-gather", shared, padded * numbers, e)
    return padded // devices


def _rescue(sent: _Sent, axes: Axes, n: int, r: int, e: int, *, times: int = 1) -> None:
    """Adds the bytes of jitter and refinement: sum p^2, and L beside its inverse."""
    shared, padded = share_axes(n, {a: sent.sizes[a] for a in axes})
    for _ in range(times):
        sent.add("all-reduce", axes, n, e)
        if shared:
            sent.add("all-gather", shared, padded * r * (r + 1) // 2, e)
