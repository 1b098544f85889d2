"""Tasks: data, and the study made of them. ``config.data.task`` names one.

A task is a module with three functions, see docs/add_a_paper.md:

    read(config) -> Data                data of a training run
    abstract(config) -> Data            its shapes, and facts of the same shapes and cost,
                                        without reading any data; ``examples`` is None
    study(name, config, data, mesh) -> Study   the rows of the comparison, that of paper
                                        ``name`` first
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from jaxpapers.study import Data, Study


def read(config: Any) -> Data:
    """Data of a training run of this config."""
    return load(config).read(config)


def abstract(config: Any) -> Data:
    """Shapes and facts of the config's data, without reading any."""
    return load(config).abstract(config)


def study(name: str, config: Any, data: Data, mesh: Any) -> Study:
    """The comparison of a paper's config."""
    return load(config).study(name, config, data, mesh)


def load(config: Any) -> ModuleType:
    """The module that ``config.data.task`` names.

    Raises:
      ValueError: unknown task.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    task = config.data.task
    if task not in names or not hasattr(_module(task), "study"):
        known = [name for name in names if hasattr(_module(name), "study")]
        raise ValueError(f"config.data.task must be one of {known}, got {task!r}")
    return _module(task)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"jaxpapers.tasks.{name}")
