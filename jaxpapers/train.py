"""Training: the one place that knows meshes, jit, checkpoints and stopping."""

import contextlib
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpapers import checkpoint as ckpt
from jaxpapers import mesh as meshes
from jaxpapers import processes, signals
from jaxpapers import workdir as folders
from jaxpapers.loop import NonFiniteError, Plan, evaluation, loop, reader
from jaxpapers.method import Method, State
from jaxpapers.signals import PREEMPTED, Preempted

__all__ = ["PREEMPTED", "Compiled", "NonFiniteError", "Preempted", "compile", "fit"]


class Compiled(NamedTuple):
    """A method on a mesh.

    Attributes:
      init: (key) -> State, laid out by the rules; no device holds it whole.
      step: (state, batch) -> (state, metrics); donates the state.
      shapes: State of ShapeDtypeStruct with shardings.
      executable: the compiled step, for memory and cost analysis.
      jaxpr: the step before compilation.
    """

    init: Callable[[jax.Array], State]
    step: Callable[[State, Any], tuple[State, dict]]
    shapes: State
    executable: Any
    jaxpr: Any = None


def compile(
    method: Method,
    mesh: jax.sharding.Mesh,
    batch: Any,
    compiler_options: dict[str, Any] | None = None,
    *,
    allocate: bool = True,
) -> Compiled:
    """Compiles a method's step for a mesh, before anything is allocated.

    Args:
      method: pure functions.
      mesh: with Auto axes ``data`` and ``model``.
      batch: arrays or shapes of one global batch.
      compiler_options: of XLA, see ``jax.jit``.
      allocate: refuse a state that is larger than the memory of this mesh's devices;
        False to look at the program only.

    Raises:
      ValueError: rules or batch that do not fit the mesh, or a state that does not fit
        the memory.
    """
    batch = _placed(batch, mesh)
    shapes = abstract(method, mesh, batch)
    if allocate:
        meshes.check_memory(shapes, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    with jax.set_mesh(mesh):
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        step = jax.jit(
            method.update,
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )
        traced = step.trace(shapes, batch)
        executable = traced.lower().compile(compiler_options)

    @functools.cache
    def build():
        # Compiled before its key is seen: wherever that lies, this is one program.
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct((), key.dtype, sharding=replicated)
        init = jax.jit(lambda key: method.init(key, batch), out_shardings=shardings)
        return init.lower(key).compile()

    def init(key):
        with jax.set_mesh(mesh):
            executable = build()
            processes.wait()  # One may have it from a cache, and others compile it.
            return executable(key)

    return Compiled(init, executable, shapes, executable, traced.jaxpr)


def abstract(method: Method, mesh: jax.sharding.Mesh, batch: Any) -> State:
    """The state of a method as ShapeDtypeStructs with its shardings on a mesh.

    Args:
      method: pure functions.
      mesh: with Auto axes ``data`` and ``model``.
      batch: arrays or shapes of one global batch.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(method.init, key, _placed(batch, mesh))
        return ckpt.abstract(state, meshes.state_shardings(state, method.rules, mesh))


def _placed(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes of a global batch with its sharding."""
    sharding = meshes.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding), batch
    )


def check_start(
    method: Method, shapes: State, init_from: str, init_only: str = ""
) -> None:
    """Checks that a run can start from another one's checkpoint; reads no arrays.

    Args:
      method: pure functions.
      shapes: of ``abstract``.
      init_from: workdir or checkpoint folder.
      init_only: see ``fit``.

    Raises:
      FileNotFoundError: it holds no checkpoint.
      ValueError: its shapes or dtypes are not those of the method; ``init_only`` is no
        regex, or of a method that takes what its ``warm_start`` says.
    """
    warm = method.warm_start
    _check_only(method, init_only)
    parts = warm.parts(shapes) if warm else {"params": shapes.params}
    try:
        ckpt.check_parts(init_from, parts, init_only)
    except ValueError as e:
        raise ValueError(_no_start(init_from, e) if warm else str(e)) from e


def _check_only(method: Method, init_only: str) -> None:
    try:
        re.compile(init_only)
    except re.error as e:
        raise ValueError(f"train.init_only={init_only!r} is no regex: {e}") from None
    if init_only and method.warm_start:
        raise ValueError(
            "train.init_only: this method starts from the whole of another stage; leave "
            "it empty"
        )


def _no_start(init_from: str, e: Exception) -> str:
    return (
        f"config.train.init_from={init_from!r} is no run of the stage before this one "
        f"(method.stage=pretrain): {e}"
    )


def fit(
    method: Method,
    examples: Any,
    *,
    steps: int,
    batch: int,
    mesh: jax.sharding.Mesh | None = None,
    compiled: Compiled | Callable[[], Compiled] | None = None,
    refresh: tuple[int, Callable[[State], State]] | None = None,
    seed: int = 0,
    workdir: str | Path | None = None,
    config: dict | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluated: Callable[[int], bool] | None = None,
    eval_every: int = 0,
    save_every: int = 0,
    save_minutes: int | float = 0,
    keep: int = 2,
    init_from: str | None = None,
    init_only: str = "",
    report: Any = None,
    profile: tuple[int, int] | None = None,
) -> State:
    """Trains until ``steps``, continuing from ``workdir`` if it holds a checkpoint.

    The result is a function of (method, examples, seed) alone: stopped and resumed at any
    step it is bitwise that of the uninterrupted run on the same mesh.

    Args:
      method: see ``Method``.
      examples: has ``batch(start, size, rows)``, e.g. ``data.text.Windows``; a function
        of the State or None, see ``study.Data``.
      steps: optimizer steps of the whole run.
      batch: examples per step, over all devices and hosts.
      mesh: default all devices on ``data``.
      compiled: the method's step on this mesh, or a function that gives it; needed where
        ``examples`` alone do not give the shapes of a batch.
      refresh: (k, State -> State), called before steps 0, k, 2k, ...; see ``study.Data``.
      seed: of the parameters and of the steps' keys.
      workdir: checkpoints go to its folder ``checkpoints``; None saves nothing.
      config: plain values, stored in every checkpoint.
      evaluate: state -> metrics, every ``eval_every`` steps and after the last.
      evaluated: whether the evaluation of a step is recorded; the checkpoint that a run
        goes on from may be of a step whose evaluation never came. None: evaluates again.
      eval_every: 0 only after the last step.
      save_every: steps between checkpoints; the last step is always saved.
      save_minutes: minutes between checkpoints; 0 for by step only.
      keep: checkpoints kept.
      init_from: workdir or checkpoint folder whose parameters start a fresh run, or
        what ``method.warm_start`` takes of them.
      init_only: regex of the paths of parameters that ``init_from`` gives; the others
        start as without it. "": all, and the two must have the same.
      report: see ``report.Report``; None prints and writes nothing.
      profile: first and last step of a trace written to ``workdir/profile``.

    Returns:
      The final state.

    Raises:
      Preempted: on SIGTERM, after saving.
      NonFiniteError: names the step; nothing of it is saved.
      ValueError: shapes that do not fit the mesh or the checkpoint, ``steps`` below the
        checkpoint's, no whole checkpoint among damaged ones, a workdir that another run
        writes to.
      OSError: a checkpoint cannot be written.
    """
    mesh = mesh or meshes.make_mesh()
    if compiled is None and (examples is None or callable(examples)):
        raise ValueError(
            "examples that depend on the state give no shapes: pass compiled="
            "train.compile(method, mesh, shapes)"
        )
    _check_only(method, init_only)
    if refresh and refresh[0] < 1:
        raise ValueError(f"refresh needs at least 1 step between, got {refresh[0]}")
    if steps < 0:
        raise ValueError(f"train.steps must be >= 0, got {steps}")
    if batch < 1 and examples is not None:
        raise ValueError(f"data.batch must be >= 1, got {batch}")
    rows = slice(0) if examples is None else meshes.batch_rows(mesh, batch)
    plan = Plan(
        steps, batch, refresh, config or {}, evaluate, eval_every, save_every,
        save_minutes, profile, workdir,
    )  # fmt: skip
    with contextlib.ExitStack() as opened:
        stop = opened.enter_context(signals.stopping())
        manager = None
        if workdir:
            folder = folders.local(workdir, "workdir")
            opened.enter_context(folders.lock_for_all(folder))
            manager = ckpt.open_manager(folder / "checkpoints", keep=keep)
            opened.callback(ckpt.close, manager)
        if compiled is None:
            local = examples.batch(0, batch, rows)
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), local
            )
            if init_from and not (manager and manager.latest_step() is not None):
                known = abstract(method, mesh, shapes)
                check_start(method, known, init_from, init_only)
            compiled = compile(method, mesh, shapes)
        elif not isinstance(compiled, Compiled):
            compiled = compiled()
        processes.wait()
        with jax.set_mesh(mesh):
            state, position = _start(
                compiled, manager, seed, init_from, init_only, method
            )
        first = int(state.step)
        if first > steps:
            raise ValueError(
                f"train.steps={steps}, but {workdir} is at step {first} already; raise "
                "train.steps, or choose another --workdir"
            )
        if report:
            report.start(compiled, method, first, steps)
        with jax.set_mesh(mesh), stop.later():
            # A stop or a kill may have come between the checkpoint and its evaluation.
            if first and plan.evaluates(first) and not _known(evaluated, first):
                evaluation(plan, state, report, stop)
            return loop(
                plan, compiled, state, position, mesh=mesh, manager=manager, stop=stop,
                read=reader(examples, refresh is not None, batch, rows), report=report,
            )  # fmt: skip


def _start(compiled: Compiled, manager, seed, init_from, init_only, method):
    """Own latest checkpoint, else what another gives, else a fresh init."""
    if manager and manager.latest_step() is not None:
        return ckpt.restore(manager, compiled.shapes, resize=method.resize)
    state = compiled.init(jax.random.key(seed))
    warm = method.warm_start
    if init_from and warm:
        try:
            found = ckpt.restore_parts(init_from, warm.parts(compiled.shapes))
        except ValueError as e:
            raise ValueError(_no_start(init_from, e)) from e
        shardings = jax.tree.map(lambda x: x.sharding, compiled.shapes)
        state = jax.jit(warm.apply, out_shardings=shardings)(state, found)
    elif init_from:
        found = ckpt.restore_params(init_from, compiled.shapes.params, init_only)
        params = jax.tree.map(
            lambda new, own: own if new is None else new, found, state.params,
            is_leaf=lambda x: x is None,
        )  # fmt: skip
        state = state._replace(params=params)
    return state, 0


def _known(evaluated: Callable[[int], bool] | None, step: int) -> bool:
    """Whether the first process has a record of the evaluation of a step."""
    return bool(processes.of_first(bool(evaluated and evaluated(step))))
