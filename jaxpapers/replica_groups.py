"""Groups of devices of a collective: as a compiled program writes them, and by axes."""

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

Groups = frozenset[frozenset[int]]


def replica_groups(line: str, kind: str, partitions: int) -> Groups:
    """The groups of a collective.

    Args:
      line: its instruction.
      kind: of the collective.
      partitions: of the program, which form one group where the line names none.

    Raises:
      ValueError: a form that this does not know.
    """
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)
        pairs = re.findall(r"\{(\d+),(\d+)\}", pairs.group(1) if pairs else "")
        return _connected([{int(a), int(b)} for a, b in pairs])
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
        shape, dims, order = (numbers(g) for g in iota.groups())
        return _iota_groups(shape, dims, order)
    plain = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line)
    if plain is None:
        raise ValueError(f"cannot read the replica groups of: {line.strip()[:300]}")
    groups = [numbers(g) for g in re.findall(r"\{([\d,]*)\}", plain.group(1))]
    return frozenset(map(frozenset, groups or [range(partitions)]))


def numbers(text: str | None) -> list[int]:
    """Integers between commas."""
    return [int(x) for x in (text or "").split(",") if x]


def _named_groups(sizes: str, dims, order, axes: str) -> Groups:
    """Groups of mesh['a'=2,'b'=4] {'b'}; 'b':(1)2 is a part of b, after 1, of size 2."""
    names = re.findall(r"'([^']+)'=(\d+)", sizes)
    ids = np.arange(math.prod(int(n) for _, n in names))
    if dims is not None:
        ids = ids.reshape(numbers(dims)).transpose(numbers(order) or None).reshape(-1)
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


def groups_of_axes(sizes: Mapping[str, int]) -> dict[Groups, tuple[str, ...]]:
    """Groups along each combination of mesh axes -> the axes' names.

    Args:
      sizes: of the axes, in the mesh's order.
    """
    wide = [n for n in sizes if sizes[n] > 1]
    ids = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
    groups = {}
    for k in range(1, len(wide) + 1):
        for names in itertools.combinations(wide, k):
            axes = [list(sizes).index(n) for n in names]
            last = range(ids.ndim - len(axes), ids.ndim)
            rows = np.moveaxis(ids, axes, last)
            rows = rows.reshape(-1, math.prod(sizes[n] for n in names))
            groups[frozenset(frozenset(map(int, g)) for g in rows)] = names
    return groups
