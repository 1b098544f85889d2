"""How reward models of other families read a solution, for comparing with them.

Each family says where its scores are read and which two numbers make one: logits of two
tokens, or of a head of two classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Tokenize = Callable[[str], Sequence[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of process reward models.

    Attributes:
      name: of the family.
      separator: text that ends a step.
      tag: id at which a score is read; of chat models that of the answer "+".
      wrong: id of the token for a wrong step; -1: the head has two classes.
      right: id of the token for a right step; -1: likewise.
      question_end: text between question and steps.
      chat: a step is a user's turn, and the answer to it is ``tag``; the score is read
        at the position before it, which predicts the answer.
      append_ids: the separator is tokenised by itself and its ids appended.
    """

    name: str
    separator: str
    tag: int
    wrong: int = -1
    right: int = -1
    question_end: str = "\n"
    chat: bool = False
    append_ids: bool = False

    @property
    def classes(self) -> bool:
        """Whether the model has a head of two classes, wrong and right."""
        return self.right < 0


FAMILIES = {
    f.name: f
    for f in (
        Family(name="versaprm-llama", separator=" \n\n\n\n", tag=23535, wrong=12,
               right=10, question_end=" \n\n"),
        Family(name="versaprm-qwen", separator=" \n\n\n\n", tag=22701, wrong=12, right=10,
               question_end=" \n\n"),
        Family(name="math-shepherd", separator=" ки\n", tag=12902, wrong=387, right=648,
               question_end=" "),
        Family(name="rlhflow-deepseek", separator="", tag=10, wrong=12, right=10,
               question_end=" ", chat=True),
        Family(name="qwen2.5-math-prm", separator="<extra_0>", tag=151651,
               question_end="\n"),
        Family(name="math-psa", separator="\n\n\n\n\n", tag=76325, wrong=481, right=488,
               question_end=" "),
        Family(name="trl", separator="\n", tag=-1, question_end="\n", append_ids=True),
    )
}  # fmt: skip
"""Families by name. Ids are those of the tokenizers that the models come with: give your
own by ``dataclasses.replace`` where a model has another."""


class Reading(NamedTuple):
    """Ids of a solution, and where each step's score is read."""

    ids: np.ndarray
    positions: np.ndarray


def encode(
    family: Family,
    tokenize: Tokenize,
    question: str,
    steps: Sequence[str],
    chat: Callable[[Sequence[tuple[str, str]]], Sequence[int]] | None = None,
) -> Reading:
    """Ids, int32 (L,), and positions of the scores, int32 (S,).

    Args:
      family: one of ``FAMILIES``.
      tokenize: text -> ids without special tokens.
      question: text.
      steps: texts.
      chat: (role, text) turns -> ids, the model's chat template; for families with turns.

    Raises:
      ValueError: no steps, an empty one, no template where one is needed; other numbers
        of tags than of steps, which happens where a text has the tag or merges with it.
    """
    steps = [s.rstrip() for s in steps]
    if not steps or not all(steps):
        raise ValueError(f"{family.name}: steps must not be empty, got {steps[:4]}")
    if family.chat:
        return _chat(family, question, steps, chat)
    head = list(tokenize(question + family.question_end))
    if family.append_ids:
        end = list(tokenize(family.separator))
        parts = [[*tokenize(s), *end] for s in steps]
        sizes = np.cumsum([len(head), *map(len, parts)])[1:]
        ids = np.array([*head, *(t for p in parts for t in p)], np.int32)
        return Reading(ids, np.asarray(sizes - 1, np.int32))
    ids = np.array(
        [*head, *(t for s in steps for t in tokenize(s + family.separator))], np.int32
    )
    return Reading(ids, _tags(family, ids, len(steps)))


def read(family: Family, logits: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Probabilities that steps are right, float64 (S,).

    Args:
      family: of the model.
      logits: (L, V), or (L, 2) of a head of two classes.
      positions: of ``encode``.

    Raises:
      ValueError: logits of another width than the family's ids or classes need.
    """
    columns = (0, 1) if family.classes else (family.wrong, family.right)
    width = logits.shape[-1]
    if width <= max(columns) or family.classes and width != 2:
        raise ValueError(
            f"{family.name} reads columns {columns}, got logits of width {width}"
        )
    wrong, right = (np.asarray(logits[positions, c], np.float64) for c in columns)
    return 1 / (1 + np.exp(np.clip(wrong - right, -700, 700)))


def _tags(family, ids, count):
    at = np.flatnonzero(ids == family.tag)
    if len(at) != count:
        raise ValueError(
            f"{family.name}: found the tag {family.tag} {len(at)} times for {count} "
            "steps; is this the model's tokenizer?"
        )
    return at.astype(np.int32)


def _chat(family, question, steps, chat):
    if chat is None:
        raise ValueError(f"{family.name} needs chat, the model's template of turns")
    turns = []
    for i, step in enumerate(steps):
        told = f"{question}{family.question_end}{step}" if i == 0 else step
        turns += [("user", told), ("assistant", "+")]
    # Where a turn's answer stands is known from what the turns up to it add.
    ids = np.asarray(chat(turns), np.int32)
    ends = [len(chat(turns[: 2 * i + 2])) for i in range(len(steps))]
    positions = []
    for end in ends:
        answers = np.flatnonzero(ids[:end] == family.tag)
        if not len(answers):
            raise ValueError(f"{family.name}: no answer {family.tag} in the turns' ids")
        positions.append(answers[-1] - 1)
    return Reading(ids, np.array(positions, np.int32))
