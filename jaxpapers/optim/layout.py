"""How a parameter of any rank is read as a batch of matrices: sides, rank, specs.

A linen kernel is (in, out); the paper and PyTorch store (fan_out, fan_in). Nothing here
relies on the order of the axes: ``DimensionNumbers`` names them, all others are batch.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

P_SIDES = ("longer", "output", "input")
SCALES = ("spectral", "rms", None)


class DimensionNumbers(NamedTuple):
    """Which axes of a parameter are the fan-in and which the fan-out of its matrix.

    The default is a Flax kernel, (in, out). Every axis that is not named is a batch
    axis: stacked layers (L, in, out) are ``DimensionNumbers(1, 2)``, an attention
    kernel (embed, heads, head_dim) is ``(0, (1, 2))``, or ``(0, 2)`` for one matrix per
    head. Options also take ``optax.contrib.MuonDimensionNumbers``, which mean the same.
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1


# Of a leaf whose dimension numbers are None: it is no matrix, whatever its shape.
EXCLUDED = DimensionNumbers((), ())


class Layout(NamedTuple):
    """One leaf as matrices B of shape (batch, l, s): P lives on l, Q on s.

    Attributes:
      path: the leaf's path joined by "/", for messages.
      shape: shape of the leaf.
      batch: axes that index independent matrices.
      p_axes: axes whose product is l, the side of the orthonormal factor P.
      q_axes: axes whose product is s, the side of the right factor Q.
      rank: columns of P and Q.
      fan_in: product of the reduction axes.
      fan_out: product of the output axes.
      reduction: axes of the fan-in; they are ``p_axes`` or ``q_axes``.
      blocks: layouts of the matrices that lie side by side in the leaf, along
        ``split_axis``; () where it is not fused. See ``fused``.
    """

    path: str
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    p_axes: tuple[int, ...]
    q_axes: tuple[int, ...]
    rank: int
    fan_in: int
    fan_out: int
    reduction: tuple[int, ...]
    blocks: tuple["Layout", ...] = ()

    @property
    def parts(self) -> tuple["Layout", ...]:
        """The layouts that are stepped: the blocks, or the whole leaf."""
        return self.blocks or (self,)

    @property
    def split_axis(self) -> int:
        """The axis that fused matrices lie along: the first output axis."""
        return (self.q_axes if self.p_axes == self.reduction else self.p_axes)[0]

    @property
    def q_shape(self) -> tuple[int, ...]:
        """Shape of Q: batch axes, Q-side axes (each keeps its mesh axis), rank."""
        return (
            *(self.shape[a] for a in self.batch + self.q_axes),
            self.rank,
        )

    def q_spec(self, spec: P) -> P:
        """Q's partition given the parameter's: same axes, the rank whole."""
        entries = tuple(spec) + (None,) * (len(self.shape) - len(tuple(spec)))
        return P(*(entries[a] for a in self.batch + self.q_axes), None)

    def row_spec(self, spec: P) -> P:
        """Partition of one number per output row, kept on the leaf's axes."""
        entries = tuple(spec) + (None,) * (len(self.shape) - len(tuple(spec)))
        return P(*(None if a in self.reduction else e for a, e in enumerate(entries)))

    @property
    def order(self) -> str:
        """Which side comes first as the leaf is stored: ``ls`` or ``sl``."""
        return "ls" if self.p_axes < self.q_axes else "sl"

    def to_matrices(self, x: jax.Array, order: str = "ls") -> jax.Array:
        """(Local block of) a leaf -> (batch, l, s), or (batch, s, l)."""
        first, second = self._sides(order)
        x = jnp.transpose(x, self.batch + first + second)
        n, k = len(self.batch), len(self.batch) + len(first)
        return x.reshape(
            math.prod(x.shape[:n]), math.prod(x.shape[n:k]), math.prod(x.shape[k:])
        )

    def from_matrices(
        self, x: jax.Array, local_shape: Sequence[int], order: str = "ls"
    ) -> jax.Array:
        """Inverse of ``to_matrices`` for a local block of the given shape."""
        first, second = self._sides(order)
        axes = self.batch + first + second
        x = x.reshape([local_shape[a] for a in axes])
        return jnp.transpose(x, [axes.index(a) for a in range(len(axes))])

    def _sides(self, order: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        sides = {"l": self.p_axes, "s": self.q_axes}
        return sides[order[0]], sides[order[1]]

    def q_to_matrices(self, q: jax.Array) -> jax.Array:
        """(Local block of) Q -> (batch, s, r)."""
        n = len(self.batch)
        return q.reshape(math.prod(q.shape[:n]), math.prod(q.shape[n:-1]), q.shape[-1])

    def rows(
        self, axes: Sequence[int], local_shape: Sequence[int], spec: P
    ) -> jax.Array:
        """Global index of each local row of the side made of ``axes``."""
        rows = jnp.zeros((1,), jnp.int32)
        for a in axes:
            local = jnp.arange(local_shape[a], dtype=jnp.int32)
            names = spec[a] if a < len(tuple(spec)) else None
            if names is not None:
                local = local + lax.axis_index(names) * local_shape[a]
            rows = (rows[:, None] * self.shape[a] + local[None, :]).reshape(-1)
        return rows

    @property
    def compresses(self) -> bool:
        """Whether the factors of all replicas are fewer numbers than their gradients.

        ``(m + n) r < m n``, which also says that the rank is not full. Of a fused leaf
        that of every block: its momentum has an axis of replicas or not.
        """
        return all(
            (x.fan_out + x.fan_in) * x.rank < x.fan_out * x.fan_in for x in self.parts
        )

    def update_scale(self, scale: str | None, residual: Any = None) -> Any:
        """Factor of the direction in the update.

        ``spectral`` is the paper's sqrt(fan_out / fan_in); ``rms`` gives the update the
        root mean square 0.2 that AdamW's has: |P Q^T|_F^2 = rank, and a residual of
        weight w adds w^2 for each further direction.
        """
        if scale == "spectral":
            return math.sqrt(self.fan_out / self.fan_in)
        if scale == "rms":
            size = self.rank
            if residual is not None:
                left = min(self.fan_in, self.fan_out) - self.rank
                size = self.rank + residual**2 * left
            return 0.2 * (self.fan_in * self.fan_out / size) ** 0.5
        return 1.0


def matrix_rank(
    m: int, n: int, rank_fraction: float = 1.0, rank_multiple_of: int = 1
) -> int:
    """Columns of the factors of an (m, n) matrix, rounded up as the reference does.

    Example:
      >>> matrix_rank(100, 30, 0.25), matrix_rank(100, 30, 0.25, rank_multiple_of=16)
      (8, 16)
    """
    r = rank_fraction * min(m, n)
    return min(rank_multiple_of * math.ceil(r / rank_multiple_of), m, n)


def make_layout(
    path: str,
    shape: Sequence[int],
    dimensions: DimensionNumbers | None = None,
    *,
    rank_fraction: float = 1.0,
    rank_multiple_of: int = 1,
    p_side: str = "longer",
    rank: int | None = None,
) -> Layout:
    """Reads a leaf's shape as matrices.

    The reference lets the sharding choose which side P takes; here the shape does (P on
    the longer side, on the output side of a square matrix: the reference's choice for
    an unsharded matrix), so that a run does not depend on its mesh.

    Raises:
      ValueError: excluded, no two sides, overlapping or unknown axes, bad rank options.
    """
    if dimensions is None:
        if len(shape) != 2:
            raise ValueError(
                f"{path}: nothing says which axes of a {len(shape)}-D parameter "
                f"{tuple(shape)} form its matrix; pass weight_dimension_numbers, e.g. "
                "DimensionNumbers(1, 2) for stacked layers (L, in, out), or leave it "
                "to another optimizer"
            )
        dimensions = DimensionNumbers()
    if dimensions == EXCLUDED:
        raise ValueError(
            f"{path}: weight_dimension_numbers is None for this parameter of shape "
            f"{tuple(shape)}, so it is no matrix; keep it out with optax.masked or "
            "labels=, or give its DimensionNumbers"
        )
    reduction = _axes(path, "reduction_axis", dimensions.reduction_axis, shape)
    output = _axes(path, "output_axis", dimensions.output_axis, shape)
    if set(reduction) & set(output) or not reduction or not output:
        raise ValueError(
            f"{path}: reduction and output axes of shape {tuple(shape)} must be "
            f"non-empty and disjoint, got {dimensions}"
        )
    if 0 in shape:
        raise ValueError(
            f"{path}: parameter has no elements, got shape {tuple(shape)}; leave it "
            "to another optimizer"
        )
    if p_side not in P_SIDES:
        raise ValueError(f"p_side must be one of {P_SIDES}, got {p_side!r}")
    fan_in = math.prod(shape[a] for a in reduction)
    fan_out = math.prod(shape[a] for a in output)
    on_output = p_side == "output" or (p_side == "longer" and fan_out >= fan_in)
    p_axes, q_axes = (output, reduction) if on_output else (reduction, output)
    batch = tuple(a for a in range(len(shape)) if a not in reduction + output)
    if rank is None:
        rank = matrix_rank(fan_out, fan_in, rank_fraction, rank_multiple_of)
    return Layout(
        path, tuple(shape), batch, p_axes, q_axes, rank, fan_in, fan_out, reduction
    )


def path_name(path: Sequence[Any]) -> str:
    """A pytree key path as "blocks/attention/query/kernel"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def axis_names(axes: Sequence[int], spec: P) -> tuple[str, ...]:
    """Mesh axes that split the given array axes, in order."""
    entries = tuple(spec)
    return tuple(n for a in axes if a < len(entries) for n in mesh_axes(entries[a]))


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def is_dimensions(x: Any) -> bool:
    """Whether ``x`` is one value of a ``weight_dimension_numbers`` option."""
    optax_numbers = optax.contrib.MuonDimensionNumbers
    kinds = (DimensionNumbers, optax_numbers, optax.MaskedNode)
    return x is None or isinstance(x, kinds)


def is_sharding(x: Any) -> bool:
    """Whether ``x`` is one value of a ``sharding`` option."""
    return x is None or isinstance(x, P | jax.sharding.Sharding)


def _axes(path, name, axes, shape) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int | np.integer) else tuple(axes)
    for a in axes:
        if not -len(shape) <= a < len(shape):
            raise ValueError(
                f"{path}: {name} {a} is out of range for shape {tuple(shape)}"
            )
    axes = tuple(int(a) % len(shape) for a in axes)
    if len(set(axes)) != len(axes):
        raise ValueError(f"{path}: {name} names an axis twice, got {axes}")
    return axes
