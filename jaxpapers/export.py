"""The parameters of a run for others to load: a file, or a folder for a model hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpapers import __version__, papers
from jaxpapers import workdir as folders
from jaxpapers.data import decoders, text, weights
from jaxpapers.data.packages import DATASETS
from jaxpapers.folder import load_run, read_stored
from jaxpapers.method import path_name
from jaxpapers.nets.transformer import Transformer
from jaxpapers.outcome import Outcome, load

SUFFIX = ".safetensors"


def export(workdir: str, out: str) -> Path:
    """Writes the parameters of the latest checkpoint as safetensors.

    Names are the "/"-joined paths; layers stay stacked on the leading axis. What a model
    has besides parameters (moving statistics) is named ``extra/...``. What only training
    needs (``Method.served``) is left out.

    Args:
      workdir: of the run.
      out: a file ``*.safetensors``; or a new folder, which gets ``model.safetensors``,
        ``config.json`` and ``README.md``, a model card. The folder of a decoder
        (``data.decoders``) has the names, shapes and config that transformers reads; any
        other one's config is the run's.

    Raises:
      ValueError, FileNotFoundError: ``out`` is in no folder, or holds something; of
        ``load_run``.
    """
    path = folders.local(out, "OUT")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into")
    if path.suffix == SUFFIX and path.is_dir():
        raise ValueError(f"{out} is a folder, expected a file, or a name for a new one")
    if (
        path.suffix != SUFFIX
        and path.exists()
        and (not path.is_dir() or any(path.iterdir()))
    ):
        raise ValueError(
            f"{out} is there; expected a file such as model{SUFFIX}, or a new folder"
        )
    name, config, method, _, state = load_run(workdir)
    params, extra = state.params, state.extra
    if method.served:
        params, extra = method.served(params), method.served(extra)
    tree = {**params, **({"extra": extra} if extra else {})}
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {path_name(k): v for k, v in flat}
    if path.suffix == SUFFIX:
        _save(path, name, leaves)
        return path
    path.mkdir(exist_ok=True)
    net = decoder(config, set(leaves))
    if net:
        weights.save(path, net, jax.device_get(params), config={"jaxpapers": name})
    else:
        _save(path / f"model{SUFFIX}", name, leaves)
        stored = json.dumps(read_stored(workdir), indent=1) + "\n"
        folders.write(path / "config.json", stored)
    folders.write(path / "README.md", card(workdir, name, leaves, bool(net)))
    return path


def _save(path: Path, name: str, leaves: Mapping[str, Any]) -> None:
    from safetensors.flax import save_file

    with folders.replaced(path) as part:
        save_file(dict(leaves), part, metadata={"paper": name, "format": "flax"})


def decoder(config: Any, names: set[str]) -> dict[str, Any] | None:
    """Fields of the ``Transformer`` whose parameters these are; None if they are not.

    Args:
      config: of the run.
      names: of its parameters.
    """
    group = config.get("net", {})
    if not {"vocab_size", "width", "layers", "heads"} <= set(group):
        return None
    known = set(Transformer.__dataclass_fields__) - {"dtype", "parent", "name"}
    net = Transformer(**{k: v for k, v in group.items() if k in known})
    kv_heads, head_dim, hidden = net.sizes()
    fields = {
        **{k: getattr(net, k) for k in known},
        **{"kv_heads": kv_heads, "head_dim": head_dim, "hidden": hidden},
    }
    return fields if set(decoders.leaves(fields)) == names else None


def card(workdir: str, name: str, leaves: Mapping[str, Any], is_decoder: bool) -> str:
    """The model card: what it is, how it was made, what it was measured by, the terms.

    Args:
      workdir: of the run.
      name: of the paper.
      leaves: parameters that are exported.
      is_decoder: whether transformers reads the folder.
    """
    paper, outcome = papers.NAMES[name], _outcome(workdir)
    content = outcome.content if outcome else {}
    data = read_stored(workdir)["config"].get("data", {})
    terms = "not known: whoever publishes this knows what was read"
    if data.get("source") in DATASETS:
        terms = DATASETS[data["source"]].terms
    elif data.get("task") == "language_model" and not data.get("path"):
        terms = text.TERMS
    count = sum(int(np.prod(np.shape(x))) for x in leaves.values())
    use = (
        "transformers.AutoModelForCausalLM.from_pretrained(FOLDER)"
        if is_decoder
        else f'safetensors.flax.load_file("FOLDER/model{SUFFIX}")'
    )
    table = str(outcome) if outcome else "the run's study was not finished\n"
    return "\n".join(
        [
            "---",
            f"library_name: {'transformers' if is_decoder else 'jaxpapers'}",
            f"tags: [jaxpapers, jax, {name.replace('_', '-')}]",
            "---",
            "",
            f"# {paper.title}",
            "",
            f"A model of {count:,} parameters, trained by the method of "
            f"{paper.reference} with jaxpapers {__version__}.",
            "",
            f"- Command: `{content.get('command') or 'not recorded'}`",
            f"- Data: {content.get('data') or 'not recorded'}",
            f"- Terms of the data: {terms}",
            f"- Load: `{use}`",
            "",
            "## Measured",
            "",
            "```",
            table.rstrip(),
            "```",
            "",
            "## Cite",
            "",
            "```bibtex",
            papers.bibtex(name).strip(),
            "```",
            "",
        ]
    )


def _outcome(workdir: str) -> Outcome | None:
    """Of the study that the run belongs to: its folder, or one above it."""
    place = Path(workdir).resolve()
    for folder in (place, place.parent, place.parent.parent):
        if (folder / "comparison.json").exists():
            found = load(folder)
            runs = {x["folder"] and x["folder"].resolve() for x in found.rows}
            return found if place in runs else None
    return None
