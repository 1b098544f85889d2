"""Embedding tables, click head and loss that every model of behaviour sequences has.

A batch of B rows is a dict of int32 arrays: item (B,), or (B, N) for N candidates of each
history; cate, as item; hist_item and hist_cate (B, T), oldest first; length (B,), the
behaviours of each history; user (B,); float32 label (B,) to train on, and float32 weight
(B,) if rows are padding. Ids 0 and 1 are padding and out of vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpapers import options
from jaxpapers.nets import embedding, mlp
from jaxpapers.ops.means import weighted_mean

DTYPES = ("float32", "bfloat16")
"""Of the products that may be computed in a lower precision."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net:
    """Sizes of the tables and of the click MLP, which all click models share."""

    item_vocab: int
    """Items, ids 0 and 1 included."""
    cate_vocab: int = 0
    """Categories, likewise."""
    user_vocab: int = 0
    """Users, likewise."""
    item_dim: int = 64
    """Width of an item's embedding."""
    cate_dim: int = 64
    """Width of a category's embedding; 0: the model reads no categories."""
    user_dim: int = 0
    """Width of a user's embedding; 0: the model reads no users."""
    rows_multiple: int = 128
    """Rows of a table are padded to a multiple of it, to divide over a mesh axis."""
    std: float = 0.0
    """Standard deviation of the tables' first values; 0: Glorot uniform."""
    item_bias: bool = False
    """Whether each item adds a bias to its logit."""
    hidden: tuple[int, ...] = (80, 40)
    """Widths of the MLP's hidden layers."""
    activation: str = "dice"
    """Of the MLP, one of ``nets.mlp.ACTIVATIONS``."""
    dice_decay: float = 0.99
    """Of Dice's moving statistics."""
    dice_eps: float = 1e-8
    """Added to Dice's variance."""
    unit: tuple[int, ...] = (80, 40)
    """Widths of the attention unit's hidden layers."""
    unit_chunk: int = 0
    """Rows of a training step that the unit takes at a time; 0: all."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range."""
        options.check_least(
            self, "net", item_dim=1, cate_dim=0, user_dim=0, rows_multiple=1, std=0,
            hidden=1, dice_decay=0, dice_eps=0, unit=1, unit_chunk=0,
        )  # fmt: skip
        options.check_choices(self, "net", activation=mlp.ACTIVATIONS)
        if not self.dice_decay <= 1:
            raise ValueError(f"net.dice_decay must be in [0, 1], got {self.dice_decay}")
        if not self.unit:
            raise ValueError("net.unit must have at least one hidden layer, got ()")
        for field in ("item", "cate", "user"):
            width, vocab = (getattr(self, f"{field}_{x}") for x in ("dim", "vocab"))
            if width and vocab < embedding.FIRST:
                raise ValueError(
                    f"net.{field}_vocab must be >= {embedding.FIRST} with "
                    f"net.{field}_dim={width}, got {vocab}: the number of ids, 0 and 1 "
                    f"included"
                    + ("" if field == "item" else f"; net.{field}_dim=0 is without")
                )

    @property
    def width(self) -> int:
        """D: width of an item vector, item and category side by side."""
        return self.item_dim + self.cate_dim


def init(key: Key[Array, ""], net: Net) -> dict[str, Float[Array, "V D"]]:
    """Tables ``item``, ``cate``, ``user`` and ``item_bias``, those that ``net`` has.

    Args:
      key: of the draws.
      net: sizes.
    """
    draw = functools.partial(embedding.normal, std=net.std)
    if not net.std:
        draw = embedding.glorot
    sizes = {
        "item": (net.item_vocab, net.item_dim),
        "cate": (net.cate_vocab, net.cate_dim),
        "user": (net.user_vocab, net.user_dim),
    }
    keys = jax.random.split(key, len(sizes))
    tables = {
        name: draw(k, embedding.padded_rows(vocab, net.rows_multiple), width)
        for k, (name, (vocab, width)) in zip(keys, sizes.items())
        if width
    }
    if net.item_bias:
        count = embedding.padded_rows(net.item_vocab, net.rows_multiple)
        tables["item_bias"] = jnp.zeros((count, 1))
    return tables


def embed(
    tables: Mapping[str, Any],
    item: Int[Array, "*shape"],
    cate: Int[Array, "*shape"] | None,
) -> Float[Array, "*shape D"]:
    """Item vectors: the embeddings of item and category side by side."""
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
    net: Net,
    train: bool,
) -> tuple[Float[Array, "*candidates"], list[Float[Array, "*candidates _"]], dict]:
    """Logits of candidates: an MLP of their features, plus the item's bias.

    Args:
      params: a ``nets.mlp`` from F to 1.
      state: Dice's statistics.
      x: features.
      batch: see the module; rows of weight 0 enter no statistics.
      tables: see ``init``.
      net: sizes.
      train: whether Dice takes the batch's statistics.

    Returns:
      Logits, the hidden layers, and the new statistics.
    """
    (*hidden, logit), state = mlp.layers(
        params, state, x, activation=net.activation, train=train,
        mask=candidate_mask(batch, x.ndim - 1), decay=net.dice_decay, eps=net.dice_eps,
    )  # fmt: skip
    logit = logit[..., 0]
    if net.item_bias:
        item = embedding.resolve(batch["item"], net.item_vocab)
        logit = logit + embedding.lookup(tables["item_bias"], item)[..., 0]
    return logit, hidden, state


def candidate_mask(batch: Mapping[str, Array], ndim: int) -> Array | None:
    """Rows of positive weight, (B,) or (B, 1) for N candidates; None without weights."""
    if "weight" not in batch:
        return None
    mask = batch["weight"] > 0
    return mask[:, None] if ndim == 2 else mask


def cross_entropy(
    logit: Float[Array, " B"], batch: Mapping[str, Array]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean binary cross-entropy of ``batch["label"]``, weighted by ``weight`` if there.

    Returns:
      Nats per row, and the metrics ``rate`` (mean predicted probability) and, with
      weights, ``weight`` (their sum).
    """
    nats = jax.nn.softplus(logit) - batch["label"].astype(logit.dtype) * logit
    weight = batch.get("weight")
    metrics = {"rate": weighted_mean(jax.nn.sigmoid(logit), weight)}
    if weight is not None:
        metrics["weight"] = weight.sum()
    return weighted_mean(nats, weight), metrics


def fields(batch: Mapping[str, Array], net: Net) -> dict[str, Any]:
    """Ids as the model reads them, and the masks.

    Returns:
      item, hist_item, cate and hist_cate (None without), user: ids within their
      vocabularies, 0 beyond a history's end; length (B,), within 0 .. T: a history that
      was longer than the slots fills them; mask (B, T), True at behaviours; row_mask
      (B,), True at positive weights, or None.

    Raises:
      ValueError: see ``check_shapes``.
    """
    check_shapes(batch, net)
    slots = batch["hist_item"].shape[1]
    length = jnp.clip(batch["length"], 0, slots)
    within = jnp.arange(slots)[None, :] < length[:, None]
    mask = within & (batch["hist_item"] != embedding.PADDING)
    read: dict[str, Any] = {"mask": mask, "length": length}
    read["row_mask"] = candidate_mask(batch, 1)
    read["item"] = embedding.resolve(batch["item"], net.item_vocab)
    hist = embedding.resolve(batch["hist_item"], net.item_vocab)
    read["hist_item"] = jnp.where(mask, hist, embedding.PADDING)
    read["cate"] = read["hist_cate"] = None
    if net.cate_dim:
        read["cate"] = embedding.resolve(batch["cate"], net.cate_vocab)
        hist = embedding.resolve(batch["hist_cate"], net.cate_vocab)
        read["hist_cate"] = jnp.where(mask, hist, embedding.PADDING)
    if net.user_dim:
        read["user"] = embedding.resolve(batch["user"], net.user_vocab)
    return read


def check_shapes(batch: Mapping[str, Any], net: Net) -> None:
    """Checks that a batch has the arrays that ``net`` reads, of shapes that fit.

    Raises:
      ValueError: naming the array that is missing or does not fit; T = 0.
    """
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


def ids(batch: Mapping[str, Array], *, net: Net) -> dict[str, Int[Array, "..."]]:
    """Ids that a batch reads of every table; 0 for padding and for rows of weight 0."""
    read = fields(batch, net)

    def kept(*arrays):
        x = jnp.concatenate([a.reshape(len(a), -1) for a in arrays], 1)
        rows = read["row_mask"]
        return x if rows is None else jnp.where(rows[:, None], x, embedding.PADDING)

    tables = {"item": kept(read["item"], read["hist_item"])}
    if net.cate_dim:
        tables["cate"] = kept(read["cate"], read["hist_cate"])
    if net.user_dim:
        tables["user"] = kept(read["user"])
    if net.item_bias:
        tables["item_bias"] = kept(read["item"])
    return tables


def check_batch(
    batch: Mapping[str, Any], *, net: Net, counts: Mapping[str, Any] | None = None
) -> None:
    """Checks the values of a batch on the host, where a traced function cannot.

    Unchecked ids that are out of range read the out-of-vocabulary row.

    Args:
      batch: see the module.
      net: sizes.
      counts: per table, training samples that contain each id (``din.mba_regularizer``).

    Raises:
      ValueError: naming the array, its values and the values expected.
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
        values = x.get(name, np.zeros(0, int))
        if values.min(initial=0) < 0 or values.max(initial=0) >= size > 0:
            raise ValueError(
                f"{name}: ids must be within 0 .. {size - 1}, got {values.min()} .. "
                f"{values.max()}; raise the vocabulary in net or map unknown ids to "
                f"{embedding.OOV}"
            )
    if "label" in x and not np.isin(x["label"], (0, 1)).all():
        raise ValueError(f"label must be 0 or 1, got {np.unique(x['label'])[:5]}")
    if not counts:
        return
    read = jax.jit(functools.partial(ids, net=net))(x)
    for name, n in counts.items():
        present = np.unique(read[name])
        missing = present[(present > 0) & (np.asarray(n)[present] == 0)]
        if len(missing):
            raise ValueError(
                f"counts of {name!r} are 0 for ids {missing[:5]} of the batch; count "
                "the samples of the whole training set"
            )


def compute_dtype(dtype: str) -> Any:
    """One of ``DTYPES`` as ``nets.mlp.matmul`` takes it: None for that of the inputs."""
    return jnp.bfloat16 if dtype == "bfloat16" else None
