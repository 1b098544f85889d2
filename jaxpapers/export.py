"""The parameters of a run for others to load."""

from pathlib import Path

import jax

from jaxpapers import workdir as folders
from jaxpapers.folder import load_run
from jaxpapers.method import path_name


def export(workdir: str, out: str) -> Path:
    """Writes the parameters of the latest checkpoint as safetensors.

    Names are the "/"-joined paths; layers stay stacked on the leading axis. What a model
    has besides parameters (moving statistics) is named ``extra/...``. What only training
    needs (``Method.served``) is left out.

    Raises:
      ValueError, FileNotFoundError: ``out`` is a folder or in none; of ``load_run``.
    """
    from safetensors.flax import save_file

    path = folders.local(out, "OUT")
    if path.is_dir():
        raise ValueError(
            f"{out} is a folder, expected a file such as {out}/x.safetensors"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    name, _, method, _, state = load_run(workdir)
    params, extra = state.params, state.extra
    if method.served:
        params, extra = method.served(params), method.served(extra)
    tree = {**params, **({"extra": extra} if extra else {})}
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {path_name(k): v for k, v in flat}
    with folders.replaced(path) as part:
        save_file(leaves, part, metadata={"paper": name, "format": "flax"})
    return path
