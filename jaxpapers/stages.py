"""Training runs of a study: each stage once, each program once, in folders by content."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxpapers import checkpoint as ckpt
from jaxpapers import mesh as meshes
from jaxpapers import papers, report, tasks, trackers, workdir
from jaxpapers import train as trainer
from jaxpapers.config import check_continues
from jaxpapers.folder import evaluated, read_stored, write_config
from jaxpapers.method import Method, State
from jaxpapers.study import (
    Data,
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
    "prompt", "temperature", "log_images", "init_only",
}  # fmt: skip

Numbers = Mapping[str, float]


class Stages:
    """Trains stages in one folder; caches data, methods and compiled steps.

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
        chosen: Sequence[Any] = (),
    ):
        """Args: folder of the study, mesh, trackers, and see ``run.run``."""
        trackers.check(chosen)
        self.root, self.grid = root, grid
        self._quiet, self._profile, self._trackers = quiet, profile, chosen
        self._data: dict[str, Data] = {}
        self._methods: dict[str, Method] = {}
        self._compiled: dict[str, trainer.Compiled] = {}
        self._folders: dict[str, Path] = {}

    def data(self, stage: Stage) -> Data:
        """Data of a stage, cached."""
        config = plain(stage.config)
        groups = {k: v for k, v in config.items() if k not in ("train", "optim")}
        key = json.dumps(groups, sort_keys=True)
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
        """Checks all stages before the first is trained.

        Raises:
          ValueError: of ``make``, of a step traced with the shapes of its batch, or of
            a folder that holds another run, or of ``train.init_from``.
          FileNotFoundError: ``train.init_from`` holds no checkpoint.
        """
        for stage in {stage_key(s): s for s in stages}.values():
            _holds_run(self.folder(stage), stage.paper, self._stored(stage))
            method, data = self.method(stage), self.data(stage)
            if data.examples is not None:
                meshes.batch_rows(
                    self.grid,
                    stage.config.data.batch,
                    parts=stage.config.train.accumulate,
                )
            start = stage.config.train.init_from
            if start and not ckpt.steps(self.folder(stage) / "checkpoints"):
                shapes = trainer.abstract(method, self.grid, data.shapes)
                only = stage.config.train.get("init_only", "")
                trainer.check_start(method, shapes, start, only)
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
                digest = hashlib.sha256(key.encode()).hexdigest()[:8]
                folder = folder.with_name(f"{folder.name}-{digest}")
            self._folders[key] = folder
        return self._folders[key]

    def train(
        self,
        stage: Stage,
        *,
        label: str = "",
        watch: Callable[[Method, State], Numbers] | None = None,
        draw: Callable[[Method, State, Path], Sequence[Path]] | None = None,
        finish: Callable[[Method, State], Numbers] | None = None,
    ) -> State:
        """Trains a stage, or continues what its folder holds.

        Args:
          stage: the one that it starts from has been trained.
          label: of its row, for people who look into the folder.
          watch: numbers of a state, every ``train.eval_every`` steps.
          draw: (method, state, folder) -> pictures of the state that it drew there, as
            often, where ``train.log_images`` is set.
          finish: numbers of the final state.

        Returns:
          The final state.
        """
        parts = parts_of(stage)
        start = parts[0].after
        init_from = str(self.folder(start)) if start else stage.config.train.init_from
        with workdir.lock_for_all(self.folder(stage)):
            return self._train(stage, parts, init_from, label, watch, draw, finish)

    def _train(self, stage, parts, init_from, label, watch, draw, finish) -> State:
        folder, config, data = self.folder(stage), self._stored(stage), self.data(stage)
        folder.mkdir(parents=True, exist_ok=True)
        begins = not _holds_run(folder, stage.paper, config)
        if begins:
            write_config(folder, stage.paper, config, label)
        opened = []
        if jax.process_index() == 0:
            opened = trackers.open_all(folder, config, self._trackers, anew=begins)
        state = None
        with report.Report(
            tokens_per_step=config["data"].get("batch", 1) * data.work,
            trackers=opened,
            quiet=self._quiet,
            unit=data.unit,
            # A step of a run without examples is an episode.
            every=1 if data.examples is None else 10,
            eval_every=stage.config.train.eval_every if watch else 0,
        ) as reporter:
            for part in parts:
                saved = folder / "checkpoints"
                if part is stage or (ckpt.latest_step(saved) or 0) < last_step(part):
                    state = self._fit(
                        part, folder, config, init_from, watch, draw, reporter
                    )
            assert state is not None
            # Only now is it known that the config fits the checkpoint that was there.
            write_config(folder, stage.paper, config, label)
            numbers = finish(self.method(stage), state) if finish else {}
            if numbers:
                reporter.evaluation(int(state.step), dict(numbers))
        return state

    def _stored(self, stage: Stage) -> dict:
        """The config that a run's folder keeps: that of its first part."""
        return plain(parts_of(stage)[0].config)

    def _fit(self, stage, folder, config, init_from, watch, draw, reporter) -> State:
        method, data, c = self.method(stage), self.data(stage), stage.config

        def evaluate(state):
            values = {f"validation_{k}": v for k, v in watch(method, state).items()}
            if draw and c.train.get("log_images"):
                step = int(state.step)
                for path in draw(method, state, folder / "images" / f"{step:06d}"):
                    reporter.picture(step, path)
            return values

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
            evaluated=functools.partial(evaluated, folder),
            eval_every=c.train.eval_every,
            save_every=c.train.save_every,
            save_minutes=c.train.save_minutes,
            keep=c.train.keep,
            init_from=init_from or None,
            # Of the user's run, not of a stage before this one.
            init_only="" if parts_of(stage)[0].after else c.train.get("init_only", ""),
            report=reporter,
            profile=self._profile,
        )


def unique(stages: Sequence[Stage | None]) -> list[Stage]:
    """Stages with their ancestors, in training order, without duplicates.

    Stages that another one continues are part of that one's run and are left out, unless
    they are asked for themselves.
    """
    ordered: dict[str, Stage] = {}
    for stage in stages:
        for part in lineage(stage):
            continued = [s for s in lineage(stage) if s.continues and s.after is part]
            if part is stage or not continued:
                ordered.setdefault(stage_key(part), part)
    return list(ordered.values())


def parts_of(stage: Stage) -> list[Stage]:
    """A stage and those that it continues, the first one first: one run."""
    parts = [stage]
    while parts[0].continues:
        assert parts[0].after is not None
        parts.insert(0, parts[0].after)
    return parts


def same(one: Stage | None, other: Stage | None) -> bool:
    """Whether two stages are the same training run."""
    if one is None or other is None:
        return one is other
    return stage_key(one) == stage_key(other)


def _holds_run(folder: Path, paper: str, config: dict) -> bool:
    """Whether a folder has complete checkpoints.

    Raises:
      ValueError: they are of another paper, config or version.
    """
    if not ckpt.steps(folder / "checkpoints"):
        return False
    if (folder / "config.json").exists():
        stored = read_stored(folder)
        if stored["paper"] != paper:
            raise ValueError(
                f"{folder} holds a run of {stored['paper']}, got {paper}; choose another "
                "--workdir"
            )
    check_continues(folder, config)
    return True


def _program_key(stage: Stage) -> str:
    config = {
        group: {k: v for k, v in fields.items() if k not in HOST_FIELDS}
        if group == "train"
        else fields
        for group, fields in plain(stage.config).items()
    }
    return json.dumps([stage.paper, config], sort_keys=True)
