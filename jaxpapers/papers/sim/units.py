"""SIM's exact search unit, and what both units read of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxpapers.nets import behaviour, embedding, mlp
from jaxpapers.nets.attention import activation_unit
from jaxpapers.ops import search
from jaxpapers.ops.attention import attention_pool
from jaxpapers.ops.search import Found, hard_search, time_bucket, topk_masked


def esu(
    params: dict,
    z: Float[Array, "*batch K Z"],
    valid: Bool[Array, "*batch K"],
    target: Float[Array, "*batch D"],
    *,
    scaled: bool = False,
) -> Float[Array, "*batch U"]:
    """Exact search attention: every head a weighted sum of the selected (section 3.2).

    Args:
      params: W_a of the candidate (heads, H, D) and W_b of the selected (heads, H, Z); if
        there, W_v (heads, H', Z) makes values of z, and W_o (U, heads H') mixes heads.
      z: selected behaviours with their time gaps.
      valid: False at empty slots; a row without any gives zeros.
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


def fields(batch, net) -> dict[str, Any]:
    """``behaviour.fields`` with raw categories, times, and what each part may see."""
    check_shapes(batch, net)
    use = behaviour.fields(batch, net)
    place = jnp.arange(batch["hist_item"].shape[1], dtype=jnp.int32)[None]
    use["long_mask"] = use["mask"] & (place < batch["length"][:, None] - net.skip)
    use["time"], use["hist_time"] = batch.get("time"), batch.get("hist_time")
    # Raw: two unknown categories are not the same. 0 is none and matches nothing.
    use["raw_cate"] = batch.get("hist_cate")
    back = jnp.arange(net.short, dtype=jnp.int32)[None]
    last = batch["length"][:, None] - 1 - back
    idx = jnp.where(last >= 0, last, -1)
    use["recent"] = Found(idx, last >= 0, idx)
    return use


def hard(use, cates, net) -> Found:
    """The last behaviours of the candidates' categories."""
    mask = use["long_mask"] & (use["raw_cate"] != embedding.PADDING)
    hist = use["raw_cate"]
    if cates.ndim == 2:
        shape = (*cates.shape, hist.shape[1])
        mask, hist = (jnp.broadcast_to(x[:, None], shape) for x in (mask, hist))
    return hard_search(hist, mask, cates, net.k)


def soft(scores, mask, net) -> Found:
    """The behaviours of the largest scores."""
    if scores.ndim == 3:
        mask = jnp.broadcast_to(mask[:, None], scores.shape)
    return search.topk_on_mesh(scores, mask, net.k, chunk=net.chunk)


def read_history(tables, use):
    """Vectors of the whole history."""
    return behaviour.embed(tables, use["hist_item"], use["hist_cate"])


def selected(params, use, found, net):
    """z of a search's results: ids are gathered first, K rows embedded."""
    z = read_at(params["tables"], use, found)
    return with_gaps(params, z, use, found, net)


def read_at(tables, use, found):
    """Embeddings of the behaviours at positions; no others are read."""
    cate = None if use["hist_cate"] is None else pick(use["hist_cate"], found)
    return behaviour.embed(tables, pick(use["hist_item"], found), cate)


def with_gaps(params, z, use, found, net):
    """``append_gaps`` at what a search found."""
    if not net.time_dim:
        return z
    return append_gaps(params, z, use["time"], pick(use["hist_time"], found), net)


def append_gaps(params, z, now, times, net):
    """Behaviours with the embedded time since each, if the net has that."""
    if not net.time_dim:
        return z
    gaps = now.reshape((-1,) + (1,) * (times.ndim - 1)) - times
    bucket = time_bucket(gaps, buckets=net.time_buckets, unit=net.time_unit)
    return jnp.concatenate([z, params["gaps"][bucket]], -1)


def pick(values, found):
    """``search.take`` of (B, T, ..) at (B, K) or (B, N, K) positions."""
    shape = found.idx.shape
    flat = jax.tree.map(lambda x: x.reshape(shape[0], -1), found)
    picked = search.take(values, flat)
    return picked.reshape(*shape, *values.shape[2:])


def per_category(find: Callable, cates, distinct: int):
    """find((B, S) categories) for candidates, once per distinct category of a user."""
    if cates.ndim == 1:
        return jax.tree.map(lambda x: x[:, 0], find(cates[:, None]))
    count = cates.shape[1]
    size = min(count, distinct)
    own, place = jax.vmap(
        lambda x: jnp.unique(
            x, size=min(size + 1, count), fill_value=0, return_inverse=True
        )
    )(cates)

    def spread(x):
        index = place.reshape(*place.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, 1)

    def once():
        return jax.tree.map(spread, find(own[:, :size]))

    if size == count:
        return once()
    return lax.cond((place >= size).any(), lambda: find(cates), once)


def some(scores, keys, mask, key, net):
    """A random subset of the behaviours, for histories too long to train on."""
    if not net.gsu_sample or net.gsu_sample >= mask.shape[1]:
        return scores, keys, mask
    if key is None:
        raise ValueError(
            "net.gsu_sample draws behaviours: forward needs a key to train"
        )
    kept = topk_masked(jax.random.uniform(key, mask.shape), mask, net.gsu_sample)
    return search.take(scores, kept), search.take(keys, kept), kept.valid


def options(net, use, train, apart) -> dict[str, Any]:
    """Options of Dice."""
    mask = use["row_mask"]
    mask = mask[:, None] if mask is not None and apart else mask
    return {"train": train, "decay": net.dice_decay, "eps": net.dice_eps, "mask": mask}


def click(params, state, use, query, long, net, options):
    """ESU's logit: long-term and short-term interest, candidate and user."""
    tables, state, apart = params["tables"], dict(state), query.ndim == 3
    parts = [long]
    if net.short:
        keys = read_at(tables, use, use["recent"])
        mask = search.take(use["mask"], use["recent"])
        if apart:
            keys, mask = keys[:, None], mask[:, None]
        rest = dict(options)
        row_mask = rest.pop("mask")
        counted = mask if row_mask is None else mask & row_mask[..., None]
        scores, state["unit"] = activation_unit(
            params["unit"], query, keys, counted, state=state["unit"],
            activation=net.unit_activation, chunk=net.unit_chunk, **rest,
        )  # fmt: skip
        parts.append(attention_pool(scores, keys, mask, net.normalize))
    parts.append(query)
    if net.user_dim:
        user = embedding.lookup(tables["user"], use["user"])
        shape = (*query.shape[:-1], net.user_dim)
        parts.append(jnp.broadcast_to(user[:, None] if apart else user, shape))
    x = jnp.concatenate(parts, -1)
    logit, state["mlp"] = mlp.apply(
        params["mlp"], state["mlp"], x, activation=net.activation, **options
    )
    logit = logit[..., 0]
    if net.item_bias:
        logit = logit + embedding.lookup(tables["item_bias"], use["item"])[..., 0]
    return logit, state


def check_shapes(batch, net):
    """Raises ValueError naming a field that is missing or does not fit."""
    behaviour.check_shapes(batch, net)
    hist = batch["hist_item"].shape
    needed = {"cate": batch["item"].shape, "hist_cate": hist}
    needed = needed if net.search == "hard" else {}
    if net.time_dim and net.search != "average":
        needed.update(time=hist[:1], hist_time=hist)
    for name, shape in needed.items():
        if name not in batch:
            raise ValueError(f"the batch has no {name!r}; got {sorted(batch)}")
        if batch[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {batch[name].shape}")
