"""Search traces in words, and the rules that read them back exactly.

One sentence per jump, in one of a few wordings each; a state's expressions name its node.
"""

import random
import re
from collections.abc import Sequence

from jaxpapers.papers.rejump import game24
from jaxpapers.papers.rejump.search import label
from jaxpapers.papers.rejump.trace import (
    BACKTRACKING,
    CALCULATION,
    MAX_NODES,
    ROOT,
    VERIFICATION,
    Node,
    Step,
    Trace,
    validate,
)

START = (
    "Make 24 from {state}.",
    "The numbers are {state}; the goal is 24.",
    "I have {state} and need 24.",
)
DERIVE = (
    "Combine {move} = {value}, which leaves {state}.",
    "Try {move} = {value}; left are {state}.",
    "{move} = {value}, so now I have {state}.",
)
FINISH = (
    "Combine {move}: {state} = {value}.",
    "With {move} that makes {state} = {value}.",
    "The last step {move} gives {state} = {value}.",
)
BACK = (
    "Back to {state}.",
    "This leads nowhere; return to {state}.",
    "Give up here and go back to {state}.",
)
CHECK = (
    "Check this against {state}.",
    "Verify: look at {state} again.",
    "Let me double-check with {state}.",
)
HOLD = (
    "That is right; on with {state}.",
    "Checked; continue at {state}.",
    "Verified, I am still at {state}.",
)
FOUND, NOTHING = "So the answer is {state} = 24.", "No answer was found."

_FIELDS = {
    "state": r"(?P<state>[\d+*/(), -]+)",
    "move": r"(?P<move>[\d+*/() -]+)",
    "value": r"(?P<value>-?\d+(?:/\d+)?)",
}


def _pattern(templates: Sequence[str]) -> re.Pattern:
    return re.compile(
        "|".join(f"(?:{_numbered(t, i)})" for i, t in enumerate(templates))
    )


def _numbered(template: str, i: int) -> str:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for name, field in _FIELDS.items():
        named = field.replace(f"?P<{name}>", f"?P<{name}{i}>")
        pattern = pattern.replace(f"{{{name}}}", named)
    return pattern


_RULES = {
    kind: _pattern(templates)
    for kind, templates in {
        "start": START, "derive": DERIVE, "finish": FINISH, "back": BACK,
        "check": (*CHECK, *HOLD), "found": (FOUND,),
    }.items()
}  # fmt: skip


def render(trace: Trace, seed: int = 0) -> str:
    """A search trace in words, a line for every jump.

    Args:
      trace: of a search program; see ``read``, which gives it back.
      seed: of the wordings.

    Raises:
      ValueError: a trace that is none of the Game of 24, or not sound.
    """
    if issues := validate(trace):
        raise ValueError(f"not a sound trace: {issues[0].kind}: {issues[0].message}")
    rng = random.Random(seed)
    problem = {node.name: node.problem for node in trace.nodes}
    value = {node.name: node.result for node in trace.nodes}
    lines = [rng.choice(START).format(state=problem[trace.nodes[0].name])]
    checks = 0
    for step in trace.walk:
        state = problem[step.target]
        if step.category == CALCULATION:
            new = _items(state)[-1]
            move = " ".join(_operands(new))
            templates = DERIVE if value[step.target] is None else FINISH
            result = value[step.target] or game24.evaluate(new).value
            text = rng.choice(templates).format(move=move, value=result, state=state)
        elif step.category == BACKTRACKING:
            text = rng.choice(BACK).format(state=state)
        else:
            text = rng.choice((CHECK, HOLD)[checks % 2]).format(state=state)
            checks += 1
        lines.append(text)
    answer = problem[trace.walk[-1].target] if trace.walk else ""
    lines.append(FOUND.format(state=answer) if trace.correct else NOTHING)
    return "\n".join(lines) + "\n"


def is_search_text(text: str) -> bool:
    """Whether a text begins as the sentences of ``render`` do."""
    return _match("start", text.lstrip().partition("\n")[0].strip()) is not None


def read(text: str) -> Trace:
    """The trace that a text of ``render``'s sentences tells.

    Arithmetic is checked on the way: what a sentence derives must follow from where the
    walk is, and have the value that it says.

    Raises:
      ValueError: a sentence that is none of these, or does not follow, with its line.
    """
    reader = _Reader()
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                reader.take(line.strip())
            except ValueError as e:
                raise ValueError(f"line {number}: {e}") from None
    if not reader.nodes:
        raise ValueError("no sentence: expected one like 'Make 24 from 3,3,8,8.'")
    return label(Trace(tuple(reader.nodes), tuple(reader.walk)))


class _Reader:
    """A trace as far as it was read."""

    def __init__(self):
        self.nodes: list[Node] = []
        self.walk: list[Step] = []
        self.names: dict[str, str] = {}
        self.here = ""
        self.ended = False

    def take(self, line: str) -> None:
        if self.ended:
            raise ValueError(f"nothing is expected after the answer, got {line[:60]!r}")
        if not self.nodes:
            found = _match("start", line)
            if found is None:
                raise ValueError(f"expected the numbers, got {line[:60]!r}")
            self.nodes.append(Node(ROOT, found["state"], None))
            self.names[found["state"]] = self.here = ROOT
            return
        for kind in ("derive", "finish", "back", "check", "found"):
            found = _match(kind, line)
            if found is not None:
                break
        else:
            if line != NOTHING:
                raise ValueError(f"cannot read {line[:60]!r}")
            self.ended = True
            return
        state = found["state"]
        if kind in ("derive", "finish"):
            self.derive(state, found["move"], found["value"], kind == "finish")
        elif state not in self.names:
            raise ValueError(f"{state!r} was not reached before")
        elif kind == "found":
            self.ended = True
        else:
            self.jump(state, BACKTRACKING if kind == "back" else VERIFICATION)

    def jump(self, state: str, category: str) -> None:
        name = self.names[state]
        self.walk.append(Step(self.here, name, category))
        self.here = name

    def derive(self, state: str, move: str, value: str, finish: bool) -> None:
        *rest, new = _items(state)
        source = _items(next(n.problem for n in self.nodes if n.name == self.here))
        left, operator, right = _operands(new)
        if move != f"{left} {operator} {right}" or finish == bool(rest):
            raise ValueError(f"{move!r} does not make {state!r}")
        if sorted([*rest, left, right]) != sorted(source):
            raise ValueError(f"{state!r} does not follow from {', '.join(source)!r}")
        if str(game24.evaluate(new).value) != value:
            raise ValueError(f"{new} is not {value}")
        if state not in self.names:
            if len(self.nodes) >= MAX_NODES:
                raise ValueError(f"more than {MAX_NODES:,} nodes")
            name = f"node{len(self.nodes) + 1}"
            self.nodes.append(Node(name, state, self.here, value if finish else None))
            self.names[state] = name
        self.jump(state, CALCULATION)


def _match(kind: str, line: str) -> dict[str, str] | None:
    match = _RULES[kind].fullmatch(line)
    if match is None:
        return None
    return {k.rstrip("0123456789"): v for k, v in match.groupdict().items() if v}


def _items(state: str) -> list[str]:
    return [item.strip() for item in state.split(",")]


def _operands(expression: str) -> tuple[str, str, str]:
    """(left, operator, right) of "(left-right)"."""
    depth = 0
    for i, c in enumerate(expression):
        depth += (c == "(") - (c == ")")
        if depth == 1 and c in game24.OPERATORS and i > 1:
            return expression[1:i], c, expression[i + 1 : -1]
    raise ValueError(f"expected an expression like (3-8), got {expression!r}")
