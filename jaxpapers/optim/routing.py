"""Which optimizer a parameter goes to, by its path and shape.

The paper's scaling table (Ahn et al., arXiv 2504.05295): hidden matrices get Dion;
embeddings, output heads, norm gains and biases a scalar optimizer. Dion on an
embedding, head or bias runs, but trains poorly.
"""

import math
import re
import warnings
from typing import Any

import jax

from jaxpapers.optim.layout import DimensionNumbers, path_name, per_leaf

LABELS = ("dion", "scalar", "embedding", "head")

# Matched in this order against the "/"-joined path, case-insensitively. Names come
# before shapes: under nn.scan a norm's gain is a 2-D (layers, width) array.
HEAD = (
    r"(^|/)(lm_?head|head|unembed\w*|logits|classifier|readout|output_projection)(/|$)"
)
EMBEDDING = r"embed|(^|/)(wte|wpe)(/|$)"
SCALAR = r"norm|(^|/)(bias|scale|gain|gamma|beta|b)$"


def route(params: Any, weight_dimension_numbers: Any = None) -> Any:
    """Labels every leaf ``dion``, ``scalar``, ``embedding`` or ``head``.

    A leaf is a matrix if its name says nothing else and its dimension numbers (by
    default 2-D (in, out)) give it two sides longer than 1.

    Args:
      params: parameters or gradients.
      weight_dimension_numbers: as for ``scale_by_dion``; None for a leaf excludes it.

    Returns:
      Tree of strings like ``params``.

    Warns:
      UserWarning: 3-D and larger leaves that look like kernels but have no dimension
        numbers; they go to the scalar optimizer.

    Example:
      >>> import jax.numpy as jnp
      >>> route({"mlp": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}})
      {'mlp': {'bias': 'scalar', 'kernel': 'dion'}}
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    named = [(path_name(path), leaf) for path, leaf in flat]
    dimensions = per_leaf(
        weight_dimension_numbers,
        named,
        lambda x: x is None or isinstance(x, DimensionNumbers),
        "weight_dimension_numbers",
    )
    labels = [_label(path, leaf.shape, d) for (path, leaf), d in zip(named, dimensions)]
    left_out = [
        path
        for (path, leaf), label in zip(named, labels)
        if weight_dimension_numbers is None
        and label == "scalar"
        and len(leaf.shape) > 2
        and not re.search(SCALAR, path, re.IGNORECASE)
    ]
    if left_out:
        warnings.warn(
            f"dion: {len(left_out)} parameter(s) with more than two axes, "
            f"{left_out[0]!r} first, go to the scalar optimizer because nothing says "
            "which axes form their matrices; pass weight_dimension_numbers",
            UserWarning,
            stacklevel=2,
        )
    return treedef.unflatten(labels)


def table(params: Any, labels: Any) -> list[tuple[str, tuple[int, ...], str]]:
    """(path, shape, label) of every leaf, in the tree's order.

    Args:
      params: parameters.
      labels: tree of labels, e.g. ``route(params)``.
    """
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    return [
        (path_name(path), tuple(leaf.shape), label)
        for (path, leaf), label in zip(named, jax.tree.leaves(labels))
    ]


def _label(path: str, shape: tuple[int, ...], dimensions: Any) -> str:
    for label, pattern in (
        ("head", HEAD),
        ("embedding", EMBEDDING),
        ("scalar", SCALAR),
    ):
        if re.search(pattern, path, re.IGNORECASE):
            return label if len(shape) > 1 else "scalar"
    if dimensions is None:
        return "dion" if len(shape) == 2 and min(shape) > 1 else "scalar"
    if len(shape) < 2:
        return "scalar"
    sides = [
        math.prod(shape[a] for a in ((axes,) if isinstance(axes, int) else axes))
        for axes in dimensions
    ]
    return "dion" if min(sides) > 1 else "scalar"
