"""Networks for the tests of DNW: made by hand, and drawn at random in one shape."""

import dataclasses

import numpy as np

from jaxpapers.data import characters
from jaxpapers.papers import dnw

CSV = characters.EXAMPLE


def hand_made():
    """The 30 characters of the example."""
    table = characters.table(CSV)
    return dnw.build_network(table.components, table.count)


def random_net(seed, n=10, share=0.3):
    """Each node is made of some of the nodes before it, under a random name."""
    rng = np.random.default_rng(seed)
    names = [chr(0x4E00 + i) for i in rng.permutation(n)]
    parts = {
        name: [part for part in names[:i] if rng.random() < share]
        for i, name in enumerate(names)
    }
    for components in parts.values():  # Some occur twice.
        components += components[: rng.integers(0, 2)]
    # Few values, so that frequencies tie and vanish.
    freq = {name: int(rng.integers(0, 4)) for name in names} | {names[0]: 2}
    return dnw.build_network(parts, freq)


def stack(nets):
    """Networks of the same number of nodes as one, with a leading axis."""
    links = max(len(net.comp) for net in nets)
    levels = max(net.n_levels for net in nets)
    same = []
    for net in nets:
        net = dnw.padded(net, links) if len(net.comp) else net
        same.append(dataclasses.replace(net, chars=nets[0].chars, n_levels=levels))
    arrays = {
        f.name: np.stack([getattr(net, f.name) for net in same])
        for f in dataclasses.fields(dnw.CharNet)
        if f.name not in ("chars", "n_levels")
    }
    return dataclasses.replace(same[0], **arrays)


def stack_closures(nets):
    """Their closures, padded to one shape."""
    every = [dnw.closures(net) for net in nets]
    n = len(nets[0].chars)

    def pad(name, fill):
        width = max(getattr(c, name).shape[1] for c in every)
        tables = (getattr(c, name) for c in every)
        return np.stack(
            [np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=fill)
             for t in tables]
        )  # fmt: skip

    rounds = max(c.rounds for c in every)
    return dnw.Closures(pad("nodes", n), pad("part", 0), pad("whole", 0), rounds)


def stack_links(nets):
    """Their links by level, padded to one shape."""
    levels = max(net.n_levels for net in nets)
    tall = [dataclasses.replace(net, n_levels=levels) for net in nets]
    every = [dnw.level_links(net) for net in tall]
    width = max(links.comp.shape[1] for links in every)
    return dnw.LevelLinks(
        *(np.stack([np.pad(t, ((0, 0), (0, width - t.shape[1]))) for t in tables])
          for tables in zip(*every))
    )  # fmt: skip


def dense(net):
    """A, without multiplicity."""
    a = np.zeros((len(net.chars),) * 2)
    a[net.comp[net.mult > 0], net.whole[net.mult > 0]] = 1
    return a


def parts(net):
    """Node -> set of its direct components."""
    sets = [set() for _ in net.chars]
    for c, w, m in zip(net.comp, net.whole, net.mult):
        if m:
            sets[w].add(int(c))
    return sets


def course(order, net, credit):
    """(C, F, N) after each target of an order, by sets and loops."""
    below, known, points = parts(net), set(), []
    cost = usage = 0.0
    for target in order:
        if target in known:
            points.append((cost, usage, len(known)))
            continue
        closure, todo = {int(target)}, [int(target)]
        while todo:
            fresh = below[todo.pop()] - known - closure
            closure |= fresh
            todo += fresh
        cost += net.own_cost[list(closure)].sum()
        new = closure if credit == "learn" else {int(target)}
        known |= new
        usage += net.freq[list(new)].sum()
        points.append((cost, usage, len(known)))
    return np.array(points).T
