"""Stochastic weight averaging, densely, over the valley of the validation loss (SWAD).

Cha, Chun, Lee, Cho, Park, Lee and Park, "SWAD: Domain Generalization by Seeking Flat
Minima", NeurIPS 2021, arXiv 2102.08604.

Parameters are averaged after every update. At each validation the average since the last
one becomes a segment, with the validation loss at its end. The valley begins at the first
segment whose loss is the smallest of ``n_converge`` in a row and ends when the smallest
of the last ``n_tolerance`` losses exceeds (1 + ``tolerance``) times the mean loss at the
beginning; the result is the mean of its segments. As the authors' program counts, to the
step.

Everything is a function of arrays, so it runs in a ``lax.scan``, and in a training run,
whose ``State.extra`` holds it: ``averaged`` and ``refresh``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpapers.method.protocol import Method, State


@dataclasses.dataclass(frozen=True)
class Valley:
    """Hyper-parameters of SWAD; on VLCS its authors take tolerance 0.2."""

    n_converge: int = 3
    """Segments whose first must have the smallest loss for the valley to begin."""
    n_tolerance: int = 6
    """Segments that may lie above the threshold before the valley ends."""
    tolerance: float = 0.3
    """Share by which the threshold exceeds the loss at the beginning."""

    def __post_init__(self):
        """Raises ValueError naming a field that is out of range, TypeError of no int."""
        for name in ("n_converge", "n_tolerance"):
            if not isinstance(value := getattr(self, name), int):
                raise TypeError(f"swad.{name} must be a whole number, got {value!r}")
        if self.n_converge < 1 or self.n_tolerance < 1:
            raise ValueError(
                "swad.n_converge and swad.n_tolerance must be >= 1, got "
                f"{self.n_converge} and {self.n_tolerance}"
            )
        if not self.tolerance >= 0:
            raise ValueError(f"swad.tolerance must be >= 0, got {self.tolerance}")


class Average(NamedTuple):
    """A mean of parameters, with the steps that it spans (-1: none) and its terms."""

    params: Any
    start: Any
    end: Any
    count: Any


class Swad(NamedTuple):
    """State of SWAD; a queue's newest entry is the last.

    Attributes:
      segment: since the last validation.
      queue: the last segments, stacked on a leading axis.
      loss: at their ends.
      pushed: number of segments in the queue.
      average: of the valley.
      converge_step: last step of the valley's first segment; -1 before.
      threshold: loss that ends the valley; 0 before it begins.
      dead_step: validation at which it ended; -1 before.
    """

    segment: Average
    queue: Average
    loss: Any
    pushed: Any
    average: Average
    converge_step: Any
    threshold: Any
    dead_step: Any


def init(params: Any, valley: Valley = Valley()) -> Swad:
    """The state before the first update; ``params`` gives shapes and dtypes."""
    n = max(valley.n_converge, valley.n_tolerance)
    zeros = jax.tree.map(jnp.zeros_like, params)
    stacked = jax.tree.map(lambda x: jnp.zeros((n, *jnp.shape(x)), x.dtype), params)
    none = jnp.full((), -1, jnp.int32)

    def steps(shape):
        return (*[jnp.full(shape, -1, jnp.int32)] * 2, jnp.zeros(shape, jnp.int32))

    dtype = jnp.result_type(float)
    return Swad(
        Average(zeros, *steps(())),
        Average(stacked, *steps((n,))),
        jnp.zeros(n, dtype),
        jnp.zeros((), jnp.int32),
        Average(jax.tree.map(jnp.copy, zeros), *steps(())),
        none,
        jnp.zeros((), dtype),
        jnp.copy(none),
    )


def accumulate(swad: Swad, params: Any, step: jax.Array | int) -> Swad:
    """Takes the parameters after update ``step``, counted from 0, into the segment."""
    return swad._replace(segment=_add(swad.segment, params, step, step))


def validate(
    swad: Swad,
    loss: jax.Array | float,
    step: jax.Array | int,
    valley: Valley = Valley(),
) -> Swad:
    """Ends a segment with a validation loss: the valley begins, goes on, or ends.

    Args:
      swad: with at least one update since the last validation.
      loss: mean validation loss of the training domains, finite.
      step: of the last update.
      valley: hyper-parameters; those of ``init``.
    """
    alive = swad.dead_step < 0
    pushed = _push(swad, jnp.asarray(loss, swad.loss.dtype))
    begun = swad.converge_step >= 0
    following = lax.cond(
        begun,
        lambda s: _go_on(s, step, valley),
        lambda s: _begin(s, valley),
        pushed,
    )
    new = jax.tree.map(lambda a, b: jnp.where(alive, a, b), following, swad)
    segment = Average(new.segment.params, *init((), valley).segment[1:])
    return new._replace(segment=segment)


def finalize(swad: Swad, valley: Valley = Valley()) -> Average:
    """The mean of the valley; of the last segment where none has begun."""
    n = len(swad.loss)
    last = jax.tree.map(lambda x: x[-1], swad.queue)
    # The smallest loss from each segment to the newest.
    rest = lax.cummin(swad.loss, reverse=True)
    place = jnp.arange(n)
    first = n - jnp.minimum(swad.pushed, valley.n_tolerance)
    left = (place > first) & (rest <= swad.threshold) & (swad.dead_step < 0)
    average = _add_some(swad.average, swad.queue, left)
    begun = swad.converge_step >= 0
    return jax.tree.map(lambda a, b: jnp.where(begun, a, b), average, last)


def averaged(method: Method, valley: Valley = Valley()) -> Method:
    """A method whose ``extra`` is {"method": its own, "swad": ``Swad``}.

    Every update is accumulated; ``refresh`` validates. ``predict`` takes the mean of the
    valley once there is a segment. Moving statistics of batch normalisation are those of
    the last update: freeze them, or estimate them again for the mean.
    """

    def init_state(key, batch):
        state = method.init(key, batch)
        return state._replace(
            extra={"method": state.extra, "swad": init(state.params, valley)}
        )

    def update(state, batch):
        inner, metrics = method.update(
            state._replace(extra=state.extra["method"]), batch
        )
        swad = accumulate(state.extra["swad"], inner.params, state.step)
        return inner._replace(extra={"method": inner.extra, "swad": swad}), metrics

    def predict(params, extra, batch):
        assert method.predict is not None
        swad = extra["swad"]
        mean = finalize(swad, valley).params
        chosen = jax.tree.map(
            lambda a, b: jnp.where(swad.pushed > 0, a, b), mean, params
        )
        return method.predict(chosen, extra["method"], batch)

    return method._replace(
        init=init_state, update=update, predict=predict if method.predict else None
    )


def validated(state: State, loss: float, valley: Valley = Valley()) -> State:
    """The state of an ``averaged`` method after a validation, on the host.

    Raises:
      ValueError: a loss that is not finite.
    """
    if not math.isfinite(loss):
        raise ValueError(
            f"SWAD needs a finite validation loss, got {loss} at step "
            f"{int(state.step)}; lower config.optim.lr"
        )
    swad = state.extra["swad"]
    if int(swad.segment.count) == 0:  # Before the first update.
        return state
    swad = _validate(swad, loss, state.step - 1, valley)
    return state._replace(extra={**state.extra, "swad": swad})


def refresh(
    every: int, validation_loss: Callable[[State], float], valley: Valley = Valley()
) -> tuple[int, Callable[[State], State]]:
    """``study.Data.refresh`` that validates an ``averaged`` method every k steps.

    Validations come after k, 2k, ... updates; the authors' come one update later.
    """
    return every, lambda state: validated(state, validation_loss(state), valley)


_validate = jax.jit(validate, static_argnames="valley")


def _add(average: Average, params: Any, start: Any, end: Any) -> Average:
    """A mean with one more term; the first one replaces what is there."""
    n = average.count

    def mean(old, new):
        return jnp.where(n == 0, new, old + (new - old) / (n + 1).astype(old.dtype))

    params = jax.tree.map(mean, average.params, params)
    start = jnp.where(n == 0, start, average.start).astype(jnp.int32)
    return Average(params, start, jnp.asarray(end, jnp.int32), n + 1)


def _add_some(average: Average, queue: Average, chosen: Any) -> Average:
    """A mean with the chosen segments of a queue, the oldest first."""

    def body(i, average):
        item = jax.tree.map(lambda x: x[i], queue)
        more = _add(average, item.params, item.start, item.end)
        return jax.tree.map(lambda a, b: jnp.where(chosen[i], a, b), more, average)

    return lax.fori_loop(0, len(chosen), body, average)


def _push(swad: Swad, loss: Any) -> Swad:
    def shifted(queue, new):
        return jnp.concatenate([queue[1:], new[None]])

    return swad._replace(
        queue=jax.tree.map(shifted, swad.queue, swad.segment),
        loss=shifted(swad.loss, loss),
        pushed=jnp.minimum(swad.pushed + 1, len(swad.loss)),
    )


def _begin(swad: Swad, valley: Valley) -> Swad:
    """The valley begins where the oldest of the last losses is the smallest."""
    n, nc, nt = len(swad.loss), valley.n_converge, valley.n_tolerance
    recent = swad.loss[n - nc :]
    begins = (swad.pushed >= nc) & (jnp.argmin(recent) == 0)
    threshold = recent.mean() * (1 + valley.tolerance)
    place = jnp.arange(n)
    if nt > nc:
        first = n - jnp.minimum(swad.pushed, nt)
        window = (place >= first) & (place <= first + nt - nc)
        high = jnp.where(window & (swad.loss > threshold), place + 1, first)
        # The segment at the start itself is left out.
        chosen = window & (place > high.max())
    else:
        chosen = (place > n - nc) & (place <= n - nt)
    start = jax.tree.map(lambda x: x[n - nc], swad.queue)
    # Without terms: the first one will replace it.
    empty = Average(start.params, *init((), valley).average[1:])
    begun = swad._replace(
        average=_add_some(empty, swad.queue, chosen),
        converge_step=start.end,
        threshold=threshold,
    )
    return jax.tree.map(lambda a, b: jnp.where(begins, a, b), begun, swad)


def _go_on(swad: Swad, step: Any, valley: Valley) -> Swad:
    """The valley takes its next segment, or ends."""
    n = len(swad.loss)
    first = n - jnp.minimum(swad.pushed, valley.n_tolerance)
    place = jnp.arange(n)
    lowest = jnp.where(place >= first, swad.loss, jnp.inf).min()
    inside = swad.queue.end[first] >= swad.converge_step
    ends = inside & (lowest > swad.threshold)
    taken = (place == first) & inside & ~ends
    return swad._replace(
        average=_add_some(swad.average, swad.queue, taken),
        dead_step=jnp.where(ends, step, swad.dead_step).astype(jnp.int32),
    )
