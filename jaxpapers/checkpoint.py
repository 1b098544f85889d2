"""Checkpoints over orbax: state, data position and config, on any mesh.

A run starts from the latest checkpoint in its workdir, else from
``config.train.init_from`` (parameters only), else from initialisation. Checkpoints are
written to a temporary folder and renamed when complete, so an interrupted write loses
nothing. They hold checksums of their files (``checksums``): a damaged one is named, and
the newest whole one is read instead.
"""

import contextlib
import functools
import logging
import re
import shutil
import weakref
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from jaxpapers import checksums, leaves, processes, signals
from jaxpapers.whole import newest_whole, one_line, place, steps

T = TypeVar("T")
ITEMS = ("state", "data", "config")
# Replicas share the writing of a leaf from this many bytes on. Orbax cuts each leaf by a
# compiled slice: for small ones that is all that a first checkpoint costs.
SPLIT_BYTES = 2**20
PART = ".orbax-checkpoint-tmp"  # In the names of folders that are being written.


_writable: weakref.WeakSet = weakref.WeakSet()  # Managers that may write.


def open_manager(
    directory: str | Path, *, keep: int = 2, read_only: bool = False
) -> ocp.CheckpointManager:
    """Orbax manager of a folder; keeps the last ``keep`` checkpoints.

    Sets orbax's handler of arrays for the process, see ``SPLIT_BYTES``. To write, the
    caller holds the folder's lock: what an interrupted write left there is removed.
    """
    # Orbax logs the tracebacks of its threads, whose errors come to the caller anyway.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    _split_large_leaves()
    folder = Path(directory).expanduser().resolve()
    if not read_only:
        if jax.process_index() == 0:
            for part in folder.glob(f"*{PART}*"):
                shutil.rmtree(part)
            folder.mkdir(parents=True, exist_ok=True)
        processes.of_first(None)  # It is there.
    manager = ocp.CheckpointManager(
        folder,
        item_names=ITEMS,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            read_only=read_only,
            # Named, they wait for each other outside their devices, see ``processes``.
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes=set(range(jax.process_count()))
                if jax.process_count() > 1
                else None
            ),
            async_options=ocp.options.AsyncOptions(
                # By the first process, before the folder gets its name.
                post_finalization_callback=functools.partial(_add_checksums, folder)
            ),
        ),
    )
    if not read_only:
        _writable.add(manager)
    return manager


def close(manager: ocp.CheckpointManager) -> None:
    """Waits and closes; raises OSError as ``save``."""
    with _writing(manager):
        manager.close()


def _add_checksums(folder: Path) -> None:
    for part in folder.glob(f"*{PART}*"):
        checksums.write(part, part.name.partition(".")[0])


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

    Raises:
      OSError: this checkpoint, or the one before it, cannot be written.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    with _writing(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave({"next_index": position}),
                config=ocp.args.JsonSave(config),
            ),
            force=True,
        )


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits for the checkpoints that are being written; raises OSError as ``save``."""
    with _writing(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _writing(manager: ocp.CheckpointManager) -> Generator[None, None, None]:
    try:
        yield
    except signals.Preempted:
        raise
    except Exception as e:
        whole = steps(place(manager))
        raise OSError(
            f"cannot write a checkpoint into {manager.directory}: {one_line(e)}; those "
            f"of steps {whole} are whole, and the same command goes on from there"
        ) from e


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

    A damaged checkpoint is named in a warning and the one before it is taken; a manager
    that may write renames its folder to ``<step>.damaged``.

    Raises:
      FileNotFoundError: no checkpoint.
      ValueError: leaves that differ from ``target``, it names the first; all checkpoints
        are damaged.
    """
    return newest_whole(
        manager,
        step,
        functools.partial(_restore, manager, target, resize=resize),
        writable=manager in _writable,
    )


def _restore(manager, target: Any, step: int, *, resize=None) -> tuple[Any, int]:
    stored = leaves.as_stored(manager, step, target) if resize else target
    unchanged = leaves.forms_of(stored) == leaves.forms_of(target)
    if resize and not unchanged:
        try:
            after = jax.eval_shape(functools.partial(resize, target=target), stored)
        except ValueError:
            after = None
        if after is None or leaves.forms_of(after) != leaves.forms_of(target):
            stored = target  # check_match names the difference.
    leaves.check_match(manager, step, stored)
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
    """Step of the newest whole checkpoint in a folder; None without one."""
    if not steps(directory):
        return None
    with open_manager(directory, read_only=True) as manager:
        return newest_whole(manager, None, lambda step: step)


def read_config(manager: ocp.CheckpointManager, step: int | None = None) -> dict:
    """The resolved config in a checkpoint, the newest whole one by default."""

    def read(step: int) -> dict:
        items = ocp.args.Composite(config=ocp.args.JsonRestore())
        return manager.restore(step, args=items)["config"]

    return newest_whole(manager, step, read, item="config")


def restore_params(directory: str | Path, target: Any, only: str = "") -> Any:
    """Parameters of the latest checkpoint in a folder, with the shardings of ``target``.

    Args:
      directory: workdir or checkpoint folder.
      target: ShapeDtypeStructs with shardings.
      only: regex; parameters whose path it is not found in are None in the result.

    Raises:
      FileNotFoundError, ValueError: as ``restore``; no parameter has such a path.
    """
    if not only:
        return restore_parts(directory, {"params": target})["params"]
    wanted = _chosen(target, only)
    if not jax.tree.leaves(wanted):
        raise ValueError(f"no parameter has a path with {only!r}, {_paths(target)}")
    found = restore_parts(directory, {"params": wanted}, only)["params"]
    values = dict(jax.tree_util.tree_flatten_with_path(found)[0])
    return jax.tree_util.tree_map_with_path(lambda path, x: values.get(path), target)


def _chosen(tree: Any, only: str, path: str = "") -> Any:
    """The entries of nested dicts whose path has a match."""
    if not isinstance(tree, Mapping):
        return tree if re.search(only, path) else None
    below = {k: _chosen(v, only, f"{path}/{k}".lstrip("/")) for k, v in tree.items()}
    return {k: v for k, v in below.items() if jax.tree.leaves(v)}


def _paths(tree: Any) -> str:
    names = sorted(leaves.forms_of(tree))
    return f"it has {names[:8]}" + f" and {len(names) - 8} more" * (len(names) > 8)


def restore_parts(
    directory: str | Path, targets: dict[str, Any], only: str = ""
) -> dict[str, Any]:
    """Some fields of the State in the latest checkpoint of a folder.

    Args:
      directory: workdir or checkpoint folder.
      targets: field -> ShapeDtypeStructs with shardings.
      only: see ``leaves.check_match``.

    Raises:
      FileNotFoundError, ValueError: as ``restore``.
    """
    # Orbax does not store a field without leaves.
    stored = {k: v for k, v in targets.items() if jax.tree.leaves(v)}
    with open_manager(_folder(directory), read_only=True) as manager:

        def read(step: int) -> Any:
            for name, target in stored.items():
                leaves.check_match(manager, step, target, prefix=name, only=only)
            partial = ocp.args.PyTreeRestore(
                stored,
                restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
                partial_restore=True,
            )
            return manager.restore(step, args=ocp.args.Composite(state=partial))

        return {**targets, **newest_whole(manager, None, read)["state"]}


def check_parts(directory: str | Path, targets: dict[str, Any], only: str = "") -> None:
    """Compares fields of the State with the shapes and dtypes of a latest checkpoint.

    Args:
      directory: workdir or checkpoint folder.
      targets: field -> ShapeDtypeStructs.
      only: see ``leaves.check_match``.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: they differ; names the leaf.
    """
    folder = _folder(directory)
    known = steps(folder)
    if not known:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    with open_manager(folder, read_only=True) as manager:
        for name, target in targets.items():
            if jax.tree.leaves(target):
                leaves.check_match(manager, known[-1], target, prefix=name, only=only)


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
