"""Traces: a tree of intermediate steps and the walk over it, and what may be wrong."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

CALCULATION, VERIFICATION, BACKTRACKING = CATEGORIES = (
    "calculation/derivation", "verification", "backtracking",
)  # fmt: skip
ROOT = "node1"
MAX_NODES, MAX_STEPS = 2000, 50_000

# Kinds of issues. Without a tree no metric is defined:
EMPTY_TREE, BAD_SHAPE, NO_PARENT = "empty tree", "bad shape", "no parent"
UNKNOWN_PARENT, NO_ROOT, TWO_ROOTS = "unknown parent", "no root", "two roots"
TOO_LARGE = "too large"
FATAL = (
    EMPTY_TREE, BAD_SHAPE, NO_PARENT, UNKNOWN_PARENT, NO_ROOT, TWO_ROOTS, TOO_LARGE,
)  # fmt: skip
# Of a tree and a walk that can be measured all the same, as the reference does:
CYCLE, UNKNOWN_CATEGORY, UNKNOWN_NODE, WRONG_START, BROKEN_WALK = TOLERABLE = (
    "cycle", "unknown category", "walk node not in tree", "walk does not start at root",
    "broken walk",
)  # fmt: skip


class Issue(NamedTuple):
    """One thing that is wrong with a trace: its kind, one of those above, and where."""

    kind: str
    message: str


class TraceError(ValueError):
    """A trace that is refused; ``issues`` has everything that is wrong with it."""

    def __init__(self, issues: Sequence[Issue], name: str = ""):
        self.issues = tuple(issues)
        text = "; ".join(f"{kind}: {message}" for kind, message in self.issues[:5])
        more = len(self.issues) - 5
        text += f"; and {more} more" if more > 0 else ""
        super().__init__(f"{name}: {text}" if name else text)


class Node(NamedTuple):
    """A node of the tree.

    Attributes:
      name: its id.
      problem: what is to be done there, or is left to combine.
      parent: id; None for the root.
      result: value found there, of a leaf the answer.
      correct: whether that is the answer; None: not known.
    """

    name: str
    problem: str
    parent: str | None
    result: str | None = None
    correct: bool | None = None


class Step(NamedTuple):
    """A jump of the walk: ids and category."""

    source: str
    target: str
    category: str


class Trace(NamedTuple):
    """A reasoning trace.

    Attributes:
      nodes: in order of the tree, which is that of siblings.
      walk: its jumps.
      correct: whether the final answer is right; None: not known.
    """

    nodes: tuple[Node, ...]
    walk: tuple[Step, ...]
    correct: bool | None = None


def parse_trace(
    source: str | Mapping[str, Any], *, strict: bool = True, limit: int = MAX_NODES
) -> Trace:
    """A trace of the reference's format.

    ``{"tree": {id: {"Problem", "parent", "Result"}}, "walk": [{"from", "to",
    "category"}], "corr": 0 | 1}``; the root's parent is "none" or null.
    Correctness of leaves is ``match_corr`` of their nodes, or ``leaf_correct``, id ->
    bool, where a leaf that is not named is wrong: an attempt without an answer. Steps
    from "none", with which walks of the MATH extractor begin, are dropped.

    Args:
      source: that value, or its JSON.
      strict: refuse every issue; otherwise those of ``FATAL`` only.
      limit: most nodes.

    Raises:
      TraceError: with all issues.
    """
    if isinstance(source, str):
        try:
            source = json.loads(source, object_pairs_hook=_unique)
        except RecursionError:
            raise TraceError(
                [Issue(BAD_SHAPE, "the JSON is nested too deep")]
            ) from None
        except ValueError as e:
            raise TraceError([Issue(BAD_SHAPE, f"no JSON: {e}")]) from None
    issues = _shape(source, limit)
    if issues:
        raise TraceError(issues)
    assert isinstance(source, Mapping)
    labels = source.get("leaf_correct")
    inner = {fields["parent"] for fields in source["tree"].values()}
    nodes = []
    for name, fields in source["tree"].items():
        parent = fields["parent"]
        correct = fields.get("match_corr")
        if labels is not None and name not in inner:
            correct = labels.get(name, False)
        nodes.append(
            Node(
                name,
                fields.get("Problem") or "",
                None if parent is None or parent.lower() == "none" else parent,
                None if fields.get("Result") is None else str(fields["Result"]),
                None if correct is None else bool(correct),
            )
        )
    walk = tuple(
        Step(s["from"], s["to"], s["category"])
        for s in source["walk"]
        if s["from"] is not None and s["from"] != "none"
    )
    corr = source.get("corr")
    trace = Trace(tuple(nodes), walk, None if corr is None else bool(corr))
    issues = validate(trace)
    if issues and (strict or any(kind in FATAL for kind, _ in issues)):
        raise TraceError(issues)
    return trace


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double!r} occurs twice")
    return dict(pairs)


def _shape(source: Any, limit: int) -> list[Issue]:
    """What keeps a value from being read as a trace at all."""
    if not isinstance(source, Mapping) or not {"tree", "walk"} <= set(source):
        return [Issue(BAD_SHAPE, "expected an object with tree and walk")]
    tree, walk, issues = source["tree"], source["walk"], []
    if not isinstance(tree, Mapping):
        return [Issue(BAD_SHAPE, f"tree must be an object, got {_kind(tree)}")]
    if not isinstance(walk, Sequence) or isinstance(walk, str):
        return [Issue(BAD_SHAPE, f"walk must be a list, got {_kind(walk)}")]
    if not tree:
        return [Issue(EMPTY_TREE, "it has no node")]
    if len(tree) > limit:
        return [Issue(TOO_LARGE, f"{len(tree):,} nodes, expected at most {limit:,}")]
    if len(walk) > MAX_STEPS:
        return [
            Issue(TOO_LARGE, f"{len(walk):,} steps, expected at most {MAX_STEPS:,}")
        ]
    for name, fields in tree.items():
        if not isinstance(fields, Mapping):
            issues.append(Issue(BAD_SHAPE, f"{name} must be an object"))
        elif "parent" not in fields:
            issues.append(Issue(NO_PARENT, f"{name} has no parent"))
        elif not isinstance(fields["parent"], str | None):
            issues.append(Issue(BAD_SHAPE, f"the parent of {name} must be an id"))
        elif not isinstance(fields.get("Problem"), str | None):
            issues.append(Issue(BAD_SHAPE, f"Problem of {name} must be a text"))
        elif not _is_label(fields.get("match_corr")):
            issues.append(Issue(BAD_SHAPE, f"match_corr of {name} must be 0 or 1"))
    for i, step in enumerate(walk):
        if not isinstance(step, Mapping) or not {"from", "to", "category"} <= set(step):
            issues.append(Issue(BAD_SHAPE, f"step {i} needs from, to and category"))
        elif not all(isinstance(step[k], str) for k in ("to", "category")) or not (
            isinstance(step["from"], str | None)
        ):
            issues.append(Issue(BAD_SHAPE, f"step {i} must have texts"))
    labels = source.get("leaf_correct") or {}
    if not isinstance(labels, Mapping) or not all(map(_is_label, labels.values())):
        issues.append(Issue(BAD_SHAPE, "leaf_correct must map ids to 0 or 1"))
    if not _is_label(source.get("corr")):
        issues.append(Issue(BAD_SHAPE, f"corr must be 0 or 1, got {source['corr']!r}"))
    return issues


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _is_label(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float) and value in (0, 1))


def validate(trace: Trace) -> list[Issue]:
    """Everything that is wrong with a trace; [] for a sound one."""
    names = [node.name for node in trace.nodes]
    if not names:
        return [Issue(EMPTY_TREE, "it has no node")]
    known, issues = set(names), []
    if len(known) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        issues.append(Issue(BAD_SHAPE, f"two nodes are called {double}"))
    roots = [node.name for node in trace.nodes if node.parent is None]
    if not roots:
        issues.append(Issue(NO_ROOT, "every node has a parent"))
    if len(roots) > 1:
        issues.append(Issue(TWO_ROOTS, ", ".join(roots)))
    for node in trace.nodes:
        if node.parent is not None and node.parent not in known:
            issues.append(
                Issue(UNKNOWN_PARENT, f"{node.name} has the parent {node.parent}")
            )
    if not issues:
        left = known - set(depths(trace))
        if left:
            text = f"{', '.join(sorted(left)[:5])} cannot be reached from {roots[0]}"
            issues.append(Issue(CYCLE, text))
    return issues + _walk_issues(trace, known, roots)


def _walk_issues(trace: Trace, known: set[str], roots: list[str]) -> list[Issue]:
    issues, walk = [], trace.walk
    for i, step in enumerate(walk):
        if step.category not in CATEGORIES:
            issues.append(
                Issue(UNKNOWN_CATEGORY, f"step {i} has {step.category!r}, expected one "
                      f"of {', '.join(CATEGORIES)}")
            )  # fmt: skip
        for name in {step.source, step.target} - known:
            issues.append(Issue(UNKNOWN_NODE, f"step {i} names {name}"))
        if i and step.source != walk[i - 1].target:
            text = f"step {i} starts at {step.source}, {walk[i - 1].target} was reached"
            issues.append(Issue(BROKEN_WALK, text))
    if walk and roots and walk[0].source != roots[0]:
        text = f"it starts at {walk[0].source}, the root is {roots[0]}"
        issues.append(Issue(WRONG_START, text))
    return issues


def children(trace: Trace) -> dict[str, list[str]]:
    """Id -> ids of its children, in order of the tree."""
    below: dict[str, list[str]] = {node.name: [] for node in trace.nodes}
    for node in trace.nodes:
        if node.parent is not None:
            below[node.parent].append(node.name)
    return below


def depths(trace: Trace) -> dict[str, int]:
    """Id -> depth, of the nodes that can be reached from the root, by breadth."""
    below = children(trace)
    level = [node.name for node in trace.nodes if node.parent is None][:1]
    found: dict[str, int] = {}
    depth = 0
    while level:
        found |= dict.fromkeys(level, depth)
        level = [child for name in level for child in below[name]]
        depth += 1
    return found


def to_dict(trace: Trace) -> dict[str, Any]:
    """The reference's format, which ``parse_trace`` reads back equal."""
    tree: dict[str, dict[str, Any]] = {}
    for node in trace.nodes:
        tree[node.name] = {
            "Problem": node.problem,
            "parent": "none" if node.parent is None else node.parent,
            "Result": node.result,
        }
        if node.correct is not None:
            tree[node.name]["match_corr"] = float(node.correct)
    walk = [
        {"from": s.source, "to": s.target, "category": s.category} for s in trace.walk
    ]
    corr = {} if trace.correct is None else {"corr": int(trace.correct)}
    return {"tree": tree, "walk": walk, **corr}
