"""Rounds of outlier mining for a training run: what reads the pool, and the batches."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers.data import arrays
from jaxpapers.data.outliers import Detection
from jaxpapers.method import State
from jaxpapers.ops import selection
from jaxpapers.ops.mesh_axes import batch_axes
from jaxpapers.papers import poem


class Miner(NamedTuple):
    """The two functions of ``study.Data`` that mining needs.

    Attributes:
      data: ID images and the pool.
      net, options: of the method.
      seed: of the order of the examples.
    """

    data: Detection
    net: poem.Net
    options: poem.Options
    seed: int

    def examples(self, state: State) -> "Pairs":
        """Batches of ID images and the outliers of the state's round."""
        items = poem.latest(state.extra)
        number = int(state.extra["round"]) - 1
        fields = {"outlier": self.data.pool.read(items)}
        return Pairs(
            ids(self.data, self.seed),
            # Another order in every round.
            arrays.Examples(fields, self.seed + 7919 * number, scaled),
            int(state.step),
            self.options.outliers,
        )

    def refresh(self, state: State) -> State:
        """A round: the posterior of the buffer, a draw, a scan of the pool.

        Raises:
          ValueError: features that are not finite, or fewer items than are to be chosen.
        """
        mesh, extra = _mesh(), state.extra
        number, count = int(extra["round"]), extra["ring"].shape[1]
        with jax.set_mesh(mesh):
            keys = poem.round_keys(state.key, number)
            post = w = None
            if self.options.select == "poem":
                post = self.posterior(state, mesh)
                w = poem.draw(keys["draw"], post, self.options)
            items = self.scan(state, w, keys["score"], count, mesh)
            return state._replace(extra=poem.remember(extra, items, post, w))

    def posterior(self, state: State, mesh: Any) -> Any:
        """Posterior of ID images and the buffer's outliers, in the features of now."""
        number = int(state.extra["round"])
        if number == 0:
            key = poem.round_keys(state.key, 0)["mean"]
            return poem.first_posterior(key, self.net, self.options)
        rounds = poem.buffer_slots(number, self.options)
        train = self.data.train.image
        # One copy of the ID images counts for those of every round in the buffer.
        parts = [("id", 0, train.__getitem__, np.arange(len(train)), len(rounds))]
        ring = np.asarray(state.extra["ring"])
        for slot, r in rounds:
            parts.append(("outlier", r, self.data.pool.read, ring[slot], 1))
        total: Any = None
        for kind, r, read, index, weight in parts:
            crop = jax.random.fold_in(
                poem.round_keys(state.key, r)["crop"], kind == "id"
            )
            target = poem.targets(kind, self.options, state.key)
            for i, (rows, kept) in enumerate(self._chunks(index, mesh)):
                chunk = {
                    "image": read(rows).astype(np.float32) / 255,
                    "weight": weight * kept.astype(np.float32),
                }
                stats = poem.buffer_chunk(
                    state.params, state.extra["net"], self._put(chunk, mesh), target,
                    jax.random.fold_in(crop, i), net=self.net, options=self.options,
                )  # fmt: skip
                stats = jax.tree.map(
                    lambda x: np.asarray(x, np.float64), jax.device_get(stats)
                )
                total = stats if total is None else jax.tree.map(np.add, total, stats)
        return poem.solve(total, self.options)

    def scan(self, state: State, w: Any, key: Any, count: int, mesh: Any) -> np.ndarray:
        """Indices of the chosen items of the pool, from the highest score."""
        size, number = len(self.data.pool), int(state.extra["round"])
        index = np.asarray(
            poem.scanned(state.key, number, size=size, options=self.options)
        )
        top = poem.empty_top(count, self.options, len(index))
        bad = []
        for rows, kept in self._chunks(index, mesh):
            chunk = {
                "image": self.data.pool.read(rows).astype(np.float32) / 255,
                "index": rows.astype(np.int32),
                "valid": kept,
            }
            top, broken = poem.scan_chunk(
                top, state.params, state.extra["net"], w, self._put(chunk, mesh), key,
                net=self.net, options=self.options,
            )  # fmt: skip
            bad.append(broken)
        if broken := sum(int(x) for x in bad):
            raise ValueError(
                f"{broken} of {len(index):,} scores of the pool are not finite: the "
                "network has diverged; lower config.optim.lr"
            )
        top = jax.device_get(poem.chosen(top, count=count))
        selection.check_full(top, "outliers")
        return top.index

    def _chunks(
        self, index: np.ndarray, mesh: Any
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Indices in chunks of one size, and which of them are not padding."""
        shards = math.prod(mesh.shape[n] for n in batch_axes(mesh.shape))
        size = -(-min(self.options.pool_batch, len(index)) // shards) * shards
        for start in range(0, len(index), size):
            rows = index[start : start + size]
            kept = np.arange(size) < len(rows)
            yield np.resize(rows, size), kept

    def _put(self, chunk: dict, mesh: Any) -> Any:
        size = len(next(iter(chunk.values())))
        rows = meshes.batch_rows(mesh, size, name="method.pool_batch")
        return meshes.put_batch({k: v[rows] for k, v in chunk.items()}, mesh, size)


class Pairs:
    """Batches of ID images and of outliers, each in an order of its own.

    Args:
      images: ID images.
      outliers: of the round, or None.
      first: step at which the round began.
      each: outliers for each ID image.
    """

    def __init__(
        self, images: arrays.Examples, outliers: arrays.Examples, first: int, each: int
    ):
        self.images, self.outliers = images, outliers
        self.first, self.each = first, each

    def batch(self, start: int, size: int, rows: slice | None = None) -> dict:
        """See ``arrays.Examples``; with ``outlier`` (size, each, H, W, C)."""
        own = slice(*(rows or slice(None)).indices(size))
        several = slice(own.start * self.each, own.stop * self.each)
        begin = (start - self.first * size) * self.each
        outlier = self.outliers.batch(begin, size * self.each, several)["outlier"]
        batch = self.images.batch(start, size, own)
        outlier = outlier.reshape(-1, self.each, *outlier.shape[1:])
        return {**batch, "outlier": outlier}


def ids(data: Detection, seed: int) -> arrays.Examples:
    """Batches of ID images and their classes."""
    return arrays.Examples(data.train._asdict(), seed, scaled)


def scaled(batch: dict) -> dict:
    """Images as float32 in [0, 1]."""
    return {
        k: v.astype(np.float32) / 255 if v.dtype == np.uint8 else v
        for k, v in batch.items()
    }


def _mesh() -> Any:
    """The mesh of the run, which its loop has set; else one of all devices."""
    mesh = jax.sharding.get_mesh()
    return meshes.make_mesh() if mesh.empty else mesh
