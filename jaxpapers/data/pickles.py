"""Pickles of plain data, read without Python's unpickler.

A pickle is a program: it can call anything importable, write into any object and ask for
any amount of memory. ``load`` runs none of it. It knows the instructions that build
numbers, texts and containers, and those of NumPy's arrays, which it rebuilds itself from
their bytes; every other instruction or name is refused.
"""

import codecs
import io
import math
import pickletools
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from jaxpapers.data import files

MAX_BYTES = 1 << 28
MAX_STEPS = 1 << 23
"""Instructions of a file: each makes at most an empty container, of 64 bytes."""

ARRAYS = ("uint8", "int32", "int64", "float32", "float64")
"""Types of arrays that data sets have."""

_INSTRUCTIONS = {code.code: code for code in pickletools.opcodes}


def load(
    path: str | Path,
    *,
    allowed: Collection[str] = (),
    encoding: str = "ASCII",
    max_bytes: int = MAX_BYTES,
) -> Any:
    """The object in a pickle file: numbers, texts, lists, tuples, dicts, arrays.

    Args:
      path: of the file.
      allowed: names of the dtypes that arrays may have, e.g. ``ARRAYS``; (): no arrays.
      encoding: of Python 2's strings; "bytes" leaves them as bytes.
      max_bytes: size of the largest file that is read.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a larger file; a pickle that names anything else, is cut off, or has
        more than ``MAX_STEPS`` instructions.
    """
    path, size = files.check(path)
    if size > max_bytes:
        raise ValueError(f"{path}: {size:,} bytes, more than the {max_bytes:,} allowed")
    data, place = io.BytesIO(files.read(path, most=max_bytes)), 0
    machine = _Machine(tuple(allowed), encoding)
    try:
        for _ in range(MAX_STEPS):
            place = data.tell()
            name, argument = _instruction(data)
            if name == "STOP":
                return _data(machine.pop())
            machine.run(name, argument)
        raise ValueError(f"more than {MAX_STEPS:,} instructions")
    except (ValueError, LookupError, OverflowError) as e:
        reason = f"an instruction without its values ({e!r})"
        reason = reason if isinstance(e, LookupError) else e
        raise ValueError(
            f"{path}: not a pickle of plain data: {reason} (byte {place:,})"
        ) from e


def _instruction(data: io.BytesIO) -> tuple[str, Any]:
    """The next instruction's name and its argument (ValueError)."""
    code = data.read(1)
    if not code:
        raise ValueError("cut off")
    known = _INSTRUCTIONS.get(code.decode("latin-1"))
    if known is None:
        raise ValueError(f"unknown instruction {code!r}")
    if known.name == "STRING":  # pickletools' reader takes ASCII only.
        text: Any = pickletools.read_stringnl(data, decode=False, stripquotes=True)
        return known.name, _unescaped(text)
    return known.name, known.arg.reader(data) if known.arg is not None else None


def _unescaped(text: bytes) -> str:
    """Bytes that Python 2 wrote with escapes, as latin-1 (ValueError)."""
    if b"\\" in text:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Escapes that are none stay as they are.
            text = codecs.escape_decode(text)[0]
    return text.decode("latin-1")


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Name:
    """A function that the pickle asks for: nothing but its name."""

    def __init__(self, name: str):
        self.name = name


class _Dtype:
    """A dtype of numbers; its pickled state can change the byte order alone."""

    def __init__(self, code: Any, allowed: Collection[str]):
        code = code.decode("latin-1") if isinstance(code, bytes) else code
        known = {np.dtype(name).str[1:]: name for name in allowed}
        if not isinstance(code, str) or code.removeprefix("<") not in known:
            kind = "object" if _short(code).startswith("O") else _short(code)
            raise ValueError(
                f"arrays of {kind} are not allowed, of {', '.join(allowed)} only"
            )
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        plain = isinstance(state, tuple) and len(state) == 8
        order = state[1] if plain else None
        order = order.decode("latin-1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "|", "=") or state[2:5] != (None, None, None):
            raise ValueError("a dtype with fields or other extras is not allowed")
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """An array, whose state is its shape, dtype and bytes."""

    def __init__(self):
        self.value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("an array without shape, dtype, order and bytes")
        _, shape, kind, fortran, content = state
        self.value = _array(content, kind, shape, "F" if fortran else "C")


class _Machine:
    """Stack and memo of a pickle, and what its instructions do to them."""

    def __init__(self, allowed: Collection[str], encoding: str):
        self.stack: list = []
        self.memo: dict[int, Any] = {}
        self.allowed, self.encoding = allowed, encoding
        self.actions: dict[str, Callable[[], Any]] = {
            "MARK": lambda: self.stack.append(_MARK),
            "POP": self.stack.pop,
            "MEMOIZE": lambda: self.put(len(self.memo)),
            "EMPTY_LIST": lambda: self.stack.append([]),
            "EMPTY_DICT": lambda: self.stack.append({}),
            "LIST": lambda: self.stack.append(self.marked()),
            "DICT": lambda: self.stack.append(self.pairs({}, self.marked())),
            "TUPLE": lambda: self.stack.append(tuple(self.marked())),
            "APPEND": lambda: self.extend([self.pop()]),
            "APPENDS": lambda: self.extend(self.marked()),
            "SETITEM": lambda: self.update([self.pop(), self.pop()][::-1]),
            "SETITEMS": lambda: self.update(self.marked()),
            "STACK_GLOBAL": lambda: self.name(*[self.pop(), self.pop()][::-1]),
            "REDUCE": self.call,
            "BUILD": self.build,
        }

    def run(self, name: str, argument: Any) -> None:
        """Runs an instruction (ValueError, IndexError, KeyError: it cannot be)."""
        if name in self.actions:
            self.actions[name]()
        elif name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _STRINGS:
            raw = argument.encode("latin-1")
            text = raw if self.encoding == "bytes" else raw.decode(self.encoding)
            self.stack.append(text)
        elif name in _PUTS:
            self.put(argument)
        elif name in _GETS:
            self.stack.append(self.memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            self.stack.append(tuple(self.pop() for _ in range(count))[::-1])
        elif name == "GLOBAL":
            self.name(*argument.split(" ", 1))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the instruction {name} is not allowed")

    def pop(self) -> Any:
        """The last value, an array where it stands for one."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark instead of a value")
        if isinstance(value, _Array):
            if value.value is None:
                raise ValueError("an array without its values")
            return value.value
        return value

    def marked(self) -> list:
        """The values after the last mark."""
        values = []
        while self.stack[-1] is not _MARK:
            values.append(self.pop())
        self.stack.pop()
        return values[::-1]

    def put(self, slot: int) -> None:
        """Remembers the last value."""
        if not 0 <= slot <= MAX_STEPS:
            raise ValueError(f"memo slot {slot} of at most {MAX_STEPS:,}")
        self.memo[slot] = self.stack[-1]

    def extend(self, values: list) -> None:
        """Appends to the list that is last."""
        _last(self.stack, list).extend(map(_data, values))

    def update(self, values: list) -> None:
        """Sets items of the dict that is last."""
        self.pairs(_last(self.stack, dict), values)

    def pairs(self, target: dict, values: list) -> dict:
        """Sets items; keys are texts, bytes or numbers, whose hashes take no time."""
        if len(values) % 2:
            raise ValueError("a dict with a key without a value")
        for key, value in zip(values[::2], values[1::2]):
            if not isinstance(key, str | bytes | int | float):
                raise ValueError(f"a key of a dict is {type(key).__name__}")
            target[key] = _data(value)
        return target

    def name(self, module: Any, function: Any) -> None:
        """Pushes a name, if arrays are made of it."""
        name = f"{_short(module)}.{_short(function)}"
        if name.replace("._core.", ".core.") not in _NAMES or not self.allowed:
            raise ValueError(f"it asks for {name}, which is not allowed")
        self.stack.append(_Name(_NAMES[name.replace("._core.", ".core.")]))

    def call(self) -> None:
        """Does what the function of a name does, if its arguments are as expected."""
        arguments, function = self.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of something else than a function")
        if function.name == "reconstruct":
            self.stack.append(_Array())
        elif function.name == "dtype" and arguments:
            self.stack.append(_Dtype(arguments[0], self.allowed))
        elif function.name == "encode" and len(arguments) == 2:
            text, codec = arguments
            if codec != "latin1":  # Others can multiply sizes.
                raise ValueError(f"the codec {_short(codec)!r} is not allowed")
            if not isinstance(text, str):
                raise ValueError("only texts are encoded")
            self.stack.append(text.encode("latin1"))
        elif function.name == "bytes" and not arguments:  # Protocol 2's empty ones.
            self.stack.append(b"")
        elif function.name == "frombuffer" and len(arguments) == 4:
            self.stack.append(_array(*arguments))
        else:
            raise ValueError(f"{function.name} is not allowed to be called so")

    def build(self) -> None:
        """Gives the last value its state."""
        state = self.pop()
        target = self.stack[-1]
        if not isinstance(target, _Array | _Dtype):
            raise ValueError(f"a state of {type(target).__name__} is not allowed")
        target.build(state)


_NAMES = {
    "numpy.core.multiarray._reconstruct": "reconstruct",
    "numpy.core.numeric._frombuffer": "frombuffer",
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
    "__builtin__.bytes": "bytes",
}


def _array(content: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    """An array of bytes (ValueError: a shape of another size)."""
    dtype = kind.dtype if isinstance(kind, _Dtype) else None
    fits = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if dtype is None or not fits or not isinstance(content, bytes | bytearray):
        raise ValueError("an array without shape, dtype and bytes")
    if order not in ("C", "F") or len(shape) > 8:
        raise ValueError(f"an array of {len(shape)} dimensions, order {_short(order)}")
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"{len(content):,} bytes for an array of shape {shape!r:.60}")
    return np.frombuffer(content, dtype).reshape(shape, order=order).copy()


def _data(value: Any) -> Any:
    """A value that is none of the arguments of which arrays are made (ValueError)."""
    if isinstance(value, _Name | _Dtype):
        raise ValueError("a function or a dtype instead of a value")
    return value


def _last(stack: list, kind: type) -> Any:
    if not isinstance(stack[-1], kind):
        raise ValueError(f"expected a {kind.__name__}, got {type(stack[-1]).__name__}")
    return stack[-1]


def _short(value: Any) -> str:
    """A text for an error; others by their type: they can be of any depth."""
    return value[:60] if isinstance(value, str) else f"({type(value).__name__})"
