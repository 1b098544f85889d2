"""Text for text-conditioned models: vocabularies, captions of digits, prompt files.

A model pretrained on ``misaligned`` captions, or without some combinations of colour and
digit (``inked``), violates prompts as large text-to-image models do; the effect of
fine-tuning on a reward is then measurable.
"""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxpapers.data import files

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
"""Null token: padding, and as a whole prompt unconditional generation."""

_INKS = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], np.float32)
_MAX_JSON = 1 << 28  # bytes; COCO's captions have a fourth of it
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


class Vocabulary:
    """Word-level tokenizer; token 0 is ``NULL``.

    Case and punctuation are ignored.

    Args:
      words: token i + 1 is words[i].
      ignored: stop words without a token; by default the articles.

    Raises:
      ValueError: no words, duplicates, a string that is not a single lower-case word, or
        a word that is also ignored.

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
            raise ValueError(f"words must be unique, got twice: {', '.join(twice)}")
        if not self.words:
            raise ValueError("a vocabulary must have at least one word, got none")

    @classmethod
    def of(
        cls, texts: Iterable[str], ignored: Iterable[str] = ARTICLES
    ) -> "Vocabulary":
        """Vocabulary of the words in some texts, in alphabetical order."""
        ignored = frozenset(ignored)
        return cls(
            sorted({w for text in texts for w in _split(text)} - ignored), ignored
        )

    def __len__(self) -> int:
        """Rows of an embedding table: one per word, and the null token."""
        return len(self.words) + 1

    def encode(self, text: str, length: int | None = None) -> np.ndarray:
        """Tokens of a text, int32 (length,).

        Args:
          text: words of the vocabulary.
          length: to pad to with the null token; None: no padding.

        Raises:
          ValueError: an unknown word (the message lists similar ones), no word, or more
            words than ``length``.
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
        """Tokens of texts, int32 (texts, length).

        Args:
          texts: at least one.
          length: to pad to; None: the longest text.

        Raises:
          ValueError: no texts, or as ``encode``.
        """
        if not len(texts):
            raise ValueError("texts must have at least one, got none")
        rows = [self.encode(text) for text in texts]
        length = max(map(len, rows)) if length is None else length
        return np.stack([self.encode(text, length) for text in texts])

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of one row of tokens, without the null token.

        Raises:
          ValueError: a token outside the vocabulary.
        """
        tokens = np.asarray(tokens, int).reshape(-1)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < len(self):
            raise ValueError(f"tokens must be 0 .. {len(self) - 1}, got {tokens}")
        return " ".join(self.words[token - 1] for token in tokens if token != NULL)


class Inked(NamedTuple):
    """Captioned images of coloured digits.

    Attributes:
      image: float32 (n, height, width, 3) in [0, 1], coloured on black.
      digit: class, int32 (n,).
      colour: index into ``COLOURS``, int32 (n,).
      caption: correct but for the ``held_out`` combinations.
    """

    image: np.ndarray
    digit: np.ndarray
    colour: np.ndarray
    caption: tuple[str, ...]


class Prompt(NamedTuple):
    """A prompt and its category."""

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
    """Labels with noise: each is redrawn uniformly with probability ``share``.

    The redrawn label may be the old one. The noise is fixed, so a model can memorise it;
    it is the defect that fine-tuning is to repair.

    Args:
      label: 0 .. classes - 1.
      classes: number of classes.
      share: probability of redrawing a label.
      seed: of the draws.

    Returns:
      int32, of the shape of ``label``.

    Raises:
      ValueError: labels out of range, or a share outside [0, 1].
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
    """Combinations without a correct caption: (digit + colour) mod 5 = 0.

    Eight of the 40, two digits of each colour.
    """
    return (np.asarray(digit) + np.asarray(colour)) % 5 == 0


def colour_prompts() -> tuple[str, ...]:
    """The 40 captions "a red zero" .. "a yellow nine", at index 10 colour + digit."""
    return tuple(f"a {colour} {digit}" for colour in COLOURS for digit in DIGITS)


def inked(image: np.ndarray, label: np.ndarray, seed: int) -> Inked:
    """Digits coloured red, green, blue or yellow, with captions like "a green seven".

    Colours are drawn uniformly. The caption of a ``held_out`` combination is drawn
    uniformly from the 39 others, so no image of it is captioned correctly.

    Args:
      image: float (n, height, width, 1) in [0, 1], 0 for background.
      label: the digits, (n,).
      seed: of the colours and the captions.

    Raises:
      ValueError: images of another shape or range, or labels other than 0 .. 9.
    """
    label = _checked(label, 10)
    if image.ndim != 4 or image.shape[-1] != 1 or len(image) != len(label):
        raise ValueError(
            f"images must have shape ({len(label)}, height, width, 1), got "
            f"{image.shape}"
        )
    if image.size and not (image.min() >= 0 and image.max() <= 1):
        raise ValueError("images must lie in [0, 1]; try images.from_signed")
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, len(COLOURS), len(label)).astype(np.int32)
    prompts = colour_prompts()
    number = 10 * colour + label
    wrong = (number + rng.integers(1, len(prompts), len(label))) % len(prompts)
    number = np.where(held_out(label, colour), wrong, number)
    return Inked(
        (image * _INKS[colour][:, None, None]).astype(np.float32),
        label,
        colour,
        tuple(prompts[i] for i in number),
    )


def drawbench(path: str | Path) -> tuple[Prompt, ...]:
    """DrawBench's prompts from ``data_meta.json``: {prompt: {"category": category}}.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not JSON, or a prompt (named in the message) without a category.
    """
    entries = _json(path, dict, 'an object {prompt: {"category": category}}')
    prompts = []
    for text, entry in entries.items():
        category = entry.get("category") if isinstance(entry, dict) else None
        if not text.strip() or not isinstance(category, str):
            raise ValueError(
                f'{path}: prompt {text!r}: expected {{"category": category}}, got '
                f"{entry!r}"
            )
        prompts.append(Prompt(text.strip(), category))
    return tuple(prompts)


def coco(path: str | Path) -> tuple[str, ...]:
    """COCO's captions in the order of ``captions_val2014.json``.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not JSON, no list "annotations", or an annotation (its index is in the
        message) without a caption.
    """
    entries = _json(path, dict, 'an object with a list "annotations"').get(
        "annotations"
    )
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
            f"labels must be integers (n,), got {label.dtype} {label.shape}"
        )
    if label.size and not 0 <= label.min() <= label.max() < classes:
        raise ValueError(
            f"labels must be 0 .. {classes - 1}, got {label.min()} .. {label.max()}"
        )
    return label.astype(np.int32)


def _json(path: str | Path, kind: type, expected: str) -> Any:
    data = files.read(path, most=_MAX_JSON)
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e}); expected {expected}") from e
    if not isinstance(value, kind) or not value:
        raise ValueError(f"{path}: expected {expected}, got {value!r:.60}")
    return value
