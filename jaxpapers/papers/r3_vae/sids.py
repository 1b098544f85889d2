"""Semantic IDs of a catalogue: collisions, vocabulary with offsets, files, a report."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.ops import semantic_ids as measures
from jaxpapers.papers.r3_vae.options import POLICIES

_MAX_BYTES = 2**30


class SIDs(NamedTuple):
    """Codes of a catalogue's items.

    Attributes:
      table: (N, P) int32, the codes of each item.
      sizes: (P,) number of codes of each place.
    """

    table: np.ndarray
    sizes: tuple[int, ...]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First token of each place: tokens of different places differ."""
        return tuple(int(x) for x in np.cumsum((0, *self.sizes[:-1])))

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return sum(self.sizes)

    def tokens(self, items: Any) -> np.ndarray:
        """Tokens (..., P) of items.

        Raises:
          ValueError: numbers that are no items.
        """
        items = np.asarray(items)
        if items.size and (items.min() < 0 or items.max() >= len(self.table)):
            raise ValueError(
                f"items must be in [0, {len(self.table)}), got {items.min()} to "
                f"{items.max()}"
            )
        return self.table[items] + np.asarray(self.offsets, np.int32)

    def items(self) -> dict[tuple[int, ...], list[int]]:
        """SID -> its items in their order."""
        found: dict[tuple[int, ...], list[int]] = {}
        for item, sid in enumerate(self.table.tolist()):
            found.setdefault(tuple(sid), []).append(item)
        return found

    def save(self, path: str | Path) -> None:
        """Writes JSON: ``sizes`` and ``table``."""
        content = {"sizes": list(self.sizes), "table": self.table.tolist()}
        Path(path).write_text(json.dumps(content))

    @classmethod
    def load(cls, path: str | Path) -> "SIDs":
        """Reads what ``save`` wrote.

        Raises:
          ValueError: another content, codes out of range, a file above 1 GiB.
        """
        path = Path(path)
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path} has more than {_MAX_BYTES} bytes")
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or set(content) != {"sizes", "table"}:
            raise ValueError(f"{path}: expected JSON with sizes and table")
        try:
            table, sizes = _whole(content["table"]), _whole(content["sizes"])
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: expected whole numbers: {error}") from None
        if sizes.ndim != 1:
            raise ValueError(
                f"{path}: expected a list of sizes, got {content['sizes']}"
            )
        sids = cls(table, tuple(sizes.tolist()))
        sids.check()
        return sids

    def check(self) -> None:
        """Refuses a table that does not fit the sizes (ValueError)."""
        if self.table.ndim != 2 or self.table.shape[1:] != (len(self.sizes),):
            raise ValueError(
                f"expected SIDs of {len(self.sizes)} codes, got {self.table.shape}"
            )
        bad = (self.table < 0) | (self.table >= np.asarray(self.sizes))
        if not self.table.size or bad.any():
            rows = np.flatnonzero(bad.any(1))[:10].tolist()
            raise ValueError(f"codes out of {self.sizes} in rows {rows}")


def _whole(values: Any) -> np.ndarray:
    """Whole numbers as int32; ValueError for others."""
    given = np.asarray(values)
    whole = given.astype(np.int32)
    if (whole != given).any():
        raise ValueError(f"got {given[whole != given][:4].tolist()}")
    return whole


def resolve(
    sid: Any,
    codes: int,
    policy: str = "token",
    *,
    limit: int = 256,
    preference: Any = None,
) -> SIDs:
    """SIDs that tell items apart, by a policy; the same for any order of computation.

    Args:
      sid: (N, L) codes of a tokenizer.
      codes: K of each level.
      policy: ``token`` (TIGER): one more code, the item's place among the items of its
        SID, in the order of items, 0 where it is alone. ``reassign`` (LETTER, LC-Rec):
        of the items of one SID the first keeps it; each of the others, in the order of
        items, takes the last-level code that it prefers most of those that are free
        under its prefix. ``none``: as they are.
      limit: items of one SID at most, with ``token``.
      preference: (N, K) for ``reassign``, larger is better; None: codes in their order.

    Raises:
      ValueError: an unknown policy; a group above ``limit``; a prefix without free codes;
        codes out of range.
    """
    sid = _whole(sid)
    if sid.ndim != 2:
        raise ValueError(f"expected SIDs (N, L), got {sid.shape}")
    sizes = (codes,) * sid.shape[1]
    SIDs(sid, sizes).check()
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {POLICIES}, got {policy!r}")
    if policy == "none":
        return SIDs(sid, sizes)
    groups = measures.groups_of(sid)
    # The place of each item among those of its SID, in the order of items.
    order = np.argsort(groups.group, kind="stable")
    first = np.cumsum(groups.sizes) - groups.sizes
    place = np.empty(len(sid), np.int32)
    place[order] = np.arange(len(sid)) - first[groups.group[order]]
    if policy == "token":
        if place.max() >= limit:
            raise ValueError(
                f"{place.max() + 1} items share one SID, method.collision_codes is "
                f"{limit}: raise it, or use a tokenizer with fewer collisions "
                "(balanced k-means, more restarts)"
            )
        return SIDs(np.concatenate([sid, place[:, None]], 1), (*sizes, limit))
    return SIDs(_reassigned(sid, codes, place, preference), sizes)


def _reassigned(sid, codes, place, preference):
    sid = sid.copy()
    taken: dict[tuple, set[int]] = {}
    for row in np.flatnonzero(place == 0):
        taken.setdefault(tuple(sid[row, :-1]), set()).add(int(sid[row, -1]))
    for row in np.flatnonzero(place > 0):
        used = taken[tuple(sid[row, :-1])]
        wish = np.arange(codes)
        if preference is not None:
            wish = np.argsort(-np.asarray(preference[row]), kind="stable")
        free = next((int(c) for c in wish if int(c) not in used), None)
        if free is None:
            raise ValueError(
                f"more than {codes} items share the first codes "
                f"{sid[row, :-1].tolist()}, so that no last code is free for item {row}: "
                "use collisions=token, or more codes"
            )
        used.add(free)
        sid[row, -1] = free
    return sid


def diagnose(
    sid: Any, codes: int, x: Any = None, q: Any = None, *, t: float = 2.0
) -> dict[str, float]:
    """A report on the SIDs of a tokenizer, before collisions are resolved.

    Args:
      sid: (N, L) codes.
      codes: K of each level.
      x: item vectors (N, d), for ``sc_x``.
      q: quantised vectors (N, D), for ``sc``, ``pd`` and ``neighbours``.
      t: of the preference discrimination.

    Returns:
      Those of ``ops.semantic_ids.code_statistics``; ``sc_x`` and ``sc_x_1`` (cohesion of
      item vectors by full SID and by first code), ``sc``, ``sc_1``, ``pd`` and ``pd_1``
      (of quantised vectors and the centres of their groups), ``neighbours`` (share of
      the ten nearest items that x and q have in common). NaN where no group has two
      items.
    """
    sid = np.asarray(sid)
    numbers = measures.code_statistics(sid, codes)
    full, first = measures.groups_of(sid), measures.groups_of(sid, 1)
    for name, vectors in (("sc_x", x), ("sc", q)):
        if vectors is not None:
            for suffix, groups in (("", full), ("_1", first)):
                numbers[name + suffix] = cohesion(vectors, groups)
    if q is not None:
        for suffix, groups in (("", full), ("_1", first)):
            numbers["pd" + suffix] = discrimination(q, groups, t)
        if x is not None and len(sid) > 1:
            numbers["neighbours"] = measures.neighbour_overlap(x, q)
    return numbers


def cohesion(q: Any, groups: measures.Groups) -> float:
    """SC of groups, in float64 on the host; NaN where none has two items."""
    u = _units(q)
    sums = np.zeros((groups.count, u.shape[1]))
    np.add.at(sums, groups.group, u)
    n = groups.sizes.astype(np.float64)
    several = n > 1
    if not several.any():
        return float("nan")
    each = (np.square(sums).sum(1) - n)[several] / (n * n - n)[several]
    return float(each.mean())


def discrimination(
    q: Any,
    groups: measures.Groups,
    t: float = 2.0,
    *,
    pairs: int = 2**21,
    seed: int = 0,
) -> float:
    """PD of the groups' mean vectors, in float64 on the host.

    Args:
      q: vectors.
      groups: of them.
      t: inverse temperature.
      pairs: drawn at random by ``seed`` where there are more than 4,096 groups.
      seed: see ``pairs``.

    Returns:
      PD; NaN for fewer than two groups.
    """
    q = np.asarray(q, np.float64)
    centres = np.zeros((groups.count, q.shape[1]))
    np.add.at(centres, groups.group, q)
    u = _units(centres / groups.sizes[:, None])
    m = len(u)
    if m < 2:
        return float("nan")
    if m > measures.MAX_GROUPS:
        rng = np.random.default_rng(seed)
        i, j = rng.integers(0, m, pairs), rng.integers(0, m - 1, pairs)
        j += j >= i
        total = 0.0
        for part in np.array_split(np.arange(pairs), max(1, pairs // 2**16)):
            cosine = (u[i[part]] * u[j[part]]).sum(1)
            total += np.exp(-t * (1 - cosine)).sum()
        return float(np.log(total / pairs))
    total = 0.0
    for rows in np.array_split(np.arange(m), max(1, m // 512)):
        total += np.exp(-t * (1 - u[rows] @ u.T)).sum()
    return float(np.log((total - m) / (m * m - m)))


def _units(q: Any) -> np.ndarray:
    q = np.asarray(q, np.float64)
    return q / np.maximum(np.linalg.norm(q, axis=1, keepdims=True), 1e-30)
