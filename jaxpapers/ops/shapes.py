"""Static shapes of arguments, checked by chex while a function is traced.

Broadcasting makes a matrix of (B,) and (B, 1), whose mean is a wrong number without an
error. Annotations say which shapes belong together; these checks hold for callers who do
not check annotations.
"""

from typing import Any

import numpy as np


def _chex():
    """The module, imported where something is traced.

    It imports absl's test runner, whose flags would become those of every program that
    imports this package.
    """
    import chex

    return chex


def same_shape(function: str, **arrays: Any) -> None:
    """Checks that arrays have one shape; None is left out.

    Args:
      function: named in the error.
      arrays: by the names of the function's arguments.

    Raises:
      ValueError: shapes that differ.

    Example:
      >>> same_shape("f", x=np.ones(3), y=np.ones((3, 1)))
      Traceback (most recent call last):
      ...
      ValueError: ... different shapes: [(3,), (3, 1)]. [f: x and y must have one shape]
    """
    named = {k: v for k, v in arrays.items() if v is not None}
    _chex().assert_equal_shape(
        [x if hasattr(x, "shape") else np.asarray(x) for x in named.values()],
        custom_message=f"{function}: {' and '.join(named)} must have one shape",
        exception_type=ValueError,
    )


def same_but_rows(function: str, **arrays: Any) -> None:
    """Checks that arrays differ in their number of rows at most.

    Raises:
      ValueError: ranks or later axes that differ.
    """
    rank = min(x.ndim for x in arrays.values())
    message = f"{function}: {' and '.join(arrays)} may differ in their first axis only"
    options = {"custom_message": message, "exception_type": ValueError}
    _chex().assert_equal_rank([*arrays.values()], **options)
    for axis in range(1, rank):
        _chex().assert_equal_shape([*arrays.values()], dims=axis, **options)


def one_per_row(function: str, rows: int, **arrays: Any) -> None:
    """Checks that arrays are vectors of ``rows`` numbers; None is left out.

    Raises:
      ValueError: another shape.
    """
    for name, x in arrays.items():
        if x is not None:
            _chex().assert_shape(
                x if hasattr(x, "shape") else np.asarray(x),
                (rows,),
                custom_message=f"{function}: {name} must be one number for each of "
                f"{rows} rows",
                exception_type=ValueError,
            )


def whole_numbers(function: str, **arrays: Any) -> None:
    """Checks that arrays are of an integer type, as ids are.

    Raises:
      TypeError: another type.
    """
    for name, x in arrays.items():
        _chex().assert_type(
            x if hasattr(x, "dtype") else np.asarray(x),
            int,
            custom_message=f"{function}: {name} must be whole numbers",
            exception_type=TypeError,
        )
