"""Click batches and sizes that the tests of the click models share."""

import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import mesh as meshes
from jaxpapers import run
from tests.programs import KEY, params_like

B, T, ITEMS, CATES, USERS = 8, 6, 30, 7, 10
SIZES: dict[str, Any] = {
    "item_vocab": ITEMS, "cate_vocab": CATES, "user_vocab": USERS, "item_dim": 4,
    "cate_dim": 2, "std": 0.5, "unit": (5,), "hidden": (6, 4), "unit_chunk": 0,
    "rows_multiple": 8,
}  # fmt: skip
# Category of each item; 2 is the first that is neither padding nor unknown.
CATE = 2 + np.arange(ITEMS) % (CATES - 2)


def batch(
    seed: int = 0,
    *,
    size: int = B,
    slots: int = T,
    candidates: int = 0,
    negatives: bool = False,
    times: bool = False,
) -> dict[str, np.ndarray]:
    """Rows of random items; the first history is empty, the second full.

    Args:
        seed: of the draws.
        size: rows.
        slots: T.
        candidates: N, for item and cate (B, N); 0: (B,).
        negatives: with neg_hist_item and neg_hist_cate, other items than the history's.
        times: with time and hist_time, oldest first.
    """
    rng = np.random.default_rng(seed)
    length = rng.integers(1, slots + 1, size)
    length[:2] = (0, slots)[: min(size, 2)]
    within = np.arange(slots) < length[:, None]
    item = rng.integers(2, ITEMS, (size, candidates) if candidates else size)
    hist = rng.integers(2, ITEMS, (size, slots)) * within
    x = {
        "user": 2 + np.arange(size) % (USERS - 2),
        "item": item,
        "cate": CATE[item],
        "hist_item": hist,
        "hist_cate": CATE[hist] * within,
        "length": length,
        "label": rng.integers(0, 2, size),
    }
    if negatives:
        other = 2 + (hist - 1) % (ITEMS - 2)
        x |= {"neg_hist_item": other * within, "neg_hist_cate": CATE[other] * within}
    if times:
        x["hist_time"] = np.sort(rng.integers(1, 10**6, (size, slots)), 1) * within
        x["time"] = np.full(size, 10**6 + 5)
    return {name: value.astype(np.int32) for name, value in x.items()}


def pad_histories(x: dict[str, np.ndarray], by: int, fill: int = 3) -> dict:
    """The batch with further slots beyond every history's end, which hold ``fill``."""
    return {
        name: np.pad(v, ((0, 0), (0, by)), constant_values=fill)
        if name.startswith("hist")
        else v
        for name, v in x.items()
    }


def overlong(x: dict[str, np.ndarray], by: int = 9) -> dict:
    """The batch with recorded lengths beyond the slots, and below zero, by ``by``."""
    slots = x["hist_item"].shape[1]
    length = x["length"] + by * ((x["length"] == slots) - 1 * (x["length"] == 0))
    return {**x, "length": length.astype(np.int32)}


def candidate(x: dict[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """The batch with the n-th of N candidates alone."""
    return {**x, "item": x["item"][:, n], "cate": x["cate"][:, n]}


# A tree of NumPy arrays as those that the package's annotations ask for.
device = functools.partial(jax.tree.map, jnp.asarray)


def config(preset: str, sizes: dict[str, Any], **fields: Any) -> Any:
    """The config of a preset with small sizes; ``net__x=1`` sets a field of a group."""
    c = run.load_config(preset).copy_and_resolve_references().unlock()
    c.data.update(history=T, batch=B)
    c.net.update(sizes)
    c.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return c.lock()


def drawn(paper: ModuleType, net: Any) -> tuple[dict, dict]:
    """Parameters and statistics of a click model, nothing at zero."""

    def init(key):
        params = paper.init(key, net)
        return params, paper.statistics(params)

    return params_like(init, KEY)


@functools.cache
def gradient(paper: ModuleType, net: Any, **options: Any) -> Any:
    """(params, statistics, batch, key) -> loss and gradients, one program per net."""
    value = functools.partial(paper.loss, net=net, **options)
    return jax.jit(jax.value_and_grad(value, has_aux=True))


def grid(sizes: tuple[int, int]) -> jax.sharding.Mesh:
    """A mesh of the axes data and model, over the first fake devices."""
    shape = dict(zip(("data", "model"), sizes))
    return meshes.make_mesh(shape, jax.devices()[: sizes[0] * sizes[1]])
