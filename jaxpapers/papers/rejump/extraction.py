"""Traces from free text by a language model, in two requests and one for each leaf.

``ask(messages, schema, check)`` is ``data.chat.Chat.structured`` or anything like it: it
gives a JSON value of the schema for which ``check`` finds nothing wrong, after telling
the model what is.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxpapers.papers.rejump.search import label, numbers_of
from jaxpapers.papers.rejump.trace import (
    CATEGORIES,
    ROOT,
    Node,
    Step,
    Trace,
    validate,
)

TASKS = ("math", "game24")
MAX_CHARACTERS = 200_000
STATUS = ("MATCH", "MISMATCH", "NOT_APPLICABLE")

SYSTEM = (
    "You annotate how someone solved a problem. You do not solve it, correct it or judge "
    "it: you only describe what the given text does, in its order. Reply in JSON."
)
TREE = {
    "math": """List the intermediate steps of the text below as a tree.
- The root is node1, with parent null and the problem "Initial State".
- Every other node is one sub-problem that the text sets itself, written so that it \
can be \
understood alone: "Given ..., compute ...". Its result is what the text finds for it.
- Steps of one line of attack form a chain: each is the child of the step before it.
- Start a branch only where the text gives a line of attack up and begins another \
one; the \
branch hangs on the last step that both share. The last node of the abandoned one \
has a \
result that ends in "[Path abandoned]".
- Put small algebra into the step that it belongs to. Checks are no nodes.
- The last node of a finished line repeats the whole problem, and its result is the \
answer.
Name the nodes node1, node2, ... in the order in which the text reaches them.""",
    "game24": """The text below looks for a way to make 24 of four numbers, each \
used once. \
List the states that it visits as a tree.
- The root is node1, with parent null; its problem is the four numbers, "a,b,c,d".
- Every other node is reached from its parent by combining two of the expressions \
that are \
left. Its problem lists what is left to combine, "9-3, 12, 8"; its result is null.
- A node where all four numbers are combined has the full expression as its problem \
and its \
value as its result.
Name the nodes node1, node2, ... in the order in which the text reaches them.""",
}
WALK = f"""The tree below describes the text. List the jumps between its nodes in \
the order in \
which the text makes them. Each jump starts where the one before it ended; the \
first starts \
at node1. Its category is one of:
- {CATEGORIES[0]}: from a node to its child, deriving it, also when it is derived again;
- {CATEGORIES[2]}: giving a line up, from where it ended to the node from which the \
next one \
goes on (a calculation then leads to that one's first step);
- {CATEGORIES[1]}: checking. Doing step X again to check Z is two jumps, Z to X and \
X to Z; \
checking Z with the problem itself goes to node1 and back."""
LEAF = """A solution ended in the result below. Say what value it comes to, and \
whether that \
is the same as the expected answer, in whatever form both are written: MATCH or \
MISMATCH; \
NOT_APPLICABLE if the result is no value (an attempt that was given up)."""


def _object(**fields: Any) -> dict:
    return {
        "type": "object", "properties": fields, "required": list(fields),
        "additionalProperties": False,
    }  # fmt: skip


def _list(of: dict) -> dict:
    return {"type": "array", "items": of}


_TEXT, _OPTIONAL = {"type": "string"}, {"type": ["string", "null"]}
TREE_SCHEMA = _object(
    nodes=_list(_object(id=_TEXT, parent=_OPTIONAL, problem=_TEXT, result=_OPTIONAL))
)
WALK_SCHEMA = _object(
    steps=_list(
        _object(
            **{"from": _TEXT}, to=_TEXT,
            category={"type": "string", "enum": list(CATEGORIES)},
        )
    )
)  # fmt: skip
LEAF_SCHEMA = _object(
    parsed_value=_OPTIONAL, match_status={"type": "string", "enum": list(STATUS)}
)


@runtime_checkable
class Ask(Protocol):
    """Gives a JSON value that passes its check."""

    def __call__(
        self,
        messages: Sequence[Mapping[str, str]],
        schema: Mapping[str, Any],
        check: Callable[[Any], Sequence[str]],
    ) -> Any:
        """The value; raises ValueError where there is none."""
        ...


def extract(
    ask: Ask, problem: str, text: str, task: str = "math", answer: str | None = None
) -> Trace:
    """The trace of a text.

    Args:
      ask: see ``Ask``.
      problem: what was to be solved.
      text: the reasoning.
      task: "math" or "game24".
      answer: the right one, for the leaves of "math"; None: their correctness stays
        unknown. Answers of "game24" are computed.

    Raises:
      ValueError: unknown task, an empty text or one that is too long, no valid reply.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    if not text.strip():
        raise ValueError("the text is empty, expected someone's reasoning")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(
            f"the text has {len(text):,} characters, expected at most {MAX_CHARACTERS:,}"
        )
    messages = tree_request(problem, text, task)
    nodes = ask(messages, TREE_SCHEMA, lambda value: check_tree(value, task))
    tree = _tree(nodes)
    messages = walk_request(problem, text, nodes)
    walk = ask(messages, WALK_SCHEMA, lambda value: check_walk(tree, value))
    trace = tree._replace(walk=_walk(walk))
    if task == "game24":
        return label(trace)
    return trace if answer is None else _judged(ask, trace, answer)


def tree_request(problem: str, text: str, task: str) -> list[dict[str, str]]:
    """Messages that ask for the tree."""
    return _messages(TREE[task], problem=problem, text=text)


def walk_request(problem: str, text: str, nodes: Any) -> list[dict[str, str]]:
    """Messages that ask for the walk over a tree."""
    return _messages(WALK, problem=problem, text=text, tree=_table(nodes))


def _messages(task: str, **parts: str) -> list[dict[str, str]]:
    body = "\n\n".join(f"<{k}>\n{v}\n</{k}>" for k, v in parts.items())
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{task}\n\n{body}"},
    ]


def _table(value: Any) -> str:
    return "\n".join(
        f"{n['id']} (parent {n['parent']}): {n['problem']} -> {n.get('result')}"
        for n in value["nodes"]
    )


def check_tree(value: Any, task: str = "math") -> list[str]:
    """What is wrong with a reply's tree; its root has the numbers of a game24."""
    try:
        tree = _tree(value)
    except (KeyError, TypeError, AttributeError, ValueError):
        return ['expected {"nodes": [{"id", "parent", "problem", "result"}, ...]}']
    problems = [f"{kind}: {message}" for kind, message in validate(tree)]
    roots = [node.name for node in tree.nodes if node.parent is None]
    if not problems and roots != [ROOT]:
        problems.append(f"the root must be called {ROOT}, got {roots[0]}")
    if not problems and task == "game24":
        root = next(node for node in tree.nodes if node.parent is None)
        try:
            numbers_of(root.problem)
        except ValueError as e:
            problems.append(f'{e}; expected the four numbers, "a,b,c,d"')
    return problems


def check_walk(tree: Trace, value: Any) -> list[str]:
    """What is wrong with a reply's walk over a tree."""
    try:
        walk = _walk(value)
    except (KeyError, TypeError, AttributeError, ValueError):
        return ['expected {"steps": [{"from", "to", "category"}, ...]}']
    if not walk:
        return ["the walk has no step"]
    return [
        f"{kind}: {message}" for kind, message in validate(tree._replace(walk=walk))
    ]


def _tree(value: Any) -> Trace:
    nodes = []
    for n in value["nodes"]:
        parent, result = n["parent"], n.get("result")
        if not isinstance(n["id"], str) or not isinstance(n["problem"], str):
            raise ValueError("texts are expected")
        if not isinstance(parent, str | None):
            raise ValueError("an id or null is expected")
        if not isinstance(result, str | int | float | None):
            raise ValueError("a text or null is expected")
        if parent is not None and parent.lower() in ("none", "null", ""):
            parent = None
        result = None if result is None else str(result)
        nodes.append(Node(n["id"], n["problem"], parent, result))
    return Trace(tuple(nodes), ())


def _walk(value: Any) -> tuple[Step, ...]:
    steps = tuple(Step(s["from"], s["to"], s["category"]) for s in value["steps"])
    if not all(isinstance(x, str) for step in steps for x in step):
        raise ValueError("texts are expected")
    return steps


def _judged(ask: Ask, trace: Trace, answer: str) -> Trace:
    """The trace with the correctness of its leaves against an answer."""
    inner = {node.parent for node in trace.nodes}
    nodes = []
    for node in trace.nodes:
        if node.name not in inner:
            node = node._replace(correct=_matches(ask, node.result or "", answer))
        nodes.append(node)
    last = trace.walk[-1].target
    right = any(bool(node.correct) for node in nodes if node.name == last)
    return Trace(tuple(nodes), trace.walk, right)


def _matches(ask: Ask, result: str, answer: str) -> bool:
    """Whether a leaf's result is the answer; the model is asked where texts differ."""
    plain = [re.sub(r"[\s$]|\\boxed|[{}]", "", x).rstrip(".") for x in (result, answer)]
    if plain[0] == plain[1]:
        return True
    if not plain[0] or result.rstrip().endswith("[Path abandoned]"):
        return False
    messages = _messages(LEAF, result=result, expected=answer)
    return ask(messages, LEAF_SCHEMA, _check_leaf)["match_status"] == "MATCH"


def _check_leaf(value: Any) -> list[str]:
    if isinstance(value, Mapping) and value.get("match_status") in STATUS:
        return []
    return [f"match_status must be one of {', '.join(STATUS)}"]
