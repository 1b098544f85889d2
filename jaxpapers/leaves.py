"""The leaves of a stored state, against those that a config expects."""

import math
import re
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers.method import path_name


class Mismatch(ValueError):
    """A checkpoint of another config: of other leaves, shapes or dtypes."""


def as_stored(manager, step: int, target: Any) -> Any:
    """``target`` with the stored shapes, sharded where the mesh divides them."""
    forms = _stored_forms(manager, step)

    def leaf(path, x):
        is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        shape, _ = forms.get(path_name(path), (x.shape, None))
        if is_key or shape == x.shape:
            return x
        # The size of an axis may differ, or a leading axis may be missing or added.
        mesh, spec = x.sharding.mesh, tuple(x.sharding.spec)
        spec += (None,) * (len(x.shape) - len(spec))
        spec = ((None,) * len(shape) + spec)[-len(shape) :]
        spec = [
            e if size % _parts(mesh, e) == 0 else None for size, e in zip(shape, spec)
        ]
        where = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(leaf, target)


def _parts(mesh, entry: Any) -> int:
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    return math.prod(mesh.shape[n] for n in names)


def _stored_forms(manager, step: int) -> dict[str, tuple[tuple[int, ...], str]]:
    # manager.item_metadata has only items that this manager wrote.
    reader = ocp.PyTreeCheckpointHandler()
    return forms_of(reader.metadata(manager.directory / str(step) / "state").tree)


def check_match(
    manager, step: int, target: Any, prefix: str = "", only: str = ""
) -> None:
    """Compares leaves with the stored metadata before orbax reads arrays.

    Args:
      manager: of the checkpoints.
      step: of one.
      target: expected; what lies below ``prefix`` in the checkpoint.
      prefix: "params" for a State's field.
      only: regex of the paths to compare; the others may differ.

    Raises:
      Mismatch: leaves that one of both lacks, or of other shapes or dtypes.
    """
    stored = _stored_forms(manager, step)
    if prefix:
        stored = {k[len(prefix) + 1 :]: v for k, v in stored.items()
                  if k.startswith(f"{prefix}/")}  # fmt: skip
    stored, expected = (
        {k: v for k, v in forms.items() if re.search(only, k)}
        for forms in (stored, forms_of(target))
    )
    missing, extra = sorted(expected.keys() - stored), sorted(stored.keys() - expected)
    if missing or extra:
        parts = [f"has no leaf {_some(missing)} of this config"] if missing else []
        parts += [f"has a leaf {_some(extra)} that this config lacks"] if extra else []
        raise Mismatch(
            f"checkpoint {manager.directory}/{step} {' and '.join(parts)}; use the "
            "config that wrote it, or another --workdir"
        )
    for name, form in expected.items():
        for what, actual, required in zip(("shape", "dtype"), stored[name], form):
            if actual != required:
                raise Mismatch(
                    f"checkpoint {manager.directory}/{step}: leaf {name!r} has {what} "
                    f"{actual}, this config expects {required}; use the config that "
                    "wrote it (config.json beside it), or another --workdir"
                )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:8]))
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def forms_of(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> (shape, dtype). Paths are text, since stored trees are dicts and lists."""

    def form(leaf: Any) -> tuple[tuple[int, ...], str]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)  # Stored as its words.
        return tuple(leaf.shape), str(leaf.dtype)

    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        path_name(path): form(leaf)
        for path, leaf in flat
        if hasattr(leaf, "shape") and leaf.shape is not None
    }
