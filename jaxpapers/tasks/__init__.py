"""What a config trains on: examples, an evaluation with its baselines, a sample."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Task(NamedTuple):
    """Data and evaluation of a run, bound to its config.

    Attributes:
      examples: training examples, with ``batch(start, size, rows)``.
      work: units of work per example, for the progress line.
      unit: name of that unit.
      metric: what is compared; ``evaluate`` has ``validation_`` + it.
      title: heading of the comparison: data and metric.
      evaluate: (state, quick) -> dict of numbers; quick on a part of the data.
      baselines: () -> name and number to compare ``validation_<metric>`` with.
      sample: (params, key, prompt, length, temperature) -> text, or None.
      describe: one line about the data.
      rising: whether a larger metric is better.
      curve: training metric that the plot shows.
      picture: state -> arrays to draw, see ``plots.plot_samples``; the same noise every
        time, so that two states can be compared. None: nothing to see.
      family: label -> (seeds -> the metric of every seed) of models that are trained
        beside this one, all seeds at once; nothing of them is kept.
      against: metric of the evaluations, and the panels of those that are drawn against
        it, see ``plots.plot_against``; None: nothing to draw.
    """

    examples: Any
    work: int
    unit: str
    metric: str
    title: str
    evaluate: Callable
    baselines: Callable[[], dict[str, float]]
    sample: Callable | None
    describe: str
    rising: bool = False
    curve: str = "loss"
    picture: Callable[[Any], dict] | None = None
    family: Mapping[str, Callable[[Sequence[int]], list[float]]] = {}
    against: tuple[str, dict[str, str]] | None = None


def named(outputs: Any) -> dict[str, Any]:
    """Outputs of a sampler by the prefix of their metric: "" for the one compared.

    A sampler that has several models gives a NamedTuple, the one to compare first.
    """
    if not hasattr(outputs, "_fields"):
        return {"": outputs}
    first, *others = outputs._fields
    return {"": getattr(outputs, first)} | {
        f"{name}_": getattr(outputs, name) for name in others
    }


def prepare(config: Any) -> tuple[Any, dict[str, Any]]:
    """A config completed by its data, and what ``make`` takes of them besides it."""
    complete = getattr(_module(config), "prepare", None)
    return complete(config) if complete else (config, {})


def rivals(name: str, config: Any) -> dict[str, tuple[str, Any]]:
    """Label -> paper and config of the models of a task that every paper is beside."""
    others = getattr(_module(config), "rivals", None)
    return others(name, config) if others else {}


def stand_ins(config: Any) -> dict[str, Any]:
    """What ``make`` takes besides a config, of the same cost, without reading data."""
    made = getattr(_module(config), "stand_ins", None)
    return made(config) if made else {}


def batch_shapes(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global training batch, without reading any data."""
    return _module(config).batch_shapes(config)


def load(config: Any, method: Any, mesh: Any) -> Task:
    """The task that ``config.data.task`` names."""
    return _module(config).load(config, method, mesh)


def _module(config: Any) -> Any:
    names = (
        "language_model", "click", "conversions", "images", "generation",
        "text_to_image",
    )  # fmt: skip
    if config.data.task not in names:
        raise ValueError(
            f"config.data.task must be one of {names}, got {config.data.task!r}"
        )
    return importlib.import_module(f"jaxpapers.tasks.{config.data.task}")
