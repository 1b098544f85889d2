"""Python functions on the host as JAX operations."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import io_callback


def on_host(f: Callable, shapes: Any, *, finite: bool = False) -> Callable:
    """A Python function as an operation that may be used under ``jax.jit``.

    Each execution calls ``f`` once, on the host, with whole arrays: an array that is
    sharded over several devices is gathered first. The operation has no derivative;
    gradients of its inputs are zero.

    Args:
      f: function of NumPy arrays. They are copies, which it may write to.
      shapes: ``jax.ShapeDtypeStruct`` of the result or a pytree of them, or a function
        of the arguments that returns it.
      finite: whether NaN and infinity in the result are errors.

    Returns:
      A function of arrays that returns arrays of ``shapes``. A result with another
      structure, shape or kind of dtype stops the program: JAX raises its own runtime
      error, which contains the message. Numbers are cast to the dtype within their kind
      (float64 to float32), those of other libraries by their ``__float__``.

    Raises:
      TypeError: ``shapes`` has leaves without shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> total = on_host(lambda x: x.sum(1), jax.ShapeDtypeStruct((2,), jnp.float32))
      >>> jax.jit(total)(jnp.ones((2, 3))).tolist()
      [3.0, 3.0]
    """

    def operation(*args: Any) -> Any:
        expected = shapes(*args) if callable(shapes) else shapes
        leaves, structure = jax.tree.flatten(expected)
        for leaf in leaves:
            if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
                raise TypeError(
                    "on_host: shapes must be jax.ShapeDtypeStruct or a pytree of them, "
                    f"got a leaf {leaf!r}"
                )

        def call(*args: Any) -> Any:
            result = f(*jax.tree.map(np.array, args))
            return _checked(result, leaves, structure, finite)

        return io_callback(call, expected, *lax.stop_gradient(args), ordered=False)

    return operation


def vectorized(f: Callable) -> Callable:
    """A function of arrays with any leading axes, which ``jax.vmap`` adds one to.

    ``jax.vmap`` of ``on_host`` calls the host once per row; of this it calls it once.

    Args:
      f: positional arrays to a pytree of arrays, all with the same leading axes.

    Returns:
      The same function. It has no derivative.

    Example:
      >>> import jax.numpy as jnp
      >>> shapes = lambda x: jax.ShapeDtypeStruct(x.shape[:-1], x.dtype)
      >>> total = vectorized(lambda x: on_host(lambda x: x.sum(-1), shapes)(x))
      >>> jax.vmap(total)(jnp.ones((2, 3))).tolist()
      [3.0, 3.0]
    """
    mapped = custom_vmap(f)

    @mapped.def_vmap
    def rule(size, batched, *args):
        rows = [
            x if own else jax.numpy.broadcast_to(x, (size, *x.shape))
            for x, own in zip(args, batched)
        ]
        out = vectorized(f)(*rows)
        return out, jax.tree.map(lambda _: True, out)

    return mapped


def _checked(result: Any, leaves: list, structure: Any, finite: bool) -> Any:
    """The result as arrays of the declared shapes and dtypes."""
    try:
        parts = structure.flatten_up_to(result)
    except ValueError:
        raise ValueError(
            f"the host function returned {_describe(result)}, expected the structure "
            f"{structure}"
        ) from None
    arrays = [_array(part, leaf, finite) for part, leaf in zip(parts, leaves)]
    return jax.tree.unflatten(structure, arrays)


def _array(part: Any, leaf: Any, finite: bool) -> np.ndarray:
    if isinstance(part, tuple):
        raise ValueError(
            f"the host function returned {_describe(part)}, expected one array of "
            f"shape {leaf.shape}; if the others are metadata, return the first one alone"
        )
    array = _numbers(part, leaf)
    if array.shape != leaf.shape:
        raise ValueError(
            f"the host function returned an array of shape {array.shape}, expected "
            f"{leaf.shape}"
        )
    if not np.can_cast(array.dtype, leaf.dtype, "same_kind"):
        raise ValueError(
            f"the host function returned {array.dtype}, expected {leaf.dtype}"
        )
    array = array.astype(leaf.dtype)
    rows = non_finite_rows(np.atleast_1d(array)) if finite else ()
    if len(rows):
        raise ValueError(
            f"the host function returned values that are not finite in rows "
            f"{list(map(int, rows[:10]))} of {len(np.atleast_1d(array))}"
        )
    return array


def _numbers(part: Any, leaf: Any) -> np.ndarray:
    """An array of numbers; of objects, as their ``__float__`` says."""
    refused = ValueError(
        f"the host function returned {_describe(part)} that is no array of numbers, "
        f"expected one of shape {leaf.shape}"
    )
    try:
        array = np.asarray(part)
        if array.dtype != object:
            return array
        if any(x is None or isinstance(x, str | bytes) for x in array.flat):
            raise refused
        return array.astype(leaf.dtype)
    except (TypeError, ValueError) as error:
        raise refused from error


def non_finite_rows(array: Any) -> np.ndarray:
    """Indices of the rows of an array (N, ...) that hold a NaN or an infinity.

    Example:
      >>> non_finite_rows([[1.0, 2.0], [np.nan, 0.0], [0.0, np.inf]]).tolist()
      [1, 2]
    """
    finite = np.isfinite(np.asarray(array))
    return np.flatnonzero(~finite.all(tuple(range(1, finite.ndim))))


def _describe(result: Any) -> str:
    if isinstance(result, tuple | list | dict):
        return f"a {type(result).__name__} of {len(result)}"
    return "None" if result is None else f"a {type(result).__name__}"
