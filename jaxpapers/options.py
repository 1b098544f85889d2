"""Hyper-parameters as frozen dataclasses: built from a config group, and checked.

A paper keeps its hyper-parameters beside its code, with the paper's values as defaults::

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Net:
        item_vocab: int
        item_dim: int = 64
        pooling: str = "attention"

        def __post_init__(self):
            check_least(self, "net", item_dim=1)
            check_choices(self, "net", pooling=("attention", "mean"))

A config gives the same fields to change: ``dataclasses.asdict(Net(item_vocab=100))`` is a
config group, and ``from_config(Net, config.net, "net")`` the instance. Names in errors
are those of the config, ``net.item_dim``.
"""

import contextvars
import dataclasses
import difflib
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def from_config(cls: type[T], group: Any, where: str) -> T:
    """The dataclass of a config group.

    A field whose type is a dataclass, or a dataclass or None, is built from a nested
    group. Lists, which is what JSON makes of tuples, become tuples.

    Args:
      cls: a dataclass.
      group: a ``ConfigDict`` or another mapping of field names.
      where: path of the group in the config, for errors.

    Raises:
      ValueError: a field that ``cls`` does not have, or one that it needs is missing; and
        what ``cls`` itself refuses.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Net:
      ...     width: int
      ...     hidden: tuple[int, ...] = (80, 40)
      >>> from_config(Net, {"width": 4, "hidden": [8]}, "net")
      Net(width=4, hidden=(8,))
      >>> from_config(Net, {"widht": 4}, "net")
      Traceback (most recent call last):
      ValueError: unknown field net.widht; did you mean net.width?
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    values = dict(group.items())
    for name in values:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {where}.{near[0]}?" if near else f"has {[*fields]}"
            raise ValueError(f"unknown field {where}.{name}; {hint}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}.{name} is missing; got {sorted(values)}")
    kinds = typing.get_type_hints(cls)
    return cls(**{n: _field(kinds[n], v, f"{where}.{n}") for n, v in values.items()})


def _field(kind: Any, value: Any, where: str) -> Any:
    """A field's value as its type asks for."""
    inner = next((k for k in (kind, *typing.get_args(kind))
                  if dataclasses.is_dataclass(k)), None)  # fmt: skip
    if inner and hasattr(value, "items"):
        return from_config(typing.cast(type, inner), value, where)
    if isinstance(value, list):
        value = tuple(value)
    if not _is_of(kind, value):
        name = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(f"{where} must be of type {name}, got {value!r}")
    return value


_PLAIN = (bool, int, float, str, type(None))


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value is of a type of plain values; others are not checked."""
    if typing.get_origin(kind) is tuple:
        each, *rest = typing.get_args(kind) or (Any,)
        if not isinstance(value, tuple):
            return False
        return rest != [...] or all(_is_of(each, x) for x in value)
    if typing.get_args(kind):
        parts = typing.get_args(kind)
        plain = all(k in _PLAIN or typing.get_origin(k) is tuple for k in parts)
        return not plain or any(_is_of(k, value) for k in parts)
    if kind not in _PLAIN:
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


_recorded: contextvars.ContextVar[dict] = contextvars.ContextVar("recorded")


def choices(cls: type, group: Any) -> dict[str, tuple]:
    """Field -> its values, as a dataclass checks them for the values of a config group.

    Example:
      >>> @dataclasses.dataclass
      ... class Net:
      ...     pooling: str = "mean"
      ...     def __post_init__(self):
      ...         check_choices(self, "net", pooling=("attention", "mean"))
      >>> choices(Net, {})
      {'pooling': ('attention', 'mean')}
    """
    found: dict[str, tuple] = {}
    token = _recorded.set(found)
    try:
        from_config(cls, group, "")
    except (TypeError, ValueError):
        pass  # A class that lacks the others' fields has checked some.
    finally:
        _recorded.reset(token)
    return found


def check_choices(options: Any, where: str, **choices: tuple) -> None:
    """Checks fields that have a few values.

    Args:
      options: the dataclass.
      where: path of its config group.
      choices: field -> its values.

    Raises:
      ValueError: a field with another value.
    """
    _recorded.get({}).update(choices)
    for name, known in choices.items():
        value = getattr(options, name)
        if value not in known:
            raise ValueError(f"{where}.{name} must be one of {known}, got {value!r}")


def check_least(options: Any, where: str, **least: int | float) -> None:
    """Checks numbers, or tuples of numbers, against their least value.

    Args:
      options: the dataclass.
      where: path of its config group.
      least: field -> its least value.

    Raises:
      ValueError: a field below it, or not a number (NaN).
    """
    for name, low in least.items():
        value = getattr(options, name)
        each = value if isinstance(value, tuple) else (value,)
        if not all(x >= low for x in each):
            raise ValueError(f"{where}.{name} must be >= {low}, got {value}")


def check_positive(options: Any, where: str, *names: str) -> None:
    """Checks numbers that must be above 0.

    Raises:
      ValueError: a field that is 0, negative or NaN.
    """
    for name in names:
        value = getattr(options, name)
        if not value > 0:
            raise ValueError(f"{where}.{name} must be > 0, got {value}")
