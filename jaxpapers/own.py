"""Papers of your own, outside this package, served by the same commands."""

import importlib.machinery
import pkgutil
from pathlib import Path

from jaxpapers import config, papers, tasks, workdir


def add(name: str, paper: papers.Paper, folder: str | Path) -> None:
    """Lists a paper whose files lie in a folder that is laid out as this repository is.

    The folder has ``papers/<name>.py`` (or a package of that name), ``configs/<name>.py``
    and, where its task is none of this package, ``tasks/<task>.py``; see
    docs/add_a_paper.md. Call it before ``cli.main``, ``run.run`` or ``folder.load_run``;
    the process is all that changes. To call it again with the same changes nothing.

    Args:
      name: of the paper's module; it is imported as ``jaxpapers.papers.<name>``.
      paper: its row of the list.
      folder: of the files.

    Raises:
      ValueError: a name that is none of a module, or that this package has already, be
        it of the paper or of a task.
      FileNotFoundError: no such module or config.
    """
    root = workdir.local(folder, "folder").resolve()
    if not name.isidentifier():
        raise ValueError(f"the paper's name must be that of a module, got {name!r}")
    modules = [root / "papers" / f"{name}.py", root / "papers" / name / "__init__.py"]
    module = next((path for path in modules if path.is_file()), None)
    if module is None:
        raise FileNotFoundError(f"no module of the paper {name!r}: {modules[0]}")
    if not (source := root / "configs" / f"{name}.py").is_file():
        raise FileNotFoundError(f"no config of the paper {name!r}: {source}")
    own = [str(root / "papers")]
    places = [x for x in papers.__path__ if x not in own] + own
    first = importlib.machinery.PathFinder.find_spec(name, places)
    folders = [x for x in config.FOLDERS if x != root / "configs"]
    if (
        papers.NAMES.get(name, paper) != paper
        or first is None
        or first.origin != str(module)
        or any((x / f"{name}.py").exists() for x in folders)
    ):
        raise ValueError(f"there is a paper {name!r} already; choose another name")
    known = [x for x in tasks.__path__ if x != str(root / "tasks")]
    taken = {x.name for x in pkgutil.iter_modules(known)}
    for task in pkgutil.iter_modules([str(root / "tasks")]):
        if task.name in taken:
            raise ValueError(
                f"there is a task {task.name!r} already; rename "
                f"{root / 'tasks' / task.name}.py"
            )
    papers.__path__[:] = places
    tasks.__path__[:] = [*known, str(root / "tasks")]
    config.FOLDERS[:] = [*folders, root / "configs"]
    papers.NAMES[name] = paper
