"""Imports go one way, and nothing touches JAX before it has to."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxpapers"
FILES = sorted(PACKAGE.rglob("*.py"))
# First part of a module inside jaxpapers -> what it may import from jaxpapers.
ALLOWED = {
    "options": set(),
    "blocks": set(),
    "scopes": set(),
    "ops": {"ops", "extras"},
    "optim": {"optim", "ops", "options", "scopes"},
    "nets": {"nets", "ops", "options"},
    "data": {"data", "extras", "ops"},
    "method": {"method", "ops"},
    "papers": {"papers", "ops", "nets", "optim", "method", "options"},
    "mesh": {"method", "ops"},
    "processes": set(),
    "checksums": {"processes"},
    "leaves": {"method"},
    "whole": {"checksums", "leaves", "processes"},
    "checkpoint": {"checksums", "leaves", "processes", "signals", "whole"},
    "pace": set(),
    "report": {"method", "pace", "trackers"},
    "trackers": {"extras", "workdir"},
    "tables": {"study"},
    "export": {"data", "folder", "method", "nets", "outcome", "papers", "workdir"},
    "outcome": {"plots", "study", "tables", "workdir"},
    "loop": {"mesh", "checkpoint", "method", "processes", "signals"},
    "train": {
        "loop",
        "mesh",
        "checkpoint",
        "method",
        "processes",
        "signals",
        "workdir",
    },
    "tasks": {
        "tasks",
        "config",
        "data",
        "mesh",
        "method",
        "nets",
        "ops",
        "papers",
        "figures",
        "frames",
        "maze_figures",
        "review_figures",
        "value_figures",
        "study",
    },
    "config": {"checkpoint", "papers", "workdir"},
    "study": {"config", "outcome"},
    "stages": {
        "checkpoint",
        "config",
        "folder",
        "mesh",
        "method",
        "papers",
        "report",
        "study",
        "tasks",
        "trackers",
        "train",
        "workdir",
    },
    "measure": {"extras", "method", "stages", "study"},
    "run": {
        "checkpoint",
        "measure",
        "config",
        "data",
        "folder",
        "mesh",
        "method",
        "papers",
        "plan",
        "outputs",
        "outcome",
        "figures",
        "export",
        "plots",
        "processes",
        "report",
        "signals",
        "stages",
        "study",
        "tables",
        "tasks",
        "workdir",
    },
    "folder": {
        "checkpoint",
        "config",
        "mesh",
        "papers",
        "plots",
        "tasks",
        "workdir",
    },
    "extras": set(),
    "plots": {"extras", "workdir"},
    "figures": {"extras", "plots"},
    "frames": {"extras", "ops", "plots"},
    "maze_figures": {"extras", "plots"},
    "review_figures": {"extras", "plots"},
    "value_figures": {"extras", "plots"},
    "signals": {"processes"},
    "supervise": {"signals"},
    "workdir": {"processes"},
    "outputs": {"figures", "plots", "study", "workdir"},
    "replica_groups": set(),
    "hlo": {"replica_groups", "scopes"},
    "chips": set(),
    "products": {"optim", "scopes"},
    "plan": {"chips", "hlo", "method", "optim", "products", "train"},
    "own": {"config", "papers", "tasks", "workdir"},
    "describe": {"blocks", "config", "options", "papers"},
    "arguments": {"config", "describe"},
    "cli": {
        "supervise",
        "arguments",
        "data",
        "extras",
        "mesh",
        "papers",
        "plan",
        "report",
        "run",
        "signals",
        "trackers",
    },
    "__main__": {"cli", "signals"},
    "__init__": {"optim"},
}
# Third-party package -> first parts of the modules that may import it.
OWNERS = {
    "orbax": {"checkpoint", "leaves", "whole"},
    "scipy": {"data", "ops"},
    "flax": {"nets", "papers"},
    "ml_collections": {"folder", "cli", "config"},
    "absl": {"run", "cli", "config"},
    "matplotlib": {
        "figures",
        "frames",
        "maze_figures",
        "plots",
        "review_figures",
        "trackers",
        "value_figures",
    },
    "tensorboardX": {"trackers"},
    "trackio": {"trackers"},
    "wandb": {"trackers"},
    "safetensors": {"data", "export"},
    "mujoco": {"ops"},
    "gymnasium": {"ops"},
    "gymnasium_robotics": {"ops"},
    "h5py": {"data"},
    "PIL": {"data"},
    "fontTools": {"data"},
    "tokenizers": {"data"},
    "openai": {"data"},
}
# What the modules of pure arrays may import at all, besides the standard library.
OUTSIDE = {
    "options": set(),
    "blocks": set(),
    "scopes": set(),
    "method": {"jax", "optax"},
    "data": {
        *("PIL", "fontTools", "h5py", "ml_dtypes", "numpy", "safetensors", "scipy"),
        *("openai", "tokenizers"),
    },
    "ops": {
        *("chex", "jax", "jaxtyping", "numpy", "scipy"),
        *("glfw", "gymnasium", "gymnasium_robotics", "mujoco"),
    },
    "optim": {"jax", "jaxtyping", "numpy", "optax"},
    "nets": {"flax", "jax", "jaxtyping", "numpy"},
    "papers": {"flax", "jax", "jaxtyping", "numpy", "optax"},
}


def part(file):
    """optim for jaxpapers/optim/dion.py, mesh for jaxpapers/mesh.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source):
    """Dotted names that a source imports, anywhere in it, with what it takes of them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(file, source):
    """Imports of a file that the tables above forbid."""
    here = part(file)
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "jaxpapers":
            if rest[0] != "__version__" and rest[0] not in ALLOWED[here]:
                yield name
            # A paper is a file or a folder of papers/, and imports no other one.
            own = file.relative_to(PACKAGE).parts[1:2]
            is_paper = here == "papers" and own != ("__init__.py",)
            if is_paper and rest[0] == "papers":
                if rest[1:2] != [own[0].removesuffix(".py")]:
                    yield name
        elif top in OWNERS and here not in OWNERS[top]:
            yield name
        elif here in OUTSIDE and top not in OUTSIDE[here] | sys.stdlib_module_names:
            yield name


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    assert not list(violations(file, file.read_text()))


@pytest.mark.parametrize(
    "file, source",
    [
        ("optim/dion.py", "from jaxpapers.nets import transformer"),
        ("nets/transformer.py", "import jaxpapers.papers.dion"),
        ("data/text.py", "import jax"),
        ("data/text.py", "def f():\n    import optax"),
        ("papers/dion.py", "from jaxpapers import train"),
        ("papers/dion.py", "from jaxpapers.papers import din"),
        ("papers/dion.py", "from jaxpapers.data import text"),
        ("mesh.py", "from jaxpapers import checkpoint"),
        ("train.py", "import orbax.checkpoint as ocp"),
        ("train.py", "from jaxpapers import tasks"),
        ("method/__init__.py", "import flax.linen as nn"),
        ("method/tables.py", "from jaxpapers.optim import rows"),
        ("train.py", "from ml_collections import ConfigDict"),
    ],
)
def test_a_wrong_import_is_found(file, source):
    assert list(violations(PACKAGE / file, source))


def test_no_drawers():
    drawers = {"utils", "util", "common", "base", "helpers", "misc"}
    assert not [f for f in FILES if drawers & {f.stem, f.parent.name}]


def test_sizes_of_the_infrastructure():
    lines = {f.name: len(f.read_text().splitlines()) for f in PACKAGE.glob("*.py")}
    assert not {name: n for name, n in lines.items() if n > 350}


@pytest.mark.parametrize(
    "code",
    [
        "import jaxpapers, jaxpapers.cli",
        "from jaxpapers import cli; cli.main(['--version'])",
        "from jaxpapers import cli; cli.main(['list', '--help'])",
        "from jaxpapers import cli; cli.main(['train', '--help'])",
        "from jaxpapers import cli; cli.main(['show', 'dion', '--bibtex'])",
        "from jaxpapers.data import text; text.load",
        "from jaxpapers.data import emoji, image_files",
        "from jaxpapers.data import gguf, tokenizer, weights",
    ],
)
def test_jax_is_not_imported(code):
    heavy = (
        "{'jax', 'flax', 'optax', 'orbax', 'absl', 'matplotlib', 'PIL', 'fontTools'}"
    )
    check = f"import sys; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    code = f"try:\n    {code}\nexcept SystemExit as e:\n    assert not e.code\n{check}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_run_does_not_parse_anyones_flags():
    code = (
        "import sys; sys.argv[1:] = ['--other=1']; from absl import flags; "
        "from jaxpapers import run; before = set(flags.FLAGS); "
        "run.load_config('dion'); assert set(flags.FLAGS) == before"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
