"""What a paragraph of a correspondence is, by its first words and its style."""

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

ROMAN = (
    "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII",
    "XIV", "XV", "XVI", "XVII", "XVIII", "XIX", "XX",
)  # fmt: skip
NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")

_WHO = r"(?:reviewer|referee)"
_ID = (
    r"(?:#|no\.?|number|n°)?\s*#?\s*(\d{1,2}|[A-H]|"
    + "|".join((*ROMAN, *NUMBER_WORDS))
    + r")"
)
_PARENS = r"(?:\s*[(\[][^)\]\n]{0,120}[)\]]{1,2})?"
# "Reviewer #1 (Remarks to the Author):", alone or with the report behind it.
REVIEWER = re.compile(
    rf"^\W{{0,3}}(?:(?:comments?|remarks|report|reply|responses?)\s+"
    rf"(?:of|from|by|to)\s+)?(?:the\s+)?{_WHO}\s*{_ID}\b"
    rf"(?:['’]s?\s+(?:comments?|report|review))?{_PARENS}"
    r"(?:\s*(?:comments?|remarks|report|review|public\s+review|"
    r"recommendations?\s+for\s+the\s+authors?))?\s*[:.\-–—]*\s*",
    re.IGNORECASE,
)
# "Review II", alone in its line.
REVIEW = re.compile(
    rf"^\W{{0,3}}review\s*(?:#|no\.?)?\s*(\d{{1,2}}|{'|'.join(ROMAN)})\s*[:.]?\s*$",
    re.IGNORECASE,
)
# A reviewer's number in a title; of a review only digits and Roman ones.
TITLED = (
    re.compile(
        rf"\b(?i:{_WHO})\s*#?\s*(\d{{1,2}}|(?i:[A-H]|{'|'.join(ROMAN)})\b)",
    ),
    re.compile(rf"\b(?i:review)\s*#?\s*(\d{{1,2}}\b|(?:{'|'.join(ROMAN)})\b)"),
)
ORDINALS = ("first", "second", "third", "fourth")
ORDINAL = re.compile(
    rf"^\W{{0,3}}(?:the\s+)?({'|'.join(ORDINALS)})\s+{_WHO}(?:['’]s)?"
    r"(?:\s+(?:comments?|report|review))?\s*[:.]\s*$",
    re.IGNORECASE,
)
EDITOR = re.compile(
    r"^\W{0,3}(?:(?:reviewing|senior|handling|academic|associate)\s+)?editor"
    r"(?:['’]?s)?(?:\s+(?:comments?|summary|remarks))?\s*(?:\([^)]*\))?\s*:\s*$",
    re.IGNORECASE,
)
NOTE = re.compile(r"^\s*[\[(]?\s*editors?\s?['’`]?\s?s?\s*note\b", re.IGNORECASE)
# A note that opens another round of review.
AGAIN = re.compile(
    r"further revisions?|during revisions?|re-?submi|re-?review|re-?consider|"
    r"second round|"
    r"(?:formal|additional) revisions?|first round|previous(?:ly)?\b.{0,80}\b(?:reject|"
    r"declin|decision|version|submi)|after (?:the )?(?:appeal|revision)|now follows|"
    r"(?:revised|new) (?:version|submission|manuscript)|plan (?:of action|"
    r"for revisions)",
    re.IGNORECASE,
)
# A note about the round that it stands in.
FIRST = re.compile(r"first (?:round|decision|review)|initial", re.IGNORECASE)
RESUBMITTED = re.compile(
    r"^\W{0,3}thank you for (?:re-?submitting|submitting the revised|"
    r"sending the revised|"
    r"submitting your revised|your re-?submission)",
    re.IGNORECASE,
)
# The editor's set phrases, in which nothing is asked of the paper.
SET_PHRASES = re.compile(
    r"^\W{0,3}(?:thank you for|the review(?:ing|er)s?(?: editor)?s?,?"
    r"(?: and| have| editor)"
    r"[^.]{0,80}(?:discussed|drafted|assembled)|our goal is|find more details|"
    r"please (?:examine|find) (?:these|below)|we (?:look|are looking) forward|"
    r"dear |sincerely|yours |best (?:wishes|regards)|kind regards|if you have any|"
    r"when (?:submitting|you submit|revising)|as is customary|"
    r"before submitting|in light of|your (?:article|manuscript|paper) has been|"
    r"(?:all|both|the) (?:\w+ )?reviewers (?:were|found|agree that the (?:work|paper))|"
    r"the manuscript has been improved|(?:three|two|four) experts)",
    re.IGNORECASE,
)
LABEL = re.compile(
    r"^\W{0,2}?(?P<label>(?:(?:major|minor|specific|general|essential)\s+)?"
    r"(?:(?:point|comment|concern|issue|question|revision|remark|query|"
    r"weakness|[RQC])\s*)?[#(]?\s?(?:\d{1,3}(?:\.\d{1,2}){0,2}|[a-hA-H](?=[).])(?!\.\s?[a-z]\.)|"
    r"[ivx]{1,4}(?=[).])(?!\.\s?[a-z]\.)))\s?(?:[).:]{1,2}|[-–—]\s)(?!\d)\s*",
    re.IGNORECASE,
)
BULLET = re.compile(r"^\s*(?P<label>[*•·▪●◦‣–—-])\s*(?=[^\W_]|[\"“‘'(])")
REPLY = re.compile(
    r"^\W{0,3}(?:(?:the\s+)?authors?['’]?s?\s+|our\s+)?"
    r"(?:(?:response|reply|answer|rebuttal)(?:\s+(?:to|\d)[^:\n]{0,60})?\s*[:.\-–—>]|"
    r"(?:A|R|AR|Ans|Resp)\s*\d{0,2}\s*:|>>+)\s*",
    re.IGNORECASE,
)
# What reviewers use when they want something.
ASKS = re.compile(
    r"\?|\b(?:should|could (?:you|the authors?)|must|needs? to|needed|please|suggest|"
    r"recommend|encourage|unclear|not (?:at all )?(?:entirely |really )?clear|clarif|"
    r"concern|worr|lack|missing|absent|insufficient|inadequate|weak|overstate|"
    r"overinterpret|over-interpret|oversimplif|overblown|unsupported|speculative|"
    r"questionable|unconvinc|not convinc|not convinced|confus|misleading|difficult to|"
    r"would (?:be|like|benefit|help|strengthen|greatly)|wonder(?:ing|ed)?|request|"
    r"require[ds]?|might (?:perhaps|want|wish|consider|be worth)|may wish|"
    r"nice to see|(?:small|minor|further|last) remark|limitation|shortcoming|"
    r"drawback|problem|inconsisten|"
    r"incorrect|wrong|"
    r"error|typo|improve|omission|however|unfortunately|not (?:supported|warranted|"
    r"surprising|shown|provided|addressed|discussed|described|appropriate|sufficient)|"
    r"more (?:detail|analys|experiment|discussion|information)|ought)",
    re.IGNORECASE,
)
# Words of asking that ask nothing.
IDIOMS = re.compile(
    r"should (?:also )?be of (?:\w+ )?(?:\w+ )?interest|would be of (?:\w+ )?interest|"
    r"(?:will|would|should) be (?:\w+ )?(?:useful|valuable|"
    r"interesting) to the (?:field|"
    r"community|readers)|no (?:\w+ )?(?:concerns?|problems?|requests?|comments?|"
    r"issues?)|"
    r"(?:concerns?|comments?|points?|issues?|questions?|criticisms?|suggestions?)"
    r"(?: \w+){0,4} (?:have|has|were|are) (?:now )?(?:all )?(?:been )?(?:\w+ly )?"
    r"(?:addressed|resolved|answered|dealt)|"
    r"(?:addressed|resolved|answered|satisfied)(?: \w+){0,4} (?:concerns?|comments?|"
    r"points?|issues?|questions?|criticisms?|suggestions?|requests?)|"
    r"(?:i|we) (?:\w+ )?recommend (?:\w+ ){0,3}(?:acceptance|publication|publishing)|"
    r"without (?:any )?(?:\w+ )?(?:concerns?|problems?)",
    re.IGNORECASE,
)
# A paragraph that leads to a list.
LEADS = re.compile(
    r"(?::|\b(?:below|as follows|the following(?: \w+)?))[\s.:)\]]*$", re.IGNORECASE
)
# A report's first paragraph that tells what the paper does.
OPENS = re.compile(
    r"^\W{0,3}(?:(?:in )?(?:this|the) (?:\w+ )?(?:\w+ )?(?:paper|manuscript|study|work|"
    r"article|submission)|the authors|[\w.-]+(?: [\w.-]+)? (?:et al|and "
    r"(?:colleagues|co-?workers)))\b",
    re.IGNORECASE,
)
ELLIPSIS = re.compile(r"^\W*(?:\.{3}|…)\W*$")
WORD = re.compile(r"[^\W_]+")
SECTIONS = re.compile(
    r"^\W{0,3}(?:\d[.)]\s*)?(?:(?:list of |summary of )?(?:major|minor|"
    r"essential|specific|"
    r"general|other|additional|main|detailed|technical|further)\s+(?:and \w+ )?"
    r"(?:points?|comments?|concerns?|issues?|revisions?|remarks?|questions?|"
    r"criticisms?|"
    r"weaknesses)|summary|strengths?|weaknesses|questions?|limitations|references?|"
    r"(?:general )?assessment|significance|evidence[^.]{0,40}|"
    r"recommendations?[^.]{0,40}|"
    r"minor|major|essential revisions?[^.]{0,60}|"
    r"(?:supplementary )?fig(?:ure|\.)s?\s*\S{1,6}|"
    r"tables?\s*\S{1,4}|abstract|introduction|results|methods|discussion|"
    r"materials and methods|title)\s*(?:\([^)]{0,60}\))?\s*[:.]?\s*$",
    re.IGNORECASE,
)


class Block(NamedTuple):
    """A paragraph.

    Attributes:
      start, end: offsets into the text.
      side: cover, note, noise, heading, letter or response.
      styled: share of its letters that are italic (or, in a reply, bold).
      round: from 1; 0: not known yet, the grammar counts.
      reviewer: number where the source says it; -1: not.
      figure: a label or caption within the authors' words.
      joined: goes on with the paragraph before, which page noise has cut.
    """

    start: int
    end: int
    side: str
    styled: float = 0.0
    round: int = 0
    reviewer: int = -1
    figure: bool = False
    joined: bool = False


def asks(text: str) -> bool:
    """Whether a paragraph wants something of the authors."""
    return bool(ASKS.search(IDIOMS.sub(" ", text)))


def words(text: str) -> list[str]:
    """Words in lower case, of compatible characters one, hyphenated breaks joined."""
    text = re.sub(r"(?<=[^\W\d_])-[ \t]*\n[ \t]*(?=[^\W\d_])", "", text)
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def trigrams(tokens: list[str]) -> set[tuple[str, ...]]:
    """Runs of three words; a short text is one run."""
    if len(tokens) < 3:
        return {tuple(tokens)} if tokens else set()
    return set(zip(tokens, tokens[1:], tokens[2:]))


def number_of(name: str) -> int:
    """A reviewer's number of "2", "B", "VI" or "two"."""
    if name.isdecimal():
        return int(name)
    if name.lower() in NUMBER_WORDS:
        return NUMBER_WORDS.index(name.lower()) + 1
    if name.upper() in ROMAN:
        return ROMAN.index(name.upper()) + 1
    return ord(name.upper()) - ord("A") + 1


def reviewer_in(title: str) -> int | None:
    """The reviewer that a title names: "Referee report (Reviewer III)", "Review II"."""
    found = next(filter(None, (pattern.search(title) for pattern in TITLED)), None)
    return number_of(found[1]) if found else None


def reviewer_heading(text: str) -> tuple[int, int] | None:
    """(number, length of the heading) of text that opens a report; None: it does not.

    A sentence about a reviewer ("Reviewer 2 suggests that ...") is none.
    """
    found = REVIEWER.match(text)
    if not found:
        alone = REVIEW.match(text)
        if alone:
            return number_of(alone[1]), alone.end()
        named = ORDINAL.match(text)
        if named:
            return ORDINALS.index(named[1].lower()) + 1, named.end()
        return None
    rest = text[found.end() :]
    if rest.strip() and not re.search(r"[:\-–—)\n]\s*$", found[0]):
        return None
    if found[1].islower() and found[1] not in NUMBER_WORDS:
        return None
    return number_of(found[1]), found.end()


def is_heading(text: str, styled: float) -> bool:
    """Whether a short line heads a part: a known name, or a few words before a colon."""
    text = text.strip()
    if SECTIONS.match(text):
        return True
    count = len(text.split())
    if count > 10 or len(text) > 100 or text.endswith(("?", ".")):
        return False
    return text.endswith(":") and count <= 7 or styled > 0.9 and count <= 6


def label_of(text: str) -> tuple[str, int]:
    """The label that a paragraph starts with, and its length; ("", 0): none."""
    found = LABEL.match(text)
    if found and found.end() < len(text):
        return " ".join(found["label"].lower().strip("(#").split()), found.end()
    found = BULLET.match(text)
    return ("*", found.end()) if found else ("", 0)


def number_in(label: str) -> str:
    """What is compared of a label: "major point 2" and "2" are one."""
    found = re.search(r"[\d.]+$|[a-z]+$", label)
    return found[0] if found else ""


def paragraphs(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Spans of a text between blank lines, without white space around."""
    for found in re.finditer(r"\S(?:[^\n]|\n(?![ \t]*\n))*", text[start:end]):
        part = found[0].rstrip()
        if part:
            yield start + found.start(), start + found.start() + len(part)
