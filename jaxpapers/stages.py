"""Training runs of a study: each stage once, each program once, in folders by content."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from jaxpapers import checkpoint as ckpt
from jaxpapers import mesh as meshes
from jaxpapers import papers, report, tasks
from jaxpapers import train as trainer
from jaxpapers.config import check_continues
from jaxpapers.folder import open_writers, read_stored, write_config
from jaxpapers.method import Method, State
from jaxpapers.study import (
    Data,
    Finding,
    Result,
    Results,
    Row,
    Stage,
    last_step,
    lineage,
    plain,
    stage_key,
    stage_name,
)

# Fields of ``config.train`` that the compiled step does not depend on.
HOST_FIELDS = {
    "seed", "eval_every", "save_every", "save_minutes", "keep", "init_from", "sample",
    "prompt", "temperature",
}  # fmt: skip

Numbers = Mapping[str, float]


class Stages:
    """Trains stages below one folder and keeps what they share.

    Stages with the same config but for what only the host reads (the seed, when to save)
    share their method and their compiled step.
    """

    def __init__(
        self,
        root: Path,
        grid: jax.sharding.Mesh,
        *,
        quiet: bool = False,
        profile: tuple[int, int] | None = None,
        writers: Sequence[str] = (),
    ):
        """Args: folder of the study, mesh, and see ``run.run``."""
        self.root, self.grid = root, grid
        self._quiet, self._profile, self._writers = quiet, profile, writers
        self._data: dict[str, Data] = {}
        self._methods: dict[str, Method] = {}
        self._compiled: dict[str, trainer.Compiled] = {}
        self._folders: dict[str, Path] = {}

    def data(self, stage: Stage) -> Data:
        """What a stage reads; read once for all stages that read the same."""
        config = plain(stage.config)
        key = json.dumps([config.get(k) for k in ("data", "net", "method")])
        if key not in self._data:
            self._data[key] = tasks.read(stage.config)
        return self._data[key]

    def method(self, stage: Stage) -> Method:
        """The stage's method."""
        key = _program_key(stage)
        if key not in self._methods:
            make = papers.load(stage.paper).make
            self._methods[key] = make(stage.config, **self.data(stage).facts)
        return self._methods[key]

    def compiled(self, stage: Stage) -> trainer.Compiled:
        """The stage's step on the mesh."""
        key = _program_key(stage)
        if key not in self._compiled:
            self._compiled[key] = trainer.compile(
                self.method(stage), self.grid, self.data(stage).shapes
            )
        return self._compiled[key]

    def check(self, stages: Sequence[Stage]) -> None:
        """Refuses before any training what a later stage would refuse after hours.

        Raises:
          ValueError: of ``make``, or of a step traced with the shapes of its batch.
        """
        for stage in stages:
            method, data = self.method(stage), self.data(stage)
            if data.examples is not None:
                meshes.batch_rows(
                    self.grid,
                    stage.config.data.batch,
                    parts=stage.config.train.accumulate,
                )
            if stage.after is not None:
                with jax.set_mesh(self.grid):
                    key = jax.random.key(0)
                    state = jax.eval_shape(method.init, key, data.shapes)
                    jax.eval_shape(method.update, state, data.shapes)

    def place(self, stage: Stage, folder: Path) -> None:
        """Gives the paper's own stage its folder."""
        self._folders[stage_key(stage)] = folder

    def folder(self, stage: Stage) -> Path:
        """The folder of a stage's run: by content, unless ``place`` gave one."""
        key = stage_key(stage)
        if key not in self._folders:
            folder = self.root / "stages" / stage_name(stage)
            if folder in self._folders.values():  # Of the same run, longer or shorter.
                folder = folder.with_name(f"{folder.name}-{last_step(stage)}")
            self._folders[key] = folder
        return self._folders[key]

    def train(
        self,
        stage: Stage,
        *,
        label: str = "",
        watch: Callable[[Method, State], Numbers] | None = None,
        finish: Callable[[Method, State], Numbers] | None = None,
    ) -> State:
        """Trains a stage, or continues what its folder holds.

        Args:
          stage: the one that it starts from has been trained.
          label: of its row, for people who look into the folder.
          watch: numbers of a state, every ``train.eval_every`` steps.
          finish: numbers of the final state.

        Returns:
          The final state.
        """
        parts = [stage]
        while parts[0].continues:
            assert parts[0].after is not None
            parts.insert(0, parts[0].after)
        start = parts[0].after
        init_from = str(self.folder(start)) if start else stage.config.train.init_from
        folder, config, data = self.folder(stage), plain(stage.config), self.data(stage)
        folder.mkdir(parents=True, exist_ok=True)
        if any((folder / "checkpoints").glob("[0-9]*")):
            read_stored(folder)
            check_continues(folder, config)
        else:
            write_config(folder, stage.paper, config, label)
        reporter = report.Report(
            tokens_per_step=config["data"].get("batch", 1) * data.work,
            writers=open_writers(folder, config, self._writers),
            quiet=self._quiet,
            unit=data.unit,
        )
        state = None
        try:
            for part in parts:
                done = ckpt.latest_step(folder / "checkpoints") or 0
                if part is stage or done < last_step(part):
                    state = self._fit(part, folder, config, init_from, watch, reporter)
            assert state is not None
            # Only now is it known that the config fits the checkpoint that was there.
            write_config(folder, stage.paper, config, label)
            numbers = finish(self.method(stage), state) if finish else {}
            if numbers:
                reporter.evaluation(int(state.step), dict(numbers))
        finally:
            reporter.close()
        return state

    def _fit(self, stage, folder, config, init_from, watch, reporter) -> State:
        method, data, c = self.method(stage), self.data(stage), stage.config

        def evaluate(state):
            return {f"validation_{k}": v for k, v in watch(method, state).items()}

        return trainer.fit(
            method,
            data.examples,
            compiled=lambda: self.compiled(stage),
            refresh=data.refresh,
            steps=last_step(stage),
            batch=c.data.get("batch", 1),
            mesh=self.grid,
            seed=c.train.seed,
            workdir=folder,
            config=config,
            evaluate=evaluate if watch else None,
            eval_every=c.train.eval_every,
            save_every=c.train.save_every,
            save_minutes=c.train.save_minutes,
            keep=c.train.keep,
            init_from=init_from or None,
            report=reporter,
            profile=self._profile,
        )


def unique(stages: Sequence[Stage | None]) -> list[Stage]:
    """Stages and what they start from, in an order of training, equal ones once.

    Stages that another one continues are part of that one's run and are left out, unless
    they are asked for themselves.
    """
    found: dict[str, Stage] = {}
    for stage in stages:
        for part in lineage(stage):
            continued = [s for s in lineage(stage) if s.continues and s.after is part]
            if part is stage or not continued:
                found.setdefault(stage_key(part), part)
    return list(found.values())


def measure(
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
      announce: told what is trained next.

    Returns:
      Results in the order of the rows, and the final state of the paper's own first run.
    """
    findings: dict[tuple[int, int], Finding] = {}
    own: list[State] = []
    done: set[str] = set()

    @functools.cache
    def untrained(j):
        for i, row in enumerate(rows[j]):
            if row.stage is None:
                findings[i, j] = row.measure()
        known = {i: f for (i, k), f in findings.items() if k == j}
        return {
            f"baseline_{row.label}": known[i].numbers[metric]
            for i, row in enumerate(rows[j])
            if row.stage is None and metric in known[i].numbers
        }

    def train(stage, j):
        if stage_key(stage) in done:
            return
        done.add(stage_key(stage))
        # A stage without the seed in its config serves the rows of all seeds.
        here = [
            (i, k)
            for k, of_seed in enumerate(rows)
            for i, row in enumerate(of_seed)
            if same(row.stage, stage)
        ]
        first = here[0][0] if here else None
        label = "first stage" if first is None else rows[j][first].label
        if first != 0 or len(seeds) > 1:
            announce(f"{label}, seed {seeds[j]}")

        def finish(method, state):
            for i, k in here:
                findings[i, k] = rows[k][i].measure(method, state)
            if first is None:
                return {}
            numbers = findings[here[0]].numbers
            final = {f"validation_{k}": v for k, v in numbers.items()}
            return {**final, **untrained(j)} if first == 0 else final

        watch = _watch(stage, others[j])
        state = stages.train(stage, label=label, watch=watch, finish=finish)
        if first == 0 and not own:
            own.append(state)

    for i in range(len(rows[0])):
        for j in range(len(seeds)):
            if rows[j][i].stage is None:
                untrained(j)
            for stage in unique([rows[j][i].stage]):
                train(stage, j)
    results = [
        Result(
            row,
            [findings[i, j] for j in range(len(seeds))],
            [stages.folder(stage) for r in rows if (stage := r[i].stage)],
        )
        for i, row in enumerate(rows[0])
    ]
    return results, own[0] if own else None


def same(one: Stage | None, other: Stage | None) -> bool:
    """Whether two stages are the same training run."""
    if one is None or other is None:
        return one is other
    return stage_key(one) == stage_key(other)


def _watch(stage: Stage, rows: Sequence[Row]) -> Callable | None:
    """Numbers to follow during a stage: of its row, or of one that continues it."""

    def run(other: Stage | None) -> list[Stage]:
        """The stage and those that it continues."""
        parts = [other] if other else []
        while parts and parts[-1].continues:
            assert parts[-1].after is not None
            parts.append(parts[-1].after)
        return parts

    for row in rows:
        if any(same(part, stage) for part in run(row.stage)):
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


def _program_key(stage: Stage) -> str:
    config = {
        group: {k: v for k, v in fields.items() if k not in HOST_FIELDS}
        if group == "train"
        else fields
        for group, fields in plain(stage.config).items()
    }
    return json.dumps([stage.paper, config], sort_keys=True)
