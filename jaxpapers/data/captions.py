"""Words for text-conditioned models: tokens, captions of digits, files of prompts.

A model that learns from ``misaligned`` captions, or that never saw some combinations of
``inked``, answers prompts wrongly in the way that large text-to-image models do: what
fine-tuning on a reward then repairs can be counted.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DIGITS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
)
COLOURS = ("red", "green", "blue", "yellow")
ARTICLES = ("a", "an", "the")
NULL = 0
"""Token of no word: pads, and alone it is the prompt of the unconditional model."""

_INKS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], np.float32)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class Vocabulary:
    """Numbers for words; token 0 is no word, ``NULL``.

    Case, punctuation and ignored words do not matter.

    Args:
      words: token i + 1 is words[i].
      ignored: words that get no token, articles unless given.

    Raises:
      ValueError: no words, one that is none or comes twice or is ignored too.

    Example:
      >>> words = Vocabulary(("green", "zero", "one"))
      >>> len(words), words.encode("A green one.", length=3).tolist()
      (4, [1, 3, 0])
      >>> words.decode([1, 3, 0])
      'green one'
    """

    def __init__(self, words: Iterable[str], ignored: Iterable[str] = ARTICLES):
        self.words, self.ignored = tuple(words), frozenset(ignored)
        for word in self.words:
            if _split(word) != [word]:
                raise ValueError(f"words must be single and lower-case, got {word!r}")
            if word in self.ignored:
                raise ValueError(f"the word {word!r} is ignored too")
        self._tokens = {word: i for i, word in enumerate(self.words, 1)}
        if len(self._tokens) < len(self.words):
            twice = [word for word in self._tokens if self.words.count(word) > 1]
            raise ValueError(f"words must be different, got twice: {', '.join(twice)}")
        if not self.words:
            raise ValueError("a vocabulary must have at least one word, got none")

    @classmethod
    def of(
        cls, texts: Iterable[str], ignored: Iterable[str] = ARTICLES
    ) -> "Vocabulary":
        """The words of some texts, in the order of the alphabet."""
        ignored = frozenset(ignored)
        return cls(
            sorted({w for text in texts for w in _split(text)} - ignored), ignored
        )

    def __len__(self) -> int:
        """Rows of an embedding table: the words and the null token."""
        return len(self.words) + 1

    def encode(self, text: str, length: int | None = None) -> np.ndarray:
        """Tokens of a text, int32 (length,).

        Args:
          text: words of the vocabulary.
          length: to fill up to with the null token; None: as long as the text.

        Raises:
          ValueError: an unknown word, with the nearest known ones; no word at all; more
            words than the length.
        """
        words = [word for word in _split(text) if word not in self.ignored]
        for word in words:
            if word not in self._tokens:
                near = difflib.get_close_matches(word, self.words) or self.words[:5]
                raise ValueError(
                    f"unknown word {word!r} in {text!r}; nearest: {', '.join(near)}"
                )
        if not words:
            raise ValueError(f"a text must have a word of the vocabulary, got {text!r}")
        length = len(words) if length is None else length
        if len(words) > length:
            raise ValueError(f"{text!r} has {len(words)} words, more than {length}")
        tokens = [self._tokens[word] for word in words] + [NULL] * (length - len(words))
        return np.array(tokens, np.int32)

    def encode_all(self, texts: Sequence[str], length: int | None = None) -> np.ndarray:
        """Tokens of texts, int32 (texts, length); None: as long as the longest.

        Raises:
          ValueError: no texts, or as ``encode``.
        """
        if not len(texts):
            raise ValueError("texts must have at least one, got none")
        rows = [self.encode(text) for text in texts]
        length = max(map(len, rows)) if length is None else length
        return np.stack([self.encode(text, length) for text in texts])

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The words of one text's tokens, without the null token.

        Raises:
          ValueError: a token outside the vocabulary.
        """
        tokens = np.asarray(tokens, int).reshape(-1)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(self):
            raise ValueError(f"tokens must be 0 .. {len(self) - 1}, got {tokens}")
        return " ".join(self.words[token - 1] for token in tokens if token != NULL)


class Inked(NamedTuple):
    """Coloured digits, each with what it is and what it is called.

    Attributes:
      image: float32 (n, height, width, 3) in [0, 1], ink on black.
      digit: what it shows, int32 (n,).
      colour: number of its ink in ``COLOURS``, int32 (n,).
      caption: of the held-out combinations a wrong one.
    """

    image: np.ndarray
    digit: np.ndarray
    colour: np.ndarray
    caption: tuple[str, ...]


class Prompt(NamedTuple):
    """A line to draw, and its kind."""

    text: str
    category: str


def digit_vocabulary() -> Vocabulary:
    """Eleven tokens: null, zero .. nine."""
    return Vocabulary(DIGITS)


def colour_vocabulary() -> Vocabulary:
    """Fifteen tokens: null, the four colours, zero .. nine."""
    return Vocabulary(COLOURS + DIGITS)


def digit_captions(label: np.ndarray) -> tuple[str, ...]:
    """Captions "a zero" .. "a nine".

    Raises:
      ValueError: a label that is no digit.

    Example:
      >>> digit_captions(np.array([7, 0]))
      ('a seven', 'a zero')
    """
    return tuple(f"a {DIGITS[i]}" for i in _checked(label, 10))


def misaligned(
    label: np.ndarray, classes: int, share: float = 0.5, *, seed: int
) -> np.ndarray:
    """Labels of which some are replaced: the defect that fine-tuning is to repair.

    Each label is drawn anew with the probability ``share``, evenly from all classes and
    thus sometimes as it was. One fixed set, not one for each epoch: a model can learn it.

    Args:
      label: 0 .. classes - 1.
      classes: number of them.
      share: probability of a replacement.
      seed: of the draws.

    Returns:
      int32, as many.

    Raises:
      ValueError: other labels, or a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be a probability, got {share}")
    label = _checked(label, classes)
    rng = np.random.default_rng(seed)
    replaced = rng.random(len(label)) < share
    return np.where(replaced, rng.integers(0, classes, len(label)), label).astype(
        np.int32
    )


def held_out(digit: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Whether a combination is never captioned correctly: (digit + colour) mod 5 = 0.

    Eight of the 40, two digits of each colour.
    """
    return (np.asarray(digit) + np.asarray(colour)) % 5 == 0


def colour_prompts() -> tuple[str, ...]:
    """The 40 captions "a red zero" .. "a yellow nine"; prompt 10 colour + digit."""
    return tuple(f"a {colour} {digit}" for colour in COLOURS for digit in DIGITS)


def inked(image: np.ndarray, label: np.ndarray, seed: int) -> Inked:
    """Scanned digits in red, green, blue or yellow ink, called "a green seven".

    Each gets an ink drawn evenly. Where the combination is ``held_out``, its caption is
    drawn evenly from the 39 others, so no picture is ever rightly called that.

    Args:
      image: float (n, height, width, 1), 1 where there is ink, 0 where there is none.
      label: the digits, (n,).
      seed: of the inks and the captions.

    Raises:
      ValueError: pictures of another shape or range, or labels that are no digits.
    """
    label = _checked(label, 10)
    if image.ndim != 4 or image.shape[-1] != 1 or len(image) != len(label):
        raise ValueError(
            f"pictures must have shape ({len(label)}, height, width, 1), got "
            f"{image.shape}"
        )
    if image.size and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError("pictures must lie in [0, 1]")
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, len(COLOURS), len(label)).astype(np.int32)
    prompts = colour_prompts()
    number = 10 * colour + label
    other = (number + rng.integers(1, len(prompts), len(label))) % len(prompts)
    number = np.where(held_out(label, colour), other, number)
    return Inked(
        (image * _INKS[colour][:, None, None]).astype(np.float32),
        label,
        colour,
        tuple(prompts[i] for i in number),
    )


def drawbench(path: str | Path) -> tuple[Prompt, ...]:
    """DrawBench's prompts, ``data_meta.json``: {prompt: {"category": kind}}.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no JSON, or a prompt without its category, which is named.
    """
    found = _json(path, dict, 'an object {prompt: {"category": kind}}')
    prompts = []
    for text, entry in found.items():
        category = entry.get("category") if isinstance(entry, dict) else None
        if not text.strip() or not isinstance(category, str):
            raise ValueError(
                f'{path}: prompt {text!r}: expected {{"category": kind}}, got {entry!r}'
            )
        prompts.append(Prompt(text.strip(), category))
    return tuple(prompts)


def coco(path: str | Path) -> tuple[str, ...]:
    """COCO's captions in the order of ``captions_val2014.json``.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no JSON, no list "annotations", or one without a caption, by its number.
    """
    found = _json(path, dict, 'an object with a list "annotations"')
    entries = found.get("annotations")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{path}: "annotations" must be a list, got {entries!r:.60}')
    captions = []
    for number, entry in enumerate(entries):
        text = entry.get("caption") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f'{path}: annotations[{number}]: expected a text "caption", got '
                f"{entry!r:.60}"
            )
        captions.append(text.strip())
    return tuple(captions)


def _split(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _checked(label: np.ndarray, classes: int) -> np.ndarray:
    label = np.asarray(label)
    if label.ndim != 1 or label.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be whole numbers (n,), got {label.dtype} {label.shape}"
        )
    if label.size and not 0 <= label.min() <= label.max() < classes:
        raise ValueError(
            f"labels must be 0 .. {classes - 1}, got {label.min()} .. {label.max()}"
        )
    return label.astype(np.int32)


def _json(path: str | Path, kind: type, wanted: str) -> Any:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path}: not JSON ({e}); expected {wanted}") from e
    if not isinstance(found, kind) or not found:
        raise ValueError(f"{path}: expected {wanted}, got {found!r:.60}")
    return found
