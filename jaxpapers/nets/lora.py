"""Low-rank adapters as a transformation of parameters, for any linen net.

Hu et al., "LoRA", arXiv 2106.09685: a matrix W of a pretrained net becomes
$W + s\\,D U$ with D (in, r) and U (r, out), and only D and U are trained. Adapters
transform parameters, not modules: ``lora_apply`` returns merged parameters, to be used,
saved or exported like any others:

    adapters = lora_init(key, params, rank=4)
    grad = jax.grad(lambda a: loss(net.apply({"params": lora_apply(params, a)}, x)))
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key


def lora_init(
    key: Key[Array, ""],
    params: Any,
    rank: int,
    match: str = ".*kernel",
    *,
    stacked: str | None = None,
) -> dict:
    """Adapters whose product is zero: ``up`` is zero.

    ``down`` is normal with standard deviation 1 / rank, as in DPOK's code. A leaf of
    shape (..., out) is read as the matrix (prod(...), out), so that a convolution's
    ``down`` acts on whole patches. Vectors and scalars never match.

    Args:
      key: of ``down``.
      params: of a net; arrays or their shapes.
      rank: r.
      match: searched for in a leaf's path, e.g. ``r"attention.*(query|value)/kernel"``.
      stacked: leaves whose path contains this have a leading axis of layers, stacked by
        ``nn.scan``; every layer gets its own adapters.

    Returns:
      For every matched leaf {"down": (in, r), "up": (r, out)}, nested as in ``params``;
      for stacked ones with the layers' axis in front.

    Raises:
      ValueError: rank < 1 or larger than a side of a matched matrix; a regular
        expression that matches no matrix.

    Example:
      >>> params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
      >>> jax.tree.map(jnp.shape, lora_init(jax.random.key(0), params, 2))
      {'dense': {'kernel': {'down': (6, 2), 'up': (2, 4)}}}
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    shapes = {
        path: _matrix_shape(leaf.shape, bool(stacked and re.search(stacked, path)))
        for path, leaf in select(params, match).items()
    }
    if stacked and not any(re.search(stacked, path) for path in shapes):
        raise ValueError(f"stacked={stacked!r} matches none of {list(shapes)[:6]} ...")
    shapes = {path: shape for path, shape in shapes.items() if len(shape) >= 2}
    if not shapes:
        raise ValueError(f"match={match!r} matches vectors only, which have no rank")
    small = {path: s for path, s in shapes.items() if min(s[-2:]) < rank}
    if small:
        raise ValueError(
            f"rank {rank} exceeds a side of {small} (in, out); lower it, or leave them "
            "out of match"
        )
    adapters = {}
    for i, path in enumerate(sorted(shapes)):
        *layers, fan_in, fan_out = shapes[path]
        kind = select(params, match)[path].dtype
        draw = jax.random.fold_in(key, i)
        down = jax.random.normal(draw, (*layers, fan_in, rank), kind) / rank
        up = jnp.zeros((*layers, rank, fan_out), kind)
        adapters[path] = {"down": down, "up": up}
    return unflatten_dict(adapters, sep="/")


def lora_apply(params: Any, adapters: Any, scale: Any = 1.0) -> dict:
    """W + scale * down @ up for leaves with adapters; other leaves unchanged.

    Bitwise equal to ``params`` while ``up`` is zero. Computed in float32 or wider, then
    cast to the leaf's dtype.

    Args:
      params: of a net.
      adapters: see ``lora_init``.
      scale: s, a number or a traced scalar.

    Raises:
      ValueError: adapters of a leaf that params do not have, or of another shape.

    Example:
      >>> params = {"kernel": jnp.zeros((2, 2))}
      >>> adapters = {"kernel": {"down": jnp.ones((2, 1)), "up": jnp.ones((1, 2))}}
      >>> lora_apply(params, adapters, 3.0)["kernel"].tolist()
      [[3.0, 3.0], [3.0, 3.0]]
    """
    leaves = flatten_dict(params, sep="/")
    pairs: dict[str, dict] = {}
    for path, part in flatten_dict(adapters, sep="/").items():
        owner, _, name = path.rpartition("/")
        pairs.setdefault(owner, {})[name] = part
    for path, pair in pairs.items():
        leaves[path] = _adapted(path, leaves, pair, scale)
    return unflatten_dict(leaves, sep="/")


def lora_dropout(key: Key[Array, ""], adapters: Any, rate: float) -> dict:
    r"""Adapters some of whose inputs are dropped: rows of ``down`` are zero or scaled up.

    $(m \odot x) D U = x\,(m \odot D)\,U$ for a mask m of inputs: inputs of the adapters
    are dropped, those of W are not, as in the paper. There each token has a mask of
    its own; here, where adapters transform parameters, all tokens of a call share one.
    Every matrix and layer has another.

    Args:
      key: of the masks.
      adapters: see ``lora_init``.
      rate: share of inputs that are dropped; the others are divided by 1 - rate.

    Raises:
      ValueError: a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    dropped: dict[str, Any] = dict(flatten_dict(adapters, sep="/"))
    for i, path in enumerate(sorted(dropped)):
        if rate and path.rpartition("/")[2] == "down":
            down = dropped[path]
            draw = jax.random.fold_in(key, i)
            kept = jax.random.bernoulli(draw, 1 - rate, (*down.shape[:-1], 1))
            dropped[path] = down * jnp.broadcast_to(kept, down.shape) / (1 - rate)
    return unflatten_dict(dropped, sep="/")


def lora_count(adapters: Any) -> int:
    """Number of adapter parameters: (in + out) r per matrix.

    Example:
      >>> params = {"kernel": jnp.ones((6, 4))}
      >>> lora_count(lora_init(jax.random.key(0), params, 2))
      20
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(adapters))


def select(params: Any, match: str) -> dict[str, Any]:
    """Leaves whose "/"-joined path matches a regular expression, by path.

    Raises:
      ValueError: none matches.
    """
    leaves = flatten_dict(params, sep="/")
    matched = {path: leaf for path, leaf in leaves.items() if re.search(match, path)}
    if not matched:
        raise ValueError(
            f"{match!r} matches no parameter; they are {sorted(leaves)[:6]} ..."
        )
    return matched


def _matrix_shape(shape, stacked):
    """(in, out), with the layers' axis in front if stacked; shorter for a vector."""
    layers, rest = (shape[:1], shape[1:]) if stacked else ((), shape)
    if len(rest) < 2:
        return ()
    return (*layers, math.prod(rest[:-1]), rest[-1])


def _adapted(path, leaves, pair, scale):
    """One leaf with its adapters added."""
    if path not in leaves or set(pair) != {"down", "up"}:
        raise ValueError(
            f"adapters {sorted(pair)} at {path!r} fit no leaf; expected down and up of "
            f"one of {sorted(leaves)[:6]} ..."
        )
    leaf, down, up = leaves[path], pair["down"], pair["up"]
    expected = _matrix_shape(leaf.shape, down.ndim == 3)
    rank = down.shape[-1]
    fits = (*expected[:-1], rank), (*expected[:-2], rank, *expected[-1:])
    if not expected or (down.shape, up.shape) != fits:
        raise ValueError(
            f"adapters of {path!r} do not fit its shape {leaf.shape}: got down "
            f"{down.shape} and up {up.shape}, expected (in, r) and (r, out) of "
            f"{expected}"
        )
    kind = jnp.promote_types(leaf.dtype, jnp.float32)
    product = scale * (down.astype(kind) @ up.astype(kind)).reshape(leaf.shape)
    return (leaf + product).astype(leaf.dtype)
