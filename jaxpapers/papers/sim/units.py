"""SIM's exact search unit, and the searches and embeddings of both units."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxpapers.nets import behaviour, embedding, interest
from jaxpapers.nets.attention import activation_unit
from jaxpapers.ops import search
from jaxpapers.ops.attention import attention_pool
from jaxpapers.ops.search import Selection, hard_search, time_bucket, topk_masked
from jaxpapers.papers.sim.net import Net


def esu(
    params: dict,
    z: Float[Array, "*batch K Z"],
    valid: Bool[Array, "*batch K"],
    target: Float[Array, "*batch D"],
    *,
    scaled: bool = False,
) -> Float[Array, "*batch U"]:
    """Exact search attention: each head a weighted sum of the selected (section 3.2).

    Args:
      params: W_a of the candidate (heads, H, D) and W_b of the selected (heads, H, Z);
        optionally W_v (heads, H', Z), which projects z to values, and W_o (U, heads H'),
        which mixes the heads.
      z: selected behaviours with their time gaps.
      valid: False at empty slots; without any behaviour the output is zero.
      target: e_a.
      scaled: divide the logits by sqrt(H) (not in the paper).

    Returns:
      The heads side by side.
    """
    width = params["W_a"].shape[1]
    candidate = jnp.einsum("...d,qhd->...qh", target, params["W_a"])
    # As in ``soft_scores``: the weights of z are applied to the candidate.
    candidate = jnp.einsum("...qh,qhz->...qz", candidate, params["W_b"])
    logits = jnp.einsum("...qz,...kz->...qk", candidate, z)
    logits = logits / np.sqrt(width).astype(logits.dtype) if scaled else logits
    heads = attention_pool(logits, z[..., None, :, :], valid[..., None, :], "softmax")
    if "W_v" in params:
        heads = jnp.einsum("...qz,qhz->...qh", heads, params["W_v"])
    heads = heads.reshape(*heads.shape[:-2], -1)
    return heads @ params["W_o"].T if "W_o" in params else heads


def fields(batch, net: Net) -> dict[str, Any]:
    """``nets.behaviour.fields`` with raw categories, times, and the parts' positions.

    ``long_mask`` is True where the search may select, ``recent`` the positions of the
    short-term part, newest first.
    """
    check_shapes(batch, net)
    read = behaviour.fields(batch, net)
    position = jnp.arange(batch["hist_item"].shape[1], dtype=jnp.int32)[None]
    older = position < read["length"][:, None] - net.skip
    read["long_mask"] = read["mask"] & older
    read["time"], read["hist_time"] = batch.get("time"), batch.get("hist_time")
    # Raw: two unknown categories are not the same. 0 is none and matches nothing.
    read["raw_cate"] = batch.get("hist_cate")
    back = jnp.arange(net.short, dtype=jnp.int32)[None]
    last = read["length"][:, None] - 1 - back
    idx = jnp.where(last >= 0, last, -1)
    read["recent"] = Selection(idx, last >= 0, idx)
    return read


def hard(read, cates, net: Net) -> Selection:
    """Positions of the latest behaviours of the candidates' categories."""
    mask = read["long_mask"] & (read["raw_cate"] != embedding.PADDING)
    hist = read["raw_cate"]
    if cates.ndim == 2:
        shape = (*cates.shape, hist.shape[1])
        mask, hist = (jnp.broadcast_to(x[:, None], shape) for x in (mask, hist))
    return hard_search(hist, mask, cates, net.k)


def soft(scores, mask, net: Net) -> Selection:
    """Positions of the behaviours of the largest scores."""
    if scores.ndim == 3:
        mask = jnp.broadcast_to(mask[:, None], scores.shape)
    return search.topk_on_mesh(scores, mask, net.k, chunk=net.chunk)


def embed_history(tables, read):
    """Vectors of the whole history."""
    return behaviour.embed(tables, read["hist_item"], read["hist_cate"])


def embed_selected(params, read, selected, net: Net):
    """z of the selected behaviours; no others are embedded."""
    return with_gaps(
        params, embed_at(params["tables"], read, selected), read, selected, net
    )


def embed_at(tables, read, selected):
    """Vectors of the selected behaviours; no others are embedded."""
    cate = None if read["hist_cate"] is None else take(read["hist_cate"], selected)
    return behaviour.embed(tables, take(read["hist_item"], selected), cate)


def with_gaps(params, z, read, selected, net: Net):
    """``append_gaps`` for the selected behaviours."""
    if not net.time_dim:
        return z
    return append_gaps(params, z, read["time"], take(read["hist_time"], selected), net)


def append_gaps(params, z, now, times, net: Net):
    """Behaviours with the embedded time since each, if the net has that."""
    if not net.time_dim:
        return z
    gaps = search.time_gap(now.reshape((-1,) + (1,) * (times.ndim - 1)), times)
    bucket = time_bucket(gaps, buckets=net.time_buckets, unit=net.time_unit)
    return jnp.concatenate([z, params["gaps"][bucket]], -1)


def take(values, selected):
    """``search.take`` of (B, T, ..) at (B, K) or (B, N, K) positions."""
    shape = selected.idx.shape
    flat = jax.tree.map(lambda x: x.reshape(shape[0], -1), selected)
    return search.take(values, flat).reshape(*shape, *values.shape[2:])


def per_category(select: Callable, cates, distinct: int):
    """select((B, S) categories) for candidates, once per distinct category of a user."""
    if cates.ndim == 1:
        return jax.tree.map(lambda x: x[:, 0], select(cates[:, None]))
    count = cates.shape[1]
    size = min(count, distinct)
    categories, index = jax.vmap(
        lambda x: jnp.unique(
            x, size=min(size + 1, count), fill_value=0, return_inverse=True
        )
    )(cates)

    def spread(x):
        at = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, at, 1)

    def once():
        return jax.tree.map(spread, select(categories[:, :size]))

    if size == count:
        return once()
    return lax.cond((index >= size).any(), lambda: select(cates), once)


def subset(scores, keys, mask, key, net: Net):
    """A random subset of the behaviours, for histories too long to train on."""
    if not net.gsu_sample or net.gsu_sample >= mask.shape[1]:
        return scores, keys, mask
    if key is None:
        raise ValueError(
            "net.gsu_sample draws behaviours: forward needs a key to train"
        )
    kept = topk_masked(jax.random.uniform(key, mask.shape), mask, net.gsu_sample)
    return search.take(scores, kept), search.take(keys, kept), kept.valid


def dice_options(net: Net, batch, query, train: bool) -> dict[str, Any]:
    """Dice's keywords of ``nets.mlp``."""
    mask = behaviour.candidate_mask(batch, query.ndim - 1)
    return {"train": train, "decay": net.dice_decay, "eps": net.dice_eps, "mask": mask}


def click(params, extra, batch, read, query, long, net: Net, train: bool):
    """ESU's logit: long-term and short-term interest, candidate and user."""
    tables, extra = params["tables"], dict(extra)
    features = [long]
    if net.short:
        keys = embed_at(tables, read, read["recent"])
        mask = search.take(read["mask"], read["recent"])
        if query.ndim == 3:
            keys, mask = keys[:, None], mask[:, None]
        dice = dice_options(net, batch, query, train)
        rows = dice.pop("mask")
        counted = mask if rows is None else mask & rows[..., None]
        scores, extra["unit"] = activation_unit(
            params["unit"], query, keys, counted, state=extra["unit"],
            activation=net.unit_activation, chunk=net.unit_chunk, **dice,
        )  # fmt: skip
        features.append(attention_pool(scores, keys, mask, net.normalize))
    features.append(query)
    if net.user_dim:
        features.append(interest.user_vectors(tables, read, query))
    logit, _, extra["mlp"] = behaviour.head(
        params["mlp"], extra["mlp"], jnp.concatenate(features, -1), batch, tables,
        net=net, train=train,
    )  # fmt: skip
    return logit, extra


def check_shapes(batch, net: Net) -> None:
    """Checks that a batch has the arrays that the search reads, of shapes that fit.

    Raises:
      ValueError: naming the array that is missing or does not fit; T = 0.
    """
    behaviour.check_shapes(batch, net)
    hist = batch["hist_item"].shape
    needed = {}
    if net.search == "hard":
        needed = {"cate": batch["item"].shape, "hist_cate": hist}
    if net.time_dim and net.search != "average":
        needed |= {"time": hist[:1], "hist_time": hist}
    for name, shape in needed.items():
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; got {sorted(batch)}")
        if batch[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {batch[name].shape}")
