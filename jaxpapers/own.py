"""Papers of your own, outside this package, served by the same commands."""

import pkgutil
from pathlib import Path

from jaxpapers import config, papers, tasks, workdir


def add(name: str, paper: papers.Paper, folder: str | Path) -> None:
    """Lists a paper whose files lie in a folder that is laid out as this repository is.

    The folder has ``papers/<name>.py`` (or a package of that name), ``configs/<name>.py``
    and, where its task is none of this package, ``tasks/<task>.py``; see
    docs/add_a_paper.md. Call it before ``cli.main``, ``run.run`` or ``folder.load_run``;
    the process is all that changes.

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
    if name in papers.NAMES:
        raise ValueError(f"there is a paper {name!r} already; choose another name")
    modules = [root / "papers" / f"{name}.py", root / "papers" / name / "__init__.py"]
    if not any(path.is_file() for path in modules):
        raise FileNotFoundError(f"no module of the paper {name!r}: {modules[0]}")
    if not (source := root / "configs" / f"{name}.py").is_file():
        raise FileNotFoundError(f"no config of the paper {name!r}: {source}")
    known = {module.name for module in pkgutil.iter_modules(tasks.__path__)}
    own = str(root / "tasks")
    if own not in tasks.__path__:
        for module in pkgutil.iter_modules([own]):
            if module.name in known:
                raise ValueError(
                    f"there is a task {module.name!r} already; rename {own}/"
                    f"{module.name}.py"
                )
        tasks.__path__.append(own)
        papers.__path__.append(str(root / "papers"))
        config.FOLDERS.append(root / "configs")
    papers.NAMES[name] = paper
