"""Letters of drawn opinions, in the journal's heading grammar.

Three layouts: ``separate`` (reports, then a point-by-point response that repeats them),
``interleaved`` (answers within the reports), ``pages`` (separate, as a PDF tool gives it:
headers, page numbers, broken and hyphenated lines). What is said of strength is worded
freely, and now and then a step off.
"""

import textwrap
from typing import NamedTuple

import numpy as np

from jaxpapers.papers.peer_review import schema
from jaxpapers.papers.peer_review.world import World

LAYOUTS = ("separate", "interleaved", "pages")
TOPICS = {
    "methodology": ("the choice of the control group", "the statistical model",
                    "the randomisation of the animals", "the sample size"),
    "evidence/data": ("the measured expression levels", "the imaging data",
                      "the time course", "the replicate measurements"),
    "interpretation/claim": ("the claim of a causal mechanism", "the stated conclusion",
                             "the interpretation of the correlation"),
    "novelty/significance": ("the novelty of the approach", "the advance over the field",
                             "the significance of the finding"),
    "literature": ("the discussion of the literature", "the citation of earlier work",
                   "the comparison with published reports"),
    "reproducibility": ("the availability of the code", "the deposited raw data",
                        "the description of the protocol"),
    "writing/presentation": ("the wording of the abstract", "the labels of the figures",
                             "the legend of the last figure"),
}  # fmt: skip
STRENGTH = (
    ("A small remark: {t} might perhaps be polished a little {k}.",
     "Minor: the authors may wish to look at {t} again {k}.",
     "It would be nice to see {t} spelled out, if there is space, {k}."),
    ("I wonder about {t} {k}.", "Could the authors say more on {t} {k}?",
     "I suggest that {t} is described in more detail {k}."),
    ("I am not sure about {t} {k}; it should be explained.",
     "Something is missing in {t} {k} and should be added.",
     "As it stands, {t} is unclear {k}."),
    ("I have a major concern with {t} {k}: what is drawn from it is not supported.",
     "The treatment of {t} is insufficient {k} and must be changed.",
     "It is a significant problem that {t} lacks a justification {k}."),
    ("There is a fundamental flaw in {t} {k}, and the main claim cannot stand on it.",
     "I find {t} invalid {k}; in this form the paper should not be published.",
     "The work fails at {t} {k}, which is a serious and major problem."),
)  # fmt: skip
COST = (
    "", "A sentence would do.", "The analysis would have to be redone for this.",
    "A further control experiment is needed here.",
    "This requires new experiments with an independent cohort.",
)  # fmt: skip
HELPFUL = (
    "", "", "For example, one could compare both groups.",
    "I suggest to begin with the data at hand, for instance by using a mixed model.",
    "I recommend a concrete way: for example, by comparing the two cohorts and by "
    "reporting both effects, which would strengthen the paper.",
)  # fmt: skip
DETAIL = (
    "", "", "See Figure {f}.", "See Figure {f}, panel 2, and line {l}.",
    "Specifically, Figure {f} and Table 2 contradict line {l}, because the values differ "
    "by 40 %.",
)  # fmt: skip
FILLER = (
    "The passage in question has been read by us more than once.",
    "Colleagues in our group had the same impression when they saw it.",
    "This came up early in the text and comes up again towards its end.",
)
REPLY = {
    "agree_and_revise": "We agree and have now added this to the manuscript, part {k}.",
    "agree_partial": "We agree in part, and mention it in the discussion, part {k}.",
    "clarify": "To clarify: the text means the pooled values, as explained in part {k}.",
    "rebut": "We respectfully disagree, since the values of part {k} say otherwise.",
    "defer": "This is beyond the scope of the present paper and left to part {k}.",
}


class Letter(NamedTuple):
    """A written correspondence and its truth.

    Attributes:
      text: of the file.
      layout: of ``LAYOUTS``.
      rows: of the world's opinions, in the order of the letter.
      points: (round, reviewer from 1, whether it is answered) of each row.
      reviewers: numbers of those with a report, by round.
    """

    text: str
    layout: str
    rows: np.ndarray
    points: tuple[tuple[int, int, bool], ...]
    reviewers: tuple[tuple[int, ...], ...]


def render(world: World, paper: int, layout: str, seed: int = 0) -> Letter:
    """The letter of one paper.

    Args:
      world: of ``simulate``.
      paper: its number.
      layout: of ``LAYOUTS``.
      seed: of the wording.

    Raises:
      ValueError: unknown layout or paper.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if not 0 <= paper < len(world.cites):
        raise ValueError(f"paper must be in 0 .. {len(world.cites) - 1}, got {paper}")
    rng = np.random.default_rng([seed, 2, paper])
    given = world.opinions
    mine = np.flatnonzero(given.paper == paper)
    numbered = bool(rng.random() < 0.7)
    parts = [f"Peer Review File\n\nA study of effects, number {paper}"]
    rows: list[int] = []
    points: list[tuple[int, int, bool]] = []
    seen: list[tuple[int, ...]] = []
    for r in range(1, world.rounds[paper] + 1):
        parts.append("REVIEWER COMMENTS" if r == 1 else "REVIEWERS' COMMENTS")
        answers: list[str] = []
        who = tuple(range(1, world.reviewers[paper] + 1))
        seen.append(who)
        for j in who:
            own = mine[(given.round[mine] == r) & (given.reviewer[mine] == j - 1)]
            parts.append(f"Reviewer #{j} (Remarks to the Author):")
            if not len(own):
                parts.append("All of my comments have been addressed.")
                continue
            parts.append("The manuscript reports on effects that are of interest.")
            answers.append(f"Reviewer #{j}")
            for i, row in enumerate(own, 1):
                label = f"{i}. " if numbered else ""
                text = label + _wording(rng, given, row)
                parts.append(text)
                reply = _reply(given, row)
                rows.append(int(row))
                points.append((r, j, bool(reply)))
                if layout == "interleaved" and reply:
                    parts.append(f"Response: {reply}")
                elif reply:
                    answers += [text, f"Response: {reply}"]
        if layout != "interleaved" and len(answers) > 0:
            parts += ["Point-by-point response to the reviewers", *answers]
    text = "\n\n".join(parts) + "\n"
    if layout == "pages":
        text = _paged(text, paper)
    return Letter(text, layout, np.array(rows, int), tuple(points), tuple(seen))


def _wording(rng, given, row) -> str:
    """Sentences of an opinion; the strength's are now and then of a step beside it."""
    strength, helpful, quality, cost = np.round(4 * given.scores[row]).astype(int)
    kind = schema.TYPES[given.codes[row, 0]]
    topic = TOPICS[kind][rng.integers(len(TOPICS[kind]))]
    said = strength
    if rng.random() < 0.3:
        said = int(np.clip(strength + rng.choice([-1, 1]), 0, 4))
    choices = STRENGTH[said]
    place = f"in part {row}"
    first = choices[rng.integers(len(choices))].format(t=topic, k=place)
    detail = DETAIL[quality].format(f=1 + row % 7, l=10 + row % 300)
    filler = list(rng.permutation(FILLER)[: rng.integers(0, 3)])
    rest = [COST[cost], HELPFUL[helpful], detail, *filler]
    return " ".join([first, *(x for x in rest if x)])


def _reply(given, row) -> str:
    kind = schema.RESPONSES[given.codes[row, 3]]
    return "" if kind == "no_response" else REPLY[kind].format(k=row)


def _paged(text: str, paper: int, lines: int = 34) -> str:
    """The text on pages of a PDF tool."""
    wrapped: list[str] = []
    for paragraph in text.split("\n\n"):
        for line in paragraph.split("\n"):
            wrapped += textwrap.wrap(line, 76) or [""]
        wrapped.append("")
    for i in range(len(wrapped) - 1):
        words = wrapped[i].split(" ")
        if i % 9 == 4 and len(words) > 6 and len(words[-1]) > 7 and words[-1].isalpha():
            if wrapped[i + 1]:
                cut = len(words[-1]) // 2
                wrapped[i + 1] = f"{words[-1][cut:]} {wrapped[i + 1]}"
                wrapped[i] = " ".join([*words[:-1], words[-1][:cut] + "-"])
    pages = [wrapped[i : i + lines] for i in range(0, len(wrapped), lines)]
    return "\f".join(
        "\n".join([f"Journal of Effects, file {paper}", *page, str(number)])
        for number, page in enumerate(pages, 1)
    )
