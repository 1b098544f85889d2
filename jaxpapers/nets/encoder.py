"""Texts to vectors by a transformer of BERT's form, such as MiniLM.

Devlin et al., arXiv 1810.04805; mean pooling: Reimers and Gurevych, "Sentence-BERT",
EMNLP 2019. Differs from ``nets.transformer`` in what its checkpoints fix: norms after the
residual sums, learned positions, kinds of tokens, exact GELU, biases everywhere.

    model = weights.load_encoder(fetch.get("minilm-l6"))
    vectors = encode(Encoder(**model.net), model.params, rows_of_ids)

Names of shapes: B rows, T positions, D width, N heads, F hidden size.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxpapers.nets.block import LayerNorm


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)); the body of the layer scan."""

    heads: int
    hidden: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Any:
        """The carry x, and no output of the scan."""
        width = x.shape[-1]
        # Rows, not (B, T, .): see ``block.MLP``.
        rows = x.reshape(-1, width)
        heads = (*x.shape[:2], self.heads, width // self.heads)
        query, key, value = (
            nn.Dense(width, name=name)(rows).reshape(heads)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
        y = nn.Dense(width, name="out")(y.reshape(rows.shape))
        rows = LayerNorm(self.epsilon, name="attention_norm")(rows + y)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(rows), approximate=False)
        y = nn.Dense(width, name="down")(y)
        rows = LayerNorm(self.epsilon, name="mlp_norm")(rows + y)
        return rows.reshape(x.shape), None


class Encoder(nn.Module):
    """Embeddings of tokens, positions and kinds, then ``Layer``s.

    Attributes:
      vocab_size: number of ids.
      width: D.
      layers: number of layers.
      heads: N, divides D.
      hidden: F.
      positions: the longest text, in tokens.
      types: kinds of tokens; all are of the first kind here.
      epsilon: of the norms.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    hidden: int
    positions: int = 512
    types: int = 2
    epsilon: float = 1e-12

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """States of all positions.

        Args:
          tokens: ids, padded on the right.
          mask: of real tokens.

        Raises:
          ValueError: more tokens than positions; heads that do not divide the width.
        """
        length = tokens.shape[1]
        if length > self.positions or self.width % self.heads:
            raise ValueError(
                f"the encoder has {self.positions} positions, {self.heads} heads and "
                f"width {self.width}; got a text of {length} tokens"
            )
        embed = {
            name: nn.Embed(size, self.width, name=name)
            for name, size in (
                ("word", self.vocab_size),
                ("position", self.positions),
                ("token_type", self.types),
            )
        }
        x = embed["word"](tokens)
        order, first = jnp.arange(length), jnp.zeros(1, jnp.int32)
        rest = embed["position"](order) + embed["token_type"](first)
        x = LayerNorm(self.epsilon, name="norm")(x + rest[None])
        x, _ = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )(self.heads, self.hidden, self.epsilon, name="layers")(x, mask)
        return x


def sentence_vectors(
    net: Encoder,
    params: Mapping[str, Any],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B D"]:
    """Mean of a text's states, of length one.

    Args:
      net: the encoder.
      params: of it.
      tokens: ids with the special tokens of the encoder, padded on the right.
      mask: of real tokens; a row without any gets zeros.
    """
    states = cast(Any, net.apply)({"params": params}, tokens, mask)
    weight = mask.astype(states.dtype)[..., None]
    mean = (states * weight).sum(1) / jnp.maximum(weight.sum(1), 1e-9)
    length = jnp.sqrt(jnp.square(mean).sum(-1, keepdims=True))
    return mean / jnp.maximum(length, 1e-12)


def encode(
    net: Encoder,
    params: Mapping[str, Any],
    rows: Sequence[Sequence[int]],
    *,
    batch: int = 32,
    multiple: int = 8,
) -> np.ndarray:
    """Vectors of many texts, on the host: sorted by length, so that little is padding.

    Args:
      net: the encoder.
      params: of it.
      rows: ids of each text, special tokens included.
      batch: texts at a time.
      multiple: lengths are rounded up to multiples of it, each of which is a program.

    Returns:
      float32 (texts, D), in the order of ``rows``.

    Raises:
      ValueError: no row, an empty row, one longer than the encoder's positions, an id
        that it does not have; batch or multiple below 1.
    """
    if batch < 1 or multiple < 1:
        raise ValueError(f"batch and multiple must be >= 1, got {batch}, {multiple}")
    if not len(rows):
        raise ValueError("no texts to encode")
    for i, row in enumerate(rows):
        if not 0 < len(row) <= net.positions:
            raise ValueError(
                f"text {i} has {len(row)} tokens, expected 1 to {net.positions}; cut it"
            )
        if min(row) < 0 or max(row) >= net.vocab_size:
            raise ValueError(
                f"text {i} has an id outside [0, {net.vocab_size}): another tokenizer's?"
            )
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    program, out = (
        _program(cast(Any, net)),
        np.empty((len(rows), net.width), np.float32),
    )
    params = jax.device_put(params)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        longest = len(rows[part[-1]])
        length = min(-(-longest // multiple) * multiple, net.positions)
        # The last texts fill up with rows of nothing: the same shapes.
        tokens, mask = (
            np.zeros((batch, length), np.int32),
            np.zeros((batch, length), bool),
        )
        for k, i in enumerate(part):
            tokens[k, : len(rows[i])], mask[k, : len(rows[i])] = rows[i], True
        out[part] = np.asarray(program(params, tokens, mask))[: len(part)]
    return out


@functools.lru_cache(maxsize=4)
def _program(net: Encoder) -> Any:
    def vectors(params, tokens, mask):
        return sentence_vectors(net, params, jnp.asarray(tokens), jnp.asarray(mask))

    return jax.jit(vectors)
