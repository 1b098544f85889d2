"""Checks of the optimizers' hyper-parameters, before anything is traced if possible."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PRECISIONS = (None, "default", "high", "highest")


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_range(
    name: str,
    value: Any,
    low: int | float,
    high: int | float = math.inf,
    *,
    open_right: bool = False,
) -> None:
    """ValueError unless ``value`` is in [low, high]; traced values pass."""
    if is_traced(value):
        return
    if callable(value):
        raise ValueError(
            f"{name} must be a number, got a function; for a schedule use "
            "optax.inject_hyperparams"
        )
    value = float(value)
    if not low <= value <= high or (open_right and value == high):
        bound = ")" if open_right or high == math.inf else "]"
        raise ValueError(f"{name} must be in [{low}, {high}{bound}, got {value}")


def check_flag(name: str, value: Any) -> None:
    """TypeError unless ``value`` is True or False: it shapes the program."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_dtype(name: str, dtype: Any) -> None:
    """ValueError unless ``dtype`` is None or one of real floating-point numbers."""
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(
            f"{name} must be a real floating-point dtype, got {jnp.dtype(dtype)}"
        )


def product_precision(precision: str | None, dtype: Any) -> lax.Precision:
    """Of the large products: by the state's dtype if it is None.

    On a TPU: one bfloat16 pass for 16-bit states, three for float32. Float64 has no
    passes to choose from.
    """
    if precision is not None:
        return lax.Precision[precision.upper()]
    by_size = {2: lax.Precision.DEFAULT, 4: lax.Precision.HIGH}
    return by_size.get(jnp.dtype(dtype).itemsize, lax.Precision.HIGHEST)


def check_leaf(path: str, leaf: Any, name: str) -> None:
    """TypeError unless the leaf is an array or number of real floating point."""
    try:
        dtype = jnp.result_type(leaf)
    except TypeError:
        raise TypeError(
            f"{path}: {name} needs real floating-point leaves, got "
            f"{type(leaf).__name__}; keep it out with optax.masked"
        ) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{path}: {name} needs real floating-point leaves, got {dtype}; keep "
            "it out with optax.masked, or give it to another optimizer"
        )


def leaf_dtype(leaf: Any) -> Any:
    """The dtype that a leaf, which may be of NumPy or Python, has in JAX."""
    return jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))


def check_paths(name: str, got: Sequence, expected: Sequence) -> None:
    """ValueError where gradients are not those of the state's parameters.

    Args:
      name: of the optimizer, for the message.
      got: gradients with their paths.
      expected: momenta with theirs.
    """
    paths = [path for path, _ in got]
    wanted = [path for path, _ in expected]
    if paths == wanted:
        return
    missing = [p for p in wanted if p not in set(paths)]
    unknown = [p for p in paths if p not in set(wanted)]
    raise ValueError(
        f"{name}: gradients and state have different structures: got {len(paths)} "
        f"gradients, expected {len(wanted)}; missing {missing[:3]}, unknown "
        f"{unknown[:3]}; call init with the parameters that these gradients belong to"
    )


def is_number(x: Any) -> bool:
    """Whether ``x`` is one value of a numeric per-leaf option."""
    return isinstance(x, int | float | jax.Array) or hasattr(x, "dtype")


def is_traced(*values: Any) -> bool:
    """Whether any value is known at run time only."""
    return any(isinstance(v, jax.core.Tracer) for v in values)


def static_fraction(path: str, fraction: Any, rank: int | None) -> float:
    """rank_fraction as a float; may be traced once the state fixes the rank."""
    if is_traced(fraction):
        if rank is None:
            raise ValueError(_STATIC.format(name="rank_fraction"))
        return 1.0
    if not 0 < float(fraction) <= 1:
        raise ValueError(
            f"{path}: rank_fraction must be in (0, 1], got {float(fraction)}"
        )
    return float(fraction)


def static_multiple(multiple: Any, rank: int | None) -> int:
    """rank_multiple_of as an int, likewise."""
    if is_traced(multiple):
        if rank is None:
            raise ValueError(_STATIC.format(name="rank_multiple_of"))
        return 1
    if int(multiple) != multiple or multiple < 1:
        raise ValueError(f"rank_multiple_of must be an integer >= 1, got {multiple}")
    return int(multiple)


_STATIC = (
    "{name} shapes the state and cannot be traced; with optax.inject_hyperparams pass "
    "static_args=('rank_fraction', 'rank_multiple_of'), or call init outside jit"
)
