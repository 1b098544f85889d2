"""ReJump in use: extraction by a model, exports, selection, the classifier."""

import json
import re
import xml.etree.ElementTree as xml

import numpy as np
import pytest

from jaxpapers.data import chat
from jaxpapers.papers import rejump
from tests.papers.rejump_traces import as_value, by_hand
from tests.programs import together


class Script:
    """A provider that gives values in order, as JSON."""

    identity = {"model": "script"}

    def __init__(self, *values):
        self.values, self.sent = list(values), []

    def __call__(self, messages, schema):
        self.sent.append((list(messages), schema))
        value = self.values.pop(0)
        return chat.Reply(value if isinstance(value, str) else json.dumps(value))


def test_extraction_of_a_search_trace():
    t = rejump.run("beam", (4, 5, 6, 10), 0)
    tree, walk = as_value(t)
    two_roots = {"nodes": [*tree["nodes"], {**tree["nodes"][0], "id": "x"}]}
    broken = {"steps": walk["steps"][1:]}
    script = Script("I think", two_roots, tree, broken, walk)
    ask = chat.Chat(script).structured
    assert rejump.extract(ask, "4 5 6 10", rejump.render(t), "game24") == t
    told = [messages[-1]["content"] for messages, _ in script.sent]
    assert "no JSON" in told[1] and "two roots: node1, x" in told[2]
    assert "walk does not start at root" in told[4]
    assert "node2 (parent node1)" in told[3] and "four numbers" in told[0]


MATH = by_hand((0, 1, 1), "1c2 2b1 1c3")


def test_extraction_of_mathematics(tmp_path):
    """Leaves are compared with the answer; texts that differ are asked about."""
    nodes = [
        {"id": "node1", "parent": "none", "problem": "Initial State", "result": None},
        {"id": "node2", "parent": "node1", "problem": "p2", "result": r"$\frac{2}{4}$"},
        {"id": "node3", "parent": "node1", "problem": "p3", "result": r"\boxed{1/2}"},
        {"id": "node4", "parent": "node1", "problem": "p4",
         "result": "3 [Path abandoned]"},
    ]  # fmt: skip
    walk = as_value(MATH)[1]
    replies = [{"nodes": nodes}, walk, {"parsed_value": "1/2", "match_status": "MATCH"}]
    script = Script(*replies)
    ask = chat.Chat(script, cache=tmp_path)
    t = rejump.extract(ask.structured, "?", "text", "math", answer="1/2")
    assert [node.correct for node in t.nodes] == [None, True, True, False]
    assert t.correct and len(script.sent) == 3
    # Again from the cache, without the model.
    recorded = chat.Chat(Script(), cache=tmp_path, recorded=True)
    assert rejump.extract(recorded.structured, "?", "text", "math", answer="1/2") == t
    unknown = rejump.extract(recorded.structured, "?", "text", "math")
    assert {node.correct for node in unknown.nodes} == {None}


@pytest.mark.parametrize(
    "reply",
    ["I cannot.", "{}", '{"nodes": 3}', '{"nodes": []}',
     '{"nodes": [{"id": "a", "parent": null, "problem": "x", "result": null}]}',
     '{"nodes": [{"id": 1, "parent": null, "problem": "x", "result": null}]}',
     '{"nodes": [{"id": "a", "parent": ["a"], "problem": "x", "result": null}]}',
     '{"nodes": [{"id": "node1", "parent": null, "problem": "x", "result": {}}]}'],
)  # fmt: skip
def test_extraction_gives_up(reply):
    ask = chat.Chat(Script(reply, reply), repairs=1).structured
    with pytest.raises(chat.BadReply, match="after 1 repairs"):
        rejump.extract(ask, "?", "text")


def test_the_root_of_a_puzzle_is_its_numbers():
    t = rejump.run("beam", (4, 5, 6, 10), 0)
    tree, walk = as_value(t)
    words = json.loads(json.dumps(tree))
    words["nodes"][0]["problem"] = "the numbers 4, 5, 6 and 10"
    del words["nodes"][1]["result"]
    script = Script(words, tree, walk)
    ask = chat.Chat(script).structured
    assert rejump.extract(ask, "4 5 6 10", "text", "game24") == t
    assert 'four numbers, "a,b,c,d"' in script.sent[1][0][-1]["content"]
    # A result may be left out: the walk is asked about all the same.
    nodes = {"nodes": [{"id": "node1", "parent": "none", "problem": "p"},
                       {"id": "node2", "parent": "node1", "problem": "q"}]}  # fmt: skip
    steps = as_value(by_hand((0, 1), "1c2"))[1]
    found = rejump.extract(chat.Chat(Script(nodes, steps)).structured, "?", "text")
    assert [node.result for node in found.nodes] == [None, None]


def test_what_is_not_extracted():
    ask = chat.Chat(Script()).structured
    for task, text, message in (
        ("chess", "x", "task must be one of"),
        ("math", " ", "is empty"),
        ("math", "x" * 200_001, "expected at most"),
    ):
        with pytest.raises(ValueError, match=message):
            rejump.extract(ask, "?", text, task)


NASTY = by_hand((0, 1, 1), "1c2 2b1 1c3 3v1 1v3", correct=[3])
NASTY = NASTY._replace(
    nodes=(
        NASTY.nodes[0]._replace(problem='a "quoted" <b> & \\ \n line'),
        *NASTY.nodes[1:],
    )
)


def test_exports():
    t = rejump.run("depth first", (1, 5, 5, 5), 0)
    for own in (t, NASTY):
        assert rejump.parse_trace(rejump.to_json(own)) == own
        root = xml.fromstring(rejump.to_svg(own, 'a "title" <&>'))
        name = "{http://www.w3.org/2000/svg}"
        # A line for every jump, a text for every node.
        jumps = [
            x for x in root.iter(f"{name}line") if x.find(f"{name}title") is not None
        ]
        assert len(jumps) == len(own.walk)
        groups = list(root.iter(f"{name}g"))
        assert len(groups) == len(own.nodes)
        width = float(root.attrib["width"])
        assert all(float(x.attrib["x2"]) <= width for x in jumps)
        # The jump is as high as its nodes are apart.
        y = {g.find(f"{name}title").text.partition(":")[0]:
             g.find(f"{name}circle").attrib["cy"] for g in groups}  # fmt: skip
        assert [x.attrib["y2"] for x in jumps] == [y[s.target] for s in own.walk]
        page = rejump.to_html(
            own, "<title>", {"jump_distance": None, "forgetting": 1.0}
        )
        assert "<script" not in page and "http://" not in page.replace(name[1:-1], "")
        assert "not defined" in page and "&lt;title&gt;" in page
        dot = rejump.to_dot(own)
        edges = [line for line in dot.splitlines() if "->" in line]
        along = sum("constraint" not in line for line in edges)
        assert (
            along == len(own.nodes) - 1 and dot.count('"') % 2 == dot.count('\\"') % 2
        )
        mermaid = rejump.to_mermaid(own).splitlines()
        assert mermaid[0] == "flowchart TD"
        pattern = r'  n\d+(\[".*"\]| --> n\d+| -\. "\d+ \w+" \.-> n\d+)'
        assert all(re.fullmatch(pattern, line) for line in mermaid[1:])
    alone = by_hand((0,))
    signs = alone._replace(nodes=(alone.nodes[0]._replace(problem='a && b < "#1"'),))
    line = rejump.to_mermaid(signs).splitlines()[1]
    assert line == '  n0["a #amp;#amp; b #lt; #quot;#35;1#quot;"]'
    assert xml.fromstring(rejump.to_svg(alone)) is not None


def test_selection():
    values = np.array([[1.0, 3.0, 3.0], [5.0, 2.0, 9.0]])
    defined = np.array([[True, True, True], [True, True, False]])

    def both(values, defined):
        return (
            rejump.best_of_n(values),
            rejump.best_of_n(values, -1),
            rejump.best_of_n(values, 1, defined),
        )

    most, least, known = together(both, values, defined)
    assert most.tolist() == [1, 2] and least.tolist() == [0, 1]
    assert known.tolist() == [1, 0]
    with pytest.raises(ValueError, match="direction must be 1 or -1"):
        rejump.best_of_n(values, 0)


def test_prompts():
    means = np.array([[1.0, 0.2, 7.0], [2.0, 0.1, 7.0], [1.4, 0.1, 7.0]])
    assert rejump.select_prompt(means, metric=0) == 1
    assert rejump.select_prompt(means, metric=1, direction=-1) == 1
    assert rejump.select_prompt(means, target=np.array([1.5, 0.1, 0.0])) == 2
    # A prompt without a mean is not the best one.
    holes = means.copy()
    holes[0, 0] = holes[2, 2] = np.nan
    assert rejump.select_prompt(holes, metric=0, direction=-1) == 2
    assert rejump.select_prompt(holes, metric=0) == 1
    assert rejump.select_prompt(holes, target=np.array([1.0, 0.1, 0.0])) == 2
    with pytest.raises(ValueError, match="no prompt has these means"):
        rejump.select_prompt(np.full((2, 3), np.nan), metric=0)
    with pytest.raises(ValueError, match="a metric or a target"):
        rejump.select_prompt(means)


def test_bootstrap_covers_the_mean(key):
    rng = np.random.default_rng(0)
    values = rng.normal([[0.0], [3.0]], 1, (2, 200)).astype(np.float32)
    found = together(lambda v, k: rejump.bootstrap(v, k, 500), values, key)
    np.testing.assert_allclose(found.mean, values.mean(1), rtol=1e-5)
    # 1.96 standard errors to each side.
    width = 1.96 * values.std(1) / 200**0.5
    np.testing.assert_allclose(found.high - found.mean, width, rtol=0.2)
    np.testing.assert_allclose(found.mean - found.low, width, rtol=0.2)


def test_logistic_regression(float64):
    """Weights and errors at the likelihood's optimum, by hand for one feature."""
    x = np.array([[0.0], [0.0], [0.0], [0.0], [1.0], [1.0], [1.0], [1.0]])
    y = np.array([0, 0, 0, 1, 0, 1, 1, 1])

    def fitted(x, y):
        model = rejump.fit(x, y, penalty=1e-9)
        three = rejump.fit(x, np.array([0, 1, 2, 1, 0, 1, 2, 2]), 3)
        return model, rejump.log_probability(model, x), three

    model, logs, three = together(fitted, x, y)
    np.testing.assert_allclose(np.exp(logs[[0, -1]]), [[0.75, 0.25], [0.25, 0.75]],
                               atol=1e-6)  # fmt: skip
    # Log odds are 2 log 3 apart, for two standard deviations of 1/2.
    assert model.weights[0, 0] == pytest.approx(np.log(3), abs=1e-6)
    assert model.errors[0, 0] == pytest.approx((1 / (8 * 0.25 * 0.75)) ** 0.5, abs=1e-5)
    low, high = model.interval
    assert low[0, 0] == pytest.approx(model.weights[0, 0] - 1.96 * model.errors[0, 0])
    assert high[0, 0] > low[0, 0] and three.weights.shape == (2, 2)
    with pytest.raises(ValueError, match="penalty > 0"):
        rejump.fit(x, y, penalty=0.0)
