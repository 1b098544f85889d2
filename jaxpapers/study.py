"""A study: rows x metrics x seeds, with the training runs, figures and tables behind it.

Every system ends in the same thing, a comparison: the paper's own row, its ablations,
baselines that are trained too and baselines that are not, folds. A task
(``tasks/<t>.py``) says what the rows are; ``jaxpapers.stages`` trains what they need,
each training run once; ``jaxpapers.run`` prints the table and writes ``comparison.json``
and the figures. A paper that trains nothing is a study whose rows have no stage.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxpapers.config import MAY_CHANGE

# Fields that a run may change and that make another run of a stage all the same.
DEFINING = {
    "data.path", "net.remat", "net.unroll", "optim.rank_fraction",
    "optim.rank_multiple_of", "optim.rank_schedule", "train.accumulate",
    "train.replica_sync", "train.replica_axis",
}  # fmt: skip


ONCE = 2**31 - 1
"""Steps between refreshes that happen before the first step only."""


class Data(NamedTuple):
    """What a training run reads: ``tasks/<t>.read(config)``.

    It must not depend on the groups ``train`` and ``optim``: runs that differ there only
    share it. Data has a seed of its own, ``data.seed``.

    Attributes:
      examples: has ``batch(start, size, rows)``: rows [start, start + size) of the
        stream, of which this process builds the slice ``rows``, a dict of NumPy arrays.
        A function (State) -> such an object where the state decides (mining); with
        ``refresh`` it is called at the start and after each refresh and must depend only
        on what the refresh wrote, without it before every step. None: the environment
        lives in the state and batches are empty. Arrays of the state that it keeps
        must be copied: the step donates them.
      shapes: ShapeDtypeStructs of one global batch.
      facts: what ``make`` takes besides the config: counts, a reward.
      refresh: (k, State -> State), on the host before steps 0, k, 2k, ...: mining,
        k-means starts, dead codes. It may change ``State.extra``, ``params`` and
        ``opt_state``, not their shapes; step and key stay.
      work: units of work per example, for the progress line.
      unit: name of that unit.
      summary: one line about the data.
    """

    examples: Any
    shapes: Mapping[str, Any]
    facts: Mapping[str, Any] = {}
    refresh: tuple[int, Callable] | None = None
    work: int = 1
    unit: str = "rows"
    summary: str = ""


class Stage(NamedTuple):
    """One training run; equal stages run once, whichever rows ask for them.

    Attributes:
      paper: name of the paper whose ``make`` builds the method.
      config: complete, with exactly the fields that the run reads.
      after: the stage whose checkpoint this one starts from, through
        ``Method.warm_start`` or with its parameters.
      continues: goes on with the whole state of ``after`` (step, optimizer, position in
        the data) in its folder: a schedule of ranks, a curriculum.
      until: step at which it ends; 0: ``config.train.steps``, which learning rate
        schedules run to in any case.
    """

    paper: str
    config: Any
    after: "Stage | None" = None
    continues: bool = False
    until: int = 0


class Table(NamedTuple):
    """A table beside the comparison: per domain, per length, of a regression."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Finding(NamedTuple):
    """Result of a measurement; plain data.

    Attributes:
      numbers: metric -> value.
      tables: printed below the comparison for the paper's own row.
      curves: "y against x" -> (x, y), two equally long sequences, or y one such for each
        member of a population; drawn in ``curves.png``, a panel for each name, a line
        for each row, the mean over seeds and members.
      files: name -> text, bytes, or arrays (name -> array, written as .npz), for the
        row's folder.
    """

    numbers: Mapping[str, float]
    tables: Sequence[Table] = ()
    curves: Mapping[str, tuple[Sequence[float], Sequence[Any]]] = {}
    files: Mapping[str, Any] = {}


class Row(NamedTuple):
    """A line of the comparison.

    Attributes:
      label: unique within its column.
      stage: the training run that it measures; None: nothing is trained.
      measure: (Method, State) -> Finding after training; () -> Finding without a stage.
      column: test domain, subject, fold; "" for studies without.
      watch: (Method, State) -> numbers, during training every ``train.eval_every`` steps;
        None: those of ``measure``.
    """

    label: str
    stage: Stage | None
    measure: Callable[..., Finding]
    column: str = ""
    watch: Callable[..., Mapping[str, float]] | None = None


class Study(NamedTuple):
    """The comparison of one config: ``tasks/<t>.study(config, data, mesh)``.

    Attributes:
      title: heading of the table: data, metric and unit.
      metric: what is compared, of the findings' numbers.
      rising: whether larger is better.
      rows: seed -> rows, the paper's own first.
      columns: further metrics of the table, those that a row has.
      pictures: file name -> (``Results``, path) -> None, besides ``loss.png``,
        ``comparison.png`` and ``curves.png``.
      states: those of ``pictures`` that show the model of one row, which
        ``train.log_images`` draws during training too.
      curve: training metric of ``loss.png``, beside which ``metric`` is drawn.
      unit: that metric with its unit; "" for its name.
      errors: whether the cells of columns have the standard error over seeds.
      sample: (Method, State, key, prompt, length, temperature) -> text; None: the model
        continues no text.
    """

    title: str
    metric: str
    rising: bool
    rows: Callable[[int], Sequence[Row]]
    columns: Sequence[str] = ()
    pictures: Mapping[str, Callable] = {}
    states: Sequence[str] = ()
    curve: str = "loss"
    unit: str = ""
    sample: Callable | None = None
    errors: bool = False

    @property
    def heading(self) -> str:
        """The title with the direction of its metric."""
        return f"{self.title} ({'higher' if self.rising else 'lower'} is better)"


class Result(NamedTuple):
    """A row after its measurements.

    Attributes:
      row: of the first seed.
      findings: one per seed.
      folders: of its training runs, one per seed; () where nothing was trained.
    """

    row: Row
    findings: Sequence[Finding]
    folders: Sequence[Path]

    def values(self, metric: str) -> list[float]:
        """A metric of every seed; [] if the row does not have it."""
        numbers = [f.numbers for f in self.findings]
        return [float(n[metric]) for n in numbers if metric in n]


Results = Sequence[Result]


def ahead(study: Study, results: Results) -> dict[str, float]:
    """Rows whose mean of the metric is better than the paper's own, label -> mean.

    Of several columns, means over the columns are compared.
    """
    values: dict[str, list[float]] = {}
    for r in results:
        values.setdefault(r.row.label, []).extend(r.values(study.metric))
    means = {label: sum(v) / len(v) for label, v in values.items() if v}
    own = means.pop(results[0].row.label, math.nan)
    sign = 1 if study.rising else -1
    return {label: m for label, m in means.items() if sign * m > sign * own}


def check_rows(rows: Sequence[Sequence[Row]]) -> None:
    """Refuses rows, one list per seed, that cannot be compared.

    Raises:
      ValueError: no rows, two of the same label and column, or other rows for another
        seed.
    """
    names = [[(row.label, row.column) for row in own] for own in rows]
    if not names[0]:
        raise ValueError("the study has no rows")
    double = [name for name in names[0] if names[0].count(name) > 1]
    if double:
        raise ValueError(f"the study has two rows {double[0]}; labels must differ")
    if any(other != names[0] for other in names):
        raise ValueError(
            "Study.rows must give the same labels in the same order for every seed, got "
            f"{names}"
        )


def lineage(stage: Stage | None) -> list[Stage]:
    """A stage and those it starts from, the first one first."""
    stages: list[Stage] = []
    while stage is not None:
        stages.insert(0, stage)
        stage = stage.after
    return stages


def last_step(stage: Stage) -> int:
    """Optimizer steps of the run when the stage ends."""
    return stage.until or stage.config.train.steps


def stage_key(stage: Stage) -> str:
    """Content of a stage as text: equal keys, same training run."""
    parts = [
        [s.paper, plain(s.config), s.continues, last_step(s)] for s in lineage(stage)
    ]
    return json.dumps(parts, sort_keys=True)


def stage_name(stage: Stage) -> str:
    """Folder name of a stage: its paper and a hash of the fields that define the run.

    The number of steps is not among them: the same run goes on in the same folder.
    """
    ignored = MAY_CHANGE - DEFINING
    parts = [
        [s.paper, {k: v for k, v in _flat(s.config) if k not in ignored}, s.until]
        for s in lineage(stage)
    ]
    text = json.dumps(parts, sort_keys=True)
    return f"{stage.paper}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def with_seed(config: Any, seed: int) -> Any:
    """A config whose ``train.seed`` is ``seed``."""
    return with_fields(config, {"train.seed": seed})


def with_fields(config: Any, fields: Mapping[str, Any]) -> Any:
    """A locked copy of a config with other values of some of its fields.

    Args:
      config: ml_collections.ConfigDict.
      fields: "group.field" -> value; fields that are not there are added.
    """
    config = config.copy_and_resolve_references().unlock()
    for name, value in fields.items():
        *groups, field = name.split(".")
        group = config
        for part in groups:
            group = group[part]
        group[field] = value
    return config.lock()


def plain(config: Any) -> dict:
    """The config as plain dicts and lists."""
    return json.loads(json.dumps(config.to_dict()))


def _flat(config: Any) -> Iterable[tuple[str, Any]]:
    for group, fields in plain(config).items():
        if not isinstance(fields, dict):
            yield group, fields
            continue
        for field, value in fields.items():
            yield f"{group}.{field}", value


def load(folder: str | Path) -> Any:
    """The ``outcome.Outcome`` of a study that was run before; see ``outcome.load``."""
    from jaxpapers import outcome

    return outcome.load(folder)
