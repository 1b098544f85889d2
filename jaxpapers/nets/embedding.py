"""Embedding tables: one row per id, rows over the mesh axis ``model``.

Ids: 0 is padding, whose row is zero and gets no gradient; 1 stands for every id that is
out of range (never the nearest row, which would be another item's); what a model knows
starts at 2. See ``ops.rows`` for what crosses devices.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from jaxpapers.ops import rows
from jaxpapers.ops.rows import OOV, PADDING, Rows, resolve

__all__ = [
    "FIRST", "OOV", "PADDING", "RULES", "Rows", "glorot", "hash_ids", "lookup", "normal",
    "padded_rows", "resolve",
]  # fmt: skip

FIRST = 2
"""The first id that is neither padding nor out of vocabulary."""
RULES = ((r"(^|/)tables/", P("model", None)),)


def padded_rows(vocab: int, multiple: int = 128) -> int:
    """Rows to allocate so that they divide over a mesh axis.

    Args:
      vocab: ids, 0 and 1 included.
      multiple: of the axis' size; the default serves all axes of 2, 4, .. 128.

    Raises:
      ValueError: a vocabulary without the two reserved ids, or a multiple below 1.

    Example:
      >>> padded_rows(1684, 8)
      1688
    """
    if vocab < FIRST or multiple < 1:
        raise ValueError(
            f"padded_rows needs vocab >= {FIRST} (rows 0 and 1 are padding and out of "
            f"vocabulary) and multiple >= 1, got {vocab} and {multiple}"
        )
    return -(-vocab // multiple) * multiple


def normal(
    key: Key[Array, ""], count: int, width: int, std: float = 0.01
) -> Float[Array, "V D"]:
    """A table drawn from a normal distribution, its row 0 zero.

    Args:
      key: of the draws.
      count: V, see ``padded_rows``.
      width: D.
      std: standard deviation.
    """
    table = std * jax.random.normal(key, (count, width))
    return table.at[PADDING].set(0.0)


def glorot(key: Key[Array, ""], count: int, width: int) -> Float[Array, "V D"]:
    """A table drawn uniformly within sqrt(6 / (V + D)), its row 0 zero."""
    bound = math.sqrt(6 / (count + width))
    table = jax.random.uniform(key, (count, width), minval=-bound, maxval=bound)
    return table.at[PADDING].set(0.0)


def lookup(
    table: Float[Array, "V D"] | Rows, ids: Int[Array, "*shape"]
) -> Float[Array, "*shape D"]:
    """Embeddings of ids; zeros, without gradient, for padding.

    Args:
      table: a whole table, or the rows of it that a batch uses (see
        ``method.tables.row_gradient``): models read both alike.
      ids: out-of-range ones read row 1. A table with more rows than its vocabulary needs
        ``resolve`` before, or reads rows that nothing trains.

    Example:
      >>> table = jnp.arange(8.0).reshape(4, 2)
      >>> jax.jit(lookup)(table, jnp.array([0, 3, 9])).tolist()
      [[0.0, 0.0], [6.0, 7.0], [2.0, 3.0]]
    """
    if isinstance(table, Rows):
        return rows.select(table, ids)
    ids = resolve(ids, table.shape[0])
    # Zeros for -1: padding is neither read nor written by the gradient.
    return rows.gather(table, jnp.where(ids == PADDING, -1, ids))


def hash_ids(
    ids: Int[Array, "*shape"], buckets: int, seed: int = 0
) -> Int[Array, "*shape"]:
    """Ids of an open vocabulary as ids 2 .. buckets + 1; padding stays 0.

    The same on every machine and version: the finaliser of MurmurHash3 on 32 bits.

    Args:
      ids: any int32, e.g. raw ids of a log.
      buckets: number of rows to share; the table has ``buckets + 2``.
      seed: another one gives independent collisions.

    Raises:
      ValueError: fewer buckets than 1.

    Example:
      >>> ids = jnp.array([0, 1, 2, 123456])
      >>> jax.jit(hash_ids, static_argnums=1)(ids, 1000).tolist()
      [0, 729, 80, 749]
    """
    if buckets < 1:
        raise ValueError(f"hash_ids needs buckets >= 1, got {buckets}")
    x = ids.astype(jnp.uint32) + jnp.uint32(seed) * jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    bucket = ((x ^ (x >> 16)) % jnp.uint32(buckets)).astype(jnp.int32)
    return jnp.where(ids == PADDING, PADDING, bucket + FIRST)
