"""What each field of a config means: of option dataclasses, else of its comment.

Descriptions have one source, the code: the string below a dataclass's field, or the
comment after a key of a config file or of ``blocks``.
"""

import ast
import dataclasses
import inspect
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

from jaxpapers import blocks, options, papers
from jaxpapers.config import config_file, fields


class Field(NamedTuple):
    """A field of a config.

    Attributes:
      name: "group.field".
      value: its default.
      text: what it is, with its choices; "" where the code does not say.
      choices: its values, where there are a few.
    """

    name: str
    value: Any
    text: str
    choices: tuple = ()


def describe(name: str, config: Any, source: str | None = None) -> list[Field]:
    """All fields of a paper's config.

    Args:
      name: of the paper.
      config: of ``load_config``.
      source: the user's own config file; None: the package's.
    """
    papers.load(name)
    file = Path(source.partition(":")[0]) if source else config_file(name)
    called = set(re.findall(r"\bblocks\.(\w+)", file.read_text()))
    comments = {**_comments(Path(blocks.__file__), called), **_comments(file)}
    groups: dict[str, tuple] = {}
    described = []
    for path, value in fields(config):
        group, _, field = path.rpartition(".")
        if group not in groups:
            groups[group] = _texts(_group(config, group), group, name)
        texts, choices = groups[group]
        top = group.partition(".")[0]
        text = (
            texts.get(field)
            or comments.get((top, field))
            or comments.get(("", field))
            or blocks.FIELDS.get(field, "")
        )
        known = choices.get(field, ())
        described.append(Field(path, value, _with_choices(text, known), known))
    return described


def _group(config: Any, path: str) -> Any:
    for part in filter(None, path.split(".")):
        config = config[part]
    return config


def _texts(
    group: Any, where: str, paper: str
) -> tuple[dict[str, str], dict[str, tuple]]:
    """Texts and choices of a group's fields, of the dataclasses that are most like it."""
    keys = {k for k in group if not hasattr(group[k], "items")}
    texts: dict[str, str] = {}
    choices: dict[str, tuple] = {}
    top = where.rpartition(".")[2]
    for cls in sorted(_dataclasses(paper), key=lambda c: -_likeness(c, keys, top)):
        names = {f.name for f in dataclasses.fields(cls)}
        if len(names & keys) < 0.5 * len(keys):
            continue
        found = options.choices(cls, {k: group[k] for k in names & keys})
        for field, text in _of_dataclass(cls).items():
            if field not in texts:
                texts[field] = text
                if values := _values(text, cls):
                    choices[field] = values
        choices = {**found, **choices}
    return texts, choices


def _likeness(cls: type, keys: set[str], group: str) -> float:
    """Share of common fields; more where the class is of the group by its name."""
    names = {f.name for f in dataclasses.fields(cls)}
    named = cls.__name__.lower() == group or f".{group}." in f"{cls.__module__}."
    return len(names & keys) / max(len(names | keys), 1) + named


_ONE_OF = re.compile(r"([Oo]ne of) ([\w.]*\b[A-Z][A-Z_]+)\b")


def _values(text: str, cls: type) -> tuple:
    """Of the constant in a text "one of NAMES", that the module of its class knows."""
    found = _ONE_OF.search(text)
    if not found:
        return ()
    module, _, name = found[2].rpartition(".")
    path = f"jaxpapers.{module}" if module else cls.__module__
    values = getattr(sys.modules.get(path, sys.modules[cls.__module__]), name, ())
    return tuple(values) if all(isinstance(x, str) for x in values) else ()


def _with_choices(text: str, choices: tuple) -> str:
    """A text with a field's values: in place of the constant that holds them, or last."""
    if not choices:
        return text
    known = ", ".join(str(x) or "''" for x in choices)
    text, count = _ONE_OF.subn(rf"\1 {known}", text)
    return text if count else f"{text.rstrip('.')}; one of {known}".lstrip("; ")


def _dataclasses(paper: str) -> list[type]:
    """Option dataclasses of a paper's modules and of those that they use."""
    todo, modules = [f"jaxpapers.papers.{paper}"], {}
    while todo:
        name = todo.pop()
        module = sys.modules.get(name)
        if module is None or name in modules or not name.startswith("jaxpapers."):
            continue
        modules[name] = module
        todo += [
            value.__name__
            if inspect.ismodule(value)
            else getattr(value, "__module__", "")
            for value in vars(module).values()
        ]
        todo += [x for x in sys.modules if x.startswith(f"jaxpapers.papers.{paper}.")]
    found = [
        value
        for _, module in sorted(modules.items())
        for value in vars(module).values()
        if inspect.isclass(value)
        and dataclasses.is_dataclass(value)
        and "__post_init__" in dir(value)
    ]
    return list(dict.fromkeys(found))


def _of_dataclass(cls: type) -> dict[str, str]:
    """Field -> the string below it, or its line under ``Attributes:`` in the docstring.

    Of a class and of those that it derives from.
    """
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not owner.__module__.startswith("jaxpapers"):
            continue
        texts.update(_attributes(owner.__doc__ or ""))
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(node, ast.ClassDef)
        for one, below in zip(node.body, node.body[1:]):
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                if isinstance(below, ast.Expr) and isinstance(
                    below.value, ast.Constant
                ):
                    texts[one.target.id] = str(below.value.value)
    return {k: " ".join(v.split()).replace("``", "") for k, v in texts.items()}


def _attributes(doc: str) -> dict[str, str]:
    """The section ``Attributes:`` of a docstring."""
    _, _, section = inspect.cleandoc(doc).partition("\nAttributes:\n")
    section = section.partition("\n\n")[0]
    found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE)
    return dict(found)


def _comments(
    file: Path, names: Container[str] | None = None
) -> dict[tuple[str, str], str]:
    """(group, key) -> the comment after a key of a dict or an argument of a call.

    The group is "" where the file does not say it. ``names``: of functions and constants
    of the file, to read these alone; None: all of it.
    """
    text = file.read_text()
    after: dict[int, str] = {}
    begun = {}  # Line -> that of the key, of comments that go on there.
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, words = token.start[0], token.string.removeprefix("#").strip()
        if token.line.strip() != token.string:
            after[line] = words
            begun[line + 1] = line
        elif line in begun and after[begun[line]].endswith((",", ":", ";")):
            after[begun[line]] += f" {words}"
            begun[line + 1] = begun[line]
    found: dict[tuple[str, str], str] = {}

    def visit(node: ast.AST, group: str) -> None:
        pairs: list[tuple[str, ast.AST]] = []
        if isinstance(node, ast.Dict):
            pairs = [
                (key.value, value)
                for key, value in zip(node.keys, node.values)
                if isinstance(key, ast.Constant) and isinstance(key.value, str)
            ]
        elif isinstance(node, ast.Call):
            pairs = [(k.arg, k.value) for k in node.keywords if k.arg]
        inside = {id(value) for _, value in pairs}
        for key, value in pairs:
            comment = after.get(getattr(value, "end_lineno", 0))
            if comment and not isinstance(value, ast.Dict):
                found.setdefault((group, key), comment)
            visit(value, group or key)
        for child in ast.iter_child_nodes(node):
            if id(child) not in inside:
                visit(child, group)

    for node in ast.parse(text).body:
        targets = getattr(node, "targets", [])
        own = {getattr(node, "name", "")} | {getattr(x, "id", "") for x in targets}
        if names is None or any(x in names for x in own):
            visit(node, "")
    return found
