"""Click batches: a user's history and candidates, as every sequential model reads them.

A batch is a dict of int32 item (B,) or (B, N) for N candidates of each history, cate as
item, hist_item and hist_cate (B, T), length (B,), user (B,), and of label (B,) and an
optional float32 weight (B,). ``net`` has the vocabularies item_vocab, cate_vocab and
user_vocab, ids 0 and 1 included, and the widths item_dim, cate_dim and user_dim; the last
two may be 0, which leaves the field out.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpapers.nets import embedding, mlp

DTYPES = ("float32", "bfloat16")


def init(key: Key[Array, ""], net: Any) -> dict[str, Float[Array, "V D"]]:
    """Tables item, cate, user and item_bias, as far as ``net`` has them.

    Args:
      key: of the draws.
      net: also ``std`` of the values (0: Glorot), ``rows_multiple`` and ``item_bias``.

    Raises:
      ValueError: see ``check_sizes``.
    """
    check_sizes(net)
    keys = iter(jax.random.split(key, 3))
    sizes = {
        "item": (net.item_vocab, net.item_dim),
        "cate": (net.cate_vocab, net.cate_dim),
        "user": (net.user_vocab, net.user_dim),
    }
    tables = {}
    for name, (vocab, width) in sizes.items():
        count = embedding.padded_rows(vocab, net.rows_multiple) if width else 0
        draw = (
            functools.partial(embedding.normal, std=net.std)
            if net.std
            else embedding.glorot
        )
        key_table = next(keys)
        if width:
            tables[name] = draw(key_table, count, width)
    if net.item_bias:
        count = embedding.padded_rows(net.item_vocab, net.rows_multiple)
        tables["item_bias"] = jnp.zeros((count, 1))
    return tables


def embed(
    tables: Mapping[str, Any],
    item: Int[Array, "*shape"],
    cate: Int[Array, "*shape"] | None,
) -> Float[Array, "*shape D"]:
    """Item vectors: the embeddings of item and category."""
    parts = [embedding.lookup(tables["item"], item)]
    if cate is not None:
        parts.append(embedding.lookup(tables["cate"], cate))
    return jnp.concatenate(parts, -1)


def head(
    params: dict,
    state: dict,
    x: Float[Array, "*candidates F"],
    batch: Mapping[str, Array],
    tables: Mapping[str, Any],
    *,
    net: Any,
    train: bool,
) -> tuple[Float[Array, "*candidates"], list[Float[Array, "*candidates _"]], dict]:
    """Logits of candidates: an MLP on their features, and their own bias.

    Args:
      params: an ``nets.mlp`` from F to 1.
      state: Dice's statistics.
      x: features.
      batch: see above; rows of weight 0 are in no statistics.
      tables: see ``init``; ``item_bias`` is added if ``net`` has it.
      net: also ``activation``, ``dice_decay`` and ``dice_eps``.
      train: statistics of the batch.

    Returns:
      Logits, the hidden layers, and the statistics to use next.
    """
    mask = batch["weight"] > 0 if "weight" in batch else None
    if mask is not None and x.ndim == 3:
        mask = mask[:, None]
    (*hidden, logit), state = mlp.layers(
        params, state, x, activation=net.activation, train=train, mask=mask,
        decay=net.dice_decay, eps=net.dice_eps,
    )  # fmt: skip
    logit = logit[..., 0]
    if net.item_bias:
        item = embedding.resolve(batch["item"], net.item_vocab)
        logit = logit + embedding.lookup(tables["item_bias"], item)[..., 0]
    return logit, hidden, state


def cross_entropy(
    logit: Float[Array, " B"], batch: Mapping[str, Array]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean binary cross-entropy of ``batch["label"]``, weighted if it has ``weight``.

    Returns:
      Nats per row, 0 without any weight; metrics ``rate``, the mean prediction, and with
      weights ``weight``, their sum.
    """
    nats = jax.nn.softplus(logit) - batch["label"].astype(logit.dtype) * logit
    predicted = jax.nn.sigmoid(logit)
    if "weight" not in batch:
        return nats.mean(), {"rate": predicted.mean()}
    weight = batch["weight"].sum()
    share = batch["weight"] / jnp.where(weight == 0, 1, weight)
    rate = (predicted * share).sum()
    return (nats * share).sum(), {"rate": rate, "weight": weight}


def fields(batch: Mapping[str, Array], net: Any) -> dict[str, Any]:
    """Ids within their vocabularies, zeros beyond a history's end, and the masks.

    Returns:
      item, hist_item, cate and hist_cate (None without), user, mask (B, T) of the
      history's items and row_mask (B,), None or where the weight is positive.

    Raises:
      ValueError: see ``check_shapes``.
    """
    check_shapes(batch, net)
    slots = batch["hist_item"].shape[1]
    here = jnp.arange(slots)[None, :] < batch["length"][:, None]
    mask = here & (batch["hist_item"] != embedding.PADDING)
    use: dict[str, Any] = {"mask": mask, "row_mask": None}
    use["item"] = embedding.resolve(batch["item"], net.item_vocab)
    hist = embedding.resolve(batch["hist_item"], net.item_vocab)
    use["hist_item"] = jnp.where(mask, hist, embedding.PADDING)
    use["cate"] = use["hist_cate"] = None
    if net.cate_dim:
        use["cate"] = embedding.resolve(batch["cate"], net.cate_vocab)
        hist = embedding.resolve(batch["hist_cate"], net.cate_vocab)
        use["hist_cate"] = jnp.where(mask, hist, embedding.PADDING)
    if net.user_dim:
        use["user"] = embedding.resolve(batch["user"], net.user_vocab)
    if "weight" in batch:
        use["row_mask"] = batch["weight"] > 0
    return use


def check_shapes(batch: Mapping[str, Any], net: Any) -> None:
    """Raises ValueError naming a field that is missing or does not fit, or T = 0."""
    needed = ["item", "hist_item", "length"]
    needed += ["cate", "hist_cate"] if net.cate_dim else []
    needed += ["user"] if net.user_dim else []
    missing = [n for n in needed if n not in batch]
    if missing:
        raise ValueError(f"the batch has no {missing}; got {sorted(batch)}")
    hist = batch["hist_item"].shape
    if len(hist) != 2 or hist[1] == 0:
        raise ValueError(
            f"hist_item must be (batch, slots) with slots >= 1, got shape {hist}; set "
            "data.history >= 1"
        )
    for name, shape in (("hist_cate", hist), ("length", hist[:1]), ("label", hist[:1]),
                        ("weight", hist[:1]), ("user", hist[:1]),
                        ("cate", batch["item"].shape)):  # fmt: skip
        if name in batch and batch[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {batch[name].shape}")


def ids(batch: Mapping[str, Array], *, net: Any) -> dict[str, Int[Array, "..."]]:
    """The ids that a batch reads of every table, 0 for padding and rows of weight 0."""
    use = fields(batch, net)
    keep = use["row_mask"]

    def real(*arrays):
        x = jnp.concatenate([a.reshape(len(a), -1) for a in arrays], 1)
        return x if keep is None else jnp.where(keep[:, None], x, 0)

    found = {"item": real(use["item"], use["hist_item"])}
    if net.cate_dim:
        found["cate"] = real(use["cate"], use["hist_cate"])
    if net.user_dim:
        found["user"] = real(use["user"])
    if net.item_bias:
        found["item_bias"] = real(use["item"])
    return found


def check_batch(
    batch: Mapping[str, Any], *, net: Any, counts: Mapping[str, Any] | None = None
) -> None:
    """Checks the values of a batch on the host; inside jit only shapes can be.

    Without it, ids that are out of range read the out-of-vocabulary row.

    Args:
      batch: arrays of ``forward`` and label.
      net: ``config.net``.
      counts: per table, see ``mba_regularizer``.

    Raises:
      ValueError: naming the field, what it holds and what it should hold.
    """
    x = {k: np.asarray(v) for k, v in batch.items()}
    check_shapes(x, net)
    slots = x["hist_item"].shape[1]
    if x["length"].min(initial=0) < 0 or x["length"].max(initial=0) > slots:
        raise ValueError(
            f"length must be within 0 .. {slots} (width of hist_item), got "
            f"{x['length'].min()} .. {x['length'].max()}; cut histories to data.history"
        )
    vocab = {"item": net.item_vocab, "cate": net.cate_vocab, "user": net.user_vocab,
             "hist_item": net.item_vocab, "hist_cate": net.cate_vocab}  # fmt: skip
    for name, size in vocab.items():
        found = x.get(name, np.zeros(0, int))
        if found.min(initial=0) < 0 or found.max(initial=0) >= size > 0:
            raise ValueError(
                f"{name}: ids must be within 0 .. {size - 1}, got {found.min()} .. "
                f"{found.max()}; raise the vocabulary in config.net or map unknown ids "
                "to 1"
            )
    if "label" in x and not np.isin(x["label"], (0, 1)).all():
        raise ValueError(f"label must be 0 or 1, got {np.unique(x['label'])[:5]}")
    used = ids({k: jnp.asarray(v) for k, v in x.items()}, net=net) if counts else {}
    for name, n in (counts or {}).items():
        present = np.unique(used[name])
        missing = present[(present > 0) & (np.asarray(n)[present] == 0)]
        if len(missing):
            raise ValueError(
                f"counts of {name!r} are 0 for ids {missing[:5]} of the batch; count "
                "the samples of the whole training set"
            )


def compute_dtype(net: Any) -> Any:
    """``net.dtype`` for ``nets.mlp.matmul``."""
    return jnp.bfloat16 if net.dtype == "bfloat16" else None


def check_choices(net: Any, **choices: tuple[str, ...]) -> None:
    """Raises ValueError naming a field of ``net`` that is none of its choices."""
    for name, known in choices.items():
        value = getattr(net, name)
        if value not in known:
            raise ValueError(f"config.net.{name} must be one of {known}, got {value!r}")


def check_sizes(net: Any) -> None:
    """Raises ValueError naming the vocabulary or width of ``net`` that is none."""
    for vocab, width in (
        ("item_vocab", "item_dim"),
        ("cate_vocab", "cate_dim"),
        ("user_vocab", "user_dim"),
    ):
        if getattr(net, width) and getattr(net, vocab) < embedding.FIRST:
            raise ValueError(
                f"config.net.{vocab}={getattr(net, vocab)} is no vocabulary: the task "
                f"sets it, or pass ids + {embedding.FIRST}; config.net.{width}=0 leaves "
                "the field out"
            )
    if net.item_dim < 1 or min(net.cate_dim, net.user_dim) < 0:
        raise ValueError(
            "config.net: item_dim must be >= 1, cate_dim and user_dim >= 0, got "
            f"{net.item_dim}, {net.cate_dim} and {net.user_dim}"
        )
