"""The grammar of letters: JATS of all kinds, the journal's text, notes; hostile input."""

import json
import re

import pytest

from jaxpapers.papers import peer_review as pr
from jaxpapers.papers.peer_review import jats, journal, openreview, units


def article(*parts):
    body = "".join(
        f'<sub-article article-type="{kind}"><front-stub><title-group><article-title>'
        f"{title}</article-title></title-group></front-stub><body>{text}</body>"
        "</sub-article>"
        for kind, title, text in parts
    )
    front = (
        "<front><article-meta><article-id pub-id-type='doi'>10.1/x</article-id>"
        "<title-group><article-title>A <italic>paper</italic></article-title>"
        "</title-group><pub-date><year>2014</year></pub-date></article-meta></front>"
    )
    return f"<article>{front}{body}</article>".encode()


def p(*texts):
    return "".join(f"<p>{t}</p>" for t in texts)


def covers(file, source=None):
    assert "".join(file.text[s.start : s.end] for s in file.segments) == file.text
    if source is not None:  # All character data, white space aside.
        data = re.sub(r"<[^>]*>", "", source.decode())
        assert re.sub(r"\s", "", file.text) == re.sub(r"\s", "", data)


LETTER = p(
    "Thank you for sending your work, which has been evaluated by two reviewers.",
    "<italic>Reviewer #1</italic>:",
    "The authors describe a mechanism of growth.",
    "1) The controls are missing in Figure 2. They should be added to the paper.",
    "A second strain would be needed as well, to exclude that the effect "
    "is of the strain.",
    "2) Please cite the work of others on this mechanism.",
    "<italic>Reviewer #2</italic>:",
    "I wonder whether the growth rate was measured in the dark or in the light.",
    "[Editors' note: further revisions were requested prior to acceptance.]",
    "Thank you for resubmitting your work.",
    "1) The new controls are not described in the methods.",
)
REPLY = p(
    "We thank the reviewers.",
    "Reviewer #1:",
    "<italic>1) The controls are missing in Figure 2. They should be added to the paper"
    "</italic>.",
    "We have added them.",
    "They are in a new panel.",
    "<italic>A second strain would be needed as well, to exclude that the effect is of "
    "the strain</italic>.",
    "This was not possible.",
    "<italic>2) Please cite the work of others […]</italic>",
    "Done.",
    "Reviewer #2:",
    "<italic>I wonder whether the growth rate was measured in the dark</italic>",
    "In the dark.",
    "[Editors' note: further revisions were requested prior to acceptance.]",
    "<italic>1) The new controls are not described in the methods.</italic>",
    "They are now.",
)


@pytest.mark.parametrize("letter", ["decision-letter", "article-commentary"])
@pytest.mark.parametrize("reply", ["reply", "author-comment"])
def test_letter_and_reply_of_two_rounds(letter, reply):
    data = article((letter, "Decision letter", LETTER), (reply, "Response", REPLY))
    file = pr.parse_jats(data)
    covers(file, data)
    assert file.paper == {"doi": "10.1/x", "title": "A paper", "year": "2014"}
    assert file.rounds == 2 and file.reviewers == (1, 2)
    found = [(q.round, q.reviewer, q.label, len(q.spans)) for q in file.points]
    assert found == [(1, 1, "1", 2), (1, 1, "2", 1), (1, 2, "", 1), (2, 0, "1", 1)]
    said = [[file.quote(x.reply) for x in q.links] for q in file.points]
    assert said == [
        ["We have added them. They are in a new panel.", "This was not possible."],
        ["Done."], ["In the dark."], ["They are now."],
    ]  # fmt: skip
    kinds = {file.text[s.start : s.end].strip(): s.kind for s in file.segments}
    assert kinds["We thank the reviewers."] == "response"
    assert kinds["The authors describe a mechanism of growth."] == "summary"


def test_reports_that_are_sub_articles():
    data = article(
        ("editor-report", "eLife assessment", p("This is a solid study.")),
        ("referee-report", "Reviewer #1 (Public Review)",
         p("The study shows growth.", "Weaknesses:",
           "The main claim is not supported by the data of the last figure.")),
        ("referee-report", "Reviewer #2 (Public Review)",
         p("It is unclear how many animals were used in each of the groups.")),
        ("author-comment", "Author response",
         p("Reviewer #1 (Public Review):",
           "The main claim is not supported by the data of the last figure.",
           "We have toned it down.", "Reviewer #2 (Public Review):",
           "It is unclear how many animals were used in each of the groups.",
           "Twelve in each.")),
        ("data-statement", "Data", p("At the repository.")),
    )  # fmt: skip
    file = pr.parse_jats(data)
    covers(file, data)
    assert file.warnings == (
        "sub-article of type 'data-statement' is kept and not parsed",
    )
    said = [(q.reviewer, [file.quote(x.reply) for x in q.links]) for q in file.points]
    assert said == [(1, ["We have toned it down."]), (2, ["Twelve in each."])]


@pytest.mark.parametrize(
    "titles, numbers",
    [
        (("Reviewer III (Public Review)", "Review II", "Referee report: referee XIV"),
         [2, 3, 14]),
        (("Peer Review #2", "Review 1 | Reviewer IV"), [2, 4]),
        # No number: in their order.
        (("Preview III", "Review in depth", "Peer Review 2020"), [1, 2, 3]),
        (("Review IIb", "Reviewer Information", "Reviews V"), [1, 2, 3]),
    ],
)  # fmt: skip
def test_titles_that_name_a_reviewer(titles, numbers):
    asked = "The dose of drug {} must be given in the methods section."
    parts = [("referee-report", x, p(asked.format(n))) for n, x in enumerate(titles)]
    file = pr.parse_jats(article(*parts))
    assert sorted(q.reviewer for q in file.points) == numbers


def test_letters_of_reviews_with_roman_numbers():
    """As text: a heading alone in its line, and a response in the same way."""
    file = pr.parse_review_file(
        "Review I\n\n1. The sample is rather small here.\n\nReview II\n\n"
        "1. The second figure should be redrawn.\n\nResponse to reviewers\n\n"
        "Review II\n\n1. The second figure should be redrawn.\n\nWe have redrawn it."
    )
    said = [(q.reviewer, [file.quote(x.reply) for x in q.links]) for q in file.points]
    assert said == [(1, []), (2, ["We have redrawn it."])]


def test_rounds_of_numbered_decision_letters():
    def letter(n, ask):
        return (
            "decision-letter", f"Decision Letter {n}",
            p("Reviewer #1: " + ask),
        )  # fmt: skip

    def reply(n, said):
        return "author-comment", f"Author response to Decision Letter {n}", p(said)

    data = article(
        letter(0, "The sample size must be justified in the methods section."),
        reply(0, "1. It is justified now."),
        letter(1, "Please add the confidence intervals to the second table."),
        reply(1, "They are added."),
    )
    file = pr.parse_jats(data)
    covers(file, data)
    assert [(q.round, q.reviewer) for q in file.points] == [(1, 1), (2, 1)]


def test_answers_by_number_and_by_order():
    asked = p("1. The dose of the drug is not given in the methods.",
              "2. The statistics of the second figure are wrong.")  # fmt: skip
    told = p("2) We corrected the test.", "1) It is now stated.")
    file = pr.parse_jats(article(("decision-letter", "", asked), ("reply", "", told)))
    said = [[(x.by, file.quote(x.reply)) for x in q.links] for q in file.points]
    assert said == [
        [("number", "1) It is now stated.")], [("number", "2) We corrected the test.")]
    ]  # fmt: skip
    asked = p("Could the authors discuss the ultrasensitive receptor of the cells?",
              "The crude extract should be compared with the pure compound.")  # fmt: skip
    told = p("1) We discuss other receptors of that kind.",
             "2) Crude extract and purified compound are compared.")  # fmt: skip
    file = pr.parse_jats(article(("decision-letter", "", asked), ("reply", "", told)))
    assert [x.by for q in file.points for x in q.links] == ["order", "order"]


def test_what_only_the_authors_quote_is_a_point():
    told = p("<italic>A comment of the editor that the letter does not show us</italic>",
             "We agree.")  # fmt: skip
    letter = p("Please cite the relevant work on this mechanism.")
    file = pr.parse_jats(article(("decision-letter", "", letter), ("reply", "", told)))
    assert file.points[-1].section == "quoted by the authors"
    assert file.quote(file.points[-1].links[0].reply) == "We agree."


def test_authors_who_set_their_own_words_in_italics():
    asked = ("1) The dose of the drug is not given in the methods section.",
             "2) The statistics of the second figure must be corrected.")  # fmt: skip
    said = [f"<italic>Our answer to comment {n} is written here in full</italic>."
            for n in (1, 2)]  # fmt: skip
    told = p(asked[0], said[0], asked[1], said[1])
    letter = "decision-letter", "", p("First reviewer:", *asked)
    file = pr.parse_jats(article(letter, ("reply", "", told)))
    assert [(q.reviewer, len(q.links)) for q in file.points] == [(1, 1), (1, 1)]
    assert file.quote(file.points[1].links[0].reply).startswith(
        "Our answer to comment 2"
    )


PAGES = "".join(
    f"Journal of Effects {n}\n{body}\n{n}\n\f"
    for n, body in (
        (1, "Peer Review File\n\nREVIEWER COMMENTS\n\nReviewer #1 (Remarks to the "
            "Author):\n\n1. The control is miss-\ning and its absence"),
        (2, "must be explained in full.\n\n2. Figure 3 is unclear.\n\nReviewer #2 "
            "(Remarks to the Author):\n\nNone"),
        (3, "Point-by-point response\n\nReviewer #1\n\n1. The control is missing and its "
            "absence must be explained in full.\n\nResponse: It is"),
        (4, "added.\n\n2. Figure 3 is unclear.\n\nReply: Redrawn.\n\nREVIEWERS' COMMENTS"
            "\n\nReviewer #1 (Remarks to the Author):\n\nAll my concerns have been "
            "addressed."),
    )
)  # fmt: skip


def test_pages_of_the_journal():
    file = pr.parse_review_file(PAGES)
    covers(file)
    assert file.rounds == 2 and file.reviewers == (1, 2)
    said = [[file.quote(x.reply) for x in q.links] for q in file.points]
    assert said == [["Response: It is added."], ["Reply: Redrawn."]]
    noise = [file.text[s.start : s.end] for s in file.segments if s.kind == "noise"]
    assert len(noise) == 8 and all("\n" in x or x.strip() for x in noise)
    assert [r.note for r in file.reports if r.note] == ["None"]


def test_a_quote_of_several_paragraphs_is_all_of_it():
    data = article(("decision-letter", "", LETTER), ("reply", "", REPLY))
    file = pr.parse_jats(data)
    for o in pr.rule_extract(file):
        assert o.span == (file.points[o.point].spans[0].start,
                          file.points[o.point].spans[-1].end)  # fmt: skip
        assert file.text[slice(*o.span)].split() == o.quote.split()


def test_interleaved_answers_and_a_response_alone():
    text = (
        "Reviewer #1 (Remarks to the Author):\n\nThe sample is small.\n\nResponse: It is "
        "larger now.\n\nThe axis lacks a unit.\n\nResponse: Added.\n"
    )
    file = pr.parse_review_file(text)
    assert [[x.by for x in q.links] for q in file.points] == [["interleaved"]] * 2
    text = (
        "Response to reviewers\n\nReviewer 1\n\n1. The sample is rather small here.\n\n"
        "Response: It is larger.\n\n2. The axis of the plot lacks a unit.\n\nResponse: "
        "Added.\n\nAlso in the table.\n"
    )
    file = pr.parse_review_file(text)
    covers(file)
    said = [file.quote(q.links[0].reply) for q in file.points]
    assert said == ["Response: It is larger.", "Response: Added. Also in the table."]


def test_a_reviewer_without_a_report_is_named():
    text = (
        "REVIEWER COMMENTS\n\nReviewer #1 (Remarks to the Author):\n\nReviewer #2 "
        "(Remarks to the Author):\n\nThe sample is too small for the claim.\n"
    )
    assert pr.parse_review_file(text).warnings == (
        "reviewer 1 of round 1 has no report",
    )


def note(id, content, replyto=None, signed="Reviewer_x", value=True):
    made = {k: {"value": v} if value else v for k, v in content.items()}
    return {"id": id, "forum": "f", "replyto": replyto, "content": made,
            "signatures": [signed], "cdate": len(id)}  # fmt: skip


@pytest.mark.parametrize("value", [True, False])
def test_notes_of_a_forum(value):
    notes = [
        note("f", {"title": "T", "abstract": "A"}, signed="Authors", value=value),
        note("r1", {"summary": "It learns.", "weaknesses": "- No baseline is shown at "
             "all.\n\n- The data are small, please add more.", "rating": "3"}, "f",
             value=value),
        note("a11", {"comment": "> No baseline is shown at all.\n\nIt is in the "
             "appendix.\n\n> The data are small, please add more.\n\nAdded."}, "r1",
             "Authors", value=value),
        note("r222", {"questions": "Why is the rate so low?", "rating": "5"}, "f",
             value=value),
    ]  # fmt: skip
    file = pr.parse_bytes(json.dumps({"notes": notes}).encode())
    covers(file)
    assert file.layout == "openreview" and file.reviewers == (1, 2)
    said = [(q.reviewer, [file.quote(x.reply) for x in q.links]) for q in file.points]
    assert said == [(1, ["It is in the appendix."]), (1, ["Added."]), (2, [])]
    with pytest.raises(ValueError, match="no note is a review"):
        openreview.read(notes[:1])
    with pytest.raises(ValueError, match="2 forums"):
        openreview.read([*notes, {**notes[1], "forum": "g"}])


def test_hostile_xml_is_refused():
    bomb = b'<!DOCTYPE a [<!ENTITY x "y"><!ENTITY z "&x;&x;">]><article>&z;</article>'
    with pytest.raises(ValueError, match="declares the entity"):
        pr.parse_bytes(bomb)
    outside = b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>'
    with pytest.raises(ValueError, match="declares the entity"):
        pr.parse_bytes(outside)
    deep = b"<a>" * 300 + b"</a>" * 300
    with pytest.raises(ValueError, match="deeper than 200"):
        pr.parse_bytes(deep)
    with pytest.raises(ValueError, match="no well-formed XML"):
        pr.parse_bytes(b"<article><p></article>")
    with pytest.raises(ValueError, match="no sub-article"):
        pr.parse_bytes(b"<article><p>text</p></article>")
    with pytest.raises(ValueError, match="bytes; at most"):
        jats.read(b" " * (jats.MOST_BYTES + 1))


def test_named_entities_of_an_unread_dtd_are_characters():
    data = article(("decision-letter", "", p("Caf&eacute; should be spelled right.")))
    data = b'<!DOCTYPE article SYSTEM "JATS.dtd">' + data
    assert "Café should" in pr.parse_jats(data).text


def test_unrecognised_files():
    with pytest.raises(ValueError, match=r"unrecognised layout.*\['Dear Sir'"):
        pr.parse_bytes(b"Dear Sir\n\nnothing here\n")
    with pytest.raises(ValueError, match="a PDF; extract its text"):
        pr.parse_bytes(b"%PDF-1.4")
    with pytest.raises(ValueError, match="neither XML nor text"):
        pr.parse_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ValueError, match="characters; at most"):
        journal.read("x" * (journal.MOST_CHARACTERS + 1))


def test_headings_and_labels():
    heads = ("Reviewer #1:", "Referee 2 (Remarks to the Author):", "REVIEWER 3",
             "Reviewer B:", "Reviewer #1 (Public Review):", "Comments from Reviewer 2:",
             "Reviewer two:")  # fmt: skip
    numbers = [units.reviewer_heading(h)[0] for h in heads]
    assert numbers == [1, 2, 3, 2, 1, 2, 2]
    roman = """I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX
               XX""".split()
    for who in ("Reviewer {}:", "Referee #{} (Remarks to the Author):", "Review {}"):
        numbers = [units.reviewer_heading(who.format(x))[0] for x in roman]
        assert numbers == [*range(1, 21)], who
    for text in ("Reviewer VX:", "Reviewer XXI:", "Review II of the data shows this.",
                 "Review in full", "Preview II", "Reviewer IIa:"):  # fmt: skip
        assert units.reviewer_heading(text) is None, text
    for text in ("Reviewer 2 suggests that we add a control.", "Reviewer comments"):
        assert units.reviewer_heading(text) is None
    assert units.reviewer_heading("Reviewer #2: None")[1] == len("Reviewer #2: ")
    for text, label in (
        ("1) Anatomy is hard.", "1"), ("2. More data.", "2"), ("1 )The authors", "1"),
        ("(3) x is y", "3"), ("Major point 2: the claim", "major point 2"),
        ("a) first of all", "a"), ("*The original images", "*"), ("• First", "*"),
        ("100) Anatomy is hard.", "100"), ("2014) showed that", ""),
        ("2.5 mM was used", ""), ("In 2014 we", ""), ("I. e. nothing", ""),
    ):  # fmt: skip
        assert units.label_of(text)[0] == label, text
