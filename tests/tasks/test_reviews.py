"""``run peer_review``: the generated study, letters of one's own, the same bytes."""

import json

import pytest

from jaxpapers.data import chat
from jaxpapers.papers import peer_review as pr
from jaxpapers.papers.peer_review import extraction
from jaxpapers.tasks import model_coder
from tests.papers.test_peer_review import TEXT, reply_of

SMALL = [
    "--config.data.papers=90", "--config.data.texts=6", "--config.method.bootstrap=64",
    "--config.method.fields=30",
]  # fmt: skip


@pytest.mark.programs(90)  # Six kinds of fits, two bootstraps, permutations, measures.
def test_generated_study(call, tmp_path):
    code, out, err = call("run", "peer_review:smoke", *SMALL, f"--workdir={tmp_path}/a")
    assert code == 0, err
    for words in ("rule extractor", "length only", "coefficients against the truth",
                  "replications", "tenths of strength", "fields compared"):  # fmt: skip
        assert words in out, words
    first = json.loads((tmp_path / "a" / "comparison.json").read_text())
    rows = {r["label"]: r["numbers"][0] for r in first["rows"]}
    assert rows["rule extractor"]["structure"] == 1
    assert (
        rows["rule extractor"]["spearman"] > 0.5 + rows["length only"]["spearman"] / 2
    )
    assert r"\begin{tabular}" in (tmp_path / "a" / "regressions.tex").read_text()
    code, _, err = call("run", "peer_review:smoke", *SMALL, f"--workdir={tmp_path}/b")
    assert code == 0, err
    for name in (
        "comparison.json",
        "regressions.txt",
        "regressions.tex",
        "deciles.npz",
    ):
        one, two = ((tmp_path / x / name).read_bytes() for x in "ab")
        assert one == two, name


@pytest.mark.programs(40)  # The measures' program at two shapes.
def test_letters_of_the_user(call, tmp_path):
    (tmp_path / "one.txt").write_text(TEXT)
    code, out, err = call(
        "run", "peer_review", tmp_path / "one.txt", f"--workdir={tmp_path}/run"
    )
    assert code == 0, err
    assert "1 letters, 2 points, 0 files skipped" in out
    made = json.loads((tmp_path / "run" / "one.json").read_text())
    assert [len(q["answers"]) for q in made["points"]] == [1, 0]
    lines = (tmp_path / "run" / "points.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[1].startswith("one,1.1.1,1,1,")
    (tmp_path / "two.xml").write_text("<a></a>")
    code, out, err = call("run", "peer_review", tmp_path, f"--workdir={tmp_path}/run")
    assert code == 0 and "1 files skipped" in out and "no sub-article" in out
    code, _, err = call("run", "peer_review", tmp_path / "two.xml")
    assert code == 1 and "no sub-article" in err


def test_coder_asks_through_the_chat_client(tmp_path):
    """A provider whose first reply is wrong is asked again; the cache answers later."""

    class Provider:
        identity = {"model": "toy"}

        def __init__(self):
            self.asked = 0

        def __call__(self, messages, schema):
            self.asked += 1
            if "links" in schema["properties"]:
                value = {"links": []}
            elif "Figure 2" in messages[1]["content"]:
                value = {"opinions": [reply_of("Figure 2 should be redrawn")]}
            elif len(messages) == 2:
                value = {"opinions": [reply_of("words that are not there at all, no")]}
            else:
                value = {"opinions": [reply_of("The sample is far too small")]}
            return chat.Reply(json.dumps(value))

    class Options:
        model, url, key, cache, recorded = "toy", "", "", str(tmp_path), False

    provider = Provider()
    coder = model_coder.Coder(Options, provider)
    file = pr.parse_review_file(TEXT)
    assert "2 requests" in coder.estimate([file])
    made = coder(file)
    assert [o.reviewer for o in made.opinions] == [1, 2] and not made.failed
    assert "1 repairs" in coder.usage()
    asked = provider.asked
    again = model_coder.Coder(Options, provider)(file)
    assert again.opinions == made.opinions and provider.asked == asked
    assert len(extraction.requests(file)) == 2
