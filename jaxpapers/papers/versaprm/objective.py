"""Losses and scores of steps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jaxpapers.nets.lora import lora_dropout
from jaxpapers.ops.means import weighted_mean
from jaxpapers.papers.versaprm.network import Net, all_logits, states, two_logits


def two_way_loss(
    logits: Float[Array, "*batch 2"], labels: Shaped[Array, "*batch"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    r"""Mean cross-entropy of right and wrong at labelled positions.

    $$ \mathcal L = -\frac 1 n \sum_t y_t \log \sigma(\ell_t) +
       (1 - y_t) \log \sigma(-\ell_t), \quad \ell = \ell_+ - \ell_- $$

    with the logits at the position itself, not at the one before it.

    Args:
      logits: of wrong and right.
      labels: y in [0, 1], hard or soft; negative where there is none.

    Returns:
      Nats per label; metrics ``accuracy``, the share of labels whose rounded value is
      the likelier, and ``weight``, their number.

    Raises:
      TypeError: boolean labels, of which a mark for "no label" is lost.
    """
    if labels.dtype == jnp.bool_:
        raise TypeError(
            "labels must be numbers, got booleans, of which -100 would have become True"
        )
    labelled = labels >= 0
    y = jnp.where(labelled, labels, 0).astype(logits.dtype)
    margin = logits[..., 1] - logits[..., 0]
    nats = optax.sigmoid_binary_cross_entropy(margin, y)
    right = ((margin > 0) == (y > 0.5)).astype(logits.dtype)
    weight = labelled.astype(logits.dtype)
    return weighted_mean(nats, weight), {
        "accuracy": weighted_mean(right, weight),
        "weight": weight.sum(),
    }


def loss(
    params: Any,
    batch: Mapping[str, Array],
    key: Key[Array, ""] | None = None,
    *,
    net: Net,
    language: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """``two_way_loss`` of a batch.

    Args:
      params: of ``init``.
      batch: ``ids`` int32, ``labels`` float32 or int32 and ``segments`` int32, each
        (B, L); see ``encoding.pack``.
      key: of the adapters' dropout; None: none.
      net: the network.
      language: weight of the next token's cross-entropy beside it, over tokens that a
        label calls right. 0, the paper's: no logits of the vocabulary are formed.
    """
    if key is not None and net.lora_dropout:
        dropped = lora_dropout(key, params["lora"], net.lora_dropout)
        params = {**params, "lora": dropped}
    hidden, decoder = states(params, batch["ids"], batch["segments"], net)
    labels = batch["labels"]
    value, metrics = two_way_loss(two_logits(params, decoder, hidden, net), labels)
    if not language:
        return value, metrics
    nats, _ = _next_token(net.logits(decoder, hidden), batch, labels > 0.5)
    return value + language * nats, {**metrics, "process": value, "language": nats}


def language_loss(
    params: Any,
    batch: Mapping[str, Array],
    key: Key[Array, ""] | None = None,
    *,
    net: Net,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy of the next token, over those of right steps.

    How the base model is trained: questions are given, and not to be predicted.

    Raises:
      ValueError: a net without logits of all tokens.
    """
    del key
    ids = batch["ids"]
    logits = all_logits(params, ids, batch["segments"], net)
    return _next_token(logits, batch, batch["labels"] > 0.5)


def _next_token(logits, batch, counted):
    """Cross-entropy of the tokens that count, each from the one before it."""
    ids, segments = batch["ids"], batch["segments"]
    logits, following = logits[:, :-1], ids[:, 1:]
    # Not by index: a head that is split over the vocabulary stays so.
    targets = jax.nn.one_hot(following, logits.shape[-1], dtype=logits.dtype)
    nats = optax.softmax_cross_entropy(logits, targets)
    within = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    weight = (within & counted[:, 1:]).astype(logits.dtype)
    right = (logits.argmax(-1) == following).astype(logits.dtype)
    return weighted_mean(nats, weight), {
        "accuracy": weighted_mean(right, weight),
        "weight": weight.sum(),
    }


class Scores(NamedTuple):
    """Scores of the steps of each sequence.

    Attributes:
      scores: (B, S), probabilities that a step is right; 0 where there is none.
      valid: (B, S), which of them are steps.
    """

    scores: Float[Array, "B S"]
    valid: Bool[Array, "B S"]


def step_scores(
    params: Any,
    ids: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    *,
    net: Net,
    steps: int,
) -> Scores:
    """Probability of "right" at each separator, in their order.

    Args:
      params: of ``init``.
      ids: tokens.
      segments: see ``states``; the scores of a row's sequences follow each other.
      net: the network.
      steps: S; further steps are cut off, their number is that of separators.
    """
    hidden, decoder = states(params, ids, segments, net)
    ends = (ids == net.separator) & (segments > 0)
    # Positions of the separators first, in order: S states instead of L.
    length = ids.shape[1]
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    order = jnp.sort(jnp.where(ends, place, length), axis=1)[:, :steps]
    order = jnp.pad(
        order, ((0, 0), (0, steps - order.shape[1])), constant_values=length
    )
    valid = order < length
    at = jnp.minimum(order, length - 1)[..., None]
    logits = two_logits(params, decoder, jnp.take_along_axis(hidden, at, 1), net)
    p = jax.nn.sigmoid(logits[..., 1] - logits[..., 0])
    return Scores(jnp.where(valid, p, 0), valid)


def token_scores(
    params: Any, extra: Any, batch: Mapping[str, Array], *, net: Net
) -> Float[Array, "B L"]:
    """Probability of "right" at every position: ``Method.predict``."""
    del extra
    hidden, decoder = states(params, batch["ids"], batch["segments"], net)
    logits = two_logits(params, decoder, hidden, net)
    return jax.nn.sigmoid(logits[..., 1] - logits[..., 0])
