"""Opinions by lexicon and pattern: the baseline that a language model must beat.

Every point of a parsed file is an opinion. What its words say of strength, cost and so on
is added up and rounded to the five steps of the coding scale; nothing is learned.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxpapers.papers.peer_review import units
from jaxpapers.papers.peer_review.schema import Opinion, Point, ReviewFile, Span


class Cue(NamedTuple):
    """A pattern and what each match adds to a score."""

    pattern: re.Pattern
    weight: float


def _cues(*pairs: tuple[str, float]) -> tuple[Cue, ...]:
    return tuple(Cue(re.compile(p, re.IGNORECASE), w) for p, w in pairs)


STRENGTH = _cues(
    (r"\b(?:fatal|fundamental(?:ly)?|serious(?:ly)?|severe(?:ly)?|critical flaw|"
    r"invalid|"
     r"unacceptable|not (?:be )?publish|untenable|fail(?:s|ed)? to)\b", 0.35),
    (r"\b(?:major|main|significant|strong|substantial) (?:concern|issue|problem|flaw|"
     r"weakness|limitation|reservation|objection)s?\b", 0.3),
    (r"\b(?:not (?:\w+ )?(?:supported|convinc\w+|justified|warranted|valid|credible|"
     r"appropriate|sufficient|clear)|unsupported|unconvinc\w+|unjustified|overblown|"
     r"over-?stat\w+|over-?interpret\w+|misleading|incorrect|wrong|"
     r"inadequate)\b", 0.22),
    (r"\b(?:must|cannot|essential|crucial|critical|necessary|has to|have to)\b", 0.16),
    (r"\b(?:concern\w*|worr\w+|problem\w*|lack\w*|missing|weak\w*|confus\w+|unclear|"
     r"question\w*|speculative|insufficient|doubt\w*)\b", 0.1),
    (r"\b(?:should|need\w*|require\w*)\b", 0.07),
    (r"\b(?:minor|small|typo\w*|perhaps|maybe|might|could|would be (?:nice|helpful|"
     r"interesting|useful)|optional\w*|suggest\w*|wonder\w*|if possible|slight\w*|"
     r"consider)\b", -0.12),
    (r"\b(?:well[- ](?:written|done|executed)|excellent|convincing(?:ly)? (?:show|"
    r"demon)|"
     r"impress\w+|elegant|nice work|beautiful)\b", -0.15),
)  # fmt: skip
CONSTRUCTIVE = _cues(
    (r"\b(?:suggest\w*|recommend\w*|propose|could be (?:improved|addressed)|"
    r"for example|"
     r"for instance|e\.g|such as|one (?:way|option)|consider|instead|would (?:help|"
     r"strengthen|benefit))\b", 0.2),
    (r"\b(?:please|should|could the authors|it would be)\b", 0.12),
    (r"\b(?:by (?:adding|using|comparing|repeating|including|reporting))\b", 0.2),
)  # fmt: skip
QUALITY = _cues(
    (r"\b(?:fig(?:ure|\.)?s?|table|line|page|section|equation|supplement\w*|"
    r"panel)\s*\S?\d",
     0.2),
    (r"\b(?:because|since|therefore|given that|as (?:shown|reported)|et al|\(\d{4}\)|"
     r"pmid|doi|specifically|in particular)\b", 0.15),
    (r"\d+(?:\.\d+)?\s?(?:%|fold|mM|nM|µM|°|kDa|bp)?", 0.04),
)  # fmt: skip
COST = _cues(
    (r"\b(?:(?:new|additional|further|more|repeat\w*|perform\w*|another|independent) "
     r"(?:\w+ )?(?:experiment\w*|data|cohort|measurement\w*|sample\w*|mice|animals|"
     r"replicat\w*|validation|trial)|experiment\w* (?:is|are|should|must)|knock-?outs?|"
     r"replicate the|new cohort)\b", 0.45),
    (r"\b(?:control\w*|re-?analys\w*|re-?analyz\w*|analys\w+|simulat\w+|quantif\w+|"
     r"statistic\w*|compar\w+|test\w*)\b", 0.18),
    (r"\b(?:clarify|explain|discuss\w*|rephrase|reword|cite|describe|mention|state|"
    r"typo|"
     r"legend|label|wording|title|tone)\b", -0.08),
)  # fmt: skip
CORE = re.compile(
    r"\b(?:main|central|key|core|principal|primary) (?:\w+ )?(?:claim|conclusion|"
    r"finding|"
    r"result|message|hypothesis|point)s?\b|\bconclusions?\b|\bclaims?\b|"
    r"\bhypothes[ie]s\b|"
    r"\bmechanism\b|\b(?:abstract|title)\b.{0,40}\bclaim",
    re.IGNORECASE,
)
PERIPHERAL = re.compile(
    r"\b(?:typo\w*|legend|figure label|font|colou?r|wording|sentence|grammar|spelling|"
    r"reference list|citation|minor|supplement\w*|abbreviation)\b",
    re.IGNORECASE,
)
TYPES = (
    ("writing/presentation", r"\b(?:typo\w*|writ\w+|wording|grammar|spelling|legend|"
    r"label|"
     r"figure quality|readab\w+|title|clarity|rephrase|sentence|confusing|"
     r"hard to follow|"
     r"language|presentation)\b"),
    ("literature", r"\b(?:cit(?:e|ed|ation|ing)\w*|literature|reference\w*|"
    r"previous(?:ly)? "
     r"(?:work|stud\w+|published|report\w+)|earlier work|et al)\b"),
    ("reproducibility", r"\b(?:reproduc\w+|code|data availab\w+|raw data|deposit\w*|"
    r"protocol|"
     r"replicab\w+|repository|source data|shared?)\b"),
    ("novelty/significance", r"\b(?:novel\w*|significance|incremental|impact|"
    r"interest to|"
     r"importan(?:t|ce) of|advance|broad(?:er)? (?:interest|audience))\b"),
    ("interpretation/claim", r"\b(?:claim\w*|conclu\w+|interpret\w*|overstat\w*|"
    r"speculat\w*|"
     r"causal\w*|alternative explanation|mechanism|implication\w*|hypothes\w+)\b"),
    ("methodology", r"\b(?:method\w*|design|statistic\w*|model\w*|control\w*|"
    r"sample size|"
     r"power|assay|analys[ie]s|random\w*|bias\w*|protocol|simulation\w*|"
     r"parameter\w*)\b"),
    ("evidence/data", r"\b(?:data|evidence|experiment\w*|result\w*|measure\w*|"
    r"replicat\w*|"
     r"observ\w+|figure|show\w*|quantif\w+)\b"),
)  # fmt: skip
_TYPES = tuple((name, re.compile(p, re.IGNORECASE)) for name, p in TYPES)
PRAISE = re.compile(
    r"\b(?:well[- ]written|excellent|convincing|impress\w+|elegant|interesting|"
    r"important "
    r"(?:paper|work|study)|timely|commend\w*|solid|high quality|nicely|carefully)\b",
    re.IGNORECASE,
)
NEGATIVE = re.compile(
    r"\b(?:not|no|never|lack\w*|missing|fail\w*|unclear|weak\w*|concern\w*|problem\w*|"
    r"insufficient|over-?\w+stat\w*|unsupported|misleading|wrong|incorrect|speculative|"
    r"however|unfortunately|limit\w*|doubt\w*|flaw\w*)\b",
    re.IGNORECASE,
)
SUGGEST = re.compile(
    r"\b(?:suggest\w*|recommend\w*|should|please|could (?:be|the authors)|would (?:be|"
    r"like|help|benefit)|need\w*|must|encourage)\b",
    re.IGNORECASE,
)
RESPONSES = (
    ("rebut", r"\b(?:(?:respectfully )?disagree|do not agree|not (?:correct|"
    r"the case|true)|"
     r"we (?:believe|feel|think|maintain) (?:that )?(?:this|our|the)|contrary to|"
     r"not necessary|misunderst\w+)\b"),
    ("defer", r"\b(?:beyond the scope|out of (?:the )?scope|future (?:work|stud\w+|"
    r"research|"
     r"manuscript)|separate (?:study|manuscript|paper)|not (?:possible|feasible)|"
     r"unable to|"
     r"unfortunately|could not|cannot be (?:done|performed))\b"),
    ("agree_partial", r"\b(?:partly|partially|in part|to some extent|although we agree|"
     r"while we (?:do )?agree|agree\w*[^.]{0,60}\b(?:but|however|although))\b"),
    ("agree_and_revise", r"\b(?:we (?:have )?(?:now )?(?:\w+ )?(?:add\w*|revis\w*|"
    r"chang\w*|"
     r"correct\w*|includ\w*|perform\w*|repeat\w*|rewr\w+|modif\w*|remov\w*|expand\w*|"
     r"replac\w*|redr\w+|updat\w*|reword\w*|clarified|provide\w*)|(?:has|"
     r"have) (?:now )?been"
     r" (?:add|chang|correct|revis|includ|mov|remov)\w*|as suggested|we agree|"
     r"good point|"
     r"thank\w* (?:the )?(?:reviewer|you) for (?:pointing|this))\b"),
    ("clarify", r"\b(?:clarif\w+|explain\w*|we (?:meant|used|mean|refer)|note that|"
    r"in fact|"
     r"indeed|as (?:described|explained|stated|shown))\b"),
)  # fmt: skip
_RESPONSES = tuple((name, re.compile(p, re.IGNORECASE)) for name, p in RESPONSES)
BASE = {"strength": 0.3, "constructiveness": 0.2, "quality": 0.2, "revision_cost": 0.2}


def score(text: str) -> dict[str, float]:
    """The four scores of a text, in steps of a quarter from 0 to 1; see ``levels``."""
    return {name: round(4 * value) / 4 for name, value in levels(text).items()}


def levels(text: str) -> dict[str, float]:
    """The four scores before rounding, in [0, 1]: a base and the cues' weights.

    A cue counts at most three times: long paragraphs do not become strong by length.
    """
    cues = {
        "strength": STRENGTH, "constructiveness": CONSTRUCTIVE, "quality": QUALITY,
        "revision_cost": COST,
    }  # fmt: skip
    result = {}
    for name, own in cues.items():
        total = BASE[name]
        for cue in own:
            total += cue.weight * min(len(cue.pattern.findall(text)), 3)
        result[name] = min(max(total, 0.0), 1.0)
    return result


def opinion_type(text: str) -> str:
    """The type with most matches, of equal ones the more specific."""
    counts = {name: len(p.findall(text)) for name, p in _TYPES}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "other"


def target(text: str, section: str = "") -> str:
    """Whether a paper's claims are meant, by words of the text and its section."""
    if re.search(r"minor", section, re.IGNORECASE):
        return "peripheral"
    if CORE.search(text) or re.search(r"major|essential", section, re.IGNORECASE):
        return "core"
    return "peripheral" if PERIPHERAL.search(text) else "core" if (
        levels(text)["strength"] >= 0.6) else "peripheral"  # fmt: skip


def polarity(text: str) -> str:
    """Of the first that holds: praise, criticism, suggestion, question."""
    negative = len(NEGATIVE.findall(text))
    if PRAISE.search(text) and not negative and not SUGGEST.search(text):
        return "praise"
    if negative:
        return "criticism"
    if SUGGEST.search(text):
        return "suggestion"
    return "question" if "?" in text else "criticism"


def response_type(text: str | None) -> str:
    """What an answer does; no_response without one."""
    if not text or not text.strip():
        return "no_response"
    for name, pattern in _RESPONSES:
        if pattern.search(text):
            return name
    return "clarify"


def rule_extract(file: ReviewFile) -> list[Opinion]:
    """One opinion for each point of a parsed file, its quote located by offset."""
    return list(_opinions(file))


def _opinions(file: ReviewFile) -> Iterator[Opinion]:
    for n, point in enumerate(file.points):
        text = " ".join(file.quote(point.spans).split())
        if not text:
            continue
        label = units.label_of(text)[1]
        said = [s for x in point.links for s in x.reply]
        reply = file.quote(said) or None
        kind = response_type(reply)
        yield Opinion(
            id=f"{point.round}.{point.reviewer}.{point.number}",
            round=point.round, reviewer=point.reviewer, quote=text,
            summary=_first_sentence(text[label:]),
            opinion_type=opinion_type(text), target=target(text, point.section),
            polarity=polarity(text), **score(text), response_type=kind,
            response_quote=reply, resolved_round=resolved(file, point, kind),
            span=Span(point.spans[0].start, point.spans[-1].end), point=n,
        )  # fmt: skip


def resolved(file: ReviewFile, point: Point, kind: str) -> int | None:
    """The round after an agreement, unless the reviewer repeats the point.

    Args:
      file: of a parser.
      point: what was asked, or an opinion's round, reviewer and spans.
      kind: of the answer, see ``schema.RESPONSES``.
    """
    if kind not in ("agree_and_revise", "agree_partial"):
        return None
    mine = units.trigrams(units.words(file.quote(point.spans)))
    for other in file.points:
        if other.round > point.round and other.reviewer == point.reviewer:
            same = units.trigrams(units.words(file.quote(other.spans))) & mine
            if len(same) > 0.5 * len(mine):
                return None
    return point.round + 1


def _first_sentence(text: str) -> str:
    found = re.match(r".{20,200}?[.?!](?=\s|$)", text)
    return (found[0] if found else text[:200]).strip()
