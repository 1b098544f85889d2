"""Weight decay that never works against the update.

Reference: Chen, Li, Liang, Su, Xie, Pierse, Liang, Lao, Liu. "Cautious Weight Decay",
arXiv 2510.12402.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpapers.optim.options import check_range


def add_cautious_weight_decay(
    weight_decay: Any = 0.0, mask: Any = None
) -> optax.GradientTransformation:
    r"""Decays the coordinates whose update goes towards zero, and no others.

    $$ X \leftarrow X - \eta (U + \lambda\, 1[U \odot X \ge 0] \odot X) $$

    It stands in a chain where ``optax.add_decayed_weights`` would, before the learning
    rate, and has the same state.

    Args:
      weight_decay: lambda, a number or array.
      mask: tree of bool, or function of the parameters that returns one: which leaves
        decay, as for ``optax.add_decayed_weights``.

    Raises:
      ValueError: negative decay; at ``update``, no parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = add_cautious_weight_decay(0.5)
      >>> x = jnp.array([2.0, 2.0, -2.0])
      >>> u, _ = tx.update(jnp.array([1.0, -1.0, 0.0]), tx.init(x), x)
      >>> u.tolist()
      [2.0, -1.0, -1.0]
    """
    check_range("weight_decay", weight_decay, 0)

    def decayed(u, x):
        # Signs, as the product of two small numbers is 0.
        agree = jnp.sign(u) * jnp.sign(x) >= 0
        return u + weight_decay * jnp.where(agree, x, 0)

    def update(updates, params):
        if params is None:
            raise ValueError(
                "cautious weight decay compares updates with parameters, got "
                "params=None; pass them: tx.update(gradients, state, params)"
            )
        return jax.tree.map(
            lambda u, x: None if u is None else decayed(u, x),
            updates,
            params,
            is_leaf=lambda x: x is None,
        )

    tx = optax.stateless(update)
    return tx if mask is None else optax.masked(tx, mask)
