"""FLOPs of the matrix products of a program, from its jaxpr."""

import math
from typing import Any

from jax.lax import Precision

from jaxpapers import scopes
from jaxpapers.optim.orthonormalize import RESCUE

PASSES = {Precision.DEFAULT: 1, Precision.HIGH: 3, Precision.HIGHEST: 6}
"""bfloat16 products of a product of float32 matrices, by its precision."""


def product_flops(jaxpr: Any, *, passes: bool = False) -> float:
    """FLOPs of the matrix products of a jaxpr, over all devices.

    Bodies of ``scan`` count once per iteration, unlike in the compiler's cost analysis;
    those of ``while`` as ``scopes.usual_trips`` says, or once. Dion's fallback for
    ill-conditioned factors does not count.

    Args:
      jaxpr: of a whole program.
      passes: count a product once for each of the bfloat16 products that a TPU makes of
        it, see ``matrix_passes``.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if RESCUE in str(eqn.source_info.name_stack):
            continue
        if eqn.primitive.name == "dot_general":
            total += _dot_flops(eqn) * (matrix_passes(eqn) if passes else 1)
            continue
        times = 1
        if eqn.primitive.name == "scan":
            times = eqn.params["length"]
        elif eqn.primitive.name == "while":
            times = scopes.trips_of(str(eqn.source_info.name_stack))
        elif eqn.primitive.name == "shard_map":
            # The body is one device's work along the manual axes.
            sizes = dict(eqn.params["mesh"].shape)
            times = math.prod(sizes[a] for a in eqn.params["newly_manual_axes"])
        inner = [product_flops(j, passes=passes) for j in _inner_jaxprs(eqn.params)]
        if eqn.primitive.name in ("cond", "platform_index"):
            inner = [max(inner, default=0.0)]
        total += times * sum(inner)
    return total


def matrix_passes(eqn: Any) -> int:
    """bfloat16 products that a TPU makes of one ``dot_general``: 1, 3 or 6.

    Numbers of 16 bits and integers take one; float32 as its precision says, of which
    ``high`` splits each operand in two parts and ``highest`` in three.
    """
    if all(v.aval.dtype.itemsize < 4 for v in eqn.invars):
        return 1
    precision = eqn.params["precision"]
    chosen = precision if isinstance(precision, tuple) else (precision,)
    return max(PASSES.get(x, 1) for x in chosen)


def _dot_flops(eqn: Any) -> float:
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    left, right = (v.aval.shape for v in eqn.invars)
    rows = math.prod(left) / math.prod(left[a] for a in contract)
    free = math.prod(right) / math.prod(left[a] for a in (*contract, *batch))
    return 2.0 * rows * free * math.prod(left[a] for a in contract)


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    jaxprs = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                jaxprs.append(item)
    return jaxprs
