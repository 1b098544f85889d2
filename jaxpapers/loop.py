"""The steps of a run: batches, refreshes, evaluations, checkpoints, stopping."""

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
from jaxpapers import processes, signals
from jaxpapers.method import State


class NonFiniteError(ValueError):
    """Loss or gradient became NaN or infinite; the last checkpoint is a good one."""


class Plan(NamedTuple):
    """What the loop does beside the steps; see ``train.fit``."""

    steps: int
    batch: int
    refresh: tuple[int, Callable[[State], State]] | None = None
    config: dict = {}
    evaluate: Callable[[Any], dict[str, float]] | None = None
    eval_every: int = 0
    save_every: int = 0
    save_minutes: int | float = 0
    profile: tuple[int, int] | None = None
    workdir: Any = None

    def evaluates(self, done: int) -> bool:
        """Whether the state after ``done`` steps is evaluated."""
        last = done == self.steps
        due = last or (self.eval_every and done % self.eval_every == 0)
        return bool(self.evaluate and due)


def loop(
    plan: Plan,
    compiled: Any,
    state: State,
    position: int,
    *,
    read: Callable,
    mesh: jax.sharding.Mesh,
    manager: Any,
    report: Any,
    stop: signals.Stop,
) -> State:
    """Trains a state to ``plan.steps``.

    Args:
      plan: see ``Plan``.
      compiled: step and shapes, see ``train.Compiled``.
      state: of the start.
      position: index of the next training example.
      read: of ``reader``.
      mesh: of the batches.
      manager: of the checkpoints, or None.
      report: see ``report.Report``, or None.
      stop: inside ``stop.later()``.

    Raises:
      signals.Preempted, NonFiniteError, OSError: see ``train.fit``.
    """
    saved_at = time.monotonic()
    pending: dict | None = None
    tracing = False
    steps, profile = plan.steps, plan.profile

    def flush(step: int) -> None:
        """Reads the metrics of a step that was dispatched before the newest one."""
        nonlocal pending
        if pending is not None:
            metrics, pending = jax.device_get(pending), None
            _check_finite(metrics := {k: float(v) for k, v in metrics.items()}, step,
                          manager)  # fmt: skip
            if report:
                report.step(step, metrics)

    for step in range(int(state.step), steps):
        if profile and step == profile[0]:
            jax.profiler.start_trace(str(Path(plan.workdir or ".") / "profile"))
            tracing = True
        due_refresh = plan.refresh and step % plan.refresh[0] == 0
        if plan.refresh and due_refresh:
            state = _refreshed(state, plan.refresh[1], compiled.shapes)
        local = read(state, position, bool(due_refresh))
        previous = pending
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            batch = meshes.put_batch(local, mesh, plan.batch)
            state, metrics = compiled.step(state, batch)
        position += plan.batch
        # One step late: the device never waits for the host to read.
        if previous is not None:
            flush(step)
        pending = metrics
        done = step + 1
        if tracing and profile and done > min(profile[1], steps - 1):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            tracing = False
        late = plan.save_minutes and processes.agreed(
            time.monotonic() - saved_at, done
        ) > (60 * plan.save_minutes)
        every = plan.save_every
        save = done == steps or (every and done % every == 0) or late
        preempted = signals.preempted(stop, done)
        if plan.evaluates(done) or save or preempted:
            flush(done)
        if save or preempted:
            _save(manager, state, position, plan.config)
            saved_at = time.monotonic()
        if plan.evaluates(done) and not preempted:
            try:
                evaluation(plan, state, report, stop)
            except signals.Preempted:
                _save(manager, state, position, plan.config)
                preempted = True
        if preempted:
            if manager:
                ckpt.wait(manager)
            raise signals.Preempted(f"stopped at step {done} of {steps}")
    flush(steps)
    if manager:
        ckpt.wait(manager)
    if stop.raised:
        raise signals.Preempted(f"stopped after the last step, {steps}")
    return state


def evaluation(plan: Plan, state: State, report: Any, stop: signals.Stop) -> None:
    """Evaluates a state and reports it.

    Raises:
      signals.Preempted: SIGTERM while evaluating; one process alone only, since the
        others wait for each other.
    """
    assert plan.evaluate is not None
    if jax.process_count() > 1:
        values = plan.evaluate(state)
    else:
        with stop.at_once():
            values = plan.evaluate(state)
    if report and values:
        report.evaluation(int(state.step), values)


def reader(examples: Any, refreshed: bool, batch: int, rows: slice) -> Callable:
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


def _check_finite(metrics: dict[str, float], step: int, manager: Any) -> None:
    bad = {k: v for k, v in metrics.items() if not math.isfinite(v)}
    if not bad:
        return
    last = manager.latest_step() if manager else None
    good = f"last good checkpoint: step {last}" if last else "no checkpoint yet"
    raise NonFiniteError(
        f"non-finite metrics at step {step}: {bad}; {good}; lower config.optim.lr, or "
        "find the operation with JAX_DEBUG_NANS=1"
    )


def _save(manager: Any, state: State, position: int, config: dict) -> None:
    """Saves a state, unless it is not finite or there is no workdir."""
    if manager is None:
        return
    if not bool(_finite((state.params, state.opt_state, state.extra))):
        raise NonFiniteError(
            f"non-finite optimizer state after step {int(state.step)}; last good "
            f"checkpoint: step {manager.latest_step()}; lower config.optim.lr"
        )
    ckpt.save(manager, state, position, config)


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
