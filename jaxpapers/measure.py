"""The rows of a study: each trained where it has to be, and measured."""

import functools
from collections.abc import Callable, Sequence

from jaxpapers.method import State
from jaxpapers.stages import Stages, parts_of, unique
from jaxpapers.study import Finding, Result, Results, Row, Stage, last_step, stage_key


def measure_rows(
    stages: Stages,
    rows: Sequence[Sequence[Row]],
    others: Sequence[Sequence[Row]],
    seeds: Sequence[int],
    metric: str,
    announce: Callable[[str], None],
) -> tuple[Results, State | None]:
    """Trains what the rows need, row by row and seed by seed, and measures them.

    Args:
      stages: where.
      rows: one list per seed, see ``study.check_rows``.
      others: all rows of the study, whose ``watch`` also sees stages on the way.
      seeds: of the rows.
      metric: of the untrained rows, written beside the paper's own final numbers.
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
                if metric in findings[i, j].numbers:
                    name = f"baseline_{row.label}"
                    numbers[name] = findings[i, j].numbers[metric]
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

        watch = _watch(stage, others[j])
        state = stages.train(stage, label=label, watch=watch, finish=finish)
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


def _watch(stage: Stage, rows: Sequence[Row]) -> Callable | None:
    """Numbers to follow during a stage: of its row, or of one that continues it."""

    key = stage_key(stage)
    for row in rows:
        if row.stage and key in map(stage_key, parts_of(row.stage)):
            break
    else:
        return None
    if row.watch:
        return row.watch
    last, measured = last_step(stage), row.measure

    def watch(method, state):
        # The final state is measured right after training.
        return {} if int(state.step) == last else measured(method, state).numbers

    return watch
