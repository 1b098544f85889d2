"""ReJump: recorded numbers, metrics by hand, edit distances, traces that are refused."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxpapers.mesh import make_mesh
from jaxpapers.papers import rejump
from jaxpapers.papers.rejump import edit_distance, trace
from tests.papers.rejump_traces import by_hand, drawn, nested
from tests.programs import together

MESHES = {"1x1": (1, 1), "8x1": (8, 1), "4x2": (4, 2)}


def lenient(case):
    fields = {k: case[k] for k in ("tree", "walk", "leaf_correct")}
    return rejump.parse_trace(fields, strict=False)


@pytest.mark.parity("lm", only=lambda entry: entry["kind"] == "rejump")
def test_recorded_metrics(case):
    recorded = json.loads((case.folder / case.entry["file"]).read_text())
    traces = [lenient(x) for x in recorded["cases"]]
    batch = rejump.to_arrays(traces)

    @functools.partial(together)
    def values(batch=batch):
        matrices = rejump.transition_matrix(batch.category)
        pairs = np.array([(p["a"], p["b"]) for p in recorded["pairs"]])
        return {
            "metrics": rejump.metrics(batch)._asdict(),
            "tree": rejump.tree_info(batch.parent),
            "visits": rejump.visits(batch),
            "kept": rejump.filtered_leaf_mask(batch),
            "matrices": matrices,
            "walks": rejump.walk_similarity(
                matrices[pairs[:, 0]], matrices[pairs[:, 1]]
            ),
        }

    for i, x in enumerate(recorded["cases"]):
        check_case(traces[i], x["expected"], values, i)
    for x in recorded["transition_matrices"]:
        np.testing.assert_allclose(
            values["matrices"][x["case"]], x["matrix"], atol=1e-6
        )
    pairs = recorded["pairs"]
    a, b = ([traces[p[side]] for p in pairs] for side in "ab")
    edits = rejump.tree_edit_distances(a, b)
    sizes = [[rejump.size(t) for t in side] for side in (a, b)]
    trees = rejump.tree_similarity(edits, *sizes)
    for i, p in enumerate(pairs):
        assert edits[i] == p["tree_edit_distance"]
        assert (sizes[0][i], sizes[1][i]) == (p["n_a"], p["n_b"])
        assert trees[i] == pytest.approx(p["tree_similarity"], abs=1e-6)
        clamped = p["walk_similarity_clamped"]
        assert values["walks"][i] == pytest.approx(clamped, abs=1e-6)
    # Where the reference differs from its clamped form, ours does not follow.
    other = [abs(p["walk_similarity"] - p["walk_similarity_clamped"]) for p in pairs]
    assert sum(x > 1e-3 for x in other) == 4


def check_case(t, expected, values, i):
    names = np.array([node.name for node in t.nodes])
    n = len(names)
    depth, leaf = values["tree"].depth[i, :n], values["tree"].is_leaf[i, :n]
    assert dict(zip(names[depth >= 0], depth[depth >= 0])) == expected["depths"]
    assert sorted(names[leaf]) == sorted(expected["leaves"])
    seen, kept = values["visits"][i], values["kept"][i]
    assert names[seen[seen >= 0]].tolist() == expected["visit_sequence"]
    assert names[seen[kept]].tolist() == expected["filtered_leaves"]
    m = {k: v[i] for k, v in values["metrics"].items()}
    counts = [sum(s.category == k for s in t.walk) for k in expected["counts"]]
    assert counts == list(expected["counts"].values())
    assert m["num_solutions"] == expected["solution_count"]
    assert m["judged"]
    for name in ("forgetting", "no_calculation_edge"):
        assert m[name] == expected[name], name
    assert m["defined"] == (expected["jump_distance"] is not None)
    wanted = {**expected, "jump_distance": expected["jump_distance"] or 0}
    for name in ("jump_distance", "verification_rate", "success_rate",
                 "overthinking_rate"):  # fmt: skip
        assert m[name] == pytest.approx(wanted[name], abs=1e-6), name


# A root with two subtrees: 2 (leaves 4, 5) and 3 (leaf 6).
PARENTS = (0, 1, 1, 2, 2, 3)
WALKS = {
    # Leaves 4, 5, 6: two apart, then four.
    "1c2 2c4 4b2 2c5 5b1 1c3 3c6": {
        "jump_distance": 3.0, "success_rate": 1 / 3, "overthinking_rate": 1 / 3,
        "verification_rate": 0.0, "forgetting": 0, "num_solutions": 3,
    },
    # A check of a leaf at a step that is none leaves the visits as they are.
    "1c2 2c4 4v1 1v4": {
        "jump_distance": 0.0, "success_rate": 0.0, "verification_rate": 0.5,
        "overthinking_rate": 0.0,
    },
    # A check at another leaf is a visit of it.
    "1c2 2c4 4v5 5v4": {"jump_distance": 2.0, "success_rate": 1 / 3,
                        "overthinking_rate": 1 / 3},
    # Derived again: as many calculations as nodes.
    "1c2 2c4 4b2 2c4 4b2 2c4 4b1 1c3 3c6": {
        "jump_distance": 4 / 3, "forgetting": 1, "success_rate": 0.0,
        "overthinking_rate": 0.0,
    },
    "1c2 2c5 5b2 2c4": {"overthinking_rate": 0.5, "success_rate": 0.5},
}  # fmt: skip


def test_metrics_by_hand():
    traces = [by_hand(PARENTS, walk, correct=[5]) for walk in WALKS]
    found = rejump.measure(traces)
    assert found.known.all() and found.whole.all()
    for i, (walk, expected) in enumerate(WALKS.items()):
        numbers = found.of(i)
        assert {k: numbers[k] for k in expected} == pytest.approx(expected), walk
    assert found.no_calculation_edge.tolist() == [0, 1, 1, 1, 1]
    np.testing.assert_allclose(
        list(found.means().values()), found.values.mean(0), rtol=1e-6
    )
    # Without a walk, or without labels, there are no such values.
    odd = rejump.measure([by_hand(PARENTS, "", correct=[5]), by_hand(PARENTS, "1c2")])
    assert odd.of(0)["jump_distance"] is None and odd.of(1)["jump_distance"] == 0
    assert odd.of(1)["success_rate"] is None and odd.of(0)["success_rate"] == 0
    assert odd.means() == {}


def test_order_of_leaves_in_the_reference():
    """Leaves 2 .. 10 of a star: as texts node10 comes first."""
    star = by_hand((0, *[1] * 9), "1c2 2b1 1c10", correct=[10])
    alone = by_hand((0, 1), "1c2", correct=[1], corr=True)
    by_name = rejump.measure([star, alone], order="reference_math")
    assert by_name.of(0)["success_rate"] == pytest.approx(1 / 9)
    assert by_name.of(0)["overthinking_rate"] == pytest.approx(8 / 9)
    assert by_name.of(1)["success_rate"] == 1  # As the trace's own answer is.
    walked = rejump.measure([star, alone])
    assert walked.of(0)["overthinking_rate"] == 0
    assert walked.of(1)["success_rate"] == 0
    # Nobody said whether the only leaf of a trace is right.
    alone = alone._replace(correct=None)
    unknown = rejump.measure([star, alone], order="reference_math")
    assert unknown.of(1)["success_rate"] is None
    assert unknown.whole.tolist() == [True, False]
    with pytest.raises(ValueError, match="order must be one of"):
        rejump.metrics(rejump.to_arrays([star]), order="names")


def test_distances_are_those_of_the_tree():
    rng = np.random.default_rng(0)
    traces = [drawn(rng, n) for n in (1, 7, 33, 40)]
    found = together(rejump.pairwise_distance, rejump.to_arrays(traces).parent)
    for i, t in enumerate(traces):
        n = len(t.nodes)
        place = {node.name: j for j, node in enumerate(t.nodes)}
        apart = np.full((n, n), np.inf)
        np.fill_diagonal(apart, 0)
        for node in t.nodes[1:]:
            j, k = place[node.name], place[node.parent]
            apart[j, k] = apart[k, j] = 1
        for k in range(n):
            apart = np.minimum(apart, apart[:, k : k + 1] + apart[k])
        np.testing.assert_array_equal(found[i, :n, :n], apart)
        assert (found[i, n:] == -1).all()


def test_walks_are_similar():
    a, b = ([[0, 1, 0, 1, 2, -1, 0]], [[0, 1, -1, 0, 1, 2, 0]])

    @jax.jit
    def matrices(a, b):
        p, q = rejump.transition_matrix(a), rejump.transition_matrix(b)
        other = rejump.transition_matrix(np.array([[0, 0, 0, 1, 1, 2, 2]]))
        return p, rejump.walk_similarity(p, p), rejump.walk_similarity(p, other), q

    p, same, apart, q = matrices(np.array(a), np.array(b))
    np.testing.assert_allclose(p[0], [[0, 1, 0], [0.5, 0, 0.5], [1 / 3] * 3], atol=1e-6)
    np.testing.assert_allclose(q[0], [[0, 1, 0], [0, 0, 1], [1, 0, 0]], atol=1e-6)
    assert same[0] == 1 and 0 < apart[0] < 0.7


@functools.cache
def edits(a, b):
    """Edit distance of two forests, by the definition: take the last roots away."""
    if not a or not b:
        count = len(repr(a + b).split("'")) // 2
        return count
    (x, below_x), (y, below_y) = a[-1], b[-1]
    return min(
        edits(a[:-1] + below_x, b) + 1,
        edits(a, b[:-1] + below_y) + 1,
        edits(below_x, below_y) + edits(a[:-1], b[:-1]) + (not (x and y)),
    )


@pytest.fixture(scope="module")
def trees():
    rng = np.random.default_rng(1)
    chain = by_hand(range(9))
    return [by_hand((0, *[1] * 8)), chain, by_hand((0,)),
            *(drawn(rng, int(rng.integers(2, 11))) for _ in range(9))]  # fmt: skip


def test_edit_distance_by_definition(trees):
    a = [x for x in trees for _ in trees]
    b = [y for _ in trees for y in trees]
    found = rejump.tree_edit_distances(a, b)
    expected = [edits((nested(x),), (nested(y),)) for x, y in zip(a, b)]
    np.testing.assert_array_equal(found, expected)
    table = found.reshape(len(trees), -1)
    np.testing.assert_array_equal(table, table.T)
    # A metric where no text is empty.
    full = [x for x in trees if all(node.problem for node in x.nodes)]
    keep = [i for i, x in enumerate(trees) if x in full]
    d = table[np.ix_(keep, keep)]
    assert (np.diag(d) == 0).all() and len(keep) > 4
    assert (d[:, None] <= d[:, :, None] + d[None]).all()
    # The other decomposition has the same distance at another cost.
    x = trees[-1]
    plain, mirrored = edit_distance.forest(x), edit_distance.forest(x, mirrored=True)
    assert len(plain.start) != len(mirrored.start) or plain.size.max() == len(x.nodes)


@pytest.mark.parametrize("peer", ["zss", "apted"])
def test_edit_distance_of_the_peers(trees, peer):
    module = pytest.importorskip(peer)

    def zss(a, b):
        def node(t):
            return module.Node(t[0], [node(x) for x in t[1]])

        return module.simple_distance(node(a), node(b), label_dist=relabel)

    def apted(a, b):
        class Costs(module.Config):
            def rename(self, x, y):
                return relabel(x[0], y[0])

            def children(self, node):
                return node[1]

        return module.APTED(a, b, Costs()).compute_edit_distance()

    # zss has no label for an absent node but "".
    def relabel(x, y):
        return 0 if x and y else 1

    distance = {"zss": zss, "apted": apted}[peer]
    a, b = trees, trees[1:] + trees[:1]
    expected = [distance(nested(x), nested(y)) for x, y in zip(a, b)]
    np.testing.assert_array_equal(rejump.tree_edit_distances(a, b), expected)


# Both programs on each mesh.
@pytest.mark.parametrize(
    "mesh",
    ["4x2", *(pytest.param(m, marks=pytest.mark.matrix) for m in ("1x1", "8x1"))],
)
def test_same_numbers_on_every_mesh(mesh):
    data, model = MESHES[mesh]
    devices = jax.devices()[: data * model]
    grid = make_mesh({"data": data, "model": model}, devices)
    rng = np.random.default_rng(2)
    traces = [drawn(rng, 6, 5) for _ in range(11)]
    for a, b in zip(rejump.measure(traces), rejump.measure(traces, grid)):
        np.testing.assert_array_equal(a, b)
    others = traces[1:] + traces[:1]
    np.testing.assert_array_equal(
        rejump.tree_edit_distances(traces, others),
        rejump.tree_edit_distances(traces, others, grid),
    )


def test_large_trees_are_compared_few_at_a_time(monkeypatch):
    """As many as the table has room for; what has none is refused, or -1."""
    rng, lanes, chunk = np.random.default_rng(3), [], edit_distance._chunk
    large = [drawn(rng, 40) for _ in range(5)]
    others = large[1:] + large[:1]

    def counted(pairs, count, *args):
        lanes.append(count)
        return chunk(pairs, count, *args)

    monkeypatch.setattr(edit_distance, "_chunk", counted)
    expected = rejump.tree_edit_distances(large, others)
    monkeypatch.setattr(edit_distance, "MAX_TABLE", 4 * 128 * 128)
    np.testing.assert_array_equal(rejump.tree_edit_distances(large, others), expected)
    assert lanes == [8, 4, 4]
    monkeypatch.setattr(edit_distance, "MAX_TABLE", 64 * 64)
    some = [large[0], by_hand((0, 1))]
    found = rejump.tree_edit_distances(some, some, strict=False)
    assert found.tolist() == [-1, 0]
    trees, walks = rejump.similarities(some, some, strict=False)
    assert np.isnan(trees[0]) and trees[1] == 1 and np.isfinite(walks).all()
    with pytest.raises(ValueError, match="at most 4,096: compare smaller trees"):
        rejump.tree_edit_distances(some, some)


def test_too_large_trees_are_refused():
    # Two children each, of which now the first, now the second has children.
    zigzag, last = [0], 1
    for i in range(300):
        zigzag += [last, last]
        last = len(zigzag) - i % 2
    big = by_hand(zigzag)
    with pytest.raises(ValueError, match="compare smaller trees"):
        rejump.tree_edit_distances([big], [big])
    with pytest.raises(ValueError, match="as many traces a as b"):
        rejump.tree_edit_distances([big], [])
    with pytest.raises(ValueError, match="no traces"):
        rejump.to_arrays([])
    with pytest.raises(ValueError, match="at most 8 and 8"):
        rejump.to_arrays([big], 8, 8)


def tree(**parents):
    return {name: {"Problem": name, "parent": p, "Result": None}
            for name, p in parents.items()}  # fmt: skip


def step(a, b, category="backtracking"):
    return {"from": a, "to": b, "category": category}


SOUND = tree(node1="none", node2="node1", node3="node2")
REFUSED = {
    trace.EMPTY_TREE: {"tree": {}},
    trace.TWO_ROOTS: {"tree": {**SOUND, **tree(node4=None)}},
    trace.NO_ROOT: {"tree": tree(node1="node2", node2="node1")},
    trace.CYCLE: {"tree": {**SOUND, **tree(node4="node5", node5="node4")}},
    trace.UNKNOWN_PARENT: {"tree": {**SOUND, **tree(node4="node9")}},
    trace.NO_PARENT: {"tree": {**SOUND, "node4": {"Problem": "x"}}},
    trace.UNKNOWN_CATEGORY: {"walk": [step("node1", "node2", "guessing")]},
    trace.UNKNOWN_NODE: {"walk": [step("node1", "node7")]},
    trace.WRONG_START: {"walk": [step("node2", "node1")]},
    trace.BROKEN_WALK: {"walk": [step("node1", "node2"), step("node1", "node3")]},
    trace.TOO_LARGE: {
        "tree": {f"node{i}": {"parent": i and "node0"} for i in range(2001)}
    },
    trace.BAD_SHAPE: {"tree": ["node1"]},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_traces(kind):
    source = {"tree": SOUND, "walk": [step("node1", "node2")], **REFUSED[kind]}
    with pytest.raises(rejump.TraceError, match=kind) as error:
        rejump.parse_trace(source)
    assert [issue.kind for issue in error.value.issues] == [kind]
    if kind in trace.TOLERABLE:
        found = rejump.validate(rejump.parse_trace(source, strict=False))
        assert [issue.kind for issue in found] == [kind]


@pytest.mark.parametrize(
    "source",
    [
        "no JSON", "[" * 100_000, "[]", '{"tree": {}}', "null",
        '{"tree": {"a": {"parent": null}, "a": {"parent": null}}, "walk": []}',
        {"tree": SOUND, "walk": "node1"}, {"tree": SOUND, "walk": [["node1"]]},
        {"tree": SOUND, "walk": [step("node1", 2)]}, {"tree": {"node1": 3}, "walk": []},
        {"tree": {"node1": {"parent": 3}}, "walk": []},
        {"tree": {"node1": {"parent": None, "Problem": 4}}, "walk": []},
        {"tree": {"node1": {"parent": None, "match_corr": "yes"}}, "walk": []},
        {"tree": SOUND, "walk": [], "corr": 0.5},
        {"tree": SOUND, "walk": [], "leaf_correct": {"node3": "x"}},
    ],
)  # fmt: skip
def test_what_is_no_trace(source):
    with pytest.raises(rejump.TraceError, match=trace.BAD_SHAPE):
        rejump.parse_trace(source)


def test_odd_walks_are_measured_as_the_reference_does():
    """Unknown categories do not count, but are no verification; unknown nodes are
    no leaves; what a cycle holds is in no tree."""
    walk = [step("node1", "node3", "calculation/derivation"),
            step("node3", "node9", "verification"),
            step("node9", "node3", "guess")]  # fmt: skip
    cyclic = {**SOUND, **tree(node4="node5", node5="node4")}
    t = rejump.parse_trace(
        {"tree": cyclic, "walk": walk, "leaf_correct": {"node3": 1}}, strict=False
    )
    found = rejump.measure([t])
    assert found.of(0) == pytest.approx(
        {"num_solutions": 1, "jump_distance": 0, "success_rate": 1,
         "verification_rate": 0.5, "overthinking_rate": 0.5, "forgetting": 0}
    )  # fmt: skip
    assert rejump.size(t) == 3


def test_steps_from_nowhere_are_dropped():
    walk = [step("none", "node1"), step("node1", "node2")]
    t = rejump.parse_trace({"tree": SOUND, "walk": walk})
    assert [s.target for s in t.walk] == ["node2"]
    assert rejump.parse_trace(json.dumps(rejump.to_dict(t))) == t
