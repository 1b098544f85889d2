"""Compiled programs are what tests cost: one for all values that a test looks at.

An eager ``jax.numpy`` operation on a new shape is a program of its own, 45-70 ms of
the compiler's time. So tests compute inputs and expected values with NumPy and call
what they test inside one jitted function.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# A key without data, for init functions of which only the shapes are wanted.
KEY = jax.eval_shape(lambda: jax.random.key(0))
# Fires for every executable that is compiled or read from the cache on disk.
COMPILED = "/jax/core/compile/backend_compile_duration"


def together(f: Callable, *args: Any) -> Any:
    """``f(*args)`` in one compiled program; the leaves of the result on the host.

    Examples:
        >>> together(lambda x: {"max": x.max(), "sum": x.sum()}, np.arange(3))
        {'max': array(2, dtype=int32), 'sum': array(3, dtype=int32)}
    """
    return jax.device_get(jax.jit(f)(*args))


def params_like(init: Callable, *args: Any, seed: int = 0) -> Any:
    """Parameters of the shapes that ``init(*args)`` has, drawn with NumPy.

    Matrices and kernels are normal with variance 1 / fan-in. Scales and variances lie
    in (0.5, 1.5), other vectors are normal with standard deviation 0.1, so that no term
    of an equation is zero or one. Integers are zero.

    Args:
        init: a function of shapes only: `KEY` serves as its key.
        *args: arrays or `jax.ShapeDtypeStruct`.
        seed: of the NumPy generator.

    Examples:
        >>> init = lambda key: {"kernel": jax.random.normal(key, (3, 2))}
        >>> params_like(init, KEY)["kernel"].shape
        (3, 2)
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(
                f"init returns a random key at {jax.tree_util.keystr(path)}"
            )
        if not jax.dtypes.issubdtype(leaf.dtype, np.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path[-1:]) if path else ""
        if len(leaf.shape) > 1:
            fan_in = np.prod(leaf.shape[:-1])
            values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        elif "scale" in name or "var" in name:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            values = 0.1 * rng.normal(size=leaf.shape)
        return np.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, *args))


class Programs:
    """Counts compiled programs for whoever is at the top of the stack of owners."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.owners = ["collection"]
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **kwargs: Any) -> None:
        if event == COMPILED:
            self.counts[self.owners[-1]] += 1
