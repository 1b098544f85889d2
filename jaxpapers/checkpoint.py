"""Checkpoints over orbax: state, data position and config, on any mesh.

A run starts from the latest checkpoint in its workdir, else from
``config.train.init_from`` (parameters only), else from initialisation. Checkpoints are
written to a temporary folder and renamed when complete, so an interrupted write loses
nothing.
"""

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpapers.method import path_name

ITEMS = ("state", "data", "config")
# Replicas share the writing of a leaf from this many bytes on. Orbax cuts each leaf by a
# compiled slice: for small ones that is all that a first checkpoint costs.
SPLIT_BYTES = 2**20


def open_manager(
    directory: str | Path, *, keep: int = 2, read_only: bool = False
) -> ocp.CheckpointManager:
    """Orbax manager of a folder; keeps the last ``keep`` checkpoints.

    Sets orbax's handler of arrays for the process, see ``SPLIT_BYTES``.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    _split_large_leaves()
    return ocp.CheckpointManager(
        Path(directory).expanduser().resolve(),
        item_names=ITEMS,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only
        ),
    )


@functools.cache
def _split_large_leaves() -> None:
    # Typed keys are restored by the metadata that the default handler stores.
    store = getattr(
        ocp.type_handlers.get_type_handler(jax.Array), "_array_metadata_store", None
    )
    if store is None:  # Another orbax: slower first checkpoints, nothing else.
        return
    ocp.type_handlers.register_type_handler(
        jax.Array,
        ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=SPLIT_BYTES, array_metadata_store=store
        ),
        override=True,
    )


def save(
    manager: ocp.CheckpointManager, state: Any, position: int, config: dict
) -> None:
    """Saves a checkpoint asynchronously, after copying the state to the host.

    Args:
      manager: of ``open_manager``.
      state: State; its step names the checkpoint. An existing step is skipped.
      position: global index of the next training example.
      config: resolved config of plain values.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"next_index": position}),
            config=ocp.args.JsonSave(config),
        ),
        force=True,
    )


def restore(
    manager: ocp.CheckpointManager,
    target: Any,
    step: int | None = None,
    *,
    resize: Callable | None = None,
) -> tuple[Any, int]:
    """State and data position of a checkpoint, with the shardings of ``target``.

    Args:
      manager: of ``open_manager``.
      target: State of ShapeDtypeStruct with shardings, on any mesh.
      step: None: the latest.
      resize: (state, target) -> state of the target's shapes, for leaves that are stored
        with other shapes; raises ValueError for shapes that it cannot convert.

    Raises:
      FileNotFoundError: no checkpoint.
      ValueError: leaves that differ from ``target``; names the first.
    """
    step = _step(manager, step)
    stored = _as_stored(manager, step, target) if resize else target
    unchanged = _forms(stored) == _forms(target)
    if resize and not unchanged:
        try:
            after = jax.eval_shape(functools.partial(resize, target=target), stored)
        except ValueError:
            after = None
        if after is None or _forms(after) != _forms(target):
            stored = target  # _check_match names the difference.
    _check_match(manager, step, stored)
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(stored), data=ocp.args.JsonRestore()
        ),
    )
    state = restored["state"]
    if resize and not unchanged:
        shardings = jax.tree.map(lambda x: x.sharding, target)
        change = functools.partial(resize, target=target)
        state = jax.jit(change, out_shardings=shardings)(state)
    return state, int(restored["data"]["next_index"])


def latest_step(directory: str | Path) -> int | None:
    """Step of the latest complete checkpoint in a folder; None without one."""
    if not Path(directory).is_dir():
        return None
    with open_manager(directory, read_only=True) as manager:
        return manager.latest_step()


def read_config(manager: ocp.CheckpointManager, step: int | None = None) -> dict:
    """The resolved config in a checkpoint."""
    step = _step(manager, step)
    items = ocp.args.Composite(config=ocp.args.JsonRestore())
    return manager.restore(step, args=items)["config"]


def restore_params(directory: str | Path, target: Any) -> Any:
    """Parameters of the latest checkpoint in a folder, with the shardings of ``target``.

    Raises:
      FileNotFoundError, ValueError: as ``restore``.
    """
    return restore_parts(directory, {"params": target})["params"]


def restore_parts(directory: str | Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Some fields of the State in the latest checkpoint of a folder.

    Args:
      directory: workdir or checkpoint folder.
      targets: field -> ShapeDtypeStructs with shardings.

    Raises:
      FileNotFoundError, ValueError: as ``restore``.
    """
    # Orbax does not store a field without leaves.
    stored = {k: v for k, v in targets.items() if jax.tree.leaves(v)}
    with open_manager(_folder(directory), read_only=True) as manager:
        step = _step(manager, None)
        for name, target in stored.items():
            _check_match(manager, step, target, prefix=name)
        partial = ocp.args.PyTreeRestore(
            stored,
            restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
            partial_restore=True,
        )
        restored = manager.restore(step, args=ocp.args.Composite(state=partial))
    return {**targets, **restored["state"]}


def abstract(state: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings: the target of ``restore``."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings,
    )


def _folder(directory: str | Path) -> Path:
    """A workdir's checkpoint folder, or the folder itself."""
    inside = Path(directory).expanduser() / "checkpoints"
    return inside if inside.is_dir() else Path(directory).expanduser()


def _step(manager: ocp.CheckpointManager, step: int | None) -> int:
    step = manager.latest_step() if step is None else step
    if step is None or step not in manager.all_steps():
        raise FileNotFoundError(
            f"no checkpoint {'' if step is None else step} in {manager.directory}, "
            f"found steps {sorted(manager.all_steps())}"
        )
    return step


def _as_stored(manager, step: int, target: Any) -> Any:
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
    return _forms(reader.metadata(manager.directory / str(step) / "state").tree)


def _check_match(manager, step: int, target: Any, prefix: str = "") -> None:
    """Compares leaves with the stored metadata before orbax reads arrays."""
    stored = _stored_forms(manager, step)
    if prefix:
        stored = {k[len(prefix) + 1 :]: v for k, v in stored.items()
                  if k.startswith(f"{prefix}/")}  # fmt: skip
    expected = _forms(target)
    for name, form in expected.items():
        if name not in stored:
            raise ValueError(
                f"checkpoint {manager.directory}/{step} has no leaf {name!r} of this "
                "config; use the config that wrote it, or another --workdir"
            )
        for what, actual, required in zip(("shape", "dtype"), stored[name], form):
            if actual != required:
                raise ValueError(
                    f"checkpoint {manager.directory}/{step}: leaf {name!r} has {what} "
                    f"{actual}, this config expects {required}; use the config that "
                    "wrote it (config.json beside it), or another --workdir"
                )
    extra = sorted(set(stored) - set(expected))
    if extra:
        raise ValueError(
            f"checkpoint {manager.directory}/{step} has a leaf {extra[0]!r} that this "
            "config lacks; use the config that wrote it, or another --workdir"
        )


def _forms(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
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
