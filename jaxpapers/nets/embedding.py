"""Embedding tables: one row per id, rows split over the mesh axis ``model``.

Id 0 is padding, whose row is zero and gets no gradient. Id 1 is out of vocabulary: every
id out of range reads its row, never the nearest one, which belongs to another item. The
vocabulary starts at 2. See ``ops.rows`` for the communication between devices.
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
    """Number of rows of a table, such that they divide over a mesh axis.

    Args:
      vocab: number of ids, 0 and 1 included.
      multiple: of the axis size; the default divides over axes of 2, 4, .., 128.

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
    """A table of normal values, with zeros in row 0.

    Args:
      key: of the draws.
      count: V, see ``padded_rows``.
      width: D.
      std: standard deviation.
    """
    table = std * jax.random.normal(key, (count, width))
    return table.at[PADDING].set(0.0)


def glorot(key: Key[Array, ""], count: int, width: int) -> Float[Array, "V D"]:
    """A table of values uniform within sqrt(6 / (V + D)), with zeros in row 0."""
    bound = math.sqrt(6 / (count + width))
    table = jax.random.uniform(key, (count, width), minval=-bound, maxval=bound)
    return table.at[PADDING].set(0.0)


def lookup(
    table: Float[Array, "V D"] | Rows, ids: Int[Array, "*shape"]
) -> Float[Array, "*shape D"]:
    """Embeddings of ids; zeros, without gradient, for padding.

    Args:
      table: a whole table, or the rows of it that a batch reads, see
        ``method.tables.row_gradient``.
      ids: those out of range read row 1. If the table is padded beyond its vocabulary,
        call ``resolve`` first: the added rows are never trained.

    Example:
      >>> table = jnp.arange(8.0).reshape(4, 2)
      >>> jax.jit(lookup)(table, jnp.array([0, 3, 9])).tolist()
      [[0.0, 0.0], [6.0, 7.0], [2.0, 3.0]]
    """
    if isinstance(table, Rows):
        return rows.select(table, ids)
    ids = resolve(ids, table.shape[0])
    # -1 reads zeros and gets no gradient.
    return rows.gather(table, jnp.where(ids == PADDING, -1, ids))


def hash_ids(
    ids: Int[Array, "*shape"], buckets: int, seed: int = 0
) -> Int[Array, "*shape"]:
    """Hashes the ids of an open vocabulary to 2 .. buckets + 1; padding stays 0.

    The hash is the 32-bit finaliser of MurmurHash3, the same on every machine.

    Args:
      ids: any int32, e.g. raw ids of a log.
      buckets: number of rows that the ids share; the table has ``buckets + 2``.
      seed: collisions of different seeds are independent.

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
