"""Moving averages of the parameters, and runs that start from one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxpapers.method.protocol import Method, WarmStart


def averaged(method: Method, decay: float) -> Method:
    """A method whose ``extra`` is {"ema": exponential moving average of the parameters}.

    The average starts at the initial parameters and is updated after every step; the
    sampler uses it in place of the parameters.

    Args:
      method: without ``extra``.
      decay: of the average; 0 gives the parameters themselves.

    Raises:
      ValueError: decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")

    def init(key, batch):
        state = method.init(key, batch)
        # Copies: a donated state must not hold an array twice.
        return state._replace(extra={"ema": jax.tree.map(jnp.copy, state.params)})

    def update(state, batch):
        ema = state.extra["ema"]
        state, metrics = method.update(state._replace(extra=()), batch)
        ema = optax.incremental_update(state.params, ema, 1 - decay)
        return state._replace(extra={"ema": ema}), metrics

    def sampler(params, key, *args, extra=None, **kwargs):
        assert method.sampler is not None
        params = extra["ema"] if extra else params
        return method.sampler(params, key, *args, **kwargs)

    return method._replace(
        init=init, update=update, sampler=sampler if method.sampler else None
    )


def from_average(name: str, copies: Sequence[str] = ()) -> WarmStart:
    """Starts from the averaged parameters of another stage, see ``averaged``.

    Args:
      name: entry of ``params``, a dict, in both stages.
      copies: other entries that start as copies of it.
    """

    def parts(shapes):
        return {"extra": {"ema": {name: shapes.params[name]}}}

    def apply(state, restored):
        average = restored["extra"]["ema"][name]
        # Copies: a donated state must not hold an array twice.
        copied = {copy: jax.tree.map(jnp.copy, average) for copy in copies}
        return state._replace(params={**state.params, name: average, **copied})

    return WarmStart(parts, apply)
