"""An extension: one b per level, fitted to the cost of learning by gradient descent.

The order is a sort, so its weighted completion cost S is piecewise constant in b. Here
comparisons of scores become sigmoids of differences of log W over a temperature tau; as
tau goes to 0, the loss goes to S under ``transient`` credit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from jaxpapers.papers.dnw.measure import dnw
from jaxpapers.papers.dnw.network import CharNet, Closures, weights


def level_b(params: Float[Array, " L"]) -> Float[Array, " L"]:
    """b of each level in (0, 1), from unconstrained parameters."""
    return jax.nn.sigmoid(params)


def level_scores(b: Float[Array, " L"], net: CharNet) -> Float[Array, " n"]:
    """W_v = f_v + b_l(v) sum W_w: the level of the component decides its b.

    Args:
      b: of the levels from 1 to L.
      net: the network.
    """
    freq, comp = jnp.asarray(net.freq), jnp.asarray(net.comp)
    weight = weights(net) * b[jnp.asarray(net.level)[comp] - 1]
    return dnw(freq, comp, jnp.asarray(net.whole), weight, 1.0, n_levels=net.n_levels)


def loss(
    params: Float[Array, " L"],
    net: CharNet,
    closures: Closures,
    *,
    tau: Float[Array, ""] | float = 0.1,
    top: int = 1000,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Smoothed S of the order by W under ``transient`` credit.

    With s = log W and sigma_uv = sigmoid((s_u - s_v) / tau), the share of u before v,

    $$ S = sum_v f_v (q_v + sum_{u != v} sigma_{uv} q_u), q_u = sum_x r_{ux} c_x $$

    where r_ux, the share of x that is paid for with u, is 1 for u and otherwise the
    largest of r_uw sigma_ux over the wholes w of x in the closure of u.

    Args:
      params: see ``level_b``.
      net: the network.
      closures: ``network.closures(net)``.
      tau: temperature, of log W.
      top: the nodes of largest W, which are compared with each other.

    Returns:
      S of the top nodes, and the metrics ``b_first`` and ``b_last``, b of the lowest and
      of the highest level.
    """
    b = level_b(params)
    w = level_scores(b, net)
    # log is taken where W > 0; the others are after everything.
    score = jnp.log(jnp.maximum(w, jnp.finfo(w.dtype).tiny))
    _, nodes = lax.top_k(lax.stop_gradient(score), min(top, len(w)))
    cost = _soft_costs(nodes, score, net, closures, tau)
    mine = score[nodes]
    before = jax.nn.sigmoid((mine[:, None] - mine[None, :]) / tau)
    before = jnp.where(jnp.eye(len(nodes), dtype=bool), 1.0, before)
    value = ((cost @ before) * jnp.asarray(net.freq)[nodes]).sum()
    return value, {"b_first": b[0], "b_last": b[-1]}


def fit(
    net: CharNet,
    closures: Closures,
    tx: optax.GradientTransformation,
    *,
    steps: int,
    b: float = 0.35,
    tau: Float[Array, ""] | float = 0.1,
    top: int = 1000,
) -> tuple[Float[Array, " L"], Float[Array, " steps"]]:
    """b per level after some steps of an optax transformation, and the losses.

    Args:
      net: the network.
      closures: ``network.closures(net)``.
      tx: the optimizer.
      steps: of it.
      b: of all levels at the start, in (0, 1).
      tau: see ``loss``.
      top: see ``loss``.
    """
    params = jnp.full(net.n_levels, jax.scipy.special.logit(b))

    def step(carry, _):
        params, opt_state = carry
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(
            params, net, closures, tau=tau, top=top
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    (params, _), losses = lax.scan(step, (params, tx.init(params)), length=steps)
    return level_b(params), losses


def _soft_costs(nodes, score, net: CharNet, closures: Closures, tau: Any):
    """q of the given nodes."""
    score = jnp.append(score, -jnp.inf)
    own_cost = jnp.append(jnp.asarray(net.own_cost), 0)

    def one(nodes, part, whole):
        later = jax.nn.sigmoid((score[nodes[0]] - score[nodes]) / tau)
        first = nodes == nodes[0]

        def step(_, need):
            share = need[whole] * later[part]
            reached = jax.ops.segment_max(share, part, len(nodes))
            return jnp.where(first, 1.0, jnp.maximum(reached, 0.0))

        need = lax.fori_loop(0, closures.rounds, step, first.astype(score.dtype))
        return (need * own_cost[nodes]).sum()

    tables = (closures.nodes, closures.part, closures.whole)
    return jax.vmap(one)(*(jnp.asarray(table)[nodes] for table in tables))
