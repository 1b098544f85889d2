"""Counterfactual augmentation: a right solution with one step made wrong.

For every solution without errors a rewriter (a language model, or the generator's own
errors) is offered two types of error and gives a step in place of one, see
``encoding.encode_example``. The authors' final model does without.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

TYPES = (
    "conflicting steps", "non-sequitur", "factual", "false assumption", "contextual",
)  # fmt: skip
ARITHMETIC = ("calculation", "incorrect equation")
"""Types that are offered for problems with numbers besides ``TYPES``."""


class Rewrite(NamedTuple):
    """A rewriter's answer.

    Attributes:
      number: of the step, from 1.
      text: of the wrong step.
      kind: type of its error, one of those that were offered.
    """

    number: int
    text: str
    kind: str


class Augmented(NamedTuple):
    """Records with ``augs``, and the number of answers that did not fit, by reason."""

    records: list[dict[str, Any]]
    refused: dict[str, int]


def augment(
    records: Sequence[Mapping[str, Any]],
    rewrite: Callable[[str, Sequence[str], Sequence[str]], Rewrite | None],
    *,
    times: int = 2,
    numbers: bool = False,
    seed: int = 0,
) -> Augmented:
    """Asks ``rewrite(question, steps, two types)`` for each right solution ``times``.

    An answer that does not fit (none, a step that is not there, an empty or unchanged
    text, a type that was not offered) is refused and counted.

    Args:
      records: with ``question`` and ``chain_of_thoughts``, see ``encoding.encode_all``.
      rewrite: see above.
      times: per solution.
      numbers: offer ``ARITHMETIC`` too.
      seed: of the types that are offered.

    Raises:
      ValueError: times below 1.
    """
    if times < 1:
        raise ValueError(f"times must be >= 1, got {times}")
    rng, refused, made = random.Random(seed), {}, []
    known = (*TYPES, *(ARITHMETIC if numbers else ()))
    for record in records:
        solutions = []
        for solution in record["chain_of_thoughts"]:
            labels = solution.get("labels")
            augs = list(solution.get("augs") or ())
            right = bool(labels) and all(y == 1 for y in labels)
            for _ in range(times if right else 0):
                offered = rng.sample(known, 2)
                answer = rewrite(record["question"], solution["steps"], offered)
                reason = _unfit(answer, solution["steps"], offered)
                if reason or answer is None:
                    refused[reason] = refused.get(reason, 0) + 1
                    continue
                augs.append(
                    {
                        "aug_step": answer.text,
                        "aug_idx": answer.number - 1,
                        "aug_type": answer.kind,
                    }
                )
            solutions.append({**solution, "augs": augs})
        made.append({**record, "chain_of_thoughts": solutions})
    return Augmented(made, refused)


def _unfit(answer: Rewrite | None, steps, offered) -> str:
    """Why an answer does not fit; "" if it does."""
    if answer is None:
        return "no answer"
    if answer.kind not in offered:
        return "type not offered"
    if not 1 <= answer.number <= len(steps):
        return "no such step"
    if not answer.text.strip():
        return "empty step"
    if answer.text.strip() == steps[answer.number - 1].strip():
        return "unchanged step"
    return ""
