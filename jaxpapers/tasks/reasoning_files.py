"""The user's own reasoning traces: read, extracted where they are text, and drawn."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.data import chat, files, replies
from jaxpapers.papers import rejump
from jaxpapers.papers.rejump import extraction
from jaxpapers.study import Data, Finding, Row, Study, Table

MAX_BYTES, MAX_TRACES = 1 << 26, 1000
# Traces whose similarities are tabulated.
COMPARED = 12


class Item(NamedTuple):
    """A trace, or a text that still has to become one.

    Attributes:
      label: file, and number in it.
      trace: None for a text.
      text, problem, answer: of a text.
      issues: what is wrong with the trace, where that is tolerated.
    """

    label: str
    trace: Any = None
    text: str = ""
    problem: str = ""
    answer: str | None = None
    issues: tuple = ()


def read(config: Any) -> Data:
    """Traces of ``data.path``; fact ``items``.

    A file is JSON: a trace (``rejump.parse_trace``), a text
    ``{"text", "problem", "answer"}``, a list of them or ``{"traces": [...]}``; or it is a
    text itself (``.txt``, ``.md``).

    Raises:
      ValueError: a bad file, with its name; a text without a model to read it.
      FileNotFoundError: no such file.
    """
    items: list[Item] = []
    for path in config.data.path:
        items += _items(path, config.data.strict)
    if len(items) > MAX_TRACES:
        raise ValueError(f"{len(items):,} traces, expected at most {MAX_TRACES:,}")
    labels = [item.label for item in items]
    if len(set(labels)) < len(labels):
        double = next(label for label in labels if labels.count(label) > 1)
        raise ValueError(f"two traces are called {double}; rename a file")
    texts = [item for item in items if item.trace is None]
    summary = f"{len(items):,} traces"
    odd = sum(bool(item.issues) for item in items)
    if odd:
        summary += f", {odd:,} of them not sound"
    if texts:
        client = make_chat(config)
        requests = [
            (
                extraction.tree_request(x.problem, x.text, config.chat.kind),
                extraction.TREE_SCHEMA,
            )
            for x in texts
        ]
        usage = client.estimate(requests)
        summary += (
            f"; {len(texts):,} texts for {config.chat.model}, at first "
            f"{usage.text(config.chat.price)} (an estimate; walks cost as much again)"
        )
    return Data(None, {}, facts={"items": items}, summary=summary)


def _items(path: str, strict: bool) -> list[Item]:
    try:
        content = files.read(path, most=MAX_BYTES).decode()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: no UTF-8 at byte {e.start}") from None
    file = Path(path)
    name = file.stem
    if file.suffix.lower() in (".txt", ".md"):
        return [_text(name, {"text": content}, path)]
    try:
        value = replies.loads(content)
    except ValueError as e:
        raise ValueError(
            f"{path}: no JSON ({e}); texts are .txt or .md files"
        ) from None
    if isinstance(value, Mapping) and isinstance(value.get("traces"), list):
        value = value["traces"]
    if not isinstance(value, list):
        return [_item(name, value, path, strict)]
    if not value:
        raise ValueError(f"{path}: no traces")
    return [_item(f"{name} {i + 1}", x, path, strict) for i, x in enumerate(value)]


def _item(label: str, value: Any, path: str, strict: bool) -> Item:
    if isinstance(value, Mapping) and "tree" not in value and "text" in value:
        return _text(label, value, path)
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{path}: trace {label}: bad shape: expected an object with tree and walk"
        )
    try:
        trace = rejump.parse_trace(value, strict=strict)
    except rejump.TraceError as e:
        hint = ""
        if strict and all(kind in rejump.TOLERABLE for kind, _ in e.issues):
            hint = "; --config.data.strict=False measures it all the same"
        raise ValueError(f"{path}: trace {label}: {e}{hint}") from None
    return Item(label, _labelled(trace), issues=tuple(rejump.validate(trace)))


def _labelled(trace: Any) -> Any:
    """Answers of the Game of 24 are computed where nobody has judged them."""
    inner = {node.parent for node in trace.nodes}
    if all(node.correct is None for node in trace.nodes if node.name not in inner):
        root = next(node for node in trace.nodes if node.parent is None)
        parts = [part.strip() for part in root.problem.split(",")]
        if len(parts) == 4 and all(part.isdecimal() for part in parts):
            return rejump.label(trace)._replace(correct=trace.correct)
    return trace


def _text(label: str, value: Mapping, path: str) -> Item:
    fields = [value.get(k) for k in ("text", "problem", "answer")]
    if (
        not all(isinstance(x, str | None) for x in fields)
        or not (fields[0] or "").strip()
    ):
        raise ValueError(
            f"{path}: {label}: text, problem, answer must be texts, the text not blank"
        )
    text, problem, answer = fields
    assert text is not None
    if rejump.is_search_text(text):
        try:
            return Item(label, rejump.read(text))
        except ValueError as e:
            raise ValueError(f"{path}: {label}: {e}") from None
    if len(text) > extraction.MAX_CHARACTERS:
        raise ValueError(
            f"{path}: {label}: the text has {len(text):,} characters, expected at most "
            f"{extraction.MAX_CHARACTERS:,}"
        )
    return Item(label, None, text, problem or "", answer)


def make_chat(config: Any) -> chat.Chat:
    """The model of ``config.chat``.

    Raises:
      ValueError: none is named, or a bad value.
    """
    c = config.chat
    if not c.model:
        raise ValueError(
            "a text needs a language model to become a trace: set --config.chat.model "
            "(and chat.url, chat.key: see docs/reasoning_traces.md)"
        )
    if c.kind not in extraction.TASKS:
        raise ValueError(f"chat.kind must be one of {extraction.TASKS}, got {c.kind!r}")
    if c.model == "local":
        from jaxpapers.tasks import local_model

        provider: Any = local_model.provider(c.max_tokens)
    else:
        provider = chat.Endpoint(
            model=c.model, url=c.url, key=c.key, max_tokens=c.max_tokens,
            retries=c.retries,
        )  # fmt: skip
    return chat.Chat(
        provider, cache=c.cache or None, recorded=c.recorded, repairs=c.repairs,
        budget=c.budget,
    )  # fmt: skip


class _Read(NamedTuple):
    traces: Mapping[str, Any]
    failed: Mapping[str, str]
    usage: str


def _extracted(config: Any, items: Sequence[Item]) -> _Read:
    """All traces; texts whose replies never passed their checks are left out, by name."""
    traces = {x.label: x.trace for x in items if x.trace is not None}
    texts = [x for x in items if x.trace is None]
    if not texts:
        return _Read(traces, {}, "")
    client = make_chat(config)

    def one(item: Item):
        return rejump.extract(
            client.structured, item.problem, item.text, config.chat.kind, item.answer
        )

    found = chat.every(one, texts, config.chat.workers)
    failed = {}
    for item, result in zip(texts, found):
        if isinstance(result, chat.BadReply):
            failed[item.label] = str(result)
        else:
            traces[item.label] = result
    return _Read(traces, failed, client.usage.text(config.chat.price))


def study(config: Any, data: Data, mesh: Any) -> Study:
    """A row for each trace, with its metrics and drawings."""
    from jaxpapers.tasks.reasoning import drawings

    items: Sequence[Item] = data.facts["items"]

    @functools.cache
    def result():
        found = _extracted(config, items)
        if not found.traces:
            reasons = "; ".join(f"{k}: {v}" for k, v in found.failed.items())
            raise ValueError(f"no text became a trace: {reasons}")
        labels = list(found.traces)
        measures = rejump.measure(
            list(found.traces.values()), mesh, config.method.order
        )
        return found, labels, measures

    def measure(i):
        found, labels, measures = result()
        label = items[i].label
        tables = _tables(items, found, labels, measures, mesh) if i == 0 else ()
        if label not in found.traces:
            return Finding({}, tables)
        place = labels.index(label)
        values, trace = measures.of(place), found.traces[label]
        numbers = {k: v for k, v in values.items() if v is not None}
        numbers["no_calculation_edge"] = float(measures.no_calculation_edge[place])
        numbers |= {"nodes": len(trace.nodes), "steps": len(trace.walk)}
        return Finding(numbers, tables, files=drawings(trace, label, values))

    return Study(
        title="jump distance of traces",
        metric="jump_distance",
        rising=True,
        rows=lambda seed: [
            Row(x.label, None, functools.partial(measure, i))
            for i, x in enumerate(items)
        ],
        columns=(*(n for n in rejump.NAMES if n != "jump_distance"),
                 "no_calculation_edge", "nodes", "steps"),
    )  # fmt: skip


def _tables(items, found, labels, measures, mesh) -> list[Table]:
    whole = int(measures.whole.sum())
    title = f"means over the {whole} of {len(labels)} traces with every metric"
    tables = [Table(title, ("metric", "mean"), list(measures.means().items()))]
    few = labels[:COMPARED]
    if len(few) > 1:
        pairs = [(a, b) for i, a in enumerate(few) for b in few[i + 1 :]]
        a, b = ([found.traces[p[k]] for p in pairs] for k in (0, 1))
        trees, walks = rejump.similarities(a, b, mesh, strict=False)
        rows = [
            (a, b, "too large" if np.isnan(t) else float(t), float(w))
            for (a, b), t, w in zip(pairs, np.asarray(trees), walks)
        ]
        title = "similarities" + (f" of the first {COMPARED}" if few != labels else "")
        tables.append(Table(title, ("trace", "trace", "trees", "walks"), rows))
    issues = [(x.label, issue.kind, issue.message) for x in items for issue in x.issues]
    if issues:
        columns = ("trace", "issue", "where")
        tables.append(Table("traces that are not sound", columns, issues[:50]))
    if found.failed:
        rows = list(found.failed.items())
        tables.append(Table("texts that became no trace", ("text", "reason"), rows))
    if found.usage:
        tables.append(Table("language model", ("usage",), [(found.usage,)]))
    return tables
