"""Traces as DOT, Mermaid, SVG and HTML, without any program to draw them."""

import html
import json
from collections.abc import Mapping
from typing import Any

from jaxpapers.papers.rejump.trace import (
    BACKTRACKING,
    CALCULATION,
    VERIFICATION,
    Trace,
    children,
    to_dict,
)

COLOURS = {CALCULATION: "#1f77b4", BACKTRACKING: "#d95f02", VERIFICATION: "#7b3fa0"}
RIGHT, WRONG, INNER = "#2a9d4a", "#c43c3c", "#9aa0a6"
ROW, INDENT, FONT = 18, 16, 12
MAX_LABEL = 44
# Mermaid's entities begin with # where HTML's have &.
MERMAID = str.maketrans(
    {"&": "#amp;", "<": "#lt;", ">": "#gt;", '"': "#quot;", "#": "#35;"}
)


def to_json(trace: Trace) -> str:
    """The reference's format as JSON."""
    return json.dumps(to_dict(trace), indent=1, ensure_ascii=False) + "\n"


def to_dot(trace: Trace) -> str:
    """A Graphviz graph: the tree, and the jumps that do not follow its edges."""
    lines = ["digraph trace {", '  node [shape=box, fontname="sans-serif"];']
    for node in trace.nodes:
        text = _quoted(f"{node.name}\n{_label(node, 200)}")
        lines.append(f'  {_quoted(node.name)} [label={text}, color="{_colour(node)}"];')
    for node in trace.nodes:
        if node.parent is not None:
            lines.append(f"  {_quoted(node.parent)} -> {_quoted(node.name)};")
    for number, step in _jumps(trace):
        lines.append(
            f"  {_quoted(step.source)} -> {_quoted(step.target)} [constraint=false, "
            f'style=dashed, label="{number}", color="{_step_colour(step)}"];'
        )
    return "\n".join([*lines, "}"]) + "\n"


def to_mermaid(trace: Trace) -> str:
    """A Mermaid flowchart: the tree, and the jumps that do not follow its edges."""
    ids = {node.name: f"n{i}" for i, node in enumerate(trace.nodes)}
    lines = ["flowchart TD"]
    for node in trace.nodes:
        text = " ".join(_label(node, 200).translate(MERMAID).split())
        lines.append(f'  {ids[node.name]}["{text}"]')
    for node in trace.nodes:
        if node.parent in ids:
            lines.append(f"  {ids[node.parent]} --> {ids[node.name]}")
    for number, step in _jumps(trace):
        if step.source in ids and step.target in ids:
            kind = step.category.partition("/")[0]
            lines.append(
                f'  {ids[step.source]} -. "{number} {kind}" .-> {ids[step.target]}'
            )
    return "\n".join(lines) + "\n"


def _jumps(trace: Trace):
    """Steps with their numbers, but derivations along the tree's edges."""
    edges = {(node.parent, node.name) for node in trace.nodes}
    for i, step in enumerate(trace.walk):
        known = step.category == CALCULATION and (step.source, step.target) in edges
        if not known:
            yield i + 1, step


def to_svg(trace: Trace, title: str = "") -> str:
    """The tree as an indented list and, beside it, the walk: a step to the right each.

    Node and walk share their lines, so that a jump is as high as the nodes are apart.
    """
    order, depth = _listing(trace)
    y = {name: 46 + ROW * i for i, name in enumerate(order)}
    nodes = {node.name: node for node in trace.nodes}
    labels = {name: _label(nodes[name], MAX_LABEL) for name in order}
    width = max(INDENT * depth[n] + 7 * len(labels[n]) for n in order) + 46
    steps = len(trace.walk)
    stride = max(4, min(14, 1200 // max(steps, 1)))
    right = width + 20 + stride * max(steps, 1)
    total = max(right + 20, 560)
    height = 46 + ROW * len(order) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" '
        f'viewBox="0 0 {total} {height}" font-family="sans-serif" font-size="{FONT}">',
        f'<rect width="{total}" height="{height}" fill="white"/>',
        _legend(title),
    ]
    for name in order:
        parts.append(
            f'<line x1="{width}" y1="{y[name]}" x2="{right}" y2="{y[name]}" '
            'stroke="#eeeeee"/>'
        )
    parts += _tree_parts(nodes, order, depth, y, labels)
    parts += _walk_parts(trace, y, width + 10, stride)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend(title: str) -> str:
    x, parts = 8, [f'<text x="8" y="14" font-weight="bold">{html.escape(title)}</text>']
    for category, colour in COLOURS.items():
        parts.append(
            f'<line x1="{x}" y1="27" x2="{x + 18}" y2="27" stroke="{colour}" '
            f'stroke-width="2"/><text x="{x + 23}" y="31">{category}</text>'
        )
        x += 40 + 7 * len(category)
    parts.append(
        f'<circle cx="{x}" cy="27" r="4" fill="{RIGHT}"/><text x="{x + 8}" y="31">right'
        f'</text><circle cx="{x + 54}" cy="27" r="4" fill="{WRONG}"/>'
        f'<text x="{x + 62}" y="31">wrong leaf</text>'
    )
    return "".join(parts)


def _tree_parts(
    nodes: Mapping, order: list, depth: Mapping, y: Mapping, labels: Mapping
):
    for name in order:
        node, x = nodes[name], 14 + INDENT * depth[name]
        if node.parent in y:
            above = x - INDENT
            yield (
                f'<path d="M{above} {y[node.parent] + 5} V{y[name]} H{x - 5}" '
                'fill="none" stroke="#c8ccd0"/>'
            )
        full = html.escape(f"{name}: {_label(node, 1000)}")
        yield (
            f'<g><title>{full}</title><circle cx="{x}" cy="{y[name]}" r="4" '
            f'fill="{_colour(node)}"/><text x="{x + 9}" y="{y[name] + 4}">'
            f"{html.escape(labels[name])}</text></g>"
        )


def _walk_parts(trace: Trace, y: Mapping, x: int, stride: int):
    here = trace.walk[0].source if trace.walk else ""
    for i, step in enumerate(trace.walk):
        if here in y and step.target in y:
            dash = "" if step.category == CALCULATION else ' stroke-dasharray="4 2"'
            text = html.escape(f"{i + 1}: {here} to {step.target}, {step.category}")
            yield (
                f'<line x1="{x + stride * i}" y1="{y[here]}" '
                f'x2="{x + stride * (i + 1)}" y2="{y[step.target]}" '
                f'stroke="{_step_colour(step)}" stroke-width="1.6"{dash}>'
                f"<title>{text}</title></line>"
            )
        here = step.target
        if here in y:
            node = next(n for n in trace.nodes if n.name == here)
            yield (
                f'<circle cx="{x + stride * (i + 1)}" cy="{y[here]}" r="2.4" '
                f'fill="{_colour(node)}"/>'
            )


def to_html(trace: Trace, title: str = "", numbers: Mapping[str, Any] = {}) -> str:  # noqa: B006
    """A page with the drawing, the metrics and every jump; no scripts, nothing to load.

    Args:
      trace: a trace.
      title: heading.
      numbers: metrics to show, name -> value; None: not defined.
    """
    problem = {node.name: node.problem for node in trace.nodes}

    def row(*cells: Any) -> str:
        return (
            "<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>"
        )

    def shown(value: Any) -> str:
        return "not defined" if value is None else f"{value:.4g}"

    metrics = "".join(row(k.replace("_", " "), shown(v)) for k, v in numbers.items())
    steps = "".join(
        row(i + 1, s.category, problem.get(s.source, s.source),
            problem.get(s.target, s.target))
        for i, s in enumerate(trace.walk)
    )  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>body{{font-family:sans-serif;"
        "margin:2em}td{padding:1px 10px 1px 0;vertical-align:top}</style></head><body>\n"
        f"<h1>{html.escape(title)}</h1>\n<table>{metrics}</table>\n"
        f'<div style="overflow-x:auto">{to_svg(trace)}</div>\n'
        f"<details><summary>{len(trace.walk)} jumps</summary><table>{steps}</table>"
        "</details>\n</body></html>\n"
    )


def _listing(trace: Trace) -> tuple[list[str], dict[str, int]]:
    """Reachable nodes, each before its children, and their depths."""
    below = children(trace)
    stack = [(node.name, 0) for node in trace.nodes if node.parent is None][:1]
    order, depth = [], {}
    while stack:
        name, level = stack.pop()
        order.append(name)
        depth[name] = level
        stack += [(child, level + 1) for child in reversed(below[name])]
    return order, depth


def _label(node: Any, limit: int) -> str:
    text = node.problem or node.name
    if node.result:
        text = f"{text} = {node.result}"
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _colour(node: Any) -> str:
    return INNER if node.correct is None else RIGHT if node.correct else WRONG


def _step_colour(step: Any) -> str:
    return COLOURS.get(step.category, INNER)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
