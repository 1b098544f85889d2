"""Peer review: opinions by a language model, grounded in the letter or listed as lost."""

import json

from jaxpapers.papers import peer_review as pr
from jaxpapers.papers.peer_review import extraction, rules, schema
from tests.papers.test_peer_review import opinion


def reply_of(quote):
    scores = dict.fromkeys(schema.SCORES, 4)
    return {"quote": quote, "summary": "s", "opinion_type": "methodology",
            "target": "core", "polarity": "criticism", **scores}  # fmt: skip


TEXT = """REVIEWER COMMENTS

Reviewer #1 (Remarks to the Author):

1. The sample is far too small for the main claim of the paper.

Reviewer #2 (Remarks to the Author):

1. Figure 2 should be redrawn.

Response to reviewers

Reviewer #1

1. The sample is far too small for the main claim of the paper.
Response: We have doubled it.
"""


def test_extraction_grounds_quotes_and_lists_what_fails():
    file = pr.parse_review_file(TEXT)

    def ask(messages, made, check):
        text = messages[1]["content"]
        assert messages[0]["content"] == extraction.SYSTEM
        if "links" in made["properties"]:
            value = {"links": [{"number": 1, "response_type": "agree_and_revise",
                                "response_quote": "We have doubled it"}]}  # fmt: skip
        elif "Figure 2" in text:
            bad = {"opinions": [reply_of("This is nowhere in the report at all.")]}
            assert "is not in the report" in check(bad)[0]
            raise ValueError("no valid reply")
        else:
            one = reply_of("the sample is far  too small")
            value = {"opinions": [one, one]}
        assert check(value) == []
        return value

    made = pr.extract(ask, file)
    assert [(r, i) for r, i, _ in made.failed] == [(1, 2)]
    assert len(made.opinions) == 1 and len(made.dropped) == 1
    found = made.opinions[0]
    assert found.strength == 0.75 and found.point == 0
    assert file.text[slice(*found.span)] == "The sample is far too small"
    assert found.response_quote == "We have doubled it"
    # Settled in the next round, as by the rules.
    kind = found.response_type
    assert found.resolved_round == 2 == rules.resolved(file, file.points[0], kind)
    assert made.failed[0][2] == "no valid reply"
    numbers = pr.measures(pr.opinions([made.opinions]), 1, 1, 3)
    assert numbers["resolved_2"] == 1
    assert pr.validate(made.opinions, file) == []
    problems = pr.validate(
        [opinion(quote="Not there at all, not a word.", reviewer=5)], file
    )
    assert len(problems) == 2
    assert made.provenance["prompts"] == extraction.prompt_hash()


def test_long_letters_are_asked_about_in_pieces(monkeypatch):
    """Every word is asked about; of a response, too; a part may fail."""
    monkeypatch.setattr(extraction, "MOST_CHARACTERS", 200)
    points = [
        f"{n}. The {w} of the sample must be explained in the text. Why so {w}?"
        for n, w in enumerate(("size", "age", "colour", "weight", "place"), 1)
    ]
    answers = [f"{x}\nResponse: We explain it at some length in section {n}."
               for n, x in enumerate(points, 1)]  # fmt: skip
    text = "\n\n".join(
        ["REVIEWER COMMENTS", "Reviewer #1 (Remarks to the Author):", *points,
         "Response to reviewers", "Reviewer #1", *answers]
    )  # fmt: skip
    file = pr.parse_review_file(text)
    asked = {"opinions": [], "links": []}

    def ask(messages, made, check):
        (name,) = made["properties"]
        part = messages[1]["content"].rpartition("<<<\n")[2].rpartition("\n>>>")[0]
        assert 0 < len(part) <= 200
        asked[name].append(part)
        if name == "opinions":
            if "colour" in part:
                raise ValueError("no valid reply")
            quotes = [x for x in points if x in part]
            value = {"opinions": [reply_of(x) for x in quotes]}
        else:
            last = part.rpartition("section ")[2][0]
            value = {"links": [
                {"number": 1, "response_type": "clarify",
                 "response_quote": f"We explain it at some length in section {last}"},
                {"number": 2, "response_type": "rebut", "response_quote": None},
            ]}  # fmt: skip
            lists = {"links": [{**value["links"][0], "response_quote": ["no"]}]}
            assert check(lists) == ["links[0].response_quote must be a text or null"]
        assert check(value) == []
        return value

    made = pr.extract(ask, file)
    assert len(asked["opinions"]) == 3 and len(asked["links"]) > 1
    words = " ".join(asked["opinions"]).split()
    assert words == " ".join(points).split()
    said = " ".join(asked["links"])
    assert all(
        f"We explain it at some length in section {n}." in said for n in range(1, 6)
    )
    assert made.failed == [(1, 1, "part 2 of 3: no valid reply")]
    assert [o.id for o in made.opinions] == ["1.1.1", "1.1.2", "1.1.3"]
    first, second = made.opinions[:2]
    assert first.response_type == "clarify" and second.response_type == "no_response"
    assert len(extraction.requests(file)) == 3
    # A paragraph without an end is cut between words.
    plain = pr.parse_review_file(
        "Reviewer #1 (Remarks to the Author):\n\n" + "word " * 99
    )
    cut = extraction.pieces(plain, plain.reports[0].spans)
    assert " ".join(cut).split() == ["word"] * 99 and max(map(len, cut)) <= 200


def test_checks_of_replies():
    report = "The sample is small."
    good = {"opinions": [reply_of("The sample is small")]}
    assert extraction.check_opinions(good, report) == []
    for change, words in (
        ({"strength": 6}, "strength must be a whole number in range"),
        ({"strength": True}, "strength must be a whole number in range"),
        ({"polarity": "x"}, "polarity must be one of"),
        ({"quote": ""}, "quote must be a text"),
    ):
        value = {"opinions": [{**reply_of("The sample is small"), **change}]}
        assert words in extraction.check_opinions(value, report)[0]
    assert extraction.check_opinions([], report) == [
        "expected an object with a list 'opinions'"
    ]


def test_quotes_are_located():
    source = "Intro. The main effect, as shown, is NOT supported by the data in Fig. 2."
    assert pr.locate("the main effect as shown", source) == (7, 32)
    # One word of eleven differs.
    near = "The main effect, as shown, is not supported by these data in"
    assert pr.locate(near, source) is not None
    assert pr.locate("The side effect that we saw is supported", source) is None
    assert pr.locate("", source) is None


def test_parse_is_plain_data():
    made = pr.to_dict(pr.parse_review_file(TEXT))
    assert json.loads(json.dumps(made))["points"][0]["answers"][0]["by"] == "quote"
    assert made["reviewers"] == [1, 2] and made["rounds"] == 1
