"""Which optimizer a parameter goes to, by its path and shape, and why.

The paper's scaling table (Ahn et al., arXiv 2504.05295): hidden matrices get Dion;
embeddings, output heads, norm gains and biases a scalar optimizer. Dion on an
embedding, head or bias runs, but trains poorly.

Names are compared as whole words (``names``), then shapes: a matrix with a side of the
vocabulary is a head, whatever it is called.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpapers.optim import names
from jaxpapers.optim.fused import read_layout
from jaxpapers.optim.layout import EXCLUDED, Layout, is_dimensions, make_layout
from jaxpapers.optim.paths import (
    aligned,
    dimension_numbers,
    is_function,
    named_leaves,
)

LABELS = ("dion", "scalar", "embedding", "head")
# An MLP's hidden side is 4 times its other one, rarely 8; a vocabulary's is more.
WIDE = 8
# Rows from which a wide matrix looks like a vocabulary's in a report.
MANY = 1000


class Route(NamedTuple):
    """Where one parameter goes.

    Attributes:
      path: joined by "/", without the names of boxes.
      shape: of the leaf.
      group: ``dion`` | ``scalar`` | ``embedding`` | ``head``.
      reason: in words.
    """

    path: str
    shape: tuple[int, ...]
    group: str
    reason: str


class RoutingTable(tuple[Route, ...]):
    """The routes of a tree's leaves in its order; ``str`` of it is a report."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("leaf", "shape", "group", "reason")]
        rows += [(r.path, str(r.shape), r.group, r.reason) for r in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(x.ljust(n) for x, n in zip(row, widths)), row[3]])
            for row in rows
        ]
        return "\n".join([*lines, *(f"hint: {x}" for x in self.hints)])

    @property
    def hints(self) -> tuple[str, ...]:
        """Leaves of the group ``dion`` whose shape is that of a vocabulary."""
        wide = [
            r
            for r in self
            if r.group == "dion"
            and len(r.shape) == 2
            and max(r.shape) >= max(MANY, WIDE * min(r.shape))
        ]
        return tuple(
            f"{r.path} {r.shape} goes to the matrix optimizer, but a side of "
            f"{max(r.shape)} looks like a vocabulary; if it is an embedding or a head, "
            "say so with labels= or with None in weight_dimension_numbers"
            for r in wide
        )


def route(
    params: Any, weight_dimension_numbers: Any = None, *, vocabulary: int | None = None
) -> Any:
    """Labels every leaf ``dion``, ``scalar``, ``embedding`` or ``head``.

    A leaf is a matrix if its name says nothing else, its dimension numbers (by default
    2-D (in, out)) give it two sides longer than 1, and neither is the vocabulary's.

    Args:
      params: parameters or gradients.
      weight_dimension_numbers: as for ``scale_by_dion``; None for a leaf excludes it.
      vocabulary: number of tokens; by default the rows of the embeddings that are
        found by name.

    Returns:
      Tree of strings like ``params``; ``routing_table`` has the reasons.

    Warns:
      UserWarning: 3-D and larger leaves that look like kernels but have no dimension
        numbers (or None from a function); they go to the scalar optimizer.

    Example:
      >>> import jax.numpy as jnp
      >>> route({"mlp": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}})
      {'mlp': {'bias': 'scalar', 'kernel': 'dion'}}
    """
    found, treedef = routes(params, weight_dimension_numbers, vocabulary)
    warn_left_out(found)
    return treedef.unflatten([r.group for r in found])


def routing_table(
    params: Any,
    weight_dimension_numbers: Any = None,
    *,
    labels: Any = None,
    split_sizes: Any = None,
    vocabulary: int | None = None,
) -> RoutingTable:
    """Which optimizer each parameter goes to, and why: print it before a long run.

    Args:
      params: parameters, their gradients or shapes (``jax.eval_shape``).
      weight_dimension_numbers: as given to the optimizer.
      labels: as given to the optimizer: they replace what names and shapes say.
      split_sizes: as given to the optimizer: the reason names the blocks of a fused leaf.
      vocabulary: see ``route``.

    Example:
      >>> import jax
      >>> shape = lambda *s: jax.ShapeDtypeStruct(s, "float32")
      >>> print(routing_table({"embed": shape(99, 8), "up": {"w": shape(8, 32)}}))
      leaf   shape    group      reason
      embed  (99, 8)  embedding  named 'embed'
      up/w   (8, 32)  dion       matrix of 8 x 32
    """
    found, _ = routes(params, weight_dimension_numbers, vocabulary)
    given = aligned(labels, is_label, "labels")
    if given is not None:
        groups = jax.tree.leaves(given(params))
        found = [r._replace(group=g, reason="labels=") for r, g in zip(found, groups)]
    if split_sizes is not None:
        named = [(r.path, jax.ShapeDtypeStruct(r.shape, np.float32)) for r in found]
        options = {
            "weight_dimension_numbers": weight_dimension_numbers,
            "split_sizes": split_sizes,
        }
        found = [
            r._replace(reason=_blocks(read_layout(*leaf, **options), r.reason))
            if r.group == "dion"
            else r
            for r, leaf in zip(found, named)
        ]
    return RoutingTable(found)


def table(params: Any, labels: Any) -> list[tuple[str, tuple[int, ...], str]]:
    """(path, shape, label) of every leaf, in the tree's order.

    Args:
      params: parameters.
      labels: tree of labels, e.g. ``route(params)``; ``routing_table`` has the reasons.
    """
    return [r[:3] for r in routing_table(params, labels=labels)]


def routes(
    params: Any, weight_dimension_numbers: Any = None, vocabulary: int | None = None
) -> tuple[list[Route], Any]:
    """The route of each leaf, and the tree's structure; see ``route``."""
    named, treedef = named_leaves(params)
    numbers = dimension_numbers(weight_dimension_numbers, named)
    if is_function(weight_dimension_numbers, is_dimensions):
        # It says None to all leaves that nobody thought of; a tree's None is meant.
        numbers = [
            None if d == EXCLUDED and np.ndim(leaf) > 2 else d
            for (_, leaf), d in zip(named, numbers)
        ]
    said = [names.read_name(path) for path, _ in named]
    found = [
        _route(path, tuple(np.shape(leaf)), name, d)
        for (path, leaf), name, d in zip(named, said, numbers)
    ]
    sizes = _vocabularies(found, said) if vocabulary is None else {vocabulary: ("", 0)}
    heads = {r.path: why for r in found if (why := _head_by_shape(r, found, sizes))}
    found = [
        r._replace(group="head", reason=heads[r.path]) if r.path in heads else r
        for r in found
    ]
    return found, treedef


def warn_left_out(found: Sequence[Route]) -> list[str]:
    """Warns of leaves that nothing but missing dimension numbers keeps from Dion."""
    left_out = [r.path for r in found if r.reason.startswith(_UNKNOWN)]
    if left_out:
        warnings.warn(
            f"dion: {len(left_out)} parameter(s) with more than two axes, "
            f"{left_out[0]!r} first, go to the scalar optimizer because nothing says "
            "which axes form their matrices; pass weight_dimension_numbers",
            UserWarning,
            stacklevel=3,
        )
    return left_out


def is_label(x: Any) -> bool:
    """Whether ``x`` is one value of a ``labels`` option."""
    return isinstance(x, str)


_UNKNOWN = "no dimension numbers"


def _route(path: str, shape: tuple[int, ...], name: names.Name, numbers: Any) -> Route:
    if len(shape) < 2:
        return Route(path, shape, "scalar", f"{len(shape)}-D")
    if name.group:
        return Route(path, shape, name.group, f"named {name.word!r}")
    if numbers == EXCLUDED:
        return Route(path, shape, "scalar", "None in weight_dimension_numbers")
    if numbers is None and len(shape) > 2:
        return Route(path, shape, "scalar", f"{_UNKNOWN} for {len(shape)} axes")
    layout = make_layout(path, shape, numbers) if 0 not in shape else None
    if layout is None or min(layout.fan_in, layout.fan_out) < 2:
        return Route(path, shape, "scalar", "a side of its matrix is at most 1")
    count = math.prod(shape[a] for a in layout.batch)
    kind = "matrix" if count == 1 else f"{count} matrices"
    sides = f"{layout.fan_in} x {layout.fan_out}"
    return Route(path, shape, "dion", f"{kind} of {sides}")


def _blocks(layout: Layout, reason: str) -> str:
    if not layout.blocks:
        return reason
    sides = ", ".join(f"{x.fan_in} x {x.fan_out}" for x in layout.blocks)
    return f"{reason}, in blocks of {sides}"


def _vocabularies(
    found: Sequence[Route], said: Sequence[names.Name]
) -> dict[int, tuple[str, int]]:
    """Rows of the embeddings of tokens -> (path of one, its width)."""
    return {
        r.shape[-2]: (r.path, r.shape[-1])
        for r, name in zip(found, said)
        if r.group == "embedding" and name.tokens
    }


def _head_by_shape(
    r: Route, found: Sequence[Route], sizes: dict[int, tuple[str, int]]
) -> str:
    """Why a matrix is a head although its name does not say so, or "".

    A hidden layer may have as many units as there are tokens: one of several is no head
    unless it is much wider than an MLP.
    """
    if r.group != "dion" or len(r.shape) != 2 or names.in_block(r.path):
        return ""
    small, large = sorted(r.shape)
    if large not in sizes or small == large:
        return ""
    embedding, width = sizes[large]
    if not embedding:
        return f"a side of the vocabulary, {large}"
    alike = [
        x for x in found if x.group == "dion" and len(x.shape) == 2 and large in x.shape
    ]
    if large >= WIDE * small or (len(alike) == 1 and small == width):
        return f"a side of {large}, the rows of {embedding}"
    return ""
