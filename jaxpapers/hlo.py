"""Collectives of a compiled program, parsed from its HLO text.

The text, ``jax.jit(f).lower(...).compile().as_text()``, has the collectives that the
compiler inserted and combined. Each becomes a ``Collective`` with its mesh axes and the
bytes that a device sends in a ring, counted once per iteration of its loops.
"""

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxpapers.scopes import ONCE, trips_of

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
    "collective-permute",
)
Groups = frozenset[frozenset[int]]
_BYTES = {"pred": 1.0, "token": 0.0}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_TYPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of ``KINDS``.
      axes: mesh axes it runs over; None if its groups are not those of axes.
      group: number of devices in a group.
      result_bytes: of the results on a device.
      wire_bytes: that a device sends in a ring, per execution.
      elements: of the largest result.
      matrix: elements of the last two axes of the largest result.
      count: number of executions.
      op_name: the compiler's metadata of its origin.
    """

    kind: str
    axes: tuple[str, ...] | None
    group: int
    result_bytes: float
    wire_bytes: float
    elements: int
    matrix: int
    count: int
    op_name: str


def collectives(text: str, mesh: Any = None) -> list[Collective]:
    """Collectives of a compiled module that move data between devices.

    Args:
      text: ``compiled.as_text()``.
      mesh: Mesh or AbstractMesh of the program, for the names of axes; its devices are
        the program's partitions, in order.

    Raises:
      ValueError: not the text of an HLO module, or an unknown form of replica groups.
    """
    bodies, entry = _computations(text)
    if entry is None:
        raise ValueError("not an HLO module: expected compiled.as_text()")
    names = {} if mesh is None else _groups_of_axes(mesh)
    header = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    partitions = int(header.group(1)) if header else 1
    result, chains = [], set()
    for name, count in _runs(bodies, entry):
        for line in bodies[name]:
            item = _parse(line, name, count, names, partitions)
            if item is None or item.group == 1:
                continue
            # On TPUs one collective can be a chain of fusions, each of which has it.
            chain = _CHAIN.search(line)
            if chain and chain.groups() in chains:
                continue
            if chain:
                chains.add(chain.groups())
            result.append(item)
    return result


def wire_bytes(
    collectives: list[Collective],
) -> dict[tuple[str, tuple[str, ...] | None], float]:
    """Total bytes that a device sends, by (kind, axes)."""
    total: dict[tuple[str, tuple[str, ...] | None], float] = {}
    for c in collectives:
        key = (c.kind, c.axes)
        total[key] = total.get(key, 0.0) + c.wire_bytes * c.count
    return total


def ring_bytes(kind: str, size: int | float, group: int) -> float:
    """Bytes that each of ``group`` devices sends in a ring algorithm.

    Args:
      kind: one of ``KINDS``.
      size: bytes on a device, of the result or, for ``reduce-scatter``, of the operand.
      group: number of devices.

    Example:
      >>> ring_bytes("all-reduce", 1024, 4), ring_bytes("all-gather", 1024, 4)
      (1536.0, 768.0)
    """
    if kind == "collective-permute":
        return float(size)
    return (2 if kind == "all-reduce" else 1) * (group - 1) / group * size


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    bodies: dict[str, list[str]] = {}
    entry, current = None, None
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head and "=" not in line.split("(")[0]:
            current = bodies.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return bodies, entry


def _runs(bodies: dict[str, list[str]], entry: str) -> Iterator[tuple[str, int]]:
    """(computation, number of executions), once per call site."""
    # The last number is that of the innermost loop, not of its iterations.
    pending = [(entry, 1, 1)]
    while pending:
        name, count, loops = pending.pop()
        yield name, count
        for line in bodies[name]:
            called = _CALLED.findall(line)
            for group in _BRANCHES.findall(line):
                called += [x.strip().lstrip("%") for x in group.split(",")]
            trips = _trips(line, bodies)
            start = loops if f'/{ONCE}/cond"' in line else count
            inner = count if " while(" in line else loops
            pending += [(c, start * trips, inner) for c in called if c in bodies]


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Trip count of a while instruction; 1 for other instructions and where unknown.

    Where it depends on the data, the program may say what is usual, see ``scopes``.
    TPU programs have no annotated trip count: the condition of a ``lax.scan`` compares
    its counter, which starts at 0, with one constant.
    """
    annotated = _TRIPS.search(line)
    if annotated:
        return int(annotated.group(1))
    loop = _CONDITION.search(line)
    condition = bodies.get(loop.group(1), []) if loop else []
    bounds = [b.group(1) for b in map(_BOUND.search, condition) if b]
    less = any("direction=LT" in x and x.lstrip().startswith("ROOT") for x in condition)
    if less and len(bounds) == 1:
        return int(bounds[0])
    note = _OP_NAME.search(line)
    return trips_of(note.group(1)) if loop and note else 1


def _parse(
    line: str, computation: str, count: int, names: dict, partitions: int
) -> Collective | None:
    match = re.search(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if match is None:
        return None
    results, kind, start = match.groups()
    shapes = [(_size_of(d), _numbers(dims)) for d, dims in _TYPE.findall(results)]
    if start and kind != "all-reduce":
        # (operands..., results...), for permutes with two context words.
        shapes = (
            shapes[1:2] if kind == "collective-permute" else shapes[len(shapes) // 2 :]
        )
    groups = _replica_groups(line, kind, partitions)
    group = max((len(g) for g in groups), default=1)
    result = float(sum(size * math.prod(dims) for size, dims in shapes))
    # TPUs implement a reduce-scatter as a fusion of an all-reduce and a slice.
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind, wire = "reduce-scatter", ring_bytes("reduce-scatter", result, group)
    elif kind == "reduce-scatter":
        wire = ring_bytes(kind, result * group, group)
    else:
        wire = ring_bytes(kind, result, group)
    note = _OP_NAME.search(line)
    return Collective(
        kind,
        names.get(groups),
        group,
        result,
        wire,
        max(math.prod(dims) for _, dims in shapes),
        max(math.prod(dims[-2:]) for _, dims in shapes),
        count,
        note.group(1) if note else "",
    )


def _size_of(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits.group()) / 8 if bits else 0.0


def _replica_groups(line: str, kind: str, partitions: int) -> Groups:
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)
        numbers = re.findall(r"\{(\d+),(\d+)\}", pairs.group(1) if pairs else "")
        return _connected([{int(a), int(b)} for a, b in numbers])
    named = re.search(
        r"replica_groups=mesh\[([^\]]*)\]"
        r"(?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}",
        line,
    )
    if named:
        return _named_groups(*named.groups())
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
    )
    if iota:
        shape, dims, order = (_numbers(g) for g in iota.groups())
        return _iota_groups(shape, dims, order)
    plain = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line)
    if plain is None:
        raise ValueError(f"cannot read the replica groups of: {line.strip()[:300]}")
    groups = [_numbers(g) for g in re.findall(r"\{([\d,]*)\}", plain.group(1))]
    return frozenset(map(frozenset, groups or [range(partitions)]))


def _numbers(text: str | None) -> list[int]:
    return [int(x) for x in (text or "").split(",") if x]


def _named_groups(sizes: str, dims, order, axes: str) -> Groups:
    """Groups of mesh['a'=2,'b'=4] {'b'}; 'b':(1)2 is a part of b, after 1, of size 2."""
    import numpy as np

    names = re.findall(r"'([^']+)'=(\d+)", sizes)
    ids = np.arange(math.prod(int(n) for _, n in names))
    if dims is not None:
        ids = ids.reshape(_numbers(dims)).transpose(_numbers(order) or None).reshape(-1)
    sub_axes = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    shape, last = [], []
    for name, size in names:
        before, part = sub_axes.get(name, (int(size), 1))
        part = part or int(size)
        shape += [before, part, int(size) // before // part]
        if name in sub_axes:
            last.append(len(shape) - 2)
    rows = np.moveaxis(ids.reshape(shape), last, range(-len(last), 0))
    rows = rows.reshape(-1, math.prod(shape[i] for i in last))
    return frozenset(frozenset(map(int, g)) for g in rows)


def _iota_groups(shape, dims, order) -> Groups:
    import numpy as np

    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose(order) if order else ids
    return frozenset(frozenset(map(int, g)) for g in ids.reshape(-1, shape[-1]))


def _connected(pairs: list[set[int]]) -> Groups:
    """Connected components of the graph of exchanging devices."""
    groups: list[set[int]] = []
    for pair in pairs:
        joined = [g for g in groups if g & pair]
        groups = [g for g in groups if not g & pair] + [pair.union(*joined)]
    return frozenset(frozenset(g) for g in groups)


def _groups_of_axes(mesh: Any) -> dict[frozenset[frozenset[int]], tuple[str, ...]]:
    """Partition groups along each combination of mesh axes -> the axes' names."""
    import numpy as np

    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes))
    wide = [n for n in mesh.axis_names if sizes[n] > 1]
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    groups = {}
    for k in range(1, len(wide) + 1):
        for names in itertools.combinations(wide, k):
            axes = [mesh.axis_names.index(n) for n in names]
            last = range(ids.ndim - len(axes), ids.ndim)
            rows = np.moveaxis(ids, axes, last)
            rows = rows.reshape(-1, math.prod(sizes[n] for n in names))
            groups[frozenset(frozenset(map(int, g)) for g in rows)] = names
    return groups
