"""The rows of a study: each trained where it has to be, and measured."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpapers import extras
from jaxpapers.method import State
from jaxpapers.stages import Stages, parts_of, unique
from jaxpapers.study import (
    Finding,
    Result,
    Results,
    Row,
    Stage,
    Study,
    last_step,
    stage_key,
)


def measure_rows(
    stages: Stages,
    rows: Sequence[Sequence[Row]],
    others: Sequence[Sequence[Row]],
    seeds: Sequence[int],
    study: Study,
    announce: Callable[[str], None],
) -> tuple[Results, State | None]:
    """Trains what the rows need, row by row and seed by seed, and measures them.

    Args:
      stages: where.
      rows: one list per seed, see ``study.check_rows``.
      others: all rows of the study, whose ``watch`` also sees stages on the way.
      seeds: of the rows.
      study: its metric of the untrained rows is written beside the paper's own final
        numbers; its pictures of states are drawn where ``train.log_images`` is set.
      announce: called with label and seed before each training run.

    Returns:
      Results in the order of the rows, and the final state of the paper's own first run.
    """
    findings: dict[tuple[int, int], Finding] = {}
    trained: set[str] = set()
    final_state: State | None = None
    keys = [[stage_key(r.stage) if r.stage else "" for r in each] for each in rows]

    @functools.cache
    def untrained(j):
        """The metric of the rows of a seed that train nothing."""
        numbers = {}
        for i, row in enumerate(rows[j]):
            if row.stage is None:
                findings[i, j] = row.measure()
                if study.metric in findings[i, j].numbers:
                    name = f"baseline_{row.label}"
                    numbers[name] = findings[i, j].numbers[study.metric]
        return numbers

    def train(stage, j):
        key = stage_key(stage)
        if key in trained:
            return None
        trained.add(key)
        # A stage without the seed in its config serves the rows of all seeds.
        measured = [
            (i, k) for k in range(len(seeds)) for i, x in enumerate(keys[k]) if x == key
        ]
        label = rows[j][measured[0][0]].label if measured else "first stage"
        is_own = bool(measured) and measured[0][0] == 0
        if not is_own or len(seeds) > 1:
            announce(f"{label}, seed {seeds[j]}")

        def finish(method, state):
            for i, k in measured:
                findings[i, k] = rows[k][i].measure(method, state)
            if not measured:
                return {}
            numbers = findings[measured[0]].numbers
            final = {f"validation_{k}": v for k, v in numbers.items()}
            return {**final, **untrained(j)} if is_own else final

        followed = _followed(stage, others[j])
        if followed:
            followed = followed._replace(measure=_once(followed.measure))
        state = stages.train(
            stage, label=label, finish=finish,
            watch=_watch(stage, followed) if followed else None,
            draw=functools.partial(_draw, study, followed) if followed else None,
        )  # fmt: skip
        return state if is_own else None

    for i in range(len(rows[0])):
        for j in range(len(seeds)):
            if rows[j][i].stage is None:
                untrained(j)
            for stage in unique([rows[j][i].stage]):
                state = train(stage, j)
                final_state = state if final_state is None else final_state
    results = [
        Result(
            row,
            [findings[i, j] for j in range(len(seeds))],
            [stages.folder(stage) for r in rows if (stage := r[i].stage)],
        )
        for i, row in enumerate(rows[0])
    ]
    return results, final_state


def check_drawing(name: str, config: Any, study: Study) -> None:
    """Looks whether ``train.log_images`` can be done, before anything is trained.

    Args:
      name: of the paper.
      config: of the run.
      study: of the config.

    Raises:
      ValueError: the study has no picture of a model in training, or names another.
      ModuleNotFoundError: matplotlib is missing.
    """
    if not config.get("train", {}).get("log_images"):
        return
    if not study.states:
        raise ValueError(
            f"config.train.log_images: {name} has no picture of a model in training; "
            "leave it False"
        )
    if unknown := sorted(set(study.states) - set(study.pictures)):
        raise ValueError(f"Study.states names {unknown}, which are not in its pictures")
    extras.need("matplotlib")


def _followed(stage: Stage, rows: Sequence[Row]) -> Row | None:
    """The row whose numbers a stage shows: its own, or of a stage that continues it."""
    key = stage_key(stage)
    for row in rows:
        if row.stage and key in map(stage_key, parts_of(row.stage)):
            return row
    return None


def _once(measure: Callable[..., Finding]) -> Callable[..., Finding]:
    """A measurement of whose last state the finding is kept: to follow and to draw it."""
    kept: dict[int, Finding] = {}

    def measured(method, state):
        step = int(state.step)
        if step not in kept:
            kept.clear()
            kept[step] = measure(method, state)
        return kept[step]

    return measured


def _watch(stage: Stage, row: Row) -> Callable:
    """Numbers to follow during a stage."""
    if row.watch:
        return row.watch
    last, measured = last_step(stage), row.measure

    def watch(method, state):
        # The final state is measured right after training.
        return {} if int(state.step) == last else measured(method, state).numbers

    return watch


def _draw(
    study: Study, row: Row, method: Any, state: State, folder: Path
) -> list[Path]:
    """Draws the study's pictures of a state into a folder; those that there are."""
    finding = row.measure(method, state)
    if jax.process_index():
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in study.states]
    for path in paths:
        study.pictures[path.name]([Result(row, [finding], [folder])], path)
    return [path for path in paths if path.exists()]
