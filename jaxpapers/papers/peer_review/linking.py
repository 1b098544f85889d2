"""Which answer belongs to which point: repeated words, labels, order.

A response repeats the reviewers' words, whole or in part, before it answers. A paragraph
is a quote if its runs of three words are a letter's; in italics half of them are enough.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxpapers.papers.peer_review import units
from jaxpapers.papers.peer_review.schema import Link, Span

PLAIN, STYLED = 0.75, 0.5
SHORT = 6  # Words below which a quote must be a run of the letter's words.


class Quote(NamedTuple):
    """A paragraph of a response that repeats a letter.

    Attributes:
      letters: indices of the letter's paragraphs.
      score: share of its runs of words that they have.
      by: quote or number.
    """

    letters: tuple[int, ...]
    score: float
    by: str


class Linked(NamedTuple):
    """Links of points by their index, and points that only the response has."""

    links: Mapping[int, list[Link]]
    only_quoted: list[tuple[Any, tuple[Span, ...], tuple[Link, ...]]]


def quotes(
    text: str, letters: Sequence[Any], answers: Sequence[Any]
) -> dict[int, Quote]:
    """Index of an answer's paragraph -> the letter's paragraphs that it repeats."""
    # Paragraphs that page noise has cut are whole here.
    chains: list[list[int]] = []
    for i, u in enumerate(letters):
        chains[-1].append(i) if u.joined and chains else chains.append([i])
    heads = [letters[c[0]] for c in chains]
    tokens = [
        units.words("\n".join(text[letters[i].start + letters[i].lead : letters[i].end]
                              for i in c))
        for c in chains
    ]  # fmt: skip
    grams = [units.trigrams(t) for t in tokens]
    where: dict[tuple[str, ...], list[int]] = {}
    for i, g in enumerate(grams):
        for gram in g:
            where.setdefault(gram, []).append(i)
    found: dict[int, Quote] = {}
    last = -1
    for j, u in enumerate(answers):
        if u.figure:
            continue
        part = text[u.start : u.end]
        if units.ELLIPSIS.match(part):
            continue
        own = units.words(part[u.lead :])
        quote = _repeated(own, u, heads, tokens, grams, where, last)
        if quote is None and u.label:
            quote = _numbered(own, u, heads, tokens)
        if quote is not None:
            last = max(quote.letters)
            members = tuple(i for c in quote.letters for i in chains[c])
            found[j] = quote._replace(letters=members)
    return found


def _repeated(own, u, letters, tokens, grams, where, last) -> Quote | None:
    """The letter's paragraphs that have most of a paragraph's words."""
    if len(own) < SHORT:
        if u.styled < 0.5 and not u.label or not own:
            return None
        runs = [
            i for i, t in enumerate(tokens)
            if len(own) >= 3 and _has_run(t, own) or t and t == own
        ]  # fmt: skip
        runs = _nearest(runs, letters, u, last)
        return Quote((runs[0],), 1.0, "quote") if runs else None
    mine = units.trigrams(own)
    counts: dict[int, int] = {}
    for gram in mine:
        for i in where.get(gram, ()):
            counts[i] = counts.get(i, 0) + 1
    if not counts:
        return None
    best = max(counts.values())
    top = _nearest([i for i, n in counts.items() if n == best], letters, u, last)
    chosen = {top[0]}
    # A paragraph may repeat several of the letter's, each with words of its own.
    same = (letters[top[0]].round, letters[top[0]].reviewer)
    covered = mine & grams[top[0]]
    for i in sorted(counts, key=lambda i: -counts[i]):
        new = (mine & grams[i]) - covered
        here = (letters[i].round, letters[i].reviewer) == same
        if here and len(new) >= max(0.6 * len(grams[i]), 4):
            chosen.add(i)
            covered |= new
    score = len(covered) / len(mine)
    least = STYLED if u.styled >= 0.5 else PLAIN
    return Quote(tuple(sorted(chosen)), score, "quote") if score >= least else None


def _nearest(indices, letters, u, last) -> list[int]:
    """Candidates: of the same round and reviewer first, then the next in order."""
    return sorted(
        indices,
        key=lambda i: (
            letters[i].round != u.round,
            u.reviewer > 0 and letters[i].reviewer != u.reviewer,
            i < last,
            abs(i - last),
        ),
    )


def _numbered(own, u, letters, tokens) -> Quote | None:
    """A labelled line whose words are those of the letter's point of that label."""
    number = units.number_in(u.label)
    same = [
        i for i, v in enumerate(letters)
        if v.label and number and units.number_in(v.label) == number
        and v.round == u.round and (v.reviewer == u.reviewer or not u.reviewer)
    ]  # fmt: skip
    for i in same:
        inside = set(tokens[i])
        share = sum(t in inside for t in own) / max(len(own), 1)
        if own and share >= 0.6 and (u.styled >= 0.5 or len(own) <= 20 or share >= 0.9):
            return Quote((i,), share, "number")
    return None


def _has_run(tokens: Sequence[str], run: Sequence[str]) -> bool:
    n = len(run)
    return any(list(tokens[i : i + n]) == list(run) for i in range(len(tokens) - n + 1))


def link(
    text: str,
    letters: Sequence[Any],
    answers: Sequence[Any],
    found: Mapping[int, Quote],
    points: Sequence[Any],
) -> Linked:
    """Gives the paragraphs of responses a kind and a point; the links of points.

    Args:
      text: the source.
      letters: with the index of their point as ``group``.
      answers: paragraphs of responses; ``kind`` and ``group`` are set here.
      found: of ``quotes``.
      points: as collected from the letters.
    """
    links: dict[int, list[Link]] = {}
    alone: list[tuple[Any, tuple[Span, ...], tuple[Link, ...]]] = []
    # Authors may set their own words in italics, and the reviewers' plain.
    told = [answers[j].styled > 0.5 for j in found]
    reversed_ = bool(told) and sum(told) < 0.5 * len(told)
    markers = sum(bool(units.REPLY.match(text[u.start : u.end])) for u in answers)
    turns = _turns(text, letters, answers, found, markers >= 2, reversed_)
    _by_order(text, turns, points, links, letters, found)
    for quoted, said in turns:
        spans = tuple(
            Span(u.start, u.end) for u in said if u.section.lower() != "references"
        )
        targets: dict[int, list[int]] = {}
        for j in quoted:
            for i in found[j].letters if j in found else ():
                if letters[i].group >= 0:
                    targets.setdefault(letters[i].group, []).append(j)
        for n, js in _elided(text, letters, answers, quoted, found).items():
            if n not in targets:
                quote = tuple(Span(answers[j].start, answers[j].end) for j in js)
                links.setdefault(n, []).append(Link(quote, spans, "ellipsis", 1.0))
        for n, js in targets.items():
            js = list(dict.fromkeys(js))
            best = max(js, key=lambda j: found[j].score)
            quote = tuple(Span(answers[j].start, answers[j].end) for j in js)
            links.setdefault(n, []).append(
                Link(quote, spans, found[best].by, found[best].score)
            )
        group = min(targets) if targets else -1
        new = [j for j in quoted if j not in found and not units.ELLIPSIS.match(
            text[answers[j].start : answers[j].end])]  # fmt: skip
        if new and not targets:
            own = tuple(Span(answers[j].start, answers[j].end) for j in new)
            reply = (Link((), spans, "quote", 1.0),) if said else ()
            alone.append((answers[new[0]], own, reply))
            group = len(points) + len(alone) - 1
        for j in quoted:
            answers[j].kind = "point" if j in new and not targets else "quote"
            answers[j].group = group
        for u in said:
            if not u.kind:
                answers_it = quoted and u.section.lower() != "references"
                u.kind = "reply" if answers_it else "response"
                u.group = group if answers_it else -1
    return Linked(links, alone)


def _elided(text, letters, answers, quoted, found) -> dict[int, list[int]]:
    """Points that stand between two quotes where the authors wrote an ellipsis."""
    between: dict[int, list[int]] = {}
    for a, j, b in zip(quoted, quoted[1:], quoted[2:]):
        part = text[answers[j].start : answers[j].end]
        if not units.ELLIPSIS.match(part) or a not in found or b not in found:
            continue
        first, last = max(found[a].letters), min(found[b].letters)
        for i in range(first + 1, last):
            same = (letters[i].round, letters[i].reviewer) == (
                letters[first].round, letters[first].reviewer
            )  # fmt: skip
            if same and letters[i].group >= 0:
                between.setdefault(letters[i].group, []).append(j)
    return between


def _turns(
    text, letters, answers, found, marked, reversed_
) -> list[tuple[list[int], list[Any]]]:
    """Runs of quotes, each with the paragraphs that follow it; the first may quote
    nothing."""
    turns: list[tuple[list[int], list[Any]]] = [([], [])]
    context = None
    for j, u in enumerate(answers):
        part = text[u.start : u.end]
        here = (u.round, u.reviewer)
        if here != context:
            turns.append(([], []))
            context = here
        if u.joined and turns[-1] != ([], []):
            turns[-1][1].append(u) if turns[-1][1] else turns[-1][0].append(j)
            continue
        reply = bool(units.REPLY.match(part))
        ellipsis = bool(units.ELLIPSIS.match(part))
        quote = not reply and (
            j in found
            or ellipsis
            and bool(turns[-1][0])
            and not turns[-1][1]
            or _unmatched(text, answers, j, marked, letters, turns[-1], reversed_)
        )
        if quote:
            if turns[-1][1]:
                turns.append(([], []))
            turns[-1][0].append(j)
        else:
            turns[-1][1].append(u)
    return [t for t in turns if t[0] or t[1]]


def _unmatched(text, answers, j, marked, letters, turn, reversed_) -> bool:
    """Whether a paragraph repeats something that the letters do not show."""
    u = answers[j]
    part = text[u.start : u.end].strip()
    if u.figure or len(units.words(part)) < 4:
        return False
    if u.styled > 0.9 and not reversed_:
        heads = part.endswith(":") and len(part.split()) < 10
        return not heads and len(units.words(part)) >= 8
    if not marked:
        return False
    # "Response:" lines: what stands before one is the reviewer's.
    after = answers[j + 1] if j + 1 < len(answers) else None
    before_marker = after is not None and bool(
        units.REPLY.match(text[after.start : after.end])
    )
    if u.label and not turn[1]:
        return True
    return before_marker and (bool(u.label) or not turn[0] or not letters)


def _by_order(text, turns, points, links, letters, found) -> None:
    """Labelled paragraphs without quotes answer the points in their order.

    Where a response numbers its answers and repeats nothing, each labelled paragraph is
    an answer; they are aligned with the unanswered points by number, else in order by
    the words that they share.
    """
    for quoted, said in turns:
        if quoted or not said:
            continue
        starts = [k for k, u in enumerate(said) if u.label and u.label != "*"]
        if not starts:
            continue
        u = said[0]
        open_ = [
            n for n, p in enumerate(points)
            if p.round == u.round and (p.reviewer == u.reviewer or not u.reviewer)
            and not p.links and not any(
                letters[i].group == n for q in found.values() for i in q.letters)
        ]  # fmt: skip
        if not open_:
            continue
        runs = [said[a:b] for a, b in zip(starts, [*starts[1:], len(said)])]
        for run, n in _aligned(text, runs, [(n, points[n]) for n in open_]):
            spans = tuple(Span(v.start, v.end) for v in run)
            number = units.number_in(run[0].label)
            same = number and number == units.number_in(points[n].label)
            by = "number" if same else "order"
            links.setdefault(n, []).append(Link((), spans, by, 1.0))
            for v in run:
                v.kind, v.group = "reply", n


def _aligned(text, runs, open_) -> list[tuple[Any, int]]:
    """Pairs of answers and points: by number if points have them, else the monotone
    alignment with most shared words."""
    numbered = {units.number_in(p.label): n for n, p in reversed(open_) if p.label}
    if numbered and "" not in numbered:
        pairs = [(r, numbered.get(units.number_in(r[0].label))) for r in runs]
        return [(r, n) for r, n in pairs if n is not None]
    bags = [set(units.words(" ".join(text[a:b] for a, b in p.spans))) for _, p in open_]
    common = set.intersection(*bags) if len(bags) > 1 else set()
    score = []
    for r in runs:
        own = {w for u in r for w in units.words(text[u.start : u.end])}
        score.append(
            [len({w for w in own & b - common if len(w) > 4}) / (1 + len(b)) ** 0.5
             for b in bags]
        )  # fmt: skip
    best: list[list[tuple[float, tuple]]] = [[(0.0, ())] * (len(bags) + 1)]
    for i in range(len(runs)):
        row: list[tuple[float, tuple]] = [best[-1][0]]
        for k in range(len(bags)):
            pair = best[-1][k][0] + score[i][k], (*best[-1][k][1], (i, k))
            row.append(max(row[-1], best[-1][k + 1], pair, key=lambda x: x[0]))
        best.append(row)
    return [(runs[i], open_[k][0]) for i, k in best[-1][-1][1] if score[i][k] > 0]
