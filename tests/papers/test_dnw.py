"""The measure, the network and the orders of DNW: closed forms, oracles, bad input."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.mesh import make_mesh
from jaxpapers.papers import dnw
from jaxpapers.papers.dnw import network
from tests.papers.dnw_networks import (
    dense,
    hand_made,
    parts,
    random_net,
    stack,
    stack_links,
)
from tests.programs import together

B = 0.35
CHAIN = {"b": ["a"], "c": ["b"], "a": []}
DIAMOND = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


def by_name(net, values):
    return dict(zip(net.chars, np.asarray(values).tolist()))


def sweep(*args, **options):
    return np.asarray(dnw.sweep(*args, **options))


def fixpoint(net, b):
    weight = dnw.weights(net)
    return dnw.dnw(net.freq, net.comp, net.whole, weight, b, n_levels=net.n_levels)


def names(net, order):
    return [net.chars[i] for i in order]


def test_closed_forms(float64):
    cases = [
        (CHAIN, {"c": 1}, {"a": B**2, "b": B, "c": 1.0}),
        (
            DIAMOND,
            {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4},
            {"a": 0.1 + B * 0.5 + 2 * B**2 * 0.4, "b": 0.2 + B * 0.4,
             "c": 0.3 + B * 0.4, "d": 0.4},
        ),
        ({"x": [], "y": []}, {"x": 3, "y": 1}, {"x": 0.75, "y": 0.25}),
        ({"林": ["木", "木"], "木": []}, {"林": 1}, {"林": 1.0, "木": B}),
    ]  # fmt: skip
    nets = [dnw.build_network(table, freq) for table, freq, _ in cases]
    found = together(lambda nets: [fixpoint(net, B) for net in nets], nets)
    for net, w, (_, _, expected) in zip(nets, found, cases):
        assert by_name(net, w) == pytest.approx(expected, rel=1e-12)


def test_against_a_dense_solve_with_its_derivatives(float64):
    """9(a): solve, dW/db = (I - bA)^-1 A W, dW/df = (I - bA)^-1, sum W = sum f m."""
    nets = [random_net(seed, n=12) for seed in range(8)]

    def all_of(net, links, b):
        w, dw_db = jax.jvp(lambda x: fixpoint(net, x), (b,), (1.0,))
        dw_df = jax.jacrev(lambda f: fixpoint(dataclasses.replace(net, freq=f), b))(
            net.freq
        )
        levels = jax.jvp(lambda x: dnw.dnw_levels(net.freq, *links, x), (b,), (1.0,))
        return w, dw_db, dw_df, levels

    w, dw_db, dw_df, levels = together(
        jax.vmap(all_of, (0, 0, None)), stack(nets), stack_links(nets), np.float64(B)
    )
    for i, net in enumerate(nets):
        a = dense(net)
        inverse = np.linalg.inv(np.eye(len(a)) - B * a)
        np.testing.assert_allclose(w[i], inverse @ net.freq, rtol=1e-9)
        np.testing.assert_allclose(dw_db[i], inverse @ a @ w[i], rtol=1e-9)
        np.testing.assert_allclose(dw_df[i], inverse, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(levels[0][i], w[i], rtol=1e-9)
        np.testing.assert_allclose(levels[1][i], dw_db[i], rtol=1e-9)
        m = np.zeros(len(a))
        for v in np.argsort(net.level, kind="stable"):
            m[v] = 1 + B * sum(m[c] for c in parts(net)[v])
        assert w[i].sum() == pytest.approx((net.freq * m).sum(), rel=1e-12)


@pytest.mark.matrix  # Half a second of imports for what the dense solve says too.
def test_against_katz_centrality(float64):
    nx = pytest.importorskip("networkx")
    net = random_net(3, n=30, share=0.1)
    w = sweep(net, [0.2, 0.9])
    graph = nx.DiGraph()
    graph.add_nodes_from(range(30))
    graph.add_edges_from(zip(net.whole.tolist(), net.comp.tolist()))
    for b, row in zip((0.2, 0.9), w):
        katz = nx.katz_centrality_numpy(
            graph, alpha=b, beta=dict(enumerate(net.freq)), normalized=False
        )
        np.testing.assert_allclose(row, [katz[i] for i in range(30)], rtol=1e-9)


def test_a_sweep_is_its_rows_on_any_mesh_and_grows_with_b():
    net = random_net(0, n=40, share=0.1)
    b = np.linspace(0, 1, 7)  # Which 2 does not divide.
    rows = sweep(net, b)
    single = together(fixpoint, net, np.float32(b[3]))
    np.testing.assert_allclose(rows[3], single, rtol=1e-5)
    split = sweep(net, b, mesh=make_mesh({"data": 4, "model": 2}))
    np.testing.assert_allclose(split, rows, rtol=1e-5)
    np.testing.assert_allclose(rows[0], net.freq, rtol=1e-6)
    assert (np.diff(rows, axis=0) >= -1e-7).all()
    assert (rows[-1][net.comp] >= rows[-1][net.whole] - 1e-6).all()


def test_multiplicity_and_names():
    net = hand_made()
    w, counted = sweep(net, [B]), sweep(net, [B], use_multiplicity=True)
    more = by_name(net, counted[0] - w[0])
    # 林 is 木 twice, and 森 is 木 and 林: b (f + b f) more.
    f = by_name(net, net.freq)
    assert more["木"] == pytest.approx(B * (f["林"] + B * f["森"]), rel=1e-3)
    assert {c for c, x in more.items() if abs(x) > 1e-6} == {"木"}
    # Other names of the same nodes: the same W under the new ones.
    renamed = {c: chr(0x5000 + (17 * i) % 31) for i, c in enumerate(net.chars)}
    table = {
        renamed[net.chars[w]]: [renamed[net.chars[c]] for c in components]
        for w, components in enumerate(parts(net))
    }
    other = dnw.build_network(table, {renamed[c]: x for c, x in f.items()})
    new = by_name(other, sweep(other, [B])[0])
    assert {renamed[c]: x for c, x in by_name(net, w[0]).items()} == pytest.approx(new)


def test_the_network_by_hand():
    net = hand_made()
    assert len(net.chars) == 30 and len(net.comp) == 27 and net.mult.sum() == 28
    levels = by_name(net, net.level)
    assert np.bincount(net.level).tolist() == [0, 16, 10, 3, 1]
    assert (levels["照"], levels["昭"], levels["召"], levels["龟"]) == (4, 3, 2, 1)
    assert net.freq.sum() == pytest.approx(1) and net.chars[0] == "的"
    assert net.chars[-3:] == (
        "勺",
        "灬",
        "𠂇",
    )  # Ties by code point; 𠂇 is not in the BMP.
    assert by_name(net, net.own_cost)["林"] == 2 and net.own_cost.sum() == 44
    fewer = dnw.build_network({"林": ["木", "木"], "木": []}, {"林": 1}, costs={"木": 4},
                              cost="combinations")  # fmt: skip
    assert by_name(fewer, fewer.own_cost) == {"林": 1, "木": 4}
    closed = dnw.build_network(
        {"照": ["昭", "灬"], "昭": ["日", "召"]}, {"照": 1}, ["照"], close=True
    )
    assert set(closed.chars) == set("照昭灬日召")
    alone = dnw.build_network({"口": ["口"]}, {"口": 1})
    assert alone.level.tolist() == [1] and sweep(alone, [1])[0].tolist() == [1]


@pytest.mark.parametrize(
    "decomposition, freq, options, message",
    [
        (
            {"a": ["c"], "b": ["a"], "c": ["b"], "d": ["a"]}, {"a": 1}, {},
            r"cycle: (a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c) ",
        ),
        ({"a": ["b"]}, {"a": 1}, {}, "'b' of 'a' is not among.*close=True"),
        ({"a": []}, {"a": -1}, {}, "finite and >= 0, got -1.0 for 'a'"),
        ({"a": []}, {"a": float("nan")}, {}, "finite and >= 0, got nan"),
        ({"a": []}, {}, {}, "all frequencies are 0"),
        ({"a": []}, {"a": 1}, {"seeds": ["a", "a"]}, "'a' is given twice"),
        ({}, {"a": 1}, {}, "has no nodes"),
        ({"a": []}, {"a": 1}, {"costs": {"a": 0}}, "costs must be > 0, got 0.0 for 'a'"),
        ({"a": []}, {"a": 1}, {"cost": "strokes"}, "cost must be one of"),
    ],
)  # fmt: skip
def test_bad_networks(decomposition, freq, options, message):
    with pytest.raises(ValueError, match=message):
        dnw.build_network(decomposition, freq, **options)


def test_bad_arguments(key):
    net = dnw.build_network(CHAIN, {"c": 1})
    for order in ([0, 1], [0, 0, 1], [1, 2, 3], [0.0, 1.0, 2.0]):
        with pytest.raises(ValueError, match="permutation of 0 .. 2"):
            dnw.check_order(order, 3)
    for b, message in (([1.1], r"lie in \[0, 1\]"), ([np.nan], "numbers"),
                       ([-0.1], "allow_any_b")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sweep(net, b)
    w = sweep(net, [-2.0], allow_any_b=True)[0]
    assert by_name(net, w) == {"a": 4, "b": -2, "c": 1}
    with pytest.raises(ValueError, match="'x' is not a node"):
        dnw.explain(net, "x")
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        dnw.sample_order(key, jnp.ones(2), -1.0)


def test_orders_by_hand():
    net = hand_made()

    def sorts(net, noo_all):
        scores = {
            "ufo": dnw.ufo(net), "direct": dnw.noo_direct(net), "all": noo_all,
            "level": dnw.by_level(net), "density": dnw.frequency_per_cost(net),
            "dnw": fixpoint(net, B),
        }  # fmt: skip
        orders = {k: dnw.order_from_score(s, net.freq) for k, s in scores.items()}
        return orders | {"loach": dnw.loach_order(net)}

    orders = together(sorts, net, dnw.noo_all(net).astype(np.float32))
    first = {name: "".join(names(net, order)[:6]) for name, order in orders.items()}
    # Users: 日 明早旦昭, 口 如右召, 人 但休, 女 如好, 木 休林森, 召 昭, 林 森.
    assert first["ufo"] == "的人如好一日"
    assert first["direct"] == "日口木人女一"
    assert first["all"] == "日口木刀人一"  # 日 照但 too, 口 照昭 too; 刀 召昭照.
    assert first["level"] == "人一日口女月"
    assert first["density"] == "的人一日口如"
    assert first["loach"] == "白勺的人一日"
    # The sort puts 的 before 白 and 勺, which inherit a third of it: 155 and 140 here.
    assert first["dnw"] == "的白勺人女日"
    below = parts(net)
    place = np.argsort(orders["loach"])
    assert all(place[c] < place[w] for w in range(30) for c in below[w])


def test_components_move_to_just_before(float64):
    nets = [random_net(seed) for seed in range(40)]
    orders = np.stack([np.random.default_rng(i).permutation(10) for i in range(40)])
    moved = together(
        jax.vmap(dnw.components_first), orders.astype(np.int32), stack(nets)
    )
    for net, order, result in zip(nets, orders, moved):
        expected, below = [], parts(net)
        for target in order:
            closure, todo = set(), [int(target)]
            while todo:
                node = todo.pop()
                if node not in closure | set(expected):
                    closure.add(node)
                    todo += below[node]
            expected += sorted(closure, key=lambda v: (net.level[v], v))
        assert result.tolist() == expected


def test_greedy_is_the_slow_greedy_and_no_order_beats_smiths_bound():
    for seed in range(12):
        net = random_net(seed, n=6)
        below, known, expected = parts(net), set(), []
        while len(known) < 6:
            best = None
            for v in sorted(set(range(6)) - known):
                closure, todo = set(), [v]
                while todo:
                    node = todo.pop()
                    if node not in closure | known:
                        closure.add(node)
                        todo += below[node]
                index = list(closure)
                density = net.freq[index].sum() / net.own_cost[index].sum()
                if best is None or density > best[0] + 1e-12:
                    best = density, sorted(closure, key=lambda v: (net.level[v], v))
            known |= set(best[1])
            expected += best[1]
        greedy = dnw.density_greedy(net)
        times = []
        for order in (expected, greedy, *itertools.permutations(range(6))):
            order = np.array(order)
            place = np.argsort(order)
            if all(place[c] < place[w] for w in range(6) for c in below[w]):
                cost = np.cumsum(net.own_cost[order])
                times.append((net.freq[order] * cost).sum())
        bound = dnw.smith_lower_bound(net.freq, net.own_cost)
        # The same densities may leave a choice; S is what the choice does not change.
        assert times[1] == pytest.approx(times[0]) and bound <= min(times) + 1e-12


def test_plackett_luce(float64, key):
    score = np.array([0.4, 0.05, 0.3, 0.1, 0.15])
    orders = np.array(list(itertools.permutations(range(5))), np.int32)

    def body(key, score):
        log_p = jax.vmap(lambda o: dnw.log_prob(o, score))(orders)
        keys = jax.random.split(key, 4000)
        draws = jax.vmap(lambda k: dnw.sample_order(k, score)[0])(keys)
        cold = dnw.sample_order(key, score, 0.0)
        zero = dnw.sample_order(key, score.at[2].set(0.0))[-1]
        half = dnw.log_prob(jnp.asarray(orders[0]), score, 0.5)
        return log_p, draws, cold, zero, half

    log_p, draws, cold, zero, half = together(body, key, score)
    assert np.exp(log_p).sum() == pytest.approx(1)
    # 0 1 2 3 4: .4 * .05 / .6 * .3 / .55 * .1 / .25.
    assert np.exp(log_p[0]) == pytest.approx(0.4 * 0.05 / 0.6 * 0.3 / 0.55 * 0.4)
    squares = score**2
    remaining = np.cumsum(squares[::-1])[::-1]
    assert half == pytest.approx(np.log(squares / remaining).sum())
    expected = 4000 * score
    chi2 = ((np.bincount(draws, minlength=5) - expected) ** 2 / expected).sum()
    assert chi2 < 18.5  # The 0.1 percent quantile of 4 degrees of freedom.
    assert cold.tolist() == [0, 2, 4, 3, 1] and zero == 2


def test_explained():
    net = hand_made()
    terms = dnw.explain(net, "日", B, top=30)
    w = by_name(net, sweep(net, [B])[0])["日"]
    f = by_name(net, net.freq)
    assert sum(t.amount for t in terms) == pytest.approx(w, rel=1e-5)
    assert sum(t.share for t in terms) == pytest.approx(1)
    amounts = {t.char: t.amount for t in terms}
    assert amounts == pytest.approx(
        {"日": f["日"], **{c: B * f[c] for c in "明早旦昭"}, "但": B**2 * f["但"],
         "照": B**2 * f["照"]}
    )  # fmt: skip
    assert [t.char for t in dnw.explain(net, "日", B, top=2)] == ["日", "明"]


def test_networks_that_no_memory_holds(monkeypatch):
    """A chain has n^2 / 2 nodes below its nodes, a dense network n^3 / 6 links."""
    monkeypatch.setattr(network, "MAX_CLOSURES", 100)
    for n, count, message in (
        (9, 9, None), (20, 1, "more than 100 nodes below them in all, at node"),
        (13, 13, "more than 100 links below"),
    ):  # fmt: skip
        names = [chr(0x4E00 + i) for i in range(n)]
        parts = {x: names[max(0, i - count) : i] for i, x in enumerate(names)}
        net = dnw.build_network(parts, {names[0]: 1})
        if message is None:
            monkeypatch.setattr(network, "MAX_CLOSURES", 1 << 20)
            assert dnw.closures(net).nodes.shape == (n, n)
            monkeypatch.setattr(network, "MAX_CLOSURES", 100)
            continue
        with pytest.raises(ValueError, match=message):
            dnw.closures(net)
