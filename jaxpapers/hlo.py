"""Collectives of a compiled program, parsed from its HLO text.

The text, ``jax.jit(f).lower(...).compile().as_text()``, has the collectives that the
compiler inserted and combined. Each becomes a ``Collective`` with its mesh axes and the
bytes that a device sends in a ring, counted once per iteration of its loops.

A program for several TPU slices is the text of one of them: its partitions are the chips
of a slice. What crosses the slower network between slices (DCN) is no collective there
but a pair of ``send`` and ``recv`` to Megascale's runtime, whose attributes say what the
pair does; each becomes a ``Collective`` over the mesh axis ``slice``.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxpapers.replica_groups import groups_of_axes, numbers, replica_groups
from jaxpapers.scopes import ONCE, trips_of

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-broadcast", "collective-permute",
)  # fmt: skip
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
_DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_READ = re.compile(r" [\w\-]+\(([^()]*)\)")
_PARAMETER = re.compile(r" parameter\((\d+)\)")
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="[^"]*"')
_RECV = re.compile(r" = (.*?) recv\(")
_HANDLER = re.compile(r'_xla_host_transfer_handler_name="([^"]*)"')
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="([^"]*)"')
_TARGET = re.compile(r'_xla_megascale_target="\{([\d,]+)\}x\{0:(\d+)\}"')
_TRANSFERS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
SLICE = "slice"


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of ``KINDS``.
      axes: mesh axes it runs over; None if its groups are not those of axes.
      group: number of devices in a group.
      result_bytes: of the results on a device.
      wire_bytes: that a device sends in a ring, per execution; of a ragged exchange the
        mean over devices if the smaller of its buffers is full.
      elements: of the largest result.
      matrix: elements of the last two axes of the largest result.
      count: number of executions.
      op_name: the compiler's metadata of its origin; where it has none, as in programs
        for several slices, that of what it reads.
      between_slices: whether it crosses the network between slices.
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
    between_slices: bool = False


def collectives(text: str, mesh: Any = None) -> list[Collective]:
    """Collectives of a compiled module that move data between devices.

    Args:
      text: ``compiled.as_text()``.
      mesh: Mesh or AbstractMesh of the program, for the names of axes; its devices are
        the program's partitions, in order, or those of all slices, of which the text is
        one's.

    Raises:
      ValueError: not the text of an HLO module, of another mesh, an unknown form of
        replica groups, or a transfer that does not say between whom.
    """
    bodies, entry = _computations(text)
    if entry is None:
        raise ValueError("not an HLO module: expected compiled.as_text()")
    header = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    partitions = int(header.group(1)) if header else 1
    sizes = {} if mesh is None else dict(zip(mesh.axis_names, mesh.axis_sizes))
    slices = 1
    if mesh is not None and math.prod(sizes.values()) != partitions:
        slices = sizes.pop(SLICE, 1)
        if math.prod(sizes.values()) != partitions:
            raise ValueError(
                f"the program has {partitions} partitions: expected the devices of the "
                f"mesh {dict(mesh.shape)}, or those of one slice of it"
            )
    names = groups_of_axes(sizes)
    result, chains = [], set()
    for name, count, site in _runs(bodies, entry):
        for line in bodies[name]:
            item = _parse(line, name, count, names, partitions) or _between_slices(
                line, count, slices, partitions
            )
            if item is None or item.group == 1:
                continue
            if item.kind == "ragged-all-to-all":
                item = _ragged(item, line, bodies[name])
            # On TPUs one collective can be a chain of fusions, each of which has it.
            chain = _CHAIN.search(line)
            if chain and chain.groups() in chains:
                continue
            if chain:
                chains.add(chain.groups())
            if not item.op_name:
                item = item._replace(op_name=_origin(line, bodies[name], site))
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


class _Site(NamedTuple):
    """A call of a computation: the instruction, its computation and the call of that."""

    line: str
    body: list[str]
    above: "_Site | None"


def _origin(line: str, body: list[str], site: _Site | None) -> str:
    """The op_name nearest to an instruction: of what it reads, else of its call."""
    pending, seen, call = [(line, body, site)], set(), site
    while pending:
        line, body, site = pending.pop(0)
        if note := _OP_NAME.search(line):
            return note.group(1)
        read = _READ.search(line)
        names = re.findall(r"%([\w.\-]+)", read.group(1)) if read else []
        parameter, pair = _PARAMETER.search(line), _RENDEZVOUS.search(line)
        if parameter and site and " fusion(" in site.line:
            read = _READ.search(site.line)
            names = re.findall(r"%([\w.\-]+)", read.group(1) if read else "")
            names = names[int(parameter.group(1)) :][:1]
            body, site = site.body, site.above
        found = [
            x
            for x in body
            if ((d := _DEFINED.match(x)) and d.group(1) in names)
            # What a recv gets is what its send has read.
            or (pair and " recv(" in line and " send(" in x and pair.group() in x)
        ]
        pending += [(x, body, site) for x in found if x not in seen]
        seen.update(found)
    while call:
        if note := _OP_NAME.search(call.line):
            return note.group(1)
        call = call.above
    return ""


def _runs(
    bodies: dict[str, list[str]], entry: str
) -> Iterator[tuple[str, int, _Site | None]]:
    """(computation, number of executions, call), once per call site."""
    # The last number is that of the innermost loop, not of its iterations.
    pending: list[tuple[str, int, int, _Site | None]] = [(entry, 1, 1, None)]
    while pending:
        name, count, loops, site = pending.pop()
        yield name, count, site
        for line in bodies[name]:
            called = _CALLED.findall(line)
            for group in _BRANCHES.findall(line):
                called += [x.strip().lstrip("%") for x in group.split(",")]
            trips = _trips(line, bodies)
            start = loops if f'/{ONCE}/cond"' in line else count
            inner = count if " while(" in line else loops
            call = _Site(line, bodies[name], site)
            pending += [(c, start * trips, inner, call) for c in called if c in bodies]


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
    shapes = _TYPE.findall(results)
    if start and kind != "all-reduce":
        # (operands..., results...), for permutes with two context words.
        shapes = (
            shapes[1:2] if kind == "collective-permute" else shapes[len(shapes) // 2 :]
        )
    groups = replica_groups(line, kind, partitions)
    group = max((len(g) for g in groups), default=1)
    # TPUs implement a reduce-scatter as a fusion of an all-reduce and a slice.
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        return _collective(
            line, "reduce-scatter", names.get(groups), group, shapes, count, whole=True
        )
    return _collective(line, kind, names.get(groups), group, shapes, count)


def _ragged(item: Collective, line: str, body: list[str]) -> Collective:
    """Both buffers have room for the most that may come: the smaller one is sent."""
    read = re.search(rf" {item.kind}\(%?([\w.\-]+),", line)
    made = [x for x in body if read and read[1] in _DEFINED.findall(x)]
    if not made:
        raise ValueError(f"cannot find the operand of: {line.strip()[:300]}")
    dtype, dims = _TYPE.findall(made[0])[0]
    size = min(_size_of(dtype) * math.prod(numbers(dims)), item.result_bytes)
    return item._replace(wire_bytes=ring_bytes(item.kind, size, item.group))


def _between_slices(
    line: str, count: int, slices: int, partitions: int
) -> Collective | None:
    """What a ``recv`` gets from other slices; its ``send`` says the same again."""
    match = _RECV.search(line)
    if match is None:
        return None
    handler = _HANDLER.search(line)
    if handler and handler.group(1) != "xla_megascale_runtime":
        return None  # From this device's host.
    transfer, target = _TRANSFER.search(line), _TARGET.search(line)
    kind = _TRANSFERS.get(transfer.group(1)) if transfer else None
    found = None
    if target:
        found = len(target.group(1).split(",")), int(target.group(2)) + 1
    elif kind in ("all-to-all", "collective-permute"):
        found = slices, partitions  # Each slice has another target: none is written.
    if kind is None or slices == 1 or found != (slices, partitions):
        raise ValueError(
            f"cannot say between which slices this is sent: {line.strip()[:500]}; "
            f"expected a collective of the mesh axis {SLICE!r}, here of {slices} slices "
            f"with {partitions} devices each"
        )
    shapes = _TYPE.findall(match.group(1))[:1]  # Then context and token.
    return _collective(line, kind, (SLICE,), slices, shapes, count, between_slices=True)


def _collective(
    line, kind, axes, group, shapes, count, *, whole=False, between_slices=False
) -> Collective:
    """A collective with results of these shapes; ``whole``: those of its operands."""
    dims = [numbers(x) for _, x in shapes]
    size = float(sum(_size_of(t) * math.prod(x) for (t, _), x in zip(shapes, dims)))
    ring = size * group if kind == "reduce-scatter" and not whole else size
    note = _OP_NAME.search(line)
    return Collective(
        kind,
        axes,
        group,
        size,
        ring_bytes(kind, ring, group),
        max(math.prod(x) for x in dims),
        max(math.prod(x[-2:]) for x in dims),
        count,
        note.group(1) if note else "",
        between_slices,
    )


def _size_of(dtype: str) -> float:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits.group()) / 8 if bits else 0.0
