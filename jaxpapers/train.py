"""Training: the one place that knows meshes, jit, checkpoints and stopping."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpapers import checkpoint as ckpt
from jaxpapers import mesh as meshes
from jaxpapers import signals
from jaxpapers.method import Method, State

PREEMPTED = 75  # EX_TEMPFAIL: the same command again continues


class Preempted(Exception):
    """The run was asked to stop; its state is saved if it has a workdir."""


class NonFiniteError(ValueError):
    """Loss or gradient became NaN or infinite; the last checkpoint is a good one."""


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
) -> Compiled:
    """Compiles a method's step for a mesh, before anything is allocated.

    Args:
      method: pure functions.
      mesh: with Auto axes ``data`` and ``model``.
      batch: arrays or shapes of one global batch.
      compiler_options: of XLA, see ``jax.jit``.

    Raises:
      ValueError: rules or batch that do not fit the mesh.
    """
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            np.shape(x), x.dtype, sharding=meshes.batch_sharding(mesh)
        ),
        batch,
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        state = jax.eval_shape(method.init, key, batch)
        shardings = meshes.state_shardings(state, method.rules, mesh)
        shapes = ckpt.abstract(state, shardings)
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        step = jax.jit(
            method.update,
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )
        traced = step.trace(shapes, batch)
        executable = traced.lower().compile(compiler_options)

    build = jax.jit(lambda key: method.init(key, batch), out_shardings=shardings)

    def init(key):
        with jax.set_mesh(mesh):
            return build(key)

    return Compiled(init, executable, shapes, executable, traced.jaxpr)


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
    eval_every: int = 0,
    save_every: int = 0,
    save_minutes: int | float = 0,
    keep: int = 2,
    init_from: str | None = None,
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
      eval_every: 0 only after the last step.
      save_every: steps between checkpoints; the last step is always saved.
      save_minutes: minutes between checkpoints; 0 for by step only.
      keep: checkpoints kept.
      init_from: workdir or checkpoint folder whose parameters start a fresh run, or
        what ``method.warm_start`` takes of them.
      report: see ``report.Report``; None prints and writes nothing.
      profile: first and last step of a trace written to ``workdir/profile``.

    Returns:
      The final state.

    Raises:
      Preempted: on SIGTERM, after saving.
      NonFiniteError: names the step; nothing of it is saved.
      ValueError: shapes that do not fit the mesh or the checkpoint.
    """
    mesh = mesh or meshes.make_mesh()
    if compiled is None and (examples is None or callable(examples)):
        raise ValueError(
            "examples that depend on the state give no shapes: pass compiled="
            "train.compile(method, mesh, shapes)"
        )
    if refresh and refresh[0] < 1:
        raise ValueError(f"refresh needs at least 1 step between, got {refresh[0]}")
    rows = slice(0) if examples is None else meshes.batch_rows(mesh, batch)
    # From here on SIGTERM waits for the next step's end, also during compilation.
    with signals.Flag() as stop:
        if compiled is None:
            local = examples.batch(0, batch, rows)
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), local
            )
            compiled = compile(method, mesh, shapes)
        elif not isinstance(compiled, Compiled):
            compiled = compiled()
        read = _reader(examples, refresh is not None, batch, rows)
        manager = (
            ckpt.open_manager(Path(workdir) / "checkpoints", keep=keep)
            if workdir
            else None
        )
        try:
            with jax.set_mesh(mesh):
                state, position = _start(compiled, manager, seed, init_from, method)
            if report:
                report.start(compiled, method, int(state.step), steps)
            with jax.set_mesh(mesh):
                return _loop(
                    compiled, state, position, read, refresh, mesh, batch, steps, manager,
                    config or {}, evaluate, eval_every, save_every,
                    save_minutes, report, profile, workdir, stop,
                )  # fmt: skip
        finally:
            if manager:
                manager.close()


def _start(compiled: Compiled, manager, seed: int, init_from: str | None, method):
    """Own latest checkpoint, else what another gives, else a fresh init."""
    if manager and manager.latest_step() is not None:
        return ckpt.restore(manager, compiled.shapes, resize=method.resize)
    state = compiled.init(jax.random.key(seed))
    warm = method.warm_start
    if init_from and warm:
        try:
            found = ckpt.restore_parts(init_from, warm.parts(compiled.shapes))
        except ValueError as e:
            raise ValueError(
                f"config.train.init_from={init_from!r} is no run of the stage before "
                f"this one (method.stage=pretrain): {e}"
            ) from e
        shardings = jax.tree.map(lambda x: x.sharding, compiled.shapes)
        state = jax.jit(warm.apply, out_shardings=shardings)(state, found)
    elif init_from:
        params = ckpt.restore_params(init_from, compiled.shapes.params)
        state = state._replace(params=params)
    return state, 0


def _loop(
    compiled, state, position, read, refresh, mesh, batch, steps, manager, config,
    evaluate, eval_every, save_every, save_minutes, report, profile, workdir, stop,
) -> State:  # fmt: skip
    first = int(state.step)
    saved_at = time.monotonic()
    pending: dict | None = None
    tracing = False

    def flush(step: int) -> None:
        """Reads the metrics of a step that was dispatched before the newest one."""
        nonlocal pending
        if pending is None:
            return
        metrics = {k: float(v) for k, v in jax.device_get(pending).items()}
        pending = None
        bad = {k: v for k, v in metrics.items() if not math.isfinite(v)}
        if bad:
            last = manager.latest_step() if manager else None
            raise NonFiniteError(
                f"non-finite metrics at step {step}: {bad}; "
                + (
                    f"last good checkpoint: step {last}"
                    if last
                    else "no checkpoint yet"
                )
                + "; lower config.optim.lr, or find the operation with JAX_DEBUG_NANS=1"
            )
        if report:
            report.step(step, metrics)

    for step in range(first, steps):
        if profile and step == profile[0]:
            jax.profiler.start_trace(str(Path(workdir or ".") / "profile"))
            tracing = True
        due_refresh = refresh and step % refresh[0] == 0
        if refresh and due_refresh:
            state = _refreshed(state, refresh[1], compiled.shapes)
        local = read(state, position, bool(due_refresh))
        previous = pending
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = compiled.step(state, meshes.put_batch(local, mesh, batch))
        position += batch
        # One step late: the device never waits for the host to read.
        if previous is not None:
            flush(step)
        pending = metrics
        done = step + 1
        if tracing and profile and done > min(profile[1], steps - 1):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            tracing = False
        due = evaluate and (done == steps or (eval_every and done % eval_every == 0))
        late = save_minutes and signals.agreed(time.monotonic() - saved_at, done) > (
            60 * save_minutes
        )
        save = done == steps or (save_every and done % save_every == 0) or late
        preempted = signals.preempted(stop, manager, done)
        if due or save or preempted:
            flush(done)
        if manager and (save or preempted):
            if not bool(_finite((state.params, state.opt_state, state.extra))):
                raise NonFiniteError(
                    f"non-finite optimizer state after step {done}; last good "
                    f"checkpoint: step {manager.latest_step()}; lower config.optim.lr"
                )
            ckpt.save(manager, state, position, config)
            saved_at = time.monotonic()
        if due and not preempted:
            values = evaluate(state)
            if report and values:
                report.evaluation(done, values)
        if preempted:
            if manager:
                manager.wait_until_finished()
            raise Preempted(f"stopped at step {done} of {steps}")
    flush(steps)
    if manager:
        manager.wait_until_finished()
    if stop.raised:
        raise Preempted(f"stopped after the last step, {steps}")
    return state


def _reader(examples: Any, refreshed: bool, batch: int, rows: slice) -> Callable:
    """(state, position, just refreshed) -> this process's rows of the next batch."""
    if examples is None:
        return lambda state, position, new: {}
    if not callable(examples):
        return lambda state, position, new: examples.batch(position, batch, rows)
    known: list[Any] = []

    def read(state, position, new):
        if not known or new or not refreshed:
            known[:] = [examples(state)]
        return known[0].batch(position, batch, rows)

    return read


def _refreshed(state: State, change: Callable, shapes: State) -> State:
    """The state after a refresh, laid out as before; step and key are the old ones.

    Raises:
      ValueError: the refresh changed a shape or a dtype.
    """
    new = change(state)._replace(step=state.step, key=state.key)
    forms = [jax.tree.map(lambda x: (np.shape(x), x.dtype), x) for x in (new, shapes)]
    if forms[0] != forms[1]:
        raise ValueError(
            "a refresh may change the values of State.params, opt_state and extra, not "
            f"their shapes or dtypes; got {forms[0]}, expected {forms[1]}"
        )
    kept = {id(x) for x in jax.tree.leaves(state)}

    def place(x, shape):
        # The step donates the state, which must not hold a buffer twice.
        x = x if id(x) in kept else jnp.copy(x)
        kept.discard(id(x))
        return jax.device_put(x, shape.sharding)

    return jax.tree.map(place, new, shapes)


@jax.jit
def _finite(tree: Any) -> jax.Array:
    """Whether all floating point leaves are finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.array([jnp.isfinite(x).all() for x in floats]).all()
