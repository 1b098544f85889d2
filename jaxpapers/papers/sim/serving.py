"""SIM behind a server: hard search by index, soft search in projected tables."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxpapers.nets import behaviour, embedding
from jaxpapers.ops import search
from jaxpapers.ops.behaviour_tree import BehaviourTree, ubt_query
from jaxpapers.papers.sim import units
from jaxpapers.papers.sim.net import Net
from jaxpapers.papers.sim.units import esu


def serve(
    params: dict,
    extra: dict,
    ubt: BehaviourTree,
    batch: Mapping[str, Array],
    *,
    net: Net,
    distinct: int = 20,
) -> Float[Array, "B ..."]:
    """``predict`` of the hard search, from the user behaviour tree.

    Args:
      params: see ``init``.
      extra: see ``statistics``.
      ubt: see ``build_ubt``; all its behaviours must be older than the request.
      batch: user (B,), as in the tree, item and cate (B, N), time (B,), and histories of
        the recent behaviours alone, any T >= ``net.short``.
      net: hyper-parameters.
      distinct: see ``forward``.

    Raises:
      ValueError: the search is not hard.
    """
    if net.search != "hard":
        raise ValueError(
            f"serve needs the index of the hard search, got net.search={net.search!r}; "
            "use predict"
        )
    read = units.fields(batch, net)
    query = behaviour.embed(params["tables"], read["item"], read["cate"])

    def select(cates):
        user = jnp.broadcast_to(batch["user"][:, None], cates.shape)
        known = ubt_query(ubt, user, cates, net.k)
        valid = known.valid & (cates != embedding.PADDING)[..., None]
        item = jnp.where(valid, embedding.resolve(known.items, net.item_vocab), 0)
        cate = None
        if net.cate_dim:
            cate = embedding.resolve(cates, net.cate_vocab)[..., None]
            cate = jnp.where(valid, cate, 0)
        z = behaviour.embed(params["tables"], item, cate)
        return units.append_gaps(params, z, read["time"], known.times, net), valid

    z, valid = units.per_category(select, batch["cate"], distinct)
    long = esu(params["esu"], z, valid, query)
    return units.click(params, extra, batch, read, query, long, net, False)[0]


def projected(params: dict, net: Net) -> dict[str, Array]:
    """W_b e_i of every item and category in bfloat16, for ``search.soft_search``.

    e_i is item and category side by side, so W_b e_i is a sum of two rows. Training does
    not update the copies: compute them again afterwards.

    Args:
      params: see ``init``.
      net: hyper-parameters.

    Raises:
      ValueError: the search is not soft.
    """
    if net.search != "soft":
        raise ValueError(
            f"only the soft search projects, got net.search={net.search!r}"
        )
    tables, w_b = params["tables"], params["gsu"]["W_b"]
    parts = {"item": w_b[:, : net.item_dim]}
    if net.cate_dim:
        parts["cate"] = w_b[:, net.item_dim :]
    return {n: search.pack(tables[n] @ w.T) for n, w in parts.items()}
