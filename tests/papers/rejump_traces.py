"""Traces for the tests of ReJump: by hand, and drawn at random."""

from jaxpapers.papers import rejump

KINDS = {
    "c": rejump.CATEGORIES[0],
    "v": rejump.CATEGORIES[1],
    "b": rejump.CATEGORIES[2],
}


def by_hand(parents, walk="", *, blank=(), correct=(), corr=None):
    """A trace of nodes 1..n: parents (0: the root), and steps "1c2 2b1".

    Leaves are judged where ``correct`` is given.
    """
    inner = set(parents)
    nodes = tuple(
        rejump.Node(
            f"node{i}",
            "" if i in blank else f"p{i}",
            f"node{parent}" if parent else None,
            None,
            None if i in inner or correct == () else i in correct,
        )
        for i, parent in enumerate(parents, 1)
    )
    steps = tuple(
        rejump.Step(f"node{s[0]}", f"node{s[2:]}", KINDS[s[1]]) for s in walk.split()
    )
    return rejump.Trace(nodes, steps, corr)


def drawn(rng, n, steps=0):
    """A random trace of n nodes, of which the later ones hang on earlier ones."""
    parents = [0, *(int(rng.integers(1, i)) for i in range(2, n + 1))]
    blank = [i for i in range(1, n + 1) if rng.random() < 0.1]
    trace = by_hand(parents, blank=blank, correct=[int(rng.integers(1, n + 1))])
    here, walk = 1, []
    for _ in range(steps):
        there = int(rng.integers(1, n + 1))
        walk.append(
            rejump.Step(
                f"node{here}", f"node{there}", rejump.CATEGORIES[rng.integers(3)]
            )
        )
        here = there
    return trace._replace(walk=tuple(walk))


def nested(trace, blank=False):
    """The tree as (label, children) tuples; labels are "" or the text."""
    below = {}
    for node in trace.nodes:
        below.setdefault(node.parent, []).append(node)

    def tuples(node):
        return (node.problem, tuple(tuples(x) for x in below.get(node.name, [])))

    return tuples(below[None][0])


def as_value(trace):
    """The replies from which an extractor makes this trace."""
    nodes = [
        {"id": n.name, "parent": n.parent, "problem": n.problem, "result": n.result}
        for n in trace.nodes
    ]
    steps = [
        {"from": s.source, "to": s.target, "category": s.category} for s in trace.walk
    ]
    return {"nodes": nodes}, {"steps": steps}
