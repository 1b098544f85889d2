r"""Equal steps for all outputs of a matrix: NorMuon's division of rows.

NorMuon (Li et al., arXiv 2510.05491) divides each output's row of the direction O by the
root of its mean square v, and restores the norm of the whole:

$$ O' = O / (\sqrt v + \epsilon), \quad O \leftarrow O'\, |O|_F / |O'|_F $$

Only row sums cross devices: one number per output over the axes that split the inputs,
two per matrix over those that split the outputs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxpapers.optim.collectives import psum
from jaxpapers.optim.layout import Layout, axis_names


def row_mean_square(layout: Layout, spec: P, o: jax.Array) -> jax.Array:
    """Mean square of each output's row, on the leaf's axes with inputs of size 1.

    Args:
      layout: of the leaf.
      spec: its partition.
      o: this device's block.
    """
    total = jnp.square(o).sum(layout.reduction, keepdims=True)
    return psum(total, axis_names(layout.reduction, spec)) / layout.fan_in


def divide_rows(
    layout: Layout, spec: P, o: jax.Array, square: jax.Array, v: Any, eps: Any
) -> jax.Array:
    """O / (sqrt(v) + eps) with O's Frobenius norm; a row of zeros stays one.

    Args:
      layout: of the leaf.
      spec: its partition.
      o: this device's block.
      square: ``row_mean_square`` of it.
      v: what is divided by, shaped like ``square``.
      eps: added to the root.
    """
    factor = 1 / (jnp.sqrt(v) + eps)
    output = [a for a in layout.p_axes + layout.q_axes if a not in layout.reduction]
    sizes = jnp.stack([square, square * jnp.square(factor)]).sum(
        [a + 1 for a in output], keepdims=True
    )
    before, after = psum(sizes, axis_names(output, spec))
    return o * factor * jnp.sqrt(before / jnp.where(after == 0, 1, after))
